"A Pilot, the Pilot with its Copilot, and a wider LoRA with as many parameters as both"
from functools import lru_cache
import torch
import ftlab
from ftlab.adapters.modules.lora import lora
from ftlab.core.batches import collate
from ftlab.core.generate import generate
from ftlab.core.model import evaluating, model_inputs
from ftlab.core.scorers import WORLD, answers, judge
from ftlab.core.tokens import encode_all
from ftlab.evaluators.decoding.copilot import (Copilot, answer_together, copilot, examples_of,
                                               mistakes, rmse, thoughts)

SKILL, BATCH, LAM = 'new-procedure', 8, 1.
FASTER = 5/3 # the Copilot's rate, in rates of its Pilot: the paper's Table 5
ITEMS = dict(test=1000, validation=400)
RANK, WIDE = 8, 31 # 9,472 parameters a rank: 293,632 beside 75,776 + 212,909

def recipe(arm, rate):
    wide = lora(r=WIDE, alpha=2.*WIDE)
    return wide if arm == 'wide' else lora(r=RANK)*copilot(LAM, lr=rate*FASTER)

# the Pilot is bit for bit the same with and without its Copilot (an identity), so the two share a run
@lru_cache(12)
def trained(arm, rate, seed, steps):
    model, tok = ftlab.load('lab-s')
    return ftlab.fit(model, tok, ftlab.data(SKILL, seed=seed, n=2000), recipe(arm, rate),
                     steps=steps, batch_size=BATCH, lr=rate, seed=seed, schedule='cosine',
                     progress=False)

@torch.no_grad()
def foreseen(run, rows):
    "Share of the squared norm of the Pilot's mistakes on `rows` that the Copilot predicts"
    b = collate(encode_all(rows, run.tok, 'text', 100), run.tok.pad_token_id)
    with evaluating(run.model):
        out = run.model(**model_inputs(b), output_hidden_states=True)
    logged = examples_of(b, out.logits, thoughts(out), 0)
    silent = Copilot(run.model.config.hidden_size, len(run.tok))
    return 1 - float(rmse(run.models['copilot'], logged)/rmse(silent, logged))**2

def run(arm, rate, seed, split, steps):
    rows = WORLD.rows(SKILL, ITEMS[split], split, seed)
    if arm == 'base':
        model, tok = ftlab.load('lab-s')
    else:
        done = trained('wide' if arm == 'wide' else 'both', rate, seed, steps)
        model, tok = done.model, done.tok
    def heard(model, tok, prompts, **how):
        return answer_together(model, done.models['copilot'], tok, prompts, LAM, **how)

    def right(decode=None):
        return [judge(r, a) for r, a in zip(rows, answers(model, tok, rows, decode=decode))]

    said = dict(score=right(heard), alone=right()) if arm == 'together' else dict(score=right())
    out = {k: sum(v)/len(v) for k, v in said.items()} | dict(items=said)
    return out | (dict(foreseen=foreseen(done, rows[:200])) if arm == 'together' else {})

def derive(found):
    "The very Pilot that has the Copilot beside it, answering alone"
    return dict(alone=dict(score=found['together']['alone']))

def boxed(n, split):
    return [r | dict(response='box') for r in WORLD.rows('last', n, split)]

def stands_still():
    "The Copilot of a Pilot that learns nothing: it makes the same mistakes all the time"
    model, tok = ftlab.load('lab-s')
    return ftlab.fit(model, tok, ftlab.data(boxed(300, 'train')), lora(r=2)*copilot(LAM, lr=5e-3),
                     steps=40, batch_size=BATCH, lr=1e-7, progress=False)

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
    size = WIDE*a.cost['trainable']/8/(b.cost['trainable'] + b.cost['learners'])
    return {
        'the Pilot is trained as if alone, bit for bit': p.keys() == q.keys()
        and all(torch.equal(p[k], q[k]) for k in p),
        'a Copilot of this size foresees a Pilot that stands still': foreseen(
            stands_still(), boxed(50, 'test')) > .4,
        'lam 0 is the Pilot': answer_together(b.model, b.models['copilot'], b.tok, asked, 0., 9)
        == generate(b.model, b.tok, asked, max_new_tokens=9),
        'an untrained Copilot corrects nothing': answer_together(
            b.model, Copilot(128, len(b.tok)), b.tok, asked, LAM, 9)
        == generate(b.model, b.tok, asked, max_new_tokens=9),
        'a perfect Copilot would leave no mistake': torch.equal(
            (logits.softmax(-1) + l)[:, 1:4].argmax(-1), y[:, 2:]),
        'a mistake sums to zero, and is zero where nothing is asked': bool(
            l.sum(-1).abs().max() < 1e-5 and l[:, 0].abs().max() == 0 and l[:, 1].abs().max() > 0),
        'the wide LoRA has as many parameters, to a twentieth': abs(size - 1) < .05}
