"The page worker: what a kernel would show, and nothing of one page in the next"
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='pages run in kernels where there is no fork')


def notebook(path: Path, *sources: str, tags: dict | None = None) -> Path:
    "A page with these code cells; `tags` is {cell number: its tags}"
    made = [dict(cell_type='code', id=f'c{i}', source=s, outputs=[], execution_count=None,
                 metadata=dict(tags=(tags or {}).get(i, []))) for i, s in enumerate(sources)]
    path.write_text(json.dumps(dict(cells=made, metadata={}, nbformat=4, nbformat_minor=5)))
    return path


def worked(*paths: Path, ours: bool = False, timeout: int = 60, most: int = 2) -> dict[str, dict]:
    """{page's stem: its result} from a worker in a process of its own,
    as fork wants a process without threads"""
    code = f'''
import json, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT/'tests')!r})
import worker
worker.preload(['matplotlib.pyplot', 'matplotlib_inline.backend_inline',
                'IPython.core.interactiveshell', 'ipywidgets', 'numpy'] + ['ftlab']*{ours})
done = worker.Workers({most}, {timeout}).run([(Path(p).stem, Path(p)) for p in {[str(p) for p in paths]!r}])
print('RESULT' + json.dumps(dict(done)))'''
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    r = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env, capture_output=True,
                       text=True)
    assert r.returncode == 0, r.stderr
    return json.loads(r.stdout.split('RESULT')[1])


def text(outputs: list[dict]) -> str:
    return ''.join(o.get('text', '') or o.get('data', {}).get('text/plain', '') or o.get('evalue', '') for o in outputs)


SHOWN = ['print("a"); import sys; print("b", file=sys.stderr); 1 + 1', 'import pandas as pd\npd.DataFrame(dict(x=[1]))',
         '%time 3\n', '!echo from a shell', 'import matplotlib.pyplot as plt\nplt.plot([1, 2]);',
         'h = display("x", display_id="one"); h.update("y")',
         'from IPython.display import clear_output\nprint("gone"); clear_output(); print("kept")',
         '5;', 'import asyncio\nawait asyncio.sleep(0, "awaited")', 'import ipywidgets\nipywidgets.IntSlider(3)',
         'import inspect\ndef f(): return 41\ninspect.getsource(f), f.__module__, __name__']


def test_a_cell_shows_what_a_kernel_shows(tmp_path):
    """The same cells in a fork and in a fresh kernel:
    the same kinds of output with the same text, in the same order"""
    import nbformat
    from nbclient import NotebookClient
    path = notebook(tmp_path/'shown.ipynb', *SHOWN)
    result = worked(path)['shown']
    assert not result['wrong']
    nb = NotebookClient(nbformat.read(path, 4),
                        resources={'metadata': {'path': str(tmp_path)}}).execute()
    for i, cell in enumerate(nb.cells):
        ours, theirs = result['outputs'].get(str(i), []), cell.outputs
        assert [o['output_type'] for o in ours] == [o['output_type'] for o in theirs], SHOWN[i]
        forms = [[sorted(o.get('data', {})) for o in outputs] for outputs in (ours, theirs)]
        assert forms[0] == forms[1], SHOWN[i]
        if 'time' not in SHOWN[i]:
            assert text(ours) == text(theirs), SHOWN[i]


def test_a_page_that_fails_says_where(tmp_path):
    bad = notebook(tmp_path/'bad.ipynb', 'x = 1', '1/0  # here', 'never = 1')
    expected = notebook(tmp_path/'expected.ipynb', '1/0', 'x', tags={0: ['raises-exception']})
    syntax = notebook(tmp_path/'syntax.ipynb', 'a b')
    died = notebook(tmp_path/'died.ipynb', 'import os; os._exit(3)')
    hangs = notebook(tmp_path/'hangs.ipynb', 'import time; time.sleep(99)')
    after = notebook(tmp_path/'after.ipynb', '1')
    r = worked(bad, expected, syntax, died, hangs, after, timeout=2)
    assert (all(o in r['bad']['wrong'] for o in ('cell 1', '1/0  # here', 'ZeroDivisionError: division by zero'))
            and '2' not in r['bad']['outputs'])
    assert 'cell 1' in r['expected']['wrong'] and "name 'x' is not defined" in r['expected']['wrong']
    assert ('SyntaxError' in r['syntax']['wrong'] and 'died' in r['died']['wrong']
            and 'more than 2 seconds' in r['hangs']['wrong'])
    assert not r['after']['wrong'] and r['after']['cpu'] > 0


def test_nothing_of_one_page_is_seen_by_the_next(tmp_path):
    """Names, modules' attributes, the environment, the folder, random numbers,
    figures and option settings: each page finds them fresh"""
    source = '''import os, sys, random, builtins, numpy as np, matplotlib, matplotlib.pyplot as plt, ftlab
seen = ['leak' in globals(), hasattr(ftlab, 'leak'), 'LEAK' in os.environ, hasattr(builtins, 'leak'),
        'leak' in sys.modules, matplotlib.rcParams['lines.linewidth'] == 7,
        len(plt.get_fignums()) > 0, 'run_notebooks' in sys.modules]
print(seen, os.getcwd(), sys.path[0] == '', random.random(), np.random.rand())
leak = ftlab.leak = builtins.leak = 1
os.environ['LEAK'] = '1'
sys.modules['leak'] = sys
matplotlib.rcParams['lines.linewidth'] = 7
plt.figure()
os.chdir('/')'''
    a, b = (notebook(tmp_path/f'{n}.ipynb', source) for n in 'ab')
    r = worked(a, b, most=1, ours=True)
    assert not r['a']['wrong'] and not r['b']['wrong']
    said = [r[n]['outputs']['0'][0]['text'].strip() for n in 'ab']
    assert all(s.startswith(f'{[False]*8} {tmp_path} True ') for s in said) and said[0] != said[1]


def test_a_page_stores_what_a_fresh_kernel_gives(tmp_path):
    path = notebook(tmp_path/'one.ipynb', 'import os\nprint("new"); os.path.basename(os.getcwd())')
    run = [sys.executable, 'tests/run_notebooks.py', '--store', str(path)]
    subprocess.run(run, cwd=ROOT, check=True, capture_output=True)
    cell, = json.loads(path.read_text())['cells']
    assert [''.join(o.get('text', o.get('data', {}).get('text/plain')))
            for o in cell['outputs']] == ['new\n', repr(tmp_path.name)]
    before = notebook(path, 'print("half"); 1/0').read_bytes()
    assert (subprocess.run(run, cwd=ROOT, capture_output=True).returncode == 1
            and path.read_bytes() == before)


def test_a_stored_output_that_restates_data_is_held_against_a_fresh_run(tmp_path):
    "Only where the cell says so, by `#| data`: streams in pieces, tables and results"
    table = 'import pandas as pd\n#| data\nprint("a"); print("b")\npd.DataFrame(dict(x=[1, 2]))'
    path = notebook(tmp_path/'right.ipynb', table, '2')
    nb = json.loads(path.read_text())
    nb['cells'][0]['outputs'] = worked(path)['right']['outputs']['0']
    nb['cells'][0]['outputs'][0]['text'] = ['a\n', 'b\n']
    nb['cells'][1]['outputs'] = [dict(output_type='execute_result', data={'text/plain': ['3']},
                                      metadata={}, execution_count=1)]
    path.write_text(json.dumps(nb))
    nb['cells'][0]['outputs'][1]['data']['text/html'] = (
        nb['cells'][0]['outputs'][1]['data']['text/html'].replace('<td>2</td>', '<td>7</td>'))
    (tmp_path/'wrong.ipynb').write_text(json.dumps(nb))
    nb['cells'][0]['outputs'] = []
    (tmp_path/'empty.ipynb').write_text(json.dumps(nb))
    r = worked(*(tmp_path/f'{n}.ipynb' for n in ('right', 'wrong', 'empty')))
    assert not r['right']['wrong'], r['right']['wrong']
    assert (all(o in r['wrong']['wrong']
                for o in ('cell 0', 'stored: ', '<td>7</td>', '<td>2</td>', '--store'))
            and 'stored: (nothing)' in r['empty']['wrong'])


def test_a_page_runs_where_its_own_module_has_not_been_imported():
    """It registers operators and kinds that a second registration would refuse;
    papers find the library imported"""
    import run_notebooks
    first, then = run_notebooks.parted(
        ['native/perturb.ipynb', 'trainers/loop.ipynb', 'adapters/subsets/hft.ipynb',
         'course/first_light.ipynb', 'glossary.ipynb'])
    assert first == ['native/perturb.ipynb', 'trainers/loop.ipynb'] and 'adapters/subsets/hft.ipynb' in then
