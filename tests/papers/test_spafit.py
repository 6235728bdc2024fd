"SPAFIT: against peft and torch on the same tensors, the three strata in every family, and its budget"
import pytest
import torch
from torch import nn
from ftlab.adapters.attach import attach
from ftlab.adapters.select import parts
from ftlab.adapters.subsets.spafit import pairs_and_biases, spafit, strata
from ftlab.core.anatomy import anatomy
from ftlab.trainers.fit import fit
from tests.tiny import inputs_for, tiny
from tests.toys import TOK, classifier, label_data, toy


def answers(model, inputs):
    return model(**inputs).logits.float()


def in_peft(att):
    "The same change by peft: LoRA in the top block, and the biases that are free here; (model, pairs)"
    peft = pytest.importorskip('peft')
    theirs = peft.get_peft_model(tiny('bert'), peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=['query', 'value'], layers_to_transform=[1],
        layers_pattern='layer')).eval()
    lines, same = dict(theirs.named_parameters()), []
    for n, d in att.deltas.items():
        if n.endswith('bias'):
            lines[f'base_model.model.{n}'].requires_grad_(True)
            same.append((d.value, lines[f'base_model.model.{n}']))
            continue
        m = f'base_model.model.{n.removesuffix(".weight")}'
        same += [(d.A, lines[f'{m}.lora_A.default.weight']),
                 (d.B, lines[f'{m}.lora_B.default.weight'])]
    return theirs, same


@pytest.mark.peer('spafit', 'peft',
                  'one pass of a BERT',
                  tolerance=dict(outputs=1e-5, gradients=dict(rtol=1e-4, atol=1e-3)))
def test_forward_and_gradients_are_those_of_peft_and_torch(tolerance):
    model, inputs = tiny('bert'), inputs_for('bert')
    att = attach(model, strata((0, .5))(model), pairs_and_biases(4))
    theirs, same = in_peft(att)
    with torch.no_grad():
        for mine, other in same:
            mine.copy_(.1*torch.randn(mine.shape))
            other.copy_(mine + other if mine.ndim == 1 else mine)
    ours, want = answers(model, inputs), answers(theirs, inputs)
    torch.testing.assert_close(ours, want, rtol=0, atol=tolerance['outputs'])
    ours.square().sum().backward()
    want.square().sum().backward()
    for mine, other in same:
        torch.testing.assert_close(mine.grad, other.grad, **tolerance['gradients'])
    assert sum(p.requires_grad for p in theirs.parameters()) == len(list(att.parameters()))
    top = anatomy(tiny('bert')).blocks[1].name
    frozen = (f'{top}.attention.self.query.bias', f'{top}.attention.self.value.bias')
    assert not set(frozen) & set(att.deltas)


@pytest.mark.parametrize('family', 'llama qwen2 gemma gpt2 opt gpt_neox bert vit'.split())
@pytest.mark.parametrize('reverse', (False, True))
def test_the_strata_of_every_family(family, reverse):
    model = tiny(family, num_hidden_layers=6)
    a, chosen = anatomy(model), strata(reverse=reverse)(model)
    blocks = a.blocks[::-1] if reverse else a.blocks
    matrices = set(parts('q', 'v', 'qkv')(model))
    has_bias = any(n.endswith('bias') for b in a.blocks for n in b.parameters)
    for i, b in enumerate(blocks):
        inside = {n for n in b.parameters if n in chosen}
        wide = {n for n in b.parameters if n in matrices and len(a.shapes[n]) == 2}
        if i < 2:
            assert not inside
            continue
        lora = {b.biases.get(r) for r, n in (b.attention | b.mlp).items() if n in wide}
        small = ({n for n in b.parameters if n.endswith('bias')} if has_bias
                 else {n for n in b.norms.values()})
        assert inside == (small if i < 4 else wide | (small - lora))
    assert set(chosen) <= {n for b in a.blocks for n in b.parameters}
    answers_before = answers(model, inputs_for(family))
    attach(model, chosen, spafit(r=2).delta)
    assert torch.equal(answers(model, inputs_for(family)), answers_before)


@pytest.mark.parametrize('family', 'llama gpt2 gpt_neox bert'.split())
def test_the_budget_is_met_to_within_one_rank(family):
    model = tiny(family, num_hidden_layers=6)
    total = sum(p.numel() for p in model.parameters())
    chosen = strata()(model)
    shapes = [model.get_parameter(n).shape for n in chosen]
    rank = sum(sum(s) for s in shapes if len(s) == 2)
    met = 0
    for budget in (.01, .02, .05, .1, .2):
        try:
            att = attach(model, chosen, spafit(budget=budget).delta)
        except ValueError as e:
            assert 'with rank 1' in str(e)
            continue
        count = sum(p.numel() for p in att.parameters().values())
        att.detach()
        met += 1
        assert 0 <= budget*total + .5 - count < rank + 1
    assert met >= 2


def test_a_classifier_trains_the_strata_and_its_head_alone():
    model = classifier()
    run = fit(model, TOK, label_data(), spafit(r=2), steps=2, batch_size=4, progress=False)
    moved = set(run.delta.attached.chosen)
    head = {n for n, _ in classifier().named_parameters() if n.startswith('classifier')}
    assert head and moved == set(strata()(classifier())) | head
    assert not any('.layer.0.' in n or 'embeddings' in n for n in moved)


def test_a_delta_is_fitted_to_what_it_will_change_and_to_nothing_else():
    model, seen = classifier(), []

    class Later:
        vectors = True

        def fitted(self, model, chosen):
            seen.append(set(chosen))
            return pairs_and_biases(2)
    head = next(n for n, _ in model.named_parameters() if n.startswith('classifier'))
    inside = strata()(model)
    att = attach(model, inside | {head: True}, Later(), also=(head,))
    assert seen == [set(inside)] and set(att.deltas) == set(inside)


def test_the_scale_stays_when_the_budget_sets_the_rank():
    W = torch.randn(16, 16)
    assert pairs_and_biases(3)(W).s == pairs_and_biases(8)(W).s == 2.
    assert pairs_and_biases(4, alpha=4.)(W).s == 1.


@pytest.mark.parametrize('make, says', [
    (lambda: spafit(cuts=(.6, .3)), 'ascending'), (lambda: spafit(cuts=(0, 1.5)), 'ascending'),
    (lambda: attach(toy(), strata()(toy()), spafit(budget=1e-4).delta), 'with rank 1'),
    (lambda: attach(toy(), strata()(toy()), spafit(budget=1.).delta), 'the highest'),
    (lambda: attach(toy(), strata()(toy()), spafit(budget=2.).delta), 'share of the parameters'),
    (lambda: spafit(budget=.1).delta(torch.zeros(8, 8)), 'call fitted first'),
    (lambda: spafit(targets=('experts',)).select(toy()), 'no matrix among experts'),
    (lambda: spafit(r=0).delta(nn.Linear(4, 4).weight.detach()), 'between 1 and 4')])
def test_wrong_arguments_say_what_is_wrong(make, says):
    with pytest.raises(ValueError, match=says):
        make()
