"""A new procedure from few rows, a quarter of which have the answer of another row: how many new questions are
answered right, and how many of the false answers are repeated word for word?"""
import random
from functools import lru_cache
import ftlab
from ftlab.adapters.attach import attach
from ftlab.adapters.delta import Entries
from ftlab.adapters.subsets.memcontrol import halves, masks, searched
from ftlab.core.batches import Sample
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, answers, judge
from ftlab.core.tokens import encode_all

SKILL, ROWS, FALSE = 'new-procedure', 320, 80
SEARCH = dict(trials=10, steps=40, lr=3e-3, rows=ROWS)
UNITS = ('attention', 'mlp')
BY = dict(memcontrol='both', quality='quality', random='random')

@lru_cache(4)
def taught(seed) -> tuple[list[dict], list[dict]]: # true rows, and rows with the answer of another one
    rows = WORLD.rows(SKILL, ROWS, 'train', seed)
    false = [dict(r, response=s['response']) for r, s in zip(rows[:FALSE], rows[1:FALSE] + rows[:1])]
    return rows[FALSE:], false

@lru_cache(8)
def chosen(by, seed) -> dict:
    "The masks do not depend on the rate of the run: one search for all of them"
    model, tok = ftlab.load('lab-s')
    true, false = taught(seed)
    rows = encode_all(random.Random(seed).sample(true + false, ROWS), tok, 'text')
    return searched(by=by, **SEARCH)(model, Sample(rows, tok.pad_token_id, seed=seed), seed)

def recipe(arm, seed) -> Recipe:
    if arm in BY:
        return Recipe(arm, select=lambda model, batches=None, s=0: chosen(BY[arm], seed))
    return dict(full=Recipe(), uniform=ftlab.methods.attention_only()*Recipe())[arm]

def verbatim(model, tok, rows) -> list[int]:
    return [int(a.strip() == r['response'].strip()) for a, r in zip(answers(model, tok, rows), rows)]

def run(arm, rate, seed, split, steps):
    model, tok = ftlab.load('lab-s')
    true, false = taught(seed)
    if arm != 'base':
        data = ftlab.data(dict(train=random.Random(seed).sample(true + false, ROWS),
                               validation=true[:2], test=true[:2]))
        ftlab.fit(model, tok, data, recipe(arm, seed), steps=steps, lr=rate, seed=seed,
                  schedule='constant', batch_size=32, progress=False)
    ask = WORLD.rows(SKILL, 1000 if split == 'test' else 400, split, seed)
    right = [judge(r, a) for r, a in zip(ask, answers(model, tok, ask))]
    score, repeated = sum(right)/len(ask), sum(verbatim(model, tok, false))/FALSE
    return dict(tradeoff=score - repeated, score=score, repeated=repeated, questions=len(ask))
