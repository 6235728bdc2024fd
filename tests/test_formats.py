"What goes in: formats, columns, shapes of files, labels and mixtures; every input is read right or refused with a fix"
import ast
import itertools
import json
import random
import datasets
import numpy
import pandas
import pytest
import ftlab
from ftlab.core.data import Data, data, on_hub
from ftlab.core.formats import ALSO, FORMS, HISTORIES, MEANT, TOOLS
from ftlab.core.lab import lab_skill
from ftlab.core.mix import mix, row_counts
from ftlab.core.scorers import judge

def talk(ask, say):
    return [dict(role='user', content=ask), dict(role='assistant', content=say)]

def share(*said):
    return [{'from': who, 'value': text}
            for who, text in zip(itertools.cycle(('human', 'gpt')), said)]

def lines(path, rows):
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8')
    return path

def all_rows(d):
    return d.train + d.validation + d.test

def refused(*args, **kwargs):
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        data(*args, **kwargs)
    return str(e.value)

QA = [dict(prompt=f'question {i}', response=f'answer {i}') for i in range(60)]

# ---- what worked before gives the same rows: fingerprints made before formats were known
PINS = {
    'text': '7fa71096f50e1979',
    'text_carried': '5f12e43f8143914c',
    'completion': '7fa71096f50e1979',
    'renamed': 'deafc8ee3104a7f6',
    'pairs': '568b08c38f0a09fb',
    'chat': '6372cf3f6094cd8e',
    'chat_named': '7b2cd001e68aa02c',
    'chat_and_text': '795d094d3ffa8b6c',
    'text_and_lm': 'e4486b7897f6329b',
    'label': '857282f241242697',
    'label_numbers': '3d8e4ec9ebabd417',
    'label_bool': 'd86153d270c3ba1e',
    'class_label': '17040d4a7a1704aa',
    'lm': '64a64bda14434f71',
    'choices': 'a4f94e2fb07c4ac9',
    'lab': 'ba7ce617f0eafeaa',
    'splits': 'c0463a7ee56420e4',
    'some': '13861ae806d5f972'}

def pinned():
    T = talk
    qa = QA
    chats = [dict(messages=[dict(role='system', content='be short')]*(i % 2) + T(f'q{i}', 'a') + T('and?', f'{i}'))
             for i in range(60)]
    named = datasets.Features(text=datasets.Value('string'), label=datasets.ClassLabel(names=['z', 'y', 'x']))
    return dict(
        text=(qa, {}),
        text_carried=([dict(r, id=i, meta=dict(lang='de'), source=None)
                       for i, r in enumerate(qa)], {}),
        completion=([dict(prompt=r['prompt'], completion=r['response']) for r in qa], {}),
        renamed=([dict(question=r['prompt'], answer=r['response'], id=i) for i, r in enumerate(qa)],
                 dict(columns=dict(prompt='question', response='answer'))),
        pairs=([dict(prompt=r['prompt'], chosen=r['response'], rejected='no', score=i)
                for i, r in enumerate(qa)], {}),
        chat=(chats, {}),
        chat_named=([dict(messages=[dict(m, name=None) for m in r['messages']], id=i)
                     for i, r in enumerate(chats)], {}),
        chat_and_text=([dict(r, prompt='p', response='r') for r in chats], {}),
        text_and_lm=([dict(r, text='t') for r in qa], {}),
        label=([dict(text=f't{i}', label='abc'[i % 3], id=i) for i in range(60)], {}),
        label_numbers=([dict(text=f't{i}', label=i % 12) for i in range(60)], {}),
        label_bool=([dict(text=f't{i}', label=i % 2 == 0) for i in range(60)], {}),
        class_label=(datasets.Dataset.from_list([dict(text=f't{i}', label=i % 3)
                                                 for i in range(60)],
                                                features=named), {}),
        lm=([dict(text=f'document {i}', url='x') for i in range(60)], {}),
        choices=([dict(prompt=f'p{i}', response='a', choices=['a', 'b']) for i in range(60)], {}),
        lab=('sort', dict(n=20, seed=3)),
        splits=(dict(train=qa[:40], dev=qa[40:50], test=qa[50:]), {}),
        some=(qa, dict(n=7, seed=5)))

def test_what_was_read_before_is_read_the_same():
    assert {k: data(s, **o).fingerprint for k, (s, o) in pinned().items()} == PINS

# ---- the rule for columns, for every form and every column
ROWS = dict(chat=dict(messages=talk('a', 'b')), text=dict(prompt='a', response='b'),
            pairs=dict(prompt='a', chosen='b', rejected='c'), label=dict(text='a', label='x'),
            lm=dict(text='a'))
VALUES = ('words', 3, ['x'], dict(a=1), 0.5)

def both(row):
    return dict(train=[row]*2, validation=[row], test=[row])

@pytest.mark.parametrize('form', ROWS)
def test_a_column_that_changes_the_meaning_is_read_carried_or_refused(form):
    for column in sorted(MEANT - {*FORMS[form], *ALSO[form]}):
        if form == 'lm' and column == 'label':
            continue # then the form is another one
        for value in VALUES:
            row = dict(ROWS[form]) | {column: value}
            says = refused(both(row))
            assert (repr(column) in says and f"carry=['{column}']" in says
                    and 'train row 1' in says), says
            if column != 'tools' or form != 'chat':
                d = data(both(row), carry=column)
                assert d.train[0][column] == value and d.counts['carried'] == {column: 4}
                assert d.kind == data(both(ROWS[form])).kind
        for nothing in (None, '', '  ', [], float('nan')):
            assert column not in data(both(dict(ROWS[form]) | {column: nothing})).note

@pytest.mark.parametrize('form', ROWS)
def test_what_the_error_says_to_write_works(form):
    good = (dict.fromkeys(TOOLS, [dict(name='f')]) | dict.fromkeys(HISTORIES, [['a', 'b']])
            | dict(labels='true'))
    said = 0
    for column in sorted(MEANT - {*FORMS[form], *ALSO[form]} - {'label'}):
        row = dict(ROWS[form]) | {column: good.get(column, 'words')}
        says = refused(both(row))
        if 'pass columns=' in says:
            columns = ast.literal_eval(says.split('pass columns=')[1].split('; to carry')[
                0].strip())
            if column == 'labels' and form == 'text':
                d = data(both(row), columns=columns, wanted='only')
                assert d.counts['wanted'] == {'rows': 4}
            else:
                d = data(both(row), columns=columns)
                assert 'unread' not in d.counts and column not in d.train[0]
            said += 1
    assert said or form == 'chat'

@pytest.mark.parametrize('form', ROWS)
def test_every_other_column_is_carried_along_and_said(form):
    r = random.Random(form)
    for i in range(30):
        name = ''.join(r.choice('abcdefghij_0 ') for _ in range(r.randint(1, 9))) + '_x'
        row = dict(ROWS[form]) | {name: r.choice(VALUES)}
        d = data(both(row))
        assert d.train[0][name] == row[name] and d.counts['unread'] == {name: 4}
        assert f'carried along unread: {name} (4)' in d.note
        quiet = data(both(row), carry=[name])
        assert 'unread' not in quiet.note and quiet.fingerprint == d.fingerprint

def test_carry_is_checked():
    assert "carry= names 'idd', but no row has that column; did you mean 'id'" in refused(
        [dict(r, id=1) for r in QA], carry='idd')
    assert 'rename it in train' in refused([dict(prompt='a', completion='b', response='c')], carry='response')
    assert 'either read or carried' in refused(QA, columns=dict(prompt='prompt'), carry=['prompt'])
    assert 'tools beside messages are always read' in refused(
        both(dict(ROWS['chat'], tools=[dict(name='f')])), carry='tools')
    d = data([dict(text=f't{i}', label=['x']) for i in range(40)], carry='label')
    assert d.kind == 'lm' and d.train[0]['label'] == ['x']

def test_columns_may_join_several():
    rows = [dict(q=f'why {i}?', context='' if i % 2 else f'since {i}', a='so', id=i)
            for i in range(60)]
    d = data(rows, columns=dict(prompt=['context', 'q'], response='a'))
    assert {r['prompt'] for r in all_rows(d)} == {
        f'why {i}?' if i % 2 else f'since {i}\nwhy {i}?' for i in range(60)}
    assert d.counts['joined'] == {'q': 30} and 'joined to the text before: q (30)' in d.note
    assert "has no column 'p'" in refused(rows, columns=dict(prompt=['p', 'q'], response='a'))
    assert 'list of names' in refused(rows, columns=dict(prompt=[], response='a'))
    assert 'context is 7, of type int; it must be text' in refused(
        [dict(rows[0], context=7)], columns=dict(prompt=['context', 'q'], response='a'))
    nli = [dict(premise='p', hypothesis=f'h{i}', label=i % 3) for i in range(60)]
    assert "columns={'text': ['premise', 'hypothesis']}" in refused(nli)
    assert data(nli, columns=dict(text=['premise', 'hypothesis'])).train[0]['text'].startswith('p\nh')

# ---- formats
WORDS = dict(dog='Hund', cat='Katze', house='Haus', tree='Baum', sun='Sonne', bread='Brot', water='Wasser', moon='Mond')
ALPACA = [dict(instruction='Translate into German.', input=k, output=v) for k, v in WORDS.items()]*5

def test_alpaca_s_input_is_in_the_prompt():
    d = data(ALPACA)
    assert {(r['prompt'], r['response']) for r in all_rows(d)} == {
        (f'Translate into German.\n{k}', v) for k, v in WORDS.items()}
    assert d.kind == 'text' and d.counts['joined'] == {'input': 40} and d.counts['formats'] == {'train': 'Alpaca'}
    assert 'read as Alpaca' in d.note and 'input (40)' in d.note
    says = refused(ALPACA, columns=dict(prompt='instruction', response='output'))
    assert "columns={'prompt': ['instruction', 'input'], 'response': 'output'}" in says and "carry=['input']" in says
    kept = data(ALPACA, columns=dict(prompt='instruction', response='output'), carry='input')
    assert kept.train[0]['input'] in WORDS and kept.train[0]['prompt'] == 'Translate into German.'
    short = [{k: v for k, v in r.items() if k != 'input'} for r in ALPACA]
    assert data(short).train[0].keys() == {'prompt', 'response'}
    assert data(short[:1] + ALPACA[1:]).counts['joined'] == {'input': 39}
    whole = data([dict(r, text='the template and all of it') for r in ALPACA]) # as on the hub
    assert whole.kind == 'text' and whole.counts['unread'] == {'text': 40}

def test_alpaca_with_system_and_history_is_a_conversation():
    rows = [dict(r, system='Be brief.' if i % 2 else '',
                 history=[['hi', 'hello']] if i % 3 == 0 else None)
            for i, r in enumerate(ALPACA[:8])]
    d = data(dict(train=rows, validation=rows[:1], test=rows[1:2]))
    first, second = d.train[:2]
    assert first['messages'] == talk('hi', 'hello') + talk('Translate into German.\ndog', 'Hund')
    assert second['messages'] == [dict(role='system', content='Be brief.')] + talk(
        'Translate into German.\ncat', 'Katze')
    assert d.kind == 'chat' and d.counts['told'] and all('messages' in r for r in all_rows(d))
    assert 'history is' in refused([dict(rows[0], history=['hi'])])
    assert data([dict(r, system='', history=[]) for r in ALPACA]).kind == 'text'
    d = data([dict(r, system_prompt='Be brief.') for r in QA], columns=dict(system='system_prompt'))
    assert d.train[0]['messages'][0] == dict(role='system', content='Be brief.')
    assert "columns={'system': 'system_prompt'}" in refused([dict(r, system_prompt='Be brief.')
                                                             for r in QA])

def test_dolly_s_context_is_in_the_prompt():
    rows = [dict(instruction=f'Who {i}?', context='It was me.'*(i % 2), response='me',
                 category='qa') for i in range(40)]
    d = data(rows)
    assert {r['prompt'] for r in all_rows(d)} == {f'Who {i}?' + '\nIt was me.'*(i % 2)
                                                  for i in range(40)}
    assert d.counts['unread'] == {'category': 40} and d.counts['formats'] == {'train': 'Dolly'}
    assert d.train[0].keys() == {'prompt', 'response', 'category'}

def test_a_column_called_context_is_no_mark():
    for value in (2, 'some text'):
        rows = [dict(messages=talk(f'q{i}', 'first') + talk('more', 'second'), context=value)
                for i in range(40)]
        assert "'context' changes what a row means" in refused(rows)
        assert data(rows, carry='context').train[0]['context'] == value
    says = refused([dict(r, context='x') for r in QA])
    assert "columns={'prompt': ['prompt', 'context']}" in says
    d = data([dict(r, context='x') for r in QA], columns=dict(prompt=['prompt', 'context']))
    assert d.train[0]['prompt'].endswith('\nx')

def test_sharegpt_is_openai_s_messages():
    rows = [dict(conversations=share(f'q{i}', 'a', 'more', f'b{i}')) for i in range(60)]
    same = data([dict(messages=talk(f'q{i}', 'a') + talk('more', f'b{i}')) for i in range(60)])
    d = data(rows)
    assert d.kind == 'chat' and d.fingerprint == same.fingerprint and 'read as ShareGPT' in d.note
    assert data(rows, columns=dict(messages='conversations')).fingerprint == same.fingerprint
    assert data([dict(conversations=json.dumps(r['conversations']))
                 for r in rows]).fingerprint == same.fingerprint
    assert data([dict(conversations=r['messages']) for r in same.train]).train # OpenAI's turns under ShareGPT's name
    told = data([dict(r, system='Be kind.') for r in rows])
    assert told.train[0]['messages'][0] == dict(role='system', content='Be kind.')
    open_end = data([dict(conversations=r['conversations'] + share('and?')) for r in rows])
    assert open_end.fingerprint == same.fingerprint
    assert (open_end.counts['messages']['messages after the last answer, left out'] == 60
            and 'left out (60)' in open_end.note)

def test_sharegpt_s_calls_become_tool_calls():
    turns = share('Weather?') + [{'from': 'function_call',
                                  'value': '{"name": "weather", "arguments": {"place": "Ulm"}}'},
                                 {'from': 'observation', 'value': 'sun'}, {'from': 'gpt', 'value': 'Sunny.'}]
    tools = [dict(type='function', function=dict(name='weather', parameters={}))]
    row = data(both(dict(conversations=turns, tools=json.dumps(tools)))).train[0]
    assert row['tools'] == tools and [m['role'] for m in row['messages']] == ['user', 'assistant', 'tool', 'assistant']
    assert row['messages'][1] == dict(role='assistant', content=None, tool_calls=[
        dict(type='function', function=dict(name='weather', arguments=dict(place='Ulm')))])
    turns[1]['value'] = 'weather(Ulm)'
    assert 'message 2 is a function_call, but its value is not JSON' in refused(
        both(dict(conversations=turns)))
    assert "from 'robot'" in refused(both(dict(conversations=[{'from': 'robot', 'value': 'x'}])))

CALL = [dict(type='function', function=dict(name='weather', arguments='{"place": "Ulm"}'))]

def test_tools_and_calls_stay_in_the_row():
    def row(i, said):
        return dict(tools=CALL, messages=[
            dict(role='user', content=f'Weather {i}?'),
            dict(role='assistant', content=said, tool_calls=CALL),
            dict(role='tool', content='sun', tool_call_id='1'), dict(role='assistant', content='Sunny.')])
    for said in ('I look.', None, ''):
        rows = [row(i, said) for i in range(40)]
        d = data(rows)
        assert d.train[0] == rows[0] and d.counts['tools'] == {'rows': 40}
    rows[3]['messages'][1].pop('content')
    assert data(rows).train
    rows[3]['messages'][1]['tool_calls'] = 'weather'
    assert 'train row 4: the tool_calls of message 2' in refused(rows)
    assert 'train row 1: tools is' in refused([dict(row(0, 'x'), tools=['f'])])
    odd = [dict(function=dict(name='f', arguments='\ud83d'))]
    odd = talk('a', 'b')[:1] + [dict(role='assistant', content='', tool_calls=odd)]
    assert 'tool_calls of message 2 has half a surrogate' in refused([dict(messages=odd)])
    assert "the column 'tools'" in refused([dict(r, tools=CALL) for r in QA])
    assert "'function_call'" in refused([dict(messages=talk('a', 'b') + [
        dict(role='assistant', content='x', function_call=dict(name='f'))])])
    assert "with 'time', kept for the template (80)" in data(
        [dict(messages=[dict(m, time=1) for m in talk(f'{i}', 'b')]) for i in range(40)]).note

def test_weights_are_zero_or_one():
    def row(i, w):
        ask, wrong = talk(f'{i}?', 'wrong')
        return dict(messages=[ask, dict(wrong, weight=w), *talk('That is wrong.', str(i))])
    for w, kept in ((0, 0), (1, 1), (0., 0), (1., 1), (False, 0), (True, 1), (numpy.int64(0), 0)):
        d = data([row(i, w) for i in range(40)])
        found = d.train[0]['messages'][1]['weight']
        assert found == kept and type(found) is int
        assert d.counts.get('messages', {}).get('messages with weight 0', 0) == 40*(1 - kept)
    assert 'weight' not in data([row(i, None) for i in range(40)]).train[0]['messages'][1]
    for bad in (.5, 2, -1, '0', 'no', [0]):
        assert 'train row 1: message 2 has the weight' in refused([row(0, bad)])
    silent = [dict(messages=[dict(m, weight=0) for m in talk('a', 'b')])]
    assert 'nothing would be learned' in refused(silent)
    assert "write 'weight': 0" in refused([dict(messages=[dict(m, train=False) for m in talk('a', 'b')])])
    assert "'weight' changes what a row means" in refused([dict(r, weight=.3) for r in QA])

def test_the_prompt_of_trl_has_weight_0():
    d = data([dict(prompt=talk(f'q{i}', 'a') + talk('more', '')[:1], completion=talk('', 'b')[1:])
              for i in range(60)])
    r = next(r for r in d.train if r['messages'][0]['content'] == 'q0')
    assert r == dict(messages=[dict(m, weight=0) for m in talk('q0', 'a') + talk('more', '')[:1]]
                     + talk('', 'b')[1:])

def test_parts_are_text_or_refused():
    part = lambda *texts: [dict(type='text', text=t) for t in texts]
    rows = [dict(messages=[dict(role='user', content=part('one', f'{i}')),
                           dict(role='assistant', content=part('b'))])
            for i in range(40)]
    d = data(rows)
    assert {r['messages'][0]['content'] for r in all_rows(d)} == {f'one\n{i}' for i in range(40)}
    assert d.counts['messages']['messages whose parts were joined'] == 80
    for kind in ('image_url', 'image', 'input_audio', 'video', 'file'):
        rows[5]['messages'][0]['content'] = part('see') + [dict(type=kind)]
        assert f"train row 6: message 1 has a part of type '{kind}'" in refused(rows)
    rows[5]['messages'][0]['content'] = part('')
    assert 'a part of message 1 is empty' in refused(rows)

# ---- good and bad answers
KTO = [dict(prompt=f'Is {i} even?', completion='yes' if (i % 2 == 0) == good else 'no', label=good)
       for i in range(60) for good in (True, False)]

@pytest.mark.parametrize('true, false', [(True, False), (1, 0), (1., 0.), ('true', 'false'), ('True', 'False')])
def test_unwanted_answers_are_never_learned_silently(true, false):
    rows = [dict(r, label=true if r['label'] else false) for r in KTO]
    says = refused(rows)
    assert "wanted='only'" in says and "carry=['label']" in says and 'KTO' in says
    d = data(rows, wanted='only')
    assert sorted(r['prompt'] for r in all_rows(d)) == sorted({r['prompt'] for r in KTO})
    assert all(r['response'] == ('yes' if int(r['prompt'].split()[1]) % 2 == 0 else 'no')
               for r in all_rows(d))
    assert d.counts['unwanted, left out'] == {'rows': 60} and 'labelled false and left out: rows (60)' in d.note
    assert all('label' not in r for r in all_rows(d))
    d = data(rows, carry='label')
    false_rows = sum(d.counts[f'unwanted_{s}'] for s in ('validation', 'test'))
    assert false_rows > 0 and len(all_rows(d)) == 120 - false_rows
    assert sum(r['label'] == false for r in d.train) == 60 - false_rows

def test_only_wanted_answers_are_asked_for_at_test():
    some, rest = KTO[:80], [dict(prompt=r['prompt'], completion=r['completion']) for r in KTO[100:]]
    d = data(some, validation=KTO[80:100], test=rest, carry='label')
    assert [r['label'] for r in d.validation] == [True]*10
    assert len(d.test) == 20 and len(d.train) == 80
    assert '10 of 20 validation rows are left out: their label is false' in d.note
    kinds = data([dict(r, label='ab'[i % 2]) for i, r in enumerate(KTO)], carry='label')
    assert len(all_rows(kinds)) == 120
    one = data([dict(r, label=True) for r in KTO], carry='label')
    assert 'label is true in all training rows; kto needs both kinds' in one.note

def test_wanted_is_checked():
    liked = [dict(prompt=r['prompt'], response=r['completion'], liked=r['label']) for r in KTO]
    assert len(all_rows(data(liked, wanted='only', columns=dict(label='liked')))) == 60
    says = refused([dict(r, label='easy') for r in QA])
    assert "'label' changes what a row means" in says and 'columns=' not in says
    assert 'no label that is true or false' in refused(QA, wanted='only')
    assert 'wanted is' in refused(KTO, wanted='all')
    assert 'leaves nothing' in refused([dict(r, label=False) for r in QA], wanted='only')
    chats = [dict(r, prompt=talk(r['prompt'], '')[:1], completion=talk('', r['completion'])[1:])
             for r in KTO]
    assert data(chats, wanted='only').kind == 'chat'

# ---- pairs of conversations
def test_pairs_of_one_question_are_text():
    want = data([dict(prompt=f'q{i}', chosen='good', rejected='bad')
                 for i in range(60)]).fingerprint
    whole = [dict(chosen=talk(f'q{i}', 'good'), rejected=talk(f'q{i}', 'bad')) for i in range(60)]
    asked = [dict(r, prompt=r['chosen'][0]['content']) for r in whole]
    apart = [dict(prompt=r['chosen'][:1], chosen=r['chosen'][1:], rejected=r['rejected'][1:])
             for r in whole]
    answers = [dict(prompt=a['prompt'], chosen=r['chosen'], rejected=r['rejected'])
               for a, r in zip(asked, apart)]
    for rows in (whole, asked, apart, answers):
        assert data(rows).fingerprint == want
    named = [dict(better=r['chosen'], worse=r['rejected']) for r in whole]
    assert data(named, columns=dict(chosen='better', rejected='worse')).fingerprint == want

def test_longer_pairs_are_conversations():
    shared = talk('hi', 'hello')
    rows = [dict(chosen=shared + talk(f'q{i}', 'good'), rejected=shared + talk(f'q{i}', 'bad'))
            for i in range(60)]
    rows[7] = dict(chosen=talk('q7', 'good'), rejected=talk('q7', 'bad'))
    d = data(rows)
    before = [dict(m, weight=0) for m in shared + talk('q0', '')[:1]]
    r = next(r for r in all_rows(d) if r['messages'][-2]['content'] == 'q0')
    assert (d.kind == 'chat' and r == dict(messages=before + talk('', 'good')[1:],
                                           rejected=before + talk('', 'bad')[1:]))
    assert all(isinstance(r['rejected'], list) for r in all_rows(d)) and 'bad' in repr(d)
    assert 'do not begin with the same message' in refused(
        [dict(chosen=talk('a', 'b'), rejected=talk('c', 'd'))])
    assert 'prompt is not among' in refused([dict(prompt='x', chosen=talk('a', 'b'), rejected=talk('a', 'd'))])
    assert 'same, which teaches no preference' in data([dict(r, rejected=r['chosen'])
                                                        for r in rows]).note
    hh = [dict(chosen=f'Human: {i} Assistant: yes', rejected=f'Human: {i} Assistant: no')
          for i in range(60)]
    assert 'move that beginning to a column of its own' in refused(hh)

# ---- files
TEXTS = ['plain', 'a, "quoted" b', 'two\nlines', 'semi; colon', 'tab\there',
         'Ünï \u2028 \U0001f600', ' spaces ', "it's", '|bar|']

def files(folder, rows, r):
    "The same rows in every shape of a file"
    frame = pandas.DataFrame(rows)
    put = {'list.json': json.dumps(rows), 'list.jsonl': json.dumps(rows),
           'pretty.json': json.dumps(rows, indent=2),
           'pretty.jsonl': '\n ' + json.dumps(rows, indent=1),
           'lines.jsonl': '\n'.join(map(json.dumps, rows)),
           'crlf.jsonl': '\r\n'.join(json.dumps(x, ensure_ascii=False) for x in rows) + '\r\n\r\n',
           'comma.csv': frame.to_csv(index=False), 'semicolon.csv': frame.to_csv(index=False, sep=';'),
           'bar.csv': frame.to_csv(index=False, sep='|'), 'tab.csv': frame.to_csv(index=False, sep='\t'),
           'tab.tsv': frame.to_csv(index=False, sep='\t'), 'end.csv': frame.to_csv(index=False) + '\n\n'}
    for name, text in put.items():
        for code in ('utf-8', 'utf-8-sig', 'utf-16', 'utf-16-be with mark'):
            path = folder/f'{code[:9]}-{name}'
            mark = '\ufeff' if 'mark' in code else ''
            path.write_bytes((mark + text).encode(code.split()[0]))
            yield path
    frame.to_parquet(folder/'table.parquet')
    yield folder/'table.parquet'
    yield datasets.Dataset.from_list(rows)
    yield [str(lines(folder/'one.jsonl', rows[:20])), lines(folder/'two.jsonl', rows[20:])]

@pytest.mark.parametrize('kind', ['text', 'pairs', 'label', 'lm', 'alpaca', 'kto'])
def test_every_shape_of_a_file_gives_the_same_rows(kind, tmp_path):
    r = random.Random(kind)
    word = lambda: ' '.join(r.choice(TEXTS) for _ in range(r.randint(1, 4)))
    columns = dict(text=('prompt', 'response', 'id'), pairs=('prompt', 'chosen', 'rejected'),
                   label=('text', 'label'),
                   lm=('text', 'url'), alpaca=('instruction', 'input', 'output'), kto=('prompt', 'completion', 'label'))
    def cell(c, i):
        return ((('yes', 'no')[i % 2] if kind == 'label' else ('true', 'false')[i % 2])
                if c == 'label' else f'{word()} {i}')
    rows = [{c: cell(c, i) for c in columns[kind]} for i in range(60)]
    options = dict(wanted='only') if kind == 'kto' else {}
    want = data(rows, **options)
    for source in files(tmp_path, rows, r):
        got = data(source, **options)
        assert got.fingerprint == want.fingerprint, source
        assert {k: v for k, v in got.counts.items() if k not in ('rows', 'formats')} == {
            k: v for k, v in want.counts.items() if k not in ('rows', 'formats')}

@pytest.mark.parametrize('name, text, says', [
    ('d.jsonl', '[{"prompt": "a",\n "response": }]', ['d.jsonl, line 2', 'not JSON']),
    ('d.jsonl', '["a", "b"]\n["c", "d"]\n', ['d.jsonl, line 2', 'one object a line begins with {']),
    ('d.jsonl', '[[1], [2]]', ['d.jsonl, item 1 is of type list', 'named columns']),
    ('d.json', '{"data": [{"prompt": "a"}], "n": 3}', ["seem to be under 'data'", 'write that list alone']),
    ('d.json', '{"prompt": ["a"], "response": ["b"]}', ['by columns', 'orient="records"']),
    ('d.json', '{"text": {"0": "a"}, "label": {"0": "b"}}', ['by columns', 'orient="records"']),
    ('d.csv', 'prompt,response\n"[{\'role\': \'user\', \'content\': \'a\'}]",b\n',
     ['line 2', 'prompt is a list of messages written as text', 'JSON lines']),
    ('d.csv', 'messages\n"[{\'role\': \'user\'}]"\n', ['line 2', 'messages is', 'as JSON']),
    ('d.jsonl', '{\n "prompt": "a"\n}\n', ['line 1 is not JSON', 'one whole object']),
    ('d.csv', 'prompt;response\na;b\nc\n', ['d.csv, line 3', '1 cells', 'a semicolon']),
    ('d.tsv', 'prompt\tresponse\na\tb\tc\n', ['d.tsv, line 2', '3 cells', 'a tab']),
    ('d.tsv', 'prompt\tresponse\n"a\tb\n', ['d.tsv, line 2', 'double quote']),
    ('d.csv', 'prompt;response\na;\n', ['d.csv, line 2', 'response is empty']),
    ('d.jsonl', '{"prompt": "a", "response": ["b"]}', ['line 1', 'must be text']),
    ('d.jsonl', '{"prompt": [{"role": "user", "content": "a"}], "response": "b"}',
     ['line 1', 'response is', 'list of']),
    ('d.jsonl', '{"text": "a", "label": 1.0}', ['line 1', 'label is 1.0', 'such as 1']),
    ('d.jsonl', '{"text": "a", "label": ["x", "y"]}', ['line 1', "label is ['x', 'y']"]),
    ('d.jsonl', '{"text": "a", "labels": [1, 0]}', ['line 1', "'labels'", "columns={'label': 'labels'}"]),
    ('d.jsonl', '{"instruction": "a", "input": 7, "output": "b"}', ['line 1', 'input is 7, of type int']),
    ('d.jsonl', '{"instruction": "", "input": "", "output": "b"}', ['line 1', 'prompt is empty']),
    ('d.jsonl', '{"instruction": "a", "output": null}', ['line 1', 'response has no value']),
    ('d.jsonl', '{"conversations": []}', ['line 1', 'messages is', 'list of']),
    ('d.jsonl', '{"conversations": "[{]"}', ['line 1', 'messages is', 'list of']),
    ('d.jsonl', '{"conversations": [{"from": "gpt", "value": ""}]}', ['line 1', 'value of message 1 is empty']),
    ('d.jsonl', '{"conversations": [{"from": "human", "value": "a"}]}', ['line 1', 'message 1', 'assistant']),
    ('d.jsonl', '{"messages": [{"role": "assistant", "content": null}]}',
     ['line 1', 'content of message 1 has no value']),
    ('d.jsonl', '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, '
                '{"role": "user", "content": "c"}]}', ['line 1', "from 'user' (message 3)"]),
    ('d.jsonl', '{"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "b"}], '
                '"system": "y"}', ['line 1', 'system column and a system message']),
    ('d.jsonl', '{"messages": [{"role": "user", "content": "a", "images": ["x.png"]}, {"role": "assistant", '
                '"content": "b"}]}', ['line 1', "message 1 has 'images'", 'only text']),
    ('d.jsonl', '{"prompt": "a", "response": "b", "images": ["x.png"]}', ['line 1', "'images'", 'carry=']),
    ('d.jsonl', '{"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]}',
     ['line 1', 'rejected is a list of messages', 'as text']),
    ('d.jsonl', '{"chosen": [{"role": "user", "content": "a"}], "rejected": []}', ['line 1', 'rejected is', 'list of']),
    ('d.csv', 'a;b\nc;d\n', ['d.csv has the columns a, b', "no 'prompt'"]),
    ('d.txt', 'hello', ["'.txt'", '.tsv'])])
def test_what_cannot_be_read_is_named_with_a_fix(tmp_path, monkeypatch, name, text, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path/name).write_text(text)
    message = refused(name)
    for s in says:
        assert s in message, message

def test_half_an_emoji_is_named_wherever_it_is(tmp_path):
    odd = 'fine \ud83d'
    said = dict(role='assistant', content='b', thinking=odd)
    for row, where in ((dict(prompt='a', response=odd), 'response'),
                       (dict(prompt=odd, response='a'), 'prompt'),
                       (dict(instruction='a', input=odd, output='b'), 'input'), (dict(text=odd), 'text'),
                       (dict(text='a', label=odd), 'label'), (dict(messages=talk('a', odd)), 'content of message 2'),
                       (dict(conversations=share(odd, 'b')), 'value of message 1'),
                       (dict(messages=talk('a', 'b'), tools=[dict(name=odd)]), 'tools'),
                       (dict(messages=[*talk('a', 'b')[:1], said]), 'thinking'),
                       (dict(prompt='a', chosen='b', rejected=odd), 'rejected'),
                       (dict(prompt='a', response='b', system=odd), 'system')):
        good = json.loads(json.dumps(row).replace('\\ud83d', 'x'))
        for source in ([good]*40 + [row], lines(tmp_path/'d.jsonl', [good]*40 + [row])):
            says = refused(source)
            assert 'half a surrogate pair (U+D83D)' in says and where in says, says
            assert 'row 41' in says or 'line 41' in says

def test_messages_in_parquet_and_arrays(tmp_path):
    rows = [dict(messages=[dict(m, weight=None, tool_calls=None) for m in talk(f'q{i}', 'yo')])
            for i in range(40)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path/'m.parquet')
    frame = pandas.read_parquet(tmp_path/'m.parquet').to_dict('records') # lists come back as arrays
    for source in (tmp_path/'m.parquet', frame):
        d = data(source)
        assert d.kind == 'chat' and 'weight' not in d.train[0]['messages'][0]

def test_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    lines(tmp_path/'d.jsonl', QA)
    assert data('~/d.jsonl').fingerprint == data(QA).fingerprint

# ---- rows as wrong as they come
ODD = ('x', '', ' ', None, float('nan'), 1, 0, 2.5, True, b'x', numpy.int64(3), numpy.bool_(True),
       numpy.array([1, 2]),
       numpy.array([]), pandas.NA, pandas.NaT, pandas.Timestamp('2020'), {}, [], (), set(),
       dict(a=1), ['a'], [['a', 'b']],
       [None], '\ud800', '[{', '[]', '{}', complex(1, 2))
NAMES = [*MEANT, *ROWS['pairs'], *ROWS['chat'], *ROWS['label'], 'completion', 'conversations', 'instruction',
         'output', 'skill', 'level', 'id']
KEYS = ('role', 'content', 'from', 'value', 'weight', 'tool_calls', 'name', 'thinking', 'function_call', 'train')
ROLE = ('user', 'assistant', 'system', 'tool', 'human', 'gpt', 'function_call')

def odd_message(r):
    keys = [k for k in KEYS if r.random() < (.9 if k in ('role', 'content') else .07)]
    some = lambda k: (r.choice(ROLE) if k in ('role', 'from') else 'said' if r.random() < .7
                      else r.choice(ODD))
    return {k: some(k) for k in keys}

def odd_value(r, column):
    if column in ('messages', 'conversations', 'prompt', 'response', 'chosen',
                  'rejected') and r.random() < .5:
        return [odd_message(r) for _ in range(r.randint(0, 4))]
    return f'words {r.randint(0, 9)}' if r.random() < .7 else r.choice(ODD)

OPTIONS = ({}, {}, dict(carry='label'), dict(wanted='only'), dict(labels=['a', 'b']), dict(n=2),
           dict(columns=dict(prompt=['instruction', 'input'])), dict(columns=dict(text='prompt')))

@pytest.mark.parametrize('seed', range(8))
def test_any_row_is_read_or_refused_with_its_place(seed):
    r, read = random.Random(seed), 0
    forms = [*ROWS.values(), dict(conversations=0), dict(instruction=0, input=0, output=0),
             dict(chosen=0, rejected=0)]
    for _ in range(150):
        names = [*r.choice(forms), *r.sample(sorted(NAMES), r.choice((0, 0, 1, 2)))]
        rows = [{c: odd_value(r, c) for c in names if r.random() < .97}
                for _ in range(r.randint(1, 3))]
        try:
            d = data(both(rows[0]) | dict(train=rows), **r.choice(OPTIONS))
        except ValueError as e:
            assert type(e) is ValueError and 'ambiguous' not in str(e), str(e)
            assert any(w in str(e) for w in ('row', 'columns', 'label', 'wanted', 'carry')), str(e)
        else:
            read += 1
            assert repr(d) and d._repr_html_() and json.dumps(d.counts) and len(d.validation) == 1
    assert read

# ---- folders, splits, streams, the hub
def test_folder_names(tmp_path):
    for i, name in enumerate(('eval', 'evaluation', 'valid', 'val', 'dev', 'validation', 'Eval',
                              'validation-00000-of-00001')):
        folder = tmp_path/str(i)
        folder.mkdir()
        lines(folder/'train.jsonl', QA[:40])
        lines(folder/f'{name}.jsonl', QA[40:50])
        lines(folder/'extra.jsonl', QA)
        d = data(folder)
        assert (d.validation == QA[40:50] and 'files of' in d.note
                and d.counts['files_not_read'] == ['extra.jsonl'])
    lines(folder/'dev.jsonl', QA)
    assert 'two files for validation' in refused(folder)

def test_shards_are_one_split(tmp_path):
    for i in range(3):
        pandas.DataFrame(QA[i*20:i*20 + 20]).to_parquet(tmp_path/f'train-{i:05}-of-00003.parquet')
    d = data(tmp_path)
    assert d.fingerprint == data(QA).fingerprint and len(d.counts['rows']) == 3
    lines(tmp_path/'train.jsonl', QA)
    assert 'two files for train' in refused(tmp_path)

def test_several_files(tmp_path):
    a, b = lines(tmp_path/'a.jsonl', QA[:30]), lines(tmp_path/'b.jsonl', ALPACA)
    d = data([a, str(b)])
    assert len(all_rows(d)) == 70 and d.counts['rows'] == {str(a): 30, str(b): 40}
    assert f'{b} is read as Alpaca' in d.note
    lines(tmp_path/'c.jsonl', [dict(text='x', label='y')])
    assert 'Give all in one form' in refused([a, tmp_path/'c.jsonl'])
    assert 'no file' in refused([a, tmp_path/'none.jsonl'])
    lines(tmp_path/'d.jsonl', QA[:2] + [dict(prompt='x')])
    assert "d.jsonl, line 3 has no 'response'" in refused([a, tmp_path/'d.jsonl'])

def test_dataset_dicts_and_saved_ones(tmp_path):
    rows = datasets.Dataset.from_list(QA)
    both = datasets.DatasetDict(train=rows, eval=rows.select(range(5)), unsupervised=rows)
    d = data(both)
    assert d.validation == QA[:5] and d.counts['splits_not_read'] == ['unsupervised'] and 'unsupervised' in d.note
    both.save_to_disk(tmp_path/'saved')
    assert data(tmp_path/'saved').fingerprint == d.fingerprint
    rows.save_to_disk(tmp_path/'alone')
    assert data(tmp_path/'alone').fingerprint == data(QA).fingerprint
    assert "source['train_sft']" in refused(datasets.DatasetDict(train_sft=rows))
    assert 'keys' in refused(dict(train=QA, tset=QA))

def test_streams_need_a_number_of_rows():
    many = [dict(prompt=f'question {i}', response='a') for i in range(3000)]
    stream = datasets.Dataset.from_list(many).to_iterable_dataset()
    assert 'n=1000' in refused(stream)
    d = data(stream, n=100)
    assert len(d.train) == 100 and d.validation and d.test and 'rows of the stream' in d.note
    d = data(dict(train=stream, validation=many[:5], test=many[5:9]), n=100)
    assert (len(d.train) == 100
            and {r['prompt'] for r in d.train} == {f'question {i}' for i in range(100)})
    endless = datasets.IterableDataset.from_generator(lambda: (dict(prompt=f'{i}', response='a')
                                                               for i in itertools.count()))
    assert len(data(endless, n=50).train) == 50
    short = datasets.Dataset.from_list(many[:30]).to_iterable_dataset()
    assert 'only' in data(short, n=100).note

def test_the_hub_is_asked_only_for_what_can_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    def load_dataset(*args):
        asked.append(args)
        if args[0] == 'nobody/none':
            raise ConnectionError('no network\nmore')
        rows = datasets.Dataset.from_list(QA)
        return datasets.DatasetDict(train=rows, test=rows.select(range(4)))
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    d = data('owner/name')
    assert d.test == QA[:4] and d.name == 'owner/name' and data('owner/name:main').test == QA[:4]
    assert data(QA, test='owner/name').test == QA[:4]
    assert asked == [('owner/name',), ('owner/name', 'main'), ('owner/name',)]
    says = refused('nobody/none')
    assert 'there is no file nobody/none' in says and 'ConnectionError: no network' in says and 'more' not in says
    assert 'none called validation' in refused(QA, validation='owner/name')
    (tmp_path/'here').mkdir()
    for path in ('here/name', 'owner/name.jsonl', 'a/b/c', '/owner/name', './name', '../name',
                 '~/name', 'C:\\a\\b', 'name'):
        assert not on_hub(path)
    assert 'no file here/name' in refused('here/name')

# ---- labels
LABELS = [dict(text=f't{i}', label=('neg', 'pos')[i % 2]) for i in range(60)]

def sign(d, r):
    return d.labels[r['label']] == ('neg', 'pos')[int(r['text'][1:]) % 2]

def test_labels_in_the_order_that_is_given():
    numbers = [dict(text=f't{i}', label=i % 2) for i in range(60)]
    for rows in (LABELS, numbers, [dict(r, label=str(r['label'])) for r in numbers],
                 [dict(r, label=numpy.int64(r['label'])) for r in numbers]):
        for labels in (['neg', 'pos'], ['pos', 'neg'], ['x', 'pos', 'neg']):
            if rows is not LABELS and labels != ['neg', 'pos']:
                continue
            d = data(rows, labels=labels)
            assert d.labels == labels and all(sign(d, r) for r in all_rows(d))
    stars = [dict(text=f't{i}', label=i % 5 + 1) for i in range(60)]
    d = data(stars, labels=['5', '4', '3', '2', '1'])
    assert all(d.labels[r['label']] == str(int(r['text'][1:]) % 5 + 1) for r in d.train)

def test_labels_outside_the_given_ones_are_refused():
    for bad, near in (('Pos', "did you mean 'pos'"), (' pos', "did you mean 'pos'"),
                      ('other', "they are 'neg', 'pos'"), (7, "'7'")):
        says = refused(LABELS + [dict(text='x', label=bad)], labels=['neg', 'pos'])
        assert 'train row 61' in says and near in says, says
    assert 'label is 2; the list given names the labels 0 to 1' in refused(
        [dict(text=f't{i}', label=i % 3) for i in range(60)], labels=['neg', 'pos'])
    assert data(LABELS, test=[dict(text='x', label='odd')], labels=['neg', 'pos', 'odd']).test[0]['label'] == 2
    assert 'labels were given, which need rows with text' in refused(QA, labels=['a'])
    for wrong in ([], ['a', 'a'], 'neg'):
        assert 'labels is' in refused(LABELS, labels=wrong)

def test_each_split_s_class_labels_are_its_own():
    def of(names, rows):
        features = datasets.Features(text=datasets.Value('string'),
                                     label=datasets.ClassLabel(names=names))
        return datasets.Dataset.from_list([dict(r, label=names.index(r['label'])) for r in rows],
                                          features=features)
    orders = ['neg', 'pos'], ['pos', 'neg'], ['x', 'neg', 'pos']
    for first, second in itertools.permutations(orders, 2):
        d = data(datasets.DatasetDict(train=of(first, LABELS), test=of(second, LABELS[:20])))
        assert d.labels == first and len(d.test) == 20 and all(sign(d, r) for r in all_rows(d))
        d = data(of(first, LABELS), test=LABELS[:20], labels=second)
        assert d.labels == second and all(sign(d, r) for r in all_rows(d))

def test_labels_that_look_alike_are_said():
    d = data(LABELS + [dict(text=f'u{i}', label=' Pos') for i in range(9)])
    assert d.labels == [' Pos', 'neg', 'pos'] and d.counts['labels_alike'] == 2 and 'only in case, spaces' in d.note

# ---- counts
def test_rows_of_test_from_train_are_counted():
    d = data(QA, test=QA[:30])
    both = sum(r in d.train for r in QA[:30])
    assert d.counts['test_in_train'] == both > 20
    assert f'{both} of 30 test rows have the question' in d.note
    assert 'test_in_train' not in data(QA).counts

def test_counts_are_json_and_enter_no_fingerprint():
    for d in (data(ALPACA), data(KTO, wanted='only'),
              data([dict(conversations=share('a', f'b{i}')) for i in range(40)])):
        assert json.loads(json.dumps(d.counts)) and d.counts['rows']
        again = Data(d.train, d.validation, d.test, d.kind, d.labels)
        assert again.fingerprint == d.fingerprint and again.counts == {}

# ---- a column of one's own called skill
def test_only_the_lab_s_rows_are_the_lab_s():
    lab = ftlab.data('sort', n=5).train
    assert {lab_skill(r) for r in lab} == {'sort'} and {lab_skill(r) for r in data(lab).train} == {'sort'}
    assert 'unread' not in data(dict(train=lab, validation=lab, test=lab)).counts
    for skill in (['Logic', 'Facts'], 'sort', 3, None, dict(a=1), 'my skill'):
        for level in (None, 1, 'sort', [1]):
            row = dict(prompt='Sort 0 3 1: ', response='0 1 3', skill=skill, level=level)
            assert lab_skill(row) is None and judge(row, '0 1 3') == 1 and judge(row, '0 3 1') == 0
    d = data([dict(r, skill=['Logic']) for r in QA])
    assert d.counts['unread'] == {'skill': 60}
    from ftlab.instruments.bench import taught
    from ftlab.lab.models import old_skills
    assert taught(d) is None and old_skills(d)

# ---- mixtures
def test_shares_are_of_rows_and_exact():
    r = random.Random(0)
    for _ in range(200):
        weights = [r.randint(1, 20) for _ in range(r.randint(1, 5))]
        shares, n = [w/sum(weights) for w in weights], r.randint(0, 3000)
        counts = row_counts(shares, n)
        assert sum(counts) == n and all(abs(c - s*n) < 1 + 1e-6 for c, s in zip(counts, shares))

def part(name, n=200):
    rows = [dict(prompt=f'{name} {i}', response=name) for i in range(n)]
    return data(dict(train=rows, validation=rows[:0] or [dict(prompt=f'{name} v', response=name)],
                     test=[dict(prompt=f'{name} t', response=name)]))

def taken(d):
    return {k: sum(r['response'] == k for r in d.train) for k in {r['response'] for r in d.train}}

def test_mix_takes_what_it_says(tmp_path):
    new, old = part('new'), part('old', 40)
    d = mix({'new': (new, .9), 'old': (old, .1)})
    assert taken(d) == {'new': 200, 'old': 22} == d.counts['mixed'] and d.test == new.test
    assert ('training rows: 200 of 200 from new, 22 of 40 from old' in d.note
            and 'those of new' in d.note)
    assert d.counts['evaluation_rows_left_out'] == {'old': 2}
    assert len({r['prompt'] for r in d.train}) == 222 # none is taken twice
    a, b, c = (mix([(new, .5), (old, .5)], n=60, seed=s) for s in (1, 1, 2))
    assert a.train == b.train != c.train and taken(a) == {'new': 30, 'old': 30}
    assert mix({'new': (new, .9), 'old': (old, .1)}, evaluate='old').test == old.test
    one, two = lines(tmp_path/'new.jsonl', QA), lines(tmp_path/'old.jsonl', ALPACA)
    d = ftlab.mix({one: .75, str(two): .25}, n=20)
    assert (list(d.counts['mixed'].values()) == [15, 5] and 'read as Alpaca' in d.note
            and d.name.startswith('75% new.jsonl'))
    assert mix({'new-language': .9, 'sort': .1}, n=100).counts['mixed'] == {'new-language': 90, 'sort': 10}

@pytest.mark.parametrize('sources, options, says', [
    ({'a': (part('a'), .9), 'b': (part('b'), .2)}, {}, 'their sum 1'),
    ({'a': (part('a'), 1.5), 'b': (part('b'), -.5)}, {}, 'above 0'),
    ({'a': (part('a'), '.5'), 'b': (part('b'), .5)}, {}, 'above 0'),
    ({'a': (part('a'), float('nan')), 'b': (part('b'), .5)}, {}, 'above 0'),
    ({}, {}, 'needs shares'), ([part('a')], {}, 'needs shares'),
    ({'a': (part('a'), .5), 'b': (part('b', 10), .5)}, dict(n=100),
     'b has 10 training rows, but its share of n=100 is 50; with n=20'),
    ({'a': (part('a'), .99), 'b': (part('b'), .01)}, dict(n=10), '100 or more'),
    ({'a': (part('a'), .5), 'b': (part('b'), .5)}, dict(n=0), 'n is 0'),
    ({'a': (part('a'), .5), 'b': (part('b'), .5)}, dict(evaluate='c'), "evaluate is 'c'"),
    ({'a': (part('a'), .5), 'b': (LABELS, .5)}, {}, "kind 'label'"),
    ({'a': (LABELS, .5), 'b': ([dict(r, label='other') for r in LABELS], .5)}, {}, 'different labels'),
    ({'none.jsonl': .5, 'sort': .5}, {}, 'no file none.jsonl')])
def test_wrong_mixtures_are_refused(sources, options, says):
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        mix(sources, **options)
    assert says in str(e.value)

def test_mixed_labels_are_numbered_alike():
    other = data(LABELS, labels=['pos', 'neg'])
    d = mix({'a': (LABELS, .5), 'b': (other, .5)})
    assert d.labels == ['neg', 'pos'] and all(sign(d, r) for r in all_rows(d))

def test_a_leak_between_sources_is_said():
    d = mix({'a': (data(dict(train=QA[:30], validation=QA[50:], test=QA[40:50])), .5),
             'b': (data(dict(
        train=QA[30:60], validation=QA[:2], test=QA[:2])), .5)})
    assert d.counts['test_in_train'] == 10 and '10 of 10 test rows' in d.note

# ---- on the command line, and in methods that compare answers
def test_the_shell_says_the_same_in_its_own_words():
    from argparse import Namespace
    from ftlab.commands.given import columns_of
    from ftlab.commands.words import with_options
    names = {'columns', 'carry', 'wanted', 'empty'}
    says = with_options(refused(ALPACA,
                                columns=dict(prompt='instruction', response='output')), names)
    typed = 'prompt=instruction+input,response=output'
    assert f'--columns {typed};' in says and says.endswith('--carry input')
    columns = columns_of(Namespace(columns=typed))
    assert columns == dict(prompt=['instruction', 'input'], response='output')
    assert data(ALPACA, columns=columns).fingerprint == data(ALPACA).fingerprint
    says = with_options(refused(KTO), names)
    assert '--wanted only' in says and '--carry label' in says

def test_pairs_of_conversations_are_compared():
    from types import SimpleNamespace
    from test_data import CHATML, learnt, letters
    from ftlab.trainers.preferences import Pairs
    told = [dict(role='system', content='s')]
    d = data([dict(chosen=told + talk(f'q{i}', 'good'), rejected=told + talk(f'q{i}', 'bad'))
              for i in range(60)])
    state = SimpleNamespace(data=d, settings=dict(batch_size=2, accumulate=1), tok=letters(CHATML),
                            limit=None)
    pairs = Pairs(state).pairs
    assert len(pairs) == len(d.train)
    for pair in pairs:
        assert [learnt(state.tok, p) for p in pair] == ['good</s>\n', 'bad</s>\n']
    state.data = data([dict(messages=talk(f'q{i}', 'a')) for i in range(60)])
    with pytest.raises(ValueError, match='no conversation in the column'):
        Pairs(state)

# ---- what says nothing, what is empty, and what to write for it
QUIET = dict(deleted=False, exclude=0, skip='false', is_test=False, keep=True,
             is_train=1, weight=1.0,
             split='train', fold='training')

@pytest.mark.parametrize('column', QUIET)
def test_a_column_that_says_nothing_is_carried_along(column):
    rows = [dict(r, **{column: QUIET[column]}) for r in QA]
    assert data(rows).counts['unread'] == {column: len(QA)}
    other = dict(split='test', fold='dev', weight=.5).get(column, not QUIET[column])
    other = True if column == 'skip' else other
    assert f"'{column}' " in refused([*rows[:-1], dict(rows[-1], **{column: other})])

def test_a_split_is_compared_with_the_rows_own():
    train, test = ([dict(r, split=s) for r in QA] for s in ('train', 'test'))
    assert data(train, validation=QA[:2], test=test).counts['unread'] == {'split': 2*len(QA)}
    assert "'split' says" in refused(train, validation=QA[:2], test=train)

def test_a_text_that_stands_in_the_messages_is_no_other_text():
    row = dict(conversations=[{'from': 'human', 'value': 'q '}, {'from': 'gpt', 'value': 'a'}])
    assert data(both(row | dict(instruction='q'))).kind == 'chat'
    assert "'instruction' changes" in refused(both(row | dict(instruction='other')))

def test_all_columns_that_mean_something_are_named_at_once():
    rows = [dict(r) for r in QA]
    rows[1]['weight'], rows[4]['context'], rows[5]['split'] = .5, 'c', 'test'
    says = refused(rows)
    assert "train row 2: the columns 'weight', 'context', 'split' change what" in says
    assert "'context': to join it to the prompt" in says
    assert "'split': write one file for each" in says
    assert "carry=['weight', 'context', 'split']" in says
    assert data(rows, carry=['weight', 'context', 'split']).counts['carried']

def test_empty_rows_are_left_out_and_counted_if_that_is_asked_for():
    lines = [dict(text='' if i % 3 else f'line {i}') for i in range(90)]
    assert "text is empty" in refused(lines) and "pass empty='drop'" in refused(lines)
    d = data(lines, empty='drop')
    assert len(all_rows(d)) == 30 and d.counts['empty'] == {'rows': 60}
    assert 'left out, because a text is empty: rows (60)' in d.note
    for row, none in ((ALPACA[0], dict(output='')),
                      (dict(conversations=talk('a', 'b')), dict(conversations=[])),
                      (dict(prompt='a', chosen='b', rejected='c'), dict(rejected=None))):
        rows = [dict(row), row | none]
        assert "empty='drop'" in refused(dict(train=rows, validation=rows[:1], test=rows[:1]))
        d = data(dict(train=rows, validation=rows[:1], test=rows[:1]), empty='drop')
        assert len(d.train) == 1 and d.counts['empty'] == {'rows': 1}
    assert 'all are empty' in refused(lines[1:3], empty='drop')
    assert "must be 'drop'" in refused(lines, empty='keep')

def test_empty_is_kept_in_the_origin(tmp_path):
    from ftlab.core.mix import read_again
    rows = ['{"text": "%s"}\n' % ('' if i % 2 else i) for i in range(60)]
    (tmp_path/'d.jsonl').write_text(''.join(rows))
    d = data(tmp_path/'d.jsonl', empty='drop')
    assert read_again(d.origin).fingerprint == d.fingerprint

def test_a_split_without_labels_names_the_mend():
    rows = [dict(text=f't{i}', label=i % 2) for i in range(40)]
    kind = datasets.ClassLabel(names=['a', 'b'])
    good, none = (datasets.Dataset.from_list(r).cast_column('label', kind)
                  for r in (rows, [dict(r, label=-1) for r in rows]))
    source = datasets.DatasetDict(train=good, test=none)
    assert "data({k: v for k, v in source.items() if k != 'test'})" in refused(source)
    assert data({k: v for k, v in source.items() if k != 'test'}).kind == 'label'

@pytest.mark.parametrize('more', [dict(coarse_label=1, fine_label=2), dict(summary='s'),
                                  dict(answers='a'),
                                  dict(question='q', answer='a'), dict(role='user')])
def test_text_with_its_label_or_answer_is_no_plain_text(more):
    says = refused(both(dict(text='t') | more))
    assert all(repr(c) in says for c in more) and f'carry={[*more]}' in says
    assert data(both(dict(text='t') | more), carry=list(more)).kind == 'lm'

def test_a_class_of_the_source_is_a_label():
    rows = datasets.Dataset.from_list([dict(text=f't{i}', mood=i % 2) for i in range(40)])
    rows = rows.cast_column('mood', datasets.ClassLabel(names=['a', 'b']))
    assert "pass columns={'label': 'mood'}" in refused(rows)
    assert data(rows, columns={'label': 'mood'}).labels == ['a', 'b']

HINTED = dict(
    lmsys=dict(conversation=talk('a', 'b'), model='m'),
    xsum=dict(document='d', summary='s', id='1'),
    cnn=dict(article='d', highlights='s'), samsum=dict(dialogue='d', summary='s'), aya=dict(inputs='a', targets='b'),
    mrpc=dict(sentence1='a', sentence2='b', label=1),
    nli=dict(premise='a', hypothesis='b', label=1),
    sms=dict(sms='a', label=1), orca=dict(system='s', question='q', chosen='a', rejected='b'),
    argilla=dict(system='s', input='q', chosen='a', rejected='b'),
    boolq=dict(question='q', answer=True),
    math=dict(instruction='q', chosen_response='a', rejected_response='b'))

@pytest.mark.parametrize('name', HINTED)
def test_the_suggested_columns_work(name):
    row = HINTED[name]
    says = refused(both(row))
    columns = says.split('pass columns=')[1].split('. Rows need')[0]
    d = data(both(row), columns=ast.literal_eval(columns))
    assert d.kind == dict(mrpc='label', nli='label', sms='label', boolq='label').get(
        name, 'chat' if 'system' in row or name == 'lmsys' else 'text')
    assert ('rejected' in d.train[0]) == (name in ('orca', 'argilla', 'math'))

def test_what_cannot_be_read_gets_no_suggestion():
    assert 'pass columns' not in refused(both(dict(chosen='q a', rejected='q b')))
    assert 'move that beginning' in refused(both(dict(chosen='q a', rejected='q b')))
    assert "'response'" not in refused(both(dict(question='q', answer=0))).split('. Rows need')[0]
