"""Norms alone, a part of them, and full fine-tuning on one task with labels: which of some letters is the
last in the alphabet"""
import ftlab
from ftlab.adapters.delta import Entries
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD
from ftlab.instruments.bench import scores
from ftlab.methods import layernorm_tuning

TAUGHT, ASKED = 2000, 1000
RARE = 'abc' # hardly ever the last: left out, so that every label is taught

def pooler(model, batches=None, seed=0):
    "The pooler: fresh in lab-e, so that it belongs to the head and trains in every arm"
    return {n: True for n, _ in model.named_parameters() if '.pooler.' in n}

def with_pooler(recipe):
    def select(model, batches=None, seed=0):
        return recipe.select(model, batches, seed) | pooler(model)

    return Recipe(recipe.name, select=select, delta=Entries)

NORMS = with_pooler(layernorm_tuning())
ARMS = dict(norms=NORMS, norms_quarter=NORMS, fifth=with_pooler(layernorm_tuning(.2)),
            random=with_pooler(layernorm_tuning(.2, 'random')), head=Recipe('head', select=pooler),
            full=Recipe(), full_quarter=Recipe())

def rows(n, split, seed):
    some = WORLD.rows('max', n + n//5, split, seed)
    return [dict(text=r['prompt'], label=r['response']) for r in some
            if r['response'] not in RARE][:n]

def run(arm, rate, seed, split, steps):
    asked = rows(ASKED, split, seed)
    data = ftlab.data(rows(TAUGHT, 'train', seed), validation=asked, test=asked)
    model, tok = ftlab.load('lab-e', labels=data.labels, seed=seed)
    ftlab.fit(model, tok, data, ARMS[arm], steps=steps, batch_size=32, lr=rate, seed=seed,
              progress=False)
    right = scores('accuracy', model, tok, data.test, data)
    return dict(accuracy=sum(right)/len(right), questions=len(right), items=dict(accuracy=right))

def identities():
    taught, first, asked = (rows(*x, 0) for x in ((TAUGHT, 'train'), (ASKED, 'validation'),
                                                  (ASKED, 'test')))
    texts = [{r['text'] for r in part} for part in (taught, first, asked)]
    return {'no question is taught, or asked in two splits':
                sum(map(len, texts)) == len(set.union(*texts)) == TAUGHT + 2*ASKED,
            'every label that is asked is taught':
                {r['label'] for r in first + asked} <= {r['label'] for r in taught}}
