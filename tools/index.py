"""Fill every generated list of the project from its folders, claims and results: `make index`.

    python tools/index.py [--check]

`--check` writes nothing and fails naming what would change.
"""
import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ('adapters', 'trainers', 'evaluators', 'beyond')


def families(root: Path, part: str) -> list[str]:
    "The families of a part: folders of `nbs/<part>` that hold pages"
    folder = root/'nbs'/part
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and any(p.glob('[!.]*.ipynb')))


def papers_of(root: Path, part: str, family: str) -> list[str]:
    "The keys of a family's papers: its pages, by name"
    return sorted(p.stem for p in (root/'nbs'/part/family).glob('[!.]*.ipynb') if p.stem != 'index')


def sidebar(root: Path) -> str:
    "`_quarto.yml` with the pages of each part's families between the marks"
    text = (root/'_quarto.yml').read_text(encoding='utf-8')
    for part in PARTS:
        pages = [f'{part}/{f}/{k}.ipynb' for f in families(root, part) for k in papers_of(root, part, f)]
        mark = re.compile(rf'(# papers of {part}: made by `make index`\n).*?( *# end of papers\n)', re.S)
        if not mark.search(text):
            raise ValueError(f'_quarto.yml has no place for the papers of {part}; add the two comments that mark it')
        listed = ''.join(f'          - {p}\n' for p in pages)
        text = mark.sub(lambda m, listed=listed: m[1] + listed + m[2], text, count=1)
    return text


def made(root: Path) -> dict[str, str]:
    "{path: text} of every generated file"
    return {'_quarto.yml': sidebar(root)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='write nothing; fail where something would change')
    check = parser.parse_args().check
    stale = {f: t for f, t in made(ROOT).items() if (ROOT/f).read_text(encoding='utf-8') != t}
    if check and stale:
        sys.exit(f'{", ".join(stale)}: not what the papers say; run make index')
    for file, text in stale.items():
        (ROOT/file).write_text(text, encoding='utf-8')
        print(file)


if __name__ == '__main__':
    main()
