"Reward at equal distance: preferences, their chosen answers alone, and reinforcement learning"
import copy
import random
from functools import lru_cache, partial
from types import SimpleNamespace
import torch
import ftlab
from ftlab.core.batches import collate
from ftlab.core.generate import generate
from ftlab.core.model import evaluating, model_inputs, pad_id
from ftlab.core.scorers import WORLD, judge
from ftlab.core.tokens import encode_all
from ftlab.lab.world import ATTRIBUTES
from ftlab.trainers.objective import kl, loss_mask
from ftlab.trainers.preferences import judged_pairs, preference

SKILL, ITEMS, PARTS = 'write', 600, 6
BUDGETS = dict(near=.3, middle=1., far=3.) # nats an answer

@lru_cache(4)
def liked(seed):
    "Half of the colors, pets, jobs and foods: the words that this seed's judge likes"
    rng = random.Random(f'taste/{seed}')
    return {w for k in ('color', 'pet', 'job', 'food')
            for w in rng.sample(ATTRIBUTES[k], len(ATTRIBUTES[k])//2)}

def reward(row, answer, seed):
    "The share of the asked words that are right (of the kind, not ruled out, no repeats) and liked"
    said = answer.split()
    good = ' '.join(w for w in said if w in liked(seed))
    asked = len(row['response'].split())
    return judge(row, good)*max(asked, len(good.split()))/max(asked, len(said))

@lru_cache(2)
def begin(seed, steps):
    "The reference, and pairs of its own answers: two to each question, the better one first"
    model, tok = ftlab.load('lab-s')
    asked = ftlab.data(SKILL, seed=seed, n=32*steps).train
    score = partial(reward, seed=seed)
    return model, tok, asked, judged_pairs(model, tok, asked, score=score, draws=2, seed=seed)

@torch.no_grad()
def measured(model, reference, tok, rows, seed):
    """The mean reward of drawn answers, and the KL divergence from the reference, in nats an answer:
    summed over each answer's tokens, whole distributions compared at each"""
    with torch.random.fork_rng(): # a run's own draws must not depend on being watched
        said = generate(model, tok, [r['prompt'] for r in rows], max_new_tokens=5, sample=True,
                        generator_seed=seed)
    enc = encode_all([dict(r, response=a) for r, a in zip(rows, said)], tok, 'text', 256)
    far = 0.
    for i in range(0, len(enc), 200):
        b = collate(enc[i:i + 200], pad_id(tok))
        with evaluating(model), evaluating(reference):
            p, q = (m(**model_inputs(b)).logits[:, :-1] for m in (model, reference))
        far += float(kl(p, q)[loss_mask(b['labels'])].sum())
    return dict(reward=sum(reward(r, a, seed) for r, a in zip(rows, said))/len(rows),
                valid=sum(judge(r, a) for r, a in zip(rows, said))/len(rows), kl=far/len(rows))

@lru_cache(2)
def at_start(seed, split, steps):
    reference, tok, *_ = begin(seed, steps)
    return measured(reference, reference, tok, WORLD.rows(SKILL, ITEMS, split, seed), seed)

def reward_within(path, budget):
    """The reward where the run has come this far from its reference; at its end, if it never does.
    Between two measurements it is read on the root of the distance, with which reward grows"""
    for a, b in zip(path, path[1:]):
        if b['kl'] >= budget:
            near, there, far = (max(0., x)**.5 for x in (a['kl'], budget, b['kl']))
            share = (there - near)/(far - near)
            return a['reward'] + share*(b['reward'] - a['reward'])
    return path[-1]['reward']

def run(arm, rate, seed, split, steps):
    reference, tok, asked, pairs = begin(seed, steps)
    rows, path = WORLD.rows(SKILL, ITEMS, split, seed), [dict(at_start(seed, split, steps), step=0)]
    if arm != 'reference':
        recipe = dict(dpo=ftlab.methods.dpo, preferred=ftlab.methods.full,
                      grpo=partial(ftlab.methods.grpo, reward=partial(reward, seed=seed)))[arm]()
        model, train = copy.deepcopy(reference), asked if arm == 'grpo' else pairs

        class Watch:
            def after_step(self, state):
                if state.step in {round(steps*k/PARTS) for k in range(1, PARTS + 1)}:
                    path.append(dict(measured(model, reference, tok, rows, seed), step=state.step))

        ftlab.fit(model, tok, ftlab.data(dict(train=train, validation=train[:2], test=train[:2])),
                  recipe, steps=steps, batch_size=64 if arm == 'grpo' else 32, lr=rate, seed=seed,
                  schedule='constant', callbacks=(Watch(),), progress=False)
    for p in path:
        p['gain'] = p['reward'] - path[0]['reward']
    within = {f'reward_{k}': reward_within(path, b) for k, b in BUDGETS.items()}
    return dict(path[-1], **within, pairs=len(pairs), path=path,
                excluded={'questions whose two answers scored the same': len(asked) - len(pairs)})

def one_word(logits, reference, chosen, rejected):
    "A state in which every answer is one word: pairs of (chosen, rejected)"
    n = len(chosen)
    words = torch.cat([chosen, rejected])
    y = torch.stack([torch.full_like(words, -100), words], 1)
    full = lambda x: x.expand(2*n, 2, -1)
    s = SimpleNamespace(batch=dict(labels=y), forward=lambda: full(logits),
                        models=dict(reference=lambda: SimpleNamespace(logits=full(reference))))
    s.batches = [s.batch]
    return s

def identities():
    beta, reference, reward = (.5, torch.tensor([.5, .2, .15, .1, .05], dtype=torch.double).log(),
                               torch.tensor([0., .2, -.3, .8, .5], dtype=torch.double))
    i, j = (x.flatten() for x in torch.meshgrid(torch.arange(5), torch.arange(5), indexing='ij'))
    wins = torch.sigmoid(reward[i] - reward[j])
    best = (reference + reward/beta).log_softmax(0).requires_grad_()

    def loss(logits, c, w):
        return preference(beta)(one_word(logits, reference, c, w))

    def population(logits):
        return sum(p*loss(logits, c[None], w[None]) for p, c, w in zip(wins, i, j))

    g, = torch.autograd.grad(population(best), best)
    start = loss(reference.clone(), i, j)
    shift = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    moved = reference + shift
    elsewhere, = torch.autograd.grad(population(q := moved.clone().requires_grad_()), q)
    return {'the gradient vanishes at reference * exp(reward/beta)': bool(g.abs().max() < 1e-6),
            'and not elsewhere': bool(elsewhere.abs().max() > 1e-3),
            'every pair costs log 2 at the reference': abs(float(start) - .6931471805599453) < 1e-6,
            'a constant added to all logits changes nothing': torch.allclose(
                loss(moved, i, j), loss(moved + 3., i, j))}
