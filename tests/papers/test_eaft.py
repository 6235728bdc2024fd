"eaft: what its page cannot say about itself"
import dataclasses
import math
import pytest
import torch
import torch.nn.functional as F
from ftlab import methods
from ftlab.core.recipe import Recipe
from ftlab.core.state import State
from ftlab.native.crossentropy import weighted_linear_cross_entropy
from ftlab.trainers.fit import fit
from ftlab.trainers.losses.dft import probability
from ftlab.trainers.losses.eaft import eaft, entropy
from ftlab.trainers.objective import kl_to_base, nll, token_nll, weighted
from losses import (Fixed, assert_one_pass_ends_alike,
                    assert_one_pass_has_the_same_gradient, labelled)
from toys import TOK, lab_data, toy, weights


def by_hand(logits, labels, alpha, k=20):
    "The mean over tokens, each weighted by its entropy, one token at a time and in float64"
    total, n = 0., 0
    for row, answer in zip(logits.flatten(0, -2), labels.flatten()):
        if answer == -100:
            continue
        top = sorted(row.detach().tolist(), reverse=True)[:k]
        size = math.log(sum(math.exp(x) for x in top))
        entropy = -sum(math.exp(x - size)*(x - size) for x in top)
        total = total - (entropy/math.log(k))**alpha*row.log_softmax(-1)[answer]
        n += 1
    return total/n


def loss_of(recipe, logits, labels):
    state = State(Fixed(logits))
    state.batch = dict(input_ids=labels, labels=labels)
    state.count = int((labels[:, 1:] != -100).sum())
    return recipe.objective(state)


@pytest.mark.parametrize('alpha, k', [(1., 20), (2., 20), (.5, 3), (0., 20), (1., 50)])
def test_value_and_gradient_are_those_of_the_formula(alpha, k):
    g = torch.Generator().manual_seed(1)
    logits = (3*torch.randn(2, 6, 50, generator=g, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(50, (2, 6), generator=g)
    labels[0, :3] = labels[1, 0] = -100
    ours = loss_of(eaft(alpha, k), logits, labels)
    theirs = by_hand(logits[:, :-1], labels[:, 1:], alpha, k)
    assert abs((ours - theirs).item()) < 1e-6*theirs.item()
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (ours, theirs)),
                               atol=1e-7, rtol=1e-4)


def test_the_code_of_the_authors_divides_by_three():
    logits = torch.randn(1, 8, 40, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8)[None]
    top = logits[:, :-1].topk(20).values
    theirs = torch.distributions.Categorical(logits=top).entropy()/3.
    each = F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction='none')
    ratio = loss_of(eaft(), logits, labels)/(theirs*each).mean()
    assert abs(float(ratio) - 3/math.log(20)) < 1e-6


def test_alpha_zero_is_plain_fine_tuning():
    runs = [fit(toy(), TOK, lab_data(), r, steps=3, batch_size=8, seed=0, progress=False)
            for r in (eaft(alpha=0.), Recipe())]
    a, b = (weights(r.model) for r in runs)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_the_weight_has_its_ends_and_survives_forbidden_words():
    z = torch.tensor([[0.]*20 + [-99.]*5, [99.] + [0.]*24, [1., 0.] + [-math.inf]*23])
    w = entropy()(None, z)
    assert abs(w[0] - 1) < 1e-6 and w[1] < 1e-6 and 0 < w[2] < 1 and bool(torch.isfinite(w).all())
    assert torch.equal(entropy(k=99)(None, z), entropy(k=25)(None, z)), 'k is at most the vocabulary'


def test_an_encoder_with_few_labels_is_weighted_too():
    state = State(Fixed(torch.tensor([[2., 0., 0.], [0., 0., 0.]])))
    state.batch, state.count = dict(input_ids=torch.zeros(2, 1), labels=torch.tensor([0, 1])), 2
    first = float(entropy()(None, state.model.logits)[0])*(math.log(math.exp(2) + 2) - 2)
    assert abs(float(eaft().objective(state))*2 - math.log(3) - first) < 1e-5


@pytest.mark.parametrize('chunk', [None, 7, 1])
def test_without_logits_the_same(chunk):
    g = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 8, generator=g, dtype=torch.float64).requires_grad_()
                    for n in (30, 60))
    labels = torch.randint(60, (30,), generator=g)
    labels[::4] = -100
    one = weighted_linear_cross_entropy(hidden, head, labels, entropy(), chunk=chunk)
    whole = by_hand(hidden @ head.T, labels, 1.)*(labels != -100).sum()
    torch.testing.assert_close(one.loss, whole, atol=0, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(one.loss, (hidden, head)),
                    torch.autograd.grad(whole, (hidden, head))):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize('recipe', [
    eaft(), methods.lora()*eaft(), methods.hft()*eaft(2.),
    eaft()*Recipe('near', objective=nll() + kl_to_base(.1))], ids=lambda r: r.name)
def test_a_run_in_one_pass_ends_alike(recipe, monkeypatch):
    assert_one_pass_ends_alike(lambda: recipe, monkeypatch, steps=20, seed=1)


def test_another_weight_is_refused_by_name():
    with pytest.raises(ValueError, match='both answer|objective'):
        eaft()*methods.dft()


@pytest.mark.parametrize('wrong', [dict(alpha=-1.), dict(k=1), dict(alpha=math.nan), dict(k=2.5)])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match='alpha must be at least 0, k a whole number'):
        eaft(**wrong)


def test_it_prints_and_compares_by_value():
    assert repr(entropy()) == 'H20**1' and entropy() == entropy(1., 20) != entropy(2.)
    assert dataclasses.asdict(entropy()) == dict(alpha=1., k=20)


FAMILIES = 'llama qwen2 gemma gemma2 gpt2 opt gpt_neox mixtral qwen3_moe'.split()


@pytest.mark.parametrize('family', FAMILIES)
def test_real_architectures_have_the_same_gradient_in_one_pass(family, monkeypatch):
    model, batch = labelled(family)
    loss, state = assert_one_pass_has_the_same_gradient(eaft(k=5), model, batch, monkeypatch)
    assert (state.extra['plain_head'][0] is None) == (family == 'gemma2'), 'its logits are capped'
    logits = model(**{k: v for k, v in batch.items() if k != 'labels'}).logits
    whole = by_hand(logits[:, :-1], batch['labels'][:, 1:], 1., 5)
    torch.testing.assert_close(loss, whole, atol=0, rtol=1e-5)


def test_older_weights_give_the_same_bits():
    "A weight that reads the nll is applied as before weights could read more, value and gradient"
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 50, generator=g, requires_grad=True)
    labels = torch.randint(50, (2, 6), generator=g)
    labels[0, :3] = -100
    ours = loss_of(methods.dft(), logits, labels)
    nll_ = token_nll(logits, labels)
    before = (probability(1.)(nll_).detach()*nll_).sum()/int((labels[:, 1:] != -100).sum())
    assert torch.equal(ours, before)
    assert torch.equal(*(torch.autograd.grad(x, logits)[0] for x in (ours, before)))


@pytest.mark.parametrize('reads', ['entropy', None])
def test_a_weight_that_reads_something_else_is_refused(reads):
    class Odd:
        def __call__(self, nll):
            return nll
    odd = Odd()
    odd.reads = reads
    with pytest.raises(ValueError, match='a weight reads nll, logits or batch'):
        weighted(odd)


def test_one_pass_never_holds_the_logits_of_all_rows():
    "The largest tensor that a weight which reads logits is given has the rows of one chunk"
    sizes = []

    class Watch:
        reads = 'logits'

        def __call__(self, nll, logits):
            sizes.append(tuple(logits.shape))
            return entropy()(nll, logits)
    hidden, head = torch.randn(40, 8, requires_grad=True), torch.randn(60, 8)
    labels = torch.arange(40)
    a = weighted_linear_cross_entropy(hidden, head, labels, Watch(), chunk=8)
    b = weighted_linear_cross_entropy(hidden, head, labels, entropy())
    assert sizes == [(8, 60)]*5
    torch.testing.assert_close(a.weight, b.weight)
    w = entropy()(None, (hidden @ head.T).detach())
    torch.testing.assert_close(a.weight, w, atol=1e-5, rtol=1e-4)
