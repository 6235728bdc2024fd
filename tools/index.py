"""Fill every generated list of the project from the papers' modules, pages, claims and results: `make index`.

    python tools/index.py [--check]

Generated are: the papers in `_quarto.yml`; the cells of notebooks that begin with the mark below, and nothing else of
those notebooks; the stored tables of `nbs/papers`; `README.md`. To add a paper, write its own page and its own
claim, and touch none of these by hand. `--check` writes nothing and fails naming what would change.
"""
from __future__ import annotations
import argparse
import inspect
import json
import os
import re
import sys
import tomllib
from functools import cached_property
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
# the checkout that this file lies in, not one installed
sys.path[:0] = [str(ROOT), str(ROOT/'tools'), str(ROOT/'tests'), str(ROOT/'docs')]

from ftlab.instruments.families import (CONCERNS, FAMILIES, answer_words, entries_of, read_family,
                                        seeds_of) # noqa: E402
from ftlab.instruments.verdicts import contrast, contrast_verdict # noqa: E402
from ftlab.map import CHAPTERS, chapter_named # noqa: E402
from ftlab.papers import (PARTS, catalogue, index, nouns, papers_html, scoreboard, scoreboard_html,
                          effect_line) # noqa: E402
from equalities import equalities  # noqa: E402
from readme import readme  # noqa: E402

MARK = re.compile(r'<!-- made by `make index`: (.+?) -->')

# What a reader lacks, in the order of the table on nbs/methods.
# A paper's page says `**Use it when** ...` with these words.
NEEDS = ('you try for the first time', 'gradients and optimizer state do not fit in memory',
         'old skills must not be forgotten',
         'there are only a few hundred rows', 'the model should say when it does not know',
         'answers can be judged, but there are no model answers',
         'you have better and worse answers to the same prompts',
         'plain fine-tuning on your answers has stopped helping', 'the model is too large to train',
         'several tuned models should become one')
COMPARED = {*FAMILIES, 'editing'} # families with a comparison on their page (editing's is of bench/edits.py)
ASKS = dict(select='which parameters may change', delta='how the change is represented',
            edit='what is done to the change afterwards',
            source='what the model sees', objective='what the loss is',
            step='how a loss becomes an update', loop='in what order',
            decode='how answers are drawn', probe='what happened')


def source(cell: dict) -> str:
    return ''.join(cell['source'])


def head(nb: dict) -> tuple[str, str]:
    "Title and description of a page: its `# ` line and the `> ` line below it"
    text = next((source(c) for c in nb['cells'] if c['cell_type'] == 'markdown'), '')
    found = re.match(r'\s*# +(.+?)\s*(?:\n+> *(.+))?(?:\n|$)', text)
    if not found:
        raise ValueError('its first text must begin with "# Title"')
    return found[1], found[2] or ''


def relinked(text: str, folder: str) -> str:
    "Links of a page in `folder` as seen from the top"
    def link(m):
        if re.match(r'\w+:|#', m[1]):
            return m[0]
        return f']({os.path.normpath(os.path.join(folder, m[1]))})'
    return re.sub(r'\]\(([^)]+)\)', link, text)


class Project:
    "The pages and the papers of one checkout; pages are changed here first, and written at the end"
    def __init__(self, root: Path):
        self.root, self.pages, self.texts = root, {}, {}

    def page(self, name: str) -> dict:
        if name not in self.pages:
            self.pages[name] = json.loads((self.root/'nbs'/name).read_text(encoding='utf-8'))
        return self.pages[name]

    def text(self, name: str) -> str:
        return json.dumps(self.page(name), indent=1, ensure_ascii=False) + '\n'

    @cached_property
    def papers(self) -> list[dict]:
        return sorted(index(), key=lambda e: (PARTS.index(e['home']), e['family'], e['key']))

    @cached_property
    def equalities(self) -> list[dict]:
        return equalities(self.root)

    def families(self, part: str) -> list[str]:
        "The families of a part: folders of `nbs/<part>` that hold pages"
        folder = self.root/'nbs'/part
        return (sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name != 'yardsticks'
                       and any(p.glob('[!.]*.ipynb'))) if folder.is_dir() else [])

    def keys(self, part: str, family: str) -> list[str]:
        "The keys of a family's papers: its pages, by name"
        return sorted(p.stem for p in (self.root/'nbs'/part/family).glob('[!.]*.ipynb')
                      if p.stem != 'index')

    def fill(self, name: str, made: dict[str, str]) -> None:
        """Put each text into the page's cell with its mark;
        raises `ValueError` where a mark is unknown or a text has no place"""
        places = {m[1]: c for c in self.page(name)['cells'] if (m := MARK.match(source(c)))}
        if odd := set(places) ^ set(made):
            raise ValueError(f'nbs/{name}: the generated cells are {sorted(places)}, they should be {sorted(made)}')
        for what, text in made.items():
            marked = f'<!-- made by `make index`: {what} -->\n\n{text}'
            places[what]['source'] = marked.splitlines(keepends=True)

    def store(self, name: str, call: str, html: str) -> None:
        "Store what the cell that ends in `call` shows"
        cell = next((c for c in self.page(name)['cells'] if c['cell_type'] == 'code'
                     and source(c).rstrip().endswith(call)), None)
        if cell is None:
            raise ValueError(f'nbs/{name} has no cell that ends in {call}')
        plain = '<IPython.core.display.HTML object>'
        data = {'text/html': html.splitlines(keepends=True), 'text/plain': [plain]}
        cell['outputs'] = [dict(output_type='execute_result', data=data, execution_count=None,
                                metadata={})]


# ---------- the site

def sidebar(p: Project) -> str:
    "`_quarto.yml` with each part's families between the marks"
    text = (p.root/'_quarto.yml').read_text(encoding='utf-8')
    for part in PARTS:
        listed = ''
        for family in p.families(part):
            page, keys = f'{part}/{family}/index.ipynb', p.keys(part, family)
            title = head(p.page(page))[0].split(':')[0]
            listed += (f'          - section: {title}\n            href: {page}\n            contents:\n'
                       if keys else f'          - {page}\n') # a section needs pages
            listed += ''.join(f'              - {part}/{family}/{key}.ipynb\n' for key in keys)
        begin = f'# papers of {part}: made by `make index`'
        mark = re.compile(rf'({begin}\n).*?( *# end of papers\n)', re.S)
        if not mark.search(text):
            raise ValueError(f'_quarto.yml has no place for the papers of {part}; add the two comments that mark it')
        text = mark.sub(lambda m, listed=listed: m[1] + listed + m[2], text, count=1)
    return text


def contents(p: Project, text: str) -> dict[str, str]:
    "A table of pages for each section of the sidebar"
    import yaml
    out = {}
    for o in yaml.safe_load(text)['website']['sidebar']['contents']:
        if isinstance(o, dict):
            rows = [row for entry in o['contents'] for row in _listed(p, entry)]
            out[f'contents, {o["section"]}'] = _table('page', 'what it is about', 'minutes', 'read first', rows=rows)
    return out


def _listed(p: Project, entry) -> list[tuple]:
    "The rows of a page, or of a family: its page first"
    if isinstance(entry, str):
        return [_about(p, entry)]
    first = _about(p, entry['href'])
    return [(f'**{first[0]}**', *first[1:]), *(_about(p, page) for page in entry['contents'])]


def _about(p: Project, page: str) -> tuple:
    "Link, description, minutes, and the pages that its first lines send you to first"
    nb, folder = p.page(page), os.path.dirname(page)
    text = [source(c) for c in nb['cells'] if c['cell_type'] == 'markdown']
    code = [c for c in nb['cells'] if c['cell_type'] == 'code'
            and not re.search(r'^#\| *(hide|default_exp)', source(c), re.M)]
    title, about = head(nb)
    minutes = 5*max(1, round((sum(len(t.split()) for t in text)/200 + len(code)/4)/5))
    about = relinked(re.sub(r'\s*\*[^*]*minutes[^*]*\*', '', about), folder)
    before = relinked(', '.join(re.findall(r'Read (\[.+?\]\(.+?\))', text[0])), folder)
    if chapter := {f'course/{c.name}.ipynb': c for c in CHAPTERS}.get(page):
        minutes = chapter.minutes
        before = ', '.join(f'[{chapter_named(n).title}](course/{n}.ipynb)' for n in chapter.needs)
    return f'[{title}]({page})', about, minutes, before


# ---------- tables of papers

def _table(*heads: str, rows) -> str:
    lines = [f'| {" | ".join(heads)} |', '|' + '---|'*len(heads)]
    return '\n'.join(lines + [f'| {" | ".join(map(str, row))} |' for row in rows])


def _said(e: dict) -> str:
    "What became of a paper's claim, in a word or two"
    return f'{e["verdict"]} ({e["note"]})' if e['verdict'] and e['note'] else e['verdict'] or e['note']


def _title(e: dict) -> str:
    "A paper's title, linked where it has an arXiv id (14 of the 300 have none)"
    return f'[{e["title"]}](https://arxiv.org/abs/{e["arxiv"]})' if e['arxiv'] else e['title']


def _code(e: dict, page: str) -> str:
    return f'[`{e["key"]}`]({page})'


def methods(p: Project) -> str:
    "Every method: what it answers, what its paper claims, what became of that"
    rows = [('`full`', 'none: plain fine-tuning', '', 'no paper, so no claim')]
    for e in sorted(_methods(p), key=lambda e: e['key']):
        asked = '; '.join(ASKS[n] for n in nouns(e))
        rows.append((_code(e, e['notebook'].removeprefix('nbs/')), asked, e['claim'], _said(e)))
    rows += [(f'[`{name}`]({page})', asked, '', 'a yardstick, so no claim')
             for name, page, asked in _yardsticks()]
    return _table('method', 'what it answers', 'what its paper claims', 'verdict here', rows=rows)


def _methods(p: Project) -> list[dict]:
    import ftlab.methods
    return [e for e in p.papers if e['key'] in ftlab.methods.names()]


def _yardsticks() -> list[tuple[str, str, str]]:
    "(name, page, what it answers) of every common method"
    import ftlab.methods
    rows = []
    for name, file in sorted(ftlab.methods.yardsticks().items()):
        recipe = ftlab.methods.get(name)
        asked = '; '.join(text for noun, text in ASKS.items()
                          if getattr(recipe, noun, None) is not None)
        rows.append((name, f'{file.parts[-3]}/yardsticks/{file.stem}.ipynb', asked))
    return rows


def common(p: Project) -> str:
    "A row a kind of yardstick: its page, what it is about, the methods or rules on it"
    import ftlab.methods
    pages = {}
    for name, file in {**ftlab.methods.yardsticks(), **ftlab.methods.merging_yardsticks()}.items():
        pages.setdefault(f'{file.parts[-3]}/yardsticks/{file.stem}.ipynb', []).append(f'`{name}`')
    rows = [(f'[{title}]({page})', about, ', '.join(names)) for page, names in sorted(pages.items())
            for title, about in [head(p.page(page))]]
    return _table('kind', 'what it is about', 'yardsticks', rows=rows)


def rules(p: Project) -> str:
    "Every rule to merge by: where it is from, its strength and settings, what became of its claim"
    import ftlab.methods
    common, papers = ftlab.methods.merging_yardsticks(), {e['key']: e for e in p.papers}
    rows = []
    for name, strength in ftlab.methods.merging_rules().items():
        rule = ftlab.methods.merging_rule(name)
        settings = ', '.join(f'`{k}`' for k in list(inspect.signature(rule).parameters)[3:])
        e = papers.get(name) or dict(title=rule.paper.title, arxiv=rule.paper.arxiv)
        page = (f'{common[name].parts[-3]}/yardsticks/{common[name].stem}.ipynb' if name in common
                else e['notebook'].removeprefix('nbs/'))
        rows.append((f'[`{name}`](../{page})', _title(e), f'{strength:g}', settings or 'none',
                     'a yardstick, so no claim' if name in common else _said(e)))
    return _table('rule', 'from', 'strength if none is given', 'settings', 'verdict here',
                  rows=rows)


def which(p: Project) -> str:
    "What a reader lacks, and the methods whose pages say that they are for it"
    found = {need: [] for need in NEEDS}
    for e in p.papers:
        page = e['notebook'].removeprefix('nbs/')
        for need, remark in uses(p.page(page), page):
            told = [remark]*bool(remark) + ['its claim fails here']*(e['verdict'] == 'fails')
            found[need].append(_code(e, page) + (f' ({", but ".join(told)})' if told else ''))
    found[NEEDS[0]].insert(0, '`full`')
    found['old skills must not be forgotten'].insert(
        0, '`full` at a smaller learning rate ([try it](course/how_to_be_fooled.ipynb))')
    rows = [(need, ', '.join(names)) for need, names in found.items() if names]
    return _table('use it when', 'methods', rows=rows)


def uses(nb: dict, page: str) -> list[tuple[str, str]]:
    """(need, remark) of what a page says that its paper is for;
    raises `ValueError` for words that are none of `NEEDS`"""
    lines = [m[1] for c in nb['cells'] for m in re.finditer(r'^\*\*Use it when\*\* (.+?)\.?$',
                                                            source(c), re.M)]
    out = []
    for said in (s for line in lines for s in line.split(';')):
        found = re.fullmatch(r'\s*([^(]+?)\s*(?:\((.+)\))?\s*', said)
        need, remark = found.groups() if found else (said, '')
        if need not in NEEDS:
            raise ValueError(f'nbs/{page} is for {need!r}; write one of: {"; ".join(NEEDS)} (or add '
                             'to NEEDS in tools/index.py)')
        out.append((need, remark or ''))
    return out


def measured(p: Project) -> str:
    """What was best in each comparison, by what a reader cares about; where its frontiers are drawn; and the
    families without a result"""
    folder, rows, none, drawn = p.root/'bench'/'results', [], [], []
    for name in FAMILIES:
        found = read_family(folder/f'family_{name}.json')
        page = next(f'{part}/{name}/index.ipynb' for part in PARTS if name in p.families(part))
        rows += _answers(f'[{name}]({page})', found or {})
        drawn += _drawn(p, name, page, 'The-family-side-by-side') if found else []
        if not found:
            none.append(f'No result yet for [{name}]({page}): `python bench/families.py {name}` makes it.')
    for path in sorted((p.root/'nbs').glob('*/yardsticks/*.ipynb')):
        found = read_family(folder/f'yardsticks_{path.stem}.json')
        page, name = path.relative_to(p.root/'nbs').as_posix(), path.stem.replace('_', ' ')
        rows += _answers(f'[{name}]({page})', found or {})
        drawn += _drawn(p, name, page, 'Side-by-side') if found else []
    heads = ('compared', 'on', 'seeds', *(c.name for c in CONCERNS))
    curves = f'Drawn as curves, gain against forgetting, so far: {", ".join(drawn)}.'
    return '\n\n'.join([*none, *[_table(*heads, rows=rows)]*bool(rows), *[curves]*bool(drawn)])


def _drawn(p: Project, name: str, page: str, heading: str) -> list[str]:
    "A link to the frontiers of a page, if it draws them"
    draws = any(c['cell_type'] == 'code' and 'frontiers(' in source(c) for c in p.page(page)['cells'])
    return [f'[{name}]({page}#{heading})']*draws


def _answers(link: str, result: dict) -> list[tuple]:
    "A row for each setting of a result file"
    return [(link, name, seeds_of(e['methods']), *(answer_words(e['methods'], c) for c in CONCERNS))
            for name, e in entries_of(result).items()]


def peers(p: Project, page: str, only: str = '') -> str:
    "A row for each equality with another package that a test holds; `only`: of this test file"
    rows = []
    for e in p.equalities:
        link = lambda to: Path(os.path.relpath(to, os.path.dirname(page))).as_posix()
        ours = ', '.join(f'`{name}`' if to == page else f'[`{name}`]({link(to)})'
                         for name, to in e['ours'])
        if only in ('', e['file']):
            rows.append((ours, f'{e["peer"]} {e["version"] or "(any)"}', e['compared'], e['tolerance'],
                         f'`{e["file"].removeprefix("tests/")}::{e["test"]}`'))
    heads = ('ours', 'package', 'what is compared', 'largest difference allowed', 'test')
    return _table(*heads, rows=rows)


def families(p: Project) -> str:
    "A row a family: what it is about, and its papers with their verdicts"
    rows = []
    for part in PARTS:
        for family in p.families(part):
            page = f'{part}/{family}/index.ipynb'
            title, about = head(p.page(page))
            of = [e for e in p.papers if (e['home'], e['family']) == (part, family)]
            names = ', '.join(f'{_code(e, e["notebook"].removeprefix("nbs/"))} {_said(e)}'
                              for e in of)
            rows.append((f'[{title.split(":")[0]}]({page})', about, names or 'none built yet'))
    return _table('family', 'what it is about', 'papers, with the verdict on each claim here',
                  rows=rows)


def family(p: Project, part: str, name: str) -> str:
    "The papers of a family, whether anything compares them, and where to go from there"
    rows = [(_code(e, f'{e["key"]}.ipynb'), e['claim'], _title(e), _said(e))
            for e in p.papers if (e['home'], e['family']) == (part, name)]
    listed = [e for e in catalogue().values() if (e['home'], e['family']) == (part, name)]
    said = (_table('paper', 'what it claims', 'title', 'verdict here', rows=rows) if rows else
            f'**No paper of this family is built yet.** The catalogue has {len(listed)}.')
    if rows and name not in COMPARED:
        said += ('\n\n**No shared comparison yet.** Each verdict comes from an experiment of its own, with its own '
                 'data, steps and measure, so two verdicts do not say which method is better. '
                 '[Which method?](../../methods.ipynb) lists the comparisons that there are.')
    return (f'{said}\n\n**Where next:** [the verdict on each claim](../../papers/scoreboard.ipynb); '
            '[all methods by name](../../methods.ipynb).')


def words(e: dict) -> str:
    "Say where the words are explained that a paper's page takes for granted"
    if e['home'] == 'beyond':  # studies that train no base model
        return ('*New words:* [how a verdict is made](../../instruments/verdicts.ipynb) explains what a '
                'claim is.')
    return ('*New words:* [first light](../../course/first_light.ipynb) '
            'explains `lab-s`, gain and forgetting; [the Recipe](../../core/recipe.ipynb) '
            'lists the nine questions that a method answers in this package.')


# ---------- verdicts

WORDS = dict(holds='hold', fails='fail', unclear='remain unclear', checked='only needed its arithmetic checked')
ONE = dict(WORDS, holds='holds', fails='fails', unclear='remains unclear')


def counts(p: Project) -> str:
    "How many claims came to what"
    return _counted(p, p.papers, 'claims')


def real_counts(p: Project) -> str:
    "How many claims about a real model came to what; '' if there are none"
    real = [e['real'] for e in p.papers if e['real']]
    return _counted(p, real, 'claims about a real model') if real else ''


def _counted(p: Project, entries: list[dict], what: str) -> str:
    claimed = [e for e in entries if e['claims']]
    parts = [f'**{n}** {words}' for n, words in _tally([e['verdict'] for e in claimed])]
    if waiting := sum(e['verdict'] is None for e in claimed):
        parts.append(f'**{waiting}** not yet run')
    text = (f'Of {len(claimed)} {what}, each written down before its run and judged by one fixed rule: '
            f'{", ".join(parts)}.')
    results = [json.loads((p.root/e['evidence']).read_text(encoding='utf-8')) for e in claimed
               if e['evidence'] and e['verdict']]
    single = [contrast_verdict(c)[0] for r in results for c in r['contrasts']
              if c.get('primary', True)]
    if not single:
        return text
    each = ', '.join(f'{n} {words}' for n, words in _tally(single))
    return f'{text} A claim holds only if every contrast that decides it holds: of these {len(single)}, {each}.'


def _tally(verdicts: list) -> list[tuple[int, str]]:
    return [(n, (ONE if n == 1 else WORDS)[v]) for v in WORDS if (n := verdicts.count(v))]


def failed_controls(p: Project, e: dict) -> list[str]:
    "A line for each control that failed: whatever the contrasts say, the verdict is then unclear"
    result = json.loads((p.root/e['evidence']).read_text(encoding='utf-8'))
    out = []
    for c in result.get('controls') or ():
        if c['ok']:
            continue
        bars = [f'{word} {c[key]:g}' for key, word in (('at_least', 'at least'), ('at_most', 'at most'))
                if c.get(key) is not None]
        # values are numbers, or the runs in which it failed
        broken = c['values'].count(None)
        mean = (f'broke down in {broken} of {len(c["values"])} seeds' if broken or not bars
                else f'{sum(c["values"])/len(c["values"]):+.3f}')
        seen = f'{mean}, needed {" and ".join(bars)}' if bars else f'failed in {", ".join(c["values"])}'
        out.append(f'control failed, which makes the verdict unclear: {c["name"]}, {seen}')
    return out


def against(p: Project, e: dict) -> list[str]:
    """A line for whatever speaks against the sentence, for what differs from the paper, and for
    each earlier verdict"""
    claim, evidence, n = p.root/e['claims'][0], p.root/e['evidence'], 1
    read = lambda path: tomllib.loads(path.read_text(encoding='utf-8'))
    result, spec = json.loads(evidence.read_text(encoding='utf-8')), read(claim)
    out = [f'also seen: {x}' for x in (*result.get('also_seen', ()), *result.get('noted', ()))]
    out += [f'excluded in {arm}: {why} ({", ".join(map(str, counts))} of each seed)'
            for arm, of in (result.get('excluded') or {}).items() for why, counts in of.items()]
    out += [f'differs from the paper: {x}' for x in spec.get('differs', ())]
    out += [f'left out: {x}' for x in spec.get('left_out', ())]
    while (earlier := evidence.with_suffix(f'.{n}.json')).exists():
        was = json.loads(earlier.read_text(encoding='utf-8'))['verdict']
        n += 1
        after = claim.with_suffix(f'.{n}.toml') # the claim that took its place says why
        why = read(after if after.exists() else claim)['superseded']
        out.append(f'an earlier claim on this paper came to *{was}*, and was superseded: {why}')
    return out


def rate_curves(p: Project, e: dict) -> str:
    "A table for each contrast that hangs on the rate: its effect at the rates around the chosen ones"
    result = json.loads((p.root/e['evidence']).read_text(encoding='utf-8'))
    out = []
    for c in result['contrasts']:
        if contrast_verdict(c)[1].startswith('hangs'):
            rows = [(f'`{arm}`', f'{chosen:g}', *(_effect(c, arm, chosen, of) for of in (min, max)))
                    for arm, chosen in sorted({(t['arm'], t['chosen']) for t in c['sensitivity']})]
            table = _table('with only this arm moved', 'its chosen rate', 'half a grid step below',
                           'above', rows=rows)
            out.append(f'How the effect of *{c["name"]}* depends on the rate (two other seeds; it is '
                       f'{contrast(c)["mean"]:+.3f} at the chosen rates):\n\n{table}')
    return '\n\n'.join(out)


def _effect(c: dict, arm: str, chosen: float, nearest) -> str:
    "The mean effect at the rate below (`min`) or above (`max`) the chosen one"
    found = [t for t in c['sensitivity']
             if t['arm'] == arm and nearest(t['rate'], chosen) != chosen]
    if not found:
        return 'not tried'
    return f'{fmean(found[0]["effects"]):+.3f}' if found[0]['effects'] else 'gain not reached'


def verdict(p: Project, e: dict, rows: dict[str, list[dict]]) -> str:
    "What became of a paper's claims, for its own page"
    said = _verdict(p, e, rows.get(e['key'], []), 'Verdict')
    if e['real']:
        name = f'{e["key"]}/real'
        said += '\n\n' + _verdict(p, e | e['real'] | dict(key=name), rows.get(name, []), 'With a real model')
    if e['verdict'] or e['real'] and e['real']['verdict']:
        said += ('\n\n[How a verdict is made](../../instruments/verdicts.ipynb); '
                 '[all verdicts](../../papers/scoreboard.ipynb).')
    return said


def _verdict(p: Project, e: dict, rows: list[dict], head: str) -> str:
    if not e['claims']:
        return f'**{head}: none.** No claim has been written down yet.'
    if not e['verdict']:
        return f'**{head}: not yet run.** The claim is in `{e["claims"][0]}`: `ftlab claims run {e["key"]}`.'
    said = [*map(effect_line, rows), *failed_controls(p, e), *against(p, e)]
    lines = '\n'.join(f'- {m}' for m in said if m)
    said = f'**{head}: {_said(e)}** ({e["scope"]}). {rows[0]["sentence"]}\n\n{lines}'.rstrip()
    if curves := rate_curves(p, e):
        said += f'\n\n{curves}'
    return said


def reasons(p: Project) -> str:
    "The likely reasons that the pages give for what failed or stayed open"
    out = []
    for v, title in (('unclear', 'Unclear'), ('fails', 'Failed')):
        lines = [f'- {_code(e, "../" + e["notebook"].removeprefix("nbs/"))}: {why}'
                 for e in p.papers if e['verdict'] == v
                 for why in [reason(p.page(e['notebook'].removeprefix('nbs/')))] if why]
        out += [f'### {title}\n\n' + '\n'.join(lines)] if lines else []
    return '\n\n'.join(out)


def reason(nb: dict) -> str:
    "What a page says about why its verdict is what it is"
    found = [m[1].strip() for c in nb['cells']
             for m in re.finditer(r'^\*\*Likely reason\.\*\* (.+?)$', source(c), re.M)]
    return ' '.join(found)


# ---------- all of it

def made(root: Path) -> dict[str, str]:
    "{path: text} of every generated file"
    p, board = Project(root), scoreboard()
    rows = ({key: part.to_dict('records') for key, part in board.groupby('claim')} if len(board)
            else {})
    for e in p.papers:
        p.fill(e['notebook'].removeprefix('nbs/'),
               dict(words=words(e), verdict=verdict(p, e, rows)))
    for part in PARTS:
        for name in p.families(part):
            p.fill(f'{part}/{name}/index.ipynb', dict(papers=family(p, part, name)))
    p.fill('methods.ipynb', dict(which=which(p), measured=measured(p), methods=methods(p),
                                 peers=peers(p, 'methods.ipynb')))
    page = 'evaluators/patching.ipynb'
    p.fill(page, dict(peers=peers(p, page, only='tests/test_patching.py')))
    p.fill('commands/merge.ipynb', dict(rules=rules(p)))
    both = f'{counts(p)} {real_counts(p)}'.rstrip()
    p.fill('index.ipynb', dict(families=families(p), yardsticks=common(p),
                               counts=f'{both} [The scoreboard](papers/scoreboard.ipynb) has the numbers.'))
    p.fill('papers/scoreboard.ipynb', dict(counts=both, reasons=reasons(p)))
    p.store('papers/scoreboard.ipynb', 'HTML(scoreboard_html(board))', scoreboard_html(board))
    p.store('papers/table.ipynb', 'HTML(papers_html())', papers_html())
    nav = sidebar(p)
    p.fill('contents.ipynb', contents(p, nav))  # last: it counts the words of the others
    text, images = readme([c | dict(source=source(c)) for c in p.page('index.ipynb')['cells']])
    out = {'_quarto.yml': nav, 'README.md': text} | {f'nbs/{name}': p.text(name)
                                                     for name in sorted(p.pages)}
    for name, data in images.items():
        out[name] = data
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='write nothing; fail where something would change')
    check = parser.parse_args().check
    as_bytes = lambda t: t if isinstance(t, bytes) else t.encode()
    stale = {f: as_bytes(t) for f, t in made(ROOT).items()
             if not (ROOT/f).exists() or (ROOT/f).read_bytes() != as_bytes(t)}
    if check and stale:
        sys.exit(f'{", ".join(stale)}: not what the papers say; run make index')
    for file, data in stale.items():
        (ROOT/file).parent.mkdir(parents=True, exist_ok=True)
        (ROOT/file).write_bytes(data)
        print(file)


if __name__ == '__main__':
    main()
