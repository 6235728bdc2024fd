"Grafting: the mask against the official formulas written out and against autograd, and the edges of its settings"
from types import SimpleNamespace
import pytest
import torch
from torch.func import functional_call
from ftlab.adapters.merging.grafting import (Grafting, PlainDescent, graftable, grafting,
                                             keep_largest, largest, learned_graft, region,
                                             region_overlap, unit_of)
from ftlab.core.anatomy import anatomy
from ftlab.core.recipe import Recipe
from ftlab.trainers.fit import fit
from tests.tiny import tiny
from tests.toys import TOK, classifier, lab_data, label_data, same, toy, weights

FAMILIES = ('llama', 'qwen2', 'gemma', 'gpt2', 'opt', 'gpt_neox', 'bert', 'vit', 'mixtral')
QUIET = dict(batch_size=8, progress=False)


def change_of(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {n: .1*torch.randn(model.get_parameter(n).shape, generator=g) for n in graftable(model)}


class Layer(torch.nn.Module):
    "A map with known gradients; `state` and `losses` are what `fit` would give"
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([[1., 2., -1.], [.5, 0., 1.]]))

    def forward(self, x):
        return x @ self.w.T


def state_of(model, steps):
    return SimpleNamespace(model=model, step=0, steps=steps, stop=False, extra={},
                           emit=lambda event: None)


def graft_of_layer(**more):
    model = Layer()
    change = dict(w=torch.tensor([[.5, -.1, .3], [-.4, .2, .05]]))
    backward = SimpleNamespace(backward=lambda loss: loss.backward())
    step = Grafting(dict(model.named_parameters()), backward, change,
                    **dict(density=.5, rate=1., start=1/3, bias=2.) | more)
    state = state_of(model, 5)
    x, y = torch.tensor([[1., -1., 2.], [0., 1., 1.]]), torch.tensor([[0., 1.], [1., 0.]])
    return model, change['w'], step, state, lambda w: (x @ w.T - y).square().mean()


def test_a_step_is_descent_on_the_relaxed_mask():
    model, change, step, state, loss = graft_of_layer()
    w0, base = model.w.detach().clone(), torch.zeros(2, 3)
    base[0, 0] = 1. # a third of three entries: the one that moved most
    S = torch.zeros(2, 3, requires_grad=True)
    mask = base*(1 - (S - 2.).sigmoid()) + (1 - base)*(S - 2.).sigmoid()
    assert torch.allclose(step.mask()['w'], mask)
    loss(w0 + mask*change).backward()
    unit = S.grad.abs().flatten().sort(descending=True).values[2] # of three entries the last
    found = step(state, [lambda: loss(model.w)])
    assert found == pytest.approx(float(loss(w0 + mask*change).detach()))
    assert torch.allclose(step.S['w'], -S.grad/unit, rtol=1e-5)
    assert not state.stop and torch.allclose(model.w, w0 + step.mask()['w']*change)
    assert model.w.grad is None


def test_the_gradient_is_that_of_the_official_code():
    "graft_trainer.py, lines 290 and 308: gradient x change x (1 - 2 base) x sigmoid' at S minus the bias"
    model, change, step, state, loss = graft_of_layer()
    w0, base, S = model.w.detach().clone(), (step.sign['w'] < 0).float(), torch.zeros(2, 3)
    frac = base + (1 - 2*base)*torch.sigmoid(S - 2.)
    w = (w0 + frac*change).requires_grad_()
    loss(w).backward()
    official = (1 - 2*base)*w.grad*change*torch.sigmoid(S - 2.)*(1 - torch.sigmoid(S - 2.))
    step(state, [lambda: loss(model.w)])
    assert torch.allclose(step.S['w']*step.unit, -official, rtol=1e-5)


def test_micro_batches_add_up_and_the_last_step_rounds():
    whole, halves = graft_of_layer(), graft_of_layer()
    for model, _, step, state, loss in (whole, halves):
        parts = 1 if model is whole[0] else 2
        step(state, [lambda: loss(model.w)/parts]*parts)
    assert torch.allclose(whole[2].S['w'], halves[2].S['w'], rtol=1e-5)
    model, change, step, state, loss = whole
    w0 = Layer().w.detach()
    state.step = 4
    step(state, [lambda: loss(model.w)])
    inside = step.rounded()['w']
    assert state.stop and inside.sum() == 3
    assert torch.equal(model.w.detach(), torch.where(inside, w0 + change, w0))


def test_the_search_ends_when_the_region_has_its_size():
    model, _, step, state, loss = graft_of_layer(rate=50.)
    step(state, [lambda: loss(model.w)])
    assert state.stop and step.size() >= 3 and step.rounded()['w'].sum() == 3


def test_a_loss_that_is_not_finite_changes_no_mask():
    model, _, step, state, loss = graft_of_layer()
    with pytest.raises(FloatingPointError, match='the mask was not changed'):
        step(state, [lambda: loss(model.w)*float('nan')])
    assert not step.S['w'].any()


def test_a_gradient_of_zero_moves_nothing():
    assert unit_of(dict(a=torch.zeros(4)), 2) == 1.
    assert unit_of(dict(a=torch.tensor([3., 0., -2.])), 2) == 2.
    assert unit_of(dict(a=torch.tensor([3., 0.])), 2) == 3. # fewer gradients than entries: the largest
    model, _, step, state, _ = graft_of_layer()
    step(state, [lambda: model.w.sum()*0])
    assert not step.S['w'].any()


@pytest.mark.parametrize('family', FAMILIES)
def test_embeddings_and_heads_are_not_grafted(family):
    model = tiny(family)
    where = anatomy(model).locations
    chosen = graftable(model)
    assert chosen.keys() == {n for n in where if where[n][1] not in ('embedding', 'head')}
    masks = largest(change_of(model), .1)
    size = sum(m.numel() for m in masks.values())
    assert chosen and masks.keys() == chosen.keys()
    assert sum(int(m.sum()) for m in masks.values()) == round(.1*size)


def test_the_largest_entries_of_all_tensors_together():
    change = dict(a=torch.tensor([3., -9., 1.]), b=torch.tensor([[2., 8.]]), c=torch.zeros(3))
    masks = largest(change, 3/8)
    assert masks['a'].tolist() == [True, True, False] and masks['b'].tolist() == [[False, True]]
    assert not masks['c'].any()
    kept = keep_largest(3/8)(change)
    assert kept['a'].tolist() == [3., -9., 0.] and same(keep_largest(1.)(change), change)
    assert same(region(kept), masks)


def test_overlap_is_a_share_of_the_second():
    a = dict(x=torch.tensor([1., 1., 1., 0.]))
    b = dict(x=torch.tensor([0., 0., 2., 2.]), y=torch.ones(2))
    assert region_overlap(a, b) == 1/4 and region_overlap(b, a) == 1/3
    assert region_overlap(region(a), region(b)) == 1/4
    with pytest.raises(ValueError, match='the region of b is empty'):
        region_overlap(a, dict(x=torch.zeros(4)))
    with pytest.raises(ValueError, match='not made from one base'):
        region_overlap(a, dict(x=torch.ones(5)))


@pytest.mark.parametrize('setting, value', [
    ('density', 0.), ('density', 1.5), ('density', True), ('start', 0.), ('bias', 0.),
    ('rate', -1.), ('rate', float('inf')), ('rate', None)])
def test_settings_out_of_range_are_named(setting, value):
    for make in (grafting, lambda **k: learned_graft(dict(a=torch.ones(2)), **k)):
        with pytest.raises(ValueError, match=f'{setting} is {value}'):
            make(**{setting: value})
    if setting == 'density':
        with pytest.raises(ValueError, match=f'density is {value}; it must be above 0 and at most 1'):
            keep_largest(value)(dict(a=torch.ones(2)))


def test_other_inputs_that_make_no_sense():
    with pytest.raises(ValueError, match="optimizer is 'muon'; it must be adamw or sgd"):
        grafting(optimizer='muon')
    with pytest.raises(ValueError, match='it must be a change'):
        learned_graft([torch.ones(2)])
    with pytest.raises(ValueError, match="density is 'x'"):
        keep_largest('x')(dict(a=torch.ones(2)))
    with pytest.raises(ValueError, match='moves no entry'):
        learned_graft(dict(a=torch.zeros(2)))
    with pytest.raises(ValueError, match="change of 'b' is not finite"):
        learned_graft(dict(a=torch.ones(2), b=torch.tensor([1., float('nan')])))
    with pytest.raises(ValueError, match='no tensor is in both'):
        region_overlap(dict(a=torch.ones(2)), dict(b=torch.ones(2)))


def test_a_change_of_another_model_is_refused():
    change = change_of(toy())
    name = next(n for n, c in change.items() if c.dim() == 2)
    change[name] = torch.ones(3, 5)
    with pytest.raises(ValueError, match=r'is \(3, 5\) in the change and \(32, 32\) in the model'):
        fit(toy(), TOK, lab_data(), learned_graft(change, .1), steps=1, **QUIET)


def test_a_mask_of_bfloat16_is_kept_in_float32():
    model = toy().bfloat16()
    change = {n: c.bfloat16() for n, c in change_of(toy()).items()}
    step = Grafting(dict(model.named_parameters()), SimpleNamespace(backward=None), change)
    assert all(s.dtype == torch.float32 for s in step.S.values())
    assert model.dtype == torch.bfloat16


def test_a_search_that_starts_with_the_whole_region_ends_at_once():
    "With `start=1` there is nothing left to learn: the graft by magnitude"
    change = change_of(toy())
    run = fit(toy(), TOK, lab_data(), learned_graft(change, .1, start=1.), steps=4, **QUIET)
    assert len(run.log) == 1
    assert same(region(run.delta.tensors()), region(keep_largest(.1)(change)))


def test_a_run_leaves_a_region_of_the_size_asked_for():
    recipe, base = grafting(.05, rate=.5), weights(toy())
    run = fit(toy(), TOK, lab_data(), recipe, steps=8, lr=1e-2, **QUIET)
    moved = {n: p != base[n] for n, p in weights(run.model).items()}
    names = graftable(toy())
    count = sum(int(moved[n].sum()) for n in names)
    size = sum(base[n].numel() for n in names)
    assert not any(m.any() for n, m in moved.items() if n not in names)
    assert round(.05*size)*.98 <= count <= round(.05*size) # an entry that did not move may be in it


def test_a_given_change_is_grafted_as_it_is():
    change = change_of(toy())
    run = fit(toy(), TOK, lab_data(), learned_graft(change, .1, rate=.5), steps=3, **QUIET)
    found = run.delta.tensors()
    assert all(torch.allclose(c, change[n].where(c != 0, 0), atol=1e-6) for n, c in found.items())
    count = sum(int((c != 0).sum()) for c in found.values())
    assert count == round(.1*sum(c.numel() for c in change.values()))


def test_a_fresh_head_stays_tuned():
    recipe = grafting(.1, rate=.5)
    run = fit(classifier(), TOK, label_data(), recipe, steps=6, lr=1e-2, **QUIET)
    base = weights(classifier())
    assert (weights(run.model)['classifier.weight'] != base['classifier.weight']).any()


def test_plain_descent_is_sgd():
    "Twice the rate moves twice as far, and each entry in proportion to its gradient"
    n = 'model.layers.0.mlp.up_proj.weight'

    def moved(lr):
        run = fit(toy(), TOK, lab_data(), Recipe('sgd', step=PlainDescent), steps=1, lr=lr,
                  clip=None, **QUIET)
        return weights(run.model)[n] - weights(toy())[n]

    one = moved(.1)
    assert torch.allclose(2*one, moved(.2), atol=1e-6)
    assert one.abs().max() > 3*one.abs().mean() # AdamW's first step is as large everywhere


def test_functional_call_gives_the_same_gradient_on_a_language_model():
    "The gradient of S by hand is autograd's through base + mask x change"
    model, change = toy(), change_of(toy())
    batch = dict(input_ids=torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[5, 6, 7, 8]]))
    S = {n: torch.zeros_like(c).requires_grad_() for n, c in change.items()}
    first = largest(change, .01)
    masks = {n: first[n] + (1 - 2.*first[n])*(s - 4.).sigmoid() for n, s in S.items()}
    w = {n: p.detach() + masks[n]*change[n] for n, p in model.named_parameters() if n in change}
    functional_call(model, w, kwargs=batch).loss.backward()
    params = dict(model.named_parameters())
    backward = SimpleNamespace(backward=lambda loss: loss.backward())
    step = Grafting(params, backward, change, density=.1, rate=1., start=.1, bias=4.)
    state = state_of(model, 9)
    step(state, [lambda: model(**batch).loss])
    assert all(torch.allclose(step.S[n]*step.unit, -S[n].grad, atol=1e-8, rtol=1e-3) for n in S)


def test_it_resumes(tmp_path):
    whole = fit(toy(), TOK, lab_data(), grafting(.1, rate=.05), steps=8, lr=1e-2, **QUIET)

    class Cut:
        "Stops by hand in the second stage"
        def after_step(self, state):
            if state.extra.get('lr') == .05 and state.step == 2:
                state.stop = 'by hand'

    more = dict(steps=8, lr=1e-2, out=tmp_path, save_every=1, **QUIET)
    cut = fit(toy(), TOK, lab_data(), grafting(.1, rate=.05), callbacks=(Cut(),), **more)
    assert cut.interrupted
    again = fit(toy(), TOK, lab_data(), grafting(.1, rate=.05), resume=True, **more)
    assert same(weights(again.model), weights(whole.model))


def test_a_graft_alone_resumes(tmp_path):
    recipe = learned_graft(change_of(toy()), .1, rate=.05)
    whole = fit(toy(), TOK, lab_data(), recipe, steps=4, **QUIET)

    class Cut:
        def after_step(self, state):
            if state.step == 2:
                state.stop = 'by hand'

    more = dict(steps=4, out=tmp_path, save_every=1, **QUIET)
    assert fit(toy(), TOK, lab_data(), recipe, callbacks=(Cut(),), **more).interrupted
    again = fit(toy(), TOK, lab_data(), recipe, resume=True, **more)
    assert same(weights(again.model), weights(whole.model))


def test_new_tokens_are_refused_before_anything_is_trained():
    model = toy()
    model.new_rows = [5]
    with pytest.raises(ValueError, match='rows of the new tokens would be lost'):
        fit(model, TOK, lab_data(), grafting(), steps=2, progress=False)
