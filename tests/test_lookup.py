"""The skills of looking things up: every answer follows from its prompt, by parsers that share no code with the
generators; training text never predicts a held-out instance; the Bayes predictor is exact."""
import random
import re

import numpy as np
import pytest

from ftlab.lab.lookup import KINDS, LARGEST, LOOKUP, LOOKUP_SKILLS, NOISE, SCENES, SLOPES
from ftlab.lab.lookup import LookupWorld, bayes_line, document, from_language, judge_chain
from ftlab.lab.lookup import line_error, line_examples, read_number, to_language, write_number
from ftlab.lab.world import OLD, SKILLS, LabWorld, split_of, vocabulary

WORLD = LookupWorld(0)
WORDS = set(vocabulary())


def boxes(prompt, named):
    at = {}
    *told, ask = [p.strip() for p in prompt.rstrip('.? ').split(' . ')]
    for t in told:
        if m := re.fullmatch(r'box (\w) has (\w+)', t):
            at[m[1]] = m[2]
        elif m := re.fullmatch(r'move (?:(\w+) )?from (\w) to (\w)', t):
            assert (m[1] is not None) == named
            thing = at.pop(m[2])
            assert m[1] in (None, thing) and m[3] not in at
            at[m[3]] = thing
        else:
            raise AssertionError(t)
    assert 3 <= len(at) <= 7
    if m := re.fullmatch(r'(?:what is in|tell me what is inside) box (\w)|box (\w) has what'
                         r'|tell me what is inside (\w)', ask):
        return at[m[1] or m[2] or m[3]]
    m = re.fullmatch(r'which box has (\w+)|(\w+) is in which box|name the box with (\w+)', ask)
    return {v: k for k, v in at.items()}[m[1] or m[2] or m[3]]


def note(prompt):
    text, ask = re.fullmatch(r'(?:note :|list :|show) (.+?) \. (.+)', prompt).groups()
    pairs = [re.fullmatch(r'(?:the )?(\w+) (?:is|:|goes to|has) (\w+)', t).groups()
             for t in text.split(' , ')]
    assert len(dict(pairs)) == len(pairs)
    key = re.fullmatch(r'(?:what goes with |now |tell me )?(\w+)(?: \?| :| \.)', ask)[1]
    return dict(pairs)[key]


def story(prompt):
    *told, ask = [t.split() for t in prompt.split(' . ')]
    fits = [t for t in told if sum(a == b for a, b in zip(t, ask)) == 2]
    assert len(fits) == 1 and len(ask) == 3
    return fits[0][ask.index('?')]


def pairs_of(prompt):
    for arrow, between in ((':', ','), ('>', ';'), ('is', ','), ('=', '.'), (':', '.'), ('=', ',')):
        *shown, last = prompt.split(f' {between} ')
        split = [s.split(f' {arrow} ') for s in shown]
        if last.endswith(f' {arrow}') and split and all(len(s) == 2 for s in split):
            return split, last[:-len(arrow) - 1]
    raise AssertionError(prompt)


def label(prompt):
    shown, ask = pairs_of(prompt)
    said = {y for x, y in shown if x == ask}
    assert len(said) == 1
    return said.pop()


def category(prompt):
    shown, ask = pairs_of(prompt)
    kind = {x: k for k, words in KINDS.items() for x in words}
    assert ask not in [x for x, _ in shown]
    said = {y for x, y in shown if kind[x] == kind[ask]}
    assert len(said) == 1
    return said.pop()


TASKS = dict(reverse=lambda x: x[::-1], sort=lambda x: sorted(x), max=lambda x: [max(x)],
             last=lambda x: x[-1:], dedupe=lambda x: [c for i, c in enumerate(x) if c not in x[:i]],
             count=lambda x: [str(x.count(x[0]))])


def shown(prompt, only=None):
    pairs, ask = pairs_of(prompt)
    fits = {k: f for k, f in TASKS.items() if all(f(x.split()) == y.split() for x, y in pairs)}
    assert fits and (only is None or only in fits)
    said = {' '.join(f(ask.split())) for f in fits.values()}
    assert len(said) == 1
    return said.pop()


def chain(prompt, answer):
    text = re.search(r'\d (?:(?:\+|-|times) \d ?)+', prompt)[0].split()
    value, steps = int(text[0]), []
    for op, d in zip(text[1::2], text[2::2]):
        after = eval(f'({value} {"*" if op == "times" else op} {d}) % 10')
        steps.append(f'{value} {op} {d} = {after} ;')
        value = after
    assert answer == ' '.join([*steps, str(value)]) or answer == str(value)
    return answer


def line(prompt, answer):
    words = prompt.split()
    assert words[0] in ('rule', 'map') and words[-1] == '>' and int(words[-2]) in range(1, 10)
    assert -LARGEST <= read_number(answer) <= LARGEST
    return answer


def solve(skill, prompt, answer):
    if skill.startswith('track'):
        return boxes(prompt, skill == 'track')
    if skill.startswith('story'):
        return story(prompt)
    if skill.startswith('label'):
        return label(prompt)
    if skill.startswith('shown'):
        return shown(prompt, skill.partition('-')[2] or None)
    if skill.startswith('chain'):
        return chain(prompt, answer)
    if skill.startswith('line'):
        return line(prompt, answer)
    return dict(lookup=note, category=category)[skill](prompt)


@pytest.mark.parametrize('skill', LOOKUP)
def test_answers_follow_from_prompts(skill):
    for level in (1, 2, 3):
        for row in WORLD.rows(skill, 60, level=level, seed=level):
            prompt, answer = row['prompt'], row['response']
            assert solve(skill, prompt, answer) == answer
            assert WORLD.judge(row, answer) == 1
            assert set(f'{prompt} {answer}'.split()) <= WORDS
            assert len(f'{prompt} {answer}'.split()) + 4 <= 128


def test_chains_need_their_steps_or_not():
    rows = WORLD.rows('chain', 20)
    assert all('=' in r['response'] for r in rows)
    assert all(len(r['response'].split()) == 1 for r in WORLD.rows('chain-direct', 20))
    assert (judge_chain('', '1 + 2 = 3 ; 3', '3') == 1
            and judge_chain('', '1 + 2 = 3 ; 3', '3 ; 4') == 0)


@pytest.mark.parametrize('skill', LOOKUP_SKILLS)
def test_documents_predict_no_held_out_instance(skill):
    """Each predicted answer, put after the prompt that a test would ask,
    is a training instance with that answer"""
    r, marked = random.Random(1), 0
    for i in range(150):
        text, first = '', ''
        for piece, predict in document(WORLD, skill, r, i % 3):
            if predict:
                before = text.replace('<bos> <user>', '').replace('<assistant>', '')
                turns = text.split(' <user> ')
                if len(turns) > 2:  # a further question about the same scene
                    question = turns[-1].replace('<assistant>', '').strip()
                    scene = turns[1].split(' <assistant>')[0]
                    before = f'{scene[:-len(last_part(scene))]}{question}'
                prompt = ' '.join(before.split())
                assert split_of(prompt) == 'train'
                answer = piece.replace(' <eos>', '')
                if i % 3 and '<assistant>' in text:
                    assert solve(skill, prompt, answer) == answer
                marked += 1
            text = f'{text} {piece}'
    assert marked >= 150


def last_part(scene):
    "The question at the end of a scene: what stands after the last full stop but its own"
    return scene.removesuffix(' .').split(' . ')[-1] + (' .' if scene.endswith(' .') else '')


def test_held_out_rows_stay_held_out():
    for s in LOOKUP_SKILLS:
        parts = {p: {r['prompt'] for r in WORLD.rows(s, 100, p, seed=3)} for p in ('train', 'validation', 'test')}
        assert not parts['train'] & (parts['validation'] | parts['test']) and not parts['validation'] & parts['test']


def test_the_questions_of_v1_are_unchanged():
    for s in OLD:
        assert LookupWorld(0).rows(s, 20) == LabWorld(0).rows(s, 20)
    assert not set(LOOKUP) & set(SKILLS) and len(vocabulary()) == 1069
    with pytest.raises(KeyError, match='no skill is called .*lookup'):
        WORLD.skill('look-up')


def test_numbers():
    for y in range(-99, 100):
        assert read_number(write_number(y)) == y
    for bad in ('', '3', '+ 3', '1 2 3', '+ a 1', '+ 1 2 3'):
        assert read_number(bad) is None
    with pytest.raises(ValueError, match='no prompt of the skill line'):
        line_examples('rule 3 > + 0')


def test_bayes_predictor_is_exact():
    "Against a posterior by plain sampling: draw a task, keep it if it makes the very examples"
    r, hits, discrete = random.Random(0), [], 0
    prompt = 'rule 2 > + 0 7 , 5 >'
    for _ in range(400_000):
        d = r.random() < .5
        w = r.choice(SLOPES) if d else round(8*r.gauss(0, 3))/8
        if round(2*w + r.gauss(0, NOISE)) == 7:
            hits.append(round(5*w + r.gauss(0, NOISE)))
            discrete += d
    found = bayes_line(prompt)
    assert len(hits) > 10_000 and abs(found['probabilities'].sum() - 1) < 1e-9
    assert abs(found['mean'] - np.mean(hits)) < .25 and abs(found['median'] - np.median(hits)) <= 1
    assert abs(found['discrete'] - discrete/len(hits)) < .02


def test_line_error():
    rows = WORLD.rows('line', 200)
    best = [write_number(bayes_line(r['prompt'])['median']) for r in rows]
    assert line_error(rows, best)['ratio'] == 1
    worse = line_error(rows, ['nothing']*len(rows))
    assert worse['unreadable'] == 1 and worse['ratio'] > 20


def test_translation_keeps_the_question():
    for s in ('story', 'label'):
        for row in WORLD.rows(s, 50):
            there = to_language(WORLD, row['prompt'], 'tavi')
            assert there != row['prompt'] and from_language(WORLD, there, 'tavi') == row['prompt']
            assert solve(f'{s}-tavi', there, '') == to_language(WORLD, row['response'], 'tavi')


def test_every_skill_has_a_scene_and_a_sentence():
    assert set(SCENES) == set(LOOKUP) and all(s.doc and 'Level 1' in s.doc for s in LOOKUP.values())
