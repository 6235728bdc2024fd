"Prompts against peft: the same start, the same training, on the same tensors (skipped without peft)"
from functools import partial
import pytest, torch
from transformers import DynamicCache, StaticCache
from ftlab import methods
from ftlab.adapters.attach import attach
from ftlab.adapters.store import load_delta
from ftlab.adapters.yardsticks.prompts import Prefix, Prompt
from ftlab.core.data import data
from ftlab.core.generate import generate
from ftlab.core.model import answer_room, row_limit
from ftlab.core.scorers import nll
from ftlab.trainers.fit import fit
from test_yardsticks_low_rank import ours, trained
from tiny import example_inputs, tiny
from toys import TOK, assert_resumes, lab_data, label_data, logits, probe, toy

METHODS = dict(prompt=methods.prompt_tuning, prefix=methods.prefix_tuning,
               network=partial(methods.prefix_tuning, hidden=6))
both = pytest.mark.parametrize('method', METHODS.values(), ids=METHODS)

@pytest.fixture
def peft():
    return pytest.importorskip('peft', reason='peft is in the bench extra')

def theirs_from(peft, value, model=None):
    config = peft.PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=len(value))
    theirs = peft.get_peft_model(model or toy(), config)
    theirs.prompt_encoder['default'].embedding.weight.data.copy_(value)
    return theirs

@pytest.mark.peer('prompt_tuning', 'peft',
                  'outputs at the start; parameters and outputs after three steps', tolerance=1e-5)
def test_equal_to_peft(peft, tolerance):
    lr = 1e-2
    run, start = ours(methods.prompt_tuning(tokens=5), lr)
    first = next(iter(start.parameters.values()))
    theirs = theirs_from(peft, first).eval()
    at_start = (logits(theirs)[:, 5:] - start.logits).abs().max()
    trained(theirs, lr)
    theirs.eval()
    now = next(iter(run.delta.attached.parameters().values())).detach()
    assert (now - first).abs().max() > 1e-3, 'nothing was learned'
    gap = (now - theirs.prompt_encoder['default'].embedding.weight.detach()).abs().max()
    out = (logits(theirs)[:, 5:] - logits(run.model)).abs().max()
    print(dict(start=float(at_start), parameters=float(gap), outputs=float(out)))
    assert max(at_start, gap, out) <= tolerance

@both
@pytest.mark.parametrize('family', ['llama', 'gpt2', 'qwen2', 'gpt_neox', 'opt'])
def test_a_prompt_of_known_tokens_says_what_they_say(family, method):
    m, x = tiny(family), example_inputs()
    ids = [7, 9, 30] # OPT's head calls the decoder past its base model
    text = torch.tensor([ids]*len(x['input_ids']))
    told = logits(m, dict(input_ids=torch.cat([text, x['input_ids']], 1)))[:, 3:]
    recipe = method(tokens=3, start=ids)
    attach(m, recipe.select(m), recipe.delta)
    torch.testing.assert_close(logits(m, x), told, atol=1e-5, rtol=0)
    torch.testing.assert_close(m(input_ids=x['input_ids']).logits, told, atol=1e-5, rtol=0) # no mask

@both
@pytest.mark.parametrize('model', [
    toy, lambda: tiny('gpt2', vocab_size=len(TOK), max_position_embeddings=128)])
def test_answers_do_not_depend_on_padding_and_cache(model, method):
    m = model()
    recipe = method(tokens=3)
    torch.manual_seed(1)
    att = attach(m, recipe.select(m), recipe.delta)
    for p in att.parameters().values():
        p.data.normal_(std=1.)
    prompts = ['sort a b c', 'sort a', 'sort d e f g h i']
    together = generate(m, TOK, prompts, max_new_tokens=6)
    assert together == [generate(m, TOK, [p], max_new_tokens=6)[0] for p in prompts]
    ids = torch.tensor([TOK('sort a b').input_ids])
    cached = m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    for _ in range(cached.shape[1] - ids.shape[1]):
        ids = torch.cat([ids, m(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids, cached)

@pytest.mark.peer('prompt_tuning, prefix_tuning', 'peft',
                  'outputs of the exported adapter', tolerance=1e-5)
@both
def test_written_for_peft(peft, tmp_path, method, tolerance):
    base = toy()
    base.save_pretrained(tmp_path/'base')
    run = fit(toy(), TOK, lab_data(), method(tokens=4), steps=2, batch_size=4, lr=1e-1,
              progress=False)
    run.export(tmp_path/'out', form='peft')
    theirs = peft.PeftModel.from_pretrained(base, tmp_path/'out').eval()
    said = logits(run.model)
    gap = (logits(theirs)[:, -said.shape[1]:] - said).abs().max() # a prefix has no outputs
    print(float(gap))
    assert gap <= tolerance
    b = {k: v for k, v in probe().items() if k in ('input_ids', 'attention_mask')}
    one = {k: v[:1, :5] for k, v in b.items()}
    how = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    a, b = (m.generate(**one, **how)[:, -6:] for m in (theirs, run.model))
    assert torch.equal(a, b)

@both
def test_resumed_is_uninterrupted_and_saved(tmp_path, method):
    how = dict(steps=4, batch_size=4, lr=1e-2, progress=False)
    run = lambda **more: fit(toy(), TOK, lab_data(), method(tokens=3), **how, **more)
    whole = assert_resumes(run, tmp_path)
    whole.delta.save(tmp_path/'saved.safetensors')
    fresh = toy()
    load_delta(fresh, tmp_path/'saved.safetensors')
    assert torch.equal(logits(fresh), logits(whole.model))

@both
def test_packed_rows_and_new_tokens_are_refused(method):
    m = toy()
    with pytest.raises(ValueError, match='cannot be packed'):
        fit(m, TOK, lab_data(), method(tokens=2), steps=1, batch_size=4, packing=True,
            progress=False)
    recipe, m = method(tokens=2), toy()
    chosen = recipe.select(m)
    rows = {n: torch.ones_like(m.get_parameter(n), dtype=torch.bool) for n in chosen}
    with pytest.raises(ValueError, match='new tokens'):
        attach(m, chosen, recipe.delta, beside=rows)

@both
def test_nothing_is_folded_or_exported_plain(tmp_path, method):
    run = fit(toy(), TOK, lab_data(), method(tokens=2), steps=1, batch_size=4, progress=False)
    with pytest.raises(ValueError, match='cannot be folded'):
        run.delta.attached.fold()
    with pytest.raises(ValueError, match='cannot hold'):
        run.export(tmp_path/'x')

@both
@pytest.mark.parametrize('family', ['bert', 'roberta', 't5', 'vit', 'gemma3_text'])
def test_what_is_no_decoder_is_refused(family, method):
    m = tiny(family)
    with pytest.raises(ValueError):
        recipe = method(tokens=2)
        attach(m, recipe.select(m), recipe.delta)

W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('make, says', [
    (lambda: Prompt(W, tokens=0), 'at least 1'), (lambda: Prompt(W, W > 0), 'cannot use a mask'),
    (lambda: Prompt(W, start=()), 'ids of tokens'), (lambda: Prompt(W, start=(6,)), 'from 0 to 5'),
    (lambda: Prefix(W, tokens=0), 'at least 1'), (lambda: Prefix(W, W > 0), 'cannot use a mask'),
    (lambda: Prefix(W, hidden=-1), 'hidden is -1')])
def test_wrong_arguments_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()

@both
@pytest.mark.parametrize('family', ['gpt2', 'opt'])
def test_rows_longer_than_the_positions_left_are_refused(family, method):
    m, recipe = tiny(family, max_position_embeddings=12), method(tokens=5)
    attach(m, recipe.select(m), recipe.delta)
    assert logits(m, example_inputs(length=7)).shape[1] == 7
    with pytest.raises(ValueError, match='has 12 positions and the .* takes 5.*at most 7 tokens'):
        m(**example_inputs(length=8))

@both
def test_the_length_of_a_row_counts_what_stands_before_it(method):
    m, recipe = tiny('gpt2', vocab_size=len(TOK), max_position_embeddings=24), method(tokens=5)
    limits = lambda m, **more: (row_limit(m, TOK, **more), row_limit(m, TOK, 100, **more),
                                row_limit(m, TOK, 8, **more))
    assert limits(m) == (24, 24, 8) and answer_room(4, m) == (20, 4)
    assert limits(m, recipe=recipe) == (19, 19, 8) == limits(m, recipe=recipe*methods.get('dft'))
    assert limits(m, recipe=methods.lora()) == (24, 24, 8)
    assert row_limit(toy(), TOK) == 128 and row_limit(toy(), TOK, recipe=recipe) == 123
    assert row_limit(toy(), TOK, 128, recipe) == 128 # positions are computed for any length
    with pytest.raises(ValueError, match='has 24 positions, and 24 tokens before each row leave none'):
        row_limit(m, TOK, recipe=method(tokens=24))
    rows = [dict(prompt='sort a b c', response=' '.join('a b c d e f g'.split()*4))]*8
    run = fit(m, TOK, data(rows, validation=rows[:2]), recipe, steps=1, batch_size=4,
              progress=False)
    assert any('19' in n for n in run.notes), run.notes
    assert limits(run.model) == (19, 19, 8) and answer_room(4, run.model) == (15, 4)
    asked = 'sort ' + ' '.join('a b c d e f g'.split()*4)
    assert len(generate(run.model, TOK, [asked, 'sort a'], max_new_tokens=30)) == 2
    assert nll(run.model, TOK, rows) > 0
    with run.disabled():
        assert limits(run.model) == (19, 19, 8) # the base is asked with the same rows
    run.delta.attached.detach()
    assert limits(m) == (24, 24, 8)

def test_a_loss_that_counts_routing_is_refused():
    m, recipe = toy(), methods.prompt_tuning(tokens=2)
    m.config.output_router_logits = True
    with pytest.raises(ValueError, match='output_router_logits'):
        attach(m, recipe.select(m), recipe.delta)

@both
def test_a_prompt_beside_a_head_is_not_written_for_peft(tmp_path, method):
    m = tiny('llama', 'classifier', num_labels=3, vocab_size=len(TOK), pad_token_id=0)
    run = fit(m, TOK, label_data(), method(tokens=2), steps=1, batch_size=4, progress=False)
    with pytest.raises(ValueError, match="whole change, and 'score.weight' is trained beside it"):
        run.export(tmp_path/'x', form='peft')

# ---------- what belongs to a prefix alone

def with_prefix(m, **options):
    "Attach a prefix of random values; return its delta"
    recipe = methods.prefix_tuning(**options)
    att = attach(m, recipe.select(m), recipe.delta)
    torch.manual_seed(1)
    for p in att.parameters().values():
        p.data.normal_()
    return next(iter(att.deltas.values()))

def padded(side):
    "Two rows, of which the first has three tokens of padding"
    x = example_inputs()
    x['attention_mask'][0, dict(left=slice(3), right=slice(-3, None), none=slice(0))[side]] = 0
    return x

@pytest.mark.peer('prefix_tuning', 'peft',
                  'one pass on seven architectures', tolerance=dict(outputs=1e-6, gradient=1e-5))
@pytest.mark.parametrize('side', ['none', 'left', 'right'])
@pytest.mark.parametrize('family', 'llama gpt2 gpt_neox opt qwen3 gemma mixtral'.split())
def test_a_prefix_and_its_gradient_are_those_of_peft(peft, family, side, tolerance):
    m, x = tiny(family), padded(side)
    d = with_prefix(m, tokens=3)
    theirs = peft.get_peft_model(tiny(family), peft.PrefixTuningConfig(
        task_type='CAUSAL_LM', num_virtual_tokens=3)).eval()
    E = theirs.prompt_encoder['default'].embedding.weight
    E.data.copy_(d.p.data.flatten(1))
    on = x['attention_mask'].bool()
    a, b = m(**x).logits[on], theirs(**x).logits[on]
    weight = torch.randn_like(a)
    for out in (a, b):
        (out*weight).sum().backward()
    torch.testing.assert_close(a, b, atol=tolerance['outputs'], rtol=0)
    torch.testing.assert_close(d.p.grad.flatten(1), E.grad, atol=tolerance['gradient'], rtol=0)

@pytest.mark.peer('prefix_tuning', 'peft',
                  'one pass through the network that makes the prefix',
                  tolerance=dict(outputs=1e-6, gradient=dict(atol=1e-4, rtol=1e-5)))
def test_the_network_is_that_of_peft(peft, tolerance):
    m, x = tiny('llama'), example_inputs()
    d = with_prefix(m, tokens=3, hidden=6)
    d.begin.zero_() # peft adds nothing
    theirs = peft.get_peft_model(tiny('llama'), peft.PrefixTuningConfig(
        task_type='CAUSAL_LM', num_virtual_tokens=3, prefix_projection=True,
        encoder_hidden_size=6)).eval()
    encoder = theirs.prompt_encoder['default']
    encoder.embedding.weight.data.copy_(d.e.data)
    encoder.transform.load_state_dict(d.net.state_dict())
    a, b = m(**x).logits, theirs(**x).logits
    for out in (a, b):
        out.square().sum().backward()
    torch.testing.assert_close(a, b, atol=tolerance['outputs'], rtol=0)
    near = tolerance['gradient']
    torch.testing.assert_close(d.net[0].weight.grad, encoder.transform[0].weight.grad, **near)
    torch.testing.assert_close(d.e.grad, encoder.embedding.weight.grad, **near)

@pytest.mark.peer('prefix_tuning', 'peft',
                  'parameters and outputs after three steps', tolerance=1e-5)
def test_a_prefix_trains_as_in_peft(peft, tolerance):
    lr = 1e-2
    run, start = ours(methods.prefix_tuning(tokens=5), lr)
    first = next(iter(start.parameters.values()))
    theirs = peft.get_peft_model(toy(), peft.PrefixTuningConfig(
        task_type='CAUSAL_LM', num_virtual_tokens=5))
    E = theirs.prompt_encoder['default'].embedding.weight
    E.data.copy_(first.flatten(1))
    trained(theirs, lr)
    now = next(iter(run.delta.attached.parameters().values())).detach()
    assert (now - first).abs().max() > 1e-3, 'nothing was learned'
    torch.testing.assert_close(now.flatten(1), E.detach(), atol=tolerance, rtol=0)
    torch.testing.assert_close(logits(run.model), logits(theirs.eval()), atol=tolerance, rtol=0)

@pytest.mark.peer('prefix_tuning', 'peft', 'tokens of greedy answers', tolerance=0)
@pytest.mark.parametrize('family', ['llama', 'gpt2', 'opt'])
def test_a_batch_of_prompts_is_answered_as_in_peft(peft, family, tolerance):
    m, x = tiny(family), padded('left')
    d = with_prefix(m, tokens=3)
    theirs = peft.get_peft_model(tiny(family), peft.PrefixTuningConfig(
        task_type='CAUSAL_LM', num_virtual_tokens=3)).eval()
    theirs.prompt_encoder['default'].embedding.weight.data.copy_(d.p.data.flatten(1))
    how = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    torch.testing.assert_close(m.generate(**x, **how), theirs.generate(**x, **how), rtol=0,
                               atol=tolerance)

@pytest.mark.parametrize('family', ['mistral', 'gemma2', 'gemma3_text'])
def test_a_cache_that_forgets_is_refused(family):
    with pytest.raises(ValueError, match='does not keep the keys and values of all tokens'):
        with_prefix(tiny(family), tokens=2)

def test_a_cache_of_a_fixed_size_is_refused():
    m = tiny('llama')
    with_prefix(m, tokens=2)
    with pytest.raises(ValueError, match='is a StaticCache'):
        m(**example_inputs(), past_key_values=StaticCache(config=m.config, max_cache_len=16))
    cache = DynamicCache() # one that does not know its layers yet
    m(**example_inputs(), past_key_values=cache)
    assert cache.get_seq_length() == 9

def test_gradient_checkpointing_is_refused():
    with pytest.raises(ValueError, match='drops the cache'):
        fit(toy(), TOK, lab_data(), methods.prefix_tuning(tokens=2), steps=1, batch_size=4,
            gradient_checkpointing=True, progress=False)

def test_a_prefix_that_fills_all_positions_is_refused():
    m = tiny('gpt2', max_position_embeddings=12)
    with pytest.raises(ValueError, match='tokens is 12; the model has 12 positions'):
        with_prefix(m, tokens=12)

@both
def test_half_precision(method):
    m = tiny('llama').bfloat16()
    recipe = method(tokens=2)
    att = attach(m, recipe.select(m), recipe.delta)
    assert all(p.dtype == torch.float32 for p in att.parameters().values())
    assert m(**example_inputs()).logits.dtype == torch.bfloat16
    att.detach()
    m, x = tiny('llama'), example_inputs()
    att = attach(m, recipe.select(m), recipe.delta)
    plain = logits(m, x)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(logits(m, x).float(), plain, atol=.1, rtol=.1)

def test_switched_off_the_model_is_the_base():
    m, x = tiny('llama'), example_inputs()
    before = logits(m, x)
    recipe = methods.prefix_tuning(tokens=2)
    att = attach(m, recipe.select(m), recipe.delta)
    with att.disabled():
        assert torch.equal(logits(m, x), before)
    assert not torch.equal(logits(m, x), before)
    att.detach()
    assert torch.equal(logits(m, x), before)
