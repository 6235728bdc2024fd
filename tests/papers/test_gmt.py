"gmt: what its page cannot say about itself"
from types import SimpleNamespace
import pytest
import torch
import torch.nn.functional as F
from tiny import inputs_for, tiny
from toys import TOK, assert_resumes, lab_data, same, toy, weights
from ftlab.adapters.subsets.gmt import LargestGradients, gmt
from ftlab.methods import get
from ftlab.trainers.fit import fit

SETTINGS = dict(batch_size=8, lr=1e-2, weight_decay=0., schedule='constant', clip=None,
                progress=False)


class Batches:
    "Keep the batches of a run"
    def __init__(self):
        self.seen = []

    def before_batch(self, state):
        self.seen += state.batches


def by_hand(batches, masked, lr=1e-2):
    "AdamW on what `masked` leaves of each gradient, in plain torch"
    model = toy().train()
    params = list(model.parameters())
    opt = torch.optim.AdamW(params, lr=lr, weight_decay=0.)
    for b in batches:
        logits = model(input_ids=b['input_ids'], attention_mask=b['attention_mask']).logits
        labels = b['labels'][:, 1:]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100,
                               reduction='sum')
        (loss/(labels != -100).sum()).backward()
        for p, g in zip(params, masked([p.grad for p in params])):
            p.grad = g
        opt.step()
        opt.zero_grad()
    return weights(model)


def percentile(g, keep):
    "The paper's formula: what lies below the threshold T_k becomes 0"
    T = g.abs().flatten().sort(descending=True).values[max(1, round(keep*g.numel())) - 1]
    return torch.where(g.abs() >= T, g, 0.)


def per_tensor(grads):
    return [percentile(g, .3) for g in grads]


def over_the_model(grads):
    flat = percentile(torch.cat([g.flatten() for g in grads]), .3)
    return [m.view_as(g) for g, m in zip(grads, flat.split([g.numel() for g in grads]))]


def differ(a, b):
    "The share of entries that differ; AdamW makes a whole step of a gradient that is only rounding, so a few may"
    off = sum(int(((a[n] - b[n]).abs() > 1e-4).sum()) for n in a)
    return off/sum(t.numel() for t in a.values())


@pytest.mark.parametrize('each, masked', [('tensor', per_tensor), ('model', over_the_model)])
def test_three_steps_are_those_of_the_formula_in_plain_torch(each, masked):
    look = Batches()
    run = fit(toy(), TOK, lab_data(), gmt(.3, each), steps=3, callbacks=(look,), **SETTINGS)
    ours, theirs = weights(run.model), by_hand(look.seen, masked)
    plain = by_hand(look.seen, lambda grads: grads)
    assert differ(ours, theirs) < 1e-2 and differ(ours, plain) > .1


@pytest.mark.parametrize('family', 'llama qwen2 gemma gpt2 opt gpt_neox bert vit'.split())
def test_the_mask_is_the_same_on_every_family(family):
    model = tiny(family)
    model(**inputs_for(family))[0].float().square().mean().backward()
    params = dict(model.named_parameters())
    grads = {n: p.grad.clone() for n, p in params.items() if p.grad is not None}
    attached = SimpleNamespace(parameters=lambda: params)
    state = SimpleNamespace(attached=attached, model=model, seed=0, step=0)
    LargestGradients(.2, 'tensor', 'gradient', None).after_backward(state)
    for n, g in grads.items():
        kept = params[n].grad
        assert torch.equal(kept[kept != 0], g[kept != 0])
        assert int((kept != 0).sum()) <= max(1, round(.2*g.numel()))
        assert not g.any() or g[kept == 0].abs().max() <= kept[kept != 0].abs().min()


def test_a_budget_of_everything_masks_nothing_though_some_weights_have_no_gradient():
    model = tiny('mixtral') # a tensor of experts that no row reached has none
    model(**inputs_for('mixtral'))[0].float().square().mean().backward()
    params = dict(model.named_parameters())
    next(p for n, p in params.items() if 'experts' in n).grad = None
    grads = {n: p.grad.clone() for n, p in params.items() if p.grad is not None}
    attached = SimpleNamespace(parameters=lambda: params)
    state = SimpleNamespace(attached=attached, model=model, seed=0, step=0)
    for each in ('tensor', 'model'):
        LargestGradients(.2, each, 'gradient', 1.).after_backward(state)
        assert all(torch.equal(params[n].grad, g) for n, g in grads.items())


def test_a_budget_that_is_more_than_what_trains_is_refused_before_the_first_step():
    with pytest.raises(ValueError, match='entries a step, and only'):
        fit(toy(), TOK, lab_data(), get('gmt(budget=.9) * lora(r=2)'), steps=1, **SETTINGS)


def test_a_run_without_gradients_is_refused():
    with pytest.raises(ValueError, match='gmt masks gradients, and this run computes none'):
        fit(toy(), TOK, lab_data(), get('gmt * mezo'), steps=1, **SETTINGS)


def in_first_step(recipe, seed=0):
    run = fit(toy(), TOK, lab_data(), recipe, steps=1, seed=seed, **SETTINGS)
    return {n: c != 0 for n, c in run.delta.tensors().items()}


def test_a_budget_is_a_share_of_the_model_that_moves_in_a_step():
    model = toy()
    total = sum(p.numel() for p in model.parameters())
    for each in ('tensor', 'model'):
        moved = sum(int(m.sum()) for m in in_first_step(gmt(each=each, budget=.01)).values())
        assert abs(moved - .01*total) <= (30 if each == 'tensor' else 1) # a tensor rounds for itself


def test_a_random_mask_is_of_the_same_size_and_drawn_anew_from_the_seed():
    a, again, other = (in_first_step(gmt(.2, by='random'), seed=s) for s in (0, 0, 1))
    assert same(a, again) and not same(a, other)
    n = 'model.layers.0.mlp.up_proj.weight'
    assert abs(float(a[n].float().mean()) - .2) < .01


def test_it_masks_what_a_delta_trains():
    run = fit(toy(), TOK, lab_data(), get('gmt(.25) * lora(r=4)'), steps=1, **SETTINGS)
    B = run.delta.attached.deltas['model.layers.0.mlp.up_proj.weight'].B
    assert int((B != 0).sum()) == round(.25*B.numel()) # B begins at 0


def test_it_goes_on_after_a_stop(tmp_path):
    recipe = gmt(.2, by='random')
    run = lambda **more: fit(toy(), TOK, lab_data(), recipe, steps=4, **SETTINGS, **more)
    assert_resumes(run, tmp_path, at=2)


@pytest.mark.parametrize('wrong, says', [
    (dict(keep=0.), 'keep is 0.0; it is a share'), (dict(keep=True), 'keep is True'),
    (dict(budget=1.5), 'budget is 1.5'), (dict(each='row'), "each is 'row'"), (dict(by='weight'), "by 'weight'")])
def test_wrong_arguments_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        gmt(**wrong)
