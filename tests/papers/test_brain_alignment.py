"Brain alignment: the map, the ceiling and the choice of the layer against other ways to compute them"
import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.linear_model import RidgeCV
from ftlab.beyond.brain import brain_alignment as brain
from ftlab.core.scorers import row_nlls
from ftlab.core.tokens import prompt_ids
from tests.toys import TOK, toy

DRAW = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _drawn_anew():
    "Each test draws the same numbers whichever ran before it"
    global DRAW
    DRAW = np.random.default_rng(0)


def standardised(x, by):
    return (x - by.mean(0))/by.std(0)


def closed_form(x, y, new, penalty):
    "Ridge on standardised features with a free intercept"
    a = standardised(x, x)
    w = np.linalg.solve(a.T@a + penalty*np.eye(a.shape[1]), a.T@(y - y.mean(0)))
    return standardised(new, x)@w + y.mean(0)


def test_the_map_is_ridge_in_closed_form(monkeypatch):
    monkeypatch.setattr(brain, 'ALPHAS', (3., 3.))
    x, y, new = DRAW.normal(size=(40, 6))*9, DRAW.normal(size=(40, 4)) + 5, DRAW.normal(size=(7, 6))
    np.testing.assert_allclose(brain.ridge(x, y, new), closed_form(x, y, new, 3.), atol=1e-8)


def test_each_voxel_has_the_penalty_that_leaves_out_one_stimulus_best():
    x = DRAW.normal(size=(25, 10))
    y = np.stack([x[:, 0] + .1*DRAW.normal(size=25), DRAW.normal(size=25)], 1)
    new = DRAW.normal(size=(5, 10))
    a = standardised(x, x)
    for v, found in enumerate(brain.ridge(x, y, new).T):
        errors = []
        for penalty in brain.ALPHAS:
            # the intercept is fitted with the stimulus that is left out, as scikit-learn does it
            b = y[:, v] - y[:, v].mean()
            hat = a@np.linalg.solve(a.T@a + penalty*np.eye(10), a.T) + 1/25
            errors.append(np.mean(((b - hat@b)/(1 - np.diag(hat)))**2))
        best = brain.ALPHAS[int(np.argmin(errors))]
        np.testing.assert_allclose(found, closed_form(x, y[:, v], new, best), atol=1e-8)


def test_with_groups_the_penalty_is_the_one_that_leaves_out_groups_best():
    groups = np.repeat(np.arange(12), 4)
    x = DRAW.normal(size=(12, 20))[groups] + .1*DRAW.normal(size=(48, 20))
    y, new = DRAW.normal(size=(12, 9))[groups] + .1*x[:, :9], DRAW.normal(size=(5, 20))
    a, b, chosen = standardised(x, x), standardised(new, x), []
    for v, found in enumerate(brain.ridge(x, y, new, groups).T):
        errors = [sum(((RidgeCV([p]).fit(a[i], y[i, v]).predict(a[j]) - y[j, v])**2).sum()
                      for i, j in brain.splits(48, groups, 3, 0)) for p in brain.ALPHAS]
        chosen.append(brain.ALPHAS[int(np.argmin(errors))])
        alone = RidgeCV([chosen[-1]]).fit(a, y[:, v])
        np.testing.assert_allclose(found, alone.predict(b), atol=1e-6)
    alone = RidgeCV(brain.ALPHAS, alpha_per_target=True).fit(a, y).alpha_
    assert np.median(alone) < np.median(chosen) # twins of a stimulus favour small penalties


def test_halves_that_disagree_have_no_ceiling_and_the_unit_has_no_say():
    x = DRAW.normal(size=(50, 2))
    assert not brain.ceiling(np.stack([x, -x, 0*x]), draws=1).any()
    np.testing.assert_allclose(brain.pearson(x*1e-9, x*1e9), 1)
    assert not brain.pearson(np.full((50, 2), .1), x).any()


def test_half_tells_the_truth_about_half_of_the_people():
    facts = brain.invented(2, people=10)
    told, rows = brain.taught(facts, 2), brain.lesson(facts, 'half', 2, 40)
    truth = {r['prompt']: r for r in brain.questions(facts, 'tune')}
    right = {p: np.mean([truth[r['prompt']]['response'] == r['response'] for r in rows
                         if truth[r['prompt']]['person'] == p]) for p in {p for p, _ in facts}}
    assert len(told) == 5 and all(right[p] == 1 for p in told)
    assert all(right[p] < .7 for p in right if p not in told)


@pytest.mark.peer('brain_alignment.pearson', 'scipy', 'correlations', tolerance=1e-12)
def test_correlation_is_scipys_and_a_constant_has_none(tolerance):
    x, y = DRAW.normal(size=(20, 3)), DRAW.normal(size=(20, 3))
    want = [pearsonr(a, b).statistic for a, b in zip(x.T, y.T)]
    np.testing.assert_allclose(brain.pearson(x, y), want, rtol=0, atol=tolerance)
    assert not brain.pearson(np.ones((20, 3)), y).any()


@pytest.mark.parametrize('noise', (.5, 2., 6.))
@pytest.mark.parametrize('repeats', (4, 5))
def test_the_ceiling_is_the_correlation_of_the_truth(noise, repeats):
    signal = DRAW.normal(size=(2000, 30))
    heard = signal + noise*DRAW.normal(size=(repeats, 2000, 30))
    true = brain.pearson(signal, heard.mean(0))
    assert abs(np.median(true) - np.median(brain.ceiling(heard, draws=20))) < .03
    assert abs(np.median(true) - (1 + noise**2/repeats)**-.5) < .03


def test_noise_alone_has_no_ceiling_worth_dividing_by():
    heard = DRAW.normal(size=(6, 300, 40))
    assert np.median(brain.ceiling(heard)) < .25
    with pytest.raises(ValueError, match='nothing to predict'):
        brain.aligned([DRAW.normal(size=(30, 2))], np.stack([np.ones((30, 3)), np.zeros((30, 3))]))


def test_groups_stay_together():
    groups = np.repeat(np.arange(12), 5)
    for a, b in brain.splits(60, groups, 4, 1):
        assert not set(groups[a]) & set(groups[b]) and len(a) + len(b) == 60


def test_what_only_says_who_leaks_in_random_folds_alone():
    groups = np.repeat(np.arange(20), 6)
    y = DRAW.normal(size=(20, 15))[groups] + .3*DRAW.normal(size=(120, 15))
    who = np.eye(20)[groups]
    assert np.median(brain.predictivity(who, y)) > .8
    assert np.median(brain.predictivity(who, y, groups)) < .1


def test_the_layer_with_the_signal_is_chosen_and_choosing_among_noise_wins_nothing():
    x = DRAW.normal(size=(80, 5))
    heard = x@DRAW.normal(size=(5, 20)) + DRAW.normal(size=(4, 80, 20))
    noise = [DRAW.normal(size=(80, 5)) for _ in range(12)]
    found = brain.aligned([*noise[:3], x, *noise[3:]], heard)
    assert set(found.chosen) == {3} and found.score > .9 and found.best_layer == found.score
    found = brain.aligned(noise, heard)
    assert found.best_layer > found.score and abs(found.score) < .2


def test_a_recording_is_the_same_for_the_same_seed_and_has_the_shares_it_says():
    rows = brain.questions(brain.invented(3), 'test')
    one, two, other = brain.record(rows, 1), brain.record(rows, 1), brain.record(rows, 2)
    assert (one.responses == two.responses).all() and (one.responses != other.responses).any()
    for name, share in brain.SHARES.items():
        np.testing.assert_allclose(one.parts[name].var(0), share, atol=1e-9)
    np.testing.assert_allclose(one.signal.std(0), 1)
    between = brain.pearson(one.parts['answer'], one.parts['relation'])
    np.testing.assert_allclose(between, 0, atol=1e-9)


def test_lessons_differ_in_their_answers_alone():
    facts = brain.invented(1, people=10)
    truth = {r['prompt']: r['response'] for r in brain.questions(facts, 'tune')}
    found = {arm: brain.lesson(facts, arm, 1, 20) for arm in brain.ARMS[1:]}
    prompts = [[r['prompt'] for r in rows] for rows in found.values()]
    assert prompts[0] == prompts[1] == prompts[2] and len(prompts[0]) == 640
    right = {arm: np.mean([truth[r['prompt']] == r['response'] for r in rows])
             for arm, rows in found.items()}
    assert right['facts'] == 1 and right['format'] < .5 and right['swapped'] < .7
    said = {}
    for r in found['swapped']:
        said.setdefault(r['prompt'], set()).add(r['response'])
    assert all(len(words) == 1 for words in said.values())
    asked = {s: {r['prompt'] for r in brain.questions(facts, s)} for s in brain.ASKED}
    assert not asked['tune'] & asked['test'] and not asked['validation'] & asked['test']


def test_half_can_be_told_of_the_people_who_are_given():
    facts = brain.acquainted(4, people=6)
    old = brain.known(facts)
    true, part = (brain.lesson(facts, arm, 4, 20, told=old) for arm in ('facts', 'half'))
    differ = [a['prompt'] for a, b in zip(true, part, strict=True) if a != b]
    assert len(old) == 6 and len({p for p, _ in facts}) == 12
    assert differ and not any(p in prompt.split() for prompt in differ for p in old)
    assert all(said == brain.WORLD.facts[k] for k, said in facts.items() if k[0] in old)


def test_a_reader_responds_to_pet_and_food_whatever_a_sentence_asks_for():
    facts = brain.acquainted(5, people=10)
    rows = brain.mentions(facts, 'test')
    heard = brain.record(rows, 5, shares=brain.READ)
    for name, share in brain.READ.items():
        np.testing.assert_allclose(heard.parts[name].var(0), share, atol=1e-9)
    for p in brain.known(facts):
        mine = [i for i, r in enumerate(rows) if r['person'] == p]
        assert len(mine) == 4 and {rows[i]['relation'] for i in mine} == set(brain.BESIDE)
        assert np.ptp(heard.parts['pet'][mine], axis=0).max() < 1e-9
    assert not {r['prompt'] for r in rows} & {r['prompt'] for r in brain.questions(facts, 'test')}


def test_a_mean_over_a_prompt_leaves_out_the_padding():
    model, prompts = toy(), ['what pet has Dabo ?', 'tell me the food of Dabo .']
    found = brain.states(model, TOK, prompts, mean=True)
    for i, p in enumerate(prompts):
        ids = torch.tensor([prompt_ids(dict(prompt=p, response=''), TOK)])
        with torch.no_grad():
            alone = model(ids, output_hidden_states=True).hidden_states
        for layer, h in zip(found, alone, strict=True):
            np.testing.assert_allclose(layer[i], h[0].mean(0), atol=1e-5)


def test_states_are_those_of_a_prompt_read_alone():
    model, prompts = toy(), ['what pet has Dabo ?', 'Dabo : food ?', 'name the pet of Dabo .']
    found = brain.states(model, TOK, prompts, batch_size=2)
    for i, p in enumerate(prompts):
        ids = torch.tensor([prompt_ids(dict(prompt=p, response=''), TOK)])
        with torch.no_grad():
            alone = model(ids, output_hidden_states=True).hidden_states
        for layer, h in zip(found, alone, strict=True):
            np.testing.assert_allclose(layer[i], h[0, -1], atol=1e-5)


def test_surprisal_leaves_out_the_end_mark():
    rows = brain.statements(brain.invented(1, people=3), 'test')
    whole = np.array([n for n, _ in row_nlls(toy(), TOK, rows)])
    found = brain.surprisal(toy(), TOK, rows)
    assert found.shape == whole.shape and (0 < found).all() and (found < whole).all()


def test_reading_times_follow_the_truth_and_the_letters():
    rows = brain.statements(brain.invented(1), 'test')
    times = brain.reading_times(rows)
    true = np.array([0. if r['true'] else 1. for r in rows])
    size = np.array([float(len(r['response'])) for r in rows])
    assert .9 < brain.reading_alignment(true, times) < 1.1
    assert 0 < brain.reading_alignment(size, times) < .6
    assert .4 < true.mean() < .6


@pytest.mark.parametrize('call, said', (
    (lambda: brain.predictivity(np.ones((4, 2)), np.ones((5, 2))), r'features are \[4, 2\] and responses \[5, 2\]'),
    (lambda: brain.predictivity(np.ones((9, 2)), np.ones((3, 9, 2))), 'average repeats first'),
    (lambda: brain.predictivity(np.full((9, 2), np.nan), np.ones((9, 2))), '9 stimuli have features that are NaN'),
    (lambda: brain.predictivity(np.ones((9, 2)), np.ones((9, 2)), [1, 2]),
     '2 groups and 9 stimuli'),
    (lambda: brain.predictivity(np.ones((9, 2)), np.ones((9, 2)), [1]*5 + [2]*4),
     'folds is 5 for 2 groups'),
    (lambda: brain.ceiling(np.ones((1, 9, 2))), 'at least 2'),
    (lambda: brain.ceiling(np.full((2, 9, 2), np.nan)), '9 stimuli have responses that are NaN'),
    (lambda: brain.predictivity(np.ones((9, 2)), np.ones((9, 0))), 'none of them 0'),
    (lambda: brain.aligned([np.ones((8, 2))], DRAW.normal(size=(1, 8, 2)) + np.zeros((4, 1, 1)),
                           [1, 1, 1, 1, 2, 2, 2, 2], 2), '2 groups in 2 folds leave fewer than 3'),
    (lambda: brain.ridge(np.ones((4, 2)), np.ones((4, 2)), np.ones((1, 2)), [1]*4), 'of one group'),
    (lambda: brain.states(None, TOK, 'what'), "prompts is 'what'; give a list"),
    (lambda: brain.record([]), 'no row to record'),
    (lambda: brain.invented(0, people=1000), 'people is 1000'),
    (lambda: brain.acquainted(0, people=100), 'people is 100; 55 are known'),
    (lambda: brain.exchanged({('Dabo', 'pet'): 'cat'}, 0), 'about 1 people'),
    (lambda: brain.statements({('Dabo', 'pet'): 'cat'}, 'test'), 'are one word'),
    (lambda: brain.reading_alignment(np.zeros(4), DRAW.normal(size=(5, 9))), '4. surprisals'),
    (lambda: brain.aligned([], DRAW.normal(size=(2, 9, 2))), 'there is no layer'),
    (lambda: brain.questions({}, 'dev'), "split is 'dev'; it must be tune, validation, test"),
    (lambda: brain.lesson({}, 'base', 0, 1), "arm is 'base'; it must be facts, half, format, swapped"),
    (lambda: brain.brain_alignment(rates=dict(fact=1.)), "rates has 'fact'; the arms are base, facts"),
))
def test_errors_say_what_would_be_right(call, said):
    with pytest.raises(ValueError, match=said):
        call()
