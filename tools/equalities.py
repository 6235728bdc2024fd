"""Collect the equalities with other packages from the tests, without running or importing them.

A test that compares something of ours with another package on the same tensors is marked

    @pytest.mark.peer('dora', 'peft', 'what is compared', tolerance=1e-6)

and reads what it allows from the fixture `tolerance`, so the list cannot say anything else. The package is one of
`settings.ini`, so that CI installs it."""
import ast
import re
from collections import Counter, defaultdict
from configparser import ConfigParser
from functools import cache
from pathlib import Path

from ftlab._modidx import d as MODULES

MARK = 'pytest.mark.peer'


@cache
def versions(root: Path) -> dict[str, str]:
    "{package: the versions that settings.ini asks for} of what the package and its bench extra need"
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    lines = [o.strip() for k in ('requirements', 'bench_requirements')
             for o in config['DEFAULT'][k].splitlines() if o.strip()]
    return {m[1]: m[2].removeprefix('==') for m in (re.match(r'([\w-]+)(.*)', o) for o in lines)}


@cache
def symbols() -> dict[str, list[str]]:
    "{last part of its name: dotted names} of what the package exports"
    found = defaultdict(list)
    for names in MODULES['syms'].values():
        for name in names:
            found[name.rpartition('.')[2]].append(name)
    return found


def exported(name: str) -> tuple[str, str]:
    """(name, page) of something of ours; `name` may begin with its module's, as in 'statistics.gradients'.
    Raises `ValueError` if there is none, or more than one"""
    short = name.rpartition('.')[2]
    found = [n for n in symbols().get(short, ()) if f'.{n}'.endswith(f'.{name}')]
    if len(found) != 1:
        raise ValueError(f'{name!r} is {found or "nothing that ftlab exports"}; write module.name')
    module = found[0].rpartition('.')[0]
    return short, f'{MODULES["syms"][module][found[0]][0].partition(".html")[0]}.ipynb'


def value(node):
    "A tolerance as it is written: a number, or dict(...) of them"
    if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'dict':
        return {k.arg: value(k.value) for k in node.keywords}
    return ast.literal_eval(node)


def allowed(tolerance) -> str:
    "A tolerance in words"
    if not isinstance(tolerance, dict):
        return 'none: bit for bit' if tolerance == 0 else f'{tolerance:.0e}'.replace('e-0', 'e-')
    if set(tolerance) <= {'atol', 'rtol'}:
        parts = [allowed(tolerance['atol'])] if 'atol' in tolerance else []
        parts += [f'{allowed(tolerance["rtol"])} of its size'] if 'rtol' in tolerance else []
        return ' + '.join(parts)
    return '; '.join(f'{k.replace("_", " ")} {allowed(v)}' for k, v in tolerance.items())


def equalities(root: Path) -> list[dict]:
    """Return a dict for each marked test: ours [(name, page)], peer, version, compared, tolerance, file, test.
    Raises `ValueError` for a package that is not in settings.ini, an unknown name of ours, a test that does not
    use the fixture `tolerance` or has two marks, and a mark that is not on a function of the file"""
    out = []
    for file in sorted((root/'tests').rglob('test_*.py')):
        text, name = file.read_text(encoding='utf-8'), file.relative_to(root).as_posix()
        tree = ast.parse(text if MARK in text else '')
        found = [(f, d) for f in tree.body if isinstance(f, ast.FunctionDef)
                 for d in f.decorator_list if is_mark(getattr(d, 'func', d))]
        if len(found) != sum(map(is_mark, ast.walk(tree))):
            raise ValueError(f'{name}: each mark must be a decorator of a function of the file, to be listed')
        for f, n in Counter(f.name for f, _ in found).items():
            if n > 1:
                raise ValueError(f'{name}::{f} has {n} marks, and compares by the tolerance of one')
        out += [_row(root, name, f, d) for f, d in found]
    return sorted(out, key=lambda r: (r['peer'].lower(), r['ours'][0][1], r['file']))


def is_mark(node) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) == MARK


def _row(root, file, function, mark) -> dict:
    where = f'{file}::{function.name}'
    try:
        ours, peer, compared = map(ast.literal_eval, mark.args)
        within, = (value(k.value) for k in mark.keywords if k.arg == 'tolerance')
    except (AttributeError, ValueError) as e:
        raise ValueError(f'{where}: the mark needs ours, the package, what is compared, and tolerance=') from e
    if peer not in versions(root):
        raise ValueError(f'{where}: {peer} is not in settings.ini, so CI would skip this test')
    used = {n.id for n in ast.walk(ast.Module(function.body, [])) if isinstance(n, ast.Name)}
    if 'tolerance' not in used or 'tolerance' not in {a.arg for a in function.args.args}:
        raise ValueError(f'{where} must compare by the fixture `tolerance`, which is what the list shows')
    try:
        ours = [exported(n) for n in ours.split(', ')]
    except ValueError as e:
        raise ValueError(f'{where}: {e}') from e
    return dict(ours=ours, peer=peer, version=versions(root)[peer], compared=compared,
                tolerance=allowed(within), file=file, test=function.name)
