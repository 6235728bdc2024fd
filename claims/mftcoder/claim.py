"""Four new tasks of the lab in very different numbers and lengths: one model with a balanced loss, one with
the plain loss, one with rows drawn evenly, and a model for each task"""
import random
from functools import lru_cache
import ftlab
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, answers, judge
from ftlab.methods import mftcoder

ROWS = {'longer-arithmetic': 800, 'new-language': 800, 'new-format': 200, 'new-procedure': 100}
ITEMS = dict(test=450, validation=50)  # a task; the format has 481 different ones
RECIPES = dict(mft=mftcoder('skill'))
LEAST = 12  # steps of a model for one task

@lru_cache(8)
def rows_of(task, seed) -> list[dict]:
    return WORLD.rows(task, ROWS[task], 'train', seed)

def taught(arm, seed, task=None):
    "The mixture; evenly drawn, each task has as many rows as there are of the most plentiful one"
    rows = [r for t in ([task] if task else ROWS) for r in rows_of(t, seed)]
    if arm == 'even':
        most = max(ROWS.values())
        rows = [r for t, n in ROWS.items() for r in rows_of(t, seed)*(most//n)]
    random.Random(f'mixture/{seed}').shuffle(rows)
    few = rows[:2]
    return ftlab.data(dict(train=rows, validation=few, test=few), carry=['skill', 'level'])

def tuned(arm, rate, seed, steps, task=None):
    model, tok = ftlab.load('lab-s')
    ftlab.fit(model, tok, taught(arm, seed, task), RECIPES.get(arm, Recipe()), steps=steps, lr=rate,
              seed=seed, schedule='cosine', warmup=steps//10, batch_size=32, progress=False)
    return model, tok

def right(model, tok, task, split, seed) -> list[float]:
    rows = WORLD.rows(task, ITEMS[split], split, seed)
    return [judge(r, a) for r, a in zip(rows, answers(model, tok, rows))]

def run(arm, rate, seed, split, steps):
    "A model for each task has as many rows of it as the mixture has, and its share of the steps, or LEAST of them"
    found = {}
    if arm == 'base':
        model, tok = ftlab.load('lab-s')
    elif arm != 'single':
        model, tok = tuned(arm, rate, seed, steps)
    for task, n in ROWS.items():
        if arm == 'single':
            own = max(LEAST, round(steps*n/sum(ROWS.values())))
            model, tok = tuned(arm, rate, seed, own, task)
        found[task] = right(model, tok, task, split, seed)
    means = {t: sum(x)/len(x) for t, x in found.items()}
    return dict(score=sum(means.values())/len(means), worst=min(means.values()), **means,
                items=dict(score=[x for own in found.values() for x in own]))

def identities() -> dict[str, bool]:
    import torch
    from ftlab.core.state import State
    from ftlab.trainers.losses.mftcoder import by_task
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 7, 8, 9], [-100, -100, -100, 4]])
    s = State(None)
    s.batch = dict(labels=labels, task=torch.tensor([0, 1, 1]), task_weight=torch.ones(3))
    s.batches, s.count = [s.batch], 6
    w = by_task().weights(s)*(labels[:, 1:] != -100)
    gap = float(w[0].sum() - w[1:].sum())
    return {'each task has the same share of the weights': abs(gap) < 1e-5,
            'the weights sum to the number of tokens': abs(float(w.sum()) - 6) < 1e-5}
