"What DPO's loss is, on five answers and on random logits"
from types import SimpleNamespace
import torch
from ftlab.trainers.preferences import preference

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

def identities() -> dict[str, bool]:
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
    return {'the gradient vanishes at reference * exp(reward/beta)': bool(g.abs().max() < 1e-6),
            'and not elsewhere': bool(
                torch.autograd.grad(population(q := moved.clone().requires_grad_()),
                                    q)[0].abs().max() > 1e-3),
            'every pair costs log 2 at the reference': abs(float(start) - .6931471805599453) < 1e-6,
            'a constant added to all logits changes nothing': torch.allclose(
                loss(moved, i, j), loss(moved + 3., i, j))}
