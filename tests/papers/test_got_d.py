"GOT-D: its potentials against POT's, what they say about moving mass, what is chosen and read, errors"
import pytest
import torch
from ftlab.core.data import Data
from ftlab.core.tokens import encode_all
from ftlab.trainers.curation.got_d import (calibrated, choose, chosen_rows, dual, embed, encoded,
                                           got_d, read_chosen,
                                            squared)
from ftlab.trainers.fit import fit
from tests.toys import TOK, Texts, classifier, lab_data, same, toy, weights


def points(seed=0, n=12, m=30):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g), torch.randn(m, 4, generator=g) + .5


def value(C, b, eps):
    "The distance with masses `b` on the candidates: the dual at its maximum, found by plain iteration"
    n = len(C)
    f = torch.zeros(n).double()
    for _ in range(400):
        g = -eps*((f[:, None] - C)/eps - torch.log(torch.tensor(float(n)))).logsumexp(0)
        f = -eps*((g - C)/eps + b.log()).logsumexp(1)
    return float(f.mean() + (g*b).sum())


@pytest.mark.peer('dual', 'POT',
                  'potentials and plan of optimal transport',
                  tolerance=dict(potentials=1e-5, plan=1e-7))
@pytest.mark.parametrize('reg', [.2, 1.])
def test_the_potentials_are_those_of_pot(reg, tolerance):
    ot = pytest.importorskip('ot', reason='POT is in the bench extra')
    C = squared(*points())
    n, m = C.shape
    eps = reg*float(C.mean())
    plan, log = ot.bregman.sinkhorn_log(torch.full((n,), 1/n).double().numpy(),
                                        torch.full((m,), 1/m).double().numpy(),
                                        C.numpy(), eps, numItermax=3000, stopThr=1e-8, log=True)
    f, g = dual(C, eps, tol=1e-9, most=3000)
    theirs = torch.tensor(eps*log['log_v'])
    torch.testing.assert_close(calibrated(g), calibrated(theirs), rtol=0,
                               atol=tolerance['potentials'])
    torch.testing.assert_close(((f[:, None] + g - C)/eps).exp()/(n*m), torch.tensor(plan),
                               atol=tolerance['plan'], rtol=0)


def test_a_potential_tells_how_the_distance_changes_with_more_of_a_candidate():
    C = squared(*points(1, 6, 8))
    eps, m, h = .3*float(C.mean()), 8, 1e-4
    slope = calibrated(dual(C, eps, tol=1e-10, most=3000)[1])
    for j in (0, 3, 7):
        toward = torch.full((m,), -h/(m - 1)).double()
        toward[j] = h
        up, down = (value(C, 1/m + s*toward, eps) for s in (1, -1))
        assert (up - down)/(2*h) == pytest.approx(float(slope[j]), abs=1e-4)


def test_what_is_missing_is_chosen_and_the_nearest_are_not():
    target = torch.tensor([[0., 0.]]*5 + [[4., 0.]]*5)
    pool = torch.tensor([[0., .1]]*18 + [[4., 1.]]*2)
    assert set(choose(target, pool, 2)) == {18, 19}
    assert choose(target, pool, 2, 'nearest') == [0, 1]
    assert sorted(choose(target, pool, 20, 'random', seed=3)) == list(range(20))
    assert choose(target, pool, 5, 'random', seed=3) != choose(target, pool, 5, 'random', seed=4)


def test_points_do_not_depend_on_the_padding_and_the_model_stays_as_it_was():
    model, rows = toy().train(), encode_all(lab_data().train[:7]
                                            + [dict(prompt='sort b a c d e f', response='a')],
                                            TOK, 'text')
    before = weights(model)
    together = embed(model, rows, TOK.pad_token_id)
    alone = torch.cat([embed(model, [r], TOK.pad_token_id) for r in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert model.training and same(before, weights(model))
    assert embed(classifier(), rows).shape == (8, 32)


@pytest.mark.parametrize('by', ['got_d', 'nearest', 'random'])
def test_what_is_chosen_is_read_and_then_the_rows_are_tuned_on(by):
    pool = [dict(prompt=p, response=r) for p, r in (('sort b a', 'a b'), ('max a c', 'c'),
                                                    ('last b a', 'a'))]
    look = Texts()
    run = fit(toy(), TOK, lab_data(), got_d(pool + ['a b c'], budget=2, by=by), steps=4,
              batch_size=4, progress=False,
              callbacks=(look,))
    stage = read_chosen(tuple((r['prompt'], r['response']) for r in pool) + (('a b c', None),), 2,
                        by, .1)
    chosen = stage(context()).source.source.rows
    read = {TOK.decode(e['input_ids']) for e in encoded(chosen, TOK)}
    assert len(chosen) == 2 and set(look.seen[0]) == read and not set(look.seen[1]) & read
    assert len(run.settings['stages']) == 2 and '2 of 4' in repr(stage)


def context(data=None, **config):
    return type('Context', (), dict(model=toy(**config), tok=TOK, data=data or lab_data(),
                                    seed=0))()


def test_a_text_is_read_as_it_is_and_a_long_one_is_cut_not_left_out():
    pool = (('sort b a', None), ('sort b a', 'a b'), (' '.join('abc'*40), None), ('max a c', None))
    rows = [TOK.decode(e['input_ids']) for e in encoded(pool, TOK, 12)]
    assert 'user' not in rows[0] and 'sort b a' in rows[0] and '<assistant> a b' in rows[1]
    assert [len(e['input_ids']) for e in encoded(pool, TOK, 12)][2] == 12 and 'max' in rows[3]
    state = type('State', (), dict(settings=dict(batch_size=4, accumulate=1), seed=0, tok=TOK,
                                   limit=12, pad_id=0))()
    assert len(chosen_rows(pool)(state).rows) == 4


def test_without_candidates_the_rows_are_read_and_plain_texts_may_be_the_target():
    data = lab_data()
    few = read_chosen((), 3, 'got_d', .1)(context(data)).source.source.rows
    assert len(few) == 3 and set(few) <= {(r['prompt'], r['response']) for r in data.train}
    every = read_chosen((), 10**6, 'got_d', .1)(context(data)).source.source.rows
    assert len(every) == len(data.train)
    plain = Data([dict(text='sort b a c'), dict(text='max a')], [], [], 'lm')
    both = read_chosen((), 2, 'got_d', .1)(context(plain)).source.source.rows
    assert set(both) == {('sort b a c', None), ('max a', None)}


def test_twins_have_one_potential_and_are_chosen_together():
    target, pool = points(2, 5, 6)
    g = dual(squared(target, torch.cat([pool, pool])), 1.)[1]
    torch.testing.assert_close(g[:6], g[6:])
    first = choose(target, torch.cat([pool, pool]), 2)
    assert first[1] == first[0] + 6


def test_what_it_refuses():
    for wrong in (dict(by='best'), dict(budget=0), dict(budget=9), dict(budget=1.5), dict(reg=0.),
                  dict(share=0.)):
        with pytest.raises(ValueError, match='must be'):
            got_d(['a b', 'c'], **{'budget': 1} | wrong)
    for candidates, said in (('a text', 'list of'), (['a'], 'at least two'),
                             (['a', dict(text='b')], 'prompt and'),
                             (['a', ('b', 'c')], 'prompt and'), ((x for x in 'ab'), 'list of')):
        with pytest.raises(ValueError, match=said):
            got_d(candidates, budget=1)
    for C, eps in ((torch.zeros(3), 1.), (torch.full((2, 2), torch.nan), 1.),
                   (torch.zeros(2, 2), 0.)):
        with pytest.raises(ValueError, match='must be'):
            dual(C, eps)
    with pytest.raises(RuntimeError, match='raise reg'):
        dual(squared(*points()), 1e-3, most=3)
    with pytest.raises(ValueError, match='at least two'):
        calibrated(torch.zeros(1))
    with pytest.raises(ValueError, match='1 to 30'):
        choose(*points(), 31)
    target, pool = points()
    for x, y, said in ((target[:0], pool, 'at least one'), (target[:, :2], pool, 'of one width'),
                       (target, pool*torch.nan, 'finite'), (pool*0, pool*0, 'in one place')):
        for by in ('got_d', 'nearest'):
            with pytest.raises(ValueError, match=said):
                choose(x, y, 2, by)
