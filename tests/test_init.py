"ftlab init: a notebook for any paths and names, which runs from top to bottom and destroys nothing"

import json
import re
import threading
from pathlib import Path

import nbformat
import pytest

from ftlab.cli import main
from ftlab.commands.init import from_notebook
from ftlab.instruments.compare import effort, plan
from sums import labelled, rows, save_encoder, save_small

ODD = "o'd \"d$(touch x);ä #{n}\\"  # a folder's name that a shell, a string or a template might take for code


@pytest.fixture(scope='module')
def small(tmp_path_factory) -> Path:
    return save_small(tmp_path_factory.mktemp('small'))


def run(path: Path, again: int = 0, method: str | None = None, steps: int = 2) -> dict:
    "Execute the code of a notebook with little training, in its own folder, its last cells `again`; its names"
    small = [
        (r'STEPS = \d+', f'STEPS = {steps}'),
        ('MAX_RUNS = 12', 'MAX_RUNS = 4'),
        (r'items=50', 'items=3'),
        ('old_items=10', 'old_items=1'),
        ('seeds=1,', 'seeds=1, validation_items=3, old_validation_items=1,'),
        ("'--old-items=10'", "'--old-items=1'"),
        ('matrices=8', 'matrices=0'),
        ("'full', 'hft', 'lora'", "'full', 'hft'"),
        ('METHOD = None', f'METHOD = {method!r}'),
    ]
    space = {}
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'code']
    for cell in cells + cells[-2:] * again:
        source = cell.source
        for old, new in small:
            source = re.sub(old, new, source)
        exec(compile(source, cell.id, 'exec'), space)
    return space


def test_runs_on_a_lab_skill_twice_and_removes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['init', '--model', 'lab-s', '--data', 'new-procedure']) == 0
    nb = nbformat.read('start.ipynb', as_version=4)
    nbformat.validate(nb)
    for name in ('tuned', 'tuned-1'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'mine.txt').write_text('kept')
    # after two steps no method has gained anything, so none is chosen unless it is named
    space = run(tmp_path / 'start.ipynb', again=1, method='hft')
    assert space['run'].recipe.name == 'hft' and (tmp_path / 'tuned-2/README.md').exists()
    assert space['folder'] == Path('tuned-3') and (tmp_path / 'tuned-2/model.safetensors').exists()
    assert (
        (tmp_path / 'tuned/mine.txt').read_text()
        == (tmp_path / 'tuned-1/mine.txt').read_text()
        == 'kept'
    )
    assert {x.name for x in (tmp_path / 'ftlab-runs/start').iterdir()} == {
        'compare',
        'report-1',
        'run-1',
    }
    found = re.findall(r'(\d+) runs and (\d+) to tune', capsys.readouterr().out)
    runs, tuning = found[0]
    asked = effort(plan(['full', 'hft'], None), 1, 4)
    assert len(found) == 2 and (2 * int(runs), 2 * int(tuning)) == (asked['test'], asked['tuning'])
    assert space['found'].result['runs']['made'] <= 4, 'what the dry run said is what was run'
    text = '\n'.join(c.source for c in nb.cells)
    assert 'ftlab.show(' in text and text.count('=MAX_RUNS') == text.count('={MAX_RUNS}') == 1
    assert not re.search('rmtree|unlink|remove|rmdir|!|%', text.replace("'{", ''))
    assert text.count('ftlab.doctor(') == 1


def test_runs_on_forty_rows_of_ones_own_in_a_folder_of_any_name(
    small, tmp_path, monkeypatch, capsys
):
    rows(tmp_path / ODD / 'daten ü.jsonl', ours=('frage', "ant'wort"))
    rows(tmp_path / ODD / 'test.jsonl', 8, ours=('frage', "ant'wort"))
    monkeypatch.chdir(tmp_path)
    out = Path('notes') / ODD / 'start.ipynb'
    given = ['--columns', "prompt=frage,response=ant'wort", '--eval', f'{ODD}/test.jsonl']
    assert (
        main(
            [
                'init',
                '--model',
                str(small),
                '--data',
                f'{ODD}/daten ü.jsonl',
                *given,
                '--out',
                str(out),
            ]
        )
        == 0
    )
    monkeypatch.chdir(out.parent)
    space = run(Path('start.ipynb'), steps=12)
    assert space['run'].recipe.name == space['found'].winner().method
    assert space['fits'] and len(space['data'].test) == 8 and space['folder'] == Path('tuned-1')
    assert not (tmp_path / 'x').exists() and not Path('x').exists()


def test_runs_on_labels(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    labelled(Path('labels.jsonl'), 'a', 'b')
    save_encoder(Path('models/mine'))
    assert (
        main(
            ['init', '--model', 'models/mine', '--data', 'labels.jsonl', '--out', 'nb/first.ipynb']
        )
        == 0
    )
    assert "'../models/mine'" in Path('nb/first.ipynb').read_text()
    monkeypatch.chdir('nb')
    assert run(Path('first.ipynb'), method='full')['data'].labels == ['a', 'b']


def test_two_notebooks_of_one_folder_write_into_folders_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ('x', 'y'):
        assert main(['init', '--model', 'lab-s', '--data', 'sort', '--out', f'{name}.ipynb']) == 0
        text = Path(f'{name}.ipynb').read_text()
        assert f"OUT = Path('ftlab-runs', '{name}')" in text and 'ftlab-runs/' not in text
        assert text.count("OUT/'compare'") == text.count("OUT/'report'") == 1


def test_a_path_leads_back_from_a_folder_that_is_a_link(tmp_path, monkeypatch):
    (tmp_path / 'real/deep').mkdir(parents=True)
    (tmp_path / 'link').symlink_to('real/deep')
    (tmp_path / 'blob').write_text('x')
    (tmp_path / 'rows.jsonl').symlink_to('blob')
    monkeypatch.chdir(tmp_path)
    assert from_notebook('rows.jsonl', Path('link/a.ipynb')) == '../../rows.jsonl'
    monkeypatch.chdir(tmp_path / 'link')
    assert Path('../../rows.jsonl').read_text() == 'x'


def test_a_file_named_like_a_skill_stays_a_file(tmp_path, monkeypatch, capsys):
    rows(tmp_path / 'sort/train.jsonl')
    monkeypatch.chdir(tmp_path)
    for name, said in (
        ('./sort', "DATA = './sort'"),
        ('sort', "DATA = 'sort'"),
        (str(tmp_path / 'sort'), "DATA = './sort'"),
    ):
        assert (
            main(['init', '--model', 'lab-s', '--data', name, '--out', f'{len(name)}.ipynb']) == 0
        )
        source = nbformat.read(f'{len(name)}.ipynb', as_version=4).cells[1].source
        assert said in source.splitlines()


def test_model_and_rows_are_tried_first(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    turns = [dict(role='user', content='1 plus'), dict(role='assistant', content='2')]
    Path('chat.jsonl').write_text(
        ''.join(
            json.dumps(dict(messages=[dict(turns[0], content=f'{i} plus'), turns[1]])) + '\n'
            for i in range(40)
        )
    )
    for model, data, said in (
        ('./nowhere', 'sort', 'nowhere'),
        ('', 'sort', '--model is empty'),
        (str(small), 'chat.jsonl', 'chat template'),
    ):
        assert main(['init', '--model', model, '--data', data]) == 1
        err = capsys.readouterr().err
        assert said in err and err.count('\n') == 1
    assert not list(tmp_path.glob('*.ipynb'))


def test_what_exists_is_never_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('start.ipynb').write_text('mine')
    assert main(['init', '--model', 'lab-s', '--data', 'new-procedure']) == 1
    assert Path('start.ipynb').read_text() == 'mine'
    assert 'exists, and is never overwritten' in capsys.readouterr().err
    codes = []
    both = [
        threading.Thread(
            target=lambda: codes.append(
                main(['init', '--model', 'lab-s', '--data', 'new-procedure', '--out', 'a.ipynb'])
            )
        )
        for _ in range(2)
    ]
    for t in both:
        t.start()
    for t in both:
        t.join()
    assert sorted(codes) == [0, 1]


@pytest.mark.parametrize(
    'options, said',
    [
        (['--data', 'nowhere.jsonl'], 'there is no file nowhere.jsonl'),
        (['--data', 'new-procedure', '--out', 'start.txt'], 'ending .ipynb'),
        (['--data', 'few.jsonl'], 'gives no validation row'),
    ],
)
def test_says_what_is_wrong(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    Path('few.jsonl').write_text(
        ''.join(json.dumps(dict(prompt=f'{i} plus', response='1')) + '\n' for i in range(2))
    )
    assert main(['init', '--model', 'lab-s', *options]) == 1
    err = capsys.readouterr().err
    assert said in err and err.count('\n') == 1
    assert not list(tmp_path.glob('*.ipynb'))
