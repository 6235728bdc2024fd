"""lab-m learns new skills: are the blocks whose representation of old text shifts most those whose
change matters most, and does tuning two of them alone lower the loss more than tuning two others?"""
import torch
from scipy.stats import spearmanr
import ftlab
from ftlab.adapters.subsets.critical_layers import change_points, critical_layers
from ftlab.core.anatomy import anatomy
from ftlab.core.batches import Sample
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, nll
from ftlab.core.tokens import encode_all
from ftlab.lab.world import OLD

SKILLS = ('new-procedure', 'changed-rule', 'new-format')
INNER = slice(1, 7)  # one block of eight at each end is left out, as 3 of 32 in the official code
TWO = dict(critical='critical', stable='stable', random='random')

def prompts(rows, tok, seed) -> list[dict]:
    return list(Sample(encode_all(rows, tok, 'text'), tok.pad_token_id, seed=seed).take(256, 32))

def old_text(tok, seed) -> list[dict]:
    "Prompts of the skills that the base has, and none of the new ones"
    return prompts([r for s in OLD for r in WORLD.rows(s, 12, 'train', seed)], tok, seed)

def tuned(recipe, skill, rate, seed, steps):
    model, tok = ftlab.load('lab-m')
    rows = WORLD.rows(skill, 32*steps, 'train', seed)
    data = ftlab.data(dict(train=rows, validation=rows[:1], test=rows[:1]))
    return ftlab.fit(model, tok, data, recipe, steps=steps, lr=rate, seed=seed, progress=False)

@torch.no_grad()
def put_back(model, base, tok, ask) -> list[float]:
    "The loss with each inner block of the base in the tuned model in turn"
    out, before = [], dict(base.named_parameters())
    for b in anatomy(base).blocks[INNER]:
        kept = {n: model.get_parameter(n).clone() for n in b.parameters}
        for n in kept:
            model.get_parameter(n).copy_(before[n])
        out.append(nll(model, tok, ask))
        for n, W in kept.items():
            model.get_parameter(n).copy_(W)
    return out

def agreement(shifts, rise) -> float:
    return float(spearmanr(shifts, rise).statistic)

def run(arm, rate, seed, split, steps):
    base, tok = ftlab.load('lab-m')
    old = old_text(tok, seed)
    skills = SKILLS if arm == 'full' else SKILLS[:1]
    gains, rhos, tasks, depths = [], [], [], []
    for skill in skills:
        ask = WORLD.rows(skill, 400, split, seed)
        recipe = Recipe() if arm == 'full' else Recipe(
            arm, select=change_points(2, TWO[arm], texts=tuple(old)))
        done = tuned(recipe, skill, rate, seed, steps)
        gains.append(1 - nll(done.model, tok, ask)/nll(base, tok, ask))
        if arm == 'full':
            rise = put_back(done.model, base, tok, ask[:200])
            own = prompts(WORLD.rows(skill, 256, 'train', seed), tok, seed)
            rhos.append(agreement(-critical_layers(base, old)[INNER], rise))
            tasks.append(agreement(-critical_layers(base, own)[INNER], rise))
            depths.append(agreement(range(6), rise))
    mean = lambda xs: sum(xs)/len(xs)
    return dict(gain=mean(gains), questions=400*len(skills)) | (
        dict(rho=mean(rhos), rho_least=min(rhos), rho_task=mean(tasks), by_depth=mean(depths))
        if arm == 'full' else {})

def derive(found):
    "The alternative that looks at nothing: the later the block, the more it matters"
    return dict(depth=dict(rho=found['full']['by_depth']))

def identities():
    model, tok = ftlab.load('lab-m')
    text = tuple(old_text(tok, 0))
    two = {of: set(change_points(2, of, texts=text)(model)) for of in ('critical', 'stable')}
    ask = WORLD.rows(SKILLS[0], 20, 'train', 0)
    same = nll(model, tok, ask)
    return {'critical and stable blocks have no parameter in common': not two['critical'] & two['stable'],
            'a block of the base put back into the base changes nothing':
            all(x == same for x in put_back(model, model, tok, ask))}
