"What the claim says of the share, and what LoRA is: counted on the model of the claim"
import torch
import ftlab
from ftlab.adapters.delta import attach

def identities() -> dict[str, bool]:
    model, tok = ftlab.load('lab-s')
    recipe = ftlab.methods.lora()
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
    return {'trains less than a tenth of the numbers':
                sum(p.numel() for p in params.values()) < size/10,
            'starts as the base, bit for bit': starts,
            'the change of every matrix has at most the rank asked for': max(ranks) <= 8
            and max(ranks) > 0}
