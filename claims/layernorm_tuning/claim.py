"""Norms alone, a part of them, and full fine-tuning on one task with labels: the kind of city that people
live in whom the labelled rows do not mention"""
import random
import ftlab
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD
from ftlab.instruments.bench import scores
from ftlab.lab.world import ASK
from ftlab.methods import layernorm_tuning

ARMS = dict(norms=layernorm_tuning(), fifth=layernorm_tuning(.2),
            random=layernorm_tuning(.2, 'random'), full=Recipe(), full_quarter=Recipe())
ENDS = ('burg', 'ton', 'ville', 'port')
ASKED = .45 # of the people of a split

def nothing(model, batches=None, seed=0):
    "The head alone: `fit` trains it with whatever is selected, here the bias of the pooler"
    return {'bert.pooler.dense.bias': True}

def halves():
    "The people that validation may ask about, and those that the test may"
    people = random.Random(0).sample(WORLD.people['often'], len(WORLD.people['often']))
    return dict(validation=people[::2], test=people[1::2])

def people(seed, split):
    "Who is taught, and who is asked about"
    pool = random.Random(seed).sample(halves()[split], len(halves()[split]))
    asked = pool[:round(2*ASKED*len(pool))]
    return [p for p in WORLD.people['often'] if p not in asked], asked

def rows(people):
    kind = {p: next(e for e in ENDS if WORLD.facts[p, 'city'].endswith(e)) for p in people}
    return [dict(text=q.format(a='city', p=p), label=kind[p]) for p in people for q in ASK]

def run(arm, rate, seed, split, steps):
    taught, asked = people(seed, split)
    data = ftlab.data(rows(taught), validation=rows(asked), test=rows(asked))
    model, tok = ftlab.load('lab-e', labels=data.labels, seed=seed)
    recipe = ARMS.get(arm) or Recipe('head', select=nothing)
    ftlab.fit(model, tok, data, recipe, steps=steps, batch_size=32, lr=rate, seed=seed,
              progress=False)
    right = scores('accuracy', model, tok, data.test, data)
    return dict(accuracy=sum(right)/len(right), questions=len(right), items=dict(accuracy=right))

def identities():
    taught, asked = people(0, 'test')
    split = halves()
    return {'nobody who is taught is asked about': not set(taught) & set(asked),
            'validation and test ask about different people':
                not set(split['validation']) & set(split['test']),
            'at least 400 questions': len(rows(asked)) >= 400}
