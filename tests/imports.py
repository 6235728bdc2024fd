"""The rules of imports, read from the modules' source.

- The library points one way:
  core, lab <- native <- adapters <- trainers <- evaluators <- instruments <- course, cli.
- A paper's module (`ftlab.<part>.<family>.<key>`) imports what it likes of the library below the
  instruments, and other papers. No library module imports a paper.
- No cycles: not between modules, not between parts.
- Nothing private crosses from one module into another: neither an imported name nor an attribute.

Rules that are broken today stand in `known_imports.json`, until they are gone:
`python tests/imports.py` writes it anew, and refuses to add to it.
"""
import ast
import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

# what is not listed comes last
RANK = dict(core=0, lab=0, native=1, adapters=2, trainers=3, evaluators=4, instruments=5)
LAST = 6
# their names stay importable there
AT_THE_TOP = dict(methods='instruments', papers='instruments', map='course', exercises='course')
KNOWN = Path(__file__).with_name('known_imports.json')


def modules(lib: Path) -> dict[str, str]:
    "{dotted name: source} of the package at `lib`; a folder's __init__ bears the folder's name"
    named = lambda p: '.'.join((lib.name, *p.relative_to(lib).with_suffix('').parts)).removesuffix('.__init__')
    return {named(p): p.read_text(encoding='utf-8') for p in sorted(lib.rglob('*.py'))}


@lru_cache(None)
def tree(source: str) -> ast.Module:
    return ast.parse(source)


def taken(name: str, source: str, known: set[str]) -> set[tuple[str, str]]:
    """(module among `known`, what is taken from it or '' for the module itself) of all that
    module `name` imports, anywhere in its source"""
    top, is_package, found = name.split('.')[0], any(k.startswith(name + '.') for k in known), set()
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Import):
            found |= {(a.name, '') for a in node.names if a.name.split('.')[0] == top}
        elif isinstance(node, ast.ImportFrom):
            base = (name.split('.')[:len(name.split('.')) - node.level + is_package] if node.level
                    else [])
            base = '.'.join(base + (node.module.split('.') if node.module else []))
            if base.split('.')[0] == top:
                found |= {(f'{base}.{a.name}', '') if f'{base}.{a.name}' in known
                          else (base, a.name) for a in node.names}
    return {(m, n) for m, n in found if m != name}


def imported(name: str, source: str, known: set[str]) -> set[str]:
    "The modules among `known` that module `name` imports"
    return {m for m, _ in taken(name, source, known)}


def is_paper(module: str) -> bool:
    "Does it lie in a family's folder? The doctor's checks lie as deep, and are library"
    return (module.count('.') == 3 and part(module) != 'instruments'
            and not module.split('.')[-1].startswith('_'))


def part(module: str) -> str:
    """The part that a module belongs to: its folder,
    or what a module at the top is counted with; '' for the package itself"""
    name = module.split('.')[1] if '.' in module else ''
    return AT_THE_TOP.get(name, name)


def asks_where_it_is(source: str, package: str) -> bool:
    """Does a module use nothing of the package itself but `__file__` and the like? Its own
    `__file__` a notebook does not have"""
    used = {n.attr for n in ast.walk(tree(source)) if isinstance(n, ast.Attribute)
            and isinstance(n.value, ast.Name) and n.value.id == package}
    return bool(used) and all(u.startswith('__') for u in used)


def library(sources: Mapping[str, str]) -> list[str]:
    """The modules whose imports are judged: the face imports everything, lazily;
    the index imports nothing"""
    return [m for m in sources if '.' in m and not m.endswith('._modidx')]


def wrong_imports(sources: Mapping[str, str]) -> list[str]:
    "One line for each import that points the wrong way"
    known, wrong = set(sources), []
    for name in library(sources):
        for other in sorted(imported(name, sources[name], known)):
            a, b = RANK.get(part(name), LAST), RANK.get(part(other), LAST)
            if (is_paper(name) and (is_paper(other) or b < RANK['instruments']) or '.' not in other
                and asks_where_it_is(sources[name], other)):
                continue
            if is_paper(name):
                wrong.append(f'{name} imports {other}: a paper imports the library below the instruments, and papers')
            elif is_paper(other):
                wrong.append(f'{name} imports {other}: the library imports no paper')
            elif b > a and not ('.' not in other and asks_where_it_is(sources[name], other)):
                wrong.append(f'{name} imports {other}: {part(other) or "the package itself"} comes after {part(name)}')
    return wrong


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    "The groups of nodes that reach one another (Tarjan's strongly connected components), sorted"
    index, low, stack, found, on = {}, {}, [], [], set()
    def visit(v):
        index[v] = low[v] = len(index)
        stack.append(v)
        on.add(v)
        for w in graph.get(v, ()):
            if w not in index:
                visit(w)
                low[v] = min(low[v], low[w])
            elif w in on:
                low[v] = min(low[v], index[w])
        if low[v] == index[v]:
            group = []
            while not group or group[-1] != v:
                group.append(stack.pop())
                on.discard(group[-1])
            if len(group) > 1:
                found.append(sorted(group))
    for v in graph:
        if v not in index:
            visit(v)
    return sorted(found)


def circular_imports(sources: Mapping[str, str]) -> list[str]:
    "One line for each group of modules, and of parts, that import one another"
    known, between = set(sources), defaultdict(set)
    graph = {m: imported(m, sources[m], known) & set(library(sources)) for m in library(sources)}
    for m, others in graph.items():
        if not is_paper(m):
            between[part(m)] |= {part(o) for o in others if not is_paper(o)} - {part(m)}
    return ([f'modules in a circle: {", ".join(group)}' for group in circles(graph)]
            + [f'parts in a circle: {", ".join(group)}' for group in circles(between)])


def private(name: str) -> bool:
    return name.startswith('_') and not name.endswith('__')


def own_privates(source: str) -> set[str]:
    "The private names that a module defines or assigns, attributes too"
    found = set()
    for n in ast.walk(tree(source)):
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(n.name)
        elif isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
            found.add(n.id)
        elif isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store):
            found.add(n.attr)
    return {n for n in found if private(n)}


def crossing_privates(sources: Mapping[str, str]) -> list[str]:
    "One line for each private name or attribute of one module that another one uses"
    known, owners, wrong = set(sources), defaultdict(set), set()
    for m in library(sources):
        for n in own_privates(sources[m]):
            owners[n].add(m)
    for m in library(sources):
        wrong |= {f'{m} takes {n} from {other}'
                  for other, n in taken(m, sources[m], known) if private(n)}
        for node in ast.walk(tree(sources[m])):
            if (isinstance(node, ast.Attribute) and private(node.attr) and owners[node.attr]
                and m not in owners[node.attr]):
                wrong.add(f'{m} reaches for .{node.attr} of {" or ".join(sorted(owners[node.attr]))}')
    return sorted(wrong)


def broken(lib: Path) -> dict[str, list[str]]:
    "{rule: what breaks it} in the package at `lib`"
    sources = modules(lib)
    return dict(direction=wrong_imports(sources), circles=circular_imports(sources),
                private=crossing_privates(sources))


def known() -> dict[str, list[str]]:
    return json.loads(KNOWN.read_text(encoding='utf-8'))


if __name__ == '__main__':
    now, before = broken(KNOWN.parent.parent/'ftlab'), known() if KNOWN.exists() else {}
    if new := [w for rule, lines in now.items() for w in lines if before and w not in before[rule]]:
        sys.exit('new, so not written:\n' + '\n'.join(new))
    KNOWN.write_text(json.dumps(now, indent=1) + '\n', encoding='utf-8')
    print({rule: len(lines) for rule, lines in now.items()})
