"""How OpenMP's threads should wait: seconds of 50 small steps and of a round of questions.

One process a setting, in turns.

    python bench/threads.py           # writes bench/results/threads.json

Threads that sleep at once are slow to wake, and a small step has hundreds of waits; threads that
spin for long take the processor from others. So each setting is tried on a machine that is idle but
for it, and beside as many busy processes as there are processors."""
import json, os, platform, subprocess, sys
from pathlib import Path
from statistics import median

SETTINGS = dict(one_thread=dict(OMP_NUM_THREADS='1'),
                sleep=dict(OMP_WAIT_POLICY='passive', GOMP_SPINCOUNT='0'),
                short_spin=dict(OMP_WAIT_POLICY='passive', GOMP_SPINCOUNT='20000'),
                long_spin=dict(OMP_WAIT_POLICY='active'))
TURNS = 3

CODE = '''
import ftlab, time, torch
model, tok = ftlab.load('lab-s')
data = ftlab.data('new-language', n=500)
ask = lambda: ftlab.skills(model, 10, tok=tok)
train = lambda steps: ftlab.fit(model, tok, data, steps=steps, progress=False)
train(5)
ask()
t = time.perf_counter()
train(50)
u = time.perf_counter()
ask()
print(torch.get_num_threads(), u - t, time.perf_counter() - u)
'''

def once(setting:dict) -> tuple[int, float, float]: # threads, seconds to train, seconds to ask
    own = ('OMP_NUM_THREADS', 'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')
    env = {k: v for k, v in os.environ.items() if k not in own}
    env |= dict(HF_HUB_OFFLINE='1') | setting
    out = subprocess.run([sys.executable, '-c', CODE], env=env, capture_output=True, text=True,
                         check=True).stdout.split()
    return int(out[0]), float(out[1]), float(out[2])

def rounds(busy:int) -> dict:
    "Every setting `TURNS` times, in turns, beside `busy` processes that only count"
    others = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(busy)]
    try:
        turns = [{n: once(s) for n, s in SETTINGS.items()} for _ in range(TURNS)]
    finally:
        for p in others:
            p.kill()
    return {n: dict(threads=turns[0][n][0])
            | {what: dict(median=round(median(v), 2), all=[round(x, 2) for x in v])
               for i, what in ((1, 'train'), (2, 'ask')) for v in [[t[n][i] for t in turns]]}
            for n in SETTINGS}

if __name__ == '__main__':
    import torch
    found = dict(settings=SETTINGS, idle=rounds(0), busy=rounds(os.cpu_count()),
                 processors=os.cpu_count(), model='lab-s', steps=50,
                 versions=dict(python=platform.python_version(), torch=torch.__version__))
    out = Path(__file__).parent/'results'/'threads.json'
    tmp = out.with_suffix('.tmp')
    tmp.write_text(json.dumps(found, indent=1) + '\n')
    tmp.replace(out)
    for when in ('idle', 'busy'):
        print(when, {n: (r['train']['median'], r['ask']['median']) for n, r in found[when].items()})
