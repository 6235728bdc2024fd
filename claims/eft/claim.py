"Knowledge from a large base, a way of answering from a small tuned one; beside the large one tuned"
import copy
import random
from functools import lru_cache
import torch
import ftlab
from ftlab.core.scorers import WORLD, answers
from ftlab.evaluators.decode import combined
from ftlab.evaluators.decoding.eft import eft, emulate
from ftlab.lab.world import ATTRIBUTES

STYLES = dict(plain='{v}', note='note : {v}', sentence='the {a} is {v}', record='{{ {a} : {v} }}')
SHARES = dict(plain=.85, note=.05, sentence=.05, record=.05) # in the last piece of pretraining
RULE = dict(city='sentence', job='sentence', pet='record', food='record', color='note')
LAST, ITEMS = dict(steps=80, lr=1e-3), 400 # of pretraining: facts, each in a style drawn at random

def asked_about(row):
    "The attribute of a question"
    return next(a for a in ATTRIBUTES if a in row['prompt'].split())

def told(row, style=None):
    "The row with its answer in a style: that of the rule, unless one is given"
    a = asked_about(row)
    said = STYLES[style or RULE[a]].format(a=a, v=row['response'])
    return dict(prompt=row['prompt'], response=said)

@lru_cache(2)
def bases(seed):
    "The small and the large model after a last piece of pretraining in which all styles occur"
    rng = random.Random(f'styles/{seed}')
    drawn = rng.choices(list(SHARES), list(SHARES.values()), k=1000)
    rows = [told(r, s) for r, s in zip(WORLD.rows('fact', 1000, 'train', seed), drawn)]
    out = []
    for name in ('lab-s', 'lab-m'):
        model, tok = ftlab.load(name)
        ftlab.fit(model, tok, rows, seed=seed, progress=False, **LAST).delta.attached.fold()
        out.append(model)
    return *out, tok

@lru_cache(16) # emulated, multiplied and tuned share the small one
def tuned(size, rate, seed, steps):
    "The small (0) or the large model (1), tuned to follow the rule on people that both know"
    *both, tok = bases(seed)
    model = copy.deepcopy(both[size])
    rows = [told(r) for r in WORLD.rows('fact', 1000, 'train', seed + 50_000)]
    ftlab.fit(model, tok, rows, steps=steps, batch_size=16, lr=rate, seed=seed,
              schedule='constant', progress=False)
    return model

def found(rows, said):
    """Outcomes of each question: all right; the style right; the fact right, whatever the style;
    the mean of the two"""
    score, manners, knowledge = [], [], []
    for r, text in zip(rows, said):
        values = [w for w in text.split() if w in ATTRIBUTES[asked_about(r)]]
        whatever = told(dict(r, response=values[0] if values else ''))['response']
        score.append(float(text == told(r)['response']))
        manners.append(float(text == whatever))
        knowledge.append(float(values == [r['response']]))
    joined = [(m + k)/2 for m, k in zip(manners, knowledge)]
    return dict(score=score, manners=manners, knowledge=knowledge, joined=joined)

def run(arm, rate, seed, split, steps):
    small, large, tok = bases(seed)
    rows = WORLD.rows('atlas', ITEMS, split, seed)

    def emulated(model, tok, prompts, **kw):
        return eft(large).decode(dict(base=small, tuned=tuned(0, rate, seed, steps)), tok, prompts,
                                 **kw)

    def multiplied(model, tok, prompts, **kw):
        both = dict(tuned=tuned(0, rate, seed, steps), large=large)
        return combined(both, tok, prompts, lambda p: p['tuned'] + p['large'], **kw)

    decode = dict(emulated=emulated, multiplied=multiplied).get(arm)
    model = large if arm == 'large' else None
    if arm in ('tuned', 'tuned_large'):
        model = tuned(int(arm == 'tuned_large'), rate, seed, steps)
    each = found(rows, answers(model, tok, rows, 8, decode))
    return {k: sum(v)/len(v) for k, v in each.items()} | dict(items=each)

def derive(found):
    "The bar: 85 percent of what tuning the large model itself gains"
    large, best = found['large'], found['tuned_large']
    return dict(bar={k: large[k] + .85*(best[k] - large[k])
                     for k in ('score', 'manners', 'knowledge', 'joined')})

def identities():
    g = torch.Generator().manual_seed(0)
    p = {k: torch.randn(3, 9, generator=g).log_softmax(-1) for k in ('base', 'tuned', 'large')}
    return {'without a change in the small model the large one speaks': torch.equal(
                emulate()(p | dict(tuned=p['base'])), p['large']),
            'with the small base in place of the large one the tuned model speaks': torch.allclose(
                emulate()(p | dict(large=p['base'])), p['tuned'], atol=1e-6),
            'with beta 0 the large one speaks': torch.equal(emulate(0.)(p), p['large'])}
