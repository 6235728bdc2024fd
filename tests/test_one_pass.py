"The price of a text without its logits: the same runs, by the same recipes, and no logits made"
import pytest, torch
from ftlab import methods
from ftlab.core.recipe import Recipe
from ftlab.trainers import objective
from ftlab.trainers.fit import fit
from ftlab.trainers.objective import kl_to_base, nll, plain_head
from tiny import DECODERS, example_inputs, tiny
from toys import TOK, lab_data, probe, toy, weights

BENT = {'gemma2'} # a soft cap after the head

@pytest.mark.parametrize('family', DECODERS)
def test_a_head_is_plain_where_logits_are_its_product(family):
    m = tiny(family)
    rng = torch.get_rng_state()
    head = plain_head(m, example_inputs())
    assert ((head is not None) == (family not in BENT) and torch.equal(rng, torch.get_rng_state())
            and not (head and (head._forward_pre_hooks or head._forward_hooks)))

def test_a_head_that_somebody_listens_to_is_left_alone():
    m = toy()
    h = m.lm_head.register_forward_hook(lambda *a: None)
    assert plain_head(m, probe()) is None
    h.remove()
    assert plain_head(m, probe()) is m.lm_head

RECIPES = dict(full=Recipe, dft=methods.dft, asft=methods.asft, mezo=methods.mezo,
               asft_lora=lambda: (methods.lora()*methods.dft()
                                  *Recipe('held', objective=nll() + kl_to_base(.3, 'reverse'))),
               lift=lambda: methods.lift(r=2), hft=methods.hft)

def trained(recipe, monkeypatch, heavy, steps=200, model=None, **more):
    monkeypatch.setattr(objective, '_HEAVY', heavy)
    logits = []
    class Look:
        def after_step(self, state):
            logits.append(state.logits is not None)
    run = fit(model or toy(), TOK, lab_data(), recipe,
              **dict(dict(steps=steps, batch_size=8, lr=1e-3, seed=1, progress=False,
                          callbacks=(Look(),)),
                     **more))
    return run, any(logits)

@pytest.mark.parametrize('name', RECIPES)
def test_a_whole_run_without_logits_ends_alike(name, monkeypatch):
    steps, lr = (20, 1e-5) if name == 'mezo' else (200, 3e-4)
    (a, whole), (b, none) = (trained(RECIPES[name](), monkeypatch, heavy, steps, lr=lr)
                             for heavy in (1 << 60, 0))
    assert whole and not none
    x, y = a.delta.attached.changes(), b.delta.attached.changes()
    assert x.keys() == y.keys()
    size = sum(t.double().pow(2).sum() for t in x.values())**.5
    far = sum((x[n] - y[n]).double().pow(2).sum() for n in x)**.5
    assert far < .02*size and size > 0
    assert (all(abs(p['nll'] - q['nll']) < 2e-3*max(1., p['nll'])
                and abs(p['loss'] - q['loss']) < 2e-3*max(1., abs(p['loss']))
                for p, q in zip(a.log, b.log)) and len(a.log) == len(b.log) == steps)

def test_a_whole_run_without_the_cpp_ends_alike(monkeypatch):
    a, _ = trained(methods.asft(), monkeypatch, 0, 50)
    monkeypatch.setenv('FTLAB_NATIVE', 'torch')
    b, _ = trained(methods.asft(), monkeypatch, 0, 50)
    for (n, x), y in zip(weights(a.model).items(), weights(b.model).values()):
        torch.testing.assert_close(x, y, atol=2e-4, rtol=1e-3)
    assert any(not torch.equal(x, y)
               for x, y in zip(weights(a.model).values(), weights(toy()).values()))

def test_small_logits_are_made_whole_as_ever(monkeypatch):
    run, whole = trained(Recipe(), monkeypatch, objective._HEAVY, 2)
    assert whole

def test_who_needs_the_logits_has_them(monkeypatch):
    def mine(state):
        assert state.logits is not None
        return 0.*state.logits.sum()

    assert trained(Recipe('mine', objective=nll() + mine), monkeypatch, 0, 2)[1]
    assert trained(Recipe('two', objective=nll() + kl_to_base() + kl_to_base(.1, 'reverse')),
                   monkeypatch, 0, 2)[1]
    assert trained(methods.copilot(), monkeypatch, 0, 2)[1]

def test_micro_batches_add_up_without_logits(monkeypatch):
    (a, _), (b, _) = (trained(methods.asft(), monkeypatch, 0, 5, accumulate=k) for k in (1, 2))
    for x, y in zip(weights(a.model).values(), weights(b.model).values()):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
