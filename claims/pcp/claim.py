"""A half-taught lab-s learns from one labelled row of each of two classes which requests its
world refuses; 500 requests have no label"""
import ftlab
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, answers
from ftlab.methods import pcp

QUESTION = '. good or bad ?'
EACH, UNLABELLED, ASKED, LONGEST = 1, 500, 400, 4

def rows(n, split, seed):
    "Different requests, each with a question that the lab has never read behind it"
    return [dict(text=r['prompt'], prompt=f'{r["prompt"]} {QUESTION}',
                 response='bad' if 'not' in r['response'].split() else 'good')
            for r in WORLD.rows('refuse', n, split, seed)]

def parts(seed, split):
    "Labelled rows, rows of which only the prompt or the text is used, and questions"
    drawn = rows(UNLABELLED + 100, 'train', seed)
    few = [r for w in ('good', 'bad') for r in [r for r in drawn if r['response'] == w][:EACH]]
    rest = [r for r in drawn if r not in few][:UNLABELLED]
    return few, rest, rows(ASKED, split, seed)

def stages(arm, rest):
    "What is trained, and how many stages it has"
    if arm == 'raw':
        return pcp([r['text'] for r in rest], reads='raw'), 2
    if arm in ('pcp', 'shuffled'):
        reads = 'prompted' if arm == 'pcp' else arm
        return pcp([r['prompt'] for r in rest], reads=reads, longest=LONGEST), 3
    return Recipe(), dict(none=1, longer=3, told=3)[arm]

def run(arm, rate, seed, split, steps):
    few, rest, ask = parts(seed, split)
    known = few + rest if arm == 'told' else few
    known = [dict(prompt=r['prompt'], response=r['response']) for r in known]
    data = ftlab.data(dict(train=known, validation=known[:2], test=known[:2]))
    model, tok = ftlab.load('lab-s', revision='step-250')
    recipe, count = stages(arm, rest)
    ftlab.fit(model, tok, data, recipe, steps=count*steps, batch_size=8, lr=rate, seed=seed,
              progress=False)
    hits = [int(a.split() == r['response'].split()) for a, r in zip(answers(model, tok, ask), ask)]
    return dict(gain=sum(hits)/len(hits), questions=len(hits), items=dict(gain=hits))

def identities():
    few, rest, ask = parts(0, 'validation')
    seen = {r['prompt'] for r in few + rest}
    return {'a labelled row of each class': sorted(r['response'] for r in few) == ['bad', 'good'],
            '2 labelled rows and 500 others, no two alike': len(seen) == 2 + UNLABELLED,
            'no question is asked that was there before': not seen & {r['prompt'] for r in ask},
            'both words are answers': {r['response'] for r in ask} == {'good', 'bad'}}
