"""Begin a paper: its page, its claim and its test, from its row in the catalogue, ready to fill in.

    make paper KEY=model_soups [KIND=study]        or: python tools/paper.py model_soups [--kind study]

What is to be written says FILL IN; a claim that still says it cannot be run. Then every generated list is made again.
"""
from __future__ import annotations
import argparse
import difflib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout that this file lies in, not one installed

import ftlab.core.paper  # noqa: E402
from ftlab.papers import catalogue  # noqa: E402

KINDS = ('method', 'probe', 'study')

BODIES = {
    'method': '''def {key}(strength:float=1. # FILL IN: the paper's own arguments, with its defaults
      ) -> Recipe:
    "FILL IN: what it does, in the imperative"
    return Recipe({name})''',
    'probe': '''def {key}(model,  # a model to measure; it is left as it was
      batch   # input_ids and what belongs to them
     ) -> dict:
    "FILL IN: what it measures, with its unit"
    return {{'parameters': sum(p.numel() for p in model.parameters())}}''',
    'study': '''def {key}(seed:int) -> {evidence}:
    "FILL IN: what is compared, on what"
    values = {{'treatment.score': .5, 'baseline.score': .5}}
    return {returned}'''}

TRIES = {'method': '{key}().describe()', 'probe': '{key}(torch.nn.Linear(2, 3), None)', 'study': '{key}(seed=0)'}
HOLDS = {'method': '{key}().describe() == {key}().describe()',
         'probe': "{key}(torch.nn.Linear(2, 3), None) == {{'parameters': 9}}",
         'study': '{key}(seed=0) == {key}(seed=0)'}

RECIPE_CLAIM = '''# Written down, and read by someone who tries to break it, before the first run on test data.
# nbs/instruments/verdicts.ipynb explains the keys.
edition = 2
paper_says = "FILL IN: the paper's own sentence, in plain words"
where = "FILL IN: version, section, table; or repository, commit, file and line"
sentence = "FILL IN: one sentence that could turn out wrong, with its numbers and its step budget"
scope = "lab"
why = """FILL IN: what stands for what; the reason for each margin; what was known beforehand."""
differs = ["FILL IN: a departure from the paper's set-up"]
left_out = ["FILL IN: a baseline or question of the paper that is absent, and why"]
seeds = [20, 21, 22, 23, 24]
steps = 120
grid = [1e-4, 3.16e-4, 1e-3, 3.16e-3]
model = "lab-s"
data = "new-procedure"

[arms]
{key} = "{key}"
full = "full"
scaled = "FILL IN: the alternative that costs no thought"

[[contrast]]
name = "FILL IN"
primary = true
treatment = "{key}"
baseline = "full"
metric = "forgetting_matched"
higher_is_better = false
kind = "superiority"
margin = 0.03
best = 0.0
worst = 1.0
trivial = {{name = "FILL IN", arm = "scaled"}}

[[control]]
name = "full fine-tuning learns the procedure"
arm = "full"
metric = "gain"
at_least = 0.5

[review]
objections = [] # three or more of another reader: {{objection = "", answer = "", changed = ""}}
'''

SCRIPT_CLAIM = '''# Written down, and read by someone who tries to break it, before the first run on test data.
# nbs/instruments/verdicts.ipynb explains the keys.
edition = 2
paper_says = "FILL IN: the paper's own sentence, in plain words"
where = "FILL IN: version, section, table; or repository, commit, file and line"
sentence = "FILL IN: one sentence that could turn out wrong, with its numbers and its step budget"
scope = "lab"
why = """FILL IN: what stands for what; the reason for each margin; what was known beforehand."""
differs = ["FILL IN: a departure from the paper's set-up"]
left_out = ["FILL IN: a baseline or question of the paper that is absent, and why"]
seeds = [20, 21, 22, 23, 24]
steps = 120
grid = [1e-4, 3.16e-4, 1e-3, 3.16e-3]

[arms]
treatment = {{grid = [1e-4, 3.16e-4, 1e-3, 3.16e-3]}}
baseline = {{grid = [1e-4, 3.16e-4, 1e-3, 3.16e-3]}}
base = {{}}

[[contrast]]
name = "FILL IN"
primary = true
treatment = "treatment"
baseline = "baseline"
metric = "score"
kind = "superiority"
margin = 0.03
best = 1.0
worst = 0.0
trivial = {{name = "change nothing", arm = "base"}}

[review]
objections = [] # three or more of another reader: {{objection = "", answer = "", changed = ""}}
'''

SCRIPT = '''"FILL IN: the experiment of {key}"

def run(arm, rate, seed, split, steps) -> dict:
    "Numbers by name; all is drawn from `seed`, and questions of `split` ('validation' or 'test') alone are asked"
    raise NotImplementedError('FILL IN')

def identities() -> dict[str, bool]:
    "What must be exact"
    return {{}}
'''

TEST = '''"{key}: what its page cannot say about itself"

# FILL IN: a peer on the same tensors where one exists, the edges of its arguments, the errors that it gives
'''


def row_of(key: str) -> dict:
    "The catalogue's row; raises `ValueError` offering the nearest keys"
    if found := catalogue().get(key):
        return found
    near = difflib.get_close_matches(key, catalogue(), 3, .4)
    raise ValueError('no paper of the catalogue is called '
                     f'{key!r}' + (f'; did you mean {" or ".join(near)}?' if near else ''))


def kind_of(row: dict) -> str:
    """What a catalogue's row is built as, where nothing is said: findings inside models are probes,
    the rest that is no method a study"""
    return 'method' if row['kind'] == 'method' else 'probe' if row['family'] == 'mechanisms' else 'study'


def cells(row: dict, kind: str) -> list[dict]:
    "The page: five beats, each with its place"
    key, title = row['key'], row['title']
    mark = kind if hasattr(ftlab.core.paper, kind) else 'paper'
    has_evidence = hasattr(ftlab.core.paper, 'Evidence')
    words = dict(key=key, name='' if mark == 'method' else f'{key!r}',
                 evidence='Evidence' if has_evidence else 'dict',
                 returned="Evidence(values, units=dict(score='share of right answers'))"
                 if has_evidence else 'values')
    imports = {'method': f'from ftlab.core.paper import {mark}\nfrom ftlab.core.recipe import '
               'Recipe', 'probe': f'from ftlab.core.paper import {mark}',
               'study': f'from ftlab.core.paper import {"Evidence, " if has_evidence else ""}{mark}'}[kind]
    link = f'https://arxiv.org/abs/{row["arxiv"]}' if row['arxiv'] else ''
    short = title.split(':')[0] if len(title.split(':')[0]) < 50 else key
    new = Cells(key)
    new.text(f'# {short}\n\n> FILL IN: what it does, in one sentence of plain words.\n\nFILL IN: '
             'the problem, and the idea against it.')
    new.text('<!-- made by `make index`: words -->', 'words')
    new.code(f'#| default_exp {row["home"]}.{row["family"]}.{key}')
    new.code('#| hide\nfrom nbdev.showdoc import *')
    new.code(f'#| export\nfrom __future__ import annotations\n{imports}')
    new.text(f'**The claim** ({f"[{title}]({link})" if link else title}): FILL IN, in one sentence, '
             'with the version and the section that it stands in.')
    decorator = (f"@{mark}({title!r}, {row['arxiv']!r},\n    'FILL IN: what the paper says, in one "
                 "sentence',\n    'FILL IN: what was read to build it, with version and section, or "
                 "repository, commit, file and line')")
    new.code(f'#| export\n{decorator}\n{BODIES[kind].format(**words)}')
    new.text('**The smallest true picture.** FILL IN: what to look at.')
    if kind == 'probe':
        new.code('import torch')
    new.code(TRIES[kind].format(**words))
    new.text('**What follows from it.** FILL IN: an identity that the definition implies.')
    new.code(f'assert {HOLDS[kind].format(**words)}')
    new.text('<!-- made by `make index`: verdict -->', 'verdict')
    new.text('**Limits.** FILL IN.\n\n**Next:** FILL IN, and on [the family\'s page](index.ipynb) what it is one of.')
    return new.cells


class Cells:
    "The cells of a page, with ids that belong to it"

    def __init__(self, key: str):
        self.key, self.cells = key, []

    def text(self, source: str, name: str = '') -> None:
        self._add('markdown', source, name)

    def code(self, source: str) -> None:
        self._add('code', source, '', execution_count=None, outputs=[])

    def _add(self, kind: str, source: str, name: str, **more) -> None:
        self.cells.append(dict(cell_type=kind, id=name or f'{self.key[:40]}-{len(self.cells)}',
                               metadata={}, source=source.splitlines(keepends=True), **more))


def notebook(cells: list[dict]) -> str:
    kernel = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    return json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5), indent=1,
                      ensure_ascii=False) + '\n'


def family_page(row: dict) -> str:
    "The page of a family that has no paper yet"
    new = Cells(row['family'])
    new.text(f'# {row["family"].capitalize()}\n\n> FILL IN: what its papers have in common, in one '
             'sentence.\n\nFILL IN: the shared idea, in at most 300 words.')
    new.text('<!-- made by `make index`: papers -->', 'papers')
    return notebook(new.cells)


def files(row: dict, kind: str) -> dict[str, str]:
    "{path: text} of what a new paper consists of"
    key, folder = row['key'], f'{row["home"]}/{row["family"]}'
    claim = RECIPE_CLAIM if kind == 'method' else SCRIPT_CLAIM
    out = {f'nbs/{folder}/{key}.ipynb': notebook(cells(row, kind)),
           f'tests/papers/test_{key}.py': TEST.format(key=key),
           f'claims/{key}/claim.toml': claim.format(key=key)}
    return out if kind == 'method' else out | {f'claims/{key}/claim.py': SCRIPT.format(key=key)}


def begin(root: Path, key: str, kind: str | None = None) -> list[str]:
    """Write what is missing of a new paper; raises `ValueError` for an unknown key,
    `FileExistsError` for what is there"""
    row = row_of(key)
    new = files(row, kind or kind_of(row))
    if there := sorted(f for f in new if (root/f).exists()):
        raise FileExistsError(f'{key} is begun already: {", ".join(there)} '
                              f'{"exists" if len(there) == 1 else "exist"}; nothing was written')
    index = f'nbs/{row["home"]}/{row["family"]}/index.ipynb'
    if not (root/index).exists():
        new[index] = family_page(row)
    for file, text in new.items():
        (root/file).parent.mkdir(parents=True, exist_ok=True)
        (root/file).write_text(text, encoding='utf-8')
    return sorted(new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('key', nargs='?', help='of the paper, as in papers/catalogue.jsonl')
    parser.add_argument('--kind', choices=KINDS, help='what it is built as, where the catalogue does not say')
    a = parser.parse_args()
    if not a.key:
        parser.error('name the paper: make paper KEY=model_soups')
    try:
        print('\n'.join(begin(ROOT, a.key, a.kind)))
    except (ValueError, FileExistsError) as e:
        sys.exit(f'make paper: {e}')
    export = 'from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()'
    for command in (['-c', export], ['tools/index.py']):
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


if __name__ == '__main__':
    main()
