"The doctor on what other programs made: what it recognizes, what it finds, how long it takes, and which fixes it tries"
import importlib.util
import json
import re
import sys
import time
from pathlib import Path

import pytest
import yaml

from ftlab.cli import main
from ftlab.instruments.artifact import Config, Elsewhere, form_of, log_of, recognize
from ftlab.instruments.checks.config import AXOLOTL, unmatched
from ftlab.instruments.checks.folder import saved
from ftlab.instruments.doctor import CHECKS, doctor
from ftlab.instruments.fixes import SETTINGS_OF_OTHERS, put
from ftlab.instruments.planted import before, elsewhere, toy_adapter, toy_log, toy_rows

GALLERY = Path(__file__).parent.parent/'bench'/'gallery'/'cases.py'


def alarms(path, **more):
    return [f.name for f in doctor(path, **more) if f.severity != 'note']


# ---------- recognized by content

def test_each_kind_is_recognized_by_its_content_under_any_name(tmp_path):
    def made(name, text):
        (tmp_path/name).write_text(text)
        return recognize(tmp_path/name)

    state = toy_log()
    assert made('x.json', json.dumps(state)).log.loss == log_of(state['log_history']).loss
    lines = '\n'.join(str(r) for r in state['log_history'])
    assert made('x.log', lines.replace("'loss': 1", "'loss': nan, 'old': 1")).log.last == 300
    dumped = '\n'.join(map(json.dumps, state['log_history']))
    assert made('y.jsonl', dumped).log.eval_loss[-1] == (300, 1.32)
    assert made('z.yml', yaml.safe_dump(AXOLOTL)).config.form == 'axolotl'
    assert made('a.json', json.dumps(dict(learning_rate=1e-4, num_train_epochs=2))).config.form == 'trl'
    assert made('b.jsonl', '\n'.join(map(json.dumps, toy_rows(3)))).rows == tmp_path/'b.jsonl'
    assert recognize(Path(toy_adapter()['model'])/'adapter_config.json').adapter


def test_a_checkpoint_has_several_parts(tmp_path):
    folder = Path(toy_adapter()['model'])
    (folder/'trainer_state.json').write_text(json.dumps(toy_log(evals={})))
    (folder/'training_args.bin').write_bytes(b'\x80\x04.')
    found = doctor(folder)
    assert 'evaluation-missing' in found.names and 'training_args.bin: a pickle' in found.about


def test_a_pickle_is_never_opened(tmp_path):
    for name in ('training_args.bin', 'x.pt'):
        (tmp_path/name).write_bytes(b'\x80\x04.')
        with pytest.raises(ValueError, match='a pickle, which can run any program'):
            doctor(tmp_path/name)


def test_what_is_nothing_is_said(tmp_path):
    (tmp_path/'x.txt').write_text('hello')
    for path in (tmp_path, tmp_path/'x.txt'):
        with pytest.raises(ValueError, match='nothing that the doctor knows'):
            doctor(path)
    with pytest.raises(FileNotFoundError):
        recognize(tmp_path/'none')


def test_groups_and_names_of_settings():
    c = Config(dict(train=dict(learning_rate='3e-4'), peft=dict(r=4, target_modules=['q'])), 'trl')
    assert c.number('lr') == 3e-4 and c['r'] == 4 and c.words('targets') == ['q'] and c.method == 'lora'
    assert form_of(dict(a=1)) is None and Config(AXOLOTL, 'axolotl').method == 'lora'
    assert unmatched(['q_proj', 'x'], {'model.layers.0.q_proj'}) == ['x']


# ---------- the gallery

@pytest.fixture(scope='module')
def gallery(tmp_path_factory):
    spec = importlib.util.spec_from_file_location('gallery_cases', GALLERY)
    module = sys.modules['gallery_cases'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path_factory.mktemp('gallery')
    return module, root, module.write(root)


def test_the_gallery_is_large_and_each_failure_has_a_healthy_twin(gallery):
    module, root, cases = gallery
    names = [c.name for c in cases]
    assert len(set(names)) == len(names)
    assert sum(bool(c.failure) for c in cases) >= 30 and sum(not c.failure for c in cases) >= 15
    healthy = {c.name for c in cases if not c.failure}
    assert all(c.twin in healthy and c.failure in module.FOUND for c in cases if c.failure)


@pytest.mark.parametrize('form', ['log', 'config', 'adapter', 'rows'])
def test_healthy_cases_are_silent_and_most_failures_are_found(form, gallery):
    module, root, cases = gallery
    missed = []
    for c in (c for c in cases if c.form == form):
        target = root/'cases'/c.name/('rows.jsonl' if form == 'rows' else '')
        found = alarms(target, base=root/c.base if c.base else None)
        if not c.failure:
            assert not found, c.name
        elif not any(re.search(module.FOUND[c.failure]['ftlab'], n) for n in found):
            missed.append(c.name)
    assert missed == (['rows-contradict'] if form == 'rows' else [])


# ---------- silence where a failure is not there

@pytest.mark.parametrize('settings', [
    dict(flash_attention=None, attn_implementation='flash_attention_2'),
    dict(flash_attention=None, flex_attention=True),
    dict(sample_packing=False, flash_attention=None),
    dict(lora_target_modules=None, lora_target_linear=True), dict(learning_rate='0.0002'),
    dict(learning_rate=1., optimizer='prodigy'), dict(fp16=False, bf16=True),
    dict(val_set_size=0, test_datasets=[dict(path='x')]), dict(special_tokens=dict(pad_token='<pad>')),
    dict(chat_template='tokenizer_default'), dict(num_epochs=30, max_steps=100),
    dict(rl='dpo', learning_rate=5e-6, sample_packing=False),
    dict(datasets=[dict(path='x', type='completion')], train_on_inputs=True)])
def test_settings_that_are_right_raise_no_alarm(settings):
    assert not alarms(elsewhere(config=AXOLOTL | settings)['model'])


def test_packing_of_trl_is_right_by_default():
    args = dict(packing=True, max_length=1024, learning_rate=1e-4, eval_strategy='steps')
    assert not alarms(elsewhere(args=args)['model'])
    assert alarms(elsewhere(args=args | dict(packing_strategy='wrapped'))['model']) == ['packing-mixes-rows']


@pytest.mark.parametrize('more', [
    dict(evals={50: 1.6, 100: 1.4, 150: 1.41, 200: 1.4, 250: 1.42, 300: 1.41}),  # noise
    dict(loss={150: 2.2}),                                                       # one spike
    dict(grad_norm={20: float('nan'), 30: float('inf')}),                        # a loss scale finds its size
    dict(learning_rate=dict.fromkeys(range(10, 310, 10), 1e-5))])                # constant
def test_logs_that_are_right_raise_no_alarm(more):
    assert not alarms(elsewhere(trainer_state=toy_log(**more))['model'])


def test_a_log_of_a_hundred_thousand_lines_takes_linear_time(tmp_path):
    took = {}
    for n in (25_000, 100_000):
        rows = [dict(step=i, loss=2. - i/n/2 + .01*(i % 7), learning_rate=1e-4, grad_norm=1.)
                for i in range(1, n + 1)]
        rows += [dict(step=i, eval_loss=2. - i/n/2) for i in range(n//10, n + 1, n//10)]
        case = Elsewhere(recognize(Path(elsewhere(trainer_state=dict(log_history=rows))['model'])))
        start = time.process_time()
        for k in (k for k in CHECKS if k.stage == 'log'):
            try:
                k.function(case)
            except Exception as e:
                assert type(e).__name__ == 'NotApplicable', (k.name, e)
        took[n] = time.process_time() - start
    assert took[100_000] < 2 and took[100_000] < 10*took[25_000] + .1


# ---------- against the base, and with rows

def test_with_a_base_and_rows_the_checks_of_rows_and_model_run_too():
    rows = toy_rows(60)
    data = dict(train=rows + rows[:20], test=rows[:10])
    settings = elsewhere(config=AXOLOTL | dict(sequence_len=8))
    found = doctor(**settings, base=saved()['base'], data=data)
    assert {'duplicate-rows', 'train-test-overlap', 'answers-cut'} <= set(found.names)


def test_a_shard_that_is_gone(tmp_path):
    given = saved()
    index = dict(weight_map={'model.norm.weight': 'model-00002-of-00002.safetensors'})
    folder = Path(given['model'])
    (folder/'model.safetensors').rename(folder/'model-00001-of-00002.safetensors')
    (folder/'model.safetensors.index.json').write_text(json.dumps(index))
    assert 'weights-missing' in alarms(folder)


# ---------- fixes

def test_a_fix_keeps_every_other_setting():
    raw = dict(train=dict(fp16=True, bf16=True, special=dict(a=1, b=2)), peft=dict(r=4))
    was = json.dumps(raw)
    assert put(raw, dict(fp16=False, new=3)) == dict(
        train=dict(fp16=False, bf16=True, special=dict(a=1, b=2)), peft=dict(r=4), new=3)
    assert json.dumps(raw) == was


def test_every_fix_of_settings_makes_its_finding_go_away():
    tried = {}
    for k in (k for k in CHECKS if k.stage == 'config'):
        for plant in k.planted:
            given = plant.make()
            file = next(Path(given['model']).glob('*.yaml'))
            was = file.read_bytes()
            for t in doctor(**given, try_fix=True).tried:
                assert t.kind == 'none' or t.gone, t
                tried[t.name] = t.kind
            assert file.read_bytes() == was
    assert {n for n, kind in tried.items() if kind != 'none'} >= set(SETTINGS_OF_OTHERS)


def test_before_a_run_the_step_is_taken_with_and_without(capsys):
    given = before(lr=3.)
    tried = doctor(**given, try_fix=True).tried[0]
    assert tried.gone and tried.without > tried.with_fix and not doctor(**before())
    found = doctor(**elsewhere(trainer_state=toy_log(evals={})), try_fix=True)
    assert [t.kind for t in found.tried] == ['none']
    assert 'is not changed by other settings' in str(found)


def test_the_dry_step_of_foreign_settings_needs_base_and_rows():
    bad = elsewhere(config=AXOLOTL | dict(learning_rate=2., lora_alpha=16, sequence_len=64))
    with_rows = doctor(**bad, base=saved()['base'], data=toy_rows(60), try_fix=True)
    t = next(t for t in with_rows.tried if t.name == 'rate-unusual')
    assert t.gone and t.without != t.with_fix
    assert 'no dry step' in str(next(t for t in doctor(**bad, try_fix=True).tried if t.name == 'rate-unusual'))


# ---------- the command line

def test_the_command_examines_and_tries(capsys):
    folder = elsewhere(config=AXOLOTL | dict(train_on_inputs=True))['model']
    assert main(['doctor', folder, '--try-fix', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['when'] == 'elsewhere' and found['tried'][0]['change'] == 'train_on_inputs=False'
    assert main(['doctor', folder, '--lr', '1e-3']) == 1
    assert '--lr does not apply' in capsys.readouterr().err
    assert main(['doctor', '--base', 'lab-s']) == 1 and 'name the folder' in capsys.readouterr().err
    assert main(['doctor', elsewhere(trainer_state=toy_log(loss={30: float('nan')}))['model']]) == 1
    assert 'log-not-finite' in capsys.readouterr().out


# ---------- what the second reader found

FACTORY = dict(model_name_or_path='Qwen/Qwen2.5-7B', stage='sft', do_train=True, finetuning_type='lora',
               lora_target='all', template='qwen', dataset='mine', cutoff_len=2048, output_dir='out',
               logging_steps=10, save_steps=500, warmup_ratio=.1, bf16=True, val_size=.1,
               per_device_train_batch_size=1, gradient_accumulation_steps=8, learning_rate=1e-4,
               num_train_epochs=3., lr_scheduler_type='cosine', eval_strategy='steps')


def test_settings_of_llamafactory_are_told_by_what_only_it_has():
    assert form_of(FACTORY) == 'llamafactory'
    assert not alarms(elsewhere(config=FACTORY | dict(quantization_bit=4))['model'])
    assert alarms(elsewhere(config=FACTORY | dict(packing=True))['model']) == ['packing-mixes-rows']
    assert form_of(dict(do_train=True, output_dir='x', learning_rate=1e-4)) == 'trl'


def test_a_base_that_is_not_there_is_an_error():
    for path in (toy_adapter()['model'], saved()['model']):
        with pytest.raises((ValueError, FileNotFoundError)):
            doctor(path, base='/nowhere/base')
    with pytest.raises(ValueError, match='exported='):
        doctor(toy_adapter()['model'], exported='x')


def test_printed_numbers_are_read_also_behind_a_bar_of_progress(tmp_path):
    state = toy_log(grad_norm=dict.fromkeys(range(10, 310, 10), 0.))
    lines = [str({k: str(v) for k, v in r.items()}) for r in state['log_history']]
    for bar in ('', ' 10%|█    | 1/9 [00:01<00:09, 1.2it/s]'):
        (tmp_path/'x.log').write_text('\n'.join(bar + line for line in lines))
        assert 'gradient-zero' in alarms(tmp_path/'x.log')
    keys = list(state['log_history'][0])
    table = [','.join(keys), *(','.join(str(r.get(k, '')) for k in keys) for r in state['log_history'])]
    (tmp_path/'x.csv').write_text('\n'.join(table))
    assert 'gradient-zero' in alarms(tmp_path/'x.csv')
    assert recognize(tmp_path/'x.csv').log.eval_loss == []
    log_of([None, dict(loss='1.5')])


def test_what_is_not_read_is_named(tmp_path):
    for name in ('a.yaml', 'b.yaml'):
        (tmp_path/name).write_text(yaml.safe_dump(AXOLOTL))
    broken = Path(toy_adapter(change=lambda t: {n: x*float('nan') for n, x in t.items()})['model'])
    broken.rename(tmp_path/'checkpoint-20')
    found = doctor(tmp_path)
    assert 'not read: b.yaml' in found.about and 'an adapter of peft (checkpoint-20)' in found.about
    assert 'adapter-not-finite' in found.names


def test_evaluations_of_several_sets_are_all_read():
    state = toy_log(evals={})
    for s, v in ((100, 1.5), (200, 1.5), (300, 1.5)):
        state['log_history'].append({'step': s, 'eval_ours_loss': v, 'eval_law_loss': 2 - s/1000})
    assert alarms(elsewhere(trainer_state=state)['model']) == ['evaluation-constant']


def test_a_dry_step_that_would_be_the_same_gives_no_losses():
    bad = elsewhere(config=AXOLOTL | dict(train_on_inputs=True, sequence_len=64))
    t = doctor(**bad, base=saved()['base'], data=toy_rows(60), try_fix=True).tried[0]
    assert t.name == 'prompts-learned' and t.gone and t.without is None
    assert 'is the same with it' in str(t)


@pytest.mark.parametrize('settings', [
    dict(save_strategy='steps', eval_strategy='steps', save_steps=250, eval_steps=100),
    dict(save_strategy='steps', eval_strategy='no')])
def test_the_best_is_mended_where_it_is_wrong(settings):
    args = dict(load_best_model_at_end=True, greater_is_better=False, learning_rate=1e-4) | settings
    tried = doctor(**elsewhere(args=args), try_fix=True).tried
    t = next(t for t in tried if t.name == 'best-not-found')
    assert t.gone and 'greater_is_better' not in t.change


@pytest.mark.parametrize('settings', [
    dict(optimizer='lion', learning_rate=3e-6),
    dict(rl='grpo', val_set_size=0, sample_packing=False),
    dict(eval_sample_packing=True, val_set_size=.02)])
def test_more_settings_that_are_right_raise_no_alarm(settings):
    assert not alarms(elsewhere(config=AXOLOTL | settings)['model'])


def test_a_scale_of_losses_that_is_searched_at_the_start_is_no_failure():
    norms = dict.fromkeys(range(10, 60, 10), float('inf'))
    assert not alarms(elsewhere(trainer_state=toy_log(grad_norm=norms))['model'])
    norms = dict.fromkeys(range(200, 260, 10), float('inf'))
    assert alarms(elsewhere(trainer_state=toy_log(grad_norm=norms))['model'])


def test_positions_that_were_extended_on_purpose_are_a_note():
    given = saved()
    for part, rope in (('base', dict(rope_type='default', rope_theta=1e4)),
                       ('model', dict(rope_type='yarn', factor=4., rope_theta=1e4))):
        file = Path(given[part])/'config.json'
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(rope_parameters=rope)))
    assert 'config-differs' not in alarms(given['model'], base=given['base'])


def test_a_rate_of_adapters_on_the_command_line_of_trl():
    args = dict(model_name_or_path='a/b', dataset_name='c', learning_rate=5e-4, eval_strategy='steps')
    assert alarms(elsewhere(args=args | dict(learning_rate=2e-3))['model']) == ['rate-unusual']
    assert not alarms(elsewhere(args=args | dict(use_peft=True))['model'])
