"What `_quarto.yml` says about the site, for whichever generator builds it"
import json, re
from pathlib import Path
import yaml

ROOT = Path(__file__).resolve().parent.parent

def website(root:Path=ROOT) -> dict:
    "The `website` part of `_quarto.yml`"
    return yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['website']

def sections(root:Path=ROOT) -> list[tuple[str, list[str]]]:
    """(heading, its pages) in the order of the sidebar; pages outside a section have the heading ''.

    The pages of a family follow its own page.
    Raises `ValueError` for a section inside a section that has no page, and for a deeper tree."""
    out = []
    for o in website(root)['sidebar']['contents']:
        name, entries = (o['section'], o['contents']) if isinstance(o, dict) else ('', [o])
        pages = [p for e in entries for p in _pages_of(e, name)]
        if name == '' and out and out[-1][0] == '':
            out[-1][1].extend(pages)
        else:
            out.append((name, pages))
    return out

def _pages_of(entry, section:str) -> list[str]:
    "A page, or a family: its own page (`href`) and those below it"
    if isinstance(entry, str):
        return [entry]
    if 'href' not in entry or not all(isinstance(p, str) for p in entry['contents']):
        raise ValueError(f'_quarto.yml: section {section!r} has sections of its own; only a family '
                         'with a page (href) may lie in one, and only pages in that')
    return [entry['href'], *entry['contents']]

def families(root:Path=ROOT) -> dict[str, list[str]]:
    "{a family's page: the pages below it}"
    inner = [e for o in website(root)['sidebar']['contents'] if isinstance(o, dict)
             for e in o['contents'] if isinstance(e, dict)]
    return {e['href']: e['contents'] for e in inner}

def pages(root:Path=ROOT) -> list[str]:
    return [p for _, ps in sections(root) for p in ps]

def heading(notebook:Path) -> tuple[str, str]:
    "Title and description of a notebook: its `# ` line and the `> ` line below it"
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    first = next((''.join(c['source']) for c in cells if c['cell_type'] == 'markdown'), '')
    found = re.match(r'\s*# +(.+?)\s*(?:\n+> *(.+))?(?:\n|$)', first)
    if not found:
        raise ValueError(f'{notebook.name}: its first text must begin with "# Title"')
    return found[1], found[2] or ''
