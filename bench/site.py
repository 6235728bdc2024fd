"""What the site costs to build from cold with 300 papers more: copies of today's papers, in a copy of the project.

    python bench/site.py                 # 300 copies, Sphinx
    python bench/site.py --copies 0      # the site as it is

A copy is a whole page with its module and claim; `make index` lists it in the sidebar and in every table. Measured is
one process, `docs/build.py --fresh`, without a cache of its own or of Sphinx: its CPU-seconds, which a busy machine
does not change, and how much the pages weigh. Nothing is extrapolated."""
import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT/'tests'), str(ROOT/'bench')]
from pages import copy_project, pages  # noqa: E402
from scale import multiply, processor  # noqa: E402


def run(root: Path, *command: str) -> tuple[float, float, subprocess.CompletedProcess]:
    "CPU-seconds, seconds and the result of a Python command in the project at `root`"
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
    used, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    r = subprocess.run([sys.executable, *command], cwd=root, env=env, capture_output=True,
                       text=True)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return cpu, time.perf_counter() - start, r


def measure(copies: int) -> dict:
    "Build the site of a project with `copies` papers more; raises where that fails for anything but weight"
    with tempfile.TemporaryDirectory() as tmp:
        root, out = copy_project(Path(tmp)/'copy'), Path(tmp)/'site'
        multiply(root, copies)
        _, _, listed = run(root, 'tools/index.py')
        cpu, seconds, r = run(root, 'docs/build.py', '--out', str(out), '--sphinx', '--fresh')
        heavy = [line for line in r.stderr.splitlines() if 'are the limit' in line]
        if listed.returncode or (r.returncode and not heavy):
            raise RuntimeError(f'{listed.stderr[-2000:]}{r.stdout[-2000:]}{r.stderr[-2000:]}')
        size = {p.relative_to(out).as_posix(): p.stat().st_size for p in out.rglob('*.html')}
        count = len(pages(root/'nbs'))
    top = sorted(size, key=size.get)[:-6:-1]
    return dict(machine=processor(), python=platform.python_version(), copies=copies, pages=count,
                cpu_seconds=round(cpu, 1), cpu_seconds_a_page=round(cpu/count, 3),
                seconds=round(seconds, 1), load=round(os.getloadavg()[0], 1),
                largest_kb={p: round(size[p]/1024) for p in top},
                too_heavy=[line.partition(' has ')[0] for line in heavy])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--copies', type=int, default=300)
    p.add_argument('--out', type=Path, default=ROOT/'bench'/'results'/'site.json')
    a = p.parse_args()
    result = measure(a.copies)
    print(json.dumps(result, indent=1))
    a.out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
