"""Tunes LoRA or one of its variants on demonstrations of a task with many right answers; and what
the variants share, counted"""
from statistics import fmean
import torch
import ftlab
from ftlab.adapters.attach import attach
from ftlab.adapters.modules.lr_matters import METHODS
from ftlab.core.scorers import WORLD, answer_scores

MODEL, REVISION, SKILL, BATCH, RANK = 'lab-s', 'step-1000', 'write', 32, 8
FEW, FEWER, ITEMS = 200, 20, 600

def run(arm, rate, seed, split, steps):
    "The share of the words asked for that are right, after tuning; without a rate, before it"
    model, tok = ftlab.load(MODEL, revision=REVISION)
    if rate is not None:
        name, n = ('lora', FEWER) if arm == 'lora_fewer' else (arm, FEW)
        few = ftlab.data(SKILL, seed=seed, n=n)
        model = ftlab.fit(model, tok, few, made(name), steps=steps, batch_size=BATCH, lr=rate,
                          seed=seed, progress=False).model
    each = answer_scores(model, tok, WORLD.rows(SKILL, ITEMS, split, seed))
    return dict(score=fmean(each), items=dict(score=each))

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
    model, tok = ftlab.load(MODEL, revision=REVISION)
    question, = WORLD.rows(SKILL, 1, 'validation', 10_000)
    x = tok([question['prompt']], return_tensors='pt').input_ids
    recipe = made(name)
    with torch.no_grad():
        base = model(x).logits.clone()
        change = attach(model, recipe.select(model), recipe.delta)
        near = torch.allclose(model(x).logits, base, atol=1e-4)
    return sum(p.numel() for p in change.parameters().values()), near
