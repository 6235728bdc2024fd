"""LT-SFT: a task learned in English and a language learned from its text, added up;
the task is then asked in that language"""
import random
import torch
from ftlab.adapters.sparse import compose, overlap
from ftlab.adapters.subsets.lt_sft import lt_sft
from ftlab.core.batches import data
from ftlab.core.loading import load
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, exact_match
from ftlab.lab.world import ASK, ATTRIBUTES, FOREIGN
from ftlab.trainers.fit import fit

# LT-SFT spends half of the steps on finding, so the dense arms have half as many
STEPS, RATES, DENSITY = 100, dict(sparse=3e-3, dense=1e-3), .08
WORD = dict(zip(ATTRIBUTES, FOREIGN['zuma'])) # what the language calls each attribute: words that lab-s has never read

def english(r):
    p, a = r.choice(WORLD.people['often']), r.choice(list(ATTRIBUTES))
    return r.choice(ASK).format(a=a, p=p), WORLD.facts[p, a]

def foreign(r):
    p, a = r.choice(WORLD.people['often']), r.choice(list(ATTRIBUTES))
    return (
        r.choice(['{p} {a} :', '{a} {p} :', '{p} , {a} :', '{a} , {p} :']).format(a=WORD[a], p=p),
        WORLD.facts[p, a])

def twice(ask, r):
    prompt, v = ask(r)
    return f'say and say : {prompt}', f'{v} {v}'

KINDS = dict(task=lambda r: twice(english, r), language=foreign, target=lambda r: twice(foreign, r))

def rows(kind, split, n, seed):
    "Different questions; those of one split are in no other"
    r, out = random.Random(f'{kind} {split} {seed}'), {}
    while len(out) < n:
        prompt, response = KINDS[kind](r)
        if random.Random(prompt).choice(['train']*6
                                        + ['validation', 'test', 'test', 'test']) == split:
            out[prompt] = dict(prompt=prompt, response=response)
    return list(out.values())

def learned(model, tok, kind, recipe, steps, rate, seed):
    d = data(rows(kind, 'train', 1200, seed), validation=rows(kind, 'validation', 100, seed),
             test=rows(kind, 'test', 100, seed))
    run = fit(model, tok, d, recipe, steps=steps, lr=rate, seed=seed, progress=False)
    change = {n: t.clone() for n, t in run.delta.tensors().items()}
    run.delta.attached.detach()
    return change

def run(seed, tuned):
    model, tok = load('lab-s')
    test = {k: rows(k, 'test', 400, seed) for k in ('task', 'target')}
    out = {}
    def asked(changes):
        att = compose(model, changes)
        try:
            return {k: exact_match(model, tok, t) for k, t in test.items()}
        finally:
            att.detach()
    sparse = {k: learned(model, tok, k, lt_sft(DENSITY), STEPS, RATES['sparse'], seed) for k in ('task', 'language')}
    dense = {k: learned(model, tok, k, Recipe(), STEPS//2, RATES['dense'], seed) for k in ('task', 'language')}
    for name, made in dict(sparse=sparse, dense=dense).items():
        out[name], out[f'{name}_task'] = asked(list(made.values())), asked([made['task']])
    out['sparse']['overlap'] = overlap(*sparse.values())
    return out

def identities():
    a, b = ({'model.layers.0.mlp.up_proj.weight': torch.zeros(320, 128).index_fill_(
                 0, torch.tensor(i), 1e-3)} for i in ([0, 1], [1, 2]))
    model, tok = load('lab-s')
    n = next(iter(a))
    W = model.get_parameter(n).detach().clone()
    att = compose(model, [a, b])
    both = att.values()[n]
    att.detach()
    att = compose(model, [a, b, {n: -b[n]}])
    back = att.values()[n]
    att.detach()
    return {'a sum of sparse changes is their sum': torch.allclose(both, W + a[n] + b[n]),
            'what is taken away again is gone': torch.allclose(back, W + a[n], atol=1e-7),
            'the base stays': torch.equal(model.get_parameter(n), W),
            'half of the places of two changes is shared': overlap(a, b) == .5}
