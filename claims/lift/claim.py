"""The masks that LIFT is compared with and that the library does not have: by the gradient, by
first-order movement, and the smallest entries, which most released settings choose"""
from dataclasses import dataclass
from functools import lru_cache
import torch
import ftlab
from ftlab.adapters.attach import attach
from ftlab.adapters.delta import Entries
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.select import coverage, parts
from ftlab.adapters.subsets.lift import Refresh, lift, principal, scores, top_k
from ftlab.core.batches import collate
from ftlab.core.loading import load
from ftlab.core.model import model_inputs, pad_id, row_limit
from ftlab.core.recipe import Loop, Recipe, With
from ftlab.core.tokens import encode_all
from ftlab.instruments.claims import bench_of, named_claim
from ftlab.trainers.objective import token_nll

MODEL, TASK, RANK, EVERY, ROWS = 'lab-s', 'new-procedure', 8, 8, 256

def gradients(model, seed):
    "The gradient of each matrix of attention and MLP at the base, on the first rows of the training data"
    tok = load(MODEL)[1]
    rows = ftlab.data(TASK, seed=seed).train[:ROWS]
    batch = collate(encode_all(rows, tok, 'text', row_limit(model, tok)), pad_id(tok))
    own = dict(model.named_parameters())
    W = {n: own[n].detach().clone().requires_grad_() for n in parts()(model)}
    logits = torch.func.functional_call(model, W, kwargs=dict(model_inputs(batch))).logits
    found = torch.autograd.grad(token_nll(logits, batch['labels']).sum(), list(W.values()))
    return {n: (W[n].detach(), g) for n, g in zip(W, found)}

# official: grad_mag and movement_v2 of sparseAdam.py
BY = dict(gradient=lambda W, g: g.abs(), movement=lambda W, g: -g*W)

@dataclass(frozen=True)
class by_gradient:
    "As many entries as LIFT, with the highest score; a selection"
    by:str

    def __call__(self, model, batches=None, seed=0):
        out = {}
        for n, (W, g) in gradients(model, seed).items():
            s = BY[self.by](W, g)
            mask = torch.zeros(W.numel(), dtype=torch.bool)
            out[n] = mask.index_fill_(0, top_k(s - s.min(), RANK), True).view_as(W)
        return out

@dataclass(frozen=True)
class smallest(principal):
    "The smallest entries of the low-rank approximation"
    def indices(self, W, seed=0):
        s = scores(W, self.by, self.filter_rank, seed)
        return top_k(s.max() - s, self.r)

def method(arm):
    if arm in BY:
        return Recipe(arm, select=by_gradient(arm), delta=Entries)
    chosen = smallest(RANK)
    return Recipe(arm, select=chosen, delta=Entries,
                  loop=Loop(callbacks=(With(Refresh, every=EVERY, choose=chosen.indices),)))

@lru_cache(1)
def bench():
    return bench_of(named_claim('lift'))

def run(arm, rate, seed, split, steps):
    found = bench().run(method(arm), rate, seed, split, steps)
    if found['error']:
        raise ArithmeticError(found['error'])
    return found

def official(W, mask_type, k, filter_rank=2):
    "update_masks of the official sparseAdam.py: the entries that it chooses"
    U, S, V = torch.svd(W)
    low = ((U[:, :filter_rank]*S[:filter_rank]) @ V[:, :filter_rank].T).abs().flatten()
    return set(torch.topk(low, k, largest='largest' in mask_type).indices.tolist())

def identities():
    model, _ = load(MODEL)
    W = model.get_parameter('model.layers.2.mlp.up_proj.weight').detach()
    k = sum(W.shape)*RANK
    ours = set(top_k(scores(W), RANK).tolist())
    named, unnamed = (official(W, t, k) for t in ('weight_filtered_mag_abs_largest_sparse', 'lift_sparse'))
    att = attach(model, lora().select(model), lora().delta)
    parameters = sum(p.numel() for p in att.parameters().values())
    att.detach()
    p = Entries(W, principal(RANK)(model)['model.layers.2.mlp.up_proj.weight'])
    torch.nn.init.normal_(p.value)
    before = p(W).detach()
    p.move(top_k(W.abs(), RANK))
    whole = set(top_k(scores(W, filter_rank=128), RANK).tolist())
    largest = set(top_k(scores(W, 'magnitude'), RANK).tolist())
    return {'the entries are those of the official formula of June 2025': named == ours,
            'the official formula of July 2025, without the flag, chooses none of them':
                not unnamed & ours,
            'its entries are those of the arm `smallest`, but for ties':
                len(unnamed & set(smallest(RANK).indices(W).tolist())) >= .99*k,
            'as many parameters as LoRA of that rank':
                coverage(model, lift().select(model))['parameters'] == parameters,
            'what was learned stays when entries are exchanged': bool(torch.equal(p(W), before)),
            'with all directions kept it is magnitude': len(whole & largest) >= .998*k}
