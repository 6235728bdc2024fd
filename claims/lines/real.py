"""LiNeS and uniform scaling of what full fine-tuning of SmolLM2-135M-Instruct has changed"""
from functools import lru_cache
from safetensors.torch import load_file, save_file
import ftlab
from ftlab.adapters.edit import attach_change, scale, unchanged
from ftlab.adapters.merging.lines import by_depth
from ftlab.core.io import write_atomically
from ftlab.core.recipe import Recipe
from ftlab.instruments.bench import mean_of, measured
from ftlab.instruments.claims import workplace
from ftlab.instruments.real import MODEL, TASK, real_bench
from ftlab.instruments.runs import library_code

RATE, STEPS = 3e-4, 60  # the rate that learns best on the tuning seed
EDITS = dict(lines=lambda g: by_depth(g, 1 - g), uniform=scale,
             reverse=lambda g: by_depth(1, g - 1), plain=lambda g: unchanged)

@lru_cache(1)
def bench():
    return real_bench(MODEL, TASK, metric='exact', steps=STEPS, batch_size=8, evaluations=2,
                      max_length=96, items=150, old_items=30, validation_items=60,
                      old_validation_items=15)

@lru_cache(1)
def change_of(name, rate, seed):
    "The change of a fine-tune; it is kept in a file, as its training takes minutes"
    file = workplace()/'changes'/f'{name}-{rate:g}-{seed}-{library_code()}.safetensors'
    if not file.exists():
        model, tok = bench().base(seed)
        recipe = Recipe('full') if name == 'full' else ftlab.methods.get(name)
        run = ftlab.fit(model, tok, bench().data(seed), recipe, steps=STEPS, lr=rate, seed=seed,
                        max_length=96, batch_size=8, progress=False)
        change = {n: c.detach().clone().contiguous()
                  for n, c in run.delta.attached.changes().items()}
        write_atomically(file, lambda p: save_file(change, p))
    return load_file(file)

def found(change, seed, split):
    "Gain and forgetting of the base with a change"
    b = bench()
    model, tok = b.base(seed)
    att = attach_change(model, change)
    now, was = measured(b, model, tok, seed, split), b.before(seed, split)
    att.detach()
    lost = {k: [x - y for x, y in zip(was['old'][k], v)] for k, v in now['old'].items()}
    return dict(gain=mean_of(now['new']) - mean_of(was['new']), forgetting=mean_of(lost))

@lru_cache(64)
def edited(edit, dial, seed, split):
    change = change_of('full', RATE, seed)
    return found(EDITS[edit](dial)(change, bench().base(seed)[0]), seed, split)

def run(arm, rate, seed, split, steps):
    plain, here = edited('plain', None, seed, split), edited(arm, rate, seed, split)
    kept, undone = here['gain']/max(plain['gain'], .01), 1 - here['forgetting']/plain['forgetting']
    return here | dict(kept=kept, undone=undone, tradeoff=(2*kept + undone)/3)
