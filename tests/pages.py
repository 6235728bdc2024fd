"What the tests know about the project's pages: where they are, what they export, how they are ordered"
import json, os, re, shutil, subprocess
from pathlib import Path
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
IGNORED = {'.venv', '.git', 'build', 'dist', 'runs', 'ftlab-runs', '__pycache__', '_proc', '_docs',
           '.ipynb_checkpoints', '.pytest_cache'}

def pages(nbs:Path=NBS) -> list[str]:
    "Every notebook under `nbs`, as the site names it: `lab/world.ipynb`"
    found = (p.relative_to(nbs) for p in nbs.rglob('*.ipynb'))
    return sorted(p.as_posix() for p in found if not any(o[0] in '._' for o in p.parts))

def ordered(node=None) -> list[str]:
    "The pages that `_quarto.yml` lists, in its order; a family's own page before those below it"
    if node is None:
        node = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    if isinstance(node, str):
        return [node]
    if isinstance(node, dict):
        node = [node[k] for k in ('href',) if k in node] + node.get('contents', [])
    return [page for o in node for page in ordered(o)]

def cells(page:str, nbs:Path=NBS) -> list[dict]:
    "The page's cells, with their source as one string"
    nb = json.loads((nbs/page).read_text(encoding='utf-8'))
    return [c | {'source': ''.join(c['source'])} for c in nb['cells']]

def exports(cells:list[dict]) -> list[str]:
    "The modules that the cells name as their `default_exp`"
    return [m for c in cells if c['cell_type'] == 'code'
            for m in re.findall(r'^#\|\s*default_exp\s+(\S+)', c['source'], re.M)]

def project_files() -> list[Path]:
    """What belongs to the project, relative to its root: tracked by git or about to be;
    all that is not ignored where there is no git"""
    if (ROOT/'.git').exists() and shutil.which('git'):
        out = subprocess.run(
            ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT,
            check=True, capture_output=True, text=True).stdout
        return [Path(o) for o in sorted(set(out.split('\0'))) if o and (os.path.lexists(ROOT/o))
                and not (ROOT/o).is_dir()]
    return [p.relative_to(ROOT) for p in sorted(ROOT.rglob('*')) if not p.is_dir()
            and not IGNORED & set(p.relative_to(ROOT).parts)]

def copy_project(to:Path) -> Path:
    "A copy of the project's files at `to`, to run there what would change the original"
    for f in project_files():
        (to/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/f, to/f, follow_symlinks=False)
    return to
