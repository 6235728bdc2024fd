"""Test the library, and papers: all, or what changed and a tenth that rotates. `make test` calls this.

    python tests/run.py                 everything with at most 100 papers; above: the library,
                                        what is not committed, a tenth of the papers
    python tests/run.py --all           everything
    python tests/run.py --changed REF   the library, what a change since REF touches,
                                        a tenth of the other papers, and the site

The tests, the pages and the site always run one after another, whatever fails,
so that one call tells everything that is wrong."""
import argparse
import os
import subprocess
import sys

import run_notebooks
from affected import Selection, Sources, key_of, select
from pages import ROOT, pages

# a file is one process's work, as its tests share fixtures; conftest.py puts the costly files first
PYTEST = [sys.executable, '-m', 'pytest', '-n', 'auto', '--maxprocesses', '4',
          '--dist', 'loadfile', '--no-loadscope-reorder']


def order(page: str) -> bool:
    """The course trains, the rest mostly does not: its pages first,
    so that no worker waits for the last of them"""
    return not page.startswith('course/')


def run(chosen: Selection, sources: Sources, site: bool) -> bool:
    "Did everything pass?"
    env = {**os.environ, 'FTLAB_TEST_KEYS': ' '.join(sorted(chosen.keys))}
    # a few hundred processes import the library: none compiles it again, whatever the machine's usual setting
    env.pop('PYTHONDONTWRITEBYTECODE', None)
    sys.dont_write_bytecode = False
    failed = subprocess.run(PYTEST, cwd=ROOT, env=env).returncode
    todo = [p for p in sorted(pages(), key=order) if key_of(p) is None or key_of(p) in chosen.keys]
    failed |= run_notebooks.main(todo)
    if site:
        failed |= subprocess.run([sys.executable, 'docs/build.py'], cwd=ROOT).returncode
    return not failed


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--all', action='store_true', help='every paper')
    p.add_argument('--changed', metavar='REF', help='what changed since this commit, and the site')
    p.add_argument('--list', action='store_true', help='name the papers, and run nothing')
    a = p.parse_args()
    sources = Sources()
    chosen = select(sources, a.all, a.changed)
    print(f'The library and {len(chosen.keys)} of {len(sources.papers)} papers: {chosen.why}',
          flush=True)
    if a.list:
        print(*sorted(chosen.keys))
        return 0
    return not run(chosen, sources, a.all or a.changed is not None)


if __name__ == '__main__':
    sys.exit(main())
