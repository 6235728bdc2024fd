"tl_training: what its page cannot say about itself"
import re
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from ftlab import methods
from ftlab.core.batches import collate
from ftlab.core.data import data
from ftlab.core.state import State
from ftlab.core.tokens import encode
from ftlab.trainers.fit import fit
from ftlab.trainers.losses.tl_training import (ERRORS, call_weights, departures, mark_calls,
                                               marked, tl_training)
from ftlab.trainers.objective import IGNORE, loss_mask, token_nll
from losses import assert_one_pass_ends_alike
from toys import TOK, lab_data, toy

TOOLS = ('open map , open key , fix bell : the key in Guville today', r'(\w+ \w+) [,:]', r'call (\w+ \w+) \(')


def batch_of(*talks, view):
    rows = [encode(dict(messages=[dict(role=r, content=c) for r, c in talk]), TOK, 'chat')
            for talk in talks]
    return view(collate(rows, TOK.pad_token_id), State(None, TOK))


def official(logits, ids, names, name, begin, end, w_max=9):
    """The loss of one call as in the official trainer, from lists of tokens: no character is looked at.
    The call's tokens are ids[begin:end]; its name begins at `begin`"""
    def shared(a, b):
        n = 0
        while n < min(len(a), len(b)) and a[n] == b[n]:
            n += 1
        return n
    keys = {0} | {shared(name, o) for o in names if o != name and shared(name, o)}
    each = torch.stack([-logits[i - 1].log_softmax(-1)[ids[i]] for i in range(begin, end)])
    key = torch.zeros(end - begin, dtype=torch.bool)
    key[list(keys)] = True
    n_key, n_other = int(key.sum()), int((~key).sum())
    w = min(n_other/n_key, w_max) if n_key < n_other else 1.
    return (w*each[key].sum() + each[~key].sum())/(w*n_key + n_other)


@pytest.mark.parametrize('w_max', [9., 1.5])
def test_value_and_gradient_are_those_of_the_official_code(w_max):
    prompt, tools, _ = TOOLS
    view = mark_calls(w_max, tools, r'^ *(\w+ \w+) \(', '')
    batch = batch_of([('user', prompt), ('assistant', 'open key ( Guville , today )')], view=view)
    ids, on = batch['input_ids'][0], batch['labels'][0] != IGNORE
    begin, end = on.nonzero()[0].item(), on.nonzero()[-1].item() + 1
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, len(ids), len(TOK), generator=g).requires_grad_()
    n = loss_mask(batch['labels']).sum()
    ours = (marked()(batch)*token_nll(logits, batch['labels'])).sum()/n
    names = [TOK(t, add_special_tokens=False).input_ids for t in ('open map', 'open key', 'fix bell')]
    theirs = official(logits[0], ids, names, names[1], begin, end, w_max)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-5)
    a, b = (torch.autograd.grad(x, logits)[0] for x in (ours, theirs))
    torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


def test_failed_calls_stay_in_the_text_and_lose_their_labels():
    prompt, tools, call = TOOLS
    failed = [('user', prompt), ('assistant', 'call open map ( Guville , today )'), ('tool', 'i do not know'),
              ('assistant', 'call open key ( Guville , today )')]
    plain = batch_of(failed, failed[:2], view=lambda b, s: b)
    batch = batch_of(failed, failed[:2], view=mark_calls(9., tools, call, 'do not know'))
    assert torch.equal(batch['input_ids'], plain['input_ids'])
    gone = (plain['labels'] != IGNORE) & (batch['labels'] == IGNORE)
    lost = TOK.decode(batch['input_ids'][0][gone[0]]).split()
    assert lost[:3] == 'call open map'.split() and not gone[1].any()
    kept = batch_of(failed, view=mark_calls(9., tools, call, ''))
    assert torch.equal(kept['labels'], plain['labels'][:1])
    w, on = batch['token_weights'], batch['labels'] != IGNORE
    assert abs(float(w[0][on[0]].mean()) - 1) < 1e-6 and abs(float(w[1][on[1]].mean()) - 1) < 1e-6
    assert TOK.convert_ids_to_tokens(batch['input_ids'][0][w[0] > 1]) == ['open', 'key']


def test_names_are_found_by_characters_whatever_the_tokens_are():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    text = '{"name": "get_weather"} {"name": "get_weekday"} {"name": "search"}'
    letters = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([text]*3, trainers.BpeTrainer(vocab_size=300, show_progress=False,
                                                          initial_alphabet=letters))
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe)
    before, call = tok(text).input_ids, tok('{"name": "get_weather", "city": "é"}').input_ids
    batch = dict(input_ids=torch.tensor([before + call]),
                 labels=torch.tensor([[-100]*len(before) + call]))
    w = mark_calls()(batch, State(None, tok))['token_weights'][0, len(before):]
    heavy, ends, done = [i for i, x in enumerate(w) if x > 1], [], ''
    for i in range(len(call)):
        ends.append((len(done), len(done := tok.decode(call[:i + 1]))))
    spelled = tok.decode(call)
    start = spelled.index('get_weather')
    assert len(heavy) == 2
    for i, c in zip(heavy, (0, len('get_we'))):
        assert ends[i][0] <= start + c < ends[i][1]


@pytest.mark.parametrize('name, others, want', [
    ('advice', ['advice_by_id', 'random'], [0, 6]), ('a', [], [0]), ('a', ['a', 'a'], [0]),
    ('get_x', ['get_y', 'get_z', 'go'], [0, 1, 4])])
def test_where_a_name_is_decided(name, others, want):
    assert departures(name, others) == want


def test_the_weight_has_its_bounds():
    assert call_weights(4, {0, 1, 2}, 9.) == [1.]*4, 'no key token counts less than others'
    w = call_weights(100, {0}, 9.)
    assert abs(w[0]/w[1] - 9) < 1e-9 and abs(sum(w) - 100) < 1e-9


def test_rows_without_a_call_are_plain_fine_tuning():
    runs = [fit(toy(), TOK, lab_data(), r, steps=2, batch_size=8, seed=0, progress=False)
            for r in (tl_training(), methods.get('full'))]
    a, b = (r.delta.attached.changes() for r in runs)
    assert all(torch.allclose(a[n], b[n], atol=1e-6) for n in a)
    losses = [[x['loss'] for x in r.log] for r in runs]
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.parametrize('delta', ['full', 'lora'])
def test_a_run_in_one_pass_ends_alike(delta, monkeypatch):
    recipe = methods.get(delta)*tl_training(**methods.make_of('tl_training').paper.toy)
    assert_one_pass_ends_alike(lambda: recipe, monkeypatch, seed=1)


@pytest.mark.parametrize('wrong, said', [(dict(tools='name'), 'tools is .*one group'), (dict(call='(a)(b)'), 'call is'),
                                         (dict(w_max=.5), 'w_max is 0.5; it must be at least 1')])
def test_wrong_settings_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        tl_training(**wrong)


def test_packed_rows_and_labels_are_refused():
    view = mark_calls()
    for batch in (dict(labels=torch.tensor([1, 2])), dict(labels=torch.ones(1, 3), position_ids=0)):
        with pytest.raises(ValueError, match='use packing=False'):
            view(batch, None)


@pytest.mark.parametrize('said', [ # what the official code looks for, as tools write it
    "NameError: name 'x' is not defined", 'f() takes 1 positional argument but 2 were given',
    "got an unexpected keyword argument 'city'", 'ConnectionError: refused', '{"error": "no such city"}',
    'HTTPError', 'this is not supported', 'Invalid API call', 'Response error', '400 Client Error: Bad Request',
    "{'error': 'x'}", 'slice indices must be integers or None or have an __index__ method',
    'Object of type SerpResults is not JSON serializable', 'connection error'])
def test_every_failure_that_the_official_code_knows_is_found(said):
    assert re.search(ERRORS, said)
    assert not re.search(ERRORS, '{"temperature": 21, "city": "Bern"}')


def spelled(text) -> list[int]:
    return [ord(c) for c in text]


class Letters:
    "A tokenizer with a token for each character"
    def decode(self, ids, **more):
        return ''.join(map(chr, ids))


def heavy_of(before, call, **more) -> list[int]:
    "The characters of the call that get more than the mean weight"
    batch = dict(input_ids=torch.tensor([spelled(before + call)]),
                 labels=torch.tensor([[IGNORE]*len(before) + spelled(call)]))
    marked = mark_calls(errors='', **more)(batch, State(None, Letters()))
    w = marked['token_weights'][0, len(before):]
    return [i for i, x in enumerate(w) if x > 1]


def test_an_argument_that_looks_like_a_call_is_none():
    tools = '{"name": "search"} {"name": "send"}'
    call = '{"name": "search", "arguments": {"name": "Ann"}}'
    assert heavy_of(tools, call) == [call.index('search'), call.index('search') + 2]
    other = '{"name": "stop", "arguments": {"name": "Ann"}}'
    assert heavy_of(tools, other) == [other.index('stop'), other.index('stop') + 1], 'not offered, and still the tool'
    two = '{"name": "search"} {"name": "send"}'
    assert len(heavy_of(tools, two)) == 4, 'two calls in one answer'


def test_a_pattern_that_is_none_is_refused_by_name():
    for name in ('tools', 'call', 'errors'):
        with pytest.raises(ValueError, match=f'{name} is .* no regular expression'):
            tl_training(**{name: '('})


def test_the_mean_is_over_what_is_left_also_in_parts():
    "A step of four micro-batches with different shares of failed calls is the step of the whole batch"
    prompt, tools, call = TOOLS
    failed = [dict(role='assistant', content='call open map ( Guville , today )'),
              dict(role='tool', content='i do not know')]
    right = dict(role='assistant', content='call open key ( Guville , today )')
    asked = dict(role='user', content=prompt)
    talks = [dict(messages=[asked, *failed*n, right]) for n in (0, 1, 2)*8]
    runs = []
    for k in (1, 4):
        recipe = tl_training(tools=tools, call=call, errors='do not know')
        runs.append(fit(toy(), TOK, data(talks, seed=0), recipe, steps=2, batch_size=4,
                        accumulate=k, progress=False, lr=1e-3, seed=0))
    whole, parts = ([x['loss'] for x in r.log] for r in runs)
    assert whole == pytest.approx(parts, rel=1e-4)
    assert runs[0].log[0]['loss'] > 1
