"""LoKI: its attribution written out at the last block, the way that runs one token against the one that runs all,
the official count, and the edges of its arguments"""
from contextlib import contextmanager
import pytest
import torch
from ftlab import data
from ftlab.adapters.subsets.loki import _copied, attributions, least_used, loki, most_often
from ftlab.core.anatomy import anatomy
from ftlab.core.batches import Sample, Unread, collate
from ftlab.core.tokens import encode_all
from tests.tiny import DECODERS, PLAIN, tiny
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


@pytest.mark.peer('loki.attributions', 'captum',
                  'integrated gradients', tolerance=dict(rtol=1e-4, atol=1e-6))
def test_the_attribution_is_captums_integrated_gradient(tolerance):
    captum = pytest.importorskip('captum.attr', reason='captum is in the bench extra')
    model = sharp()
    found, = attributions(model, collate(ROWS[:1], TOK.pad_token_id), [DOWN.format(1)], steps=7)
    P, z = last_block(model, ROWS[0])
    theirs = captum.IntegratedGradients(P).attribute(
        z[None], torch.zeros_like(z)[None], target=int(P(z).argmax()), n_steps=7,
        method='riemann_right')
    torch.testing.assert_close(found[0].double(), theirs[0].double(), **tolerance)


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


LFM2 = dict(num_key_value_heads=2, layer_types=['conv', 'full_attention'])
FALCON = dict(num_key_value_heads=2, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
              mamba_n_groups=1, mamba_d_state=8)


@contextmanager
def tokens_read(model, layer=None):
    "Count the tokens of each pass, at the beginning or as a layer sees them"
    read = []
    module = model.get_submodule(layer) if layer else model.get_input_embeddings()
    hook = module.register_forward_hook(lambda m, args, out: read.append(out[..., 0].numel()))
    yield read
    hook.remove()


def prompts(labelled=True):
    "Padded rows for `tiny` models with prompts of 6, 3, 1 and 9 tokens; without labels, of 12, 11, 1 and 10"
    lengths = dict(zip((6, 3, 1, 9), (12, 11, 2, 10) if labelled else (12, 11, 1, 10)))
    draw = torch.Generator().manual_seed(0)
    ids = {p: torch.randint(4, 64, (n,), generator=draw).tolist() for p, n in lengths.items()}
    batch = collate([dict(input_ids=x, labels=[-100]*p + x[p:]) for p, x in ids.items()], 1)
    return batch if labelled else {k: v for k, v in batch.items() if k != 'labels'}


def downs(model):
    return [b.mlp['down'].removesuffix('.weight') for b in anatomy(model).blocks]


def without_cache(model):
    "The same model, whose forward pass takes no cache"
    forward = model.forward
    model.forward = lambda input_ids, attention_mask: forward(
        input_ids=input_ids, attention_mask=attention_mask)
    return model


def assert_near(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5*float(b.abs().max()))
        assert b.abs().max() > 0


@pytest.mark.parametrize('labelled', (True, False))
@pytest.mark.parametrize('family', DECODERS + PLAIN)
def test_one_token_gives_what_all_tokens_give(family, labelled):
    model, batch = tiny(family), prompts(labelled)
    first, second = downs(model)
    with (tokens_read(model) as start, tokens_read(model, first) as low,
          tokens_read(model, second) as high):
        found = attributions(model, batch, [first, second], steps=3)
    with tokens_read(model) as every:
        assert_near(found, attributions(without_cache(model), batch, [first, second], steps=3))
    assert every == [48, 48*3, 48*3]
    before = (5, 2, 0, 8) if labelled else (11, 10, 0, 9)
    each = lambda copies: [48, *[n for b in before for n in (b, copies) if n]]
    assert [start, low, high] == [each(1), each(1 + 3), each(1 + 2*3)]


@pytest.mark.parametrize('family', ('llama', 'gemma2', 'gpt2', 'opt'))
def test_one_token_gives_the_same_where_attention_is_written_out(family):
    model, batch = tiny(family), prompts()
    found = attributions(model, batch, downs(model), steps=3)
    model.set_attn_implementation('eager')
    with tokens_read(model, downs(model)[1]) as read:
        assert_near(attributions(model, batch, downs(model), steps=3), found)
    assert read[-1] == 7


def test_layers_in_any_order_one_of_them_or_two_of_a_block():
    model, batch = tiny('llama', num_hidden_layers=3), prompts()
    a, b, c = downs(model)
    want = attributions(model, batch, [a, b, c], steps=3)
    assert_near(attributions(model, batch, [c, a], steps=3), [want[2], want[0]])
    both = [b, 'model.layers.1.self_attn.o_proj']
    with tokens_read(model) as read:
        found = attributions(model, batch, both, steps=3)
    assert read[-1] == 48*3
    assert_near(found[:1], want[1:2])
    with tokens_read(model) as read:
        assert_near(attributions(model, batch, ['model.norm', a], steps=3)[1:], want[:1])
    assert read[-1] == 48*3
    assert_near(attributions(model, batch, [a, a], steps=3), [want[0], want[0]])


@pytest.mark.parametrize('family, more', [('lfm2', LFM2), ('falcon_h1', FALCON), ('llama', {})])
def test_only_keys_and_values_of_every_block_are_copied(family, more):
    past = tiny(family, 'causal', **more)(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    assert _copied(past, 2) == (family == 'llama')
    assert not _copied(past, 3)


def test_all_tokens_run_where_the_copies_come_out_otherwise():
    "Only the copies: the token itself is right"
    model = tiny('llama')
    model.lm_head.register_forward_hook(
        lambda m, args, out: torch.cat([out[:1], out[1:]*1.001]) if out.shape[1] == 1 else out)
    with tokens_read(model) as read:
        attributions(model, prompts(), downs(model), steps=3)
    assert read[-1] == 48*3


def test_an_error_within_the_pass_leaves_no_hook():
    model, passes = tiny('llama'), []

    def broken(module, args, out):
        passes.append(len(out))
        if passes[-1] > 4:
            raise MemoryError('too many rows')
    model.lm_head.register_forward_hook(broken)
    with pytest.raises(MemoryError):
        attributions(model, prompts(), downs(model), steps=3)
    assert passes[-1] == 7
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 1


@pytest.mark.parametrize('family', ('mistral', 'gemma3_text'))
def test_one_token_gives_what_all_give_where_attention_sees_four_tokens(family):
    model = tiny(family, sliding_window=4, layer_types=['sliding_attention']*2)
    with tokens_read(model, downs(model)[1]) as one:
        found = attributions(model, prompts(), downs(model), steps=3)
    assert one[-1] == 7
    assert_near(found, attributions(without_cache(model), prompts(), downs(model), steps=3))


def test_layers_take_turns_where_their_copies_are_too_many(monkeypatch):
    model, batch = tiny('llama', num_hidden_layers=5), prompts()
    together = attributions(model, batch, downs(model), steps=3)
    monkeypatch.setattr('ftlab.adapters.subsets.loki.TOGETHER', 6*6)
    with tokens_read(model, downs(model)[-1]) as read:
        assert_near(attributions(model, batch, downs(model), steps=3), together)
    assert read == [48, 5, 7, 7, 4, 2, 13, 4, 16, 8, 4, 4, 4, 4, 4]


@pytest.mark.parametrize('family, layer, more', [
    ('bert', 'bert.encoder.layer.0.output.dense', {}),
    ('gemma3_text', DOWN.format(0), dict(use_bidirectional_attention=True)),
    ('gpt2', 'transformer.h.0.mlp.c_proj', dict(add_cross_attention=True)),
    ('lfm2', 'model.layers.0.feed_forward.w2', LFM2),
    ('falcon_h1', 'model.layers.0.feed_forward.down_proj', FALCON)])
def test_all_tokens_run_where_no_cache_of_keys_and_values_gives_the_same(family, layer, more):
    model, batch = tiny(family, 'masked' if family == 'bert' else 'causal', **more), prompts()
    with tokens_read(model) as read:
        found = attributions(model, batch, [layer], steps=3)
    assert read[0] == 48 and read[-1] == 48*3
    assert_near(found, attributions(without_cache(model), batch, [layer], steps=3))


def test_all_tokens_run_where_a_cache_changes_the_logits_a_little():
    model = tiny('llama')
    model.lm_head.register_forward_hook(
        lambda m, args, out: out*(1 + 1e-4*(out.shape[1] == 1)))
    with tokens_read(model) as read:
        attributions(model, prompts(), [DOWN.format(0)], steps=3)
    assert read[-1] == 48*3


def test_all_tokens_of_a_classifiers_rows_run():
    batch = collate(ROWS[:2], TOK.pad_token_id) | dict(labels=torch.tensor([0, 1]))
    model, size = classifier(), batch['input_ids'].numel()
    with tokens_read(model) as read:
        attributions(model, batch, ['bert.encoder.layer.1.output.dense'], steps=3)
    assert read == [size, 3*size]


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
