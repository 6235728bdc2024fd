"What a run of the tests covers: by imports, by names, by the day"
import datetime
import json
import subprocess
from pathlib import Path

import affected
import pytest
import run
from affected import FEW, TURNS, Sources, changed_since, key_of, select, turn

FILES = {
    'ftlab/__init__.py': "_PUBLIC = dict(\n    fit=('ftlab.trainers.loop', 'fit'), methods=('ftlab.methods', None))",
    'ftlab/methods.py': 'from .trainers.losses.one import one\nfrom .trainers.losses.two import '
                        'two\nfrom .adapters.subsets.half_it import half_it',
    'ftlab/core/recipe.py': 'import os', 'ftlab/trainers/loop.py': 'def fit():\n    from ..core.recipe import Recipe',
    'ftlab/trainers/objective.py': '', 'ftlab/trainers/unused.py': '',
    'ftlab/native/__init__.py': 'import importlib\ndef __getattr__(n): return importlib.import_module(n)',
    'ftlab/native/noise.py': '',
    'ftlab/trainers/losses/one.py': 'from ..objective import nll\nfrom ...native import noise_',
    'ftlab/trainers/losses/two.py': 'from .one import weight',
    'ftlab/adapters/subsets/half_it.py': 'from ...core.recipe import Recipe',
    'tests/test_contract.py': 'import toys\nfrom ftlab.methods import get\nfrom ftlab.trainers.losses.one import one',
    'tests/test_one.py': 'import helper', 'tests/helper.py': '', 'tests/test_fit.py': 'import toys',
    'tests/toys.py': 'from ftlab.core.recipe import Recipe',
    'claims/half_it/claim.py': 'import banks',
    'claims/half_it/claim.toml': 'arms = {a = "half_it", b = "two"}',
    'claims/half_it/result.json': '{}', 'bench/banks.py': '', 'bench/results/speed.json': '{}',
    'settings.ini': '', 'README.md': '', 'ftlab/csrc/x.cu': '',}
CELLS = {'nbs/trainers/losses/one.ipynb': ['%matplotlib inline\nimport ftlab', 'ftlab.fit()'],
         'nbs/trainers/losses/two.ipynb': ['from ftlab import fit', 'json.load(open("bench/results/speed.json"))'],
         'nbs/adapters/subsets/half_it.ipynb': ['1'], 'nbs/adapters/subsets/index.ipynb': ['1'],
         'nbs/trainers/loop.ipynb': ['1'],}


@pytest.fixture
def project(tmp_path) -> Path:
    for name, text in FILES.items():
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text(text)
    for name, cells in CELLS.items():
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        nb = dict(cells=[dict(cell_type='code', source=[c]) for c in cells])
        (tmp_path/name).write_text(json.dumps(nb))
    return tmp_path


def sources(root: Path) -> Sources:
    return Sources(root, sorted(p.relative_to(root).as_posix()
                                for p in root.rglob('*') if p.is_file() and '.git' not in p.parts))


@pytest.mark.parametrize('file, keys', [
    ('ftlab/trainers/losses/one.py', 'one two half_it'),  # two imports it, and half_it's claim compares itself with two
    ('ftlab/trainers/losses/two.py', 'two half_it'),
    ('ftlab/adapters/subsets/half_it.py', 'half_it'),
    ('ftlab/trainers/objective.py', 'one two half_it'),
    ('ftlab/trainers/loop.py', 'one two'),  # by `ftlab.fit` and `from ftlab import fit`
    ('ftlab/core/recipe.py', 'one two half_it'),
    ('ftlab/trainers/unused.py', ''),
    ('ftlab/native/noise.py', 'one two half_it'),  # a package that imports its modules on first use
    ('nbs/trainers/losses/one.ipynb', 'one'),
    ('nbs/trainers/loop.ipynb', ''),
    ('claims/half_it/claim.toml', 'half_it'), ('claims/half_it/result.json', 'half_it'), ('bench/banks.py', 'half_it'),
    ('bench/results/speed.json', 'two'),
    ('tests/test_one.py', 'one'), ('tests/helper.py', 'one'), ('tests/test_fit.py', ''),
    ('tests/toys.py', 'one two half_it'), ('tests/test_contract.py', 'one two half_it'),
    ('ftlab/methods.py', 'one two half_it'),
    ('settings.ini', 'one two half_it'), ('ftlab/csrc/x.cu', 'one two half_it'),
    ('ftlab/trainers/gone.py', 'one two half_it'),
    ('README.md', ''), ('docs/build.py', ''), ('nbs/gone.ipynb', '')])
def test_what_a_change_touches(project, file, keys):
    assert sources(project).touched([file])[0] == set(keys.split())


def test_the_papers_here_are_told_apart_from_the_library():
    here = Sources()
    assert (len(here.papers) >= 24 and here.papers['hft'] == 'adapters/subsets/hft.ipynb'
            and set(here.by_key) == {affected.plain(k) for k in here.papers})
    assert key_of('adapters/delta.ipynb') is key_of('index.ipynb') is key_of(
        'adapters/subsets/index.ipynb') is key_of('instruments/checks/rows.ipynb') is None
    loop = here.touched(['ftlab/trainers/loop.py'])[0]
    assert loop == set(here.papers), 'every contract trains'
    spin = here.touched(['nbs/trainers/rl/spin.ipynb'])[0]
    assert (spin == {'spin'} and 'spin' in here.touched(['ftlab/trainers/rl/dpo.py'])[0]
            and 'elm' not in here.touched(['ftlab/trainers/rl/spin.py'])[0])


def test_a_turn_comes_once_in_ten_days_and_hangs_on_the_key_alone():
    first = datetime.date(2026, 1, 1)
    days = [first + datetime.timedelta(d) for d in range(TURNS)]
    keys = [f'paper_{i}' for i in range(300)]
    assert all(sum(turn(k, d) for d in days) == 1 for k in keys)
    assert all(15 <= sum(turn(k, d) for k in keys) <= 45 for d in days)


def test_few_papers_all_run_and_many_only_what_changed_and_a_tenth(project, monkeypatch):
    git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b']
    for command in (['init', '-q'], ['add', '-A'], ['commit', '-qm', 'x']):
        subprocess.run([*git, *command], cwd=project, check=True)
    everything = {'one', 'two', 'half_it'}
    never = next(d for d in map(datetime.date.fromordinal, range(1, 11))
                 if not any(turn(k, d) for k in everything))

    def ask(*arguments, day=never):
        return select(sources(project), *arguments, day=day).keys

    assert (FEW == 100 and ask() == everything and ask(False, 'HEAD') == set()
            and ask(True, 'HEAD') == everything)
    monkeypatch.setattr(affected, 'FEW', 2)
    assert ask() == set() and ask(True) == everything and ask(False, 'no-such-commit') == everything
    for d in map(datetime.date.fromordinal, range(1, 11)):
        assert ask(day=d) == {k for k in everything if turn(k, d)}
    (project/'ftlab/trainers/losses/two.py').write_text('changed = 1')
    assert ask() == {'two', 'half_it'}
    subprocess.run([*git, 'commit', '-qam', 'y'], cwd=project, check=True)
    assert ask() == set() and ask(False, 'HEAD^') == {'two', 'half_it'}
    (project/'nbs/adapters/subsets/new_one.ipynb').write_text(json.dumps(dict(cells=[])))
    assert (ask() == {'new_one'} and changed_since('HEAD^', project)
            == ['ftlab/trainers/losses/two.py', 'nbs/adapters/subsets/new_one.ipynb'])
    (project/'ftlab/trainers/losses/two.py').unlink()
    assert ask() == everything | {'new_one'}, 'who needed a module that is gone cannot be asked'


TELLS = """import os, time, pytest

@pytest.mark.parametrize('i', range(6))
def test(i):
    time.sleep(.02)
    with open(__file__ + '.said', 'a') as f:
        f.write(os.environ['PYTEST_XDIST_WORKER'] + ' ')
"""

def test_the_tests_of_one_file_share_a_process(tmp_path):
    "They share its fixtures, and some cost half a minute; a group that xdist does not see costs nothing but time"
    for name in 'abcd':
        (tmp_path/f'test_{name}.py').write_text(TELLS)
    command = [*run.PYTEST, '-n', '2', '-p', 'no:cacheprovider', '--rootdir', tmp_path, tmp_path]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    said = [p.read_text().split() for p in sorted(tmp_path.glob('*.said'))]
    assert [len(s) for s in said] == [6]*4 and [len(set(s)) for s in said] == [1]*4
    assert len({s[0] for s in said}) == 2, 'both processes work'
