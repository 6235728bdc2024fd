"""lab-s learns three tasks on letters one after another: with a pool of modulators, with one adapter for each task, or
with a single one; then it is asked without being told the task"""
import random
import torch
import ftlab
from ftlab.adapters.attach import attach
from ftlab.adapters.lowrank import LoRA
from ftlab.adapters.select import parts
from ftlab.core.batches import collate
from ftlab.core.model import evaluating
from ftlab.core.recipe import Recipe, With
from ftlab.core.scorers import teacher_forced
from ftlab.core.text import split_of
from ftlab.core.tokens import encode_all
from ftlab.lab.world import LETTERS, LISTS
from ftlab.trainers.callbacks import Every
from ftlab.trainers.continual.learning_to_modulate import (
    KINDS, Keys, in_turn, keys_of, learning_to_modulate, prompts_in, queries)

# the prompts of three skills that lab-s knows, each with the answers of another rule
TASKS = (('sort', lambda x: sorted(x)[::-1]), ('dedupe', lambda x: x[::-1]),
         ('reverse', lambda x: list(dict.fromkeys(x))))
N = len(TASKS)
SIZE, RANK = 6, 4    # of the pool; every LoRA has this rank
INIT = .1            # of the keys: in 60 steps they move less far than in the paper's 100,000
ROWS, ASKED = 400, 500 # of each task, to learn from and to be asked

class matrices:
    "Select the matrices that the pool modulates"
    def __call__(self, model, batches=None, seed=0):
        return parts(*KINDS['lora'])(model)

def low_rank(r):
    return With(LoRA, r=r, alpha=2.*r)

ARMS = dict(l2m=learning_to_modulate(size=SIZE, r=RANK, tasks=N, init=INIT),
            oracle=Recipe('one for each', select=matrices(), delta=low_rank(RANK)),
            shared=Recipe('one for all', select=matrices(), delta=low_rank(RANK),
                          source=in_turn(N)))

def rows(task, n, split, seed) -> list[dict]:
    "Different questions of one task, five or six letters each"
    skill, rule = TASKS[task]
    rng, out = random.Random(f'{split}/{seed}/{task}'), {}
    while len(out) < n:
        x = [rng.choice(LETTERS) for _ in range(rng.choice((5, 6)))]
        prompt = rng.choice(LISTS[skill][1]).format(x=' '.join(x))
        if split_of(prompt) == split:
            out[prompt] = dict(prompt=prompt, response=' '.join(rule(x)))
    return list(out.values())

def right(model, tok, asked) -> list[int]:
    """Whether each answer would be said, read from one pass over question and answer. The keys of a pool are told
    which tokens are the question, as when the answer is written"""
    keys, out = [m for m in model.modules() if isinstance(m, Keys)], []
    enc = encode_all(asked, tok, 'text')
    for i in range(0, len(enc), 250):
        b = collate(enc[i:i + 250], tok.pad_token_id)
        for k in keys:
            k.told = [(b['input_ids'], prompts_in(b))]
        with evaluating(model), torch.no_grad():
            out += teacher_forced(model, b).int().tolist()
    return out

def embedded(model, tok, asked) -> torch.Tensor:
    return queries(model, tok, [r['prompt'] for r in asked])

def tune(arm, train, rate, seed, steps, callbacks=()):
    model, tok = ftlab.load('lab-s')
    data = ftlab.data(dict(train=train, validation=train[:2], test=train[:2]))
    return ftlab.fit(model, tok, data, ARMS[arm], steps=steps, lr=rate, seed=seed, batch_size=8,
                     schedule='constant', progress=False, callbacks=callbacks)

def mean(x):
    return sum(x)/len(x)

def levels(first, last) -> dict:
    """Share of right answers when each task was learned, at the end, and how much of it the earlier tasks lost;
    `first` and `last` are the hits of each task then"""
    lost = [mean(first[t]) - mean(last[t]) for t in range(N - 1)]
    named = {f'task{t + 1}': mean(x) for t, x in enumerate(last)}
    learned = mean([mean(x) for x in first])
    return dict(score=mean([mean(x) for x in last]), forgot=mean(lost), learned=learned, **named)

def stream(arm, train, asked, rate, seed, steps) -> dict:
    "Learn all tasks in turn, with the pool or one LoRA for all; ask each when it is learned, and at the end"
    ends = {(t + 1)*steps//N: t for t in range(N)}

    def look(state):
        due = [ends[state.step]] if state.step in ends else []
        due = range(N) if state.step == steps else due
        return {f'task {t}': right(state.model, state.tok, asked[t]) for t in due}

    run = tune(arm, sum(train, []), rate, seed, steps, (Every(set(ends), look),))
    seen = {r['step']: r for r in run.path}
    first = [seen[end][f'task {t}'] for end, t in ends.items()]
    out = levels(first, [seen[steps][f'task {t}'] for t in range(N)])
    return out | (selected(run, asked) if arm == 'l2m' else {})

def selected(run, asked) -> dict:
    """How often a question chooses an entry that its own task uses more than the others do, and how many entries
    at least a tenth of a task's questions choose, on average"""
    keys = keys_of(run.delta.attached)
    picked = [keys.choose(embedded(run.model, run.tok, a)) for a in asked]
    share = torch.stack([torch.bincount(p, minlength=SIZE)/len(p) for p in picked])
    return dict(selected=float(share.max(0).values.sum())/N, spread=float((share >= .1).sum())/N)

def apart(train, asked, rate, seed, steps) -> dict:
    """Learn each task with an adapter of its own, for its part of the steps; choose by the true task, and (`near_`)
    by the nearest mean of embedded prompts"""
    grid, means, near = [], [], []
    for t in range(N):
        run = tune('oracle', train[t], rate, seed + t, steps//N)
        grid.append([right(run.model, run.tok, a) for a in asked])
        means.append(embedded(run.model, run.tok, train[t]).mean(0))
    for t in range(N):
        far = torch.cdist(embedded(run.model, run.tok, asked[t]), torch.stack(means))
        near.append(far.argmin(1))
    own = [grid[t][t] for t in range(N)]
    by_mean = [[grid[i][t][j] for j, i in enumerate(near[t].tolist())] for t in range(N)]
    found = mean([float((n == t).float().mean()) for t, n in enumerate(near)])
    named = levels(own, by_mean) | dict(selected=found)
    return levels(own, own) | {f'near_{k}': v for k, v in named.items()}

def run(arm, rate, seed, split, steps):
    train = [rows(t, ROWS, 'train', seed) for t in range(N)]
    asked = [rows(t, ASKED, split, seed) for t in range(N)]
    made = apart if arm == 'oracle' else lambda *a: stream(arm, *a)
    return made(train, asked, rate, seed, steps) | dict(questions=N*ASKED)

def derive(found):
    "The oracle's adapters, chosen by the nearest mean"
    own = found.get('oracle', {})
    near = {k.removeprefix('near_'): v for k, v in own.items() if k.startswith('near_')}
    return dict(nearest=near) if near else {}

def identities() -> dict[str, bool]:
    model, _ = ftlab.load('lab-s')
    size = {}
    for arm in ('l2m', 'shared'):
        att = attach(model, ARMS[arm].select(model), ARMS[arm].delta)
        size[arm] = sum(p.numel() for d in att.deltas.values() if not isinstance(d, Keys)
                        for p in d.parameters())
        att.detach()
    words = [{w for r in rows(t, 50, 'train', 0) for w in r['prompt'].split()} for t in range(N)]
    shared = all(len(a & b) > len(a)/2 for a in words for b in words)
    return {'the pool has as many parameters as six single LoRAs': size['l2m'] == SIZE*size['shared'],
            'tasks share most of their words': shared,
            'no training question is asked': not {r['prompt'] for r in rows(0, ROWS, 'train', 0)}
            & {r['prompt'] for r in rows(0, ASKED, 'test', 0)}}
