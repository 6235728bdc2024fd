"""DiffFit on the digits: full fine-tuning, biases, LoRA, the class embedding alone and DiffFit
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
NOISE = dict(validation=1, test=2)

def classes_and_matrices(model, batches=None, seed=0):
    "The matrices of the blocks, and the class embedding"
    return ({n: True for n in anatomy(model, FLOW_FAMILIES).matrices()}
            | {n: m for n, m in scales_and_biases(0.)(model).items() if n.startswith('classes')})

ARMS = dict(
    difffit=difffit(), every_block=difffit(scaled=1.), biases=difffit(scaled=0.),
    full=Recipe('full'), classes=Recipe('classes', select=named(CLASSES)),
    lora=Recipe('lora', select=classes_and_matrices, delta=mixed(partial(LoRA, r=1, alpha=4.))))

@lru_cache(1)
def judge():
    return load('digits-vit')

@lru_cache(1)
def real():
    "Features of all real pictures of the new digits that no arm is trained on, and of all"
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

def run(arm, rate, seed, split, steps):
    if arm == 'before':
        return measured(load('digits-flow'), seed, split)
    path = []

    def look(state):
        path.append(dict(measured(state.model, seed, split), step=state.step))
        return {}

    fit(load('digits-flow'), None, digits(NEW, 'classes', n=200, seed=seed), ARMS[arm]*flow(),
        steps=steps, batch_size=64, lr=rate, betas=(.9, .98), seed=seed, progress=False,
        callbacks=(Every(steps//8, look),))
    return dict(path[-1], path=path)
