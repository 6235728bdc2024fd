"Inputs as people have them: each kind is read right, or refused with the true reason, or said in the note"
import argparse
import codecs
import gzip
import json
import random
import datasets
import pytest
import torch
import transformers
from templates import CHATML, byte_tokenizer
import ftlab
from ftlab.cli import main, parser
from ftlab.core.data import data, question_of
from ftlab.core.formats import CLASSES, DIVIDERS, MEANT, plain_name
from ftlab.core.labels import model_labels
from ftlab.core.model import notes_of
from ftlab.core.rows import read_rows
from ftlab.trainers.fit import special_note

QA = [dict(prompt=f'question {i}', response=f'answer {i}') for i in range(40)]
TL = [dict(text=f'text {i}', label='ab'[i % 2]) for i in range(40)]
LM = [dict(text=f'text {i}') for i in range(40)]

def lines(rows):
    return ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows)

def says(*args, **kwargs):
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        data(*args, **kwargs)
    return str(e.value)

# ---- files: however text is written, the rows are the same, or the error says what the file is
TEXT = lines(QA)
SEMI = 'prompt;response\n' + ''.join(f'{r["prompt"]};{r["response"]}\n' for r in QA)
WRITTEN = {
    'plain.jsonl': TEXT.encode(),
    'bom_crlf.jsonl': codecs.BOM_UTF8 + TEXT.replace('\n', '\r\n').encode(),
    'utf16.jsonl': TEXT.encode('utf-16'), 'old_mac.jsonl': TEXT.replace('\n', '\r').encode(),
    'blank_end.jsonl': (TEXT + '\n \n').encode(), 'array.jsonl': json.dumps(QA, indent=1).encode(),
    'array.json': json.dumps(QA).encode(), 'UPPER.JSONL': TEXT.encode(), 'semi.csv': SEMI.encode(),
    'excel.csv': ('sep=;\n' + SEMI).encode(), 'utf16.csv': SEMI.encode('utf-16'),
    'tab.csv': SEMI.replace(';', '\t').encode(), 'tab.tsv': SEMI.replace(';', '\t').encode(),
    'comma.tsv': SEMI.replace(';', ',').encode(), 'crlf.csv': SEMI.replace('\n', '\r\n').encode()}
WRONG = {
    'gz.jsonl': (gzip.compress(TEXT.encode()), 'gzip; unpack it, or write'),
    'zip.jsonl': (b'PK\x03\x04rest', 'a zip archive or an Excel file; unpack it, or'),
    'parquet.json': (b'PAR1\x15\x04', 'a parquet file; call it what it is'),
    'utf32.jsonl': (TEXT.encode('utf-32'), 'UTF-32 text; write it as UTF-8'),
    'utf16le.jsonl': (TEXT.encode('utf-16-le'), 'UTF-16'), 'one.json': (b'{"prompt": "a"}', 'list of objects'),
    'data.json': (json.dumps(dict(data=QA)).encode(), "'data'"), 'rows.txt': (b'hello', '.txt'),
    'comma.jsonl': (TEXT.replace('}\n', '},\n').encode(), 'line 1'),
    'empty.jsonl': (b'', 'no rows'),
    'twice.jsonl': (b'{"prompt": "a", "prompt": "b", "response": "c"}\n', 'appears twice'),
    'nan.jsonl': (b'{"prompt": "a", "response": NaN}\n', 'no value'),
    'header.csv': (b'prompt,response\n', 'no rows'), 'empty_cell.csv': (b'prompt,response\na,\n', 'line 2'),
    'latin.jsonl': ('{"prompt": "é"}'.encode('latin-1'), 'UTF-8')}

@pytest.mark.parametrize('name', WRITTEN)
def test_a_file_is_read_however_it_is_written(name, tmp_path):
    (tmp_path/name).write_bytes(WRITTEN[name])
    assert [r for _, r in read_rows(tmp_path/name)] == QA

@pytest.mark.parametrize('name', WRONG)
def test_a_file_that_is_no_text_or_broken_is_named_for_what_it_is(name, tmp_path):
    raw, why = WRONG[name]
    (tmp_path/name).write_bytes(raw)
    said = says(tmp_path/name)
    assert why in said and name in said

def test_the_lines_of_a_file_with_a_separator_line_are_counted_as_in_the_file(tmp_path):
    (tmp_path/'e.csv').write_text('sep=;\nprompt;response\na;b\nc;\n')
    assert 'line 4' in says(tmp_path/'e.csv')
    (tmp_path/'e.csv').write_text('sep=:\nprompt:response\na:b\nc:d:e\n')
    said = says(tmp_path/'e.csv')
    assert 'e.csv, line 4 has 3 cells' in said and "contains ':' or" in said

def test_a_quoted_name_may_hold_the_other_separator(tmp_path):
    (tmp_path/'q.csv').write_text('"prompt, please";response\na;b\n')
    assert read_rows(tmp_path/'q.csv')[0][1] == {'prompt, please': 'a', 'response': 'b'}

def test_files_that_are_given_twice_or_lie_beside_are_said(tmp_path):
    for f in ('train', 'eval'):
        (tmp_path/f'{f}.jsonl').write_text(TEXT)
    train = tmp_path/'train.jsonl'
    assert 'given twice for train' in says([train, tmp_path/'.'/'train.jsonl'])
    assert 'eval.jsonl' in data(train).note and 'not read' in data(train).note
    assert 'not read' not in data(train, validation=tmp_path/'eval.jsonl').note
    assert 'not read' not in data(tmp_path).note

# ---- splits
@pytest.mark.parametrize('as_dict', [dict, datasets.DatasetDict])
@pytest.mark.parametrize('two', [('validation', 'dev'), ('val', 'valid'), ('eval', 'dev')])
def test_two_names_of_one_split_are_refused(as_dict, two):
    part = (lambda rows: rows) if as_dict is dict else datasets.Dataset.from_list
    said = says(as_dict({'train': part(QA), **{s: part(QA[:3 + i]) for i, s in enumerate(two)}}))
    assert all(repr(s) in said for s in two) and 'both validation rows' in said

def test_why_there_is_no_test_row_is_true():
    same = [dict(prompt='question 0', response=f'{i}') for i in range(40)] # in train, by its hash
    assert len(data(same, validation=QA[:2], test=QA[:2]).train) == 40
    assert '40 rows, with 1 different question' in data(same).note
    rare = data([dict(text=f't{i}', label=i) for i in range(200)])
    assert 'rare labels' in rare.note and 'too few' not in rare.note
    assert 'too few rows' in data(QA[:2]).note

def test_a_greeting_does_not_decide_the_split():
    hello = dict(role='assistant', content='Hi, I help.', weight=0)
    last = dict(role='assistant', content='x')
    greeted = [dict(messages=[hello, dict(role='user', content=r['prompt']), last]) for r in QA]
    d = data(greeted)
    assert d.test and d.validation
    assert {question_of(r, 'chat') for r in greeted} == {r['prompt'] for r in QA}

@pytest.mark.parametrize('n', [True, 5.0, '5', 0, -1])
def test_n_is_a_whole_number(n):
    assert repr(n) in says(QA, n=n)

@pytest.mark.parametrize('twin', [' Question 0 ', 'QUESTION 0', 'question\n0', 'question  0'])
def test_a_test_question_with_other_spaces_or_case_is_one_of_train(twin):
    d = data(QA, validation=QA[:1], test=[dict(prompt=twin, response='x')])
    assert d.counts['test_in_train'] == 1

# ---- data sets with formatted columns, and as arrow writes them
FORMATTED = ('torch', 'numpy', 'pandas', 'arrow', None)

@pytest.mark.parametrize('form', FORMATTED)
@pytest.mark.parametrize('rows', [QA, TL, [dict(text=f't{i}', label=i % 2) for i in range(40)]])
def test_the_format_of_a_data_set_changes_nothing(form, rows):
    plain = datasets.Dataset.from_list(rows)
    assert data(plain.with_format(form)).fingerprint == data(rows).fingerprint
    some = plain.with_format(form, columns=[plain.column_names[1]])
    assert data(some).fingerprint == data(rows).fingerprint

# ---- columns: in every spelling, and what a form does not read
SPELL = dict(lower=str.lower, upper=str.upper, spaced=lambda c: f' {c} ', title=str.title,
             dashed=lambda c: '-'.join(c), under=lambda c: '_'.join(c))

@pytest.mark.parametrize('spell', SPELL)
def test_a_column_that_means_something_is_found_in_any_spelling(spell):
    drawn = random.Random(spell).sample(sorted(MEANT - {'label', 'system', 'history'}), 12)
    for column in map(SPELL[spell], drawn):
        assert repr(column) in says([dict(r, **{column: 'words'}) for r in QA])
        carried = data([dict(r, **{column: 'words'}) for r in QA], carry=[column])
        assert carried.counts['carried'][column] == len(QA)

@pytest.mark.parametrize('column', sorted(CLASSES))
def test_texts_with_a_column_of_classes_are_no_plain_text(column):
    rows = [dict(text=f't{i}', **{column: 'ab'[i % 2]}) for i in range(40)]
    assert f"columns={{'label': {column!r}}}" in says(rows)
    assert data(rows, columns=dict(label=column)).kind == 'label'
    assert data(rows, carry=[column]).kind == 'lm'

@pytest.mark.parametrize('column', sorted(DIVIDERS))
@pytest.mark.parametrize('word', ['test', 'Validation', ' dev'])
def test_a_column_that_names_the_split_is_not_ignored(column, word):
    assert 'split' in says([dict(r, **{column: word}) for r in QA])
    assert data([dict(r, **{column: 'news'}) for r in QA]).kind == 'text'

def test_answers_to_compare_beside_messages_are_not_ignored():
    turn = lambda say: [dict(role='user', content='q'), dict(role='assistant', content=say)]
    row = dict(prompt='q', chosen=turn('good'), rejected=turn('bad'), messages=turn('good'))
    d = dict(train=[row]*2, validation=[row], test=[row])
    assert "carry=['messages']" in says(d)
    assert data(d, carry=['messages']).train[0]['rejected'] == 'bad'
    assert data(d, carry=['chosen', 'rejected']).kind == 'chat'

def test_the_hint_for_a_question_is_not_the_system_prompt():
    said = says([dict(system_prompt='s', question=f'q{i}', response='a') for i in range(40)])
    assert "columns={'prompt': 'question'}" in said and plain_name('System Prompt') == 'systemprompt'

# ---- labels: what looks like one label is said, and what marks none is not learned silently
ALIKE = [('1', '1.0'), ('1', '01'), (True, 1), ('true', '1'), ('a', 'A '),
         ('caf\xe9', 'cafe\u0301')]

@pytest.mark.parametrize('two', ALIKE)
def test_labels_that_may_be_one_are_said(two):
    d = data([dict(text=f't{i}', label=two[i % 2]) for i in range(40)])
    assert d.counts.get('labels_alike') == 2 and len(d.labels) == 2

def test_labels_that_are_different_are_not_said():
    names = ['1', '10', '1.5', 'one', '-1.0']
    d = data([dict(text=f't{i}', label=names[i % 5]) for i in range(60)])
    assert 'labels_alike' not in d.counts

def classed(rows, names):
    features = datasets.Features(text=datasets.Value('string'),
                                 label=datasets.ClassLabel(names=names))
    return datasets.Dataset.from_list(rows, features=features)

def test_rows_without_a_label():
    three = data([dict(text=f't{i}', label=i % 3 - 1) for i in range(60)])
    assert '-1 counts as a label' in three.note
    rows = [dict(text=f't{i}', label=-(i % 2)) for i in range(40)]
    assert 'without a label' in says(classed(rows, ['n', 'p']))
    assert 'nothing to tell apart' in data([dict(text=f't{i}', label='a') for i in range(40)]).note

def test_each_split_has_its_own_order_of_names():
    def part(names):
        rows = [dict(text=f'{names[i % 2]} {i}', label=i % 2) for i in range(20)]
        return classed(rows, names)

    d = data(datasets.DatasetDict(train=part(['n', 'p']), test=part(['p', 'n'])))
    assert all(r['text'].split()[0] == d.labels[r['label']] for r in d.train + d.test)

# ---- texts
NO_TEXT = ['\u200b', '\u200d\u2060', '\ufeff', '\u3164', '\u2800\u2800', '\xad', ' \u200b\n', '',
           ' \n', '\xa0', 'a\x00', '\ud83d', None, 3, 1.5, True, ['a'], dict(a=1), b'a', float('nan')]

@pytest.mark.parametrize('text', NO_TEXT)
@pytest.mark.parametrize('column', ['prompt', 'response'])
def test_an_answer_that_is_no_text_is_refused(text, column):
    said = says([dict(QA[0], **{column: text})] + QA)
    assert 'train row 1' in said and column in said

ODD_TEXT = ['null', '0', '\u202eabc', 'x'*50000, 'a\r\nb', '\U0001f468\u200d\U0001f469', '.', '\u0e01']

@pytest.mark.parametrize('text', ODD_TEXT)
def test_odd_text_is_text(text):
    d = data([dict(QA[0], response=text)] + QA[1:], validation=QA[:1], test=QA[:1])
    assert d.train[0]['response'] == text

# ---- special tokens in the text of rows
SPECIAL = dict(bos=('<s>hi', 'a', '<s>'), eos=('hi', 'a</s>', '</s>'),
               template=('<|im_start|>user\nhi<|im_end|>', 'a', '<|im_start|>'), end=('hi', '<|im_end|>', '<|im_end|>'))

@pytest.mark.parametrize('case', SPECIAL)
def test_special_tokens_in_the_text_are_said(case):
    prompt, response, word = SPECIAL[case]
    tok = byte_tokenizer(CHATML)
    train = [dict(prompt=prompt, response=response), *QA[:3]]
    said = special_note(data(train, validation=QA[:1], test=QA[:1]), tok)
    assert word in said and '1 of 4' in said
    turns = [dict(role='user', content=prompt), dict(role='assistant', content=response)]
    chat = [dict(messages=turns)]*2
    assert '2 of 2' in special_note(data(dict(train=chat, validation=chat, test=chat)), tok)
    assert special_note(data(QA), tok) == ''

def test_what_ends_no_answer_and_what_changes_with_the_day_is_said():
    assert 'nothing ends an answer' in special_note(data(QA), byte_tokenizer(eos=None))
    dated = byte_tokenizer("{{ strftime_now('%d %b %Y') }}" + CHATML)
    assert 'date of the day' in special_note(data(QA), dated) and special_note(data(LM), dated) == ''

# ---- heads: kept, replaced and said, or refused
TOK = byte_tokenizer()
HEADS = 'QuestionAnswering TokenClassification MultipleChoice NextSentencePrediction'.split()

SIZES = dict(vocab_size=len(TOK), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
             num_attention_heads=2, max_position_embeddings=64, pad_token_id=2)

def bert(head, folder, **more):
    config = transformers.BertConfig(**SIZES, **more)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(transformers, f'BertFor{head}')(config).save_pretrained(folder)
    TOK.save_pretrained(folder)
    return folder

@pytest.mark.parametrize('head', HEADS)
def test_a_head_of_another_task_is_not_taken_for_labels(head, tmp_path):
    names = dict(id2label={0: 'a', 1: 'b'}, label2id=dict(a=0, b=1))
    model, _ = ftlab.load(bert(head, tmp_path/'m', **names), labels=['a', 'b'])
    assert any(f'BertFor{head}' in n and 'untrained' in n for n in notes_of(model))
    assert model_labels(model) == ['a', 'b']
    with pytest.raises(ValueError):
        ftlab.fit(*ftlab.load(tmp_path/'m'), data(QA), steps=1, progress=False)

@pytest.mark.parametrize('loss', ['multi_label_classification', 'regression'])
def test_a_head_for_another_loss_is_kept_only_on_purpose(loss, tmp_path):
    names = dict(id2label={0: 'a', 1: 'b'}, label2id=dict(a=0, b=1), problem_type=loss)
    bert('SequenceClassification', tmp_path/'m', **names)
    with pytest.raises(ValueError, match=loss):
        ftlab.load(tmp_path/'m', labels=['a', 'b'])
    model, _ = ftlab.load(tmp_path/'m', labels=['a', 'b'], head='new')
    assert model.config.problem_type == 'single_label_classification'

@pytest.mark.filterwarnings('ignore')
def test_a_reward_model_gets_a_new_head_or_is_refused(tmp_path):
    bert('SequenceClassification', tmp_path/'m', num_labels=1)
    model, tok = ftlab.load(tmp_path/'m', labels=['a', 'b'])
    assert any('replaced' in n for n in notes_of(model)) and model.config.num_labels == 2
    with pytest.raises(ValueError, match='cannot generate'):
        ftlab.fit(*ftlab.load(tmp_path/'m'), data(QA), steps=1, progress=False)

# ---- the command line: an option that is accepted is read, or refused
class Watched(argparse.Namespace):
    "Arguments that note which of them are read"
    def __init__(self, a):
        super().__init__(**vars(a))
        object.__setattr__(self, 'read', set())

    def __getattribute__(self, name):
        if not name.startswith('_') and name != 'read':
            object.__getattribute__(self, 'read').add(name)
        return object.__getattribute__(self, name)

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('inputs')
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, bos_token_id=0,
                                      eos_token_id=1)
    transformers.LlamaForCausalLM(config).save_pretrained(folder/'m')
    TOK.save_pretrained(folder/'m')
    (folder/'d.jsonl').write_text(TEXT)
    assert main(f'fit --model {folder}/m --data {folder}/d.jsonl --steps 2 --batch-size 4 --items 4 '
                f'--out {folder}/run'.split()) == 0
    return folder

LM_RUN = '--model {d}/m --data {d}/d.jsonl --steps 2 --batch-size 4 --items 4'
RUNS = dict(
    fit=f'fit {LM_RUN} --out {{t}}/fit', compare=f'compare {LM_RUN} --methods full --no-tune --seeds 1 --out {{t}}/c',
    report='report {d}/run --items 2 --matrices 0 --out {t}/r',
    doctor='doctor --model {d}/m --data {d}/d.jsonl --steps 2',
    merge='merge {d}/run --out {t}/m', show='show --model {d}/m --data {d}/d.jsonl -n 1',
    papers='papers hft')
# read by `main` itself, or only in the other mode of the command: `REFUSED` holds that they are not ignored there
BY_MAIN = {'command', 'json', 'debug', 'run', 'options', 'read'}
ELSEWHERE = dict(report={'eval', 'columns', 'carry', 'wanted', 'labels', 'empty'},
                 compare={'ray_address', 'workers', 'gpus_per_run'})  # with --executor alone, else refused

@pytest.mark.parametrize('command', RUNS)
def test_every_option_is_read(command, place, tmp_path, capfd):
    a = Watched(parser().parse_args(RUNS[command].format(d=place, t=tmp_path).split()))
    object.__getattribute__(a, 'run')(a)
    unread = vars(a).keys() - a.read - BY_MAIN - ELSEWHERE.get(command, set())
    assert not unread

REFUSED = ['doctor {d}/run --lr 1e-3', 'doctor {d}/run --method lora', 'doctor {d}/run --steps 9',
           'doctor {d}/run --batch-size 2', 'doctor {d}/run --accumulate 2', 'doctor {d}/run --max-length 9',
           'doctor {d}/run --precision bf16', 'doctor {d}/run --head new', 'doctor {d}/run --carry x',
           'doctor {d}/run --columns prompt=x', 'doctor {d}/run --eval x', 'doctor {d}/run --wanted only',
           'report {d}/run --carry x', 'report {d}/run --columns prompt=x', 'report {d}/run --eval x',
           'report {d}/run --empty drop', 'doctor {d}/run --empty drop', 'doctor {d}/run --quantize nf4',
           'report {d}/run --wanted only', 'claims list --jobs 2', 'claims list --all', 'claims run hft --because x',
           'claims explain hft --jobs 2', f'fit {LM_RUN} --head new', f'fit {LM_RUN} --epochs 2',
           f'compare {LM_RUN} --methods full --epochs 2', f'fit {LM_RUN} --dry-run --epochs 2',
           f'fit {LM_RUN} --evaluate-every 2',
           'show --model {d}/m --data {d}/d.jsonl --head new',
           f'compare {LM_RUN} --methods full --no-tune --max-runs 3',
           f'compare {LM_RUN} --methods full --workers 2', f'compare {LM_RUN} --methods full --ray-address x',
           f'compare {LM_RUN} --methods full --gpus-per-run 1']

@pytest.mark.parametrize('line', REFUSED)
def test_an_option_that_nothing_would_read_is_refused(line, place, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(line.format(d=place).split()) == 1
    option = [w for w in line.split() if w.startswith('--')][-1]
    assert f'{option} would not be used' in capfd.readouterr().err and not list(tmp_path.iterdir())

# ---- output folders
@pytest.mark.parametrize('more', ['--lr 1e-2', '--method lora(r=2)', '--seed 1', '--steps 3', '--batch-size 8',
                                  '--max-length 20', '--packing', '--precision bf16',
                                  '--eval {d}/d.jsonl'])
def test_a_finished_run_is_not_replaced_unasked(more, place, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    files = [place/'run'/f for f in ('run.json', 'delta.safetensors')]
    before = [f.read_bytes() for f in files]
    line = f'fit {LM_RUN} --out {{d}}/run {more}'.format(d=place)
    assert main(line.split()) == 1
    said = capfd.readouterr().err
    assert 'finished run' in said and '--no-resume' in said
    assert before == [f.read_bytes() for f in files]

def test_the_same_run_again_and_one_on_purpose(place, tmp_path, capfd):
    line = f'fit {LM_RUN} --out {{t}}/run'.format(d=place, t=tmp_path)
    again = ('', '', '--lr 1e-2 --no-resume')
    assert [main(f'{line} {more}'.split()) for more in again] == [0, 0, 0]
    assert json.loads((tmp_path/'run'/'run.json').read_text())['settings']['lr'] == 1e-2
    (tmp_path/'c').mkdir()
    (tmp_path/'c'/'result.json').write_text('{}')
    assert main(f'fit {LM_RUN} --out {{t}}/c'.format(d=place, t=tmp_path).split()) == 1
    assert 'holds a comparison' in capfd.readouterr().err
