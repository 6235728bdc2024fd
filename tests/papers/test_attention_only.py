"Attention only: against the official freezing by names, on every kind of model, and the edges of its arguments"
import pytest
from ftlab.adapters.subsets.attention_only import attention_only, projections
from ftlab.core.anatomy import anatomy
from ftlab.trainers.fit import fit
from tests.tiny import tiny
from tests.toys import TOK, lab_data, toy

OFFICIAL = dict(attention=('self_attn', ('q_proj', 'k_proj', 'v_proj', 'o_proj')),
                gate_up=('mlp', ('gate_proj', 'up_proj')), down=('mlp', ('down_proj',)),
                mlp=('mlp', ('gate_proj', 'up_proj', 'down_proj')))


@pytest.mark.parametrize('tune', OFFICIAL)
@pytest.mark.parametrize('family', ('llama', 'qwen2', 'qwen3', 'mistral', 'gemma'))
def test_what_trains_is_what_the_official_names_unfreeze(family, tune):
    "llava/train/train.py, lines 2057 to 2162: weights and biases, by parts of their names"
    module, keys = OFFICIAL[tune]
    model = tiny(family)
    official = {n for n, _ in model.named_parameters()
                if 'model.layers.' in n and f'.{module}.' in n and any(f'.{k}.' in n for k in keys)}
    assert projections(tune)(model) == dict.fromkeys(official, True)
    assert official
    if family == 'qwen2' and tune == 'attention':
        assert any(n.endswith('bias') for n in official)


@pytest.mark.parametrize('family, reads, writes', [
    ('gpt2', 'mlp.c_fc', 'mlp.c_proj'), ('opt', 'fc1', 'fc2'),
    ('gpt_neox', 'dense_h_to_4h', 'dense_4h_to_h'),
    ('bert', 'intermediate.dense', '.output.dense'),
    ('vit', 'mlp.fc1', 'mlp.fc2'), ('phi3', 'gate_up_proj', 'down'),
    ('mixtral', 'experts.gate_up_proj', 'experts.down_proj')])
def test_models_without_a_gate_train_up_alone(family, reads, writes):
    model = tiny(family)
    chosen = projections('gate_up')(model)
    blocks = len(anatomy(model).blocks)
    assert all(reads in n for n in chosen)
    assert len([n for n in chosen if not n.endswith('bias')]) == blocks
    down = projections('down')(model)
    assert all(writes in n for n in down) and not set(down) & set(chosen)
    assert set(down) | set(chosen) <= set(projections('mlp')(model))
    attention = projections()(model)
    assert attention and not set(attention) & set(projections('mlp')(model))


@pytest.mark.parametrize('tune', ('attention', 'gate_up'))
@pytest.mark.parametrize('budget', (.0001, .01, .1))
def test_a_budget_is_met_exactly_and_drawn_with_the_seed(budget, tune):
    model = toy(hidden=64)
    count = max(1, round(budget*sum(p.numel() for p in model.parameters())))
    select = attention_only(tune, budget).select
    first, again, other = (select(model, seed=s) for s in (0, 0, 1))
    assert sum(int(m.sum()) for m in first.values()) == count
    assert first.keys() == again.keys() and all((m == again[n]).all() for n, m in first.items())
    assert first.keys() != other.keys() or any((m != other[n]).any() for n, m in first.items())


def test_only_these_matrices_move():
    model = toy()
    run = fit(model, TOK, lab_data(), attention_only(), steps=2, batch_size=4, lr=1e-2,
              progress=False)
    moved = {n for n, c in run.delta.tensors().items() if c.any()}
    assert moved == set(anatomy(toy()).matrices('attention'))


@pytest.mark.parametrize('make, says', [
    (lambda: attention_only('gate'), "tune is 'gate'; it must be attention"),
    (lambda: attention_only(budget=0.).select(toy()), 'above 0 and at most 1'),
    (lambda: attention_only(budget=1).select(toy()), 'use a smaller budget')])
def test_wrong_arguments_say_what_is_wrong(make, says):
    with pytest.raises(ValueError, match=says):
        make()
