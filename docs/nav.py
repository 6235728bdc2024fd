"What `_quarto.yml` says about the site, for whichever generator builds it"
import json, re
from pathlib import Path
import yaml

ROOT = Path(__file__).resolve().parent.parent

def website(root:Path=ROOT) -> dict:
    "The `website` part of `_quarto.yml`"
    return yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['website']

def sections(root:Path=ROOT) -> list[tuple[str, list[str]]]:
    "(heading, its pages) in the order of the sidebar; pages outside a section have the heading ''. Raises `ValueError` for a deeper tree"
    out = []
    for o in website(root)['sidebar']['contents']:
        name, pages = (o['section'], o['contents']) if isinstance(o, dict) else ('', [o])
        if not all(isinstance(p, str) for p in pages): raise ValueError(f'_quarto.yml: section {name!r} has sections of its own; one level is what the sidebar shows')
        if name == '' and out and out[-1][0] == '': out[-1][1].extend(pages)
        else: out.append((name, list(pages)))
    return out

def pages(root:Path=ROOT) -> list[str]: return [p for _, ps in sections(root) for p in ps]

def heading(notebook:Path) -> tuple[str, str]:
    "Title and description of a notebook: its `# ` line and the `> ` line below it"
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    found = re.match(r'\s*# +(.+?)\s*(?:\n+> *(.+))?(?:\n|$)', next((''.join(c['source']) for c in cells if c['cell_type'] == 'markdown'), ''))
    if not found: raise ValueError(f'{notebook.name}: its first text must begin with "# Title"')
    return found[1], found[2] or ''
