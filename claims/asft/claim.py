"""ASFT, DFT and plain fine-tuning on the same rows, half of whose answers are scrambled;
the bench is that of every claim whose arms are Recipes"""
import torch
import ftlab
from ftlab.core.batches import collate, encode
from ftlab.core.state import State
from ftlab.instruments.claims import beside, run_seed
from ftlab.trainers.objective import loss_mask

DFT = beside('dft')
ARMS = DFT.arms('asft', 'dft', 'full')

def tune() -> dict:
    return DFT.choose(ARMS)

def run(seed, tuned) -> dict:
    return run_seed(DFT.BENCH, ARMS, {a: tuned[a]['rate'] for a in ARMS}, seed)

def identities() -> dict[str, bool]:
    (model, tok), other = ftlab.load('lab-s'), ftlab.load('lab-s', revision='step-2200')[0]
    s = State(model, tok)
    s.batch = collate([encode(r, tok, 'text') for r in ftlab.data('sort', n=8).train],
                      tok.pad_token_id)
    s.count = int(loss_mask(s.batch['labels']).sum())

    def gradient(recipe, base):
        s.models['reference'] = base
        return torch.autograd.grad(recipe.objective(s), model.lm_head.weight)[0]

    dft, asft = (ftlab.methods.get(n) for n in ('dft', 'asft'))
    plain = gradient(dft, model)
    return {
        'at the base it is DFT': torch.allclose(gradient(asft, model), plain, atol=1e-6),
        'away from the base it is not': not torch.allclose(gradient(asft, other), plain, atol=1e-6),
        'with weight 0 it is DFT everywhere': torch.equal(
            gradient(ftlab.methods.asft(weight=0.), other), plain)}
