"MeZO beside the untouched model and beside backpropagation with the same number of rows"
from types import SimpleNamespace
import torch
import ftlab
from ftlab.instruments.compare import tune as choose
from ftlab.core.scorers import WORLD, exact_match
from ftlab.native import perturb_
from ftlab.trainers.optimizers.mezo import MeZO, seed_of

REVISION, SKILL, STEPS, BATCH, ITEMS = 'step-250', 'refuse', 600, 16, 400
GRIDS = dict(mezo=(1e-4, 2e-4, 4e-4), full=(1e-4, 3e-4, 1e-3))

def train(arm, rate, seed, split, items):
    model, tok = ftlab.load('lab-s', revision=REVISION)
    tokens = 0
    if arm != 'base':
        run = ftlab.fit(model, tok, ftlab.data(SKILL, seed=seed), ftlab.methods.get(arm),
                        steps=STEPS, batch_size=BATCH, lr=rate, seed=seed, progress=False)
        tokens = run.cost['tokens']*(2 if arm == 'mezo' else 1)
    return dict(score=exact_match(model, tok, WORLD.rows(SKILL, items, split, seed)), tokens=tokens)

def tune() -> dict:
    def score(arm, rate):
        try:
            return train(arm, rate, 10_000, 'validation', 300)['score']
        except FloatingPointError:
            return 0. # it diverged
    return choose(score, GRIDS)

def run(seed, tuned):
    out = {a: train(a, tuned[a]['rate'] if a in tuned else None, seed, 'test', ITEMS) for a in ('mezo', 'full', 'base')}
    return out | dict(bar=dict(score=.85*out['full']['score']))

def identities() -> dict[str, bool]:
    model, tok = ftlab.load('lab-s', revision=REVISION)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    seen = {}
    class Look:
        def after_step(self, state):
            seen.update(moves=state.extra['moves'],
                        grads=[p for p in state.model.parameters() if p.grad is not None])
    ftlab.fit(model, tok, ftlab.data(SKILL, n=64), ftlab.methods.mezo(), steps=5, batch_size=BATCH,
              lr=1e-4, callbacks=(Look(),), progress=False)
    params = dict(model.named_parameters())
    again = {n: p.clone() for n, p in start.items()}
    MeZO(again, SimpleNamespace(lr=1e-4, weight_decay=0., factor=None)).replay(seen['moves'])
    w = {'w': torch.tensor([1., -2., .5, 3.])}
    A = torch.tensor([1., 2., 3., 4.])
    step = MeZO(w, SimpleNamespace(lr=0., weight_decay=0., factor=lambda s: 1.))
    state, estimates = SimpleNamespace(seed=0, step=0, extra={}, model=torch.nn.Identity()), []
    for state.step in range(4000):
        step(state, [lambda: (A*w['w']**2).sum()/2])
        z = torch.zeros(4)
        perturb_([z], seed_of(0, state.step), 1.)
        estimates.append(step.log[-1][1]*z)
    e = torch.stack(estimates)
    off = (e.mean(0) - A*torch.tensor([1., -2., .5, 3.])).abs()
    return {
        'the log of seeds and numbers gives the weights again, bit for bit': all(
            torch.equal(again[n], p) for n, p in params.items())
        and any((params[n] != start[n]).any() for n in start),
        'no gradient is ever there': not seen['grads'],
        'on a quadratic the estimate is right on average': bool((off < 4*e.std(0)/4000**.5).all())}
