"What Python can read, the command line can name: the order of labels, and mixtures with their shares"

import argparse
import json

import pytest

import ftlab
from ftlab.cli import main
from ftlab.commands.given import mixture_of
from ftlab.instruments.report import read_run
from sums import labelled, rows, save_encoder, save_small


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp('options')
    save_small(d / 'lm')
    rows(d / 'new.jsonl', 50, ours=('q', 'a'))
    rows(d / 'old.jsonl', 59, ours=('q', 'a'))
    rows(d / 'test.jsonl', 7, ours=('q', 'a'))
    save_encoder(d / 'enc')
    labelled(d / 'labels.jsonl', 'no', 'yes')
    return d


def given(made, shares: str = 'new.jsonl=.8,old.jsonl=.2') -> list[str]:
    data = ','.join(f'{made}/{part}' for part in shares.split(','))
    return [f'--model={made}/lm', f'--data={data}', '--columns=prompt=q,response=a']


def test_a_run_on_a_mixture_is_that_of_python_and_is_reported_from_its_folder(
    made, tmp_path, capsys
):
    out = tmp_path / 'run'
    assert (
        main(
            [
                'fit',
                *given(made),
                '--steps=2',
                f'--out={out}',
                f'--eval={made}/test.jsonl',
                '--json',
            ]
        )
        == 0
    )
    record = json.loads(capsys.readouterr().out)
    how = dict(columns=dict(prompt='q', response='a'))
    mixed = ftlab.mix(
        {
            'new': (ftlab.data(made / 'new.jsonl', test=made / 'test.jsonl', **how), 0.8),
            'old': (ftlab.data(made / 'old.jsonl', **how), 0.2),
        }
    )
    assert record['settings']['data'] == mixed.fingerprint and len(mixed.test) == 7
    assert record['mixture'] == {f'{made}/new.jsonl': 0.8, f'{made}/old.jsonl': 0.2}
    assert json.loads((out / 'run.json').read_text())['mixture'] == record['mixture']
    assert read_run(out).data.fingerprint == mixed.fingerprint
    assert main(['report', str(out), '--items=4', '--matrices=0']) == 0
    changed = (made / 'old.jsonl').read_text()
    (made / 'old.jsonl').write_text(changed.replace('1 plus', '2 plus'))
    try:
        assert main(['report', str(out), '--items=4']) == 1
        assert 'no longer those of the run' in capsys.readouterr().err
    finally:
        (made / 'old.jsonl').write_text(changed)


def test_compare_and_doctor_take_a_mixture(made, tmp_path, capsys):
    main(['doctor', *given(made), '--steps=2', '--json'])
    assert json.loads(capsys.readouterr().out)
    assert (
        main(
            [
                'compare',
                *given(made),
                '--methods=full',
                '--no-tune',
                '--lrs=1e-3',
                '--seeds=1',
                '--steps=1',
                '--items=3',
                f'--out={tmp_path}',
                '--json',
                '--quiet',
            ]
        )
        == 0
    )
    c = json.loads(capsys.readouterr().out)
    assert c['data'] == '80% new.jsonl + 20% old.jsonl' and c['protocol']['train'] < 59


def test_a_lab_skill_in_a_mixture_brings_its_own_columns(tmp_path):
    made = ftlab.data('new-procedure', n=60)
    lines = [
        json.dumps(dict(q=r['prompt'], a=r['response']))
        for r in made.train + made.validation + made.test
    ]
    (tmp_path / 'mine.jsonl').write_text('\n'.join(lines))
    from ftlab.core.mix import read_mix

    found = read_mix(
        {str(tmp_path / 'mine.jsonl'): 0.9, 'sort': 0.1}, columns=dict(prompt='q', response='a')
    )
    assert found.counts['mixed']['sort'] == round(len(found.train) / 10)


def test_labels_keep_the_order_given(made, tmp_path, capsys):
    ask = [f'--model={made}/enc', f'--data={made}/labels.jsonl']
    assert (
        main(['fit', *ask, '--labels=yes,no,perhaps', '--steps=1', f'--out={tmp_path}', '--json'])
        == 0
    )
    record = json.loads(capsys.readouterr().out)
    assert record['labels'] == record['label_order'] == ['yes', 'no', 'perhaps']
    run = read_run(tmp_path)
    assert run.data.labels == ['yes', 'no', 'perhaps'] and run.model.config.num_labels == 3
    assert main(['fit', *ask, '--labels=yes,nope', '--steps=1', f'--out={tmp_path}/2']) == 1
    assert "label is 'no', which the given labels do not have" in capsys.readouterr().err
    assert (
        main(['fit', f'--model={made}/lm', '--data=sort', '--labels=a,b', f'--out={tmp_path}/3'])
        == 1
    )
    assert 'lab skill' in capsys.readouterr().err


@pytest.mark.parametrize(
    'text, found',
    [
        ('a.jsonl', None),
        ('a=.5,b=.5', {'a': 0.5, 'b': 0.5}),
        ('run=3/x.jsonl=.9,sort=.1', {'run=3/x.jsonl': 0.9, 'sort': 0.1}),
    ],
)
def test_a_mixture_is_read(text, found):
    assert mixture_of(argparse.Namespace(data=text)) == found


def test_a_path_that_exists_is_one_source(tmp_path):
    rows(tmp_path / 'lr=1,x=2')
    assert mixture_of(argparse.Namespace(data=str(tmp_path / 'lr=1,x=2'))) is None


@pytest.mark.parametrize(
    'shares, said',
    [
        ('new.jsonl=.8,old.jsonl', 'without a share'),
        ('new.jsonl=.8,new.jsonl=.2', 'twice'),
        ('new.jsonl=.8,old.jsonl=.8', 'their sum 1'),
        ('new.jsonl=.9', 'their sum 1'),
        ('new.jsonl=nan,old.jsonl=.1', 'share'),
    ],
)
def test_a_wrong_mixture_is_an_error(made, tmp_path, capsys, shares, said):
    assert main(['fit', *given(made, shares), f'--out={tmp_path}']) == 1
    err = capsys.readouterr().err
    assert said in err and err.count('\n') == 1
