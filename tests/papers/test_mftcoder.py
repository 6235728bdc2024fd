"mftcoder: what its page cannot say about itself"
import pytest
import torch
from ftlab import methods
from ftlab.core.data import data
from ftlab.core.recipe import Recipe
from ftlab.core.state import State
from ftlab.trainers.fit import fit
from ftlab.trainers.losses.mftcoder import by_task, mark_tasks, mftcoder
from ftlab.trainers.objective import kl_to_base, nll, token_nll
from losses import (Fixed, assert_one_pass_ends_alike,
                    assert_one_pass_has_the_same_gradient, labelled)
from toys import TOK, classifier, lab_data, label_data, toy

FIRST = dict(task=lambda row: row.get('prompt', row.get('text', '')).split()[0])
SETTINGS = dict(steps=3, batch_size=8, lr=1e-3, seed=0, progress=False)


def official(logits, labels, tasks, weights, mode):
    """The loss of the official code, row by row: the sum over the tasks that are present of weight
    times mean, over the sum of their weights"""
    total, size = 0., 0.
    for t in sorted(set(tasks)):
        rows = [i for i, own in enumerate(tasks) if own == t]
        each = []
        for i in rows:
            at = [j for j in range(1, labels.shape[1]) if labels[i, j] != -100]
            each.append([-logits[i, j - 1].log_softmax(-1)[labels[i, j]] for j in at])
        if mode == 'token':
            mean = sum(sum(e) for e in each)/sum(len(e) for e in each)
        else:
            mean = sum(sum(e)/len(e) for e in each)/len(rows)
        total, size = total + weights[t]*mean, size + weights[t]
    return total/size


def state_of(logits, labels, tasks, weights):
    s = State(Fixed(logits))
    s.batch = dict(input_ids=labels, labels=labels, task=torch.tensor(tasks),
                   task_weight=torch.tensor([weights[t] for t in tasks]))
    s.batches, s.count = [s.batch], int((labels[:, 1:] != -100).sum())
    return s


@pytest.mark.parametrize('mode', ['token', 'sample'])
@pytest.mark.parametrize('weights', [(1., 1., 1.), (.5, 3., 1.)])
def test_value_and_gradient_are_those_of_the_official_code(mode, weights):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 9, 30, generator=g, dtype=torch.float64).requires_grad_()
    labels = torch.randint(30, (5, 9), generator=g)
    for i, n in enumerate((1, 3, 6, 2, 7)): # rows of different lengths
        labels[i, :n] = -100
    tasks = [0, 2, 2, 0, 2] # of three tasks, one is absent
    ours = by_task(mode)(state_of(logits, labels, tasks, weights))
    theirs = official(logits, labels, tasks, weights, mode)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-6, check_dtype=False)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (ours, theirs)),
                               atol=1e-7, rtol=1e-5)


def test_a_step_in_parts_is_the_whole_step():
    "The means are over the step: parts that hold different tasks add up to the same loss"
    g = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(4, 6, 20, generator=g), torch.randint(20, (4, 6), generator=g)
    labels[0, :4] = -100
    whole = state_of(logits, labels, [0, 0, 1, 2], (1., 2., 1.))
    total = 0.
    for i in (0, 2):
        part = State(Fixed(logits[i:i + 2]))
        cut = [{k: v[j:j + 2] for k, v in whole.batch.items()} for j in (0, 2)]
        part.batch, part.batches, part.count = cut[i//2], cut, whole.count
        total += by_task()(part)
    torch.testing.assert_close(total, by_task()(whole))


def test_one_task_is_plain_fine_tuning_and_a_task_without_labels_takes_nothing():
    g = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(3, 6, 20, generator=g), torch.randint(20, (3, 6), generator=g)
    labels[2] = -100
    plain = token_nll(logits, labels).sum()/(labels[:, 1:] != -100).sum()
    torch.testing.assert_close(by_task()(state_of(logits, labels, [0, 0, 1], (1., 1.))), plain)
    alone = by_task('sample')(state_of(logits, labels, [0, 0, 1], (1., 1.)))
    assert torch.isfinite(alone)
    runs = [fit(toy(), TOK, lab_data(), r, **SETTINGS)
            for r in (mftcoder(task=lambda row: 'one'), Recipe())]
    assert runs[0].log[-1]['loss'] == pytest.approx(runs[1].log[-1]['loss'], rel=1e-5)


def test_tasks_are_found_whatever_the_order_and_rows_without_labels_are_passed_over():
    rows = [dict(prompt=f'reverse a {w} =', response=f'{w} a', task=w) for w in 'bcde']
    kept = data(dict(train=rows, validation=rows, test=rows), carry=['task'])
    run = fit(toy(), TOK, kept, mftcoder(weights={'b': 2.}), **SETTINGS)
    state = State(run.model, TOK, data=kept, limit=64)
    state.rows = []
    known = mark_tasks(weights=(('b', 2.),))._of_rows(state)
    assert sorted(known.values()) == [(0, 2.), (1, 1.), (2, 1.), (3, 1.)]


def test_a_classifier_s_labels_are_balanced_too():
    run = fit(classifier(), TOK, label_data(), mftcoder(**FIRST), **SETTINGS)
    assert all(r['loss'] > 0 for r in run.log)


@pytest.mark.parametrize('recipe', [
    lambda: mftcoder(**FIRST), lambda: methods.lora()*mftcoder(mode='sample', **FIRST),
    lambda: methods.hft()*mftcoder(**FIRST),
    lambda: mftcoder(**FIRST)*Recipe('near', objective=nll() + kl_to_base(.1)),
    lambda: mftcoder(**FIRST)*methods.masked_thought()])
def test_a_run_in_one_pass_ends_alike(recipe, monkeypatch):
    assert_one_pass_ends_alike(recipe, monkeypatch)


@pytest.mark.parametrize('family', 'llama qwen2 gemma gemma2 gpt2 opt gpt_neox'.split())
def test_real_architectures_have_the_same_gradient_in_one_pass(family, monkeypatch):
    model, batch = labelled(family)
    n = len(batch['labels'])
    batch |= dict(task=torch.arange(n) % 2, task_weight=torch.ones(n))
    assert_one_pass_has_the_same_gradient(mftcoder(), model, batch, monkeypatch)


def test_another_loss_is_refused_by_name():
    with pytest.raises(ValueError, match='both answer|objective'):
        mftcoder()*methods.dft()


@pytest.mark.parametrize('wrong, said', [
    (dict(mode='rows'), 'mode must be token or sample'), (dict(weights={'a': 0.}), 'every weight above 0')])
def test_settings_out_of_range_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        mftcoder(**wrong)


@pytest.mark.parametrize('recipe, said', [
    (mftcoder(), "no task in 'task'; it has prompt"),
    (mftcoder('skill', weights={'sort': 2.}), "weights names 'sort'; the tasks are new-procedure"),
    (methods.masked_thought()*mftcoder(**FIRST), 'write mftcoder first')])
def test_what_does_not_fit_the_data_is_said(recipe, said):
    with pytest.raises(ValueError, match=said):
        fit(toy(), TOK, lab_data(), recipe, **SETTINGS | dict(steps=20))


def test_equal_rows_of_one_task_are_one_and_rows_that_were_cut_alike_are_refused():
    rows = [dict(prompt=f'reverse a b {w} =', response='a b', task=t)
            for w, t in ('cx', 'cx', 'dy')]
    tasks = data(dict(train=rows, validation=rows, test=rows), carry=['task'])
    state = State(toy(), TOK, data=tasks, limit=64)
    state.rows = []
    assert sorted(mark_tasks()._of_rows(state).values()) == [(0, 1.), (1, 1.)]
    ids = [5, 6, 7]
    state.rows = [dict(input_ids=ids, labels=ids)]*3
    state.limit = 3
    cut = 'in two tasks, x and y.* raise max_length=3 if it was cut'
    with pytest.raises(ValueError, match=cut):
        mark_tasks()._of_rows(state)


def test_a_row_in_two_tasks_and_packed_rows_are_refused():
    rows = [dict(prompt='a b', response='c', task=t) for t in 'xy']
    twice = data(dict(train=rows, validation=rows, test=rows), carry=['task'])
    with pytest.raises(ValueError, match="the tokens of 'a b' are in two tasks, x and y; keep the row in one"):
        fit(toy(), TOK, twice, mftcoder(), **SETTINGS)
    with pytest.raises(ValueError, match='packing=False'):
        fit(toy(), TOK, lab_data(), mftcoder(**FIRST), packing=True, **SETTINGS)
