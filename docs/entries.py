"""The notebooks as a site shows them: nbdev's processing, with three differences.

- Lesson cells are never run. nbdev runs every cell that imports something; here an entry is made
  from the exported module, and only cells marked `#| exec_doc` run, so that what they show
  (verdicts, contents) is never older than the site.
- An entry has the signature, the docstring, a table of the parameters, and the source below a
  fold: no repository need be reachable.
- Names and files are linked inside the site, and nothing of a page's first text is lost.
"""
import importlib, inspect, os, re, shutil, sys
from collections import Counter
from functools import lru_cache
from itertools import groupby
from pathlib import Path
import nbdev.config
import nbdev.processors
import nbdev.serve
from execnb.shell import CaptureShell
from fastcore.docments import DocmentTbl, MarkdownRenderer
from fastcore.nbio import mk_cell
from nbdev.processors import (FilterDefaults, Processor, _get_nm, _is_showdoc, add_links,
                              exec_show_docs)
from nbdev.showdoc import show_doc
from nav import ROOT

sys.path.insert(0, str(ROOT))  # the pages are about this checkout's ftlab, not about one installed from elsewhere

def signature(text:str, width:int=84) -> str:
    """A signature in one line where that fits, else with the parameters on lines of their own,
    none wider than what a page shows"""
    if not (m := re.fullmatch(r'(\w+ [\w.]+)\(\s*(.*?)\s*\)(->.*)?:', text.strip(), re.S)):
        return text
    given, end = re.sub(r'\s*\n\s*', ' ', m[2]).replace('=<factory>', '=...'), ')' + (m[3] or '')
    if len(m[1]) + len(given) + len(end) < width:
        return f'{m[1]}({given}{end}'
    lines = ['']
    for one in re.split(r'(?<=,) (?=[\w*]+(?:[:=,]|$)|[/*])', given):
        if lines[-1] and len(lines[-1]) + len(one) > width - 5:
            lines.append(one)
        else:
            lines[-1] = f'{lines[-1]} {one}'.strip()
    return '\n    '.join([f'{m[1]}(', *lines]) + f'\n{end}'

def parameters(table:str) -> str:
    "The table of parameters, each name as code, and what comes back as a row like the others"
    table = table.replace('|    |', '| **Name** |', 1).replace('**Returns**', '*returns*')
    row = lambda m: f'| <code>{m[1]}</code> |' if m[1] != '*returns*' else '| *returns* |'
    return re.sub(r'^\| (\*?\w+\*?) \|', row,
                  re.sub(r'(?<=\| )\*\*(.+?)\*\*(?= \|)',
                         lambda m: m[0] if m[1] in ('Name', 'Type', 'Default', 'Details') else m[1],
                         table), flags=re.M)

sourcelines = lru_cache(None)(inspect.getsourcelines)  # Python reads the whole module for each class

def addressless(text:str) -> str:
    """A signature or a table without the addresses of what it names:
    `<built-in method softmax of type object at 0x7f6a066cea40>` is softmax"""
    named = r'<(?:built-in method|built-in function|bound method|function) ((?:[\w.]|<locals>)+)(?:[^<>]|<[^<>]*>)*>'
    return re.sub(named, r'\1', text)

class Entry(MarkdownRenderer):
    "What `show_doc` shows of a function or class"
    def _repr_markdown_(self):
        table = DocmentTbl(self.sym)
        for d in self.dm.dm.values():
            d['docment'] = ''
        lines, start = sourcelines(self.sym)
        file = Path(inspect.getsourcefile(self.sym)).relative_to(ROOT).as_posix()
        said = signature(re.sub('^def ', 'class ', str(self.dm)).replace('->None', '')
                         if inspect.isclass(self.sym) else str(self.dm))
        rows = addressless(parameters(str(table))) if table.has_docment else ''
        return '\n\n'.join(filter(None,
                                  [f'{"#"*self.title_level} {self.nm}',
                                   f'```python\n{addressless(said)}\n```',
                                   self.docs.partition('\n\nParameters:\n')[0], rows,
                                   f'<details class="source"><summary>Source: {file}, line '
                                   f'{start}</summary>\n\n```python\n{"".join(lines).rstrip()}\n```\n\n</details>']))

class split_title(Processor):
    """nbdev takes the title and the description out of the first text, and drops the rest of it:
    the rest becomes a text of its own"""
    def begin(self):
        first = next((i for i, c in enumerate(self.nb.cells) if c.cell_type == 'markdown'), None)
        if first is None:
            return
        whole = self.nb.cells[first].source
        head = re.match(r'# .*\n*(?:> .*)?', whole)
        if not head or not (rest := whole[head.end():].strip()):
            return
        self.nb.cells[first].source = head[0]
        self.nb.cells.insert(first + 1, mk_cell(rest, 'markdown'))

def where(page:str) -> str:
    """The line below a page's title: where it runs, and the file.
    Binder and Colab where settings.ini names a public address (`git_url`)"""
    from ftlab.map import hosted
    at = hosted(page)
    link = lambda to, text, how='': f'<a href="{to}"{how}>{text}</a>'
    out = [link(f'http://localhost:8888/lab/tree/nbs/{page}', 'Open in Lab',
                ' title="where make lab is running"'),
           link(Path(page).name, 'Download the notebook', ' download data-noresolveinput')]
    if at:
        out += [link(at['colab'].replace('/main/nbs/', '/gh-pages/'), 'Open in Colab'),
                link(at['binder'], 'Open in Binder')]  # the site's copy has the cell that installs
    return f'<p class="notebook">{" ".join(out)}</p>'

class add_where(Processor):
    "See `where`; below the title, which nbdev has made the front matter"
    def begin(self):
        at = next((i + 1 for i, c in enumerate(self.nb.cells) if c.cell_type == 'raw'), 0)
        self.nb.cells.insert(at,
                             mk_cell(where(Path(self.nb.path_).resolve().relative_to(
                                 ROOT/'nbs').as_posix()), 'markdown'))

class show_entries(Processor):
    """Fill the cells that nbdev added for what a page exports, in the order of the source, and run
    what asks for it"""
    def begin(self):
        module = next((c.directives_['default_exp'] for c in self.nb.cells if c.cell_type == 'code'
                       and 'default_exp' in c.directives_), None)
        self.names = vars(importlib.import_module(f'ftlab.{module}')) if module else {}
        self.shell, self.level = None, 2
        line = lambda c: sourcelines(eval(_get_nm(c.parsed_()[0]), dict(self.names)))[1]
        # what Python calls when a name is missing is nothing to call by hand
        self.nb.cells = [c for c in self.nb.cells if not (c.cell_type == 'code' and _is_showdoc(c)
                                                          and _get_nm(c.parsed_()[0]) == '__getattr__')]
        for shown, run in groupby(range(len(self.nb.cells)),
                                  lambda i: self.nb.cells[i].cell_type == 'code'
                                  and bool(_is_showdoc(self.nb.cells[i]))):
            if shown:
                at = list(run)
                self.nb.cells[at[0]:at[-1] + 1] = sorted((self.nb.cells[i] for i in at), key=line)
    def __call__(self, cell):
        if cell.cell_type == 'markdown' and re.search('^## ', cell.source, re.M):
            self.level = 3  # no level is left out
        if _is_showdoc(cell):
            entry = show_doc(eval(_get_nm(cell.parsed_()[0]), dict(self.names)), renderer=Entry,
                             title_level=self.level)
            cell.outputs = [dict(output_type='display_data', metadata={},
                                 data={'text/markdown': entry._repr_markdown_()})]
        elif cell.cell_type == 'code' and 'exec_doc' in cell.directives_:
            self.shell = self.shell or CaptureShell()
            self.shell.cell(cell)
            cell.metadata.pop('execution', None)
            if self.shell.exc:
                raise RuntimeError('a cell marked exec_doc '
                                   f'failed:\n{cell.source}') from self.shell.exc

@lru_cache(1)
def homes() -> dict[str, str]:
    """Where a name is explained, `trainers/fit.ipynb#fit`:
    names of one page alone that are no everyday words, and `ftlab.NAME`"""
    import ftlab
    from ftlab._modidx import d
    places = {f'{m}.{n}': page.replace('.html', '.ipynb') for m, syms in d['syms'].items()
              for full, (page, _) in syms.items() if '.' not in (n := full.removeprefix(f'{m}.'))
              and n[0] != '_'}
    short = Counter(full.rpartition('.')[2] for full in places)
    out = {n: p for full, p in places.items() if short[n := full.rpartition('.')[2]] == 1
           and re.search('_|[a-z][A-Z]|^Recipe$', n)}
    out |= {f'ftlab.{k}': p for k, (m, a) in ftlab._PUBLIC.items()
            if (p := places.get(f'{m}.{a}'))}
    methods = ftlab.methods.names()
    return out | {f'ftlab.methods.{n}': p for full, p in places.items()
                  if (n := full.rpartition('.')[2]) in methods}

CODE = re.compile(r'(?<![`\[])`(\w[\w.]*)(\(\))?`(?![`\]])')
ANCHOR = re.compile(r'(?:(?<=\()|(?<=\.ipynb))#[^)\s]+(?=\))')  # Jupyter's anchors have capitals, a site's have none
OUTSIDE = re.compile(r'\]\(((?:\.\./)+)([A-Za-z][\w./-]*)(#[\w-]*)?\)')

def linked(text:str, page:str) -> str:
    """Prose of `page` with known names linked,
    and files from outside nbs/ linked as copies in `top/`"""
    here, up = Path(page).parent, '../'*page.count('/')
    def name(m):
        file, _, anchor = homes().get(m[1], '').partition('#')
        return (f'[`{m[1]}{m[2] or ""}`]({os.path.relpath(file, here)}#{anchor})' if file
                and file != page else m[0])

    def outside(m):
        return f']({up}top/{m[2]}{m[3] or ""})' if len(m[1])//3 > page.count('/') else m[0]

    # odd ones: code, headings, links
    parts = re.split(r'(^```.*?^```|^#.*$|\[[^\]]*\]\([^)]*\))', text, flags=re.M | re.S)
    text = OUTSIDE.sub(outside,
                       ''.join(p if i % 2 else CODE.sub(name, p) for i, p in enumerate(parts)))
    return ANCHOR.sub(lambda m: m[0].lower(), text)

class link(Processor):
    """See `linked`; and a page becomes what every reader takes:
    pandoc wants no result without a number, nbformat no key that only nbdev knows"""
    def __call__(self, cell):
        cell.pop('has_sd', None)
        page = Path(self.nb.path_).resolve().relative_to(ROOT/'nbs').as_posix()
        if cell.cell_type == 'markdown':
            cell.source = linked(cell.source, page)
        for o in cell.get('outputs', []):
            if o['output_type'] == 'execute_result':
                o['output_type'] = 'display_data'
                o.pop('execution_count', None)
            if 'text/markdown' in o.get('data', {}):
                o['data']['text/markdown'] = linked(''.join(o['data']['text/markdown']), page)

class Processing(FilterDefaults):
    def base_procs(self):
        shown = [show_entries if p is exec_show_docs else p
                 for p in super().base_procs() if p is not add_links]
        return [split_title, *shown, add_where, link]

def stale(proc:Path) -> bool:
    """Has anything changed that every page depends on?
    (Sphinx itself sees what changed in templates and static files)"""
    shared = [*(ROOT/f for f in ('_quarto.yml', 'settings.ini', 'CHANGELOG.md', 'CITATION.cff')),
              *(ROOT/'docs').glob('*.py')]
    return not proc.exists() or max(p.stat().st_mtime for p in shared) > proc.stat().st_mtime

def process(force:bool=False) -> Path:
    """The processed notebooks, in `_proc`:
    those that changed since the last time, and those that ask to be run"""
    os.chdir(ROOT)
    nbdev.serve.FilterDefaults = Processing
    # which reads pyproject.toml twice for every cell
    nbdev.processors.get_config = lru_cache(nbdev.config.get_config)
    proc, outside = ROOT/'_proc', set()
    last = max(p.stat().st_mtime for folder in ('nbs', 'ftlab', 'claims')
               for p in (ROOT/folder).rglob('*') if p.suffix in ('.ipynb', '.py', '.json', '.toml'))
    for page in (ROOT/'nbs').rglob('*.ipynb'):
        text = page.read_text(encoding='utf-8')
        outside |= {file for _, file, _ in OUTSIDE.findall(text) if (ROOT/file).is_file()
                    and not (ROOT/'nbs'/file).exists()}
        if '"#| exec_doc' in text and (
            made := proc/page.relative_to(ROOT/'nbs')).exists() and made.stat().st_mtime < last:
            made.unlink()
    nbdev.serve.proc_nbs(n_workers=0, force=force or stale(proc))
    for file in outside:
        (to := proc/'top'/file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/file, to)
    return proc
