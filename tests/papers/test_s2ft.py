"S2FT: against the official layer, written out, and the edges of its arguments"
import pytest
import torch
from ftlab.adapters.attach import attach
from ftlab.adapters.slices import Slices
from ftlab.adapters.subsets.s2ft import coupled, s2ft
from ftlab.core.batches import Unread
from tests.tiny import tiny
from tests.toys import toy


def chosen_lines(mask):
    return mask.all(0).nonzero().squeeze(1)


def test_the_layer_is_the_official_one_up_to_the_order_of_channels():
    "S2RowLinear (s2ft/s2.py): after a permutation, y = W x + s2 x[start:end]"
    torch.manual_seed(0)
    model = toy()
    mlp = model.model.layers[0].mlp
    x, name = torch.randn(3, 7, 32), 'model.layers.0.mlp.down_proj.weight'
    mask = torch.zeros_like(mlp.down_proj.weight, dtype=torch.bool)
    picked = [3, 17, 40]
    mask[:, picked] = True
    order = picked + [i for i in range(80) if i not in picked]
    up, gate = mlp.up_proj.weight[order], mlp.gate_proj.weight[order]
    down = mlp.down_proj.weight[:, order]
    s2 = torch.randn(32, 3, requires_grad=True)
    inside = torch.nn.functional.silu(x @ gate.T)*(x @ up.T)
    official = inside @ down.T + inside[:, :, 0:3] @ s2.T
    official.square().sum().backward()
    att = attach(model, {name: mask}, Slices)
    d = att.deltas[name]
    d.value.data.copy_(s2.detach())
    ours = mlp(x)
    ours.square().sum().backward()
    torch.testing.assert_close(ours, official, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d.value.grad, s2.grad, rtol=1e-5, atol=1e-4)


def test_the_default_draws_three_percent_of_the_channels_of_all_blocks_together():
    model = toy(hidden=64)
    chosen = s2ft().select(model, seed=3)
    assert sum(len(chosen_lines(m)) for m in chosen.values()) == int(.03*2*160)
    assert all(n.endswith('down_proj.weight') for n in chosen)
    other = s2ft().select(model, seed=4)
    equal = [torch.equal(m, other[n]) for n, m in chosen.items() if n in other]
    same = chosen.keys() == other.keys() and all(equal)
    assert not same


@pytest.mark.parametrize('budget', (.01, .05, .1))
def test_a_budget_is_met_to_within_a_channel(budget):
    model = toy(hidden=64)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(int(m.sum()) for m in s2ft(budget=budget).select(model).values())
    assert 0 <= budget*total + .5 - trained <= 64 + .5


@pytest.mark.parametrize('tune', (('o', 'down'), ('down', 'o'), ('v', 'o', 'up', 'down')))
@pytest.mark.parametrize('budget', (.01, .05, .1))
def test_what_is_less_than_a_head_goes_to_channels(budget, tune):
    model = toy(hidden=64)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(int(m.sum()) for m in s2ft(budget=budget, tune=tune).select(model).values())
    assert 0 <= budget*total + .5 - trained <= 2*64 + .5


def test_heads_are_whole_also_where_the_model_stores_a_weight_transposed():
    chosen = s2ft(.5, ('o', 'down')).select(tiny('gpt2'))
    width = tiny('gpt2').config.n_embd//tiny('gpt2').config.n_head
    heads = [m for n, m in chosen.items() if 'attn.c_proj' in n]
    assert heads
    for m in heads: # stored as [in, out]: the inputs are rows
        rows = m.all(1)
        assert rows.sum()*m.shape[1] == m.sum()
        assert all(len(set(h.tolist())) == 1 for h in rows.view(-1, width))


def test_by_activation_the_quietest_channels_are_first():
    model = toy()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] = 0. # this channel is silent
    ids = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(0))
    batches = [dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)]
    chosen = coupled(.007, by='activation')(model, batches)
    assert {n: chosen_lines(m).tolist() for n, m in chosen.items()} == {'model.layers.1.mlp.down_proj.weight': [5]}
    assert coupled(by='activation')(model, Unread())


@pytest.mark.parametrize('make, says', [
    (lambda: s2ft(tune=('gate',)), 'some of v, o, up, down'), (lambda: s2ft(by='size'), 'random or activation'),
    (lambda: s2ft(0.), 'above 0 and at most 1'), (lambda: s2ft(budget=.9).select(toy()), 'the budget allows'),
    (lambda: s2ft(budget=2.).select(toy()), 'share of the parameters'),
    (lambda: s2ft(.001).select(toy()), 'less than one channel'),
    (lambda: s2ft(tune=('v',)).select(tiny('gpt2')), "no 'v' in its blocks")])
def test_wrong_arguments_say_what_is_wrong(make, says):
    with pytest.raises(ValueError, match=says):
        make()
