"Self-play from a start at which more of the same fine-tuning has stopped helping, at equal tokens"
import copy
from functools import lru_cache
from types import SimpleNamespace
import torch
import ftlab
from ftlab.core.generate import generate
from ftlab.core.scorers import WORLD, answers, judge
from ftlab.trainers.preferences import judged_pairs, preference
from ftlab.trainers.rl.spin import spin

SKILL, FEW, ITEMS, DRAWS = 'write', 200, 600, 16
START = dict(steps=80, lr=3e-4, schedule='constant') # by pilots: where the validation score stops rising
MORE = 2.4 # steps of plain tuning that read as many tokens as one of self-play, its draws included

@lru_cache(2)
def begin(seed):
    "The untuned model, the model that was tuned on the few until that stopped helping, and the few"
    before, tok = ftlab.load('lab-s', revision='step-1000')
    few = ftlab.data(SKILL, seed=seed, n=FEW)
    model = copy.deepcopy(before)
    ftlab.fit(model, tok, few, batch_size=32, seed=seed, progress=False,
              **START).delta.attached.fold()
    return before, model, tok, few

def scored(model, tok, rows, seed):
    "Scores of greedy answers, by question, and the mean score of drawn ones"
    each = [judge(r, a) for r, a in zip(rows, answers(model, tok, rows))]
    drawn = generate(model, tok, [r['prompt'] for r in rows], max_new_tokens=5, sample=True,
                     generator_seed=seed)
    return each, sum(judge(r, a) for r, a in zip(rows, drawn))/len(rows)

@lru_cache(4)
def at_start(seed, split):
    "The start's score on each question, and on drawn answers"
    _, start, tok, _ = begin(seed)
    return scored(start, tok, WORLD.rows(SKILL, ITEMS, split, seed), seed)

def go_on(arm, model, tok, few, rate, seed, steps):
    "The tuned model, and how many of the few gave no pair"
    how = dict(batch_size=32, lr=rate, seed=seed + 1, progress=False)
    if arm == 'sft':
        return ftlab.fit(model, tok, few, steps=round(MORE*steps), **how), 0
    if arm == 'spin':
        return ftlab.fit(model, tok, few, spin(), steps=steps, **how), 0
    pairs = judged_pairs(model, tok, few.train, seed=seed, draws=DRAWS)
    bought = ftlab.data(dict(train=pairs, validation=pairs[:2], test=pairs[:2]))
    done = ftlab.fit(model, tok, bought, ftlab.methods.dpo(), steps=steps, **how)
    return done, len(few.train) - len(pairs)

def run(arm, rate, seed, split, steps):
    before, start, tok, few = begin(seed)
    rows = WORLD.rows(SKILL, ITEMS, split, seed)
    if rate is None:
        each, drawn = at_start(seed, split) if arm == 'start' else scored(before, tok, rows, seed)
        return dict(score=sum(each)/len(rows), drawn=drawn, items=dict(score=each))
    done, left = go_on(arm, copy.deepcopy(start), tok, few, rate, seed, steps)
    each, drawn = scored(done.model, tok, rows, seed)
    return dict(score=sum(each)/len(rows), drawn=drawn, items=dict(score=each),
                gained=(sum(each) - sum(at_start(seed, split)[0]))/len(rows),
                tokens=done.cost['tokens'],
                excluded={'questions whose draws scored the same': left} if left else {})

def identities():
    y = torch.tensor([[-100, 3, 4], [-100, 5, 6]]).repeat(2, 1)
    logits = torch.randn(4, 3, 9, generator=torch.Generator().manual_seed(0))
    logits[2:] = logits[:2]
    logits.requires_grad_()
    twin = logits[:2].repeat(2, 1, 1)
    s = SimpleNamespace(batch=dict(labels=y), forward=lambda: twin,
                        models=dict(reference=lambda: SimpleNamespace(logits=logits.detach())))
    s.batches = [s.batch]
    g, = torch.autograd.grad(preference()(s), logits)
    odd = SimpleNamespace(batch=dict(labels=torch.cat([y[:2], y[:2].flip(0)])),
                          forward=lambda: logits, models=s.models)
    odd.batches = [odd.batch]
    h, = torch.autograd.grad(preference()(odd), logits)
    return {'an opponent that says what the data say teaches nothing': bool(g.abs().max() == 0),
            'another one does': bool(h.abs().max() > 0),
            'as many rounds as were asked for': len(spin(rounds=4).loop.stages) == 4}
