"""LoRA and full fine-tuning at equal accuracy: intruders and forgetting; and what shrinking LoRA's
intruders gives back for two points of accuracy, beside shrinking its whole change"""
import copy
from functools import lru_cache
from statistics import fmean
import torch
import ftlab
from ftlab.adapters.edit import write_change
from ftlab.adapters.select import parts
from ftlab.core.model import evaluating
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, answers, exact_match, judge, nll
from ftlab.evaluators.mechanisms.intruders import count_intruders, intruders, shrink_intruders
from ftlab.lab.world import OLD

TARGET = .85 # the equal accuracy
COST = .02   # of accuracy, at which ways to shrink are compared
NEVER = 3.   # the rise of a run that does not reach the target
OLD_ROWS = dict(validation=50, test=100) # of each old skill
DOSES = (1., .9, .8, .7, .6, .5, .4, .3, .2, .1, 0.)
RECIPES = dict(full=lambda: Recipe('full', select=parts('attention', 'mlp')),
               lora=lambda: ftlab.methods.lora(r=2, alpha=4.))

class Until:
    "Every 10 steps: the accuracy; a copy of the last model below the target; a stop at it"

    def __init__(self, tok, rows):
        self.tok, self.rows, self.now, self.before = tok, rows, 0., None

    def after_step(self, state):
        if state.step % 10 and state.step != state.steps:
            return
        with evaluating(state.model):
            self.now = exact_match(state.model, self.tok, self.rows)
        state.stop = self.now >= TARGET
        if not state.stop:
            self.before = copy.deepcopy(state.model)

def trained(name, rate, seed, steps, callbacks=()):
    model, tok = ftlab.load('lab-s')
    return ftlab.fit(model, tok, ftlab.data('new-procedure', seed=seed, n=4000), RECIPES[name](),
                     steps=steps, lr=rate, seed=seed, progress=False, callbacks=callbacks)

def neighbour(W0, C):
    "The component of the tuned matrix that stands nearest to its strongest intruder and is none"
    U, S, Vh = torch.linalg.svd(W0 + C, full_matrices=False)
    on = intruders(W0, W0 + C, k=len(S))
    if not on[:10].any():
        return torch.zeros_like(C)
    first = int(on.nonzero()[0])
    i = min((~on).nonzero().flatten().tolist(), key=lambda i: (abs(i - first), i))
    return S[i]*torch.outer(U[:, i], Vh[i])

def parts_of(run):
    "LoRA's change, folded, and what each way to shrink takes out of it: {way: {matrix: part}}"
    att = run.delta.attached
    first = {n: W0.clone() for n, W0, _ in att.weights()}
    change = {n: c.clone() for n, c in att.changes().items()}
    cut = shrink_intruders(0.)(change, run.model)
    ways = dict(shrunk={n: change[n] - cut[n] for n in change}, scaled=change,
                neighbour={n: neighbour(first[n], c) for n, c in change.items()})
    att.fold()
    return first, change, ways

@lru_cache(4)
def asked(seed, split):
    "400 questions to stop by, 1,000 others to measure with"
    rows = WORLD.rows('new-procedure', 1400, split, seed)
    return rows[:400], rows[400:]

def surprise(model, tok, seed, split) -> float:
    return fmean(nll(model, tok, WORLD.rows(s, OLD_ROWS[split], split, seed)) for s in OLD)

@lru_cache(4)
def base_surprise(seed, split) -> float:
    return surprise(*ftlab.load('lab-s'), seed, split)

def at_equal_accuracy(name, rate, seed, split, steps) -> dict:
    """The rise where other questions have the target accuracy, between the last model below it and
    the first at it"""
    stop_by, others = asked(seed, split)
    tok = ftlab.load('lab-s')[1]
    until = Until(tok, stop_by)
    run = trained(name, rate, seed, steps, (until,))
    counts = count_intruders(run.delta.attached)
    out = dict(intruders=fmean(counts.values()), steps=len(run.log), final=until.now)
    # a path of one point, so that a rate at which the target is never reached is known as such
    path = lambda gain, rise: [dict(step=len(run.log), gain=gain, rise=rise)]
    if until.now < TARGET:
        return out | dict(rise=NEVER, realised=until.now, path=path(0., NEVER))
    around = until.before or ftlab.load('lab-s')[0], run.model
    low, high = (exact_match(m, tok, others) for m in around)
    w = min(1.5, max(-.5, (TARGET - low)/max(high - low, 1e-9))) # may lie just beside them
    before, after = (surprise(m, tok, seed, split) for m in around)
    rise = (1 - w)*before + w*after - base_surprise(seed, split)
    return out | dict(rise=rise, realised=(1 - w)*low + w*high, path=path(TARGET, rise))

def for_two_points(model, tok, part, first, change, known, seed, split) -> float:
    "The share of the rise that is gone where the accuracy has fallen by COST, between two doses"
    learned, rise, others, last = *known, asked(seed, split)[1], (1., 0.)
    taken = lambda: 1 - (surprise(model, tok, seed, split) - base_surprise(seed, split))/rise
    for dose in DOSES[1:]:
        put(model, first, change, part, dose)
        lost = learned - exact_match(model, tok, others)
        if lost >= COST or dose == DOSES[-1]:
            here = taken()
            put(model, first, change, part, last[0])
            w = min(1., (COST - last[1])/max(lost - last[1], 1e-9))
            return w*here + (1 - w)*(taken() if last[0] < 1 else 0.)
        last = dose, lost

def put(model, first, change, part, dose):
    write_change(model, first, {n: c - (1 - dose)*part[n] for n, c in change.items()})

def shrinking(rate, seed, split, steps) -> dict:
    "LoRA after all steps: its strongest intruders shrunk, their neighbours, or its whole change"
    run = trained('lora', rate, seed, steps)
    counts = count_intruders(run.delta.attached)
    model, tok, others = run.model, run.tok, asked(seed, split)[1]
    first, change, ways = parts_of(run)
    rise = lambda: surprise(model, tok, seed, split) - base_surprise(seed, split)
    items = [judge(r, a) for r, a in zip(others, answers(model, tok, others))]
    known = learned, _ = fmean(items), rise()
    out = dict(learned=learned, lora_rise=known[1], touched=fmean(k > 0 for k in counts.values()),
               items=dict(learned=items))
    for way in ('shrunk', 'neighbour'):
        put(model, first, change, ways[way], .7)
        out |= {f'{way}_lost': learned - exact_match(model, tok, others),
                f'{way}_less': 1 - rise()/known[1]}
    for way in ('shrunk', 'scaled'):
        out[f'{way}_taken'] = for_two_points(model, tok, ways[way], first, change, known, seed,
                                             split)
    return out | dict(ahead=out['shrunk_taken'] - out['scaled_taken'],
                      beyond=out['shrunk_less'] - out['neighbour_less'])

def run(arm, rate, seed, split, steps) -> dict:
    if arm == 'shrunk':
        return shrinking(rate, seed, split, steps)
    return at_equal_accuracy('full' if arm == 'usual' else arm, rate or 1e-3, seed, split, steps)

def identities() -> dict[str, bool]:
    g = torch.Generator().manual_seed(0)
    W = torch.randn(32, 48, generator=g, dtype=torch.float64).float()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    new = U @ torch.full((32, 1), 32**-.5)
    other = U @ torch.cat([torch.full((16, 1), 32**-.5), torch.full((16, 1), -(32**-.5))])
    one = W + 100*new @ Vh[:1]
    two = one + 60*other @ Vh[1:2]
    model = torch.nn.Linear(48, 32, bias=False)
    def left(tuned, lam, most=1):
        model.weight.data = tuned.clone()
        now = W + shrink_intruders(lam, most=most)({'weight': tuned - W}, model)['weight']
        return [float((d.T @ now).norm()/(d.T @ tuned).norm()) for d in (new, other)]
    return {
        'a matrix has no intruder beside itself': not intruders(W, W).any(),
        'restretching adds none': not intruders(W, U @ torch.diag(S.flip(0)) @ Vh).any(),
        'one strong new direction is one intruder': int(intruders(W, one).sum()) == 1,
        'a factor of 1 changes nothing': abs(left(one, 1.)[0] - 1) < 1e-5,
        'a factor of 0 takes the direction out': left(one, 0.)[0] < .05,
        'of two intruders only the stronger is shrunk': (left(two, 0.)[0] < .1
                                                         and left(two, 0.)[1] > .9),
        'or both': max(left(two, 0., None)) < .1}
