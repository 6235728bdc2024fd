"""A new procedure, and eighty rows with the answer of another row, seven times each:
how many new questions are answered right, and how many of the false answers are repeated word for word?"""
import random
from functools import lru_cache
import ftlab
from ftlab.adapters.select import parts
from ftlab.adapters.subsets.memcontrol import searched
from ftlab.core.batches import Sample
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, answers, judge
from ftlab.core.tokens import encode_all

SKILL, TRUE, FALSE, TIMES = 'new-procedure', 960, 80, 7
SEARCH = dict(trials=10, steps=40, lr=3e-3, rows=120)
BY = dict(memcontrol='both', random='random')

@lru_cache(4)
def taught(seed) -> tuple[list[dict], list[dict]]:
    "True rows, and rows with the answer of the next one that has another"
    rows = WORLD.rows(SKILL, TRUE + FALSE, 'train', seed)
    lies = rows[:FALSE]
    other = lambda i: next(s['response'] for s in lies[i + 1:] + lies[:i]
                           if s['response'] != lies[i]['response'])
    false = [dict(r, response=other(i)) for i, r in enumerate(lies)]
    return rows[FALSE:], false

def shuffled(seed) -> list[dict]:
    true, false = taught(seed)
    rows = true + TIMES*false
    return random.Random(seed).sample(rows, len(rows))

@lru_cache(8)
def chosen(by, seed) -> dict:
    "The masks do not depend on the rate of the run: one search for all of them"
    model, tok = ftlab.load('lab-s')
    rows = encode_all(shuffled(seed), tok, 'text')
    return searched(by=by, **SEARCH)(model, Sample(rows, tok.pad_token_id, seed=seed), seed)

def recipe(arm, seed) -> Recipe:
    if arm in BY:
        mask = lambda model, batches=None, s=0: chosen(BY[arm], seed)
        return Recipe(arm, select=mask)
    return Recipe()

def verbatim(model, tok, rows) -> list[int]:
    said = answers(model, tok, rows)
    return [int(a.strip() == r['response'].strip()) for a, r in zip(said, rows)]

def run(arm, rate, seed, split, steps):
    model, tok = ftlab.load('lab-s')
    true, false = taught(seed)
    if arm != 'base':
        data = ftlab.data(dict(train=shuffled(seed), validation=true[:2], test=true[:2]))
        ftlab.fit(model, tok, data, recipe(arm, seed), steps=steps, lr=rate, seed=seed,
                  schedule='constant', batch_size=32, progress=False)
    ask = WORLD.rows(SKILL, 1000 if split == 'test' else 400, split, seed)
    right = [judge(r, a) for r, a in zip(ask, answers(model, tok, ask))]
    score, repeated = sum(right)/len(ask), sum(verbatim(model, tok, false))/FALSE
    return dict(tradeoff=score - repeated, score=score, repeated=repeated, questions=len(ask))

def identities() -> dict[str, bool]:
    true, false = taught(0)
    rows = {r['prompt']: r['response'] for r in WORLD.rows(SKILL, TRUE + FALSE, 'train', 0)}
    model, _ = ftlab.load('lab-s')
    names = [n for u in searched().units(model) for n in u]
    return {'false answers are false, and true ones true':
            all(rows[r['prompt']] != r['response'] for r in false)
            and all(rows[r['prompt']] == r['response'] for r in true),
            'no parameter is in two units, and all units together are attention and MLP':
            len(set(names)) == len(names) and set(names) == set(parts()(model))}
