"""Masked and plain fine-tuning on the same 200 lists: held-out accuracy,
and how much a swapped letter of the answer so far changes what follows"""
import random
import torch
import ftlab
from ftlab.instruments.compare import tune as choose
from ftlab.core.batches import collate, encode
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, exact_match
from ftlab.core.state import State
from ftlab.lab.world import LETTERS
from ftlab.trainers.objective import IGNORE
from ftlab.trainers.losses.masked_thought import mask_answers

SKILL, ROWS, STEPS, ITEMS, GRID = 'reverse', 200, 240, 1000, (1e-4, 3e-4, 1e-3)
ARMS = dict(masked_thought=ftlab.methods.masked_thought(), full=Recipe())

def train(arm, rate, seed):
    model, tok = ftlab.load('lab-s', revision='step-250')
    ftlab.fit(model, tok, ftlab.data(SKILL, seed=seed, n=ROWS), ARMS[arm], steps=STEPS, lr=rate,
              seed=seed, progress=False)
    return model, tok

@torch.no_grad()
def leaning(model, tok, rows, rng):
    "Mean change of the predictions after a swapped letter of the answer so far"
    letters, out = set(tok.convert_tokens_to_ids(LETTERS)), []
    for r in rows:
        e = encode(r, tok, 'text')
        x = torch.tensor([e['input_ids']])
        places = [i for i, y in enumerate(e['labels']) if y in letters]
        i, other = rng.choice(places[:-1]), x.clone()
        other[0, i] = rng.choice(sorted(letters - {int(x[0, i])}))
        p, q = (model(z).logits[0, i:-2].softmax(-1) for z in (x, other))
        out.append(float((p - q).abs().sum(-1).mean()/2))
    return sum(out)/len(out)

def tune() -> dict:
    return choose(lambda arm, rate: exact_match(*train(arm, rate, 10_000),
                                                WORLD.rows(SKILL, 300, 'validation', 10_000)),
                  {a: GRID for a in ARMS})

def run(seed, tuned):
    rows, out = WORLD.rows(SKILL, ITEMS, 'test', seed), {}
    for arm in ARMS:
        model, tok = train(arm, tuned[arm]['rate'], seed)
        out[arm] = dict(score=exact_match(model, tok, rows),
                        leaning=leaning(model, tok, rows[:400], random.Random(seed)))
    return out

def identities() -> dict[str, bool]:
    model, tok = ftlab.load('lab-s')
    s = State(model, tok)
    s.steps, s.step, s.pad_id = 100, 100, tok.pad_token_id
    b = collate([encode(r, tok, 'text') for r in ftlab.data(SKILL, n=200).train], tok.pad_token_id)
    new = mask_answers()(b, s)
    hidden = new['input_ids'] != b['input_ids']
    s.step = 0
    return {'the labels are as they were': torch.equal(new['labels'], b['labels']),
            'nothing of the question is hidden': not bool((hidden & (b['labels'] == IGNORE)).any()),
            'something of the answer is': bool(hidden.any()),
            'at the first step nothing is hidden': torch.equal(
                mask_answers()(b, s)['input_ids'], b['input_ids'])}
