"""An answer stops where the model, its tokenizer and its template say, and is compared without what they add"""
import types
import pytest, torch
import templates as t
from ftlab.core.generate import answer_text, generate, render, stop_ids
from ftlab.core.template import answer_opening
from ftlab.core.scorers import answer_length, answers, exact_match
from ftlab.evaluators.decode import decode

class Says(torch.nn.Module):
    "A model that continues every prompt with the same text, without end"
    def __init__(self, tok, text, own=None):
        super().__init__()
        self.one, self.tok = torch.nn.Parameter(torch.zeros(1)), tok
        self.said = tok(text, add_special_tokens=False).input_ids
        self.generation_config = types.SimpleNamespace(eos_token_id=own)
        self.config = types.SimpleNamespace(vocab_size=len(tok))

    def generate(self, input_ids, max_new_tokens, eos_token_id, pad_token_id, **_):
        ids = (self.said*max_new_tokens)[:max_new_tokens]
        stop = next((k for k, i in enumerate(ids) if i in (eos_token_id or ())), len(ids))
        ids = ids[:stop + 1] + [pad_token_id]*(len(ids) - stop - 1)
        return torch.cat([input_ids, torch.tensor([ids]*len(input_ids))], 1)

@pytest.mark.parametrize('own', [None, 1, [1], [1, 2]])
def test_every_source_of_an_end_counts(own):
    tok = t.byte_tokenizer(t.CHATML)
    turn = tok.convert_tokens_to_ids('<|im_end|>')
    listed = own if isinstance(own, list) else [own]*(own is not None)
    assert stop_ids(Says(tok, 'a', own), tok) == sorted({1, turn, *listed})
    assert stop_ids(Says(tok, 'a', own), t.byte_tokenizer(eos=None)) == sorted(listed)

@pytest.mark.parametrize('eos', ['</s>', '<|im_end|>', None])
@pytest.mark.parametrize('special', [True, False])
def test_an_answer_is_the_text_before_the_end_mark(eos, special):
    tok = t.byte_tokenizer(t.CHATML, eos=eos)
    if not special: # Qwen's end marks of tools and thinking are added tokens, but not special ones
        tok = t.byte_tokenizer(t.CHATML, eos=eos, marks=False)
        tok.add_tokens('<|im_end|>')
    rows = [dict(prompt=f'q{"q"*i}', response='lima') for i in range(3)]
    model = Says(tok, 'lima<|im_end|>\nba')
    assert generate(model, tok, [r['prompt'] for r in rows], max_new_tokens=40) == ['lima']*3
    assert exact_match(model, tok, rows) == 1

    def begin():
        at = iter(model.said*9)
        def read(x, mask, place):
            return torch.nn.functional.one_hot(torch.tensor([next(at)]*len(x)), len(tok)).float()
        return read

    assert decode([model], tok, [r['prompt'] for r in rows], begin, max_new_tokens=20) == ['lima']*3

def test_without_any_end_the_whole_answer_is_kept():
    tok = t.byte_tokenizer(t.OURS['no_end_mark'], eos=None)
    assert generate(Says(tok, 'ab'), tok, ['q'], max_new_tokens=5) == ['ababa']
    assert answer_text(torch.tensor(tok('a<s>b').input_ids), tok, []) == 'ab'

@pytest.mark.parametrize('name, said', [
    ('qwen3', '<think>\n\n</think>\n\nd<|im_end|>'), ('qwen3', '<think>\nlong\n</think>\n\nd<|im_end|>'),
    ('qwen3', 'd<|im_end|>'), ('nemotron', '</think>d<|im_end|>'), ('parts', ' d<|end_of_utterance|>'),
    ('chatml', 'd<|im_end|>')])
@pytest.mark.parametrize('marks', [True, False]) # whether <think> is one token, which is not shown
def test_exact_compares_the_answer_without_the_templates_opening(name, said, marks):
    tok = t.byte_tokenizer(t.OURS[name], marks=marks)
    if not marks:
        tok.add_tokens(['<|im_end|>', '<|end_of_utterance|>'])
    rows = [dict(prompt='q', response='d'), dict(prompt='q', response='e')]
    if marks and 'long' in said:
        pytest.skip('thinking between marks that are not shown is part of the answer')
    assert answers(Says(tok, said), tok, rows, max_new_tokens=60) == ['d', 'd']
    if 'long' not in said:
        assert exact_match(Says(tok, said), tok, rows) == .5
    opening = tok(answer_opening(tok), add_special_tokens=False).input_ids
    assert answer_length(rows, tok) == 1 + len(opening) + 1

def test_thinking_of_the_response_is_compared():
    tok = t.byte_tokenizer(t.QWEN3, marks=False)
    tok.add_tokens('<|im_end|>')
    thought = '<think>\nwhy\n</think>\n\nd'
    assert answers(Says(tok, thought + '<|im_end|>'), tok,
                   [dict(prompt='q', response=thought)]) == [thought]

def test_a_conversation_needs_a_template():
    tok = t.byte_tokenizer()
    talk = [dict(role='system', content='s'), dict(role='user', content='q')]
    assert render(['q', talk[1:]], tok) == 2*render(['q'], tok)
    for wrong, n in ((talk, 2), ([], 0), (dict(messages=talk), 2)):
        with pytest.raises(ValueError, match=f'^prompt 2 has {n} messages, and the tokenizer has no chat template'):
            render(['q', wrong], tok)
    with pytest.raises(ValueError, match='^prompt 1 has tools, and the tokenizer has no chat template'):
        render([dict(messages=talk[1:], tools=[dict(name='look')])], tok)

@pytest.mark.parametrize('rows, says', [
    ([], 'there are no rows to answer'), ([dict(messages=[])], 'row 1 of 1 has no .*, only messages; give rows with'),
    ([dict(prompt='q', response='d'), dict(prompt='q')], 'row 2 of 2 has no response')])
def test_a_score_of_answers_needs_prompts_and_responses(rows, says):
    tok = t.byte_tokenizer()
    for ask in (lambda: answer_length(rows, tok), lambda: exact_match(Says(tok, 'd'), tok, rows),
                lambda: answers(Says(tok, 'd'), tok, rows, max_new_tokens=4)):
        with pytest.raises(ValueError, match=f'^{says}'):
            ask()

def test_prompts_may_bring_tools():
    tok = t.byte_tokenizer(t.TOOLS)
    tools = [dict(type='function', function=dict(name='weather', parameters={}))]
    talk = [dict(role='user', content='Rain?')]
    plain, told = render([talk, dict(messages=talk, tools=tools)], tok)
    assert plain == render(['Rain?'], tok)[0] and 'weather' in tok.decode(told)
    assert tok.decode(told) == tok.apply_chat_template(talk, tools=tools, tokenize=False,
                                                       add_generation_prompt=True)
    with pytest.raises(ValueError, match='half a surrogate pair'):
        render(['\ud83d'], tok)

@pytest.mark.parametrize('prompts', [None, 3, [], 'one prompt'])
def test_what_is_no_list_of_prompts_is_named(prompts):
    import ftlab
    with pytest.raises(ValueError, match='it must be a list of at least one prompt'):
        ftlab.generate(*ftlab.load('lab-s'), prompts)

def test_a_model_in_the_place_of_its_tokenizer_is_named():
    import ftlab
    model, tok = ftlab.load('lab-s')
    with pytest.raises(TypeError, match='tok is a model; give the loaded model and its tokenizer'):
        ftlab.generate(tok, model, ['a'])
