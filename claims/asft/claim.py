"""ASFT, each of its halves alone (DFT; plain fine-tuning with the KL penalty) and plain fine-tuning,
on the noisy lists of DFT's claim and on half-known facts"""
from functools import lru_cache
import torch
import ftlab
from ftlab.core.batches import collate
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD
from ftlab.core.state import State
from ftlab.core.tokens import encode
from ftlab.evaluators.probe import drift
from ftlab.instruments.claims import beside
from ftlab.trainers.objective import kl_to_base, loss_mask, nll

DFT = beside('dft')
BASES = dict(noise='step-250', facts='step-500')
ITEMS = dict(noise=1000, facts=400)
SEEN, DRIFTED = 200, 100 # questions at each evaluation on the way, and for the drift

def penalized(weight):
    "Plain fine-tuning with `weight` times KL(base || model)"
    return Recipe(objective=nll() + kl_to_base(weight))

METHODS = dict(asft=ftlab.methods.asft(),
               asft_paper=ftlab.methods.asft(weight=.05, direction='reverse'),
               dft=ftlab.methods.dft(), sft_kl=penalized(.1), full=Recipe(),
               base=None)

def asked(ground, seed, split, n):
    "Questions; of facts those about people whom the base has read about sometimes"
    skill, level = dict(noise=('reverse', None), facts=('fact', 2))[ground]
    return WORLD.rows(skill, n, split, seed, level)

@lru_cache(1)
def taught(ground, seed):
    if ground == 'noise':
        return DFT.taught('noise', seed)
    sets = dict(train=2000, validation=50, test=50)
    return ftlab.data({split: asked(ground, seed, split, n) for split, n in sets.items()})

def start(ground):
    return ftlab.load('lab-s', revision=BASES[ground])

class Path:
    "Gain and drift on the way, and at the last step"

    def __init__(self, measure, steps, looks):
        self.measure, self.steps, self.every, self.rows = measure, steps, max(1, steps//looks), []

    def after_step(self, state):
        if state.step % self.every == 0 or state.step == self.steps:
            self.rows.append(dict(step=state.step, **self.measure(state.model)))

def run(arm, rate, seed, split, steps):
    name = arm.removesuffix('_facts')
    ground = 'noise' if name == arm else 'facts'
    (base, tok), (model, _) = start(ground), start(ground)
    rows = asked(ground, seed, split, ITEMS[ground])
    few = collate([encode(r, tok, 'text') for r in rows[:DRIFTED]], tok.pad_token_id)
    known = sum(DFT.right(base, tok, rows[:SEEN]))/SEEN

    def measure(model):
        found = DFT.right(model, tok, rows[:SEEN])
        with torch.no_grad():
            far = drift(base, model, few)
        return dict(gain=sum(found)/SEEN - known, kl=far, items=dict(gain=found))

    # the drift at equal gain is asked on lists alone
    path = Path(measure, steps, dict(noise=4, facts=1)[ground])
    if METHODS[name] is not None:
        DFT.fit(model, tok, taught(ground, seed), METHODS[name], rate, seed, steps, (path,))
    found = DFT.right(model, tok, rows)
    end = path.rows[-1] if path.rows else measure(model)
    return dict(score=sum(found)/len(found), gain=end['gain'], kl=end['kl'], path=path.rows,
                items=dict(score=found))

def identities() -> dict[str, bool]:
    (model, tok), other = ftlab.load('lab-s'), ftlab.load('lab-s', revision='step-2200')[0]
    s = State(model, tok)
    s.batch = collate([encode(r, tok, 'text') for r in ftlab.data('sort', n=8).train],
                      tok.pad_token_id)
    s.count = int(loss_mask(s.batch['labels']).sum())

    def gradient(recipe, base):
        s.models['reference'] = base
        return torch.autograd.grad(recipe.objective(s), model.lm_head.weight)[0]

    dft, asft, reverse = (ftlab.methods.get(n) for n in
                          ('dft', 'asft', "asft(direction='reverse')"))
    plain = gradient(dft, model)
    return {
        'at the base it is DFT': torch.allclose(gradient(asft, model), plain, atol=1e-6),
        'away from the base it is not': not torch.allclose(gradient(asft, other), plain, atol=1e-6),
        'with weight 0 it is DFT everywhere': torch.equal(
            gradient(ftlab.methods.asft(weight=0.), other), plain),
        'the two directions differ away from the base': not torch.allclose(
            gradient(reverse, other), gradient(asft, other), atol=1e-6)}
