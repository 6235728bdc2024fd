"""lab-s learns tasks one after another: with a pool of modulators, with one adapter per task, or with a
single one; then it is asked without being told the task."""
import random
import torch
import ftlab
from ftlab.adapters.attach import Attached
from ftlab.adapters.store import load_delta
from ftlab.core.generate import generate
from ftlab.core.recipe import Recipe, With
from ftlab.adapters.lowrank import LoRA
from ftlab.adapters.select import parts
from ftlab.core.text import split_of
from ftlab.lab.world import LETTERS, LISTS
from ftlab.methods import learning_to_modulate
from ftlab.trainers.callbacks import Every
from ftlab.trainers.continual.learning_to_modulate import KINDS, in_turn, keys_of, queries

SIZE, RANK, TASKS = 6, 4, 3
ROWS, ASKED = 400, 80 # of each task, to learn from and to be asked

def ordered(x, op):
    return LISTS[op][0](x)

RULES = [lambda x: sorted(x)[::-1], lambda x: x[::-1], lambda x: list(dict.fromkeys(x))]
CUES = [LISTS[k][1] for k in ('sort', 'dedupe', 'reverse')]
STREAM = 'words'
PURE = .85

def letters(task, rng):
    "Six letters, most of them from the task's own third"
    n = rng.choice((5, 6))
    if STREAM == 'words':
        return [rng.choice(LETTERS) for _ in range(n)]
    own = LETTERS[4*task:4*task + 4]
    return [rng.choice(own if rng.random() < PURE else LETTERS) for _ in range(n)]

def rows(task, n, split, seed):
    rng, out = random.Random(f'{split}/{seed}/{task}'), {}
    while len(out) < n:
        x = letters(task, rng)
        ask = rng.choice(CUES[task]) if STREAM == 'words' else 'sort {x} ='
        prompt = ask.format(x=' '.join(x))
        if split_of(prompt) == split:
            out[prompt] = dict(prompt=prompt, response=' '.join(RULES[task](x)))
    return list(out.values())

def right(model, tok, asked) -> list[int]:
    said = generate(model, tok, [r['prompt'] for r in asked], max_new_tokens=8)
    return [int(s.split() == r['response'].split()) for s, r in zip(said, asked)]

class Stages:
    "Ask the questions of each task when it has been learned, and all at the end"

    def __init__(self, steps, tok, asked):
        self.ends = {(i + 1)*steps//TASKS: i for i in range(TASKS)}
        self.steps, self.tok, self.asked = steps, tok, asked

    def __call__(self, state):
        if not state.step:
            return {}
        now = range(TASKS) if state.step == self.steps else [self.ends[state.step]]
        return {f'task {t}': right(state.model, self.tok, self.asked[t]) for t in now}

def same(model) -> dict:
    "Select the matrices that the pool modulates"
    return parts(*KINDS['lora'])(model)

def where(model, batches=None, seed=0):
    return same(model)

def recipe_of(arm) -> Recipe:
    if arm == 'l2m':
        return learning_to_modulate(size=SIZE, r=RANK, tasks=TASKS, init=INIT)
    if arm == 'shared':
        return Recipe('shared', select=where, source=in_turn(TASKS),
                      delta=With(LoRA, r=SIZE*RANK, alpha=2.*SIZE*RANK))
    return Recipe('one', select=where, delta=With(LoRA, r=RANK, alpha=2.*RANK))

INIT = .1

def tune(recipe, train, rate, seed, steps, model, tok, callbacks=()):
    some = train[:2]
    return ftlab.fit(model, tok, ftlab.data(dict(train=train, validation=some, test=some)), recipe, steps=steps,
                     lr=rate, seed=seed, batch_size=16, schedule='constant', progress=False, callbacks=callbacks)

def summed(first, last) -> dict:
    "Share of right answers at the end, and how much of it the earlier tasks lost since each was learned"
    mean = lambda x: sum(x)/len(x)
    lost = [mean(first[t]) - mean(last[t]) for t in range(TASKS - 1)]
    return dict(score=mean([mean(x) for x in last]), forgot=mean(lost),
                **{f'task{t + 1}': mean(x) for t, x in enumerate(last)})

def stream(arm, train, asked, rate, seed, steps) -> dict:
    "The pool, or one LoRA for all"
    model, tok = ftlab.load('lab-s')
    look = Stages(steps, tok, asked)
    run = tune(recipe_of(arm), sum(train, []), rate, seed, steps, model, tok, (Every(set(look.ends), look),))
    seen = {r['step']: r for r in run.path}
    first = [seen[end][f'task {t}'] for end, t in look.ends.items()]
    out = summed(first, [seen[steps][f'task {t}'] for t in range(TASKS)])
    if arm == 'l2m':
        keys = keys_of(run.delta.attached)
        entries = [keys.choose(queries(model, tok, [r['prompt'] for r in a])) for a in asked]
        most = [int(e.mode().values) for e in entries]
        out |= dict(selected=sum(float((e == m).float().mean()) for e, m in zip(entries, most))/TASKS,
                    entries=len(set(most)))
    return out

def apart(train, asked, rate, seed, steps) -> tuple[dict, dict]:
    "One adapter for each task: chosen by the true task, and by the nearest mean of embedded prompts"
    model, tok = ftlab.load('lab-s')
    embedded = lambda rows: queries(model, tok, [r['prompt'] for r in rows])
    means = torch.stack([embedded(t).mean(0) for t in train])
    near = [torch.cdist(embedded(a), means).argmin(1) for a in asked]
    grid = []
    for t in range(TASKS):
        run = tune(recipe_of('one'), train[t], rate, seed + t, steps//TASKS, model, tok)
        grid.append([right(model, tok, a) for a in asked])
        run.delta.attached.detach()
    own = [grid[t][t] for t in range(TASKS)]
    by_mean = [[grid[int(i)][t][j] for j, i in enumerate(near[t])] for t in range(TASKS)]
    found = sum(float((n == t).float().mean()) for t, n in enumerate(near))/TASKS
    return summed(own, own), summed(own, by_mean) | dict(selected=found)

def run(arm, rate, seed, split, steps):
    train = [rows(t, ROWS, 'train', seed) for t in range(TASKS)]
    asked = [rows(t, ASKED, split, seed) for t in range(TASKS)]
    if arm != 'oracle':
        return stream(arm, train, asked, rate, seed, steps)
    true, near = apart(train, asked, rate, seed, steps)
    return true | {f'near_{k}': v for k, v in near.items()}

def derive(found):
    "The oracle's adapters, chosen by the nearest mean"
    if 'oracle' not in found:
        return {}
    return dict(nearest={k.removeprefix('near_'): v for k, v in found['oracle'].items() if k.startswith('near_')})
