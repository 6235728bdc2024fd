"ASFT, DFT and plain fine-tuning on the same rows, half of whose answers are scrambled; the bench is that of every claim whose arms are Recipes"
import random
from dataclasses import replace
import torch
import ftlab
from ftlab.instruments.claims import Ground, run_seed, train_arm
from ftlab.instruments.compare import tune as choose
from ftlab.core.batches import collate, encode
from ftlab.core.state import State
from ftlab.trainers.objective import priced

STEPS, GRID = 60, (1e-4, 3e-4, 1e-3)

class Scrambled(Ground):
    "The skill, with the letters of half of the training answers in a random order; validation and test questions as they were"
    def data(self, seed):
        d, rng = super().data(seed), random.Random(f'scrambled/{seed}')
        def spoil(row): words = row['response'].split(); return dict(row, response=' '.join(rng.sample(words, len(words)))) if rng.random() < .5 else row
        return replace(d, train=[spoil(r) for r in d.train])

BENCH = Scrambled('lab-s', 'reverse', revision='step-500', items=1000, old_items=400, validation_items=200, steps=STEPS, progress=False, batch_size=32)
ARMS = {n: dict(recipe=ftlab.methods.get(n), steps=STEPS) for n in ('asft', 'dft', 'full')}

def tune() -> dict:
    return choose(lambda arm, rate: train_arm(BENCH, ARMS[arm], rate, 10_000)[1].path[-1]['gain'], {a: GRID for a in ARMS})

def run(seed, tuned): return run_seed(BENCH, ARMS, {a: tuned[a]['rate'] for a in ARMS}, seed)

def identities() -> dict[str, bool]:
    (model, tok), other = ftlab.load('lab-s'), ftlab.load('lab-s', revision='step-2200')[0]
    s = State(model, tok); s.batch = collate([encode(r, tok, 'text') for r in ftlab.data('sort', n=8).train], tok.pad_token_id); s.count = int(priced(s.batch['labels']).sum())
    def gradient(recipe, base): s.models['reference'] = base; return torch.autograd.grad(recipe.objective(s), model.lm_head.weight)[0]
    dft, asft = (ftlab.methods.get(n) for n in ('dft', 'asft')); plain = gradient(dft, model)
    return {'at the base it is DFT': torch.allclose(gradient(asft, model), plain, atol=1e-6), 'away from the base it is not': not torch.allclose(gradient(asft, other), plain, atol=1e-6),
            'with weight 0 it is DFT everywhere': torch.equal(gradient(ftlab.methods.asft(weight=0.), other), plain)}
