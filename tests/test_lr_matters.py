"""The largest eigenvalue of the Hessian at the start of LoRA and its kin, held against the whole Hessian;
and what the claim's script does not say"""
from types import SimpleNamespace
import pytest
import torch
from tiny import example_inputs, tiny
from torch.func import functional_call, hessian
from torch.nn.attention import SDPBackend, sdpa_kernel
import ftlab.instruments.claims as C
from ftlab.adapters.attach import attach
from ftlab.adapters.modules.lr_matters import METHODS, largest_eigenvalue, lr_matters


@pytest.mark.parametrize('name', ('lora', 'pissa'))
def test_the_eigenvalue_is_that_of_the_whole_hessian(name):
    model, x = tiny('llama'), example_inputs()
    recipe = METHODS[name](r=1, alpha=1., targets='layers.0.self_attn.[qk]_proj')
    torch.manual_seed(0)
    change = attach(model, recipe.select(model), recipe.delta)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in params.values()]
    assert sum(sizes) == sum(p.numel() for p in change.parameters().values())

    def loss(flat):
        at = {n: v.view_as(p) for (n, p), v in zip(params.items(), flat.split(sizes))}
        return functional_call(model, at, kwargs=x).logits.logsumexp(-1).square().mean()

    flat = torch.cat([p.detach().reshape(-1) for p in params.values()])
    with sdpa_kernel(SDPBackend.MATH):
        exact = float(torch.linalg.eigvalsh(hessian(loss)(flat))[-1])
        at = flat.requires_grad_()
        found = [largest_eigenvalue(loss(at), [at], k) for k in (3, 30)]
    assert found[0] <= found[1]*1.001 and found[1] == pytest.approx(exact, rel=1e-2) and exact > 0


def test_the_study_takes_enough_iterations_for_its_estimate_to_settle():
    found = [lr_matters(methods=('lora',), **more).values['lora.eigenvalue']
             for more in ({}, dict(iterations=20))]
    assert found[0] == pytest.approx(found[1], rel=.02)


def test_a_direction_without_a_bend_ends_the_search():
    x = torch.ones(4, requires_grad=True)
    assert largest_eigenvalue((x*x).sum()/2, [x], 9) == pytest.approx(1.)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="'vera' is none of the methods; they are lora, dora"):
        lr_matters(methods=('lora', 'vera'))


def test_the_script_of_the_claim_trains_what_the_arms_say(monkeypatch):
    claim = C.named_claim('lr_matters')
    script, arms = C.script_of(claim), claim.spec['arms']
    assert script.identities() == dict.fromkeys(script.identities(), True)
    tuned = {n for n, a in arms.items() if 'grid' in a}
    assert tuned - {'lora_fewer'} == set(METHODS) and set(arms) - tuned == {'before'}

    seen = []

    def no_fit(model, tok, data, recipe, **how):
        seen.append((recipe.delta, len(data.train), how['steps'], how['lr'], how['seed']))
        return SimpleNamespace(model=model)

    monkeypatch.setattr(script.ftlab, 'fit', no_fit)
    monkeypatch.setattr(script, 'ITEMS', 4)
    some = 'before', 'lora_fewer', 'pissa'
    found = [script.run(n, .01 if n in tuned else None, 10_000, 'validation', 3) for n in some]
    delta = lambda n: METHODS[n.removesuffix('_fewer')](r=8, alpha=8.).delta
    assert seen == [(delta(n), 20 if n == 'lora_fewer' else 200, 3, .01, 10_000)
                    for n in some[1:]]
    assert delta('lora') != delta('pissa') != delta('olora')
    assert all(0 <= f['score'] <= 1 and len(f['items']['score']) == 4 for f in found)
    assert len({f['score'] for f in found}) == 1 # all are the base, as nothing was trained
