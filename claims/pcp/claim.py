"lab-s learns from 32 labelled pairs whether an answer is its own; 500 pairs have no label"
import ftlab
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import answers
from ftlab.instruments.claims import beside
from ftlab.methods import pcp

PAIRS = beside('spafit')
WORDS = dict(yes='good', no='bad') # words that the lab knows
LABELLED, UNLABELLED = 32, 500
READS = dict(pcp='prompted', raw='raw', shuffled='shuffled')

def rows(n, split, seed):
    return [dict(prompt=f'review : {r["text"]}', response=WORDS[r['label']])
            for r in PAIRS.judged(n, split, seed)]

def parts(seed, split):
    "Labelled rows, prompts without a label, and questions"
    drawn = rows(LABELLED + UNLABELLED + 4, 'train', seed)
    return drawn[:LABELLED], [r['prompt'] for r in drawn[LABELLED:]], rows(1000, split, seed)

def run(arm, rate, seed, split, steps):
    few, prompts, ask = parts(seed, split)
    data = ftlab.data(dict(train=few, validation=ask[:2], test=ask[:2]))
    model, tok = ftlab.load('lab-s')
    recipe = pcp(prompts, reads=READS[arm], longest=4) if arm in READS else Recipe()
    # each stage has `steps`; tuned alone, the model has those of one stage, or of all three
    total = dict(none=steps).get(arm, 3*steps)
    ftlab.fit(model, tok, data, recipe, steps=total, batch_size=8, lr=rate, seed=seed,
              progress=False)
    hits = [int(a.split() == r['response'].split()) for a, r in zip(answers(model, tok, ask), ask)]
    return dict(gain=sum(hits)/len(hits), questions=len(hits), items=dict(gain=hits))

def identities():
    few, prompts, ask = parts(0, 'validation')
    return {'no labelled pair is among those without a label':
            not {r['prompt'] for r in few} & set(prompts),
            'both words are answers': {r['response'] for r in ask} == set(WORDS.values())}
