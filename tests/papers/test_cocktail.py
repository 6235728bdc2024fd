"The cocktail: exact shares, what is drawn and when, contributions against brute force, and the edges of its arguments"
from collections import Counter
from itertools import islice, permutations
import random
import pytest
import torch
from ftlab.core.data import Data, data
from ftlab.core.tokens import encode_all
from ftlab.lab.models import lab_tokenizer
from ftlab.trainers.curation.cocktail import (Mixed, cocktail, contributions, mixed, mixing_grid,
                                              shapley, shares_of, side_effects, turns)
from ftlab.trainers.fit import fit
from ftlab.trainers.source import Rows
from tests.toys import TOK, assert_resumes, lab_data, label_data, classifier, same, toy, weights

SETTINGS = dict(steps=4, batch_size=8, progress=False, lr=1e-3)


def rows(n, word='sort', letters='abcdefghij'):
    return [dict(prompt=f'{word} {a} {b}', response=f'{min(a, b)} {max(a, b)}')
            for a in letters for b in letters][:n]


def shares(k, seed):
    draw = random.Random(seed)
    parts = [draw.random()**3 + 1e-3 for _ in range(k)]
    return [p/sum(parts) for p in parts]


# ---------- shares

@pytest.mark.parametrize('k', [1, 2, 3, 5, 9])
def test_no_task_is_ever_a_row_ahead_or_behind(k):
    "Tijdeman's bound, for all tasks and all lengths at once; a single task is always drawn"
    bound = 1 - 1/max(1, 2*k - 2)
    for seed in range(6):
        p, drawn = shares(k, seed), [0]*k
        for t, pick in enumerate(islice(turns(p), 700), 1):
            drawn[pick] += 1
            assert max(abs(n - s*t) for n, s in zip(drawn, p)) <= bound + 1e-6
        assert sum(drawn) == 700


def test_equal_shares_go_round_and_round():
    seen = list(islice(turns([.25]*4), 400))
    assert all(sorted(seen[i:i + 4]) == [0, 1, 2, 3] for i in range(0, 400, 4))


@pytest.mark.parametrize('wrong', [[], [.5], [.5, .6], [1., 0.], [1.5, -.5], [float('nan'), .5]])
def test_shares_must_be_shares(wrong):
    with pytest.raises(ValueError, match='must be above 0'):
        next(turns(wrong))


@pytest.mark.parametrize('p', [[.4999996]*2, [.5000004]*2, [.3333333]*3])
def test_shares_that_are_rounded_are_drawn_as_if_they_were_not(p):
    assert Counter(islice(turns(p), 600*len(p))) == dict.fromkeys(range(len(p)), 600)


def test_general_rows_alone_are_no_cocktail():
    with pytest.raises(ValueError, match='rows of a target'):
        shares_of(dict(general=5, math=3))


def test_shares_from_sizes_and_from_weights():
    sizes = dict(target=30, a=90, general=5000, math=1)
    found = shares_of(sizes)
    assert found == pytest.approx(dict(target=.7/4, a=.7*3/4, general=.2, math=.1))
    assert list(found) == list(sizes)
    assert shares_of(sizes, dict(target=3)) == pytest.approx(
        dict(target=.7*3/4, a=.7/4, general=.2, math=.1))
    assert shares_of(sizes, dict(target=1, a=1), .5, .3) == pytest.approx(
        dict(target=.1, a=.1, general=.5, math=.3))
    assert shares_of(dict(target=7)) == dict(target=1.)


@pytest.mark.parametrize('more, said', [
    (dict(weights=dict(b=1)), 'must name target, a'), (dict(weights=dict(general=1)), 'must name target, a'),
    (dict(weights=dict(a=0)), "weight of 'a' is 0"), (dict(weights=dict(a=True)), "weight of 'a'"),
    (dict(weights=dict(a=float('nan'))), "weight of 'a'"), (dict(weights=dict(a='1')), "weight of 'a'"),
    (dict(general=1.), 'below 1'), (dict(general=0.), 'above 0'), (dict(general='.2'), 'above 0'),
    (dict(general=float('nan')), 'above 0'), (dict(math=.1), "no task is called 'math'")])
def test_wrong_shares_are_refused(more, said):
    with pytest.raises(ValueError, match=said):
        shares_of(dict(target=2, a=2, general=2), **more)


def test_general_and_math_must_leave_something():
    with pytest.raises(ValueError, match='leave a share'):
        shares_of(dict(target=1, general=1, math=1), general=.6, math=.4)


# ---------- the source

def coded(n, first=0):
    return [dict(input_ids=[first + i], labels=[first + i]) for i in range(n)]


def test_each_task_has_whole_passes_of_its_own_and_the_target_those_of_plain_fine_tuning():
    tasks = dict(target=coded(5), a=coded(5, 100), b=coded(12, 200))
    p = dict(target=.3, a=.2, b=.5)
    source, plain = Mixed(tasks, p, 10, seed=4), Rows(tasks['target'], 5, seed=4)
    drawn = [x for step in range(30) for x in source.drawn(step)]
    assert Counter(name for name, _ in drawn) == dict(target=90, a=60, b=150)
    for name, n in (('target', 5), ('a', 5), ('b', 12)):
        own = [i for x, i in drawn if x == name]
        assert all(sorted(own[j:j + n]) == list(range(n)) for j in range(0, len(own) - n, n))
    own = [i for x, i in drawn if x == 'target']
    state = type('State', (), {})
    for step in range(18):
        state.step = step
        there = plain.next(state)[0]['input_ids'][:, 0].tolist()
        assert there == own[5*step:5*step + 5]
    assert [i for x, i in drawn if x == 'a'] != own[:60]  # of as many rows, in another order


def test_a_step_does_not_depend_on_what_was_asked_before():
    tasks, p = dict(target=coded(7), a=coded(3)), dict(target=.6, a=.4)
    made = lambda seed=0: Mixed(tasks, p, 8, seed=seed)
    late, early = made(), made()
    for step in range(9):
        early.drawn(step)
    assert late.drawn(9) == early.drawn(9) == late.drawn(9) != made(1).drawn(9)


@pytest.mark.parametrize('tasks, p', [(dict(target=coded(2), a=[]), dict(target=.5, a=.5)),
                                      (dict(target=coded(2)), dict(a=1.)),
                                      (dict(target=coded(2), a=coded(1)), dict(a=.5, target=.5))])
def test_rows_and_shares_must_be_of_the_same_tasks(tasks, p):
    with pytest.raises(ValueError, match='the same tasks'):
        Mixed(tasks, p, 2)


def test_without_tasks_it_is_plain_fine_tuning():
    runs = [fit(toy(), TOK, lab_data(), r, **SETTINGS) for r in (cocktail(), None)]
    assert same(*(weights(r.model) for r in runs)) and runs[0].log == runs[1].log


def test_a_run_is_resumed(tmp_path):
    recipe = cocktail(dict(a=rows(9), general=rows(5, 'max')))
    assert_resumes(lambda **more: fit(toy(), TOK, lab_data(), recipe, **SETTINGS | more), tmp_path)


def test_the_rows_that_are_trained_on_are_those_of_the_tasks():
    seen = []
    class Texts:
        def after_backward(self, state):
            seen.extend(TOK.decode(i[m.bool()]) for b in state.batches
                        for i, m in zip(b['input_ids'], b['attention_mask']))
    recipe = cocktail(dict(a=rows(9), general=data('add', n=60)), dict(target=1, a=3), general=.5)
    run = fit(toy(), TOK, lab_data(), recipe, callbacks=(Texts(),), **SETTINGS)
    texts = {' '.join(TOK.decode(r['input_ids']).split()): k for k, of in run.source.tasks.items()
             for r in of}
    found = Counter(texts[' '.join(t.split())] for t in seen)
    assert found == dict(target=4, a=12, general=16)


def test_labels_and_plain_texts_are_mixed_as_well():
    train = label_data().train
    wrong = cocktail(dict(a=[dict(text='max a', label=3)]))
    with pytest.raises(ValueError, match='positions in a, b, c'):
        fit(classifier(), TOK, label_data(), wrong, **SETTINGS)
    right = cocktail(dict(a=[dict(r, text=f'{r["text"]} and') for r in train[:6]]))
    run = fit(classifier(), TOK, label_data(), right, **SETTINGS)
    assert len(run.log) == 4
    plain = Data([dict(text='sort b a c'), dict(text='max a')], [], [], 'lm')
    run = fit(toy(), TOK, plain, cocktail(dict(a=[dict(text='last a b')])), **SETTINGS)
    assert run.source.shares == pytest.approx(dict(target=2/3, a=1/3))


@pytest.mark.parametrize('tasks, said', [
    (dict(a=[dict(text='sort b a')]), "task 'a'.*of kind 'text'"), (dict(a=['sort b a']), "task 'a'"),
    (dict(a=[dict(prompt='sort b a')]), "task 'a'"), (dict(a=label_data()), "kind 'label'")])
def test_rows_of_another_kind_are_refused(tasks, said):
    with pytest.raises(ValueError, match=said):
        fit(toy(), TOK, lab_data(), cocktail(tasks), **SETTINGS)


def test_other_labels_and_test_questions_are_refused():
    other = data([dict(text=r['text'], label='xyz'[r['label']]) for r in label_data().train])
    with pytest.raises(ValueError, match="labels \\['x', 'y', 'z'\\]"):
        fit(classifier(), TOK, label_data(), cocktail(dict(a=other)), **SETTINGS)
    with pytest.raises(ValueError, match='2 rows whose questions'):
        fit(toy(), TOK, lab_data(), cocktail(dict(a=rows(3) + lab_data().test[:2])), **SETTINGS)


@pytest.mark.parametrize('tasks, said', [
    ([rows(2)], 'rows by name'), ('sort', 'rows by name'), ({1: rows(2)}, 'rows by name'),
    (dict(target=rows(2)), 'must not be'), (dict(a=[]), 'a list of rows'), (dict(a='sort'), 'a list of rows'),
    (dict(a=dict(prompt='a')), 'a list of rows')])
def test_wrong_tasks_are_refused(tasks, said):
    with pytest.raises(ValueError, match=said):
        cocktail(tasks)


def test_a_record_tells_mixtures_apart():
    told = [cocktail(t, **more).describe() for t, more in (
        (dict(a=rows(4)), {}), (dict(a=rows(4, 'max')), {}), (dict(b=rows(4)), {}),
        (dict(a=rows(3)), {}),
        (dict(a=rows(4)), dict(weights=dict(a=2.))), ({}, {}))]
    assert all(a != b for i, a in enumerate(told) for b in told[:i])
    assert told[0] == cocktail(dict(a=rows(4))).describe()
    two, three = (mixed((('a', rows(n)),)) for n in (2, 3))
    assert isinstance(hash(two), int) and two != three and two == mixed((('a', rows(2)),))


def test_a_tokenizer_of_an_encoder_gives_rows_too():
    coded_rows = encode_all(rows(3), lab_tokenizer(), 'text')
    source = Mixed(dict(target=coded_rows), dict(target=1.), 2, accumulate=2, pad_id=0)
    state = type('State', (), dict(step=1))
    assert [len(b['input_ids']) for b in source.next(state)] == [1, 1]


# ---------- what each task adds

def game(names, seed, targets):
    g = torch.Generator().manual_seed(seed)
    return mixing_grid(lambda mix: {t: float(torch.rand((), generator=g)) for t in targets}, names)


@pytest.mark.parametrize('target', ['a', 'elsewhere'])
@pytest.mark.parametrize('seed', range(3))
def test_shapley_values_are_the_mean_over_all_orders(seed, target):
    names = list('abcde')
    grid = game(names, seed, ['a', 'elsewhere'])
    others = [n for n in names if n != target]
    own = frozenset([target]) & frozenset(names)
    sums = dict.fromkeys(others, 0.)
    for line in permutations(others):
        for i, task in enumerate(line):
            had = own | set(line[:i])
            sums[task] += grid[had | {task}][target] - grid[had][target]
    found = shapley(grid, target)
    count = len(list(permutations(others)))
    assert found == pytest.approx({t: s/count for t, s in sums.items()})
    everything = grid[frozenset(names)][target] - grid[own][target]
    assert sum(found.values()) == pytest.approx(everything)


@pytest.mark.parametrize('seed', range(3))
def test_contributions_are_means_with_minus_means_without(seed):
    names, grid = list('abcd'), game(list('abcd'), seed, ['b', 'elsewhere'])
    for target in ('b', 'elsewhere'):
        found = contributions(grid, target)
        there = [mix for mix in grid if target not in names or target in mix]
        mean = lambda mixes: sum(grid[m][target] for m in mixes)/len(mixes)
        for task in found:
            gap = mean([m for m in there if task in m]) - mean([m for m in there if task not in m])
            assert found[task] == pytest.approx(gap)


def test_where_tasks_only_add_up_both_are_the_summands():
    gain = dict(a=.3, b=-.1, c=0.)
    grid = mixing_grid(lambda mix: dict(x=.2 + sum(gain[k] for k in mix)), list(gain))
    assert contributions(grid, 'x') == pytest.approx(gain) == shapley(grid, 'x')


def test_two_tasks_that_only_work_together_share_the_credit_and_an_idle_one_has_none():
    grid = mixing_grid(lambda mix: dict(x=float({'a', 'b'} <= set(mix))), ['a', 'b', 'idle'])
    assert shapley(grid, 'x') == pytest.approx(dict(a=.5, b=.5, idle=0.))


def test_a_grid_may_lack_mixes_but_not_for_shapley_values():
    grid = game(list('abc'), 0, ['x'])
    part = {mix: v for mix, v in grid.items() if mix != frozenset('abc')}
    assert contributions(part, 'x')['a'] == pytest.approx(
        sum(part[m | {'a'}]['x'] - part[m]['x'] for m in map(frozenset, ('', 'b', 'c')))/3)
    with pytest.raises(ValueError, match='7 mixes .* needs all 8'):
        shapley(part, 'x')
    with pytest.raises(ValueError, match="with and without 'a'"):
        contributions({frozenset('a'): dict(x=1.), frozenset('b'): dict(x=1.)}, 'x')
    for of in (shapley, contributions):
        with pytest.raises(ValueError, match="no score of 'y'"):
            of(grid, 'y')
        with pytest.raises(ValueError, match="no score of 'y'"):
            of({}, 'y')


def test_wrong_grids_are_refused():
    fine = lambda mix: dict(x=1.)
    for tasks in ([], 'ab', ['a', 'a'], [str(i) for i in range(9)]):
        with pytest.raises(ValueError, match='different names'):
            mixing_grid(fine, tasks)
    for score in (lambda mix: dict(x=float('nan')), lambda mix: {},
                  lambda mix: {f'x{len(mix)}': 1.}):
        with pytest.raises(ValueError, match='finite score of the same targets'):
            mixing_grid(score, ['a', 'b'])
    assert len(mixing_grid(fine, list('abc'))) == 8


def test_side_effects_are_flips():
    found = side_effects(dict(a=[1, 1, 0, 0], b=[1., 1.]), dict(a=[1, 0, 0, 1], b=[0., 0.]))
    assert found['lost']['share'] == pytest.approx((.25 + 1)/2)
    assert found['won']['share'] == pytest.approx(.25/2) and found['sets'] == 2
    with pytest.raises(ValueError, match='must be the same'):
        side_effects(dict(a=[1]), dict(b=[1]))
    with pytest.raises(ValueError, match='no set'):
        side_effects({}, {})
