"The rules of a comparison on numbers made by hand, and comparisons of tiny models from end to end"
import dataclasses, json, math
import pytest, torch
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)
import ftlab.instruments.compare as C
from ftlab.adapters.store import identity
from ftlab.instruments.compare import (Comparison, assemble, best_rate, compare, interval, matched,
                                       metric_for, old_skills, plan, target_gain, tune, tuning_seed)
from ftlab.instruments.explore import draw_tradeoff, runs_of
from ftlab.instruments.views import COLORS, FIXED, MARKS, method_styles
from ftlab.map import measured
from ftlab.core.data import data
from ftlab.core.paper import Method
from ftlab.core.recipe import Learner, Loop, Recipe, Stages
from ftlab.lab.models import lab_tokenizer
from ftlab.lab.world import ASPECTS, BAD, GOOD, OLD

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
    return [dict(step=s, gain=g, forgetting=f) for s, g, f in rows]

def test_matched_takes_the_first_look_that_reaches_the_target():
    p = path((0, 0., 0.), (10, .5, .1), (20, .4, .3), (30, .8, .6))
    assert [matched(p, t) for t in (.3, .5, .51, .81, None)] == [.1, .1, .6, None, None]

def test_the_target_is_set_by_the_weakest_arms_best_look_not_its_last():
    weak, strong = path((0, 0., 0.), (10, .4, .1), (20, .2, .1)), path((0, 0., 0.), (10, .9, .5))
    assert target_gain([weak, strong]) == pytest.approx(.38)
    assert target_gain([path((0, 0., 0.)), strong]) is None and target_gain([]) is None

def test_an_edge_extends_all_grids_towards_each_ones_best():
    calls = []

    def score(name, rate):
        calls.append((name, rate))
        return {'in': -abs(math.log10(rate) + 2), 'low': -rate, 'high': rate}[name]

    t = tune(score,
             {'in': (1e-3, 1e-2, 1e-1), 'low': (1e-3, 1e-2, 1e-1), 'high': (1e-3, 1e-2, 1e-1)})
    assert ({n: len(d['tried']) for n, d in t.items()} == {'in': 5, 'low': 5, 'high': 5}
            and len(calls) == len(set(calls)) == 15)
    assert (t['low']['rate'] == pytest.approx(1e-5) and t['high']['rate'] == pytest.approx(10)
            and t['in']['rate'] == 1e-2)
    assert t['low']['at_edge'] and t['high']['at_edge'] and not t['in']['at_edge']

def test_no_edge_no_extension_and_one_extension_where_it_suffices():
    peak = lambda at: lambda n, r: -abs(math.log10(r/at))
    assert len(tune(peak(1e-2), {'a': (1e-3, 1e-2, 1e-1)})['a']['tried']) == 3
    once = tune(peak(1e-1), {'a': (1e-3, 1e-2, 1e-1)})['a']
    assert len(once['tried']) == 4 and once['rate'] == 1e-1 and not once['at_edge']

def test_equal_rates_inside_before_edge_then_gentle():
    assert (best_rate({1: .5, 2: .5, 3: .5, 4: .5}) == 2 and best_rate({1: .6, 2: .5, 3: .5}) == 1
            and best_rate({1: .5, 2: .5}) == 1)

def test_unequal_grids_are_refused():
    with pytest.raises(ValueError, match='same number of learning rates; there are 1 for a, 2 for b'):
        tune(lambda n, r: 0, dict(a=(1,), b=(1, 2)))

def test_the_tuning_seed_is_outside_and_stays_when_seeds_are_added():
    assert (tuning_seed([0, 1, 2]) == tuning_seed(list(range(50)))
            and tuning_seed([10_000]) not in (10_000,))

def cell(seed, p, gain=.5, forgetting=.2, error=None):
    return dict.fromkeys(C.SEED_KEYS) | dict(seed=seed, gain=gain, forgetting=forgetting, path=p,
                                             error=error)

def test_a_crash_is_the_worst_score_and_sets_no_target():
    good, other = path((0, 0., 0.), (1, .5, .1)), path((0, 0., 0.), (1, .6, .3))
    a, b = assemble(
        dict(a=({}, [cell(s, good) for s in range(3)]),
             b=({}, [cell(0, other), cell(1, other), cell(2, [], -.1, .9, 'NotFinite')])))
    assert ([s['forgetting_matched'] for s in b['seeds']] == [.3, .3, .9]
            and [s['forgetting_matched'] for s in a['seeds']] == [.1]*3)
    assert b['gain']['mean'] == pytest.approx(.3) and b['seeds'][2]['error'] == 'NotFinite'

def test_where_an_arm_gained_nothing_nothing_is_matched():
    a, b = assemble(dict(a=({}, [cell(0, path((0, 0., 0.), (1, 0., .2)))]),
                         b=({}, [cell(0, path((0, 0., 0.), (1, .5, .1)))])))
    assert a['forgetting_matched']['mean'] is b['forgetting_matched']['mean'] is None

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
        {'full': Recipe().lrs, 'mine': (1., 2.)}, {'full': (Recipe().lr,)},
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
    done, fit = [], C.fit

    def counted(*a, **kw):
        run = fit(*a, **kw)
        done.append((kw['lr'], kw['seed']))
        return run

    monkeypatch.setattr(C, 'fit', counted)
    return done

def test_the_json_has_the_promised_shape(plain, tmp_path):
    c = compare(['full', 'lora'], *plain, seeds=3, lrs=[1e-3], tune=False, out=tmp_path, **FAST)
    r = c.json()
    assert ({'model', 'data', 'protocol', 'methods', 'tuning', 'versions'} == set(r)
            and json.loads((tmp_path/'result.json').read_text()) == r)
    for m in r['methods']:
        assert ({'name', 'recipe', 'seeds', 'gain', 'forgetting', 'forgetting_matched'} == set(m)
                and len(m['seeds']) == 3)
        assert (all(set(m[k]) == {'mean', 'low', 'high'} for k in ('gain', 'forgetting', 'forgetting_matched'))
                and m['gain']['low'] < m['gain']['mean'] < m['gain']['high'])
        for s in m['seeds']:
            assert {'seed', 'gain', 'forgetting', 'forgetting_matched', 'nll', 'drift', 'seconds',
                    'peak_bytes', 'trainable', 'saved_bytes', 'path'} <= set(s)
            assert ({'step', 'gain', 'forgetting'} == set(s['path'][0])
                    and s['path'][0]['step'] == 0 and s['path'][-1]['step'] == 6
                    and s['saved_bytes'] > 0 and s['seconds'] > 0)
    full, lora = r['methods']
    assert full['seeds'][0]['trainable'] == plain[0][0].num_parameters() > lora['seeds'][0]['trainable'] > 0
    assert (r['protocol']['forgetting'] == 'drift (KL)'
            and full['seeds'][0]['forgetting'] == pytest.approx(full['seeds'][0]['drift'])
            and full['seeds'][0]['drift'] > 0)
    assert (full['seeds'][0]['gain'] == pytest.approx(full['seeds'][0]['after'] - full['seeds'][0]['before'])
            and full['seeds'][0]['nll'] == pytest.approx(-full['seeds'][0]['after']))
    page = (tmp_path/'index.html').read_text()
    assert ('<script' not in page and 'src="data:image' in page and 'http' not in page
            and (tmp_path/'tradeoff.png').read_bytes()[:4] == b'\x89PNG')
    assert (Comparison.read(tmp_path/'result.json').table.equals(c.table)
            and not list(tmp_path.rglob('*.tmp')) and not list(tmp_path.rglob('*.safetensors')))

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
    assert at['full'][0] > at['dft'][0] and at['full'][1] > at['dft'][1]

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

def test_finished_cells_are_kept_and_only_what_is_missing_is_run(plain, tmp_path, monkeypatch):
    ask = dict(lrs=dict(full=[1e-4, 1e-3], hft=[1e-4, 1e-3]), out=tmp_path, **FAST)
    done = count_fits(monkeypatch)
    first = compare(['full', 'hft'], *plain, seeds=1, **ask)
    n = len(done)
    assert (n == sum(len(d['tried']) for d in first.json()['tuning']['methods'].values()) + 2
            and {s for _, s in done} == {0, 10_000})
    assert (compare(['full', 'hft'], *plain, seeds=1, **ask).json() == first.json()
            and len(done) == n)
    second = compare(['full', 'hft'], *plain, seeds=2, **ask)
    assert (done[n:] == [(m['seeds'][1]['rate'], 1) for m in second.json()['methods']]
            and second.json()['methods'][0]['seeds'][0] == first.json()['methods'][0]['seeds'][0])
    compare(['full', 'hft'], *plain, seeds=1, **ask | dict(steps=5))
    assert len(done) > n + 2 # other settings, other cells
    m = len(done)
    compare(['full', 'hft'], *plain, seeds=1, resume=False, **ask)
    assert len(done) == m + n

def test_an_interruption_keeps_what_was_finished(plain, tmp_path, monkeypatch):
    ask = dict(seeds=2, tune=False, out=tmp_path, **FAST)
    fit, calls = C.fit, []
    def stopped(*a, **kw):
        calls.append(kw['seed'])
        run = fit(*a, **kw)
        run.interrupted = len(calls) == 3
        return run
    monkeypatch.setattr(C, 'fit', stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(['full', 'lora'], *plain, **ask)
    assert len(list((tmp_path/'cells').glob('*.json'))) == 2
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
            and c.table.loc['bad', 'crashed'] == 3)

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
            and undone['path'][-2]['gain'] != 0) # the edit took all of it back
    assert two['drift'] > 0 and two['error'] is None
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
    b = C.Bench((llama(t := lab_tokenizer()), t), data('new-procedure', n=30), steps=1)
    assert b.data(0).fingerprint != b.data(1).fingerprint and len(b.data(1).train) == 30

@pytest.mark.parametrize('more, words', [(dict(device='cuda:7'), 'cuda:7'),
                                         (dict(metric='accuracy'), 'accuracy needs labels'),
                                         (dict(metric='bleu'), "metric is 'bleu'"),
                                         (dict(seeds=0), 'seeds is 0; give how many'),
                                         (dict(seeds=[1, 1]), 'each once'),
                                         (dict(steps=0), 'at least 1'),
                                         (dict(budget=0), 'at least 1')])
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
