"Frontiers and the search for rates: exact results on paths made by hand, and properties on random ones"
import math
import random
import pytest
from ftlab.instruments.frontier import (at_gain, best_gain, choose, common_gain, frontier,
                                        least_forgetting,
                                        paired_difference, pooled, reading)
from ftlab.instruments.rates import Grid, Tried, Want, half_decades, on_ladder, rounded, search

RANDOM = range(60)

def path(*rows):
    return [dict(step=s, gain=g, forgetting=f) for s, g, f in rows]

def random_path(rng):
    "A path that begins at nothing and may fall back"
    rows = [(0, 0., 0.)]
    for step in (15, 30, 60, 120):
        rows.append((step, round(rng.uniform(-.1, 1), 2), round(rng.uniform(-.05, .6), 2)))
    return path(*rows)

def random_paths(seed):
    rng = random.Random(seed)
    return {10**-i: random_path(rng) for i in range(1, rng.randint(2, 6))}

# ---- reading a path

def test_a_path_is_read_where_it_first_reaches_the_gain():
    p = path((0, 0., 0.), (10, .5, .1), (20, .4, .3), (30, .8, .6))
    read = [at_gain(p, t) and (at_gain(p, t)['step'], at_gain(p, t)['forgetting'])
            for t in (.25, .5, .6, .81, None)]
    assert read[3:] == [None, None]
    assert read[:3] == [pytest.approx((5, .05)), pytest.approx((10, .1)), pytest.approx((25, .45))]
    assert at_gain([], .1) is None and best_gain([]) == 0 and best_gain(p) == .8

def test_what_is_read_between_two_evaluations_is_made_of_both_with_its_items():
    before = dict(step=0, gain=0., forgetting=0.,
                  items=dict(gain=[0, 0], forgetting=dict(add=[0, 0])))
    after = dict(step=10, gain=1., forgetting=.5,
                 items=dict(gain=[1, 1], forgetting=dict(add=[1, 0])), more=2)
    row = at_gain([before, after], .25)
    assert row == dict(step=2.5, gain=.25, forgetting=.125,
                       items=dict(gain=[.25, .25], forgetting=dict(add=[.25, 0])))

@pytest.mark.parametrize('seed', RANDOM)
def test_a_reading_lies_between_its_neighbours(seed):
    rng = random.Random(seed)
    p = random_path(rng)
    gain = rng.uniform(.01, 1)
    row = at_gain(p, gain)
    if row is None:
        assert best_gain(p) < gain
        return
    i = next(i for i, r in enumerate(p) if r['gain'] >= gain)
    assert all(r['gain'] < gain for r in p[:i]) and row['gain'] == pytest.approx(gain)
    for k in ('step', 'forgetting'):
        low, high = sorted((p[i - 1][k], p[i][k]))
        assert low - 1e-9 <= row[k] <= high + 1e-9

# ---- differences

def test_the_standard_error_is_that_of_paired_differences_and_sets_weigh_the_same():
    a, b = [1, 1, 0, 1], [1, 0, 0, 0]
    mean, error = paired_difference(a, b)
    assert (mean, error) == (.5, pytest.approx(math.sqrt(1/3/4)))
    long, short = dict(x=[1]*100, y=[0, 0]), dict(x=[0]*100, y=[0, 1])
    mean, error = paired_difference(long, short)
    assert mean == pytest.approx((1 - .5)/2) and error == pytest.approx(math.sqrt(0 + .5/2)/2)
    assert paired_difference([1], [0])[1] == math.inf

@pytest.mark.parametrize('n', [2, 10, 50, 333])
def test_one_question_more_is_one_standard_error(n):
    mean, error = paired_difference([1] + [0]*(n - 1), [0]*n)
    assert mean == pytest.approx(error) == pytest.approx(1/n)

@pytest.mark.parametrize('a, b', [([1], [1, 0]), (dict(x=[1]), dict(y=[1])), ([1], dict(x=[1]))])
def test_other_questions_are_refused(a, b):
    with pytest.raises(ValueError, match='not asked the same questions'):
        paired_difference(a, b)

# ---- the target

def test_the_target_is_set_by_the_weakest_arm():
    assert common_gain(dict(a=.9, b=.8)) == (pytest.approx(.76), True)
    assert common_gain(dict(a=.9, b=0.)) == (None, False) == common_gain(dict(a=.9, b=-.2))
    assert common_gain(dict(a=.4)) == (pytest.approx(.38), True)

def test_the_target_must_be_half_of_the_strongest_arms_gain():
    "95% of .52 is less than half of 1, and 95% of .53 is more"
    assert common_gain(dict(a=1., b=.52)) == (pytest.approx(.494), False)
    assert common_gain(dict(a=1., b=.53)) == (pytest.approx(.5035), True)

@pytest.mark.parametrize('seed', RANDOM)
def test_every_arm_reaches_the_target(seed):
    arms = {n: random_paths(f'{seed}{n}') for n in 'abc'}
    best = {n: max(map(best_gain, of.values())) for n, of in arms.items()}
    target, common = common_gain(best)
    if target is None:
        assert min(best.values()) <= 0 and not common
        return
    assert all(target <= b for b in best.values())
    assert all(any(at_gain(p, target) for p in of.values()) for of in arms.values())

# ---- outcomes

def test_a_metric_is_read_at_the_end_or_at_the_target():
    o = dict(gain=.8, forgetting=.6, kl=3., items=dict(gain=[1, 0]),
             path=path((0, 0., 0.), (10, .8, .6)))
    assert reading(o, 'gain') == (.8, [1, 0]) and reading(o, 'kl') == (3., None)
    assert reading(o, 'forgetting_matched', .4)[0] == pytest.approx(.3)
    assert reading(o, 'forgetting_matched', .9) is None is reading(o, 'forgetting_matched', None)
    assert reading(o | dict(error='nan'), 'gain') is None is reading(o | dict(gain=math.nan), 'gain')
    with pytest.raises(KeyError, match="no 'gian'; it has gain, forgetting, kl"):
        reading(o, 'gian')

def outcome(gain, forgetting, items, rows, **more):
    return dict(gain=gain, forgetting=forgetting, items=dict(gain=items), path=rows) | more

def test_outcomes_of_two_seeds_are_averaged_with_their_items_side_by_side():
    a = outcome(.8, .4, [1, 1], path((0, 0., 0.), (10, .5, .1), (20, .8, .4)))
    b = outcome(.6, .2, [1, 0], path((0, 0., 0.), (10, .3, .3)), stopped='validation loss 9.00 after 10 steps')
    both = pooled({0: a, 1: b})
    assert (both['gain'], both['forgetting']) == (pytest.approx(.7), pytest.approx(.3))
    assert both['items']['gain'] == {'0/': [1, 1], '1/': [1, 0]}
    assert [(r['step'], r['gain']) for r in both['path']] == [(0, 0), (10, pytest.approx(.4))]
    broken = pooled({0: a, 1: dict(error='nan', gain=0.)})
    assert broken['error'] == 'nan' and reading(broken, 'gain') is None

# ---- the choice

def of_right(n, right):
    return dict(gain=right/n, items=dict(gain=[1]*right + [0]*(n - right)))

def test_within_one_standard_error_the_smaller_is_taken_and_beyond_it_is_not():
    found = choose({1e-4: of_right(50, 20), 3e-4: of_right(50, 45), 1e-3: of_right(50, 46)}, 'gain')
    assert (found['rate'], found['best'], found['value']) == (3e-4, 1e-3, .9)
    assert found['values'] == {1e-4: .4, 3e-4: .9, 1e-3: .92}
    assert choose({1e-4: of_right(50, 43), 1e-3: of_right(50, 46)}, 'gain')['rate'] == 1e-3

def test_where_less_is_better_the_same_rule_holds_turned_round():
    worse = lambda x: dict(forgetting=sum(x)/len(x), items=dict(forgetting=dict(add=x)))
    few, more, many = [1] + [0]*49, [1]*2 + [0]*48, [1]*9 + [0]*41
    found = choose({1e-4: worse(more), 1e-3: worse(few), 1e-2: worse(many)}, 'forgetting',
                   higher=False)
    assert (found['rate'], found['best']) == (1e-4, 1e-3)
    assert choose({1e-4: worse(many), 1e-3: worse(few)}, 'forgetting', higher=False)['rate'] == 1e-3

def test_without_items_only_an_equal_value_is_as_good_and_without_a_value_there_is_no_choice():
    plain = lambda g: dict(gain=g)
    assert choose({1: plain(.5), 2: plain(.5), 3: plain(.4)}, 'gain')['rate'] == 1
    assert choose({1: plain(.49), 2: plain(.5)}, 'gain')['rate'] == 2
    assert choose({1: dict(error='nan')}, 'gain') is None

# ---- the frontier

def test_the_frontier_of_two_rates_is_what_one_reads_off_the_picture():
    paths = {3e-4: path((0, 0, 0), (120, .7, .1)),
             1e-3: path((0, 0, 0), (60, .35, .2), (120, .9, .3))}
    corners = frontier(paths)
    assert [(c['gain'], c['rate']) for c in corners] == [(0, 3e-4), (.35, 3e-4), (.7, 3e-4),
                                                         (.9, 1e-3)]
    assert [c['forgetting'] for c in corners] == pytest.approx([0, .05, .1, .3])
    assert (least_forgetting(corners, .8) == pytest.approx(.2)
            and least_forgetting(corners, .95) is None)
    assert frontier({}) == [] and least_forgetting([], .1) is None

def test_more_gain_with_less_forgotten_counts_at_less_gain_too():
    corners = frontier({1: path((0, 0., 0.), (1, .5, .3)), 2: path((0, 0., 0.), (1, .8, .2))})
    assert [c['forgetting'] for c in corners] == pytest.approx([0, .125, .2])
    back = frontier({1: path((0, 0., 0.), (1, .5, .3), (2, .5, .1))})
    assert back[-1]['forgetting'] == .1 and back[-1]['step'] == 2, 'a later step with the same gain is a point, too'

@pytest.mark.parametrize('seed', RANDOM)
def test_the_frontier_is_never_above_a_path_and_never_falls(seed):
    paths = random_paths(seed)
    corners = frontier(paths)
    f = [c['forgetting'] for c in corners]
    assert f == sorted(f) and [c['gain'] for c in corners] == sorted({c['gain'] for c in corners})
    for p in paths.values():
        for row in p:
            if row['gain'] >= 0:
                assert least_forgetting(corners, row['gain']) <= row['forgetting'] + 1e-9
        for i in range(1, 50):
            if row := at_gain(p, i/50):
                assert least_forgetting(corners, i/50) <= row['forgetting'] + 1e-9
    assert corners[-1]['gain'] == max(map(best_gain, paths.values()))
    assert {c['rate'] for c in corners} <= set(paths)

# ---- grids

def test_a_grid_is_half_decades_and_moves_by_them():
    assert half_decades((3e-4, 1e-4)) == (1e-4, 3.16e-4, 1e-3, 3.16e-3)
    grid = Grid(half_decades((1e-4,)))
    assert (grid.moved(3.16e-3, 1), grid.moved(1e-4, -1)) == (1e-2, 3.16e-5)
    assert (grid.moved(1e-3, .5), grid.moved(1e-3, -.5)) == (1.78e-3, 5.62e-4)
    assert Grid((1e-3,)).moved(1e-3, .5) == 1.78e-3, 'one value is varied by 1.78 as well'
    line = Grid((0., .5, 1.), 'linear', (0., 1.))
    assert line.moved(1., 1) is None is line.moved(0., -1) and line.moved(.5, .5) == .75

def test_equal_rates_are_equal_numbers_wherever_they_come_from():
    "So that runs are shared"
    up, down = 1e-4, 1.
    for _ in range(8):
        up, down = Grid(half_decades((1e-4,))).moved(up, .5), Grid((.1, .316, 1.)).moved(down, -.5)
    assert (up == 1e-2 == down and rounded(on_ladder(3.162277e-3)) == 3.16e-3
            and on_ladder(3e-3) == 3e-3)

@pytest.mark.parametrize('ask, words', [
    (dict(values=()), 'give one or more'), (dict(values=(0., 1.)), 'above 0'),
    (dict(values=(-1.,)), 'between'),
    (dict(values=(.5, 2.), spacing='linear', bounds=(0., 1.)), 'between 0 and 1'),
    (dict(values=(1.,), spacing='cubic'), "spacing is 'cubic'")])
def test_a_grid_refuses(ask, words):
    with pytest.raises(ValueError, match=words):
        Grid(**ask)

# ---- the search

def peaked(hidden, n=50, log=None):
    "A run whose gain falls on both sides of a hidden rate, question by question"
    def run(arm, rate, seed):
        if log is not None:
            log.append((arm, rate, seed))
        return of_right(n, max(0, round(.8*n - .4*n*abs(math.log10(rate/hidden[arm])))))
    return run

GRID = Grid(half_decades((1e-4,)))

def test_no_edge_no_extension_two_refined_three_again():
    log = []
    tried = search(dict(a=GRID), peaked(dict(a=3.3e-4), log=log), [Want(('a',))])
    assert sorted(tried.outcomes['a']) == [1e-4, 1.78e-4, 3.16e-4, 5.62e-4, 1e-3, 3.16e-3]
    assert sum(s == 10_001 for _, _, s in log) == 3 and len(log) == len(set(log)) == 9
    choice = tried.choices(Want(('a',)))['arms']['a']
    assert choice['rate'] == 3.16e-4 and not choice['at_edge']

@pytest.mark.parametrize('higher', [True, False])
def test_an_arm_that_no_want_names_is_run_with_every_seed_at_its_best_rates(higher):
    "Such as a trivial alternative, which has no strong or weak side of its own but must be at its best"
    best, want = dict(a=-3., idle=-2.), Want(('a',), 'm', higher)
    run = lambda arm, rate, seed: dict(m=(-1 if higher else 1)*abs(math.log10(rate) - best[arm]))
    grids = dict(a=GRID, idle=GRID)
    tried = search(grids, run, [want], refine=False, others=dict(idle=want))
    assert max(GRID.values) in tried.twice('idle') and min(GRID.values) not in tried.twice('idle')

def test_an_edge_extends_all_arms_on_both_sides():
    hidden = dict(low=2e-5, inside=3.3e-4, high=1.2e-2)
    tried = search(dict.fromkeys(hidden, GRID), peaked(hidden), [Want(tuple(hidden))])
    assert {len(of) for of in tried.outcomes.values()} == {4 + 2 + 2}
    chosen = tried.choices(Want(tuple(hidden)))['arms']
    assert [chosen[a]['rate'] for a in hidden] == [1.78e-5, 3.16e-4, 1e-2]
    assert min(tried.outcomes['low']) == 1e-5 and max(tried.outcomes['high']) == 3.16e-2
    assert min(tried.outcomes['inside']) == 1e-5, 'an inner arm grows where it has fewer neighbours, or downwards'

def test_a_choice_that_stays_at_the_edge_says_so_and_extension_ends():
    rising = lambda arm, rate, seed: of_right(400, round(150 + 40*math.log10(rate/1e-4)))
    tried = search(dict(a=GRID), rising, [Want(('a',))], refine=False)
    choice = tried.choices(Want(('a',)))['arms']['a']
    assert (len(tried.outcomes['a']) == 4 + 3 and choice['at_edge']
            and choice['rate'] == max(tried.outcomes['a']))

def test_an_arm_that_hardly_learns_yet_is_tried_further_up():
    """Its rates differ by less than one standard error, so the smallest is the choice, and the
    largest the best"""
    slow = lambda arm, rate, seed: of_right(50, 2 + round(math.log10(rate/1e-4)*.4))
    tried = search(dict(a=GRID), slow, [Want(('a',))], refine=False, extend=1)
    assert sorted(tried.outcomes['a'])[-1] == 1e-2

@pytest.mark.parametrize('seed', range(25))
def test_every_arm_ends_with_as_many_rates_and_as_many_of_them_twice(seed):
    rng = random.Random(seed)
    hidden = {a: 10**rng.uniform(-6, 0) for a in 'abc'}
    def run(arm, rate, seed):
        away = abs(math.log10(rate/hidden[arm]))
        top = max(-.1, (.9 if arm == 'a' else .6) - .3*away)
        return dict(gain=top, forgetting=.1 + rate,
                    path=path((0, 0., 0.), (60, top/2, .02 + rate/2),
                               (120, top, .1 + rate)))
    wants = [Want(('a', 'b', 'c'), 'forgetting_matched', False), Want(('a', 'b', 'c'))]
    tried = search(dict.fromkeys('abc', GRID), run, wants)
    assert len({len(of) for of in tried.outcomes.values()}) == 1
    assert [sum(len(o) == 2 for o in of.values()) for of in tried.outcomes.values()] == [3]*3
    for want in wants:
        for arm, c in tried.choices(want)['arms'].items():
            assert c['rate'] in tried.twice(arm)

def test_an_arm_that_reaches_the_target_at_one_rate_alone_still_gets_three_rates_again():
    "The weakest arm sets the target, so it seldom reaches it at more"
    def run(arm, rate, seed):
        top = .8 if arm == 'strong' else {1e-3: .7, 3.16e-4: .5, 1.78e-3: .6}.get(rate, .1)
        return dict(gain=top, forgetting=.1, path=path((0, 0., 0.), (10, top, .1)))
    want = Want(('strong', 'weak'), 'forgetting_matched', False)
    tried = search(dict.fromkeys(('strong', 'weak'), GRID), run, [want])
    assert tried.twice('weak') == {1e-3, 1.78e-3, 3.16e-4}, 'the next best by what they gain'
    assert len(tried.twice('strong')) == 3

def test_bounds_may_leave_fewer():
    bounded = Grid((.4, .6, .8, 1.), 'linear', (.3, 1.))
    other = Grid((1., 2., 3., 4.), 'linear')
    run = lambda arm, rate, seed: of_right(100, round(10*rate))
    tried = search(dict(a=bounded, b=other), run, [Want(('a', 'b'))], refine=False)
    assert all(.3 <= r <= 1 for r in tried.outcomes['a']) and len(tried.outcomes['b']) == 7
    assert tried.choices(Want(('a', 'b')))['arms']['a']['at_edge']

def test_unequal_grids_are_refused():
    with pytest.raises(ValueError, match='same number of learning rates; there are 1 for a, 2 for b'):
        search(dict(a=Grid((1.,)), b=Grid((1., 2.))), lambda *a: {}, [])

def test_one_value_is_run_on_both_seeds_and_not_searched():
    log = []
    search(dict(a=Grid((1e-3,))), peaked(dict(a=1e-3), log=log), [Want(('a',))])
    assert sorted(log) == [('a', 1e-3, 10_000), ('a', 1e-3, 10_001)]

def test_an_arm_that_is_out_gets_no_more_rates_and_sets_no_target():
    log = []
    hidden = dict(a=3e-4, b=3e-4, out=3e-4)
    tried = search(dict.fromkeys(hidden, GRID), peaked(hidden, log=log), [Want(tuple(hidden))],
                   drop=lambda tried: ['out'])
    assert [(r, s) for a, r, s in log if a == 'out'] == [(r, 10_000) for r in GRID.values]
    assert len(tried.outcomes['a']) == 6 and tried.twice('a') != set(tried.outcomes['a'])

def test_a_number_that_no_arm_has_is_named_and_one_that_some_lack_is_not():
    run = lambda arm, rate, seed: of_right(50, 20) | (dict(score=rate) if arm == 'a' else {})
    grids = dict.fromkeys('ab', GRID)
    with pytest.raises(KeyError, match="no 'scor'"):
        search(grids, run, [Want(('a', 'b'), 'scor')])
    tried = search(grids, run, [Want(('a', 'b'), 'score')])
    chosen = tried.choices(Want(('a', 'b'), 'score'))['arms']
    assert chosen['a']['rate'] == max(tried.twice('a')) and chosen['b']['value'] is None

def test_a_rate_that_broke_down_in_one_seed_is_not_chosen():
    def run(arm, rate, seed):
        return (dict(error='nan') if rate == 1e-3
                and seed == 10_001 else of_right(50, 40 if rate == 1e-3 else 30))
    tried = search(dict(a=GRID), run, [Want(('a',))])
    assert tried.choices(Want(('a',)))['arms']['a']['rate'] != 1e-3

# ---- after the repeat

ENDS = dict(weak={1e-4: (.1, .1), 1e-3: (.4, .1), 1e-2: (.2, .1)},
            strong={1e-4: (.45, .05), 1e-3: (.7, .2), 1e-2: (.9, .7)},
            other={1e-4: (.9, .1), 1e-3: (.8, .3), 1e-2: (.9, .4)})
THREE = Grid((1e-4, 1e-3, 1e-2))
EQUAL = Want(tuple(ENDS), 'forgetting_matched', False)

def rising(arm, rate, seed):
    "The weak arm learns twice as much with the second seed, so the target rises"
    gain, lost = ENDS[arm][rate]
    gain *= 2 if arm == 'weak' and seed == 10_001 else 1
    return dict(gain=gain, forgetting=lost, path=path((0, 0., 0.), (10, gain, lost)))

def settled(settle, run=rising, wants=(EQUAL, Want(EQUAL.arms)), **more):
    grids = dict.fromkeys(ENDS, THREE)
    how = dict(extend=0, refine=False, again=2, settle=settle)
    return search(grids, run, list(wants), **how | more)

def test_a_target_that_rises_with_the_second_seed_does_not_leave_an_arm_at_its_only_repeated_rate():
    before, after = settled(0), settled(1)
    assert before.choices(EQUAL)['target'] == after.choices(EQUAL)['target'] == pytest.approx(.57)
    assert before.overlooked(EQUAL) == dict(strong=1e-3)
    was, now = (t.choices(EQUAL)['arms']['strong'] for t in (before, after))
    assert (was['rate'], was['value']) == (1e-2, pytest.approx(.7*.57/.9))
    assert (now['rate'], now['value']) == (1e-3, pytest.approx(.2*.57/.7))
    assert after.overlooked(EQUAL) == {}

def test_one_more_rate_with_both_seeds_is_one_more_for_every_arm():
    twice = lambda tried: {a: len(tried.twice(a)) for a in ENDS}
    assert twice(settled(0)) == dict.fromkeys(ENDS, 2)
    assert twice(settled(1)) == dict.fromkeys(ENDS, 3)
    same = lambda arm, rate, seed: rising(arm, rate, 10_000)
    assert twice(settled(2, same)) == dict.fromkeys(ENDS, 2), 'nothing changed, so nothing is run'
    assert twice(settled(2, again=0)) == dict.fromkeys(ENDS, 3), 'on one seed all rates are chosen from'

def test_an_arm_without_the_metric_overlooks_nothing():
    named = lambda arm, rate, seed: rising(arm, rate, seed) | (
        dict(score=gain_of(arm, rate, seed)) if arm != 'other' else {})
    gain_of = lambda arm, rate, seed: 1 - rate if seed == 10_000 else rate
    score = Want(tuple(ENDS), 'score')
    tried = settled(0, named, [score], again=1)
    assert tried.overlooked(score) == {} and tried.choices(score)['arms']['other']['value'] is None

def test_a_rate_that_the_second_seed_shows_to_be_worse_makes_way_for_another():
    "The only repeated rate breaks down with the second seed"
    def run(arm, rate, seed):
        if (rate, seed) == (1e-3, 10_001):
            return dict(error='nan')
        return of_right(50, 40 if rate == 1e-3 else 30)
    gain = Want(('a',))
    tried = lambda n: search(dict(a=THREE), run, [gain], extend=0, refine=False, again=1, settle=n)
    assert tried(0).choices(gain)['arms']['a']['value'] is None
    assert tried(0).overlooked(gain) == dict(a=1e-4)
    assert tried(1).choices(gain)['arms']['a']['rate'] == 1e-4

def test_a_rate_as_good_as_the_choice_and_worse_than_the_best_is_not_overlooked():
    rates = (.000316, .001, .00316, .01)
    wrong = dict(zip(rates, ({*range(60, 80), *range(40, 50)}, {*range(23, 39)}, {*range(10, 23)},
                             {*range(10)})))
    def run(arm, rate, seed):
        right = [int(i not in wrong[rate]) for i in range(100)]
        return dict(gain=sum(right)/100, items=dict(gain=right))
    gain = Want(('a',))
    tried = search(dict(a=Grid(rates)), run, [gain], extend=0, refine=False, again=2, settle=0)
    choice = tried.choices(gain)['arms']['a']
    assert choice['rate'] < choice['best'] and tried.overlooked(gain) == {}
    assert search(dict(a=Grid(rates)), run, [gain], extend=0, refine=False, again=0).choices(
        gain)['arms']['a']['rate'] == choice['rate'], 'all rates on one seed agree'

def test_rates_that_share_no_seed_overlook_nothing():
    one = of_right(10, 5)
    assert Tried({}, dict(a={1.: {0: one, 1: one}, 2.: {5: one}})).overlooked(Want(('a',))) == {}

@pytest.mark.parametrize('seed', range(40))
def test_whatever_the_second_seed_shows_the_effort_stays_equal_and_bounded(seed):
    rng = random.Random(seed)
    ends = {(a, s): rng.uniform(.3, 1) for a in ENDS for s in (10_000, 10_001)}
    log = []
    def run(arm, rate, seed):
        log.append((arm, rate, seed))
        noise = random.Random(f'{seed} {arm} {rate}')
        gain = ends[arm, seed]*noise.uniform(.5, 1)
        lost = noise.uniform(0, 1)
        return dict(gain=gain, forgetting=lost, path=path((0, 0., 0.), (10, gain, lost)))
    wants = [EQUAL, Want(EQUAL.arms)]
    tried = search(dict.fromkeys(ENDS, GRID), run, wants)
    again = {sum(len(o) == 2 for o in of.values()) for of in tried.outcomes.values()}
    assert len(again) == 1 and 3 <= max(again) <= 3 + 2
    assert len(log) == len(set(log)) <= len(ENDS)*(4 + 3 + 2 + 3 + 2)
    assert again == {5} or not any(map(tried.overlooked, wants)), 'what is overlooked has had its rounds'

# ---- what was tried

def test_what_was_tried_can_be_asked_for_any_number_of_arms():
    tried = Tried({}, {n: {1.: {0: of_right(10, k)}} for n, k in dict(a=5, b=2).items()})
    both, alone = tried.choices(Want(('a', 'b'))), tried.choices(Want(('a',)))
    assert both['target'] is None and both['common'] and list(alone['arms']) == ['a']

def test_that_a_seed_ended_early_is_said_of_both():
    early = outcome(.1, .2, [1], [], stopped='validation loss 9.00 after 10 steps')
    assert pooled({0: outcome(.1, .2, [1], []), 1: early})['stopped'] == early['stopped']
    assert pooled(dict.fromkeys((0, 1), outcome(.1, .2, [1], [])))['stopped'] is None
