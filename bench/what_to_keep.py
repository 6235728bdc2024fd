"""What the chapter "What to keep" shows: a new skill for lab-s, with and without replay of old questions.

    python bench/what_to_keep.py        # writes bench/results/what_to_keep.json, about 8 CPU-minutes

Five arms learn the same skill in the same number of steps; in four of them a tenth of the rows is old.
`none`: new rows only.
`all`: rows of all old skills, with their true answers.
`own`: questions of all old skills, with the answers of the base itself (`harvest`).
`lists`: rows of the six list skills only.
`others`: rows of all old skills but those six.
All arms have the same rates and seeds, and all are shown. `GAIN`, at which they are compared,
and the groups of skills were chosen from runs without replay (seed 0) before any run with it."""
import json, random, time
from functools import cache
from pathlib import Path
from statistics import fmean
import torch
import ftlab
from ftlab.core.io import write_atomically
from ftlab.core.record import versions
from ftlab.core.scorers import WORLD, exact_match
from ftlab.evaluators.harvest import harvest
from ftlab.lab.world import LISTS, OLD
from ftlab.trainers.callbacks import Every

TASK, SHARE, STEPS, ROWS, GAIN = 'new-procedure', .1, 60, 32, .6
SEEDS = dict.fromkeys((1e-3, 5.62e-4), (50, 51, 52)) # by rate
AT = {20, 30, 40, 50}
LIST_SKILLS = [s for s in OLD if s in LISTS]
OTHERS = [s for s in OLD if s not in LISTS]
POOL = 300 # old rows to draw from: more than the mixture takes, so that none is taken twice
ARMS = dict(none=[], all=OLD, own=OLD, lists=LIST_SKILLS, others=OTHERS)
OUT = Path(__file__).parent/'results'/'what_to_keep.json'

@cache
def replayed(arm:str, seed:int) -> tuple[dict, ...]:
    "Return the old rows from which an arm draws, all from the split that the base was trained on"
    names = ARMS[arm]
    rows = [r for s in names for r in WORLD.rows(s, -(-POOL//len(names)), 'train', seed)]
    if arm == 'own':
        return tuple(harvest(*ftlab.load('lab-s'), [r['prompt'] for r in rows], seed))
    return tuple(dict(prompt=r['prompt'], response=r['response']) for r in rows)

def rows_of(arm:str, seed:int):
    "Return the training data of an arm"
    n, new = STEPS*ROWS, ftlab.data(TASK, seed=seed)
    if not ARMS[arm]:
        return ftlab.mix([(new, 1.)], n=n, seed=seed)
    old = list(replayed(arm, seed))
    random.Random(seed).shuffle(old)
    old = ftlab.data(dict(train=old, validation=old[:1], test=old[:1]))
    return ftlab.mix({'new': (new, 1 - SHARE), 'old': (old, SHARE)}, n=n, seed=seed)

def asked(seed:int) -> dict[str, list[dict]]:
    "Return the test questions of a seed: more of the list skills, which the new skill resembles"
    return ({TASK: ftlab.data(TASK, seed=seed).test[:100]}
            | {s: WORLD.rows(s, 40 if s in LIST_SKILLS else 12, 'test', seed) for s in OLD})

def shares(model, tok, questions:dict) -> dict[str, float]:
    "Return the share of right answers of each set"
    return {s: exact_match(model, tok, rows) for s, rows in questions.items()}

def one(arm:str, rate:float, seed:int) -> list[dict]:
    "Fine-tune once; return step, gain, forgetting and what each old skill has lost, on the way"
    model, tok = ftlab.load('lab-s')
    questions = asked(seed)
    before = shares(model, tok, questions)

    def measure(state):
        if state.step == 0:
            return dict(gain=0., forgetting=0., lost=dict.fromkeys(OLD, 0.))
        now = shares(state.model, tok, questions)
        lost = {s: round(before[s] - now[s], 4) for s in OLD}
        return dict(gain=round(now[TASK] - before[TASK], 4),
                    forgetting=round(fmean(lost.values()), 4), lost=lost)

    run = ftlab.fit(model, tok, rows_of(arm, seed), ftlab.methods.full(), steps=STEPS,
                    batch_size=ROWS, lr=rate, seed=seed, progress=False,
                    callbacks=[Every(AT, measure)])
    return run.path

def main() -> None:
    torch.set_num_threads(1)
    kept = json.loads(OUT.read_text()) if OUT.exists() else dict(runs={}, cpu_seconds=0.)
    runs, before = kept['runs'], kept['cpu_seconds']
    for rate, seeds in SEEDS.items():
        for seed in seeds:
            for arm in ARMS:
                of = runs.setdefault(f'{rate:g}', {}).setdefault(arm, {})
                if str(seed) not in of: # an interrupted run of this script goes on
                    of[str(seed)] = path = one(arm, rate, seed)
                    print(rate, seed, arm, path[-1]['gain'], path[-1]['forgetting'], flush=True)
                    write(runs, before)

def write(runs:dict, before:float) -> None:
    "Write what is known so far"
    result = dict(model='lab-s', task=TASK, share=SHARE, steps=STEPS, rows=ROWS, gain=GAIN,
                  list_skills=LIST_SKILLS, runs=runs,
                  seeds={f'{r:g}': s for r, s in SEEDS.items()},
                  cpu_seconds=round(before + time.process_time(), 1), threads=1,
                  versions=versions())
    write_atomically(OUT, lambda tmp: tmp.write_text(json.dumps(result) + '\n'))

if __name__ == '__main__':
    main()
