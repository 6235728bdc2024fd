"""What a paper costs: lines of its module, test and claim, cells of its page, CPU-minutes of its claim, and hours
from the first commit of its page to that of its first result.

    python bench/cost.py        # writes bench/results/cost.json and prints a table of medians

Hours come from git's history. They contain waiting, and leave out what was done before the first commit. Pages that
were moved, and clones without history, have none."""
import argparse
import json
import re
import subprocess
import sys
from datetime import date, datetime
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/'tests')]
from affected import Sources, plain  # noqa: E402
from ftlab.core.io import write_atomically  # noqa: E402
from ftlab.core.table import markdown_table  # noqa: E402
from ftlab.papers import catalogue  # noqa: E402

WHAT = dict(module_lines='module, lines', test_lines='test, lines', claim_lines='claim, lines',
            cells='page, cells', text_words='page, words of text', claim_minutes='claim, CPU-minutes',
            hours='first commit to first result, hours')


def first_commit(path: Path) -> datetime | None:
    "When a file was first committed; `None` if it was so under another name, or git does not know"
    log = lambda *options: subprocess.run(['git', 'log', *options, '--', path], cwd=ROOT, text=True,
                                          capture_output=True, check=False).stdout
    said = log('--diff-filter=A', '--format=%aI').split()
    moved = re.search(r'^R\d', log('--follow', '--name-status', '--format='), re.M)
    return datetime.fromisoformat(said[-1]) if said and not moved else None


def lines(*paths: Path) -> int | None:
    "Lines of the files that exist; `None` if none does"
    found = [len(p.read_text(encoding='utf-8').splitlines()) for p in paths if p.exists()]
    return sum(found) if found else None


def minutes(folder: Path) -> float | None:
    "CPU-minutes of all runs of the claim, its earlier editions included"
    found = [json.loads(p.read_text(encoding='utf-8')) for p in folder.glob('result*.json')]
    return round(sum(r.get('seconds') or 0 for r in found)/60, 1) if found else None


def cost(key: str, page: Path, module: Path) -> dict:
    "What one paper costs"
    cells = json.loads(page.read_text(encoding='utf-8'))['cells']
    text = [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown']
    folder = ROOT/'claims'/key
    results = sorted(folder.glob('result*.json'))
    begun, done = first_commit(page), [t for p in results if (t := first_commit(p))]
    hours = (min(done) - begun).total_seconds()/3600 if begun and done else -1
    return dict(module_lines=lines(module),
                test_lines=lines(ROOT/'tests'/'papers'/f'test_{key}.py'),
                claim_lines=lines(folder/'claim.toml', folder/'claim.py'), cells=len(cells),
                text_words=sum(len(t.split()) for t in text), claim_minutes=minutes(folder),
                hours=round(hours, 1) if hours > 0 else None)


def table(papers: dict) -> list[list]:
    "Median and range of each number over the papers that have it"
    out = []
    for key, name in WHAT.items():
        known = sorted(c[key] for c in papers.values() if c[key] is not None)
        if known:
            shown = (f'{v:,.4g}' for v in (median(known), known[0], known[-1]))
            out.append([name, *shown, len(known)])
    return out


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    here = Sources(ROOT, [p.relative_to(ROOT).as_posix() for d in ('nbs', 'ftlab', 'tests', 'claims')
                          for p in (ROOT/d).rglob('*') if p.is_file()])
    rows = catalogue()
    papers = {k: cost(k, ROOT/'nbs'/page, ROOT/here.by_key[plain(k)])
              for k, page in sorted(here.papers.items()) if k in rows} # a yardstick is no paper
    for k, c in papers.items():
        c['family'] = rows[k]['family']
    result = dict(date=date.today().isoformat(), papers=papers)
    text = json.dumps(result, indent=1) + '\n'
    file = Path(__file__).parent/'results'/'cost.json'
    write_atomically(file, lambda p: p.write_text(text, encoding='utf-8'))
    print(markdown_table(['what', 'median', 'least', 'most', 'papers'], table(papers)))


if __name__ == '__main__':
    main()
