"""Breadcrumbs: eight fine-tunes of a half-trained lab-s, merged by four rules.
Each rule's scale is chosen on a merge of four that the seed draws"""
import random
from functools import lru_cache
import torch
from ftlab.adapters.edit import attach_change, merge
from ftlab.adapters.merging.breadcrumbs import merge_breadcrumbs, middle
from ftlab.core.data import data
from ftlab.core.loading import load
from ftlab.core.scorers import WORLD, answers, judge
from ftlab.trainers.fit import fit

# skills that the half-trained model half knows, so that one model can know them all
TASKS = ('reverse', 'tool', 'selen', 'sort', 'dedupe', 'refuse', 'context', 'write')
FEW, RATE = 4, 1e-3
ITEMS = dict(validation=100, test=250)

def ties(changes, alpha, keep=.2):
    "Keep the largest entries of each change, elect a sign, and average those that have it"
    flat = torch.stack([torch.cat([c[n].flatten() for n in changes[0]]) for c in changes])
    dropped = flat.shape[1] - int(keep*flat.shape[1])
    top = flat*(flat.abs() >= flat.abs().kthvalue(dropped, dim=1, keepdim=True).values)
    sign = top.sum(0).sign()
    sign[sign == 0] = sign.sum().sign() # where the sum is zero, the majority's
    agree = top*(top*sign > 0)
    merged = alpha*agree.sum(0)/(agree != 0).sum(0).clamp(min=1)
    parts = merged.split([t.numel() for t in changes[0].values()])
    return {n: p.view_as(t) for (n, t), p in zip(changes[0].items(), parts)}

RULES = dict(sum=merge, breadcrumbs=merge_breadcrumbs, ties=ties,
             pruned=lambda changes, alpha: merge_breadcrumbs(changes, alpha, .85, 1.))

def base():
    return load('lab-s', revision='step-250')

@lru_cache(8)
def fine_tuned(seed, steps):
    "Return the changes of the eight fine-tunes"
    model, tok = base()
    out = []
    for name in TASKS:
        run = fit(model, tok, data(name, seed=seed, n=2000), steps=steps, lr=RATE, seed=seed,
                  progress=False)
        out.append({n: t.clone() for n, t in run.delta.tensors().items()})
        run.delta.attached.detach()
    return out

def scores(change, names, seed, split):
    "Return the outcome of each question of each task, by task, with the change applied"
    model, tok = base()
    att = attach_change(model, change)
    out = {}
    for name in names:
        rows = WORLD.rows(name, ITEMS[split], split, seed)
        out[name] = [float(judge(r, a)) for r, a in zip(rows, answers(model, tok, rows))]
    att.detach()
    return out

def mean(outcomes):
    "Mean over tasks of the mean over questions"
    return sum(sum(o)/len(o) for o in outcomes.values())/len(outcomes)

def first(seed):
    "The four tasks that the scale is chosen on: drawn anew by each seed"
    return tuple(random.Random(seed).sample(TASKS, FEW))

@lru_cache(128)
def merged(rule, alpha, names, seed, split, steps):
    "Return the outcomes of a merge of these tasks; two arms of one rule share them"
    changes = dict(zip(TASKS, fine_tuned(seed, steps)))
    return scores(RULES[rule]([changes[t] for t in names], alpha), names, seed, split)

@lru_cache(8)
def single(seed, split, steps):
    "Return (own accuracy, mean over all eight tasks) of each fine-tune"
    found = [scores(c, TASKS, seed, split) for c in fine_tuned(seed, steps)]
    return [(sum(f[t])/len(f[t]), mean(f)) for t, f in zip(TASKS, found)]

def run(arm, rate, seed, split, steps):
    "`rate` is the scale of the sum"
    if arm in ('alone', 'one_model'):
        own, everywhere = zip(*single(seed, split, steps))
        return dict(many=sum(own if arm == 'alone' else everywhere)/len(TASKS))
    if arm == 'base':
        return dict(many=mean(merged('sum', 0., TASKS, seed, split, steps)))
    rule = arm.removesuffix('_retuned')
    many = merged(rule, rate, TASKS, seed, split, steps)
    if split == 'test':
        return dict(many=mean(many))
    # the number that the scale is chosen by: of the merge of four, or, for `_retuned`, of all
    chosen = many if arm != rule else merged(rule, rate, first(seed), seed, split, steps)
    return dict(many=mean(many), chosen=mean(chosen), items=dict(many=many, chosen=chosen))

def identities():
    g = torch.Generator().manual_seed(0)
    cs = [dict(w=torch.randn(1000, generator=g)) for _ in range(2)]
    kept = middle(.85, .994)(cs[0], None)['w']
    size = cs[0]['w'].abs().sort().values
    return {'the whole range is task arithmetic': torch.equal(
                merge_breadcrumbs(cs, .3, 0., 1.)['w'], merge(cs, .3)['w']),
            '14.4% are kept': int((kept != 0).sum()) == 144,
            'what is kept is untouched and of middle size': torch.equal(
                kept[kept != 0], cs[0]['w'][kept != 0]) and bool(kept.abs().max() == size[993])
            and bool(kept[kept != 0].abs().min() == size[850]),
            'TIES of one change is its largest fifth':
                int((ties(cs[:1], 1.)['w'] != 0).sum()) >= 200
            and torch.equal(ties(cs[:1], 1.)['w'].abs().max(), size[-1])}
