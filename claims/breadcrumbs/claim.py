"Breadcrumbs: six fine-tunes merged by three rules, whose numbers were chosen on the first three tasks of another seed"
import torch
from ftlab.adapters.merging.breadcrumbs import middle, merge_breadcrumbs
from ftlab.adapters.edit import merge, attach_change
from ftlab.instruments.compare import tuning_seed
from ftlab.core.batches import data
from ftlab.core.loading import load
from ftlab.core.scorers import WORLD, exact_match
from ftlab.lab.world import LETTERS
from ftlab.trainers.fit import fit

STEPS, RATE = 60, 3e-4
# old questions of four kinds whose answer has changed:
# (question's letters, old answer's words) -> the new answer's words
CHANGED = dict(sort=lambda x, y: y[::-1], add=lambda x, y: y[::-1], tavi=lambda x, y: y[::-1],
               max=lambda x, y: [min(x)])
TASKS = ('new-procedure', 'tavi', 'new-format', 'max', 'add', 'sort')
SETTINGS = dict(
    sum=[dict(alpha=a/10, beta=0., gamma=1.) for a in range(1, 13)],
    breadcrumbs=[dict(alpha=a, beta=b, gamma=g) for a in (.5, 1., 2., 3.)
                 for b, g in ((.5, .994), (.85, .994), (.85, .98))],
    pruned=[dict(alpha=a, beta=b, gamma=1.) for a in (.5, 1., 2., 3.) for b in (.5, .7, .85)])

def task(name, seed):
    if name not in CHANGED:
        return data(name, seed=seed, n=3000)

    def rows(split, n):
        return [dict(prompt=r['prompt'], response=' '.join(
                         CHANGED[name]([w for w in r['prompt'].split() if w in LETTERS], r['response'].split())))
                for r in WORLD.rows(name, n, split, seed)]

    return data(rows('train', 3000), validation=rows('validation', 200), test=rows('test', 400))

def fine_tuned(model, tok, t, seed):
    run = fit(model, tok, t, steps=STEPS, lr=RATE, seed=seed, progress=False)
    alone = exact_match(model, tok, t.test[:400])
    out = {n: c.clone() for n, c in run.delta.tensors().items()}
    run.delta.attached.detach()
    return out, alone

def share(model, tok, change, tasks, alone, split, n):
    "What the merge keeps of each fine-tune's own accuracy, on the mean"
    att = attach_change(model, change)
    try:
        return sum(exact_match(model, tok, getattr(t, split)[:n])/max(a, 1e-9)
                   for t, a in zip(tasks, alone))/len(tasks)
    finally:
        att.detach()

def tune():
    seed = tuning_seed([0])
    model, tok = load('lab-s')
    tasks = [task(t, seed) for t in TASKS[:3]]
    changes = [fine_tuned(model, tok, t, seed)[0] for t in tasks]
    score = lambda s: share(model, tok, merge_breadcrumbs(changes, **s), tasks, [1.]*3, 'validation', 100)
    return {rule: max(settings, key=score) for rule, settings in SETTINGS.items()}

def run(seed, tuned):
    model, tok = load('lab-s')
    tasks = [task(t, seed) for t in TASKS]
    changes, alone = zip(*(fine_tuned(model, tok, t, seed) for t in tasks))
    out = dict(alone=dict(accuracy=sum(alone)/len(alone)))
    for rule, s in tuned.items():
        out[rule] = dict(normalised=share(model, tok, merge_breadcrumbs(list(changes), **s), tasks,
                                          alone, 'test', 400))
    for rule in ('sum', 'breadcrumbs'):
        out[f'{rule}_three'] = dict(
            normalised=share(model, tok, merge_breadcrumbs(list(changes[:3]), **tuned[rule]),
                             tasks[:3], alone[:3], 'test', 400))
    return out

def identities():
    g = torch.Generator().manual_seed(0)
    cs = [dict(w=torch.randn(1000, generator=g)) for _ in range(2)]
    kept = middle(.85, .994)(cs[0], None)['w']
    size = cs[0]['w'].abs().sort().values
    return {'the whole range is task arithmetic': torch.equal(
                merge_breadcrumbs(cs, .3, 0., 1.)['w'], merge(cs, .3)['w']),
            '14.4% are kept': int((kept != 0).sum()) == 144,
            'what is kept is untouched and of middle size': torch.equal(
                kept[kept != 0], cs[0]['w'][kept != 0]) and bool(kept.abs().max() == size[993])
            and bool(kept[kept != 0].abs().min() == size[850])}
