"LEVI: its formula by hand, padding, caches, half precision, models of several kinds, and its errors"
import pytest
import torch
from torch.nn import functional as F
from ftlab.adapters.attach import attach
from ftlab.adapters.modules.levi import Small, Views, evenly, levi
from ftlab.adapters.store import load_delta
from ftlab.trainers.fit import fit
from tests.tiny import inputs_for, tiny
from tests.toys import TOK, classifier, label_data, probe, toy


def beside(model, **kw):
    recipe = levi(**dict(taps=2, width=16, depth=1, heads=2) | kw)
    return attach(model, recipe.select(model), recipe.delta)


def views(att):
    (d,) = att.deltas.values()
    return d.eval()


def inputs():
    b = probe()
    return {k: b[k] for k in ('input_ids', 'attention_mask')}


@torch.no_grad()
def test_the_answer_is_the_mean_over_depths_of_what_each_says_of_both_views():
    model, b = classifier(), inputs()
    states = model(**b, output_hidden_states=True).hidden_states
    att = beside(model)
    d, on = views(att), b['attention_mask'][..., None].float()
    mean = lambda h: (h*on).sum(1)/on.sum(1)
    s = mean(d.small(b['input_ids'], b['attention_mask']))
    said = [A(torch.cat([mean(F.layer_norm(states[k], (32,))), s], 1)) for k, A in
            zip((1, 2), d.adapt)]
    out = model(**b)
    torch.testing.assert_close(out.logits, sum(said)/2)
    assert out.hidden_states is None and 'hidden_states' not in out
    assert len(model(**b, output_hidden_states=True).hidden_states) == 3
    by_hand = sum(p.numel() for p in d.parameters())
    assert by_hand == sum(p.numel() for p in att.parameters().values())
    att.detach()
    assert torch.equal(model(**b, output_hidden_states=True).hidden_states[2], states[2])


def test_depths_divide_the_base_evenly():
    assert evenly(4, 12) == [3, 6, 9, 12] and evenly(4, 2) == [1, 2] and evenly(1, 5) == [5]
    assert views(beside(classifier(), taps=(0, 2))).taps == [0, 2]


@torch.no_grad()
@pytest.mark.parametrize('make', (classifier, toy))
def test_padding_on_either_side_changes_nothing(make):
    model, ids = make(), torch.tensor([[9, 10, 11, 12]])
    beside(model)
    whole = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    pad, on = torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)
    right = model(input_ids=torch.cat([ids, pad], 1), attention_mask=torch.cat([on, pad], 1)).logits
    torch.testing.assert_close(right if whole.ndim == 2 else right[:, :4], whole, atol=1e-5, rtol=0)
    torch.manual_seed(0)
    small = Small(20, 16, 1, 2, causal=True)
    left = small(torch.cat([pad, ids], 1), torch.cat([pad, on], 1))[:, 3:]
    torch.testing.assert_close(left, small(ids, on), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_decoder_s_small_model_sees_no_later_token_and_follows_the_cache():
    model, ids = toy(), torch.randint(5, 90, (2, 8))
    beside(model)
    whole = model(input_ids=ids).logits
    other = ids.clone()
    other[:, 5:] = 7
    torch.testing.assert_close(model(input_ids=other).logits[:, :5], whole[:, :5])
    first = model(input_ids=ids[:, :6], use_cache=True)
    last = model(input_ids=ids[:, 6:], past_key_values=first.past_key_values,
                 attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(last.logits, whole[:, 6:], atol=1e-5, rtol=1e-5)
    kept = model(input_ids=ids, logits_to_keep=1).logits
    torch.testing.assert_close(kept, whole[:, -1:])
    with pytest.raises(ValueError, match='the whole row, without a cache'):
        model(input_ids=ids[:1, 7:], attention_mask=torch.ones(1, 99, dtype=torch.long))


@torch.no_grad()
def test_two_texts_with_caches_are_not_mixed_up_and_beams_take_their_tokens_along():
    model, ids = toy().eval(), torch.randint(5, 90, (2, 8))
    beside(model)
    whole = model(input_ids=ids).logits
    caches = [model(input_ids=row[None, :6], use_cache=True).past_key_values for row in ids]
    for row, cache, logits in zip(ids, caches, whole):
        out = model(input_ids=row[None, 6:], past_key_values=cache)
        torch.testing.assert_close(out.logits[0], logits[6:], atol=1e-5, rtol=1e-5)
    how = dict(max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    said = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    mask = torch.ones_like(ids)
    assert torch.equal(said, model.generate(ids, attention_mask=mask, use_cache=False, **how))


@torch.no_grad()
def test_the_model_is_called_as_before():
    model, b = classifier(), inputs()
    beside(model)
    kinds = torch.ones_like(b['input_ids'])
    named = model(**b, token_type_ids=kinds).logits
    assert torch.equal(model(*b.values(), kinds).logits, named)
    assert not torch.equal(model(**b).logits, named)
    (logits,) = model(**b, token_type_ids=kinds, return_dict=False)
    assert torch.equal(logits, named)
    model.config.output_hidden_states = True
    assert len(model(**b).hidden_states) == 3


@pytest.mark.parametrize('family', 'llama gpt2 opt gpt_neox bert'.split())
def test_it_stands_beside_models_of_every_kind(family):
    model, given = tiny(family), inputs_for(family)
    base = model(**given).logits
    att = beside(model)
    out = model(**given).logits
    assert out.shape == base.shape and not torch.equal(out, base)
    out.square().sum().backward()
    assert all(p.grad is not None for p in att.parameters().values())
    with att.disabled():
        assert torch.equal(model(**given).logits, base)


@torch.no_grad()
def test_half_precision_is_rounded_once():
    model = classifier().to(torch.bfloat16)
    d = views(beside(model))
    assert {p.dtype for p in d.parameters()} == {torch.float32}
    assert model(**inputs()).logits.dtype == torch.bfloat16


def test_a_classifier_learns_saves_and_loads(tmp_path):
    model = classifier()
    was = {n: p.clone() for n, p in model.named_parameters()}
    run = fit(model, TOK, label_data(), levi(taps=2, width=16), steps=3, batch_size=4,
              progress=False)
    assert all(torch.equal(p, was[n]) for n, p in run.model.named_parameters() if n in was)
    run.delta.save(tmp_path/'d.safetensors')
    fresh = classifier()
    load_delta(fresh, tmp_path/'d.safetensors')
    with torch.no_grad():
        assert torch.equal(fresh(**inputs()).logits, run.model.eval()(**inputs()).logits)


@torch.no_grad()
def test_each_view_may_stand_alone():
    model = classifier()
    d = views(beside(model, taps=()))
    assert len(d.adapt) == 1 and d.adapt[0][0].in_features == 16
    model = classifier()
    d = views(beside(model, depth=0))
    assert d.small is None and d.adapt[0][0].in_features == 32
    assert model(**inputs()).logits.shape == (6, 3)


@pytest.mark.parametrize('make, says', [
    (lambda: levi(taps=(), depth=0), 'one of the two views'),
    (lambda: levi(width=20, heads=4), 'multiple of twice the heads'),
    (lambda: levi(depth=-1), '0 or more'),
    (lambda: levi(taps=2.5), 'give whole numbers'),
    (lambda: beside(classifier(), taps=(5,)), 'depths 0 to 2'),
    (lambda: levi().delta(torch.zeros(4, 4)), 'call fitted first'),
    (lambda: Views(torch.zeros(4, 4), depth=0), 'nothing is left'),
    (lambda: Views(torch.zeros(4, 4), torch.ones(4, 4, dtype=torch.bool)), 'mask of entries'),
    (lambda: beside(classifier().bert), 'no logits and states'),
    (lambda: attach(classifier().bert, {'embeddings.word_embeddings.weight': True}, Views), 'with a head'),
    (lambda: attach(toy(), {'model.layers.0.mlp.up_proj.weight': True}, levi().delta), 'not the input embedding')])
def test_wrong_arguments_say_what_is_wrong(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_inputs_that_it_cannot_read_say_so():
    model, b = classifier(), inputs()
    beside(model)
    with pytest.raises(ValueError, match='give the model no labels'):
        model(**b, labels=torch.zeros(6, dtype=torch.long))
    with pytest.raises(ValueError, match='nor given as embeddings'):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    model = toy()
    beside(model)
    ids = torch.randint(5, 90, (1, 4))
    with pytest.raises(ValueError, match='as a number of them'):
        model(input_ids=ids, logits_to_keep=torch.tensor([0]))
