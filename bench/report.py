"""How much memory and time a report takes: of a 100M-parameter Llama whose weights all moved, and of lab-s.

    python bench/report.py            # writes bench/results/report.json

Each case runs in a process of its own. `peak_bytes` is the system's own figure (VmHWM), cleared
before the report begins; it counts pages of memory-mapped files, which the system takes back when
it needs them. `peak_own_bytes` is what the process alone holds (RssAnon), looked at every 10 ms."""
import json, platform, subprocess, sys, tempfile, threading, time
from pathlib import Path

def _peak(what):
    """Bytes above the start that `what()` took at its highest, its seconds of processor time, and
    what it gave back"""
    from ftlab.trainers.watch import PeakMemory
    import torch
    own = lambda: next(int(l.split()[1])*1024
                       for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('RssAnon'))
    seen, stop = [own()], threading.Event()
    def watch():
        while not stop.wait(.01):
            seen.append(own())
    threading.Thread(target=watch, daemon=True).start()
    with PeakMemory(torch.device('cpu')) as m:
        t, c = time.time(), time.process_time()
        out = what()
        stop.set()
        return dict(peak_bytes=m.bytes(), peak_own_bytes=max(seen) - seen[0], start_bytes=m.start,
                    seconds=round(time.time() - t, 1),
                    cpu_seconds=round(time.process_time() - c, 1)), out

def large(folder:Path) -> dict:
    """A random Llama of 100M numbers (12 blocks of 768, 32,000 words), all of them nudged,
    as a run whose originals are in a file"""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from ftlab.adapters.attach import attach
    from ftlab.adapters.store import identity
    from ftlab.adapters.select import everything
    from ftlab.core.data import data
    from ftlab.core.recipe import Recipe
    from ftlab.lab.models import lab_tokenizer
    from ftlab.instruments.report import report
    from ftlab.trainers.reference import Originals
    from ftlab.trainers.run import Change, Run
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, hidden_size=768, intermediate_size=2048,
                                         num_hidden_layers=12, num_attention_heads=12,
                                         num_key_value_heads=12, max_position_embeddings=512,
                                         tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
                                         eos_token_id=2)).eval()
    base = identity(model)
    chosen = everything(model)
    att = attach(model, chosen,
                 originals=Originals(folder/'originals.safetensors',
                                     dict(model.named_parameters())))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(.01*torch.randn_like(p)*p.std())
    rows = data('new-procedure', n=100)
    plain = [dict(prompt=r['prompt'], response=r['response']) for r in rows.test]
    d = data(dict(train=plain[:100], test=plain[100:200]))
    recipe = Recipe('full')
    run = Run(model, lab_tokenizer(), d, recipe, Change(att, base, recipe), [],
              dict(seconds=None, tokens=None, peak_bytes=None, trainable=None, head=0), {},
              folder=folder)
    # old data of its own, so that no lab skill is asked
    cost, rep = _peak(lambda: report(run, d, items=50, old_items=50, matrices=6))
    return dict(cost, parameters=model.num_parameters(), model_bytes=4*model.num_parameters(),
                matrices=rep.json()['change']['matrices'], moved=rep.json()['change']['moved'])

def lab(folder:Path) -> dict:
    """lab-s after 100 steps of new-language, 100 questions of each of 23 skills:
    a first report and one with the base's answers kept"""
    import ftlab
    from ftlab.instruments.report import report
    model, tok = ftlab.load('lab-s')
    run = ftlab.fit(model, tok, ftlab.data('new-language'), steps=100, lr=1e-3, progress=False,
                    out=folder)
    (first, _), (again, rep) = _peak(lambda: report(run)), _peak(lambda: report(run))
    return dict(first=first, again=again, parameters=model.num_parameters(), headline=rep.headline)

if __name__ == '__main__':
    if len(sys.argv) > 1:
        with tempfile.TemporaryDirectory() as tmp:
            print(json.dumps(dict(large=large, lab=lab)[sys.argv[1]](Path(tmp))))
    else:
        import os, torch, transformers
        env = os.environ | dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='passive')
        found = {k: json.loads(subprocess.run([sys.executable, __file__, k], env=env, check=True,
                                              capture_output=True, text=True).stdout) for k in ('large', 'lab')}
        found['versions'] = dict(python=platform.python_version(), torch=torch.__version__,
                                 transformers=transformers.__version__)
        found['threads'] = 1
        out = Path(__file__).parent/'results'/'report.json'
        out.write_text(json.dumps(found, indent=1) + '\n')
        print(json.dumps(found, indent=1))
