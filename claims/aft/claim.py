"""Lists written backwards by a half-taught model: its own right and wrong answers, ranked with and without a
constraint, against more fine-tuning on the data's answers or on all right ones"""
import copy
from functools import lru_cache
import ftlab
import torch
from ftlab.core.batches import collate
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, answers, judge
from ftlab.core.tokens import encode_each
from ftlab.methods import aft
from ftlab.trainers.losses.aft import sampled, scores

SKILL, ROWS, ITEMS, DRAWS, BATCH, FIRST = 'reverse', 320, 1000, 6, 16, 40
ARMS = dict(boundary=aft(), detach=aft('detach'), none=aft('none'), sft=Recipe(), tuned=None)

@lru_cache(2)
def begin(seed):
    "A model tuned on worked answers, and its own answers to the questions"
    model, tok = ftlab.load('lab-s', revision='step-250')
    rows = WORLD.rows(SKILL, ROWS, 'train', seed)
    ftlab.fit(model, tok, of(rows), Recipe(), steps=FIRST, lr=1e-3, seed=seed, schedule='cosine',
              batch_size=32, progress=False)
    return model, tok, sampled(model, tok, rows, draws=DRAWS, seed=seed)

def of(rows, **more):
    return ftlab.data(dict(train=rows, validation=rows[:2], test=rows[:2]), **more)

@lru_cache(4)
def judged(seed, split):
    "Right and wrong answers of the tuned model to questions that are not learned from"
    model, tok, _ = begin(seed)
    return sampled(model, tok, WORLD.rows(SKILL, 200, split, seed + 500), draws=DRAWS, seed=seed)

@torch.no_grad()
def measured(model, tok, rows) -> dict:
    "The share of pairs of a right and a wrong answer in which the right one has the higher score; the wrong ones' mean"
    flat = [(i, good, dict(r, response=a)) for i, r in enumerate(rows)
            for good, own in ((1, [r['response'], *r['right']]), (0, r['wrong'])) for a in own]
    batch = collate(encode_each([r for *_, r in flat], tok, 'text'), tok.pad_token_id)
    logits = model(batch['input_ids'], attention_mask=batch['attention_mask']).logits
    s = scores(logits, batch['labels']).tolist()
    sides = [[[x for (j, good, _), x in zip(flat, s) if j == i and good == g] for g in (1, 0)]
             for i in range(len(rows))]
    pairs = [float(p > n) for good, bad in sides for p in good for n in bad]
    wrong = [x for _, bad in sides for x in bad]
    return dict(assessment=sum(pairs)/len(pairs), wrong=sum(wrong)/len(wrong))

def run(arm, rate, seed, split, steps):
    model, tok, rows = begin(seed)
    if ARMS[arm] is not None:
        model = copy.deepcopy(model)
        ftlab.fit(model, tok, of(rows, carry=['right', 'wrong']), ARMS[arm], steps=steps, lr=rate,
                  seed=seed, schedule='cosine', batch_size=BATCH, progress=False)
    asked = WORLD.rows(SKILL, ITEMS if split == 'test' else 400, split, seed)
    right = [judge(r, a) for r, a in zip(asked, answers(model, tok, asked))]
    return dict(score=sum(right)/len(right), **measured(model, tok, judged(seed, split)),
                items=dict(score=right))

def identities() -> dict[str, bool]:
    from ftlab.trainers.losses.aft import ranking
    good, bad = torch.tensor([-1., -.5]), torch.tensor([-1.15], requires_grad=True)
    g, = torch.autograd.grad(ranking(good, bad), bad)
    return {'the gradient vanishes beta below the lowest right score': bool(g.abs() < 1e-6)}
