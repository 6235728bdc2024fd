"RandLoRA: where LoRA falls short, does a full-rank change with no more parameters learn more?"
import random
import torch
from ftlab.adapters.delta import Entries
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.modules.randlora import RandLoRA, randlora
from ftlab.adapters.select import parts, top
from ftlab.core.batches import data
from ftlab.core.loading import load
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, answers, judge
from ftlab.lab.world import ASK, ATTRIBUTES
from ftlab.trainers.fit import fit

RANK, TERM = 8, 7 # 71,820 parameters of RandLoRA beside LoRA's 75,776
SPLITS = ['train']*6 + ['validation'] + ['test']*3

def masked(seed):
    "A random mask of no more entries than LoRA has parameters: full rank at no cost of thought"
    g = torch.Generator().manual_seed(seed)
    return Recipe('mask', select=top(lambda W: torch.rand(W.shape, generator=g), .1), delta=Entries)

ARMS = dict(randlora=lambda seed: randlora(r=TERM),
            randlora_paper=lambda seed: randlora(r=TERM, scale='paper'),
            lora=lambda seed: lora(r=RANK), mask=masked,
            full=lambda seed: Recipe('full', select=parts('attention', 'mlp')))

def rows(seed):
    "Questions about known facts, answered by the code name of the value: the values permuted"
    r, code = random.Random(f'code names {seed}'), {}
    for values in ATTRIBUTES.values():
        # each value is called what the next one was, so that none keeps its name
        ring = r.sample(values, len(values))
        code |= dict(zip(ring, ring[1:] + ring[:1]))
    out = dict(train=[], validation=[], test=[])
    for p in WORLD.people['often']:
        for a in ATTRIBUTES:
            for ask in ASK:
                out[r.choice(SPLITS)].append(
                    dict(prompt=ask.format(a=a, p=p), response=code[WORLD.facts[p, a]]))
    return {split: r.sample(of, len(of)) for split, of in out.items()}

def run(arm, rate, seed, split, steps):
    drawn = rows(seed)
    asked = drawn[split][:200 if split == 'validation' else 400]
    model, tok = load('lab-s')
    task = data(drawn['train'], validation=drawn['validation'][:50], test=drawn['test'][:50])
    fit(model, tok, task, ARMS[arm](seed), steps=steps, batch_size=32, lr=rate, seed=seed,
        progress=False)
    items = [judge(r, a) for r, a in zip(asked, answers(model, tok, asked))]
    return dict(gain=sum(items)/len(items), items=dict(gain=items))

def derive(found):
    "The gap between LoRA and full fine-tuning in one seed, and the point half of the way"
    lora, full = (found[a]['gain'] for a in ('lora', 'full'))
    return dict(half=dict(gain=(lora + full)/2), gap=dict(gain=full - lora))

def identities():
    torch.manual_seed(0)
    W = torch.randn(40, 24)
    d = RandLoRA(W, r=5)
    start = bool(torch.equal(d(W), W))
    [torch.nn.init.normal_(p) for p in d.parameters()]
    change = (d(W) - W).detach()
    x = torch.randn(3, 24)
    model, _ = load('lab-s')
    params = dict(model.named_parameters())

    def count(recipe):
        return sum(p.numel() for n, mask in recipe.select(model).items()
                   for p in recipe.delta(params[n].detach(), mask).parameters())

    def bases(seed):
        torch.manual_seed(seed)
        return randlora(r=5).delta(W).B

    return {'it starts as the base': start,
            'its change has full rank': int(torch.linalg.matrix_rank(change)) == 24,
            'the fast path is the definition': bool(
                torch.allclose(d.branch(x), x @ change.T, atol=1e-3)),
            'neither scale has more parameters than LoRA, and the mask has no more': all(
                count(ARMS[a](0)) <= count(ARMS['lora'](0))
                for a in ('randlora', 'randlora_paper', 'mask')),
            'the paper divides by the root of the number of terms': RandLoRA(
                W, r=5, scale='paper').s == 2/5**.5,
            'every seed draws its bases, and draws them again': bool(
                torch.equal(bases(1), bases(1)) and not torch.equal(bases(1), bases(2)))}
