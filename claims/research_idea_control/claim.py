"""lab-s learns to write made-up ideas; steering matrices learn three rewards of them from the same rows. How
does each dial move its reward, and is a strength for each sentence better than one for the whole text?"""
import itertools
from functools import lru_cache
import torch
from scipy.stats import spearmanr
import ftlab
from ftlab.core.data import Data
from ftlab.core.model import evaluating
from ftlab.methods import full, research_idea_control
from ftlab.trainers.rl.research_idea_control import (Field, Schedule, constant, folded_head,
                                                     learn_schedule, steer_of, steered, write)

ROWS, TUNED, RATE = 1920, 60, 3e-3       # one pass over the known ideas
DIAL = (-1., -.5, 0., .5, 1.)            # the range of the strengths in training
FAR = (2., 3.)                           # further than in training: a weak dial may be turned up
GRID = (0., 1., 2., 3.)                  # of the fixed weights, in each dimension
# texts by split: at each strength; at all fixed weights, then at the best; in a round of learning; at the end
ITEMS = dict(validation=(40, 4, 24, 32, 60), test=(60, 12, 96, 128, 200))
BEST, ROUNDS = 4, 6                      # of the grid in the second look; of the schedule, and of learned fixed weights
STEPS = 60                               # of the matrices and vectors
BATCH = 500                              # texts at once
LONGEST = 28                             # an idea has 24 tokens
FORMS = dict(steer='matrix', bias='vector')

@lru_cache(12)
def writer(seed):
    "The field, its known ideas, and lab-s after it has learned to write such"
    known = Field(seed)
    rows = known.rows(ROWS)
    model, tok = ftlab.load('lab-s')
    run = ftlab.fit(model, tok, data(rows), full(), steps=TUNED, lr=RATE, seed=seed, progress=False)
    return known, rows, {n: p.detach().clone() for n, p in run.model.state_dict().items()}

def data(rows):
    return Data(train=rows, validation=rows[:2], test=rows[:2], kind='text', name='ideas')

def each_row(e):
    "A pace that never changes, [rows, dims]: the memory keeps each row's strengths"
    def pace(seen, memory):
        now = e if memory is None else memory
        return now, now
    return pace

def smooth(grid, total):
    "A quadratic in the weights, fitted to noisy sums: [weights]"
    x = torch.tensor(grid)
    pairs = [x[:, i]*x[:, j] for i in range(3) for j in range(i, 3)]
    features = torch.stack([torch.ones(len(x)), *x.T, *pairs], 1)
    return features @ torch.linalg.lstsq(features, total[:, None]).solution[:, 0]

class Level(torch.nn.Module):
    "Strengths that are the same in every sentence, for `learn_schedule`: what a schedule is without reading"
    limit = 4. # as in `Schedule`

    def __init__(self, start):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.atanh(torch.tensor(start)/self.limit))

    def forward(self, seen, memory=None):
        return self.strengths.expand(len(seen), -1), None

    @property
    def strengths(self):
        return self.limit*torch.tanh(self.bias)

class Study:
    "A steered writer and how its texts are scored"

    def __init__(self, arm, rate, seed, split):
        self.field, rows, weights = writer(seed)
        self.model, self.tok = ftlab.load('lab-s')
        self.model.load_state_dict(weights)
        recipe = research_idea_control(self.field.rewards, form=FORMS[arm])
        ftlab.fit(self.model, self.tok, data(rows), recipe, steps=STEPS, lr=rate, seed=seed,
                  progress=False)
        self.seed, self.split, self.items = seed, split, ITEMS[split]
        self.draw = 100*seed # no two looks, and no two seeds, share their random numbers
        self.known = self.field.rows(400, 'schedule') # prompts on which weights and schedule are chosen

    def scores(self, pace, rows, seed):
        "The three rewards and whether it is an idea, of each text: [rows, 4]"
        got = write(self.model, self.tok, [r['prompt'] for r in rows], pace, max_new_tokens=LONGEST,
                    seed=seed)
        return torch.tensor([
            [*(f(r, a) for f in self.field.rewards), float(bool(self.field.read(a)))]
            for r, a in zip(rows, got.texts)])

    def at_each(self, strengths, rows, seed):
        "The means of `scores` over the same rows at several strengths, in one batch: [strengths, 4]"
        n = len(rows)
        e = torch.tensor(strengths, dtype=torch.float32).repeat_interleave(n, 0)
        size = n*max(1, BATCH//n)
        found = [self.scores(each_row(part), rows*(len(part)//n), seed + i)
                 for i, part in enumerate(e.split(size))]
        return torch.cat(found).view(len(strengths), n, 4).mean(1)

    def dials(self):
        "Each reward over the strengths of its own matrix"
        rows = self.field.rows(self.items[0], self.split)
        zero, one, strengths = DIAL.index(0.), DIAL.index(1.), DIAL + FAR
        found = torch.zeros(3, len(strengths), 4)
        at = lambda e: self.scores(constant(e), rows, self.draw).mean(0) # the same draws at every strength
        found[:, zero] = at((0., 0., 0.))
        for d, (i, s) in itertools.product(range(3), enumerate(strengths)):
            if s:
                found[d, i] = at([s*(d == k) for k in range(3)])
        own = torch.stack([found[d, :, d] for d in range(3)])
        rank = [float(spearmanr(DIAL, y).statistic) if len(set(y.tolist())) > 1 else 0.
                for y in own[:, :len(DIAL)]]
        lift, reach = own[:, one] - own[:, zero], own[:, one:].max(1).values - own[:, zero]
        told = lambda x: [round(float(v), 3) for v in x]
        return dict(spearman=min(rank), lift=float(lift.mean()), reach=float(reach.mean()),
                    least_reach=float(reach.min()), valid=float(found[:, :len(DIAL), 3].min()),
                    curves=[told(y) for y in own], lifts=told(lift), reaches=told(reach))

    def first_look(self):
        "The best weights of a grid, best first, by a quadratic fitted to few texts of each"
        grid = list(itertools.product(GRID, repeat=3))
        total = self.at_each(grid, self.known[:self.items[1]], self.draw + 10)[:, :3].sum(1)
        return [grid[i] for i in smooth(grid, total).topk(BEST).indices]

    def fixed(self, near):
        "The best fixed weights by a second look: those of the first one, and learned ones"
        tried = [*near, tuple(self.learned(Level(near[0])).strengths.tolist())]
        again = self.at_each(tried, self.known[:self.items[2]], self.draw + 20)[:, :3].sum(1)
        return tried[int(again.argmax())], tried[-1]

    def schedule(self, start):
        "A schedule that begins at the weights which the first look found best"
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            made = Schedule(self.model.config.hidden_size, start)
        return self.learned(made)

    def learned(self, made):
        "A schedule or a level after learning from its own texts; both from the same number"
        learn_schedule(made, self.model, self.tok, self.known, self.total, rounds=ROUNDS,
                       draws=self.items[3], seed=self.draw + 40, max_new_tokens=LONGEST)
        return made

    def total(self, row, answer):
        return sum(f(row, answer) for f in self.field.rewards)

def run(arm, rate, seed, split, steps):
    study = Study(arm, rate, seed, split)
    found = study.dials()
    if arm == 'bias':
        return found
    near = study.first_look()
    best, level = study.fixed(near)
    rows = study.field.rows(ITEMS[split][4], f'{split}/last')
    paces = dict(schedule=study.schedule(near[0]), fixed=constant(best),
                 zero=constant((0., 0., 0.)))
    means = {n: study.scores(p, rows, study.draw + 90).mean(0) for n, p in paces.items()}
    totals = {n: float(m[:3].sum()) for n, m in means.items()}
    each = {f'{n}_rewards': [round(float(v), 3) for v in m] for n, m in means.items()}
    wins = sum(float(s > f) for s, f in zip(means['schedule'][:3], means['fixed'][:3]))
    sums = {f'{n}_total': t for n, t in totals.items() if n != 'schedule'}
    return found | each | sums | dict(
        total=totals['schedule'], wins=wins, weights=list(best), level=list(level),
        fixed_gain=totals['fixed'] - totals['zero'])

def derive(found):
    "The best fixed weights and the writer without steering, from the same run"
    of = found.get('steer')
    return {n: dict(total=of[f'{n}_total']) for n in ('fixed', 'zero')} if of else {}

@torch.no_grad()
def identities():
    model, tok = ftlab.load('lab-s')
    rows = Field(0).rows(32)
    batch = torch.tensor([tok(rows[0]['prompt']).input_ids])
    base = model(batch).logits
    recipe = research_idea_control(at=(1., -1.))
    with torch.enable_grad():
        ftlab.fit(model, tok, data(rows), recipe, steps=2, lr=1e-2, seed=0, batch_size=8,
                  progress=False)
    with evaluating(model):
        with steered(model, [0., 0.]):
            off = model(batch).logits
        on = model(batch).logits
        states = []
        hook = steer_of(model).register_forward_pre_hook(lambda m, args: states.append(args[0]))
        model(batch)
        hook.remove()
        folded = states[0] @ folded_head(model, [1., -1.]).T
    return {'at strengths 0 it is the base, bit for bit': torch.equal(off, base),
            'a head with the matrices folded in gives the same logits': torch.allclose(
                folded, on, atol=1e-4) and not torch.allclose(on, base, atol=1e-4),
            'known ideas are ideas': all(len(Field(0).read(r['response'])) == 4 for r in rows)}
