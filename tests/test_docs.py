"""The site: what `_quarto.yml` lists, what a page becomes, and what either generator must find.
tests/browser/test_site.py opens the built site"""
import json, re, shutil, subprocess, sys
from pathlib import Path
import pytest
import yaml
from pages import NBS, ROOT, cells, ordered, pages

sys.path.insert(0, str(ROOT/'docs'))
import build, entries, nav

@pytest.fixture(scope='module')
def processed(tmp_path_factory):
    """A few pages as `_proc` holds them: a method's, one with mathematics, a chapter,
    and the two that run when the site is built"""
    from fastcore.nbio import read_nb, write_nb
    out = tmp_path_factory.mktemp('proc')
    for page in ('adapters/subsets/hft.ipynb', 'adapters/subsets/lift.ipynb',
                 'adapters/modules/lora.ipynb', 'course/first_light.ipynb', 'contents.ipynb',
                 'index.ipynb'):
        nb = read_nb(NBS/page)
        entries.Processing()(nb)
        (out/page).parent.mkdir(parents=True, exist_ok=True)
        write_nb(nb, out/page)
    return out

def said(notebook:Path) -> str:
    return '\n'.join(''.join(c['source'])
                     + ''.join(''.join(o.get('data', {}).get('text/markdown', '')) for o in c.get('outputs', []))
                     for c in json.loads(notebook.read_text())['cells'])

def test_the_navigation_is_quartos():
    "The order that the tests know, the sections that we build, and the file that Quarto reads, are one"
    assert nav.pages() == ordered() and sorted(nav.pages()) == pages()
    raw = yaml.safe_load((NBS/'_quarto.yml').read_text())['website']['sidebar']['contents']
    assert [(o['section'], ordered(o)) for o in raw if isinstance(o, dict)] == [
        (n, ps) for n, ps in nav.sections() if n]
    assert ({f: sorted(p.relative_to(NBS).as_posix()
                       for p in (NBS/f).parent.glob('*.ipynb') if p.name != 'index.ipynb')
             for f in nav.families()} == nav.families())
    conf = subprocess.run([sys.executable, '-c', 'import conf; print("\\n".join(conf.toctrees()))'],
                          cwd=ROOT/'docs', capture_output=True, text=True)
    if 'No module named' in conf.stderr:
        pytest.skip('Sphinx is not installed: make docs installs it')
    assert re.findall(r'^/(\S.*)$', conf.stdout, re.M) == [
        p.removesuffix('.ipynb') for p in nav.pages() if p != 'index.ipynb'
        and p not in sum(nav.families().values(), [])], conf.stderr
    assert re.findall(r':caption: (.+)', conf.stdout) == [n for n, _ in nav.sections() if n]

def test_a_deeper_navigation_is_refused(tmp_path):
    for inner in ('{section: B, contents: [c.ipynb]}',
                  '{section: B, href: b.ipynb, contents: [{section: C, href: c.ipynb, contents: [d.ipynb]}]}'):
        (tmp_path/'_quarto.yml').write_text(
            'website: {title: x, sidebar: {contents: [{section: A, contents: [%s]}]}}' % inner)
        with pytest.raises(ValueError, match="section 'A'"):
            nav.sections(tmp_path)
    (tmp_path/'_quarto.yml').write_text('website: {title: x, sidebar: {contents: [{section: A, '
                                        'contents: [a.ipynb, {section: B, href: b.ipynb, contents: '
                                        '[c.ipynb]}]}]}}')
    assert (nav.sections(tmp_path) == [('A', ['a.ipynb', 'b.ipynb', 'c.ipynb'])]
            and nav.families(tmp_path) == {'b.ipynb': ['c.ipynb']})

def test_every_page_has_a_title_and_a_description():
    assert not (bare := [p for p in pages() if not nav.heading(NBS/p)[1]]), (
        f'no "> description" below the title: {bare}')

def test_an_entry_has_signature_parameters_and_source(processed):
    text = said(processed/'adapters'/'subsets'/'hft.ipynb')
    assert ('### hft' in text and 'ratio:float=0.5' in text and '| <code>ratio</code> | float | 0.5 '
            '| share of each category that is trained, over the whole model |' in text)
    assert (re.search(r'<summary>Source: ftlab/adapters/subsets/hft.py, line \d+</summary>', text)
            and '/blob/' not in text)

def test_nothing_of_the_first_text_is_lost(processed):
    "nbdev alone drops what stands below the description"
    first = next(c['source'] for c in cells('course/first_light.ipynb') if c['cell_type'] == 'markdown')
    last = first.strip().splitlines()[-1]
    assert len(last) > 40 and last[:40] in said(processed/'course'/'first_light.ipynb')

def test_no_lesson_cell_runs_when_the_site_is_built(processed):
    "Stored results stay as they are, byte for byte"
    stored = [c['outputs'] for c in cells('course/first_light.ipynb') if c['cell_type'] == 'code'
              and c['outputs']]
    kept = [c['outputs']
            for c in json.loads((processed/'course'/'first_light.ipynb').read_text())['cells']
            if c.get('outputs')]
    flat = lambda outs: [''.join(o.get('text', ''))
                         or ''.join(o.get('data', {}).get('text/plain', '')) for os in outs
                         for o in os]
    assert flat(kept) and set(flat(kept)) <= set(flat(stored))

@pytest.mark.parametrize(
    'text, linked',
    [('see `load_delta`', 'see [`load_delta`](../adapters/store.ipynb#load_delta)'),
     ('`ftlab.fit(x)` and `ftlab.fit`', '`ftlab.fit(x)` and [`ftlab.fit`](fit.ipynb#fit)'),
     ('a `step` of `full`', 'a `step` of `full`'),
     ('[`load_delta`](x.ipynb)', '[`load_delta`](x.ipynb)'),
     ('## `load_delta`', '## `load_delta`'),
     ('```\n`load_delta`\n```', '```\n`load_delta`\n```'),
     ('[l](../../LICENSE)', '[l](../top/LICENSE)'),
     ('[l](../index.ipynb)', '[l](../index.ipynb)'),
     ('[l](step.ipynb#Several-Processes)', '[l](step.ipynb#several-processes)')])
def test_links(text, linked):
    assert entries.linked(text, 'trainers/step.ipynb') == linked

def test_contents_are_made_from_the_navigation(processed):
    text = said(processed/'contents.ipynb')
    assert not (
        left := [p for _, ps in nav.sections() if _ for p in ps if f']({p})' not in text]), left

def test_the_processed_pages_convert_with_pandoc(processed):
    "As Quarto would: without a warning"
    try:
        import pypandoc
        pandoc = pypandoc.get_pandoc_path()
    except (ImportError, OSError):
        pandoc = shutil.which('pandoc')
    if not pandoc:
        pytest.skip('no pandoc: pip install pypandoc_binary')
    for page in sorted(processed.rglob('*.ipynb')):
        r = subprocess.run(
            [pandoc, '-f', 'ipynb', '-t', 'html', '--mathml', '--fail-if-warnings', str(page)],
            capture_output=True, text=True)
        assert r.returncode == 0 and not r.stderr, f'{page.name}: {r.stderr}'

def test_notebooks_beside_pages_and_llms_txt(tmp_path):
    build.extras(tmp_path)
    listed = re.findall(r'\]\((.+?)\)', (tmp_path/'llms.txt').read_text())
    assert ([p.removesuffix('.html.md') + '.ipynb' for p in listed] == nav.pages()
            and all((tmp_path/p).exists() for p in listed))
    assert ((tmp_path/'adapters'/'subsets'/'hft.ipynb').read_bytes()
            == (NBS/'adapters'/'subsets'/'hft.ipynb').read_bytes()
            and 'def hft' not in (tmp_path/'adapters'/'subsets'/'hft.html.md').read_text()[:50])

def test_with_an_address_pages_open_in_colab_and_install(tmp_path, monkeypatch):
    """Without one, as now, nothing is promised; with `git_url` in settings.ini the links are
    there, and the downloaded notebook begins by installing"""
    import ftlab.map
    real = ftlab.map.hosted
    assert ('git_url' in (ROOT/'settings.ini').read_text()
            or 'colab' not in entries.where('adapters/subsets/hft.ipynb').lower())
    monkeypatch.setattr(ftlab.map, 'hosted', lambda page: real(page, 'https://github.com/me/mine'))
    line = entries.where('adapters/subsets/hft.ipynb')
    assert ('href="https://colab.research.google.com/github/me/mine/blob/gh-pages/adapters/subsets/hft.ipynb"'
            in line and 'mybinder.org/v2/gh/me/mine/' in line and '<img' not in line)
    nb = json.loads(build.downloaded(NBS/'adapters'/'subsets'/'hft.ipynb', 'adapters/subsets/hft.ipynb'))
    first = ''.join(nb['cells'][0]['source'])
    assert ('pip install -q git+https://github.com/me/mine@main' in first and nb['cells'][1:]
            == json.loads((NBS/'adapters'/'subsets'/'hft.ipynb').read_text())['cells'])
    import nbformat
    nbformat.validate(nb)
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell()
    ran = []
    shell.run_line_magic = lambda *a, **k: ran.append(a)
    assert shell.run_cell(first).success and not ran  # ftlab is here: nothing is installed

def test_quarto_gets_what_sphinx_gets(tmp_path):
    """Nothing from elsewhere, mathematics without a script, the version,
    and the tables' style and script"""
    html = yaml.safe_load((ROOT/'_quarto.yml').read_text())['format']['html']
    assert (html['html-math-method'] == 'mathml'
            and set(html['theme'].values()) <= {
                'default', 'slate'}), 'cosmo and most other themes import a font from Google'
    build.for_quarto(tmp_path)
    put = yaml.safe_load((tmp_path/'_metadata.yml').read_text())['format']['html']
    assert (
        'table.filter' in put['include-in-header'][0]['text']
        and (ROOT/'docs'/'static'/'site.js').read_text() in put['include-after-body'][0]['text'])
    version = re.search(r'^version *= *(\S+)', (ROOT/'settings.ini').read_text(), re.M)[1]
    assert yaml.safe_load((tmp_path/'_quarto.yml').read_text())['website']['title'].endswith(
        version)

def test_entries_stand_in_the_order_of_the_source(processed):
    lines = [list(map(int, re.findall(r'<summary>Source: \S+, line (\d+)', said(p))))
             for p in sorted(processed.rglob('*.ipynb'))]
    assert sum(map(len, lines)) > 7 and all(l == sorted(l) for l in lines), lines

@pytest.mark.parametrize(
    'given, shown',
    [('def f(\n    a:int=1\n)->dict:', 'def f(a:int=1)->dict'),
     ('class C(\n    x:list=<factory>\n):', 'class C(x:list=...)'),
     ('def f(\n    ' + ', '.join(f'longname_{i}:Callable[[int, str], float]=None' for i in range(3))
      + '\n):',
      'def f(\n    longname_0:Callable[[int, str], float]=None,\n    longname_1:Callable[[int, '
      'str], float]=None,\n    longname_2:Callable[[int, str], float]=None\n)')])
def test_signatures_fit_the_page(given, shown):
    assert entries.signature(given) == shown

def test_the_glossary_knows_every_noun():
    terms = re.findall(r'^### (.+)$', '\n'.join(c['source'] for c in cells('glossary.ipynb')), re.M)
    assert terms == [t.lower() for t in terms], 'Jupyter, Quarto and Sphinx agree on the anchors of lower case only'
    assert (len(terms) == len(set(terms))
            and {'recipe', 'select', 'delta', 'edit', 'source', 'objective', 'step', 'loop',
                 'decode', 'probe', 'gain', 'forgetting', 'verdict', 'scope',
                 'budget', 'validation', 'stable rank', 'energy', 'cosine', 'svd', 'momentum',
                 'weight decay', 'chat template', 'fold', 'export'} <= set(terms))
    assert all(len(c['source'].split()) <= 500 for c in cells('glossary.ipynb')), 'a cell too long to edit'

def test_the_citation_names_this_version():
    version = re.search(r'^version *= *(\S+)', (ROOT/'settings.ini').read_text(), re.M)[1]
    cff = yaml.safe_load((ROOT/'CITATION.cff').read_text())
    assert cff['version'] == version and cff['title'] and cff['authors'] and cff['license'] == 'Apache-2.0'

def test_the_side_bar_is_the_themes(processed, tmp_path):
    """Made once a site, it is what the theme would make of every page anew: on the start page, at the
    top, on a family's page, below it, and on a page outside the navigation"""
    pytest.importorskip('sphinx', reason='Sphinx is not installed: make docs installs it')
    pytest.importorskip('myst_nb', reason='myst-nb is not installed: make docs installs it')
    shutil.copytree(processed, tmp_path/'proc')
    for page in ('adapters/subsets/index.ipynb', 'adapters/modules/index.ipynb', 'adapters/edit.ipynb'):
        shutil.copy2(NBS/page, tmp_path/'proc'/page)
    (tmp_path/'proc'/'outside.md').write_text('# A page that no list has\n')
    code = """
import json, sys
from sphinx.application import Sphinx
from furo.navigation import get_navigation_tree
seen = {}
def first(app, name, template, context, doctree):
    whole = context['toctree'](collapse=False, titles_only=True, maxdepth=-1, includehidden=True)
    seen[name] = [get_navigation_tree(whole).replace('role="heading"', 'role="heading" aria-level="2"')]
def last(app, name, template, context, doctree):
    seen[name].append(context['furo_navigation_tree'])
app = Sphinx(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[3] + '/trees', 'html', status=None, warning=None)
app.connect('html-page-context', first, 50)
app.connect('html-page-context', last, 950)
app.build()
print('SEEN' + json.dumps(seen))"""
    r = subprocess.run([sys.executable, '-c', code, tmp_path/'proc', ROOT/'docs', tmp_path/'out'],
                       capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    seen = json.loads(r.stdout.split('SEEN')[1])
    assert {'index', 'contents', 'adapters/edit', 'adapters/subsets/index', 'adapters/subsets/hft',
            'adapters/modules/lora', 'outside', 'search', '404'} <= set(seen)
    assert not (other := [name for name, (theirs, ours) in seen.items() if theirs != ours]), other
    below = seen['adapters/subsets/hft'][1]
    assert below.count('current-page') == 1 and 'checked=""' in below

@pytest.mark.parametrize(
    'given, shown',
    [('w=functools.partial(<built-in method softmax of type object at 0x7f6a066cea40>, dim=-1)',
      'w=functools.partial(softmax, dim=-1)'),
     ('f=<function nll.<locals>.g at 0x7f>', 'f=nll.<locals>.g'),
     ('f=<function g at 0x7f>, n=<factory>', 'f=g, n=<factory>'),
     ('f=<bound method A.f of <m.A object at 0x7f>>, g=1', 'f=A.f, g=1')])
def test_an_entry_names_no_address(given, shown):
    assert entries.addressless(given) == shown

def test_a_formula_that_cannot_be_set_fails_the_build(tmp_path):
    "With its page and its text; one that can is MathML"
    pytest.importorskip('sphinx', reason='Sphinx is not installed: make docs installs it')
    pytest.importorskip('myst_nb', reason='myst-nb is not installed: make docs installs it')
    for formula, ends in ((r'\frac{a}{b}', 0), (r'\nosuchcommand{a}', 1)):
        page = tmp_path/'proc'/'index.md'
        page.parent.mkdir(exist_ok=True)
        page.write_text(f'# A page\n\nInline ${formula}$, and\n\n$$\n{formula}\n$$\n')
        run = [sys.executable, '-m', 'sphinx', '-c', str(ROOT/'docs'), '-q', '-W', '--keep-going',
               '-E', str(page.parent), str(tmp_path/'out')]
        r = subprocess.run(run, capture_output=True, text=True)
        assert bool(r.returncode) == bool(ends), r.stdout + r.stderr
        assert (r.stderr.count('this formula cannot be set') == 2*ends
                and ('index.md' in r.stderr) == bool(ends))
        assert ends or (tmp_path/'out'/'index.html').read_text().count('<mfrac>') == 2

def test_every_formula_can_be_set():
    "Seen here in a second, not only when the site is built"
    math = pytest.importorskip('docutils.utils.math', reason='docutils is not installed')
    from docutils.utils.math.latex2mathml import tex2mathml
    wrong = []
    for page in sorted(NBS.rglob('*.ipynb')):
        cells = json.loads(page.read_text(encoding='utf-8'))['cells']
        prose = '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
        prose = re.sub(r'```.*?```|`[^`\n]*`', '', prose, flags=re.S)
        shown = re.findall(r'\$\$(.+?)\$\$', prose, re.S)
        within = re.sub(r'\$\$.+?\$\$', '', prose, flags=re.S)
        for formula in shown + re.findall(r'(?<![\\\w])\$(?! )([^$]+?)(?<! )\$(?!\d)', within):
            try:
                tex2mathml(formula)
            except math.MathError as e:
                wrong.append(f'{page.relative_to(NBS)}: {formula.strip()}: {e}')
    assert not wrong, '\n'.join(wrong)

def test_no_notebook_is_too_heavy(tmp_path):
    "The built pages are weighed when the site is built"
    assert not (heavy := build.too_heavy(NBS)), '\n'.join(heavy)
    for name, size in (('light.html', 300*1024),
                       ('heavy.html', 300*1024 + 600),
                       ('heavy.ipynb', 400*1024),
                       ('heavy.png', 10**6)):
        (tmp_path/name).write_bytes(b'x'*size)
    found = build.too_heavy(tmp_path)
    assert ([f.split()[0] for f in found] == ['heavy.html', 'heavy.ipynb']
            and '400 kB, and 300 are the limit' in found[1])

def test_a_number_in_a_cell_stays_in_one_piece():
    tidy = build.tidied('<p>1e-3</p><svg><path d="M 1e-3"/></svg><td title="1e-3">1e-3 to <b>2.5e-05</b> lab-1e-3</td>')
    assert tidy == ('<p>1e-3</p><svg><path d="M 1e-3"/></svg><td title="1e-3"><span class="whole">1e-3</span> to '
                    '<b><span class="whole">2.5e-05</span></b> lab-1e-3</td>')

def test_a_page_loses_nothing_when_it_is_tidied():
    code = ('<div class="highlight"><pre><span class="k">def</span><span class="w"> </span><span '
            'class="nf">f</span><span class="p">(</span><span class="n">x</span><span '
            'class="p">)</span></pre></div>')
    tidy = build.tidied(f'<aside class="sidebar-drawer"></aside><aside class="toc-drawer no-toc"></aside>{code}')
    assert re.sub('<[^>]+>', '', tidy) == 'def f(x)' and len(tidy) < len(code) + 60
    assert '<span class="k">def</span> <span class="nf">f</span>(x)' in tidy
    assert ('aria-label="Pages" class="sidebar-drawer"' in tidy
            and 'aria-label="On this page" class="toc-drawer no-toc"' in tidy)
