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
