"""What it saves to train rows, columns or blocks instead of scattered entries, as many of them.

On a random Llama of 100 million parameters, at 5% of them. `python bench/slices.py` writes
bench/results/slices.json in about two minutes on quiet cores. Time: all methods in turns in one process on one model,
the second step of each, in CPU-seconds of one thread; ratios to SHiRA within a round. With two threads, most of the
CPU-seconds of small products are spent waiting for the other thread if the machine is busy. A step is forward,
backward and AdamW.
Memory: `fit` with each method in a process of its own, by the system's own mark, above the loaded
model, and with it. `fit` begins the mark anew before its first step, so what a selection holds for a moment is not in
it. SMT is measured with random blocks, and again with its own; so are full fine-tuning and subsets of another form, of
which those that read rows read two. Memory hangs little on what else
the machine does, so `python bench/slices.py memory` measures it alone and keeps the times of the file;
`python bench/slices.py memory full loki` keeps the other peaks as well, if they are of the same processor and torch:
each peak says of which."""
import json, os, statistics, subprocess, sys, time
from pathlib import Path
from native import THREADS, machine, peak, save
import native_training
from native_training import by_ftlab, load, matrices

BUDGET, ROWS, TOKENS, ROUNDS = .05, 2, 64, 3
FILE = Path(__file__).parent/'results'/'slices.json'
ARMS = ('shira', 's2ft', 's2ft down', 'slicefine', 'smt', 'lora')
OTHERS = ('smt with selection', 'full', 'neuroada', 'sara', 'spt', 'goodvibe', 'loki', 'spafit',
          'surgical_fisher', 'layernorm_tuning', 'lape')

def recipe(arm, model):
    from ftlab import methods
    total = sum(p.numel() for p in model.parameters())
    inside = sum(a*b for a, b in matrices(model).values())
    rank = round(BUDGET*total/sum(a + b for a, b in matrices(model).values()))
    return {'shira': lambda: methods.shira(BUDGET*total/inside),
            's2ft': lambda: methods.s2ft(budget=BUDGET, tune=('o', 'down')),
            's2ft down': lambda: methods.s2ft(budget=BUDGET),
            'slicefine': lambda: methods.slicefine(budget=BUDGET, every=0),
            'smt': lambda: methods.smt(BUDGET, 64, 'random'),
            'smt with selection': lambda: methods.smt(BUDGET, 64, rows=2),
            'lora': lambda: methods.lora(rank), 'full': lambda: methods.full(),
            'neuroada': lambda: methods.neuroada(budget=BUDGET),
            'sara': lambda: methods.sara(budget=BUDGET),
            'spt': lambda: methods.spt(BUDGET, r=32, rows=2), # rank 8 cannot spend it
            'goodvibe': lambda: methods.goodvibe(budget=BUDGET, rows=2),
            'loki': lambda: methods.loki(budget=BUDGET, rows=2),
            'spafit': lambda: methods.spafit(budget=BUDGET),
            'surgical_fisher': lambda: methods.surgical_fisher(budget=BUDGET),
            'layernorm_tuning': lambda: methods.layernorm_tuning(), # all norms
            # a language's neurons need rows of another; where they lie changes no size
            'lape': lambda: methods.lape(by='random', budget=BUDGET)}[arm]()

class Trained:
    "How many parameters train"

    def before_fit(self, state):
        self.count = sum(p.numel() for p in state.attached.parameters().values())

def timed():
    "Seconds of a step of each method, round by round, and what trains"
    import torch
    from ftlab.adapters.attach import attach
    model, _ = load('llama_100m')
    ids = torch.randint(0, 500, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    times, trained = {a: [] for a in ARMS}, {}

    def once(arm, steps):
        r = recipe(arm, model)
        att = attach(model, r.select(model, None, 0), r.delta)
        ps = list(att.parameters().values())
        opt, out = torch.optim.AdamW(ps, lr=1e-6), []
        for _ in range(steps):
            t = time.process_time()
            with att.recompute():
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            opt.step()
            opt.zero_grad()
            out.append(time.process_time() - t)
        trained[arm] = sum(p.numel() for p in ps)
        att.detach()
        model.requires_grad_(True)
        return min(out[1:])

    for _ in range(ROUNDS):
        for arm in ARMS:
            times[arm].append(once(arm, 2))
        print({a: round(t[-1], 2) for a, t in times.items()}, file=sys.stderr, flush=True)
    ratios = {a: [x/y for x, y in zip(times[a], times['shira'])] for a in ARMS}
    ratio = {a: dict(median=round(statistics.median(r), 2), rounds=[round(x, 2) for x in r])
             for a, r in ratios.items()}
    return dict(rows=ROWS, tokens=TOKENS, rounds=ROUNDS, trained=trained, time_ratio=ratio,
                seconds={a: round(statistics.median(t), 3) for a, t in times.items()})

def child(arm):
    import torch
    import ftlab.trainers.fit # noqa: F401 - what is imported is not what training holds
    torch.set_num_threads(1 if arm == 'time' else THREADS)
    if arm == 'time':
        return print(json.dumps(dict(timed(), torch=torch.__version__)))
    native_training.STEPS = 2
    model, tok = load('llama_100m')
    held, r = 4*sum(p.numel() for p in model.parameters()), recipe(arm, model)
    trained = Trained()
    above = peak(lambda: by_ftlab(model, tok, r, (trained,)))
    print(json.dumps(dict(above_model=above, with_model=above + held, trained=trained.count,
                          torch=torch.__version__)))

def run(arm):
    threads = '1' if arm == 'time' else str(THREADS)
    env = {**os.environ, 'OMP_NUM_THREADS': threads, 'HF_HUB_OFFLINE': '1',
           **({} if arm == 'time' else {'MALLOC_MMAP_THRESHOLD_': '65536'})}
    r = subprocess.run([sys.executable, __file__, arm], env=env, stdout=subprocess.PIPE, text=True)
    if r.returncode:
        sys.exit(f'{arm}: ended with {r.returncode}')
    print(arm, r.stdout.splitlines()[-1], flush=True)
    return json.loads(r.stdout.splitlines()[-1])

def main(memory=False, *arms):
    "Measure; what was measured is saved at once, so that a run that was cut off is not lost"
    if memory:
        result = json.loads(FILE.read_text())
    else:
        found = run('time')
        result = dict(budget=BUDGET, **machine(found.pop('torch')), time_threads=1,
                      targets=dict(time='at most 0.7 of SHiRA', peak='at most 0.8 of SHiRA'),
                      **found)
        save(FILE, result)
    kept = result.get('peak_bytes', {}) if arms else {}
    if arms and 'shira' not in kept:
        arms = dict.fromkeys(('shira', *arms)) # the ratios are to it
    for arm in arms or (*ARMS, *OTHERS):
        kept[arm] = run(arm)
        kept[arm] |= machine(kept[arm]['torch'])
        if other := [a for a, b in kept.items() if not same_machine(b, kept[arm])]:
            sys.exit(f'{", ".join(other)}: of another processor or torch; measure them too')
        ratios = {k: {a: round(b[k]/kept['shira'][k], 2) for a, b in kept.items()}
                  for k in ('above_model', 'with_model')}
        save(FILE, result | dict(peak_bytes=kept, peak_ratio=ratios))

def same_machine(one, two):
    return all(one.get(k) == two.get(k) for k in ('cpu', 'torch'))

if __name__ == '__main__':
    child(sys.argv[1]) if sys.argv[1:2] not in ([], ['memory']) else main(*sys.argv[1:])
