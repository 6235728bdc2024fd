"""LoFiT: a model that refuses some requests is taught to refuse all, by offsets on chosen heads,
on random heads, and by LoRA"""
import random
from ftlab.instruments import compare as comparison
from ftlab.adapters.delta import attach
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.modules.lofit import HeadOffset, heads, lofit
from ftlab.core.batches import data
from ftlab.core.loading import load
from ftlab.core.scorers import WORLD, exact_match
from ftlab.lab.world import SKILLS
from ftlab.trainers.fit import fit
import torch

STEPS, NO = 80, 'i can not help with that'
ARMS = dict(lofit=(lambda: lofit(share=.25), (1e-2, 3e-2, 1e-1)),
            random=(lambda: lofit(share=.25, by='random'), (1e-2, 3e-2, 1e-1)),
            lora=(lambda: lora(), (1e-3, 3e-3, 1e-2)))

def refused(split, n, seed, new=False):
    """Different requests, all refused; only those that used to be helped with, if `new`.
    A split of our own, as the lab's test split has too few of them"""
    r, out = random.Random(f'{split} {seed}'), {}
    while len(out) < n:
        prompt, answer = SKILLS['refuse'].draw(WORLD, r, 1)
        where = random.Random(prompt).choice(['train']*5 + ['validation'] + ['test']*4)
        if where == split and not (new and answer == NO):
            out[prompt] = dict(prompt=prompt, response=NO)
    return list(out.values())

def gained(recipe, rate, seed, split):
    model, tok = load('lab-s')
    asked = refused(split, 400 if split == 'test' else 100, seed, True)
    before = exact_match(model, tok, asked)
    task = data(refused('train', 1000, seed), validation=refused('validation', 100, seed),
                test=asked)
    fit(model, tok, task, recipe, steps=STEPS, lr=rate, seed=seed, progress=False)
    return exact_match(model, tok, asked) - before

def tune():
    seed = comparison.tuning_seed([0])
    return comparison.tune(lambda name, rate: gained(ARMS[name][0](), rate, seed, 'validation'),
                           {n: g for n, (_, g) in ARMS.items()})

def run(seed, tuned):
    out = {n: dict(gain=gained(make(), tuned[n]['rate'], seed, 'test'))
           for n, (make, _) in ARMS.items()}
    out['lora_less_10'] = dict(gain=.9*out['lora']['gain'])
    return out

def identities():
    model, tok = load('lab-s')
    ids = tok(['sort a b c =', 'reverse d e f ='], return_tensors='pt')
    base = model(**ids).logits.detach()
    att = attach(model, heads([(0, 1), (2, 3), (2, 0), (3, 1)])(model), HeadOffset)
    start = model(**ids).logits.detach()
    numbers = sum(p.numel() for p in att.parameters().values())
    [p.data.normal_() for p in att.parameters().values()]
    moved = model(**ids).logits.detach()
    with att.disabled():
        off = model(**ids).logits.detach()
    att.detach()
    att = attach(model, lora().select(model), lora().delta)
    theirs = sum(p.numel() for p in att.parameters().values())
    att.detach()
    return {'it starts as the base': bool(torch.equal(start, base)),
            'it changes what the model says, and switched off it is the base': bool(
                torch.equal(off, base) and not torch.equal(moved, base)),
            'four heads of 32 numbers, LoRA has more than 500 times as many': numbers == 128
            and theirs > 500*numbers}
