"""The best learning rate of LoRA and of full fine-tuning in each seed, and what LoRA is, counted on
the model of the claim"""
import math
from functools import lru_cache
import torch
import ftlab
from ftlab.adapters.attach import attach
from ftlab.adapters.modules.lora import lora
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, nll
from ftlab.trainers.step import NotFinite

MODEL, TASK, BATCH = 'lab-s', 'new-procedure', 32
HALF_DECADE = 10**.5
# method -> how it is made and where its search begins; alpha 32 and the constant rate are the
# source's
BOTH = dict(full=(lambda: Recipe('full'), 1e-3), lora=(lambda: lora(alpha=32.), 1e-2))

def run(arm, rate, seed, split, steps):
    "The learning rate with the lowest loss on the questions, of each method, as a power of ten"
    best = {n: best_rate(n, seed, split, steps) for n in BOTH}
    return dict(best, log_ratio=best['lora'] - best['full'])

def best_rate(name, seed, split, steps):
    """The minimum of a parabola in the logarithm of the rate, through the best of half-decade rates
    and its two neighbours"""
    middle, known = BOTH[name][1], {}
    def at(k):
        if k not in known:
            known[k] = loss(name, middle*HALF_DECADE**k, seed, split, steps)
        return known[k]
    low = min((-1, 0, 1), key=at)
    while min(at(low - 1), at(low + 1)) < at(low):
        low += 1 if at(low + 1) < at(low - 1) else -1
    left, here, right = at(low - 1), at(low), at(low + 1)
    bend = left - 2*here + right
    off = (left - right)/2/bend if math.isfinite(bend) and bend > 0 else 0.
    return math.log10(middle) + (low + off)/2

def loss(name, rate, seed, split, steps):
    "The loss on the questions after training; infinite for a run that breaks down"
    model, tok = ftlab.load(MODEL)
    data = ftlab.data(TASK, seed=seed)
    try:
        run = ftlab.fit(model, tok, data, BOTH[name][0](), steps=steps, batch_size=BATCH, lr=rate,
                        schedule='constant', seed=seed, progress=False)
    except NotFinite:
        return math.inf
    found = nll(run.model, tok, questions(seed, split))
    return found if math.isfinite(found) else math.inf

@lru_cache(2)
def questions(seed, split):
    if split == 'test':
        return WORLD.rows(TASK, 400, 'test', seed)
    return ftlab.data(TASK, seed=seed).validation[:100]

def identities() -> dict[str, bool]:
    model, tok = ftlab.load(MODEL)
    recipe = lora()
    x = tok(['sort c a b ='], return_tensors='pt').input_ids
    size = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        base = model(x).logits.clone()
    att = attach(model, recipe.select(model), recipe.delta)
    params = att.parameters()
    with torch.no_grad():
        starts = torch.equal(model(x).logits, base)
        gen = torch.Generator().manual_seed(0)
        for p in params.values():
            p.add_(.02*torch.randn(p.shape, generator=gen))
        ranks = [int(torch.linalg.matrix_rank(c, rtol=1e-4)) for c in att.changes().values()]
    return {'trains less than a tenth of the parameters':
                sum(p.numel() for p in params.values()) < size/10,
            'starts as the base, bit for bit': starts,
            'the change of every matrix has at most the rank asked for':
                0 < max(ranks) <= 8}
