"""Run every page from top to bottom in a fresh namespace, two at a time; nothing is written back.

    python tests/run_notebooks.py                            all pages
    python tests/run_notebooks.py lab/world.ipynb            these
    python tests/run_notebooks.py --kernel lab/world.ipynb   each in a fresh kernel instead of a forked process
    python tests/run_notebooks.py --store lab/world.ipynb    in a fresh kernel, and its outputs are stored in the page
"""
import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from affected import Sources, key_of
from pages import NBS, cells, exports, pages
from worker import HEAVY, OURS, Workers, lacks, plain, preload

# Two pages share the cores: with one thread each they do not wait for one another. Nothing is downloaded.
MOST = 5  # CPU-seconds that a paper's page should take
ENV = dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='passive', HF_HUB_OFFLINE='1',
           TOKENIZERS_PARALLELISM='false', PYDEVD_DISABLE_FILE_VALIDATION='1')


def path_of(name: str) -> Path:
    """The page that `name` means: a path under nbs/, or one from here.
    Raises `SystemExit` where there is none"""
    for path in (NBS/name, Path(name).resolve()):
        if path.suffix == '.ipynb' and path.exists():
            return path
    raise SystemExit(f'there is no page {name!r}: neither under {NBS.name}/ nor from this folder')


def parted(names: list[str]) -> tuple[list[str], list[str]]:
    """The pages whose own module is among those that OURS brings, and the others.
    The first must run before OURS are imported: a page registers what its module registers, and twice is an error."""
    sources = Sources()
    brought = sources.closure_of({sources.modules[m] for m in OURS if m in sources.modules},
                                 step=sources.imports)
    first = [n for n in names
             if {f'ftlab/{m.replace(".", "/")}.py' for m in exports(cells(path_of(n)))} & brought]
    return first, [n for n in names if n not in first]


def shows(output: dict) -> bool:
    "Whether a reader sees anything of an output: a progress bar that was cleared leaves an empty one"
    data = output.get('data', {})
    empty = data.get('text/html', 'x') == '' and data.keys() <= {'text/html', 'text/plain'}
    return output['output_type'] != 'display_data' or not empty


def in_kernel(path: Path, timeout: int, store: bool = False) -> str:
    """Execute the notebook at `path` in its own folder, as JupyterLab would:
    what went wrong or ''; `store` keeps the outputs"""
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, as_version=4)
    resources = {'metadata': {'path': str(path.parent)}}
    missing = {i: lacks(c) for i, c in enumerate(nb.cells) if lacks(c)}
    if missing and store:
        lacking = ', '.join(sorted(set(missing.values())))
        return f'cells {", ".join(map(str, missing))} need {lacking}: nothing is stored'
    for i in missing:
        nb.cells[i].metadata['tags'] = ['skip-execution']
    try:
        NotebookClient(nb, timeout=timeout, kernel_name='python3', resources=resources,
                       extra_arguments=['--log-level=ERROR']).execute()
    except Exception as e:  # whatever it is, the other pages still run
        return plain(str(e)).strip() or type(e).__name__
    if store:
        from nbdev.clean import nbdev_clean
        for cell in nb.cells:
            if cell.cell_type == 'code':
                cell.outputs = [o for o in cell.outputs if shows(o)]
        nbformat.write(nb, path)
        nbdev_clean.__wrapped__(str(path))
    return ''


def left_out(path: Path) -> str:
    "Words for the cells of a page that cannot run here, for want of a package that they name"
    missing = [p for c in cells(path) if (p := lacks(c))]
    names = ', '.join(sorted(set(missing)))
    return f', without {len(missing)} cells that need {names}' if missing else ''


def kernels(todo: list[tuple[str, Path]], timeout: int, store: bool):
    "Yield (name, result) of pages that run in kernels, one after the other"
    for name, path in todo:
        start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        with tempfile.TemporaryDirectory() as home:  # no page shows anybody's progress in the course
            os.environ['FTLAB_HOME'] = home
            wrong = in_kernel(path, timeout, store)
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        yield name, dict(wrong=wrong, outputs={}, seconds=time.perf_counter() - start, cpu=cpu)


def main(names: list[str], workers: int = 2, timeout: int = 600, kernel: bool = False,
         store: bool = False) -> int:
    """Run the pages `names`, print each as it ends and the ten slowest at the end;
    the number that failed"""
    os.environ.update(ENV)
    start, failed, used, todo = time.perf_counter(), {}, {}, [(n, path_of(n)) for n in names]
    if kernel or store or not hasattr(os, 'fork'):
        results = kernels(todo, timeout, store)
    else:
        preload(HEAVY)
        paths = dict(todo)
        first, then = parted(names)
        first, then = ([(n, paths[n]) for n in part] for part in (first, then))
        results = Workers(workers, timeout).run(first, then, between=lambda: preload(OURS))
    for name, result in results:
        used[name] = result['cpu']
        if result['wrong']:
            failed[name] = result['wrong']
        print(f'{"FAILED" if name in failed else "ok":6} {result["seconds"]:6.1f} s {result["cpu"]:6.1f} CPU-s  {name}'
              f'{left_out(path_of(name))}', flush=True)
    for name, wrong in failed.items():
        print(f'\n--- {name}\n{wrong}')
    own, seconds = time.process_time(), time.perf_counter() - start
    print(f'\n{len(names)} pages in {seconds:.0f} s, {sum(used.values()):.0f} CPU-s and {own:.0f} '
          f'for imports; {len(failed)} failed; the slowest:')
    for name, cpu in sorted(used.items(), key=lambda o: -o[1])[:10]:
        print(f'{cpu:8.1f} CPU-s  {name}')
    papers = {n: c for n, c in used.items() if key_of(n)}
    if long := [n for n, c in papers.items() if c > MOST]:
        print(f'{len(long)} of {len(papers)} papers\' pages take more than {MOST} CPU-seconds: '
              f'{", ".join(sorted(long))}')
    return len(failed)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('pages', nargs='*', help='paths under nbs/ (all)')
    p.add_argument('--workers', type=int, default=2)
    p.add_argument('--timeout', type=int, default=600, help='seconds that a cell may take')
    p.add_argument('--kernel', action='store_true', help='a fresh kernel for each page')
    p.add_argument('--store', action='store_true', help='keep the outputs, as a fresh kernel gives them, in the page')
    a = p.parse_args()
    if a.store and not a.pages:
        p.error('--store needs the pages that it may change')
    # the course trains, the rest mostly does not: the long ones first, so that no worker waits for the last of them
    todo = a.pages or sorted(pages(), key=lambda n: not n.startswith('course/'))
    sys.exit(bool(main(todo, a.workers, a.timeout, a.kernel, a.store)))
