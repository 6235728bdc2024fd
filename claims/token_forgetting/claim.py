"""A new procedure from rows in which three letters in twenty were replaced: learned in full, divided into learned
and forgotten tokens, or with the negative ones ignored"""
import random
from functools import lru_cache
import ftlab
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, answers, judge
from ftlab.lab.world import LETTERS
from ftlab.methods import token_forgetting

SKILL, ROWS, WRONG, ITEMS = 'new-procedure', 4800, .15, 1000
ARMS = dict(forget=token_forgetting(), ignore=token_forgetting(strength=0.), full=Recipe(),
            clean=Recipe(), base=None)

def spoiled(row, rng) -> dict:
    "The row with every letter of its answer replaced by another with probability WRONG"
    said = [rng.choice([c for c in LETTERS if c != w]) if rng.random() < WRONG else w
            for w in row['response'].split()]
    return dict(row, response=' '.join(said))

@lru_cache(4)
def taught(seed, clean):
    rng, rows = random.Random(f'spoiled/{seed}'), WORLD.rows(SKILL, ROWS, 'train', seed)
    rows = rows if clean else [spoiled(r, rng) for r in rows]
    return ftlab.data(dict(train=rows, validation=rows[:2], test=rows[:2]))

def run(arm, rate, seed, split, steps):
    model, tok = ftlab.load('lab-s')
    if ARMS[arm] is not None:
        ftlab.fit(model, tok, taught(seed, arm == 'clean'), ARMS[arm], steps=steps, lr=rate,
                  seed=seed, schedule='linear', warmup=round(.03*steps), batch_size=32,
                  progress=False)
    rows = WORLD.rows(SKILL, ITEMS if split == 'test' else 400, split, seed)
    right = [judge(r, a) for r, a in zip(rows, answers(model, tok, rows))]
    return dict(score=sum(right)/len(right), items=dict(score=right))

def identities() -> dict[str, bool]:
    import torch
    from ftlab.trainers.losses.token_forgetting import signs
    scores = [torch.tensor([3., 0., -1.]), torch.tensor([2., 9.])]
    on = [torch.tensor([True, True, True]), torch.tensor([True, False])]
    right = [x.tolist() for x in signs(scores, on, .5)] == [[1, -1, -1], [1, 0]]
    return {'the highest scores of all labelled tokens are positive': right}
