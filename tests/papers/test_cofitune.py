"CoFiTune: its importance and its step against plain torch, the search, and the edges of its arguments"
import pytest
import torch
from torch.nn.functional import dropout
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.subsets.cofitune import (SoftMask, cofitune, halves, importance, modules,
                                             projections, quarters, region, search, standardized)
from ftlab.core.anatomy import anatomy
from ftlab.trainers.fit import fit
from tests.tiny import example_inputs, inputs_for, tiny
from tests.toys import TOK, lab_data, toy


class Masked(torch.nn.Module):
    "Llama's MLP with masks on what `up` and `down` write, and dropout after it, as in the official model"
    def __init__(self, mlp, width, hidden, share):
        super().__init__()
        self.mlp, self.share = mlp, share
        self.up = torch.ones(width, requires_grad=True)
        self.down = torch.ones(hidden, requires_grad=True)

    def forward(self, x):
        m = self.mlp
        h = m.act_fn(m.gate_proj(x))*(m.up_proj(x)*self.up)
        return dropout(m.down_proj(h)*self.down, self.share, training=True)


def test_the_importance_is_that_of_masks_in_the_model_itself():
    share = .1
    model, batch = tiny('llama'), example_inputs()
    got = importance(tiny('llama'), [batch, batch], share, seed=3)
    masked = []
    for layer in model.model.layers:
        layer.mlp = Masked(layer.mlp, 80, 32, share)
        masked.append(layer.mlp)
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda m, args: (dropout(args[0], share, training=True),))
    torch.manual_seed(3)
    for _ in range(2):
        p = [model(**batch).logits.flatten(0, 1).log_softmax(-1) for _ in range(2)]
        loss = .1/len(batch['input_ids'])*(p[1].exp()*(p[1] - p[0])).sum() # the official scale
        loss.backward()
    for i, m in enumerate(masked):
        for role, s in (('up', m.up.grad/14), ('down', m.down.grad/14)):
            want = torch.tanh((s - s.mean())/s.std()).abs()
            name = anatomy(tiny('llama')).blocks[i].mlp[role]
            torch.testing.assert_close(got[name], want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('family', 'llama qwen2 gemma gpt2 opt gpt_neox bert vit'.split())
def test_every_family_has_a_factor_for_each_unit(family):
    model, a = tiny(family), anatomy(tiny(family))
    state = torch.get_rng_state()
    found = importance(model, [inputs_for(family)], .2)
    assert torch.equal(state, torch.get_rng_state())
    for b in a.blocks:
        for role in ('up', 'down'):
            n = b.mlp[role]
            out = a.shapes[n][1 if n in a.transposed else 0]
            assert found[n].shape == (out,) and 0 < found[n].max() < 1 and found[n].min() >= 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def steps_of(soft, model=None, **more):
    seen = []

    class Look:
        def after_backward(self, state):
            seen.append({n: (p.detach().clone(), p.grad.clone()) for n, p in
                         state.model.named_parameters() if p.grad is not None})
    run = fit(model or toy(), TOK, lab_data(), cofitune(soft=soft, rows=8), steps=2, batch_size=4,
              lr=1e-2, weight_decay=0., schedule='constant', clip=None, progress=False,
              callbacks=(Look(),), **more)
    return run, seen


def test_the_mask_reaches_gradient_or_change_unit_by_unit():
    plain, first = steps_of(None)
    runs = {soft: steps_of(soft) for soft in ('gradient', 'change')}
    name = anatomy(toy()).blocks[0].mlp['up']
    W0 = toy().get_parameter(name).detach()
    ratio = runs['gradient'][1][0][name][1]/first[0][name][1]
    factor = ratio.nanmedian(1, keepdim=True).values
    assert torch.allclose(ratio[~ratio.isnan()], factor.expand_as(ratio)[~ratio.isnan()], rtol=1e-3)
    assert (0 < factor).all() and (factor <= 1).all() and factor.std() > .05
    moved = {s: x[1][name][0] - W0 for s, x in
             dict(none=first, gradient=runs['gradient'][1], change=runs['change'][1]).items()}
    torch.testing.assert_close(moved['change'], factor*moved['none'], rtol=1e-3, atol=1e-6)
    near = lambda x: (x - moved['none']).norm()/moved['none'].norm()
    assert near(moved['gradient']) < .05 < .2 < near(moved['change'])


def test_standardized_does_not_see_scale_or_shift():
    s = torch.randn(50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(standardized(s), standardized(-7*s + 3))
    assert not standardized(torch.ones(5)).any()


def test_the_search_descends_to_the_best_and_counts_its_trainings():
    root = region((0., 1.), ('attention', 'up', 'down'))
    half = halves(root)[1]
    assert half.where == (.25, .75) and [m.roles for m in modules(half)] == [
        ('attention',), ('up', 'down')]
    assert [q.where for q in quarters(half)] == [(.25, .5), (.5, .75)]
    assert [p.roles for p in projections(modules(half)[1])] == [('up',), ('down',)]
    seen = []
    want = [1, 5, 2, 3, 6, 7, 4, 6, 9]

    def score(model):
        seen.append({n for n, p in model.named_parameters() if not torch.equal(p, base[n])})
        return want[len(seen) - 1]
    fresh = lambda: tiny('llama', num_hidden_layers=4, vocab_size=len(TOK))
    base = {n: p.detach().clone() for n, p in fresh().named_parameters()}
    found = search(fresh, TOK, lab_data(), score, steps=1, batch_size=2, lr=1e-2)
    assert found[0] == (9., region((.25, .5), ('down',))) and len(found) == 9
    assert seen[-1] == {anatomy(fresh()).blocks[1].mlp['down']}
    seen.clear()
    want[3:5] = [0, 0] # neither module is better than both
    assert len(search(fresh, TOK, lab_data(), score, steps=1, batch_size=2)) == 5


def test_general_text_may_be_given():
    rows = tuple(dict(prompt=r['prompt'], response=r['response']) for r in lab_data().train[:8])
    run = fit(toy(), TOK, lab_data(), cofitune(general=rows), steps=1, batch_size=4, progress=False)
    assert run.log


@pytest.mark.parametrize('make, says', [
    (lambda: cofitune(soft='x'), 'must be'), (lambda: cofitune((.5, .25)), 'ascending'),
    (lambda: cofitune((0., .1)).select(toy()), 'wider range'),
    (lambda: cofitune(roles=('x',)).select(toy()), "no part or role is called 'x'"),
    (lambda: cofitune(roles=('router',)).select(toy()), 'other roles'),
    (lambda: SoftMask().after_step(None), 'computes none')])
def test_wrong_arguments_say_what_is_wrong(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_it_refuses_an_adapter_under_its_mask():
    from dataclasses import replace
    with pytest.raises(ValueError, match='no adapter'):
        fit(toy(), TOK, lab_data(), replace(cofitune(roles=('attention',)), delta=lora().delta),
            steps=1, progress=False)


def test_a_mask_that_has_nothing_to_do_is_refused():
    for roles in (('attention',), ('q', 'gate')):
        with pytest.raises(ValueError, match='soft=None'):
            fit(toy(), TOK, lab_data(), cofitune(roles=roles), steps=1, batch_size=2,
                progress=False)
    with pytest.raises(ValueError, match='no up and down'):
        importance(tiny('mixtral'), [inputs_for('mixtral')])
