"The one way in which imports point, read from the modules' source: lab, core <- native <- adapters <- trainers <- evaluators <- the rest"
import ast
from pathlib import Path

RANK = dict(lab=0, core=0, native=1, adapters=2, trainers=3, evaluators=4)  # what is not listed (modules at the top, `ftlab` itself) comes last
NOUNS = dict(adapters={'select', 'delta', 'edit', 'attach'}, trainers={'source', 'objective', 'step', 'loop', 'callbacks', 'learner', 'checkpoint', 'reference', 'stage', 'stages', 'fit', 'run', 'watch', 'shard'}, evaluators={'decode', 'probe', 'report'}, beyond=set())

def modules(lib:Path) -> dict[str, str]:
    "{dotted name: source} of the package at `lib`; a folder's __init__ bears the folder's name"
    named = lambda p: '.'.join((lib.name, *p.relative_to(lib).with_suffix('').parts)).removesuffix('.__init__')
    return {named(p): p.read_text(encoding='utf-8') for p in sorted(lib.rglob('*.py'))}

def imported(name:str, source:str, known:set[str]) -> set[str]:
    "The modules among `known` that module `name` imports, anywhere in its source"
    top, is_package, found = name.split('.')[0], any(k.startswith(name + '.') for k in known), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names if a.name.split('.')[0] == top}
        elif isinstance(node, ast.ImportFrom):
            base = name.split('.')[:len(name.split('.')) - node.level + is_package] if node.level else []
            base = '.'.join(base + (node.module.split('.') if node.module else []))
            if base.split('.')[0] == top: found |= {f'{base}.{a.name}' if f'{base}.{a.name}' in known else base for a in node.names}
    return found

def wrong_imports(sources:dict[str, str]) -> list[str]:
    "One line for each import that points the wrong way"
    known, wrong = set(sources), []
    part = lambda m: m.split('.')[1] if len(m.split('.')) > 2 or '.'.join(m.split('.')[:2]) in packages else ''
    packages = {'.'.join(m.split('.')[:2]) for m in known if m.count('.') > 1}
    for name, source in sources.items():
        if '.' not in name or name.endswith('._modidx'): continue  # the face imports everything, lazily; the index imports nothing
        for other in sorted(imported(name, source, known) - {name}):
            a, b = part(name), part(other)
            if RANK.get(b, 5) > RANK.get(a, 5): wrong.append(f'{name} imports {other}: {b or "the top"} comes after {a}')
            elif a == b and a in NOUNS and other.count('.') > 1 and other.split('.')[2] not in NOUNS[a]:
                wrong.append(f'{name} imports {other}: inside {a} only its nouns ({", ".join(sorted(NOUNS[a]))}) are imported')
    return wrong
