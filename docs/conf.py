"Sphinx, where there is no Quarto: reads the processed notebooks in `_proc`, in the order of `_quarto.yml`"
import json, re, sys
from pathlib import Path
from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.docutils import SphinxTranslator
from sphinx.util.logging import getLogger

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
    trees = (toctrees() if name == 'index' else [toctree(families()[f'{name}.ipynb'])]
             if f'{name}.ipynb' in families() else [])
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

def page(app, name, template, context, doctree):
    "Headings of the side bar have a level"
    if 'furo_navigation_tree' in context:
        context['furo_navigation_tree'] = context['furo_navigation_tree'].replace(
            'role="heading"', 'role="heading" aria-level="2"')

def setup(app):
    app.connect('source-read', read)
    app.connect('html-page-context', page, 900)
    app.add_html_math_renderer('mathml', (inline_math, None), (block_math, None))
