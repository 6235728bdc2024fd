"RandLoRA: how near it comes to targets of full rank, and what it learns beside LoRA with no more numbers"
import torch
from ftlab.instruments import compare as comparison
from ftlab.adapters.lowrank import LoRA
from ftlab.adapters.modules.randlora import RandLoRA, randlora
from ftlab.adapters.modules.lora import lora
from ftlab.core.batches import data
from ftlab.core.loading import load
from ftlab.core.scorers import exact_match
from ftlab.trainers.fit import fit

WIDTH, RANK, TERM, STEPS = 64, 4, 11, 80 # 6 (11 + 64) = 450 numbers beside 4 (64 + 64) = 512
ARMS = dict(randlora=lambda: randlora(r=7), lora=lambda: lora(r=8))

def missing(target, seed, steps=1500):
    "The share of the target's squares that RandLoRA leaves, fitted by Adam with a falling rate"
    W = torch.zeros_like(target)
    d = RandLoRA(W, r=TERM, seed=seed)
    opt = torch.optim.Adam(d.parameters(), lr=2e-2)
    fall = torch.optim.lr_scheduler.LinearLR(opt, 1., 0., steps)
    for _ in range(steps):
        opt.zero_grad()
        loss = (d(W) - target).square().sum()/target.square().sum()
        loss.backward()
        opt.step()
        fall.step()
    return float(loss.detach())

def floor(target):
    s = torch.linalg.svdvals(target).square()
    return float(s[RANK:].sum()/s.sum())

def gained(recipe, rate, seed, split):
    model, tok = load('lab-s')
    task = data('new-procedure', seed=seed, n=4000)
    rows = getattr(task, split)[:400 if split == 'test' else 200]
    before = exact_match(model, tok, rows)
    fit(model, tok, task, recipe, steps=STEPS, lr=rate, seed=seed, progress=False)
    return exact_match(model, tok, rows) - before

def tune():
    seed = comparison.tuning_seed([0])
    return comparison.tune(lambda name, rate: gained(ARMS[name](), rate, seed, 'validation'),
                           {n: (1e-3, 3e-3, 1e-2) for n in ARMS})

def run(seed, tuned):
    g = torch.Generator().manual_seed(seed)
    targets = dict(rotation=torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=g))[0],
                   gauss=torch.randn(WIDTH, WIDTH, generator=g)/WIDTH**.5)
    out = {}
    for name, t in targets.items():
        out[f'randlora_{name}'], out[f'lora_{name}'] = (
            dict(missing=missing(t, seed)), dict(missing=floor(t)))
    for name, make in ARMS.items():
        out[name] = dict(gain=gained(make(), tuned[name]['rate'], seed, 'test'))
    out['lora_less_5'] = dict(gain=out['lora']['gain'] - .05)
    return out

def identities():
    torch.manual_seed(0)
    W = torch.randn(40, 24)
    d = RandLoRA(W, r=5)
    start = bool(torch.equal(d(W), W))
    [torch.nn.init.normal_(p) for p in d.parameters()]
    change = (d(W) - W).detach()
    x = torch.randn(3, 24)
    model, _ = load('lab-s')

    def count(recipe):
        params = dict(model.named_parameters())
        return sum(sum(p.numel() for p in recipe.delta(params[n].detach(), True).parameters())
                   for n in recipe.select(model))

    numbers = lambda m: sum(p.numel() for p in m.parameters())
    Z = torch.zeros(WIDTH, WIDTH)
    return {'it starts as the base': start,
            'its change has full rank': int(torch.linalg.matrix_rank(change)) == 24,
            'the fast path is the definition': bool(
                torch.allclose(d.branch(x), x @ change.T, atol=1e-3)),
            'no more numbers than LoRA, on one matrix and on lab-s': numbers(
                RandLoRA(Z, r=TERM)) <= numbers(LoRA(Z, r=RANK))
            and count(ARMS['randlora']()) <= count(ARMS['lora']()),
            'the bases come back from their seed': bool(torch.equal(RandLoRA(W, r=5).B, d.B))}
