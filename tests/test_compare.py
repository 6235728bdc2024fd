"The rules of a comparison on numbers made by hand, and comparisons of tiny models from end to end"
import copy, dataclasses, json, math, re
from functools import partial
from types import SimpleNamespace
from statistics import fmean
import pytest, torch
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)
import ftlab.instruments.bench as B
from ftlab.adapters.lowrank import LoRA
from ftlab.adapters.select import parts, top
from ftlab.adapters.store import identity
from ftlab.core.record import digest
from ftlab.core.scorers import skill_questions
from ftlab.evaluators.forgetting import flips, mean_flips
from ftlab.evaluators.old_sets import old_set
from ftlab.instruments.bench import Bench, evaluation_steps, mean_of, metric_for
from ftlab.instruments.compare import (Comparison, check_limit, compare, effort, hangs_on_rate,
                                       interval, lost_races,
                                       plan, read_at, seed_row, thinned, tuning_seeds, upgraded,
                                       overlooked_within, within_limit)
from ftlab.instruments.compare_page import in_words, reading, table_html, tuning_words, warned
from ftlab.instruments.explore import draw_tradeoff, runs_of
from ftlab.instruments.rates import Tried, Want
from ftlab.instruments.runs import Runs, papers_code, recipe_code, run_key
from ftlab.instruments.views import COLORS, FIXED, MARKS, method_styles
from ftlab.map import measured
from ftlab.core.data import data
from ftlab.core.paper import Method
from ftlab.core.recipe import Learner, Loop, Recipe, Share, Stages, With, viewed
from ftlab.lab import digits
from ftlab.lab.models import lab_tokenizer, old_skills
from ftlab.lab.world import ASPECTS, BAD, GOOD, OLD
from ftlab.methods import get, names
from ftlab.trainers.objective import nll

# ---- the rules

def test_interval_is_students_t():
    x = [.2, .5, .6, .9]
    d = interval(x)
    ref = stats.ttest_1samp(x, 0).confidence_interval(.95)
    assert ((d['low'], d['high']) == pytest.approx((ref.low, ref.high))
            and d['mean'] == pytest.approx(.55))

@pytest.mark.parametrize('values, mean',
                         [([.4], .4), ([.4, .6], .5), ([], None), ([.1, None, .3], None)])
def test_no_interval_without_three_seeds_and_no_mean_with_a_hole(values, mean):
    d = interval(values)
    assert (d['low'] is None and d['high'] is None
            and (d['mean'] is None if mean is None else d['mean'] == pytest.approx(mean)))

def path(*rows):
    return [dict(step=s, gain=g, forgetting=f, items={}) for s, g, f in rows]

def made(gain=.5, forgetting=.2, rows=None, error=None, **more):
    "An outcome by hand"
    rows = path((0, 0., 0.), (10, gain, forgetting)) if rows is None else rows
    return dict(gain=gain, forgetting=forgetting, items={}, path=rows, error=error) | more

def test_equal_gain_is_read_between_evaluations_and_at_the_closest_point_where_it_is_missed():
    o = made(rows=path((0, 0., 0.), (10, .5, .1), (20, .4, .3)))
    assert read_at(o, .25) == dict(step=5, gain=.25, forgetting=.05)
    assert read_at(o, .9) == dict(step=10, gain=.5, forgetting=.1)
    assert read_at(o, None)['forgetting'] is None

def test_a_crash_is_the_worst_score_at_both_points_and_is_counted():
    fine, broken = made(before=.1, after=.6), made(-.1, .9, [], 'NotFinite: nan')
    row = seed_row(broken, broken, .3)
    assert (row['gain'], row['forgetting'], row['forgetting_matched'],
            row['error']) == (-.1, .9, .9, 'NotFinite: nan')
    assert seed_row(fine, broken, .3)['error'] == 'NotFinite: nan', 'a crash at equal gain alone is one, too'
    assert seed_row(fine, fine, .3)['error'] is None

def test_flips_count_questions_both_ways():
    counted = flips([1., 1., 0., 1.], [0., 1., 1., 0.])
    o = made(flips=dict(mean=mean_flips([counted, flips([1.]*4, [1.]*4)]), sets={}))
    row = seed_row(o, o, .1)
    assert (row['lost'], row['won']) == (2/8, 1/8)
    assert seed_row(made(flips=None), o, .1)['lost'] is None

def test_an_outcome_counts_the_answers_that_flipped():
    tok = lab_tokenizer()
    b = Bench((llama(tok), tok), 'changed-rule', **FAST | dict(old_items=6))
    o = b.run(get('full'), 3e-3, 0, 'test')
    for q in b.old_sets(0, 'test'):
        lost = o['items']['forgetting'][q.name]
        f = o['flips']['sets'][q.name]
        assert f['lost']['count'] == sum(v > 0 for v in lost)
        assert f['won']['count'] == sum(v < 0 for v in lost)
    assert set(o['flips']['sets']) == set(o['old'])

def test_what_a_decoder_draws_is_corrected_by_a_second_sampling_and_a_choice_for_guessing():
    """Base and tuned model draw independently: an unchanged coin flips as often as the base by
    itself. A decoder that draws nothing needs no correction."""
    tok = lab_tokenizer()
    rows = [dict(prompt=f'sort {c} {d}', response='a') for c in 'abcdefghij' for d in 'abcdefghij']
    b = Bench((llama(tok), tok), 'changed-rule', **FAST | dict(old_items=100, steps=2),
              old=dict(said=old_set(rows, metric='exact'),
                       chosen=[dict(r, choices=['a', 'b']) for r in rows[:40]]))
    coin = lambda models, tok, prompts, **kw: ['a' if torch.rand(1) < .5 else 'b' for _ in prompts]
    same = lambda models, tok, prompts, **kw: ['a']*len(prompts)
    found = [b.run(Recipe('drawn', decode=coin), 1e-6, seed, 'test')['flips']['sets']
             for seed in (0, 1, 2)]
    assert {f['said']['correction'] for f in found} == {'resampled'}
    assert {f['chosen']['correction'] for f in found} == {'chance'}
    for key in ('share', 'expected'):
        assert fmean(f['said']['lost'][key] for f in found) == pytest.approx(.25, abs=.12)
    flat = b.run(Recipe('same', decode=same), 1e-6, 0, 'test')['flips']['sets']['said']
    assert flat['correction'] == 'none' and flat['lost']['count'] == 0

def test_the_tuning_seeds_are_outside_and_stay_when_seeds_are_added():
    assert tuning_seeds([0, 1, 2]) == tuning_seeds(list(range(50))) == (10_000, 10_001)
    assert tuning_seeds([10_000]) == (10_001, 10_002)

# ---- effort

def arms_of(n, rates=4):
    return {f'm{i}': (None, tuple(range(1, rates + 1))) for i in range(n)}

def test_effort_counts_the_most_runs_there_can_be():
    full = effort(arms_of(3), 5)
    assert (full['tuning'], full['test']) == (3*(4 + 3 + 2 + 3 + 2), 3*5*2)
    assert effort(arms_of(3), 5, points=3)['test'] == 3*5*3
    assert effort(arms_of(2), 3, tuned=False)['tuning'] == 0
    assert effort(arms_of(2, 1), 3)['test'] == 6

def test_extra_rounds_go_first_when_runs_are_few():
    keys = ('refine', 'again', 'settle', 'extend')
    said = [[effort(arms_of(3), 3, n)[k] for k in keys] for n in (54, 45)]
    assert said == [[True, 3, 0, 3], [True, 2, 0, 1]]

@pytest.mark.parametrize('limit', range(6, 60, 3))
def test_max_runs_is_kept_to(limit):
    found = effort(arms_of(2), 3, limit)
    assert found['tuning'] + found['test'] <= limit and found['rates'] >= 1

def test_too_few_runs_are_refused_and_more_are_never_thinner():
    with pytest.raises(ValueError, match='max_runs is 5; 2 methods over 3 seeds take at least 6'):
        effort(arms_of(2), 3, 5)
    sizes = [effort(arms_of(2), 3, n)['tuning'] for n in range(6, 60)]
    assert sizes == sorted(sizes)

def test_thinning_keeps_the_middle():
    assert (thinned((4, 1, 3, 2), 3) == (1, 2, 3) and thinned((1, 2, 3, 4), 2) == (2, 3)
            and thinned((1, 2), 4) == (1, 2))
    assert thinned((1, 2, 3, 4), 1) == (2,)

# ---- the limit

@pytest.mark.parametrize('limit', [-1, float('nan'), 101, 'two', float('inf')])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(ValueError, match='lose_at_most is .*percentage points'):
        check_limit(limit, 'old skills')

def test_a_limit_needs_to_know_what_is_lost():
    with pytest.raises(ValueError, match='give old='):
        check_limit(2, 'drift (KL)')
    with pytest.raises(ValueError, match='score of notes, letters is a likelihood, in nats'):
        check_limit(2, 'old data', ['notes', 'letters'])
    with pytest.raises(ValueError, match='nothing is tuned'):
        check_limit(2, 'old data', searched=False)
    assert check_limit(None, 'drift (KL)', ['notes'], False) is None
    assert check_limit(0, 'old data') == 0 and check_limit(2, 'old data') == .02

def test_a_limit_in_points_is_refused_before_the_first_run_where_there_are_no_points(
    plain, tmp_path, monkeypatch):
    (model, tok), sums = plain
    monkeypatch.setattr(B, 'fit', lambda *a, **k: pytest.fail('something was trained'))
    rows = [dict(prompt=f'{i} plus', response=str(i)) for i in range(40)]
    chosen = [dict(r, choices=[r['response'], '3 4']) for r in rows]
    ask = lambda **more: compare('full', (model, tok), sums, lose_at_most=2, out=tmp_path,
                                 **FAST | more)
    with pytest.raises(ValueError, match='give old='):
        ask()
    with pytest.raises(ValueError, match='score of rows is a likelihood, in nats'):
        ask(old=rows)
    with pytest.raises(ValueError, match='score of told is a likelihood'):  # the mean of both would be no points either
        ask(old=dict(told=rows, chosen=chosen))
    for untuned in (dict(tune=False), dict(lrs=[1e-3]), dict(max_runs=9)):
        with pytest.raises(ValueError, match='nothing is tuned'):
            ask(old=chosen, **untuned)
    assert not list(tmp_path.rglob('*.json'))

def tried_of(**arms):
    "{arm: {rate: outcome or [outcome of each seed]}}"
    seeds = lambda o: dict(enumerate(o if isinstance(o, list) else [o]))
    return Tried({n: None for n in arms},
                 {n: {r: seeds(o) for r, o in of.items()} for n, of in arms.items()})

def test_within_a_limit_the_best_gain_over_rates_steps_and_doses():
    harsh = made(.9, .5, path((0, 0., 0.), (10, .5, .1), (20, .9, .5)),
                 doses=[dict(dose=.5, gain=.7, forgetting=.08),
                        dict(dose=.75, gain=.8, forgetting=.3)])
    gentle = made(.4, .05, path((0, 0., 0.), (10, .2, .01), (20, .4, .05)))
    tried = tried_of(a={1e-4: gentle, 1e-3: harsh})
    def pick(limit):
        w = within_limit(tried, 'a', limit)
        return w and (w['rate'], w['step'], w['dose'], w['gain'])

    assert [pick(x) for x in (.5, .3, .1, .05, .01)] == [
        (1e-3, 20, 1., .9), (1e-3, 20, .75, .8), (1e-3, 20, .5, .7), (1e-4, 20, 1., .4),
        (1e-4, 10, 1., .2)]
    assert pick(0) is None, 'doing nothing does not qualify'
    assert within_limit(tried_of(a={1.: made(error='nan', rows=[])}), 'a', .5) is None

def test_a_rate_on_one_seed_that_gains_more_within_the_limit_is_named_and_not_chosen():
    at = lambda gain, lost, **more: made(gain, lost, path((0, 0., 0.), (10, gain, lost)), **more)
    harsh = [at(.95, .4), at(.95, .4)]
    tried = tried_of(a={1e-4: at(.3, .005), 3e-4: at(.55, .015), 1e-3: [at(.8, .2)]*2, 3e-3: harsh})
    assert within_limit(tried, 'a', .02) is None
    assert overlooked_within(tried, 'a', .02) == 3e-4
    assert overlooked_within(tried, 'a', .2) is None, 'the choice gains more'
    assert overlooked_within(tried, 'a', .001) is None
    half = at(.95, .4, doses=[dict(dose=.5, gain=.7, forgetting=.01)])
    tried = tried_of(a={3e-4: at(.55, .015), 1e-3: [half]*2})
    assert overlooked_within(tried, 'a', .02) is None, 'a dose of the choice gains more'

# ---- races and rates

def paths_with_items(forgetting, n=400):
    lost = lambda share: dict(forgetting=dict(old=[1]*round(share*n) + [0]*(n - round(share*n))))
    return made(.8, forgetting,
                [dict(step=s, gain=g, forgetting=g/.8*forgetting, items=lost(g/.8*forgetting))
                 for s, g in ((0, 0.), (10, .4), (20, .8))])

def test_a_race_is_lost_only_beyond_doubt_at_every_gain():
    good, bad, close = paths_with_items(.1), paths_with_items(.6), paths_with_items(.12)
    assert lost_races(tried_of(a={1.: good}, b={1.: bad}, c={1.: close})) == dict(b='a')
    further = paths_with_items(.6)
    further['path'][-1]['gain'] = .9
    assert not lost_races(tried_of(a={1.: good}, b={1.: further})), 'it reaches a gain that nobody else does'
    assert not lost_races(tried_of(a={1.: good}, b={1.: made(.8, .9)})), 'without items there is no error to go by'
    assert not lost_races(tried_of(a={1.: made(error='nan', rows=[])}, b={1.: bad}))

def test_an_order_that_a_neighbouring_rate_turns_is_marked():
    choices = lambda tried: tried.choices(Want(tuple(tried.grids), 'forgetting_matched', False))
    def marked(**arms):
        tried = tried_of(**arms)
        found = choices(tried)
        return hangs_on_rate(tried, found['arms'], found['target'])

    run = lambda forgetting: made(1., forgetting, path((0, 0., 0.), (10, .95, forgetting)))
    twice = lambda *f: [run(x) for x in f]
    a = {1.: twice(.10, .12), 1.78: twice(.30, .34), 3.16: twice(.5, .5)}
    b = {1.: twice(.20, .24)}
    near = pytest.approx
    share = .95 # of the gain, which is read on the way
    both = marked(a=a, b=b)
    assert (set(both) == {'a'} and (both['a']['rate'], both['a']['other'], both['a']['seeds'])
            == (1.78, 'b', 2))
    assert [both['a'][k] for k in ('own', 'value', 'theirs')] == near(
        [share*x for x in (.11, .32, .22)])
    assert marked(a={1.: a[1.], 3.16: a[3.16]}, b=b) == {}, 'a neighbour is at most 1.8 times away'
    assert marked(a=a, b={1.: [made(error='nan', rows=[])]*2}) == {}
    once = marked(a=a | {1.78: twice(.30)}, b=b)['a'] # on its first seed alone
    assert (once['rate'], once['seeds']) == (1.78, 1)
    assert [once[k] for k in ('own', 'value', 'theirs')] == near([share*x for x in (.10, .30, .20)])
    noise = dict(a={1.: twice(.22, .02), 1.78: twice(.23)}, b=b)
    assert marked(**noise) == {}, 'on that seed the rate turns nothing, the seed does'

def test_the_replaced_skill_is_not_among_the_old_ones():
    assert (old_skills(data('changed-rule', n=10)) == [s for s in OLD if s != 'sort']
            and old_skills(data('new-facts', n=10)) == OLD)

@pytest.mark.parametrize(
    'ask, error, words',
    [(dict(methods=['full', 'lorra']), KeyError, 'did you mean lora'),
     (dict(methods=['full', 'full']), ValueError, "'full' is named twice"),
     (dict(methods=[]), ValueError, 'no method was named'),
     (dict(methods=['full'], lrs=[]), ValueError, 'learning rates of full are'),
     (dict(methods=['full'], lrs=[0.]), ValueError, 'each above 0'),
     (dict(methods=['full'], lrs=dict(hft=[1e-3])), ValueError, 'lrs names hft'),
     (dict(methods=['full'], lrs=[1e-3, 1e-4], tuned=False), ValueError, 'tuning is off')])
def test_plan_refuses(ask, error, words):
    with pytest.raises(error, match=words):
        plan(**ask)

@pytest.mark.parametrize('seeds, words', [(0, 'seeds is 0; give how many'), ([], r'seeds is \[\]'),
                                          ([1, 1], r'seeds is \[1, 1\].*each once'),
                                          ('three', "seeds is 'three'")])
def test_seeds_that_are_none_are_named(seeds, words):
    with pytest.raises(ValueError, match=words):
        compare(['full'], 'lab-s', 'new-format', seeds=seeds)

def test_plan_gives_every_method_its_rates():
    p = (plan('lora(r=4)'), plan(['full', Recipe(Method('mine', lrs=(1., 2.)))]),
         plan(['full'], tuned=False), plan(['full', 'lora'], dict(full=1e-3, lora=[1e-2])))
    assert [{n: r for n, (_, r) in x.items()} for x in p[1:]] == [
        {'full': (1e-4, 3.16e-4, 1e-3, 3.16e-3), 'mine': (1., 3.16, 10., 31.6)},
        {'full': (Recipe().lr,)},
        {'full': (1e-3,), 'lora': (1e-2,)}]
    assert list(p[0]) == ['lora(r=4)']

# ---- whole comparisons, tiny

def llama(tok, seed=0):
    torch.manual_seed(seed)
    tie = dict(tie_word_embeddings=True, pad_token_id=tok.pad_token_id,
               bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=80, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                    **tie)).eval()

@pytest.fixture(scope='module')
def plain():
    "A language model that knows nothing of the lab, and sums as its data"
    t = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(
                              ['<pad>', '<eos>', '<unk>', 'plus', 'is', *map(str, range(40))])},
                         unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=t, pad_token='<pad>', eos_token='<eos>',
                                  unk_token='<unk>')
    return ((llama(tok), tok), data([dict(prompt=f'{i} plus {j} is', response=str(i + j))
                                     for i in range(20) for j in range(20)]))

@pytest.fixture(scope='module')
def reviews():
    "A classifier of two labels over the words of the lab"
    tok = lab_tokenizer()
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                   num_attention_heads=4, max_position_embeddings=64, num_labels=2,
                   pad_token_id=0)).eval()
    return ((model, tok),
            data([dict(text=f'{w} {a}', label=l) for l, words in dict(good=GOOD, bad=BAD).items()
                  for w in words for a in ASPECTS]))

FAST = dict(steps=6, batch_size=8, items=20, validation_items=20, old_items=5, progress=False)

def count_fits(monkeypatch):
    done, fit = [], B.fit

    def counted(*a, **kw):
        run = fit(*a, **kw)
        done.append((kw['lr'], kw['seed']))
        return run

    monkeypatch.setattr(B, 'fit', counted)
    return done

METHOD_KEYS = {'name', 'recipe', 'seeds', 'gain', 'forgetting', 'forgetting_matched',
               'gain_matched', 'lost', 'won',
               'rate', 'rate_matched', 'frontier', 'paths', 'within', 'hangs', 'stopped'}
NEW_KEYS = {'options'}  # an earlier ftlab kept none
RESULT_KEYS = {'version', 'model', 'data', 'protocol', 'methods', 'tuning', 'versions', 'target',
               'common', 'lose_at_most', 'findings', 'inputs',
               'runs'}

def without_counts(result):
    "A result without how many runs were made and how many taken from files"
    return {k: v for k, v in result.items() if k != 'runs'}

def finite(x) -> bool:
    "Is every number in it one, and everything plain JSON?"
    if isinstance(x, dict):
        return all(isinstance(k, str) and finite(v) for k, v in x.items())
    if isinstance(x, list):
        return all(map(finite, x))
    return x is None or isinstance(x, (str, bool, int)) or isinstance(x, float) and math.isfinite(x)

def test_the_json_has_the_promised_shape(plain, tmp_path):
    c = compare(['full', 'lora'], *plain, seeds=3, lrs=[1e-3], tune=False, out=tmp_path, **FAST)
    r = c.json()
    assert set(r) == RESULT_KEYS and r['version'] == 2 and r['tuning'] is None and finite(r)
    assert json.loads((tmp_path/'result.json').read_text()) == r
    for m in r['methods']:
        assert set(m) == METHOD_KEYS | NEW_KEYS and len(m['seeds']) == 3
        assert (all(set(m[k]) == {'mean', 'low', 'high'} for k in ('gain', 'forgetting', 'forgetting_matched'))
                and m['gain']['low'] < m['gain']['mean'] < m['gain']['high'])
        for s in m['seeds']:
            assert {'seed', 'gain', 'forgetting', 'forgetting_matched', 'gain_matched', 'step_matched',
                    'nll', 'drift', 'seconds', 'peak_bytes', 'trainable', 'saved_bytes', 'path',
                    'lost', 'won'} <= set(s)
            assert [x['step'] for x in s['path']] == [0, *evaluation_steps(6)] == [0, 1, 2, 3, 6]
            assert ({'step', 'gain', 'forgetting'} == set(s['path'][0]) and s['saved_bytes'] > 0
                    and s['seconds'] > 0)
    full, lora = r['methods']
    assert full['seeds'][0]['trainable'] == plain[0][0].num_parameters() > lora['seeds'][0]['trainable'] > 0
    assert (r['protocol']['forgetting'] == 'drift (KL)'
            and full['seeds'][0]['forgetting'] == pytest.approx(full['seeds'][0]['drift'])
            and full['seeds'][0]['drift'] > 0 and full['lost']['mean'] is None)
    assert (full['seeds'][0]['gain'] == pytest.approx(full['seeds'][0]['after'] - full['seeds'][0]['before'])
            and full['seeds'][0]['nll'] == pytest.approx(-full['seeds'][0]['after']))
    page = (tmp_path/'index.html').read_text()
    assert ('<script' not in page and 'src="data:image' in page and 'http' not in page
            and (tmp_path/'tradeoff.png').read_bytes()[:4] == b'\x89PNG')
    assert (Comparison.read(tmp_path/'result.json').table.equals(c.table)
            and not list(tmp_path.rglob('*.tmp')) and not list(tmp_path.rglob('*.safetensors')))

@pytest.mark.parametrize('notebook', [False, True])
def test_the_number_of_runs_and_the_time_come_first_and_then_each_run(
    plain, tmp_path, monkeypatch, capsys, notebook):
    shown = []
    def display(html, display_id):
        shown.append(html.data)
        return SimpleNamespace(update=lambda html: shown.append(html.data))
    for module in ('compare', 'progress'):
        monkeypatch.setattr(f'ftlab.instruments.{module}.in_notebook', lambda: notebook)
    monkeypatch.setattr('IPython.display.display', display)
    ask = dict(seeds=2, lrs=[1e-3], tune=False, out=tmp_path, **FAST | dict(steps=2, evaluations=1))
    compare(['full', 'lora'], *plain, **ask | dict(progress=True))
    said = capsys.readouterr()
    lines, other = (said.out, said.err)[::1 if notebook else -1]
    lines = [x for x in lines.splitlines() if not x.startswith('warning: ')]
    assert lines[0].startswith('at most 4 runs, 0 of them to tune; about ') and lines[0].endswith(' minutes')
    runs = [f'run {i} of 4: {m} at 0.001, seed {s}' for i, (s, m) in
            enumerate([(0, 'full'), (0, 'lora'), (1, 'full'), (1, 'lora')], 1)]
    assert [x.split(': gain')[0] for x in lines[1:]] == ([] if notebook else runs) and not other
    assert notebook or all(re.search(r'; \d+ s so far, about \d+ s left$', x) for x in lines[1:])
    assert [runs[i] in html for i, html in enumerate(shown)] == [True]*4*notebook
    compare(['full', 'lora'], *plain, **ask)
    assert capsys.readouterr() == ('', ''), 'progress=False says nothing'

def test_what_the_doctor_finds_in_the_data_comes_first_and_stays_on_the_page(plain, tmp_path, capsys):
    few = data([dict(prompt=f'{i} plus 1 is', response=str(i + 1)) for i in range(30)])
    c = compare(['full', 'lora'], plain[0], few, seeds=1, lrs=[1e-3], tune=False, out=tmp_path,
                **FAST | dict(steps=80, evaluations=1, progress=True))
    found = c.result['findings']
    assert {f['name'] for f in found} >= {'few-test-rows', 'passes-over-data'}
    said = capsys.readouterr().err.splitlines()
    assert all(x.startswith('warning: ') for x in said[1:1 + len(found)])
    assert said[1 + len(found)].startswith('run 1')
    page = ' '.join(warned(c.result))
    assert all(f['fix'] in page and f['fix'] in ' '.join(said) for f in found)

def test_each_run_is_reported_to_a_function(plain, tmp_path):
    """A search: the number of runs is the largest possible one until the tuning has ended; at the end nothing
    is left; runs that were kept say so and count no time"""
    heard, again = [], []
    ask = dict(seeds=1, lrs=[3e-3, 1e-2], out=tmp_path, max_runs=8,
               **FAST | dict(steps=2, evaluations=1))
    one = compare(['full', 'lora'], *plain, **ask | dict(progress=heard.append))
    begins, *heard = heard
    assert begins['run'] == 0 and [x['run'] for x in heard] == [*range(1, len(heard) + 1)]
    assert heard[-1]['of'] == len(heard) and heard[-1]['left'] == 0 and heard[-1]['exact']
    assert {x['exact'] for x in heard if x['kind'] == 'tuning'} == {False}
    assert all(x['left'] > 0 for x in heard[:-1]) and not any(x['kept'] for x in heard)
    assert [x['elapsed'] for x in heard] == sorted(x['elapsed'] for x in heard)
    two = compare(['full', 'lora'], *plain, **ask | dict(progress=again.append))
    again = again[1:]
    assert all(x['kept'] for x in again) and len(again) == len(heard)
    assert two.json()['methods'] == one.json()['methods'], 'nothing in the result depends on what is shown'

SEARCH = dict(seeds=3, lrs=[3e-3, 1e-2], lose_at_most=100)

@pytest.fixture(scope='module')
def tuned(plain, tmp_path_factory):
    "A whole comparison with old data: searched, and within a limit"
    folder = tmp_path_factory.mktemp('tuned')
    old = [dict(prompt=f'{i} plus', response=str(i), choices=[str(i), str((i + 7) % 40)])
           for i in range(40)]
    c = compare(['full', 'lora'], *plain, old=dict(counting=old), out=folder, **SEARCH,
                **FAST | dict(steps=12))
    return c, folder, old

def test_a_search_gives_every_method_as_many_rates_on_seeds_of_its_own(tuned):
    c, folder, _ = tuned
    r = c.json()
    runs = [json.loads(p.read_text()) for p in (folder/'runs').glob('*.json')]
    tuning = [x for x in runs if x['split'] == 'validation']
    per = {n: sorted((x['seed'], x['rate']) for x in tuning if x['method'] == n) for n in ('full', 'lora')}
    assert len({sum(s == 10_000 for s, _ in of) for of in per.values()}) == 1
    again = {sum(s == 10_001 for s, _ in of) for of in per.values()}
    assert len(again) == 1 and again <= {3, 4, 5}
    assert {x['seed'] for x in runs if x['split'] == 'test'} == {0, 1, 2}
    assert r['tuning']['seeds'] == [10_000, 10_001]
    assert r['runs'] == dict(made=len(runs), taken=r['runs']['taken'], cpu_seconds=r['runs']['cpu_seconds'])
    work = effort({n: (None, (1, 2)) for n in per}, 3, points=3)
    assert len(tuning) <= work['tuning'] and len(runs) <= work['tuning'] + work['test']
    for m in r['methods']:
        t = r['tuning']['methods'][m['name']]
        assert set(t) == {'rate', 'tried', 'at_edge', 'rate_matched', 'forgetting_matched',
                          'at_edge_matched', 'overlooked', 'stopped'}
        assert set(t['overlooked']) <= {'within'} or again == {5}
        assert (m['rate'], m['rate_matched']) == (t['rate'], t['rate_matched'])
        assert [x for x, _ in t['tried']] == sorted({rate for _, rate in per[m['name']]})

def test_both_operating_points_come_from_test_seeds_and_the_curve_from_tuning_seeds(tuned):
    c, folder, _ = tuned
    r = c.json()
    runs = {(x['method'], x['rate'], x['seed'], x['split']): x for p in (folder/'runs').glob('*.json')
            for x in [json.loads(p.read_text())]}
    assert r['target'] > 0 and set(r) == RESULT_KEYS and finite(r)
    for m in r['methods']:
        best = [runs[m['name'], m['rate'], s, 'test'] for s in range(3)]
        equal = [runs[m['name'], m['rate_matched'], s, 'test'] for s in range(3)]
        assert m['gain']['mean'] == pytest.approx(fmean(x['gain'] for x in best))
        assert [s['forgetting_matched'] for s in m['seeds']] == [read_at(x, r['target'])['forgetting'] for x in equal]
        assert (set(m) == METHOD_KEYS | NEW_KEYS
                and [k['gain'] for k in m['frontier']] == sorted(k['gain'] for k in m['frontier']))
        top = max(row[1] for p in m['paths'].values() for row in p)
        assert m['frontier'][-1]['gain'] == pytest.approx(top, abs=1e-4) and r['target'] <= top
        assert set(m['paths']) == {f'{x:g}' for x, _ in r['tuning']['methods'][m['name']]['tried']}

def test_what_a_limit_finds_is_measured_on_test_questions_with_its_dose(tuned):
    c, folder, _ = tuned
    for m in c.json()['methods']:
        w = m['within']
        assert (set(w) == {'rate', 'step', 'dose', 'gain', 'forgetting'}
                and w['dose'] in (.25, .5, .75, 1.))
        runs = [x for p in (folder/'runs').glob('*.json') for x in [json.loads(p.read_text())]
                if (x['method'], x['rate'], x['split']) == (m['name'], w['rate'], 'test')]
        assert len(runs) == 3 and [d['dose'] for d in runs[0]['doses']] == [.25, .5, .75]
        point = lambda x: (next(d for d in x['doses'] if d['dose'] == w['dose']) if w['dose'] < 1
                           else next(row for row in x['path'] if row['step'] == w['step']))
        assert w['gain']['mean'] == pytest.approx(fmean(point(x)['gain'] for x in runs))
    assert 'gain within 100 points' in c.table and 'gain within 100 points' in c._repr_html_()

def test_a_finished_comparison_trains_nothing_and_a_damaged_run_is_made_again(
    tuned, plain, monkeypatch, tmp_path):
    c, folder, old = tuned
    done = count_fits(monkeypatch)
    ask = dict(old=dict(counting=old), out=folder, **SEARCH, **FAST | dict(steps=12))
    assert (without_counts(compare(['full', 'lora'], *plain, **ask).json())
            == without_counts(c.json()) and not done)
    broken, foreign = sorted((folder/'runs').glob('*.json'))[:2]
    text = foreign.read_text()
    broken.write_text('{"gain": ')
    foreign.write_text(text.replace('"seed": ', '"seed": 9'))
    with pytest.warns(UserWarning, match='cannot be read and is made again'):
        again = compare(['full', 'lora'], *plain, **ask).json()
    assert len(done) == 2 and again['methods'][0]['gain'] == c.json()['methods'][0]['gain']

def test_a_page_says_which_rate_is_overlooked_and_for_which_question(tuned):
    r = copy.deepcopy(tuned[0].json())
    m, other = r['methods']
    t = r['tuning']['methods'][m['name']]
    other |= dict(within=None)
    words = 'the rate 0.0316 ran on one tuning seed, and by that seed it would be chosen '
    for k, asked in dict(gain='for the largest gain.', forgetting_matched='at equal gain.',
                         within='within 100 points.').items():
        t['overlooked'] = {k: .0316}
        assert words + asked in ' '.join(warned(r))
    r['protocol']['search']['settle'] = 0
    assert 'may tell' not in ' '.join(warned(r)), 'no run is repeated for the limit'
    t['overlooked'] = dict(gain=.0316)
    assert f'{words}for the largest gain; more runs (max_runs) may tell.' in ' '.join(warned(r))
    del t['overlooked'] # an earlier ftlab kept none
    assert words not in ' '.join(warned(r))
    r['tuning']['methods'][other['name']]['overlooked'] = dict(within=.0316)
    assert 'nothing that ran on both tuning seeds gains' in ' '.join(warned(r))

def test_a_page_says_what_speaks_against_it(tuned):
    r = copy.deepcopy(tuned[0].json())
    m, other = r['methods']
    far = dict(mean=r['target'] + .1, low=None, high=None)
    t = r['tuning']['methods'][m['name']]
    m |= dict(gain_matched=far, hangs=dict(rate=t['forgetting_matched'][-1][0], value=.9,
                                           other=other['name']))
    other |= dict(within=None)
    r |= dict(common=False)
    said = ' '.join(warned(r))
    for words in ('less than half of what the strongest', "place depends on its rate", 'instead of',
                  'nothing that was tried'):
        assert words in said
    assert ('‡' in table_html(r) and table_html(r).count('†') == 1
            and all(isinstance(x, str) for x in in_words(r) + tuning_words(r) + reading(r)))
    assert '(validation questions).' in said, 'as an earlier version wrote it'
    m['hangs'] |= dict(own=.25, theirs=.5, seeds=1)
    assert (f"forgets 0.250 at {m['rate_matched']:g} and 0.900 at {m['hangs']['rate']:g}; "
            f"{other['name']} forgets 0.500 (validation questions, one tuning seed)") in ' '.join(
                warned(r))
    m['within'] |= dict(forgetting=dict(mean=1.2, low=None, high=None))
    assert 'forgets 120.0 points on test questions' in ' '.join(warned(r))
    assert 'gained nothing' in ' '.join(warned(r | dict(target=None)))
    for edge in (True, False):
        t['at_edge'] = edge
        words = f'{m["name"]}: the best of its rates lies at the edge'
        assert (words in ' '.join(warned(r))) == edge
    lost = other | dict(seeds=[], stopped='full', rate=None, rate_matched=None, hangs=None,
                        within=None,
                        **{k: interval([]) for k in ('gain', 'forgetting', 'forgetting_matched', 'gain_matched')})
    for curve in (lost['frontier'], []):
        stopped = Comparison(r | dict(methods=[m | dict(hangs=None), lost | dict(frontier=curve)]))
        assert ('stopped early' in stopped._repr_html_()
                and 'clearly forgets less' in ' '.join(warned(stopped.json())))

def test_a_result_of_version_1_still_opens_draws_and_writes_a_page(tmp_path):
    stored = json.loads(measured('compare_lab_s/result.json').read_text())
    stored = {k: v for k, v in stored.items() if k in ('model', 'data', 'protocol', 'methods', 'tuning', 'versions')}
    for m in stored['methods']:
        for k in set(m) - {'name', 'recipe', 'seeds', 'gain', 'forgetting', 'forgetting_matched'}:
            del m[k]
    c = Comparison(copy.deepcopy(stored))
    r = c.json()
    assert r['version'] == 1 and all(METHOD_KEYS <= set(m) for m in r['methods'])
    for m, was in zip(r['methods'], stored['methods']):
        assert m['gain'] == was['gain'] and m['rate'] == was['seeds'][0]['rate']
    assert (c.save(tmp_path) and (tmp_path/'index.html').read_text().count('<svg') + 1
            and c.plot().axes and repr(c))
    said = ' '.join(reading(r))
    assert 'earlier version' in said and 'gained nothing' not in said
    assert Comparison.read(tmp_path/'result.json').json() == r
    with pytest.raises(ValueError, match='version 3.*install a newer'):
        upgraded(dict(version=3))

def better_is_right_and_up(ax) -> bool:
    """Gain grows to the right and forgetting downwards, so what was kept lies up,
    and both labels say which way is better"""
    left, right = ax.get_xlim()
    bottom, top = ax.get_ylim()
    return (left < right and bottom > top and 'gain' in ax.get_xlabel()
            and 'right is better' in ax.get_xlabel() and 'up is better' in ax.get_ylabel())

def test_the_pictures_have_one_orientation_and_a_methods_own_colour():
    c = Comparison.read(measured('compare_lab_s/result.json'))
    names = [m['name'] for m in c.json()['methods']]
    styles = method_styles(names)
    runs = runs_of(c)
    frame, _ = draw_tradeoff(runs, names, (0., 12.), (60., 97.))
    for fig in (c.plot(), frame):
        ax, = fig.axes
        assert better_is_right_and_up(ax)
        assert {t.get_text(): t.get_color() for t in ax.texts if t.get_text() in names} == {
            m: color for m, (color, _) in styles.items()}
    at = {t.get_text(): t.xy for t in frame.axes[0].texts}
    assert at['full'][0] > at['dft'][0] and at['full'][1] < at['dft'][1], 'dft gains less and forgets more'

def test_a_method_has_one_colour_whatever_stands_beside_it():
    known = method_styles(['dft', 'lora', 'hft', 'full'])
    assert known == method_styles(FIXED) and len(set(known.values())) == 4
    alone = {m: method_styles([m])[m] for m in ('lisa', 'mezo', 'a paper of tomorrow')}
    assert all(method_styles([m, 'another'])[m] == style for m, style in alone.items())
    many = method_styles(['full', 'hft', 'lisa', 'lora', 'mezo', 'grpo', 'lift'])
    assert len({color for color, _ in many.values()}) == 7 and all(many[m] == known[m] for m in ('full', 'hft', 'lora'))
    more = method_styles(f'method {i}' for i in range(20))
    assert len(set(more.values())) == 20
    four = ['grpo', 'lift', 'mezo', 'lisa']
    assert method_styles(four) == method_styles(four[::-1])
    assert all(color in COLORS and mark in MARKS for color, mark in more.values())

def test_the_given_model_stays_as_it_is(plain, tmp_path):
    before = identity(plain[0][0])
    compare(['hft', 'lora'], *plain, seeds=1, tune=False, out=tmp_path, **FAST)
    assert (identity(plain[0][0]) == before
            and all(p.requires_grad for p in plain[0][0].parameters()))

def test_finished_runs_are_kept_and_only_what_is_missing_is_run(plain, tmp_path, monkeypatch):
    ask = dict(lrs=dict(full=[1e-4, 1e-3], hft=[1e-4, 1e-3]), out=tmp_path, max_runs=16, **FAST)
    done = count_fits(monkeypatch)
    first = compare(['full', 'hft'], *plain, seeds=1, **ask)
    n = len(done)
    assert n == first.json()['runs']['made'] <= 16 and {s for _, s in done} <= {0, 10_000, 10_001}
    assert without_counts(compare(['full', 'hft'], *plain, seeds=1,
                                  **ask).json()) == without_counts(first.json())
    assert len(done) == n
    second = compare(['full', 'hft'], *plain, seeds=2, **ask | dict(max_runs=18)).json()
    assert ({s for _, s in done[n:]} == {1}
            and second['methods'][0]['seeds'][0] == first.json()['methods'][0]['seeds'][0])
    m = len(done)
    compare(['full', 'hft'], *plain, seeds=1, **ask | dict(steps=5))
    assert len(done) >= m + n - 4 # other settings, other runs
    m = len(done)
    compare(['full', 'hft'], *plain, seeds=1, resume=False, **ask)
    assert len(done) == m + n

def test_an_interruption_keeps_what_was_finished(plain, tmp_path, monkeypatch):
    ask = dict(seeds=2, tune=False, out=tmp_path, **FAST)
    fit, calls = B.fit, []
    def stopped(*a, **kw):
        calls.append(kw['seed'])
        run = fit(*a, **kw)
        run.interrupted = len(calls) == 3
        return run
    monkeypatch.setattr(B, 'fit', stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(['full', 'lora'], *plain, **ask)
    assert len(list((tmp_path/'runs').glob('*.json'))) == 2
    compare(['full', 'lora'], *plain, **ask)
    assert len(calls) == 3 + 2

def test_a_method_that_breaks_down_does_not_stop_the_rest(plain, tmp_path):
    def explode(state):
        return state.forward().sum()*float('nan')

    c = compare(['full', Recipe('bad', objective=explode)], *plain, seeds=3, tune=False,
                out=tmp_path, **FAST)
    full, bad = c.json()['methods']
    assert (all('NotFinite' in s['error'] and 'step 0' in s['error'] for s in bad['seeds'])
            and all(s['error'] is None for s in full['seeds']))
    assert (bad['seeds'][0]['forgetting_matched'] == pytest.approx(math.log(len(plain[0][1])))
            and bad['gain']['mean'] <= 0 < full['gain']['mean']
            and full['forgetting_matched']['mean'] is not None)
    assert ('broke down' in (tmp_path/'index.html').read_text()
            and c.table.loc['bad', 'crashed'] == 3 and finite(c.json()))

def test_a_rate_that_diverges_stops_and_says_so_and_one_that_learns_slowly_does_not(plain, reviews):
    bench = Bench(*plain, **FAST | dict(steps=40, evaluations=6))
    wild = bench.run(get('full'), 30., 10_000, 'validation')
    assert (wild['stopped'] and 'validation loss' in wild['stopped']
            and wild['path'][-1]['step'] < 40)
    assert wild['error'] is None and wild['gain'] < 0
    assert bench.run(get('full'), 30., 0, 'test')['stopped'] is None, 'a test run goes on to its end'
    fresh = Bench(*reviews, **FAST | dict(steps=8))
    slow = fresh.run(get('full'), 1e-6, 10_000, 'validation')
    assert slow['stopped'] is None and slow['path'][-1]['step'] == 8, 'a new head begins as one that knows nothing'

def test_a_method_that_gains_nothing_leaves_no_equal_gain(plain, tmp_path):
    flat = lambda model, tok, rows: 1.
    c = compare(['full', 'lora'], *plain, metric=flat, seeds=1, lrs=[1e-3, 3.16e-3], max_runs=12,
                out=tmp_path, **FAST)
    r = c.json()
    assert r['target'] is None and not r['common']
    assert 'gained nothing' in (tmp_path/'index.html').read_text()
    assert all(m['rate_matched'] == m['rate'] and m['forgetting_matched']['mean'] is None
               for m in r['methods'])

def test_wrong_input_of_a_method_is_refused_not_scored(plain, tmp_path):
    with pytest.raises(ValueError, match='rank 99 does not fit'):
        compare(['lora(r=99)'], *plain, seeds=1, tune=False, out=tmp_path, **FAST)

def test_labels_gain_accuracy_and_drift(reviews, tmp_path):
    c = compare(['full', 'lora'], *reviews, seeds=1, lrs=dict(full=3e-3, lora=1e-2), tune=False,
                out=tmp_path, **FAST | dict(steps=60, items=100))
    full, lora = (m['seeds'][0] for m in c.json()['methods'])
    head = 32*2 + 2 # weights and biases of the classifier
    assert (c.lost == 'drift (1 - CKA)' and c.lost in c.table and full['after'] > .7
            and 0 < full['drift'] <= 1 and full['head'] == lora['head'] == head
            and lora['trainable'] < full['trainable'])
    assert (full['forgetting'] == pytest.approx(full['drift'])
            and full['path'][0]['forgetting'] == pytest.approx(0, abs=1e-6))

def test_labels_beside_old_data_lose_accuracy_and_drift_is_measured_too(reviews):
    tasks = data([dict(text=f'{a} {w}', label=l) for l, words in dict(good=GOOD, bad=BAD).items()
                  for w in words for a in ASPECTS[:3]])
    bench = Bench(*reviews, old=dict(reversed=tasks), **FAST | dict(steps=20))
    o = bench.run(get('full'), 3e-3, 0, 'test')
    assert o['error'] is None and 0 <= o['drift'] <= 1 and list(o['items']['forgetting']) == ['reversed']
    assert o['forgetting'] == pytest.approx(o['old']['reversed']['before'] - o['old']['reversed']['after'])

def test_lab_models_lose_old_skills_skill_by_skill(tmp_path):
    tok = lab_tokenizer()
    ask = dict(seeds=1, tune=False, out=tmp_path,
               **FAST | dict(old_items=2, evaluate_every=6, items=4, validation_items=4))
    r = compare('full', (llama(tok), tok), 'changed-rule', **ask).json()
    s = r['methods'][0]['seeds'][0]
    assert (r['protocol']['forgetting'] == 'old skills' and r['protocol']['metric'] == 'exact'
            and set(s['old']) == set(OLD) - {'sort'} and r['protocol']['redrawn'])
    assert s['forgetting'] == pytest.approx(
        sum(v['before'] - v['after'] for v in s['old'].values())/len(s['old']))

def test_old_data_and_a_metric_of_ones_own(plain, tmp_path):
    (model, tok), sums = plain
    old = data([dict(prompt=f'{i} plus', response=str(i)) for i in range(40)])
    asked = []

    def mine(model, tok, rows):
        asked.append(len(rows))
        return float(next(model.parameters()).double().sum())

    r = compare('full', (model, tok), sums, old=old, metric=mine, seeds=1, tune=False, out=tmp_path,
                **FAST).json()
    s = r['methods'][0]['seeds'][0]
    assert (r['protocol']['forgetting'] == 'old data' and list(s['old']) == ['rows']
            and s['forgetting'] == pytest.approx(s['old']['rows']['before'] - s['old']['rows']['after']))
    assert r['protocol']['metric'] == 'mine' and set(asked) == {20} and s['gain'] != 0

def test_recipes_with_edits_stages_and_their_own_decoding(plain, tmp_path):
    def shrink(changes, model):
        return {k: v*0 for k, v in changes.items()}

    none, staged = Recipe('undone', edit=shrink), Recipe('staged', loop=Stages(Recipe('a'), Recipe('b')))
    c = compare([none, staged], *plain, seeds=1, tune=False, lrs=[1e-2], out=tmp_path,
                **FAST).json()['methods']
    undone, two = (m['seeds'][0] for m in c)
    assert (undone['gain'] == pytest.approx(0, abs=1e-6)
            and undone['forgetting'] == pytest.approx(0, abs=1e-6)
            and undone['drift'] == pytest.approx(0, abs=1e-6)) # the edit took all of it back
    assert two['drift'] > 0 and two['error'] is None
    # a method that is one only at its end is evaluated there alone
    assert [[x['step'] for x in s['path']] for s in (undone, two)] == [[0, 6], [0, 6]]
    tok = lab_tokenizer()
    said = []

    def decode(models, tok, prompts, **kw):
        said.append(sorted(models))
        return ['a']*len(prompts)

    r = compare(
        Recipe('spoken', decode=decode), (llama(tok), tok), data('new-procedure', n=20), seeds=1,
        tune=False, out=tmp_path,
        **FAST | dict(evaluate_every=6, steps=2, old_items=2, items=4, validation_items=4)).json()
    assert (r['methods'][0]['seeds'][0]['gain'] == 0 and said
            and all(s == ['base', 'tuned'] for s in said))

def test_a_budget_ends_a_run_and_its_last_look_is_there(plain, tmp_path):
    s = compare('full', *plain, seeds=1, tune=False, budget=100, out=tmp_path,
                **FAST | dict(steps=50, evaluate_every=50)).json()['methods'][0]['seeds'][0]
    assert 100 <= s['tokens'] < 200 and 0 < s['path'][-1]['step'] < 10

def test_a_seed_redraws_the_questions_of_a_skill():
    b = Bench((llama(t := lab_tokenizer()), t), data('new-procedure', n=30), steps=1)
    assert b.data(0).fingerprint != b.data(1).fingerprint and len(b.data(1).train) == 30

@pytest.mark.parametrize('more, words', [(dict(device='cuda:7'), 'cuda:7'),
                                         (dict(metric='accuracy'), 'accuracy needs labels'),
                                         (dict(metric='bleu'), "metric is 'bleu'"),
                                         (dict(seeds=0), 'seeds is 0; give how many'),
                                         (dict(seeds=[1, 1]), 'each once'),
                                         (dict(steps=0), '^steps is 0; it must be at least 1'),
                                         (dict(budget=0), '^budget is 0; it must be at least 1')])
def test_compare_refuses(plain, tmp_path, more, words):
    with pytest.raises(ValueError, match=words):
        compare('full', *plain, out=tmp_path, **FAST | dict(seeds=1, tune=False) | more)

def test_data_without_test_rows_and_old_data_with_other_labels_are_refused(
    plain, reviews, tmp_path):
    few = data([dict(prompt='1 plus', response='1')],
               validation=[dict(prompt='2 plus', response='2')],
               test=[dict(prompt='3 plus', response='3')])
    few.test.clear()
    with pytest.raises(ValueError, match='has no test row'):
        compare('full', plain[0], few, out=tmp_path, **FAST)
    other = data([dict(text=f'{w} {a}', label=w) for w in GOOD for a in ASPECTS])
    with pytest.raises(ValueError, match='other labels'):
        compare('full', *reviews, old=other, out=tmp_path, **FAST)

def test_metric_fits_the_data(plain, reviews):
    assert ([metric_for(d) for d in (plain[1], reviews[1], data('new-facts', n=5))]
            == ['nll', 'accuracy', 'exact'] and metric_for(plain[1], 'exact') == 'exact')

def test_without_test_rows_the_metric_follows_from_the_rows_there_are(plain, reviews):
    """No test row is no sign of a lab skill: a set of old questions, or a handful of rows,
    may have none"""
    bare = lambda d: dataclasses.replace(d, test=[])
    assert [metric_for(bare(d)) for d in (plain[1], reviews[1], data('new-facts', n=5))] == [
        'nll', 'accuracy', 'exact']
    assert (metric_for(dataclasses.replace(plain[1], test=[], validation=[])) == 'nll'
            and metric_for(dataclasses.replace(plain[1], train=[], test=[], validation=[])) == 'nll')

def test_old_data_of_training_rows_alone_are_priced_by_likelihood(plain, tmp_path):
    (model, tok), sums = plain
    old = dataclasses.replace(data([dict(prompt=f'{i} plus', response=str(i)) for i in range(8)]),
                              test=[], validation=[])
    s = compare('full', (model, tok), sums, old=old, seeds=1, tune=False, out=tmp_path,
                **FAST).json()['methods'][0]['seeds'][0]
    assert (s['old']['rows']['before'] < 0
            # minus a negative log-likelihood, not a share of right answers
            and s['old']['rows']['before'] != s['old']['rows']['after'])

def test_a_learner_is_asked_only_once_it_is_there(tmp_path):
    tok, said = lab_tokenizer(), []

    def decode(models, tok, prompts, **kw):
        said.append(sorted(models))
        return ['a']*len(prompts)

    watcher = Learner(
        lambda state: torch.nn.Linear(len(tok), 1),
        lambda state: state.models['watcher'](state.logits).square().mean()/len(state.batches))
    few = FAST | dict(evaluate_every=2, steps=2, old_items=2, items=4, validation_items=4)
    r = compare(Recipe('watched', decode=decode, loop=Loop(learners=dict(watcher=watcher))),
                (llama(tok), tok), data('new-procedure', n=20), seeds=1, tune=False, out=tmp_path,
                **few).json()
    assert (r['methods'][0]['seeds'][0]['error'] is None and said
            and all(s == ['base', 'tuned', 'watcher'] for s in said))

# ---- the bench

def test_an_outcomes_items_are_what_gain_and_forgetting_are_made_of(plain):
    (model, tok), sums = plain
    old = {n: data([dict(prompt=f'{i} {n}', response=str(i)) for i in range(k, k + 20)])
           for n, k in dict(plus=0, **{'is': 9}).items()}
    bench = Bench((model, tok), sums, old=old, **FAST)
    o = bench.run(get('full'), 3e-3, 0, 'validation', doses=(.5,))
    assert len(o['items']['gain']) == 20 and set(o['items']['forgetting']) == {'plus', 'is'}
    for row in (o, *o['path'], *o['doses']):
        assert row['gain'] == pytest.approx(mean_of(row['items']['gain']))
        assert row['forgetting'] == pytest.approx(
            fmean(map(fmean, row['items']['forgetting'].values())))
    assert o['path'][0]['gain'] == o['path'][0]['forgetting'] == 0 and o['path'][-1]['gain'] == o['gain']
    assert ((o['doses'][0]['gain'], o['doses'][0]['dose']) != (o['gain'], 1)
            and finite(json.loads(json.dumps(o))))
    whole = bench.run(get('full'), 3e-3, 0, 'validation', doses=(1.,))['doses'][0]
    assert (whole['gain'] == pytest.approx(o['gain'], abs=1e-5)
            and whole['forgetting'] == pytest.approx(o['forgetting'], abs=1e-5))

def test_the_score_of_each_question_averages_to_the_metric(plain):
    (model, tok), sums = plain
    for rows in (sums.test[:7], sums.test[:30]):
        each = B.scores('nll', model, tok, rows, sums)
        assert (len(each) == len(rows)
                and fmean(each) == pytest.approx(B.score('nll', model, tok, rows, sums)))
        assert fmean(each) == pytest.approx(-B.nll(model, tok, rows, sums.kind))

asked = lambda rows: {json.dumps(r, sort_keys=True) for r in rows}

def test_choosing_and_judging_share_no_question(plain):
    (model, tok), sums = plain
    b = Bench((model, tok), sums, **FAST)
    assert not asked(b.questions(0, 'validation')) & asked(b.questions(0, 'test'))
    doubled = data([dict(prompt=f'{i%50} plus', response=str(i%50)) for i in range(200)])
    assert not asked(doubled.validation) & asked(doubled.test), 'rows that stand twice are on one side'
    b = Bench((model, tok), sums, old=doubled, **FAST)
    half = {w: [r for q in b.old_sets(0, w) for r in q.rows] for w in ('validation', 'test')}
    assert all(half.values()) and not asked(half['validation']) & asked(half['test'])

@pytest.mark.parametrize('skill', ['new-procedure', 'changed-rule', *OLD[:4]])
def test_the_questions_of_a_skill_are_different_in_each_split(skill):
    prompts = lambda rows: {r['prompt'] for r in rows}
    for seed in (0, 10_000):
        split = {s: prompts(skill_questions(skill, 60, s, seed)) for s in ('train', 'validation', 'test')}
        assert not split['validation'] & split['test']
        assert not split['train'] & (split['validation'] | split['test'])

def test_evaluations_are_each_twice_as_late_as_the_one_before():
    assert evaluation_steps(120) == [15, 30, 60, 120] and evaluation_steps(200, 1) == [200]
    assert evaluation_steps(3) == [1, 2, 3] and evaluation_steps(1, 5) == [1]

def test_old_data_by_name(plain):
    rows = [dict(prompt=f'{i} plus', response='a') for i in range(20)]
    names = lambda old: Bench(*[plain[0], plain[1]], old=old, **FAST).old_names
    assert names(None) == [] and names(rows) == ['rows']
    assert names(dict(mine=rows, yours=rows[:12])) == ['mine', 'yours']

def test_an_evaluation_on_the_way_is_a_run_that_is_stopped_there(plain):
    """With a constant schedule; so that what is read at a gain is what stopping there would have
    given"""
    bench = Bench(*plain, **FAST | dict(steps=12), schedule='constant')
    long = bench.run(get('full'), 3e-3, 0, 'test')
    short = bench.run(get('full'), 3e-3, 0, 'test', steps=6)
    row = next(r for r in long['path'] if r['step'] == 6)
    assert row['gain'] == pytest.approx(short['gain'], abs=1e-5)
    assert row['forgetting'] == pytest.approx(short['forgetting'], abs=1e-5)

# ---- shared runs

def key_of(bench, recipe=None, rate=1e-3, seed=0, split='validation', steps=6, doses=()):
    return digest(json.loads(json.dumps(run_key(bench, recipe or get('lora'), rate, seed, split,
                                                steps, doses),
                                        default=str)))

def test_every_ingredient_of_a_run_is_in_its_key(plain, monkeypatch):
    (model, tok), sums = plain
    make = lambda m=model, t=tok, d=sums, **more: Bench((m, t), d, **FAST | more)
    bench = make()
    base = key_of(bench)
    assert key_of(make()) == base, 'the same run has the same key'
    other_model = copy.deepcopy(model)
    other_model.lm_head.weight.data[0, 0] += 1e-3
    template, bigger = copy.deepcopy(tok), copy.deepcopy(tok)
    template.chat_template = '{% for m in messages %}{{ m.content }}{% endfor %}'
    bigger.add_tokens(['more'])
    tok(['1 plus 1', '1'], padding=True, truncation=True, max_length=3)
    assert key_of(make()) == base, 'what the last call left in a tokenizer is no part of it'
    mine = lambda model, tok, rows: 1.
    yours = lambda model, tok, rows: 2.
    old = data([dict(prompt=str(i), response='1') for i in range(20)])
    assert key_of(make(precision='no', accumulate=1)) == base, 'saying what is so anyway changes nothing'
    others = dict(
        model=key_of(make(m=other_model)), template=key_of(make(t=template)),
        words=key_of(make(t=bigger)),
        data=key_of(make(d=data(sums.train[:-1] + sums.validation + sums.test))),
        old=key_of(make(old=old)),
        old_name=key_of(make(old=dict(x=old))), metric=key_of(make(metric=mine)),
        metric2=key_of(make(metric=yours)),
        argument=key_of(bench, get('lora(r=2)')), method=key_of(bench, get('full')),
        rate=key_of(bench, rate=2e-3),
        seed=key_of(bench, seed=1), split=key_of(bench, split='test'), steps=key_of(bench, steps=7),
        doses=key_of(bench, doses=(.5,)), settings=key_of(make(schedule='constant')),
        weight_decay=key_of(make(weight_decay=.1)),
        batch=key_of(make(batch_size=4)), items=key_of(make(validation_items=10)),
        evaluations=key_of(make(evaluations=2)),
        length=key_of(make(max_length=9)), budget=key_of(make(budget=1000)))
    paced = get('lora')
    meta = dataclasses.replace(paced.meta, schedule='constant')
    others |= dict(schedule=key_of(bench, dataclasses.replace(paced, meta=meta)))
    for name, new in (('library_code', lambda: 'another'), ('recipe_code', lambda r: dict(x='y')),
                      ('versions', lambda: dict(torch='9'))):
        monkeypatch.setattr(f'ftlab.instruments.runs.{name}', new)
        others[name] = key_of(bench)
        monkeypatch.undo()
    assert base not in others.values()
    assert len(set(others.values())) == len(others), [k for k, v in others.items()
                                                      if list(others.values()).count(v) > 1]

def test_how_many_test_questions_there_are_is_no_part_of_a_tuning_run(plain):
    (model, tok), sums = plain
    t = lab_tokenizer()
    base = llama(t)
    few, many = (Bench((base, t), 'new-procedure', **FAST | dict(items=n, old_items=o, steps=2))
                 for n, o in ((20, 5), (900, 9))) # 900 are more than the data have, so more are drawn
    assert len(few.data(0).test) < len(many.data(0).test) and key_of(few) == key_of(many)
    assert key_of(few, split='test') != key_of(many, split='test')
    one, other = (b.run(get('lora'), 1e-2, 0, 'validation') for b in (few, many))
    assert (one['path'], one['old'], one['nll']) == (other['path'], other['old'], other['nll'])
    for rows in ('train', 'validation'): # `fit` sees both, whatever is tested afterwards
        less = dataclasses.replace(sums, **{rows: getattr(sums, rows)[:-1]})
        keys = {key_of(Bench((model, tok), d, **FAST), split='test') for d in (less, sums)}
        assert len(keys) == 2

def test_a_papers_code_counts_with_that_of_the_papers_it_imports_and_a_readers_own():
    asft = 'ftlab.trainers.losses.asft'
    assert set(papers_code([asft])) == {asft, asft.replace('asft', 'dft')}
    assert list(recipe_code(get('dft'))) == ['ftlab.trainers.losses.dft'] and not recipe_code(get('full'))
    one = recipe_code(Recipe('own', objective=lambda state: state.forward().sum()))
    two = recipe_code(Recipe('own', objective=lambda state: state.forward().mean()))
    assert len(one) == 1 and list(one.values()) != list(two.values())

def with_alpha(alpha):
    return Recipe('own', select=parts('q'), delta=partial(LoRA, r=2, alpha=alpha))

def view(batch, state, by=1):
    return batch

def term(state, by=1):
    return 0.

def stage(context, by=1):
    return Recipe('made')

OPTIONS = dict( # by what it may be: a recipe of one's own whose answers differ only in an option
    delta=with_alpha,
    arguments=lambda x: Recipe('own', objective=partial(term, x)),
    step=lambda x: Recipe('own', step=With(term, by=x)),
    nothing=lambda x: Recipe('own', step=With(term, **{} if x == 8 else dict(by=1))),
    view=lambda x: Recipe('own', source=viewed(partial(view, by=x))),
    term=lambda x: Recipe('own', objective=nll() + partial(term, by=x)),
    callback=lambda x: Recipe('own', loop=Loop((With(term), With(term, by=x)))),
    learner=lambda x: Recipe('own', loop=Loop((), dict(l=Learner(partial(stage, by=x), term)))),
    within=lambda x: Recipe('own', step=With(term, by=partial(term, by=x))),
    rows=lambda x: Recipe('own', source=With(view, by=[dict(prompt='p', response=str(x))]*99)),
    score=lambda x: Recipe('own', select=top(partial(torch.clamp, max=x), .1)),
    tensor=lambda x: Recipe('own', edit=With(view, by=torch.full([2], x))),
    precision=lambda x: Recipe('own', edit=With(view, by=torch.half if x == 8 else torch.double)),
    product=lambda x: get('dft')*with_alpha(x),
    edits=lambda x: Recipe(edit=With(view, by=x))*Recipe(edit=With(view, by=2)),
    stages=lambda x: Recipe('own', loop=Stages(get('lora'), Share(with_alpha(x), 2.))),
    made=lambda x: Recipe('own', loop=Stages(get('lora'), partial(stage, by=x))),
    blocks=lambda x: Recipe('own', select=parts('q', blocks=(x,))),
    where=lambda x: Recipe('own', select=top(torch.abs, .1, parts('q', blocks=(x,)))))

@pytest.mark.parametrize('make', OPTIONS.values(), ids=OPTIONS)
def test_recipes_that_differ_in_an_option_are_two_methods(make, plain):
    bench = Bench(*plain, **FAST)
    assert key_of(bench, make(8)) == key_of(bench, make(8)) != key_of(bench, make(16))
    assert len(str(make(8).describe())) < 400

def test_a_method_with_arguments_is_described_by_them_alone():
    told = str([get(n).describe() for n in names()])
    assert "'options'" not in told and 'blocks=' not in told
    assert (get('mezo')*get('hft')).describe()['arguments'] == {
        'mezo': dict(eps=1e-3, dist='normal'), 'hft': dict(ratio=.5, granularity='matrix', round=0)}
    first = get('lofit').stages[0]
    assert (get('lofit').describe()['stages'][0] == first.describe(explained=True)
            == {k: v for k, v in first.describe().items() if k != 'options'} != first.describe())

def test_pictures_are_refused_before_a_model_is_loaded():
    with pytest.raises(ValueError, match="9 are of kind 'image'.*asks questions that are text"):
        compare('lora', 'no/such/model', digits.digits(), metric='accuracy')

def test_no_two_methods_share_a_run(plain):
    "`pissa` once took the runs of `olora`: the same arguments, and another start"
    bench, of = Bench(*plain, **FAST), {}
    noted = Recipe(Method('noted', arguments=dict(start=.5)), objective=term)
    ways = {'a product': lambda r: r*get('dft'), 'a product in stages': lambda r: get('spin')*r,
            'another start recorded': lambda r: r*noted,
            'a stage': lambda r: Recipe('own', loop=Stages(r)), 'a share': lambda r: (
                Recipe(Method('own', arguments=dict(r=8)), loop=Stages(Share(r, 2.))))}
    alike = {f'{n}, {how}': way(get(n).named('own')).named('own')
             for n in ('pissa', 'olora') for how, way in ways.items()}
    for name, recipe in ({n: get(n) for n in names()} | alike).items():
        of.setdefault(key_of(bench, recipe), []).append(name)
    assert [same for same in of.values() if len(same) > 1] == []

def test_compare_runs_both_of_two_recipes_that_differ_in_an_option(plain, tmp_path):
    arms = [with_alpha(8.).named('mild'), with_alpha(64.).named('strong')]
    c = compare(arms, *plain, seeds=1, lrs=[1e-2], tune=False, out=tmp_path, **FAST)
    mild, strong = (m['seeds'][0]['nll'] for m in c.result['methods'])
    assert c.result['runs']['made'] == 2 and mild != strong

def test_a_run_is_made_once_for_everyone(plain, tmp_path):
    bench, again = Bench(*plain, **FAST), Bench(*plain, **FAST)
    one, other = Runs(tmp_path), Runs(tmp_path)
    first = one(bench, get('lora'), 1e-2, 0, 'test')
    assert other(again, get('lora'), 1e-2, 0, 'test') == first
    assert (one.made, one.taken, other.made, other.taken) == (1, 0, 0, 1) and other.saved == first['cpu_seconds']
    kept = Runs(tmp_path, keep=True)
    kept(bench, get('lora'), 1e-2, 0, 'test')
    assert kept.made == 1 and len(list(tmp_path.glob('*.safetensors'))) == 1, 'the change was asked for and not there'
    next(tmp_path.glob('*.json')).unlink()
    next(tmp_path.glob('*.safetensors')).unlink()
    path = tmp_path/f'{key_of(bench, rate=1e-2, split="test")}.json'
    path.mkdir()
    with pytest.raises(IsADirectoryError, match='move it away'):
        one(bench, get('lora'), 1e-2, 0, 'test')

def test_a_run_that_broke_down_is_kept_too(plain, tmp_path):
    def explode(state):
        return state.forward().sum()*float('nan')
    bench, runs = Bench(*plain, **FAST), Runs(tmp_path, keep=True)
    for _ in range(2):
        assert 'NotFinite' in runs(bench, Recipe('bad', objective=explode), 1e-3, 0, 'test')['error']
    assert (runs.made, runs.taken) == (1, 1)
