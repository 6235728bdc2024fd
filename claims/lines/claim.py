"""LiNeS: fine-tunes of lab-m edited in three ways, and eight fine-tunes of a half-trained lab-s
merged in two"""
from functools import lru_cache
import torch
from ftlab.adapters.edit import attach_change, depth, merge, scale, unchanged
from ftlab.adapters.merging.lines import by_depth, merge_lines
from ftlab.core.data import data
from ftlab.core.loading import load
from ftlab.core.scorers import WORLD, answers, judge
from ftlab.lab.models import old_skills
from ftlab.lab.world import OLD
from ftlab.trainers.fit import fit

RATE = 1e-3
TARGETS = ('new-format', 'new-procedure')
# skills that the half-trained model half knows, so that one model can know them all
TASKS = ('reverse', 'tool', 'selen', 'sort', 'dedupe', 'refuse', 'context', 'write')
ITEMS = dict(validation=100, test=400)
OLD_ITEMS = dict(validation=20, test=40)
MERGE_ITEMS = dict(validation=100, test=250)
EDITS = dict(lines=lambda g: by_depth(g, 1 - g), uniform=scale,
             reverse=lambda g: by_depth(1, g - 1), plain=lambda g: unchanged)
MERGES = dict(merged_lines=merge_lines, merged_sum=lambda changes, model, a: merge(changes, a))

def lab_m():
    return load('lab-m')

def half_trained():
    return load('lab-s', revision='step-250')

@lru_cache(24)
def fine_tuned(base, names, seed, steps):
    "Return the changes of one fine-tune for each task"
    model, tok = base()
    out = []
    for name in names:
        run = fit(model, tok, data(name, seed=seed, n=2000), steps=steps, lr=RATE, seed=seed,
                  progress=False)
        out.append({n: t.clone() for n, t in run.delta.tensors().items()})
        run.delta.attached.detach()
    return out

def asked(base, change, n, names, seed, split):
    "Return the outcome of each question of each skill, with the change applied"
    model, tok = base()
    att = attach_change(model, change)
    out = {}
    for name in names:
        rows = WORLD.rows(name, n, split, seed)
        out[name] = [float(judge(r, a)) for r, a in zip(rows, answers(model, tok, rows))]
    att.detach()
    return out

def mean(outcomes):
    return sum(sum(o)/len(o) for o in outcomes.values())/len(outcomes)

def old_of(target):
    "Return the old skills that the target does not contradict"
    return tuple(s for s in OLD if s in old_skills(data(target, n=50)))

@lru_cache(64)
def measured(index, edit, dial, seed, split, steps):
    "Return the outcomes of the new and of the old questions of an edited fine-tune"
    target = TARGETS[index]
    change = fine_tuned(lab_m, TARGETS, seed, steps)[index]
    edited = EDITS[edit](dial)(change, lab_m()[0])
    new = asked(lab_m, edited, ITEMS[split], (target,), seed, split)[target]
    old = asked(lab_m, edited, OLD_ITEMS[split], old_of(target), seed, split)
    return new, [x for o in old.values() for x in o]

def run(arm, rate, seed, split, steps):
    if arm.startswith('merged'):
        return merged(arm, rate, seed, split, steps)
    new, old, items = [], [], {}
    for i, target in enumerate(TARGETS):
        here = measured(i, arm, rate, seed, split, steps)
        # the paper's scale: the new task of the fine-tune, the old ones of the base
        own = max(mean(dict(x=measured(i, 'plain', None, seed, split, steps)[0])), .01)
        base = mean(dict(x=measured(i, 'uniform', 0., seed, split, steps)[1]))
        shares = [x/own for x in here[0]], [x/base for x in here[1]]
        new.append(sum(shares[0])/len(shares[0]))
        old.append(sum(shares[1])/len(shares[1]))
        # the official choice of the dial weighs the new task twice; the mean of these sets is that
        items[f'{target}, new'] = [x*4/3 for x in shares[0]]
        items[f'{target}, old'] = [x*2/3 for x in shares[1]]
    new, old = sum(new)/len(new), sum(old)/len(old)
    score = (2*new + old)/3
    # `gain` is the number that the dial is chosen by, also where the contrast is about other arms
    return dict(new=new, old=old, tradeoff=score, gain=score,
                items=dict(tradeoff=items, gain=items))

def merged(arm, rate, seed, split, steps):
    # 40 steps for the 60 of a single target: the half-trained model learns its skills faster
    changes, n = fine_tuned(half_trained, TASKS, seed, steps*2//3), MERGE_ITEMS[split]
    if arm == 'merged_alone':
        own = [mean(asked(half_trained, c, n, (t,), seed, split)) for t, c in zip(TASKS, changes)]
        return dict(accuracy=sum(own)/len(own))
    if arm == 'merged_base':
        change = merge(changes, 0.)
    else:
        change = MERGES[arm](changes, half_trained()[0], rate)
    outcomes = asked(half_trained, change, n, TASKS, seed, split)
    score = mean(outcomes)
    return dict(accuracy=score, gain=score, items=dict(accuracy=outcomes, gain=outcomes))

def identities():
    model, _ = load('lab-s')
    at = depth(model)
    c = {n: torch.ones_like(p) for n, p in model.named_parameters()}

    def same(a, b):
        return all(torch.allclose(a[n], b[n]) for n in c)

    both = merge_lines([c, scale(3.)(c, model)], model, .5)
    return {'no dial, no edit': same(by_depth(1., 0.)(c, model), c),
            'no slope is uniform scaling': same(by_depth(.3, 0.)(c, model), scale(.3)(c, model)),
            'the embedding is shallow and the last norm deep':
                at['model.embed_tokens.weight'] == 0 and at['model.norm.weight'] == 1,
            'the first block of a merge keeps the mean': torch.allclose(
                both['model.layers.0.self_attn.q_proj.weight'], torch.tensor(2.))}
