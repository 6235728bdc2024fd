"""Which entries the official code chooses under the names of its masks, and what LIFT does, counted on
the model of the claim"""
import torch
from ftlab.adapters.attach import attach
from ftlab.adapters.delta import Entries
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.select import coverage
from ftlab.adapters.subsets.lift import lift, principal, scores, top_k
from ftlab.core.loading import load

RANK = 8

def official(W, mask_type, k, filter_rank=2):
    "update_masks of the official sparseAdam.py: the entries that it chooses"
    U, S, V = torch.svd(W)
    low = ((U[:, :filter_rank]*S[:filter_rank]) @ V[:, :filter_rank].T).abs().flatten()
    return set(torch.topk(low, k, largest='largest' in mask_type).indices.tolist())

def identities():
    model, _ = load('lab-s')
    W = model.get_parameter('model.layers.2.mlp.up_proj.weight').detach()
    k = sum(W.shape)*RANK
    ours = set(top_k(scores(W), RANK).tolist())
    june = official(W, 'weight_filtered_mag_abs_largest_sparse', k)
    july = official(W, 'lift_sparse', k)
    att = attach(model, lora().select(model), lora().delta)
    parameters = sum(p.numel() for p in att.parameters().values())
    att.detach()
    p = Entries(W, principal(RANK)(model)['model.layers.2.mlp.up_proj.weight'])
    torch.nn.init.normal_(p.value)
    before = p(W).detach()
    p.move(top_k(W.abs(), RANK))
    whole = set(top_k(scores(W, filter_rank=128), RANK).tolist())
    largest = set(top_k(scores(W, 'magnitude'), RANK).tolist())
    return {'the entries are those of the official formula of June 2025': june == ours,
            'the official formula of July 2025, without the flag, chooses none of them':
                not july & ours,
            'as many parameters as LoRA of that rank':
                coverage(model, lift().select(model))['parameters'] == parameters,
            'what was learned stays when entries are exchanged': bool(torch.equal(p(W), before)),
            'with all directions kept it is magnitude': len(whole & largest) >= .998*k}
