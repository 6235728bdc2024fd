"""DiffFit on the digits: it and full fine-tuning, biases alone, LoRA and the class embedding alone
teach a flow model two digits that it has never seen"""
from functools import lru_cache, partial
import torch
from ftlab.adapters.attach import attach
from ftlab.adapters.lowrank import LoRA
from ftlab.adapters.subsets.difffit import CLASSES, Scale, difffit, mixed, scales_and_biases
from ftlab.adapters.select import named
from ftlab.core.anatomy import anatomy
from ftlab.core.recipe import Recipe
from ftlab.lab.digits import (FLOW_FAMILIES, digits, features, flow, frechet, load, pictures, read,
                              sample)
from ftlab.trainers.callbacks import Every
from ftlab.trainers.fit import fit

OLD, NEW = range(8), (8, 9)
DRAWN = dict(validation=200, test=400) # of the new digits, and of the old ones
ALLOWED = 1.25 # a distance up to so many times that of full fine-tuning is called competitive
NOISE = dict(validation=1, test=2)

def classes_and_matrices(model, batches=None, seed=0):
    "The matrices of the blocks, and the class embedding"
    return ({n: True for n in anatomy(model, FLOW_FAMILIES).matrices()}
            | {n: m for n, m in scales_and_biases(0.)(model).items() if n.startswith('classes')})

ARMS = dict(
    difffit=difffit(), biases=difffit(scaled=0.), full=Recipe('full'),
    classes=Recipe('classes', select=named(CLASSES)),
    lora=Recipe('lora', select=classes_and_matrices, delta=mixed(partial(LoRA, r=1, alpha=4.))))

@lru_cache(1)
def judge():
    return load('digits-vit')

@lru_cache(1)
def real():
    "Features of all 354 real pictures of the new digits"
    d = digits(NEW)
    return features(judge(), pictures(d.train + d.validation + d.test)[0])

def measured(model, seed, split):
    asked = {'new': torch.tensor(NEW).repeat(DRAWN[split]//2),
             'old': torch.tensor(OLD).repeat(DRAWN[split]//8)}
    out, items = {}, {}
    for kind, classes in asked.items():
        images = sample(model, classes, seed=10*seed + NOISE[split])
        right = (read(judge(), images) == classes).float()
        out[f'accuracy_{kind}'], items[f'accuracy_{kind}'] = float(right.mean()), right.tolist()
        if kind == 'new':
            out['frechet_new'] = frechet(features(judge(), images), real())
    return dict(out, gain=out['accuracy_new'], forgetting=1 - out['accuracy_old'],
                items=dict(items, gain=items['accuracy_new']))

@lru_cache(1)
def before(seed, split):
    return measured(load('digits-flow'), seed, split)

def run(arm, rate, seed, split, steps):
    if arm == 'before':
        found = before(seed, split)
        return dict(found, frechet_allowed=found['frechet_new'])
    path = []

    def look(state):
        found = measured(state.model, seed, split) if state.step else before(seed, split)
        path.append(dict(found, step=state.step))
        return {}

    fit(load('digits-flow'), None, digits(NEW, 'classes', n=200, seed=seed), ARMS[arm]*flow(),
        steps=steps, batch_size=64, lr=rate, betas=(.9, .98), seed=seed, progress=False,
        callbacks=(Every(steps//2, look),))
    end = path[-1]
    times = ALLOWED if arm == 'full' else 1.
    return dict(end, frechet_allowed=times*end['frechet_new'], path=path)

def identities():
    model, base = load('digits-flow'), load('digits-flow')
    recipe = difffit()
    att = attach(model, recipe.select(model), recipe.delta)
    g = torch.Generator().manual_seed(0)
    x, t, c = torch.randn(6, 1, 8, 8, generator=g), torch.rand(6, generator=g), torch.arange(6)
    start = torch.equal(model(x, t, c), base(x, t, c))
    share = (sum(p.numel() for p in att.parameters().values())
             / sum(p.numel() for p in base.parameters()))
    with torch.no_grad():
        for p in att.parameters().values():
            p.add_(.1*torch.randn(p.shape, generator=g))
        changed = model(x, t, c)
        frozen = all(torch.equal(p, dict(base.named_parameters())[n])
                     for n, p in model.named_parameters() if n.endswith('qkv.weight'))
        att.fold()
        folded = (torch.allclose(model(x, t, c), changed, atol=1e-5)
                  and not torch.allclose(changed, base(x, t, c), atol=1e-2))
        b, h, gamma = (base.blocks[0], torch.randn(2, 16, 64, generator=g),
                       torch.rand(64, generator=g) + .5)
        branch = b.attend(h)
        s = Scale(b.o.weight)
        s.more.copy_(gamma - 1)
        b.o.weight.copy_(s(b.o.weight))
        b.o.bias.mul_(gamma)
        same = torch.allclose(b.attend(h), gamma*branch, atol=1e-5)
    return {'starts as the base, bit for bit': start,
            'under 2% of the parameters train': share < .02,
            'matrices stay frozen': frozen, 'folded it says the same': folded,
            'scaling the rows of the last matrix and its bias is scaling the branch': same}
