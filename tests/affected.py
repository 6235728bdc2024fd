"""Which papers' pages, contracts and claims a run of the tests covers:
all, those that a change touches, a tenth that rotates.

A paper is a page in a family's folder, `nbs/<part>/<family>/<key>.ipynb`; its key is the page's
name. Everything else is the library, and always tested. What a change touches is read from the
sources: who imports whom, transitively, who names a paper, who reads which result.
What cannot be judged from the sources counts as touching everything."""
import ast
import datetime
import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

from imports import imported
from pages import ROOT, pages, project_files

FEW = 100  # with this many papers or fewer, `make test` runs everything
TURNS = 10  # days until the rotation has seen every paper
# lists of everything: what they import says nothing about who needs it
HUBS = {'ftlab', 'ftlab._modidx', 'ftlab.methods', 'ftlab.papers'}
# what no paper's test reads; the library's tests, which always run, do
APART = re.compile(r'(docs|binder|\.ci|papers|nbs/images)/|tests/(browser|native)/|tests/test_\w+\.py$|'
                   r'[^/]*\.(md|cff|in)$|LICENSE$|\.git\w+$|(nbs/)?_quarto\.yml$|README_files/')


def key_of(page: str) -> str | None:
    """The paper's key that a page is filed under, or None:
    'adapters/subsets/hft.ipynb' -> 'hft'. The doctor's checks are library"""
    parts = Path(page).parts
    return Path(page).stem if len(parts) == 3 and parts[0] != 'instruments' and Path(page).stem != 'index' else None


def plain(key: str) -> str:
    "A key as it is compared: claims and functions have been named with and without underscores"
    return key.replace('_', '').lower()


def turn(key: str, day: datetime.date) -> bool:
    """Is it the key's turn? Once in TURNS days, by a hash of the key alone:
    a new paper moves no other"""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % TURNS == day.toordinal() % TURNS


def code_of(path: Path) -> str:
    "A Python file's source, a notebook's code cells, or a text file as it stands"
    text = path.read_text(encoding='utf-8')
    if path.suffix != '.ipynb':
        return text
    cells = [''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'code']
    return '\n'.join(re.sub(r'^(\s*)[%!].*$', r'\1pass', c, flags=re.M) for c in cells)


@dataclass(eq=False)
class Sources:
    "The project's files, and which of them each one needs"
    root: Path = ROOT
    files: list[str] = field(default_factory=lambda: [p.as_posix() for p in project_files()])

    @cached_property
    def papers(self) -> dict[str, str]:
        "{key: page}, by key"
        found = {key_of(p): p for p in pages(self.root/'nbs')}
        return {k: found[k] for k in sorted(k for k in found if k)}

    @cached_property
    def modules(self) -> dict[str, str]:
        "{dotted name: file} of the package and of what tests and benches share"
        named = {}
        for f in self.files:
            path = Path(f)
            if path.suffix != '.py':
                continue
            if path.parts[0] == 'ftlab':
                named['.'.join(path.with_suffix('').parts).removesuffix('.__init__')] = f
            elif path.parts[0] in ('tests', 'bench') and len(path.parts) == 2:
                named[path.stem] = f
        return named

    @cached_property
    def public(self) -> dict[str, str]:
        """{name of the face: module} as `ftlab/__init__.py` lists them:
        `ftlab.fit` needs ftlab.trainers.loop"""
        text = (self.root/'ftlab'/'__init__.py').read_text(encoding='utf-8')
        return dict(re.findall(r"(\w+)=\('(ftlab[\w.]*)'", text))

    @cached_property
    def by_key(self) -> dict[str, str]:
        "{a paper's key, plain: its module's file}"
        homes = {Path(f).stem: f for f in self.modules.values() if len(Path(f).parts) == 4}
        return {plain(k): homes[k] for k in self.papers if k in homes}

    @cache
    def needs(self, file: str) -> set[str]:
        "The files that `file` needs at first hand"
        path = self.root/file
        if path.suffix not in ('.py', '.ipynb', '.toml'):
            return set()
        text = code_of(path)
        return (self._named(text, file) | self._results(text) | self.imports(file)) - {file}

    @cache
    def imports(self, file: str) -> set[str]:
        "The files that `file` imports at first hand, lazily or not"
        path = self.root/file
        if path.suffix not in ('.py', '.ipynb'):
            return set()
        text = code_of(path)
        found = self._imported(file, text)
        # names imported on first use
        if path.name == '__init__.py' and 'import_module(' in text and path.parent.name != 'ftlab':
            found |= {f for f in self.modules.values() if Path(f).parent == Path(file).parent}
        return found - {file}

    def _imported(self, file: str, text: str) -> set[str]:
        names = {f: m for m, f in self.modules.items()}
        name = names.get(file, 'page')
        if name in HUBS:
            return set()
        known = set(self.modules)
        try:
            tree = ast.parse(text)
        except SyntaxError:  # a page with IPython's own syntax: what it imports by lines
            lines = re.findall(r'^\s*(?:import|from) .*$', text, re.M)
            tree = ast.parse('\n'.join(l.strip() for l in lines if not l.rstrip().endswith('(')))
        found = imported(name, ast.unparse(tree), known)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found |= {node.module}
                found |= {self.public[a.name] for a in node.names if node.module == 'ftlab'
                          and a.name in self.public}
            elif (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                  and node.value.id == 'ftlab'):
                found |= {self.public.get(node.attr, 'ftlab')}
        return {self.modules[m] for m in found if m in known}

    def _named(self, text: str, file: str) -> set[str]:
        "The modules of the papers that the text names: in `methods.hft`, 'hft * dft', `hft = \"hft\"`"
        if file in {self.modules.get(h) for h in HUBS}:
            return set()
        return {self.by_key[w]
                for w in {plain(w) for w in re.findall(r'\w+', text)} if w in self.by_key}

    def _results(self, text: str) -> set[str]:
        "The results of benches that the text names"
        said = set(re.findall(r'[\w-]+(?=\.json)', text))
        return {f for f in self.files if f.startswith('bench/results/') and Path(f).stem in said}

    def own(self, key: str) -> set[str]:
        "The files that are a paper's alone: page, module, claim, test"
        names = {key, plain(key)}
        own = {f'nbs/{self.papers[key]}', self.by_key.get(plain(key), '')}
        for f in self.files:
            parts = Path(f).parts
            if parts[0] == 'claims' and (names & {*parts[1:-1], Path(f).stem}):
                own.add(f)
            elif parts[0] == 'tests' and Path(f).stem.removeprefix('test_') in names:
                own.add(f)
        return own & set(self.files)

    @cached_property
    def shared(self) -> set[str]:
        """What every paper's contract and claim is tested by,
        without the papers that these tests use as examples"""
        start = {f for f in ('tests/test_contract.py', 'tests/test_claims.py') if f in self.files}
        papers = set(self.by_key.values())
        return self.closure_of(start, without=papers)

    def closure_of(self, start: set[str], without: Collection = (),
                   step: Callable | None = None) -> set[str]:
        """`start` and every file that it needs (or `step` leads to), directly or through others;
        nothing through `without`"""
        step = step or self.needs
        seen, todo = set(start), list(start)
        while todo:
            for f in step(todo.pop()) - seen - set(without):
                seen.add(f)
                todo.append(f)
        return seen

    @cache
    def closure(self, key: str) -> set[str]:
        "Every file that a paper's page, contract, claim or test needs"
        return self.closure_of(self.own(key)) | self.shared

    def touched(self, changed: list[str]) -> tuple[set[str], str]:
        "The keys that a change of these files touches, and why where it is all of them"
        for f in changed:
            gone = f not in self.files and f.startswith(('ftlab/', 'tests/'))  # who needed it cannot be asked any more
            if gone or f in self.files and not self.judged(f):
                return set(self.papers), f'{f} changed, and every paper may depend on it'
        return {k for k in self.papers if self.closure(k) & set(changed)}, ''

    def judged(self, file: str) -> bool:
        "Do the sources tell who needs this file?"
        read = (file.startswith(('ftlab/', 'nbs/', 'claims/', 'tests/', 'bench/'))
                and file.endswith(('.py', '.ipynb', '.toml')))
        return (read or bool(APART.match(file)) or file.startswith(('bench/', 'claims/'))
                and file.endswith('.json'))


def changed_since(ref: str, root: Path = ROOT) -> list[str] | None:
    """The files that differ from what `ref` had, gone ones and new ones included;
    None where git cannot say"""
    def git(*args):
        return subprocess.run(['git', *args], cwd=root, capture_output=True, text=True)
    diff, new = (git('diff', '--name-only', '--no-renames', '-z', ref, '--'),
                 git('ls-files', '-z', '--others', '--exclude-standard'))
    if diff.returncode or new.returncode:
        return None
    return sorted({f for f in (diff.stdout + new.stdout).split('\0') if f})


@dataclass
class Selection:
    "The papers that a run covers, and why"
    keys: set[str]
    why: str


def select(sources: Sources, everything: bool = False, ref: str | None = None,
           day: datetime.date | None = None) -> Selection:
    """Everything when asked, or with few papers and no `ref`; else what changed since `ref`
    (by default since the last commit) and the day's tenth. Where git cannot say what changed: everything."""
    papers, day = set(sources.papers), day or datetime.date.today()
    if everything:
        return Selection(papers, 'everything, as asked')
    if ref is None and len(papers) <= FEW:
        return Selection(papers, f'everything: there are at most {FEW} papers')
    changed = changed_since(ref or 'HEAD', sources.root)
    if changed is None:
        return Selection(papers, f'everything: git cannot tell what changed since {ref or "HEAD"}')
    touched, why = sources.touched(changed)
    due = {k for k in papers if turn(k, day)}
    text = (f'{why or f"{len(touched)} that {len(changed)} changed files touch"}, '
            f'and {len(due - touched)} whose turn it is')
    return Selection(touched | due, text)
