"What rows say about parameters: gradients and activations against torch, and selections at a budget"
import pytest
import torch
from torch import nn
import ftlab
from ftlab.adapters.delta import Entries
from ftlab.adapters.select import allowed, best_units, highest, parts
from ftlab.commands.memory import training_bytes
from ftlab.core.batches import Sample, Unread
from ftlab.core.recipe import Recipe
from ftlab.core.tokens import encode_all
from ftlab.trainers.statistics import activations, gradients
from toys import TOK, lab_data, toy

ROWS = encode_all(lab_data().train[:12], TOK, 'text')

def sample(**more):
    return Sample(ROWS, TOK.pad_token_id, **more)

def by_hand(model, batch):
    "The gradient of transformers' own loss"
    model.zero_grad()
    model(**batch).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found

@pytest.mark.peer('statistics.gradients', 'transformers',
                  'gradients of the loss of a model, over rows',
                  tolerance=dict(rtol=1e-4, atol=1e-7))
@pytest.mark.parametrize('of, f', [('mean', lambda g: g), ('abs', torch.abs),
                                   ('square', torch.square)])
def test_gradients_are_those_of_transformers_loss(of, f, tolerance):
    model = toy()
    found = gradients(model, sample(), of=of, rows=3)
    each = [by_hand(model, b) for b in sample().take(3, 1)]
    for n, g in found.items():
        want = sum(f(e[n]) for e in each)/3
        torch.testing.assert_close(g, want, **tolerance)

def test_padding_counts_neither_in_gradients_nor_in_activations():
    model = toy()
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][:4]
    one, many = (activations(model, sample(), layers, 'square', size=s) for s in (1, 12))
    for n in layers:
        torch.testing.assert_close(one[n], many[n], rtol=1e-4, atol=1e-7)
    short = [r for r in ROWS if len(r['input_ids']) < max(len(r['input_ids']) for r in ROWS)]
    assert short, 'without rows of different lengths nothing is padded'

def test_activations_are_what_a_layer_reads_and_writes():
    model = toy()
    name = next(n for n, m in model.named_modules() if n.endswith('down_proj'))
    batch, seen = next(sample().take(1, 1)), []
    note = lambda m, a, out: seen.append((a[0], out))
    hook = model.get_submodule(name).register_forward_hook(note)
    model(**batch)
    hook.remove()
    for side, x in zip(('input', 'output'), seen[0]):
        for of, f in (('mean', lambda x: x), ('positive', lambda x: (x > 0).float())):
            found = activations(model, [batch], [name], of, side)[name]
            torch.testing.assert_close(found, f(x[0]).mean(0))

def test_the_model_is_left_as_it_was():
    model = toy().train()
    model.get_input_embeddings().weight.requires_grad_(False)
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    gradients(model, sample(), rows=2)
    activations(model, sample(), ['lm_head'], rows=2)
    assert torch.equal(state, torch.get_rng_state()) and all(m.training for m in model.modules())
    for n, p in model.named_parameters():
        assert p.grad is None and p.requires_grad == before[n][1] and torch.equal(p, before[n][0])

def test_wrong_input():
    model = toy()
    with pytest.raises(ValueError, match='of is .sum'):
        gradients(model, sample(), of='sum')
    with pytest.raises(ValueError, match='there are none'):
        gradients(model, None)
    for nothing in (dict(batches=[]), dict(batches=iter(())), dict(batches=sample(), rows=0)):
        with pytest.raises(ValueError, match='no rows were read'):
            gradients(model, **nothing)
    with pytest.raises(ValueError, match="no parameter called 'model.norm.weigth'; did you mean 'model.norm.weight'"):
        gradients(model, sample(), ['model.norm.weigth'])
    with pytest.raises(ValueError, match='no labels'):
        gradients(model, [{k: v for k, v in b.items() if k != 'labels'} for b in sample().take(2)])
    with pytest.raises(ValueError, match='no training rows'):
        Sample([], 0)
    with pytest.raises(ValueError, match='read nothing'):
        activations(model, [], ['lm_head'])
    for budget in (0, -1, 1.5, True, '1%', float('nan')):
        with pytest.raises(ValueError, match='share of the parameters'):
            allowed(model, budget)
    with pytest.raises(ValueError, match='smaller budget'):
        highest({'a': torch.ones(3)}, 4)
    with pytest.raises(ValueError, match='smallest unit'):
        best_units([1., 2.], [5, 6], 4)

# ---- a budget
def test_the_highest_are_torchs():
    g = torch.Generator().manual_seed(0)
    scores = {n: torch.rand(6, 7, generator=g) for n in 'abc'}
    chosen = highest(scores, 20)
    flat = torch.cat([s.flatten() for s in scores.values()])
    want = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, flat.topk(20).indices, True)
    got = torch.cat([chosen.get(n, torch.zeros(6, 7, dtype=torch.bool)).flatten() for n in scores])
    assert torch.equal(got, want)
    rows = highest(scores, 36, 'row')
    assert all((m.sum(1) == 2).all() for m in rows.values())
    for n, s in scores.items():
        assert torch.equal(rows[n], s >= s.topk(2, 1).values[:, -1:])
    assert [int(m.sum()) for m in highest(scores, 30, 'tensor').values()] == [10, 10, 10]

def test_ties_go_to_the_first_and_units_that_do_not_fit_are_passed_over():
    assert highest({'a': torch.ones(2, 3)}, 2)['a'].flatten().nonzero().flatten().tolist() == [0, 1]
    assert best_units([3., 2., 1., 2.], [10, 5, 4, 5], 9) == [1, 2]
    assert best_units([1., 1., 1.], [1, 1, 1], 2) == [0, 1]

def test_tied_parameters_count_once():
    model = toy()
    model.lm_head.weight = model.get_input_embeddings().weight
    own = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert allowed(model, .1) == round(.1*own)

# ---- in a run
def by_gradient(model, batches=None, seed=0):
    names = [n for n in parts()(model)]
    return highest(gradients(model, batches, names, rows=8), allowed(model, .02))

def test_a_run_gives_its_rows_to_the_selection_and_resumes(tmp_path):
    recipe, given = Recipe('by gradient', select=by_gradient, delta=Entries), []
    def asked(model, batches=None, seed=0):
        given.append(batches)
        return by_gradient(model, batches, seed)
    fit = lambda recipe: ftlab.fit(toy(), TOK, lab_data(), recipe, steps=4, batch_size=4, seed=3,
                                   progress=False)
    whole, again = fit(recipe), fit(Recipe('by gradient', select=asked, delta=Entries))
    assert len(given) == 1 and isinstance(given[0], Sample)
    other = Sample(encode_all(lab_data().train, TOK, 'text'), TOK.pad_token_id, seed=3)
    for a, b in zip(given[0].take(9), other.take(9), strict=True):
        assert torch.equal(a['input_ids'], b['input_ids'])
    A, B = (r.delta.attached.parameters() for r in (whole, again))
    assert all(torch.equal(A[n], B[n]) for n in A) and len(A) == len(B)
    assert sum(p.numel() for p in whole.delta.attached.parameters().values()) == allowed(toy(), .02)

def test_a_dry_run_counts_as_many_without_rows():
    recipe = Recipe('by gradient', select=by_gradient, delta=Entries)
    assert training_bytes(toy(), recipe)['trainable'] == allowed(toy(), .02)
    assert isinstance(next(iter(gradients(toy(), Unread()).values())), torch.Tensor)


def test_a_sample_gives_rows_of_other_data_encoded_as_its_own():
    given = []
    def asked(model, batches=None, seed=0):
        given.append(batches)
        return parts('norm')(model)
    ftlab.fit(toy(), TOK, lab_data(), Recipe(select=asked), steps=1, progress=False)
    other = ftlab.data('sort', n=40)
    found = given[0].other(other, 5)
    texts = [TOK.decode(r['input_ids']) for r in found.rows]
    assert len(texts) == 5 and all(any(r['prompt'] in t for r in other.train) for t in texts)
    assert found.other(other, 3).rows == given[0].other(other, 3).rows
    with pytest.raises(ValueError, match='cannot encode other rows'):
        sample().other(other, 3)
