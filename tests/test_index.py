"Every generated list is what the papers say, and generating again changes nothing"
import json
import re
import sys
from types import SimpleNamespace
import pytest
from pages import NBS, ROOT, cells, pages
from ftlab import papers

sys.path.insert(0, str(ROOT/'tools'))
import index
import equalities

FILES = {e['key']: e['notebook'].removeprefix('nbs/') for e in papers.index()}


@pytest.fixture(scope='module')
def made() -> dict:
    "{file: text} of every generated file; seconds, which no collection of the tests should take"
    return index.made(ROOT)


def said(page: str, what: str) -> str:
    "A generated cell's text"
    return next(c['source'] for c in cells(page) if c['source'].startswith(f'<!-- made by `make index`: {what} -->'))


def test_generating_again_changes_nothing(made):
    stale = [f for f, text in made.items()
             if (ROOT/f).read_bytes() != (text if isinstance(text, bytes) else text.encode())]
    assert not stale, f'{stale} are not what the papers say; run make index'


def test_only_generated_cells_and_tables_change(made):
    """Of a notebook whose generated cells were emptied, the same comes out again,
    and its other cells stay as they are"""
    for page in ('methods.ipynb', 'papers/scoreboard.ipynb', 'adapters/subsets/hft.ipynb',
                 'adapters/subsets/index.ipynb'):
        ours, new = json.loads((NBS/page).read_text(encoding='utf-8')), json.loads(made[f'nbs/{page}'])
        assert any(index.MARK.match(''.join(c['source'])) for c in ours['cells'])
        assert [c['id'] for c in ours['cells']] == [c['id'] for c in new['cells']]


def test_every_mark_is_filled_by_the_script(made):
    "A mark on a page that the script does not know would be a list that nobody keeps"
    marked = {p for p in pages() if any(index.MARK.match(c['source']) for c in cells(p))}
    assert marked <= {f.removeprefix('nbs/') for f in made}
    for page in marked:
        assert all(len(c['source'].splitlines()) > 1 for c in cells(page) if index.MARK.match(c['source'])), page


def test_every_paper_is_in_every_list(made):
    for key, page in FILES.items():
        family = f'{page.rpartition("/")[0]}/index.ipynb'
        assert f'({page})' in said('index.ipynb', 'families') and f'({key}.ipynb)' in said(family, 'papers')
        assert f'- {page}\n' in made['_quarto.yml'] and said(page, 'verdict')
        assert any(f'({page})' in c['source']
                   for c in cells('contents.ipynb') if index.MARK.match(c['source']))


def test_a_family_says_whether_its_papers_are_compared_and_if_none_is_built(made):
    project = index.Project(ROOT)
    for part in papers.PARTS:
        for name in project.families(part):
            page, keys = f'{part}/{name}/index.ipynb', project.keys(part, name)
            table = said(page, 'papers')
            alone = bool(keys) and name not in index.COMPARED
            assert ('No shared comparison yet' in table) == alone, page
            assert ('No paper of this family is built yet' in table) == (not keys), page
            assert (f'          - {page}\n' in made['_quarto.yml']) == (not keys), page
    row = next(r for r in said('index.ipynb', 'families').splitlines() if 'beyond/vision' in r)
    built = project.keys('beyond', 'vision')
    assert row.endswith('| none built yet |') == (not built)


def test_the_readme_names_every_yardstick_beside_its_page():
    import ftlab.methods
    common = ftlab.methods.yardsticks() | ftlab.methods.merging_yardsticks()
    rows = (ROOT/'README.md').read_text(encoding='utf-8').splitlines()
    for name, file in common.items():
        page = f'(nbs/{file.parts[-3]}/yardsticks/{file.stem}.ipynb)'
        assert any(f'`{name}`' in row and page in row for row in rows), name


def test_a_failed_control_is_named_beside_the_verdict():
    "Else contrasts that hold or fail would stand below `unclear` without a word"
    seen = set()
    for key, page in FILES.items():
        file = ROOT/'claims'/key/'result.json'
        controls = json.loads(file.read_text(encoding='utf-8'))['controls'] if file.exists() else []
        for c in controls or ():
            named = f'- control failed, which makes the verdict unclear: {c["name"]}, ' in said(
                page, 'verdict')
            assert named == (not c['ok']), (key, c['name'])
            seen.add(c['ok'])
    assert True in seen or not any((ROOT/'claims'/k/'result.json').exists() for k in FILES)

def test_each_earlier_verdict_stands_with_the_reason_of_the_claim_that_took_its_place():
    "ELM has two: the first held and was asked anew, the second had no room"
    shown = said(FILES['elm'], 'verdict')
    first, second = (line for line in shown.splitlines() if line.startswith('- an earlier claim'))
    assert 'came to *holds*' in first and 'The numbers stood when checked' in first
    assert 'came to *unclear*' in second and 'No test seed was run' in second

def test_a_verdict_that_disappoints_has_its_likely_reason():
    "A reason is a guess, or points to what the run shows; it has no link, which would break on the scoreboard"
    board = said('papers/scoreboard.ipynb', 'reasons')
    for e in papers.index():
        why = index.reason(dict(cells=cells(FILES[e['key']])))
        if e['verdict'] in ('fails', 'unclear'):
            assert re.search(r'\b(guess|the run|not know)\b', why, re.I), e['key']
            assert '](' not in why and why in board, e['key']
        else:
            assert not why, f"{e['key']} is {e['verdict']}, and its page gives a reason for something else"

def test_a_verdict_that_hangs_on_the_rate_shows_its_effect_at_the_rates_around(tmp_path):
    c = dict(name='more', kind='superiority', margin=.1, primary=True, common=True, arms=['a', 'b'],
             treatment=[.5]*4 + [.51], baseline=[.2]*5,
             sensitivity=[dict(arm='a', chosen=1., rate=.562, effects=[.3, .4]),
                          dict(arm='a', chosen=1., rate=1.78, effects=[-.1, -.2]),
                          dict(arm='b', chosen=2., rate=1.12, effects=[])])
    def shown(c):
        (tmp_path/'r.json').write_text(json.dumps(dict(contrasts=[c])))
        return index.rate_curves(SimpleNamespace(root=tmp_path), dict(evidence='r.json'))

    assert '*more* depends' in shown(c) and '+0.302 at the chosen rates' in shown(c)
    assert shown(c).splitlines()[-2:] == ['| `a` | 1 | +0.350 | -0.150 |',
                                          '| `b` | 2 | gain not reached | not tried |']
    assert shown(c | dict(sensitivity=c['sensitivity'][:1])) == '', 'it does not hang'

def test_a_control_that_failed_says_what_was_needed(tmp_path):
    control = dict(name='it learns', ok=False, values=[.1, .3], at_least=.5, at_most=None)
    broken = control | dict(values=[.1, None])
    controls = [control, broken, control | dict(ok=True)]
    (tmp_path/'result.json').write_text(json.dumps(dict(controls=controls)))
    said = index.failed_controls(SimpleNamespace(root=tmp_path), dict(evidence='result.json'))
    assert [x.rpartition('it learns, ')[2] for x in said] == [
        '+0.200, needed at least 0.5', 'broke down in 1 of 2 seeds, needed at least 0.5']


def test_the_table_of_papers_has_their_keys():
    from ftlab.papers import papers_html
    table = papers_html()
    assert all(f'<code>{key}</code> <a href="../{page}">' in table for key, page in FILES.items())


def test_the_counts_are_those_of_the_files():
    "Recomputed from the result files, by the rule and not by the index"
    from ftlab.instruments.verdicts import verdict
    found = [verdict(json.loads(p.read_text(encoding='utf-8'))) for p in (ROOT/'claims').glob('*/result.json')]
    for page in ('index.ipynb', 'papers/scoreboard.ipynb'):
        text = said(page, 'counts')
        numbers = {v: int(m[1]) if (m := re.search(rf'\*\*(\d+)\*\* {words}', text)) else 0
                   for v, words in index.WORDS.items()}
        assert numbers == {v: found.count(v) for v in index.WORDS} and f'Of {len(papers.claims())} claims' in text
    assert said('index.ipynb', 'counts').splitlines()[-1].split('[')[0] in (
        ROOT/'README.md').read_text(encoding='utf-8')


def test_a_page_that_is_for_an_unknown_need_is_named():
    page = dict(cells=[dict(source='**Use it when** there are only a few hundred rows (of text); it rains.')])
    with pytest.raises(ValueError, match=r"nbs/x.ipynb is for 'it rains'; write one of: you try"):
        index.uses(page, 'x.ipynb')
    page['cells'][0]['source'] = '**Use it when** there are only a few hundred rows (of text).'
    assert index.uses(page, 'x.ipynb') == [('there are only a few hundred rows', 'of text')]


def test_a_page_without_its_place_is_named(monkeypatch):
    p = index.Project(ROOT)
    p.pages['x.ipynb'] = dict(cells=[dict(cell_type='markdown', source='# Title')])
    with pytest.raises(ValueError, match=r"nbs/x.ipynb: the generated cells are \[\], they should be \['verdict'\]"):
        p.fill('x.ipynb', dict(verdict='holds'))


def test_the_catalogue_has_every_paper_once():
    rows = [json.loads(line) for line in (ROOT/'papers'/'catalogue.jsonl').read_text(encoding='utf-8').splitlines()]
    listed = [r for r in rows if r.get('catalogue', True)]
    assert (len(listed) == 300
            and len({r['key'] for r in rows}) == len(rows) == len({r['title'] for r in rows}))
    assert {r['key'] for r in rows} - {r['key'] for r in listed} == {'lora', 'dpo', 'grpo', 'lr_matters'}
    assert all(set(r) - {'catalogue'} == {'key', 'family', 'title', 'arxiv', 'kind', 'home'}
               for r in rows)
    assert all(r[k] for r in rows for k in ('key', 'family', 'title', 'kind', 'home'))
    # some papers are on no arXiv
    assert all(re.fullmatch(r'\d{4}\.\d{4,5}', r['arxiv']) or not r['arxiv'] for r in rows)
    assert all(re.fullmatch('[a-z][a-z0-9_]*', r['key']) and re.fullmatch('[a-z]+', r['family'])
               for r in rows)
    assert {r['home'] for r in rows} == {*papers.PARTS, 'course'}


def test_what_many_pages_say_has_one_owner():
    "A paragraph that stands word for word on more than five pages is made by `make index`, never typed"
    where = {}
    for page in pages():
        for c in cells(page):
            if c['cell_type'] == 'markdown' and not index.MARK.match(c['source']):
                for paragraph in c['source'].split('\n\n'):
                    where.setdefault(paragraph.strip(), set()).add(page)
    typed = {text: sorted(on) for text, on in where.items() if len(on) > 5 and len(text) > 30}
    assert not typed, typed

# ---------- the equalities with other packages

GOOD = """import pytest
@pytest.mark.peer('dora', 'peft', 'outputs', tolerance=dict(loss=1e-6, gradient=dict(rtol=2e-5)))
def test_x(tolerance):
    assert 0 <= tolerance['loss']
"""

@pytest.fixture
def checkout(tmp_path):
    "A checkout of one test file"
    (tmp_path/'tests').mkdir()
    (tmp_path/'settings.ini').write_text((ROOT/'settings.ini').read_text())
    def write(text):
        (tmp_path/'tests'/'test_x.py').write_text(text)
        return equalities.equalities(tmp_path)
    return write

def test_an_equality_is_read_from_its_mark(checkout):
    row, = checkout(GOOD)
    assert row['ours'] == [('dora', 'adapters/yardsticks/low_rank.ipynb')]
    assert row['tolerance'] == 'loss 1e-6; gradient 2e-5 of its size'
    assert (row['peer'], row['version']) == ('peft', '0.21.2')
    assert equalities.allowed(0) == 'none: bit for bit'
    assert equalities.allowed(dict(rtol=1e-4, atol=1e-10)) == '1e-10 + 1e-4 of its size'

@pytest.mark.parametrize('old, new, says', [
    ("'peft'", "'torchvision'", 'torchvision is not in settings.ini, so CI would skip'),
    ("'dora'", "'adora'", "'adora' is nothing that ftlab exports"),
    ("'dora'", "'attributions'", 'write module.name'),
    ("tolerance['loss']", "1e-6", 'must compare by the fixture'),
    ('test_x(tolerance)', 'test_x()', 'must compare by the fixture'),
    (", 'outputs'", '', 'test_x: the mark needs ours, the package'),
    ('tolerance=dict(', 'within=dict(', 'test_x: the mark needs ours, the package'),
    ("('dora', 'peft', 'outputs', tolerance=dict(loss=1e-6, gradient=dict(rtol=2e-5)))", '',
     'test_x: the mark needs ours, the package'),
    ('def test_x', "@pytest.mark.peer('lora', 'peft', 'outputs', tolerance=1e-3)\ndef test_x", 'has 2 marks'),
    ('import pytest', "import pytest\npytestmark = pytest.mark.peer('dora', 'peft', 'all', tolerance=0)",
     'must be a decorator'),
    ("def test_x", "def test_x(): pass\nclass T:\n  @pytest.mark.peer('dora', 'peft', 'it', tolerance=0)\n  def test_y",
     'must be a decorator')])
def test_a_mark_that_says_what_is_not_so_is_an_error(checkout, old, new, says):
    with pytest.raises(ValueError, match=says):
        checkout(GOOD.replace(old, new))

# files whose tests read what a peer writes, or refuse it, and compare no values with it
NONE_COMPARED = {'test_anatomy.py', 'test_checkpoints.py', 'test_elsewhere.py', 'test_gpu.py',
                 'test_foreign.py', 'test_gguf_folder.py', 'test_loading.py', 'test_real.py',
                 'test_serving.py', 'test_train_options.py'}

def test_whoever_compares_with_a_package_is_on_the_list():
    names = [*equalities.versions(ROOT), 'ot']
    asks = re.compile(rf"importorskip\(\s*'({'|'.join(map(re.escape, names))})\b", re.I)
    found = {f for f in (ROOT/'tests').rglob('test_*.py') if asks.search(f.read_text())}
    listed = {ROOT/e['file'] for e in equalities.equalities(ROOT)}
    assert {f.name for f in found - listed} == NONE_COMPARED
    assert {e['peer'] for e in equalities.equalities(ROOT)} > {
        'peft', 'trl', 'torch', 'transformers', 'bitsandbytes', 'schedulefree', 'mergekit', 'POT',
        'galore_torch', 'captum', 'transformer_lens'}
