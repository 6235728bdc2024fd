"Prompts against peft: the same start, the same training, on the same tensors (skipped without peft)"
import pytest, torch
from ftlab import methods
from ftlab.adapters.attach import attach
from ftlab.adapters.yardsticks.prompts import Prompt
from ftlab.core.generate import generate
from ftlab.trainers.fit import fit
from test_yardsticks_low_rank import ours, trained
from tiny import example_inputs, tiny
from toys import TOK, lab_data, label_data, logits, probe, toy

@pytest.fixture
def peft():
    return pytest.importorskip('peft', reason='peft is in the bench extra')

def theirs_from(peft, value, model=None):
    config = peft.PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=len(value))
    theirs = peft.get_peft_model(model or toy(), config)
    theirs.prompt_encoder['default'].embedding.weight.data.copy_(value)
    return theirs

def test_equal_to_peft(peft):
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
    assert max(at_start, gap, out) <= 1e-5

@pytest.mark.parametrize('family', ['llama', 'gpt2', 'qwen2', 'gpt_neox', 'opt'])
def test_a_prompt_of_known_tokens_says_what_they_say(family):
    m, x = tiny(family), example_inputs()
    ids = [7, 9, 30] # OPT's head calls the decoder past its base model
    text = torch.tensor([ids]*len(x['input_ids']))
    told = logits(m, dict(input_ids=torch.cat([text, x['input_ids']], 1)))[:, 3:]
    recipe = methods.prompt_tuning(tokens=3, start=ids)
    attach(m, recipe.select(m), recipe.delta)
    torch.testing.assert_close(logits(m, x), told, atol=1e-5, rtol=0)

@pytest.mark.parametrize('model', [
    toy, lambda: tiny('gpt2', vocab_size=len(TOK), max_position_embeddings=128)])
def test_answers_do_not_depend_on_padding_and_cache(model):
    m = model()
    recipe = methods.prompt_tuning(tokens=3)
    torch.manual_seed(1)
    att = attach(m, recipe.select(m), recipe.delta)
    att.deltas[next(iter(att.deltas))].p.data.normal_(std=1.)
    prompts = ['sort a b c', 'sort a', 'sort d e f g h i']
    together = generate(m, TOK, prompts, max_new_tokens=6)
    assert together == [generate(m, TOK, [p], max_new_tokens=6)[0] for p in prompts]
    ids = torch.tensor([TOK('sort a b').input_ids])
    cached = m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    for _ in range(cached.shape[1] - ids.shape[1]):
        ids = torch.cat([ids, m(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids, cached)

def test_written_for_peft(peft, tmp_path):
    base = toy()
    base.save_pretrained(tmp_path/'base')
    run = fit(toy(), TOK, lab_data(), methods.prompt_tuning(tokens=4), steps=2, batch_size=4,
              lr=1e-1, progress=False)
    run.export(tmp_path/'out', form='peft')
    theirs = peft.PeftModel.from_pretrained(base, tmp_path/'out').eval()
    gap = (logits(theirs)[:, 4:] - logits(run.model)).abs().max()
    print(float(gap))
    assert gap <= 1e-5
    b = {k: v for k, v in probe().items() if k in ('input_ids', 'attention_mask')}
    one = {k: v[:1, :5] for k, v in b.items()}
    how = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    a, b = (m.generate(**one, **how)[:, -6:] for m in (theirs, run.model))
    assert torch.equal(a, b)

def test_resumed_is_uninterrupted(tmp_path):
    how = dict(steps=4, batch_size=4, lr=1e-2, progress=False)
    recipe = methods.prompt_tuning(tokens=3)
    whole = fit(toy(), TOK, lab_data(), recipe, **how)
    class Stop:
        def after_step(self, state):
            if state.step == 1:
                raise KeyboardInterrupt
    how |= dict(out=tmp_path, save_every=1)
    assert fit(toy(), TOK, lab_data(), recipe, **how, callbacks=(Stop(),)).interrupted
    again = fit(toy(), TOK, lab_data(), recipe, **how, resume=True)
    assert torch.equal(logits(again.model), logits(whole.model))

def test_packed_rows_and_new_tokens_are_refused():
    m = toy()
    with pytest.raises(ValueError, match='cannot be packed'):
        fit(m, TOK, lab_data(), methods.prompt_tuning(tokens=2), steps=1, batch_size=4,
            packing=True, progress=False)
    recipe, m = methods.prompt_tuning(tokens=2), toy()
    chosen = recipe.select(m)
    rows = {n: torch.ones_like(m.get_parameter(n), dtype=torch.bool) for n in chosen}
    with pytest.raises(ValueError, match='new tokens'):
        attach(m, chosen, recipe.delta, beside=rows)

def test_nothing_is_folded_or_exported_plain(tmp_path):
    run = fit(toy(), TOK, lab_data(), methods.prompt_tuning(tokens=2), steps=1, batch_size=4,
              progress=False)
    with pytest.raises(ValueError, match='cannot be folded'):
        run.delta.attached.fold()
    with pytest.raises(ValueError, match='cannot hold'):
        run.export(tmp_path/'x')

@pytest.mark.parametrize('family', ['bert', 'roberta', 't5', 'vit', 'gemma3_text'])
def test_what_is_no_decoder_is_refused(family):
    m = tiny(family)
    with pytest.raises(ValueError):
        recipe = methods.prompt_tuning(tokens=2)
        attach(m, recipe.select(m), recipe.delta)

W = torch.randn(6, 4)

@pytest.mark.parametrize('make, says', [
    (lambda: Prompt(W, tokens=0), 'at least 1'), (lambda: Prompt(W, W > 0), 'cannot use a mask'),
    (lambda: Prompt(W, start=()), 'ids of tokens'), (lambda: Prompt(W, start=(6,)), 'from 0 to 5')])
def test_wrong_arguments_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()

@pytest.mark.parametrize('family', ['gpt2', 'opt'])
def test_rows_longer_than_the_positions_left_are_refused(family):
    m, recipe = tiny(family, max_position_embeddings=12), methods.prompt_tuning(tokens=5)
    attach(m, recipe.select(m), recipe.delta)
    assert logits(m, example_inputs(length=7)).shape[1] == 7
    with pytest.raises(ValueError, match='has 12 positions and the prompt takes 5.*at most 7 tokens'):
        m(**example_inputs(length=8))

def test_a_loss_that_counts_routing_is_refused():
    m, recipe = toy(), methods.prompt_tuning(tokens=2)
    m.config.output_router_logits = True
    with pytest.raises(ValueError, match='output_router_logits'):
        attach(m, recipe.select(m), recipe.delta)

def test_a_prompt_beside_a_head_is_not_written_for_peft(tmp_path):
    m = tiny('llama', 'classifier', num_labels=3, vocab_size=len(TOK), pad_token_id=0)
    run = fit(m, TOK, label_data(), methods.prompt_tuning(tokens=2), steps=1, batch_size=4,
              progress=False)
    with pytest.raises(ValueError, match="whole change, and 'score.weight' is trained beside it"):
        run.export(tmp_path/'x', form='peft')
