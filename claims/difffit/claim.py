"""DiffFit on the digits: full fine-tuning, biases alone,
LoRA and DiffFit teach a flow model two digits that it has never seen"""
from functools import partial
import torch
from ftlab.adapters.delta import attach
from ftlab.adapters.lowrank import LoRA
from ftlab.adapters.subsets.difffit import Scale, difffit, mixed, scales_and_biases
from ftlab.instruments.compare import matched, target_gain, tune as choose
from ftlab.core.anatomy import anatomy
from ftlab.core.recipe import Recipe
from ftlab.lab.digits import FLOW_FAMILIES, digits, flow, load, quality
from ftlab.trainers.callbacks import Every
from ftlab.trainers.fit import fit

OLD, NEW, STEPS, LOOKS = range(8), (8, 9), 200, 5

def names_and_matrices(model, batches=None, seed=0):
    "The matrices of the blocks, and the class embedding"
    return ({n: True for n in anatomy(model, FLOW_FAMILIES).matrices()}
            | {n: m for n, m in scales_and_biases(0.)(model).items() if n.startswith('classes')})

ARMS = dict(
    difffit=difffit(), full=Recipe('full'), biases=difffit(scaled=0.),
    lora=Recipe('lora', select=names_and_matrices, delta=mixed(partial(LoRA, r=1, alpha=4.))))
GRIDS = dict(difffit=(1e-2, 3e-2, 1e-1), full=(3e-4, 1e-3, 3e-3), biases=(1e-2, 3e-2, 1e-1),
             lora=(3e-3, 1e-2, 3e-2))

def look(model, judge, n, noise):
    return {f'{k}_{w}': v for w, of in (('new', NEW), ('old', OLD))
            for k, v in quality(model, judge, of, n, seed=noise).items()}

def taught(arm, rate, seed, see=None):
    "Teach digits-flow the new digits; `see(state) -> numbers` is called at every look"
    return fit(load('digits-flow'), None, digits(NEW, 'classes', n=200, seed=seed),
               ARMS[arm]*flow(), steps=STEPS, batch_size=64, lr=rate, betas=(.9, .98), seed=seed,
               progress=False, callbacks=(Every(STEPS//LOOKS, see),) if see else ())

def tune() -> dict:
    judge = load('digits-vit')
    return choose(lambda arm, rate: quality(taught(arm, rate, 10_000).model, judge, NEW, 200,
                                            seed=10_000)['accuracy'],
                  GRIDS)

def run(seed, tuned):
    judge, noise = load('digits-vit'), 1000*(seed + 1)
    found, paths = dict(before=look(load('digits-flow'), judge, 400, noise)), {}
    def see(state):
        now = look(state.model, judge, 120, noise + 1)
        return dict(gain=now['accuracy_new'] - found['before']['accuracy_new'], forgetting=-now['accuracy_old'])
    for arm in ARMS:
        done = taught(arm, tuned[arm]['rate'], seed, see)
        paths[arm] = done.path
        found[arm] = look(done.model, judge, 400, noise) | dict(numbers=done.cost['trainable'])
    target = target_gain(list(paths.values()))
    for arm, path in paths.items():
        old = matched(path, target)
        found[arm] |= dict(accuracy_old_matched=0. if old is None else -old,
                           matched_at=None if old is None else next(r['step'] for r in path if r['gain'] >= target))
    return found

def identities() -> dict[str, bool]:
    model, base = load('digits-flow'), load('digits-flow')
    recipe = difffit()
    att = attach(model, recipe.select(model), recipe.delta)
    g = torch.Generator().manual_seed(0)
    x, t, c = torch.randn(6, 1, 8, 8, generator=g), torch.rand(6, generator=g), torch.arange(6)
    start = torch.equal(model(x, t, c), base(x, t, c))
    share = (
        sum(p.numel() for p in att.parameters().values())/sum(p.numel() for p in base.parameters()))
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
    return {'starts as the base, bit for bit': start, 'under 2% of the numbers train': share < .02,
            'matrices stay frozen': frozen, 'folded it says the same': folded,
            'scaling the rows of the last matrix and its bias is scaling the branch': same}
