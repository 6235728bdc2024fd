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

SKILL, FEW, ITEMS = 'write', 200, 400
START = dict(steps=80, lr=3e-4, schedule='constant') # by pilots: where the validation score stops rising
MORE = 2.4 # steps of plain tuning that read as many tokens as one of self-play, its draws included

@lru_cache(1)
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

def go_on(arm, model, tok, few, rate, seed, steps):
    how = dict(batch_size=32, lr=rate, seed=seed + 1, progress=False)
    if arm == 'sft':
        return ftlab.fit(model, tok, few, steps=round(MORE*steps), **how)
    if arm == 'spin':
        return ftlab.fit(model, tok, few, spin(), steps=steps, **how)
    pairs = judged_pairs(model, tok, few.train, seed=seed)
    bought = ftlab.data(dict(train=pairs, validation=pairs[:2], test=pairs[:2]))
    return ftlab.fit(model, tok, bought, ftlab.methods.dpo(), steps=steps, **how)

def run(arm, rate, seed, split, steps):
    before, start, tok, few = begin(seed)
    rows = WORLD.rows(SKILL, ITEMS, split, seed)
    model, out = copy.deepcopy(before if arm == 'before' else start), {}
    if rate is not None:
        done = go_on(arm, model, tok, few, rate, seed, steps)
        out = dict(tokens=done.cost['tokens'])
        model = done.model
    each, drawn = scored(model, tok, rows, seed)
    if arm == 'sft':
        at_start, _ = scored(start, tok, rows, seed)
        out['still_gained'] = (sum(each) - sum(at_start))/len(rows)
    return out | dict(score=sum(each)/len(rows), drawn=drawn, items=dict(score=each))

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
