"Critical layers: CKA and the state that is read against the official formula, and which blocks are chosen"
import pytest
import torch
from ftlab.adapters.lowrank import LoRA
from ftlab.adapters.subsets.critical_layers import (change_points, critical_layers,
                                                    prompt_states)
from ftlab.core.anatomy import anatomy
from ftlab.core.batches import Sample, Unread
from ftlab.core.recipe import Recipe
from ftlab.core.tokens import encode_all
from ftlab.trainers.fit import fit
from tests.tiny import inputs_for, tiny
from tests.toys import TOK, lab_data, toy


def rows(n=24):
    return Sample(encode_all(lab_data().train[:n], TOK, 'text'), TOK.pad_token_id)


def centred_grams(X):
    "The Gram matrix of the rows, centred on both sides"
    n = len(X)
    H = torch.eye(n, dtype=torch.double) - torch.full((n, n), 1/n, dtype=torch.double)
    return H @ (X.double() @ X.double().T) @ H


def test_delta_is_the_mean_of_the_official_cka_over_neighbours():
    model = tiny('llama', num_hidden_layers=5)
    batch = {k: v[:, :] for k, v in inputs_for('llama').items()}
    batch = {k: torch.cat([v, v.roll(1, 1), v.roll(2, 1)]) for k, v in batch.items()}
    grams = [centred_grams(x) for x in prompt_states(model, batch)]
    hsic = lambda K, L: (K*L).sum()
    for near in (1, 2):
        got = critical_layers(model, batch, neighbours=near)
        for i, K in enumerate(grams):
            others = [L for j, L in enumerate(grams) if 0 < abs(i - j) <= near]
            want = [hsic(K, L)/(hsic(K, K)*hsic(L, L)).sqrt() for L in others]
            assert abs(float(got[i]) - float(sum(want)/len(want))) < 1e-5


@pytest.mark.parametrize('family', 'llama qwen2 gemma gpt2 opt gpt_neox'.split())
def test_the_state_is_that_of_the_prompts_last_token(family):
    "Each prompt alone, without padding and answer, gives the same state"
    model = tiny(family)
    ids = inputs_for(family)['input_ids']
    labels = ids.clone()
    labels[0, :4] = labels[1, :5] = -100
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels[1, 6:] = -100
    got = prompt_states(model, dict(input_ids=ids, attention_mask=mask, labels=labels))
    seen = []
    last = model.get_submodule(anatomy(model).blocks[-1].name)
    hook = last.register_forward_hook(
        lambda m, a, y: seen.append((y[0] if isinstance(y, tuple) else y)[0, -1]))
    with torch.no_grad():
        for i, n in enumerate((4, 5)):
            model(input_ids=ids[i:i + 1, :n])
    hook.remove()
    torch.testing.assert_close(got[-1], torch.stack(seen), rtol=1e-4, atol=1e-4)


def test_plain_text_is_read_at_its_last_token_whether_or_not_it_is_padded():
    "It has labels from the start; read as an answer, all rows would be read at their first token"
    model, ids = tiny('llama'), inputs_for('llama')['input_ids']
    for padded in (slice(5, None), slice(0, 2)):
        mask = torch.ones_like(ids)
        mask[1, padded] = 0
        batch = dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        plain = {k: v for k, v in batch.items() if k != 'labels'}
        for got, want in zip(prompt_states(model, batch), prompt_states(model, plain)):
            assert torch.equal(got, want)
            assert not torch.equal(got[0], got[1])


@pytest.mark.parametrize('family', 'bert vit'.split())
def test_an_encoder_is_read_at_its_first_token(family):
    model = tiny(family)
    inputs = inputs_for(family)
    states = prompt_states(model, inputs, at='first')
    with torch.no_grad():
        want = model(**inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[0], want[1][:, 0], rtol=1e-4, atol=1e-4)
    assert critical_layers(model, inputs, at='first').shape == (2,)


def test_the_selection_reads_the_token_that_it_is_told():
    model = tiny('bert', num_hidden_layers=6)
    batch = inputs_for('bert')
    batch = {k: torch.cat([v, v.roll(1, 1), v.roll(2, 1)]) for k, v in batch.items()}
    for at in ('first', 'last'):
        want = critical_layers(model, batch, at=at).argsort(stable=True)[:2].tolist()
        chosen = change_points(2, edge=0, at=at)(model, batch)
        assert {anatomy(model).location(n)[0] for n in chosen} == set(want)


def test_a_block_that_adds_nothing_is_stable_and_the_others_are_chosen():
    model = tiny('llama', num_hidden_layers=6)
    with torch.no_grad():
        for b in anatomy(model).blocks[1:4]:
            model.get_parameter(b.attention['o']).zero_()
            model.get_parameter(b.mlp['down']).zero_()
    batch = inputs_for('llama')
    batch = {k: torch.cat([v, v.roll(1, 1), v.roll(2, 1)]) for k, v in batch.items()}
    d = critical_layers(model, batch)
    assert (d[1:3] > 1 - 1e-6).all() and d[1:3].min() > d[4:].max()
    blocks = lambda rule: {anatomy(model).location(n)[0] for n in rule(model, batch)}
    for of in ('critical', 'stable'):
        want = d.argsort(descending=of == 'stable', stable=True)[:2].tolist()
        assert blocks(change_points(2, of, edge=0)) == set(want)
    assert blocks(change_points(2, 'rest', edge=0)) == {None, *range(6)} - blocks(
        change_points(2, edge=0))


def test_the_official_ends_are_left_out_and_a_quarter_is_chosen():
    model = tiny('llama', num_hidden_layers=12)
    batch = inputs_for('llama')
    chosen = change_points(texts=(batch,))(model)
    found = {anatomy(model).location(n)[0] for n in chosen}
    assert len(found) == 3 and found <= set(range(1, 11))


def test_a_budget_takes_whole_blocks_and_random_ones_follow_the_seed():
    model = tiny('llama', num_hidden_layers=6)
    a, batch = anatomy(model), inputs_for('llama')
    total = sum(p.numel() for p in model.parameters())
    one = sum(model.get_parameter(n).numel() for n in a.blocks[1].parameters)
    for budget in (one/total, .5):
        chosen = change_points(budget=budget, edge=0)(model, batch)
        count = sum(model.get_parameter(n).numel() for n in chosen)
        assert 0 <= budget*total + .5 - count < one + 1
    drawn = [frozenset(change_points(2, 'random')(model, None, s)) for s in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    assert change_points(2)(model, Unread()).keys() == change_points(2)(model, Unread()).keys()


def test_it_trains_the_chosen_blocks_alone_and_composes_with_a_delta():
    base = {n: p.detach().clone() for n, p in toy().named_parameters()}
    for recipe in (Recipe('c', select=change_points(1)),
                   Recipe('l', select=change_points(1, which=('attention', 'mlp')), delta=LoRA)):
        run = fit(toy(), TOK, lab_data(), recipe, steps=2, batch_size=4, lr=1e-2, progress=False)
        run.delta.attached.fold()
        moved = {anatomy(run.model).location(n)[0] for n, p in run.model.named_parameters()
                 if not torch.equal(p, base[n])}
        assert len(moved) == 1 and None not in moved


@pytest.mark.parametrize('make, says', [
    (lambda: change_points(0), 'at least 1'), (lambda: change_points(of='x'), 'critical, stable'),
    (lambda: change_points(at='middle'), 'last or first'),
    (lambda: change_points(of='rest', budget=.1), 'takes a count'),
    (lambda: change_points(3)(toy(), rows()), 'has 2 blocks'),
    (lambda: change_points(1)(toy()), 'looks at text'),
    (lambda: change_points(budget=1e-4)(toy(), rows()), 'the smallest unit has'),
    (lambda: change_points(budget=1.)(toy(), rows()), 'that may be chosen'),
    (lambda: critical_layers(toy(), rows(), neighbours=0), 'at least 1'),
    (lambda: critical_layers(tiny('llama', num_hidden_layers=1), inputs_for('llama')),
     'one block')])
def test_wrong_arguments_say_what_is_wrong(make, says):
    with pytest.raises(ValueError, match=says):
        make()
