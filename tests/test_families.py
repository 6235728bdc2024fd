"A family's comparison: who takes part, what is left out and why, and what its file says"
import os
import json
import re
import sys
from types import SimpleNamespace

import pytest

from ftlab import methods
from ftlab.core.io import Busy
from ftlab.instruments.bench import Bench
from ftlab.instruments.families import (CONCERNS, FAMILIES, answer, answer_words, coloured,
                                        entries_of, family_words, frontiers, outermost,
                                        panel_styles, read_family, setting_rows)
from ftlab.instruments.views import COLORS, method_styles
from ftlab.papers import catalogue
from pages import ROOT
from toys import TOK, classifier, lab_data, toy

sys.path[:0] = [str(ROOT/'bench'), str(ROOT/'tools')]
import families
import index
import yardsticks

# as much of a bench as the list of arms needs
STUB = SimpleNamespace(base=lambda seed: (toy(), TOK), given=SimpleNamespace(labels=False))
SETTINGS = {f: families.settings(f) for f in FAMILIES}
SMALL = dict(batch_size=4, evaluations=1, items=4, old_items=1, validation_items=4,
             old_validation_items=1)
GAIN, LOST, STATE, SAVED, TIME = CONCERNS


def of_family(family: str) -> set[str]:
    return {k for k, row in catalogue().items() if row['family'] == family}


def row(gain, **more) -> dict:
    "A method's row, as the result file has it"
    each = dict(gain=gain, forgetting=[.1]*len(gain), forgetting_matched=[.05]*len(gain))
    return dict(each, rate=1e-3) | more


def entry(**rows) -> dict:
    about = dict(model='toy', redrawn=True, forgetting='old skills')
    return dict(about, methods=rows, settings=dict(steps=1, batch_size=2),
                left_out={'spt': 'not built here yet'})


def put(folder, name: str = 'x, 1%', **rows) -> None:
    "Write a setting of the subsets into a folder's result file"
    families.write(folder/'family_subsets.json', 'subsets', name, entry(**rows))


# ---------- who takes part

@pytest.mark.parametrize('family', FAMILIES)
def test_every_paper_of_a_family_is_compared_or_says_why_not(family):
    for setting in SETTINGS[family]:
        arms, out = families.arms_of(family, setting, STUB)
        assert set(arms) & set(out) == set() and all(out.values())
        beside = {'full', 'lora'} if setting.budget else {'full'}
        assert set(arms) | set(out) == of_family(family) | beside
        for name in set(arms) - {'full', 'lora'}:
            assert not setting.budget or f'budget={setting.budget:g}' in arms[name]


def test_a_new_paper_takes_part_by_its_key_and_its_budget_alone(monkeypatch):
    key = next(k for k in sorted(of_family('subsets')) if k not in methods.names())
    made = {key: lambda budget=None: None}
    make_of = methods.make_of
    monkeypatch.setattr(methods, 'paper_modules', lambda: {key: None})
    monkeypatch.setattr(methods, 'names', lambda: [key])
    monkeypatch.setattr(methods, 'make_of', lambda n: made.get(n) or make_of(n))
    setting = SETTINGS['subsets'][0]
    arms, out = families.arms_of('subsets', setting, STUB)
    assert arms[key] == f'{key}(budget={setting.budget:g})' and key not in out
    made[key] = lambda: None
    assert 'no budget' in families.arms_of('subsets', setting, STUB)[1][key]


def test_what_a_method_needs_is_given_and_the_others_say_why_not():
    arms = {s.name: families.arms_of(f, s, STUB) for f in FAMILIES for s in SETTINGS[f]}
    assert arms['mixed'][0]['mftcoder'] == "mftcoder('skill')"
    column = methods.get(arms['mixed'][0]['mftcoder']).views[0].task
    assert all(r[column] for r in families.unequal(n=40).train)
    assert methods.get(arms['new-procedure, 1%'][0]['slicefine']).callbacks
    for name, (some, out) in arms.items():
        if 'new-language' in name:
            assert some['lape'] == "lape(budget=0.01, others=('tavi', 'oruk'))"
            assert methods.get(some['lape']).select.others == ('tavi', 'oruk')
        elif '%' in name:
            assert 'only new-language teaches one' in out['lape']


def test_one_task_is_plain_fine_tuning_and_two_are_not(monkeypatch):
    monkeypatch.setattr(families, 'PROBE', 2)
    for make, there in ((families.clean, False), (families.unequal, True)):
        some = Bench('lab-s', make(n=200), steps=2, progress=False, **SMALL)
        arms = dict(full='full', mftcoder="mftcoder('skill')")
        recipes, _, out = families.able(some, arms, same_rows=True)
        assert ('mftcoder' in recipes) == there, out
        assert there or 'plain fine-tuning' in out['mftcoder']


@pytest.mark.parametrize('labels, model', [(False, toy()), (True, classifier())], ids=('text', 'labels'))
def test_the_rank_is_the_one_nearest_the_budget(labels, model):
    total = sum(p.numel() for p in model.parameters())
    count = lambda r: families.training_bytes(model, methods.lora(r=r), labels)['trainable']
    for budget in (.001, .05, .2):
        r = families.nearest_rank(model, budget, labels)
        assert all(abs(count(r) - budget*total) <= abs(count(k) - budget*total)
                   for k in (r - 1, r + 1) if k >= 1)


def test_noise_and_mixture_change_what_they_say():
    makes = (families.clean, families.with_noise, families.unequal)
    clean, noisy, mixed = (make(n=600) for make in makes)
    assert clean.test == noisy.test and len(clean.train) == len(noisy.train)
    changed = [a['response'] != b['response'] for a, b in zip(clean.train, noisy.train)]
    assert abs(sum(changed)/len(changed) - families.NOISE) < .08
    assert [a['prompt'] for a in clean.train] == [b['prompt'] for b in noisy.train]
    few = sum(r['skill'] == families.FORMAT for r in mixed.train)/len(mixed.train)
    assert abs(few - families.UNEQUAL[1]) < .01
    assert [r['skill'] for r in mixed.test[:2]] == [families.PROCEDURE, families.FORMAT]


# ---------- one that breaks

@pytest.fixture(scope='module')
def bench():
    return Bench((toy(), TOK), lab_data(), steps=2, progress=False, **SMALL)


def test_a_method_that_breaks_or_differs_in_nothing_is_left_out_and_the_others_go_on(bench, monkeypatch):
    def broken(*args):
        raise RuntimeError('it fell apart')
    get = methods.get
    monkeypatch.setattr(methods, 'get', lambda t: get('full').named('full') if t == 'full'
                        else broken() if t == 'broken' else get(t))
    monkeypatch.setattr(families, 'PROBE', 2)
    same = ('full', 'broken', 'tl_training', 'dft', 'grpo')
    arms = dict(zip(same, same), smt='smt(budget=1e-9)')
    recipes, costs, out = families.able(bench, arms, same_rows=True)
    assert list(recipes) == list(costs) == ['full', 'dft']
    assert set(out) == {'broken', 'smt', 'tl_training', 'grpo'}
    assert out['broken'] == 'RuntimeError: it fell apart' and out['smt'].startswith('ValueError: ')
    assert 'plain fine-tuning' in out['tl_training'] and 'rows of its own' in out['grpo']
    whole = sum(p.numel() for p in toy().parameters())
    assert costs['full']['trainable'] == whole and costs['full']['saved_bytes'] >= 4*whole
    assert 0 <= costs['full']['optimizer_bytes'] - 8*whole <= 400 # two moments, and a count for each tensor


def test_a_method_that_compare_refuses_does_not_end_the_others(monkeypatch, tmp_path):
    asked = []

    def compare(arms, *args, **kw):
        asked.append([r for r in arms])
        if 'bad' in arms:
            raise ValueError('bad cannot do this')
        return SimpleNamespace(json=lambda: list(arms))
    monkeypatch.setattr(families.ftlab, 'compare', compare)
    setting = SETTINGS['losses'][0]
    found, out = families.together(dict(a='a', bad='bad', c='c'), setting, tmp_path, 1)
    assert found == ['a', 'c'] and out == {'bad': 'ValueError: bad cannot do this'}
    with pytest.raises(ValueError, match='bad cannot'):
        families.together(dict(bad='bad'), setting, tmp_path, 1)


def test_what_is_wrong_with_the_machine_leaves_no_method_out(monkeypatch, tmp_path):
    "A busy folder once became the reason for which `full` was left out"
    def compare(arms, *args, **kw):
        raise Busy('another run writes into this folder')
    monkeypatch.setattr(families.ftlab, 'compare', compare)
    with pytest.raises(Busy, match='another run'):
        families.together(dict(a='a', c='c'), SETTINGS['losses'][0], tmp_path, 1)


def test_those_that_learn_little_do_not_set_the_gain_of_all():
    path = lambda *gains: [dict(gain=g, forgetting=0.) for g in gains]
    best = dict(much=path(.2, .8), half=path(.45), little=path(.4), none=[])
    found = [dict(name=n, frontier=f) for n, f in best.items()]
    assert families.reaching(dict(methods=found)) == ['much', 'half'] # 95% of .4 is less than half of .8


# ---------- what the file says

def test_a_result_is_written_beside_the_others_and_read_back(tmp_path):
    put(tmp_path, 'one', full=row([.5, .6]))
    put(tmp_path, 'two', full=row([.7]))
    put(tmp_path, 'one', full=row([.8, .9]))
    found = read_family(tmp_path/'family_subsets.json')
    assert list(entries_of(found)) == ['one', 'two']
    assert found['settings']['one']['methods']['full']['gain'] == [.8, .9]
    said, none = (family_words('subsets', f) for f in (found, read_family(tmp_path/'none.json')))
    assert '85.0' in said and '`spt` (not built here yet)' in said
    assert 'no result yet' in none and 'no result yet' not in said


def test_a_method_that_learned_little_is_first_in_nothing_else():
    rows = dict(full=row([.9, .9], saved_bytes=100), idle=row([.0, .0], saved_bytes=1),
                small=row([.45, .5], saved_bytes=10, forgetting_matched=[.2, .2]),
                broken=dict(row([None, .9]), saved_bytes=1))
    assert answer(rows, SAVED)['best'] == 'small' and answer(rows, SAVED)['of'] == 2
    assert answer(rows, LOST)['best'] == 'full' and answer(rows, GAIN)['of'] == 3


def test_large_numbers_have_commas_and_no_decimals(tmp_path):
    put(tmp_path, full=row([.5], optimizer_bytes=7_133_336),
        small=row([.4], optimizer_bytes=71_392))
    said = family_words('subsets', read_family(tmp_path/'family_subsets.json'))
    assert '| 7,130 |' in said and '| 71.4 |' in said


def test_a_method_that_is_not_at_the_equal_gain_is_marked(tmp_path):
    rows = dict(on=row([.6, .6], gain_matched=[.49, .53]), off=row([.2, .8], gain_matched=[.2, .5]),
                none=row([.1, .1], gain_matched=[None]*2, forgetting_matched=[None]*2))
    for name, target in (('with', .5), ('without', None)):
        one = entry(**rows) | dict(target=target)
        families.write(tmp_path/'family_subsets.json', 'subsets', name, one)
    shown = {k: {r['method']: r['lost at equal gain'] for r in setting_rows(e)}
             for k, e in entries_of(read_family(tmp_path/'family_subsets.json')).items()}
    assert shown['with'] == dict(on=5., off='5.0 †', none=None)
    assert shown['without'] == dict(on=5., off=5., none=None)
    said = family_words('subsets', dict(settings=dict(one=entry(**rows) | dict(target=.5))))
    assert '5.0 †' in said and 'more than two points from the equal gain' in said
    assert '†' not in family_words('subsets', dict(settings=dict(one=entry(**rows))))


def test_an_answer_names_what_cannot_be_told_apart():
    rows = dict(a=row([.8, .9], saved_bytes=100), b=row([.7, .82], saved_bytes=100.5),
                c=row([.6, .79], saved_bytes=200))
    assert answer(rows, GAIN) == dict(best='a', value=pytest.approx(85), also=['b'], of=3)
    assert answer(rows, SAVED)['also'] == ['b'] and answer(rows, TIME) is None
    rows['a']['forgetting_matched'] = [.1, None]
    assert answer(rows, LOST)['of'] == 2 and answer_words(rows, STATE) == 'not measured'
    rows['a']['gain'] = [-.1, .0] # below zero
    assert answer(rows, GAIN)['best'] == 'b'


def test_a_table_has_no_empty_column_and_the_best_first():
    rows = setting_rows(entry(a=row([.5]), b=row([.6], share=.01)))
    assert [r['method'] for r in rows] == ['b', 'a']
    assert 'trained, %' in rows[0] and 'saved, kB' not in rows[0]
    assert rows[0]['gained'] == 60 and rows[0]['lost at equal gain'] == 5


def test_which_method_follows_from_the_files(tmp_path):
    "The table on nbs/methods is made from the files, and from nothing else"
    results = tmp_path/'bench'/'results'
    results.mkdir(parents=True)
    (tmp_path/'nbs').symlink_to(ROOT/'nbs')
    said = lambda: index.measured(index.Project(tmp_path))
    assert all(f'`python bench/families.py {f}` makes it' in said() for f in FAMILIES)
    assert '|' not in said()
    put(results, full=row([.5, .6]), smt=row([.7, .8]))
    now = said()
    assert '| x, 1% | 2 | `smt`: 75 points | ' in now
    assert 'families.py subsets' not in now and 'families.py losses' in now
    put(results, full=row([.9, .9, .9]), smt=row([.7, .8]))
    assert '| x, 1% | 3 | `full`: 90 points | ' in said()


def test_the_page_says_what_the_files_of_this_project_say():
    cells = json.loads((ROOT/'nbs'/'methods.ipynb').read_text(encoding='utf-8'))['cells']
    texts = [''.join(c['source']) for c in cells]
    page = next(t for t in texts if 'made by `make index`: measured' in t)
    assert page.endswith(index.measured(index.Project(ROOT)))
    for file in (ROOT/'bench'/'results').glob('family_*.json'):
        for name, e in json.loads(file.read_text(encoding='utf-8'))['settings'].items():
            family = file.stem.removeprefix('family_')
            assert of_family(family) <= {*e['methods'], *e['left_out']}, f'{name}: a paper is missing'


# ---------- frontiers

def curve(*corners) -> dict:
    "A method's row with these corners of its frontier"
    return row([corners[-1][0]]*2, frontier=[dict(gain=g, forgetting=f) for g, f in corners])


def many(n: int) -> dict[str, dict]:
    "`full`, `lora`, and n methods of which each gains as much as the one before and forgets more"
    return {name: curve((0, 0), (.8, .02*i)) for i, name in
            enumerate(['full', 'lora', *(f'method_{k}' for k in range(n))])}


def test_the_outermost_forget_least_where_much_is_gained():
    rows = many(4) | dict(short=curve((0, 0), (.3, -.1)), far=curve((0, 0), (.8, .9), (1., .95)))
    assert outermost(rows, 2) == ['method_0', 'method_1'] # short ends before half of the largest gain
    rows['far'] = curve((0, 0), (1., 0.))
    assert outermost(rows, 2)[0] == 'far'
    assert outermost(dict(full=curve((0, 0)), idle=curve((0, 0)))) == []
    assert coloured(many(5)) == list(many(5))
    assert coloured(many(9)) == ['full', 'lora', 'method_0', 'method_1', 'method_2']


def test_frontiers_are_drawn_of_the_settings_that_are_asked_for_and_of_new_ones(tmp_path):
    file, how = tmp_path/'family_subsets.json', dict(metric='exact', target=.5)
    for name, rows in dict(one=many(9), two=many(2)).items():
        families.write(file, 'subsets', name, entry(**rows) | how)
    both, one, two = frontiers(file), frontiers(file, 'one'), frontiers(file, 'two')
    assert [len(p.parts) for p in (both, one, two)] == [2, 1, 1]
    for p in (both, one): # names of those in colour alone
        assert all(f'{n} gains 0.80, loses 0.10' in p.alt for n in ('full', 'lora', 'method_2'))
        assert 'method_3' not in p.svg and '6 others are thin and grey' in p.alt
        assert p.svg.count('stroke: #b2b2b2') >= 6
    assert 'method_1 gains 0.80' in two.alt and 'grey' not in two.alt
    assert 'right is better' in one.svg and 'up is better' in one.svg
    families.write(file, 'subsets', 'three', entry(**many(1)) | how | dict(target=None))
    assert len(frontiers(file).parts) == 3
    with pytest.raises(KeyError, match='four'):
        frontiers(file, 'four')


def drawn_on_pages() -> list[dict[str, list[str]]]:
    "The coloured methods of each panel, for each file and all settings in one call, and for the pages' calls"
    files = sorted((ROOT/'bench'/'results').glob('*.json'))
    found = {f.stem: {n: coloured(e['methods']) for n, e in entries_of(read_family(f)).items()
                      if all('frontier' in m for m in e['methods'].values())}
             for f in files if f.stem.startswith(('family_', 'yardsticks_'))}
    few = [n for n in found['family_subsets'] if n.startswith('new-') and n.endswith(' 1%')]
    return [*filter(None, found.values()), {n: found['family_subsets'][n] for n in few}]


def test_no_panel_has_a_colour_twice_and_a_method_looks_the_same_in_all():
    for panels in drawn_on_pages():
        styles, seen = panel_styles(panels), {}
        for n, of in panels.items():
            assert list(styles[n]) == of and len({c for c, _ in styles[n].values()}) == len(of)
            assert all(seen.setdefault(m, s) == s for m, s in styles[n].items())
        assert len(set(seen.values())) == len(seen)
        if len({c for c, _ in method_styles(seen).values()}) == len(seen): # all fit as they are
            assert seen == method_styles(seen)
    file = ROOT/'bench'/'results'/'family_losses.json'
    for svg, _ in frontiers(file, 'clean', 'noisy', 'mixed').parts[:2]:
        assert all(f'stroke: {c.lower()}' in svg for c in COLORS), 'seven methods, seven colours'


def test_panels_that_have_no_colours_in_common_have_their_own():
    few = [f'm{i}' for i in range(8)] # any two share a panel, so they would need eight colours
    panels = {f'{a} {b}': [a, b, 'full'] for a in few for b in few if a < b}
    styles = panel_styles(panels)
    assert all(len({c for c, _ in styles[n].values()}) == 3 for n in panels)
    assert all(styles[n] == method_styles(of) for n, of in panels.items())


def test_names_lose_their_arguments_where_they_stay_different(tmp_path):
    file = tmp_path/'yardsticks_x.json'

    def names(*of):
        rows = {n: curve((0, 0), (.8, .1*i)) for i, n in enumerate(of)}
        file.write_text(json.dumps(dict(entry(**rows), task='x', metric='exact', target=.5)))
        return re.findall(r'([^.;]+) gains', frontiers(file).alt.partition('downwards')[2])
    assert names('lora(r=2)', 'bitfit(norms=True)') == [' lora', ' bitfit']
    assert names('lora(r=2)', 'lora(r=16)') == [' lora(r=2)', ' lora(r=16)']
    assert names('lora(r=2) * dft', 'lora(r=2)') == [' lora * dft', ' lora']


def test_yardsticks_keep_their_frontiers_and_what_was_tried(monkeypatch):
    seeds = [dict(gain=.5, forgetting=.1, forgetting_matched=.1)]

    def compare(arms, *args, **kw):
        row = dict(rate=.1, rate_matched=.1, seeds=seeds, frontier=[dict(gain=.6)])
        rows = [dict(row, name=str(a)) for a in arms]
        tuned = {str(a): dict(tried=[[.1, .6]]) for a in arms}
        found = dict(methods=rows, tuning=dict(methods=tuned), target=.4,
                     protocol=dict(metric='exact', forgetting='old skills'))
        return SimpleNamespace(json=lambda: found)
    monkeypatch.setattr(yardsticks.ftlab, 'compare', compare)
    found = yardsticks.compared('few')
    assert found['target'] == .4 and found['metric'] == 'exact'
    assert all(m['frontier'] == [dict(gain=.6)] and m['tried'] == [[.1, .6]]
               for m in found['methods'].values())


KINDS = sorted((ROOT/'nbs').glob('*/yardsticks/*.ipynb'))

@pytest.mark.parametrize('page', KINDS, ids=lambda p: p.stem)
def test_a_page_of_yardsticks_draws_what_its_file_has(page):
    found = read_family(ROOT/'bench'/'results'/f'yardsticks_{page.stem}.json')
    rows = entries_of(found)
    has = bool(rows) and all('frontier' in m for m in found['methods'].values())
    assert has == ('frontiers(' in page.read_text(encoding='utf-8'))
    link = f'{page.relative_to(ROOT/"nbs").as_posix()}#Side-by-side'
    assert has == (link in index.measured(index.Project(ROOT)))
    for m in found['methods'].values() if has else ():
        reached = max(c['gain'] for c in m['frontier'])
        assert m['rate'] in dict(m['tried']) and reached >= max(g for _, g in m['tried']) - 1e-9


# ---------- the whole way, very small

def test_a_small_comparison_from_the_command_to_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(families, 'PROBE', 2)
    monkeypatch.setattr(families, 'run_seconds', lambda *a: dict(step=1., tuning=30., test=60.))
    monkeypatch.setattr(families, 'settings', lambda family: [
        families.Setting('clean', 'clean', lambda: families.clean(n=40), dict(SMALL, steps=2))])
    few = ['--only', 'full,dft', '--runs', '4', '--seeds', '1']
    families.main(['losses', *few, '--to', str(tmp_path)])
    e = read_family(tmp_path/'family_losses.json')['settings']['clean']
    assert set(e['methods']) == {'full', 'dft'}
    assert of_family('losses') <= {*e['methods'], *e['left_out']}
    assert all(len(m['gain']) == 1 and len(m['tried']) == 2 for m in e['methods'].values())
    assert 0 < e['base']['calibration'][0]['ece'] < 1
    assert e['methods']['dft']['calibration'][0]['n'] > 4
    said = capsys.readouterr().out
    assert '1 setting of 2 methods, at most 12 runs of 52 CPU-seconds' in said # 2 x 30, 4 x 60
    assert 'clean' in family_words('losses', read_family(tmp_path/'family_losses.json'))


def test_too_few_runs_or_jobs_and_unknown_parts_are_errors():
    with pytest.raises(SystemExit, match='no part of losses is called'):
        families.arguments(['losses', 'minilm'])
    with pytest.raises(SystemExit, match='take at least 6'):
        families.arguments(['losses', '--runs', '4'])
    with pytest.raises(SystemExit, match='--jobs is 0'):
        families.arguments(['losses', '--jobs', '0'])


def test_two_jobs_run_in_processes_of_their_own_and_in_order():
    with families.workers(1) as here, families.workers(2) as two:
        assert here is None and list(two.map(abs, [-1, 2])) == [1, 2]
        assert two.submit(os.getpid).result() != os.getpid()
