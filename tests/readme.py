"README.md from nbs/index.ipynb: prose as it stands, code fenced, stored results below it. `make index` writes it"
import base64, re

MADE = re.compile(r'^<!-- made by `make index`: .+? -->\n*')

def _linked(text:str) -> str:
    return re.sub(r'(\]\()(?!\w+:|#|/|\.\./)([^)]+)', r'\1nbs/\2', text).replace('](../', '](')

def _output(o:dict, stem:str, images:dict[str, bytes]) -> str:
    data = o.get('data', {'text/plain': o.get('text', '')})
    text = lambda k: ''.join(data[k]).strip('\n')
    for kind, ending in (('image/svg+xml', 'svg'), ('image/png', 'png')):
        if kind in data:
            name = f'README_files/{stem}.{ending}'
            images[name] = text(kind).encode() if ending == 'svg' else base64.b64decode(text(kind))
            return f'![{o.get("metadata", {}).get(kind, {}).get("alt", "the figure that this code draws")}]({name})'
    if 'text/markdown' in data:
        return _linked(text('text/markdown'))
    if data.get('text/html') == '' or data.get('text/html') == ['']:
        return '' # where a progress bar was
    return '\n'.join('    ' + l for l in text('text/plain').splitlines())

def readme(cells:list[dict]) -> tuple[str, dict[str, bytes]]:
    """The README's text and the images that it shows ({path: bytes});
    links become relative to the top/"""
    parts, images = [], {}
    for i, c in enumerate(cells):
        source, hidden = (c['source'].strip(),
                          re.search(r'^#\|\s*(hide|default_exp)\b', c['source'], re.M))
        if c['cell_type'] == 'markdown':
            parts.append(_linked(MADE.sub('', source)))
        elif c['cell_type'] == 'code' and source and not hidden:
            code = '\n'.join(l for l in source.splitlines() if not l.startswith('#|')).strip()
            if not re.search(r'^#\|\s*echo:\s*false', source, re.M):
                parts.append(f'```python\n{code}\n```')
            parts += filter(None, (_output(o, f'{i}-{j}', images) for j, o in enumerate(c.get('outputs', []))))
    return '\n\n'.join(p for p in parts if p) + '\n', images
