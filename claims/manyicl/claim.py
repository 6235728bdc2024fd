"""Words labelled by kind, a new labelling in every task: lab-l tuned on many tasks with many, few or no examples in
context, and asked about new tasks with fifteen"""
import random
from functools import lru_cache
import ftlab
from ftlab.core.batches import collate
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, answers, teacher_forced
from ftlab.core.tokens import encode_all
from ftlab.lab.lookup import KINDS, LABELS
from ftlab.lab.models import skills_of
from ftlab.methods import manyicl
from ftlab.trainers.losses.manyicl import conversation

TASKS, ROWS = 32, 20                         # to learn from
ASKED = dict(test=(100, 4), validation=(40, 3))  # tasks, and questions of each
SHOTS = 15
# each arm, how many of its lines are in a step (64 rows in every arm), how many examples it is tuned with, and
# how many times the steps: few-shot tuning has four times, and so as many answers with a loss as all answers have
ARMS = dict(many=(manyicl(SHOTS), 4, SHOTS, 1), last=(manyicl(SHOTS, 'last'), 4, SHOTS, 1),
            few=(manyicl(3, 'last'), 16, 3, 4), zero=(Recipe(), 64, 0, 1), base=(None, 0, SHOTS, 1))

def labelled(rng) -> dict[str, str]:
    "A task: four kinds of words, each with a label"
    return dict(zip(rng.sample(list(KINDS), 4), rng.sample(LABELS, 4)))

def rows_of(task, n, rng) -> list[dict]:
    "Different words of the task's kinds, each kind as likely as the others"
    said = {}
    while len(said) < n:
        kind = rng.choice(list(task))
        said[rng.choice(list(KINDS[kind]))] = task[kind]
    return [dict(prompt=f'{word} >', response=label) for word, label in said.items()]

@lru_cache(8)
def tasks(seed) -> list[dict[str, str]]:
    rng = random.Random(f'tasks/{seed}')
    return [labelled(rng) for _ in range(TASKS)]

def taught(seed):
    rng = random.Random(f'rows/{seed}')
    rows = [dict(r, task=str(i)) for i, t in enumerate(tasks(seed)) for r in rows_of(t, ROWS, rng)]
    rng.shuffle(rows)
    return ftlab.data(dict(train=rows, validation=rows[:2], test=rows[:2]), carry=['task'])

def asked(seed, split, shots) -> list[dict]:
    "Questions about new tasks: no labelling is one of the training tasks'"
    rng, out, n = random.Random(f'{split}/{seed}'), [], ASKED[split]
    while len(out) < n[0]*n[1]:
        if (task := labelled(rng)) in tasks(seed):
            continue
        rows = rows_of(task, SHOTS + n[1], rng)
        out += [dict(prompt=conversation([*rows[:shots], q])['messages'][:-1],
                     response=q['response']) for q in rows[SHOTS:]]
    return out

def right(model, tok, rows) -> list[float]:
    return [float(a.split() == r['response'].split())
            for a, r in zip(answers(model, tok, rows, max_new_tokens=3), rows)]

def kept(model, tok, split, seed) -> float:
    "The share of answers to old questions that greedy decoding would give"
    rows = [r for s in skills_of(tok) for r in WORLD.rows(s, 15, split, seed)]
    coded = sorted(encode_all(rows, tok, 'text'), key=lambda r: len(r['input_ids']))
    model.eval()
    batches = [collate(coded[i:i + 64], tok.pad_token_id) for i in range(0, len(coded), 64)]
    hits = [x for b in batches for x in teacher_forced(model, b).tolist()]
    return sum(hits)/len(hits)

def run(arm, rate, seed, split, steps):
    recipe, size, own, times = ARMS[arm]
    model, tok = ftlab.load('lab-l')
    if recipe is not None:
        ftlab.fit(model, tok, taught(seed), recipe, steps=steps*times, lr=rate, seed=seed,
                  schedule='cosine', warmup=1, batch_size=size, progress=False)
    items = right(model, tok, asked(seed, split, SHOTS))
    score = sum(items)/len(items)
    as_tuned = score
    if arm == 'few':
        found = right(model, tok, asked(seed, split, own))
        as_tuned = sum(found)/len(found)
    return dict(score=score, as_tuned=as_tuned, kept=kept(model, tok, split, seed),
                items=dict(score=items))

def identities() -> dict[str, bool]:
    import torch
    from ftlab.core.tokens import encode
    from ftlab.trainers.objective import token_nll
    model, tok = ftlab.load('lab-l')
    rows = rows_of(labelled(random.Random(0)), 6, random.Random(0))

    def total(c):
        b = collate([encode(c, tok, 'chat')], tok.pad_token_id)
        with torch.no_grad():
            logits = model(b['input_ids'], b['attention_mask']).logits
        return float(token_nll(logits, b['labels']).sum())
    once = total(conversation(rows))
    apart = sum(total(conversation(rows[:k], 'last')) for k in range(1, 7))
    return {'the loss on all answers is the sum of the losses on the last answer of each beginning':
            abs(once - apart) < 1e-3*once}
