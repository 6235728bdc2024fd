"Options of `fit` that say how long a run is, which weights it keeps, and what it holds in memory"
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
import pytest
import torch
from tiny import DECODERS, ENCODERS, MIXED, PLAIN, inputs_for, tiny
from toys import TOK, classifier, lab_data, label_data, same, toy, weights
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
import ftlab
from ftlab.cli import main
from ftlab.commands.memory import training_bytes
from ftlab.core.four_bits import quantize
from ftlab.core.model import checkpointing
from ftlab.core.recipe import Recipe, Stages
from ftlab.instruments.bench import Bench
from ftlab.instruments.card import card
from ftlab.instruments.report import read_run
from ftlab.instruments.winner import StopAt
from ftlab.trainers.callbacks import EarlyStop, Every, KeepBest
from ftlab.trainers.checkpoint import change_tensors
from ftlab.trainers.source import epochs_note, steps_of_epochs
from ftlab.trainers.step import NotFinite

QUICK = dict(batch_size=8, progress=False)

def fit(recipe=None, **more):
    return ftlab.fit(toy(), TOK, lab_data(), recipe, **QUICK | more)

# ---- epochs
@pytest.mark.parametrize('epochs, rows, size, steps', [
    (1, 200, 8, 25), (1, 201, 8, 26), (.5, 200, 8, 13), (3, 10, 32, 1), (1e-9, 10, 2, 1),
    (.1, 30, 1, 3)])
def test_steps_are_rounded_up(epochs, rows, size, steps):
    assert steps_of_epochs(epochs, rows, size) == steps

def test_epochs_are_the_same_run_as_their_steps():
    one = fit(epochs=.05, max_length=20)
    two = fit(steps=len(one.log), max_length=20)
    assert one.log == two.log and one.settings == two.settings and len(one.log) == 2
    assert same(weights(one.model), weights(two.model))
    said = '0.05 passes over 200 training rows, 8 in a step, make 2 steps'
    assert any(said in n for n in one.notes)

@pytest.mark.parametrize('rows, size, parts, epochs', [
    (201, 8, 1, 3), (200, 8, 2, 3), (201, 6, 3, 1), (10, 32, 1, 3), (100, 8, 1, .5)])
def test_steps_are_those_of_trainer_but_for_its_short_batches(rows, size, parts, epochs, tmp_path):
    args = TrainingArguments(tmp_path, per_device_train_batch_size=size//parts, use_cpu=True,
                             gradient_accumulation_steps=parts, num_train_epochs=epochs)
    items = [dict(input_ids=[1], labels=[1])]*rows
    trainer = Trainer(toy(), args, train_dataset=items, data_collator=lambda x: x)
    _, a_pass, *_, steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    mine = steps_of_epochs(epochs, rows, size)
    assert a_pass == math.ceil(rows/size) # the last of them is short, if the division leaves a rest
    assert steps == mine if rows % size == 0 or epochs <= 1 else mine <= steps <= mine + epochs

def test_the_example_of_the_page():
    assert steps_of_epochs(3, 201, 8) == 76
    assert epochs_note(1, 8, 8) == '1 pass over 8 training rows, 8 in a step, makes 1 step'

def test_rows_that_are_left_out_are_not_passed_over():
    rows = [dict(prompt='list a', response='b')]*12
    rows += [dict(prompt='list ' + 'a '*40, response='b')]*12
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
    both = dict(epochs=1, steps=2)
    for call in (lambda: fit(**both), lambda: Bench(toy(), lab_data(), **both)):
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
    few = dict(seeds=1, tune=False, batch_size=8, items=4, old='add', old_items=4,
               validation_items=4, evaluations=1, progress=False, max_length=20, out=tmp_path)
    given = ['full', 'lora(r=2)'], (toy(), TOK), lab_data()
    c = ftlab.compare(*given, epochs=.1, **few)
    p = c.json()['protocol']
    assert p['steps'] == 3 and any('0.1 passes' in n for n in p['notes'])
    assert {m['seeds'][0]['path'][-1]['step'] for m in c.json()['methods']} == {3}
    again = ftlab.compare(*given, steps=3, **few)
    assert again.json()['runs']['made'] == 0

# ---- gradient checkpointing: the same numbers, to the bit, in less memory
def flags(model):
    return {m.gradient_checkpointing for m in model.modules() if hasattr(m, 'gradient_checkpointing')}

class Seen:
    "Notes whether blocks are computed again, and what their gradients are"
    def before_batch(self, state):
        self.flags = flags(state.model)

    def after_backward(self, state):
        self.gradients = {n: p.grad.clone() for n, p in state.attached.parameters().items()}

def both(make, data, recipe=None, **more):
    "Two runs, without and with it: (run, what was seen)"
    out = []
    for on in (False, True):
        seen = Seen()
        run = ftlab.fit(make(), TOK, data, recipe, steps=2, gradient_checkpointing=on,
                        callbacks=(seen,), **dict(batch_size=4, progress=False) | more)
        out.append((run, seen))
    return out

def pairs():
    rows = [dict(r, rejected=r['response'][::-1]) for r in lab_data().train[:40]]
    return ftlab.data(rows, validation=rows[:4], test=rows[:4], carry=['skill', 'level'])

CASES = dict(full={}, dropout=dict(make=lambda: toy(dropout=.2)),
             lora=dict(recipe='lora(r=2)', accumulate=2),
             sparse=dict(recipe='lift'), heads=dict(recipe='lofit'), reference=dict(recipe='asft'),
             dpo=dict(data=pairs, recipe='dpo'), packed=dict(packing=True), mixed=dict(precision='bf16'),
             labels=dict(make=classifier, data=label_data, recipe='hft'))

@pytest.mark.parametrize('case', CASES)
def test_computing_blocks_again_changes_no_bit(case):
    how = dict(dict(make=toy, data=lab_data, recipe='full'), **CASES[case])
    make, data, recipe = (how.pop(k) for k in ('make', 'data', 'recipe'))
    (plain, a), (thin, b) = both(make, data(), ftlab.methods.get(recipe), **how)
    assert same(a.gradients, b.gradients) and plain.log == thin.log
    assert same(weights(plain.model), weights(thin.model)) and plain.settings == thin.settings
    # on in the run alone
    assert True in b.flags and a.flags == flags(thin.model) == {False}
    assert thin.model.config.use_cache is not False

@pytest.mark.parametrize('family', [*DECODERS, *PLAIN, *MIXED, *ENCODERS, 'vit'])
def test_every_family_has_the_same_gradient(family):
    def gradients(on):
        model, x = tiny(family).train(), inputs_for(family)
        with torch.random.fork_rng(), checkpointing(model, on):
            torch.manual_seed(0)
            model(**x).logits.logsumexp(-1).sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    a, b = gradients(False), gradients(True)
    assert a and same(a, b)

def test_a_base_in_4_bits_is_computed_again_too():
    pytest.importorskip('bitsandbytes')
    def packed():
        model = toy(hidden=64)
        quantize(model)
        return model
    (plain, a), (thin, b) = both(packed, lab_data(), ftlab.methods.lora(r=2))
    assert same(a.gradients, b.gradients) and plain.log == thin.log

def test_an_error_or_an_interrupt_switches_it_off():
    class Stop:
        def __init__(self, error):
            self.error = error

        def before_batch(self, state):
            raise self.error
    for error in (KeyboardInterrupt(), ValueError('x')):
        model = toy()
        with pytest.raises(ValueError, match='x') if type(error) is ValueError else nullcontext():
            ftlab.fit(model, TOK, lab_data(), steps=2, gradient_checkpointing=True,
                      callbacks=(Stop(error),), **QUICK)
        assert flags(model) == {False} and model.config.use_cache

def test_what_the_user_switched_on_stays_on():
    model = toy()
    model.activation_checkpointing_enable()
    ftlab.fit(model, TOK, lab_data(), steps=1, gradient_checkpointing=True, **QUICK)
    assert True in flags(model)

def test_a_model_without_it_is_named():
    class Unable(LlamaForCausalLM):
        supports_gradient_checkpointing = False
    model = Unable(toy().config)
    with pytest.raises(ValueError, match='Unable does not support gradient checkpointing'):
        ftlab.fit(model, TOK, lab_data(), steps=1, gradient_checkpointing=True, **QUICK)

def test_a_run_is_resumed_with_it_or_without(tmp_path):
    class Stop:
        def after_step(self, state):
            if state.step == 2:
                raise KeyboardInterrupt
    how = dict(steps=4, save_every=1, out=tmp_path)
    assert fit(callbacks=(Stop(),), **how).interrupted
    whole, resumed = fit(steps=4), fit(resume=True, gradient_checkpointing=True, **how)
    assert same(weights(whole.model), weights(resumed.model))

def test_the_plan_counts_what_is_saved():
    model = tiny('llama', num_hidden_layers=8)
    plain, thin = (training_bytes(model, ftlab.methods.lora(r=2), shape=(4, 32), recompute=on)
                   for on in (False, True))
    assert thin['activations'] < .4*plain['activations']
    assert {k for k in plain if plain[k] != thin[k]} == {'activations'} and flags(model) == {False}

# ---- the best weights at the end
class Snapshots:
    "Notes the weights after every step"
    def __init__(self):
        self.weights, self.of = {}, {}

    def before_fit(self, state):
        self.after_step(state)

    def after_step(self, state):
        self.weights[state.step] = weights(state.model)
        self.of[state.step] = {n: t.clone() for n, t in change_tensors(state.attached).items()}

def best_step(run):
    losses = {r['step']: r['validation_nll'] for r in run.path if 'validation_nll' in r}
    return min(losses, key=losses.get)

WORSE = dict(steps=12, lr=.3, schedule='constant') # the loss falls for a few steps and then explodes

@pytest.mark.parametrize('recipe', ['full', 'lora(r=2)', 'hft', 'ia3', 'copilot', 'lift(every=3)'])
def test_every_part_of_the_change_is_put_back(recipe):
    seen = Snapshots()
    peak = Every(2, lambda state: dict(f1=-abs(state.step - 4))) # whatever the losses are
    run = fit(ftlab.methods.get(recipe), steps=8, lr=3e-2,
              callbacks=(seen, peak, KeepBest('f1', higher=True)))
    now = {n: t.clone() for n, t in change_tensors(run.delta.attached).items()}
    assert run.kept == dict(step=4, key='f1', value=0) and len(run.log) == 8
    assert same(now, seen.of[4]) and not same(now, seen.of[8])
    shorter = fit(ftlab.methods.get(recipe), steps=8, lr=3e-2, callbacks=(StopAt(4),))
    assert run.models.keys() == shorter.models.keys()
    assert all(same(m.state_dict(), shorter.models[n].state_dict()) for n, m in run.models.items())

def test_a_run_ends_with_its_best_weights():
    seen = Snapshots()
    run = fit(keep='best', evaluate_every=2, callbacks=(seen,), **WORSE)
    k = run.kept['step']
    assert k == best_step(run) < 12 and run.kept['key'] == 'validation_nll' and len(run.log) == 12
    assert {r['step'] for r in run.path} == {0, 2, 4, 6, 8, 10, 12}
    now = weights(run.model)
    assert same(now, seen.weights[k]) and not same(now, seen.weights[12])
    said = f'the weights after step {k} of 12 are kept: validation_nll {run.kept["value"]:.4f}'
    assert said in run.notes[-1]
    assert f'kept step {k}' in repr(run)

def test_the_best_is_among_later_steps_too():
    seen = Snapshots()
    run = fit(steps=6, lr=3e-3, keep='best', evaluate_every=2, callbacks=(seen,))
    assert run.kept['step'] == best_step(run) > 0
    assert same(weights(run.model), seen.weights[run.kept['step']])
    plain = fit(steps=6, lr=3e-3)
    assert run.log == plain.log and plain.kept is None # an evaluation changes nothing

@pytest.mark.parametrize('stop', [3, 7])
def test_an_interrupted_run_is_resumed_to_the_same_best(stop, tmp_path):
    class Stop:
        def after_step(self, state):
            if state.step == stop:
                raise KeyboardInterrupt
    how = dict(WORSE, lr=.03, keep='best', evaluate_every=2)
    whole = fit(**how)
    assert fit(out=tmp_path, save_every=1, callbacks=(Stop(),), **how).interrupted
    resumed = fit(out=tmp_path, save_every=1, resume=True, **how)
    assert resumed.kept == whole.kept and resumed.path == whole.path
    assert same(weights(whole.model), weights(resumed.model))
    with pytest.raises(ValueError, match='evaluate_every=2, this one has 3'):
        fit(out=tmp_path, save_every=1, resume=True, **how | dict(evaluate_every=3))

def test_early_stopping_and_a_number_of_ones_own():
    run = fit(keep='best', callbacks=(EarlyStop(n=1, patience=2),), **WORSE)
    assert len(run.log) == run.kept['step'] + 2 and run.kept['step'] == best_step(run)
    mine = (Every(1, lambda state: dict(f1=-abs(state.step - 3))), KeepBest('f1', higher=True))
    assert fit(steps=5, callbacks=mine).kept == dict(step=3, key='f1', value=0)
    with pytest.warns(UserWarning, match="no 'f1' was measured"):
        assert fit(steps=1, callbacks=(KeepBest('f1'),)).kept is None

def peak(at, key='f1', value=lambda x: x):
    return Every(1, lambda state: {key: value(-abs(state.step - at))})

def test_other_measurements_do_not_hide_the_number():
    run = fit(steps=5, callbacks=(peak(3), peak(1, 'other'), KeepBest('f1', higher=True)))
    assert run.kept == dict(step=3, key='f1', value=0)
    run = fit(keep='best', callbacks=(EarlyStop(n=1, patience=2), peak(1)), **WORSE)
    assert run.kept['step'] == best_step(run)

def test_it_stands_after_what_measures():
    model = toy()
    before = weights(model)
    with pytest.raises(ValueError, match="'f1' was measured after step 0 when KeepBest had already looked"):
        ftlab.fit(model, TOK, lab_data(), steps=4, callbacks=(KeepBest('f1'), peak(2)), **QUICK)
    assert same(weights(model), before)

def test_values_are_numbers():
    tensors = fit(steps=3, callbacks=(peak(2, value=torch.tensor), KeepBest('f1', higher=True)))
    assert json.loads(json.dumps(tensors.kept)) == dict(step=2, key='f1', value=0)
    gaps = Every(1, lambda state: dict(f1=None if state.step == 3 else state.step))
    run = fit(steps=3, callbacks=(gaps, KeepBest('f1', higher=True)))
    assert run.kept['step'] == 2 and 'at the last evaluation not a finite number' in run.notes[-1]
    with pytest.raises(ValueError, match="'f1' is 'high'; KeepBest compares numbers"):
        fit(steps=1, callbacks=(Every(1, lambda state: dict(f1='high')), KeepBest('f1')))

class StopIn:
    "Ends a run in a step, as `how` says"
    def __init__(self, step, how):
        self.step, self.how = step, how

    def after_step(self, state):
        if state.step == self.step and self.how is KeyboardInterrupt:
            raise self.how
        state.stop = self.how if state.step == self.step else state.stop

@pytest.mark.parametrize('how', [True, 'by hand'])
def test_a_run_that_ends_early_is_evaluated_where_it_ends(how):
    run = fit(steps=20, lr=3e-3, keep='best', evaluate_every=10, callbacks=(StopIn(7, how),))
    assert [r['step'] for r in run.path] == [0, 7] and run.kept['step'] == 7
    run = fit(steps=20, callbacks=(StopIn(7, how), EarlyStop(n=7)))
    assert [r['step'] for r in run.path] == [0, 7] and len(run.log) == 7

def test_an_interrupt_before_any_evaluation_keeps_what_was_learned():
    seen = Snapshots()
    with pytest.warns(UserWarning, match='measured after a step in this run, so the last weights are kept'):
        run = fit(steps=20, lr=3e-3, keep='best', evaluate_every=10,
                  callbacks=(seen, StopIn(7, KeyboardInterrupt)))
    assert run.interrupted and run.kept is None and same(weights(run.model), seen.weights[7])
    assert not same(seen.weights[7], seen.weights[0])

def test_an_error_of_another_callback_is_not_hidden():
    class Fails:
        def before_fit(self, state):
            raise ValueError('mine')
    best = KeepBest('f1', higher=True)
    fit(steps=2, callbacks=(peak(1), best))
    with pytest.raises(ValueError, match='mine'):
        fit(steps=2, callbacks=(Fails(), peak(1), best))

def test_one_callback_decides():
    mine = peak(2), KeepBest('f1', higher=True)
    for more in (dict(keep='best', callbacks=mine), dict(callbacks=(*mine, KeepBest('f1')))):
        with pytest.raises(ValueError, match='one KeepBest among the callbacks, or keep='):
            fit(steps=3, **more)

def test_a_number_of_ones_own_needs_no_validation_rows():
    bare = replace(lab_data(), validation=[])
    mine = peak(2), KeepBest('f1', higher=True)
    run = ftlab.fit(toy(), TOK, bare, steps=3, callbacks=mine, **QUICK)
    assert run.kept['step'] == 2

@pytest.mark.parametrize('steps, most', [(19, 10), (200, 10), (7, 7)])
def test_evaluations_are_at_most_ten(steps, most):
    class At:
        def before_fit(self, state):
            state.steps = 0
    run = fit(steps=steps, keep='best', callbacks=(At(),))
    every = run.settings['evaluate_every']
    assert math.ceil(steps/every) <= most

def test_another_objective_is_said():
    said = 'dpo trains on something else'
    run = ftlab.fit(toy(), TOK, pairs(), ftlab.methods.get('dpo'), steps=2, keep='best', **QUICK)
    assert any(said in n for n in run.notes)
    assert not any('something else' in n for n in fit(steps=2, keep='best').notes)

def test_keep_belongs_to_the_run_that_is_resumed(tmp_path):
    how = dict(steps=8, out=tmp_path, save_every=1)
    fit(keep='best', evaluate_every=2, callbacks=(StopIn(3, KeyboardInterrupt),), **how)
    with pytest.raises(ValueError, match="a run with keep='best', this one has 'last'"):
        fit(resume=True, **how)
    with pytest.warns(UserWarning, match="its keep is 'best', here 'last'"):
        fit(callbacks=(StopIn(3, KeyboardInterrupt),), **how)
    with pytest.raises(ValueError, match="a run with keep='last', this one has 'best'"):
        fit(resume=True, keep='best', **how)
    assert len(fit(resume=True, **how).log) == 8

def test_a_nan_loss_leaves_the_best_weights():
    seen = Snapshots()
    with pytest.raises(NotFinite) as e:
        fit(steps=12, lr=1e20, keep='best', evaluate_every=1, callbacks=(seen,))
    run = e.value.run
    assert same(weights(run.model), seen.weights[run.kept['step']])

def test_what_the_best_cannot_be_kept_of():
    stages, bare = Recipe(loop=Stages(Recipe(), Recipe())), replace(lab_data(), validation=[])
    for said, call in {
            "keep is 'most'; it must be last or best": lambda: fit(keep='most'),
            'trains in stages': lambda: fit(stages, steps=4, keep='best'),
            'second evaluation': lambda: fit(keep='best', evaluate_every=2,
                                             callbacks=(EarlyStop(),)),
            'is for keep=': lambda: fit(evaluate_every=2),
            'trains in stages;': lambda: fit(stages, steps=4, callbacks=(KeepBest(),)),
            'evaluate_every is 0': lambda: fit(keep='best', evaluate_every=0),
            'in a comparison it says': lambda: ftlab.compare(['full'], toy(), lab_data(), keep='best'),
            'the data have none': lambda: ftlab.fit(toy(), TOK, bare, keep='best')
            }.items():
        with pytest.raises(ValueError, match=said):
            call()

def test_report_and_export_are_of_the_kept_weights(tmp_path):
    run = fit(keep='best', evaluate_every=2, **WORSE)
    run.export(tmp_path/'plain')
    again = LlamaForCausalLM.from_pretrained(tmp_path/'plain').state_dict()
    assert same(again, dict(run.model.state_dict()))
    assert f'the weights after step {run.kept["step"]}' in card(run)

# ---- the command line
@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder with a model and rows of a lab skill"
    folder = tmp_path_factory.mktemp('options')
    toy().save_pretrained(folder/'m')
    TOK.save_pretrained(folder/'m')
    d = lab_data()
    rows = [dict(prompt=r['prompt'], response=r['response'])
            for r in d.train + d.validation[:40] + d.test[:40]]
    (folder/'d.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return folder

@pytest.fixture
def call(made, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(line):
        try:
            more = f'--model {made}/m --data {made}/d.jsonl --batch-size 8 --items 4'
            code = main(f'{line} {more}'.split())
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
    said = f'steps is {steps}, and --epochs 0.2 makes {steps_of_epochs(.2, rows, 8)}'
    assert code == 1 and said in err
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
    assert code == 1 and 'not those that --epochs 3 counts' in err and 'give --steps instead' in err

def test_gradient_checkpointing_in_the_shell(call):
    code, out, err = call('fit --method lora(r=2) --steps 2 --gradient-checkpointing --out thin --json')
    thin = json.loads(out)
    code, out, err = call('fit --method lora(r=2) --steps 2 --out plain --json')
    assert json.loads(out)['after'] == thin['after'] and 'Caching' not in err
    plans = [json.loads(call(f'fit --method lora(r=2) --steps 2 --dry-run --json{more}')[1])['methods'][0]['memory']
             for more in ('', ' --gradient-checkpointing')]
    assert plans[1]['activations'] < plans[0]['activations']
    code, out, err = call('compare --methods full --no-tune --seeds 1 --steps 2 --gradient-checkpointing '
                          '--out c --json')
    assert code == 0 and json.loads(out)['protocol']['gradient_checkpointing'] is True, err

def test_the_best_in_the_shell(call, made):
    line = 'fit --steps 12 --lr .3 --keep best --evaluate-every 2'
    code, out, err = call(f'{line} --out run --json')
    said = json.loads(out)
    how = said['settings']
    assert code == 0 and how['keep'] == 'best' and how['evaluate_every'] == 2, err
    assert any(f'the weights after step {said["kept"]["step"]} of 12 are kept' in n for n in said['notes'])
    assert read_run('run').kept == said['kept']
    assert call(f'{line} --out run')[0] == 0 # the same run again
    code, out, err = call('fit --steps 12 --lr .3 --out run')
    assert code == 1 and "in which keep is 'best' and not 'last'" in err
    code, out, err = call('fit --steps 12 --lr .3 --keep best --evaluate-every 3 --out run')
    assert code == 1 and 'in which --evaluate-every is 2 and not 3' in err
    assert call('fit --steps 12 --lr .3 --keep best --out run')[0] == 0 # which is every two steps
    plans = [json.loads(call(f'fit --steps 2 --dry-run --json{more}')[1])['methods'][0]
             for more in ('', ' --keep best')]
    assert plans[1]['memory']['best'] == plans[0]['memory']['gradients']
