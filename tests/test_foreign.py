"The doctor on what other programs made: what it recognizes, what it finds, how long it takes, and which fixes it tries"
import importlib.util
import json
import math
import random
import re
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from ftlab.cli import main
from ftlab.core.recipe import Recipe
from ftlab.instruments.artifact import Config, Elsewhere, form_of, log_of, recognize
from ftlab.instruments.checks.adapter import saved_toy
from ftlab.instruments.checks.config import AXOLOTL, unmatched
from ftlab.instruments.checks.folder import saved
from ftlab.instruments.checks.sources import with_rows
from ftlab.instruments.doctor import CHECKS, doctor
from ftlab.instruments.fixes import PLANNED, SETTINGS_OF_OTHERS, put
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
    assert sum(bool(c.failure) for c in cases) >= 90 and sum(not c.failure for c in cases) >= 40
    healthy = {c.name for c in cases if not c.failure}
    assert all(c.twin in healthy and c.failure in module.FOUND for c in cases if c.failure)


@pytest.mark.parametrize('form', ['log', 'config', 'adapter', 'folder', 'rows'])
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
    for k in (k for k in CHECKS if k.stage in PLANNED):
        for plant in k.planted:
            given = plant.make()
            files = {p: p.read_bytes() for p in Path(given['model']).glob('*.yaml')}
            for t in doctor(**given, try_fix=True).tried:
                assert t.kind == 'none' or t.gone, t
                tried[t.name] = t.kind
            assert all(p.read_bytes() == was for p, was in files.items())
    assert {n for n, kind in tried.items() if kind != 'none'} >= set(SETTINGS_OF_OTHERS)


def test_before_a_run_the_step_is_taken_with_and_without(capsys):
    given = before(lr=3.)
    tried = doctor(**given, try_fix=True).tried[0]
    assert tried.gone and tried.without > tried.with_fix and not doctor(**before())
    found = doctor(**elsewhere(trainer_state=toy_log(evals={})), try_fix=True)
    assert [t.kind for t in found.tried] == ['none']
    assert 'is not changed by other settings' in str(found)


def test_why_no_step_was_taken_before_a_run_is_said(monkeypatch):
    monkeypatch.setattr('ftlab.instruments.fixes.COPY_LIMIT', 0)
    t = doctor(**before(lr=3.), try_fix=True).tried[0]
    assert t.gone and str(t).endswith('no dry step could be taken: the model is too large to be copied')


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


def test_a_run_made_elsewhere_names_the_arguments_that_do_not_apply():
    adapter = toy_adapter()['model']
    for given, odd in ((dict(steps=5), 'steps'), (dict(recipe=Recipe(), lr=1., tok=1), 'tok, recipe, lr')):
        with pytest.raises(ValueError, match=rf'made elsewhere, so it takes base=.*leave out {odd}\.'):
            doctor(adapter, **given)


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
    bad = elsewhere(config=AXOLOTL | dict(fp16=True, bf16=True, sequence_len=64))
    t = doctor(**bad, base=saved()['base'], data=toy_rows(60), try_fix=True).tried[0]
    assert t.name == 'precision-twice' and t.gone and t.without is None
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


# ---------- what a set of another person showed

def with_line(settings, line):
    "Write settings with one more line"
    given = elsewhere(config=settings)
    file = next(Path(given['model']).glob('*.yaml'))
    file.write_text(file.read_text() + line)
    return file


def test_a_key_that_stands_twice_is_named_with_its_lines_and_inside_a_group_too(tmp_path):
    found = doctor(with_line(AXOLOTL, 'learning_rate: 0.5\n'))
    twice = next(f for f in found if f.name == 'setting-repeated')
    assert twice.severity == 'error' and 'learning_rate (lines ' in twice.seen
    assert 'rate-unusual' in found.names # the last one counts, and it is examined
    (tmp_path/'a.yaml').write_text('training:\n  learning_rate: 1.0e-4\n  bf16: true\n  learning_rate: 2.0e-4\n'
                                   '  max_length: 512\n  eval_strategy: steps\n')
    assert alarms(tmp_path/'a.yaml') == ['setting-repeated']
    (tmp_path/'a.json').write_text('{"learning_rate": 1e-4, "eval_strategy": "steps", "learning_rate": 2e-4}')
    assert alarms(tmp_path/'a.json') == ['setting-repeated']
    (tmp_path/'b.yaml').write_text('a: &a {learning_rate: 1.0e-4}\nb: {<<: *a, learning_rate: 1.0e-4}\n'
                                   'max_length: 512\neval_strategy: steps\n')
    assert not alarms(tmp_path/'b.yaml')
    (tmp_path/'c.yaml').write_text('g:\n  h:\n    a: &a {<<: {learning_rate: 2.0e-4}, learning_rate: 1.0e-4}\n'
                                   'b: {<<: *a}\nmax_length: 512\neval_strategy: steps\n')
    assert not alarms(tmp_path/'c.yaml')


@pytest.mark.parametrize('text', [
    '&a\nloop: *a\n', 'datasets: 5\nspecial_tokens: 7\ntokens: 3\n',
    'datasets: [5, null, {path: [a], type: [b]}, {path: r.jsonl, type: {field_output: [1]}}, '
    '{path: r.jsonl, type: chat_template, message_property_mappings: 5, field_messages: [x]}]\n',
    f'datasets: [{{path: {"x"*300}.jsonl, type: alpaca}}, {{path: "a\\0.jsonl"}}]\n'])
def test_settings_of_odd_types_do_not_end_the_doctor(tmp_path, text):
    rest = {k: v for k, v in AXOLOTL.items() if k not in ('datasets', 'special_tokens')}
    (tmp_path/'a.yaml').write_text(text + yaml.safe_dump(rest))
    (tmp_path/'r.jsonl').write_text('{"instruction": 5, "messages": "hello"}\n'*30)
    assert not any('itself failed' in f.seen for f in doctor(tmp_path))


@pytest.mark.parametrize('info', [[1], dict(mine=dict(file_name=['x'], columns=5, tags=[1])),
                                  dict(mine=dict(file_name='../rows.jsonl', columns=5))])
def test_a_list_of_data_sets_of_odd_types_does_not_end_the_doctor(info):
    found = doctor(with_rows(FACTORY, ASKED, info=info)['model'])
    assert not any('itself failed' in f.seen for f in found)
    assert ('rows-unreadable' in found.names) == (info == [1])


def test_a_folder_of_pickles_is_said_to_be_one_and_how_to_convert_it(tmp_path):
    for name in ('pytorch_model.bin', 'optimizer.pt', 'scheduler.pt'):
        (tmp_path/name).write_bytes(b'\x80\x04.')
    with pytest.raises(ValueError) as e:
        doctor(tmp_path)
    for said in ("holds pickles alone", "pytorch_model.bin (the weights of a model)",
                 "optimizer.pt (an optimizer's state)", 'weights_only=True', 'none was opened'):
        assert said in str(e.value)


def test_a_base_beside_a_log_alone_is_used_or_said_to_be_of_no_use():
    base = saved()['base']
    found = doctor(**elsewhere(trainer_state=toy_log()), base=base)
    assert 'a log alone needs only the number of tokens' in found.about and not found.names
    high = elsewhere(trainer_state=toy_log(loss={s: 9.5 - s/300 for s in range(10, 310, 10)}))
    assert 'loss-starts-high' in doctor(**high, base=base).names # the toy has 312 tokens: ln 312 = 5.7
    assert 'loss-starts-high' not in doctor(**high).names


ASKED = [dict(instruction=f'what is {i} ?', input='', output=f'it is {i}') for i in range(200)]
TALKS = [dict(conversations=[{'from': 'human', 'value': r['instruction']},
                             {'from': 'gpt', 'value': r['output']}])
         for r in ASKED]


def of_type(**entry):
    return AXOLOTL | dict(datasets=[dict(path='rows.jsonl') | entry])


@pytest.mark.parametrize('entry, rows', [
    (dict(type='alpaca'), ASKED), (dict(type='alpaca:chat'), ASKED), (dict(type='sharegpt'), TALKS),
    (dict(type='chat_template', field_messages='conversations', message_field_role='from',
          message_field_content='value'), TALKS),
    (dict(type='completion', field='output'), ASKED),
    (dict(type=dict(field_instruction='instruction', field_output='output')), ASKED),
    (dict(type='a.type.of.ones.own'), TALKS),
    (dict(type='alpaca'), [dict(r, output='') if i == 7 else r for i, r in enumerate(ASKED)])])
def test_rows_that_fit_their_type_raise_no_alarm(entry, rows):
    assert not alarms(with_rows(of_type(**entry), rows)['model'])


@pytest.mark.parametrize('entry, rows, name', [
    (dict(type='alpaca'), TALKS, 'rows-do-not-fit'), (dict(type='completion'), ASKED, 'rows-do-not-fit'),
    (dict(type='chat_template'), TALKS, 'rows-do-not-fit'), (dict(type='alpaca'), ASKED + ASKED, 'duplicate-rows'),
    (dict(type='alpaca'), ASKED[:30], 'steps-few'),
    (dict(type='alpaca'), [dict(r, output='') for r in ASKED[:60]] + ASKED, 'rows-unanswered'),
    (dict(type='alpaca'), [dict(r, output=r['output'] + '<|im_end|>') for r in ASKED], 'marks-in-text')])
def test_rows_that_settings_name_are_judged(entry, rows, name):
    assert name in alarms(with_rows(of_type(**entry), rows)['model'])


def test_rows_that_are_given_take_the_place_of_those_that_are_named():
    given = with_rows(of_type(type='alpaca'), TALKS)
    assert 'rows-do-not-fit' not in doctor(**given, data=toy_rows(60)).names
    assert 'rows-unreadable' in doctor(**given, data='/nowhere/rows.jsonl').names


def test_rows_of_llamafactory_are_read_by_dataset_info():
    info = dict(mine=dict(file_name='../rows.jsonl', columns=dict(prompt='instruction', response='output')))
    assert not alarms(with_rows(FACTORY, ASKED, info=info)['model'])
    pairs = dict(mine=dict(file_name='../rows.jsonl', formatting='sharegpt', ranking=True,
                           columns=dict(messages='conversations', chosen='a', rejected='b')))
    rows = [dict(conversations=t['conversations'][:1], a=dict(value='x'), b=dict(value='y'))
            for t in TALKS]
    preferred = FACTORY | dict(stage='dpo', learning_rate=5e-6)
    assert not alarms(with_rows(preferred, rows, info=pairs)['model'])
    books = dict(mine=dict(file_name='../rows.jsonl', columns=dict(prompt='output')))
    assert not alarms(with_rows(FACTORY | dict(stage='pt'), ASKED, info=books)['model'])
    assert alarms(with_rows(FACTORY, TALKS, info=info)['model']) == ['rows-do-not-fit']
    gone = dict(mine=dict(file_name='none.json'))
    assert alarms(with_rows(FACTORY, ASKED, info=gone)['model']) == ['rows-not-found']


@pytest.mark.parametrize('turns', [
    [dict(role='user', content='the time?'), dict(role='assistant', content=None, tool_calls=[{}]),
     dict(role='tool', content='noon'), dict(role='assistant', content='noon')],
    [dict(role='user', content=[dict(type='image')]),
     dict(role='assistant', content=[dict(type='text', text='a cat')])],
    [dict(role='user', content='hi'), dict(role='assistant', tool_calls=[{}])]])
def test_talks_with_tools_or_images_are_no_failure(turns):
    rows = [dict(messages=turns) for _ in ASKED]
    assert 'rows-do-not-fit' not in alarms(with_rows(of_type(type='chat_template'), rows)['model'])
    args = dict(dataset_name='rows.jsonl', learning_rate=1e-5, eval_strategy='steps',
                model_name_or_path='a/b')
    assert 'rows-do-not-fit' not in alarms(with_rows(args, rows)['model'])


def test_rows_of_questions_alone_are_read_by_trl_and_rows_in_a_format_of_ones_own_are_not_judged():
    grpo = dict(dataset_name='rows.jsonl', learning_rate=1e-6, model_name_or_path='a/b',
                num_generations=8, per_device_train_batch_size=8)
    assert not alarms(with_rows(grpo, [dict(prompt=r['instruction'], answer='4') for r in ASKED])['model'])
    info = dict(mine=dict(file_name='../rows.jsonl', formatting='openai'))
    assert not alarms(with_rows(FACTORY, [dict(messages=[])]*200, info=info)['model'])
    assert 'rows-do-not-fit' not in alarms(with_rows(of_type(type='alpaca.load_mine'), TALKS)['model'])


def test_rows_of_trl_are_told_by_their_columns():
    args = dict(dataset_name='rows.jsonl', learning_rate=1e-5, eval_strategy='steps',
                max_length=64, model_name_or_path='a/b')
    plain = [dict(prompt=r['instruction'], completion=r['output']) for r in ASKED]
    assert not alarms(with_rows(args, plain)['model'])
    assert alarms(with_rows(args, [dict(q='x', a='y')]*50)['model']) == ['rows-do-not-fit']
    assert not alarms(with_rows(args | dict(dataset_text_field='a'),
                                [dict(a=f'y {i}') for i in range(50)])['model'])


@pytest.mark.parametrize('settings', [
    dict(chat_template='chatml', base_model='NousResearch/Hermes-2-Pro-Llama-3-8B'),
    dict(chat_template='chatml', base_model='mistralai/Mistral-7B-v0.1', tokens=['<|im_start|>'],
         special_tokens=dict(eos_token='<|im_end|>'), lora_modules_to_save=['embed_tokens', 'lm_head']),
    dict(warmup_ratio=None, warmup_steps=10),
                                      dict(deepspeed='zero2.json', fsdp=None, fsdp_config={}),
    dict(val_set_size=0, num_epochs=1, evals_per_epoch=None), dict(max_steps=300, num_epochs=2)])
def test_tokens_and_pairs_of_settings_that_are_right(settings):
    assert not alarms(elsewhere(config=AXOLOTL | settings)['model'])


@pytest.mark.parametrize('settings', [
    dict(num_generations=8, per_device_train_batch_size=1, gradient_accumulation_steps=1), # on 8 GPUs
    dict(num_generations=14, per_device_train_batch_size=16, use_vllm=True),               # 7 of 8, one serves
    dict(num_generations=4, per_device_train_batch_size=4, temperature=.6),
    dict(num_generations=16, generation_batch_size=64, per_device_train_batch_size=2)])
def test_groups_that_fit_raise_no_alarm(settings):
    args = dict(learning_rate=1e-6, model_name_or_path='a/b') | settings
    assert not alarms(elsewhere(args=args)['model'])


# what `to_dict` writes has every default, and what trl works out from others
DUMP = dict(adam_beta1=.9, adam_epsilon=1e-8, weight_decay=0., dataloader_drop_last=False,
            num_train_epochs=3., per_device_train_batch_size=8, learning_rate=1e-6,
            eval_strategy='steps')


@pytest.mark.parametrize('settings', [
    dict(num_generations=8, generation_batch_size=16, steps_per_generation=2),
    dict(max_steps=300), dict(beta=.5, lmbda=.5, packing=True)])
def test_settings_that_follow_from_others_exclude_nothing(settings):
    found = doctor(elsewhere(args=DUMP | settings)['model'])
    assert 'settings-exclude-each-other' not in found.names
    short = {k: v for k, v in DUMP.items() if k != 'adam_beta1'}
    if 'lmbda' not in settings: # written by hand, it is said
        by_hand = doctor(elsewhere(args=short | settings)['model'])
        assert 'settings-exclude-each-other' in by_hand.names


def preferred(seed, size=60):
    "Return a log of DPO as it should be, whose first entries are means of many steps, and so below ln 2"
    draw, rows = random.Random(seed), []
    for i in range(size):
        gain = 1 - math.exp(-(i + 1)/size/.05)
        margin = [draw.gauss(2.5*gain, 2.5*gain) for _ in range(4)]
        loss, wins = sum(math.log1p(math.exp(-m)) for m in margin)/4, sum(m > 0 for m in margin)/4
        rows.append({'step': 10*i + 10, 'epoch': i/size, 'loss': loss,
                     'rewards/margins': sum(margin)/4, 'rewards/accuracies': wins})
    return rows


def test_losses_of_preferences_that_swing_do_not_diverge_and_those_that_rise_do(tmp_path):
    seen = []
    for seed in range(40):
        rows = preferred(seed)
        (tmp_path/'trainer_state.json').write_text(json.dumps(dict(log_history=rows)))
        seen += {'loss-diverges', 'resume-jump', 'margins-fall'} & set(alarms(tmp_path))
    assert len(seen) <= 1, seen
    rows = [r | dict(loss=r['loss'] + max(0, i - 30)/10) for i, r in enumerate(preferred(0))]
    (tmp_path/'trainer_state.json').write_text(json.dumps(dict(log_history=rows)))
    assert {'loss-diverges', 'preference-diverged'} & set(alarms(tmp_path))


def test_a_template_that_trl_replaces_is_no_failure():
    trl = pytest.importorskip('trl')
    from ftlab.instruments.checks.vocabulary import replaced_by_trl
    folder = Path(trl.__file__).parent/'chat_templates'
    assert replaced_by_trl((folder/'qwen2_5.jinja').read_text()) and not replaced_by_trl('{{ messages }}')


@pytest.mark.parametrize('more', [
    dict(learning_rate={s: 1e-4*abs((s/50) % 2 - 1) for s in range(10, 310, 10)}),          # cycles
    dict(learning_rate={s: 1e-4*(1 - (s % 100)/100) for s in range(10, 310, 10)}),          # restarts at once
    dict(reward={s: .6 + .1*(-1)**(s//10) for s in range(10, 310, 10)}, evals={}),          # a flat reward
    dict(reward=dict.fromkeys(range(10, 310, 10), 1.), kl={s: s/3000 for s in range(10, 310, 10)},
         evals={}),
    {'rewards/margins': {s: s/200 for s in range(10, 310, 10)},
     'rewards/accuracies': {s: (.5, 1.)[s//10 % 2] for s in range(10, 310, 10)}}])
def test_more_logs_that_are_right_raise_no_alarm(more):
    assert not alarms(elsewhere(trainer_state=toy_log(**more))['model'])


def test_the_best_value_is_looked_for_among_all_that_was_evaluated():
    state = toy_log()
    for r in state['log_history'][-3:]:
        r['eval_accuracy'] = .9 if r['step'] == 200 else .8
    kept = dict(best_model_checkpoint='out/checkpoint-200')
    assert not alarms(elsewhere(trainer_state=state | kept | dict(best_metric=.9))['model'])
    assert alarms(elsewhere(trainer_state=state | kept | dict(best_metric=.8))['model']) == ['best-is-worst']
    assert alarms(elsewhere(trainer_state=state | kept | dict(best_metric=.5))['model']) == ['best-is-worst']
    assert not alarms(elsewhere(trainer_state=state | dict(best_metric=.5))['model']) # nothing says where


@pytest.mark.parametrize('before, after', [
    (dict(lora_r=4, lora_alpha=8), dict(lora_r=16, lora_alpha=32)),
                                           (dict(lora_alpha=8), dict(lora_alpha=2048)),
    (dict(lora_target_modules=['q_proj']), dict(lora_target_modules=['down_proj'])),
    (dict(train_on_inputs=False), dict(train_on_inputs=True)),
                                           (dict(learning_rate=1e-4), dict(learning_rate=1e-2))])
def test_the_dry_step_takes_over_what_the_settings_say(before, after):
    from ftlab.core.loading import load
    from ftlab.instruments.fixes import as_case, one_step
    base = saved()['base']
    case = Elsewhere(recognize(Path(elsewhere(config=AXOLOTL)['model'])), base, toy_rows(60))
    model, tok = load(base)
    lengths = dict(sequence_len=64)
    steps = [one_step(as_case(case, Config(AXOLOTL | lengths | more, 'axolotl'), model, tok))
             for more in (before, after)]
    assert steps[0] != steps[1]


def test_prompts_that_are_learned_change_the_dry_step():
    bad = elsewhere(config=AXOLOTL | dict(train_on_inputs=True, sequence_len=64,
                                          learning_rate=1e-3))
    t = doctor(**bad, base=saved()['base'], data=toy_rows(60), try_fix=True).tried
    t = next(x for x in t if x.name == 'prompts-learned')
    assert t.gone and t.without is not None and t.without != t.with_fix


def test_a_model_without_the_code_of_its_own_is_not_said_to_lack_parameters():
    given = saved(config=dict(auto_map=dict(AutoModel='x.Y')), tie_word_embeddings=False)
    assert 'weights-missing' not in alarms(given['model'])
    from ftlab.instruments.planted import toy_classifier, toy_tokenizer
    folder = Path(saved()['model']).parent/'classifier'
    model = toy_classifier()
    model.config.id2label = dict(enumerate('abc'))
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    assert not alarms(folder)


# ---------- rows that other trainers take

KTO = [dict(prompt=f'what is {i} ?', completion=f'it is {i}', label=i%3 == 0) for i in range(60)]
TOKENISED = [dict(input_ids=[5, 6, i + 7], attention_mask=[1, 1, 1], labels=[-100, -100, i + 7])
             for i in range(60)]
PROMPTED = [dict(prompt=f'what is {i} ?', solution=str(i)) for i in range(60)]


@pytest.mark.parametrize('rows, name', [(KTO, ''), (TOKENISED, ''), (PROMPTED, ''),
                                        ([r | dict(label=True) for r in KTO], 'labels-one-sided'),
                                        ([r | dict(labels=[-100]*3) for r in TOKENISED], 'tokens-without-labels'),
                                        ([dict(prompt='a', response=5)]*60, 'rows-unreadable')])
def test_rows_in_a_form_of_another_trainer_are_no_error(tmp_path, rows, name):
    (tmp_path/'r.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    assert alarms(saved()['base'], data=tmp_path/'r.jsonl') == ([name] if name else [])


def test_a_column_that_the_settings_name_is_read_by_the_trainer(tmp_path):
    lines = (json.dumps(dict(content=f'text {i}')) for i in range(60))
    (tmp_path/'r.jsonl').write_text('\n'.join(lines))
    for named, alarm in (('content', False), ('contents', True)):
        given = elsewhere(args=dict(dataset_text_field=named, learning_rate=1e-4,
                                    num_train_epochs=1))
        assert ('rows-unreadable' in alarms(given['model'], data=tmp_path/'r.jsonl')) == alarm


def test_few_test_rows_of_the_doctors_own_split_are_a_note(tmp_path):
    path = tmp_path/'r.jsonl'
    path.write_text('\n'.join(map(json.dumps, toy_rows(60))))
    assert 'few-test-rows' in doctor(saved()['base'], data=path).names
    assert 'few-test-rows' not in alarms(saved()['base'], data=path)
    given = dict(train=path, test=toy_rows(10, 500))
    assert 'few-test-rows' in alarms(saved()['base'], data=given)


@pytest.mark.parametrize('epochs, alarm', [(1, False), (2, True), (10, True)])
def test_an_evaluation_that_is_off_is_a_warning_only_where_rows_are_seen_often(epochs, alarm):
    off = elsewhere(args=dict(eval_strategy='no', learning_rate=1e-4, num_train_epochs=epochs))
    assert ('evaluation-off' in alarms(off['model'])) == alarm
    logged = elsewhere(trainer_state=toy_log(evals={}, epochs=epochs))
    assert ('evaluation-missing' in alarms(logged['model'])) == alarm


@pytest.mark.parametrize('entries, rate, alarm', [(5, 1e-4, False), (40, 1e-4, True),
                                                  (5, 2e-4, True), (5, 2e-5, True)])
def test_a_peak_that_is_soon_gone_is_no_resume(tmp_path, entries, rate, alarm):
    rows = [dict(step=10*i, loss=(2.5 if 30 <= i < 30 + entries else 1.3) + i%3/100,
                 learning_rate=1e-4 if i < 30 else rate) for i in range(1, 70)]
    (tmp_path/'trainer_state.json').write_text(json.dumps(dict(log_history=rows)))
    assert ('resume-jump' in alarms(tmp_path)) == alarm


def test_an_adapter_that_is_whole_raises_no_alarm():
    deeper = dict(base=saved_toy(num_hidden_layers=4))
    for given in (toy_adapter(layers_to_transform=[0, 1]) | deeper, toy_adapter(modules_to_save=[]),
                  toy_adapter() | dict(base=saved_toy()),
                  toy_adapter(peft_type='PROMPT_TUNING', num_virtual_tokens=8,
                              change=lambda t: {'prompt_embeddings': .1*torch.ones(8, 32)}),
                  toy_adapter(use_dora=True, change=lambda t: t | {
                      n.replace('lora_A.weight', 'lora_magnitude_vector'): torch.ones(32)
                      for n in t if 'lora_A' in n})):
        found = alarms(given.pop('model'), **given)
        asked = {'adapter-parts-lost', 'adapter-layers-missing', 'adapter-changes-nothing'}
        assert not asked & set(found), found
    assert 'adapter-layers-missing' in alarms(toy_adapter()['model'], **deeper)
    cut = Path(toy_adapter()['model'])
    file = cut/'adapter_model.safetensors'
    file.write_bytes(file.read_bytes()[:200])
    assert 'adapter-layers-missing' not in alarms(cut, **deeper)
