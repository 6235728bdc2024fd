"""GRPO beside fine-tuning on one's own right answers, drawn once (RFT) or at every step (online
RFT), on a task with many right answers; all draw and train on equally many"""
from functools import lru_cache
import torch
import ftlab
from ftlab.core.data import Data
from ftlab.core.generate import generate
from ftlab.core.recipe import Recipe
from ftlab.trainers.rl.grpo import advantages, grpo, reward_alone
from ftlab.trainers.rl.razor import other_order, own_answers, questions

MODEL, BATCH, GROUP, LONGEST = 'lab-s', 64, 8, 8
ITEMS = dict(validation=400, test=1000)

def outcomes(model, tok, rows):
    said = generate(model, tok, [r['prompt'] for r in rows], max_new_tokens=LONGEST)
    return [other_order(r, a) for r, a in zip(rows, said)]

@lru_cache(2)
def own_right_answers(seed, steps):
    "As many draws from the base as GRPO makes in all its steps, and those of them that are right"
    model, tok = ftlab.load(MODEL)
    asked = [r for r in questions(steps*BATCH//GROUP, 'train', seed) for _ in range(GROUP)]
    said = own_answers(model, tok, [r['prompt'] for r in asked], LONGEST, seed)
    return len(asked), [dict(r, response=s['response']) for r, s in zip(asked, said)
                        if other_order(r, s['response'])]

def data_of(rows):
    return Data(train=rows, validation=rows[:2], test=rows[:2], kind='text', name='another order')

def run(arm, rate, seed, split, steps):
    model, tok = ftlab.load(MODEL)
    held_out, found = questions(ITEMS[split], split, seed), {}
    if arm == 'rft':
        drawn, right = own_right_answers(seed, steps)
        recipe, data = Recipe('rft'), data_of(right)
        gold = {r['prompt']: r['response'] for r in questions(steps*BATCH//GROUP, 'train', seed)}
        found = dict(gold_share=sum(r['response'] == gold[r['prompt']] for r in right)/len(right),
                     different=len({(r['prompt'], r['response']) for r in right})/len(right),
                     excluded={'drawn answers that are wrong': drawn - len(right)})
    elif arm != 'base':
        data = data_of(questions(steps*BATCH//GROUP, 'train', seed))
        recipe = (grpo(GROUP, reward=other_order) if arm == 'grpo' else
                  grpo(GROUP, beta=0., reward=other_order, advantage=reward_alone))
    if arm != 'base':
        ftlab.fit(model, tok, data, recipe, steps=steps, batch_size=BATCH, lr=rate, seed=seed,
                  progress=False)
    right = outcomes(model, tok, held_out)
    return found | dict(score=sum(right)/len(right), items=dict(score=right))

def identities():
    r = torch.tensor([[1., 0., 0., 1.], [1., 1., 1., 1.], [0., 0., 0., 0.]])
    a = advantages(r)
    shifted = torch.allclose(advantages(r + 3), a, atol=1e-5)
    return {'a group of equals teaches GRPO nothing': bool((a[1:] == 0).all()),
            'the advantages of a group sum to zero': bool(a.sum(1).abs().max() < 1e-5),
            'a shift of all rewards changes nothing': shifted,
            'online RFT learns from a group in which all are right': bool(reward_alone(r)[1].all())}
