"""LiNeS: one fine-tune edited in three ways, and three fine-tunes merged in two;
every dial is set on validation data by one rule"""
import torch
from ftlab.adapters.edit import scale
from ftlab.adapters.merging.lines import by_depth, depth, merge_lines
from ftlab.adapters.edit import merge, attach_change
from ftlab.instruments.compare import old_skills
from ftlab.core.batches import data
from ftlab.core.loading import load
from ftlab.core.scorers import exact_match, skills
from ftlab.trainers.fit import fit

TASKS, STEPS, RATE = ('new-format', 'new-procedure', 'changed-rule'), 60, 1e-3
EDITS = dict(lines=lambda g: by_depth(g, 1 - g), uniform=scale,
             reverse=lambda g: by_depth(1, g - 1))
DIALS, MERGE_DIALS = [i/10 for i in range(11)], [i/10 for i in range(1, 11)]

def changed(model, change, measure):
    att = attach_change(model, change)
    try:
        return measure(model)
    finally:
        att.detach()

def fine_tuned(model, tok, task, seed):
    run = fit(model, tok, task, steps=STEPS, lr=RATE, seed=seed, progress=False)
    out = {n: t.clone() for n, t in run.delta.tensors().items()}
    run.delta.attached.detach()
    return out

def run(seed, tuned):
    model, tok = load('lab-s')
    tasks = [data(t, seed=seed, n=4000) for t in TASKS]
    changes = [fine_tuned(model, tok, t, seed) for t in tasks]
    one, change = tasks[0], changes[0]
    names = old_skills(one)

    def gained(split, n):
        return lambda m: exact_match(m, tok, getattr(one, split)[:n])

    def kept(m):
        s = skills(m, 400, names=names, tok=tok, seed=seed)
        return sum(s.values())/len(s)

    start, start_old = gained('test', 400)(model), kept(model)
    first = gained('validation', 200)(model)
    full = changed(model, change, gained('validation', 200)) - first
    out = {}
    for arm, edit in EDITS.items(): # the smallest dial that keeps 95% of the gain; 1 keeps all of it
        dial = next(g for g in DIALS if g == 1
                    or changed(model, edit(g)(change, model),
                               gained('validation', 200)) - first >= .95*full)
        new, old = changed(model, edit(dial)(change, model),
                           lambda m: (gained('test', 400)(m), kept(m)))
        out[arm] = dict(gain=new - start, forgetting=start_old - old, dial=dial)
    new, old = changed(model, change, lambda m: (gained('test', 400)(m), kept(m)))
    out['plain'] = dict(gain=new - start, forgetting=start_old - old)

    def mean(split, n):
        return lambda m: sum(exact_match(m, tok, getattr(t, split)[:n]) for t in tasks)/len(tasks)

    for arm, made in dict(merged_lines=lambda d: merge_lines(changes, model, d),
                          merged_sum=lambda d: merge(changes, d)).items():
        score = {d: changed(model, made(d), mean('validation', 100)) for d in MERGE_DIALS}
        dial = max(score, key=score.get)
        out[arm] = dict(accuracy=changed(model, made(dial), mean('test', 400)), dial=dial)
    return out

def identities():
    model, _ = load('lab-s')
    at = depth(model)
    c = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    same = lambda a, b: all(torch.allclose(a[n], b[n]) for n in c)
    return {'no dial, no edit': same(by_depth(1., 0.)(c, model), c),
            'no slope is uniform scaling': same(by_depth(.3, 0.)(c, model), scale(.3)(c, model)),
            'the embedding is shallow and the last norm deep': at['model.embed_tokens.weight'] == 0
            and at['model.norm.weight'] == 1,
            'the first block of a merge keeps the mean': torch.allclose(
                merge_lines([c, scale(3.)(c, model)], model, .5)['model.layers.0.self_attn.q_proj.weight'],
                torch.tensor(2.))}
