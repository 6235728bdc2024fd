"""The site in a real browser, from a folder with spaces, without a server.

Needs Sphinx (`make docs` installs it), Playwright and a Chromium; axe where
`axe-playwright-python` is.

FTLAB_SHOTS=folder keeps the screenshots of eight pages."""
import os, re, shutil, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
import pytest
from pages import ROOT, ordered

api = pytest.importorskip('playwright.sync_api', reason='Playwright is not installed')
for needed in ('sphinx', 'myst_nb', 'furo'):
    pytest.importorskip(needed, reason=f'{needed} is not installed: make docs installs it')
NAMES = 'chromium', 'chromium-browser', 'google-chrome'
CHROMIUM = (os.environ.get('CHROMIUM')
            or next(filter(None, map(shutil.which, NAMES)), None))
EIGHT = ('index.html', 'contents.html', 'course/first_light.html', 'adapters/subsets/hft.html',
         'adapters/modules/lora.html', 'papers/table.html', 'trainers/loop.html', 'glossary.html')
PHONE, DESK = dict(width=360, height=740), dict(width=1280, height=900)

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site, built and put where a reader may put it"
    sys.path.insert(0, str(ROOT/'docs'))
    import build
    out = tmp_path_factory.mktemp('site')/'a folder with spaces'
    where = os.getcwd()
    try:
        print(build.build(out, quarto=False))
    finally:
        os.chdir(where)
    return out

@pytest.fixture(scope='module')
def chromium():
    with api.sync_playwright() as p:
        try:
            browser = p.chromium.launch(executable_path=CHROMIUM,
                                        args=['--no-sandbox', '--disable-background-networking',
                                              '--disable-component-update'])
        except api.Error as e:
            pytest.skip(f'no Chromium: {str(e).splitlines()[0]}')
        yield browser
        browser.close()

@pytest.fixture
def tab(chromium):
    "Opens a page; fails at the end if it said or asked for anything that it should not"
    contexts, wrong = [], []
    def open_(path, **how):
        context = chromium.new_context(**{'viewport': DESK} | how)
        contexts.append(context)
        page = context.new_page()
        page.on('console', lambda m: wrong.append(f'{path.name}: console: {m.text}')
                           if m.type in ('error', 'warning') else None)
        page.on('pageerror', lambda e: wrong.append(f'{path.name}: {e}'))
        page.on('requestfailed', lambda r: wrong.append(f'{path.name}: failed: {r.url}'))
        page.on('request', lambda r: wrong.append(f'{path.name}: asked for {r.url}')
                           if not r.url.startswith(('file:', 'data:')) else None)
        page.goto(path.as_uri())
        return page
    yield open_
    for c in contexts:
        c.close()
    assert not wrong, '\n'.join(wrong)

class Html(HTMLParser):
    "What a page points to, what can be pointed at in it, and images without a word"

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.mute, self.loads = [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {v for v in (a.get('id'), a.get('name')) if v}
        if tag == 'a' and a.get('href'):
            self.links.append(a['href'])
        if tag == 'img' and not (a.get('alt') or '').strip():
            self.mute.append(a.get('src', '')[:60])
        self.loads += [v for t, k in (('img', 'src'), ('script', 'src'), ('link', 'href'))
                       if tag == t and (v := a.get(k))
                       and a.get('rel') not in ('index', 'search', 'next', 'prev', 'author')]

@pytest.fixture(scope='module')
def parsed(site):
    return {p: Html(p.read_text(encoding='utf-8')) for p in sorted(site.rglob('*.html'))}

def test_every_page_is_there(site):
    assert not (gone := [p for p in ordered() if not (site/p).with_suffix('.html').exists()]), gone

def test_no_link_or_anchor_is_broken(parsed, site):
    bad = []
    for page, html in parsed.items():
        if page.name == '404.html':
            continue  # its links are those of the server's root
        for link in html.links + html.loads:
            u = urlsplit(link)
            if u.scheme or link.startswith('//'):
                continue
            to = (page.parent/unquote(u.path)).resolve() if u.path else page
            if not to.exists():
                bad.append(f'{page.relative_to(site)}: {link}')
            elif u.fragment and to.suffix == '.html' and unquote(u.fragment) not in parsed[to].ids:
                bad.append(f'{page.relative_to(site)}: no such place: {link}')
    assert not bad, '\n'.join(bad)

def test_nothing_is_loaded_from_elsewhere(parsed):
    assert not (far := {l for h in parsed.values() for l in h.loads
                        if urlsplit(l).scheme not in ('', 'data') or l.startswith('//')}), far

def test_every_picture_has_words(parsed, site):
    dull = [f'{p.relative_to(site)}: {m}' for p, h in parsed.items() for m in h.mute] + [
        f'{p.relative_to(site)}: only a file name: {a}' for p in parsed
        for a in re.findall(r'<img[^>]* alt="([^"]*)"', p.read_text())
        if re.fullmatch(r'\S*(_images|\.png|\.svg)\S*', a)]
    assert not dull, '\n'.join(dull)

def test_every_page_opens_in_peace_on_a_phone(tab, site):
    "No error, no failed request (`tab` sees to that), and nothing that scrolls sideways"
    wide = []
    for p in ordered():
        page = tab((site/p).with_suffix('.html'), viewport=PHONE)
        w = page.evaluate('document.documentElement.scrollWidth')
        page.context.close()
        wide += [(p, w)]*(w > PHONE['width'])
    assert not wide, wide

@pytest.mark.parametrize('path', EIGHT)
def test_nothing_scrolls_sideways_on_any_screen(tab, site, path):
    "Wide tables and code scroll in boxes of their own, with the side bars beside the page and without"
    page, wide = tab(site/path), []
    for width in (320, 390, 740, 800, 1000, 1024, 1100, 1280, 1320, 1400, 1470, 1920):
        page.set_viewport_size(dict(width=width, height=900))
        seen = page.evaluate('document.documentElement.scrollWidth')
        wide += [(width, seen)]*(seen > width)
    assert not wide, wide

@pytest.mark.parametrize('width', [390, 1280])
def test_no_name_breaks_inside_a_table(tab, site, width):
    "A name in code stands on one line; where the table is too wide for the page, it scrolls"
    broken = []
    for path in ('methods.html', 'adapters/subsets/index.html', 'trainers/losses/index.html',
                 'instruments/checks/index.html', 'papers/table.html'):
        page = tab(site/path, viewport=dict(width=width, height=900))
        broken += [(path, name) for name in page.evaluate('''[...document.querySelectorAll('td code, th code')]
            .filter(e => new Set([...e.getClientRects()].map(r => Math.round(r.top))).size > 1)
            .map(e => e.textContent)''')]
    assert not broken, broken

def test_a_page_that_is_not_there(tab, site):
    "The 404 has two ways out, from the file system, too"
    for link, name in ((0, 'index.html'), (1, 'search.html')):
        page = tab(site/'404.html')
        page.get_by_role('link').nth(link).click()
        page.wait_for_url(f'**/{name}')

def test_every_table_with_a_filter_filters(tab, site):
    "Each choice leaves some rows, and all choices of a column together leave each row once or more"
    tables = [p for p in sorted(site.rglob('*.html'))
              if '<table class="filter"' in p.read_text(encoding='utf-8')]
    assert {p.name for p in tables} >= {'table.html', 'scoreboard.html'}
    for file in tables:
        page = tab(file)
        shown = lambda: page.locator('table.filter tbody tr:visible').count()
        total = shown()
        assert page.locator('.filters select').count()
        for choice in page.locator('.filters select').all():
            counts = [choice.select_option(v) and shown()
                      for v in choice.locator('option').evaluate_all('os => os.map(o => o.value)')
                      if v]
            choice.select_option('')
            assert (counts and min(counts) > 0
                    and sum(counts) + page.locator('table.filter td:empty').count() >= total), (
                file.name, counts)

def test_search_finds(tab, site):
    page = tab(site/'index.html')
    for key, at in (('hft', 'adapters/subsets/hft'), ('lt_sft', 'adapters/subsets/lt_sft'), # a paper by its key
                    ('randlora', 'adapters/modules/randlora')):
        page.goto((site/'index.html').as_uri())
        page.get_by_label('Search').first.fill(key)
        page.keyboard.press('Enter')
        page.wait_for_selector('#search-results li a')
        found = page.eval_on_selector_all('#search-results li a', 'as => as.map(a => a.getAttribute("href"))')
        assert found[0].startswith(f'{at}.html'), found

def test_the_table_of_papers_filters(tab, site):
    page = tab(site/'papers'/'table.html')
    shown = lambda: page.locator('table.filter tbody tr:visible').count()
    total = shown()
    assert total > 20
    for name in ('Question', 'Part', 'Verdict', 'Scope', 'Budget'):
        choice = page.get_by_label(name, exact=True)
        values = [v for v in choice.locator('option').evaluate_all('os => os.map(o => o.value)')
                  if v]
        counts = []
        for v in values:
            choice.select_option(v)
            counts.append(shown())
        assert (values and all(0 < c <= total for c in counts)
                and (len(values) == 1 or min(counts) < total)), (name, counts)
        choice.select_option('')
    page.locator('.filters input').fill('half')
    assert 0 < shown() < total and page.locator('.filters output').inner_text() == f'{shown()} of {total}'
    for key in ('lt_sft', 'masked_thought', 'grpo', 'elm'): # what the folders and modules are called
        page.locator('.filters input').fill(key)
        assert key in page.locator('table.filter tbody tr:visible code').all_inner_texts()
    page.locator('.filters input').fill('no such paper')
    assert shown() == 0
    page.locator('.filters input').fill('')
    assert shown() == total

def test_the_table_of_papers_sorts(tab, site):
    page = tab(site/'papers'/'table.html')
    titles = lambda: page.locator('table.filter tbody th a:first-of-type').all_inner_texts()
    button = page.get_by_role('button', name='Paper')
    button.focus()
    page.keyboard.press('Enter')
    up = titles()
    assert len(up) > 20 and [t[0].lower() for t in up] == sorted(t[0].lower() for t in up), up
    page.keyboard.press('Enter')
    assert titles() == up[::-1] and page.locator('th[aria-sort=descending]').count() == 1

def test_without_javascript(tab, site):
    page = tab(site/'papers'/'table.html', java_script_enabled=False)
    assert (page.locator('table.filter tbody tr:visible').count() > 20
            and page.get_by_role('link', name='Glossary').first.is_visible())
    page = tab(site/'course'/'first_light.html', java_script_enabled=False)
    assert (page.locator('article img:visible, article svg:visible').count() >= 5
            and page.locator('.next-page').is_visible())
    page = tab(site/'adapters'/'modules'/'randlora.html', java_script_enabled=False)
    assert page.locator('math:visible').count() > 3

@pytest.mark.parametrize('view', [DESK, PHONE], ids=['desk', 'phone'])
def test_the_keyboard_reaches_everything(tab, site, view):
    """Tab goes to every link, button and box that is seen,
    and what has the focus can be seen to have it"""
    page = tab(site/'papers'/'table.html', viewport=view)
    mark = ('e => { const s = getComputedStyle(e), r = e.getBoundingClientRect(); '
            'return r.width > 0 && s.visibility != "hidden" && r.right > 0 && r.left '
            '< innerWidth }')
    wanted = page.evaluate('[...document.querySelectorAll("a[href], button, '
                           f'input:not([type=hidden]), select, summary")].filter({mark}).length')
    seen, unseen = 0, []
    for _ in range(3*wanted + 50):
        page.keyboard.press('Tab')
        at = page.evaluate('(() => { const e = document.activeElement; if (e === document.body || '
                           'e.dataset.seen) return null; e.dataset.seen = 1; '
                           'const s = getComputedStyle(e); return [e.outerHTML.slice(0, 90), '
                           's.outlineStyle != "none" || s.boxShadow != "none"] })()')
        if at is None:
            break
        seen += 1
        unseen += [at[0]]*(not at[1] and 'sidebar-toggle' not in at[0])
    left = page.evaluate('[...document.querySelectorAll("a[href], button, '
                         f'input:not([type=hidden]), select, summary")].filter({mark}).filter(e => '
                         '!e.dataset.seen).map(e => e.outerHTML.slice(0, 90))')
    assert seen > 20 and not left and not unseen, (seen, left, unseen)

def test_a_phone_opens_its_menu_by_keyboard(tab, site):
    page = tab(site/'adapters'/'subsets'/'hft.html', viewport=PHONE)
    link = page.get_by_role('link', name='Glossary').first
    assert not link.is_visible() or link.bounding_box()['x'] < 0
    page.locator('#__navigation').focus()
    page.keyboard.press('Space')
    page.wait_for_timeout(500)
    assert link.bounding_box()['x'] >= 0
    page.keyboard.press('Escape')
    page.wait_for_timeout(500)
    assert not link.is_visible() or link.bounding_box()['x'] < 0

def test_each_page_says_what_is_where(tab, site):
    "The version, open in Lab, download, previous and next"
    page = tab(site/'adapters'/'subsets'/'hft.html')
    version = re.search(r'^version *= *(\S+)', (ROOT/'settings.ini').read_text(), re.M)[1]
    assert (version in page.locator('.sidebar-brand').inner_text()
            and page.get_by_role('link', name='Open in Lab').get_attribute('href').endswith(
                '/lab/tree/nbs/adapters/subsets/hft.ipynb'))
    link = page.get_by_role('link', name='Download the notebook')
    assert link.get_attribute('download') is not None  # from the file system Chromium shows it instead
    assert (site/'adapters'/'subsets'/link.get_attribute('href')).read_bytes() == (
        ROOT/'nbs'/'adapters'/'subsets'/'hft.ipynb').read_bytes()
    at = ordered().index('adapters/subsets/hft.ipynb')
    assert page.locator('.next-page').get_attribute('href').split('/')[-1] == Path(
        ordered()[at + 1]).name.replace('.ipynb', '.html')

def test_dark_and_light(tab, site):
    page = tab(site/'index.html')
    ground = lambda: page.evaluate('getComputedStyle(document.body).backgroundColor')
    seen = {ground()}
    for _ in range(2):
        page.locator('.theme-toggle:visible').first.click()
        seen.add(ground())
    assert len(seen) == 2

@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('path', EIGHT + ('search.html', '404.html'))
def test_axe(tab, site, path, scheme):
    """Contrast, landmarks, names, order of headings: axe-core's rules,
    its best practices among them. Left out: the two boxes that open the side bars,
    which the theme needs outside of any landmark. Axe would ask for the style sheets,
    which a browser refuses it here: `preload`"""
    Axe = pytest.importorskip('axe_playwright_python.sync_playwright',
                              reason='axe is not installed: pip install axe-playwright-python').Axe
    page = tab(site/path, color_scheme=scheme)
    page.wait_for_timeout(200)
    found = Axe().run(page, context={'exclude': [['.sidebar-toggle']]},
                      options={'preload': False}).response['violations']
    assert not found, '\n'.join(f'{v["id"]} ({v["impact"]}): {v["help"]}; {len(v["nodes"])} times, '
                                f'such as {v["nodes"][0]["html"][:200]} '
                                f'{(v["nodes"][0].get("any") or [{}])[0].get("message", "")}'
                                for v in found)

def test_screenshots(tab, site, tmp_path):
    shots = Path(os.environ.get('FTLAB_SHOTS', tmp_path))
    shots.mkdir(exist_ok=True)
    for path in EIGHT:
        for name, how in dict(desk=dict(), phone=dict(viewport=PHONE), dark=dict(color_scheme='dark')).items():
            file = shots/f'{path.replace("/", "_").removesuffix(".html")}_{name}.png'
            tab(site/path, **how).screenshot(path=file)
            assert file.stat().st_size > 5000
