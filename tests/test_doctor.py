"Every check of the doctor finds the settings that were planted for it, by name, and is silent on healthy runs"
import json
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from toys import TOK, classifier, lab_data, logits, same, toy, weights

import ftlab
from ftlab import methods
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.select import parts
from ftlab.core.data import Data
from ftlab.core.data import data as as_data
from ftlab.core.paper import Method
from ftlab.core.recipe import Recipe, Stages
from ftlab.instruments import doctor as diagnosis
from ftlab.instruments.case import SETTINGS, SEVERITIES, STAGES, Case, Check, NotApplicable, check
from ftlab.instruments.checks import cost
from ftlab.instruments.doctor import CHECKS, checks_of, doctor, examine
from ftlab.instruments.planted import SHORT, planted, toy_model, toy_rows, trained
from ftlab.instruments.planted import before as planted_before
from ftlab.trainers.fit import fit
from ftlab.trainers.objective import nll
from ftlab.trainers.source import Rows


def before(recipe=None, **given):
    return doctor(**planted_before(recipe, **given))


@pytest.fixture(autouse=True)
def _few_questions(monkeypatch, request):
    "Toys can do nothing, so they are asked little"
    if 'found[old-skills' not in request.node.name:
        monkeypatch.setattr(cost, 'ASKED', 4)
        monkeypatch.setattr(cost, 'old_skills', lambda data, tok=None: ['max', 'last'])


# ---------- the checks themselves

def test_at_least_twenty_checks_each_with_its_reasons_and_a_planted_setting():
    assert len(CHECKS) >= 20 and len({k.name for k in CHECKS}) == len(CHECKS)
    for k in CHECKS:
        assert k.planted, (f'nothing is planted for {k.name}; add a function marked '
                           f'@planted({k.function.__name__}, ...) below it')
        assert (re.fullmatch(r'[\w.-]+/[\w.-]+#\d+', k.source) and k.severity in SEVERITIES
                and k.when in ('before', 'after', 'both', 'elsewhere'))
        assert re.fullmatch(r'[a-z0-9-]+', k.name) and k.name == k.function.__name__.replace('_', '-')
        assert len(k.why.split()) > 4 and len(k.fix.split()) > 2 and k.stage in STAGES


def test_nothing_is_planted_twice():
    made = [(p.make, k.name) for k in CHECKS for p in k.planted]
    assert len(made) == len(set(made)) >= 67


def test_the_folder_is_the_registry():
    """Every file of the folder is a stage, every function marked there is in the list,
    in the order of files and lines"""
    folder = Path(diagnosis.__file__).parent/'checks'
    assert {f.stem for f in folder.glob('*.py')} == {*STAGES, '__init__'}
    marked = {s: re.findall(r'^@check\((?:.|\n)*?^def (\w+)\(', (folder/f'{s}.py').read_text(),
                            re.M) for s in STAGES}
    assert ([(k.stage, k.function.__name__) for k in CHECKS]
            == [(s, f) for s in STAGES for f in marked[s]])
    assert [k['name'] for k in diagnosis.checks()] == [k.name for k in CHECKS]


def test_a_check_of_another_file_is_not_counted_again():
    from types import ModuleType
    module = ModuleType('mine')
    exec("from ftlab.instruments.checks.data import few_test_rows\n"
         "from ftlab.instruments.case import check\n"
         "@check('after', 'note', why='a', fix='b', source='a/b#1')\ndef my_own(case): return 'seen'", vars(module))
    assert [k.name for k in checks_of(module)] == ['my-own']


def test_planted_stands_beside_its_check():
    "In the same file, so that a reader of one meets the other"
    apart = [(k.name, p.make.__name__) for k in CHECKS
             for p in k.planted if p.make.__module__ != k.function.__module__]
    assert not apart


@pytest.mark.parametrize('field, says', [
    (dict(when='later'), "check odd-one: when is 'later'; it must be one of before, after, both, elsewhere"),
    (dict(severity='fatal'), "severity is 'fatal'; it must be one of error, warning, note"),
    (dict(source='a blog'), "source is 'a blog'; write owner/repository#number")])
def test_a_check_with_a_wrong_field_is_refused(field, says):
    def odd_one(case):
        pass

    with pytest.raises(ValueError, match=re.escape(says)):
        check(**dict(when='before', severity='error', why='w', fix='f', source='a/b#1') | field)(
            odd_one)


def test_what_stood_in_the_module_once_is_still_imported_from_it():
    from ftlab.instruments.doctor import (ASKED, FEW, PATIENCE, PROMISED, SAMPLE, SELECTION, Given,
                                          labels_shifted)
    from ftlab.instruments.doctor import Case as case_there, Check as check_there
    assert ((case_there, check_there) == (Case, Check) and issubclass(Case, Given)
            and labels_shifted in [k.function for k in CHECKS])
    assert ([k.name for k in SELECTION][0] == 'selection-empty'
            and [k.name for k in PROMISED][0] == 'reload-differs')
    assert min(ASKED, FEW, PATIENCE, SAMPLE) > 0
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_that'"):
        diagnosis.nothing_of_that


PLANTED = [pytest.param(k, p, id=f'{k.name}-{i}') for k in CHECKS for i, p in enumerate(k.planted)]


@pytest.mark.parametrize('check, plant', PLANTED)
def test_planted_failure_is_found(check, plant):
    d = doctor(**plant.make())
    found = {f.name: f for f in d}
    assert check.name in found, d
    assert (re.search(plant.seen, found[check.name].seen)
            and 'itself failed' not in found[check.name].seen), found[check.name]
    assert not [f for f in d if 'the check itself failed' in f.seen], d


def test_a_check_needs_no_other_before_it():
    "Asked alone, it finds what is planted for it"
    for k in (k for k in CHECKS if k.stage in ('selection', 'data', 'settings') and k.when == 'before'):
        setting = k.planted[0].make()
        assert examine(diagnosis.case_before(**setting), 'before', [k]).names == [k.name]


def test_a_recipe_that_draws_its_own_rows_gets_a_few_batches():
    "One batch of equal rewards says nothing; four in a row do"
    class Late:
        def __init__(self, state, n):
            self.rows, self.n = Rows(state.rows, 16), n

        def next(self, state):
            return [dict(b, weight=torch.tensor(float(state.step >= self.n)))
                    for b in self.rows.next(state)]

    def weighed(state):
        return nll()(state)*state.batch['weight']

    late = lambda n: before(Recipe('late', source=lambda s: Late(s, n), objective=weighed))
    assert not late(0) and not late(2)
    d = late(9)
    assert (d.names == ['zero-gradient'] and d[0].severity == 'warning'
            and '4 batches in a row' in d[0].seen)


# ---------- silence

def coloured():
    "Lab questions with a colour at the end, which is their label"
    colour = lambda rows: [dict(text=r['prompt'] + (' red' if i % 2 else ' blue'),
                                label='lr'[i % 2]) for i, r in enumerate(rows)]
    found = as_data(colour(lab_data().train))
    test = [dict(r, label=found.labels.index(r['label'])) for r in colour(lab_data().test[:40])]
    return Data(found.train, found.validation, test, 'label', found.labels)


def chat(n=40):
    turns = lambda r: dict(messages=[dict(role='user', content=r['prompt']),
                                     dict(role='assistant', content=r['response'])])
    return Data([turns(r) for r in toy_rows(n)], [], [turns(r) for r in toy_rows(20, 500)], 'chat')


def full(lr, *lrs):
    return Recipe(Method('full', lr=lr, lrs=lrs or (1e-4, 3e-4, 1e-3)))


HEALTHY = {  # name: recipe, model, data, steps, and whether the run is examined too
    'full': (lambda: None, toy, lab_data, 24, True),
    'lora': (lambda: lora(targets='(q|v|up)_proj'), lambda: ftlab.load('lab-s')[0], lab_data,
             24, True),
    'labels': (lambda: full(5e-3, 1e-3, 5e-3), lambda: classifier(2), coloured, 48, True),
    'chat': (lora, toy, chat, 6, False),
    'bf16': (lambda: full(1e-3), lambda: toy().bfloat16(), lab_data, 24, True),
    'dropout': (lambda: None, lambda: toy(dropout=.1), lab_data, 24, False),
    'blocks': (lambda: Recipe(select=parts(blocks=(0, 1, 2))),
               lambda: toy_model(num_hidden_layers=4), lab_data, 24, False)}


@cache
def healthy():
    "Diagnoses of healthy runs, before and after, that together let every check run"
    out = {}
    for name, (recipe, model, data, steps, also_after) in HEALTHY.items():
        given = (model(), TOK, data(), recipe())
        settings = dict(steps=steps, batch_size=16)
        out[name, 'before'] = doctor(*given, **settings)
        if also_after:
            out[name, 'after'] = doctor(fit(*given, progress=False, **settings))
    return out


@pytest.mark.parametrize('name', [k.name for k in CHECKS if k.when != 'elsewhere'])
def test_silent_on_healthy_runs(name):
    assert not {k: d[d.names.index(name)] for k, d in healthy().items() if name in d.names}
    assert any(name in d.ran for d in healthy().values())


def test_a_finding_is_never_without_its_reasons():
    d = before(lr=3e-3)
    f = d[0]
    assert len(d) == 1 and d.errors == 0 and bool(d) and f.why and f.fix and f.source == 'huggingface/peft#3552'
    assert 'WARNING learning-rate' in repr(d) and 'learning-rate' in d._repr_html_()
    assert json.loads(json.dumps(d.json()))['findings'][0]['name'] == 'learning-rate'
    fine = before()
    assert (not fine and re.search(r'nothing found; \d\d checks ran, \d+ did not apply', repr(fine))
            and 'the data have no labels' in repr(fine))
    assert set(fine.ran) | set(fine.skipped) == {
        k.name for k in CHECKS if k.when in ('before', 'both')}


def test_the_model_is_left_as_it_was():
    two = Recipe('two', loop=Stages(lora(), Recipe('norms', select=parts('norm'))))
    for recipe in (None, lora(), methods.get('hft * dft'), two):
        m = toy()
        m.model.norm.weight.requires_grad_(False)
        was, flags, modes = (weights(m), [p.requires_grad for p in m.parameters()],
                             [x.training for x in m.modules()])
        state = torch.get_rng_state()
        doctor(m, TOK, lab_data(), recipe, **SHORT)
        assert same(weights(m), was) and flags == [p.requires_grad for p in m.parameters()]
        assert (modes == [x.training for x in m.modules()]
                and torch.equal(state, torch.get_rng_state()))
        assert (all(p.grad is None for p in m.parameters())
                and set(dict(m.named_parameters())) == set(was))
    run = trained(lora())
    now, tensors = logits(run.model), run.delta.tensors()
    doctor(run)
    assert (torch.equal(logits(run.model), now) and same(run.delta.tensors(), tensors)
            and not run.model.training)


def test_a_check_that_breaks_is_reported_under_its_name():
    def breaks(case):
        raise ZeroDivisionError('division by zero')

    c = Case(toy(), TOK, lab_data(), Recipe(), SETTINGS | SHORT)
    d = examine(c, 'before',
                [Check('breaks', 'before', 'error', breaks, 'why', 'fix', 'a/b#1'), *CHECKS[:2]])
    said = 'the check itself failed, so nothing was examined: ZeroDivisionError: division by zero'
    assert d.names == ['breaks'] and said in d[0].seen
    assert d.ran == ['breaks', 'selection-empty', 'selection-thin']


@pytest.mark.parametrize('answer', [True, ['a', 'b'], (), ('fatal', 'seen'), ('note', 'seen', 'more'), ('note', 3)])
def test_a_check_that_answers_in_another_form_is_reported_and_ends_nothing(answer):
    c = Case(toy(), TOK, lab_data(), Recipe(), SETTINGS | SHORT)
    d = examine(c, 'before', [Check('odd', 'before', 'error', lambda case: answer, 'why', 'fix', 'a/b#1'),
                              *CHECKS[:2]])
    assert d.names == ['odd'] and d[0].severity == 'warning'
    assert d.ran == ['odd', 'selection-empty', 'selection-thin']
    assert f'it returned {answer!r}; a check returns None' in d[0].seen


def test_a_file_of_checks_that_cannot_be_imported_is_named(monkeypatch, tmp_path):
    "As is one without `__all__`, which a file written by hand has not"
    import ftlab.instruments.checks as folder
    (tmp_path/'broken.py').write_text('raise RuntimeError("not like this")')
    where = [*folder.__path__, str(tmp_path)]
    monkeypatch.setattr(folder, '__path__', where)
    monkeypatch.setattr(folder.__spec__, 'submodule_search_locations', where)
    with pytest.raises(ImportError, match=r'its checks in ftlab\.instruments\.checks\.broken: '
                       r'RuntimeError: not like this'):
        diagnosis.check_modules()
    (tmp_path/'broken.py').rename(tmp_path/'by_hand.py').write_text('x = 1')
    assert [m.__name__.rpartition('.')[2] for m in diagnosis.check_modules()] == [*STAGES, 'by_hand']
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_that'"):
        diagnosis.nothing_of_that


@pytest.mark.parametrize('chosen, says', [
    (['model.norm.weight'], 'the selection gives a list; it must give {name of a parameter: True or mask}'),
    ({'nothing': True}, "the selection names 'nothing', which the model does not have")])
def test_a_selection_of_ones_own_that_is_none_is_an_error_of_the_run_alone(chosen, says):
    d = doctor(toy(), TOK, lab_data(),
               Recipe('mine', select=lambda model, batches=None, seed=0: chosen), **SHORT)
    assert d.names == ['refused'] and d.skipped['selection-empty'] == says
    assert 'the selection' in d[0].seen and 'ValueError' in d[0].seen


def test_what_it_cannot_examine_it_says():
    m = toy_model()
    m.config.model_type = 'unheard-of'
    d = doctor(m, TOK, lab_data(), methods.get('hft'), **SHORT)
    assert 'cannot be examined' in d.skipped['selection-empty'] and d.names == ['refused'] and 'unheard-of' in d[0].seen


def test_a_case_says_what_it_lacks():
    c = Case(toy(), None, lab_data(), Recipe(), SETTINGS | SHORT)
    with pytest.raises(NotApplicable, match='there is no tokenizer'):
        c.limit
    with pytest.raises(NotApplicable, match='the data have labels, not answers in words'):
        Case(classifier(2), TOK, coloured(), Recipe(), SETTINGS).require_answers()


@pytest.mark.parametrize('n', [1, 299, 300, 301, 599, 899, 1000])
def test_the_sample_is_spread_over_all_rows(n):
    rows = [dict(prompt='a', response=str(i)) for i in range(n)]
    c = Case(toy(), TOK, Data(rows, [], [], 'text'), Recipe(), SETTINGS | SHORT)
    at = [int(r['response']) for r in c.sample]
    ends = [*at, n]
    assert len(at) == min(n, 300) and at[0] == 0
    assert {b - a for a, b in zip(ends, ends[1:])} <= {max(1, n//300), -(-n//300)}


def test_pictures_are_examined_without_a_tokenizer():
    from ftlab.adapters.subsets.difffit import difffit
    from ftlab.lab.digits import digits, flow, load
    for model, data, recipe in ((load('digits-vit'), digits(), Recipe('full')),
                                (load('digits-flow'), digits((8, 9), 'classes'), difffit()*flow())):
        d = doctor(model, None, data, recipe, steps=60, batch_size=32)
        run = fit(model, None, data, recipe, steps=4, batch_size=32, progress=False)
        e = doctor(run)
        assert not d and not e and {'learning-rate', 'zero-gradient'} <= set(d.ran) and 'nothing-moved' in e.ran, (d, e)
        assert 'no tokenizer' in ' '.join(d.skipped.values())


@pytest.mark.parametrize(
    'call, error, says',
    [(lambda: doctor(trained(steps=2), TOK), ValueError, r'call doctor\(run\)'),
     (lambda: doctor(toy()), ValueError, 'model, tok and data'),
     (lambda: doctor(toy(), TOK, lab_data(), exported='x'), ValueError, 'needs a finished run to compare'),
     (lambda: doctor(toy(), TOK, lab_data(), epochs=3), TypeError, "no setting 'epochs'"),
     (lambda: doctor('lab-s', TOK, lab_data()), ValueError, "model is 'lab-s', a name; load it first"),
     (lambda: doctor(toy(), TOK, lab_data(), 'lora'), ValueError,
      "recipe is 'lora'; give a Recipe"),
     (lambda: doctor('nowhere'), FileNotFoundError, "no folder 'nowhere'")])
def test_arguments_that_do_not_fit(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_planted_leaves_the_function_as_it_is():
    @check('before', 'note', why='w', fix='f', source='a/b#1')
    def my_check(case):
        return 'seen'

    @planted(my_check, 'se+n')
    def _my_case():
        return {}

    assert (my_check.check.planted[0].make is _my_case
            and my_check.check.planted[0].name == 'my case' and my_check(None) == 'seen')


# ---------- on the command line

def command(capsys, text):
    from ftlab.cli import main
    code = main(text.split())
    return code, capsys.readouterr()


def test_command_says_what_it_found_and_ends_with_one_for_an_error(capsys, tmp_path):
    code, said = command(capsys, 'doctor --model lab-s --data new-procedure --method lora')
    assert code == 0 and 'nothing found' in said.out
    code, said = command(capsys, 'doctor --model lab-s --data new-procedure --max-length 9 --json')
    found = json.loads(said.out)
    assert code == 1 and found['errors'] >= 1 and 'answers-cut' in [f['name'] for f in found['findings']]
    code, said = command(capsys, 'doctor --model lab-s')
    assert code == 1 and '--model and --data' in said.err
    code, said = command(
        capsys, f'fit --model lab-s --data new-procedure --method lora --steps 3 --items 2 --out {tmp_path}/run')
    assert code == 0
    code, said = command(capsys, f'doctor {tmp_path}/run --json')
    found = json.loads(said.out)
    assert (code == 0 and found['when'] == 'after' and not found['findings']
            and 'reload-differs' in found['ran'])
    assert doctor(tmp_path/'run').json() == found  # the folder will do in Python, too
    ftlab.load('lab-s')[0].save_pretrained(tmp_path/'base')
    code, said = command(capsys, f'doctor {tmp_path}/run --exported {tmp_path}/base')
    assert code == 1 and "its logits are the base's" in said.out


# ---------- a sample of the sweep

sys.path.insert(0, str(Path(__file__).parent.parent/'bench'))
SAMPLE = [('hft', 'new-facts', 'qwen2'),
          ('dft', 'tool', 'gpt2'),
          ('lora', 'review', 'bert'),
          ('full', 'stack', 'opt'),
          ('lora', 'boxes', 'phi'),
          ('full', 'oruk', 'gemma')]


@pytest.mark.parametrize('recipe, skill, model', SAMPLE)
def test_no_false_alarm_in_a_sample_of_the_sweep(recipe, skill, model):
    import doctor_sweep
    row = doctor_sweep.one(recipe, skill, model)
    assert row['before']['findings'] == [] == row['after']['findings'], row


def test_the_sweep_covers_everything_and_its_table_is_silent():
    import doctor_sweep
    from ftlab.lab.world import SKILLS
    runs, names = doctor_sweep.plan(), set(methods.names())
    on_lab = [r for r, s, m in runs if m == 'lab-s']
    assert (set(on_lab) == names and all(on_lab.count(n) == 1 for n in names - {'full'})), (
        'each method runs once on lab-s')
    assert len(runs) <= len(names) + len(SKILLS) + 24
    assert {r[1] for r in runs} == set(SKILLS) and len(doctor_sweep.ARCHITECTURES) == 10
    assert {*doctor_sweep.ARCHITECTURES, 'lab-s'} == {r[2] for r in runs}
    table = json.loads((doctor_sweep.ROOT/'bench'/'results'/'doctor_sweep.json').read_text())
    most = table['most_seconds_on_lab_s']
    said = [f for x in table['table'] for w in ('before', 'after') for f in x[w]['findings']]
    sure = sum(len(x['confirmed']) for x in table['table'])
    assert (len(said) == sure == table['confirmed']
            and table['false_alarms'] == 0 == table['refused']
            and table['runs'] == len(table['table']))
    assert most['before'] < 5 and most['after'] < 20


def test_the_sweep_counts_only_checks_that_a_run_of_ours_has(tmp_path):
    import doctor_sweep
    elsewhere = sum(k.when == 'elsewhere' for k in CHECKS)
    assert 0 < elsewhere == len(CHECKS) - doctor_sweep.result_of([], {})['checks']
    row = dict(recipe='full', skill='max', model='lab-s')
    for checks, kept in ((len(CHECKS) - elsewhere, [row]), (len(CHECKS), [])):
        (tmp_path/'x.json').write_text(json.dumps(dict(checks=checks, table=[row])))
        assert doctor_sweep.kept(tmp_path/'x.json', [tuple(row.values())]) == kept


def test_a_new_method_changes_no_other_run_of_the_sweep(monkeypatch):
    import doctor_sweep
    before, names = doctor_sweep.plan(), methods.names()
    monkeypatch.setattr(methods, 'names', lambda: ['aaa', *names, 'zzz'])
    after = doctor_sweep.plan()
    assert (set(before) < set(after) and {r[0] for r in set(after) - set(before)} == {'aaa', 'zzz'}
            and len(after) == len(before) + 2)
    monkeypatch.setattr(methods, 'names', lambda: [n for n in names if n != 'hft'])
    assert set(before) - set(doctor_sweep.plan()) == {
        next(r for r in before if r[0] == 'hft' and r[2] == 'lab-s')}
