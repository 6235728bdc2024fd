"""The course's own machinery: exercises and what readers do to them, progress, the map,
the start page, the quiz, how JupyterLab is started"""
import contextlib, functools, importlib, inspect, io, json, os, re, socket, subprocess, sys
import warnings
from pathlib import Path
import pytest, torch
import ftlab
import ftlab.exercises
from ftlab import cli
from ftlab.commands import jupyter
from ftlab import map as course
from ftlab.exercises import EXERCISES, Wrong, chapters, differs, find, progress, remember, same_as
from ftlab.map import (CHAPTERS, QUESTIONS, QUIZ, draw_map, go_on, grade, hosted, measured,
                       questions,
                       start, unfinished, where_to_begin, write_start_page)
from pages import NBS, ROOT, cells, ordered, pages

@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    "A reader's folder of its own for each test, and nowhere to write a start page"
    monkeypatch.setenv('FTLAB_HOME', str(tmp_path/'home'))
    monkeypatch.delenv('FTLAB_START', raising=False)
    return tmp_path/'home'

def named(name, f):
    "`f` as if the reader had called it `name`"
    if inspect.isclass(f):
        return type(name, (f,), {})

    @functools.wraps(f)
    def mine(*args):
        return f(*args)

    mine.__name__ = name
    return mine

QUICK = [e for e in EXERCISES if e.name not in ('teach_zigzag', 'compare_and_choose')] # these train
MISTAKES = [pytest.param(e, *m, id=f'{e.name}-{i}') for e in EXERCISES
            for i, m in enumerate(e.mistakes)]

# --- every exercise

def test_every_chapter_has_exercises_and_every_exercise_a_chapter():
    assert len({e.name for e in EXERCISES}) == len(EXERCISES)
    order = [c.name for c in CHAPTERS]
    assert sorted(order) == chapters(), 'a chapter has no module of exercises, or a module has no chapter'
    asked = [e for c in CHAPTERS for e in c.exercises]
    assert sorted(asked) == sorted(e.name for e in EXERCISES), 'an exercise belongs to no chapter, or to two'
    assert {c.name: len(c.exercises) >= 2 for c in CHAPTERS} == dict.fromkeys(order, True)
    assert all(e.hints and len(e.mistakes) >= 3 for e in EXERCISES if e.name != 'teach_zigzag')

def test_an_exercise_says_how_difficult_it_is_and_what_its_result_means():
    for e in EXERCISES:
        assert e.difficulty in (1, 2, 3) and 5 <= e.minutes <= 30, e.name
        assert 2 <= len(re.findall(r'[.:?!](?= |$)', e.means)) <= 6, e.name
        text = f'difficulty {e.difficulty} of 3, {e.minutes} minutes'
        assert text in e._repr_markdown_().split('<details>')[0] and text in repr(e)
    for c in CHAPTERS:
        mine = [e for e in EXERCISES if e.chapter == c.name]
        assert any(e.difficulty == 3 and e.minutes >= 15 for e in mine), c.name
    left = ftlab.check(find('forgetting').reference).message
    assert left.startswith(find('forgetting').means) and '`rescale` (difficulty 1 of 3, 10 minutes)' in left

@pytest.mark.parametrize('chapter', CHAPTERS, ids=lambda c: c.name)
def test_exercises_stand_beside_their_chapter(chapter):
    """In the module of its name, on a page that the chapter does not show,
    in the order in which the chapter asks them"""
    module = importlib.import_module(f'ftlab.exercises.{chapter.name}')
    assert [e.name for e in module.EXERCISES] == chapter.exercises
    for e in module.EXERCISES:
        assert (e.chapter, e.reference.__module__, e.reference.__name__) == (
            chapter.name, module.__name__, e.name)
        assert getattr(ftlab.exercises, e.name) is e.reference, 'not found where it was before'
    code = '\n'.join(c['source']
                     for c in cells(f'course/{chapter.name}.ipynb') if c['cell_type'] == 'code')
    at = [code.index(f"ftlab.exercise('{n}')") for n in chapter.exercises]
    assert (at == sorted(at)
            and not any(inspect.getsource(e.reference).strip() in code for e in module.EXERCISES))

def test_names_of_before_are_found_and_others_are_not():
    assert ftlab.exercises.EXERCISES is EXERCISES and ftlab.exercises.FORGETTING is find('forgetting')
    for name in ('nothing_of_the_kind', '_path'):
        with pytest.raises(AttributeError, match=name):
            getattr(ftlab.exercises, name)

@pytest.mark.parametrize('exercise', QUICK, ids=lambda e: e.name)
def test_our_solution_passes_and_is_remembered(exercise):
    assert ftlab.check(exercise.reference) and exercise.name in progress()['exercises']

@pytest.mark.parametrize('exercise, wrong, sentence', MISTAKES)
def test_a_typical_mistake_gets_its_own_sentence(exercise, wrong, sentence):
    checked = ftlab.check(named(exercise.name, wrong))
    assert not checked and not progress()['exercises']
    if exercise.name == 'pick_rate': # what the choice does on unseen seeds follows
        others = {s for _, s in exercise.mistakes} - {sentence}
        assert checked.message.startswith(sentence)
        assert not any(s in checked.message for s in others)
    else:
        assert checked.message == sentence

@pytest.mark.parametrize('exercise', [e for e in EXERCISES if e.name != 'teach_zigzag'],
                         ids=lambda e: e.name)
def test_what_readers_do_is_told_kindly(exercise):
    """An empty body, an exception, a wrong type, too few arguments: none passes, none is raised,
    each message says what happened"""

    def nothing(*args):
        ...

    def breaks(*args):
        raise RuntimeError('the reader wrote this')

    def strange(*args):
        return object()

    for f, said in ((nothing, 'nothing|has to be a'),
                    (breaks, 'RuntimeError, the reader wrote this|has to be a class'),
                    (strange, 'object|has to be a'),
                    (lambda *, x: 1, 'has to take|has to be a class')):
        checked = ftlab.check(named(exercise.name, f))
        assert not checked and re.search(said, checked.message), (said, checked.message)
    assert 'has to be a' in ftlab.check(5, exercise.name).message

@pytest.mark.parametrize('exercise', EXERCISES, ids=lambda e: e.name)
def test_an_exercise_shows_its_task_hints_and_solution_folded(exercise):
    shown = ftlab.exercise(exercise.name)._repr_markdown_()
    folds = re.findall(r'<details><summary>(.*?)</summary>\n\n(.*?)\n\n</details>', shown, re.S)
    assert [t for t, _ in folds] == [f'Hint {i}' for i in range(1, len(exercise.hints) + 1)] + ['Our solution']
    assert (inspect.getsource(exercise.reference).strip() in folds[-1][1]
            and exercise.means in folds[-1][1]
            and inspect.getsource(exercise.reference) not in shown.split('<details>')[0]
            and exercise.means not in shown.split('<details>')[0])
    assert exercise.task in repr(exercise)

@pytest.mark.slow
def test_teaching_zigzag():
    "The exercise that trains: short wrong turns, each with its own message, then our solution"
    def taught(method='lora', lesson='new-procedure', steps=1, base='lab-s', before=0):
        model, tok = ftlab.load(base)
        if before:
            ftlab.fit(model, tok, ftlab.data('new-language', n=400), ftlab.methods.full(),
                      steps=before, lr=2e-3, schedule='constant', progress=False)
        return ftlab.fit(model, tok, ftlab.data(lesson, n=400), getattr(ftlab.methods, method)(),
                         steps=steps, progress=False)
    for f, said in ((lambda: taught('full'), 'made by `full`'),
                    (lambda: taught(lesson='new-language'), "learned from 'new-language'"),
                    (lambda: taught(), '80% are wanted'),
                    (lambda: taught(base='lab-m'), 'another model than `lab-s`'),
                    (lambda: taught(before=20), 'Load a fresh `lab-s`'),
                    (lambda: taught().model, 'return the run itself')):
        checked = ftlab.check(named('teach_zigzag', f))
        assert not checked and said in checked.message, checked.message
    assert ftlab.check(find('teach_zigzag').reference)

@pytest.mark.slow
def test_compare_and_choose(tmp_path, monkeypatch):
    "Our solution runs a comparison, here a shorter one, and its choice follows from it"
    def short_one(methods, model, data, **settings):
        return compare(methods, model, data, **settings | dict(
            steps=8, evaluate_every=4, items=20, old_items=1, out=tmp_path, progress=False))
    compare = ftlab.compare
    monkeypatch.setattr(ftlab, 'compare', short_one)
    assert ftlab.check(find('compare_and_choose').reference)

# --- check

def test_a_message_shows_every_argument_and_how_to_repeat_the_call():
    "The price stands behind a path that is longer than a line"
    def best_stop(path, price):
        return 30 if price < 1 else 20

    said = ftlab.check(best_stop).message
    assert "path=[{'step': 0" in said and 'price=3' in said, said
    line = re.search(r'To repeat it: `(.*)`', said)[1]
    assert eval(line, dict(best_stop=find('best_stop').reference, ftlab=ftlab)) == 10
    ftlab.exercise('best_stop').case(2)[0].clear()
    assert ftlab.exercise('best_stop').case(2)[0], 'a case is a copy'

def test_none_is_an_answer_where_it_is_right_for_some_inputs():
    def what_broke(before, after):
        return None

    said = ftlab.check(what_broke).message
    assert 'nothing back (`None`) on any input. That is right for some of them only' in said, said
    right = find('what_broke').reference

    def late(before, after):
        return right(before, after) if len(before) == 3 else None

    assert 'the result is nothing' in ftlab.check(late, 'what_broke').message

def wrong_rates():
    right = find('pick_rate').reference

    def rate_only(runs, need):
        return right(runs, need)[0]

    def text(runs, need):
        rate, why = right(runs, need)
        return str(rate), why

    def always(runs, need):
        return 3e-4, {}

    def more_needed(runs, need):
        return right(runs, need + .1)

    def reasons_in_words(runs, need):
        rate, why = right(runs, need)
        return rate, dict.fromkeys(why, 'worse')

    return ((rate_only, 'a pair is wanted'), (text, 'none of the rates'),
            (always, 'misses it in 21 of 40 runs'), (more_needed, 'In the reasons, why[0.001]'),
            (reasons_in_words, "is 'worse'"))

@pytest.mark.parametrize('yours, message', wrong_rates(), ids=lambda x: getattr(x, '__name__', ''))
def test_wrong_rates(yours, message):
    assert message in ftlab.check(yours, 'pick_rate').message

def test_the_rates_are_chosen_as_surely_as_their_exercise_says():
    "Five seeds: the right rate in nine of ten draws at least; one seed: half of the second world wrong"
    from ftlab.exercises import what_it_cost as own
    right = [own.pick_rate(*case)[0] for case in own._CASES]

    def share(world, n):
        draws = [own._runs(world, range(20_000 + i*n, 20_000 + i*n + n)) for i in range(150)]
        return sum(own.pick_rate(d, own._NEEDS[world])[0] == right[world] for d in draws)/150

    assert all(share(world, 5) > .9 for world in range(4))
    assert .4 < share(1, 1) < .6 and round(.9**5, 2) == .59

def test_answers_that_have_a_result_without_the_way():
    "Draws from too few halves, a step forgotten in one case only, a change of the base, a fixed start"
    import random

    def of_each_pair(names, seed):
        dice = random.Random(seed)
        return {dice.choice(names[i:i + 2]) for i in range(0, len(names) - 1, 2)}

    def sometimes(runs, need):
        return None if 1e-2 in runs else find('pick_rate').reference(runs, need)

    class Seeded(find('LowRank').reference):
        def __init__(self, W, r, alpha):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                super().__init__(W, r, alpha)

    for name, wrong, said in (('half_of', of_each_pair, 'a few halves'),
                              ('pick_rate', sometimes, 'gives None; a pair is wanted'),
                              ('LowRank', Seeded, 'the same `A`')):
        checked = ftlab.check(wrong, name)
        assert not checked and said in checked.message, checked.message

def test_our_rates_are_the_best_on_the_seeds_that_nobody_has_seen():
    from ftlab.exercises import what_it_cost as own
    for world in range(len(own._WORLDS)):
        chosen, _ = own.pick_rate(*find('pick_rate').case(world))
        assert own.pick_rate(own._runs(world, own._UNSEEN), own._NEEDS[world])[0] == chosen, world

def test_answers_to_the_comparison_that_are_no_answers():
    from ftlab.exercises.half_is_enough import _HALF_BETTER, _made_up
    made, choice, more = _made_up(_HALF_BETTER)
    two = _made_up(_HALF_BETTER[:3])[0]
    for m in two.result['methods']:
        m['seeds'] = m['seeds'][:2]
    other = type(made)(made.result | dict(data='new-facts'))
    alone = type(made)(made.result | dict(methods=made.result['methods'][:1]))
    for got, said in (((made, 'half', more), 'is one of'), ((made, choice, {}), "no key 'mean'"),
                      ((made, choice, (0, 1)), 'a dictionary'),
                      ((two, choice, more), 'has 2 seeds'),
                      ((other, choice, more), 'new-facts'), ((alone, choice, more), '`hft` is not in'),
                      ('hft', 'three things'), ((None, choice, more), 'three things')):
        checked = ftlab.check(lambda: got, 'compare_and_choose')
        assert not checked and said in checked.message, checked.message

def test_an_answer_that_is_none_of_the_possible_ones_hears_which_they_are():
    from ftlab.exercises.lab_models import BUGS
    said = ftlab.check(lambda setup: 'a leak', 'find_bug').message
    assert "'a leak', which is not one of the possible answers" in said, said
    assert all(repr(b) in said for b in BUGS), said

def test_a_guess_finds_no_bug_and_every_bug_is_planted_twice():
    from collections import Counter
    from ftlab.exercises.lab_models import BUGS, find_bug
    assert Counter(find_bug(*find('find_bug').case(i)) for i in range(10)) == dict.fromkeys(BUGS, 2)

def test_wrong_shapes_and_types_are_told():
    base = {'w': torch.zeros(2, 3)}
    shape = ftlab.check(
        named('rescale', lambda base, tuned, alpha: {n: base[n].movedim(0, -1) for n in base}))
    assert 'shape [3, 2], but the shape should be [2, 3]' in shape.message
    assert 'should be a tensor of shape [2, 3]' in ftlab.check(
        named('rescale', lambda base, tuned, alpha: {n: base[n].tolist() for n in base})).message
    assert 'a dictionary with the keys' in ftlab.check(
        named('rescale', lambda base, tuned, alpha: base['w'])).message
    assert "has no key 'b'" in ftlab.check(named('rescale', lambda base, tuned, alpha: {'w': base['w']})).message
    assert 'should be a number' in ftlab.check(
        named('forgetting', lambda before, after: '0.3')).message
    assert ('is 3' in differs([1, 2, 3], [1, 2, 4], 'x') and differs(torch.tensor(2.), 2.) is None
            and differs(float('nan'), 1.)
            and differs(torch.full((2,), float('nan')), torch.ones(2)))
    assert (differs(base, {'w': torch.zeros(2, 3)}) is None and differs(1, True)
            and differs(True, 1.))

def test_an_exception_is_told_with_the_readers_own_line():
    def forgetting(before, after):
        total = 0
        return total/len([])

    said = ftlab.check(forgetting).message
    line = inspect.getsourcelines(forgetting)[1] + 2
    assert f'In line {line} of your cell, `return total/len([])`: ZeroDivisionError' in said and 'called with' in said

def test_an_exit_in_the_readers_code_is_a_mistake_and_ends_nothing():
    def forgetting(before, after):
        raise SystemExit

    said = ftlab.check(forgetting).message
    assert '`raise SystemExit`: SystemExit. It was called with' in said

def test_the_reader_is_given_copies_and_told_off_for_changing_them():
    def rescale(base, tuned, alpha):
        for n in base:
            base[n] += alpha*(tuned[n] - base[n])
        return base

    assert 'changes its arguments' in ftlab.check(rescale).message
    assert ftlab.check(find('rescale').reference)

def test_check_runs_nothing_but_what_it_was_given(monkeypatch):
    "Neither other functions of the same namespace nor anything printed to be run"
    calls = []

    def forgetting(before, after):
        calls.append('mine')
        return find('forgetting').reference(before, after)

    def rescale(*a):
        calls.append('other')

    assert ftlab.check(forgetting) and set(calls) == {'mine'}

def test_a_stop_by_hand_is_not_swallowed():
    def forgetting(before, after):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ftlab.check(forgetting)

def test_names_that_no_exercise_has():
    def forgeting(before, after):
        return 0

    with pytest.raises(ValueError, match='did you mean forgetting'):
        ftlab.check(forgeting)
    with pytest.raises(ValueError, match='did you mean LowRank'):
        ftlab.exercise('lowrank')
    with pytest.raises(ValueError, match=r'there are .*\bforgetting\b'):
        ftlab.exercise('qqqq')
    for x in (3., lambda b, a: 0):
        with pytest.raises(ValueError, match='without brackets'):
            ftlab.check(x)
    assert not ftlab.check(lambda before, after: 0., name='forgetting')

def test_a_mistake_is_named_only_where_it_explains_every_answer():
    "An answer that equals a mistake on one input by chance must not be told that it made it"
    test = same_as(lambda x: x, [(2,), (3,)], ((lambda x: x*x, 'squared'), (lambda x: x/0, 'divided')))
    with pytest.raises(Wrong, match='squared'):
        test(lambda x: x*x)
    with pytest.raises(Wrong, match='is 4, but should be 2'):
        test(lambda x: 4)

# --- progress

def test_progress_survives_a_new_process(home):
    ftlab.check(find('forgetting').reference)
    ftlab.chapter('first_light')
    code = 'from ftlab.exercises import progress; import json; print(json.dumps(progress()))'
    out = json.loads(subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True,
                                    text=True, check=True).stdout)
    assert (list(out['exercises']) == ['forgetting'] and out['last'] == 'first_light'
            and [p.name for p in home.iterdir()] == ['progress.json'])

@pytest.mark.parametrize('text', ['{"exercises": ', '[1, 2]', ''])
def test_a_broken_file_is_put_aside_with_a_word(home, text):
    home.mkdir()
    (home/'progress.json').write_text(text)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        assert ftlab.check(find('forgetting').reference)
    assert (any('progress.broken.json' in str(w.message) for w in said)
            and (home/'progress.broken.json').read_text() == text
            and list(progress()['exercises']) == ['forgetting'])

def test_parts_of_the_wrong_kind_are_left_out(home):
    home.mkdir()
    (home/'progress.json').write_text(json.dumps(
        dict(exercises=['x'], quiz='y', chapters={'first_light': 'now'}, last=3)))
    assert progress() == dict(exercises={}, quiz={}, chapters={'first_light': 'now'}, last='')

def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path, monkeypatch):
    (tmp_path/'file').write_text('x')
    monkeypatch.setenv('FTLAB_HOME', str(tmp_path/'file'/'below'))
    with pytest.warns(UserWarning, match='could not be saved'):
        assert ftlab.check(find('forgetting').reference)
    with pytest.warns(UserWarning):
        assert ftlab.chapter('first_light').chapter.name == 'first_light'

# --- the map and its chapters

def test_the_chapters_are_those_of_the_site_in_its_order():
    others = {'course/start.ipynb', 'course/primer.ipynb'}
    listed = [Path(o).stem for o in ordered() if o.startswith('course/') and o not in others]
    assert listed == [c.name for c in CHAPTERS] and listed[1] == 'lab_models'
    assert {f'course/{c}.ipynb' for c in listed} | others == {p for p in pages() if p.startswith('course/')}
    of_exercises = [Path(o).stem for o in ordered() if o.startswith('exercises/')]
    assert of_exercises == listed, 'the pages of exercises stand in another order'

@pytest.mark.parametrize('chapter', CHAPTERS, ids=lambda c: c.name)
def test_a_chapter_says_its_name_and_asks_its_exercises(chapter):
    if not (NBS/'course'/f'{chapter.name}.ipynb').exists():
        pytest.fail('no such page')
    found = cells(f'course/{chapter.name}.ipynb')
    code = '\n'.join(c['source'] for c in found if c['cell_type'] == 'code')
    assert found[0]['source'].splitlines()[0] == f'# {chapter.title}'
    assert f"ftlab.chapter('{chapter.name}')" in code, 'its first line does not say where it stands'
    for e in chapter.exercises:
        assert f"ftlab.exercise('{e}')" in code and f'ftlab.check({e})' in code, e
    assert (all(n in QUESTIONS for n in chapter.nouns)
            and all(CHAPTERS.index(course.chapter_named(n)) < CHAPTERS.index(chapter)
                    for n in chapter.needs))

def test_the_nine_questions_are_those_of_the_pages():
    assert len(QUESTIONS) == 9
    for noun, (part, _) in QUESTIONS.items():
        assert (NBS/part/f'{noun}.ipynb').exists(), noun

def test_the_drawing_is_the_one_that_is_kept_and_can_be_read_aloud():
    import xml.etree.ElementTree as et
    svg = (NBS/'images'/'map.svg').read_text(encoding='utf-8')
    assert svg == draw_map(), 'run nbs/map.ipynb'
    tree = et.fromstring(svg)
    text = ' '.join(tree.itertext())
    assert (tree.get('role') == 'img' and all(n in text for n in QUESTIONS)
            and all(c.title in text for c in CHAPTERS if c.nouns))
    assert 'href' not in svg and draw_map(['probe']) != svg
    with pytest.raises(ValueError, match="no question 'prob'"):
        draw_map(['prob'])

def test_the_first_line_of_a_chapter(tmp_path, monkeypatch):
    "In its own folder with links; copied elsewhere without, as they would lead nowhere"
    monkeypatch.chdir(NBS/'course')
    here = ftlab.chapter('what_it_cost')._repr_markdown_()
    assert ('[First light](first_light.ipynb)' in here and '**probe**' in here
            and 'Chapter 3 of' in here and f'{len(CHAPTERS[2].exercises)} exercises' in here)
    for c in CHAPTERS:
        assert (
            c.title in repr(ftlab.chapter(c.name))
            and f'Chapter {CHAPTERS.index(c) + 1} of' in ftlab.chapter(c.name)._repr_markdown_())
    remember('exercises', 'best_stop')
    assert ' exercises, 1 solved' in ftlab.chapter('what_it_cost')._repr_markdown_()
    for e in course.chapter_named('what_it_cost').exercises:
        remember('exercises', e)
    assert 'all solved' in ftlab.chapter('what_it_cost')._repr_markdown_()
    monkeypatch.chdir(tmp_path)
    assert '](' not in ftlab.chapter('what_it_cost')._repr_markdown_()
    with pytest.raises(ValueError, match="no chapter is called 'x'; there are first_light"):
        ftlab.chapter('x')

def test_where_to_go_on():
    first, second = CHAPTERS[:2]
    assert go_on() == first
    ftlab.chapter(second.name)
    assert go_on() == second
    for e in second.exercises:
        remember('exercises', e)
    assert go_on() == CHAPTERS[2]
    for c in CHAPTERS:
        remember('chapters', c.name)
        for e in c.exercises:
            remember('exercises', e)
    assert go_on() is None and 'Everything here is solved' in repr(start())

def test_the_start_page_has_links_that_lead_somewhere(tmp_path, monkeypatch):
    ftlab.chapter('first_light')
    assert write_start_page() is None
    monkeypatch.setattr(course, 'checkout', lambda: None)
    assert write_start_page(tmp_path/'start.md') is None
    monkeypatch.undo()
    monkeypatch.setenv('FTLAB_HOME', str(tmp_path/'home'))
    monkeypatch.setenv('FTLAB_START', str(tmp_path/'sub folder'/'start.md'))
    monkeypatch.chdir(tmp_path)
    ftlab.check(find('forgetting').reference)
    page = tmp_path/'sub folder'/'start.md'
    text = page.read_text(encoding='utf-8')
    assert '**Continue with [First light](' in text and f'1 of {len(CHAPTERS[0].exercises)}' in text
    links = re.findall(r'\]\(([^)]+)\)', text)
    assert len(links) > 12
    assert not [l for l in links if not (page.parent/l).exists()]
    monkeypatch.setenv('FTLAB_START', str(page/'not a folder'/'start.md'))
    assert ftlab.check(find('forgetting').reference)  # cannot be written, and nobody minds

def test_a_run_that_was_cut_off_is_found_and_goes_on(tmp_path, monkeypatch):
    class Dies:
        def after_step(self, state):
            if state.step == 3:
                raise SystemError
    class Stops:
        def __init__(self, how=True):
            self.how = how

        def after_step(self, state):
            state.stop = state.step == 2 and self.how
    def run(name, *callbacks, **more):
        model, tok = ftlab.load('lab-s')
        rows = [dict(prompt=f'add {i}', response=str(i)) for i in range(20)]
        return ftlab.fit(model, tok, rows, steps=4, batch_size=2, out=tmp_path/name, save_every=1,
                         callbacks=callbacks, progress=False, **more)
    with pytest.raises(SystemError):
        run('runs/dead', Dies())
    run('runs/done')
    (tmp_path/'runs'/'odd').mkdir()
    (tmp_path/'runs'/'odd'/'checkpoint.safetensors').write_bytes(b'not one of ours')
    row, = unfinished(tmp_path/'runs', tmp_path)
    assert (Path(row['folder']).name, row['step'] in (2, 3), row['steps']) == ('dead', True, 4)
    monkeypatch.chdir(tmp_path)
    assert 'runs/dead' in repr(start()) and 'resume=True' in repr(start())
    assert len(run('runs/dead', resume=True).log) == 4 and not unfinished(tmp_path/'runs')
    run('meant', Stops())
    # a callback found that it was done, and so it is
    assert not unfinished(tmp_path) and len(run('meant', Stops(), resume=True).log) == 2
    run('early', Stops('by hand'))
    assert unfinished(tmp_path) # somebody stopped it before its last step ...
    (tmp_path/'early'/'run.json').write_text('{"interrupted": false}')
    assert not unfinished(tmp_path)  # ... and what keeps it says that it was meant to

def test_a_measurement_is_found_or_missed_by_name():
    assert measured('lab_v1_teach_lab-s.json').is_relative_to(ROOT/'bench')
    with pytest.raises(FileNotFoundError, match='lab_v1_teach'):
        measured('nope.json')

# --- the quiz

def test_every_chapter_has_three_questions_and_the_start_page_one_of_each():
    assert [q.chapter for q in QUIZ] == [c.name for c in CHAPTERS for _ in range(3)]
    assert len({q.name for q in QUIZ}) == len({q.text for q in QUIZ}) == len(QUIZ)
    assert all(len(set(q.options)) >= 3 and q.why for q in QUIZ)
    assert questions() == tuple(questions(c.name)[0] for c in CHAPTERS)
    right = [q.options[0] for q in questions()]
    assert where_to_begin(right) is None
    for i, c in enumerate(CHAPTERS):
        assert where_to_begin(right[:i] + [None]*(len(right) - i)) == c
    with pytest.raises(ValueError, match=f'{len(CHAPTERS)} questions and 2 answers'):
        where_to_begin(right[:2])

def test_neither_length_nor_place_gives_the_right_answer_away():
    ranks = [sorted(q.options).index(q.options[0]) for q in QUIZ]
    longest = [max(q.options, key=len) == q.options[0] for q in QUIZ]
    assert len(set(ranks)) == 3 and sum(longest) <= len(QUIZ)/2, (ranks, longest)

def test_a_right_answer_is_remembered_and_a_wrong_one_is_not(tmp_path, monkeypatch):
    q, other, _ = questions('lab_models')
    assert not grade(q, q.options[1]) and not grade(q, None) and progress()['quiz'] == {}
    monkeypatch.setenv('FTLAB_START', str(tmp_path/'start.md'))
    assert grade(q, q.options[0]) and list(progress()['quiz']) == [q.name]
    row = next(l for l in (tmp_path/'start.md').read_text(encoding='utf-8').splitlines() if 'lab_models' in l)
    assert row.endswith('| 1 of 3 |')
    assert not grade(q, q.options[2]) and list(progress()['quiz']) == [q.name], 'once right stays right'
    with pytest.raises(ValueError, match=f"'yes' is none of the answers to '{other.name}'; they are"):
        grade(other, 'yes')
    with pytest.raises(ValueError, match="no chapter is called 'labs'"):
        ftlab.quiz('labs')

@pytest.mark.parametrize('text', ['{"quiz": {"one_score": ', '[]', ''])
def test_a_damaged_file_costs_no_answer(home, text):
    home.mkdir()
    (home/'progress.json').write_text(text)
    q = questions('first_light')[0]
    with pytest.warns(UserWarning, match='progress.broken.json'):
        assert grade(q, q.options[0])
    assert (list(progress()['quiz']) == [q.name] and (home/'progress.broken.json').read_text()
            == text)

@pytest.mark.parametrize('old', [{}, dict(quiz=['one_score']), dict(quiz=None)])
def test_progress_of_before_the_quiz_is_kept(home, old):
    home.mkdir()
    (home/'progress.json').write_text(json.dumps(dict(exercises={'forgetting': 'then'}, last='first_light') | old))
    assert '0 of 3 |' in repr(start())
    q = questions('first_light')[1]
    assert grade(q, q.options[0])
    assert (progress()['exercises'] == {'forgetting': 'then'}
            and list(progress()['quiz']) == [q.name])

@pytest.mark.parametrize('chapter', [None, *(c.name for c in CHAPTERS)])
def test_the_quiz_without_a_kernel_has_its_answers_folded(chapter):
    text = ftlab.quiz(chapter)._repr_markdown_()
    assert text.count('<details>') == len(questions(chapter))
    open_ = re.sub(r'<details>.*?</details>', '', text, flags=re.S)
    for q in questions(chapter):
        assert q.text in open_ and q.why not in open_ and q.why in text
        assert all(f'- {o}' in open_ for o in q.options)

def picks_of(box):
    return [w for w in box.children if hasattr(w, 'options')]

def test_the_widgets_of_the_start_page_say_where_to_begin_and_remember_nothing():
    box = ftlab.quiz().widgets()
    assert box.children[-1].value == f'{len(CHAPTERS)} to go.'
    for p, q in zip(picks_of(box), questions()):
        p.value = q.options[0]
    assert 'You know all of this' in box.children[-1].value
    picks_of(box)[2].value = 'not sure'
    assert CHAPTERS[2].title in box.children[-1].value and progress()['quiz'] == {}

def test_the_widgets_of_a_chapter_grade_and_remember():
    asked = questions('low_rank')
    box = ftlab.quiz('low_rank').widgets()
    picks = picks_of(box)
    picks[0].value, picks[1].value = asked[0].options[0], asked[1].options[1]
    assert box.children[-1].value == '1 to go.' and list(progress()['quiz']) == [asked[0].name]
    assert asked[1].options[0] in box.children[5].value and '<b>Right.' in box.children[2].value
    picks[2].value = 'not sure'
    assert '1 of 3' in box.children[-1].value
    picks[1].value = asked[1].options[0]
    assert '2 of 3' in box.children[-1].value and 'Right' in box.children[5].value

# --- what the pages say

def texts(page):
    return [c['source'] for c in cells(page) if c['cell_type'] == 'markdown']

CHAPTER_PAGES = [f'course/{c.name}.ipynb' for c in CHAPTERS]

@pytest.mark.parametrize('chapter', CHAPTERS, ids=lambda c: c.name)
def test_a_chapter_ends_in_its_quiz_and_says_where_to_go(chapter):
    found = cells(f'course/{chapter.name}.ipynb')
    asked = [i for i, c in enumerate(found) if c['source'] == f"ftlab.quiz('{chapter.name}')"]
    assert asked == [len(found) - 2], 'the quiz stands before the last cell'
    shown = ''.join(found[asked[0]]['outputs'][0]['data']['text/markdown'])
    assert shown == ftlab.quiz(chapter.name)._repr_markdown_(), 'the stored quiz is stale'
    last, after = found[-1]['source'], CHAPTERS[CHAPTERS.index(chapter) + 1:]
    assert last.startswith('## What comes next')
    if after:
        assert f'**Next: [{after[0].title}]({after[0].name}.ipynb)** ' in last
    else:
        assert '**Next: your own model and data.**' in last
        for page in ('../index.ipynb', '../instruments/compare.ipynb', '../instruments/doctor.ipynb',
                     '../instruments/report.ipynb', '../cli.ipynb'):
            assert f']({page})' in last, page
    assert '../glossary.ipynb' in found[0]['source']

def test_a_link_with_the_name_of_a_chapter_leads_to_it():
    known, wrong = {c.title.lower(): f'{c.name}.ipynb' for c in CHAPTERS}, []
    for page in pages():
        for text, target in re.findall(r'\[([^\]]+)\]\(([^)\s]+)\)', '\n'.join(texts(page))):
            name = known.get(text.strip('*').lower())
            if name and Path(target.partition('#')[0]).name != name:
                wrong.append((page, text, target))
    assert not wrong

def test_the_minutes_of_a_chapter_stand_in_one_place():
    """What other pages say beside a link to a chapter is what `CHAPTERS` says; a chapter itself
    says none"""
    for page in CHAPTER_PAGES:
        assert not re.search(r'minutes', texts(page)[0]), page
    for page in ('index.ipynb', 'contents.ipynb', 'course/start.ipynb', 'course/primer.ipynb', 'map.ipynb'):
        for line in '\n'.join(texts(page)).splitlines():
            at = '(' if page.startswith('course/') else '(course/'
            told = line.split('|')[1 if line.startswith('|') else 0]
            linked = [c for c in CHAPTERS if f'{at}{c.name}.ipynb)' in told]
            said = re.findall(r'\b(\d+) minutes\b|\| (\d+) \|', line)
            assert (not linked or not said
                    or {int(a or b) for a, b in said} == {linked[0].minutes}), (page, line)
    table = next(t for t in texts('contents.ipynb') if 'contents, The course' in t)
    for c in CHAPTERS:
        assert re.search(rf'\(course/{c.name}.ipynb\) \| .* \| {c.minutes} \| ', table), c.name
    said = {m for page in ('index.ipynb', 'course/start.ipynb', 'contents.ipynb')
            for m in re.findall(r'quiz of (\w+) questions', '\n'.join(texts(page)))}
    assert said == {str(len(CHAPTERS))}, 'one question of each chapter'

def test_stored_pages_show_nobodys_progress():
    for page in ('course/start.ipynb', 'map.ipynb', *CHAPTER_PAGES):
        for c in cells(page):
            for o in c.get('outputs', []):
                shown = ''.join(o.get('data', {}).get('text/markdown', []))
                assert 'Continue with' not in shown and 'solved' not in shown.replace('exercises solved', ''), page
                rows = re.findall(r'^\| (.?) +\| \d\. .*\| (\d+) of \d+ \| (\d+) of \d+ \|$',
                                  shown, re.M)
                assert all(row == ('', '0', '0') for row in rows), (page, rows)
    first = next(c['outputs'][0] for c in cells('course/start.ipynb') if c.get('outputs'))
    assert '**Begin with [First light](first_light.ipynb)**' in ''.join(first['data']['text/markdown'])

@pytest.mark.parametrize('page', [*CHAPTER_PAGES, 'course/primer.ipynb'])
def test_code_of_a_chapter_fits_the_page(page):
    long = [line for c in cells(page) if c['cell_type'] == 'code'
            for line in c['source'].splitlines()
            if len(line) > 88 and not line.startswith('#|')]
    assert not long

# --- hosted machines, and JupyterLab itself

def test_hosted_links_need_an_address():
    links = hosted('course/first_light.ipynb', 'https://github.com/me/mine.git')
    assert (links['colab'] == 'https://colab.research.google.com/github/me/mine/blob/main/nbs/course/first_light.ipynb'
            and links['binder'].startswith('https://mybinder.org/v2/gh/me/mine/main?'))
    if 'git_url' not in (ROOT/'settings.ini').read_text():
        assert hosted('course/first_light.ipynb') == {}
    with pytest.raises(ValueError, match='OWNER/NAME'):
        hosted('x', 'https://gitlab.com/me/mine')

def test_binder_installs_what_settings_asks_for():
    post, start_ = (ROOT/'binder'/'postBuild').read_text(), (ROOT/'binder'/'start').read_text()
    assert 'pip install' in post and 'lab_settings' in post and 'FTLAB_START' in start_ and 'exec "$@"' in start_
    assert re.search(r'python-3\.1[1-9]', (ROOT/'binder'/'runtime.txt').read_text())
    for name in ('postBuild', 'start'):
        assert os.access(ROOT/'binder'/name, os.X_OK), f'binder/{name} must be executable'
        subprocess.run(['bash', '-n', ROOT/'binder'/name], check=True)

def lab(monkeypatch, *args, **env):
    "What `ftlab lab` would start: (exit code, arguments, environment, settings, what it said)"
    got = {}
    class Started:
        def __init__(self, command, env):
            folder = Path(env['JUPYTER_CONFIG_PATH'].split(os.pathsep)[0])
            got.update(command=command, env=env,
                       settings=json.loads(next(folder.rglob('*.json')).read_text()))

        def wait(self):
            return 0

        def poll(self):
            return 0
    monkeypatch.setattr(jupyter.subprocess, 'Popen', Started)
    monkeypatch.setattr('ftlab.map.write_start_page', lambda path=None: path)
    for k in ('DISPLAY', 'WAYLAND_DISPLAY'):
        monkeypatch.delenv(k, raising=False)
    for k, v in env.items():
        monkeypatch.setenv(k, v)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main(['lab', *args])
    return (code, got.get('command', []), got.get('env', {}), got.get('settings', {}),
            said.getvalue())

def test_the_lab_opens_on_the_start_page(monkeypatch):
    code, command, env, settings, said = lab(monkeypatch)
    assert (code == 0 and '--LabApp.default_url=/lab/tree/start.md' in command
            and f'--ServerApp.root_dir={ROOT}' in command
            and env['FTLAB_START'] == str(ROOT/'start.md'))
    assert settings['@jupyterlab/docmanager-extension:plugin']['defaultViewers'] == {'markdown': 'Markdown Preview'}
    assert ('--no-browser' in command) == sys.platform.startswith('linux')
    assert ('--no-browser' not in lab(monkeypatch, DISPLAY=':0')[1]
            and '--no-browser' in lab(monkeypatch, '--no-browser', DISPLAY=':0')[1])
    assert '--LabApp.default_url=/lab/tree/nbs/course/what_it_cost.ipynb' in lab(
        monkeypatch, 'nbs/course/what_it_cost.ipynb')[1]
    code, command, *_, said = lab(monkeypatch, 'nbs/nope.ipynb')
    assert code == 1 and not command and "no page 'nbs/nope.ipynb'" in said

def test_a_taken_port_gives_way_and_that_is_said(monkeypatch):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, command, *_, said = lab(monkeypatch, '--port', str(port))
        used = int(re.search(rf'port {port} is taken; using (\d+)', said)[1])
        assert used > port and f'--port={used}' in command
        with pytest.raises(OSError, match='name another'):
            jupyter.free_port(port, tries=1)
    with pytest.raises(OSError, match='port is 70000; a port is from 1 to 65535'):
        jupyter.free_port(70000)
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 65535))
        taken.listen()
        with pytest.raises(OSError, match='no port from 65535 to 65535 is free'):
            jupyter.free_port(65535)

def test_a_lab_without_the_course_says_what_to_do(monkeypatch):
    monkeypatch.setattr('ftlab.map.checkout', lambda: None)
    code, command, *_, said = lab(monkeypatch)
    assert code == 1 and not command and 'clone the repository' in said
