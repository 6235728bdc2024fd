"""What the chapter "Which parameters?" shows: 1% of lab-s chosen in several ways, at four rates, two seeds.

    python bench/which_parameters.py         # writes bench/results/which_parameters.json, about 5 CPU-minutes
    python bench/which_parameters.py full    # one method alone

`random` and `gradient` train the same number of single entries, anywhere in attention and MLP, and differ
only in which. `lora` has the rank nearest the budget, `full` is everything. Gain and forgetting are shares of
test questions whose whole answer is the likeliest, measured on the way of each run. Finished runs are kept in the
file, so the same call goes on."""
import json
import sys
import time
from functools import cache
from pathlib import Path
from statistics import fmean

import ftlab
from ftlab import methods
from ftlab.core.io import write_atomically
from ftlab.core.record import versions
from ftlab.core.scorers import teacher_forced
from ftlab.instruments.explore import lab_questions, question_batches
from ftlab.trainers.callbacks import Every

OUT = Path(__file__).parent/'results'/'which_parameters.json'
SEEDS = (30, 31)
RATES = dict(random=(1e-2, 3.16e-2, 1e-1, 3.16e-3), gradient=(3.16e-3, 1e-2, 3.16e-2, 1e-3),
             lora=(1e-2, 3.16e-3, 1e-3, 3.16e-2), full=(1e-3, 3.16e-4, 3.16e-3, 1e-4))
METHODS = dict(random="neuroada(budget=.01, by='random', each='model')",
               gradient="neuroada(budget=.01, by='gradient', each='model')",
               lora='lora(r=1)', full='full')
STEPS, EVERY, BATCH, NEW, OLD = 48, 16, 16, 100, 6


@cache
def questions() -> tuple[dict, dict]:
    "Batches of new questions and of every old skill that is judged word for word; and how many the base has right"
    model, tok = ftlab.load('lab-s')
    new = ftlab.data('new-procedure').test[:NEW]
    asked = dict(new=question_batches(new, tok), old=question_batches(lab_questions(['new-procedure'], OLD), tok))
    return asked, {k: right(model, b) for k, b in asked.items()}


def right(model, batches) -> float:
    "The share of answers that are the likeliest, word for word"
    model.eval()
    return fmean(float(x) for b in batches for x in teacher_forced(model, b))


def run(name: str, rate: float, seed: int) -> dict:
    "Train once: gain and forgetting on the way, what it cost"
    model, tok = ftlab.load('lab-s')
    (asked, base), start = questions(), time.process_time()

    def measure(state):
        now = {k: right(state.model, b) for k, b in asked.items()}
        return dict(gain=round(now['new'] - base['new'], 4), forgetting=round(base['old'] - now['old'], 4))

    recipe = methods.get(METHODS[name])
    out = ftlab.fit(model, tok, ftlab.data('new-procedure'), recipe, steps=STEPS, lr=rate,
                    seed=seed, batch_size=BATCH, schedule='constant', progress=False,
                    callbacks=(Every(EVERY, measure),))
    path = [[r['step'], r['gain'], r['forgetting']] for r in out.path]
    return dict(path=path, trainable=out.cost['trainable'], saved=out.delta.nbytes,
                cpu_seconds=round(time.process_time() - start, 1))


def wanted(names):
    "Each run once, in an order in which an interrupted script has all methods"
    return [(n, rate, seed) for rates in zip(*(RATES[n] for n in names))
            for seed in SEEDS for n, rate in zip(names, rates)]


def main(names) -> None:
    found = json.loads(OUT.read_text()) if OUT.exists() else dict(runs={}, cost={})
    for name, rate, seed in wanted(names):
        kept = found['runs'].setdefault(name, {}).setdefault(f'{rate:g}', {})
        if str(seed) in kept:
            continue
        out = run(name, rate, seed)
        kept[str(seed)] = out.pop('path')
        found |= dict(seeds=list(SEEDS), steps=STEPS, batch_size=BATCH, methods=METHODS,
                      versions=versions())
        found['cost'][name] = out
        text = json.dumps(found, indent=1) + '\n'
        write_atomically(OUT, lambda p, text=text: p.write_text(text, encoding='utf-8'))
        print(f'{name} {rate:g} {seed}: {kept[str(seed)]}, {out}', flush=True)


if __name__ == '__main__':
    main(sys.argv[1:] or list(METHODS))
