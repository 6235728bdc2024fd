"""DFT and plain fine-tuning on the same rows, half of whose answers are scrambled;
the bench is that of every claim whose arms are Recipes"""
import random
from dataclasses import replace
import torch
import ftlab
from ftlab.instruments.claims import Ground, run_seed, train_arm
from ftlab.instruments.compare import tune as best_rates
from ftlab.trainers.losses.dft import probability

STEPS, GRID = 60, (1e-4, 3e-4, 1e-3)

class Scrambled(Ground):
    """The skill, with the letters of half of the training answers in a random order;
    validation and test questions as they were"""
    def data(self, seed):
        d, rng = super().data(seed), random.Random(f'scrambled/{seed}')
        def spoil(row):
            words = row['response'].split()
            return (dict(row, response=' '.join(rng.sample(words, len(words)))) if rng.random() < .5
                    else row)
        return replace(d, train=[spoil(r) for r in d.train])

BENCH = Scrambled('lab-s', 'reverse', revision='step-500', items=1000, old_items=400,
                  validation_items=200, steps=STEPS, progress=False, batch_size=32)

def arms(*names) -> dict:
    return {n: dict(recipe=ftlab.methods.get(n), steps=STEPS) for n in names}

def choose(arms) -> dict:
    "The learning rate of each arm, chosen on the tuning seed"
    return best_rates(
        lambda arm, rate: train_arm(BENCH, arms[arm], rate, 10_000)[1].path[-1]['gain'],
        {a: GRID for a in arms})

ARMS = arms('dft', 'full')

def tune() -> dict:
    return choose(ARMS)

def run(seed, tuned) -> dict:
    return run_seed(BENCH, ARMS, {a: tuned[a]['rate'] for a in ARMS}, seed)

def identities() -> dict[str, bool]:
    x, y = (torch.randn(6, 9, requires_grad=True, generator=torch.Generator().manual_seed(0)),
            torch.arange(6))
    nll = torch.nn.functional.cross_entropy(x, y, reduction='none')
    plain, = torch.autograd.grad(nll.sum(), x, retain_graph=True)
    of = lambda alpha: torch.autograd.grad((probability(alpha)(nll).detach()*nll).sum(), x,
                                           retain_graph=True)[0]
    return {"a token's gradient is its probability times that of cross-entropy": torch.allclose(
                of(1.), (-nll).exp().detach()[:, None]*plain, atol=1e-7),
            'with alpha 0 it is plain fine-tuning': torch.equal(of(0.), plain)}
