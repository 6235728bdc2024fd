"""lab-s learns to refuse the questions of `regress`. Is the old answer still there, and does it come back
sooner than in a copy of the checkpoint that never had the skill?"""
import random
from functools import cache
import ftlab
from ftlab.core.scorers import WORLD, exact_match
from ftlab.evaluators.mechanisms.wrapper_hypothesis import (all_units, answer_batch, answered,
                                                            best_read, layer_probe, prune_wrapper,
                                                            recovery, refused, taught,
                                                            without)

SKILL, EARLY = 'regress', 'step-1000'
HIDE, RATE, LARGE, UNITS = 80, 1e-4, 1e-3, 20

def rows(seed, split='train', n=1000):
    return WORLD.rows(SKILL, n, split, seed)

@cache
def hidden(arm, seed):
    "The arm's model after the tuning that hides the skill; 'early' has had none"
    model, tok = ftlab.load('lab-s', revision=None if arm in ('hidden', 'large') else EARLY)
    if arm == 'early':
        return model, tok
    rate = LARGE if arm == 'large' else RATE
    lesson = answered(rows(seed), refused)
    return taught(model, tok, lesson, steps=HIDE, rate=rate, seed=seed), tok

@cache
def left(arm, seed, split) -> dict:
    "What does not depend on the reverse fine-tuning: accuracy and the probe"
    model, tok = hidden(arm, seed)
    asked = rows(seed, split, 200)
    return dict(old=exact_match(model, tok, asked),
                taught=exact_match(model, tok, answered(asked, refused)),
                probe=best_read(layer_probe(model, tok, rows(seed + 1, split, 500))))

@cache
def pruned(seed, split) -> dict:
    "The old answers without 20 units that the scores choose, and without as many random ones of the same kinds"
    model, tok = hidden('hidden', seed)
    chosen = prune_wrapper(model, answer_batch(rows(seed + 1)[:64], tok), UNITS)
    draw, units = random.Random(seed), all_units(model)
    others = [u for kind in ('head', 'neuron') for u in draw.sample(
        [v for v in units if v.kind == kind], sum(c.kind == kind for c in chosen))]
    out = {}
    for name, some in (('pruned', chosen), ('random_pruned', others)):
        with without(model, some):
            out[name] = exact_match(model, tok, rows(seed, split, 200))
    return out

def run(arm, rate, seed, split, steps) -> dict:
    "Reverse fine-tuning of one model: its accuracy after these steps, beside what the tuning has left"
    model, tok = hidden(arm, seed)
    curve = recovery(model, tok, rows(seed + 1), rows(seed, split, 200), (steps,), rate=rate,
                     seed=seed)
    more = pruned(seed, split) if arm == 'hidden' and split == 'test' else {}
    return left(arm, seed, split) | more | dict(recovered=curve[steps])

def identities() -> dict[str, bool]:
    model, tok = ftlab.load('lab-s')
    asked = rows(0, 'test', 40)
    before = exact_match(model, tok, asked)
    with without(model, []):
        same = exact_match(model, tok, asked) == before
    return {'without no unit the model is itself': same,
            'after no step of reverse fine-tuning, the model is as it was':
                recovery(model, tok, asked, asked, (1,))[0] == before}
