"""The best learning rate of LoRA and of PiSSA in each seed, and what the variants share, counted on
the model of the claim"""
import torch
import ftlab
from ftlab.adapters.attach import attach
from ftlab.adapters.modules.lr_matters import METHODS
from ftlab.instruments.claims import beside

RANK = 8
STARTS = dict(lora=1e-2, pissa=1e-3) # where the search begins

def run(arm, rate, seed, split, steps):
    "The learning rate with the lowest loss on the questions, of both, as a power of ten"
    shared = beside('lora')
    shared.BOTH = {n: (lambda n=n: made(n), at) for n, at in STARTS.items()}
    best = {n: shared.best_rate(n, seed, split, steps) for n in STARTS}
    return dict(best, log_ratio=best['lora'] - best['pissa'])

def made(name):
    "A method at a scale alpha/r of 1"
    return METHODS[name](r=RANK, alpha=float(RANK))

def identities() -> dict[str, bool]:
    found = {n: counted(n) for n in METHODS}
    sizes = {n: size for n, (size, _) in found.items()}
    return {'all start as the base, to 1e-4': all(near for _, near in found.values()),
            'PiSSA, MiLoRA and OLoRA train as many parameters as LoRA':
                len({sizes[n] for n in ('lora', 'pissa', 'milora', 'olora')}) == 1,
            'DoRA trains less than a tenth more': 1 < sizes['dora']/sizes['lora'] < 1.1}

def counted(name) -> tuple[int, bool]:
    "How many parameters a method trains, and whether the model still answers as its base"
    model, tok = ftlab.load('lab-s')
    x = tok(['sort c a b ='], return_tensors='pt').input_ids
    recipe = made(name)
    with torch.no_grad():
        base = model(x).logits.clone()
        change = attach(model, recipe.select(model), recipe.delta)
        near = torch.allclose(model(x).logits, base, atol=1e-4)
    return sum(p.numel() for p in change.parameters().values()), near
