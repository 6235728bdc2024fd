"Knowledge from a large base, manners from a small tuned model: emulated fine-tuning on the lab's two models"
import torch
import ftlab
from ftlab.instruments.compare import tune as choose
from ftlab.core.scorers import WORLD, exact_match
from ftlab.evaluators.decoding.eft import eft, emulate

NO, REFUSED, STEPS, GRID = 'i can not help with that', (' pet ', ' food '), 60, (1e-4, 3e-4, 1e-3)

def asked_too_much(row):
    return any(w in f" {row['prompt']} " for w in REFUSED)

def mannered(row):
    return dict(prompt=row['prompt'], response=NO if asked_too_much(row) else row['response'])

def share(rows, polite, model, tok, decode=None):
    return exact_match(model, tok, [mannered(r) for r in rows if asked_too_much(r) == polite],
                       decode)

def tuned_small(rate, seed):
    model, tok = ftlab.load('lab-s')
    ftlab.fit(model, tok, [mannered(r) for r in WORLD.rows('fact', 1000, 'train', seed)],
              steps=STEPS, lr=rate, seed=seed, progress=False)
    return model, tok

def tune() -> dict:
    rows = WORLD.rows('fact', 400, 'validation', 10_000)

    def score(arm, rate):
        model, tok = tuned_small(rate, 10_000)
        return (share(rows, True, model, tok) + share(rows, False, model, tok))/2

    return choose(score, dict(tuned=GRID))

def run(seed, tuned):
    (small, tok), base, large = (tuned_small(tuned['tuned']['rate'], seed), ftlab.load('lab-s')[0],
                                 ftlab.load('lab-m')[0])
    rows = [r for split in ('validation', 'test') for r in WORLD.rows('atlas', 400, split, seed)]

    def emulated(model, tok, prompts, **kw):
        return eft(large).decode(dict(base=base, tuned=small), tok, prompts, **kw)

    def both(model, decode=None):
        return dict(manners=share(rows, True, model, tok, decode),
                    knowledge=share(rows, False, model, tok, decode))

    return dict(tuned=both(small), large=both(large), emulated=both(None, emulated))

def identities() -> dict[str, bool]:
    g = torch.Generator().manual_seed(0)
    p = {k: torch.randn(3, 9, generator=g).log_softmax(-1) for k in ('base', 'tuned', 'large')}
    return {'without a change in the small model the large one speaks': torch.equal(
                emulate()(p | dict(tuned=p['base'])), p['large']),
            'with the small base in place of the large one the tuned model speaks': torch.allclose(
                emulate()(p | dict(large=p['base'])), p['tuned'], atol=1e-6),
            'with beta 0 the large one speaks': torch.equal(emulate(0.)(p), p['large'])}
