"""Make lab-l: a race of recipes, one long run of the winner, and what it can do.

    python bench/lab_l.py runs/lab-l                                       by steps, on the CPU, resumable (hours)
    python bench/lab_l.py OUT --seconds 320 --device cuda --workers 14 --compiled   in that time, race included
    python bench/lab_l.py OUT --seconds 90 --workers 1 --tiny              a rehearsal
    python bench/lab_l.py OUT --check 20 --device cuda --workers 14        how fast text and steps are

Writes race.json, log.json, skills.json, model.safetensors (float16) and two earlier states, part-10
and part-40. """
import argparse
import json
import os
import time
from pathlib import Path
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
import torch
from ftlab.lab.feed import Feed
from ftlab.lab.large import CHANGES, pretrain_large, train
from ftlab.lab.stacked import Plan

TINY = Plan(layers=2, hidden=64, heads=2, inner=96, rows=16)


def speed(a):
    "Tokens a second of the text alone, and of steps with and without compiled layers"
    feed = Feed(a.workers)
    start = time.time()
    k = 0
    while time.time() - start < 3:
        feed.chunk('new', k)
        feed.chunk('old', k)
        k += 1
    text = 2*k*256*128/(time.time() - start)
    found = dict(text=round(text))
    for name, change in dict(base={}, wide=CHANGES['wide']).items():
        for compiled in (False, True):
            plan = TINY if a.tiny else Plan(**change)
            before = time.time()
            model, log = train(plan, feed, seconds=a.check/4, device=a.device, compiled=compiled)
            found[f'{name}, compiled: {compiled}'] = dict(
                tokens=round(log[-1]['tokens']/log[-1]['seconds']),
                startup=round(time.time() - before - a.check/4, 1), loss=log[-1]['loss'])
    feed.close()
    print(json.dumps(found, indent=1))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', type=Path)
    p.add_argument('--seconds', type=float, help='of everything; without it, by steps')
    p.add_argument('--device', default='cpu')
    p.add_argument('--workers', type=int, default=0, help='processes that draw text')
    p.add_argument('--compiled', action='store_true')
    p.add_argument('--trial', type=float, default=8., help='seconds of each trial of the race')
    p.add_argument('--racing', type=float, default=.4, help='part of the time that the race may take')
    p.add_argument('--ending', type=float, default=25., help='seconds kept for the last evaluation')
    p.add_argument('--tiny', action='store_true', help='a tiny model and few questions')
    p.add_argument('--check', type=float, help='measure speed for so many seconds instead')
    a = p.parse_args()
    torch.set_float32_matmul_precision('high')
    if a.check:
        speed(a)
    else:
        few = dict(plan=TINY, n=4, n_quick=2) if a.tiny else {}
        pretrain_large(a.out, a.seconds, device=a.device, workers=a.workers, trial=a.trial,
                       racing=a.racing, ending=a.ending, compiled=a.compiled, **few)
