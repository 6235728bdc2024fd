"LoKI: its attribution written out at the last block, the official count, and the edges of its arguments"
import pytest
import torch
from ftlab import data
from ftlab.adapters.subsets.loki import attributions, least_used, loki, most_often
from ftlab.core.batches import Sample, Unread, collate
from ftlab.core.tokens import encode_all
from tests.tiny import tiny
from tests.toys import TOK, classifier, lab_data, toy

DOWN = 'model.layers.{}.mlp.down_proj'
ROWS = encode_all(lab_data().train[:6], TOK, 'text')


def sample(**more):
    return Sample(ROWS, TOK.pad_token_id, **more)


def last_block(model, row):
    "The function from the last MLP's output at a prompt's last token to probabilities, and that output"
    seen = {}
    norm = lambda m, args: seen.update(h=args[0])
    hooks = [model.model.norm.register_forward_pre_hook(norm),
             model.get_submodule(DOWN.format(1)).register_forward_hook(
                 lambda m, args, out: seen.update(z=out))]
    with torch.no_grad():
        model(torch.tensor([row['input_ids']]))
    for h in hooks:
        h.remove()
    end = next(i for i, x in enumerate(row['labels']) if x != -100) - 1
    h, z = seen['h'][0, end], seen['z'][0, end]
    return lambda out: model.lm_head(model.model.norm(h - z + out)).softmax(-1), z


def sharp():
    "A toy whose predictions are not all alike"
    model = toy(hidden=32)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight.mul_(1000)
        model.model.embed_tokens.weight.mul_(30)
    return model


def test_the_attribution_is_the_formula_at_the_last_block():
    model = sharp()
    found, = attributions(model, collate(ROWS, TOK.pad_token_id), [DOWN.format(1)], steps=7)
    for row, a in zip(ROWS, found):
        P, z = last_block(model, row)
        word = int(P(z).argmax())
        total = torch.zeros_like(z)
        for k in range(1, 8):
            x = (k/7*z).requires_grad_()
            total += torch.autograd.grad(P(x)[word], x)[0]
        torch.testing.assert_close(a, z*total/7, rtol=1e-3, atol=1e-6)
        assert a.abs().max() > 1e-3


def test_the_attribution_is_captums_integrated_gradient():
    captum = pytest.importorskip('captum.attr')
    model = sharp()
    found, = attributions(model, collate(ROWS[:1], TOK.pad_token_id), [DOWN.format(1)], steps=7)
    P, z = last_block(model, ROWS[0])
    theirs = captum.IntegratedGradients(P).attribute(
        z[None], torch.zeros_like(z)[None], target=int(P(z).argmax()), n_steps=7,
        method='riemann_right')
    torch.testing.assert_close(found[0].double(), theirs[0].double(), rtol=1e-4, atol=1e-6)


def test_contributions_of_the_first_block_add_up_to_what_its_mlp_does():
    model, batch = sharp(), collate(ROWS, TOK.pad_token_id)
    added = attributions(model, batch, [DOWN.format(0)], steps=100)[0].sum(1)
    at = torch.arange(len(ROWS)), (batch['labels'] != -100).int().argmax(1) - 1
    with torch.no_grad():
        whole = model(batch['input_ids'], attention_mask=batch['attention_mask']).logits[at]
        hook = model.get_submodule(DOWN.format(0)).register_forward_hook(
            lambda m, args, out: out.index_put(at, torch.zeros(())))
        none = model(batch['input_ids'], attention_mask=batch['attention_mask']).logits[at]
        hook.remove()
    words = whole.argmax(-1, keepdim=True)
    difference = (whole.softmax(-1) - none.softmax(-1)).gather(-1, words).squeeze(-1)
    torch.testing.assert_close(added, difference, rtol=.05, atol=2e-3)


def test_padding_and_other_rows_change_nothing():
    model, layer = sharp(), [DOWN.format(0)]
    together, = attributions(model, collate(ROWS, TOK.pad_token_id), layer)
    for row, a in zip(ROWS[:3], together):
        alone, = attributions(model, collate([row], TOK.pad_token_id), layer)
        torch.testing.assert_close(alone[0], a, rtol=1e-3, atol=1e-6)


def test_rows_are_counted_as_in_the_official_code():
    "select_trainable_nodes_layer_balanced, a prompt at a time"
    scores = torch.randn(9, 20, generator=torch.Generator().manual_seed(0))
    counts = [0]*20
    for one in scores.tolist():
        low, high = min(one), max(one)
        scaled = [(x - low)/(high - low) for x in one]
        for j in sorted(range(20), key=lambda j: scaled[j])[:4]:
            counts[j] += 1
    best = sorted(range(20), key=lambda j: -counts[j])[:4]
    assert most_often(-scores, 4).nonzero().squeeze(1).tolist() == sorted(best)


def test_every_layer_trains_as_many_rows_and_the_whole_model_need_not():
    model = sharp()
    chosen = least_used(.25, rows=4, steps=2)(model, sample())
    rows = {n: int(m.all(1).sum()) for n, m in chosen.items()}
    assert rows == {f'{DOWN.format(i)}.weight': 8 for i in range(2)}
    either = least_used(.25, rows=4, steps=2, each='model')(model, sample())
    assert sum(int(m.all(1).sum()) for m in either.values()) == 16


def test_highest_and_lowest_are_others():
    model = sharp()
    low, high, size = (least_used(.25, by=by, rows=4, steps=2)(model, sample())
                       for by in ('lowest', 'highest', 'smallest'))
    assert all(not (low[n] & high[n]).all(1).any() for n in low)
    assert any(not torch.equal(low[n], size[n]) for n in low)


@pytest.mark.parametrize('budget', (.003, .01, .05, .1))
def test_a_budget_is_met_to_within_a_row_and_layers_differ_by_one_at_most(budget):
    model = toy(hidden=64)
    total = sum(p.numel() for p in model.parameters())
    chosen = loki(budget=budget, by='random').select(model)
    trained = sum(int(m.sum()) for m in chosen.values())
    assert 0 <= budget*total + .5 - trained <= 160 + .5
    rows = [int(m.all(1).sum()) for m in chosen.values()] + [0]*(2 - len(chosen))
    assert max(rows) - min(rows) <= 1


def test_rows_are_outputs_also_where_the_model_stores_a_weight_transposed():
    model = tiny('gpt2')
    for n, m in loki(.5, by='random').select(model).items():
        assert n.endswith('mlp.c_proj.weight') and m.shape == model.get_parameter(n).shape
        assert int(m.all(0).sum()) == m.shape[1]//2 and int(m.sum()) == m.numel()//2


def test_general_data_decide_if_they_are_given():
    model, asked = sharp(), []
    encode = lambda rows, kind: asked.append((len(rows), kind)) or encode_all(rows, TOK, kind)
    old = data('sort', n=40)
    least_used(.25, rows=3, steps=1, old=old)(model, sample(encode=encode))
    assert asked == [(3, 'text')]
    assert old.fingerprint in loki(old=old).arguments['old']
    assert loki(old='sort').arguments['old'] == 'sort'


def test_a_classifier_cannot_read_text_without_labels():
    text = collate(ROWS[:2], TOK.pad_token_id)
    with pytest.raises(ValueError, match='labels for a classifier'):
        attributions(classifier(), text, ['bert.encoder.layer.0.output.dense'])
    with pytest.raises(ValueError, match='text for a model of text'):
        attributions(toy(), text | dict(labels=torch.tensor([0, 1])), [DOWN.format(0)])


def test_a_classifier_scales_the_whole_row():
    model, name = classifier(), 'bert.encoder.layer.1.output.dense'
    rows = {k: v for k, v in collate(ROWS[:2], TOK.pad_token_id).items() if k != 'labels'}
    found, = attributions(model, rows | dict(labels=torch.tensor([0, 1])), [name], steps=100)
    def probability(scale):
        hook = model.get_submodule(name).register_forward_hook(lambda m, args, out: scale*out)
        with torch.no_grad():
            P = model(**rows).logits.softmax(-1)
        hook.remove()
        return P
    whole, none = probability(1.), probability(0.)
    words = whole.argmax(-1, keepdim=True)
    torch.testing.assert_close(found.sum(1), (whole - none).gather(-1, words).squeeze(-1),
                               rtol=.05, atol=1e-5)


def test_probabilities_are_read_in_single_precision():
    batch, model = collate(ROWS[:3], TOK.pad_token_id), sharp()
    wide, = attributions(model, batch, [DOWN.format(1)])
    narrow, = attributions(model.bfloat16(), batch, [DOWN.format(1)])
    assert narrow.dtype == torch.float32
    assert torch.corrcoef(torch.stack([wide.flatten(), narrow.flatten()]))[0, 1] > .9


def test_a_dry_run_counts_as_many():
    model = toy()
    dry, read = (loki(.25, rows=2, steps=1).select(model, b) for b in (Unread(), sample()))
    assert {n: int(m.sum()) for n, m in dry.items()} == {n: int(m.sum()) for n, m in read.items()}


@pytest.mark.parametrize('make, says', [
    (lambda: loki(by='x'), 'lowest, smallest, highest, random'),
    (lambda: loki(each='tensor'), "'layer' or 'model'"),
    (lambda: loki(0.), 'above 0 and at most 1'), (lambda: loki(rows=0), 'at least 1'),
    (lambda: loki(budget=.9).select(toy(), Unread()), 'the budget allows'),
    (lambda: loki(budget=2.).select(toy(), Unread()), 'share of the parameters'),
    (lambda: loki(.001).select(toy(), Unread()), 'less than one row'),
    (lambda: loki().select(toy()), 'there are none')])
def test_wrong_arguments_say_what_is_wrong(make, says):
    with pytest.raises(ValueError, match=says):
        make()
