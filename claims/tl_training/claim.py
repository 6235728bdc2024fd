"""Tool calls in the lab: twenty tools whose names share their first word, a cue for each that the
data teach, five of them in each prompt; one recorded call in six is wrong and fails"""
import random
from functools import lru_cache
import ftlab
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import answers
from ftlab.lab.world import ASPECTS, CITIES, NOUNS, THINGS
from ftlab.methods import tl_training

TOOLS = [f'{verb} {thing}' for verb, at in zip('open carry fix clean'.split(), range(4))
         for thing in THINGS[5*at:5*at + 5]]
DAYS = ['today', 'tomorrow', 'monday', 'sunday']
FAILING = .2     # of the conversations; a sixth of all calls, as in the paper's data
FAILED = 'i do not know'
PATTERNS = dict(tools=r'(\w+ \w+) [,:]', call=r'call (\w+ \w+) \(')
ARMS = dict(tl=tl_training(errors=FAILED, **PATTERNS), full=Recipe(),
            masked=tl_training(w_max=1., errors=FAILED, **PATTERNS),
            keys=tl_training(errors='', **PATTERNS), base=None)

def cues(seed) -> dict[str, str]:
    "What each tool is asked for by"
    words = random.Random(f'cues/{seed}').sample(NOUNS + ASPECTS, len(TOOLS))
    return dict(zip(TOOLS, words))

def near(tool) -> list[str]:
    "The tools whose names begin with the same word"
    return [t for t in TOOLS if t != tool and t.split()[0] == tool.split()[0]]

def request(rng, cue) -> tuple[str, str, list[str]]:
    "A prompt, the right call, and the tools that are offered: three share a first word"
    tool = rng.choice(TOOLS)
    beside = [t for t in TOOLS if t != tool and t not in near(tool)]
    offered = rng.sample([tool, *rng.sample(near(tool), 2), *rng.sample(beside, 2)], 5)
    city, day = rng.choice(CITIES), rng.choice(DAYS)
    prompt = f'{" , ".join(offered)} : {day} the {cue[tool]} in {city}'
    return prompt, f'call {tool} ( {city} , {day} )', offered

def talk(rng, cue) -> dict:
    "A recorded conversation: the right call, or another offered tool, a failure, and then the right call"
    prompt, call, offered = request(rng, cue)
    tool = call[5:].split(' (')[0]
    said = [dict(role='user', content=prompt), dict(role='assistant', content=call)]
    if rng.random() < FAILING:
        wrong = call.replace(tool, rng.choice([t for t in offered if t != tool]))
        said[1:1] = [dict(role='assistant', content=wrong), dict(role='tool', content=FAILED)]
    return dict(messages=said)

@lru_cache(1)
def taught(seed):
    rng, cue = random.Random(f'tools/{seed}'), cues(seed)
    return ftlab.data([talk(rng, cue) for _ in range(2400)], seed=seed)

def questions(split, seed) -> list[dict]:
    rng, cue = random.Random(f'tools/{split}/{seed}'), cues(seed)
    rows = [request(rng, cue)[:2] for _ in range(1000 if split == 'test' else 400)]
    return [dict(prompt=f'<user> {p} <assistant>', response=call) for p, call in rows]

def score(model, tok, rows) -> dict:
    "Whole calls, and tools, that are right"
    said = [a.strip() for a in answers(model, tok, rows)]
    right = [int(a == r['response']) for a, r in zip(said, rows)]
    named = [int(a.split(' (')[0] == r['response'].split(' (')[0]) for a, r in zip(said, rows)]
    return dict(score=sum(right)/len(rows), tool=sum(named)/len(rows),
                items=dict(score=right, tool=named))

def run(arm, rate, seed, split, steps):
    model, tok = ftlab.load('lab-s')
    if ARMS[arm] is not None:
        ftlab.fit(model, tok, taught(seed), ARMS[arm], steps=steps, lr=rate, seed=seed,
                  schedule='cosine', warmup=steps//10, batch_size=32, progress=False)
    return score(model, tok, questions(split, seed))

def identities() -> dict[str, bool]:
    from ftlab.trainers.losses.tl_training import call_weights, departures
    weights = call_weights(9, {1, 2}, 9.)
    return {'key tokens weigh as much as the others of a call': abs(sum(weights[1:3])*2 - 9) < 1e-6,
            'with a bound of 1 all weights are 1': call_weights(9, {1, 2}, 1.) == [1.]*9,
            'a name is decided at its first character and where others leave it':
                departures('open key', ['open map', 'fix bell', 'open key']) == [0, 5]}
