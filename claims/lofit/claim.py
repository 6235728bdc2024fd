"""LoFiT: lab-m is taught to refuse all requests by offsets on a few of its 40 heads.
The heads are those that learned scales point to, random ones, or those of another task"""
import random
from functools import lru_cache
import torch
from ftlab.adapters.attach import attach
from ftlab.adapters.modules.lofit import HeadOffset, head_width, heads, lofit, loudest
from ftlab.adapters.modules.lora import lora
from ftlab.core.data import data
from ftlab.core.loading import load
from ftlab.core.recipe import Recipe, With
from ftlab.core.scorers import WORLD, answers
from ftlab.lab.world import SKILLS
from ftlab.trainers.fit import fit

MODEL, HEADS, NO = 'lab-m', 40, 'i can not help with that'
# twice the official rate: in 80 steps the scales move about as far as in the official scripts
SELECT, SELECT_RATE, DRAWS = 80, 1e-2, 4
ITEMS = dict(validation=100, test=400)

def requests(split, n, seed, helped=False):
    """Return different requests, all to be refused, and how many were left out.
    With `helped`, those that the base's rule refuses already are left out."""
    r, out, left = random.Random(f'{split} {seed}'), {}, set()
    while len(out) < n:
        prompt, answer = SKILLS['refuse'].draw(WORLD, r, 1)
        # a split of our own: the lab's test split has too few requests
        where = random.Random(prompt).choice(['train']*5 + ['validation'] + ['test']*4)
        if where != split:
            continue
        if helped and answer == NO:
            left.add(prompt)
        else:
            out[prompt] = dict(prompt=prompt, response=NO)
    return list(out.values()), len(left)

@lru_cache(2)
def lesson(seed):
    return data(requests('train', 1000, seed)[0],
                validation=requests('validation', 100, seed, True)[0],
                test=requests('test', 100, seed, True)[0])

@lru_cache(2)
def base_refuses(seed, split):
    model, tok = load(MODEL)
    asked, _ = requests(split, ITEMS[split], seed, True)
    return sum(a == NO for a in answers(model, tok, asked))/len(asked)

@lru_cache(4)
def scales(task, seed):
    """Learn a scale for each head, LoFiT's own first stage, on the lesson or another task.
    It does not depend on the rate of the offsets, so all rates of a seed share it"""
    model, tok = load(MODEL)
    first = lofit(lr_select=SELECT_RATE).stages[0]
    taught = lesson(seed) if task == 'lesson' else data(task, seed=seed, n=1000)
    run = fit(model, tok, taught, first, steps=SELECT, seed=seed, progress=False)
    return {n: d.A.detach().clone() for n, d in run.delta.attached.deltas.items()}

def learned_heads(task, count, seed):
    return loudest(scales(task, seed), head_width(load(MODEL)[0]), count/HEADS)

def random_heads(count, seed):
    "Return disjoint draws of `count` heads each"
    all_heads = [(b, h) for b in range(8) for h in range(5)]
    drawn = random.Random(seed).sample(all_heads, count*DRAWS)
    return [drawn[i*count:(i + 1)*count] for i in range(DRAWS)]

def recipes(arm, seed):
    "What an arm trains: LoRA, or offsets (LoFiT's second stage) on heads; several for random heads"
    if arm == 'lora':
        return [lora()]
    found = (random_heads(2, seed) if arm == 'random'
             else [learned_heads('new-format' if arm == 'other' else 'lesson',
                                 4 if arm == 'lofit10' else 2, seed)])
    return [Recipe('offsets', select=heads(which), delta=With(HeadOffset)) for which in found]

def run(arm, rate, seed, split, steps):
    "`steps` are those of the offsets, or of LoRA"
    asked, left = requests(split, ITEMS[split], seed, True)
    outcomes = {}
    for i, recipe in enumerate(recipes(arm, seed)):
        model, tok = load(MODEL)
        fit(model, tok, lesson(seed), recipe, steps=steps, lr=rate, seed=seed, progress=False)
        outcomes[f'draw {i}'] = [int(a == NO) for a in answers(model, tok, asked)]
    mean = sum(sum(o)/len(o) for o in outcomes.values())/len(outcomes)
    return dict(gain=mean - base_refuses(seed, split), items=dict(gain=outcomes),
                excluded={'requests that the base refuses by its rule': left})

def identities():
    model, tok = load(MODEL)
    ids = tok(['sort a b c =', 'reverse d e f ='], return_tensors='pt')
    base = model(**ids).logits.detach()
    att = attach(model, heads([(0, 1), (2, 3), (2, 0), (3, 1)])(model), HeadOffset)
    start = model(**ids).logits.detach()
    count = sum(p.numel() for p in att.parameters().values())
    for p in att.parameters().values():
        p.data.normal_()
    moved = model(**ids).logits.detach()
    with att.disabled():
        off = model(**ids).logits.detach()
    att.detach()
    att = attach(model, lora().select(model), lora().delta)
    theirs = sum(p.numel() for p in att.parameters().values())
    att.detach()
    return {'it starts as the base': torch.equal(start, base),
            'it changes what the model says, and switched off it is the base':
                torch.equal(off, base) and not torch.equal(moved, base),
            'four heads of 32 values are 128 parameters; LoRA has more than 200 times as many':
                count == 128 and theirs > 200*count}
