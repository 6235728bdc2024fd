"""The words that a reader meets: none of `docs/words.toml` in pages, code, tests or the command line.

`python tests/test_words.py PAGE ...` lists what stands in these pages."""
import ast
import re
import sys
import tomllib

import pytest

from pages import ROOT, cells, pages

WORDS = tomllib.loads((ROOT/'docs/words.toml').read_text(encoding='utf-8'))
IDENTIFIERS, PHRASES = WORDS['identifiers'], WORDS['phrases']
LONGEST_FIRST = sorted(map(re.escape, PHRASES), key=len, reverse=True)
PHRASE = re.compile(rf'(?<![\w-])({"|".join(LONGEST_FIRST)})(?![\w-])', re.I)


def identifiers(source: str) -> set[str]:
    "Every name that Python code defines, uses or passes by keyword"
    found = set()
    for n in ast.walk(ast.parse(source)):
        names = (getattr(n, k, None) for k in ('id', 'attr', 'arg', 'name', 'asname'))
        found |= {x for x in names if isinstance(x, str)}
        if isinstance(n, ast.Dict):
            found |= {k.value for k in n.keys if isinstance(k, ast.Constant)
                      and isinstance(k.value, str)}
    return found


def phrases(text: str) -> list[str]:
    return [re.sub(r'\s+', ' ', m) for m in PHRASE.findall(re.sub(r'\s+', ' ', text))]


def wrong_words(source: str, code: bool, allowed=()) -> list[str]:
    "What stands in a cell or file, with what to say instead"
    found = ([(x, IDENTIFIERS[x]) for x in sorted(identifiers(source) & IDENTIFIERS.keys())] if code
             else [])
    found += [(p, PHRASES[p.lower()]) for p in phrases(source)]
    return [f'{x!r}: say {better!r}' for x, better in found if x.lower() not in allowed]


def words_of_page(page: str) -> list[str]:
    allowed = set(WORDS['allowed'].get(page, ()))
    out = []
    for i, c in enumerate(cells(page)):
        source, code = c['source'], c['cell_type'] == 'code'
        plain = ('\n'.join(l for l in source.split('\n') if not l.lstrip().startswith(('%', '!')))
                 if code else source)
        out += [f'{page}, cell {i}: {w}' for w in wrong_words(plain, code, allowed)]
    return out


@pytest.mark.parametrize('page', pages())
def test_a_page_speaks_the_fields_language(page):
    found = words_of_page(page)
    assert not found, '\n'.join(found)


@pytest.mark.parametrize('file', sorted(str(p.relative_to(ROOT)) for folder in ('tests', 'bench', 'tools', 'docs')
                                        for p in (ROOT/folder).rglob('*.py') if p.name != 'test_words.py'))
def test_a_file_speaks_the_fields_language(file):
    found = wrong_words((ROOT/file).read_text(encoding='utf-8'), True)
    assert not found, '\n'.join(found)


@pytest.mark.parametrize('file', ['README.md', 'DEVELOPERS.md'])
def test_a_text_speaks_the_fields_language(file):
    found = wrong_words((ROOT/file).read_text(encoding='utf-8'), False)
    assert not found, '\n'.join(found)


def test_no_sentence_of_the_first_reading_came_back():
    texts = {p: re.sub(r'\s+', ' ', ' '.join(c['source'] for c in cells(p))).lower()
             for p in pages()}
    assert not [(p, q) for q in WORDS['quoted']['sentences'] for p, text in texts.items()
                if q in text]


def test_the_list_finds_what_it_should():
    found = wrong_words('def f(priced):\n    return dict(mend=1)', True)
    assert found == ["'mend': say 'fix'", "'priced': say 'loss_mask'"]
    assert wrong_words('x = {"looked": 1}', True) and wrong_words('import x as lean', True)
    assert wrong_words('but The Way\nback still runs', False)
    assert not wrong_words('the railway backs up, nakedness', False)


if __name__ == '__main__':
    for page in sys.argv[1:] or pages():
        print(*words_of_page(page.removeprefix('nbs/')), sep='\n', end='')
        print()
