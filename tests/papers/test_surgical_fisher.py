"Surgical fine-tuning by Fisher information: against the official score and freezing, written out, and its edges"
import pytest
import torch
from ftlab.adapters.subsets.surgical_fisher import block_scores, informative_blocks, surgical_fisher
from ftlab.core.anatomy import anatomy
from ftlab.core.batches import Unread
from ftlab.trainers.statistics import gradients
from tests.tiny import tiny
from tests.toys import classifier, toy

FAMILIES = ('llama', 'qwen2', 'gemma', 'gpt2', 'opt', 'gpt_neox', 'bert', 'vit', 'mixtral')


def labelled(n=5):
    g = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 50, (1, 8), generator=g) for _ in range(n)]
    return [dict(input_ids=x, attention_mask=torch.ones_like(x), labels=torch.tensor([i % 3]))
            for i, x in enumerate(ids)]


def test_the_score_is_the_official_one_of_the_log_likelihood():
    "fim_calculator.py: average squared gradients over rows, then add the Frobenius norms of a layer's tensors"
    model, rows = classifier(), labelled()
    fim = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for row in rows:
        model.zero_grad()
        model(row['input_ids']).logits.log_softmax(-1)[0, int(row['labels'])].backward()
        for n, p in model.named_parameters():
            fim[n] += p.grad**2/len(rows)
    official = [0., 0.]
    for n, f in fim.items():
        if '.encoder.layer.' in n:
            official[int(n.split('.')[3])] += torch.norm(f, p='fro').item()
    names = [n for b in anatomy(model).blocks for n in b.parameters]
    ours = block_scores(model, gradients(model, rows, names, 'square'))
    assert ours == pytest.approx(official, rel=1e-4)
    best = max((0, 1), key=lambda i: official[i])
    frozen = {n for n in fim if f'.encoder.layer.{1 - best}.' in n}
    assert informative_blocks(.5)(model, rows) == {n: True for n in fim if n not in frozen}
    opposite = informative_blocks(.5, 'bottom')(model, rows)
    assert opposite == {n: True for n in fim if f'.encoder.layer.{best}.' not in n}


def test_bottom_is_the_other_end_of_one_ranking(monkeypatch):
    "A block with few large entries has the larger norms, and the smaller sums"
    model = toy()
    flat, spikes = (b.parameters for b in anatomy(model).blocks)
    fisher = {n: torch.ones_like(model.get_parameter(n)) for n in flat}
    fisher |= {n: torch.zeros_like(model.get_parameter(n)) for n in spikes}
    for n in spikes:
        fisher[n].view(-1)[0] = 100
    monkeypatch.setattr('ftlab.adapters.subsets.surgical_fisher.gradients', lambda *a: fisher)
    for by, first in (('fisher', spikes), ('bottom', flat)):
        assert set(informative_blocks(.5, by, outside=False)(model)) == set(first)
        few = informative_blocks(by=by, budget=.001)(model)
        assert few.keys() <= set(first)
    least = informative_blocks(by='bottom', budget=.3)(model) # the first block, and a part of the next
    assert all(m is True or not m.view(-1)[0] for m in least.values())


def test_a_block_without_influence_is_chosen_last():
    model = toy()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        for n in ('q_proj', 'k_proj', 'v_proj'): # the projections that write still have gradients
            getattr(model.model.layers[0].self_attn, n).weight.zero_()
        model.model.layers[0].mlp.up_proj.weight.zero_()
    ids = torch.randint(5, 50, (4, 9), generator=torch.Generator().manual_seed(0))
    rows = [dict(input_ids=i, attention_mask=torch.ones_like(i), labels=i) for i in ids.split(1)]
    chosen = informative_blocks(.5, outside=False)(model, rows)
    assert {anatomy(model).location(n)[0] for n in chosen} == {1}


@pytest.mark.parametrize('by', ('fisher', 'bottom', 'random'))
@pytest.mark.parametrize('family', FAMILIES)
def test_a_budget_is_met_exactly_inside_the_blocks(family, by):
    model = tiny(family)
    a, total = anatomy(model), sum(p.numel() for p in model.parameters())
    size = sum(model.get_parameter(n).numel() for n in a.blocks[0].parameters)
    for budget in (.0001, .01, size/total, 1.2*size/total):
        chosen = surgical_fisher(by=by, budget=budget).select(model, Unread())
        trained = sum(model.get_parameter(n).numel() if m is True else int(m.sum())
                      for n, m in chosen.items())
        assert trained == max(1, round(budget*total))
        assert all(a.location(n)[0] is not None for n in chosen)


def test_five_of_twelve_blocks_train_and_all_that_lies_outside():
    model = tiny('bert', num_hidden_layers=12)
    chosen = surgical_fisher().select(model, Unread())
    blocks = {anatomy(model).location(n)[0] for n in chosen}
    assert len(blocks - {None}) == 5 and 'bert.embeddings.word_embeddings.weight' in chosen
    drawn = [surgical_fisher(by='random').select(model, seed=s).keys() for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize('make, says', [
    (lambda: surgical_fisher(0.), 'above 0 and at most 1'),
    (lambda: surgical_fisher(by='top'), 'fisher, bottom, random'),
    (lambda: surgical_fisher(budget=1.).select(toy(), Unread()), 'more than the blocks have'),
    (lambda: surgical_fisher(budget=0.).select(toy(), Unread()), 'share of the parameters'),
    (lambda: surgical_fisher().select(toy()), 'there are none')])
def test_wrong_arguments_say_what_is_wrong(make, says):
    with pytest.raises(ValueError, match=says):
        make()
