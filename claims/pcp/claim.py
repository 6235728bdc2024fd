"""lab-s learns from 32 labelled rows to answer a new question about reviews, of which it
understands three quarters; 500 more have no label"""
import re
import ftlab
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, answers
from ftlab.methods import pcp

WORDS = dict(good='great', bad='awful') # as in the paper's prompts, where bad is 'terrible'
FORMS = re.compile(r'(?:review : |guest : |)(.+) \. (?:the (\w+) is|what does this guest say of the (\w+) \?'
                   r'|good or bad (\w+) \?)')
LABELLED, UNLABELLED, LONGEST = 32, 500, 4

def rows(n, split, seed, without=()):
    "Different reviews, each with a question in a form that the lab has never read"
    out = {}
    for r in WORLD.rows('review', n + n//2, split, seed):
        text, *aspects = FORMS.fullmatch(r['prompt']).groups()
        prompt = f'{text} . how is the {next(filter(None, aspects))} ?'
        if prompt not in without:
            out[prompt] = dict(text=text, prompt=prompt, response=WORDS[r['response']])
    return list(out.values())[:n]

def parts(seed, split):
    "Labelled rows, rows of which only the prompt or the text is used, and questions"
    ask = rows(1000 if split == 'test' else 400, split, seed)
    drawn = rows(LABELLED + UNLABELLED, 'train', seed, without={r['prompt'] for r in ask})
    return drawn[:LABELLED], drawn[LABELLED:], ask

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
    model, tok = ftlab.load('lab-s')
    recipe, count = stages(arm, rest)
    ftlab.fit(model, tok, data, recipe, steps=count*steps, batch_size=8, lr=rate, seed=seed,
              progress=False)
    hits = [int(a.split() == r['response'].split()) for a, r in zip(answers(model, tok, ask), ask)]
    return dict(gain=sum(hits)/len(hits), questions=len(hits), items=dict(gain=hits))

def identities():
    few, rest, ask = parts(0, 'validation')
    seen = {r['prompt'] for r in few} | {r['prompt'] for r in rest}
    return {'32 labelled rows and 500 others, no two alike': len(seen) == LABELLED + UNLABELLED,
            'no question is asked that was there before': not seen & {r['prompt'] for r in ask},
            'both words are answers': {r['response'] for r in ask} == set(WORDS.values())}
