"""Seven small transformers, each pretrained on its own mixture of regression tasks and tuned on the
fixed ones alone: do scaled labels bring back what the tuning cost on the others?"""
from functools import cache
import torch
from ftlab.evaluators.mechanisms.conjugate_prompting import (Mixture, Prompt, bayes, beliefs,
                                                             by_ratio, draw, errors, pretrained,
                                                             rotated, rotation, scaled, shrunk,
                                                             tuned, ways)

N = 1000 # prompts of each kind
WAYS = ('conjugate', 'shrunk', 'mapped', 'rotated', 'zero', 'scaled_base')

@cache
def asked(seed, split):
    "Base, mixture, and prompts: of D_cont to judge by, of D_cont to set dials by, of D_disc"
    base, world = pretrained(100 + seed % 7) # the tuning seeds have two of their own
    first = 10*seed + dict(validation=1, test=4)[split]
    return base, world, [draw(world, N, share, 1_000_000 + first + i)
                         for i, share in enumerate((0., 0., 1.))]

@torch.no_grad()
def mapped(ask, prompt, w):
    "Return a predictor whose estimates go through the linear map with offset that is best here"
    def with_one(prompt):
        found = ask(prompt)
        return torch.cat([found, torch.ones_like(found[..., :1])], -1)
    found = with_one(prompt)
    true = w[:, None].expand(-1, found.shape[1], -1)
    fit = torch.linalg.lstsq(found.flatten(0, 1), true.flatten(0, 1)).solution
    return lambda prompt: with_one(prompt)@fit

def run(arm, rate, seed, split, steps) -> dict:
    "Tune once and ask in every way; `derive` makes the other arms"
    base, world, (judge, dials, discrete) = asked(seed, split)
    model = tuned(base, world, rate, steps, 2_000_000 + seed)
    by_name, gamma = ways(model, *dials, seed)
    by_name |= dict(base=base, zero=shrunk(base, 0.), mapped=mapped(model, *dials))
    by_name['scaled_base'] = ways(base, *dials, seed)[0]['conjugate']
    cont = {k: errors(ask, *judge) for k, ask in by_name.items()}
    mean = {k: float(v.mean()) for k, v in cont.items()}
    gained = (errors(base, *discrete) - errors(model, *discrete)).mean(1)
    rise = mean['tuned'] - mean['base']
    groups = by_ratio(cont['tuned'] - cont['base'], beliefs(world, judge[0]).ratio)/mean['base']
    out = dict(gain=float(gained.mean()), left=1., near=float(groups[-1]), far=float(groups[0]),
               others=float(groups[:-1].max()),
               rise=rise/mean['base'], gamma=gamma, base=mean['base'],
               disc=float(errors(base, *discrete).mean()),
               items=dict(gain=[round(float(v), 5) for v in gained]))
    left = {f'left_{k}': (mean[k] - mean['base'])/max(rise, 1e-3) for k in WAYS}
    return out | left

def derive(found) -> dict:
    "The ways of asking, and the two groups of prompts, from the same run"
    of = found['tuned']
    groups = {k: dict(harm=of[k]) for k in ('near', 'far', 'others')}
    return {k: dict(left=of[f'left_{k}']) for k in WAYS} | groups

def identities() -> dict[str, bool]:
    world = Mixture(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), sigma=.6)
    larger = Mixture(2*world.tasks, sigma=1.2)
    prompt, _ = draw(world, 50, seed=1)
    known = beliefs(world, prompt)
    near = lambda a, b: torch.allclose(a, b, atol=1e-4)
    doubled = Prompt(prompt.x, 2*prompt.y)
    return {'ridge regression is its own conjugate':
                near(scaled(lambda p: beliefs(world, p).ridge, 2.)(prompt), known.ridge),
            'and under a rotation': near(
                rotated(lambda p: beliefs(world, p).ridge, rotation(3))(prompt), known.ridge),
            'fixed vectors and noise twice as large undo labels twice as large': near(
                beliefs(larger, doubled).discrete/2, known.discrete),
            'who believes in D_cont alone is ridge regression':
                near(bayes(world, 0.)(prompt), known.ridge)}
