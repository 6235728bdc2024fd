"""How fast the views of ftlab.instruments.explore respond to their controls, on lab-s.

    python bench/explore.py            # about a minute; writes bench/results/explore.json

Each view is made interactive, and one of its controls is moved to 24 new values. The response time
is the time from the change of the control to the new picture in the widget, on the kernel's side:
the model's computation, the drawing, and the widget's messages. `first` is the time to create the
view. A reader waits for seconds of the clock; beside them is the processor time, which depends less
on how busy the machine is."""
import json, os, platform, statistics, sys, time
from pathlib import Path
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
import matplotlib, torch, transformers, ftlab, ipywidgets
from ftlab.instruments import explore
from ftlab.core.io import write_atomically
from ftlab.instruments.compare import Comparison
from ftlab.map import measured

CHANGES, TARGET = 24, .3

def timed(what):
    "(seconds by the clock, of the processor, and what came of it)"
    t, c = time.perf_counter(), time.process_time()
    out = what()
    return time.perf_counter() - t, time.process_time() - c, out

def responses(view, handle, places) -> dict:
    "Move one handle through new places, after one move that warms up"
    view.live()
    leaf = view.leaves[handle][0]
    leaf.value = places[0]
    rows = []
    for place in places[1:]:
        before = view.shown.value
        wall, cpu, _ = timed(lambda: setattr(leaf, 'value', place))
        assert view.shown.value != before and view.error is None, (handle, place, view.error)
        rows.append((wall, cpu))
    view.close()
    wall, cpu = (sorted(r[i] for r in rows) for i in (0, 1))
    said = lambda v: dict(median=round(statistics.median(v), 4), low=round(v[len(v)//10], 4),
                          high=round(v[-1 - len(v)//10], 4), longest=round(v[-1], 4))
    return dict(handle=handle, changes=len(rows), seconds=said(wall), cpu_seconds=said(cpu),
                within_target=sum(w < TARGET for w in wall))

def cases():
    "name -> (how the view is made, the handle that is moved, its places)"
    model, tok = ftlab.load('lab-s')
    base, _ = ftlab.load('lab-s')
    data = ftlab.data('new-procedure')
    run = ftlab.fit(model, tok, data, steps=60, lr=1e-3, progress=False)
    row = data.test[0]
    n = range(CHANGES + 1)
    alphas = [round(.05*(i + 1), 2) for i in range(CHANGES + 5) if i != 19][:CHANGES + 1]
    return dict(tradeoff=(lambda: explore.tradeoff(
        Comparison.read(measured('compare_lab_s/result.json'))), 'gain',
                          [(60. + i, 97.) for i in n]),
                layers=(lambda: explore.layers(run), 'alpha', alphas),
                mask=(lambda: explore.mask(base, tok, data.train[:64]), 'density',
                      [i + 8 for i in n]),
                spectrum_rank=(lambda: explore.spectrum(run), 'rank', [i + 9 for i in n]),
                spectrum_matrix=(lambda: explore.spectrum(run), 'matrix',
                                 base_matrices(base)[1:CHANGES + 2]),
                prices=(lambda: explore.prices(run.model, tok, row['prompt'],
                                               row['response'], base),
                        'chance', [round(.05*(i % 18), 2) for i in n]),
                side_by_side=(lambda: explore.side_by_side(run), 'example',
                              list(explore._skill_examples(tok))[:CHANGES + 1]))

def base_matrices(model):
    from ftlab.core.anatomy import anatomy
    return anatomy(model).matrices()

def main():
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    out = {}
    for name, (make, handle, places) in cases().items():
        first, _, view = timed(make)
        out[name] = dict(responses(view, handle, places), first=round(first, 3))
        r = out[name]
        print(f'{name:16} median {1000*r["seconds"]["median"]:4.0f} ms '
              f'[{1000*r["seconds"]["low"]:.0f}, {1000*r["seconds"]["high"]:.0f}], processor '
              f'{1000*r["cpu_seconds"]["median"]:4.0f} ms, {r["within_target"]} of {r["changes"]} '
              f'below {1000*TARGET:.0f} ms', flush=True)
    result = dict(views=out, target_seconds=TARGET, low_and_high='the tenth and the ninetieth of a '
                  'hundred', threads=1, cores=os.cpu_count(), machine=platform.processor()
                  or platform.machine(),
                  load=dict(before=round(load, 1), after=round(os.getloadavg()[0], 1),
                            note='processes that wanted a core, this one among them after'),
                  versions=dict(python=platform.python_version(), torch=torch.__version__,
                                transformers=transformers.__version__,
                                matplotlib=matplotlib.__version__,
                                ipywidgets=ipywidgets.__version__))
    if '--dry' not in sys.argv:
        write_atomically(Path(__file__).parent/'results'/'explore.json',
                         lambda p: p.write_text(json.dumps(result, indent=1) + '\n'))

if __name__ == '__main__':
    main()
