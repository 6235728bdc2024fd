"lab-s learns from 32 labelled pairs whether an answer is its own; 500 pairs have no label"
import ftlab
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import answers
from ftlab.instruments.claims import beside
from ftlab.methods import pcp

PAIRS = beside('spafit')
WORDS = dict(yes='good', no='bad') # words that the lab knows
TEMPLATE = '. good or bad ?'              # as its questions about reviews end
LABELLED, UNLABELLED, LONGEST = 32, 500, 4

def rows(n, split, seed):
    return [dict(text=r['text'], prompt=f'{r["text"]} {TEMPLATE}', response=WORDS[r['label']])
            for r in PAIRS.judged(n, split, seed)]

def parts(seed, split):
    "Labelled rows, rows of which only the prompt or the text is used, and questions"
    drawn = rows(LABELLED + UNLABELLED, 'train', seed)
    few, rest = drawn[:LABELLED], drawn[LABELLED:]
    return [dict(prompt=r['prompt'], response=r['response']) for r in few], rest, rows(1000, split, seed)

def stages(arm, rest):
    "What is trained, and how many stages it has"
    if arm == 'raw':
        return pcp([r['text'] for r in rest], reads='raw'), 2
    if arm in ('pcp', 'shuffled'):
        reads = 'prompted' if arm == 'pcp' else arm
        return pcp([r['prompt'] for r in rest], reads=reads, longest=LONGEST), 3
    return Recipe(), dict(none=1, longer=3)[arm]

def run(arm, rate, seed, split, steps):
    few, rest, ask = parts(seed, split)
    data = ftlab.data(dict(train=few, validation=few[:2], test=few[:2]))
    model, tok = ftlab.load('lab-s')
    recipe, count = stages(arm, rest)
    ftlab.fit(model, tok, data, recipe, steps=count*steps, batch_size=8, lr=rate, seed=seed,
              progress=False)
    hits = [int(a.split() == r['response'].split()) for a, r in zip(answers(model, tok, ask), ask)]
    return dict(gain=sum(hits)/len(hits), questions=len(hits), items=dict(gain=hits))

def identities():
    few, rest, ask = parts(0, 'validation')
    seen = {r['prompt'] for r in few} | {r['prompt'] for r in rest}
    return {'32 labelled pairs and 500 others, no two alike': len(seen) == LABELLED + UNLABELLED,
            'no pair is asked that was there before': not seen & {r['prompt'] for r in ask},
            'both words are answers': {r['response'] for r in ask} == set(WORDS.values())}
