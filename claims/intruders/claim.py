"""Full fine-tuning and LoRA stopped at equal accuracy: intruders, what they cost the old skills,
and what shrinking them gives back"""
from statistics import fmean
import torch
import ftlab
from ftlab.adapters.edit import write_change
from ftlab.instruments.compare import tune as tuned_rates
from ftlab.core.scorers import WORLD, exact_match, nll
from ftlab.evaluators.mechanisms.intruders import count_intruders, intruders, shrink_intruders
from ftlab.lab.world import OLD

RECIPES = dict(full=lambda: ftlab.methods.full(), lora=lambda: ftlab.methods.lora(r=2, alpha=4.))
GRIDS = dict(full=(3e-4, 1e-3, 3e-3), lora=(3e-3, 1e-2, 3e-2))

class Until:
    "Stops a run at the first look at which `share` of the questions are answered right"

    def __init__(self, tok, rows, share=.9, every=5):
        self.tok, self.rows, self.share, self.every = tok, rows, share, every

    def after_step(self, state):
        if state.step % self.every:
            return
        state.model.eval()
        state.stop = exact_match(state.model, self.tok, self.rows) >= self.share
        state.model.train()

def trained(name, rate, seed, steps, stop=True):
    model, tok = ftlab.load('lab-s')
    data = ftlab.data('new-procedure', seed=seed, n=4000)
    run = ftlab.fit(model, tok, data, RECIPES[name](), steps=steps, lr=rate, seed=seed,
                    schedule='constant', progress=False,
                    callbacks=(Until(tok, data.validation[:200]),) if stop else ())
    return run, data

def tune() -> dict:
    def score(name, rate):
        run, data = trained(name, rate, 10_000, 60, stop=False)
        return exact_match(run.model, run.tok, data.validation[:200])
    return {n: d['rate'] for n, d in tuned_rates(score, GRIDS, extend=1).items()}

def old_surprise(model, tok, seed) -> float:
    return fmean(nll(model, tok, WORLD.rows(s, 100, 'test', seed)) for s in OLD)

def run(seed, tuned) -> dict:
    base, tok = ftlab.load('lab-s')
    before, test = old_surprise(base, tok, seed), WORLD.rows('new-procedure', 1000, 'test', seed)
    out = {}
    for name in RECIPES:
        r, _ = trained(name, tuned[name], seed, 250)
        att = r.delta.attached
        counts = count_intruders(att)
        if name == 'full':
            counts = {n: k for n, k in counts.items() if '.layers.' in n} # the matrices that LoRA changes too
        out[name] = dict(intruders=fmean(counts.values()),
                         rise=old_surprise(r.model, tok, seed) - before,
                         accuracy=exact_match(r.model, tok, test), steps=len(r.log))
    first = {n: att.before(n).clone() for n, *_ in att.weights()}
    changes = shrink_intruders(.7)(att.changes(), r.model)
    att.fold()
    write_change(r.model, first, changes)
    rise = old_surprise(r.model, tok, seed) - before
    out['shrunk'] = dict(rise=rise, taken_back=1 - rise/max(out['lora']['rise'], 1e-6),
                         accuracy=exact_match(r.model, tok, test))
    return out

def identities() -> dict[str, bool]:
    g = torch.Generator().manual_seed(0)
    W = torch.randn(32, 48, generator=g, dtype=torch.float64).float()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    new = U @ torch.full((32, 1), 32**-.5)
    one = W + 100*new @ Vh[:1]
    model = torch.nn.Linear(48, 32, bias=False)
    model.weight.data = one.clone()
    edit = lambda lam: shrink_intruders(lam)({'weight': one - W}, model)['weight']
    return {
        'a matrix has no intruder beside itself': not intruders(W, W).any(),
        'restretching adds none': not intruders(W, U @ torch.diag(S.flip(0)) @ Vh).any(),
        'one strong new direction is one intruder': int(intruders(W, one).sum()) == 1,
        'a factor of 1 changes nothing': torch.allclose(edit(1.), one - W, atol=1e-5),
        'a factor of 0 takes the direction out': float((new.T @ (W + edit(0.))).norm()) < .05*float(
            (new.T @ one).norm())}
