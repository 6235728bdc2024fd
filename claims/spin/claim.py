"Self-play beside more of the same, from one tuned model, on the same few demonstrations, at equal tokens"
import copy
import torch
import ftlab
from ftlab.instruments.compare import tune as choose
from ftlab.core.scorers import WORLD, exact_match
from ftlab.trainers.preferences import preference
from ftlab.trainers.rl.spin import spin
from types import SimpleNamespace

MODEL, REVISION, SKILL, FEW = 'lab-s', 'step-1000', 'write', 200
GRIDS = dict(spin=(3e-5, 1e-4, 3e-4), sft=(1e-4, 3e-4, 1e-3)) # a loss on whole answers pulls harder than one on tokens
STEPS = dict(spin=45, sft=108) # self-play reads two answers to each question and writes some: as many tokens

def begin(seed):
    "The model tuned on the few, and the few"
    model, tok = ftlab.load(MODEL, revision=REVISION)
    few = ftlab.data(SKILL, seed=seed, n=FEW)
    ftlab.fit(model, tok, few, steps=40, batch_size=32, lr=3e-4, seed=seed,
              progress=False).delta.attached.fold()
    return model, tok, few

def go_on(arm, model, tok, few, rate, seed):
    return ftlab.fit(copy.deepcopy(model), tok, few,
                     spin() if arm == 'spin' else ftlab.methods.full(), steps=STEPS[arm],
                     batch_size=32, lr=rate, seed=seed, progress=False)

def tune() -> dict:
    model, tok, few = begin(10_000)
    rows = WORLD.rows(SKILL, 400, 'validation', 10_000)
    return choose(
        lambda arm, rate: exact_match(go_on(arm, model, tok, few, rate, 10_000).model, tok, rows),
        GRIDS)

def run(seed, tuned):
    model, tok, few = begin(seed)
    rows = WORLD.rows(SKILL, 400, 'test', seed)
    out = dict(start=dict(score=exact_match(model, tok, rows)))
    for arm in STEPS:
        done = go_on(arm, model, tok, few, tuned[arm]['rate'], seed)
        out[arm] = dict(score=exact_match(done.model, tok, rows), tokens=done.cost['tokens'])
    return out

def identities() -> dict[str, bool]:
    y = torch.tensor([[-100, 3, 4], [-100, 5, 6]]).repeat(2, 1)
    logits = torch.randn(4, 3, 9, generator=torch.Generator().manual_seed(0))
    logits[2:] = logits[:2]
    logits.requires_grad_()
    twin = logits[:2].repeat(2, 1, 1)
    s = SimpleNamespace(batch=dict(labels=y), forward=lambda: twin,
                        models=dict(reference=lambda: SimpleNamespace(logits=logits.detach())))
    s.batches = [s.batch]
    g, = torch.autograd.grad(preference()(s), logits)
    odd = SimpleNamespace(batch=dict(labels=torch.cat([y[:2], y[:2].flip(0)])),
                          forward=lambda: logits, models=s.models)
    odd.batches = [odd.batch]
    h, = torch.autograd.grad(preference()(odd), logits)
    return {'an opponent that says what the data say teaches nothing': bool(g.abs().max() == 0),
            'another one does': bool(h.abs().max() > 0),
            'as many rounds as were asked for': len(spin(rounds=4).stages) == 4}
