"LAPE: the official selection written out, what trains, and the edges of its arguments"
import math
import pytest
import torch
from ftlab import data
from ftlab.adapters.subsets.lape import by_entropy, entropies, lape, language_neurons, of_language
from ftlab.core.batches import Sample, Unread
from ftlab.core.tokens import encode_all
from tests.tiny import tiny
from tests.toys import TOK, lab_data, toy

OTHERS = (data('sort', n=30), data('max', n=30))


def sample():
    encode = lambda rows, kind: encode_all(rows, TOK, kind)
    return Sample(encode(lab_data().train[:20], 'text'), TOK.pad_token_id, encode=encode)


def activity(neurons=400):
    draw = torch.Generator().manual_seed(1)
    return torch.rand(neurons, 3, generator=draw)**torch.tensor([2., 3., 4.])


def official(p, rate):
    "identify.py, a neuron at a time: those of the first language"
    every = sorted(x for line in p for x in line)
    bar = every[round(len(every)*.95) - 1]
    entropy = []
    for line in p:
        shares = [x/sum(line) for x in line]
        H = -sum(s*math.log(s) for s in shares if s > 0)
        entropy.append(H if any(x > bar for x in line) else math.inf)
    lowest = sorted(range(len(p)), key=lambda j: entropy[j])[:round(len(p)*rate)]
    return sorted(j for j in lowest if p[j][0] > bar)


@pytest.mark.parametrize('rate', (.01, .05, .2))
def test_neurons_are_those_of_the_official_code(rate):
    p = activity().double()
    found = of_language(p, rate)
    assert sorted(found) == official(p.tolist(), rate)
    assert entropies(p)[found].diff().ge(0).all()


def test_silent_neurons_have_no_entropy_and_even_ones_the_highest():
    p = torch.tensor([[0., 0.], [.4, .4], [.4, 0.]])
    torch.testing.assert_close(entropies(p), torch.tensor([0., math.log(2), 0.]))


def test_within_a_budget_its_own_neurons_come_first():
    p = activity()
    order, mine = by_entropy(p), of_language(p, 1.)
    assert order[:len(mine)] == mine and sorted(order) == list(range(len(p))) and len(mine) > 10
    assert p[order[len(mine):], 0].diff().le(0).all()


def test_of_neurons_without_an_own_one_those_of_other_languages_come_last():
    p = torch.tensor([[.0, .9], [.3, .3], [.2, .1], [.0, .0]])
    assert by_entropy(p)[:2] == [1, 2] # the first and the last have an entropy of 0


def test_random_neurons_are_as_many_as_those_of_the_language():
    model, s = toy(), sample()
    count = lambda r: sum(int(m.sum()) for m in r.select(model, s).values())
    own, drawn = (lape(.6, OTHERS, by, rows=8) for by in ('entropy', 'random'))
    assert count(own) == count(drawn) < .5*count(lape(.6, by='random'))


def test_others_are_one_language_or_several():
    assert len(lape(others='sort').select.others) == 1
    assert len(lape(others={'sort': .5, 'max': .5}).select.others) == 1
    assert lape(others=OTHERS[0]).select.others == OTHERS[:1]
    assert len(lape(others=OTHERS).select.others) == 2


def test_a_neuron_is_a_row_of_gate_and_up_and_a_column_of_down():
    model = toy()
    chosen = language_neurons(budget=.01, others=OTHERS, rows=8)(model, sample())
    for i in range(2):
        name = f'model.layers.{i}.mlp.'
        if f'{name}up_proj.weight' not in chosen:
            continue
        up = chosen[f'{name}up_proj.weight']
        assert torch.equal(up, chosen[f'{name}gate_proj.weight'])
        assert torch.equal(up, chosen[f'{name}down_proj.weight'].T)
        assert torch.equal(up, up[:, :1].expand_as(up)) and up.any()
    trained = sum(int(m.sum()) for m in chosen.values())
    assert 0 <= .01*sum(p.numel() for p in model.parameters()) + .5 - trained <= 96 + .5


def test_what_is_counted_is_how_often_the_gate_is_positive():
    model, s = toy(), sample()
    layers = [dict(gate=f'model.layers.{i}.mlp.gate_proj.weight',
                   up=f'model.layers.{i}.mlp.up_proj.weight') for i in range(2)]
    p = language_neurons(others=OTHERS, rows=6)._activity(model, s, layers)
    seen = []
    hook = model.model.layers[1].mlp.gate_proj.register_forward_hook(
        lambda m, args, out: seen.append(torch.nn.functional.silu(out[0]) > 0))
    with torch.no_grad():
        for r in s.other(OTHERS[0], 6).rows:
            model(torch.tensor([r['input_ids']]))
    hook.remove()
    torch.testing.assert_close(p[80:, 1], torch.cat(seen).float().mean(0))


@pytest.mark.parametrize('budget', (.003, .01, .1))
def test_a_budget_is_met_to_within_a_neuron(budget):
    model = toy(hidden=64)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(int(m.sum()) for m in lape(budget=budget, by='random').select(model).values())
    assert 0 <= budget*total + .5 - trained <= 3*64 + .5


def test_models_without_a_gate_and_with_weights_stored_transposed():
    model = tiny('gpt2')
    chosen = lape(.1, by='random').select(model)
    for n, m in chosen.items():
        along = 1 if n.endswith('c_fc.weight') else 0
        assert m.shape == model.get_parameter(n).shape and m.any(1 - along).any()
        assert int(m.all(1 - along).sum())*m.shape[1 - along] == int(m.sum())
    assert {n.split('.')[-2] for n in chosen} == {'c_fc', 'c_proj'}


@pytest.mark.parametrize('make, says', [
    (lambda: lape(by='x'), 'entropy or random'), (lambda: lape(0.), 'above 0 and at most 1'),
    (lambda: lape().select(toy(), sample()), 'name others'),
    (lambda: lape(others=OTHERS).select(toy()), 'there are none'),
    (lambda: lape(budget=.9).select(toy(), Unread()), 'the budget allows'),
    (lambda: lape(budget=1e-6).select(toy(), Unread()), 'the budget allows'),
    (lambda: lape(.001).select(toy(), Unread()), 'no neuron is chosen')])
def test_wrong_arguments_say_what_is_wrong(make, says):
    with pytest.raises(ValueError, match=says):
        make()
