"The model card: nothing made up, nothing from another run, nothing of this machine, and no markup of the user"
import json
import yaml
import ftlab
from ftlab import cli
from ftlab.core.data import data
from ftlab.instruments.card import card, escaped, head_of, hub_id, without_paths
from ftlab.methods import get
from ftlab.trainers.fit import fit
from toys import TOK, lab_data, toy

def run_of(d=None, method='lora', seed=0, **more):
    return fit(toy(), TOK, d or lab_data(), get(method), steps=2, batch_size=4, seed=seed,
               progress=False, **more)

def head(text):
    _, found, rest = text.split('---\n', 2)
    return yaml.safe_load(found), rest

def rows_at(path, n=40):
    path.parent.mkdir(parents=True, exist_ok=True)
    d = lab_data()
    path.write_text(''.join(json.dumps(r) + '\n'
                            for r in [*d.train[:n], *d.validation[:5], *d.test[:5]]))
    return path

def test_the_head_is_what_the_hub_reads():
    found, _ = head(card(run_of()))
    assert found['library_name'] == 'transformers' and found['pipeline_tag'] == 'text-generation'
    assert 'base_model' not in found and 'datasets' not in found and 'license' not in found and 'lora' in found['tags']
    run = run_of()
    run.settings['model_name'] = 'ann/small'
    run.data.origin = dict(source='bob/talks:en')
    assert head_of(run)['base_model'] == 'ann/small' and head_of(run)['datasets'] == ['bob/talks']
    assert head_of(run, 'peft')['library_name'] == 'peft'
    run.data.origin = None

def test_a_folder_is_no_model_of_the_hub(tmp_path, monkeypatch):
    (tmp_path/'ann'/'small').mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id('ann/small') is None and hub_id('ann/other') == 'ann/other'
    assert hub_id('/ann/other') is None and hub_id('lab-s') is None and hub_id('../a') is None

def test_the_licence_is_what_the_base_says(tmp_path):
    toy().save_pretrained(tmp_path)
    TOK.save_pretrained(tmp_path)
    made = lambda: fit(*ftlab.load(tmp_path), lab_data(), get('lora'), steps=1, batch_size=4,
                       progress=False)
    assert 'Not known' in card(made())
    (tmp_path/'README.md').write_text('---\nlicense: apache-2.0\n---\nA model')
    found, text = head(card(made()))
    assert found['license'] == 'apache-2.0' and 'The base says: apache-2.0' in text

def test_no_path_of_this_machine_and_no_markup_of_the_user(tmp_path):
    path = rows_at(tmp_path/'my user'/'[x](y) <b>*rows*.jsonl')
    run = run_of(data(path))
    run.notes.append(f'read from {path} and from {tmp_path}/other/z.csv; <script>alert(1)</script> ![a](http://b.c)')
    text = card(run, title='# <i>T</i>\n---\nx: 1')
    assert str(tmp_path) not in text and 'my user' not in text and '/other' not in text
    body = text.partition('```')[0]
    assert not any(x in body for x in ('<b>', '<script>', '![a](', 'http://'))
    assert '\\[x\\](y)' in body and '&lt;b&gt;' in body
    assert len(text.split('\n---\n')) == 2, 'a title cannot open another head'
    assert '\n# \\# &lt;i&gt;T&lt;/i&gt; --- x: 1\n' in text

def test_the_code_on_the_card_repeats_the_run(tmp_path, monkeypatch):
    toy().save_pretrained(tmp_path/'base')
    TOK.save_pretrained(tmp_path/'base')
    rows_at(tmp_path/'my.jsonl')
    monkeypatch.chdir(tmp_path)
    run = fit(*ftlab.load('base'), data('my.jsonl', n=30, seed=2), get('lora(r=3)'), steps=3,
              batch_size=4, lr=1e-2,
              seed=5, weight_decay=.1, progress=False)
    code = card(run).split('```python\n')[1].split('```')[0]
    scope = {}
    exec(code, scope)
    assert [r['loss'] for r in scope['run'].log] == [r['loss'] for r in run.log]

def test_a_name_cannot_close_the_code():
    run = run_of()
    run.data.origin = dict(source='a```\n# b')
    text = card(run)
    assert '````python' in text and '\n# b' not in text
    run.data.origin = None

def test_only_a_report_on_this_change_is_used(tmp_path):
    run, other = run_of(), run_of(seed=1)
    quick = dict(items=6, old_items=4, matrices=0)
    rep = ftlab.report(run, old='sort', **quick)
    shown = card(run, report=rep)
    assert '6 questions' in shown and 'forgetting, mean over' in shown
    rep.save(tmp_path)
    assert card(run, report=tmp_path/'report.json') == shown
    wrong = card(other, report=rep)
    assert 'another change' in wrong and '6 questions' not in wrong
    assert 'What it forgot was not measured' in wrong and 'no report' in card(run)
    old = {k: v for k, v in rep.json().items() if k != 'digest'}
    assert '6 questions' not in card(run, report=old), 'a report that does not say what it is about'

def test_only_a_record_of_this_run_is_used(tmp_path):
    run = run_of()
    mine = dict(settings=json.loads(json.dumps(run.settings)), metric='nll', before=2.,
                after=1.5, revision='abc')
    assert '2.0000 before, 1.5000 after' in card(run, record=mine)
    assert '2.0000' not in card(run_of(seed=1), record=mine)
    worse = card(run, record=mine | dict(after=2.5))
    assert 'Against it: on the test rows it is no better than the base' in worse

def test_paths_of_any_system():
    assert without_paths('C:\\a\\b.csv and /x/y z') == 'b.csv and y z'
    assert without_paths('see /home/my user/f.txt', ['/home/my user/f.txt']) == 'see f.txt'
    assert escaped('a\n# b') == 'a \\# b'

def test_the_command_line_writes_a_card_in_each_form(tmp_path, monkeypatch, capsys):
    toy().save_pretrained(tmp_path/'base')
    TOK.save_pretrained(tmp_path/'base')
    rows_at(tmp_path/'my.jsonl')
    monkeypatch.chdir(tmp_path)
    fit_args = '--model base --data my.jsonl --method lora --steps 2 --batch-size 4 --items 4'
    assert cli.main(['fit', *fit_args.split(), '--out', 'run', '--export', 'tuned']) == 0
    assert 'exact on test rows' in (tmp_path/'tuned'/'README.md').read_text()
    assert cli.main('export run --out adapter --form peft --json'.split()) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said['form'] == 'peft' and said['bytes'] > 1000
    text = (tmp_path/'adapter'/'README.md').read_text()
    assert head(text)[0]['library_name'] == 'peft' and 'exact on test rows' in text
    assert cli.main('export run --out adapter'.split()) == 1
    assert 'not empty' in capsys.readouterr().err
