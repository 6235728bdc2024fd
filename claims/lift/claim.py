"""LIFT's identities: the places are those of the official formula, in LoRA's number,
and nothing is lost when they change hands"""
import torch
from ftlab.adapters.delta import attach
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.select import coverage
from ftlab.adapters.delta import Entries
from ftlab.adapters.subsets.lift import top_k, lift, principal, scores
from ftlab.core.loading import load

def identities():
    model, _ = load('lab-s')
    W = model.get_parameter('model.layers.2.mlp.up_proj.weight').detach()
    U, S, V = torch.svd(W)
    # the official code, filter rank 2, budget rank 8
    theirs = torch.topk(((U[:, :2]*S[:2]) @ V[:, :2].T).abs().flatten(), sum(W.shape)*8).indices
    att = attach(model, lora().select(model), lora().delta)
    numbers = sum(p.numel() for p in att.parameters().values())
    att.detach()
    p = Entries(W, principal(8)(model)['model.layers.2.mlp.up_proj.weight'])
    torch.nn.init.normal_(p.value)
    before = p(W).detach()
    p.move(top_k(W.abs(), 8))
    return {'the places are those of the official formula': set(theirs.tolist())
            == set(top_k(scores(W), 8).tolist()),
            'as many numbers as LoRA of that rank': coverage(model, lift().select(model))['parameters']
            == numbers,
            'what was learned stays when places change hands': bool(torch.equal(p(W), before)),
            'with all directions kept it is magnitude': len(
                set(top_k(scores(W, filter_rank=128), 8).tolist()) & set(
                    top_k(scores(W, 'magnitude'), 8).tolist())) >= .998*sum(W.shape)*8}
