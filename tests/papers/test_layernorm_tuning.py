"LayerNorm tuning: against peft's LN tuning on the same tensors, against the Fisher diagonal written out, its edges"
import pytest
import torch
from ftlab.adapters.subsets.layernorm_tuning import layernorm_tuning, norm_entries, norm_parameters
from ftlab.core.batches import Unread
from tests.tiny import tiny
from tests.toys import toy

PEFT = dict(llama=None, mistral=None, gemma=None, gemma2=None, gpt2=None, # None: peft's own list of modules
            qwen2=['input_layernorm', 'post_attention_layernorm', 'norm'], # peft's has only the second of them
            opt=['self_attn_layer_norm', 'final_layer_norm'], bert=['LayerNorm'],
            gpt_neox=['input_layernorm', 'post_attention_layernorm', 'final_layer_norm'],
            vit=['layernorm_before', 'layernorm_after', 'layernorm'])


@pytest.mark.parametrize('family', PEFT)
def test_what_trains_is_what_peft_trains(family):
    peft = pytest.importorskip('peft')
    ours = set(norm_parameters(tiny(family)))
    wrapped = peft.get_peft_model(tiny(family), peft.LNTuningConfig(target_modules=PEFT[family]))
    names = {n.removeprefix('base_model.model.').replace('.ln_tuning_layers.default', '')
             for n, p in wrapped.named_parameters() if p.requires_grad}
    if family == 'bert': # the norm of the masked-language head lies outside of the table's norms
        names = {n for n in names if not n.startswith('cls.')}
    assert ours == names


@pytest.mark.peer('layernorm_tuning', 'peft', 'outputs after three steps of AdamW', tolerance=1e-6)
def test_a_step_is_peft_s_step_on_the_same_tensors(tolerance):
    peft = pytest.importorskip('peft')
    ours, theirs = toy(), peft.get_peft_model(toy(), peft.LNTuningConfig())
    ids = torch.randint(5, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    ours.requires_grad_(False)
    mine = [ours.get_parameter(n).requires_grad_() for n in layernorm_tuning().select(ours)]
    peft_s = [p for p in theirs.parameters() if p.requires_grad]
    for model, params in ((ours, mine), (theirs, peft_s)):
        opt = torch.optim.AdamW(params, lr=1e-2)
        for _ in range(3):
            opt.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            opt.step()
    torch.testing.assert_close(ours(ids).logits, theirs(input_ids=ids).logits, rtol=0,
                               atol=tolerance)
    assert not torch.allclose(ours(ids).logits, toy()(ids).logits, atol=1e-3)


def rows_of(model, n=4):
    g = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 50, (1, 8), generator=g) for _ in range(n)]
    return [dict(input_ids=i, attention_mask=torch.ones_like(i), labels=i) for i in ids]


def test_the_chosen_entries_have_the_most_fisher_information():
    model = toy()
    names, total = norm_parameters(model), {}
    for row in rows_of(model):
        model.zero_grad()
        logits = model(row['input_ids']).logits[0, :-1]
        (-logits.log_softmax(-1)[range(7), row['input_ids'][0, 1:]].mean()).backward()
        for n in names:
            total[n] = total.get(n, 0) + model.get_parameter(n).grad**2
    flat = torch.cat([total[n] for n in names])
    best = flat.argsort(descending=True)[:16]
    chosen = norm_entries(.1)(model, rows_of(model))
    ours = torch.cat([chosen.get(n, torch.zeros(32, dtype=torch.bool)) for n in names])
    assert sorted(best.tolist()) == ours.nonzero().squeeze(1).tolist()


@pytest.mark.parametrize('family', ('llama', 'gpt2', 'bert', 'vit', 'opt'))
def test_a_budget_is_met_exactly(family):
    model = tiny(family)
    for budget in (.0001, .003):
        count = max(1, round(budget*sum(p.numel() for p in model.parameters())))
        chosen = layernorm_tuning(budget=budget).select(model, Unread())
        assert sum(int(m.sum()) for m in chosen.values()) == count
    drawn = [layernorm_tuning(.2, 'random').select(model, seed=s) for s in (0, 0, 1)]
    assert all((m == drawn[1][n]).all() for n, m in drawn[0].items())
    one, other = drawn[0], drawn[2]
    assert one.keys() != other.keys() or any((m != other[n]).any() for n, m in one.items())


@pytest.mark.parametrize('make, says', [
    (lambda: layernorm_tuning(0.), 'above 0 and at most 1'),
    (lambda: layernorm_tuning(by='size'), 'fisher or random'),
    (lambda: layernorm_tuning(budget=.5).select(toy()), 'the norms of this model have 160'),
    (lambda: layernorm_tuning(budget=2.).select(toy()), 'share of the parameters'),
    (lambda: layernorm_tuning(.5).select(toy()), 'there are none')])
def test_wrong_arguments_say_what_is_wrong(make, says):
    with pytest.raises(ValueError, match=says):
        make()
