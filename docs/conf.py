"Sphinx, where there is no Quarto: reads the processed notebooks in `_proc`, in the order of `_quarto.yml`"
import json, re, sys
from functools import cache
from pathlib import Path
from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from furo.navigation import get_navigation_tree
from sphinx.environment.adapters.toctree import global_toctree_for_doc
from sphinx.search.en import SearchEnglish
from sphinx.util.docutils import SphinxTranslator
from sphinx.util.logging import getLogger
from sphinx.util.osutil import relative_uri

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from nav import ROOT, families, sections, website

project = website()['title']
release = re.search(r'^version *= *(\S+)', (ROOT/'settings.ini').read_text(encoding='utf-8'),
                    re.M)[1]
author = 'the ftlab authors'
copyright = 'the ftlab authors, Apache-2.0'
extensions = ['myst_nb']
html_theme = 'furo'
language = 'en'
exclude_patterns = ['_quarto.yml', '.*']
templates_path = ['templates']
html_static_path = ['static']
html_css_files = ['site.css']
html_js_files = [('site.js', {'priority': 100, 'defer': 'defer'})]
nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'gfm'
nb_mime_priority_overrides = [('html', 'text/markdown', 9)]
myst_enable_extensions = ['dollarmath', 'attrs_inline']
myst_heading_anchors = 4
smartquotes = False
html_title = f'{project} {release}'
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = 'mathml'
html_sidebars = {'**': ['sidebar/brand.html', 'sidebar/search.html', 'sidebar/scroll-start.html',
                        'sidebar/navigation.html', 'sidebar/scroll-end.html']}
html_theme_options = dict(top_of_page_buttons=[],  # colours that keep a contrast of 4.5
    light_css_variables={'color-foreground-secondary': '#4f5560',
                         'color-foreground-muted': '#5a606b', 'verdict-holds': '#0a5a8f',
                         'verdict-fails': '#9c3f00', 'verdict-other': '#50555c'},
    dark_css_variables={'color-foreground-secondary': '#b0b5bd',
                        'color-foreground-muted': '#a3a8b0', 'verdict-holds': '#7cc4f5',
                        'verdict-fails': '#ffab70', 'verdict-other': '#bcc1c8'})
html_domain_indices = False
html_use_index = False
pygments_style, pygments_dark_style = 'a11y-high-contrast-light', 'a11y-high-contrast-dark'
html_additional_pages = {'404': '404.html'}
html_context = dict(site_url=website().get('site-url', '/').rstrip('/') + '/')

DIRECTIVE = re.compile(r'^#\| *([\w-]+): *(.*)\n?', re.M)

def toctree(pages:list[str], caption:str='') -> str:
    """A hidden toctree: what Sphinx makes the navigation from. A family's stands in its folder,
    hence the paths from the top"""
    head = f':caption: {caption}' if caption else ''
    names = '\n'.join('/' + p.removesuffix('.ipynb') for p in pages)
    return f'```{{toctree}}\n:hidden:\n{head}\n\n{names}\n```'

def toctrees() -> list[str]:
    """The navigation at the top: one toctree a section;
    what lies below a family's page is listed there"""
    below = {p for ps in families().values() for p in ps} | {'index.ipynb'}
    return [toctree([p for p in ps if p not in below], name) for name, ps in sections() if ps != ['index.ipynb']]

below = cache(families)  # a site is built from one `_quarto.yml`, which takes a while to read

def adapted(cell:dict) -> dict:
    """A cell of a processed notebook as myst-nb wants it: Quarto's directives become tags;
    a shown text becomes a text"""
    source, outputs = ''.join(cell['source']), cell.get('outputs', [])
    if cell['cell_type'] == 'raw':  # Quarto's front matter
        import yaml
        head = yaml.safe_load(source.strip().strip('-')) or {}
        return dict(cell_type='markdown', metadata={},
                    source=f'# {head["title"]}\n\n' + (f'*{head["description"]}*' if head.get('description') else ''))
    if cell['cell_type'] != 'code':
        return cell
    say = dict(DIRECTIVE.findall(source))
    cell['source'] = DIRECTIVE.sub('', source).strip('\n')
    tags = cell['metadata'].setdefault('tags', [])
    if say.get('echo') == 'false':
        if outputs and all('text/markdown' in o.get('data', {}) for o in outputs):
            return dict(cell_type='markdown', metadata={},
                        source='\n\n'.join(''.join(o['data']['text/markdown']) for o in outputs))
        tags.append('remove-input')
    if 'code-fold' in say:
        tags.append('hide-input')
    if alt := say.get('fig-alt', '').strip('"\''):
        cell['metadata']['mystnb'] = dict(image=dict(alt=alt))
    for o in outputs:
        if html := o.get('data', {}).get('text/html'):
            o['data']['text/html'] = re.sub(r'(href="[^":]*)\.ipynb(["#])', r'\1.html\2',
                                            ''.join(html)).replace('<th></th>', '<td></td>')
        o['data'] = ({k: v for k, v in o.get('data', {}).items() if 'widget' not in k}
                     if 'data' in o else o.get('data'))
        o.get('data') or o.pop('data', None)
    return cell

def read(app, name, source):
    "Sphinx's `source-read`"
    if not source[0].lstrip().startswith('{'):
        source[0] = ':orphan:\n' + source[0] if source[0].startswith(':') else '---\norphan: true\n---\n' + source[0]
        return
    nb = json.loads(source[0])
    nb['cells'] = [adapted(c) for c in nb['cells']
                   if 'AUTOGENERATED' not in ''.join(c['source'])[:80]]
    nb['metadata'].pop('widgets', None)
    trees = (toctrees() if name == 'index' else [toctree(below()[f'{name}.ipynb'])]
             if f'{name}.ipynb' in below() else [])
    nb['cells'] += [dict(cell_type='markdown', metadata={}, source=t) for t in trees]
    for i, c in enumerate(nb['cells']):
        c['id'] = f'cell-{i}'
    source[0] = json.dumps(nb)

def mathml(node, **kw) -> str:
    """The formula as MathML;
    one that cannot be set is a warning with its page, and so an error of the build"""
    try:
        return tex2mathml(node.astext(), **kw)
    except (MathError, SyntaxError) as e:
        getLogger(__name__).warning('this formula cannot be set: %s (%s)', node.astext(), e,
                                    location=node)
        return ''

def inline_math(self:SphinxTranslator, node):
    self.body.append(mathml(node))
    raise nodes.SkipNode

def block_math(self:SphinxTranslator, node):
    self.body.append(f'<div class="math">{mathml(node, as_block=True)}</div>')
    raise nodes.SkipNode

class Words(SearchEnglish):
    "English, whose words are reduced to their stems once a site instead of once a page"
    def __init__(self, options):
        super().__init__(options)
        self.stem = cache(super().stem)

class SideBar:
    """The theme's navigation, made once and marked for each page. The theme alone makes it anew for
    every page, which takes as long as all else at 130 pages and grows with the square of their number"""
    def __init__(self, app):
        tree = global_toctree_for_doc(app.env, 'index', app.builder, tags=app.tags, collapse=False,
                                      titles_only=True, maxdepth=-1, includehidden=True)
        self.whole = get_navigation_tree(app.builder.render_partial(tree)['fragment'])
        self.seen_from = cache(self.seen_from)

    def seen_from(self, folder:str) -> tuple[list[str], dict[str, int]]:
        "The lines of the tree with links as pages in `folder` need them, and where each page stands"
        link = lambda m: f'href="{relative_uri(folder + "page.html", m[1])}"'
        lines = re.sub('href="([^"#]+)"', link, self.whole).split('\n')
        return lines, {m[1]: i for i, line in enumerate(lines)
                       if (m := re.search('<a [^>]*href="([^"#]+)"', line))}

    def of(self, name:str) -> str:
        "The tree on the page `name`: the page is marked, and what it lies in is marked and open"
        folder, file = re.fullmatch('(.*/)?(.*)', f'{name}.html').groups()
        lines, places = self.seen_from(folder or '')
        lines, at = lines.copy(), places.get(file)
        if at is None:  # the start page, the search, the 404
            return '\n'.join(lines)
        if 'toctree-l2' in lines[at]:
            above = next(i for i in range(at, -1, -1) if 'toctree-l1' in lines[i])
            lines[above] = marked(lines[above]).replace('<ul>', '<ul class="current">')
        top = next(i for i in range(at, -1, -1) if lines[i] == '<ul>')
        lines[top] = '<ul class="current">'
        lines[at] = re.sub('(<li class="[^"]*)', r'\1 current-page', marked(lines[at])).replace(
            f'"reference internal" href="{file}"', '"current reference internal" href="#"')
        return '\n'.join(lines)

def marked(line:str) -> str:
    "An entry of the navigation as one that lies on the way to the page, and is open"
    return re.sub(r'(<li class="toctree-l\d)', r'\1 current', line).replace(
        ' class="toctree-checkbox"', ' checked="" class="toctree-checkbox"')

def no_tree(app, name, template, context, doctree):
    "Before the theme's turn: nothing that it would make a navigation from"
    context['toctree'] = lambda **how: ''

def with_tree(app, name, template, context, doctree):
    "After it: the side bar, made when the first page is written, and headings in it have a level"
    app.side_bar = getattr(app, 'side_bar', None) or SideBar(app)
    context['furo_navigation_tree'] = app.side_bar.of(name).replace('role="heading"',
                                                                    'role="heading" aria-level="2"')

def setup(app):
    app.connect('source-read', read)
    app.connect('html-page-context', no_tree, 100)
    app.connect('html-page-context', with_tree, 900)
    app.add_search_language(Words)
    app.add_html_math_renderer('mathml', (inline_math, None), (block_math, None))
