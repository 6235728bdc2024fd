"""Every chat template is either split into prompt and answer exactly, whatever the answer says, or refused"""
import hashlib, json, random, re
import pytest
import templates as t
from ftlab.core.data import data
from ftlab.core.generate import render
from ftlab.core.template import answer_opening, chat_pieces, end_of_turn, learned_turns
from ftlab.core.tokens import IGNORE, encode, encode_all, prompt_ids
from ftlab.lab.models import lab_tokenizer

PLACE = 'XYZPLACE'
ANSWERS = [*'abcdefghijklmnopqrstuvwxyz', 'end', 'im_end', '|>', '<', '>', 'assistant', 'user',
           'model', 'system', 'of', 'think', '/think', 'A', '0', ' d', 'd ', '\n\nd', 'a\nb', 'é', '日本',
           '🙂 d', '[/INST]', 'Which?', '<|im_end|>', 'None', '{{ x }}']
REASONS = ('rejects the roles', 'does not write', 'a row of its own', 'no room for the thinking',
           'opens message', 'answer to nothing')
SHIPPED = t.shipped()
ALL = t.OURS | SHIPPED

def user(text):
    return dict(role='user', content=text)

def says(text, **more):
    return dict(role='assistant', content=text, **more)

def read(messages, tok, **row):
    "Return the row's encoding and the texts learned, one a turn"
    row = dict(messages=messages, **row)
    enc, runs, last = encode(row, tok, 'chat'), [], False
    assert len(enc['input_ids']) == len(enc['labels'])
    for i, label in zip(enc['input_ids'], enc['labels']):
        assert label in (i, IGNORE)
        if label != IGNORE:
            runs = [*runs, []] if not last else runs
            runs[-1].append(i)
        last = label != IGNORE
    return enc, [tok.decode(r) for r in runs]

def holds(messages, tok, **row):
    "Check one conversation; return its texts learned, or the reason why it is refused"
    try:
        enc, found = read(messages, tok, **row)
    except ValueError as e:
        assert any(r in str(e) for r in REASONS), e
        return str(e)
    turns = learned_turns(messages)
    # without an end mark or an opening two turns of the assistant could touch, but a user is between
    assert len(found) == len(turns)
    asked = prompt_ids(dict(messages=messages, **row), tok, 'chat')
    assert enc['input_ids'][:len(asked)] == asked and enc['labels'][:len(asked)].count(
        IGNORE) >= len(
        asked) - sum(len(tok(f, add_special_tokens=False).input_ids) for f in found[:-1])
    assert render([dict(row, messages=messages[:turns[-1]])], tok) == [asked]
    return found

def put(found, said):
    """Return the texts learned of a conversation with places for its answers, with `said` in the
    places"""
    return [f.replace(f'{PLACE}{i}E', s) for i, (f, s) in enumerate(zip(found, said))]

WRITTEN = str, str.strip, str.lstrip, str.rstrip, lambda s: json.dumps(s, ensure_ascii=False)[1:-1]

def agree(found, wanted, said):
    "Whether the texts are those wanted; a template may strip the answers, or quote them"
    return any(found == put(wanted, [write(s) for s in said]) for write in WRITTEN)

def conversations(rng, n):
    "Yield conversations as functions of their answers, and how many answers they have"
    for _ in range(n):
        k, system = rng.randint(1, 3), rng.random() < .4
        asked = [rng.choice(['Which?', 'd', ' And ', 'é?\n', 'assistant']) + str(i)
                 for i in range(k)]
        weights = [rng.choice([1, 1, 0]) for _ in range(k - 1)] + [1]
        first = [dict(role='system', content='Be brief.')]*system
        yield k, weights, lambda said, first=first, asked=asked, weights=weights: first + [
            m for q, a, w in zip(asked, said, weights) for m in (user(q), says(a, weight=w))]

@pytest.mark.parametrize('name', ALL)
def test_what_is_learned_does_not_depend_on_the_answers_letters(name):
    tok, rng = t.byte_tokenizer(ALL[name]), random.Random(name)
    wanted = holds([user('Which?'), says(PLACE + '0E')], tok)
    for a in ANSWERS:
        found = holds([user('Which?'), says(a)], tok)
        assert found == wanted if isinstance(wanted, str) else agree(found, wanted, [a]), (a, found)
    for k, weights, talk in conversations(rng, 12):
        said = [rng.choice(ANSWERS) for _ in range(k)]
        wanted = holds(talk([f'{PLACE}{i}E' for i in range(k)]), tok)
        found = holds(talk(said), tok)
        if isinstance(wanted, str):
            assert found == wanted
        else:
            # the places are numbered by turn, the texts are those of the learned turns
            kept = [i for i, w in enumerate(weights) if w]
            wanted = [re.sub(rf'{PLACE}{i}E', f'{PLACE}{n}E', f)
                      for n, (i, f) in enumerate(zip(kept, wanted))]
            assert all(f.count(PLACE) == 1 for f in wanted)
            assert agree(found, wanted, [said[i] for i in kept]), (said, found, wanted)

REFUSED = {  # of our templates: (one turn, system prompt, two turns) -> a piece of the reason
    'r1': (None, None, 'before message 2 differently'), 'nemotron': (None, None, 'before message 2 differently'),
    'gemma': (None, 'System role not supported', None), 'harmony': (None, None, 'ends message 2 differently'),
    'counts': (None, None, 'before message 2 differently'),
    'lost_system': (None, 'does not write the text of message 1 (system)', None)}

@pytest.mark.parametrize('name', t.OURS)
def test_which_of_our_templates_are_refused_and_why(name):
    tok = t.byte_tokenizer(t.OURS[name])
    one = [user('Which?'), says('d')]
    talks = one, [dict(role='system', content='Be brief.'), *one], [user('Which?'), says('e'), *one]
    for talk, reason in zip(talks, REFUSED.get(name, (None,)*3)):
        found = holds(talk, tok)
        assert reason in found if reason else isinstance(found, list), (name, found)
    # the way out that the message names
    assert isinstance(holds([user('Which?'), says('e', weight=0), *one], tok), list)

def test_texts_learned_word_for_word():
    one, two = [user('Which?'), says('d')], [user('Which?'), says('n'), user('Sure?'), says('e')]
    for name, talk, texts in (
            ('chatml', two, ['n<|im_end|>\n', 'e<|im_end|>\n']), ('llama3', two, ['n<|eot_id|>', 'e<|eot_id|>']),
            ('r1', one, ['d<|end_of_sentence|>']), ('nemotron', one, ['</think>d<|im_end|>\n']),
            ('qwen3', two, ['n<|im_end|>\n', '<think>\n\n</think>\n\ne<|im_end|>\n']),
            ('parts', two, [' n<|end_of_utterance|>\n', ' e<|end_of_utterance|>\n']),
            ('phi3', two, ['n<|end|>\n', 'e<|end|>\n</s>']), ('no_end_mark', two, ['n', 'e']),
            ('no_opening', one, ['<|assistant|>\nd<|end|>\n']), ('eos_appended', two, ['n</s>', 'e</s>']),
            ('counts', one, ['d<|im_end|>\n'])):
        assert read(talk, t.byte_tokenizer(t.OURS[name]))[1] == texts, name

@pytest.mark.parametrize('how', [dict(eos='<|im_end|>'), dict(eos=None), dict(pad='</s>'),
                                 dict(adds='<s> $A'),
                                 dict(adds='<s> $A </s>'), dict(adds='$A </s>'), dict(marks=False)])
@pytest.mark.parametrize('name', ['chatml', 'llama3', 'qwen3', 'eos_appended', 'inst', 'phi3'])
def test_the_tokenizers_own_marks_change_nothing(name, how):
    if name in ('eos_appended', 'inst', 'phi3') and 'eos' in how:
        pytest.skip('this template writes the EOS token')
    talk = [user('Which?'), says('d'), user('Sure?'), says('e')]
    plain, other = t.byte_tokenizer(t.OURS[name]), t.byte_tokenizer(t.OURS[name], **how)
    assert holds(talk, other) == holds(talk, plain)
    texts = [tok.decode(encode(dict(messages=talk), tok, 'chat')['input_ids'])
             for tok in (plain, other)]
    assert texts[0] == texts[1] == plain.apply_chat_template(talk, tokenize=False)

@pytest.mark.parametrize('name', [n for n in SHIPPED if n.endswith('_training')]
                         or [pytest.param(None, marks=pytest.mark.skip('trl is not installed'))])
def test_the_generation_tags_of_trl_mark_the_same_text(name):
    tok = t.byte_tokenizer(SHIPPED[name])
    for talk in ([user('Which?'), says(PLACE)],
                 [user('Which?'), says('KLM'), user('And?'), says(PLACE)]):
        found = holds(talk, tok)
        if isinstance(found, str):
            assert len(talk) == 4 and 'a row of its own' in found
            continue
        parts = 'idefics' in name or 'smolvlm' in name or 'llava' in name
        given = ([dict(m, content=[dict(type='text', text=m['content'])]) for m in talk] if parts
                 else talk)
        out = tok.apply_chat_template(given, return_dict=True, return_assistant_tokens_mask=True)
        masked = tok.decode([i if on else tok.pad_token_id for i, on in zip(out['input_ids'], out['assistant_masks'])])
        tagged = [s for s in masked.split('<pad>') if s]
        # some tags include the header, which our prompt already has
        assert len(tagged) == len(found) and all(
            a.rstrip().endswith(b.rstrip()) for a, b in zip(tagged, found)), (tagged, found)

# ---- thinking
def test_thinking_is_learned_or_refused():
    inline, apart = says('<think>\nwhy\n</think>\n\nd'), says('d', reasoning_content='why')
    for name, talk, wanted in (
            ('qwen3', inline, '<think>\nwhy\n</think>\n\nd<|im_end|>\n'),
            ('qwen3', apart, '<think>\nwhy\n</think>\n\nd<|im_end|>\n'),
            ('qwen3', says('d', thinking='why'), '<think>\nwhy\n</think>\n\nd<|im_end|>\n'),
            ('think', inline, 'why\n</think>\n\nd<|im_end|>\n'), ('think', apart, 'why\n</think>\n\nd<|im_end|>\n'),
            ('nemotron', inline, 'why\n</think>\n\nd<|im_end|>\n'),
            ('chatml', inline, '<think>\nwhy\n</think>\n\nd<|im_end|>\n'),
            ('chatml', apart, 'does not write the thinking of message 2'),
            ('r1', inline, 'does not write the thinking of message 2')):
        found = holds([user('Which?'), talk], t.byte_tokenizer(t.OURS[name]))
        assert wanted in found, (name, found)
    # an earlier answer loses its thinking: an error if it is learned, as a prompt it is what the template says
    tok, rest = t.byte_tokenizer(t.QWEN3), [user('And?'), says('e')]
    assert 'a row of its own' in holds([user('Which?'), inline, *rest], tok)
    assert holds([user('Which?'), dict(inline, weight=0), *rest], tok) == ['<think>\n\n</think>\n\ne<|im_end|>\n']

def test_a_template_that_cuts_answers_at_a_mark_of_its_own_is_refused():
    tok = t.byte_tokenizer(t.CHATML.replace('m.content', "m.content.split('[/THINK]')[-1]"))
    assert "does not write 'why' of message 2" in holds([user('a'),
                                                         says('[THINK]why[/THINK]d')], tok)
    assert holds([user('a'), says('d')], tok) == ['d<|im_end|>\n']

# ---- shapes of conversations
def test_parts_of_text_are_read_as_text_and_pictures_are_refused():
    tok, part = t.byte_tokenizer(t.CHATML), lambda s: [dict(type='text', text=c) for c in s]
    plain = read([user('Which?'), says('de')], tok)
    assert read([user(part('Which?')), says(part('de'))], tok) == plain
    with pytest.raises(ValueError, match="message 1 has a part of type 'image'; only text"):
        read([user([dict(type='image')]), says('d')], tok)

def test_an_answer_without_a_question():
    talk = [says('Hello.'), user('Which?'), says('d')]
    tok = t.byte_tokenizer(t.CHATML)
    assert 'message 1 is an answer to nothing' in holds(talk, tok)
    assert read([dict(talk[0], weight=0), *talk[1:]], tok)[1] == ['d<|im_end|>\n']

@pytest.mark.parametrize('adds', ['$A', '<s> $A', '$A </s>', '<s> $A </s>'])
def test_without_a_template_the_prompt_is_what_precedes_the_answer(adds):
    tok, row = t.byte_tokenizer(adds=adds), dict(prompt='Which?', response='d')
    enc, asked = encode(row, tok, 'text'), prompt_ids(row, tok)
    assert render(['Which?'], tok) == [asked] == [enc['input_ids'][:len(asked)]]
    assert tok.decode(enc['input_ids'][len(asked):]) == 'd</s>' and tok.decode(asked).endswith('?')

# ---- tools
PLACED = dict(type='object', properties=dict(place=dict(type='string', description='.')),
              required=['place'])
TOOL = [dict(type='function', function=dict(name='weather', description='.', parameters=PLACED))]

def called(arguments, content=None):
    call = dict(type='function', id='abcdefghi', function=dict(name='weather', arguments=arguments))
    return [user('Rain?'), says(content, tool_calls=[call]),
            dict(role='tool', content='sun', name='weather', tool_call_id='abcdefghi'), says('Sunny.')]

@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('arguments', [dict(place='Ulm'), '{"place": "Ulm"}'])
def test_calls_are_learned_with_the_tools_in_the_prompt_or_refused(name, arguments):
    tok = t.byte_tokenizer(ALL[name])
    for content in (None, ''):
        talk = called(arguments, content)
        for part in (talk, talk[:2]):
            found = holds(part, tok, tools=TOOL)
            if isinstance(found, list):
                assert 'weather' in found[0] and 'Ulm' in found[0] and 'sun' not in ''.join(found)
                assert len(part) == 2 or 'Sunny.' in found[1]
                asked = tok.decode(prompt_ids(dict(messages=part[:2], tools=TOOL), tok, 'chat'))
                assert 'weather' in asked and 'place' in asked

def test_tools_that_the_template_leaves_out_are_refused_by_name():
    tok = t.byte_tokenizer(t.TOOLS)
    enc, found = read(called('{"place": "Ulm"}'), tok, tools=TOOL)
    whole = tok.apply_chat_template(called('{"place": "Ulm"}'), tools=TOOL, tokenize=False)
    assert tok.decode(enc['input_ids']) == whole
    assert found[1] == 'Sunny.<|im_end|>\n' and found[0].endswith('</tool_call><|im_end|>\n')
    blind = t.byte_tokenizer(t.TOOLS.replace('{% if tools %}', '{% if false %}'))
    assert 'does not write the tools' in holds(called({}), blind, tools=TOOL)
    assert 'does not write the tool calls of message 2' in holds(
        [user('a'), says('b', tool_calls=called({})[1]['tool_calls'])], t.byte_tokenizer(t.CHATML))

def test_no_content_is_not_written_as_none():
    plain = t.TOOLS.replace("m.content or ''", 'm.content')
    assert 'None' not in holds(called({}), t.byte_tokenizer(plain), tools=TOOL)[0]

def test_a_list_of_parts_is_not_written_as_python_shows_it():
    tok = t.byte_tokenizer(t.OURS['lost_system'])
    assert 'does not write the text of message 1' in holds(
        [dict(role='system', content='Be brief.'), user('a'), says('b')], tok)

# ---- rows
def test_errors_name_the_row():
    tok = t.byte_tokenizer(t.R1)
    good = dict(messages=[user('a'), says('b')])
    with pytest.raises(ValueError, match='row 3 of 3: .* before message 2 differently'):
        encode_all([good, good, dict(messages=good['messages']*2)], tok, 'chat')
    with pytest.raises(ValueError, match='half a surrogate pair'):
        encode_all([dict(prompt='a', response='x \ud83d')], tok, 'text')
    for kind, row in dict(label=dict(text='\ud83d', label=0), lm=dict(text='\ud83d')).items():
        with pytest.raises(ValueError, match='half a surrogate pair'):
            encode(row, tok, kind)

def test_a_row_that_teaches_nothing_is_dropped_and_has_no_prompt():
    tok = t.byte_tokenizer(t.CHATML)
    none = dict(messages=[user('a'), says('b', weight=0)])
    assert encode_all([none, dict(messages=[user('a'), says('b')])], tok, 'chat').dropped == 1
    with pytest.raises(ValueError, match='every message of the assistant has weight 0'):
        prompt_ids(none, tok, 'chat')

def test_rows_of_one_shape_are_checked_once_and_the_others_too():
    tok = t.byte_tokenizer(t.OURS['lost_system'])
    one, known = [user('Which?'), says('d')], {}
    for _ in range(2):
        chat_pieces(one, tok, known=known)
        with pytest.raises(ValueError, match='message 1'):
            chat_pieces([dict(role='system', content='x'), *one], tok, known=known)
    assert len(known) == 1

def test_the_end_of_a_turn_and_what_comes_before_an_answer():
    for name, end, opening in (
            ('chatml', '<|im_end|>', ''), ('llama3', '<|eot_id|>', ''), ('phi3', '<|end|>', ''),
            ('qwen3', '<|im_end|>', '<think>\n\n</think>\n\n'), ('inst', '</s>', ' '),
            ('gemma', '<end_of_turn>', ''), ('parts', '<|end_of_utterance|>', ' '),
            ('nemotron', '<|im_end|>', '</think>'), ('no_end_mark', None, '')):
        tok = t.byte_tokenizer(t.OURS[name])
        assert end_of_turn(tok) == (end and tok.convert_tokens_to_ids(end)), name
        assert answer_opening(tok) == opening, name
    bare = t.byte_tokenizer()
    assert end_of_turn(bare) is None and answer_opening(bare) == ''
    # marks that are no tokens end nothing
    assert end_of_turn(t.byte_tokenizer(t.CHATML, marks=False)) is None

# ---- what worked before the answers were located by marks
PINNED = dict(
    lab='b91ac3aa57c52a56',
    lab_chat='177325f1f19f32a6',
    lab_lm='2b6aa756954a8c94',
    bare='446fbdc083f639df',
    chatml_text='a756c82a334866c1',
    chatml_chat='8282fac03404c798',
    llama3_text='0ea6802b4b0cbbb4',
    llama3_chat='090081c2659fcb5a',
    qwen3_text='4e52649069c2f0ba',
    qwen3_chat='7a0b7384566fe8a3',
    eos_appended_text='7b6ebd675de4fe84',
    eos_appended_chat='7c0b5edbd09a0ba2',
)

def talks():
    said = [(f'{"xyz"[i % 3]}{i} {"a" if i % 3 == 0 else "c"}', f'{"b" if i % 3 == 0 else ""}{i*7}')
            for i in range(60)]
    return [dict(messages=[user(q), says(a), user(a), says(q)]) for q, a in said]

@pytest.mark.parametrize('name', PINNED)
def test_tokens_labels_and_prompts_are_those_of_earlier_versions(name):
    template, kind = name.rpartition('_')[::2] if '_' in name else (name, 'text')
    toks = dict(lab=lab_tokenizer, bare=lambda: t.byte_tokenizer(adds='<s> $A'))
    tok = toks.get(template, lambda: t.byte_tokenizer(t.OURS[template]))()
    texts = [dict(prompt=q['content'], response=a['content'])
             for q, a, *_ in (r['messages'] for r in talks())]
    rows = dict(chat=talks(), lm=[dict(text=r['prompt']) for r in texts],
                text=data('sort', n=60).train if template == 'lab' else texts)[kind]
    asked = dict(chat=lambda r: r['messages'][:-1], text=lambda r: r['prompt']).get(kind)
    asked = [asked(r) for r in rows] if asked else []
    found = [list(encode_all(rows, tok, kind)), [prompt_ids(r, tok, kind) for r in rows if asked],
             render(asked, tok) if asked else []]
    assert hashlib.blake2s(json.dumps(found).encode(), digest_size=8).hexdigest() == PINNED[name]
