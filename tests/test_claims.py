"""Every verdict follows from its numbers, every evidence belongs to the code that is here,
and one seed of one claim a day comes out again"""
import datetime, json, os, random
from pathlib import Path
import pytest
from scipy import stats
from ftlab import papers
from ftlab.instruments.claims import (Ground, again, arms_of, carry, own_code, own_definitions,
                                      quickest_seed, run_claim, run_seed, script_of, status,
                                      supersede, train_arm)
from ftlab.instruments.compare import target_gain
from ftlab.methods import get
from ftlab.instruments.verdicts import contrast, read_claim, verdict

CLAIMS = papers.claims()
DONE = [c for c in CLAIMS if c.result.exists()]
named = lambda cs: dict(argvalues=cs, ids=[c.key for c in cs])

# ---------- what is committed

@pytest.mark.parametrize('claim', **named(DONE))
def test_the_verdict_follows_from_the_numbers(claim):
    r = json.loads(claim.result.read_text())
    assert (r['verdict'] == verdict(r) and r['sentence'] == claim.spec['sentence']
            and r['seeds'] == claim.spec['seeds'] and r['scope'] == claim.spec['scope'])
    assert [(c['name'], c['kind'], c['margin']) for c in r['contrasts']] == [
        (c['name'], c['kind'], c['margin'])
        for c in claim.spec.get('contrast', ())], 'the contrasts are not those of the file'
    assert all(len(c['treatment']) == len(c['baseline']) == len(claim.spec['seeds']) for c in r['contrasts'])

@pytest.mark.parametrize('claim', **named(DONE))
def test_the_numbers_follow_from_the_cells(claim):
    "No treatment or baseline was typed in: each is a number of a seed's cell"
    r = json.loads(claim.result.read_text())
    for c, want in zip(r['contrasts'], claim.spec.get('contrast', ())):
        for side in ('treatment', 'baseline'):
            if isinstance(want[side], str):
                assert c[side] == pytest.approx([r['cells'][str(s)][want[side]][want['metric']]
                                                 if 'error' not in r['cells'][str(s)]
                                                 else c[side][i] for i, s in enumerate(r['seeds'])],
                                                abs=1e-5)
            else:
                assert set(c[side]) == {want[side]}

@pytest.mark.parametrize('claim', **named(DONE))
def test_the_evidence_belongs_to_this_code(claim):
    state = status(claim)
    assert state not in ('stale', 'old hash'), (
        f'the code of {claim.key} or its experiment changed after its run; run: ftlab claims carry {claim.key}')

@pytest.mark.parametrize('claim', **named(CLAIMS))
def test_a_claim_can_be_run(claim):
    own_code(claim)
    if not claim.runs and claim.spec.get('contrast'):
        assert arms_of(claim)
    if claim.script:
        script = script_of(claim)
        assert callable(getattr(script, 'run', None) or script.identities)

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

@pytest.mark.skipif(not DONE, reason='no claim has been run')
def test_one_seed_of_one_claim_comes_out_again():
    """Another claim each day, and another seed; those that take more than two minutes a seed are
    left to `make claims`"""
    quick = [c for c in DONE if (r := json.loads(c.result.read_text()))['contrasts']
             and max(r['seed_seconds'].values()) < 120]
    if not quick:
        pytest.skip('every claim takes more than two minutes a seed')
    rng = random.Random(os.environ.get('FTLAB_ROTATE') or datetime.date.today().isoformat())
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

def test_four_seeds_or_a_missing_number_give_no_verdict():
    c = dict(name='few', kind='superiority', margin=0, treatment=[1.]*4, baseline=[0.]*4)
    with pytest.raises(ValueError, match='few: there are 4 seeds'):
        contrast(c)
    with pytest.raises(ValueError, match='one number for each seed'):
        contrast(c | dict(treatment=[1., 1, 1, 1, None], baseline=[0.]*5))

def test_a_broken_identity_gives_no_verdict_at_all():
    with pytest.raises(ValueError, match='frozen stays'):
        verdict(dict(contrasts=[], identities=[dict(name='frozen stays', passed=False)]))

# ---------- the machine

SPEC = '''sentence = "s"
scope = "lab"
why = "w"
model = "lab-s"
data = "sort"
steps = 4
batch_size = 4
items = 6
old_items = 2
validation_items = 20
looks = 2
grid = [1e-3, 2e-3]
seeds = [0, 1, 2, 3, 4]
[arms]
hft = "hft"
full = "full"
[[contrast]]
name = "c"
treatment = "hft"
baseline = "full"
metric = "nll"
higher_is_better = false
kind = "superiority"
margin = 0.5
'''

def claim_at(tmp_path, text=SPEC, script=None):
    folder = tmp_path/'hft'
    folder.mkdir(exist_ok=True)
    (folder/'claim.toml').write_text(text)
    if script:
        (folder/'claim.py').write_text(script)
    return read_claim(folder)

@pytest.fixture
def runs(tmp_path, monkeypatch):
    "A workplace of its own, and two old skills instead of all"
    monkeypatch.setenv('FTLAB_RUNS', str(tmp_path/'runs'))
    monkeypatch.setattr('ftlab.instruments.compare.old_skills', lambda data, tok=None: ['add', 'reverse'])
    return tmp_path

def test_a_claim_runs_and_goes_on_where_it_stopped(runs, monkeypatch):
    claim, said = claim_at(runs), []
    r = run_claim(claim, said.append)
    assert (set(r) >= {'contrasts', 'controls_ok', 'identities', 'seeds', 'verdict', 'scope',
                       'code', 'versions', 'seconds'}
            and json.loads(claim.result.read_text()) == json.loads(json.dumps(r)))
    assert status(claim) == 'current' and sum('seed' in s for s in said) == 5
    assert (r['tuning']['seed'] not in r['seeds']
            and {len(a['tried']) for a in r['tuning']['arms'].values()}
            == {len(r['tuning']['arms']['full']['tried'])})
    claim.result.unlink()
    monkeypatch.setattr('ftlab.instruments.claims.run_seed', lambda *a: pytest.fail('a finished seed was run again'))
    assert run_claim(claim)['contrasts'] == r['contrasts']

def test_a_changed_experiment_is_stale_and_a_changed_why_is_not(runs):
    claim = claim_at(runs)
    code = own_code(claim)
    assert own_code(claim_at(runs, SPEC.replace('why = "w"', 'why = "because"'))) == code
    assert own_code(claim_at(runs, SPEC.replace('margin = 0.5', 'margin = 0.4'))) != code

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
    claim = claim_at(tmp_path, script="DFT = beside('dft')\ndef identities(): return {}")
    (tmp_path/'dft').mkdir()
    (tmp_path/'dft'/'claim.toml').write_text(SPEC)
    (tmp_path/'dft'/'claim.py').write_text('STEPS = 60\ndef identities(): return {}')
    code = own_code(claim)
    (tmp_path/'dft'/'claim.py').write_text('STEPS = 61\ndef identities(): return {}')
    assert own_code(claim) != code

REPLAY = '''sentence = "s"
scope = "lab"
why = "w"
seeds = [0, 1, 2, 3, 4]
arms = {a = "one", b = "other"}
[[contrast]]
name = "c"
treatment = "a"
baseline = "b"
metric = "m"
kind = "superiority"
margin = 0.1
worst = -1.0
'''
SCRIPT = ('def run(seed, tuned): return dict(a=dict(m=.5 + seed/10), b=dict(m=.1))\n'
          'def identities(): return {"one is one": 1 == 1}\n')

def test_a_seed_that_replays_carries_the_evidence_over(runs):
    claim = claim_at(runs, REPLAY, SCRIPT)
    before = run_claim(claim)
    assert (carry(claim) == [] and 'carried' not in json.loads(claim.result.read_text())), (
        'current evidence needs no carrying')
    claim = claim_at(runs, REPLAY, SCRIPT.replace('.5 +', '.509 +'))
    assert status(claim) == 'stale'
    seed = quickest_seed(claim)
    seen = carry(claim)
    after = json.loads(claim.result.read_text())
    told = after['carried']
    assert (status(claim) == 'current' and [(t['from'], t['to'], t['seed']) for t in told]
            == [(before['code'], own_code(claim), seed)])
    assert (seen[0]['new'] - seen[0]['stored'] == pytest.approx(.009)
            and seen[0]['allowed'] == pytest.approx(.01) and told[0]['differences'] == seen)
    assert {k: after[k] for k in ('contrasts', 'cells', 'verdict')} == {
        k: before[k] for k in ('contrasts', 'cells', 'verdict')}, 'carrying changes no number'

@pytest.mark.parametrize('script, says', [
    (SCRIPT.replace('.5 +', '.52 +'), 'c was .*0.02 off, allowed 0.01; run it again'),
    (SCRIPT.replace('.5 +', 'float("nan") +'), 'NaN or infinite'),
    (SCRIPT.replace('1 == 1', '1 == 2'), 'identity: one is one was'),
    ('def run(seed, tuned): raise RuntimeError("out of memory")\n', 'c was')])
def test_a_seed_that_does_not_replay_leaves_it_stale(runs, script, says):
    run_claim(claim_at(runs, REPLAY, SCRIPT))
    claim = claim_at(runs, REPLAY, script)
    text = claim.result.read_text()
    for _ in range(2):  # the replay is kept, and what it saw is told again
        with pytest.raises(ValueError, match=f'hft stays stale.*{says}'):
            carry(claim)
    assert claim.result.read_text() == text and status(claim) == 'stale'

def test_a_failed_replay_is_kept_and_a_changed_package_replays_anew(runs, monkeypatch):
    run_claim(claim_at(runs, REPLAY, SCRIPT))
    claim = claim_at(runs, REPLAY, SCRIPT.replace('.5 +', '.52 +'))
    for _ in range(2):
        with pytest.raises(ValueError, match='stays stale'):
            carry(claim)
        monkeypatch.setattr('ftlab.instruments.claims.replay',
                            lambda *a: pytest.fail('a replay that is kept was made again'))
    monkeypatch.undo()
    monkeypatch.setenv('FTLAB_RUNS', str(runs/'runs'))
    monkeypatch.setattr('ftlab.instruments.claims.core_code', lambda: 'another library')
    monkeypatch.setattr('ftlab.instruments.claims.replay',
                        lambda c, s: [dict(name='c', margin=.1, stored=.4, new=.4)])
    assert carry(claim) and status(claim) == 'current'

def test_evidence_of_the_old_hash_is_carried_and_superseded_evidence_is_not(runs):
    claim = claim_at(runs, REPLAY, SCRIPT)
    result = run_claim(claim)
    claim.result.write_text(
        json.dumps({k: v for k, v in result.items() if k not in ('hash', 'definitions')}
                   | dict(code='0'*16)))
    assert status(claim) == 'old hash' and carry(claim) and status(claim) == 'current'
    supersede(claim, 'the row limit was off by one')
    assert (status(claim) == 'superseded' and json.loads(claim.result.read_text())['superseded']
            == 'the row limit was off by one')
    with pytest.raises(ValueError, match='superseded|cannot be carried'):
        carry(claim)
    assert run_claim(claim) and status(claim) == 'current', 'running again ends it'
    with pytest.raises(ValueError, match='say why'):
        supersede(claim, ' ')

def test_a_margin_of_nothing_allows_rounding_alone(runs):
    run_claim(claim_at(runs, REPLAY.replace('margin = 0.1', 'margin = 0.0'), SCRIPT))
    assert carry(claim_at(runs, REPLAY.replace('margin = 0.1', 'margin = 0.0'), SCRIPT.replace('.5 +', '.5000005 +')))
    claim = claim_at(runs, REPLAY.replace('margin = 0.1', 'margin = 0.0'), SCRIPT.replace('.5 +', '.5001 +'))
    with pytest.raises(ValueError, match='allowed 1e-06'):
        carry(claim)

def test_an_arm_that_breaks_down_counts_as_the_worst(runs, monkeypatch):
    claim = claim_at(runs)
    arms, bench = (
        arms_of(claim),
        Ground('lab-s', 'sort', items=6, old_items=2, steps=4, progress=False, batch_size=4))
    def broken(bench, arm, *a, **k):
        if arm['recipe'].name == 'hft':
            raise FloatingPointError('the loss is nan')
        return train_arm(bench, arm, *a, **k)
    monkeypatch.setattr('ftlab.instruments.claims.train_arm', broken)
    cells = run_seed(bench, arms, dict(hft=1e-3, full=1e-3), 0, 2)
    assert ('nan' in cells['hft']['error'] and cells['hft']['gain'] < 0
            and cells['hft']['forgetting_matched'] >= cells['full']['forgetting_matched']
            and cells['full']['error'] is None)

def test_matched_numbers_are_those_of_the_first_look_at_the_target(runs):
    "Held against a run that is stopped there"
    from ftlab.instruments.claims import measured
    bench = Ground('lab-s', 'new-procedure', items=20, old_items=5, validation_items=20, steps=12,
                   progress=False, batch_size=8, schedule='constant')
    arms = {n: dict(recipe=get(n), grid=(1e-3,), steps=12) for n in ('full', 'hft')}
    cells = run_seed(bench, arms, dict(full=1e-3, hft=1e-3), 0, 4)
    target = target_gain([c['path'] for c in cells.values()])
    for name, c in cells.items():
        first = next(r['step'] for r in c['path'] if target is not None and r['gain'] >= target)
        assert c['matched_at'] == first
        run, see, _ = train_arm(bench, arms[name], 1e-3, 0, steps=first)
        m = measured(bench, run.model, run.tok, bench.data(0), 0, bench.before(0, None),
                     bench.base(0)[0])
        assert (m['forgetting'] == pytest.approx(c['forgetting_matched'], abs=.02)
                and m['kl'] == pytest.approx(c['kl_matched'], rel=.02))

def test_a_script_claim_and_its_crash(runs):
    script = ('def tune(): return dict(x=2.)\ndef run(seed, tuned):\n    if seed == 3: '
              'raise RuntimeError("out of memory")\n    return '
              'dict(a=dict(m=tuned["x"] + seed/10), b=dict(m=seed/20))\ndef identities(): '
              'return {"one is one": 1 == 1}\n')
    r = run_claim(claim_at(runs, REPLAY, script))
    assert (r['contrasts'][0]['treatment'] == [2., 2.1, 2.2, -1., 2.4] and r['verdict'] == 'unclear'
            and r['identities'][0]['passed'])

@pytest.mark.parametrize(
    'change, says',
    [(('seeds = [0, 1, 2, 3, 4]', 'seeds = [0, 1, 2, 3, 3]'), 'five different ones'),
     (('treatment = "hft"', 'treatment = "lora"'), "treatment is 'lora'"),
     (('scope = "lab"', 'scope = "moon"'), "scope is 'moon'"),
     (('steps = 4', ''), 'steps is None'),
     (('kind = "superiority"', 'kind = "better"'), 'superiority or equivalence'),
     (('margin = 0.5', ''), 'lacks margin'),
     (('why = "w"', 'y = "w"\nwhy = "w"'), "'y' is no key")])
def test_a_wrong_file_is_named_and_mended(tmp_path, change, says):
    with pytest.raises(ValueError, match=says) as e:
        claim_at(tmp_path, SPEC.replace(*change))
    assert 'hft/claim.toml' in str(e.value)

def test_an_unknown_method_or_an_unequal_grid_is_refused(tmp_path):
    with pytest.raises(ValueError, match="arm 'hft'.*no method is called 'hff'"):
        arms_of(claim_at(tmp_path, SPEC.replace('hft = "hft"', 'hft = "hff"')))
    with pytest.raises(ValueError, match='as many learning rates'):
        arms_of(claim_at(tmp_path, SPEC.replace('hft = "hft"', 'hft = {recipe = "hft", grid = [1e-3]}')))

def test_outside_a_checkout_there_is_no_evidence(monkeypatch):
    monkeypatch.setattr(papers, 'claims_folder', lambda: None)
    e = papers.index()
    assert e and all(x['verdict'] is None and x['evidence'] is None and 'no claims here' in x['note'] for x in e)
