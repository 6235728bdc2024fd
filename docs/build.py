"""Build the site: `make docs`.

With Quarto where it is on the path, else with Sphinx; both read `_proc` and `_quarto.yml`.

    python docs/build.py [--out _docs] [--sphinx] [--fresh]
"""
import argparse, json, re, shutil, subprocess, sys, time
from pathlib import Path
from nav import ROOT, heading, sections, website
from entries import process, stale

QUARTO = """:root { --color-table-border: #8886; --color-foreground-muted: #767676;
--color-foreground-secondary: inherit; --color-brand-content: #2a5adf;
--color-foreground-primary: inherit;
--color-background-primary: transparent; --verdict-holds: #0a5a8f; --verdict-fails: #9c3f00; --verdict-other: inherit }
.quarto-dark { --verdict-holds: #7cc4f5; --verdict-fails: #ffab70 }"""

def for_quarto(proc:Path):
    """What Sphinx's theme gets from conf.py:
    the version in the header, and the tables' style and script in every page"""
    version = re.search(r'^version *= *(\S+)', (ROOT/'settings.ini').read_text(encoding='utf-8'),
                        re.M)[1]
    said = (ROOT/'_quarto.yml').read_text(encoding='utf-8')
    (proc/'_quarto.yml').write_text(said.replace(f'title: {website()["title"]}\n',
                                                 f'title: {website()["title"]} {version}\n', 1),
                                    encoding='utf-8')
    style, script = QUARTO + (ROOT/'docs'/'static'/'site.css').read_text(encoding='utf-8'), (
        ROOT/'docs'/'static'/'site.js').read_text(encoding='utf-8')
    put = {'include-in-header': [dict(text=f'<style>{style}</style>')],
           'include-after-body': [dict(text=f'<script>{script}</script>')]}
    (proc/'_metadata.yml').write_text(json.dumps(dict(format=dict(html=put)), indent=1),
                                      encoding='utf-8')  # JSON is YAML

def with_quarto(proc:Path, out:Path):
    for_quarto(proc)
    subprocess.run(['quarto', 'render', str(proc), '--no-execute', '--output-dir', str(out)],
                   check=True)

TEXT = re.compile(r'(?<=>)[^<]+(?=<)')  # between tags, where no attribute is
POWER = re.compile(r'(?<![\w.#-])(\d[\d.]*e-\d+)')  # 1e-05

def tidied(html:str) -> str:
    """A page with names for the theme's side bars, without the colour of names, punctuation
    and spaces, which is that of all text, and with numbers in cells that do not break at their minus"""
    for side, name in (('sidebar-drawer"', 'Pages'), ('toc-drawer', 'On this page')):
        html = html.replace(f'<aside class="{side}', f'<aside aria-label="{name}" class="{side}')
    html = re.sub(r'<span class="[npw]">([^<]*)</span>', r'\1', html)
    whole = lambda text: POWER.sub(r'<span class="whole">\1</span>', text[0])
    return re.sub(r'<t[dh][ >].*?</t[dh]>', lambda cell: TEXT.sub(whole, cell[0]), html, flags=re.S)

def with_sphinx(proc:Path, out:Path):
    """A warning is an error:
    a link that leads nowhere, a page outside the navigation, a notebook that cannot be read"""
    from sphinx.cmd.build import main
    if main(['-c', str(ROOT/'docs'), '-d', str(proc/'.doctrees'), '-q', '-W', '--keep-going',
             str(proc), str(out)]):
        shutil.rmtree(proc/'.doctrees', ignore_errors=True)  # a page that is kept there warns no second time
        sys.exit('the site is not whole: see the warnings above')
    for page in out.rglob('*.html'):
        page.write_text(tidied(page.read_text(encoding='utf-8')), encoding='utf-8')
    for left in ('.buildinfo', 'objects.inv'):
        (out/left).unlink(missing_ok=True)
    (out/'_sources').is_dir() and (out/'_sources').rmdir()

def text(notebook:Path) -> str:
    "A notebook as plain Markdown: its prose, its code, and what the code gave where that is text"
    out = []
    for c in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        source = ''.join(c['source']).strip()
        code = re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()
        if c['cell_type'] == 'markdown':
            out.append(source)
        elif c['cell_type'] == 'code' and code and not re.search(
            r'^#\| *(hide|default_exp)', source, re.M):
            if 'echo: false' not in source:
                out.append(f'```python\n{code}\n```')
            for o in c.get('outputs', []):
                data = o.get('data', {})
                plain = ''.join(o.get('text', data.get('text/plain', '')))
                out.append(''.join(data['text/markdown']) if 'text/markdown' in data
                           else f'```\n{plain.rstrip()}\n```' if plain.strip() else '')
    return '\n\n'.join(filter(None, out)) + '\n'

def downloaded(notebook:Path, page:str) -> bytes:
    """The notebook as it stands; with a first cell that installs ftlab where it is not,
    once settings.ini says from where (`git_url`)"""
    from ftlab.map import hosted
    if not (at := hosted(page)):
        return notebook.read_bytes()
    nb = json.loads(notebook.read_text(encoding='utf-8'))
    source = ('# Where ftlab is not installed, as on Colab: install it\ntry: import ftlab\nexcept '
              f'ImportError:\n    {at["install"]}')
    nb['cells'].insert(0, dict(cell_type='code', id='install', metadata={}, execution_count=None,
                               outputs=[], source=source.splitlines(keepends=True)))
    return (json.dumps(nb, indent=1, ensure_ascii=False) + '\n').encode()

def extras(out:Path, nbs:Path=ROOT/'nbs'):
    "Beside every page its notebook and its text; llms.txt, which lists the texts"
    site, lines = website(), [f'# {website()["title"]}', '', f'> {heading(nbs/"index.ipynb")[1]}']
    for name, pages in sections():
        lines += ['', f'## {name or "Start"}', '']
        for p in pages:
            title, about = heading(nbs/p)
            to = f'{site.get("site-url", "")}{p.removesuffix(".ipynb")}.html.md'
            lines.append(f'- [{title}]({to})' + (f': {about}' if about else ''))
            (out/p).parent.mkdir(parents=True, exist_ok=True)
            (out/p).write_bytes(downloaded(nbs/p, p))
            (out/p).with_suffix('.html.md').write_text(text(nbs/p), encoding='utf-8')
    (out/'llms.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')

def weigh(out:Path) -> str:
    "Total size and the three largest pages"
    size = {p.relative_to(out).as_posix(): p.stat().st_size for p in out.rglob('*') if p.is_file()}
    top = sorted((p for p in size if p.endswith('.html')), key=size.get)[:-4:-1]
    return (f'{sum(size.values())/2**20:.1f} MB in {len(size)} files; the largest '
            'pages: ' + ', '.join(f'{p} {size[p]/1024:.0f} kB' for p in top))

LIMIT = 300  # kB of a page, as notebook and as HTML: what a reader waits for, and what git keeps forever

def too_heavy(folder:Path) -> list[str]:
    "A line for each page and notebook below `folder` of more than `LIMIT` kB"
    size = {p.relative_to(folder).as_posix(): p.stat().st_size/1024
            for p in sorted(folder.rglob('*')) if p.suffix in ('.html', '.ipynb')}
    return [f'{p} has {kb:.0f} kB, and {LIMIT} are the limit: store fewer or lighter outputs (SVG '
            'with fewer points, smaller tables), '
            'or make two pages of it' for p, kb in size.items() if kb > LIMIT]

def build(out:Path, quarto:bool=bool(shutil.which('quarto')), fresh:bool=False) -> str:
    "Build the site at `out`; what was built, in how many seconds, and how much it weighs"
    t = time.perf_counter()
    fresh = fresh or stale(ROOT/'_proc')
    proc = process(fresh)
    made = time.perf_counter() - t
    if fresh:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(proc/'.doctrees', ignore_errors=True)
    (with_quarto if quarto else with_sphinx)(proc, out)
    extras(out)
    if heavy := [] if quarto else too_heavy(out):  # Quarto gives every line of code an anchor: its pages weigh more
        sys.exit('\n'.join(heavy))
    return (f'{out/"index.html"}: {"Quarto" if quarto else "Sphinx"}, {time.perf_counter() - t:.0f} '
            f's ({made:.0f} s of them to process notebooks); {weigh(out)}')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--out', type=Path, default=ROOT/'_docs')
    p.add_argument('--sphinx', action='store_true', help='not Quarto, even where it is')
    p.add_argument('--fresh', action='store_true', help='without the caches')
    a = p.parse_args()
    print(build(a.out.resolve(), not a.sphinx and bool(shutil.which('quarto')), a.fresh))
