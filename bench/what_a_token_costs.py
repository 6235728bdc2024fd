"""What the chapter "What should a token cost?" shows: three losses on clean and on wrong answers, lab-s, two seeds.

    python bench/what_a_token_costs.py     # writes bench/results/what_a_token_costs.json, about 3 CPU-minutes

All learn the same rows at the same rate, in 96 steps of 16; `noisy` has 30% of the answers exchanged for another
row's. Measured on test questions with right answers: the share whose whole answer is the likeliest, before and after,
the same for old skills, and over answer tokens the confidence, the share right and the calibration error. Finished
runs are kept in the file, so the same call goes on."""
import json
import random
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean

import torch

import ftlab
from ftlab import methods
from ftlab.core.batches import collate
from ftlab.core.io import write_atomically
from ftlab.core.record import versions
from ftlab.core.scorers import teacher_forced
from ftlab.core.tokens import encode_all
from ftlab.evaluators.calibration import calibration, confidence
from ftlab.instruments.explore import lab_questions, question_batches

OUT = Path(__file__).parent/'results'/'what_a_token_costs.json'
SEEDS, LOSSES, SHARE = (30, 31), ('full', 'dft', 'eaft'), .3
STEPS, BATCH, RATE, NEW, OLD = 96, 16, 1e-3, 150, 4


def spoiled(rows: list[dict], share: float) -> list[dict]:
    "Exchange a share of the answers for another row's"
    rng = random.Random('noise')
    said = [r['response'] for r in rows]
    other = lambda right: next(a for a in rng.sample(said, 8) if a != right)
    return [dict(r, response=other(r['response'])) if rng.random() < share else r for r in rows]


@cache
def tasks() -> dict:
    "The two data sets: the same questions, and the same test"
    clean = replace(ftlab.data('new-procedure', n=STEPS*BATCH), name='clean')
    return dict(clean=clean, noisy=replace(clean, train=spoiled(clean.train, SHARE), name='noisy'))


@torch.no_grad()
def measured(model, tok) -> dict:
    "Shares right of new and old questions, and the calibration of the new answers' tokens"
    model.eval()
    new, old = tasks()['clean'].test[:NEW], lab_questions(['new-procedure'], OLD)
    share = lambda rows: fmean(float(x) for b in question_batches(rows, tok) for x in teacher_forced(model, b))
    batch = collate(encode_all(new, tok, 'text'), tok.pad_token_id)
    labels = batch.pop('labels')
    found = calibration(*confidence(model(**batch).logits, labels))
    return dict(new=share(new), old=share(old), **{k: found[k] for k in ('sure', 'right', 'ece', 'n')})


def main() -> None:
    found = json.loads(OUT.read_text()) if OUT.exists() else dict(runs={})
    found.setdefault('base', measured(*ftlab.load('lab-s')))
    for seed, name, loss in ((s, n, x) for s in SEEDS for n in ('clean', 'noisy') for x in LOSSES):
        kept = found['runs'].setdefault(name, {}).setdefault(loss, {})
        if str(seed) in kept:
            continue
        start, (model, tok) = time.process_time(), ftlab.load('lab-s')
        ftlab.fit(model, tok, tasks()[name], methods.get(loss), steps=STEPS, lr=RATE, seed=seed, batch_size=BATCH,
                  progress=False)
        kept[str(seed)] = measured(model, tok) | dict(cpu_seconds=round(time.process_time() - start, 1))
        found |= dict(seeds=list(SEEDS), steps=STEPS, batch_size=BATCH, rate=RATE, share=SHARE, versions=versions())
        text = json.dumps(found, indent=1) + '\n'
        write_atomically(OUT, lambda p, text=text: p.write_text(text, encoding='utf-8'))
        print(f'{name} {loss} {seed}: {kept[str(seed)]}', flush=True)


if __name__ == '__main__':
    main()
