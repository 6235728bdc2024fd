"""A half-taught lab-s reads one pass over 240 of 8,000 texts like those of its pretraining, chosen in three ways, and
is tuned on 64 rows of two skills, one that the pretraining has plenty of and one that it hardly has"""
import math
import random
import ftlab
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, nll
from ftlab.lab.world import SKILLS
from ftlab.trainers.curation.got_d import got_d

COMMON, RARE = 'tavi', 'selen' # .05 and .012 of the pretraining
POOL, BUDGET, EACH, ASKED = 8000, 240, 32, 200
READING = .5 # steps of reading, of those of tuning

def pool(seed) -> list[dict]:
    "Training rows of all skills, as often as in the pretraining"
    names = [s for s, k in SKILLS.items() if k.weight]
    drawn = random.Random(seed).choices(names, [SKILLS[s].weight for s in names], k=POOL)
    out = []
    for s in names:
        stream = WORLD.stream(s, 'train', seed + 1)
        out += [next(stream) for _ in range(drawn.count(s))]
    random.Random(seed).shuffle(out)
    return [dict(prompt=r['prompt'], response=r['response']) for r in out]

def rows(n, split, seed) -> list[dict]:
    return [dict(prompt=r['prompt'], response=r['response'])
            for s in (COMMON, RARE) for r in WORLD.rows(s, n, split, seed)]

def run(arm, rate, seed, split, steps):
    few, ask = rows(EACH, 'train', seed + 2), rows(ASKED, split, seed + 3)
    model, tok = ftlab.load('lab-s', revision='step-250')
    recipe = Recipe() if arm in ('none', 'longer') else got_d(pool(seed), BUDGET, by=arm,
                                                              share=READING)
    data = ftlab.data(dict(train=few, validation=few[:2], test=few[:2]))
    most = steps if arm == 'none' else round(steps*(1 + READING))
    ftlab.fit(model, tok, data, recipe, steps=most, batch_size=16, lr=rate, seed=seed,
              progress=False)
    parts = {s: nll(model, tok, part) for s, part in ((COMMON, ask[:ASKED]), (RARE, ask[ASKED:]))}
    whole = nll(model, tok, ask)
    return dict(loss=math.log(whole), gain=-math.log(whole), common=parts[COMMON], rare=parts[RARE],
                questions=len(ask))

def identities() -> dict[str, bool]:
    texts, few = pool(0), rows(EACH, 'train', 2)
    return {'8,000 candidates and 64 rows': (len(texts), len(few)) == (POOL, 2*EACH),
            'the pool has more of the common skill than may be read, and some of the rare one':
                sum(COMMON in r['prompt'].split() for r in texts) > BUDGET
                and any(RARE in r['prompt'].split() for r in texts),
            'no row of the target is in the pool':
                not {r['prompt'] for r in texts} & {r['prompt'] for r in few},
            'one pass over what is chosen': BUDGET == 30*READING*16}
