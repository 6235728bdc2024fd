"A Pilot, the Pilot with its Copilot, and a wider LoRA with as many numbers as both"
import torch
import ftlab
from ftlab.adapters.modules.lora import lora
from ftlab.instruments.compare import tune as choose
from ftlab.core.generate import generate
from ftlab.core.scorers import WORLD, exact_match
from ftlab.evaluators.decoding.copilot import Copilot, answer_together, copilot, mistakes

SKILL, STEPS, LAM, ITEMS = 'new-procedure', 60, 1., 1000
# the last are the Copilot's own
GRIDS = dict(pilot=(1e-3, 3e-3, 1e-2), wide=(1e-3, 3e-3, 1e-2), together=(3e-4, 1e-3, 3e-3))
WIDE = 31 # 9,472 numbers a rank: 293,632 beside 75,776 + 212,909

def train(recipe, rate, seed):
    model, tok = ftlab.load('lab-s')
    return ftlab.fit(model, tok, ftlab.data(SKILL, seed=seed, n=2000), recipe, steps=STEPS,
                     batch_size=32, lr=rate, seed=seed, progress=False)

def alone(run, rows):
    return exact_match(run.model, run.tok, rows)

def together(run, rows):
    return exact_match(
        run.model, run.tok, rows,
        lambda m, t, p, **kw: answer_together(m, run.models['copilot'], t, p, LAM, **kw))

def tune() -> dict:
    rows = WORLD.rows(SKILL, 400, 'validation', 10_000)
    recipes = dict(pilot=lora(), wide=lora(r=WIDE, alpha=2.*WIDE))
    found = choose(lambda arm, rate: alone(train(recipes[arm], rate, 10_000), rows),
                   {a: GRIDS[a] for a in recipes})
    best = found['pilot']['rate']
    return (found
            | choose(lambda arm, rate: together(train(lora()*copilot(lr=rate), best, 10_000), rows),
                     dict(together=GRIDS['together'])))

def run(seed, tuned):
    rows, rate = WORLD.rows(SKILL, ITEMS, 'test', seed), {a: tuned[a]['rate'] for a in GRIDS}
    both, wide = (train(lora()*copilot(lr=rate['together']), rate['pilot'], seed),
                  train(lora(r=WIDE, alpha=2.*WIDE), rate['wide'], seed))
    return dict(together=dict(score=together(both, rows),
                              numbers=both.cost['trainable'] + both.cost['learners'],
                              foresight=both.log[-1]['copilot_loss']),
                pilot=dict(score=alone(both, rows)),
                wide=dict(score=alone(wide, rows), numbers=wide.cost['trainable']))

def identities() -> dict[str, bool]:
    def short(recipe):
        model, tok = ftlab.load('lab-s')
        return ftlab.fit(model, tok, ftlab.data(SKILL, n=50), recipe, steps=3, batch_size=8,
                         lr=3e-3, progress=False)

    a, b = short(lora()), short(lora()*copilot())
    asked = [r['prompt'] for r in WORLD.rows(SKILL, 20, 'train')]
    logits, y = (torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0)),
                 torch.tensor([[-100, -100, 3, 4, 8]]*2))
    l = mistakes(logits, y)
    p, q = a.delta.attached.parameters(), b.delta.attached.parameters()
    return {
        'the Pilot is trained as if alone, bit for bit': p.keys() == q.keys()
        and all(torch.equal(p[k], q[k]) for k in p),
        'lam 0 is the Pilot': answer_together(b.model, b.models['copilot'], b.tok, asked, 0., 9)
        == generate(b.model, b.tok, asked, max_new_tokens=9),
        'an untrained Copilot corrects nothing': answer_together(
            b.model, Copilot(128, len(b.tok)), b.tok, asked, LAM, 9)
        == generate(b.model, b.tok, asked, max_new_tokens=9),
        'a mistake sums to zero, and is zero where nothing is asked': bool(
            l.sum(-1).abs().max() < 1e-5 and l[:, 0].abs().max() == 0 and l[:, 1].abs().max() > 0),
        'the wide LoRA has as many numbers, to a twentieth': abs(
            WIDE*a.cost['trainable']/8/(b.cost['trainable'] + b.cost['learners']) - 1) < .05}
