"Reading, splitting, encoding and batching: what the notebook does not say about itself"
import json
import datasets, pandas, pytest, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from ftlab.core.batches import batch_at, collate, indices, order
from ftlab.core.data import Data, data
from ftlab.core.tokens import encode, encode_all, encode_each, pieces_of, prompt_ids
from ftlab.lab.models import lab_tokenizer
from ftlab.lab.world import LabWorld, split_of

QA = [dict(prompt=f'question {i}', response=f'answer {i}') for i in range(300)]

@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def put(name, text):
        (tmp_path/name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path/name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return put

def lines(rows):
    return ''.join(json.dumps(r) + '\n' for r in rows)

# ---- wrong input: (file name, content, what the message must say)
GOOD = '{"prompt": "a", "response": "b"}\n'
WRONG = {
    'missing column': (
        'd.jsonl', '{"prompt": "a", "answer": "b"}\n',
        ["d.jsonl", "prompt, answer", "no 'response'", "columns={'response': 'answer'}"]),
    'missing column, misspelt': ('d.jsonl', '{"prompt": "a", "respnse": "b"}\n', ["columns={'response': 'respnse'}"]),
    'missing in a later row': ('d.jsonl', GOOD + '{"prompt": "c"}\n', ['d.jsonl, line 2', "no 'response'"]),
    'empty object': ('d.jsonl', GOOD + '{}\n', ['line 2', 'no columns']),
    'empty line': ('d.jsonl', GOOD + '\n' + GOOD, ['d.jsonl, line 2', 'is empty']),
    'empty prompt': ('d.jsonl', GOOD + '{"prompt": " ", "response": "b"}\n', ['d.jsonl, line 2', 'prompt is empty']),
    'empty response': ('d.jsonl', GOOD*2 + '{"prompt": "b", "response": ""}\n',
                       ['d.jsonl, line 3', 'response is empty']),
    'broken line': ('d.jsonl', GOOD*4 + '{"prompt": "a", \n', ['d.jsonl, line 5', 'not JSON']),
    'not an object': ('d.jsonl', GOOD + '[1, 2]\n', ['d.jsonl, line 2', 'is of type list']),
    'None': ('d.jsonl', GOOD + '{"prompt": "a", "response": null}\n', ['line 2', 'None or NaN']),
    'NaN': ('d.jsonl', GOOD + '{"prompt": "a", "response": NaN}\n', ['line 2', 'None or NaN']),
    'a number': ('d.jsonl', GOOD + '{"prompt": "a", "response": 7}\n', ['line 2', 'is 7, of type int', 'must be text']),
    'no rows': ('d.jsonl', '', ['d.jsonl has no rows']),
    'csv without rows': ('d.csv', 'prompt,response\n', ['d.csv has no rows']),
    'ragged csv': ('d.csv', 'prompt,response\n"a\nb",c\nd,e,f\n', ['d.csv, line 4', '3 cells', 'the header has 2']),
    'short csv row': ('d.csv', 'prompt,response\na,b\nc\n', ['d.csv, line 3', '1 cells']),
    'open quote': ('d.csv', 'prompt,response\na,b\nc,"d\n', ['d.csv, line 3', 'not CSV']),
    'empty csv cell': ('d.csv', 'prompt,response\na,b\nc,\n',
                       ['d.csv, line 3', 'response is empty']),
    'json not a list': ('d.json', '{"prompt": "a"}', ['d.json', 'JSON dict', 'list of objects']),
    'broken json': ('d.json', '[{"prompt": "a",\n"response" "b"}]', ['d.json, line 2']),
    'lines in .json': ('d.json', GOOD*2, ['call it .jsonl']),
    'not parquet': ('d.parquet', 'hello', ['d.parquet is not a parquet file']),
    'unknown extension': ('d.xlsx', 'hello', ["'.xlsx'", '.jsonl', '.parquet']),
    'not UTF-8': ('d.csv', 'prompt,response\ncaf\u00e9,b\n'.encode('latin-1'), ['d.csv', 'UTF-8']),
    'deep nesting': (
        'd.jsonl', GOOD + '{"prompt": "a", "response": "b", "more": ' + '['*5000 + ']'*5000 + '}\n',
        ['d.jsonl, line 2, column 1', 'nested more than 100 deep']),
    'deep nesting that Python reads': (
        'd.jsonl', GOOD + '{"prompt": "a", "response": "b", "more": ' + '['*200 + ']'*200 + '}\n',
        ['d.jsonl, line 2', 'more is nested more than 100 deep']),
    'deep nesting in a list': ('d.json', '[\n' + '{"a":'*5000 + '1' + '}'*5000 + ']',
                               ['d.json, line 2, column 496', 'nested more than 100 deep']),
    'a huge number': ('d.jsonl', GOOD + '{"prompt": "a", "response": "b", "n": ' + '9'*5000 + '}\n',
                      ['d.jsonl, line 2, column 39', 'whole number of more than 4300 digits']),
    'half an emoji': ('d.jsonl', GOOD + '{"prompt": "a", "response": "fine \\ud83d!"}\n',
                      ['d.jsonl, line 2', 'response has half a surrogate pair (U+D83D) at character 6']),
    'half an emoji in a message': (
        'd.jsonl', '{"messages": [{"role": "user", "content": "a\\udc00"}, {"role": "assistant", "content": "b"}]}\n',
        ['d.jsonl, line 1', 'the content of message 1', 'half a surrogate pair (U+DC00) at character 2']),
    'half an emoji as a column': ('d.jsonl', GOOD + '{"prompt": "a", "response": "b", "x\\ud800": 1}\n',
                                  ['d.jsonl, line 2', 'the name of a column has half']),
    'NUL': ('d.csv', 'prompt,response\na,b\nc,d\x00e\n',
            ['d.csv, line 3', 'response has a NUL character at character 2']),
    'NUL in a column name': ('d.csv', 'pro\x00mpt,response\na,b\n',
                             ['d.csv, line 2', 'the name of a column has a NUL character']),
    'two files glued together': ('d.jsonl', GOOD + '\ufeff' + GOOD,
                                 ['d.jsonl, line 2', 'column 1', 'there is a byte order mark']),
    'a byte order mark in text': ('d.csv', 'prompt,response\na,b\n\ufeffc,d\n',
                                  ['d.csv, line 3', 'prompt has a byte order mark (U+FEFF) at character 1']),
    'a key twice': ('d.jsonl', GOOD + '{"prompt": "a", "response": "b", "response": "c"}\n',
                    ['d.jsonl, line 2, column 34', "the key 'response' appears twice"]),
    'a key twice in a list': ('d.json', '[{"prompt": "a", "response": "b"},\n{"prompt": "a", "label": 1, "label": 2}]',
                              ['d.json, line 2, column 29', "the key 'label' appears twice"]),
    'bytes that are no UTF-8': ('d.jsonl',
                                GOOD.encode()*2 + b'{"prompt": "a\xff", "response": "b"}',
                                ['d.jsonl, line 3', 'byte 14 of the line', 'UTF-8']),
    'last turn from user': ('d.jsonl', '{"messages": [{"role": "user", "content": "a"}]}\n',
                            ['d.jsonl, line 1', "from 'user'", 'assistant']),
    'empty message': ('d.jsonl',
                      '{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]}\n',
                      ['line 1', 'content of message 1', 'empty']),
    'no messages': ('d.jsonl', '{"messages": []}\n', ['line 1', 'messages']),
    'a message without role': ('d.jsonl', '{"messages": [{"from": "human", "value": "a"}]}\n', ['line 1', 'message 1']),
    'label missing': ('d.jsonl', '{"text": "a", "label": null}\n', ['line 1', 'label is None']),
    'label a float': ('d.jsonl', '{"text": "a", "label": 0.5}\n', ['line 1', 'label is 0.5']),}

@pytest.mark.parametrize('name, content, says', WRONG.values(), ids=WRONG.keys())
def test_wrong_files_are_refused_with_place_and_mend(write, name, content, says):
    write(name, content)
    with pytest.raises(ValueError) as e:
        data(name)
    for s in says:
        assert s in str(e.value), str(e.value)

def test_missing_file_offers_the_near_one(write):
    write('trains.jsonl', GOOD)
    with pytest.raises(FileNotFoundError, match="train.jsonl; did you mean 'trains.jsonl'"):
        data('train.jsonl')

def test_unknown_skill_offers_the_near_one(write):
    with pytest.raises(ValueError, match="neither a file nor a lab skill; did you mean 'changed-rule'"):
        data('change-rule')

@pytest.mark.parametrize(
    'kwargs, says',
    [(dict(columns=dict(question='prompt')), 'the keys are the names ftlab uses'),
     (dict(columns=dict(prompt='qestion', response='response')), "no column 'qestion'"),
     (dict(n=0), 'at least 1'),
     (dict(validation=[]), 'validation has no rows')])
def test_wrong_arguments(kwargs, says):
    with pytest.raises(ValueError, match=says):
        data(QA, **kwargs)

def test_other_wrong_sources():
    with pytest.raises(ValueError, match='DataFrame.*to_dict'):
        data(pandas.DataFrame(QA))
    with pytest.raises(ValueError, match='keys are|the keys a'):
        data(dict(a=QA))
    with pytest.raises(ValueError, match='lab skill'):
        data('sort', columns=dict(prompt='x'))
    with pytest.raises(ValueError, match='one form in all rows'):
        data([dict(prompt=[dict(role='user', content='a')],
                   response=[dict(role='assistant', content='b')]),
              dict(prompt='a', response='b')])

def test_label_unseen_in_train_is_refused():
    train = [dict(text=f't{i}', label='ab'[i % 2]) for i in range(40)]
    with pytest.raises(ValueError, match="test row 2: no training row has the label 'c'"):
        data(train, test=[dict(text='x', label='a'), dict(text='y', label='c')])

# ---- kinds and columns
def test_all_sources_give_the_same_data(write, tmp_path):
    write('d.jsonl', lines(QA))
    write('d.json', json.dumps(QA))
    pandas.DataFrame(QA).to_csv('d.csv', index=False)
    pandas.DataFrame(QA).to_parquet('d.parquet')
    trl = [dict(prompt=r['prompt'], completion=r['response']) for r in QA]
    got = [data(s).fingerprint for s in (QA, 'd.jsonl', tmp_path/'d.json', 'd.csv', 'd.parquet',
                                         datasets.Dataset.from_list(QA), trl)]
    assert len(set(got)) == 1
    assert data(QA[:-1] + [dict(QA[-1], response='other')]).fingerprint != got[0]

def test_crlf_bom_quotes_and_line_separators(write):
    write('d.csv', '\ufeffprompt,response\r\n"a, ""b""\r\nc",d\u2028e\r\n')
    d = data('d.csv', validation=[QA[0]], test=[QA[1]])
    assert d.train == [dict(prompt='a, "b"\nc', response='d\u2028e')]

def test_kind_follows_the_columns():
    talk = [dict(role='user', content='a'), dict(role='assistant', content='b')]
    splits = lambda r: dict(train=[r], validation=[r], test=[r])
    kinds = [data(splits(r)).kind for r in (dict(messages=talk, prompt='a', response='b'),
                                            dict(prompt='a', completion='b', text='t'),
                                            dict(text='a', label=1), dict(text='a'))]
    assert kinds == ['chat', 'text', 'label', 'lm']
    assert data(splits(dict(messages=talk, q='a', a='b')),
                columns=dict(prompt='q', response='a')).train == [
        dict(prompt='a', response='b', messages=talk)]

PAIRS = [dict(prompt=r['prompt'], chosen=r['response'], rejected='no ' + r['response']) for r in QA]

def test_pairs_are_text_whose_rejected_answers_ride_along(write):
    d = data(PAIRS)
    assert (d.kind == 'text' and not d.note and d.train[0]
            == dict(QA[QA.index({k: d.train[0][k] for k in ('prompt', 'response')})],
                    rejected='no ' + d.train[0]['response']))
    write('p.jsonl', lines(PAIRS))
    named = [dict(question=r['prompt'], better=r['chosen'], rejected=r['rejected'], judge=1)
             for r in PAIRS]
    assert {data('p.jsonl').fingerprint,
            data(PAIRS, columns=dict(response='chosen')).fingerprint} == {d.fingerprint}
    assert data(named, columns=dict(prompt='question', chosen='better')).train[0] == dict(
        d.train[0], judge=1)
    assert ('no answer' in repr(d) and 'rejected' in d._repr_html_()
            and 'rejected' not in data(QA)._repr_html_())
    both = data([dict(r, response='mine') for r in PAIRS])
    # an answer that is called response is the response
    assert both.train[0].keys() == {'prompt', 'response', 'chosen', 'rejected'}
    assert 'in 2 of 300 rows the chosen and the rejected answer are the same' in data(
        [dict(r, rejected=r['chosen']) if i < 2 else r for i, r in enumerate(PAIRS)]).note

@pytest.mark.parametrize('row, says',
                         [(dict(rejected=''), ['train row 2: rejected is empty']),
                          (dict(rejected=None), ['row 2: rejected has no value']),
                          (dict(rejected=3), ['rejected is 3, of type int; it must be text']),
                          (dict(chosen=' '), ['chosen is empty']),
                          (dict(rejected=[dict(role='assistant', content='b')]),
                           ['rejected is a list', 'give prompt, chosen and rejected as text'])])
def test_broken_pairs_are_refused(row, says):
    with pytest.raises(ValueError) as e:
        data([PAIRS[0], PAIRS[1] | row])
    for s in says:
        assert s in str(e.value)

def test_what_a_pair_lacks_is_named():
    for lacks, says in dict(rejected="no 'response'.*columns={'response': 'chosen'}",
                            # without a rejected answer it may be plain fine-tuning that is meant
                            chosen="no 'chosen'", prompt="no 'prompt'").items():
        with pytest.raises(ValueError, match=says):
            data([{k: v for k, v in PAIRS[0].items() if k != lacks}])
    with pytest.raises(ValueError, match="row 2 has no 'rejected'"):
        data([PAIRS[0], {k: v for k, v in PAIRS[1].items() if k != 'rejected'}])

def test_renaming_replaces_a_column_that_is_in_the_way():
    assert (data(dict(train=[dict(prompt='old', q='new', response='b')]), validation=QA[:1],
                 test=QA[:1], columns=dict(prompt='prompt')).kind == 'text')
    d = data([dict(prompt='old', q=r['prompt'], response=r['response']) for r in QA],
             columns=dict(prompt='q'))
    assert ({tuple(r) for r in d.train} == {('prompt', 'response')}
            and 'old' not in {r['prompt'] for r in d.train})

def test_labels():
    rows = [dict(text=f't{i}', label=i % 12) for i in range(240)]
    d = data(rows)
    assert d.labels == [str(i) for i in range(12)]                        # numbers in the order of numbers
    assert {r['label'] for r in data([dict(r, label=str(r['label'])) for r in rows]).train} == set(
        range(12))
    named = datasets.Dataset.from_list(
        rows, features=datasets.Features(
            text=datasets.Value('string'),
            label=datasets.ClassLabel(names=[f'l{11 - i:02}' for i in range(12)])))
    d = data(named)
    assert d.labels[0] == 'l11' and all(r['label'] == int(r['text'][1:]) % 12 for r in d.train)
    assert rows[5] == dict(text='t5', label=5) # the caller's rows are not touched
    with pytest.raises(ValueError, match='all 1 test rows have the label -1'):
        data(dict(train=named, test=[dict(text='x', label=-1)]))

def test_rare_labels_stay_in_train():
    lost = next(f't{i}' for i in range(100) if split_of(f't{i}') == 'test')
    rows = [dict(text=f'other {i}', label='common') for i in range(100)] + [dict(text=lost, label='rare')]
    d = data(rows)
    assert 'rare' in {d.labels[r['label']] for r in d.train} and 'rare labels' in d.note
    several = data(rows + 2*[dict(text=lost, label='common')])
    assert '3 rows of rare labels' in several.note and several.counts['kept_in_train'] == 3

# ---- splits
def test_hash_split_keeps_questions_apart_and_rows_in_place():
    twice = QA + [dict(r, response='another') for r in QA]
    d = data(twice)
    sides = {s: {r['prompt'] for r in getattr(d, s)} for s in ('train', 'validation', 'test')}
    assert not (sides['train'] & sides['test'] or sides['train'] & sides['validation']
                or sides['test'] & sides['validation'])
    assert sum(map(len, sides.values())) == 300 and min(map(len, sides.values())) > 10
    assert {r['prompt'] for r in data(QA[:150]).test} == sides['test'] & {
        r['prompt'] for r in QA[:150]}

def test_given_splits_are_kept():
    d = data(datasets.DatasetDict(train=datasets.Dataset.from_list(QA),
                                  test=datasets.Dataset.from_list(QA[:7])))
    assert (d.test == QA[:7] and {split_of(r['prompt']) for r in d.validation} == {'validation'}
            and len(d.train) + len(d.validation) == 300)
    assert 'test rows have the question of a training row' in d.note
    d = data(QA, validation=QA[:3], test=QA[3:5])
    assert (len(d.train), len(d.validation), len(d.test)) == (300, 3, 2)

def test_folder(write):
    for f, rows in dict(train=QA[:9], dev=QA[9:12], test=QA[12:14]).items():
        write(f'mine/{f}.jsonl', lines(rows))
    d = data('mine')
    assert (len(d.train), len(d.validation), len(d.test)) == (9, 3, 2)
    write('mine/validation.csv', 'prompt,response\na,b\n')
    with pytest.raises(ValueError, match='two files for validation'):
        data('mine')
    write('empty/readme.txt', 'x')
    with pytest.raises(FileNotFoundError, match='no train.jsonl.*train.tsv or.*readme.txt'):
        data('empty')

def test_n_is_a_seeded_subset():
    a, b, c = data(QA, n=20, seed=1), data(QA, n=20, seed=1), data(QA, n=20, seed=2)
    assert a.train == b.train != c.train and len(a.train) == 20 and a.test == c.test
    assert 'there are' in data(QA, n=5000).note

def test_few_rows_are_reported_not_invented():
    one = next(r for r in QA if split_of(r['prompt']) == 'train')
    d = data([one])
    assert d.train == [one] and d.test == [] and 'no test row' in d.note
    with pytest.raises(ValueError, match='give more rows'):
        data([next(r for r in QA if split_of(r['prompt']) == 'test')])

def test_no_source_is_named():
    with pytest.raises(ValueError, match='source is None; give a path, a list of dicts'):
        data(None)
    with pytest.raises(ValueError, match='the dictionary is empty; its keys must be train'):
        data({})

def test_a_skill_that_is_none_is_named():
    import ftlab
    with pytest.raises(KeyError, match="no skill is called 'srot'; there are: .*did you mean 'sort'"):
        ftlab.skills('lab-s', 1, names=['srot'])
    with pytest.raises(TypeError, match=r"names is 'sort'; give a list .*\['sort'\]"):
        ftlab.skills('lab-s', 1, names='sort')
    with pytest.raises(ValueError, match="n is 'x'; it must be a whole number of at least 1"):
        ftlab.skills('lab-s', 'x')
    with pytest.raises(TypeError, match='model is 42; give a lab model by name'):
        ftlab.skills(42)
    with pytest.raises(AttributeError, match="no attribute 'htf'.*did you mean hft"):
        ftlab.methods.htf

def test_skills():
    d = data('new-facts')
    assert (len(d.validation) == len(d.test) == 400 and 3000 < len(d.train) < 4000
            and 'only' in d.note)
    d = data('sort', n=50, seed=3)
    assert len(d.train) == 50 and d.train != data('sort', n=50).train and d.train[0]['skill'] == 'sort' and not d.note
    assert (not {r['prompt'] for r in d.train} & {r['prompt'] for r in d.test}
            and LabWorld(0).judge(d.test[0], d.test[0]['response']) == 1)

def test_shows_itself():
    d = data([dict(prompt=f'<b>{i}', response='x'*500) for i in range(100)])
    assert ('<b>' not in d._repr_html_() and '&lt;b&gt;' in d._repr_html_()
            and 'x'*121 not in repr(d) and 'rows of kind text' in repr(d))

# ---- encoding
def letters(template=None):
    "A byte-level BPE tokenizer that has one merge, 'ab', and a bos-free vocabulary"
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {'ab': 256}
    t = Tokenizer(models.BPE(vocab, [('a', 'b')]))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.decoder = decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=t, eos_token='<e>')
    tok.chat_template = template
    return tok

def learnt(tok, enc):
    return tok.decode([l for l in enc['labels'] if l != -100])

def test_no_token_crosses_from_prompt_to_response():
    tok, row = letters(), dict(prompt='xa', response='by')
    enc = encode(row, tok, 'text')
    assert tok('xaby').input_ids != enc['input_ids'][:-1]         # the whole would join a and b
    assert (learnt(tok, enc) == 'by<e>' and tok.decode(enc['input_ids']) == 'xaby<e>'
            and enc['input_ids'][:2] == tok('xa').input_ids == prompt_ids(row, tok))
    apart = encode(dict(prompt='x', response='aby'), tok, 'text')
    assert apart['input_ids'][:-1] == tok('xaby').input_ids       # and where nothing is joined, the whole it is

CHATML = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n"
          "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
# as Qwen3 does: only the last assistant turn gets the thinking mark
THINK = ("{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' and loop.last "
         "%}<think></think>{% endif %}{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt "
         "%}<|assistant|>\n{% endif %}")
# opens a turn with a mark that the rendered answer does not keep
OPENS = CHATML.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think>{% endif %}")
# writes the number of messages first, so nothing is a prefix of anything
COUNTS = "{{ messages|length }}" + CHATML
TALK = [dict(role='user', content='one'), dict(role='assistant', content='a'),
        dict(role='user', content='a two'), dict(role='assistant', content='b')]

@pytest.mark.parametrize('template, says', [(CHATML, 'a</s>\nb</s>\n'), (THINK, 'a</s>\n<think></think>b</s>\n')])
def test_assistant_turns_are_learnt_whole(template, says):
    tok = letters(template)
    enc = encode(dict(messages=TALK), tok, 'chat')
    assert (learnt(tok, enc) == says
            and tok.decode(enc['input_ids']) == tok.apply_chat_template(TALK, tokenize=False))
    first = dict(messages=[TALK[0], dict(TALK[1], weight=0), *TALK[2:]])
    assert learnt(tok, encode(first, tok, 'chat')) == says.split('\n', 1)[1]
    assert encode(first, tok, 'chat')['input_ids'] == enc['input_ids']

def test_template_that_opens_with_more_than_it_keeps():
    tok = letters(OPENS)
    row = dict(prompt='one', response='a')
    enc = encode(row, tok, 'text')
    assert (tok.decode(prompt_ids(row, tok)).endswith('<think>')
            and enc['input_ids'][:len(prompt_ids(row, tok))] == prompt_ids(row, tok)
            and learnt(tok, enc) == 'a</s>\n')

def test_templates_that_hide_the_answer_are_refused():
    with pytest.raises(ValueError, match='a row of its own'):
        encode(dict(messages=TALK), letters(COUNTS), 'chat')
    with pytest.raises(ValueError, match='no chat template'):
        encode(dict(messages=TALK), letters(), 'chat')
    with pytest.raises(ValueError, match='rejects the roles user, assistant'):
        encode(dict(messages=TALK[:2]), letters("{{ raise_exception('no') }}"), 'chat')

def test_lab_rows_in_every_kind():
    tok = lab_tokenizer()
    row = dict(prompt='sort c a b =', response='a b c')
    enc = encode(row, tok, 'text')
    assert (tok.decode(enc['input_ids']) == '<bos> <user> sort c a b = <assistant> a b c <eos>'
            and learnt(tok, enc) == 'a b c <eos>')
    assert tok.decode(prompt_ids(row, tok)) == '<bos> <user> sort c a b = <assistant>'
    lm = encode(dict(text='a b'), letters(), 'lm')
    assert lm['input_ids'] == lm['labels'] and letters().decode(lm['input_ids']) == 'a b<e>'
    assert encode(dict(text='a b c', label=2), tok, 'label', max_length=2) == dict(
        input_ids=tok('a b').input_ids, labels=2)
    with pytest.raises(ValueError, match="kind is 'sft'"):
        encode(row, tok, 'sft')

def test_trl_conversational_prompt_and_completion():
    d = data(dict(train=[dict(prompt=TALK[:3], completion=TALK[3:])],
                  validation=[dict(prompt=TALK[:1], completion=TALK[1:2])],
                  test=[dict(prompt=TALK[:1], completion=TALK[1:2])]))
    assert (d.kind == 'chat'
            and learnt(letters(CHATML), encode(d.train[0], letters(CHATML), 'chat')) == 'b</s>\n')

def one_by_one(row, tok, kind):
    "What `encode` must give, with the tokenizer asked for one text at a time"
    if kind == 'label':
        return dict(input_ids=tok(row['text']).input_ids, labels=row['label'])
    pieces, first, last = pieces_of(row, tok, kind)
    ids = lambda text: tok(text, add_special_tokens=False).input_ids
    texts = [t for t, _ in pieces]
    whole = ids(''.join(texts))
    cuts = [len(ids(''.join(texts[:k]))) for k in range(len(texts))] + [len(whole)]
    crossed = any(ids(''.join(texts[:k])) != whole[:cuts[k]] for k in range(len(texts)))
    parts = [ids(t) for t in texts] if crossed else [whole[a:b] for a, b in zip(cuts, cuts[1:])]
    return dict(input_ids=first + sum(parts, []) + last,
                labels=[-100]*len(first)
                + [i if l else -100 for p, (_, l) in zip(parts, pieces) for i in p] + last)

def many(kind, n=1203): # more than are asked of the tokenizer at once
    "Rows of a kind; every third answer joins a letter with its question"
    said = [(f'{"xyz"[i % 3]}{i} {"a" if i % 3 == 0 else "c"}', f'{"b" if i % 3 == 0 else ""}{i*7}')
            for i in range(n)]
    talk = lambda q, a: dict(
        messages=[dict(role='user', content=q), dict(role='assistant', content=a),
                  dict(role='user', content=a), dict(role='assistant', content=q)])
    return [dict(text=lambda: dict(prompt=q, response=a), chat=lambda: talk(q, a),
                 lm=lambda: dict(text=q + a), label=lambda: dict(text=q, label=len(a)))[kind]()
            for q, a in said]

@pytest.mark.parametrize('which, kind',
                         [(w, k) for w in ('lab', 'letters', 'letters with a template')
                          for k in ('text', 'chat', 'lm', 'label')
                          if (w, k) != ('letters', 'chat')]) # messages need a template
def test_many_rows_are_encoded_as_one_by_one(which, kind):
    tok = lab_tokenizer() if which == 'lab' else letters(CHATML if 'template' in which else None)
    rows = many(kind)
    want = [one_by_one(r, tok, kind) for r in rows]
    assert (list(encode_all(rows, tok, kind)) == want == [encode(r, tok, kind) for r in rows[:40]]
            + want[40:])
    if which == 'letters' and kind == 'text':
        assert (sum(tok(r['prompt'] + r['response']).input_ids != w['input_ids'][:-1]
                    for r, w in zip(rows, want)) == 401)
    m = min(len(w['input_ids']) for w in want) - 1
    short = encode_all(rows, tok, kind, max_length=m)
    cut = [dict(input_ids=w['input_ids'][:m],
                labels=w['labels'] if kind == 'label' else w['labels'][:m]) for w in want]
    assert list(short) == [c for c in cut if kind == 'label'
                           or any(l != -100 for l in c['labels'][1:])]

def test_nothing_is_remembered_between_two_encodings():
    tok, rows = letters(CHATML), many('text', 3)
    first = encode_all(rows, tok, 'text')
    rows[0]['response'] = 'other'
    tok.chat_template = THINK
    second = encode_all(rows, tok, 'text')
    assert (learnt(tok, second[0]) == '<think></think>other</s>\n'
            and all(a != b for a, b in zip(first, second)))

def test_truncation_counts_and_refuses():
    tok = lab_tokenizer()
    rows = [dict(prompt='sort c a b =', response='a b c'),
            dict(prompt='max a b c d e f g =', response='g')]
    got = encode_all(rows, tok, 'text', max_length=9)
    assert (len(got), got.dropped, got.truncated) == (1, 1, 1) and len(got[0]['labels']) == 9
    got = encode_all(rows, tok, 'text')
    assert (len(got), got.dropped, got.truncated) == (2, 0, 0)
    got = encode_all(rows, tok, 'text', max_length=4, keep='end')
    assert [learnt(tok, e) for e in got] == ['a b c <eos>', 'g <eos>']
    with pytest.raises(ValueError) as e:
        encode_all(rows, tok, 'text', max_length=8)
    whole = max(len(encode(r, tok, 'text')['labels']) for r in rows)
    assert (f'max_length={whole}' in str(e.value)
            and 'answers begin at token 9 to 13' in str(e.value))
    assert (encode_all(rows, tok, 'text', max_length=13).dropped == 0
            and encode_all(rows, tok, 'text', max_length=whole).truncated == 0)
    for bad in (dict(max_length=0), dict(max_length=5, keep='left')):
        for each in (encode_all, encode_each):
            with pytest.raises(ValueError, match='it must be'):
                each(rows, tok, 'text', **bad)
    with pytest.raises(ValueError, match='no rows'):
        encode_all([], tok, 'text')

# ---- batches
def test_collate():
    rows = [dict(input_ids=[5, 6, 7], labels=[-100, 6, 7]), dict(input_ids=[8], labels=[8])]
    right, left = collate(rows, 0), collate(rows, 0, 'left')
    assert (right['input_ids'].tolist() == [[5, 6, 7], [8, 0, 0]]
            and right['labels'].tolist() == [[-100, 6, 7], [8, -100, -100]]
            and right['attention_mask'].tolist() == [[1, 1, 1], [1, 0, 0]])
    assert (left['input_ids'].tolist() == [[5, 6, 7], [0, 0, 8]]
            and left['labels'].tolist() == [[-100, 6, 7], [-100, -100, 8]]
            and left['attention_mask'].tolist() == [[1, 1, 1], [0, 0, 1]])
    assert ({v.dtype for v in right.values()} == {torch.int64}
            and collate([dict(input_ids=[1], labels=3)], 0)['labels'].shape == (1,))
    assert rows[1] == dict(input_ids=[8], labels=[8])
    for bad in (([], 0), (rows, None), (rows, 0, 'top')):
        with pytest.raises(ValueError):
            collate(*bad)

def test_indices_cover_every_pass_and_depend_on_nothing_else():
    n, b = 7, 3
    flat = [i for s in range(14) for i in indices(s, b, n, 5)]
    assert all(sorted(flat[e*n:(e + 1)*n]) == list(range(n)) for e in range(6))
    assert (indices(9, b, n, 5) == flat[27:30]
            and len({tuple(order(n, e, 5).tolist()) for e in range(6)}) > 1)
    assert sorted(indices(0, 2*n, n)) == sorted(list(range(n))*2)   # a batch larger than the data
    assert order(1000, 0, 1).tolist() != order(1000, 1, 0).tolist()
    for wrong, says in (((-1, 3, 7), 'step is -1; it must be at least 0'),
                        ((0, 0, 7), 'batch_size is 0; it must be at least 1'),
                        ((0, 3, 0), 'n, the number of rows, is 0; it must be at least 1')):
        with pytest.raises(ValueError, match=f'^{says}$'):
            indices(*wrong)

def test_batch_at_resumes():
    rows = [dict(input_ids=[i]*(1 + i % 3), labels=[i]*(1 + i % 3)) for i in range(10)]
    torch.rand(5)
    a = batch_at(rows, 4, 3, 0, seed=2)
    torch.rand(9)
    b = batch_at(rows, 4, 3, 0, seed=2)
    assert (all(torch.equal(a[k], b[k]) for k in a)
            and [int(x[0]) for x in a['input_ids']] == indices(4, 3, 10, 2))

def test_a_batch_fits_a_model_and_padding_changes_nothing():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    tok = lab_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=80, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                    tie_word_embeddings=True)).eval()
    rows = encode_all(data('sort', n=4).train, tok, 'text')
    alone = [model(**collate([r], tok.pad_token_id)).loss.item() for r in rows]
    weight = [sum(l != -100 for l in r['labels'][1:]) for r in rows]
    together = model(**collate(rows, tok.pad_token_id)).loss.item()
    assert together == pytest.approx(sum(a*w for a, w in zip(alone, weight))/sum(weight), rel=1e-5)

def test_data_can_be_made_by_hand():
    a, b = (Data([QA[0]], [QA[1]], [QA[i]], 'text') for i in (2, 3))
    assert a.fingerprint != b.fingerprint and len(a.fingerprint) == 16

# ---- characters, numbers and shapes that no tokenizer and no file could hold

@pytest.mark.parametrize(
    'row, says',
    [({'prompt': 'a \ud800', 'response': 'b'}, 'train row 2: prompt has half a surrogate pair'),
     ({'prompt': 'a', 'response': 'b', 3: 'x'}, 'train row 2 has a column called 3, of type int'),
     ({'prompt': 'a', 'response': 'b', 'n': 10**5000}, 'train row 2: n holds a whole number'),
     ({'prompt': 'a', 'response': 'b', 'deep': (lambda f: f(f, 5000))(
           lambda f, n: [] if n == 0
           else __import__('functools').reduce(lambda x, _: [x], range(n), []))},
      'train row 2: deep is nested')])
def test_rows_given_as_dicts_are_held_to_the_same(row, says):
    with pytest.raises(ValueError, match=says):
        data([dict(prompt='a', response='b'), row])

def test_labels_of_very_many_digits_are_names():
    assert data([dict(text=f't{i}', label=l)
                 for i, l in enumerate(['9'*5000, '3', '20']*20)]).labels == ['3', '20', '9'*5000]

def test_a_long_csv_cell_is_read_and_the_limit_of_the_process_stays(tmp_path):
    import csv
    limit = csv.field_size_limit()
    (tmp_path/'d.csv').write_text(
        'text\n' + '\n'.join(f'"{"a b "*(40000 if i == 7 else 5)}{i}"' for i in range(40)))
    assert (max(len(r['text']) for r in data(tmp_path/'d.csv').train + data(tmp_path/'d.csv').test
                + data(tmp_path/'d.csv').validation) > 150_000 and csv.field_size_limit() == limit)

def test_a_parquet_row_that_python_cannot_hold_is_named(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    when = pa.array([0, 2**60, 0], pa.int64()).cast(pa.timestamp('us'), safe=False)
    pq.write_table(pa.table(dict(text=['a', 'b', 'c'], when=when)), tmp_path/'d.parquet')
    with pytest.raises(ValueError, match='d.parquet, row 2 cannot be read'):
        data(tmp_path/'d.parquet')

def test_names_that_left_batches_are_still_found_there():
    import pickle
    from ftlab.core import batches, data as of_data, tokens
    for name, home in dict(Data=of_data, data=of_data, encode=tokens, prompt_ids=tokens).items():
        assert getattr(batches, name) is getattr(home, name)
    assert pickle.loads(b'cftlab.core.batches\nData\n.') is of_data.Data  # pickled before the move
    assert not hasattr(batches, 'nothing')
    with pytest.raises(ImportError, match='nothing'):
        from ftlab.core.batches import nothing  # noqa: F401
