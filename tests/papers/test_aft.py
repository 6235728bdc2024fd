"aft: what its page cannot say about itself"
import math
import pytest
import torch
from ftlab import methods
from ftlab.core.data import data
from ftlab.core.recipe import Recipe
from ftlab.core.state import State
from ftlab.trainers.fit import fit
from ftlab.trainers.losses.aft import Groups, aft, align, ranking, sampled, scores
from ftlab.trainers.objective import kl_to_base, nll
from tiny import inputs_for, tiny
from toys import TOK, lab_data, toy

SETTINGS = dict(steps=3, batch_size=8, lr=1e-3, seed=0, progress=False)
TOY = methods.make_of('aft').paper.toy


def by_hand(good, bad, constraint, beta):
    "log(1 + sums over pairs), one pair at a time; what is a constant for the gradient is a number"
    total, low = 1., min(p.item() for p in good)
    for p in good:
        for n in bad:
            total = total + ((n.item() if constraint == 'detach' else n) - p).exp()
            if constraint == 'boundary':
                total = total + (2*low - 2*beta - p - n).exp()
    return total.log()


@pytest.mark.parametrize('constraint', ['boundary', 'detach', 'none'])
@pytest.mark.parametrize('sizes', [(1, 1), (3, 2), (2, 5)])
def test_value_and_gradient_are_those_of_the_formula(constraint, sizes):
    g = torch.Generator().manual_seed(0)
    good, bad = (torch.randn(n, generator=g, dtype=torch.float64).requires_grad_() for n in sizes)
    ours, theirs = ranking(good, bad, constraint, .3), by_hand(good, bad, constraint, .3)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-12)
    a, b = (torch.autograd.grad(x, (good, bad), allow_unused=True) for x in (ours, theirs))
    torch.testing.assert_close(a[0], b[0])
    if constraint == 'detach':
        assert a[1] is None
    else:
        torch.testing.assert_close(a[1], b[1])


def test_scores_far_apart_do_not_overflow_and_empty_sides_cost_nothing():
    far = ranking(torch.tensor([-200.]), torch.tensor([0.]), 'none')
    assert far.item() == pytest.approx(200.)
    x = torch.tensor([-1.], requires_grad=True)
    for good, bad in ((x, x[:0]), (x[:0], x)):
        loss = ranking(good, bad)
        assert loss.item() == 0 and torch.autograd.grad(loss, x)[0].item() == 0


def test_the_boundary_pushes_back_from_below():
    good = torch.tensor([-1., -.5])
    for bad, sign in ((-1.5, 1), (-1.15, 0), (-1.1, 1), (-1.3, -1)):
        b = torch.tensor([bad], requires_grad=True)
        g = torch.autograd.grad(ranking(good, b, 'boundary', .15), b)[0].item()
        if bad == -1.15:
            assert abs(g) < 1e-7
        else:
            assert g*(bad + 1.15) > 0


ROWS = [dict(prompt=f'reverse {a} {b} =', response=f'{b} {a}', right=[f'{b} {a} {a}'], wrong=[f'{a} {b}', 'c'])
        for a in 'abcde' for b in 'fghij']


class Keep:
    def after_backward(self, state):
        if state.step == 0:
            self.batches = [{k: v.clone() for k, v in b.items()} for b in state.batches]
            self.grads = [p.grad.clone() for p in state.attached.parameters().values()]


@pytest.mark.parametrize('k', [1, 2])
def test_the_first_gradient_is_that_of_the_whole_loss_written_out(k):
    keep, kept = Keep(), data(ROWS, seed=0, carry=['right', 'wrong'])
    fit(toy(), TOK, kept, aft(beta=.2, weight=.7), callbacks=(keep,), accumulate=k, clip=None,
        **SETTINGS)
    model, plain, labels, rank, questions = toy(), 0., 0, 0., 0
    assert len(keep.batches) == k
    for b in keep.batches:
        out = model(input_ids=b['input_ids'], attention_mask=b['attention_mask']).logits
        out = out.log_softmax(-1)
        s = {}
        for i, (ids, y) in enumerate(zip(b['input_ids'], b['scored'])):
            at = [j for j in range(1, len(y)) if y[j] != -100]
            logp = [out[i, j - 1, ids[j]] for j in at]
            s.setdefault((int(b['group'][i]), bool(b['good'][i])), []).append(sum(logp)/len(logp))
            if (b['labels'][i] != -100).any():
                plain, labels = plain - sum(logp), labels + len(logp)
        for q in range(int(b['group'].max()) + 1):
            assert len(s[q, True]) == 2 and len(s[q, False]) == 2, 'the data\'s answer is a right one'
            rank, questions = rank + by_hand(s[q, True], s[q, False], 'boundary', .2), questions + 1
    assert questions == 8
    loss = plain/labels + .7*rank/questions
    for a, b in zip(keep.grads, torch.autograd.grad(loss, list(model.parameters()))):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


def test_without_weight_it_is_plain_fine_tuning():
    kept = data(ROWS, seed=0, carry=['right', 'wrong'])
    # in double precision, because AdamW makes a whole step of a gradient that is nothing but rounding
    runs = [fit(toy().double(), TOK, kept, r, **SETTINGS) for r in (aft(weight=0.), Recipe())]
    a, b = (r.delta.attached.changes() for r in runs)
    assert all(torch.allclose(a[n], b[n], atol=1e-6) for n in a)


@pytest.mark.parametrize('recipe', [
    lambda: methods.lora()*aft(**TOY), lambda: methods.hft()*aft('detach', **TOY),
    lambda: aft('none', **TOY)*Recipe('near', objective=nll() + kl_to_base(.1))])
def test_it_combines(recipe):
    run = fit(toy(), TOK, lab_data(), recipe(), **SETTINGS)
    assert all(math.isfinite(r['loss']) for r in run.log) and run.log[0]['loss'] > run.log[0]['nll']


@pytest.mark.parametrize('family', 'llama qwen2 gemma gpt2 opt gpt_neox'.split())
def test_real_architectures_rank_what_they_score(family):
    model, batch = tiny(family), inputs_for(family)
    n = len(batch['input_ids'])
    batch['labels'] = batch['scored'] = batch['input_ids'].clone()
    batch |= dict(group=torch.zeros(n, dtype=torch.long), good=torch.arange(n) == 0)
    state = State(model)
    state.batch, state.batches, state.count = batch, [batch], 1
    state.forward()
    loss = align()(state)
    s = scores(state.logits, batch['scored'])
    torch.testing.assert_close(loss, by_hand(s[:1], s[1:], 'boundary', .15))
    assert any(g is not None and g.any() for g in
               torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


def test_answers_are_sampled_judged_and_not_repeated():
    rows = [dict(prompt='reverse a b =', response='b a')]*2
    random_state = torch.random.get_rng_state()
    one, two = (sampled(toy(), TOK, rows, score=lambda r, a: len(a) % 2, draws=5, seed=3)
                for _ in range(2))
    assert one == two and torch.equal(random_state, torch.random.get_rng_state())
    for r in one:
        own = r['right'] + r['wrong']
        assert len(set(own)) == len(own) <= 5 and all(len(a) % 2 for a in r['right'])


@pytest.mark.parametrize('wrong', [dict(constraint='soft'), dict(beta=-1.), dict(weight=-1.)])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match='constraint must be boundary, detach, none'):
        aft(**wrong)


def test_rows_without_lists_and_other_data_are_refused():
    with pytest.raises(ValueError, match="no list of answers in 'right'; it has prompt"):
        fit(toy(), TOK, lab_data(), aft(), **SETTINGS)
    state = State(toy(), TOK, data=data([dict(text='a', label='x'), dict(text='b', label='y')]*5),
                  settings=dict(batch_size=2, accumulate=1))
    with pytest.raises(ValueError, match='prompt and a response'):
        Groups(state, 'right', 'wrong')
