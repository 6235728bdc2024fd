"""What lab-l can do by the public interface, what lab-m can, and what needs no looking up at all.

    python bench/lab_lookup.py shortcuts       how far guesses get that do not do the task, a few seconds
    python bench/lab_lookup.py models          lab-l and lab-m by generation, n = 400, on the CPU (half an hour)

Results go to bench/results/lab_v2_shortcuts.json and lab_v2_checked.json; what is there is kept,
what is missing is measured. The scores that come with the weights are in lab_v2_skills_lab-l.json,
written by bench/lab_l.py on the GPU. """
import importlib.util
import json
import os
import re
import sys
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
import ftlab
from ftlab.core.generate import generate
from ftlab.core.io import write_atomically
from ftlab.core.scorers import skills
from ftlab.lab.lookup import LOOKUP, LOOKUP_SKILLS, LookupWorld, bayes_line, line_error
from ftlab.lab.lookup import line_examples, read_number, write_number
from ftlab.lab.world import LISTS, OLD

ROOT = Path(__file__).parent.parent
OUT = ROOT/'bench'/'results'
WORLD = LookupWorld(0)
MARKS = ((':', ','), ('>', ';'), ('is', ','), ('=', '.'), (':', '.'), ('=', ','))


def keep(name, x):
    write_atomically(OUT/name, lambda p: p.write_text(json.dumps(x, indent=1) + '\n'))


def known(name):
    return json.loads((OUT/name).read_text()) if (OUT/name).exists() else {}


def shown_pairs(prompt):
    """The pairs (input, output) that a sequence shows, and the input that is asked for;
    None for a scene"""
    for arrow, between in MARKS:
        *shown, last = prompt.split(f' {between} ')
        split = [s.split(f' {arrow} ') for s in shown]
        if last.endswith(f' {arrow}') and split and all(len(s) == 2 for s in split):
            return split, last[:-len(arrow) - 1]
    return None


def mentions(prompt, words):
    """The answers that the prompt itself mentions, in order: outputs of a sequence, or words that can be answers.

    Of boxes only those of the sort that is asked for: names of boxes are single letters."""
    try:
        return [write_number(y) for _, y in line_examples(prompt)[0]]
    except ValueError: # another skill
        pass
    found = shown_pairs(prompt)
    if found:
        return [y for _, y in found[0]]
    text, _, ask = prompt.rpartition(' . ')
    said = [x for x in (text or prompt).split() if x in words and x not in ask.split()]
    if prompt.startswith('box '):
        of_box = any(len(x) == 1 and x.isalpha() for x in ask.split())
        said = [x for x in said if (len(x) > 1) == of_box]
    return said


def frequent(said):
    return Counter(said).most_common(1)[0][0] if said else ''


# ---- guesses that need more than copying, but less than the task
def before_moves(row):
    "Where things were at the start, as if nothing had moved"
    told = dict(re.findall(r'box (\w) has (\w+) \.', row['prompt']))
    ask = row['prompt'].split(' . ')[-1].split()
    at = [told[x] for x in ask if x in told]
    back = {t: b for b, t in told.items()}
    return (at or [back[x] for x in ask if x in back] or [''])[0]


def last_beside(row):
    "What the last sentence about the box or thing names"
    *told, ask = row['prompt'].split(' . ')
    things = {t for _, t in re.findall(r'box (\w) has (\w+)', row['prompt'])}
    about = [x for x in ask.split() if x in things or len(x) == 1 and x.isalnum()]
    for sentence in reversed(told):
        said = sentence.split()
        if about and about[0] in said:
            if about[0] in things:
                return said[1] if said[0] == 'box' else said[-1]
            return next((x for x in said if x in things), '')
    return ''


def nearest_x(row):
    "The output of the example with the nearest input"
    shown, x = line_examples(row['prompt'])
    return write_number(min(shown, key=lambda p: abs(p[0] - x))[1])


def least_squares(row):
    "Least squares through zero, which knows no prior"
    shown, x = line_examples(row['prompt'])
    slope = sum(a*b for a, b in shown)/sum(a*a for a, _ in shown)
    return write_number(max(-99, min(99, round(slope*x))))


def one_task(task):
    def guess(row):
        _, ask = shown_pairs(row['prompt'])
        return ' '.join(LISTS[task][0](ask.split()))
    guess.__doc__ = f'Always {task}, whatever the examples show'
    return guess


def last_factor(row):
    "The last number of the chain"
    return re.findall(r'\d', row['prompt'])[-1]


OTHERS = {s: (before_moves, last_beside) for s in ('track', 'track-unnamed')}
OTHERS |= dict(line=(nearest_x, least_squares))
OTHERS |= {s: (last_factor,) for s in ('chain', 'chain-direct')}
OTHERS |= dict(shown=tuple(one_task(t) for t in LISTS))


def shortcuts(n=400):
    """For each skill the score of answers that are always the same, or copied from a place of the
    prompt"""
    out = {}
    for s in LOOKUP_SKILLS:
        rows, train = WORLD.rows(s, n), WORLD.rows(s, 2000, 'train')
        words = {r['response'] for r in train}
        always = frequent(r['response'].split()[-1] if s == 'chain' else r['response']
                          for r in train)
        said = [mentions(r['prompt'], words) for r in rows]
        guesses = dict(always=[always]*n, last=[x[-1] if x else '' for x in said],
                       first=[x[0] if x else '' for x in said],
                       frequent=[frequent(x) for x in said])
        guesses |= {f.__doc__: [f(r) for r in rows] for f in OTHERS.get(s, ())}
        judged = {k: sum(map(WORLD.judge, rows, g))/n for k, g in guesses.items()}
        out[s] = {k: round(v, 4) for k, v in judged.items()}
        if s == 'line':
            out['line ratio'] = {k: round(line_error(rows, g)['ratio'], 4)
                                 for k, g in guesses.items()}
    for part in ('line-discrete', 'line-continuous'):
        rows = WORLD.rows(part, n)
        said = [least_squares(r) for r in rows]
        best = [write_number(bayes_line(r['prompt'])['median']) for r in rows]
        out[f'{part} ratio'] = {
            least_squares.__doc__: round(line_error(rows, said)['ratio'], 4),
            'The Bayes predictor of both tasks': line_error(rows, best)['ratio']}
    keep('lab_v2_shortcuts.json', dict(n=n, split='test', skills=out))
    print(json.dumps(out, indent=1))


def parsers():
    "The tests' own way to find an answer from its prompt, which shares no code with the generators"
    spec = importlib.util.spec_from_file_location('test_lookup', ROOT/'tests'/'test_lookup.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.solve


def asked(name, s, n, solve):
    """Score of a model on `n` test questions of skill `s`, and the same by the parsers, or its
    errors with numbers"""
    model, tok = loaded(name)
    said, rows = [], WORLD.rows(s, n)

    def noted(*args, **kw):
        said.extend(generate(*args, **kw))
        return said

    out = {name: round(skills(model, n, names=[s], tok=tok, decode=noted)[s], 4)}
    if s.startswith('line'):
        out[f'{name}, ratio'] = round(line_error(rows, said)['ratio'], 4)
        numbers = [(read_number(x), r) for x, r in zip(said, rows) if read_number(x) is not None]
        out[f'{name}, unreadable'] = 1 - len(numbers)/n
        if len(numbers) == n:
            bayes = [abs(x - bayes_line(r['prompt'])['median']) for x, r in numbers]
            plain = [abs(x - read_number(least_squares(r))) for x, r in numbers]
            out[f'{name}, mean distance to Bayes'] = round(sum(bayes)/n, 4)
            out[f'{name}, mean distance to least squares'] = round(sum(plain)/n, 4)
    elif s in LOOKUP:
        right = [solve(s, r['prompt'], r['response']).split() for r in rows]
        last = slice(-1, None) if s == 'chain' else slice(None)
        out[f'{name}, by the parsers'] = sum(x.split()[last] == y[last]
                                             for x, y in zip(said, right))/n
    return out


@lru_cache(2)
def loaded(name):
    return ftlab.load(name)


def models(n=400, few=100):
    """lab-l and lab-m on the skills of looking things up, lab-l on those of v1, too (`few`
    questions each)"""
    solve = parsers()
    found = (known('lab_v2_checked.json') or dict(n=n, few=few, split='test', device='cpu',
                                                  skills={}))
    todo = [(m, s, n) for m in ('lab-l', 'lab-m') for s in [*LOOKUP_SKILLS, 'line-discrete']]
    todo += [('lab-l', s, few) for s in [*OLD, 'atlas']]
    for name, s, k in todo:
        here = found['skills'].setdefault(s, {})
        if name not in here:
            start = time.time()
            here.update(asked(name, s, k, solve))
            print(s, here, f'{time.time() - start:.0f} s', flush=True)
            keep('lab_v2_checked.json', found)


if __name__ == '__main__':
    what = sys.argv[1:] or ['']
    if what[0] not in ('shortcuts', 'models'):
        sys.exit(__doc__)
    dict(shortcuts=shortcuts, models=models)[what[0]]()
