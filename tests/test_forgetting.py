"Flips, their correction and their intervals; old sets of every kind; the harvest of a model's own abilities"
import random, sys, types
from statistics import fmean
import numpy as np
import pytest, torch
import ftlab
from ftlab.core.data import data
from ftlab.core.model import row_limit
from ftlab.core.scorers import WORLD, exact_match, label_accuracy, nll, skills
from ftlab.core.tokens import encode_all
from ftlab.evaluators.forgetting import flips, mean_flips, right, wilson
from ftlab.evaluators.harvest import first_line, harvest, prompts, prompts_for
from ftlab.evaluators.old_sets import OldSet, asks_base, evenly, halves, old_set, old_sets
from toys import TOK, classifier, lab_data, label_data, same, toy, weights

PLAIN = [dict(prompt=r['prompt'], response=r['response']) for r in lab_data().train[:40]]
CHOICES = [dict(r, choices=['a', r['response'], 'b c']) for r in PLAIN
           if r['response'] not in ('a', 'b c')]
CHAT = dict(messages=[dict(role='user', content='a'), dict(role='assistant', content='b')])

# ---------- flips

def test_exact_counts():
    f = flips([1, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 1])
    assert (f['n'], f['correction']) == (6, 'none')
    assert (f['lost']['count'], f['won']['count']) == (2, 1)
    assert f['lost']['share'] == f['lost']['adjusted'] == pytest.approx(1/3)
    assert (f['lost']['low'], f['lost']['high']) == wilson(2, 6)
    assert (f['lost']['adjusted_low'], f['lost']['adjusted_high']) == wilson(2, 6) and f['lost']['expected'] == 0
    # partial credit: right from one half on
    assert right([.49, .5, True, 0, 1]) == [0, 1, 1, 0, 1]
    assert flips([.6, .4], [.4, .6])['lost']['count'] == 1

@pytest.mark.peer('wilson', 'scipy', 'ends of the interval', tolerance=1e-4)
def test_wilson_is_the_known_interval(tolerance):
    from scipy.stats import binomtest
    for c, n in ((0, 10), (3, 10), (50, 100), (100, 100), (1, 1)):
        theirs = binomtest(c, n).proportion_ci(.95, 'wilson')
        assert wilson(c, n) == pytest.approx((theirs.low, theirs.high), abs=tolerance)

def test_the_correction_is_the_papers():
    """F - (1 - a0)(1 - a1)/(k - 1), by hand; with a number of options per question, the same among
    the questions with 2 options and among those with 5"""
    b, a = [1, 1, 1, 0, 0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 0, 0, 0, 0, 1, 0]
    f = flips(b, a, k=4)
    assert f['correction'] == 'chance'
    assert (f['lost']['adjusted'] == pytest.approx(.2 - .5*.6/3)
            and f['won']['adjusted'] == pytest.approx(.1 - .5*.6/3))
    assert [f[side]['expected'] for side in ('lost', 'won')] == pytest.approx([.1, .1])
    assert f['lost']['adjusted_low'] < f['lost']['adjusted'] < f['lost']['adjusted_high']
    mixed = flips(b, a, k=[2]*5 + [5]*5)['lost']
    assert mixed['expected'] == pytest.approx((.4*.4/1 + .6*.8/4)/2)
    assert flips(b, a, k=np.array([2]*5 + [5]*5))['lost'] == mixed
    assert flips(b, a, k=np.int64(4)) == f

@pytest.mark.parametrize('k', [2, 4, 10])
def test_pure_guessers_lose_nothing(k):
    "Adjusted flips average 0, and the interval contains 0 as often as it promises"
    rng = random.Random(k)
    guess = lambda: [int(rng.random() < 1/k) for _ in range(150)]
    found = [flips(guess(), guess(), k=k) for _ in range(600)]
    for side in ('lost', 'won'):
        assert abs(fmean(f[side]['adjusted'] for f in found)) < .004
        assert .92 < fmean(f[side]['adjusted_low'] <= 0 <= f[side]['adjusted_high'] for f in found)
        assert fmean(f[side]['share'] for f in found) == pytest.approx((k - 1)/k**2, abs=.01)

@pytest.mark.parametrize('ks', [[2]*50 + [10]*50, [2, 3, 4, 5, 6]*12, [*range(2, 12)]*5])
def test_guessers_lose_nothing_where_questions_have_different_numbers_of_options(ks):
    """A question with 10 options is guessed less often than one with 2: with the mean over both,
    the correction would be too large"""
    rng = random.Random(0)
    guess = lambda: [int(rng.random() < 1/k) for k in ks]
    found = [flips(guess(), guess(), k=ks)['lost'] for _ in range(600)]
    assert abs(fmean(f['adjusted'] for f in found)) < .006
    assert .92 < fmean(f['adjusted_low'] <= 0 <= f['adjusted_high'] for f in found)

@pytest.mark.parametrize('k', [2, 4])
def test_the_known_error_where_knowledge_is_kept_and_guesses_are_new(k):
    """Nothing is lost, but lucky guesses are not repeated: too little is subtracted, as the page
    says"""
    rng = random.Random(k)
    answer = lambda: [int(i < 120 or rng.random() < 1/k) for i in range(200)]
    a = .6 + .4/k
    found = [flips(answer(), answer(), k=k)['lost']['adjusted'] for _ in range(600)]
    assert fmean(found) == pytest.approx((1 - a)/(k - 1)*(a - 1/k), abs=.004)

def test_a_model_clearly_below_chance_has_no_more_lucky_guesses_than_right_answers():
    """With the paper's formula, a model that never was right would have lost -100% of its answers,
    and hide what another set lost"""
    f = flips([0]*30, [0]*30, k=2)
    assert f['lost']['adjusted'] == f['won']['adjusted'] == f['lost']['expected'] == 0
    f = flips([0]*30, [0]*10 + [1]*20, k=2)
    assert f['lost']['adjusted'] == 0 and f['won']['adjusted'] == pytest.approx(2/3 - 1/3)
    f = flips([1]*4 + [0]*96, [0]*100, k=4)
    assert f['lost']['expected'] == pytest.approx(.04) and f['lost']['adjusted'] == pytest.approx(0)
    # not clearly below: the formula of the paper
    assert flips([1]*12 + [0]*18, [0]*15 + [1]*15, k=2)['lost']['expected'] == pytest.approx(.6*.5)

def test_what_was_known_and_is_wrong_now_is_found_among_guesses():
    """Half is known before, independently a third after, the rest is guessed:
    what remains is what was known before and is wrong after"""
    rng = random.Random(0)
    k, n, seen = 4, 400, []
    for _ in range(600):
        knows = [rng.random() < .5 for _ in range(n)]
        still = [rng.random() < 1/3 for _ in range(n)]
        answer = lambda known: [int(x or rng.random() < 1/k) for x in known]
        b, a = answer(knows), answer(still)
        seen.append((flips(b, a, k=k)['lost'], fmean(x and not y for x, y in zip(knows, a))))
    assert fmean(f['adjusted'] for f, _ in seen) == pytest.approx(
        fmean(t for _, t in seen), abs=.005)
    assert .925 < fmean(f['adjusted_low'] <= .25 <= f['adjusted_high'] for f, _ in seen)

def test_a_second_sampling_of_the_base_is_subtracted():
    b, a, s = [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]
    f = flips(b, a, again=s)
    assert f['correction'] == 'resampled'
    assert (f['lost']['expected'] == pytest.approx(1/6)
            and f['lost']['adjusted'] == pytest.approx(1/6))
    assert (f['won']['expected'] == pytest.approx(2/6)
            and f['won']['adjusted'] == pytest.approx(-1/6))
    rng = random.Random(0)
    toss = lambda: [int(rng.random() < .6) for _ in range(100)]
    found = [flips(toss(), toss(), again=toss())['lost'] for _ in range(500)]
    assert abs(fmean(f['adjusted'] for f in found)) < .006
    assert .92 < fmean(f['adjusted_low'] <= 0 <= f['adjusted_high'] for f in found)

def test_swapping_before_and_after_swaps_lost_and_won():
    rng = random.Random(1)
    for _ in range(200):
        n = rng.randint(1, 30)
        b, a = ([rng.choice([0, 1, .5, rng.random()]) for _ in range(n)] for _ in range(2))
        k = rng.choice([None, 2, 5, [rng.randint(2, 6) for _ in range(n)]])
        f, g = flips(b, a, k=k), flips(a, b, k=k)
        assert f['lost'] == pytest.approx(g['won'], nan_ok=True) and f['won'] == pytest.approx(g['lost'])
        assert f['lost']['count'] + f['won']['count'] == sum(x != y
                                                             for x, y in zip(right(b), right(a)))
        assert f['won']['share'] - f['lost']['share'] == pytest.approx(
            fmean(right(a)) - fmean(right(b)))

@pytest.mark.parametrize('wrong, words', [
    (dict(before=[1]), 'before has 1 scores and after has 2'),
    (dict(before=[], after=[]), 'before has no scores'),
    (dict(before=[1, float('nan')]), r'before\[1\] is nan'),
    (dict(after=[1, -2.5]), r'after\[1\] is -2.5.*Losses are no scores'),
    (dict(before=[1, None]), r'before\[1\] is None'), (dict(before=['1', 1]), r'before\[0\] is 1; a score'),
    (dict(k=1), 'k is 1; a question needs at least 2'),
    (dict(k=2.5), 'k is 2.5; a question needs'),
    (dict(k=[2]), 'k has 1 numbers for 2'),
    (dict(k=[2, 'x']), "k is 'x'"),
    (dict(again=[1]), 'again has 1 scores'), (dict(again=[1, 2]), r'again\[1\] is 2'),
    (dict(k=4, again=[1, 1]), 'k and again are two corrections')])
def test_wrong_scores_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        flips(**dict(dict(before=[1, 0], after=[1, 1]), **wrong))

def test_the_mean_over_sets_has_an_interval_that_holds():
    rng = random.Random(0)
    shares = (.02, .1, .4)
    inside = []
    for _ in range(400):
        found = [flips([1]*60, [int(rng.random() >= p) for _ in range(60)]) for p in shares]
        m = mean_flips(found)
        assert m['lost']['share'] == pytest.approx(fmean(f['lost']['share'] for f in found))
        inside.append(m['lost']['low'] <= fmean(shares) <= m['lost']['high'])
    assert .92 < fmean(inside) < .99
    assert m['sets'] == 3 and m['correction'] == 'none'
    assert mean_flips([flips([1, 0], [1, 0]), flips([1, 0], [0, 1], k=3)])['correction'] == 'mixed'
    assert mean_flips([flips([0], [0], k=2)])['lost']['adjusted_low'] is None
    with pytest.raises(ValueError, match='no set'):
        mean_flips([])

# ---------- old sets

def test_each_metric_is_that_of_the_scorers():
    m = toy()
    written = old_set(PLAIN, metric='exact')
    assert fmean(written.scores(m, TOK)) == exact_match(m, TOK, written.rows)
    loss = old_set(PLAIN[:1])
    assert loss.metric == 'nll' and loss.k is None
    assert loss.scores(m, TOK)[0] == pytest.approx(-nll(m, TOK, loss.rows), abs=1e-5)
    d = label_data()
    net = classifier()
    labelled = old_set(d)
    assert fmean(labelled.scores(net, TOK)) == pytest.approx(
        label_accuracy(net, TOK, labelled.rows, d.labels))
    assert labelled.k == 3

def test_an_option_is_chosen_by_its_likelihood():
    m, q = toy(), old_set(CHOICES)
    assert q.metric == 'choice' and q.k == [3]*len(CHOICES)
    said = q.answers(m, TOK)
    for row, (answer, score) in list(zip(q.rows, said))[:5]:
        of = lambda c: nll(m, TOK, [dict(prompt=row['prompt'], response=c)])*(len(c.split()) + 1)
        assert answer == min(row['choices'], key=of) and score == (answer == row['response'])

def test_a_long_row_loses_the_beginning_of_its_question_and_shifts_no_answer():
    """Without the first row the answers to the others are the same; a long row has the score of its
    own end"""
    m = toy()
    long = dict(CHOICES[0], prompt='sort ' + 'a '*3000)
    alone, both = (old_set(rows).answers(m, TOK) for rows in (CHOICES[1:], [long] + CHOICES[1:]))
    assert both[1:] == alone and both[0][0] in long['choices']
    text = [dict(prompt=long['prompt'], response=long['response'])]
    losses = old_set(text + PLAIN[:3]).scores(m, TOK)
    assert losses[1:] == pytest.approx(old_set(PLAIN[:3]).scores(m, TOK), abs=1e-5)
    end = encode_all(text, TOK, 'text', row_limit(m, TOK), keep='end')[0]
    assert len(losses) == 4 and sum(y != -100 for y in end['labels']) > 1
    assert len(old_set(PLAIN[:3]).scores(m, TOK, max_length=4)) == 3

def test_a_broken_model_chooses_nothing():
    m = toy()
    with torch.no_grad():
        m.lm_head.weight.fill_(float('nan'))
    right_first = [dict(r, choices=[r['response'], 'zz']) for r in PLAIN[:5]]
    assert old_set(right_first).answers(m, TOK) == [('', 0.)]*5

def test_none_is_the_labs_old_skills():
    model, tok = ftlab.load('lab-s')
    d = ftlab.data('changed-rule')
    sets = old_sets(None, d, model, tok, n=4)
    assert 'sort' not in [s.name for s in sets] and len(sets) == 21
    some = {s.name: fmean(s.scores(model, tok)) for s in sets[:3]}
    assert some == pytest.approx(skills(model, 4, names=list(some), tok=tok))
    choose, judge = (old_sets(None, d, model, tok, n=20, split=s) for s in ('validation', 'test'))
    for a, b in zip(choose, judge):
        assert not {r['prompt'] for r in a.rows} & {r['prompt'] for r in b.rows}
    assert old_sets(None, label_data(), classifier(), TOK) == []

def test_halves_depend_on_the_row_alone():
    a, b = halves(PLAIN)
    assert len(a) + len(b) == len(PLAIN) and abs(len(a) - len(b)) < 20
    shuffled = random.Random(0).sample(PLAIN, len(PLAIN)) + PLAIN[:5]
    c, d = halves(shuffled)
    key = lambda rows: {r['prompt'] for r in rows}
    assert key(c) == key(a) and key(d) == key(b) and not key(a) & key(b)
    q = old_set(PLAIN, 'mine')
    assert (q.half('validation').rows == halves(q.rows)[0]
            and q.half('test').rows == halves(q.rows)[1])
    assert q.fingerprint != q.half('test').fingerprint
    with pytest.raises(ValueError, match='mine has 1 rows, too few for two halves'):
        halves(PLAIN[:1], 'mine')
    assert evenly(list(range(10)), 3) == [0, 3, 6] and evenly([1], 3) == [1]

def test_names_and_single_sets(tmp_path):
    m, d = toy(), lab_data()
    (tmp_path/'p.txt').write_text('sort c a\n\nsort b a\nsort b a\n')
    two = old_sets(dict(mine=PLAIN, skill='sort', set=OldSet('x', PLAIN, 'text', 'exact')), d, m,
                   TOK, n=5)
    assert [(s.name, s.metric, len(s.rows)) for s in two] == [
        ('mine', 'nll', 5), ('skill', 'exact', 5), ('set', 'exact', 5)]
    # one set with its splits, as ftlab.data reads it
    assert len(old_sets(dict(train=PLAIN[:6], test=PLAIN[6:9]), d, m, TOK)[0].rows) == 9
    assert [s.name for s in old_sets(data(PLAIN), d, m, TOK)] == ['rows']
    assert prompts_for(d, TOK, tmp_path/'p.txt') == ['sort c a', 'sort b a']
    assert asks_base('auto') and asks_base(dict(a='auto:x.txt', b=PLAIN))
    assert not asks_base(dict(a=PLAIN)) and not asks_base(None)

@pytest.mark.parametrize('old, error, words', [
    ('sortt', ValueError, "did you mean 'sort'"),
    ({}, ValueError, 'names .none.'),
    ('none.jsonl', FileNotFoundError, 'no file none.jsonl'),
    (dict(train=PLAIN, mine=PLAIN), ValueError, 'names of splits'), ({1: PLAIN}, ValueError, 'a name of its own'),
    ([], ValueError, 'old data: train has no rows'),
    (dict(mine=[]), ValueError, "the old set 'mine': train has no rows"),
    (dict(mine=None), ValueError, "nothing under the name 'mine'"),
    (['sort', 'auto'], ValueError, 'a list of sets; give each a name'),
    ('Auto', ValueError, "did you mean 'auto'"), ('lm-eval:arc_easy', ValueError, "did you mean 'lm_eval'"),
    ([dict(CHAT, choices=['b', 'c'])],
     ValueError, 'has choices, but its rows are chats'),
    ('auto:none.txt', FileNotFoundError, 'no file none.txt of prompts'),
    ('lm_eval:', ValueError, 'names no task'),
    ([dict(PLAIN[0], choices=['a']), PLAIN[1]], ValueError, 'rows of rows have choices'),
    ([dict(PLAIN[0], choices=['a'])], ValueError, 'at least 2 different texts'),
    ([dict(PLAIN[0], choices=['a', 'zz'])], ValueError, 'one of them the response'),
    ([dict(text='x', label='a'), dict(text='y', label='b')], ValueError, 'other labels')])
def test_wrong_old_sets_are_refused(old, error, words):
    with pytest.raises(error, match=words):
        old_sets(old, lab_data(), toy(), TOK)

def test_more_that_is_refused(tmp_path):
    with pytest.raises(ValueError, match='classifier, which predicts labels'):
        old_sets(PLAIN, label_data(), classifier(), TOK)
    with pytest.raises(ValueError, match='a classifier has none before'):
        old_sets('auto', label_data(), classifier(), TOK)
    for n in (0, -1, 2.5, None):
        with pytest.raises(ValueError, match=f'old_items is {n}; it must be a whole number'):
            old_sets(PLAIN, lab_data(), toy(), TOK, n=n)
    with pytest.raises(ValueError, match='old_items is 0'):
        old_set(PLAIN).first(0)
    for wrong, words in ((dict(rows=[]), "'x' has no rows"), (dict(metric='weird'), "metric is 'weird'"),
                         (dict(metric='choice'), 'x: the choices None'), (dict(metric='accuracy'), 'no labels')):
        with pytest.raises(ValueError, match=words):
            OldSet(**dict(dict(name='x', rows=PLAIN[:2], kind='text', metric='exact'), **wrong))
    for asked in ([], 'what is two plus two'):
        with pytest.raises(ValueError, match='a list with at least one prompt'):
            harvest(toy(), TOK, asked)
    with pytest.raises(ValueError, match="metric 'accuracy' does not fit mine"):
        old_set(PLAIN, 'mine', 'accuracy')
    with pytest.raises(ValueError, match="split is 'half'"):
        old_sets(None, lab_data(), toy(), TOK, split='half')
    (tmp_path/'a.csv').write_text('question\nwhy\n')
    for name, words in (('a.csv', 'has no prompt'), ('b.md', 'ends in .txt')):
        (tmp_path/name).touch()
        with pytest.raises(ValueError, match=words):
            prompts_for(lab_data(), TOK, tmp_path/name)
    (tmp_path/'c.txt').write_text('\n\n')
    with pytest.raises(ValueError, match='has no prompt'):
        prompts_for(lab_data(), TOK, tmp_path/'c.txt')

# ---------- lm-eval

def test_lm_eval_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    monkeypatch.delitem(sys.modules, 'lm_eval.tasks', raising=False)
    with pytest.raises(ModuleNotFoundError, match='pip install lm_eval'):
        old_sets('lm_eval:arc_easy', lab_data(), toy(), TOK)

class Task:
    def __init__(self, n, kind='multiple_choice'):
        self.OUTPUT_TYPE, self.eval_docs = kind, [dict(question=f'{n} plus {i}', right=i % 4)
                                                  for i in range(30)]

    def doc_to_choice(self, doc):
        return list('abcd')

@pytest.fixture
def lm_eval(monkeypatch):
    """A stand-in with the calls of lm_eval 0.4.13 that we use; a question is right if its number is
    even"""
    tasks = dict(easy=Task(1), hard=Task(2), free=Task(3, 'generate_until'))
    groups = dict(both=['easy', 'hard'])

    class TaskManager:
        def load(self, names):
            if names[0] not in tasks and names[0] not in groups:
                raise ValueError(f'Spec {names[0]!r} is not a registered task')
            return dict(tasks={t: tasks[t] for t in groups.get(names[0], names)})

    def simple_evaluate(model, tasks, samples, log_samples, bootstrap_iters):
        random.seed(1234)
        torch.manual_seed(1234)
        task, ids = tasks[0], samples[tasks[0]]
        assert log_samples and ids == sorted(ids) and not model.model.training
        out = [dict(doc_id=i, metrics=['acc_norm', 'acc'] if task != 'free' else ['exact_match'],
                    acc=float(i % 2 == 0),
                    acc_norm=9., exact_match=float(i % 2 == 0), filter=f, arguments=[('q', ' a'), ('q', ' b')],
                    filtered_resps=[(-2., False), (-1., False)] if task != 'free' else [' said '])
               for f in ('first', 'second') for i in reversed(ids)]
        return dict(samples={task: out})

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size, max_length):
            self.model = pretrained

    for name, parts in dict(tasks=dict(TaskManager=TaskManager),
                            evaluator=dict(simple_evaluate=simple_evaluate),
                            models={}).items():
        monkeypatch.setitem(sys.modules, f'lm_eval.{name}', types.SimpleNamespace(**parts))
    monkeypatch.setitem(sys.modules, 'lm_eval', types.ModuleType('lm_eval'))
    monkeypatch.setitem(sys.modules, 'lm_eval.models.huggingface', types.SimpleNamespace(HFLM=HFLM))

def test_a_task_of_lm_eval_is_a_set(lm_eval):
    m = toy()
    s, = old_sets('lm_eval:easy', lab_data(), m, TOK, n=12)
    m.train()
    state, python = torch.get_rng_state(), random.getstate()
    assert s.name == 'easy' and s.k == [4]*12
    assert s.scores(m, TOK) == [float(r['doc_id'] % 2 == 0) for r in s.rows]
    assert m.training and torch.equal(state, torch.get_rng_state()) and python == random.getstate()
    assert {a for a, _ in s.answers(m, TOK)} == {'b'} # the likelier option
    halved = [old_sets('lm_eval:easy', lab_data(), m, TOK, n=99, split=h)[0].rows for h in ('validation', 'test')]
    assert sorted(r['doc_id'] for h in halved for r in h) == list(range(30))
    assert [x.name for x in old_sets(dict(arc='lm_eval:both', one='lm_eval:free'), lab_data(), m,
                                     TOK)] == [
        'arc: easy', 'arc: hard', 'one']
    free, = old_sets('lm_eval:free', lab_data(), m, TOK, n=4)
    assert free.k is None and free.answers(m, TOK)[0] == ('said', 1.)
    with pytest.raises(ValueError, match="lm_eval cannot load the task 'nosuch'"):
        old_sets('lm_eval:nosuch', lab_data(), m, TOK)
    # a group under a name, beside a set that has the name of one of its tasks
    with pytest.raises(ValueError, match="two old sets are called 'a: easy'"):
        old_sets({'a': 'lm_eval:both', 'a: easy': PLAIN}, lab_data(), m, TOK)

def test_a_report_takes_a_task(lm_eval):
    from ftlab.core.recipe import Recipe
    from ftlab.instruments.report import report
    run = ftlab.fit(toy(), TOK, lab_data(), Recipe('full'), steps=2, lr=1e-2, batch_size=8,
                    progress=False)
    r = report(run, 'lm_eval:easy', items=5, old_items=6)
    s = r.json()['sets'][1]
    assert (s['metric'], s['n'], s['change']) == ('lm_eval', 6, 0) and s['flips']['correction'] == 'chance'
    assert r.json()['old'] is None and '<svg' in r._repr_html_()

# ---------- the harvest

def test_the_harvest_is_deterministic_and_disturbs_nothing():
    model, tok = ftlab.load('lab-s')
    asked = prompts_for(ftlab.data('new-procedure'), tok)[:120]
    state, was = torch.get_rng_state(), weights(model)
    rows = harvest(model, tok, asked, seed=3)
    assert rows == harvest(model, tok, asked, seed=3) != harvest(model, tok, asked, seed=4)
    assert torch.equal(state, torch.get_rng_state()) and same(weights(model), was)
    assert 0 < len(rows) <= len(asked) and all(r['prompt'] in asked and r['response'] for r in rows)
    auto, = old_sets('auto', ftlab.data('new-procedure'), model, tok)
    assert set(auto.scores(model, tok)) == {1.} and len(auto.rows) > len(rows)

def test_the_harvest_shows_no_truth_and_no_test_question():
    d = ftlab.data('new-language')
    _, tok = ftlab.load('lab-s')
    asked = set(prompts_for(d, tok))
    for s in ('sort', 'fact', 'tavi'):
        assert not asked & {r['prompt'] for r in WORLD.rows(s, 50, 'test')}
    assert len(set(prompts())) == len(prompts()) > 150
    assert first_line(' a  b \nc') == 'a b' and first_line('') == ''

def test_a_model_that_never_says_the_same_twice_is_an_error(monkeypatch):
    import ftlab.evaluators.harvest as module
    said = iter(range(1000))
    monkeypatch.setattr(module, 'generate', lambda m, t, p, **k: [str(next(said)) for _ in p])
    with pytest.raises(ValueError, match='to none of 2 prompts'):
        harvest(toy(), TOK, ['a', 'b'])

def test_a_model_without_a_chat_template_gets_questions(monkeypatch):
    import ftlab.evaluators.harvest as module
    seen = []
    monkeypatch.setattr(module, 'generate', lambda m, t, p, **k: seen.append(p) or ['Paris\nQ: more']*len(p))
    bare = types.SimpleNamespace(chat_template=None)
    assert harvest(toy(), bare, ['the capital?']) == [dict(prompt='Q: the capital?\nA:', response='Paris')]
    assert len(seen) == 3
