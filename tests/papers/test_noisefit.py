"noisefit: what its page cannot say about itself"
import pytest
import torch
import torch.nn.functional as F
from ftlab import methods
from ftlab.core.recipe import Recipe
from ftlab.core.state import State
from ftlab.trainers.fit import fit
from ftlab.trainers.losses.noisefit import (ChooseLayers, blocks_of, noise_scale, noisefit,
                                            noisy, signal_to_noise)
from ftlab.trainers.objective import loss_mask
from tiny import tiny
from toys import TOK, assert_resumes, classifier, label_data, lab_data, probe, same, toy, weights


def spread_of(h, token):
    "The noise of one token's features by the official formula, one number at a time; the batch's spread is left out"
    x = h[token].tolist()
    n = len(x)

    def median(v):
        return sorted(v)[(len(v) - 1)//2] # as torch: the lower of two

    def variance(v):
        return sum((a - sum(v)/n)**2 for a in v)/(n - 1)
    each = [variance(t) for t in h.tolist()]
    factor = min(5., torch.tensor(variance(x)/(sum(each)/len(each) + 1e-6)).exp().item())
    m = median(x)
    mad = max(median([abs(a - m) for a in x]), 1e-6*sum(a*a for a in x)**.5)
    return [mad*torch.tensor(-.1*abs(a - m)/(mad + 1e-6)).exp().item()*factor for a in x]


def test_the_noise_is_that_of_the_official_formula():
    h = 3*torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h[2] *= 4 # so that its factor reaches the bound
    ours = noise_scale(h[None], .7)[0]
    for t in range(5):
        theirs = .7*torch.tensor(spread_of(h, t), dtype=torch.float64)
        torch.testing.assert_close(ours[t], theirs, atol=1e-9, rtol=1e-6)


def state_of(model, batch, chosen=(0, 1)):
    state = State(model)
    state.batch, state.count = batch, int(loss_mask(batch['labels']).sum())
    state.extra['noisy layers'] = list(chosen)
    return state


def noisy_by_hand(model, batch, seed, s=.5):
    "Both noisy passes with the noise drawn here, in the order in which the model's blocks run"
    torch.manual_seed(seed)
    out = []
    for _ in range(2):
        def add(module, args, h):
            h = h[0] if isinstance(h, tuple) else h
            scale = s*h.std().detach()*s*noise_scale(h, 1.)
            return h + torch.randn(h.shape)*scale
        hooks = [b.register_forward_hook(add) for b in model.model.layers]
        inputs = dict(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'])
        out.append(model(**inputs).logits)
        for h in hooks:
            h.remove()
    return out


@pytest.mark.parametrize('alpha, c', [(.5, .1), (.3, 0.), (1., 2.)])
def test_the_loss_is_the_official_one_over_alpha(alpha, c):
    model, batch = toy(), probe()
    state = state_of(model, batch)
    torch.manual_seed(3)
    ours = noisefit(2, std=.5, alpha=alpha, consistency=c).objective(state)
    y = batch['labels'][:, 1:]
    on = y != -100
    clean = model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits
    one, two = noisy_by_hand(model, batch, 3)

    def divergence(of, to): # as torch writes it: KL(to || of)
        each = F.kl_div(of.log_softmax(-1), to.softmax(-1), reduction='none').sum(-1)[:, :-1]
        return each[on].mean()
    ce = F.cross_entropy(clean[:, :-1][on], y[on])
    official = (alpha*ce + (1 - alpha)*.5*(divergence(one, clean) + divergence(two, clean))
                + c*divergence(one, two))
    torch.testing.assert_close(ours, official/alpha, atol=1e-6, rtol=1e-5)
    assert (official/alpha - ce).item() > 1e-6 or alpha == 1 and c == 0
    a, b = (torch.autograd.grad(x, list(model.parameters()), retain_graph=True)
            for x in (ours, official/alpha))
    for x, z in zip(a, b):
        torch.testing.assert_close(x, z, atol=1e-6, rtol=1e-4)


def test_without_noise_it_is_plain_fine_tuning():
    runs = [fit(toy(), TOK, lab_data(), r, steps=3, batch_size=8, seed=0, progress=False)
            for r in (noisefit(2, std=0.), Recipe())]
    a, b = (r.delta.attached.changes() for r in runs)
    assert all(torch.allclose(a[n], b[n], atol=2e-5) for n in a)


def test_layers_are_those_of_the_highest_or_lowest_ratio_and_the_choice_survives():
    model = toy()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(30)
    rng = torch.get_rng_state()
    ratio = signal_to_noise(model, probe(), .1)
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.equal(ratio, signal_to_noise(model, probe(), .1))
    picked = {}
    for pick in ('high', 'low'):
        class Look:
            def after_step(self, state):
                picked[pick] = list(state.extra['noisy layers'])
        fit(model, TOK, lab_data(), noisefit(1, pick), steps=1, batch_size=8, lr=1e-9,
            progress=False, callbacks=(Look(),))
    assert picked['high'] != picked['low'] and sorted(picked['high'] + picked['low']) == [0, 1]
    kept, fresh = ChooseLayers(1, 'high', .1), ChooseLayers(1, 'low', .1)
    kept.chosen = [1]
    fresh.load_state_dict(kept.state_dict())
    state = state_of(model, probe())
    fresh.before_fit(state)
    assert state.extra['noisy layers'] == [1]


@pytest.mark.parametrize('family', 'llama qwen2 gemma gpt2 opt gpt_neox bert vit'.split())
def test_blocks_of_real_architectures_get_noise_and_lose_their_hooks(family):
    from tiny import inputs_for
    model, batch = tiny(family), inputs_for(family)
    batch = {k: v for k, v in batch.items() if k != 'labels'}
    with torch.no_grad():
        clean = model(**batch)[0]
        torch.manual_seed(0)
        with noisy(model, [0], 3.):
            moved = model(**batch)[0]
        again = model(**batch)[0]
    assert not torch.allclose(clean, moved) and torch.equal(clean, again)
    assert not any(b._forward_hooks for b in blocks_of(model))


def test_it_combines_with_another_loss_and_trains_an_encoder():
    recipe = methods.dft()*noisefit(1, std=1.)
    run = fit(toy(), TOK, lab_data(), recipe, steps=2, batch_size=8, progress=False)
    assert not same(weights(run.model), weights(toy()))
    run = fit(classifier(), TOK, label_data(), noisefit(1, std=1.), steps=1, batch_size=8,
              progress=False)
    assert run.log[0]['loss'] > run.log[0]['nll']


@pytest.mark.parametrize('wrong', [dict(pick='best'), dict(alpha=0.), dict(layers=0),
                                   dict(std=-1.), dict(std=float('nan')), dict(layers=1.5)])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match='must be high or low'):
        noisefit(**wrong)


@pytest.mark.parametrize('recipe, more, said', [
    (noisefit(3), {}, 'this model has 2; set layers to 2 or less'),
    (noisefit(1), dict(gradient_checkpointing=True), 'cannot run with gradient_checkpointing')])
def test_what_cannot_run_says_why(recipe, more, said):
    with pytest.raises(ValueError, match=said):
        fit(toy(), TOK, lab_data(), recipe, steps=1, batch_size=8, progress=False, **more)


RESUMED = [noisefit(1, std=1.), methods.lora()*noisefit(1, std=1.)]


@pytest.mark.parametrize('recipe', RESUMED, ids=lambda r: r.name)
def test_a_run_that_was_stopped_goes_on_with_the_same_noise_and_the_same_layers(recipe, tmp_path):
    assert_resumes(lambda **more: fit(toy(), TOK, lab_data(), recipe, steps=3, batch_size=8, seed=0,
                                      progress=False, **more), tmp_path/'run')


def test_a_list_of_experts_is_no_list_of_blocks():
    small = dict(mixtral=dict(num_local_experts=2), llama=dict(num_hidden_layers=1))
    for family, more in small.items():
        model = tiny(family, **more)
        assert type(blocks_of(model)[0]).__name__.endswith('DecoderLayer')
