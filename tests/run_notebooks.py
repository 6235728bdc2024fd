"""Run every page from top to bottom in a fresh kernel, two at a time; nothing is written back.

    python tests/run_notebooks.py                    all pages of _quarto.yml
    python tests/run_notebooks.py lab/world.ipynb    these
"""
import argparse, os, re, sys, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from pages import NBS, pages

# Two kernels share the cores: with one thread each they do not wait for one another. Nothing is downloaded.
ENV = dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='passive', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', PYDEVD_DISABLE_FILE_VALIDATION='1')

def run_page(path:str|Path, timeout:int=600) -> tuple[float, str]:
    "Execute the notebook at `path` in its own folder, as JupyterLab would: (seconds, what went wrong or '')"
    import nbformat
    from nbclient import NotebookClient
    start, path, wrong = time.perf_counter(), Path(path), ''
    try: NotebookClient(nbformat.read(path, as_version=4), timeout=timeout, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}},
                        extra_arguments=['--log-level=ERROR']).execute()
    except Exception as e: wrong = re.sub(r'\x1b\[[0-9;]*m', '', str(e)).strip() or type(e).__name__  # whatever it is, the other pages still run
    return time.perf_counter() - start, wrong

def main(names:list[str], workers:int=2, timeout:int=600) -> int:
    "Run the pages `names`, print each as it ends and the ten slowest at the end; the number that failed"
    os.environ.update(ENV); start, took, failed = time.perf_counter(), {}, {}
    with ProcessPoolExecutor(workers, mp_context=get_context('spawn')) as pool:
        jobs = {pool.submit(run_page, str(NBS/n), timeout): n for n in names}
        for job in as_completed(jobs):
            name = jobs[job]; took[name], wrong = job.result()
            if wrong: failed[name] = wrong
            print(f'{"FAILED" if wrong else "ok":6} {took[name]:6.1f} s  {name}', flush=True)
    for name, wrong in failed.items(): print(f'\n--- {name}\n{wrong}')
    print(f'\n{len(names)} pages in {time.perf_counter() - start:.0f} s, {len(failed)} failed; the slowest:')
    for name, s in sorted(took.items(), key=lambda o: -o[1])[:10]: print(f'{s:8.1f} s  {name}')
    return len(failed)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('pages', nargs='*', help='paths under nbs/ (all)'); p.add_argument('--workers', type=int, default=2)
    p.add_argument('--timeout', type=int, default=600, help='seconds that a cell may take')
    a = p.parse_args()
    # the course trains, the rest mostly does not: the long ones first, so that no worker waits for the last of them
    todo = a.pages or sorted(pages(), key=lambda n: not n.startswith('course/'))
    sys.exit(bool(main(todo, a.workers, a.timeout)))
