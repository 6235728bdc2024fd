"""What a run of the tests costs with 300 papers: copies of today's papers under new keys, in a copy of the project.

    python bench/scale.py                    # 300 copies to select among, 20 of them run
    python bench/scale.py --copies 50 --run 5

Measured: the time to choose (with all the copies there), the pages that run. Extrapolated: all the
copies' pages, at the mean of those that ran. A copy is a whole page with its module and claim; the
copies that run are drawn evenly from all of today's papers."""
import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tests'))
from affected import Sources, plain, select  # noqa: E402
from pages import copy_project  # noqa: E402

CHILD = '''
import json, os, sys
sys.path.insert(0, 'tests')
import run_notebooks as r
os.environ.update(r.ENV)
r.preload(r.HEAVY)
names = json.loads(sys.argv[1])
first, then = r.parted(names)
paths = {n: (n, r.path_of(n)) for n in names}
ran = r.Workers(2, 600).run([paths[n] for n in first], [paths[n] for n in then], between=lambda: r.preload(r.OURS))
print('RESULT' + json.dumps({n: dict(cpu=x['cpu'], wrong=x['wrong'][-300:]) for n, x in ran}))'''


def processor() -> str:
    "What this machine calls its processor, and how many cores it has"
    file = Path('/proc/cpuinfo')
    lines = file.read_text().splitlines() if file.exists() else []
    names = [o.split(':')[1].strip() for o in lines if o.startswith('model name')]
    name = names[0] if names else platform.processor()
    return f'{name}, {os.cpu_count()} cores'


def multiply(root: Path, copies: int) -> list[str]:
    "Add `copies` papers to the project at `root`, page, module and claim each; their pages"
    here, made = Sources(root,
                         [p.relative_to(root).as_posix() for p in root.rglob('*')
                          if p.is_file()]), []
    papers = list(here.papers.items())
    for i in range(copies):
        key, page = papers[i % len(papers)]
        new = f'{key}_copy{i}'
        module = here.by_key[plain(key)]
        home = module.removeprefix('ftlab/').removesuffix('.py').replace('/', '.')
        text = (root/'nbs'/page).read_text(encoding='utf-8').replace(
            f'default_exp {home}', f'default_exp {home.rpartition(".")[0]}.{new}')
        path = (root/'nbs'/page).with_name(f'{new}.ipynb')
        path.write_text(text, encoding='utf-8')
        (root/module).with_name(f'{new}.py').write_text((root/module).read_text(encoding='utf-8'),
                                                        encoding='utf-8')
        for f in (root/'claims'/key).glob('*'):
            (root/'claims'/new).mkdir(exist_ok=True)
            (root/'claims'/new/f.name).write_bytes(f.read_bytes())
        made.append(path.relative_to(root/'nbs').as_posix())
    return made


def measure(copies: int, run: int) -> dict:
    "Seconds of this processor to choose, and of the pages that run"
    with tempfile.TemporaryDirectory() as tmp:
        root = copy_project(Path(tmp)/'copy')
        made = multiply(root, copies)
        files = [p.relative_to(root).as_posix() for p in root.rglob('*') if p.is_file()]
        start = time.process_time()
        sources = Sources(root, sorted(files))
        touched = {f: len(sources.touched([f])[0]) for f in (f'nbs/{made[0]}', 'ftlab/trainers/loop.py')}
        choosing = time.process_time() - start
        assert len(select(sources, everything=True).keys) == len(sources.papers)
        sample = made[::max(1, copies//run)][:run]
        env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'}
        r = subprocess.run([sys.executable, '-c', CHILD, json.dumps(sample)], cwd=root, env=env,
                           capture_output=True, text=True)
        if 'RESULT' not in r.stdout:
            raise RuntimeError(r.stderr)
        pages = json.loads(r.stdout.split('RESULT')[1])
    mean = sum(p['cpu'] for p in pages.values())/len(pages)
    return dict(machine=processor(),
                measured=dict(papers=len(sources.papers), seconds_to_choose=round(choosing, 2),
                              papers_touched=touched,
                              failed={n: p['wrong'] for n, p in sorted(pages.items())
                                      if p['wrong']},
                              pages_run=len(pages), cpu_seconds_a_page=round(mean, 2),
                              pages={n: round(p['cpu'], 2) for n, p in sorted(pages.items())}),
                extrapolated=dict(pages_of_all_copies_cpu_minutes=round(mean*copies/60, 1),
                                  on_two_cores_minutes=round(mean*copies/120, 1)))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--copies', type=int, default=300)
    p.add_argument('--run', type=int, default=20)
    p.add_argument('--out', type=Path, default=ROOT/'bench'/'results'/'scale.json')
    a = p.parse_args()
    result = measure(a.copies, a.run)
    print(json.dumps(result, indent=1))
    a.out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
