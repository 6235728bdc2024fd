"""Every verdict follows from its numbers, every evidence belongs to the code that is here,
and one seed of one claim a day comes out again"""
import datetime, json, os, random, re
from pathlib import Path
from statistics import fmean
import pytest
from scipy import stats
from ftlab import papers
import ftlab.instruments.claims as C
from ftlab.core.data import data as as_data
from ftlab.instruments.bench import Bench
from ftlab.instruments.claims import (SENSITIVITY_SEEDS, Experiment, again, carry,
                                      effects_of, explain,
                                      own_code, own_definitions, quickest_seed,
                                      read_result, recipes_of, run_claim, run_claims, run_code,
                                      script_of,
                                      status, supersede,
                                      tuned_part)
from ftlab.instruments.rates import SEEDS
from ftlab.instruments.real import data_folder, lacks_real, real_bench
from ftlab.instruments.runs import papers_code
from ftlab.instruments.verdicts import (EDITION, arms_said, check_reviewed, contrast,
                                        ahead, bar_of, contrast_verdict, hangs, judged,
                                        lacks_room, read_claim, room, verdict)

CLAIMS = papers.claims() + papers.real_claims()
DONE = [c for c in CLAIMS if c.result.exists() and read_result(c).get('edition') == EDITION]
EARLIER = [p for c in papers.claims() for p in sorted(c.path.parent.glob('result*.json'))
           if json.loads(p.read_text()).get('edition') != EDITION]
named = lambda cs: dict(argvalues=cs, ids=[c.parent.name if isinstance(c, Path) else c.name
                                           for c in cs])

# ---------- what is committed

@pytest.mark.parametrize('claim', **named(DONE))
def test_the_verdict_follows_from_the_numbers(claim):
    r = read_result(claim)
    assert (r['verdict'], r['reason']) == judged(r) and r['sentence'] == claim.spec['sentence']
    assert r['seeds'] == claim.spec['seeds'] and r['scope'] == claim.spec['scope']
    said = [(c['name'], c['kind'], c['margin'], c['primary']) for c in r['contrasts']]
    assert said == [(c['name'], c['kind'], bar_of(c), c.get('primary', False))
                    for c in claim.spec.get('contrast', ())], 'the contrasts are not those of the file'
    for c in r['contrasts']:
        assert len(c['treatment']) == len(c['baseline']) in (0, len(r['seeds'])) and 'trivial' in c
    check_reviewed(claim)

@pytest.mark.parametrize('claim', **named(DONE))
def test_the_numbers_follow_from_the_cells(claim):
    "No treatment or baseline was typed in: each is a number of a run, or read off its path"
    r = read_result(claim)
    for row, want in zip(r['contrasts'], claim.spec.get('contrast', ())):
        for side in ('treatment', 'baseline'):
            for i, seed in enumerate(r['seeds'] if row[side] else ()):
                if not isinstance(want[side], str):
                    assert row[side][i] == want[side]
                    continue
                rate = row['rates'].get(want[side])
                name = want[side] if rate is None else f'{want[side]}@{rate:g}'
                cell = r['cells'][str(seed)].get(name) or r['cells'][str(seed)][f'{want[side]}@{row["name"]}']
                if want['metric'] in cell and not cell.get('error'):
                    assert row[side][i] == pytest.approx(cell[want['metric']], abs=1e-5)

LONG = [c for c in DONE if read_result(c)['scope'] == 'lab' and read_result(c)['seconds'] > 30*60]

@pytest.mark.parametrize('claim', **named(LONG))
def test_a_claim_of_more_than_half_an_hour_says_why(claim):
    r = read_result(claim)
    said = re.search(r'^Cost: (\d+) CPU-minutes(?:, (\d+) runs)?(?:, (\d+) of them read)?',
                     claim.spec['why'], re.M)
    assert said, (f"{claim.file}: its runs took {r['seconds']/60:.0f} CPU-minutes; say in `why` what for, in a line "
                  "that begins with 'Cost: <minutes> CPU-minutes'")
    minutes, runs, taken = (int(x) if x else None for x in said.groups())
    shared = r.get('shared') or {}
    assert minutes == round(r['seconds']/60)
    assert runs in (None, sum(shared.get(k, 0) for k in ('made', 'taken')))
    assert taken in (None, shared.get('taken'))

@pytest.mark.parametrize('claim', **named(DONE))
def test_the_evidence_belongs_to_this_code(claim):
    state = status(claim)
    assert state not in ('stale', 'old hash'), (
        f'the code of {claim.key} or its experiment changed after its run; run: ftlab claims carry {claim.key}')

@pytest.mark.parametrize('claim', **named(CLAIMS))
def test_a_claim_can_be_run(claim):
    own_code(claim)
    if claim.edition == EDITION:
        recipes_of(claim)
        if claim.script:
            script = script_of(claim)
            assert any(callable(getattr(script, n, None)) for n in ('run', 'derive', 'identities'))

@pytest.mark.parametrize('path', **named(EARLIER))
def test_a_verdict_of_the_first_edition_still_follows_from_its_numbers(path):
    r = json.loads(path.read_text())
    assert r['verdict'] == verdict(r)

def test_the_index_names_what_can_be_imported():
    entries, known, root = papers.index(), papers.catalogue(), Path(papers.claims_folder()).parent
    assert len({e['title'] for e in entries}) == len({e['key'] for e in entries}) == len(entries)
    for e in entries:
        assert (root/e['notebook']).exists() and e['symbols'] and e['source']
        mark = {k: e[k] for k in ('key', 'family', 'title', 'arxiv', 'home')}
        assert mark.items() <= known[e['key']].items(), 'the mark is not what the catalogue says'
        for s in e['symbols']:
            module, _, name = s.rpartition('.')
            assert getattr(__import__(module, fromlist=[name]), name).paper.title == e['title']

@pytest.mark.skipif(not DONE, reason='no claim of this edition has been run')
def test_one_seed_of_one_claim_comes_out_again():
    """Another claim each day, and another seed: on weekdays of those whose seeds took less than half
    a minute, at weekends less than two; what takes longer is left to `make claims`"""
    rotate, today = os.environ.get('FTLAB_ROTATE'), datetime.date.today()
    most = 120 if rotate or today.weekday() >= 5 else 30
    quick = [c for c in DONE if (r := read_result(c))['seed_seconds']
             and max(r['seed_seconds'].values()) < most]
    if not quick:
        pytest.skip(f'every claim takes more than {most} seconds a seed')
    rng = random.Random(rotate or today.isoformat())
    claim = rng.choice(quick)
    seed = rng.choice(claim.spec['seeds'])
    found = again(claim.key, seed)
    print(claim.key, seed, found)
    assert all(f['same'] for f in found), f'{claim.key}, seed {seed}: {found}'

# ---------- the rule

def test_the_rule_is_the_paired_t_interval():
    rng = random.Random(0)
    for _ in range(200):
        t, b, m = ([rng.gauss(.1, .1) for _ in range(5)], [rng.gauss(0, .05) for _ in range(5)],
                   rng.choice([0, .02, .1]))
        c = dict(name='', treatment=t, baseline=b, margin=m)
        d = [x - y for x, y in zip(t, b)]
        low, high = stats.ttest_rel(t, b).confidence_interval(.95)
        assert contrast(c | dict(kind='superiority'))['verdict'] == (
            'holds' if low > m else 'fails' if high < m else 'unclear')
        low, high = stats.ttest_rel(t, b).confidence_interval(.90)
        assert contrast(c | dict(kind='equivalence'))['verdict'] == (
            'holds' if -m < low and high < m else 'fails' if low > m or high < -m else 'unclear')
        tost = max(stats.ttest_1samp(d, -m, alternative='greater').pvalue,
                   stats.ttest_1samp(d, m, alternative='less').pvalue) # two one-sided tests at 5%
        assert (contrast(c | dict(kind='equivalence'))['verdict'] == 'holds') == (tost < .05)

def test_lower_is_better_turns_the_effect_round():
    c = dict(name='', kind='superiority', margin=.05, treatment=[.1, .11, .12, .1, .09],
             baseline=[.3, .31, .29, .3, .33])
    assert contrast(c | dict(higher_is_better=False))['verdict'] == 'holds' and contrast(c)['verdict'] == 'fails'

def test_on_par_is_superiority_to_minus_the_margin_with_either_sign_of_the_margin():
    levels = dict(treatment=[.1, .11, .12, .1, .09], baseline=[.13, .12, .15, .13, .12],
                  tuning=dict(treatment=.1, baseline=.13, trivial=0.))
    above, half = effects() | levels | dict(margin=-.05), dict(name='half', effects=[-.1])
    par, signed = (above | dict(kind='noninferiority', margin=m, worse=half) for m in (.05, -.05))
    assert contrast(par) == contrast(signed) == contrast(above)
    assert judged(dict(contrasts=[par]))[0] == 'holds'
    for more in ({}, dict(worse=half | dict(effects=[-.02])),
                 dict(tuning=dict(levels['tuning'], trivial=.1))):
        assert judged(dict(contrasts=[par | more])) == judged(dict(contrasts=[signed | more]))

def test_four_seeds_or_a_missing_number_give_no_verdict():
    c = dict(name='few', kind='superiority', margin=0, treatment=[1.]*4, baseline=[0.]*4)
    with pytest.raises(ValueError, match='few: there are 4 seeds'):
        contrast(c)
    with pytest.raises(ValueError, match='one number for each seed'):
        contrast(c | dict(treatment=[1., 1, 1, 1, None], baseline=[0.]*5))

def test_a_broken_identity_gives_no_verdict_at_all():
    with pytest.raises(ValueError, match='frozen stays'):
        verdict(dict(contrasts=[], identities=[dict(name='frozen stays', passed=False)]))

def effects(*e, **more):
    "A contrast against nothing, as it stands in a result"
    full = dict(name='c', kind='superiority', margin=.1, metric='m', primary=True, common=True,
                best=1.,
                trivial=dict(name='change nothing', values=[0.]*5), sensitivity=[],
                tuning=dict(treatment=.4, baseline=.2, trivial=0.))
    return full | dict(treatment=list(e), baseline=[.2]*len(e)) | more

GOOD, BAD = effects(.5, .52, .48, .51, .5), effects(.21, .22, .2, .19, .2)

def test_room_is_read_at_both_ends():
    up = dict(kind='superiority', margin=.05, best=1., trivial=dict(name='nothing'))
    assert lacks_room(up, .8, .6, .1) == '' and 'best possible' in lacks_room(up, .98, .95, .1)
    assert 'trivial alternative' in lacks_room(up, .12, .10, .1)
    down = up | dict(best=0., higher_is_better=False)
    assert lacks_room(down, .2, .3, .5) == '' and 'best possible' in lacks_room(down, .01, .05, .5)
    assert 'trivial' in lacks_room(down, .48, .49, .5)
    same = up | dict(kind='equivalence')
    assert lacks_room(same, .3, .3, .1) == '' and 'two margins' in lacks_room(same, .3, .15, .1)

@pytest.mark.parametrize('change, says', [
    (dict(tuning=dict(treatment=.99, baseline=.95, trivial=0.)), 'no room: on the tuning seeds'),
    (dict(treatment=[.93]*5, baseline=[.95]*5), 'no room: on the test seeds'),
    (dict(trivial=dict(name='keep one', values=[.49]*5)), 'no room: on the test seeds'),
    (dict(common=False), 'no common gain'),
    (dict(sensitivity=[dict(arm='a', rate=2., chosen=1., effects=[.02, .05])]), 'hangs on the rate: with a at 2')])
def test_each_reason_why_an_experiment_could_not_tell(change, says):
    assert judged(dict(contrasts=[GOOD])) == ('holds', '') and judged(dict(contrasts=[BAD]))[0] == 'fails'
    v, why = judged(dict(contrasts=[GOOD | change]))
    assert v == 'unclear' and why.startswith(says)

def test_sameness_needs_an_arm_that_is_told_apart():
    same = effects(.21, .2, .19, .2, .2, kind='equivalence',
                   tuning=dict(treatment=.3, baseline=.3, trivial=0.))
    worse = lambda *e: dict(worse=dict(name='half of the steps', effects=list(e)))
    assert judged(dict(contrasts=[same | worse(-.3, -.2)]))[0] == 'holds'
    assert judged(dict(contrasts=[same | worse(-.05, .02)])) == (
        'unclear', 'no room: half of the steps also lies within the margin (-0.015)')
    other_rate = same | worse(-.3) | dict(
        sensitivity=[dict(arm='a', rate=2., chosen=1., effects=[.3, .1])])
    assert 'hangs on the rate' in judged(dict(contrasts=[other_rate]))[1]

def test_a_worse_rate_of_the_arm_that_is_ahead_saves_no_claim():
    moved = lambda arm, *e: dict(sensitivity=[dict(arm=arm, rate=2., chosen=1., effects=list(e))])
    bad = BAD | dict(arms=['a', 'b'])
    assert judged(dict(contrasts=[bad | moved('b', .9, .9)])) == ('fails', '')
    assert 'with a at 2' in judged(dict(contrasts=[bad | moved('a', .9, .9)]))[1]
    good = GOOD | dict(arms=['a', 'b'])
    assert 'with b at 2' in judged(dict(contrasts=[good | moved('b', -.9, -.9)]))[1]
    same = dict(kind='equivalence', margin=.1, arms=['a', 'b'])
    assert ahead(effects(*[.5]*4, .51) | same) == 'a' and ahead(effects(*[-.5]*4, -.51) | same) == 'b'
    assert ahead(effects(*[.2]*4, .21) | same) is None

def test_a_rate_that_never_reaches_the_target_is_no_alternative_and_an_unclear_one_does_not_hang():
    assert hangs(GOOD | dict(sensitivity=[dict(arm='a', rate=2., chosen=1., effects=[])])) == ''
    open_ = effects(.2, .5, .1, .45, .3,
                    sensitivity=[dict(arm='a', rate=2., chosen=1., effects=[.5, .5])])
    assert contrast_verdict(open_) == ('unclear', '')

def test_the_primary_contrasts_alone_decide_and_a_control_turns_all():
    shown = BAD | dict(primary=False)
    assert (judged(dict(contrasts=[GOOD, shown]))[0] == 'holds'
            and judged(dict(contrasts=[GOOD, BAD]))[0] == 'fails')
    assert judged(dict(contrasts=[GOOD, BAD], controls_ok=False)) == ('unclear', 'a control failed')

def near_the_best(treatment, baseline, **more):
    "A contrast whose baseline is near the best value, 1"
    c = effects(*treatment, baseline=list(baseline), margin=.05, arms=['a', 'b'])
    return c | dict(tuning=dict(treatment=.66, baseline=.95, trivial=0.)) | more

AHEAD, BEHIND = [.95, .96, .94, .97, .96], [.7, .72, .66, .7, .69]
LEVEL_ELSEWHERE = [dict(arm='a', rate=2., chosen=1., effects=[-.01, 0.])]

def test_near_the_best_value_a_claim_fails_only_if_the_baseline_is_shown_to_be_ahead():
    assert contrast_verdict(near_the_best(BEHIND, AHEAD))[0] == 'fails'
    down = near_the_best([1 - x for x in BEHIND], [1 - x for x in AHEAD], best=0.,
                         higher_is_better=False, trivial=dict(name='change nothing', values=[1.]*5),
                         tuning=dict(treatment=.34, baseline=.05, trivial=1.))
    assert contrast_verdict(down)[0] == 'fails'
    wide = near_the_best([.14, .27, .2, .82, .43], [.91, .8, .86, .75, .2])
    assert contrast_verdict(wide) == ('unclear', ''), 'the interval is the reason, not the room'
    rate = lambda arm, *e: dict(arm=arm, rate=2., chosen=1., effects=list(e))
    rates = [rate('a', -.2, -.3), rate('b', .3, .3), rate('a')]
    assert contrast_verdict(near_the_best(BEHIND, AHEAD, sensitivity=rates))[0] == 'fails'

@pytest.mark.parametrize('c, says', [
    (near_the_best(AHEAD, [.85]*5), 'not shown'),                        # it was behind, and is ahead
    (near_the_best([.97, .84, .93, .80, .93], [.96]*5), 'not shown'),    # noise at the ceiling
    (near_the_best([.95]*5, [.96]*5), 'on the test seeds'),
    (near_the_best(BEHIND, AHEAD, tuning=dict(treatment=.92, baseline=.99, trivial=0.)), 'on the tuning seeds'),
    (near_the_best(BEHIND, AHEAD, sensitivity=LEVEL_ELSEWHERE), 'not shown'),
    (near_the_best(BEHIND, [1.]*5, broken=5), 'broke down'),
    (near_the_best(BEHIND, AHEAD, tuning=dict(treatment=.66, baseline=1., trivial=0., broken=2)), 'broke down')])
def test_near_the_best_value_nothing_holds_and_noise_does_not_fail(c, says):
    v, why = contrast_verdict(c)
    assert v == 'unclear' and why.startswith('no room') and says in why

def test_of_two_contrasts_one_without_room_leaves_both_unrun():
    unrun = GOOD | dict(treatment=[], baseline=[])
    full = unrun | dict(tuning=dict(treatment=.99, baseline=.95, trivial=0.))
    assert room(unrun) == '' and contrast_verdict(unrun)[0] == 'unclear'
    v, why = judged(dict(contrasts=[unrun, full]))
    assert v == 'unclear' and 'no room' in why

def path(*points, **more):
    "An outcome that was evaluated on the way: (gain, forgetting) pairs"
    return dict(path=[dict(step=i, gain=g, forgetting=f) for i, (g, f) in enumerate(points)],
                gain=points[-1][0], forgetting=points[-1][1], **more)

def test_other_rates_are_read_where_both_arms_have_gained_as_much():
    c = dict(treatment='a', baseline='b', metric='forgetting_matched', higher_is_better=False,
             worst=1., best=0.)
    fast, slow = path((0., 0.), (.4, .2), (.8, .4)), path((0., 0.), (.4, .3), (.6, .6))
    same = effects_of(c, [dict(a=fast, b=fast)], .8)
    assert same == dict(effects=[0.])
    short = effects_of(c, [dict(a=fast, b=slow), dict(a=fast, b=fast)], .8)
    assert short['gains'] == [.6, .8] and short['effects'] == pytest.approx([.3, 0.])
    none = effects_of(c, [dict(a=fast, b=path((0., 0.), (.3, .1)))], .8)
    assert none == dict(effects=[], why='does not reach half of the target gain')
    broken = effects_of(c, [dict(a=dict(error='NaN'), b=fast)], .8)
    assert broken['effects'] == pytest.approx([-.6]), 'a run that breaks down counts against the claim'
    plain = effects_of(c | dict(metric='gain', higher_is_better=True), [dict(a=fast, b=slow)], None)
    assert plain['effects'] == pytest.approx([.2])

# ---------- the machine

REVIEW = """
[review]
objections = [{objection = "a", answer = "b", changed = "c"}, {objection = "d", answer = "e"},
              {objection = "a", answer = "b"}]
"""
WORDS = """edition = 2
paper_says = "p"
where = "abstract"
sentence = "s"
scope = "lab"
why = "w"
differs = ["d"]
left_out = ["l"]
seeds = [0, 1, 2, 3, 4]
steps = 4
"""
SPEC = WORDS + """model = "lab-s"
data = "new-procedure"
batch_size = 4
items = 6
old_items = 2
validation_items = 6
evaluations = 1
grid = [1e-3, 3.16e-3]
fixed = "two rates, to be quick"
[arms]
hft = "hft"
full = "full"
[[contrast]]
name = "c"
primary = true
treatment = "hft"
baseline = "full"
metric = "nll"
higher_is_better = false
kind = "superiority"
margin = 0.01
best = -100.0
trivial = {name = "nothing", value = 100.0}
[[control]]
name = "it ran"
arm = "full"
metric = "gain"
at_least = -1.0
""" + REVIEW
SCRIPTED = WORDS + """grid = [1.0, 3.16, 10.0, 31.6]
arms = {a = {grid = [1.0, 3.16, 10.0, 31.6]}, b = {grid = [1.0, 3.16, 10.0, 31.6]}, base = {}}
[[contrast]]
name = "c"
primary = true
treatment = "a"
baseline = "b"
metric = "m"
kind = "superiority"
margin = 0.1
best = 2.0
worst = -1.0
trivial = {name = "base", arm = "base"}
""" + REVIEW
SCRIPT = """import math
def run(arm, rate, seed, split, steps):
    if arm == 'base':
        return dict(m=0.)
    near = abs(math.log10(rate/5))
    level = dict(a=.9, b=.4)[arm] - .1*near + seed%5/100 + steps/1000
    return dict(m=level, items=dict(m=[level]*20), excluded={'said nothing': seed%3})
def identities():
    return {'one is one': 1 == 1}
"""

ENOUGH = SPEC.replace('\nitems = 6\n', '\nitems = 1000\n')

def claim_at(tmp_path, text=SCRIPTED, script=SCRIPT):
    folder = tmp_path/'hft'
    folder.mkdir(exist_ok=True)
    (folder/'claim.toml').write_text(text)
    if script and 'model = ' not in text:
        (folder/'claim.py').write_text(script)
    return read_claim(folder)

@pytest.fixture
def runs(tmp_path, monkeypatch):
    "A workplace of its own, two old skills instead of all, claims of a handful of questions and 200 rows"
    monkeypatch.setattr('ftlab.instruments.verdicts.ITEMS',
                        dict(least=1, small_margin=.02, for_small=1))
    monkeypatch.setenv('FTLAB_RUNS', str(tmp_path/'runs'))
    monkeypatch.setattr('ftlab.evaluators.old_sets.old_skills', lambda data, tok=None: ['add', 'reverse'])
    few = lambda source, **how: as_data(source, **dict(n=200) | how)
    monkeypatch.setattr('ftlab.instruments.bench.as_data', few)
    return tmp_path

CONTROL = '[[control]]\nname = "k"\narm = "{arm}"\nmetric = "m"\nat_least = 0.2\n[review]'

@pytest.mark.parametrize('arm, more, level', [
    ('alone', '', .3), # an arm that no contrast names
    ('gap', 'def derive(found):\n    return dict(gap=dict(m=found["alone"]["m"] - found["base"]["m"]))\n', .3)])
def test_a_control_runs_its_arm_though_no_contrast_does(runs, arm, more, level):
    text = SCRIPTED.replace('base = {}',
                            'base = {}, alone = {}').replace('[review]', CONTROL.format(arm=arm))
    script = SCRIPT.replace("    near =", "    if arm == 'alone':\n        return dict(m=.3)\n    near =") + more
    r = run_claim(claim_at(runs, text, script))
    assert [c['values'] for c in r['controls']] == [[level]*5] and r['controls_ok']

def test_what_is_made_of_other_arms_is_made_only_where_it_is_asked_for(runs):
    "A contrast of two arms runs these two, and asks nothing of the others"
    more = 'def derive(found):\n    return dict(gap=dict(m=found["nobody"]["m"]))\n'
    assert run_claim(claim_at(runs, SCRIPTED, SCRIPT + more))['verdict'] in ('holds', 'unclear', 'fails')

def test_a_claim_of_recipes_runs_and_goes_on_where_it_stopped(runs, monkeypatch):
    claim, said = claim_at(runs, SPEC), []
    r = run_claim(claim, said.append)
    assert set(r) >= {'contrasts', 'controls_ok', 'room_ok', 'rate_ok', 'identities', 'seeds',
                      'verdict', 'reason', 'scope',
                      'also_seen', 'excluded', 'code', 'core', 'edition', 'versions', 'seconds',
                      'seed_seconds', 'shared', 'cells'}
    assert json.loads(claim.result.read_text()) == json.loads(json.dumps(r)) and status(claim) == 'current'
    row, = r['contrasts']
    assert (len(row['treatment']) == 5 and set(row['rates']) == {'hft', 'full'}
            and r['verdict'] == verdict(r))
    assert ({t['arm'] for t in row['sensitivity']} == {'hft', 'full'}
            and len(row['sensitivity']) == 4)
    assert all(len(t['effects']) == 2 and 1.7 < max(t['rate']/t['chosen'],
                                                    t['chosen']/t['rate']) < 1.8
               for t in row['sensitivity'])
    assert len(row['half']['effects']) == 2 and r['controls'][0]['ok']
    kept = [json.loads(p.read_text()) for p in (runs/'runs'/'outcomes').glob('*.json')]
    assert {x['seed'] for x in kept if x['split'] == 'validation'} == set(SEEDS)
    assert {x['seed'] for x in kept if x['split'] == 'test'} == {0, 1, 2, 3, 4, *SENSITIVITY_SEEDS}
    claim.result.unlink()
    monkeypatch.setattr('ftlab.instruments.bench.fit', lambda *a, **k: pytest.fail('a finished run was made again'))
    other = claim_at(runs, SPEC.replace('name = "c"', 'name = "another"'))
    again_ = run_claim(other)
    assert again_['shared']['made'] == 0 and again_['shared']['taken'] == r['shared']['made'] + r['shared']['taken']
    assert again_['contrasts'][0]['treatment'] == row['treatment'], 'two claims that share runs give the same numbers'

REAL = (SPEC.replace('scope = "lab"', 'scope = "real"')
        .replace('model = "lab-s"', 'model = "SmolLM2-135M-Instruct"')
        .replace('data = "new-procedure"', 'data = "banking77-30"'))

def real_claim_at(tmp_path, text=REAL):
    (tmp_path/'hft').mkdir(exist_ok=True)
    (tmp_path/'hft'/'real.toml').write_text(text)
    return read_claim(tmp_path/'hft', 'real.toml')

def test_a_claim_about_a_real_model_has_one_tuning_seed_and_the_rates_of_its_file(runs, monkeypatch):
    "A run takes minutes there, so nothing is refined, and sensitivity is read where every rate was run"
    few = dict(least=1, small_margin=.02, for_small=1, real=1)
    monkeypatch.setattr('ftlab.instruments.verdicts.ITEMS', few)
    monkeypatch.setattr('ftlab.instruments.claims.real_bench', lambda model, task, **how: Bench(
        'lab-s', 'new-procedure', progress=False, **how))
    claim = real_claim_at(runs)
    assert (claim.name, claim.slug, claim.result.name) == ('hft/real', 'hft-real', 'real.json')
    r = run_claim(claim)
    row, = r['contrasts']
    assert r['claim'] == 'hft/real' and json.loads(claim.result.read_text())['scope'] == 'real'
    assert len(row['treatment']) == 5 and 'half' not in row and r['verdict'] == verdict(r)
    kept = [json.loads(p.read_text()) for p in (runs/'runs'/'outcomes').glob('*.json')]
    grid = {rate for arm in claim.spec['arms'] for rate in Experiment(claim).grids[arm].values}
    assert {x['seed'] for x in kept if x['split'] == 'validation'} == {SEEDS[0]}
    assert {x['seed'] for x in kept if x['split'] == 'test'} == {0, 1, 2, 3, 4}
    around = {t['rate'] for t in row['sensitivity']}
    assert {x['rate'] for x in kept} == grid | around and not around & grid
    assert all(len(t['effects']) == 1 for t in row['sensitivity'])

@pytest.mark.parametrize('text, says', [
    (REAL.replace('scope = "real"', 'scope = "lab"'), "hft/real.toml: scope is 'lab'; it must be real in real.toml"),
    (REAL.replace('"superiority"', '"noninferiority"').replace('items = 6', 'items = 150', 1),
     'needs worse: an arm that is known to be worse'),
    (REAL.replace('items = 6', 'items = 149'), 'items is 149; it must be at least 150')])
def test_what_is_wrong_in_a_real_claim_is_named(tmp_path, text, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        real_claim_at(tmp_path, text)

def test_a_machine_without_the_real_model_or_its_data_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv('FTLAB_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"train.csv' is missing; it is from PolyAI-LDN"):
        data_folder()
    monkeypatch.delenv('FTLAB_DATA')
    assert lacks_real()
    said = []
    monkeypatch.setattr('ftlab.instruments.claims._run_one', lambda key: 'holds')
    run_claims(say=said.append)
    assert said[0].startswith('without the claims about a real model: ')
    assert not any('/real' in s for s in said)
    with pytest.raises(ValueError, match="data 'other'; a claim about a real model has"):
        real_bench('SmolLM2-135M-Instruct', 'other')

def test_a_script_claim_end_to_end(runs):
    said = []
    r = run_claim(claim_at(runs), said.append)
    row, = r['contrasts']
    assert (r['verdict'], r['reason'], r['controls_ok'], r['room_ok'], r['rate_ok']) == ('holds', '', True, True, True)
    assert row['rates'] == dict(a=5.62, b=5.62, base=None) and fmean(row['treatment']) > fmean(row['baseline'])
    assert r['excluded']['a@5.62'] == {'said nothing': [0, 1, 2, 0, 1]} and r['identities'][0]['passed']
    assert row['trivial']['values'] == [0.]*5 and row['half']['effects'] == pytest.approx(
        [x - y for x, y in zip([.5]*2, [0.]*2)], abs=.01)
    assert sum('seed' in s and 'done' in s for s in said) == 5

LESS = 'dict(a=.9, b=.9, less=.2)'

BROKEN = '    if {}:\n        raise FloatingPointError("NaN")\n    near'
IN_TEST = 'arm == "less" and split == "test"'

@pytest.mark.parametrize('kind', ['noninferiority', 'equivalence', 'equivalence without best'])
@pytest.mark.parametrize('breaks, verdict', [('False', 'holds'), (IN_TEST, 'unclear')])
def test_an_arm_that_is_known_to_be_worse_and_breaks_down_shows_nothing(runs, kind, breaks, verdict):
    text = SCRIPTED.replace('"superiority"', f'"{kind.split()[0]}"').replace(
        'metric = "m"', 'metric = "m"\nworse = "less"').replace(
        'base = {}', 'less = {grid = [1.0, 3.16, 10.0, 31.6]}, base = {}')
    text = text.replace('best = 2.0\n', '') if 'without' in kind else text
    script = SCRIPT.replace('dict(a=.9, b=.4)', LESS).replace('    near', BROKEN.format(breaks))
    r = run_claim(claim_at(runs, text, script))
    assert r['verdict'] == verdict
    assert ('less also lies within the margin' in r['reason']) == (verdict == 'unclear')

TRIVIAL = SCRIPTED.replace('base = {}', 'less = {grid = [1.0, 3.16, 10.0, 31.6]}').replace(
    'trivial = {name = "base", arm = "base"}', 'trivial = {name = "less", arm = "less"}')

@pytest.mark.parametrize('kind', ['superiority', 'equivalence without best'])
@pytest.mark.parametrize('breaks, verdict', [('False', 'holds'), (IN_TEST, 'unclear')])
def test_a_trivial_alternative_that_breaks_down_shows_no_room(runs, kind, breaks, verdict):
    text, levels = TRIVIAL, 'dict(a=.9, b=.4, less=.2)'
    if 'without' in kind:
        text = text.replace('"superiority"', '"equivalence"').replace('best = 2.0\n', '').replace(
            'metric = "m"', 'metric = "m"\nworse = "less"')
        levels = LESS
    script = SCRIPT.replace('dict(a=.9, b=.4)', levels).replace('    near', BROKEN.format(breaks))
    r = run_claim(claim_at(runs, text, script))
    assert r['verdict'] == verdict
    assert ('trivial alternative (less' in r['reason']) == (verdict == 'unclear')

def test_a_trivial_alternative_made_of_an_arm_that_breaks_down_does_not_stop_the_claim(runs):
    text = TRIVIAL.replace('less = {grid = [1.0, 3.16, 10.0, 31.6]}', 'base = {}')
    script = SCRIPT.replace('    near', BROKEN.format('arm == "b" and split == "test"')) + (
        'def derive(found):\n    return dict(less=dict(m=.2))\n')
    r = run_claim(claim_at(runs, text, script))
    assert r['verdict'] == 'unclear' and r['contrasts'][0]['trivial']['values'] == [2.]*5

def test_a_trivial_alternative_is_at_its_best_rate(runs):
    "Not at one of its lowest, though no contrast compares it by a gain"
    script = SCRIPT.replace('dict(a=.9, b=.4)', 'dict(a=.9, b=.4, less=.2)').replace(
        'rate/5', '(rate/31.6 if arm == "less" else rate/5)')
    row, = run_claim(claim_at(runs, TRIVIAL, script))['contrasts']
    assert row['rates']['less'] == 31.6

def test_an_arm_that_the_script_lacks_stops_the_claim(runs):
    with pytest.raises(KeyError, match='b'):
        run_claim(claim_at(runs, script=SCRIPT.replace('dict(a=.9, b=.4)', 'dict(a=.9)')))

def test_a_script_run_is_made_once_and_a_damaged_one_again(runs, monkeypatch):
    log = runs/'log'
    script = SCRIPT.replace('    if arm', (
        f'    open({str(log)!r}, "a").write(f"{{arm}} {{rate}} {{seed}} {{split}} {{steps}}\\n")\n    if arm'))
    first = run_claim(claim_at(runs, script=script))
    lines = log.read_text().splitlines()
    assert len(lines) == len(set(lines)), 'a run was made twice'
    run_claim(claim_at(runs, script=script))
    assert log.read_text().splitlines() == lines
    next((runs/'runs'/'claims').rglob('a-*.json')).write_text('{"m": ')
    with pytest.warns(UserWarning, match='made again'):
        assert run_claim(claim_at(runs, script=script))['contrasts'] == first['contrasts']
    assert len(log.read_text().splitlines()) == len(lines) + 1
    log.unlink()
    run_claim(claim_at(runs, script=script), keep=False)
    lines = log.read_text().splitlines()
    assert len(lines) == len(set(lines)), 'without files, too'

def test_a_part_that_another_library_made_is_made_again(runs, monkeypatch):
    "What a script ran depends on its text, on the library, and on the papers that it names"
    count = lambda: len(list((runs/'runs'/'claims').rglob('a-*.json')))
    first = run_claim(claim_at(runs))
    made = count()
    run_claim(claim_at(runs))
    assert count() == made
    monkeypatch.setattr('ftlab.instruments.claims.library_code', lambda: 'another')
    assert run_claim(claim_at(runs))['contrasts'] == first['contrasts'] and count() == 2*made

@pytest.mark.parametrize('line, module', [
    ('from ftlab.trainers.rl.razor import own_answers', 'ftlab.trainers.rl.razor'), # no method, but of its module
    ('ARM = ftlab.methods.lora()', 'ftlab.adapters.modules.lora'),
    ('ARM = ftlab.methods.get("dft")', 'ftlab.trainers.losses.dft')])
def test_the_papers_that_a_script_names_count_in_its_runs(runs, monkeypatch, line, module):
    plain = run_code(claim_at(runs))
    assert run_code(claim_at(runs)) == plain
    claim = claim_at(runs, script=f'{line}\n{SCRIPT}')
    with_paper = run_code(claim)
    known = papers_code
    monkeypatch.setattr('ftlab.instruments.claims.papers_code',
                        lambda names: {n: h + 'x'*(n == module) for n, h in known(names).items()})
    assert run_code(claim) != with_paper and run_code(claim_at(runs)) == plain

def test_without_room_the_test_seeds_are_not_run(runs):
    log = runs/'log'
    script = SCRIPT.replace('    if arm', f'    open({str(log)!r}, "a").write(f"{{split}}\\n")\n    '
                            'if arm').replace('b=.4', 'b=.95')
    text = SCRIPTED.replace('best = 2.0', 'best = 1.0')
    part, rows = tuned_part(claim_at(runs, text, script))
    assert room(rows[0]) and set(log.read_text().split()) == {'validation'}
    r = run_claim(claim_at(runs, text, script))
    assert (r['verdict'] == 'unclear' and r['reason'].startswith('no room: on the tuning seeds')
            and not r['room_ok'])
    assert set(log.read_text().split()) == {'validation'} and r['contrasts'][0]['treatment'] == []
    assert 'not run' in explain_here(r)

def explain_here(r) -> str:
    from ftlab.instruments.claims import _outcome
    return '\n'.join(_outcome(r))

MATCHED = SCRIPT.replace("return dict(m=level,", """
    path = [dict(step=0, gain=0., m=0.), dict(step=steps, gain=dict(a=.9, b=GAIN)[arm] - .1*near, m=level)]
    return dict(m=level, path=path, gain=path[-1]['gain'],""").replace('    path', '    path', 1)

def test_a_number_at_equal_gain_needs_a_common_gain(runs):
    text = SCRIPTED.replace('metric = "m"',
                            'metric = "m_matched"').replace('name = "base", arm = "base"', 'name = "0", value = 0.0')
    text = text.replace(', base = {}', '')
    none = run_claim(claim_at(runs, text, MATCHED.replace('GAIN', '.3')))
    assert ((none['verdict'], none['reason']) == ('unclear', 'no common gain')
            and none['contrasts'][0]['treatment'] == [])
    r = run_claim(claim_at(runs, text, MATCHED.replace('GAIN', '.8')))
    row = r['contrasts'][0]
    assert row['target'] == pytest.approx(.95*.8, abs=.03) and len(row['treatment']) == 5
    assert r['controls'][-1]['ok'] and 'the same gain' in r['controls'][-1]['name']
    assert row['gains']['treatment'] == pytest.approx([row['target']]*5)

@pytest.mark.parametrize('treatment, baseline, t, b, ok', [
    (.11, .10, .90, .93, True), (.11, .10, .93, .90, False),   # fails: the treatment may have gained less
    (.02, .20, .90, .93, False), (.02, .20, .93, .90, True),   # holds: the baseline may have
    (.11, .10, .92, .93, True)])
def test_an_arm_that_loses_with_an_advantage_has_lost(treatment, baseline, t, b, ok):
    noise = (-.002, -.001, 0, .001, .002)
    row = dict(name='less', kind='superiority', margin=.03, higher_is_better=False, primary=True,
               treatment=[treatment + x for x in noise], baseline=[baseline - x for x in noise],
               gains=dict(treatment=[t]*5, baseline=[b]*5))
    found, = C._same_gain([row])
    assert found['ok'] == ok and found['values'] == [pytest.approx(t - b)]
    strict, = C._same_gain([row | dict(kind='equivalence')])
    assert strict['ok'] == (abs(t - b) < .02)

@pytest.mark.parametrize('claim', DONE, ids=[c.key for c in DONE])
def test_intervals_and_flags_alone_give_the_stated_verdict(claim):
    r = read_result(claim)
    said = {contrast(c)['verdict'] if c['treatment'] else 'unclear' for c in r['contrasts'] if c['primary']}
    v = 'holds' if said == {'holds'} else 'fails' if 'fails' in said else 'unclear'
    clear = r['controls_ok'] and r['room_ok'] and r['rate_ok']
    if not said: # identities alone
        assert r['identities'] and all(i['passed'] for i in r['identities'])
        v, clear = 'checked', True
    assert r['verdict'] == (v if clear else 'unclear')

def test_a_contrast_without_room_leaves_it_unclear_beside_one_that_fails():
    full = GOOD | dict(baseline=[.99]*5, treatment=[1.]*5)
    found, why = judged(dict(contrasts=[full, BAD]))
    assert found == 'unclear' and why.startswith('no room')
    assert judged(dict(contrasts=[GOOD, BAD]))[0] == 'fails'

def test_the_flag_says_whether_the_verdict_hangs_on_the_rate():
    "Flags and contrasts alone must give the stated verdict"
    moved = dict(sensitivity=[dict(arm='a', rate=2., chosen=1., effects=[.02, .05])])
    noisy = effects(.2, .5, .1, .45, .3, **moved)
    assert not C._rate_ok([GOOD | moved]) and C._rate_ok([GOOD]) and C._rate_ok([noisy])
    assert C._rate_ok([GOOD | moved, BAD]) and judged(dict(contrasts=[GOOD | moved, BAD]))[0] == 'fails'

def test_a_verdict_that_hangs_on_the_rate(runs):
    "At any other rate than the chosen one the second arm is as good as the first"
    script = SCRIPT.replace('    return dict(m=level', "    if split == 'test' and arm == 'b' and "
                            "seed >= 20000 and rate > 8:\n        level = .95\n    return dict(m=level")
    r = run_claim(claim_at(runs, script=script))
    assert (r['verdict'] == 'unclear' and r['reason'].startswith('hangs on the rate: with b at')
            and not r['rate_ok'])
    assert any('with b at' in x for x in r['also_seen'])

def test_what_a_search_overlooks_is_kept_and_said(runs):
    "On the second tuning seed every run breaks down, so more rounds settle nothing"
    script = SCRIPT.replace('    near =', f'    if seed == {SEEDS[1]}:\n        raise OSError\n    near =')
    r = run_claim(claim_at(runs, script=script))
    left = r['contrasts'][0]['overlooked']
    assert set(left) == {'a', 'b'} and all(
        f'c: by the only tuning seed that it ran on, {rate:g} would be the rate of {arm}' in r['also_seen']
        for arm, rate in left.items())
    del r['contrasts'][0]['overlooked'] # of an earlier ftlab
    assert not any('only tuning seed' in x for x in C.also_seen(r))

def test_a_failed_control_and_one_with_a_wrong_name(runs):
    control = '\n[[control]]\nname = "high"\narm = "b"\nmetric = "m"\nat_least = 0.9\n'
    r = run_claim(claim_at(runs, SCRIPTED + control))
    assert (r['verdict'], r['reason'], r['controls_ok']) == ('unclear', 'a control failed', False)
    with pytest.raises(ValueError, match="control 'high': b has no number 'mm'"):
        run_claim(claim_at(runs, (SCRIPTED + control).replace('metric = "m"\nat_least', 'metric = "mm"\nat_least')))

def test_a_control_reads_a_number_of_any_name(runs):
    "'old' alone is how a bench calls its old scores, which are too many to keep"
    r = run_claim(claim_at(runs, SCRIPTED + '\n[[control]]\nname = "low"\narm = "b"\nmetric = "old"\nat_most = 0.1\n',
                           SCRIPT.replace('return dict(m=level', 'return dict(old=.05, m=level')))
    assert r['controls'][0]['ok'] and r['controls'][0]['values'] == 5*[.05]

@pytest.mark.parametrize('arm, value', [('a', -1.), ('b', 2.)])
def test_a_run_that_breaks_down_counts_against_the_claim(runs, arm, value):
    broken = SCRIPT.replace('    near', f"    if seed == 3 and arm == {arm!r}:\n        raise "
                            "RuntimeError('out of memory')\n    near")
    r = run_claim(claim_at(runs, script=broken))
    side = 'treatment' if arm == 'a' else 'baseline'
    assert r['contrasts'][0][side][3] == value and r['verdict'] != 'holds'
    nan = run_claim(claim_at(runs, script=broken.replace("raise RuntimeError('out of memory')",
                                                         "return dict(m=float('nan'))")))
    assert nan['contrasts'][0][side][3] == value
    assert 'm is nan' in nan['cells']['3'][f'{arm}@5.62']['error']

DERIVE = SCRIPT + """
def derive(found):
    return dict(bar=dict(m=.5*found['b']['m']))
"""

def test_an_arm_made_of_others_and_what_becomes_of_it_when_one_breaks_down(runs):
    text = SCRIPTED.replace('baseline = "b"', 'baseline = "bar"')
    row = run_claim(claim_at(runs, text, DERIVE))['contrasts'][0]
    whole = run_claim(claim_at(runs))['contrasts'][0]
    assert row['baseline'] == pytest.approx([.5*x for x in whole['baseline']])
    broken = DERIVE.replace('    near', "    if seed == 3 and arm == 'b':\n        raise RuntimeError('no')\n    near")
    assert run_claim(claim_at(runs, text, broken))['contrasts'][0]['baseline'][3] == 2.
    with pytest.raises(ValueError, match="no arm 'baz'; there are a, b, base, bar"):
        run_claim(claim_at(runs, text.replace('"bar"', '"baz"'), DERIVE))

def test_a_claim_that_nobody_reviewed_is_refused(runs):
    for review in ('', '[review]\nobjections = [{objection = "a", answer = "b"}]',
                   REVIEW.replace('answer = "b"}]', 'answer = ""}]')):
        with pytest.raises(ValueError, match=r'hft/claim.toml: \[review\] needs at least 3 objections'):
            run_claim(claim_at(runs, SCRIPTED.replace(REVIEW, '\n' + review)))
    with pytest.raises(ValueError, match='why is not filled in'):
        run_claim(claim_at(runs, SCRIPTED.replace('why = "w"', 'why = "FILL IN"')))

def test_a_claim_of_the_first_edition_is_read_and_shown_and_not_run(runs):
    claim = claim_at(runs, SCRIPTED.replace('edition = 2\n', ''))
    claim.result.write_text(json.dumps(dict(verdict='holds', contrasts=[])))
    assert claim.edition == 1 and status(claim) == 'first edition'
    with pytest.raises(ValueError, match='written for edition 1 of the rule'):
        run_claim(claim)
    with pytest.raises(ValueError, match='cannot be carried over'):
        carry(claim)

def test_the_page_lists_every_key_of_a_result():
    page = (Path(__file__).parents[1]/'nbs'/'instruments'/'verdicts.ipynb').read_text()
    part = page[page.index('### What a result has'):page.index('## When code changes')]
    listed = set(re.findall(r'`([a-z_]+)`', part))
    for claim in DONE:
        result = read_result(claim)
        keys = set(result).union(*result['contrasts'])
        assert keys <= listed, f'{claim.key}: no line about {sorted(keys - listed)}'


def test_the_committed_claims_of_the_first_edition_are_listed_as_such():
    old = [c for c in CLAIMS if c.edition == 1]
    index = {e['key']: e for e in papers.index()}
    for c in old:
        assert 'earlier rule' in index[c.key]['note'] and 'first edition' in explain(c.key)
        assert run_claims([c.key], say=lambda s: None)[c.key].startswith('not run: ValueError')

def test_a_changed_experiment_is_stale_and_changed_words_are_not(runs):
    code = own_code(claim_at(runs))
    for words in (('why = "w"', 'why = "because"'), ('differs = ["d"]', 'differs = ["e"]'),
                  (REVIEW, '\n')):
        assert own_code(claim_at(runs, SCRIPTED.replace(*words))) == code
    for change in (('margin = 0.1', 'margin = 0.2'), ('sentence = "s"', 'sentence = "t"'), ('steps = 4', 'steps = 5')):
        assert own_code(claim_at(runs, SCRIPTED.replace(*change))) != code
    assert own_code(claim_at(runs, script=SCRIPT.replace('.9', '.8'))) != code

def sources(monkeypatch, **texts):
    "The claim's paper as made-up modules"
    named = {'hft': 'ftlab.adapters.subsets.hft', 'lift': 'ftlab.adapters.subsets.lift',
             'select': 'ftlab.adapters.select'}
    monkeypatch.setattr('ftlab.instruments.claims._source',
                        lambda module: {named[k]: t for k, t in texts.items()}.get(module, ''))

def test_evidence_survives_formatting_and_moving_and_no_change(runs, monkeypatch):
    "The same tree gives the same hash wherever it lies; another tree gives another"
    claim = claim_at(runs)
    whole = ('def shared(x):\n    "Twice"\n    return 2*x\ndef half(x): return shared(x)\n'
             '@paper("t")\ndef hft(): return half(1)')
    sources(monkeypatch, hft=whole)
    code, record = own_code(claim), list(own_definitions(claim))
    assert record == ['half', 'hft', 'shared']
    other = whole.replace('"Twice"\n    return 2*x', '# two\n    return (2 *\n      x)')
    sources(monkeypatch, hft=other.replace('def half(x)', 'def half(x: int) -> int'))
    assert own_code(claim) == code, 'layout, comments and annotations count'
    claim.result.write_text(json.dumps(dict(definitions=record)))
    for home in ('lift', 'select'):  # into another paper, into the library
        there = {'hft': whole.split('def half')[0].replace(
                     'def shared(x):\n    "Twice"\n    return 2*x\n',
                     f'from ftlab.adapters.{"subsets.lift" if home == "lift" else "select"} import shared\n')
                 + 'def half' + whole.split('def half')[1],
                 home: 'def other(): pass\ndef shared(x): return 2*x'}
        sources(monkeypatch, **there)
        assert own_code(claim) == code, f'a move into {home} counts'
        sources(monkeypatch, **there | {home: 'def shared(x): return 3*x'})
        assert own_code(claim) != code, f'a change in {home} does not count'
    sources(monkeypatch, hft=whole.replace('2*x', '3*x'))
    assert own_code(claim) != code

def test_a_script_beside_another_counts_with_it(tmp_path):
    "What a claim takes from another's script belongs to its experiment"
    claim = claim_at(tmp_path, script="DFT = beside('dft')\n" + SCRIPT)
    (tmp_path/'dft').mkdir()
    (tmp_path/'dft'/'claim.toml').write_text(SCRIPTED)
    (tmp_path/'dft'/'claim.py').write_text('STEPS = 60\n' + SCRIPT)
    code = own_code(claim)
    (tmp_path/'dft'/'claim.py').write_text('STEPS = 61\n' + SCRIPT)
    assert own_code(claim) != code

def test_a_seed_that_replays_carries_the_evidence_over(runs):
    before = run_claim(claim_at(runs))
    assert carry(claim_at(runs)) == [], 'current evidence needs no carrying'
    claim = claim_at(runs, script=SCRIPT.replace('a=.9', 'a=.909'))
    assert status(claim) == 'stale'
    seed = quickest_seed(claim)
    seen = carry(claim)
    after = read_result(claim)
    told = after['carried']
    assert (status(claim) == 'current' and [(t['from'], t['to'], t['seed']) for t in told]
            == [(before['code'], own_code(claim), seed)])
    assert (seen[0]['new'] - seen[0]['stored'] == pytest.approx(.009)
            and seen[0]['allowed'] == pytest.approx(.01) and told[0]['differences'] == seen)
    assert {k: after[k] for k in ('contrasts', 'cells', 'verdict')} == {
        k: json.loads(json.dumps(before[k])) for k in ('contrasts', 'cells', 'verdict')}, 'carrying changes no number'

@pytest.mark.parametrize('script, says', [
    (SCRIPT.replace('a=.9', 'a=.92'), 'c was .*0.02 off, allowed 0.01; run it again'),
    (SCRIPT.replace('a=.9', 'a=float("nan")'), 'c was'),
    (SCRIPT.replace('1 == 1', '1 == 2'), 'identity: one is one was')])
def test_a_seed_that_does_not_replay_leaves_it_stale(runs, monkeypatch, script, says):
    run_claim(claim_at(runs))
    claim = claim_at(runs, script=script)
    text = claim.result.read_text()
    for _ in range(2):  # the replay is kept, and what it saw is told again
        with pytest.raises(ValueError, match=f'hft stays stale.*{says}'):
            carry(claim)
        monkeypatch.setattr('ftlab.instruments.claims.replay',
                            lambda *a: pytest.fail('a replay that is kept was made again'))
    assert claim.result.read_text() == text and status(claim) == 'stale'

def test_a_result_whose_runs_were_all_shared_is_carried_by_its_first_seed(runs):
    claim = claim_at(runs)
    result = run_claim(claim)
    claim.result.write_text(json.dumps(dict(result, seed_seconds={})))
    assert quickest_seed(claim) == result['seeds'][0]
    claim.result.write_text(json.dumps(dict(result, seeds=[], seed_seconds={})))
    assert quickest_seed(claim) is None

@pytest.mark.parametrize('new, same', [(-0.06499999999999995, True), (-0.0649, False),
                                       (float('nan'), False)])
def test_a_replay_that_is_just_the_margin_off_agrees(runs, monkeypatch, new, same):
    claim = claim_at(runs)
    run_claim(claim)
    monkeypatch.setattr('ftlab.instruments.claims.named_claim', lambda key: claim)
    found = dict(name='c', margin=.02, stored=-0.08499999999999996, new=new)
    monkeypatch.setattr('ftlab.instruments.claims.replay', lambda *a: [found])
    assert [f['same'] for f in again(claim.key)] == [same]

def test_superseded_evidence_is_not_carried_and_running_again_ends_it(runs):
    claim = claim_at(runs)
    result = run_claim(claim)
    old = {k: v for k, v in result.items() if k not in ('hash', 'definitions')} | dict(code='0'*16)
    claim.result.write_text(json.dumps(old))
    assert status(claim) == 'old hash' and carry(claim) and status(claim) == 'current'
    supersede(claim, 'the row limit was off by one')
    assert status(claim) == 'superseded'
    with pytest.raises(ValueError, match='cannot be carried'):
        carry(claim)
    assert run_claim(claim) and status(claim) == 'current'
    with pytest.raises(ValueError, match='say why'):
        supersede(claim, ' ')

@pytest.mark.parametrize('change, says', [
    (('edition = 2', 'edition = 3'), 'edition is 3; it must be 2'),
    (('seeds = [0, 1, 2, 3, 4]', 'seeds = [0, 1, 2, 3, 3]'), 'five different ones'),
    (('seeds = [0, 1, 2, 3, 4]', 'seeds = [0, 1, 2, 3, 4, 4]'), 'five different ones'),
    (('seeds = [0, 1, 2, 3, 4]', 'seeds = [0, 1, 2, 3, 10000]'), 'below 10000'),
    (('scope = "lab"', 'scope = "moon"'), "scope is 'moon'"),
    (('paper_says = "p"\n', ''), 'paper_says is None'), (('where = "abstract"\n', ''), 'where is None'),
    (('differs = ["d"]\n', ''), 'differs is None'),
    (('left_out = ["l"]\n', ''), 'left_out is None'),
    (('why = "w"', 'y = "w"\nwhy = "w"'), "'y' is no key of a claim"),
    (('metric = "m"', 'metric = "m"\nhigher_is_beter = false'), "'higher_is_beter' is no key of a contrast"),
    (('base = {}', 'base = {gird = [1]}'), "'gird' is no key of an arm"),
    (('arm = "base"', 'arm = "base", vaule = 1'), "'vaule' is no key of a trivial"),
    (('[review]', '[review]\nobjection = []'), "'objection' is no key of a review"),
    (('[review]', '[[control]]\nname = "x"\narm = "a"\nmetric = "m"\natleast = 1\n[review]'),
     "'atleast' is no key of a control"),
    (('[review]', '[[control]]\nname = "x"\narm = "z"\nmetric = "m"\nat_least = 1\n[review]'),
     "control 'x' needs an arm"),
    (('[review]', '[[pilot]]\ntask = "t"\nseed = 1\n[review]'), "'seed' is no key of a pilot"),
    (('treatment = "a"', 'treatment = "lora"'), "treatment is 'lora'"),
    (('kind = "superiority"', 'kind = "better"'), 'noninferiority'),
    (('kind = "superiority"\nmargin = 0.1\nbest = 2.0\n',
      'kind = "noninferiority"\nmargin = 0.1\n'), 'lacks best'),
    (('margin = 0.1\n', ''), 'lacks margin'), (('best = 2.0\n', ''), 'lacks best'),
    (('worst = -1.0\n', ''), 'needs worst'), (('trivial = {name = "base", arm = "base"}\n', ''), 'lacks trivial'),
    (('trivial = {name = "base", arm = "base"}', 'trivial = {name = "base"}'), 'give a name, and a value or an arm'),
    (('trivial = {name = "base", arm = "base"}', 'trivial = {name = "base", arm = "bse"}'),
     "trivial names the arm 'bse'"),
    (('metric = "m"', 'metric = "m"\nworse = "bse"'), "worse names the arm 'bse'"),
    (('primary = true\n', ''), 'primary = true'),
    (('b = {grid = [1.0, 3.16, 10.0, 31.6]}', 'b = {grid = [1.0]}'), '4 for a, 1 for b'),
    ((', base = {}', ', base = {recipe = "full"}'), 'model is None')])
def test_a_wrong_file_is_named_and_mended(tmp_path, change, says):
    assert change[0] in SCRIPTED
    with pytest.raises(ValueError, match=says) as e:
        claim_at(tmp_path, SCRIPTED.replace(*change))
    assert 'hft/claim.toml' in str(e.value)

def test_more_that_a_file_must_say(tmp_path):
    third = SCRIPTED[SCRIPTED.index('[[contrast]]'):SCRIPTED.index('\n[review]')]
    with pytest.raises(ValueError, match='one or two contrasts'):
        claim_at(tmp_path, SCRIPTED.replace('\n[review]', f'\n{third}{third}\n[review]'))
    pilots = ''.join(f'[[pilot]]\ntask = "{i}"\n' for i in range(4))
    with pytest.raises(ValueError, match='more than 3 tasks'):
        claim_at(tmp_path, SCRIPTED.replace('[review]', pilots + '[review]'))
    same = SCRIPTED.replace('kind = "superiority"', 'kind = "equivalence"').replace('steps = 4\n', '')
    with pytest.raises(ValueError, match='needs worse'):
        claim_at(tmp_path, same)
    one = SCRIPTED.replace('[1.0, 3.16, 10.0, 31.6]', '[1.0]')
    with pytest.raises(ValueError, match='fixed with the reason'):
        claim_at(tmp_path, one)
    linear = 'steps = 4\nspacing = "linear"'
    with pytest.raises(ValueError, match='give several values, or fixed with the reason'):
        claim_at(tmp_path, one.replace('steps = 4', linear))
    assert claim_at(tmp_path, SCRIPTED.replace('[1.0, 3.16, 10.0, 31.6]', '[0.0, 0.5]').replace('steps = 4', linear))
    assert arms_said(claim_at(tmp_path, one.replace('steps = 4', 'steps = 4\nfixed = "f"')).spec)['a']['grid'] == (1.,)
    (tmp_path/'hft'/'result.1.json').write_text('{}')
    with pytest.raises(ValueError, match='superseded is missing'):
        claim_at(tmp_path)

def test_the_rates_of_a_claim_are_four_half_decades(tmp_path):
    for grid in ('[1.0, 3.16, 10.0]', '[1.0, 3.0, 10.0, 30.0]', '[1.0, 3.16, 10.0, 100.0]', '[0.0, 1.0, 3.16, 10.0]',
                 '[1.0, 1.0, 3.16, 10.0]', '[1.0, 3.16, 10.0, 31.6, 100.0]'):
        text = SCRIPTED.replace('[1.0, 3.16, 10.0, 31.6]', grid)
        with pytest.raises(ValueError, match='hft/claim.toml: the grid of a is .*; give four values half a') as e:
            claim_at(tmp_path, text)
        assert str(json.loads(grid)) in str(e.value)
        assert claim_at(tmp_path, text.replace('steps = 4', 'steps = 4\nfixed = "the paper names them"'))
    with pytest.raises(ValueError, match='such as .1.0, 3.16, 10.0, 31.6., or fixed'):
        claim_at(tmp_path, SCRIPTED.replace('[1.0, 3.16, 10.0, 31.6]', '[1.0, 2.0, 4.0, 8.0]'))
    with pytest.raises(ValueError, match='give numbers'):
        claim_at(tmp_path, SCRIPTED.replace('[1.0, 3.16, 10.0, 31.6]', '["1.0", 3.16, 10.0, 31.6]'))
    assert claim_at(tmp_path, SCRIPTED.replace('31.6', '31.0')), 'within three percent, whatever the order'
    downwards = '[31.6, 10.0, 3.16, 1.0]'
    assert claim_at(tmp_path, SCRIPTED.replace('[1.0, 3.16, 10.0, 31.6]', downwards))

def test_a_claim_asks_enough_questions(tmp_path):
    ask = lambda items, margin: claim_at(tmp_path, SPEC.replace('\nitems = 6\n', items).replace(
        'margin = 0.01', f'margin = {margin}'), None)
    with pytest.raises(ValueError, match='hft/claim.toml: items is 399; it must be at least 400$'):
        ask('\nitems = 399\n', .03)
    with pytest.raises(ValueError, match="items is 999; .* at least 1000, as contrast 'c' has a margin of 0.02$"):
        ask('\nitems = 999\n', .02)
    with pytest.raises(ValueError, match='items is 400 where the file does not say; it must be at least 1000'):
        ask('\n', .01) # the default
    assert ask('\nitems = 1000\n', .02) and ask('\nitems = 400\n', .021) and ask('\n', .03)
    shown = SPEC.replace('\nitems = 6\n', '\n').replace('margin = 0.01', 'margin = 0.03')
    second = shown[shown.index('[[contrast]]'):shown.index('[[control]]')].replace('0.03', '0.01')
    second = second.replace('primary = true', 'primary = false')
    assert claim_at(tmp_path, shown.replace('[[control]]', second + '[[control]]'), None)

def test_an_unknown_method_is_refused(tmp_path):
    with pytest.raises(ValueError, match="arm 'hft'.*no method is called 'hff'"):
        recipes_of(claim_at(tmp_path, ENOUGH.replace('hft = "hft"', 'hft = "hff"'), None))

def test_outside_a_checkout_there_is_no_evidence(monkeypatch):
    monkeypatch.setattr(papers, 'claims_folder', lambda: None)
    e = papers.index()
    assert e and all(x['verdict'] is None and x['evidence'] is None and 'no claims here' in x['note'] for x in e)
