"R-AMT: the official gradient written out, bits in the file, architectures, edges of its arguments"
import dataclasses
import pytest
import torch
from torch.func import functional_call
from ftlab.adapters.attach import attach
from ftlab.adapters.store import load_delta
from ftlab.adapters.subsets.r_amt import START, THRESHOLD, agreement, r_amt
from ftlab.core.batches import Sample, Unread
from ftlab.core.tokens import encode_all
from ftlab.trainers.fit import fit
from ftlab.trainers.losses.dft import dft
from ftlab.trainers.optimizers.mezo import mezo
from tests.tiny import tiny
from tests.toys import TOK, lab_data, logits, toy


class Bit(torch.autograd.Function):
    "The official binarizer"
    @staticmethod
    def forward(ctx, m):
        return (m > THRESHOLD).float()

    @staticmethod
    def backward(ctx, g):
        return g


class Second:
    "Keeps scores and gradient of the second step"
    def after_backward(self, state):
        if state.step == 1:
            params = state.attached.parameters()
            self.batch = state.batches[0]
            self.scores = {n: p.detach().clone() for n, p in params.items()}
            self.grads = {n: p.grad.clone() for n, p in params.items()}


def official(base, look, strength, l2, draw):
    "graddrop_backward_and_update of masktuning.py, with the loss and the norm of forward_backward"
    params = {n: p.detach() for n, p in base.named_parameters()}
    m = {n: s.clone().requires_grad_() for n, s in look.scores.items()}
    cut = {n.partition('::')[0]: params[n.partition('::')[0]]*Bit.apply(s).view_as(
        params[n.partition('::')[0]]) for n, s in m.items()}
    inputs = {k: look.batch[k] for k in ('input_ids', 'attention_mask')}
    y = look.batch['labels'][:, 1:]
    on = y != -100
    student = functional_call(base, params | cut, (), inputs, tie_weights=True).logits[:, :-1][on]
    teacher = base(**inputs).logits[:, :-1][on].detach()
    general = -(teacher.softmax(-1)*student.log_softmax(-1)).sum(-1).mean()
    b = torch.autograd.grad(general, list(m.values()), retain_graph=True)
    loss = torch.nn.functional.cross_entropy(student, y[on]) + l2*sum(s.norm() for s in m.values())
    out = {}
    for n, a, b in zip(m, torch.autograd.grad(loss, list(m.values())), b):
        P = (a.sign()*(a + b)/(a.abs() + b.abs() + 1e-8) + 1)/2
        U = torch.rand(a.shape, generator=draw)
        out[n] = ((1 - strength) + strength*(P > U))*a
    return out


@pytest.mark.parametrize('strength', (1., .3))
def test_the_gradient_is_that_of_the_official_code(strength):
    look = Second()
    fit(toy(), TOK, lab_data(), r_amt(strength, l2=1e-5), steps=2, batch_size=8, lr=8e-3, seed=5,
        progress=False, callbacks=(look,))
    assert .05 < torch.cat([s <= THRESHOLD for s in look.scores.values()]).float().mean() < .95
    draw = torch.Generator().manual_seed(hash((5, 1)) % 2**63)
    found = official(toy(), look, strength, 1e-5, draw)
    ours, theirs = (torch.cat([g[n] for n in found]) for g in (look.grads, found))
    close = (ours - theirs).abs() <= 1e-7 + 1e-3*theirs.abs()
    assert close.float().mean() > .999 # rounding may decide between a chance and its draw
    dropped = (theirs == 0).float().mean() if strength == 1. else 0.
    assert strength < 1 or .01 < dropped < .6


def test_agreement_is_a_probability_and_1_where_the_signs_agree():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1000, generator=draw)
    P = agreement(a, b)
    assert ((0 <= P) & (P <= 1)).all() and (P[a*b > 0] > 1 - 1e-4).all() and (P[a*b < 0] < 1).all()


@pytest.mark.parametrize('family', 'llama qwen2 gemma2 gpt2 opt gpt_neox bert vit mixtral'.split())
def test_only_matrices_of_attention_have_switches_in(family):
    model = tiny(family)
    recipe = r_amt()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    att = attach(model, recipe.select(model), recipe.delta)
    for n, d in att.deltas.items():
        base, tuned = att.weight(n)
        assert base.ndim == 2 and ('att' in n) and torch.equal(base, tuned)
        with torch.no_grad():
            d.score[1] = THRESHOLD # the second entry of the first row, [out, in]
        _, tuned = att.weight(n)
        assert tuned[0, 1] == 0 and (tuned != base).sum() == 1
        assert torch.equal(d.saved()(base), tuned)
    att.detach()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def sample():
    return Sample(encode_all(lab_data().train[:40], TOK, 'text'), TOK.pad_token_id)


@pytest.mark.parametrize('rows', (sample(), Unread()))
@pytest.mark.parametrize('budget', (.001, .01, .05))
def test_a_budget_is_met_exactly(budget, rows):
    model, recipe = toy(), r_amt(budget=budget, where='both')
    att = attach(model, recipe.select(model, rows), recipe.delta)
    count = sum(p.numel() for p in att.parameters().values())
    att.detach()
    assert count == round(budget*sum(p.numel() for p in model.parameters()))


def test_a_budget_goes_to_the_largest_products_of_weight_and_gradient():
    model, (batch,) = toy(), sample().take(32, 32)
    chosen = r_amt(budget=.01).select(model, [batch])
    model(**batch).loss.backward()
    both = {n: (p*p.grad).abs() for n, p in model.named_parameters() if 'self_attn' in n}
    bar = torch.cat([s.flatten() for s in both.values()]).topk(
        sum(int(m.sum()) for m in chosen.values())).values[-1]
    assert all((s[chosen[n]] >= .999*bar).all() for n, s in both.items() if n in chosen)


@pytest.mark.parametrize('budget', (None, .02))
def test_a_file_has_one_bit_for_each_weight_of_its_matrices(budget, tmp_path):
    run = fit(toy(), TOK, lab_data(), r_amt(budget=budget), steps=3, batch_size=8, lr=1e-2,
              progress=False)
    tuned = logits(run.model)
    size = sum(d.size for d in run.delta.attached.deltas.values())
    assert run.delta.nbytes == size/8 and not torch.equal(tuned, logits(toy()))
    run.delta.save(tmp_path/'delta.safetensors')
    fresh = toy()
    load_delta(fresh, tmp_path/'delta.safetensors')
    assert torch.equal(logits(fresh), tuned)


def test_without_dropout_or_norm_nothing_is_added_to_the_loss():
    assert not r_amt(0, l2=0.).terms and 'reference' not in r_amt(0).needs
    assert 'reference' in (r_amt()*dft()).needs and len((r_amt()*dft()).terms) == 2


def test_what_it_refuses():
    with pytest.raises(ValueError, match='between 0 and 1'):
        r_amt(-.1)
    with pytest.raises(ValueError, match='0 or more'):
        r_amt(l2=float('nan'))
    with pytest.raises(ValueError, match='attention, mlp, both'):
        r_amt(where='head')
    with pytest.raises(ValueError, match='at most 1'):
        r_amt(budget=2)
    with pytest.raises(ValueError, match='smaller budget'):
        r_amt(budget=1).select(toy(), Unread())
    recipe = dataclasses.replace(r_amt(0), step=mezo().step)
    with pytest.raises(ValueError, match='computes none'):
        fit(toy(), TOK, lab_data(), recipe, steps=1, batch_size=4, progress=False)


def test_scores_start_above_the_threshold():
    assert START > THRESHOLD > 0
