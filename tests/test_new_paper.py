"`make paper` begins a paper that runs and passes as it is; what exists is refused"
import json
import os
import subprocess
import sys
from pathlib import Path
import pytest
from ftlab.instruments.verdicts import read_claim
from pages import ROOT, cells, copy_project

sys.path.insert(0, str(ROOT/'tools'))
import paper


def of_kind(kind: str, home: str) -> str:
    "A paper of the catalogue that is not built here, and is built as `kind`"
    rows = (r for r in paper.catalogue().values() if paper.kind_of(r) == kind and r['home'] == home)
    return next(r['key'] for r in rows if not list((ROOT/'nbs').glob(f'*/*/{r["key"]}.ipynb')))


def python(*args, cwd: Path, ok: bool = True) -> str:
    "Run this Python in `cwd`, with the package that lies there"
    env = {**os.environ, 'PYTHONPATH': str(cwd), 'OMP_NUM_THREADS': '1'}
    r = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True,
                       text=True)
    assert (r.returncode == 0) == ok, f'{r.stdout}\n{r.stderr}'
    return r.stdout + r.stderr


@pytest.fixture(scope='module')
def begun(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A copy of the project in which a method, a probe and a study were begun,
    the last one in a family that is new"""
    copy = copy_project(tmp_path_factory.mktemp('begun')/'copy')
    keys = dict(method=of_kind('method', 'trainers'), probe=of_kind("probe", "evaluators"),
                study=of_kind("study", "course"))
    for key in (keys['probe'], keys['study']):
        python('-c', f'import sys; sys.path.insert(0, "tools"); import paper; paper.begin(paper.ROOT, {key!r})',
               cwd=copy)
    python('tools/paper.py', keys['method'], cwd=copy)
    return copy, keys


@pytest.mark.parametrize('kind', paper.KINDS)
@pytest.mark.parametrize('script', ['as it is', 'runs'])
def test_its_claim_can_be_read_and_still_can_when_a_script_runs_it(tmp_path, kind, script):
    "A method's claim names recipes, and many a builder then writes run(), which needs what a broken run counts as"
    key = of_kind('method', 'trainers')
    for file, text in paper.files(paper.catalogue()[key], kind).items():
        if file.startswith('claims/'):
            (tmp_path/file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path/file).write_text(text, encoding='utf-8')
    if script == 'runs':
        (tmp_path/f'claims/{key}/claim.py').write_text(paper.SCRIPT.format(key=key), encoding='utf-8')
    claim = read_claim(tmp_path/f'claims/{key}')
    assert claim.runs == (kind != 'method' or script == 'runs')
    assert all({'best', 'worst'} <= set(c) for c in claim.spec['contrast'])


ASK = """import json, sys
from pathlib import Path
sys.path.insert(0, 'tools')
import index
from ftlab.instruments.claims import run_claim
refused = []
for key in {keys}:
    try: run_claim(key)
    except ValueError as e: refused.append(str(e))
stale = [f for f, text in index.made(Path.cwd()).items() if Path(f).read_text(encoding='utf-8') != text]
print(json.dumps(dict(refused=refused, stale=stale, index={{e['key']: e for e in index.index()}})))"""


@pytest.mark.slow
def test_every_list_has_it_and_its_claim_waits_to_be_filled_in(begun):
    copy, keys = begun
    found = json.loads(
        python('-c', ASK.format(keys=list(keys.values())), cwd=copy).splitlines()[-1])
    assert (not found['stale'] and found['refused']
            == [f'{key}/claim.toml: paper_says is not filled in; a claim is written down before its run'
                for key in keys.values()])
    entries = found['index']
    for kind, key in keys.items():
        e = entries[key]
        assert (e['verdict'] is None and e['note'] == 'claimed, not yet run'
                and e['claims'] == [f'claims/{key}/claim.toml'])
        page = e['notebook'].removeprefix('nbs/')
        assert any('**Verdict: not yet run.**' in c['source'] for c in cells(page, copy/'nbs'))
        assert f'- {page}\n' in (copy/'_quarto.yml').read_text(encoding='utf-8')
        decorators = [c['source'] for c in cells(page, copy/'nbs') if '#| export\n@' in c['source']]
        assert len(decorators) == 1 and decorators[0].split('\n@')[1].startswith((f'{kind}(', 'paper('))


@pytest.mark.slow
def test_the_pages_run_and_pass_the_tests_of_pages(begun):
    copy, keys = begun
    made = [p.relative_to(copy/'nbs').as_posix() for key in keys.values()
            for p in (copy/'nbs').glob(f'*/*/{key}.ipynb')]
    assert len(made) == 3 and '0 failed' in python('tests/run_notebooks.py', *made, cwd=copy)
    chosen = 'pages or site or stored or readme or module or rules or navigation or description'
    python('-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'tests/papers', 'tests/test_project.py',
           'tests/test_docs.py', '-k', chosen, cwd=copy)


@pytest.mark.slow
def test_what_exists_is_refused_and_left_alone(begun):
    copy, keys = begun
    page = next((copy/'nbs').glob(f'*/*/{keys["method"]}.ipynb'))
    page.write_text('mine')
    said = python('tools/paper.py', keys['method'], cwd=copy, ok=False)
    assert f'{keys["method"]} is begun already' in said and page.read_text() == 'mine'


def test_an_unknown_key_is_offered_the_nearest():
    with pytest.raises(ValueError, match="no paper of the catalogue is called 'noisfit'; did you mean noisefit"):
        paper.row_of('noisfit')


def test_the_skeletons_are_claims_that_can_be_read(tmp_path):
    from ftlab.instruments.verdicts import read_claim
    for kind in paper.KINDS:
        for file, text in paper.files(paper.row_of('noisefit'), kind).items():
            (tmp_path/kind/file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path/kind/file).write_text(text)
        assert read_claim(tmp_path/kind/'claims'/'noisefit').key == 'noisefit'
