"The project as a whole: exports, pages, stored outputs, imports, metadata, the wheel"
import importlib, json, os, re, subprocess, sys
from configparser import ConfigParser
from itertools import takewhile
from pathlib import Path
import pytest
from imports import broken, circular_imports, crossing_privates, known, modules, wrong_imports
from pages import NBS, ROOT, cells, copy_project, exports, ordered, pages, project_files
from readme import readme
import shared

SETTINGS = ConfigParser(delimiters=['='])
SETTINGS.read(ROOT/'settings.ini', encoding='utf-8')
SETTINGS = SETTINGS['DEFAULT']

def python(*args, cwd, **env) -> str:
    """Run this Python with `args` in `cwd`; its output,
    or a failure that shows everything that it said"""
    r = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env={**os.environ, **env},
                       capture_output=True, text=True)
    assert r.returncode == 0, f'{r.stdout}\n{r.stderr}'
    return r.stdout

# --- exports

def test_no_export_is_stale(tmp_path):
    """Made again from the notebooks, every module is what it is: none differs, is missing,
    or has lost its notebook"""
    copy = copy_project(tmp_path/'copy')
    read = lambda lib: {p.relative_to(lib).as_posix(): p.read_text(encoding='utf-8')
                        for p in lib.rglob('*.py')}
    for p in (copy/'ftlab').rglob('*.py'):
        if p not in (copy/'ftlab'/'__init__.py', copy/'ftlab'/'__main__.py'):
            p.unlink()  # those two are written by hand
    python('-c', 'from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()', cwd=copy)
    ours, fresh = read(ROOT/'ftlab'), read(copy/'ftlab')
    stale = sorted(k for k in {*ours, *fresh} if ours.get(k) != fresh.get(k))
    assert not stale, f'stale: {stale}; run nbdev-export'

def test_two_notebooks_never_share_a_module():
    homes = {}
    for page in pages():
        for module in exports(cells(page)):
            homes.setdefault(module, []).append(page)
    assert homes, 'no page exports anything'
    shared = {m: p for m, p in homes.items() if len(p) > 1}
    assert not shared, f'these overwrite each other: {shared}'

# --- the direction of imports

@pytest.mark.parametrize('rule', ['direction', 'circles', 'private'])
def test_imports_keep_the_rules(rule):
    """What broke a rule before this test was written is counted and named; nothing is added,
    and what is gone leaves the list"""
    found, allowed = broken(ROOT/'ftlab')[rule], known()[rule]
    assert not (new := sorted(set(found) - set(allowed))), '\n'.join(new)
    assert not (gone := sorted(set(allowed) - set(found))), (
        'gone, so take it off the list (python tests/imports.py):\n' + '\n'.join(gone))

PACKAGE = {'ftlab': '', 'ftlab.lab.world': '', 'ftlab.core.recipe': '', 'ftlab.native.ops': '',
           'ftlab.adapters': '', 'ftlab.adapters.select': '',
           'ftlab.adapters.lowrank': 'class LoRA:\n    def __init__(self): self._base = 1\ndef _home(): pass',
           'ftlab.adapters.subsets': '', 'ftlab.adapters.subsets.hft': '',
           'ftlab.adapters.subsets.lift': '', 'ftlab.trainers': '', 'ftlab.trainers.loop': '',
           'ftlab.instruments.compare': '', 'ftlab.instruments.checks.rows': '',
           'ftlab.methods': '', 'ftlab.cli': '', 'ftlab.map': ''}

@pytest.mark.parametrize(
    'name, source, wrong',
    [('ftlab.lab.world', 'from ..adapters.select import pick', True),
     ('ftlab.core.recipe', 'from ..native.ops import kernel', True),
     ('ftlab.adapters.lowrank', 'def f():\n    from ..trainers import loop', True),
     ('ftlab.trainers.loop', 'from ..methods import hft', True),
     ('ftlab.trainers.loop', 'from ftlab import fit', True),
     ('ftlab.trainers.loop', 'import ftlab\nftlab.fit', True),
     ('ftlab.trainers.loop', 'import ftlab\nHERE = ftlab.__file__', False),
     ('ftlab.instruments.compare', 'from ..cli import main', True),
     ('ftlab.methods', 'from .map import CHAPTERS', True),
     ('ftlab.adapters.lowrank', 'from .subsets.hft import half', True),
     ('ftlab.methods', 'from .adapters.subsets.hft import hft', True),
     ('ftlab.cli', 'import ftlab.adapters.subsets.hft', True),
     ('ftlab.instruments.checks.rows', 'from ...adapters.subsets.hft import hft', True),
     ('ftlab.instruments.checks.rows', 'from ...cli import main', True),
     ('ftlab.instruments.checks.rows', 'from ..compare import compare\nfrom ...methods import get',
      False),
     ('ftlab.adapters.subsets.hft', 'from ...instruments.compare import compare', True),
     ('ftlab.adapters.subsets.hft', 'from ftlab import fit', True),
     ('ftlab.adapters.subsets.hft',
      'from ...trainers.loop import fit\nfrom .lift import lift\nfrom ..lowrank import LoRA\n'
      'from ...native.ops import kernel',
      False),
     ('ftlab.adapters.lowrank',
      'from .select import pick\nfrom ..core.recipe import Recipe\nfrom ..native.ops import kernel',
      False),
     ('ftlab.trainers.loop', 'from ..adapters.lowrank import LoRA\nimport torch', False),
     ('ftlab.cli', 'from .methods import get\nfrom ftlab.trainers.loop import fit\nfrom .map import main', False)])
def test_the_import_check_sees_what_it_should(name, source, wrong):
    "Held against small cases, as a checker that finds nothing looks like a clean project"
    assert bool(wrong_imports(PACKAGE | {name: source})) == wrong

@pytest.mark.parametrize(
    'changes, circle',
    [({'ftlab.lab.world': 'from ..core import recipe', 'ftlab.core.recipe': 'def f():\n    from ..lab.world import x'},
      ['modules in a circle: ftlab.core.recipe, ftlab.lab.world', 'parts in a circle: core, lab']),
     ({'ftlab.adapters.subsets.hft': 'from .lift import x', 'ftlab.adapters.subsets.lift': 'from .hft import y'},
      ['modules in a circle: ftlab.adapters.subsets.hft, ftlab.adapters.subsets.lift']),
     ({'ftlab.lab.world': 'from ..core import recipe', 'ftlab.adapters.subsets.hft': 'from .lift import x'}, [])])
def test_the_check_of_circles_sees_what_it_should(changes, circle):
    assert circular_imports(PACKAGE | changes) == circle

@pytest.mark.parametrize(
    'source, wrong',
    [('from ..adapters.lowrank import _home', ['ftlab.trainers.loop takes _home from ftlab.adapters.lowrank']),
     ('def f(layer): return layer._base', ['ftlab.trainers.loop reaches for ._base of ftlab.adapters.lowrank']),
     ('from ..adapters import lowrank\nlowrank._home()',
      ['ftlab.trainers.loop reaches for ._home of ftlab.adapters.lowrank']),
     ('class Own:\n    def __init__(self): self._base = 2\ndef f(o): return o._base', []),
     ('import torch\ndef f(x): return x.__dict__, x._version', [])])
def test_the_check_of_privates_sees_what_it_should(source, wrong):
    assert crossing_privates(PACKAGE | {'ftlab.trainers.loop': source}) == wrong

def test_every_name_is_used_and_defined():
    """What pyproject.toml asks of ruff, in package, pages, tests, benches and claims;
    `ruff check --fix` removes unused imports"""
    r = subprocess.run(
        [sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format', 'concise', '.'],
        cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr

# --- pages

def test_the_site_lists_every_page_once():
    listed = ordered()
    assert len(listed) == len(set(listed)), f'listed twice: {sorted({o for o in listed if listed.count(o) > 1})}'
    assert not (gone := sorted(set(listed) - set(pages()))), f'in _quarto.yml, but not there: {gone}'
    assert not (left := sorted(set(pages()) - set(listed))), f'not in _quarto.yml: {left}'

def test_the_site_is_one_file_seen_from_two_places():
    assert (NBS/'_quarto.yml').read_bytes() == (ROOT/'_quarto.yml').read_bytes()

MACHINE_PATH = re.compile(r'(?<![\w.-])/(?:work|tmp|root|home|Users|private|var/folders)/|\b[A-Za-z]:\\+Users\b')

def bad_outputs(cell:dict) -> list[str]:
    """What is wrong with a code cell's stored outputs: an error, a warning,
    a path of the machine that ran it"""
    found = []
    for o in cell.get('outputs', []):
        text = ''.join(o.get('text', [])) + ''.join(
            json.dumps(v, ensure_ascii=False) if isinstance(v, dict) else ''.join(v)
            for k, v in o.get('data', {}).items() if not k.startswith('image/')
            or k == 'image/svg+xml')
        if o['output_type'] == 'error':
            found.append(f'an error, {o["ename"]}')
        if o.get('name') == 'stderr' and 'Warning' in text:
            found.append(f'a warning, {text.strip().splitlines()[0]!r}')
        if m := MACHINE_PATH.search(text):
            found.append(f'a path of one machine, {text[m.start():m.start() + 40]!r}')
    return found

@pytest.mark.parametrize(
    'output, bad',
    [(dict(output_type='error', ename='ValueError', evalue='', traceback=[]), True),
     (dict(output_type='stream', name='stderr', text=['x.py:1: UserWarning: no\n']), True),
     (dict(output_type='stream', name='stdout', text=['saved in /home/ann/x\n']), True),
     (dict(output_type='execute_result', data={'text/plain': ["PosixPath('/tmp/x')"]}), True),
     (dict(output_type='execute_result', data={'text/html': ['<a href="file:///Users/ann">']}),
      True),
     (dict(output_type='execute_result', data={'text/plain': ["'C:\\\\Users\\\\ann'"]}), True),
     (dict(output_type='display_data', data={'image/png': 'abc/tmp/def=='}), False),
     (dict(output_type='execute_result', data={'text/plain': ['see https://example.org/home/ and nbs/tmp/']}), False)])
def test_the_output_check_sees_what_it_should(output, bad):
    assert bool(bad_outputs(dict(outputs=[output]))) == bad

def test_stored_outputs_are_fit_to_be_seen():
    bad = [f'{p}, cell {c.get("id")}: {o}' for p in pages()
           for c in cells(p) if c['cell_type'] == 'code' for o in bad_outputs(c)]
    assert not bad, '\n'.join(bad)

def test_readme_is_the_index_page():
    if not (NBS/'index.ipynb').exists():
        pytest.skip('no index page')
    text, images = readme(cells('index.ipynb'))
    stale = [n for n, data in {'README.md': text.encode(), **images}.items()
             if not (ROOT/n).exists() or (ROOT/n).read_bytes() != data]
    assert not stale, f'{stale} differ from nbs/index.ipynb; run make index'

# --- metadata and the wheel

def test_one_version():
    import ftlab
    assert ftlab.__version__ == SETTINGS['version']
    assert f'\n## {SETTINGS["version"]} ' in (ROOT/'CHANGELOG.md').read_text(encoding='utf-8'), (
        'the changelog does not know this version')

def moved_names() -> list[tuple[str, str]]:
    "(module, name there) of every name in the changelog's tables of old and new places"
    text = (ROOT/'CHANGELOG.md').read_text(encoding='utf-8').split(
        '### Where names are now')[1].split('\n## ')[0]
    rows = [[re.findall(r'`([\w.]+)`', cell) for cell in line.strip('|').split('|')]
            for line in text.splitlines() if line.startswith('| `')]
    found = [(new, name) for _, names, (new,) in (r for r in rows if len(r) == 3) for name in names]
    for _, (new,) in (r for r in rows if len(r) == 2):
        module = '.'.join(takewhile(str.islower, new.split('.')[:-1]))
        found.append((module, new.removeprefix(module + '.')))
    return found

def test_the_changelog_says_where_names_are():
    "Each new name imports, from the module that the table gives"
    found = moved_names()
    assert len(set(found)) > 200
    wrong = []
    for module, name in found:
        at = importlib.import_module(module)
        for part in name.split('.'):
            at = getattr(at, part, None)
        if at is None:
            wrong.append(f'{module} has no {name}')
    assert not wrong, '\n'.join(wrong)

@pytest.fixture(scope='session')
def installed(tmp_path_factory) -> Path:
    """A folder into which a wheel, built from a copy of the project, was installed:
    once for all processes"""
    from ftlab.native import extension
    home, nvcc = shared.folder(tmp_path_factory), extension.nvcc()
    env = shared.nvcc_once(home, nvcc) if nvcc else {}
    return shared.once(home, 'wheel', lambda tmp: install_wheel(tmp, env))/'site'

def install_wheel(tmp:Path, env:dict) -> None:
    "Build a wheel from a copy of the project, and install it into `tmp/site`"
    copy, pip = copy_project(tmp/'copy'), ('-m', 'pip', '--disable-pip-version-check', '-q')
    python(*pip, 'wheel', '--no-build-isolation', '--no-deps', '-w', tmp/'dist', copy, cwd=tmp,
           **env)
    wheel, = (tmp/'dist').glob('*.whl')
    assert wheel.name.startswith(f'ftlab-{SETTINGS["version"]}-')
    assert wheel.stat().st_size < 60e6
    python(*pip, 'install', '--no-deps', '--target', tmp/'site', wheel, cwd=tmp)

@pytest.mark.slow
def test_the_wheel_holds_what_the_project_holds(installed):
    shipped = {p for p in project_files() if p.parts[0] == 'ftlab'
               and (p.suffix == '.py' or p.parts[1] in ('checkpoints', 'data', 'csrc'))}
    assert Path('ftlab/_modidx.py') in shipped
    missing = sorted(str(p) for p in shipped if not (installed/p).exists()
                     or (installed/p).read_bytes() != (ROOT/p).read_bytes())
    assert not missing, f'not in the wheel, or not as here: {missing}'

def test_the_wheel_knows_the_verdicts_and_what_the_chapters_show(installed, tmp_path):
    "A chapter that is opened anywhere has them"
    asked = {m for p in NBS.rglob('*.ipynb')
             for m in re.findall(r"measured\('([\w./-]+\.json)'\)", p.read_text(encoding='utf-8'))
             if m != 'nope.json'}
    asked |= {f'lab_v1_skills_{m}.json' for m in ('lab-s', 'lab-m')} # a chapter names these by a variable
    asked |= {f'lab_v2_{x}.json' for x in ('skills_lab-l', 'race', 'log', 'shortcuts', 'checked')}
    assert (len(asked) >= 4
            and all((installed/'ftlab'/'data'/'results'/m).read_bytes()
                    == (ROOT/'bench'/'results'/m).read_bytes() for m in asked))
    assert (installed/'ftlab'/'data'/'papers'/'catalogue.jsonl').read_bytes() == (
        ROOT/'papers'/'catalogue.jsonl').read_bytes()
    code = ('import ftlab; from ftlab.papers import catalogue, claims, scoreboard; '
            'assert len(catalogue()) == 304; print(claims()[0].path); '
            'print(scoreboard().to_json())')
    where, board = python('-c', code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()[-2:]
    from ftlab.papers import scoreboard
    assert Path(where).is_relative_to(installed) and board == scoreboard().to_json()

@pytest.mark.slow
def test_the_wheel_works_from_another_folder(installed, tmp_path):
    """Every module imports, the command starts, and every shipped lab model loads,
    from the wheel and not from here"""
    names = sorted(m for m in modules(installed/'ftlab') if not m.endswith('__main__'))
    models = sorted(p.parent.name for p in (installed/'ftlab'/'checkpoints').glob('lab-*/*/config.json'))
    assert models == ['lab-e', 'lab-l', 'lab-m', 'lab-s']
    code = f'''import importlib, ftlab
for m in {names!r}: importlib.import_module(m)
for m in {models!r}: assert next(ftlab.load(m)[0].parameters()).dtype.is_floating_point
print(ftlab.__file__)'''
    out = python('-c', code, cwd=tmp_path, PYTHONPATH=str(installed), HF_HUB_OFFLINE='1')
    assert Path(out.splitlines()[-1]).is_relative_to(installed)
    command, where = SETTINGS['console_scripts'].split('=')
    module, function = where.split(':')
    assert f'{command} = {where}' in next(
        installed.glob('ftlab-*.dist-info/entry_points.txt')).read_text()
    python('-c', f'from {module} import {function}', cwd=tmp_path, PYTHONPATH=str(installed))

def test_importing_keeps_threads_from_spinning():
    "Spinning OpenMP threads made a small comparison take an hour instead of a minute on a busy machine"
    code = ("import os; os.environ.pop('OMP_WAIT_POLICY', None); import ftlab; "
            "print(os.environ['OMP_WAIT_POLICY'], 'torch' in __import__('sys').modules)")
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                          check=True).stdout.split() == ['passive', 'False']


def test_what_a_paper_costs_is_what_the_file_says():
    sys.path.insert(0, str(ROOT/'bench'))
    import cost
    papers = json.loads((ROOT/'bench'/'results'/'cost.json').read_text())['papers']
    said = (ROOT/'DEVELOPERS.md').read_text(encoding='utf-8')
    of = {name: row for name, *row in cost.table(papers)}
    middle, known = (lambda k: of[cost.WHAT[k]][0]), (lambda k: of[cost.WHAT[k]][-1])
    assert f'median of {len(papers)} papers was a module of {middle("module_lines")} lines' in said
    assert f'a claim of {middle("claim_lines")} (its text' in said
    assert f'{middle("cells")} cells with {middle("text_words")} words' in said
    assert (f'the {known("test_lines")} that have a test file of their own had '
            f'{middle("test_lines")} lines') in said
    assert f'took {float(middle("claim_minutes")):.0f} CPU-minutes' in said
    assert f'For the {known("hours")} papers whose files were never moved' in said
    assert f'{float(middle("hours")):.0f} hours passed' in said
