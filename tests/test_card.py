"The model card: nothing made up, nothing from another run, nothing of this machine, and no markup of the user"
import pytest
import json
from dataclasses import replace
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

def test_the_head_is_what_the_hub_reads(monkeypatch):
    found, _ = head(card(run_of()))
    assert found['library_name'] == 'transformers' and found['pipeline_tag'] == 'text-generation'
    assert 'base_model' not in found and 'datasets' not in found and 'license' not in found and 'lora' in found['tags']
    run = run_of()
    run.settings['model_name'] = 'ann/small'
    assert 'base_model' not in head_of(run), 'a folder may have such a name'
    run.model.config._commit_hash = 'abc'
    monkeypatch.setattr(run.data, 'origin', dict(source='bob/talks:en'))  # its rows are shared with other tests
    assert head_of(run)['base_model'] == 'ann/small' and head_of(run)['datasets'] == ['bob/talks']
    assert head_of(run, 'peft')['library_name'] == 'peft'

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
    (tmp_path/'README.md').write_text('---\nlicense: [mit, apache-2.0]\n---\nA model')
    found, text = head(card(made()))
    assert found['license'] == ['mit', 'apache-2.0'] and 'The base says: mit, apache-2.0' in text
    (tmp_path/'README.md').write_text('---\nlicense: [mit\nx: : y\n---\n')
    assert 'Not known' in card(made()), 'a broken head says nothing'

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

def saved_base(at):
    toy().save_pretrained(at/'base')
    TOK.save_pretrained(at/'base')
    return at/'base'

def test_a_name_cannot_close_the_code(tmp_path):
    path = rows_at(tmp_path/'a```\n# x.jsonl')
    run = fit(*ftlab.load(saved_base(tmp_path)), data(path), get('lora'), steps=1, batch_size=4,
              progress=False)
    text = card(run)
    assert '````python' in text and '\n# x' not in text

def test_code_that_would_not_repeat_the_run_is_not_printed(tmp_path):
    base, d = saved_base(tmp_path), data(rows_at(tmp_path/'my.jsonl'))
    class Stop:
        def after_step(self, state):
            state.steps = 1
    def said(d=d, recipe=get('lora'), load=True, **more):
        net = ftlab.load(base) if load else (toy(), TOK)
        return card(fit(*net, d, recipe, steps=2, batch_size=4, progress=False, **more))
    rows = [dict(prompt=r['prompt'], response=r['response']) for r in lab_data().train]
    for text, why in [(said(data(rows)), 'rows were given in memory'), (said(load=False), 'model was made in memory'),
                      (said(replace(d, train=d.train[:10])), 'rows were chosen or changed'),
                      (said(recipe=get('lora').named('my own <thing>')), 'its Recipe is none that ftlab knows'),
                      (said(recipe=get('olora').named('pissa')), 'its Recipe is none that ftlab knows'),
                      (said(callbacks=(Stop(),)), 'it ended after 1 of 2 steps')]:
        assert why in text and '```python' not in text
    assert '```python' in said()

def test_the_code_has_dtype_and_revision(tmp_path):
    model, tok = ftlab.load(saved_base(tmp_path), dtype='bfloat16')
    run = fit(model, tok, data(rows_at(tmp_path/'my.jsonl')), get('lora'), steps=1, batch_size=4,
              progress=False)
    mine = dict(settings=json.loads(json.dumps(run.settings)), revision='abc')
    assert "ftlab.load('base', revision='abc', dtype='bfloat16')" in card(run, record=mine)

def test_the_code_reads_a_mixture_again(tmp_path, monkeypatch):
    saved_base(tmp_path)
    rows_at(tmp_path/'my.jsonl')
    monkeypatch.chdir(tmp_path)
    d = ftlab.mix({'my.jsonl': .75, 'sort': .25}, seed=2)
    run = fit(*ftlab.load('base'), d, get('lora'), steps=1, batch_size=4, progress=False)
    scope = {}
    exec(card(run).split('```python\n')[1].split('```')[0], scope)
    assert [r['loss'] for r in scope['run'].log] == [r['loss'] for r in run.log]

def test_the_card_of_a_winner_names_the_command_and_what_was_measured():
    run = run_of()
    middle = dict(mean=.5, low=None, high=None)
    measured = dict(measured='old data', old=['sort'], metric='nll', why='w', step=2, dose=1.)
    run.settings['comparison'] = dict(method='lora(r=4)', methods=['lora(r=4)', 'full'], seeds=1,
                                      gain=middle, forgetting=middle, **measured)
    text = card(run)
    assert "ftlab winner COMPARISON --method 'lora(r=4)'" in text and '```python' not in text
    assert 'gain 0.500 nats a token' in text and 'forgetting on sort 0.500' in text
    assert 'Training ended' not in text and 'of the change is kept' not in text
    assert '- lr: 0.003\n' in text

def test_what_the_folder_does_not_hold_is_said():
    assert 'this folder holds the model alone' in card(run_of(method='copilot'))
    assert 'this folder holds the model alone' not in card(run_of())

def test_every_file_is_named_and_the_rate_is_the_one_that_was_used(tmp_path):
    d = data([str(rows_at(tmp_path/'a.jsonl')), str(rows_at(tmp_path/'b.jsonl'))])
    text = card(run_of(d, lr=.03))
    assert 'a.jsonl, b.jsonl: ' in text and '- lr: 0.03\n' in text

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
    assert 'exact on 4 of 5 test rows' in (tmp_path/'tuned'/'README.md').read_text()
    assert cli.main('export run --out adapter --form peft --json'.split()) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said['form'] == 'peft' and said['bytes'] > 1000
    text = (tmp_path/'adapter'/'README.md').read_text()
    assert head(text)[0]['library_name'] == 'peft' and 'exact on 4 of 5 test rows' in text
    assert 'AutoPeftModelForCausalLM.from_pretrained' in text
    assert cli.main('export run --out adapter'.split()) == 1
    assert 'not empty' in capsys.readouterr().err

def test_what_is_no_run_is_not_exported(tmp_path):
    import ftlab
    with pytest.raises(TypeError, match='run is 42; give what ftlab.fit returned'):
        ftlab.export(42, tmp_path/'out')
    assert not (tmp_path/'out').exists()
