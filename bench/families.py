"""A family of papers on its frontier: every method that can be asked the same, tuned alike, on the same data.

    python bench/families.py subsets            # all parts: skills, budgets, minilm
    python bench/families.py subsets skills     # 1% of the parameters, on four lab skills
    python bench/families.py losses             # all parts: clean, noisy, mixed

Parameters: `full`, `lora` of the rank nearest the budget, and every paper of the family whose method takes
`budget=`; 0.5% and 5% on one skill; MiniLM on BANKING77, where FTLAB_DATA has it. Losses: `full` and every paper
that learns from the same rows as they are, with part of the answers replaced, and from two skills of unequal size;
what each does to calibration is measured on test questions. What a method cannot do is left out with the reason.

How long a part takes is estimated from two timed runs and printed before it begins. Finished runs are kept in
`ftlab-runs`, so the same call goes on. bench/results/family_<family>.json is written after each setting.
`--only full,lora,smt --settings new-procedure --runs 4 --seeds 1 --steps 40 --to DIR`
makes a small comparison elsewhere; `--jobs 2` makes two runs at a time, with the same results."""
import argparse
import inspect
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import torch

import ftlab
from banking77 import banking
from ftlab import methods
from ftlab.commands.memory import training_bytes
from ftlab.core.batches import collate
from ftlab.core.data import Data
from ftlab.core.io import write_atomically
from ftlab.core.loading import minilm_folder
from ftlab.core.model import model_inputs, pad_id
from ftlab.core.recipe import Recipe
from ftlab.core.record import digest, versions
from ftlab.core.scorers import answer_scores
from ftlab.core.tokens import encode_all
from ftlab.evaluators.calibration import calibration, confidence
from ftlab.instruments.bench import Bench
from ftlab.instruments.families import FAMILIES
from ftlab.instruments.frontier import AT_LEAST, SHARE, best_gain
from ftlab.instruments.real import data_folder
from ftlab.instruments.runs import run_key
from ftlab.papers import catalogue

# A rule to carry out, a form of answer and a language, with steps in which full fine-tuning learns each
# (bench/results/lab_v1_teach_lab-s.json; tuning seeds). A share of 1% learned nothing of the language, so there is a
# changed rule as well, which full fine-tuning learns at once. New facts take 350 steps.
SKILLS = {'new-procedure': 100, 'new-format': 60, 'changed-rule': 60, 'new-language': 200}
PROCEDURE, FORMAT = 'new-procedure', 'new-format'
BUDGET, BUDGETS = .01, (.005, .05)
NOISE = .3            # the share of answers that are another row's
UNEQUAL = (.9, .1)    # of the training rows, by skill
ROWS = 3200           # of the losses: 100 steps of 32, each row once
SEEDS = 2
# at most: four rates and one more at an edge; two of them on a second tuning seed, and one more if a rate is
# overlooked; two points on each of two test seeds
LAB_RUNS = 12
LAB = dict(steps=100, batch_size=32, evaluations=4, items=200, old_items=24,
           validation_items=100, old_validation_items=8)
# three rates, without a second tuning seed
MINILM_RUNS = 7
MINILM = dict(steps=100, batch_size=32, evaluations=2, items=1000, validation_items=300,
              max_length=64)
TUNING = 10_000
PROBE = 6             # steps by which a method's cost is measured
# arguments where the default means nothing here: in 100 steps the slices would never move, a row's task is its
# skill, and a language is compared with two that lab-s knows
ASKED = dict(slicefine='every=25', mftcoder="'skill'", lape="others=('tavi', 'oruk')")
# a word in the names of the only settings that a method is made for, and why it is left out of the others
ONLY = dict(lape=('new-language', 'it trains the neurons of one language, and only new-language teaches one'))
# raised by `compare` for what a method cannot be asked; a full disk or a busy folder is nothing of a method's
INPUT = (ValueError, TypeError, KeyError)


@dataclass(frozen=True)
class Setting:
    "One comparison: what is learned by which model, within which budget"
    part: str
    name: str                            # in the result file
    data: Callable                       # () -> what `ftlab.data` takes
    how: Mapping = field(default_factory=lambda: LAB)
    budget: float | None = None          # a share of the model's parameters
    model: Callable = lambda: 'lab-s'
    called: str = 'lab-s'                # the model, in the result file
    runs: int = LAB_RUNS                 # of each method, at most


def with_noise(n: int = ROWS) -> Data:
    "The procedure, with `NOISE` of the training answers exchanged for another row's"
    d, rng = ftlab.data(PROCEDURE, n=n), random.Random('noise')
    said = [r['response'] for r in d.train]

    def spoiled(row):
        if rng.random() >= NOISE:
            return row
        others = [a for a in rng.sample(said, 8) if a != row['response']]
        return dict(row, response=others[0])

    return replace(d, train=[spoiled(r) for r in d.train], name=f'{PROCEDURE}, {NOISE:.0%} of the answers wrong')


def clean(n: int = ROWS) -> Data:
    "The same rows with their own answers; under another name, so that no seed draws other rows"
    return replace(ftlab.data(PROCEDURE, n=n), name=f'{PROCEDURE}, clean')


def unequal(n: int = ROWS) -> Data:
    "Two skills, many rows of one and few of the other; half of the questions are about each"
    a, b = ftlab.data(PROCEDURE, n=n), ftlab.data(FORMAT, n=n)
    rows = a.train[:round(UNEQUAL[0]*n)] + b.train[:round(UNEQUAL[1]*n)]
    random.Random('unequal').shuffle(rows)
    both = {s: [r for pair in zip(getattr(a, s), getattr(b, s)) for r in pair]
            for s in ('validation', 'test')}
    return Data(rows, **both, kind='text', name=f'{UNEQUAL[0]:.0%} {PROCEDURE}, {UNEQUAL[1]:.0%} {FORMAT}')


def settings(family: str) -> list[Setting]:
    "The comparisons of a family, by part"
    if family == 'losses':
        return [Setting(name, name, make)
                for name, make in (('clean', clean), ('noisy', with_noise), ('mixed', unequal))]
    skill = [Setting('skills', f'{s}, {100*BUDGET:g}%', lambda s=s: s, dict(LAB, steps=n), BUDGET)
             for s, n in SKILLS.items()]
    share = [Setting('budgets', f'{PROCEDURE}, {100*b:g}%', lambda: PROCEDURE, budget=b)
             for b in BUDGETS]
    real = Setting('minilm', f'BANKING77, {100*BUDGET:g}%', lambda: banking(data_folder()/'banking77'),
                   MINILM, BUDGET, lambda: str(minilm_folder()), 'MiniLM', MINILM_RUNS)
    return [*skill, *share, real]


# ---------- who takes part

def nearest_rank(model, budget: float, labels: bool = False) -> int:
    "The rank with which LoRA trains a number of parameters nearest the budget, at least 1; `labels`: of a classifier"
    one, two = (training_bytes(model, methods.lora(r=r), labels)['trainable'] for r in (1, 2))
    room = budget*sum(p.numel() for p in model.parameters()) - (2*one - two) # a classifier's head trains as well
    return max(1, round(room/(two - one)))


def asked(key: str, setting: Setting) -> str:
    """How a paper's method is asked in a setting, as text.
    Raises `LookupError` with the reason if there is nothing to ask"""
    if key not in methods.paper_modules():
        raise LookupError('not built here yet')
    if key not in methods.names():
        raise LookupError('a probe or a study: it has no method to train by')
    word, why = ONLY.get(key, ('', ''))
    if word not in setting.name:
        raise LookupError(why)
    given = [ASKED[key]] if key in ASKED else []
    if setting.budget:
        if 'budget' not in inspect.signature(methods.make_of(key)).parameters:
            raise LookupError('its method takes no budget=: how much it trains follows from its own arguments')
        given.insert(0, f'budget={setting.budget:g}')
    return f'{key}({", ".join(given)})' if given else key


def arms_of(family: str, setting: Setting, bench: Bench) -> tuple[dict[str, str], dict[str, str]]:
    "What is compared, {name: text}, and what is left out, {key: reason}; together all papers of the family"
    arms, out = dict(full='full'), {}
    if setting.budget:
        rank = nearest_rank(bench.base(TUNING)[0], setting.budget, bool(bench.given.labels))
        arms['lora'] = f'lora(r={rank})'
    for key, row in sorted(catalogue().items()):
        if row['family'] == family:
            try:
                arms[key] = asked(key, setting)
            except LookupError as e:
                out[key] = e.args[0]
    return arms, out


# ---------- what a method costs

class Meter:
    "Note the CPU time after each step, and the bytes of the optimizer's state"
    def __init__(self):
        self.at, self.bytes = [], None

    def after_step(self, state):
        self.at.append(time.process_time())
        if state.optimizer is not None:
            kept = [t for of in state.optimizer.state.values() for t in of.values()]
            size = sum(t.nbytes for t in kept if isinstance(t, torch.Tensor))
            self.bytes = max(self.bytes or 0, size)

    def seconds(self) -> float:
        "CPU-seconds of a step, the median"
        return statistics.median(b - a for a, b in zip(self.at, self.at[1:]))


def probed(bench: Bench, recipe: Recipe, lr: float | None = None) -> tuple[dict, list[float]]:
    "What a few steps cost, and the loss of each"
    model, tok = bench.base(TUNING)
    meter = Meter()
    run = ftlab.fit(model, tok, bench.data(TUNING), recipe, steps=PROBE*len(recipe.turns), lr=lr,
                    seed=TUNING, max_length=bench.max_length, callbacks=(meter,), progress=False,
                    **bench.settings)
    cost = dict(trainable=run.cost['trainable'], share=round(run.cost['trainable']/bench.size, 6),
                optimizer_bytes=meter.bytes, saved_bytes=run.delta.nbytes,
                cpu_seconds_per_step=round(meter.seconds(), 4))
    return cost, [row['loss'] for row in run.log]


def able(bench: Bench, arms: Mapping[str, str], same_rows: bool = False, # every method must learn from the given rows
         ) -> tuple[dict[str, Recipe], dict[str, dict], dict[str, str]]:
    "Try each method for a few steps: those that work, what they cost, and why the others do not"
    recipes, costs, out, plain = {}, {}, {}, None
    for name, text in arms.items():
        try:
            recipe = methods.get(text).named(name)
            if same_rows and any(getattr(t, 'own_source', False) for t in recipe.turns):
                raise LookupError('draws rows of its own, not those that the others learn from')
            cost, losses = probed(bench, recipe, 3e-4 if same_rows else None)
            if name == 'full':
                plain = losses
            elif same_rows and plain and alike(losses, plain):
                raise LookupError('on these rows it is plain fine-tuning: the same loss at every step')
            recipes[name], costs[name] = recipe, dict(asked=text, **cost)
        except Exception as e: # one that breaks must not end the others
            out[name] = reason(e)
    return recipes, costs, out


def alike(a: list[float], b: list[float]) -> bool:
    "Are the losses of two runs the same, up to rounding?"
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-4) for x, y in zip(a, b))


def reason(e: Exception) -> str:
    "An error as one line"
    said = ' '.join(str(e.args[0] if e.args else e).split())
    return said if type(e) is LookupError else f'{type(e).__name__}: {said}'


# ---------- the comparison

def workers(jobs: int):
    "Give an executor of so many processes inside a `with` block; `None`, for this process, if it is one"
    if jobs == 1:
        return nullcontext()
    # a forked process would inherit torch's threads in an unknown state
    return ProcessPoolExecutor(jobs, mp_context=get_context('spawn'))


def together(recipes: Mapping[str, Recipe], setting: Setting, folder: Path, seeds: int, jobs: int = 1,
             ) -> tuple[dict, dict[str, str]]:
    """Compare; where a method raises, leave it out with the reason and compare the others.
    Finished runs are read again from the folder"""
    def compare(some):
        with workers(jobs) as pool:
            return ftlab.compare(list(some.values()), setting.model(), setting.data(), seeds=seeds,
                                 max_runs=setting.runs*len(some), out=folder,
                                 executor=pool and pool.map, **setting.how).json()
    try:
        return compare(recipes), {}
    except INPUT:
        broken = {}
        for name, recipe in recipes.items():
            try:
                compare({name: recipe})
            except INPUT as e:
                broken[name] = reason(e)
        if len(broken) in (0, len(recipes)):
            raise
        found, more = together({n: r for n, r in recipes.items() if n not in broken}, setting,
                               folder, seeds, jobs)
        return found, broken | more


def reaching(found: dict) -> list[str]:
    "The methods with a gain in common: 95% of each one's best is at least half of the best of all"
    best = {m['name']: best_gain(m['frontier']) for m in found['methods']}
    return [n for n, gain in best.items() if SHARE*gain >= AT_LEAST*max(best.values()) > 0]


def rows_of(found: dict, costs: dict) -> dict[str, dict]:
    """Each method's row in the result file; values in lists are one a seed. `overlooked` are rates that would be
    chosen if they had run on both tuning seeds, by metric"""
    rows = {}
    for m in found['methods']:
        tuned = found['tuning']['methods'][m['name']]
        of, none = lambda k: [s[k] for s in m['seeds']], [None]*len(m['seeds'])
        rows[m['name']] = dict(
            costs[m['name']], rate=m['rate'], tried=tuned['tried'], overlooked=tuned['overlooked'],
            gain=of('gain'), forgetting=of('forgetting'), rate_matched=None, gain_matched=none,
            forgetting_matched=none, errors=[e for e in of('error') if e], frontier=m['frontier'])
    return rows


def result_of(recipes: dict, costs: dict, setting: Setting, folder: Path, seeds: int, jobs: int = 1,
              ) -> tuple[dict, dict]:
    "A setting's part of the result file, and what had to be left out"
    found, out = together(recipes, setting, folder, seeds, jobs)
    near, equal = reaching(found), found
    if not found['common'] and 1 < len(near) < len(found['methods']):
        equal = together({n: recipes[n] for n in near}, setting, folder, seeds, jobs)[0]
    rows = rows_of(found, costs)
    if equal['common']: # it may have run more rates twice, so it knows better
        matched = ('gain_matched', 'forgetting_matched')
        rows |= rows_of(equal, costs)
        for m in equal['methods']:
            rows[m['name']] |= dict(rate_matched=m['rate_matched']) | {
                k: [s[k] for s in m['seeds']] for k in matched}
    how = found['protocol']
    return dict(part=setting.part, data=found['data'], model=setting.called,
                budget=setting.budget,
                settings=dict(setting.how, runs=setting.runs, search=how['search']),
                seeds=how['seeds'], redrawn=how['redrawn'], forgetting=how['forgetting'],
                metric=how['metric'], parameters=how['parameters'],
                target=equal['target'] if equal['common'] else None, methods=rows,
                cpu_seconds=round(found['runs']['cpu_seconds']), versions=versions()), out


# ---------- calibration

@torch.no_grad()
def calibrated(model, tok, rows: list[dict]) -> dict:
    "Calibration over the tokens of the right answers, and the share of right answers by skill"
    enc, seen = encode_all(rows, tok, 'text'), []
    for i in range(0, len(enc), 50):
        b = collate(enc[i:i + 50], pad_id(tok))
        seen.append(confidence(model(**model_inputs(b)).logits, b['labels']))
    sure, right = (torch.cat(x) for x in zip(*seen))
    found = {k: v for k, v in calibration(sure, right).items() if k != 'bins'}
    scores = answer_scores(model, tok, rows)
    by = {}
    for x, r in zip(scores, rows):
        by.setdefault(r['skill'], []).append(x)
    return found | dict(answers={s: statistics.fmean(x) for s, x in sorted(by.items())})


def calibrate(bench: Bench, recipes: dict, result: dict, folder: Path) -> None:
    "Add to each method what becomes of calibration at its rate of the best gain, one value a seed; and the base's"
    def once(name, recipe, rate, seed):
        key = dict(run_key(bench, recipe, rate, seed, 'test', bench.steps), what='calibration')
        file = folder/'calibration'/f'{digest(json.loads(json.dumps(key, default=str)))}.json'
        if not file.exists():
            model, tok = bench.base(seed)
            if name != 'base':
                ftlab.fit(model, tok, bench.data(seed), recipe, steps=bench.steps, lr=rate,
                          seed=seed, progress=False, **bench.settings)
            found = calibrated(model.eval(), tok, bench.questions(seed, 'test'))
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, lambda p: p.write_text(json.dumps(found)))
        return json.loads(file.read_text())
    seeds = result['seeds']
    result['base'] = dict(calibration=[once('base', Recipe('base'), None, s) for s in seeds])
    for name, m in result['methods'].items():
        if not m['errors']:
            m['calibration'] = [once(name, recipes[name], m['rate'], s) for s in seeds]


# ---------- how long it takes

def run_seconds(bench: Bench, recipe: Recipe, short: int = 8) -> dict[str, float]:
    """CPU-seconds of a step, and of what else a tuning run and a test run take, from two timed runs that
    differ in their steps alone"""
    bench.before(TUNING, 'validation')
    few, more = (bench.run(recipe, None, TUNING, 'validation', steps=n)['cpu_seconds']
                 for n in (short, 3*short))
    step = max(0., more - few)/(2*short)
    once = max(0., few - short*step)
    test, validation = (sum(bench.sizes[s]) for s in ('test', 'validation'))
    return dict(step=step, tuning=once, test=once*test/validation)


def expected(part: list[Setting], arms: int, bench: Bench, seeds: int, calibrates: bool) -> str:
    "The estimate for a part, in words"
    each = run_seconds(bench, methods.get('full'))
    test = 2*seeds + seeds # a third run on each seed where equal gain is asked of fewer, or for calibration
    if calibrates:
        test += seeds
    tuning = max(1, part[0].runs - 2*seeds)
    steps = sum(s.how['steps'] for s in part)*(tuning + test)
    seconds = arms*(steps*each['step'] + len(part)*(tuning*each['tuning'] + test*each['test']))
    runs = len(part)*arms*(tuning + test)
    return (f'{part[0].part}: {len(part)} setting{"s"*(len(part) > 1)} of {arms} methods, at most {runs} runs of '
            f'{seconds/runs:.0f} CPU-seconds on average: about {seconds/60:.0f} CPU-minutes, without runs that are '
            'already there')


# ---------- all of it

def lacks(part: list[Setting]) -> str:
    "Why a part cannot run on this machine; '' if it can"
    try:
        part[0].model(), part[0].data()
    except FileNotFoundError as e:
        return str(e)
    return ''


def kept(file: Path) -> dict:
    "The result file as it is, or an empty one"
    return json.loads(file.read_text(encoding='utf-8')) if file.exists() else {}


def write(file: Path, family: str, name: str, result: dict) -> None:
    "Put one setting into the result file, beside the others"
    found = dict(family=family, settings={}) | kept(file)
    found['settings'][name] = result
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1, ensure_ascii=False) + '\n'
    write_atomically(file, lambda p: p.write_text(text, encoding='utf-8'))


def one(family: str, setting: Setting, a, file: Path, before: Callable = lambda bench, arms: None) -> None:
    "Make one setting and write it; `before` is told the bench and the number of methods"
    bench = Bench(setting.model(), setting.data(), progress=False, **setting.how)
    arms, out = arms_of(family, setting, bench)
    if a.only:
        out |= dict.fromkeys(set(arms) - set(a.only), 'not asked for in this run')
        arms = {n: text for n, text in arms.items() if n in a.only}
    recipes, costs, unable = able(bench, arms, same_rows=family == 'losses')
    before(bench, len(recipes))
    folder = Path('ftlab-runs')/f'family_{family}'
    result, broken = result_of(recipes, costs, setting, folder, a.seeds, a.jobs)
    result['left_out'] = dict(sorted((out | unable | broken).items()))
    if family == 'losses':
        calibrate(bench, recipes, result, folder)
    write(file, family, setting.name, result)
    print(f'{file}: {setting.name}', flush=True)


def main(argv: list[str] | None = None) -> None:
    a = arguments(argv)
    file = Path(a.to or Path(__file__).parent/'results')/f'family_{a.family}.json'
    parts = {}
    named = lambda s: not a.settings or any(x in s.name for x in a.settings)
    for s in settings(a.family):
        if named(s) and (not a.parts or s.part in a.parts):
            how = dict(s.how, steps=a.steps or s.how['steps'])
            parts.setdefault(s.part, []).append(replace(s, runs=a.runs or s.runs, how=how))
    for part, some in parts.items():
        if why := lacks(some):
            print(f'{part}: left out, {why}', flush=True)
            continue
        tell = lambda bench, arms, some=some: print(
            expected(some, arms, bench, a.seeds, a.family == 'losses'), flush=True)
        for i, setting in enumerate(some):
            one(a.family, setting, a, file, *[tell]*(i == 0))


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('family', choices=FAMILIES)
    parser.add_argument('parts', nargs='*', metavar='PART', help='which parts; none: all')
    words = dict(type=lambda s: s.split(','), default=[])
    parser.add_argument('--only', **words, help='names of methods, with commas; none: the whole family')
    parser.add_argument('--settings', **words, help='words of which a setting must have one in its name')
    parser.add_argument('--runs', type=int, help='of each method, at most; fewer try fewer rates')
    parser.add_argument('--steps', type=int, help='of each run; none: the setting\'s own')
    parser.add_argument('--seeds', type=int, default=SEEDS)
    parser.add_argument('--jobs', type=int, default=1, help='runs at the same time, each in a process of its own')
    parser.add_argument('--to', help='folder of the result file; none: bench/results')
    a = parser.parse_args(argv)
    if a.jobs < 1:
        sys.exit(f'--jobs is {a.jobs}; it must be at least 1')
    there = {s.part for s in settings(a.family)}
    if odd := set(a.parts) - there:
        sys.exit(f'no part of {a.family} is called {sorted(odd)[0]!r}; there are {", ".join(sorted(there))}')
    if a.runs is not None and a.runs < 2 + 2*a.seeds:
        sys.exit(f'--runs is {a.runs}; two rates and {a.seeds} seeds take at least {2 + 2*a.seeds}')
    return a


if __name__ == '__main__':
    main()
