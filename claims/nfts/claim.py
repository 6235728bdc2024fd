"""An unseen skill from few rows: the plan that a search on other skills finds, and the corners of its search space"""
import random
from functools import lru_cache
import ftlab
from ftlab.adapters.subsets.nfts import planned, tuned_or_offset
from ftlab.core.anatomy import anatomy
from ftlab.core.batches import Sample
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, answers, judge
from ftlab.core.tokens import encode_all

SKILL, ROWS, SEEN = 'new-procedure', 64, ('changed-rule', 'new-format', 'longer-arithmetic')
SEARCH = dict(population=8, generations=4, parents=4, supernet=40, steps=16)
BY = dict(nfts='search', tuned='tuned', adapters='adapters', both='both', random='random')

def as_data(rows):
    return ftlab.data(dict(train=rows, validation=rows[:2], test=rows[:2]))

@lru_cache(1)
def taught(seed) -> list[dict]:
    return WORLD.rows(SKILL, ROWS, 'train', seed)

@lru_cache(2)
def known_before(seed):
    rows = [r for s in SEEN for r in WORLD.rows(s, 48, 'train', seed)]
    return as_data(random.Random(seed).sample(rows, len(rows)))

@lru_cache(8)
def chosen(arm, seed, rate=1e-3) -> dict:
    "What trains; as in the paper, a search has the rate of the run"
    model, tok = ftlab.load('lab-s')
    encode = lambda rows, kind: encode_all(rows, tok, kind)
    sample = Sample(encode(taught(seed), 'text'), tok.pad_token_id, seed=seed, encode=encode)
    return planned(BY[arm], seen=known_before(seed), lr=rate, **SEARCH)(model, sample, seed)

def run(arm, rate, seed, split, steps):
    model, tok = ftlab.load('lab-s')
    trained = 0
    if arm != 'base':
        plan = lambda model, batches=None, s=0: chosen(arm, seed, rate)
        recipe = Recipe(arm, select=plan, delta=tuned_or_offset())
        done = ftlab.fit(model, tok, as_data(taught(seed)), recipe, steps=steps, lr=rate, seed=seed,
                         batch_size=16, progress=False)
        trained = sum(p.numel() for p in done.delta.attached.parameters().values())
    ask = WORLD.rows(SKILL, 1000 if split == 'test' else 400, split, seed)
    right = [judge(r, a) for r, a in zip(ask, answers(model, tok, ask))]
    return dict(gain=sum(right)/len(ask), trained=trained, questions=len(ask),
                items=dict(gain=right))

def identities() -> dict[str, bool]:
    model, _ = ftlab.load('lab-s')
    size = {arm: sum(model.get_parameter(n).numel() for n in planned(BY[arm]).select(model, corner))
            for arm, corner in dict(tuned=range(4), adapters=range(4, 8), both=range(8)).items()}
    new = {r['prompt'] for r in taught(0)}
    return {'both corners together are what both trains':
                size['tuned'] + size['adapters'] == size['both'],
            'adapters are two vectors of the width for each block':
                size['adapters'] == 2*len(anatomy(model).blocks)*model.config.hidden_size,
            'no row of the unseen skill is known beforehand':
                not new & {r['prompt'] for r in known_before(0).train}}
