"""The chapter how_to_be_fooled: its dials turn its verdicts, and its exercises say what is wrong"""
import json
import re
import tomllib

import pytest

import ftlab
from ftlab.exercises.how_to_be_fooled import (BROKEN, CLAIMS, KINDS, at_equal_coverage,
                                              find_the_trap,
                                              repaired)
from ftlab.map import measured
from pages import cells

PAGE = 'course/how_to_be_fooled.ipynb'
DIALS = dict(draw_rate=3, draw_heads=2, draw_floor=2, draw_attacks=2, draw_silent=2, draw_seed=3)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FTLAB_HOME', str(tmp_path))
    monkeypatch.delenv('FTLAB_START', raising=False)


def code_of(page: str) -> list[str]:
    return [c['source'] for c in cells(page) if c['cell_type'] == 'code']


@pytest.fixture(scope='module')
def shown() -> dict:
    "The names that the page defines, its figures drawn to nowhere"
    import matplotlib
    matplotlib.use('agg')
    names = dict(ftlab=ftlab)
    for source in code_of(PAGE):
        if not re.search(r'ftlab\.(chapter|check|exercise|quiz)\(|set_matplotlib_formats|^print',
                         source, re.M):
            exec(source, names)
        elif 'set_matplotlib_formats' in source:
            exec('\n'.join(line for line in source.splitlines()
                           if 'set_matplotlib_formats' not in line), names)
    return names


# --- the page

@pytest.mark.parametrize('name', DIALS)
def test_each_dial_stands_still_at_its_ends_and_moves_for_a_reader(name):
    code = code_of(PAGE)
    still = [c for c in code if c.rstrip().splitlines()[-1].startswith(f'ends({name}, ')]
    assert len(still) == 1 and re.search(r'^#\| fig-alt: .{80,}', still[0], re.M)
    moving = [c for c in code if c.startswith(f'dial({name}, ')]
    assert len(moving) == 1 and code.index(moving[0]) == code.index(still[0]) + 1
    output = next(c for c in cells(PAGE) if c['source'] == still[0])['outputs']
    svg = ''.join(output[0]['data']['image/svg+xml'])
    assert svg.count('<g id="axes_') == DIALS[name]


def test_a_page_has_its_parts():
    code = code_of(PAGE)
    text = '\n'.join(c['source'] for c in cells(PAGE) if c['cell_type'] == 'markdown')
    assert not any('#| export' in c for c in code) and any('my_guess' in c for c in code)
    assert any("'JPY_SESSION_NAME' in os.environ" in c and 'interact(' in c for c in code)
    assert all(h in text for h in ('Three sentences to remember', '## Exercises', '## What comes next'))
    assert len(re.findall(r'^## \d', text, re.M)) == 7


def said(names, c) -> tuple[str, str]:
    "The verdict of the intervals, and that of the rule with its reason"
    return names['contrast'](c)['verdict'], names['verdicts'](c).split('rule: ')[1]


def test_the_rate_decides(shown):
    at = lambda rate: said(shown, shown['compared'](rate))
    assert at(1e-3) == ('holds', 'unclear (hangs on the rate)')
    assert at(5.62e-4) == ('fails', 'unclear (hangs on the rate)') and at(3.16e-4) == ('fails', 'fails')
    each = shown['compared'](shown['best_rate']('full'), shown['best_rate']('hft'))
    assert said(shown, each) == ('fails', 'fails'), 'nothing is left of it over all rates'


def test_ceiling_and_floor_decide(shown):
    arms = lambda steps: [shown['runs']['heads'][a][str(steps)] for a in ('learned', 'random')]
    better = lambda steps: said(shown, shown['row'](*arms(steps), .03))
    equal = lambda steps: said(shown, shown['row'](*arms(steps), .05, kind='equivalence'))
    assert better(80) == ('fails', 'unclear (no room)') and better(10) == ('holds', 'holds')
    assert equal(2) == ('holds', 'unclear (no room)') and equal(10) == ('fails', 'fails')


def test_pooling_decides(shown):
    def at(choice):
        found = [shown['area'](s, shown['CHOICES'][choice]) for s in shown['SEEDS']]
        return said(shown, shown['row'](found, [.8]*5, 0., trivial=.5))
    assert at('one example') == ('holds', 'holds') and at('all six')[0] == 'unclear'
    assert all(float(shown['left_out'](s)) > .6 for s in shown['SEEDS']), 'two thirds are left out'


def test_coverage_decides(shown):
    def at(share):
        of = [shown['runs']['abstain'][s] for s in shown['SEEDS']]
        plain = [shown['wrong_answers'](s, share) for s in shown['SEEDS']]
        return shown['contrast'](shown['row']([o['made_up']/o['questions'] for o in of], plain, 0.,
                                              best=0.,
                                              higher_is_better=False))['verdict']
    assert at(1.) == 'holds' and at('as many') == 'fails'


def test_a_seed_decides(shown):
    lift = shown['lift']
    less = [b - t for t, b in zip(lift['treatment'], lift['baseline'])]
    assert less[0] < -lift['margin'] and less[1] > lift['margin']
    assert shown['contrast'](lift)['verdict'] == 'unclear'
    with pytest.raises(ValueError, match='needs five'):
        shown['contrast'](lift | dict(treatment=lift['treatment'][:1],
                                      baseline=lift['baseline'][:1]))


def test_the_numbers_are_those_of_five_seeds():
    runs = json.loads(measured('fooled.json').read_text())
    seeds = [str(s) for s in runs['seeds']]
    assert len(set(seeds)) == 5 and max(runs['seeds']) < 10_000, 'five, and none of the tuning seeds'
    assert all(list(of) == seeds for arm in runs['rate'].values() for of in arm.values())
    assert set(runs['rate']['hft']) == set(runs['rate']['full']), 'both arms have the same rates'
    assert all(len(v) == 5 for arm in runs['heads'].values() for v in arm.values())
    assert list(runs['attacks']) == list(runs['abstain']) == seeds
    for of in runs['abstain'].values():
        assert set(of['plain']) == {'0', '1'} and len(of['plain']) == of['questions']
        assert of['made_up'] <= of['answered'] < of['questions']
    for of in runs['attacks'].values():
        assert all(sum(map(len, kinds.values())) == 100 for kinds in of.values())


# --- the exercises

def message(yours, name) -> str:
    checked = ftlab.check(yours, name=name)
    assert not checked, f'a wrong {name} passes'
    return checked.message


def test_each_trap_is_in_one_file_and_all_files_have_the_same_keys():
    assert (sorted(find_the_trap().values()) == sorted(KINDS)
            and list(find_the_trap()) == list(CLAIMS))
    keys = [{k: sorted(v) if isinstance(v, dict) else None for k, v in tomllib.loads(t).items()}
            for t in CLAIMS.values()]
    assert all(k == keys[0] for k in keys)


def test_an_answer_about_the_traps_hears_about_its_first_wrong_file():
    right = find_the_trap()
    others = dict(zip(CLAIMS, [*list(right.values())[1:], right['A']]))
    assert 'Claim A' in message(lambda: others, 'find_the_trap')
    assert 'Claim G' in message(lambda: right | dict(G='pooling'), 'find_the_trap')
    assert 'no entry' in message(lambda: dict(A='ceiling'), 'find_the_trap')
    assert "'luck' for claim C is not one of" in message(lambda: right | dict(C='luck'), 'find_the_trap')
    assert 'a dictionary' in message(lambda: list(right), 'find_the_trap')


def test_other_right_repairs_pass():
    other = repaired().replace('[0.0316, 0.1, 0.316, 1.0]', '[1e-2, 3.16e-2, 1e-1, 0.316]')
    other = other.replace('[40, 41', '[1, 2, 40, 41')
    assert ftlab.check(lambda: other, name='repaired')


@pytest.mark.parametrize('yours, said', [
    (lambda: BROKEN, 'left_out'),
    (lambda: 'sentence =', 'not readable as TOML'),
    (lambda: repaired().replace('edition = 2\n', ''), 'edition'),
    (lambda: repaired().replace('steps = 10\n', 'steps = 12\n'), 'no pilot of 12 steps; there are 2, 10, 80'),
    (lambda: repaired().replace('baseline = "random"', 'baseline = 0.0'), 'The baseline of the contrast'),
    (lambda: repaired().replace('random = {', 'other = {').replace('"random"', '"other"'),
     'The baseline of the contrast'),
    (lambda: repaired() + '\n[[control]]\nname = "x"\n', 'control'),
    (lambda: 3, 'the text of the file')])
def test_wrong_repairs_hear_why(yours, said):
    assert said in message(yours, 'repaired')


def test_coverage_of_nothing_is_no_mistake():
    assert at_equal_coverage([.5, .2], [False, True], 0) == 0
    assert 'least' in message(lambda c, r, n: at_equal_coverage([-x for x in c], r, n), 'at_equal_coverage')
