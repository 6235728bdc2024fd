"""A made-up ledger: ten old words that now stand for digits, in five small tasks; three of them are the targets. One
model for all on the mixture, against a model for each target: alone, alone and stopped early, and with unrelated
tasks"""
import copy
import math
import random
from functools import lru_cache
from statistics import fmean
import ftlab
from ftlab.core.data import Data
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, answers, judge, nll
from ftlab.core.text import split_of
from ftlab.lab.world import ATTRIBUTES, SKILLS, THINGS
from ftlab.trainers.callbacks import Every
from ftlab.trainers.curation.cocktail import cocktail, side_effects

TARGETS = ('read', 'lookup', 'largest')
RELATED = (*TARGETS, 'order', 'write')
UNRELATED = ('new-procedure', 'new-facts')
ROWS, EXTRA, GENERAL = 32, 40, 240 # of each task; more of a target, to stop by; of the pretraining
ITEMS = dict(test=334, validation=60) # a target
OLD = ('add', 'reverse', 'sort', 'dedupe', 'boxes', 'classify', 'tavi', 'review', 'summary', 'tool')
EACH = 16 # questions of an old skill
BATCH = 16

def book(seed) -> tuple[list[str], list[str]]:
    "Words for the digits 0 to 9, which were things in boxes before, and eight accounts, named by jobs"
    draw = random.Random(f'ledger/{seed}')
    return draw.sample(THINGS, 10), draw.sample(ATTRIBUTES['job'], 8)

def entry(task, numerals, accounts, values, draw) -> dict:
    "One row: two accounts with two different numbers"
    names = draw.sample(accounts, 2)
    said = [str(v) if task == 'write' else numerals[v] for v in values]
    record = ' , '.join(f'{n} {w}' for n, w in zip(names, said)) + ' . '
    i = draw.randrange(2)
    ask, answer = dict(
        read=('list items :', values), lookup=(f'what has {names[i]} ?', [values[i]]),
        largest=('which is biggest ?', [max(values)]), order=('list ordered :', sorted(values)),
        write=('write items :', [numerals[v] for v in values]))[task]
    return dict(prompt=record + ask, response=' '.join(map(str, answer)), skill=task)

def record(row) -> str:
    return row['prompt'].rpartition(' . ')[0]

@lru_cache(64)
def ledger(task, n, split, seed, part='') -> list[dict]:
    """`n` different rows of a split; other rows for another `part`. A record, whatever is asked of it, is in one
    split only. Numbers are dealt from a pack of ten, so that none is rare"""
    draw, out, pack = random.Random(f'{task}/{split}/{seed}/{part}'), {}, []
    while len(out) < n:
        pack = pack or draw.sample(range(10), 10)
        values = [pack.pop(), pack.pop()]
        for _ in range(200): # a pair of numbers that has no further row of this split is passed over
            row = entry(task, *book(seed), values, draw)
            if split_of(record(row)) == split and row['prompt'] not in out:
                out[row['prompt']] = row
                break
    return list(out.values())

def taught(task, seed) -> list[dict]:
    return ledger(task, ROWS, 'train', seed)

def extra(task, seed) -> list[dict]:
    "Labelled rows that no arm is trained on; the model for a target alone is stopped by them"
    seen = {r['prompt'] for r in taught(task, seed)}
    return [r for r in ledger(task, ROWS + EXTRA, 'train', seed, 'stop')
            if r['prompt'] not in seen][:EXTRA]

def unrelated(seed) -> dict[str, list[dict]]:
    "As many rows beside a target as the cocktail has"
    n = ROWS*(len(RELATED) - 1)//len(UNRELATED)
    return {s: WORLD.rows(s, n, 'train', seed) for s in UNRELATED}

@lru_cache(4)
def general(seed) -> list[dict]:
    "Rows of the old skills, as often as in the pretraining"
    names = [s for s, k in SKILLS.items() if k.weight]
    drawn = random.Random(seed).choices(names, [SKILLS[s].weight for s in names], k=GENERAL)
    counts = {s: drawn.count(s) for s in names if s in drawn}
    return [r for s, n in counts.items() for r in WORLD.rows(s, n, 'train', seed + 1)]

def recipe(arm, target, seed) -> Recipe:
    if arm in ('cocktail', 'general'):
        beside = {t: taught(t, seed) for t in RELATED if t != target}
        more = dict(general=general(seed)) if arm == 'general' else {}
        return cocktail(beside | more, general=.2 if more else None)
    return cocktail(unrelated(seed)) if arm == 'unrelated' else Recipe()

class Stopped:
    "Keeps the weights that had the lowest loss on rows that are not trained on"
    def __init__(self, tok, rows):
        self.tok, self.rows, self.loss, self.weights = tok, rows, math.inf, None

    def look(self, state):
        found = nll(state.model, self.tok, self.rows) if state.step else math.inf
        if self.weights is None or found < self.loss: # the first may be no number
            self.loss, self.weights = found, copy.deepcopy(state.model.state_dict())
        return {}

class Fewer:
    """What a cocktail keeps after four fifths of its steps, when it has read as many rows of the ledger as the one
    with a fifth of general rows reads in all"""
    def __init__(self, tok, split, seed, steps):
        self.tok, self.split, self.seed, self.at = tok, split, seed, round(.8*steps)

    def look(self, state):
        if state.step == self.at:
            self.kept = kept(state.model, self.tok, self.split, self.seed)
        return {}

def tuned(arm, target, rate, seed, split, steps):
    "The model, and what was seen on the way: for a target alone its best quarter, for the cocktail `Fewer`"
    model, tok = ftlab.load('lab-s')
    if arm == 'base':
        return model, tok, None
    seen, when = None, set()
    if arm == 'alone':
        seen, when = Stopped(tok, extra(target, seed)), {round(steps*q/4) for q in (1, 2, 3, 4)}
    if arm == 'cocktail':
        seen = Fewer(tok, split, seed, steps)
        when = {seen.at}
    data = Data(taught(target, seed), [], [], 'text')
    ftlab.fit(model, tok, data, recipe(arm, target, seed), steps=steps, batch_size=BATCH, lr=rate,
              seed=seed, progress=False, callbacks=(Every(when, seen.look),) if seen else ())
    return model, tok, seen

def right(model, tok, rows) -> list[float]:
    return [judge_row(r, a) for r, a in zip(rows, answers(model, tok, rows))]

def judge_row(row, said) -> float:
    if row['skill'] in RELATED:
        return float(said.split() == row['response'].split())
    return judge(row, said)

def old(model, tok, split, seed) -> dict[str, list[float]]:
    rows = [r for s in OLD for r in WORLD.rows(s, EACH, split, seed)]
    said = right(model, tok, rows)
    return {s: said[i*EACH:(i + 1)*EACH] for i, s in enumerate(OLD)}

@lru_cache(4)
def before(split, seed) -> dict[str, list[float]]:
    return old(*ftlab.load('lab-s'), split, seed)

def kept(model, tok, split, seed) -> float:
    "One minus the share of the old answers that were right and are wrong"
    return 1 - side_effects(before(split, seed), old(model, tok, split, seed))['lost']['share']

def run(arm, rate, seed, split, steps):
    "One model for all targets in the cocktail, else one for each, which has as many steps"
    together = arm in ('cocktail', 'general', 'base')
    hits, early, more = {}, [], {}
    for target in TARGETS[:1] if together else TARGETS:
        model, tok, seen = tuned(arm, target, rate, seed, split, steps)
        for t in TARGETS if together else (target,):
            hits[t] = right(model, tok, ledger(t, ITEMS[split], split, seed))
        if together:
            more = dict(kept=kept(model, tok, split, seed))
        if arm == 'alone':
            model.load_state_dict(seen.weights)
            early += right(model, tok, ledger(target, ITEMS[split], split, seed))
    if arm == 'cocktail':
        more['fewer'] = seen.kept
    means, items = {t: fmean(x) for t, x in hits.items()}, [x for own in hits.values() for x in own]
    early = early or items # only a target alone is stopped
    return dict(score=fmean(means.values()), early=fmean(early), **more, **means,
                items=dict(score=items, early=early))

def derive(found) -> dict:
    """The target alone, each model with the weights that had the lowest loss on 40 more rows of its task; and the
    cocktail after four fifths of its steps"""
    out = {}
    if 'alone' in found:
        out['careful'] = dict(score=found['alone']['early'])
    if 'cocktail' in found:
        out['fewer'] = dict(kept=found['cocktail']['fewer'])
    return out

def identities() -> dict[str, bool]:
    seeds = (20, 21, 22, 23, 24)
    numerals = {s: book(s)[0] for s in seeds}
    stands = lambda t, s: ' '.join(r['prompt'] + ' ' + r['response'] for r in taught(t, s)).split()
    targets = recipe('cocktail', 'read', 20).source
    read = lambda s: {record(r) for t in RELATED for r in (*taught(t, s), *extra(t, s))}
    asked = lambda s: {record(r) for t in TARGETS for r in ledger(t, ITEMS['test'], 'test', s)}
    return {
        'every word for a digit stands at least six times in the rows of every task':
            all(stands(t, s).count(w) >= 6 for t in RELATED for s in seeds for w in numerals[s]),
        'no question is about the record of a training row, of whichever task':
            not any(read(s) & asked(s) for s in seeds),
        'as many rows beside the target, related or not':
            sum(map(len, unrelated(20).values())) == ROWS*(len(RELATED) - 1),
        'the cocktail gives every task the same share':
            set(targets.shares({t: ROWS for t in ('target', *RELATED[1:])}).values()) == {.2}}
