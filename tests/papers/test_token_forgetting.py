"token_forgetting: what its page cannot say about itself"
import numpy as np
import pytest
import torch
from ftlab import methods
from ftlab.core.data import data
from ftlab.core.recipe import Recipe
from ftlab.core.state import State
from ftlab.trainers import objective
from ftlab.trainers.fit import fit
from ftlab.trainers.losses.token_forgetting import forget, signs, token_forgetting
from ftlab.trainers.objective import kl_to_base, nll
from losses import (Fixed, assert_one_pass_ends_alike,
                    assert_one_pass_has_the_same_gradient, labelled)
from toys import TOK, assert_resumes, classifier, lab_data, label_data, toy

SETTINGS = dict(steps=3, batch_size=8, lr=1e-3, seed=0, progress=False)


def official_signs(before, after, labels, rho):
    "The division of the official script: all labelled tokens of all rows in one list, sorted by score"
    scores = [(np.array(a) - np.array(b)).tolist() for a, b in zip(before, after)]
    tokens = [(s, i, j) for i, (own, given) in enumerate(zip(scores, labels))
              for j, (s, y) in enumerate(zip(own, given)) if y != -100]
    ranked = sorted(tokens, key=lambda t: t[0], reverse=True)
    n = int(len(ranked)*rho)
    out = [[0]*len(r) for r in labels]
    for k, (_, i, j) in enumerate(ranked):
        out[i][j] = 1 if k < n else -1
    return out


@pytest.mark.parametrize('rho', [.7, .5, 1., .01])
def test_tokens_are_divided_as_in_the_official_script(rho):
    g = torch.Generator().manual_seed(0)
    sizes = (3, 7, 1, 12)
    before, after = ([torch.rand(n, generator=g) for n in sizes] for _ in range(2))
    labels = [torch.randint(0, 9, (n,), generator=g) for n in sizes]
    for y in labels:
        y[torch.rand(len(y), generator=g) < .3] = -100
    ours = signs([a - b for a, b in zip(before, after)], [y != -100 for y in labels], rho)
    theirs = official_signs(*([x.tolist() for x in xs] for xs in (before, after, labels)), rho)
    assert [x.tolist() for x in ours] == theirs


def state_of(logits, labels, sign, step, steps):
    s = State(Fixed(logits), step=step, steps=steps)
    s.batch = dict(input_ids=labels, labels=labels, sign=sign)
    s.batches, s.count = [s.batch], int((labels[:, 1:] != -100).sum())
    return s


@pytest.mark.parametrize('step', [0, 3, 9])
def test_value_and_gradient_are_those_of_the_official_code(step):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 8, 40, generator=g, dtype=torch.float64).requires_grad_()
    labels = torch.randint(40, (3, 8), generator=g)
    labels[:, :3] = -100
    sign = torch.where(torch.rand(3, 8, generator=g) < .7, 1, -1)*(labels != -100)
    ours = forget(.25)(state_of(logits, labels, sign, step, 10))
    sums, n = {1: 0., -1: 0.}, {1: 0, -1: 0}
    for i in range(3):
        for j in range(1, 8):
            if (s := int(sign[i, j])):
                sums[s] = sums[s] - logits[i, j - 1].log_softmax(-1)[labels[i, j]]
                n[s] += 1
    theirs = sums[1]/n[1] - .25*step/10*sums[-1]/n[-1]
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-6, check_dtype=False)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (ours, theirs)),
                               atol=1e-7, rtol=1e-5)


class Seen:
    "Notes the rows that the run learns from, and their signs"

    def __init__(self):
        self.rows, self.signs, self.first = set(), [], None

    def after_step(self, state):
        for b in state.batches:
            self.rows |= {tuple(r) for r in b['input_ids'].tolist()}
            self.signs += b['sign'][:, 1:][b['labels'][:, 1:] != -100].tolist()
        self.practice = {tuple(r['input_ids']) for r in state.source.practice}


def test_the_rows_of_the_reference_are_not_learned_and_rho_is_met():
    seen = Seen()
    rows = [dict(prompt=f'reverse {a} {b} =', response=f'{b} {a}') for a in 'abcdefgh' for b in 'abcdefgh']
    fit(toy(), TOK, data(rows, seed=0), token_forgetting(share=.25), callbacks=(seen,),
        **SETTINGS | dict(steps=12))
    assert seen.practice and not seen.practice & seen.rows, 'all rows have the same length'
    assert set(seen.signs) == {1, -1}
    assert abs(sum(s == 1 for s in seen.signs)/len(seen.signs) - .7) < .1


def test_practice_leaves_model_and_random_numbers_alone():
    "With all tokens positive the first step's gradient is plain fine-tuning's on the same rows"
    class Keep:
        def after_backward(self, state):
            if state.step == 0:
                self.grads = [p.grad.clone() for p in state.attached.parameters().values()]
                self.batches, self.random = state.batches, torch.random.get_rng_state()
                self.mode = state.model.training
    keep = Keep()
    torch.manual_seed(3)
    fit(toy(), TOK, lab_data(), token_forgetting(rho=1.), callbacks=(keep,), **SETTINGS)
    model = toy()
    total, n = 0., 0
    for b in keep.batches:
        out = model(input_ids=b['input_ids'], attention_mask=b['attention_mask']).logits
        total = total + objective.token_nll(out, b['labels']).sum()
        n += int((b['labels'][:, 1:] != -100).sum())
    names = dict(model.named_parameters())
    theirs = torch.autograd.grad(total/n, list(names.values()))
    for a, b in zip(keep.grads, theirs):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert keep.mode


def test_a_run_that_was_cut_off_goes_on_alike(tmp_path):
    def run(**more):
        return fit(toy(), TOK, lab_data(), token_forgetting(), **SETTINGS | more)
    assert_resumes(run, tmp_path/'run')


def test_a_classifier_s_rows_are_divided_too():
    run = fit(classifier(), TOK, label_data(), token_forgetting(), **SETTINGS)
    assert len(run.log) == 3


@pytest.mark.parametrize('recipe', [
    lambda: token_forgetting(), lambda: methods.lora()*token_forgetting(),
    lambda: methods.hft()*token_forgetting(strength=1.),
    lambda: token_forgetting()*Recipe('near', objective=nll() + kl_to_base(.1))])
def test_a_run_in_one_pass_ends_alike(recipe, monkeypatch):
    assert_one_pass_ends_alike(recipe, monkeypatch)


@pytest.mark.parametrize('family', 'llama qwen2 gemma gemma2 gpt2 opt gpt_neox'.split())
def test_real_architectures_have_the_same_gradient_in_one_pass(family, monkeypatch):
    model, batch = labelled(family)
    batch['sign'] = torch.where(batch['labels'] % 3 == 0, -1, 1)*(batch['labels'] != -100)
    assert_one_pass_has_the_same_gradient(token_forgetting(), model, batch, monkeypatch,
                                          step=5, steps=10)


@pytest.mark.parametrize('wrong', [dict(rho=0.), dict(rho=1.1), dict(strength=-.1), dict(share=0.),
                                   dict(share=1.)])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match='rho must be in'):
        token_forgetting(**wrong)


def test_one_row_is_too_few_and_another_loss_or_source_is_refused():
    one = [dict(prompt='a', response='b')]
    rows = data(dict(train=one, validation=one, test=one))
    with pytest.raises(ValueError, match='at least 2 rows'):
        fit(toy(), TOK, rows, token_forgetting(), **SETTINGS)
    for other in (methods.dft(), methods.dpo()):
        with pytest.raises(ValueError, match='both answer'):
            token_forgetting()*other
