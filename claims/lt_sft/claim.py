"""LT-SFT: a task learned in English and a language learned from its text, added up;
the task is then asked in that language"""
import random
from functools import lru_cache
import torch
from torch import nn
from ftlab.adapters.delta import Entries
from ftlab.adapters.select import named
from ftlab.adapters.sparse import compose, overlap
from ftlab.adapters.subsets.lt_sft import lt_sft, movable, these
from ftlab.core.batches import data
from ftlab.core.loading import load
from ftlab.core.recipe import Recipe, Share, Stages
from ftlab.core.scorers import WORLD, answers, judge
from ftlab.lab.world import ASK, ATTRIBUTES, FOREIGN
from ftlab.trainers.fit import fit

DENSITY = dict(task=.08, language=.043) # of the official scripts, which penalize languages alone
L1 = dict(task=0., language=.1)
FIND = dict(task=3/13, language=1/2) # share of the steps that goes to finding, as in the scripts
BOTTLENECK = dict(task=54, language=29) # as many parameters as those densities leave
FORMS = ['{p} {a} :', '{a} {p} :', '{p} , {a} :', '{a} , {p} :']
KINDS = ('task', 'target')

def question(kind, seed, r):
    """A question and its answer. The task: say a fact twice. The language: five words that lab-s
    has never read name the attributes. The target: the task in the language."""
    p, a = r.choice(WORLD.people['often']), r.choice(list(ATTRIBUTES))
    value = WORLD.facts[p, a]
    if kind == 'task':
        prompt = r.choice(ASK).format(a=a, p=p)
    else:
        words = random.Random(f'words {seed}').sample(FOREIGN['zuma'], len(ATTRIBUTES))
        prompt = r.choice(FORMS).format(a=words[list(ATTRIBUTES).index(a)], p=p)
    if kind == 'language':
        return prompt, value
    return f'say and say : {prompt}', f'{value} {value}'

def rows(kind, split, n, seed):
    "Different questions; those of one split are in no other"
    r, out = random.Random(f'{kind} {split} {seed}'), {}
    while len(out) < n:
        prompt, response = question(kind, seed, r)
        parts = ['train']*6 + ['validation'] + ['test']*3
        if random.Random(prompt).choice(parts) == split:
            out[prompt] = dict(prompt=prompt, response=response)
    return list(out.values())

class Adapter(nn.Module):
    "A bottleneck on the residual stream, the identity at the start (Pfeiffer et al. 2020)"

    def __init__(self, width, bottleneck):
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h):
        return h + self.up(self.down(h).relu())

def adapted(seed):
    "lab-s with a language adapter below a task adapter at the embedding and after each MLP"
    model, tok = load('lab-s')
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in (model.model.embed_tokens, *(b.mlp for b in model.model.layers)):
            for kind in ('language', 'task'):
                adapter = Adapter(model.config.hidden_size, BOTTLENECK[kind])
                module.add_module(f'{kind}_adapter', adapter)
                module.register_forward_hook(lambda m, args, out, adapter=adapter: adapter(out))
    return model, tok

def random_masks(model, kind, seed):
    "As many entries as LT-SFT trains, drawn from the same tensors without looking"
    g = torch.Generator().manual_seed(2*seed + (kind == 'task'))
    params = dict(model.named_parameters())
    sizes = {n: params[n].numel() for n in movable(model)}
    total = sum(sizes.values())
    flat = torch.zeros(total, dtype=torch.bool)
    flat[torch.randperm(total, generator=g)[:round(DENSITY[kind]*total)]] = True
    return {n: m.view_as(params[n]) for (n, m) in zip(sizes, flat.split(list(sizes.values())))}

def lottery(kind):
    "LT-SFT with density, penalty and division of the steps as in the official scripts"
    find, tune = lt_sft(DENSITY[kind], L1[kind]).loop.stages
    return Recipe('sparse', loop=Stages(Share(find, FIND[kind]), Share(tune, 1 - FIND[kind])))

def recipe_of(arm, kind, model, seed):
    if arm == 'sparse':
        return lottery(kind)
    if arm == 'random':
        return Recipe('random', select=these(random_masks(model, kind, seed)), delta=Entries)
    if arm == 'adapters':
        return Recipe('adapters', select=named(rf'\.{kind}_adapter\.'))
    return Recipe('dense', select=movable)

def base_of(arm, seed):
    return adapted(seed) if arm == 'adapters' else load('lab-s')

@lru_cache(4)
def learned(arm, kind, rate, seed, steps):
    "The change {name: tuned minus base} that one run of `steps` steps makes"
    model, tok = base_of(arm, seed)
    d = data(rows(kind, 'train', 1200, seed), validation=rows(kind, 'validation', 50, seed),
             test=rows(kind, 'test', 50, seed))
    run = fit(model, tok, d, recipe_of(arm, kind, model, seed), steps=steps, batch_size=32, lr=rate,
              seed=seed, progress=False)
    return {n: t.clone() for n, t in run.delta.tensors().items()}

def asked(arm, changes, kind, split, seed) -> list[int]:
    "Whether each answer is right, with the sum of these changes"
    model, tok = base_of(arm, seed)
    compose(model, changes)
    questions = rows(kind, split, 200 if split == 'validation' else 400, seed)
    return [judge(r, a) for r, a in zip(questions, answers(model, tok, questions))]

def run(arm, rate, seed, split, steps):
    changes = [learned(arm, kind, rate, seed, steps) for kind in ('task', 'language')]
    items = {kind: asked(arm, changes, kind, split, seed) for kind in KINDS}
    out = {kind: sum(right)/len(right) for kind, right in items.items()}
    if arm == 'sparse':
        alone = asked(arm, changes[:1], 'target', split, seed)
        out['alone'] = sum(alone)/len(alone)
    return dict(out, overlap=overlap(*changes), items=items)

def derive(found):
    "The free alternative: LT-SFT's task without the language"
    return dict(task_alone=dict(target=found['sparse']['alone']))

def identities():
    a, b = ({'model.layers.0.mlp.up_proj.weight': torch.zeros(320, 128).index_fill_(
                 0, torch.tensor(i), 1e-3)} for i in ([0, 1], [1, 2]))
    model, _ = load('lab-s')
    n = next(iter(a))
    W = model.get_parameter(n).detach().clone()
    att = compose(model, [a, b])
    both = att.values()[n]
    att.detach()
    att = compose(model, [a, b, {n: -b[n]}])
    back = att.values()[n]
    att.detach()
    ids = torch.arange(12)[None]
    stacked, _ = adapted(0)
    size = {k: sum(p.numel() for m, p in stacked.named_parameters() if f'{k}_adapter' in m)
            for k in DENSITY}
    masks = {k: sum(int(m.sum()) for m in random_masks(model, k, 0).values()) for k in DENSITY}
    return {'a sum of sparse changes is their sum': torch.allclose(both, W + a[n] + b[n]),
            'what is taken away again is gone': torch.allclose(back, W + a[n], atol=1e-7),
            'the base stays': torch.equal(model.get_parameter(n), W),
            'half of the entries of two changes is shared': overlap(a, b) == .5,
            'adapters start as the base': torch.equal(stacked(ids).logits, model(ids).logits),
            'adapters, masks and LT-SFT are of one size, within 2%': all(
                abs(size[k] - masks[k]) < .02*masks[k] for k in DENSITY)}
