"What `ftlab.show` prints: the tokens of `fit`, nothing hidden, and nothing of a row that acts"
import html, json, re
import pytest
from templates import CHATML, byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toys import TOK, classifier, label_data, lab_data, toy
from transformers import PreTrainedTokenizerFast
import ftlab
from ftlab.cli import main
from ftlab.core.data import Data
from ftlab.core.model import row_limit
from ftlab.core.tokens import IGNORE, encode_all
from ftlab.instruments.show import visible
from ftlab.trainers.preferences import Pairs

BYTES = byte_tokenizer(CHATML)

def rows_of(row, kind='chat', labels=None):
    return Data([row], [row], [row], kind, labels)

def talk(ask, say, **more):
    said = dict(role='assistant', content=say, **more)
    return dict(messages=[dict(role='user', content=ask), said])

def kept(side):
    "The ids of the tokens that are shown as read, and those shown as learned"
    read = [t for t in side.tokens if not t.cut]
    return ([i for t in read for i in t.ids], [i for t in read if t.learned for i in t.ids])

@pytest.mark.parametrize('limit', [None, 9, 11])
@pytest.mark.parametrize('name', ['text', 'label', 'lm'])
def test_the_tokens_are_those_of_fit(name, limit):
    d = dict(text=lab_data, label=label_data,
             lm=lambda: ftlab.data([dict(text=r['prompt']) for r in lab_data().train[:40]]))[name]()
    model = classifier() if name == 'label' else toy()
    d = Data(d.train[:12], d.validation, d.test, d.kind, d.labels)
    shown = ftlab.show(d, TOK, 12, model=model, max_length=limit)
    trained = encode_all(d.train, TOK, d.kind, row_limit(model, TOK, limit))
    sides = [r.sides[0] for r in shown.rows]
    sides = [s for s in sides
             if isinstance(s.labels, int) or any(l != IGNORE for l in s.labels[1:])]
    assert [dict(input_ids=s.input_ids, labels=s.labels) for s in sides] == list(trained)
    for s in sides:
        assert kept(s)[0] == s.input_ids
        if not isinstance(s.labels, int):
            assert kept(s)[1] == [l for l in s.labels[1:] if l != IGNORE]

ODD = ['a\u202egnp.exe', 'zero\u200bwidth', 'n\x00ul', 'bell\x07', '\x1b[31mred',
       'soft\xadhyphen', '\u2066i\u2069', 'tag\U000e0041', 'var\ufe0f', '\u3164filler', 'nbsp\xa0',
       'line\u2028sep', '\ufeffbom',
       'tab\t', 'cr\r']

@pytest.mark.parametrize('text', ODD)
def test_nothing_is_hidden_and_nothing_acts(text):
    shown = ftlab.show(rows_of(talk(f'x {text} y', text)), BYTES)
    for out in (shown.text(), shown._repr_html_(), json.dumps(shown.json(), ensure_ascii=True)):
        hidden = [c for c in out if not c.isprintable() and c != '\n' or c in '\ufe0f\u3164']
        assert not hidden
    assert '\\' in shown.text().split('user')[1]

def test_ansi_codes_are_ours_alone():
    shown = ftlab.show(rows_of(talk('a \x1b[2Jclear', 'b \x9b2J')), BYTES).text(colour=True)
    assert set(re.findall(r'\x1b\[[^m]*m', shown)) == {'\x1b[30;48;5;153;4m', '\x1b[0m'}
    assert shown.count('\x1b') == 2*shown.count('\x1b[0m') and '\x9b' not in shown

TAGS = ['<script>alert(1)</script>', '"><img src=x onerror=y>', '&lt;b&gt;', "' onmouseover='x"]

@pytest.mark.parametrize('text', TAGS)
def test_a_row_is_no_html(text, tmp_path):
    d = rows_of(dict(text=text, label=0), 'label', [text, 'other'])
    d.name = text
    shown = ftlab.show(d, BYTES)
    page = shown.save(tmp_path/'rows.html').read_text(encoding='utf-8')
    assert set(re.findall(r'<\s*/?(\w+)', page)) <= set('DOCTYPE html head meta title body h1 p b br pre span'.split())
    plain = html.unescape(re.sub(r'<[^>]*>', '', shown._repr_html_()))
    assert visible(text) in plain and visible(text, False) in plain

def test_the_marks_cannot_be_imitated():
    assert visible('a·b│c⟨d⟩') == r'a\u00b7b\u2502c\u27e8d\u27e9' and visible(r'\n') == r'\\n'
    one = Tokenizer(models.WordLevel({'[[x]]': 0, '<unk>': 1, '[a': 2, 'b]': 3}, unk_token='<unk>'))
    one.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=one, unk_token='<unk>')
    said = ftlab.show(rows_of(dict(prompt='[[x]] [a', response='[[x]] b]'), 'text'), tok).text()
    line = said.splitlines()[-1]
    assert line.count('[[') == line.count(']]') == 1 and line.endswith(r'b\]]]')

def test_special_tokens_differ_from_the_same_letters():
    said = {split: byte_tokenizer() for split in (False, True)}
    for split, tok in said.items():
        tok.split_special_tokens = split
        said[split] = ftlab.show(rows_of(dict(prompt='</s>', response='x'), 'text'), tok).text()
    assert '⟨</s>⟩│[[x' in said[False] and '<│/│s│>│[[x' in said[True]

def test_characters_of_several_tokens():
    side = ftlab.show(rows_of(talk('你好 😀', 'é')), BYTES).rows[0].sides[0]
    texts = {t.text: len(t.ids) for t in side.tokens}
    assert texts['你'] == 3 and texts['😀'] == 4 and texts['é'] == 2
    whole = '<|im_start|>user\n你好 😀<|im_end|>\n<|im_start|>assistant\né<|im_end|>\n'
    assert ''.join(t.text for t in side.tokens) == whole

def test_sentencepiece_pieces():
    vocab = {w: i for i, w in enumerate(['▁', 'a', '<0xE4>', '<0xBD>', '<0xA0>', '▁a'])}
    t = Tokenizer(models.BPE(vocab=vocab, merges=[('▁', 'a')], byte_fallback=True))
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(),
                                   decoders.Fuse()])
    tok = PreTrainedTokenizerFast(tokenizer_object=t)
    side = ftlab.show(rows_of(dict(text='a a你'), 'lm'), tok).rows[0].sides[0]
    assert [t.text for t in side.tokens] == [' a', ' a', '你']

def test_weights_roles_tools_and_the_label_are_named():
    row = dict(messages=[*talk('q', 'a', weight=0)['messages'], *talk('r', 'b')['messages']],
               tools=[dict(type='function', function=dict(name='look_up', parameters={}))])
    tok = byte_tokenizer("{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML)
    about = '; '.join(ftlab.show(rows_of(row), tok).rows[0].about)
    assert about == ('messages: 1 user, 2 assistant, weight 0: not learned, 3 user, 4 assistant: learned; '
                     'tools: look_up')
    d = label_data()
    model = classifier()
    model.config.id2label = {0: 'c', 1: 'b', 2: 'a'}
    row = ftlab.show(d, TOK, 1, model=model).rows[0]
    named = d.labels[d.train[0]['label']]
    number = 'cba'.index(named)
    assert row.about == [f'label {number} = {named}'] and row.sides[0].labels == number

def test_both_answers_of_a_pair_are_those_of_dpo():
    from types import SimpleNamespace
    rows = [dict(r, rejected=' '.join(reversed(r['response'].split())))
            for r in lab_data().train[:6]]
    d = Data(rows, rows, rows, 'text')
    sides = [r.sides for r in ftlab.show(d, TOK, 6, max_length=64).rows]
    state = SimpleNamespace(data=d, settings=dict(batch_size=2, accumulate=1), tok=TOK, limit=64)
    as_dpo = [[dict(input_ids=s.input_ids, labels=s.labels) for s in both] for both in sides]
    assert as_dpo == [list(p) for p in Pairs(state).pairs]
    assert [s.name for s in sides[0]] == ['chosen', 'rejected']

def test_a_rejected_answer_is_compared_and_not_learned():
    row = dict(prompt='a', response='b', rejected='{{c]]')
    shown = ftlab.show(rows_of(row, 'text'), byte_tokenizer())
    chosen, rejected = shown.rows[0].sides
    assert chosen.counts() == dict(tokens=3, learned=2, cut=0, cut_learned=0)
    assert rejected.counts() == dict(tokens=7, compared=6, cut=0, cut_compared=0)
    text = shown.text()
    assert 'a│[[b│⟨</s>⟩]]' in text and 'objective that compares answers' in text
    assert '  rejected: 7 tokens, 6 compared\n  | a│{{\\{│{│c│]│]│⟨</s>⟩}}' in text
    page = shown._repr_html_()
    assert page.count('>[[<') == 1 and page.count('>{{<') == 1
    pieces = [p for s in shown.json()['rows'][0]['sides'] for p in s['pieces']]
    assert [p.get('learned') for p in pieces] == [False, True, True] + [None]*7
    plain = rows_of(dict(prompt='a', response='b'), 'text')
    assert 'compared' not in ftlab.show(plain, BYTES).text()

def test_the_longest_is_the_one_that_is_read():
    rows = [dict(prompt='a', response='b', meta=1), dict(prompt='a'*90, response='b', meta=1),
            dict(prompt='a', response='b', meta='x'*500), dict(prompt='é'*80, response='b', meta=1)]
    shown = ftlab.show(Data(rows, rows, rows, 'text'), byte_tokenizer(), 2)
    assert [(r.number, r.why) for r in shown.rows] == [(1, 'the first'), (2, 'the longest in characters')]

@pytest.mark.parametrize('wrong', [dict(max_length='12'), dict(max_length=0), dict(seed=None),
                                   dict(seed='a'),
                                   dict(tok='lab-s'), dict(n=True)])
def test_a_wrong_argument_is_named(wrong):
    with pytest.raises(ValueError, match=f'^{next(iter(wrong))} is '):
        ftlab.show(rows_of(dict(prompt='a', response='b'), 'text'), **dict(tok=BYTES) | wrong)

def test_what_is_cut_is_counted_and_shown():
    d = rows_of(dict(prompt='abc', response='defgh'), 'text')
    side = ftlab.show(d, byte_tokenizer(), max_length=5).rows[0].sides[0]
    assert side.counts() == dict(tokens=5, learned=2, cut=4, cut_learned=4)
    said = ftlab.show(d, byte_tokenizer(), max_length=3).text()
    assert '  cut off | [[d│e│f│g│h│⟨</s>⟩]]' in said and 'the row is left out of training' in said

def test_the_first_token_is_not_learned():
    side = ftlab.show(rows_of(dict(text='abc'), 'lm'), byte_tokenizer()).rows[0].sides[0]
    assert [t.learned for t in side.tokens] == [False, True, True, True]

def test_which_rows_are_shown():
    rows = [dict(prompt='a'*(50 if i == 7 else 1), response='b') for i in range(20)]
    d = Data(rows, rows[:2], [], 'text')
    numbers = lambda **more: [r.number for r in ftlab.show(d, byte_tokenizer(), **more).rows]
    assert numbers(n=2) == [1, 8] and numbers(n=4, seed=1) == numbers(n=4, seed=1)
    assert numbers(n=4, seed=1) != numbers(n=4, seed=2)
    assert numbers(n=99, split='validation') == [1, 2]
    for wrong in (dict(n=0), dict(n=True), dict(split='dev'), dict(split='test')):
        with pytest.raises(ValueError):
            numbers(**wrong)

def test_on_the_command_line(tmp_path, capfd):
    file = tmp_path/'rows.jsonl'
    rows = [dict(question=f'sort {c} b =', answer=f'b {c}') for c in 'cdefghijkl'*3]
    file.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    columns = 'prompt=question,response=answer'
    line = f'show --model lab-s --data {file} --columns {columns} -n 2'.split()
    page = tmp_path/'out'/'rows.html'
    assert main([*line, '--json', '--out', str(page)]) == 0
    said = json.loads(capfd.readouterr().out)
    assert len(said['rows']) == 2 and page.exists() and said['page'] == str(page)
    assert main(line) == 0
    assert '[[b│' in (out := capfd.readouterr().out) and '\x1b' not in out
    page.write_text('my notes')
    assert main([*line, '--out', str(page)]) == 1 and page.read_text() == 'my notes'
    assert main([*line, '--max-length', '4']) == 0
    assert 'cut off' in capfd.readouterr().out
    assert main([*line[:-2], '--split', 'test', '-n', '1', '--seed', '3', '--json']) == 0
    one = json.loads(capfd.readouterr().out)
    assert '1 of' in one['head'] and 'test rows' in one['head']
