"What a stranger meets between a file and a served model: shapes of data, words for intervals, files, and folders"
import copy
import json
import os
import re
import stat
import pytest
import torch
import ftlab
from ftlab.cli import main
from ftlab.core.data import NO_VALUE, without_value
from ftlab.core.io import write_tensors, write_text
from ftlab.core.messages import dialogue_of
from ftlab.evaluators.forgetting import MARGINS, change_in_words
from ftlab.instruments.compare import Comparison
from ftlab.instruments.compare_page import allowed, cells_of, table_html
from ftlab.instruments.report_page import headline
from sums import rows, save_small

def splits(*given):
    return dict(train=list(given), validation=[given[-1]], test=[given[-1]])

def said(given, **how):
    with pytest.raises(ValueError) as e:
        ftlab.data(splits(*given), **how)
    return str(e.value)

def talk(row):
    return [(m['role'], m['content']) for m in row['messages']]

# ---- shapes of data
FOUR = [('user', 'a'), ('assistant', 'b'), ('user', 'c'), ('assistant', 'd')]

def pair(question, better, worse):
    return dict(chosen=f'\n\nHuman: {question}\n\nAssistant: {better}',
                rejected=f'\n\nHuman: {question}\n\nAssistant: {worse}')

def test_dialogues_of_hh_rlhf_are_pairs_with_the_shared_turns_as_prompt():
    found = ftlab.data(splits(*(pair(f'q{i}', 'good', 'bad') for i in range(4))))
    assert found.kind == 'text' and found.train[0] == dict(prompt='q0', response='good', rejected='bad')
    long = [pair(f'q{i}\n\nAssistant: yes\n\nHuman: more', 'good', 'bad') for i in range(4)]
    found = ftlab.data(splits(*long))
    row = found.train[1]
    shared = [('user', 'q1'), ('assistant', 'yes'), ('user', 'more')]
    assert talk(row) == shared + [('assistant', 'good')] and found.kind == 'chat'
    assert [(m['role'], m['content']) for m in row['rejected']] == shared + [('assistant', 'bad')]
    assert [m.get('weight') for m in row['messages']] == [0, 0, 0, None], 'the shared turns are not learned'
    assert found.counts['formats']['train'] == 'HH-RLHF'

def test_a_dialogue_that_does_not_split_is_left_out_and_counted():
    odd = [pair('a\n\nHuman: b', 'c', 'd'), pair('a', '', 'd'), pair('a', 'b\n\nHuman: c', 'd'),
           dict(chosen=pair('a', 'b', '')['chosen'], rejected=pair('c', '', 'b')['rejected'])]
    good = [pair(f'q{i}', 'good', 'bad') for i in range(8)]
    found = ftlab.data(splits(*odd, *good))
    assert len(found.train) == 8
    assert sum(found.counts['dialogues'].values()) == 4 and len(found.counts['dialogues']) == 2
    assert 'dialogues left out' in found.note
    assert 'of 5 pairs of dialogues only 1' in said([*odd, good[0]])
    assert dialogue_of('Human: a\n\nAssistant: b\n\nc') == [
        dict(role='user', content='a'), dict(role='assistant', content='b\n\nc')]

def test_a_prompt_beside_whole_dialogues_can_be_left_unread():
    given = [pair(f'q{i}', 'good', 'bad') | dict(prompt='another') for i in range(3)]
    assert "carry=['prompt']" in said(given)
    assert ftlab.data(splits(*given), carry=['prompt']).train[0]['prompt'] == 'q0'

def test_capybara_says_who_speaks():
    turns = [dict(input='a', output='b'), dict(input='c', output='d')]
    found = ftlab.data(splits(*[dict(source='x', conversation=turns)]*3))
    assert talk(found.train[0]) == FOUR
    three = [dict(instruction='i', input='a', output='b')]
    assert 'must be {"role"' in said([dict(messages=three)])

@pytest.mark.parametrize('column', ('data', 'conversations', 'messages', 'turns'))
def test_texts_without_roles_are_read_only_if_you_say_so(column):
    given = [{column: ['a', 'b', 'c', 'd', 'e'], 'id': i} for i in range(3)]
    way = re.search(r'pass columns=(\{.*?\})', said(given))[1]
    assert way == str(dict(alternating=column))
    found = ftlab.data(splits(*given), columns=dict(alternating=column))
    assert talk(found.train[0]) == FOUR
    assert 'texts of user and assistant in turn' in found.note and 'left out (5)' in found.note
    assert 'list of texts' in said([{column: 'a'}], columns=dict(alternating=column))
    assert (f"columns= has {dict(alternating=column, messages='id')}; give one column as 'alternating', and none "
            "as 'messages'") in said(given, columns=dict(alternating=column, messages='id'))
    two = dict(alternating=['a', 'b'])
    assert f'columns= has {two}; give one' in said(given, columns=two)

def code_in(message):
    "Return the rows that the code in an error makes of `rows`"
    return re.search(r'such as rows = (\[.* for r in rows.*?\])(?=[.,] )', message)[1]

def test_the_advice_for_squad_and_xlam_works():
    squad = [dict(id=i, title='t', context='Paris is big.', question=f'{i}?',
                  answers=dict(text=['big'], answer_start=[9])) for i in range(3)]
    told = said(squad)
    read = ftlab.data(splits(*eval(code_in(told), dict(rows=squad))),
                      columns=eval(re.search(r'pass columns=(\{.*?\})', told)[1]))
    assert read.train[1] == dict(prompt='Paris is big.\n1?', response='big')
    xlam = [dict(id=i, query=f'{i}?', answers='[{"name": "w", "arguments": {"c": 1}}]',
                 tools='[{"name": "w", "description": "d", "parameters": {}}]') for i in range(3)]
    read = ftlab.data(splits(*eval(code_in(said(xlam)), dict(rows=xlam, json=json))))
    call = read.train[0]['messages'][1]['tool_calls'][0]['function']
    assert call == dict(name='w', arguments=dict(c=1))
    assert read.train[0]['tools'][0]['function']['name'] == 'w'

def test_a_weight_of_one_that_nothing_reads_is_said():
    turns = [dict(role=r, content='a', weight=1) for r in ('user', 'assistant')]
    note = lambda: ftlab.data(splits(*[dict(messages=turns)]*3)).note
    assert "not the assistant's, and so not learned (5)" in note()
    turns[0].pop('weight')
    assert 'weight' not in note()

@pytest.mark.parametrize('word', sorted(NO_VALUE))
def test_words_for_an_empty_cell_are_found_whole(word):
    found = without_value([dict(prompt='a', response=f' {word} ')], 'text')
    assert found == {0: ('response', word)}
    assert not without_value([dict(prompt=f'is {word} a word?', response='yes')], 'text')
    turns = [dict(role='user', content='a'), dict(role='assistant', content=word)]
    assert without_value([dict(messages=turns)], 'chat') == {0: ('messages', word)}

def test_show_and_the_doctor_say_that_a_cell_is_empty():
    model, tok = ftlab.load('lab-s')
    given = [dict(prompt=f'sort {c} a =', response=f'a {c}') for c in 'bcdefghij']
    found = ftlab.data(splits(*given, dict(prompt='max a b =', response='NULL')))
    assert "in 1 of all a text is only 'NULL'" in repr(ftlab.show(found, tok, 1))
    seen = [f for f in ftlab.doctor(model, tok, found, steps=5, batch_size=4) if f.name == 'cells-without-value']
    assert seen[0].severity == 'warning' and "'NULL' as response" in seen[0].seen

# ---- files
def briefly(model, tok, **more):
    return ftlab.fit(model, tok, ftlab.data('sort', n=8), ftlab.methods.lora(r=2), steps=1,
                     batch_size=4, progress=False, **more)

@pytest.mark.skipif(os.name != 'posix', reason='modes of files are those of Unix')
@pytest.mark.parametrize('umask', (0o022, 0o027))
def test_files_get_the_mode_of_any_new_file(umask, tmp_path):
    was = os.umask(umask)
    try:
        write_tensors(tmp_path/'a.safetensors', dict(a=torch.ones(2)))
        write_text(tmp_path/'a.txt', 'text')
        model, tok = ftlab.load('lab-s')
        run = briefly(model, tok, out=tmp_path/'run')
        ftlab.export(run, tmp_path/'plain')
        run.export(tmp_path/'adapter', 'peft')
        made = [p for p in tmp_path.rglob('*') if p.is_file()]
        odd = {p.name for p in made if stat.S_IMODE(p.stat().st_mode) != 0o666 & ~umask}
        assert len(made) > 10 and not odd and not any(p.name == '.mode' for p in made)
    finally:
        os.umask(was)

def test_an_export_has_its_card_in_one_call(tmp_path):
    model, tok = ftlab.load('lab-s')
    run = briefly(model, tok)
    run.export(tmp_path/'bare')
    assert not (tmp_path/'bare/README.md').exists()
    ftlab.export(run, tmp_path/'peft', 'peft')
    assert 'AutoPeftModel' in (tmp_path/'peft/README.md').read_text()

def test_a_finished_run_on_rows_that_have_changed_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_small(tmp_path/'lm')
    rows(tmp_path/'mine.jsonl')
    ask = ['fit', '--model=lm', '--data=mine.jsonl', '--steps=1', '--out=run', '--json']
    assert main(ask) == main(ask) == 0, 'the same command again is the same run'
    kept = (tmp_path/'run/delta.safetensors').read_bytes()
    rows(tmp_path/'mine.jsonl', 45)
    capsys.readouterr()
    assert main(ask) == 1 and (tmp_path/'run/delta.safetensors').read_bytes() == kept
    assert 'mine.jsonl has changed since' in capsys.readouterr().err
    assert main([*ask, '--no-resume']) == 0

# ---- what an interval allows
def test_one_rule_says_what_an_interval_allows():
    assert change_in_words(-18.2, 3.2) == 'between -18.2 and +3.2 points: a loss cannot be told from a gain'
    assert change_in_words(-2., 2.).startswith('no change of more than 2 points')
    assert change_in_words(-2.1, 0.).endswith('cannot be told from a gain')
    assert change_in_words(-9., -3.).startswith('lost') and change_in_words(3., 9.).startswith('gained')
    assert 'too few' in change_in_words(None, None) and list(MARGINS) == ['points', 'nats per token']

def shown(low, high, limit=None):
    mean = (low + high)/2
    at = lambda m, a, b: dict(mean=m, low=a, high=b)
    seed = dict(gain=.5, forgetting=mean, error=None, seconds=1., peak_bytes=1e6, trainable=1,
                head=0, saved_bytes=1e3)
    within = dict(gain=at(.4, .3, .5), forgetting=at(.01, 0, .02), rate=1e-3, step=1, dose=1.)
    method = dict(name='full', rate=1e-3, rate_matched=1e-3, gain=at(.5, .4, .6), frontier=[],
                  forgetting=at(mean, low, high), forgetting_matched=at(mean, low, high),
                  gain_matched=at(.5, .5, .5), hangs=None, stopped=None, lost=at(.1, 0, .2),
                  won=at(0, 0, 0), within=within if limit else None, seeds=[seed]*3)
    protocol = dict(forgetting='old data', metric='exact', seeds=[0, 1, 2])
    return dict(version=2, model='m', data='d', target=.5, common=True, lose_at_most=limit,
                tuning=dict(methods={}), protocol=protocol, methods=[method])

@pytest.mark.parametrize(('low', 'high'), ((-.1, .3), (-.01, .01)))
def test_the_report_and_the_comparison_say_the_same_of_an_interval(low, high):
    words = change_in_words(-100*high, -100*low)
    old = dict(name='b', old=True, metric='exact', before=.9, after=.9, change=-(low + high)/2,
               low=-high, high=-low)
    new = dict(name='a', old=False, metric='exact', before=.1, after=.9, change=.8, low=.7,
               high=.9)
    r = dict(kind='text', new=None, sets=[new, old],
             forgetting=dict(mean=(low + high)/2, low=low, high=high, sets=1, worst='b'))
    assert words in headline(r) and words in allowed(shown(low, high))[0]
    drifts = shown(low, high)
    drifts['protocol']['forgetting'] = 'drift (KL)'
    assert not allowed(drifts) and not allowed(shown(.1, .2))

def test_the_shell_the_page_and_a_notebook_have_the_same_columns():
    for limit in (None, 15.):
        result = shown(.1, .2, limit)
        head, (cells,) = cells_of(result)
        found = Comparison(copy.deepcopy(result))
        text, page = repr(found), table_html(result)
        assert [line.split('  ')[0] for line in text.splitlines()] == head
        assert all(f'<th>{h}</th>' in page for h in head) and page in found._repr_html_()
        assert all(c in text and c in page for c in cells)
        both = {f'{k} within 15 points' for k in ('gain', 'forgetting')}
        assert both <= {*head} if limit else not both & {*head}
        assert (both <= {*found.table}) is bool(limit)
