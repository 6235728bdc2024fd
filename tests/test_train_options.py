"Options of `fit` that say how long a run is, which weights it keeps, and what it holds in memory"
import json
from pathlib import Path
import pytest
import torch
from toys import TOK, lab_data, same, toy, weights
import ftlab
from ftlab.cli import main
from ftlab.core.recipe import Recipe, Stages
from ftlab.instruments.bench import Bench
from ftlab.trainers.source import steps_of_epochs

QUICK = dict(batch_size=8, progress=False)

def fit(recipe=None, **more):
    return ftlab.fit(toy(), TOK, lab_data(), recipe, **QUICK | more)

# ---- epochs
@pytest.mark.parametrize('epochs, rows, size, steps', [
    (1, 200, 8, 25), (1, 201, 8, 26), (.5, 200, 8, 13), (3, 10, 32, 1), (1e-9, 10, 2, 1), (.1, 30, 1, 3)])
def test_steps_are_rounded_up(epochs, rows, size, steps):
    assert steps_of_epochs(epochs, rows, size) == steps

def test_epochs_are_the_same_run_as_their_steps():
    one, two = fit(epochs=.05, max_length=20), fit(steps=len(fit(epochs=.05, max_length=20).log), max_length=20)
    assert one.log == two.log and one.settings == two.settings and len(one.log) == 2
    assert same(weights(one.model), weights(two.model))
    assert any('0.05 passes over 200 training rows, 8 in a step, make 2 steps' in n for n in one.notes)

def test_rows_that_are_left_out_are_not_passed_over():
    rows = [dict(prompt='list a', response='b')]*12 + [dict(prompt='list ' + 'a '*40, response='b')]*12
    data = ftlab.data(rows, validation=rows[:1], test=rows[:1])
    run = ftlab.fit(toy(), TOK, data, epochs=2, max_length=12, **QUICK)
    assert any('12 of 24 training rows are left out' in n for n in run.notes)
    assert len(run.log) == run.settings['steps'] == 3 # 2 passes over 12 rows, 8 in a step

def test_stages_share_the_steps_of_the_epochs():
    both = Recipe(loop=Stages(Recipe(), ftlab.methods.lora(r=2)))
    assert len(fit(both, epochs=.16).log) == 4

@pytest.mark.parametrize('epochs', [0, -1, True, '2', float('nan'), float('inf')])
def test_epochs_that_are_no_number_above_0(epochs):
    with pytest.raises(ValueError, match='epochs is .*; it must be a number above 0'):
        fit(epochs=epochs)

def test_steps_and_epochs_exclude_each_other():
    for call in (lambda: fit(epochs=1, steps=2), lambda: Bench(toy(), lab_data(), epochs=1, steps=2)):
        with pytest.raises(ValueError, match='steps is 2 and epochs is 1; give one of the two'):
            call()

def test_a_source_of_its_own_has_no_epochs():
    own = Recipe(source=lambda state: state.given())
    later = Recipe(loop=Stages(Recipe(), lambda context: own))
    before = weights(model := toy())
    for recipe in (own, Recipe(loop=Stages(Recipe(), own)), later):
        with pytest.raises(ValueError, match='draws its own rows, .* give steps= instead'):
            ftlab.fit(model, TOK, lab_data(), recipe, epochs=.2, **QUICK)
        assert same(weights(model), before)
    with pytest.raises(ValueError, match='draws its own rows'):
        ftlab.compare([own.named('mine')], toy(), lab_data(), epochs=1)

def test_a_comparison_makes_epochs_one_number_of_steps(tmp_path):
    few = dict(seeds=1, tune=False, batch_size=8, items=4, old='add', old_items=4, validation_items=4,
               evaluations=1, progress=False, max_length=20)
    c = ftlab.compare(['full', 'lora(r=2)'], (toy(), TOK), lab_data(), epochs=.1, out=tmp_path, **few)
    p = c.json()['protocol']
    assert p['steps'] == 3 and any('0.1 passes' in n for n in p['notes'])
    assert {m['seeds'][0]['path'][-1]['step'] for m in c.json()['methods']} == {3}
    again = ftlab.compare(['full', 'lora(r=2)'], (toy(), TOK), lab_data(), steps=3, out=tmp_path, **few)
    assert again.json()['runs']['made'] == 0

# ---- the command line
@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder with a model and rows of a lab skill"
    folder = tmp_path_factory.mktemp('options')
    toy().save_pretrained(folder/'m')
    TOK.save_pretrained(folder/'m')
    d = lab_data()
    rows = [dict(prompt=r['prompt'], response=r['response']) for r in d.train + d.validation[:40] + d.test[:40]]
    (folder/'d.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return folder

@pytest.fixture
def call(made, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(line):
        try:
            code = main(f'{line} --model {made}/m --data {made}/d.jsonl --batch-size 8 --items 4'.split())
        except SystemExit as e:
            code = e.code
        return code, *capfd.readouterr()
    return run

def test_epochs_in_the_shell(call, made):
    rows = len(ftlab.data(made/'d.jsonl').train)
    steps = steps_of_epochs(.1, rows, 8)
    code, out, err = call('fit --epochs .1 --out run')
    said = json.loads(Path('run/run.json').read_text())
    assert code == 0 and said['settings']['steps'] == steps, err
    assert f'note: 0.1 passes over {rows} training rows, 8 in a step, make {steps} steps' in out
    assert call('fit --epochs .1 --out run')[0] == 0 # the same run again
    code, out, err = call('fit --epochs .2 --out run')
    assert code == 1 and f'steps is {steps}, and --epochs 0.2 makes {steps_of_epochs(.2, rows, 8)}' in err
    assert call(f'fit --steps {steps} --out run')[0] == 0
    assert 'above 0, such as 3 or 0.5' in call('fit --epochs 0')[2]

def test_a_dry_run_counts_the_steps_of_the_epochs(call, made):
    rows = len(ftlab.data(made/'d.jsonl').train)
    code, out, err = call('compare --methods full --seeds 1 --no-tune --epochs 3 --dry-run --json')
    assert code == 0, err
    e, steps = json.loads(out), steps_of_epochs(3, rows, 8)
    assert e['steps'] == steps and f'make {steps} steps' in e['note']
    assert abs(e['methods'][0]['tokens'] - steps*e['methods'][0]['tokens_per_step']) <= 1
    code, out, err = call("fit --method grpo --epochs 3 --dry-run")
    assert code == 1 and 'grpo draws its own rows, not those that --epochs 3 counts' in err and 'give --steps instead' in err
