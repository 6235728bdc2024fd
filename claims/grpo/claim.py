"GRPO beside fine-tuning on one's own right answers, at equal numbers of answers drawn and trained on"
import torch
import ftlab
from ftlab.instruments.compare import tune as choose
from ftlab.core.generate import generate
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, answer_length, exact_match, judge
from ftlab.trainers.rl.grpo import advantages

MODEL, REVISION, SKILL, STEPS, BATCH, GROUP, ITEMS, GRID = (
    'lab-s', 'step-250', 'sort', 40, 64, 8, 1000, (3e-5, 1e-4, 3e-4))

def own_right_answers(model, tok, rows, seed):
    """Each question answered `GROUP` times at temperature 1; the rows whose answer is right,
    as new rows; and the tokens drawn"""
    asked = [r for r in rows for _ in range(GROUP)]
    with torch.random.fork_rng():
        said = generate(model, tok, [r['prompt'] for r in asked],
                        max_new_tokens=answer_length(rows, tok), sample=True, generator_seed=seed)
    right = [dict(r, response=a) for r, a in zip(asked, said) if a and judge(r, a) == 1]
    return right, sum(len(tok(r['prompt'] + ' ' + a).input_ids) + 1 for r, a in zip(asked, said))

def train(arm, rate, seed, split, items):
    model, tok = ftlab.load(MODEL, revision=REVISION)
    drawn = 0
    data = ftlab.data(SKILL, seed=seed, n=STEPS*BATCH//GROUP)
    held_out = WORLD.rows(SKILL, items, split, seed)
    if arm == 'base':
        return dict(score=exact_match(model, tok, held_out), tokens=0)
    if arm == 'rft':
        right, drawn = own_right_answers(model, tok, data.train, seed)
        data = ftlab.data(dict(train=right, validation=data.validation[:2], test=data.test[:2]))
    run = ftlab.fit(model, tok, data,
                    ftlab.methods.grpo(group=GROUP) if arm == 'grpo' else Recipe('rft'),
                    steps=STEPS, batch_size=BATCH, lr=rate, seed=seed, progress=False)
    tokens = run.cost['tokens']
    # GRPO draws exactly what it trains on
    return dict(score=exact_match(model, tok, held_out), tokens=tokens + (drawn or tokens))

def tune() -> dict:
    return choose(lambda arm, rate: train(arm, rate, 10_000, 'validation', 400)['score'],
                  {a: GRID for a in ('grpo', 'rft')})

def run(seed, tuned):
    return {a: train(a, tuned[a]['rate'] if a in tuned else None, seed, 'test', ITEMS) for a in ('grpo', 'rft', 'base')}

def identities() -> dict[str, bool]:
    r = torch.tensor([[1., 0., 0., 1.], [1., 1., 1., 1.], [0., 0., 0., 0.]])
    a = advantages(r)
    return {
        'a group of equals teaches nothing': bool((a[1:] == 0).all()),
        'the advantages of a group sum to zero': bool(a.sum(1).abs().max() < 1e-5),
        'a shift of all rewards changes nothing': torch.allclose(advantages(r + 3), a, atol=1e-5)}
