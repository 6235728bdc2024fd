"RL's Razor: which way the KL goes, what is counted, and what the arms learn from"
import numpy as np
import pytest
import torch
from toys import TOK, lab_data, toy

from ftlab.core.tokens import encode
from ftlab.core.recipe import Recipe
from ftlab.trainers.rl.grpo import clipped_policy
from ftlab.trainers.rl.razor import (another_order, answer_kl, explained, evaluations, other_order,
                                     own_answers, questions, weight_distance)


def other():
    "Another model than `toy()`, with other answers"
    model = toy(tied=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(.05*torch.randn(p.shape))
    return model


def rows():
    return [dict(prompt=r['prompt'], response=a)
            for r, a in zip(lab_data().train, ('a', 'b c', 'a b c d'), strict=False)]


def by_hand(base, tuned):
    "The mean over answers of the sum over their tokens, end included, of KL(base || tuned)"
    total = 0.
    for row in rows():
        e = encode(row, TOK, 'text')
        x = torch.tensor([e['input_ids']])
        with torch.no_grad():
            p, q = (m(x).logits[0].log_softmax(-1) for m in (base, tuned))
        for t, y in enumerate(e['labels'][1:]):
            if y != -100:
                total += float((p[t].exp()*(p[t] - q[t])).sum())
    return total/len(rows())


def test_the_kl_is_from_the_base_to_the_tuned_model_on_whole_answers():
    base, tuned = toy(tied=False), other()
    forward, backward = by_hand(base, tuned), by_hand(tuned, base)
    assert abs(forward - backward) > 1e-3*forward > 0
    for size in (1, 100):
        assert answer_kl(base, tuned, TOK, rows(), size) == pytest.approx(forward, rel=1e-4)
    assert answer_kl(tuned, base, TOK, rows()) == pytest.approx(backward, rel=1e-4)


def test_the_distance_of_weights_is_euclidean_over_all_of_them():
    base, tuned = toy(tied=False), other()
    gap = torch.cat([(p - q).flatten() for p, q in zip(base.parameters(), tuned.parameters())])
    assert weight_distance(base, tuned) == pytest.approx(float(gap.detach().norm()), rel=1e-5)


def test_what_is_explained_is_the_r_squared_of_a_parabola():
    draw = np.random.default_rng(0)
    points = [dict(kl=x, forgetting=x**2 - 3*x + e) for x, e in draw.normal(size=(9, 2))]
    x, y = (np.array([p[k] for p in points]) for k in ('kl', 'forgetting'))
    rest = y - np.polyval(np.polyfit(x, y, 2), x)
    assert explained(points, 'kl') == pytest.approx(1 - rest.var()/y.var())
    assert .1 < explained(points, 'kl') < .999


def test_the_base_s_own_answers_are_draws_that_a_seed_fixes():
    asked = [r['prompt'] for r in lab_data().train[:6]]
    state = torch.get_rng_state()
    one, same, another = (own_answers(toy(), TOK, asked, 4, seed) for seed in (0, 0, 1))
    assert one == same != another and [r['prompt'] for r in one] == asked
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('answer, right', [('a b c', 0.), ('c b a', 1.), ('a c b', 1.), ('c b', 0.),
                                           ('c b a a', 0.), ('', 0.)])
def test_any_other_order_of_the_same_letters_is_right(answer, right):
    assert other_order(dict(given='a b c'), answer) == right


def test_the_arms_differ_in_their_answers_alone(monkeypatch):
    asked = questions(8, 'train')
    said = [dict(prompt=r['prompt'], response=a) for r in asked
            for a in (r['given'], ' '.join(r['given'].split()[::-1]))]
    monkeypatch.setattr('ftlab.trainers.rl.razor.own_answers', lambda *a, **kw: said)
    setting = another_order(toy(), TOK, asked, questions(4, 'validation'), draws=2, old_items=1)
    (grpo, trial, _), (plain, given, high), (own, drawn, rate) = setting['arms'].values()
    assert grpo.objective == clipped_policy(beta=0.) and grpo.source.reward is other_order
    assert grpo.source.group == 8 and plain.objective is own.objective is None and high == rate
    assert [r['response'] for r in given.train] == [r['response'] for r in trial.train]
    assert all(other_order(r, r['response']) for r in drawn.train)
    palindromes = sum(r['given'].split() == r['given'].split()[::-1] for r in asked)
    assert len(drawn.train) == 8 - palindromes # the wrong half is left out


def test_a_model_that_is_never_right_has_no_answers_of_its_own_to_learn_from():
    with pytest.raises(ValueError, match='none of 8 answers that the model drew is right'):
        another_order(toy(), TOK, questions(8, 'train'), questions(4, 'validation'), draws=1)


def test_gain_is_a_rise_and_forgetting_a_fall():
    base = toy()
    first = {n: p.detach().clone() for n, p in base.named_parameters()}

    def moved(model):
        return float(sum((p.detach() - first[n]).abs().sum()
                         for n, p in model.named_parameters()))

    points = evaluations(base, TOK, dict(plain=(Recipe(), lab_data(), 1e-3)), learned=moved,
                   kept=lambda m: -2*moved(m), said=rows(), steps=4, every=2, batch_size=8)
    assert [p['step'] for p in points] == [0, 2, 4] and {p['arm'] for p in points} == {'plain'}
    assert all(points[0][k] == 0 for k in ('gain', 'forgetting', 'kl', 'moved'))
    for p in points[1:]:
        assert p['gain'] > 0 and p['forgetting'] == pytest.approx(2*p['gain'])
        assert p['kl'] > 0 and p['moved'] > 0
    assert moved(base) == 0


@pytest.mark.parametrize('points', [[], [dict(kl=0., forgetting=.1), dict(kl=1., forgetting=.1)]])
def test_nothing_explains_what_never_changes(points):
    with pytest.raises(ValueError, match=f'the same at all {len(points)} points'):
        explained(points, 'kl')
