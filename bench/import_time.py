"""How long `import ftlab` and the first use of one method take, today and with 300 more papers in the package.

    python bench/import_time.py

Each measurement is the CPU time of a fresh process, the best of three. The made-up papers are
copies of one paper's module under other keys, in a copy of the package in a temporary folder.
Writes bench/results/import_time.json."""
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAPERS, BEST_OF = 300, 3
USES = dict(
    libraries='import torch, transformers, transformers.pytorch_utils',
    ftlab='import ftlab',
    hft='import ftlab; ftlab.methods.hft()',
    names='import ftlab; ftlab.methods.names()',
    get="import ftlab; ftlab.methods.get('hft * dft')")
TOLD = '''
import json, resource, sys
u = resource.getrusage(resource.RUSAGE_SELF)
papers = [m for m in sys.modules if m.startswith("ftlab.") and m.count(".") == 3 and hasattr(sys.modules[m], "method")]
print(json.dumps(dict(cpu=u.ru_utime + u.ru_stime, papers=len(papers))))
'''


def measured(code: str, where: Path) -> dict:
    "The best of several fresh processes: CPU seconds, and how many papers' modules were imported"
    env = {**os.environ, 'PYTHONPATH': str(where), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
    runs = []
    for _ in range(BEST_OF):
        out = subprocess.run([sys.executable, '-c', code + TOLD], cwd=where, env=env,
                             capture_output=True, text=True, check=True)
        runs.append(json.loads(out.stdout.splitlines()[-1]))
    return min(runs, key=lambda r: r['cpu'])


def with_more(papers: int, into: Path) -> Path:
    "A copy of the package with so many more papers, in the families that there are"
    shutil.copytree(ROOT/'ftlab', into/'ftlab', ignore=shutil.ignore_patterns('__pycache__', 'checkpoints'))
    model = (ROOT/'ftlab/adapters/subsets/hft.py').read_text(encoding='utf-8')
    families = sorted(p for part in ('adapters', 'trainers', 'evaluators')
                      for p in (into/'ftlab'/part).iterdir() if p.is_dir() and p.name[0] != '_')
    for i in range(papers):
        key = f'made_up_{i:03}'
        (families[i % len(families)]/f'{key}.py').write_text(
            model.replace('def hft(', f'def {key}(').replace("'hft'", f"'{key}'"), encoding='utf-8')
    return into


def main() -> None:
    found = dict(python=platform.python_version(), papers=PAPERS,
                 now={k: measured(v, ROOT) for k, v in USES.items()})
    with tempfile.TemporaryDirectory() as tmp:
        larger = with_more(PAPERS, Path(tmp))
        found['with_more'] = {k: measured(v, larger) for k, v in USES.items()}
    text = json.dumps(found, indent=1) + '\n'
    (ROOT/'bench'/'results'/'import_time.json').write_text(text, encoding='utf-8')
    print(text)


if __name__ == '__main__':
    main()
