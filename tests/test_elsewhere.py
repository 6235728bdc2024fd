"A fine-tune that another program made gets the same report as the run that it is a copy of"
import json
import shutil

import pytest
import torch
from toys import TOK, classifier, lab_data, same, toy, weights

import ftlab.evaluators.old_sets as olds
from ftlab.adapters.lowrank import to_peft
from ftlab.adapters.modules.lora import lora
from ftlab.cli import main
from ftlab.core.data import data
from ftlab.core.recipe import Recipe
from ftlab.instruments.elsewhere import read_tuned, resized
from ftlab.instruments.report import report
from ftlab.trainers.fit import fit

SMALL = dict(items=12, old_items=3, rows=30, matrices=8)


@pytest.fixture(autouse=True)
def _fewer(monkeypatch):
    monkeypatch.setattr(olds, 'old_skills', lambda data, tok=None: ['fact', 'sort', 'tavi'])


def save(model, folder, tok=TOK):
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def made(tmp_path, recipe=None, model=None, **more):
    "Save a base, tune it, and write the tuned model as a whole folder"
    base = save(model or toy(), tmp_path/'base')
    run = fit(model or toy(), TOK, lab_data(), recipe or Recipe('full'),
              **dict(steps=8, lr=1e-2, batch_size=8, progress=False) | more)
    return base, run, run.export(tmp_path/'whole')


def close(a, b, name=''):
    "Assert that two parts of a report are the same to 1e-5"
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for k in a:
            close(a[k], b[k], f'{name}.{k}')
    elif isinstance(a, list):
        assert len(a) == len(b), name
        for i, (x, y) in enumerate(zip(a, b)):
            close(x, y, f'{name}[{i}]')
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=1e-5), name
    else:
        assert a == b, name


MEASURED = ('sets', 'forgetting', 'new', 'old', 'flips', 'tuco')
SPECTRUM = ('stable_rank', 'top', 'length', 'relative', 'examined')


@pytest.mark.parametrize('form', ['whole', 'peft'])
def test_the_report_of_a_copy_is_the_report_of_the_run(form, tmp_path):
    base, run, folder = made(tmp_path, lora(r=2) if form == 'peft' else Recipe('full'))
    if form == 'peft':
        folder = to_peft(run.delta.attached, tmp_path/'peft', base=str(base))
    own = report(run, **SMALL).json()
    there = report(base=None if form == 'peft' else base, tuned=folder, data=lab_data(), **SMALL)
    foreign = json.loads(json.dumps(there.json(), allow_nan=False))
    close({k: own[k] for k in MEASURED}, {k: foreign[k] for k in MEASURED})
    close({k: own['change'][k] for k in SPECTRUM}, {k: foreign['change'][k] for k in SPECTRUM})
    assert own.keys() == foreign.keys() and own['version'] == foreign['version']
    assert own['unknown'] == {} and own['change']['length'] > 0
    assert set(foreign['unknown']) == {'recipe', 'seed', 'cost', 'log', 'rows', 'overlap'}
    assert foreign['cost']['steps'] is None
    page = there.body()
    assert 'Not known: whether test rows were among the training rows' in page and 'not known: recipe' in page


def test_the_base_of_an_adapter_is_said(tmp_path):
    base, run, _ = made(tmp_path, lora(r=2))
    folder = to_peft(run.delta.attached, tmp_path/'peft', base=str(base))
    got = read_tuned(folder, data=lab_data())
    assert f'the base is {base}, as adapter_config.json says' in got.notes
    assert got.cost['trainable'] == run.cost['trainable'] and 'recipe' in repr(got)
    config = json.loads((folder/'adapter_config.json').read_text())
    nameless = config | dict(base_model_name_or_path=None)
    (folder/'adapter_config.json').write_text(json.dumps(nameless))
    with pytest.raises(ValueError, match='names no base; give it: base='):
        read_tuned(folder, data=lab_data())


def test_what_peft_alone_can_read_is_merged(tmp_path):
    peft = pytest.importorskip('peft')
    base = save(toy(), tmp_path/'base')
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=['q_proj', 'v_proj'], use_dora=True,
                             init_lora_weights=False)
    net = peft.get_peft_model(toy(), config)
    net.save_pretrained(tmp_path/'dora')
    got = read_tuned(tmp_path/'dora', base, lab_data())
    x = TOK('shift : a b c =', return_tensors='pt').input_ids
    with torch.no_grad():
        assert torch.allclose(got.model(x).logits, net.eval()(x).logits, atol=1e-5)
        with got.disabled():
            assert torch.equal(got.model(x).logits, toy()(x).logits)
    assert any('use_dora' in n and 'peft merged it' in n for n in got.notes)
    assert len(got.delta.attached.whole) == 4
    (tmp_path/'dora'/'adapter_model.safetensors').rename(tmp_path/'dora'/'adapter_model.bin')
    with pytest.raises(ValueError, match='dora'):
        read_tuned(tmp_path/'dora', base, lab_data())


@pytest.mark.parametrize('rows', [+8, -2])
def test_of_a_resized_embedding_the_shared_rows_are_compared(rows, tmp_path):
    base, run, _ = made(tmp_path)
    n = len(TOK)
    run.delta.attached.fold()
    run.model.resize_token_embeddings(n + rows)
    folder = save(run.model, tmp_path/'resized')
    if rows < 0: # the tokenizer has no token there
        assert resized(toy(), n + rows, {}).startswith(f'the embedding has {n} rows in the base')
        return
    got = read_tuned(folder, base, lab_data())
    assert any(f'the {n} that both have are compared' in note for note in got.notes)
    before, after = got.delta.attached.weight('model.embed_tokens.weight')
    assert torch.equal(before[n:], after[n:]) and not torch.equal(before[:n], after[:n])
    assert torch.equal(before[:n], toy().model.embed_tokens.weight)


def test_a_classifier_with_a_head_that_its_base_lacks(tmp_path):
    base = save(classifier().bert, tmp_path/'base')
    rows = [dict(text=r['prompt'], label='abc'[i % 3]) for i, r in enumerate(lab_data().train)]
    labelled = data(dict(train=rows[:100], validation=rows[100:120], test=rows[120:150]))
    run = fit(classifier(), TOK, labelled, Recipe('full'), steps=4, lr=1e-3, batch_size=8,
              progress=False)
    got = read_tuned(run.export(tmp_path/'whole'), base, labelled)
    assert 'head' in got.unknown and report(got, items=10, matrices=0).json()['kind'] == 'label'


def test_an_unchanged_folder_says_so(tmp_path):
    base = save(toy(), tmp_path/'base')
    shutil.copytree(base, tmp_path/'copy')
    got = report(base=base, tuned=tmp_path/'copy', data=lab_data(), **SMALL).json()
    assert got['change']['length'] == 0 and any('nothing was changed' in n for n in got['notes'])


def test_the_base_stays_what_it_was(tmp_path):
    base, run, folder = made(tmp_path)
    got = read_tuned(folder, base, lab_data())
    with got.disabled():
        assert same(weights(got.model), weights(toy()))


def another_tokenizer():
    vocab = TOK.get_vocab()
    a, b = sorted(vocab, key=vocab.get)[50:52]
    text = TOK.backend_tokenizer.to_str()
    text = json.loads(text)
    text['model']['vocab'][a], text['model']['vocab'][b] = vocab[b], vocab[a]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(text)),
                                   pad_token='<pad>', eos_token='<eos>')


def broken():
    model = toy(1)
    model.model.norm.weight.data[0] = float('nan')
    return model


@pytest.mark.parametrize('model, tok, says', [
    (lambda: toy(1, hidden=64), TOK, 'so no difference can be taken: .*; name the base that the tuned'),
    (lambda: toy(1, tied=False), TOK, 'the base lacks lm_head.weight; name the base that'),
    (broken, TOK, 'NaN or infinite, in model.norm.weight'),
    (lambda: toy(1), another_tokenizer(), 'different tokenizers: 2 tokens have other numbers')])
def test_models_that_cannot_be_compared_are_refused_with_the_reason(model, tok, says, tmp_path):
    base, folder = save(toy(), tmp_path/'base'), save(model(), tmp_path/'tuned', tok)
    with pytest.raises(ValueError, match=says):
        read_tuned(folder, base, lab_data())


def test_what_holds_no_adapter_needs_a_base():
    with pytest.raises(ValueError, match=r'nowhere is no folder with an adapter_config.json.*base= \(--base\)'):
        read_tuned('nowhere', data=lab_data())


def test_half_of_the_arguments_is_refused(tmp_path):
    for given in (dict(base='lab-s'), dict(run='x', tuned='y', data='z')):
        with pytest.raises(ValueError, match='give either a run'):
            report(**given)
    with pytest.raises(ValueError, match='--data'):
        report(base='lab-s', tuned=str(tmp_path))


def test_the_command_writes_the_report(tmp_path, capsys):
    base, run, folder = made(tmp_path)
    every = lab_data().train[:40] + lab_data().test
    rows = [dict(prompt=r['prompt'], response=r['response']) for r in every]
    file = tmp_path/'rows.jsonl'
    file.write_text('\n'.join(map(json.dumps, rows)))
    asked = ['report', '--base', str(base), '--tuned', str(folder), '--data', str(file),
             '--items', '5', '--old-items', '2', '--matrices', '0']
    assert main([*asked, '--out', str(tmp_path/'out'), '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['unknown']['rows']
    assert found == json.loads((tmp_path/'out'/'report.json').read_text())
    assert main(asked) == 1 and '--out' in capsys.readouterr().err
    assert main([*asked, '--out', 'x', '--delta', 'y']) == 1
    assert 'leave out --delta' in capsys.readouterr().err
    assert main(['report', '--base', 'lab-s']) == 1
    assert '--tuned is missing' in capsys.readouterr().err


def test_an_adapter_that_peft_cannot_place_is_refused(tmp_path):
    pytest.importorskip('peft')
    from safetensors.torch import load_file, save_file
    base, run, _ = made(tmp_path, lora(r=2))
    folder = to_peft(run.delta.attached, tmp_path/'peft', base=str(base))
    file = folder/'adapter_model.safetensors'
    tensors = load_file(file)
    wrapped = {n.replace('.model.model.', '.model._orig_mod.model.'): t for n, t in tensors.items()}
    save_file(wrapped, file, metadata=dict(format='pt'))
    with pytest.raises(ValueError, match='peft cannot place'):
        read_tuned(folder, data=lab_data())
    zero = {n: t*0 if '.lora_B' in n else t for n, t in tensors.items()}
    save_file(zero, file, metadata=dict(format='pt'))
    assert any('nothing was changed' in n for n in read_tuned(folder, data=lab_data()).notes)
