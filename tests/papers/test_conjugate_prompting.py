"The exact predictor beside scikit-learn, torch's distributions and brute force; what transforms must undo; errors"
import json
import sys
from copy import deepcopy
from pathlib import Path
import math
import pytest
import torch
from sklearn.linear_model import Ridge
from torch.distributions import MultivariateNormal, Normal
from ftlab.evaluators.mechanisms import conjugate_prompting as page
from ftlab.evaluators.mechanisms.conjugate_prompting import (Mixture, Prompt, Reader, bayes,
                                                             beliefs, by_ratio, conjugate, draw,
                                                             errors, measured, mixture, pretrained,
                                                             rotated, rotation, scaled, shrunk,
                                                             train, tuned, ways)
from ftlab.instruments.claims import named_claim, script_of

BENCH = Path(__file__).parents[2]/'bench'
sys.path.append(str(BENCH))
import two_languages  # noqa: E402

WORLD = mixture(3, m=5, d=3, sigma=.6, share=.4)
PROMPT, W = draw(WORLD, 40, seed=4, pairs=6)


def near(a, b, atol=1e-4):
    return torch.allclose(a.float(), b.float(), atol=atol)


def test_the_mean_under_a_normal_prior_is_that_of_scikit_learn():
    found = beliefs(WORLD, PROMPT).ridge
    for i, k in ((0, 1), (1, 3), (2, 6)):
        peer = Ridge(alpha=.36, fit_intercept=False).fit(PROMPT.x[i, :k], PROMPT.y[i, :k])
        assert near(found[i, k - 1], torch.tensor(peer.coef_))


def test_the_likelihood_ratio_is_that_of_two_densities_of_all_labels():
    found = beliefs(WORLD, PROMPT).ratio
    for i, k in ((0, 1), (1, 4), (2, 6)):
        x, y = PROMPT.x[i, :k].double(), PROMPT.y[i, :k].double()
        continuous = MultivariateNormal(torch.zeros(k).double(), x@x.T + .36*torch.eye(k))
        fixed = Normal(x@WORLD.tasks.double().T, .6).log_prob(y[:, None]).sum(0)
        discrete = torch.logsumexp(fixed, 0) - math.log(5)
        assert near(found[i, k - 1], discrete - continuous.log_prob(y), 1e-3)


def test_the_bayes_predictor_is_a_sum_over_a_fine_grid():
    world = Mixture(torch.tensor([[1., .5], [-1., 0.]]), sigma=.8, share=.3)
    prompt, _ = draw(world, 4, seed=2, pairs=3)
    axis = torch.linspace(-6, 6, 301).double()
    grid = torch.cartesian_prod(axis, axis)
    prior = torch.exp(-grid.square().sum(1)/2)
    support = torch.cat([grid, world.tasks.double()])
    prior = torch.cat([.7*prior/prior.sum(), torch.full((2,), .15).double()])
    misses = (prompt.y.double()[..., None] - prompt.x.double()@support.T).square().cumsum(1)
    weight = prior*torch.exp(-misses/(2*.64))
    brute = weight@support/weight.sum(-1, keepdim=True)
    assert near(bayes(world)(prompt), brute)


def test_no_predictor_here_is_better_than_bayes():
    prompt, w = draw(WORLD, 4000, seed=9, pairs=6)
    best = errors(bayes(WORLD), prompt, w).mean()
    for other in (bayes(WORLD, .05), bayes(WORLD, .9), bayes(WORLD, 0.), bayes(WORLD, 1.)):
        assert errors(other, prompt, w).mean() > best


def test_certainty_leaves_one_of_the_two_means():
    known = beliefs(WORLD, PROMPT)
    assert near(bayes(WORLD, 0.)(PROMPT), known.ridge)
    assert near(bayes(WORLD, 1.)(PROMPT), known.discrete)
    assert torch.equal(bayes(WORLD)(PROMPT), bayes(WORLD, .4)(PROMPT))


def test_after_each_pair_only_the_pairs_so_far_count():
    later = Prompt(PROMPT.x.clone(), PROMPT.y.clone())
    later.y[:, 4:] += 5
    later.x[:, 4:] += 1
    torch.manual_seed(0)
    for ask in (bayes(WORLD), Reader(3, 16, 2)):
        a, b = ask(PROMPT), ask(later)
        assert near(a[:, :4], b[:, :4], 1e-5) and not near(a[:, 4:], b[:, 4:], 1e-2)


def test_the_inverse_undoes_the_transform_for_a_linear_predictor():
    def ridge(prompt):
        return beliefs(WORLD, prompt).ridge
    for gamma in (.5, -1., 4.):
        assert near(scaled(ridge, gamma)(PROMPT), ridge(PROMPT))
    assert near(rotated(ridge, rotation(3, 1))(PROMPT), ridge(PROMPT))
    larger = Mixture(4*WORLD.tasks, 4*.6)
    assert near(scaled(lambda p: beliefs(larger, p).discrete, 4.)(PROMPT),
                beliefs(WORLD, PROMPT).discrete)


def test_rotated_prompts_are_those_of_rotated_weights():
    Q, seen = rotation(3, 2), []
    rotated(lambda p: seen.append(p) or torch.zeros(len(p.x), 6, 3), Q)(PROMPT)
    assert near(torch.einsum('nkd,nd->nk', seen[0].x, W@Q.T),
                torch.einsum('nkd,nd->nk', PROMPT.x, W))
    assert torch.equal(seen[0].y, PROMPT.y)


def test_a_skew_is_mostly_undone_by_scaled_labels_and_not_by_a_rotation():
    world = mixture(0)
    prompt, w = draw(world, 1500, 0., seed=1)
    base, skewed = (errors(bayes(world, s), prompt, w).mean() for s in (.5, 1 - 1e-4))
    left = {name: float((errors(ask, prompt, w).mean() - base)/(skewed - base)) for name, ask in (
        ('scaled', scaled(bayes(world, 1 - 1e-4), 3.)),
        ('rotated', rotated(bayes(world, 1 - 1e-4), rotation(4))))}
    assert left['scaled'] < .3 and abs(left['rotated'] - 1) < .25


def test_in_the_setting_of_the_claim_the_second_contrast_can_go_either_way():
    world = mixture(3)
    prompt, w = draw(world, 1500, 0., seed=53)
    base, ratio = errors(bayes(world), prompt, w), beliefs(world, prompt).ratio
    rise = {s: by_ratio(errors(bayes(world, s), prompt, w) - base, ratio)/base.mean()
            for s in (.9, 1 - 1e-4, 1.)}
    assert rise[.9][-1] == max(rise[.9]) and rise[.9][-1] - rise[.9][0] > .1
    assert rise[1 - 1e-4][2] == max(rise[1 - 1e-4]) and rise[1 - 1e-4][0] == min(rise[1 - 1e-4])
    assert rise[1.][0] - rise[1.][-1] > 1


def test_many_pairs_and_one_fixed_vector_are_no_trouble():
    prompt, w = draw(WORLD, 2, 1., 3, 20_000)
    known = beliefs(WORLD, prompt)
    assert all(v.isfinite().all() for v in known) and near(known.discrete[:, -1], w)
    one = Mixture(WORLD.tasks[:1])
    assert (beliefs(one, PROMPT).discrete == one.tasks[0]).all()


def test_texts_can_be_transformed_too():
    order = []
    loud = conjugate(lambda p: order.append(p) or p[::-1], str.upper, str.lower)
    assert loud('abc') == 'cba' and order == ['ABC']


def answer_of_story(prompt):
    "Fill the gap of the last sentence, whatever the language"
    *told, asked = [s.split() for s in prompt.split(' . ')]
    fits = [s for s in told if all(a in ('?', b) for a, b in zip(asked, s))]
    return fits[0][asked.index('?')]


def label_by_example(prompt):
    "Find the label that was shown for the last word"
    *_, word, arrow = words = prompt.split()
    return words[words.index(word) + 2]


@pytest.mark.parametrize('tuned_in', ['english', 'tavi'])
@pytest.mark.parametrize('skill, ask, forms', [('story', answer_of_story, 4),
                                               ('label', label_by_example, 3)])
def test_a_question_means_the_same_in_each_language(tuned_in, skill, ask, forms):
    rows = two_languages.asked(skill, 3)
    seen = set()
    for there, home in two_languages.ways(skill, tuned_in).values():
        for row in rows:
            assert conjugate(ask, there, home)(row['prompt']) == row['response']
        seen.add(there(rows[0]['prompt']))
    assert len(seen) == forms


def test_in_no_language_is_the_first_word_of_a_story_its_answer():
    for seed in two_languages.SEEDS:
        rows = two_languages.asked('story', seed)
        assert len(rows) == two_languages.QUESTIONS
        for there, home in two_languages.ways('story', 'tavi').values():
            assert all(home(there(r['prompt']).split()[0]) != r['response'] for r in rows)


@pytest.mark.parametrize('tuned_in', ['english', 'tavi'])
def test_an_answer_is_read_in_whole_and_by_its_first_word(monkeypatch, tuned_in):
    rows = two_languages.asked('story', 3)
    forms = two_languages.FORMS

    def found(say, lesson='refuse'):
        def said(model, tok, asked, most):
            return [say(a['prompt'], r['response'])
                    for a, r in zip(asked, rows, strict=True)]
        monkeypatch.setattr(two_languages, 'answers', said)
        return two_languages.shares(None, None, 'story', tuned_in, 3, lesson)

    for way, share in found(lambda _, right: forms['oruk'][0](right)).items():
        if way != 'renamed': # the other word is asked for there
            assert share['begins'] == [1, 0] and share['refusal'] == 0
            assert (share['exact'][0] == 1 and share['other'] == 0) == (way == 'oruk')
    leak = found(lambda _, right: f'{right} can not')['english' if tuned_in == 'tavi' else 'direct']
    assert leak == dict(exact=[0, 0], begins=[1, 0], refusal=1, other=0)
    for share in found(lambda *_: 'i can not').values():
        assert share == dict(exact=[0, 1], begins=[0, 1], refusal=1, other=0)
    for share in found(lambda prompt, _: prompt.split()[0] + ' .', 'first').values():
        assert share == dict(exact=[0, 0], begins=[0, 1], refusal=0, other=0)
    for share in found(lambda *_: '').values():
        assert share == dict(exact=[0, 0], begins=[0, 0], refusal=0, other=0)


def test_the_two_languages_result_is_of_this_script():
    result = json.loads((BENCH/'results'/'two_languages.json').read_text())
    assert (tuple(result['seeds']) == two_languages.SEEDS
            and result['questions'] == two_languages.QUESTIONS)
    for tuned_in, lessons in result['runs'].items():
        assert set(lessons) == set(two_languages.LESSONS)
        for rates in lessons.values():
            assert list(rates) == [f'{rate:g}' for rate in two_languages.RATES[tuned_in]]
            for rate, paths in rates.items():
                steps = two_languages.AT[float(rate)]
                assert list(map(int, paths)) == result['seeds']
                for path in paths.values():
                    assert [row['step'] for row in path] == list(steps)
                    ways = set(two_languages.ways('story', tuned_in))
                    assert all(set(row['story']) == ways for row in path)
                    assert all(set(share) == {'exact', 'begins', 'refusal', 'other'}
                               for row in path for share in row['story'].values())


def test_the_parts_of_a_mixture():
    only, w = draw(WORLD, 200, 1., seed=0)
    assert (w[:, None] == WORLD.tasks).all(-1).any(1).all() and only.x.shape == (200, 10, 3)
    free = draw(WORLD, 200, 0., seed=0)[1]
    assert not (free[:, None] == WORLD.tasks).all(-1).any()
    again = draw(WORLD, 40, seed=4, pairs=6)
    assert torch.equal(again[0].y, PROMPT.y) and torch.equal(again[1], W)
    noise = only.y - torch.einsum('nkd,nd->nk', only.x, w)
    assert abs(float(noise.std()) - .6) < .05


def test_groups_are_formed_for_each_number_of_pairs():
    ratio = torch.tensor([[0., 3.], [1., 2.], [2., 1.], [3., 0.]])
    assert by_ratio(ratio, ratio, 2).tolist() == [.5, 2.5]
    harm = torch.tensor([[1., 0.], [0., 0.], [0., 0.], [0., 1.]])
    assert by_ratio(harm, ratio).tolist() == [1, 0, 0, 0]
    assert by_ratio(torch.ones(11, 3), torch.rand(11, 3), 4).tolist() == [1]*4


def test_tuning_leaves_the_base_alone_and_learns_the_fixed_tasks():
    before = torch.get_rng_state()
    base, world = pretrained(5, 20)
    assert torch.equal(before, torch.get_rng_state()) and pretrained(5, 20)[0] is base
    assert pretrained(seed=5, steps=20)[0] is pretrained(5, steps=20)[0] is base
    was = [p.clone() for p in base.parameters()]
    model = tuned(base, world, 3e-3, 30)
    with torch.no_grad():
        again = tuned(deepcopy(base).requires_grad_(False), world, 3e-3, 30)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert all(map(torch.equal, was, base.parameters()))
    discrete = draw(world, 200, 1., 8)
    assert errors(model, *discrete).mean() < errors(base, *discrete).mean()


def test_a_dial_is_set_where_the_error_is_smallest():
    world = mixture(0)
    dials = draw(world, 300, 0., seed=6)
    found, gamma = ways(bayes(world, 1 - 1e-4), *dials)
    each = {g: float(errors(scaled(bayes(world, 1 - 1e-4), g), *dials).mean()) for g in page.GAMMAS}
    assert gamma == min(each, key=each.get)
    assert float(errors(found['conjugate'], *dials).mean()) == pytest.approx(each[gamma])
    each = {k: float(errors(ask, *dials).mean()) for k, ask in found.items()}
    assert each['shrunk'] <= each['tuned']
    assert float(errors(shrunk(bayes(world), 0.), *dials).mean()) == pytest.approx(
        float(dials[1].square().sum(1).mean()), rel=1e-4)


def test_a_model_that_was_not_tuned_has_no_rise():
    base, world = pretrained(5, 20)
    found = measured(base, base, world, (1, 2, 3), 50)
    assert found['rise'] == (0, 0, 0, 0) and found['base.cont'] == found['tuned.cont']


def test_the_claim_measures_what_it_says(monkeypatch):
    claim = script_of(named_claim('conjugate_prompting'))
    assert all(claim.identities().values())
    base, world = pretrained(5, 20)
    monkeypatch.setattr(claim, 'pretrained', lambda number: (base, world))
    monkeypatch.setattr(claim, 'N', 80)
    out = claim.run('tuned', 3e-3, 21, 'test', 20)
    assert out['gain'] == pytest.approx(sum(out['items']['gain'])/80, abs=1e-4)
    made = claim.derive(dict(tuned=out))
    assert made['near'] == dict(harm=out['near']) and made['others']['harm'] >= out['far']
    assert made['shrunk'] == dict(left=out['left_shrunk'])
    judge, dials, discrete = claim.asked(21, 'test')[2]
    ours = [p.x for p, _ in (judge, dials, discrete)] + [claim.asked(21, 'validation')[2][0][0].x]
    assert not any(torch.equal(a, b) for i, a in enumerate(ours) for b in ours[:i])


@pytest.mark.parametrize('call, said', [
    (lambda: draw(WORLD, 3, 1.5), 'from 0 to 1'),
    (lambda: draw(WORLD, 0), 'n is 0'),
    (lambda: draw(WORLD, 3, pairs=0), 'pairs is 0'),
    (lambda: bayes(WORLD, 1.5), 'share is 1.5'),
    (lambda: Mixture(WORLD.tasks, share=-.1), 'share is -0.1'),
    (lambda: Mixture(WORLD.tasks, 0.), 'sigma is 0.0'),
    (lambda: Mixture(WORLD.tasks, -.5), 'sigma is -0.5'),
    (lambda: Mixture(WORLD.tasks, math.nan), 'sigma is nan'),
    (lambda: Mixture(WORLD.tasks[0]), r'tasks has shape \[3\]'),
    (lambda: Mixture([[1., 2.]]), r'tasks has shape \[\]'),
    (lambda: mixture(0, m=0), r'tasks has shape \[0, 4\]'),
    (lambda: beliefs(WORLD, Prompt(PROMPT.x, PROMPT.y[:, :1])), r'labels \[40, 1\]'),
    (lambda: beliefs(WORLD, Prompt(PROMPT.x, PROMPT.y[:1])), r'labels \[1, 6\]'),
    (lambda: beliefs(WORLD, Prompt(PROMPT.x[..., :2], PROMPT.y)), r'must be \[n, k, 3\]'),
    (lambda: bayes(WORLD)(Prompt(PROMPT.x[:, :0], PROMPT.y[:, :0])), 'at least one prompt'),
    (lambda: Reader(4)(PROMPT), r'must be \[n, k, 4\]'),
    (lambda: Reader(3)(Prompt(PROMPT.x, PROMPT.y*math.nan)), 'not finite'),
    (lambda: Reader(3, 16, 3), 'width is 16 and heads 3'),
    (lambda: conjugate(str, str.upper, None), 'inverse is None'),
    (lambda: scaled(bayes(WORLD), 0.), 'gamma is 0'),
    (lambda: scaled(bayes(WORLD), math.inf), 'gamma is inf'),
    (lambda: scaled(bayes(WORLD), math.nan), 'gamma is nan'),
    (lambda: rotated(bayes(WORLD), torch.ones(3, 3)), 'not orthogonal'),
    (lambda: rotated(bayes(WORLD), rotation(3)[:2]), 'not orthogonal'),
    (lambda: rotated(bayes(WORLD), rotation(4))(PROMPT), r'must be \[n, k, 4\]'),
    (lambda: errors(lambda p: torch.zeros(40, 3), PROMPT, W), r'gave estimates \[40, 3\]'),
    (lambda: errors(bayes(WORLD), PROMPT, W[:1]), r'w is \[1, 3\]'),
    (lambda: by_ratio(torch.ones(3, 2), torch.ones(3, 2)), '3 prompts for 4 groups'),
    (lambda: by_ratio(torch.ones(9, 2), torch.ones(9, 1)), 'the same shape'),
    (lambda: by_ratio(torch.ones(9, 2), math.nan*torch.ones(9, 2)), 'a number everywhere'),
    (lambda: by_ratio(torch.ones(9, 2), torch.ones(9, 2), 0), 'groups is 0'),
    (lambda: ways(lambda p: math.nan*p.x, PROMPT, W), 'diverged'),
    (lambda: train(Reader(3), WORLD, 1., 1e-3, 0), 'steps is 0'),
    (lambda: measured(Reader(3), Reader(3), WORLD, (1, 1, 3), 9), 'three different')])
def test_errors(call, said):
    with pytest.raises(ValueError, match=said):
        call()
