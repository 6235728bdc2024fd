"Offsets on heads: a delta at a layer's input on all architectures, and LoFiT's choice of heads"
import pytest, torch
from transformers.pytorch_utils import Conv1D
from ftlab.adapters.attach import attach
from ftlab.adapters.store import identity, load_delta, pack, save_delta
from ftlab.adapters.modules.lofit import HeadOffset, HeadScale, head_width, heads, lasso, lofit
from ftlab.trainers.fit import fit
from tiny import DECODERS, ENCODERS, example_inputs, tiny
from toys import TOK, lab_data, logits, same, toy, weights

def out(m):
    return logits(m, example_inputs())

def tune(recipe, steps=6, **more):
    return fit(toy(), TOK, lab_data(), recipe,
               **dict(dict(steps=steps, batch_size=8, progress=False, lr=1e-2), **more))

@torch.no_grad()
def shake(att, seed=1):
    g = torch.Generator().manual_seed(seed)
    for p in att.parameters().values():
        p.add_(.5*torch.randn(p.shape, generator=g))

@pytest.mark.parametrize('make', [HeadScale, HeadOffset])
@pytest.mark.parametrize('family', DECODERS + ENCODERS)
def test_a_delta_at_the_input_leaves_no_trace(family, make, tmp_path):
    m = tiny(family)
    base, was, home, modules = out(m), weights(m), identity(m), list(dict(m.named_modules()))
    chosen = heads([(0, 1), (1, 0), (1, 2)])(m)
    if make is HeadScale:
        chosen = dict.fromkeys(chosen, True)
    att = attach(m, chosen, make)
    assert torch.equal(out(m), base)
    shake(att)
    changed = out(m)
    assert (changed - base).abs().max() > 1e-3
    with att.disabled():
        assert torch.equal(out(m), base)
    save_delta(tmp_path/'d.safetensors', *pack(att), home)
    fresh = tiny(family)
    load_delta(fresh, tmp_path/'d.safetensors')
    assert torch.equal(out(fresh), changed)
    with pytest.raises(ValueError, match='changes activations'):
        att.fold()
    assert att.changes() == {}
    att.detach()
    assert (torch.equal(out(m), base) and same(weights(m), was)
            and list(dict(m.named_modules())) == modules)

@pytest.mark.parametrize('family', DECODERS + ENCODERS)
def test_it_changes_what_the_projection_reads_in_those_columns_and_no_others(family):
    m = tiny(family)
    width = head_width(m)
    n = list(width)[1]
    w, layer = width[n], m.get_submodule(n.removesuffix('.weight'))
    seen = []
    assert w*m.config.num_attention_heads == (layer.weight.shape[0] if isinstance(layer, Conv1D)
                                              else layer.weight.shape[1])

    def watch():
        h = layer.register_forward_hook(
            lambda mod, args, o: seen.append((args[0].detach(), o.detach())))
        out(m)
        h.remove()
        return seen.pop()

    (x, y), att = watch(), attach(m, heads([(1, 2)])(m), HeadOffset)
    d = att.deltas[n]
    assert d.columns.tolist() == list(range(2*w, 3*w))
    shake(att)
    z, u = watch()
    difference = torch.zeros(x.shape[-1]).index_copy(0, d.columns, d.v.detach())
    torch.testing.assert_close(z - x, difference.expand_as(x), atol=1e-6, rtol=0)
    W = layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()
    torch.testing.assert_close(u - y, (W @ difference).expand_as(y), atol=1e-5, rtol=1e-4)

def test_scales_multiply_and_offsets_add():
    z = torch.randn(2, 3, 8)
    W = torch.zeros(5, 8)
    s, o = HeadScale(W), HeadOffset(W, torch.arange(8).expand(5, 8) > 5)
    s.A.data[:] = torch.arange(8.)
    o.v.data[:] = torch.tensor([1., -1.])
    torch.testing.assert_close(s(z), z*torch.arange(1., 9))
    assert torch.equal(o(z)[..., :6], z[..., :6])
    torch.testing.assert_close(o(z)[..., 6:] - z[..., 6:], torch.tensor([1., -1.]).expand(2, 3, 2),
                               atol=1e-6, rtol=0)
    torch.manual_seed(0)
    assert (HeadScale(W, sigma=1e-3).A.abs().max() < 1e-2 and HeadOffset(W, sigma=1e-3).v.any()
            and not HeadOffset(W).v.any())
    assert o(z[0]).shape == (3, 8) # without a batch too

def test_what_cannot_be_a_head_is_refused():
    m = toy()
    for bad in ([(2, 0)], [(0, 4)], [(0, -1)]):
        with pytest.raises(ValueError, match='there is no head'):
            heads(bad)(m)
    m.config.num_attention_heads = 5
    with pytest.raises(ValueError, match='cannot be split into 5 heads'):
        head_width(m)
    for kw in (dict(share=0.), dict(share=1.5), dict(by='probe')):
        with pytest.raises(ValueError, match='share is|by is'):
            lofit(**kw)

class Stages:
    "Notes what was attached at the end of each stage"

    def __init__(self):
        self.found = []

    def after_fit(self, state):
        self.found.append({n: (type(d), {k: v.detach().clone() for k, v in d.state_dict().items()})
                           for n, d in state.attached.deltas.items()})

def test_the_heads_with_the_longest_scales_are_chosen():
    look = Stages()
    run = tune(lofit(share=.25), steps=12, callbacks=(look,))
    first, second = look.found
    width = head_width(toy())
    assert all(t is HeadScale for t, _ in first.values())
    size = {(b, h): float(first[n][1]['A'][h*w:(h + 1)*w].norm())
            for b, (n, w) in enumerate(width.items()) for h in range(4)}
    assert len(size) == 8
    chosen = run.settings['stages'][-1]['arguments']['heads']
    assert [tuple(c) for c in chosen] == sorted(size, key=size.get, reverse=True)[:2]
    held = {n: d.columns.tolist() for n, d in run.delta.attached.deltas.items()}
    want = {}
    for b, h in chosen:
        n = list(width)[b]
        want.setdefault(n, []).extend(range(h*width[n], (h + 1)*width[n]))
    assert (held == {n: sorted(c) for n, c in want.items()}
            and all(d.v.any() for d in run.delta.attached.deltas.values()))
    assert (same(weights(run.model), weights(toy()))
            and sum(p.numel() for p in run.delta.attached.parameters().values()) == 2*8)

def test_random_heads_are_as_many_and_depend_on_the_seed():
    picks = [sorted(map(tuple, tune(lofit(share=.5, by='random'), steps=4,
                                    seed=s).settings['stages'][-1]['arguments']['heads']))
             for s in (0, 0, 1)]
    assert picks[0] == picks[1] != picks[2] and len(picks[0]) == 4

def test_the_price_of_scales_is_their_sum_and_shrinks_them():
    class State:
        values = [torch.tensor([1., -2.]), torch.tensor([3.])]
        delta = type('D', (), dict(parameters=lambda _: State.values))()
        attached = type('A', (), dict(own=dict(a=delta)))()
        batches = [0, 1]

    assert float(lasso(.5)(State)) == .5*6/2
    sizes = []
    for l1 in (0., 1.):
        look = Stages()
        tune(lofit(l1=l1), steps=20, callbacks=(look,))
        sizes.append(sum(float(s['A'].abs().sum()) for _, s in look.found[0].values()))
    assert sizes[1] < .5*sizes[0]

class Rates:
    "Notes the learning rate of each stage, as the step and the record have it"

    def __init__(self):
        self.found = []

    def before_fit(self, state):
        self.found.append(state.settings['lr'])

@pytest.mark.parametrize('recipe, given, want', [
    (lofit(), None, [5e-3, 1e-2]), # the official scripts of Llama-2-7B
    (lofit(lr_select=1e-3, lr_offset=2e-2), None, [1e-3, 2e-2]), # of the 13B model
    (lofit(by='random', lr_select=5e-4), None, [5e-4, 1e-2]),
    (lofit(lr_select=1e-3, lr_offset=2e-2), .03, [.03, .03])])
def test_each_stage_has_a_rate_of_its_own_unless_fit_is_given_one(recipe, given, want):
    look, ends = Rates(), Stages()
    run = tune(recipe, lr=given, steps=4, callbacks=(look, ends))
    assert look.found == want
    assert ([s['lr'] for s in run.settings['stages']]
            == [recipe.arguments['lr_select'], recipe.arguments['lr_offset']])

def test_the_rate_of_a_stage_is_what_its_values_move_by():
    "Adam's first step moves every value by the rate: 2 stages of 1 step each"
    ends = Stages()
    tune(lofit(l1=0., lr_select=1e-3, lr_offset=2e-2), lr=None, steps=2, schedule='constant',
         callbacks=(ends,))
    first, second = ends.found
    for found, key, rate in ((first, 'A', 1e-3), (second, 'v', 2e-2)):
        moved = torch.cat([s[key] for _, s in found.values()]).abs()
        assert moved.max() <= rate*1.001 and moved.median() > .9*rate

@pytest.mark.parametrize('kw', [dict(lr_select=0.), dict(lr_offset=-1.),
                                dict(lr_offset=float('nan')), dict(lr_select=float('inf'))])
def test_a_rate_that_is_none_is_refused(kw):
    with pytest.raises(ValueError, match=f'{next(iter(kw))} is .*above 0 and finite'):
        lofit(**kw)

@pytest.mark.parametrize('kw', [dict(l1=-1.), dict(l1=float('nan')), dict(sigma=-.1),
                                dict(sigma=float('inf'))])
def test_a_penalty_or_noise_below_zero_is_refused(kw):
    with pytest.raises(ValueError, match=f'{next(iter(kw))} is .*0 or more'):
        lofit(**kw)

def test_noise_at_the_start_is_declared():
    assert ('starts as the base' in lofit().promises
            and 'starts as the base' in lofit(sigma=1e-3).waives
            and tune(lofit(sigma=1e-3), steps=4).log)
