"""Grafts of one hundredth of the weights onto a half-trained lab-s, for two skills: learned, ranked
in one step, the entries that moved most, random ones, and all of the change"""
from functools import lru_cache
from statistics import fmean
import torch
from ftlab.adapters.edit import attach_change
from ftlab.adapters.merging.grafting import (PlainDescent, graftable, largest, learned_graft,
                                             region, region_overlap)
from ftlab.core.batches import collate
from ftlab.core.data import data
from ftlab.core.loading import load
from ftlab.core.model import evaluating, pad_id
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, answer_scores
from ftlab.core.tokens import encode_all
from ftlab.evaluators.calibration import confidence, ece
from ftlab.lab.models import old_skills
from ftlab.lab.world import OLD
from ftlab.trainers.fit import fit

TASKS = ('refuse', 'tool') # the half-trained model gets about half of both right
RATE = .3         # of plain SGD, which the paper's code uses
DENSITY = .01     # of all weights but the embedding, which is also the head
ITEMS = dict(validation=100, test=200) # of each skill
OLD_ITEMS = dict(validation=5, test=5)

def base():
    return load('lab-s', revision='step-250')

@lru_cache(32)
def tuned(task, seed, steps):
    "Return what one fine-tune changes; every arm of a seed uses it"
    model, tok = base()
    recipe = Recipe('sgd', select=graftable, step=PlainDescent)
    run = fit(model, tok, data(task, seed=seed, n=2000), recipe, steps=steps, lr=RATE, seed=seed,
              progress=False)
    return {n: c.clone() for n, c in run.delta.tensors().items()}

@lru_cache(32)
def learned(task, rate, seed, steps):
    "Return the graft whose region is learned on the same training questions"
    model, tok = base()
    recipe = learned_graft(tuned(task, seed, steps), DENSITY, rate)
    run = fit(model, tok, data(task, seed=seed, n=2000), recipe, steps=steps, seed=seed + 1,
              progress=False)
    return {n: c.clone() for n, c in run.delta.tensors().items()}

@lru_cache(8)
def in_one_step(task, seed, steps):
    """Return a graft by the gradient at the base: as many rows as `learned` reads, in one step so
    long that the entries that it would help most enter the region"""
    model, tok = base()
    recipe = learned_graft(tuned(task, seed, steps), DENSITY, rate=10.)
    run = fit(model, tok, data(task, seed=seed, n=2000), recipe, steps=1, batch_size=32*steps,
              seed=seed + 1, progress=False)
    return {n: c.clone() for n, c in run.delta.tensors().items()}

def at_random(change, task, seed):
    "Return a graft of as many entries, drawn evenly, and for each task anew"
    g = torch.Generator().manual_seed(2*seed + TASKS.index(task))
    drawn = largest({n: torch.rand(c.shape, generator=g) for n, c in change.items()}, DENSITY)
    return {n: change[n].where(mask, 0) for n, mask in drawn.items()}

def by_magnitude(change, density=DENSITY):
    "Return the graft of the entries that moved most"
    return {n: change[n].where(mask, 0) for n, mask in largest(change, density).items()}

def graft_of(arm, task, rate, seed, steps):
    change = tuned(task, seed, steps)
    if arm == 'learned':
        return learned(task, rate, seed, steps)
    if arm == 'once':
        return in_one_step(task, seed, steps)
    if arm == 'magnitude':
        return by_magnitude(change)
    return at_random(change, task, seed) if arm == 'random' else change

@lru_cache(64)
def scores(task, seed, split, steps=None):
    "Return the score of each question, of the base or, with `steps`, of the fine-tune"
    return asked(tuned(task, seed, steps) if steps else None, task, ITEMS[split], seed, split)

def asked(change, task, n, seed, split):
    model, tok = base()
    att = attach_change(model, change) if change else None
    found = answer_scores(model, tok, WORLD.rows(task, n, split, seed))
    if att:
        att.detach()
    return found

def calibration_error(change, seed, split):
    "Return the ECE of all tokens of the right answers, each read after the right ones before it"
    model, tok = base()
    batch = collate(encode_all(WORLD.rows(TASKS[0], ITEMS[split], split, seed), tok, 'text'),
                    pad_id(tok))
    labels = batch.pop('labels')
    att = attach_change(model, change)
    with torch.no_grad(), evaluating(model):
        sure, right = confidence(model(**batch).logits, labels)
    att.detach()
    return ece(sure, right)

@lru_cache(8)
def old_questions():
    return tuple(s for s in OLD if s in old_skills(data(TASKS[0], n=50)) and s not in TASKS)

@lru_cache(8)
def old_of_the_base(seed, split):
    return {s: asked(None, s, OLD_ITEMS[split], seed, split) for s in old_questions()}

def forgotten(change, seed, split):
    "Return the mean fall over the old skills"
    before = old_of_the_base(seed, split)
    return fmean(fmean(b) - fmean(asked(change, s, OLD_ITEMS[split], seed, split))
                 for s, b in before.items())

def measured(arm, task, change, seed, split, steps):
    "Return what a graft is worth on its task, beside the base and the fine-tune"
    was, full = scores(task, seed, split), scores(task, seed, split, steps)
    found = full if arm == 'full' else asked(change, task, ITEMS[split], seed, split)
    gain, of = fmean(found) - fmean(was), fmean(full) - fmean(was)
    return dict(accuracy=fmean(found), gain=gain, recovered=gain/max(of, .05),
                performance=fmean(found)/fmean(full), items=[x - y for x, y in zip(found, was)])

def run(arm, rate, seed, split, steps):
    grafts = {t: graft_of(arm, t, rate, seed, steps) for t in TASKS}
    found = {t: measured(arm, t, c, seed, split, steps) for t, c in grafts.items()}
    first, second = grafts.values()
    inside = [sum(int(m.sum()) for m in region(c).values()) for c in grafts.values()]
    out = {k: fmean(f[k] for f in found.values())
           for k in ('accuracy', 'gain', 'recovered', 'performance')}
    for t, f in found.items():
        out |= {t: f['recovered'], f'{t}_gain': f['gain']}
    return out | dict(least_gain=min(f['gain'] for f in found.values()),
                      ece=calibration_error(first, seed, split),
                      forgetting=forgotten(first, seed, split),
                      density=max(inside)/sum(c.numel() for c in first.values()),
                      overlap=region_overlap(first, second),
                      items=dict(gain=sum((f['items'] for f in found.values()), [])))

def identities():
    model, _ = base()
    g = torch.Generator().manual_seed(0)
    change = {n: torch.randn(model.get_parameter(n).shape, generator=g) for n in graftable(model)}
    some = by_magnitude(change)
    count = sum(int(m.sum()) for m in region(some).values())
    size = sum(c.numel() for c in change.values())
    outside = {n: c - some[n] for n, c in change.items()}
    return {'a graft of everything is the change': all(
                torch.equal(c, change[n]) for n, c in by_magnitude(change, 1.).items()),
            'a graft has as many entries as asked for': count == round(DENSITY*size),
            'a random graft has as many': count == sum(
                int(m.sum()) for m in region(at_random(change, TASKS[0], 0)).values()),
            'what is not grafted is no larger': max(
                float(c.abs().max()) for c in outside.values()) <= min(
                float(c[c != 0].abs().min()) for c in some.values() if c.any()),
            'a region has all of itself and nothing of the rest': (
                region_overlap(some, some) == 1 and region_overlap(some, outside) == 0)}
