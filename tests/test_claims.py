"Every verdict follows from its numbers, every evidence belongs to the code that is here, and one seed of one claim a day comes out again"
import datetime, json, os, random
from pathlib import Path
import pytest
from scipy import stats
from ftlab import papers
from ftlab.instruments.claims import Kept, again, arms_of, assemble_claim, explain, own_code, run_claim, run_seed, script_of, status, train_arm, Ground
from ftlab.instruments.compare import matched, target_gain
from ftlab.core.paper import method
from ftlab.methods import get
from ftlab.instruments.verdicts import contrast, read_claim, verdict

CLAIMS = papers.claims()
DONE = [c for c in CLAIMS if c.result.exists()]
named = lambda cs: dict(argvalues=cs, ids=[c.name for c in cs])

# ---------- what is committed

@pytest.mark.parametrize('claim', **named(DONE))
def test_the_verdict_follows_from_the_numbers(claim):
    r = json.loads(claim.result.read_text())
    assert r['verdict'] == verdict(r) and r['sentence'] == claim.spec['sentence'] and r['seeds'] == claim.spec['seeds'] and r['scope'] == claim.spec['scope']
    assert [(c['name'], c['kind'], c['margin']) for c in r['contrasts']] == [(c['name'], c['kind'], c['margin']) for c in claim.spec.get('contrast', ())], 'the contrasts are not those of the file'
    assert all(len(c['treatment']) == len(c['baseline']) == len(claim.spec['seeds']) for c in r['contrasts'])

@pytest.mark.parametrize('claim', **named(DONE))
def test_the_numbers_follow_from_the_cells(claim):
    "No treatment or baseline was typed in: each is a number of a seed's cell"
    r = json.loads(claim.result.read_text())
    for c, want in zip(r['contrasts'], claim.spec.get('contrast', ())):
        for side in ('treatment', 'baseline'):
            if isinstance(want[side], str): assert c[side] == pytest.approx([r['cells'][str(s)][want[side]][want['metric']] if 'error' not in r['cells'][str(s)] else c[side][i] for i, s in enumerate(r['seeds'])], abs=1e-5)
            else: assert set(c[side]) == {want[side]}

@pytest.mark.parametrize('claim', **named(DONE))
def test_the_evidence_belongs_to_this_code(claim):
    assert status(claim) != 'stale', f'the code of {claim.name} or its experiment changed after its run; run: ftlab claims run {claim.name}'

@pytest.mark.parametrize('claim', **named(CLAIMS))
def test_a_claim_can_be_run(claim):
    own_code(claim)
    if not claim.runs and claim.spec.get('contrast'): assert arms_of(claim)
    if claim.script: script = script_of(claim); assert callable(getattr(script, 'run', None) or script.identities)

def test_the_index_names_what_can_be_imported():
    entries = papers.index(); assert len({e['title'] for e in entries}) == len(entries)
    for e in entries:
        assert (Path(papers.claims_folder()).parent/e['notebook']).exists() and e['symbols'] and e['source']
        for s in e['symbols']: module, _, name = s.rpartition('.'); assert getattr(__import__(module, fromlist=[name]), name).paper.title == e['title']

@pytest.mark.skipif(not DONE, reason='no claim has been run')
def test_one_seed_of_one_claim_comes_out_again():
    "Another claim each day, and another seed; those that take more than two minutes a seed are left to `make claims`"
    quick = [c for c in DONE if (r := json.loads(c.result.read_text()))['contrasts'] and max(r['seed_seconds'].values()) < 120]
    if not quick: pytest.skip('every claim takes more than two minutes a seed')
    rng = random.Random(os.environ.get('FTLAB_ROTATE') or datetime.date.today().isoformat()); claim = rng.choice(quick); seed = rng.choice(claim.spec['seeds'])
    found = again(claim.name, seed); print(claim.name, seed, found)
    assert all(f['same'] for f in found), f'{claim.name}, seed {seed}: {found}'

# ---------- the rule

def test_the_rule_is_the_paired_t_interval():
    rng = random.Random(0)
    for _ in range(200):
        t, b, m = [rng.gauss(.1, .1) for _ in range(5)], [rng.gauss(0, .05) for _ in range(5)], rng.choice([0, .02, .1])
        c = dict(name='', treatment=t, baseline=b, margin=m); d = [x - y for x, y in zip(t, b)]
        low, high = stats.ttest_rel(t, b).confidence_interval(.95); assert contrast(c | dict(kind='superiority'))['verdict'] == ('holds' if low > m else 'fails' if high < m else 'unclear')
        low, high = stats.ttest_rel(t, b).confidence_interval(.90); assert contrast(c | dict(kind='equivalence'))['verdict'] == ('holds' if -m < low and high < m else 'fails' if low > m or high < -m else 'unclear')
        tost = max(stats.ttest_1samp(d, -m, alternative='greater').pvalue, stats.ttest_1samp(d, m, alternative='less').pvalue) # two one-sided tests at 5%
        assert (contrast(c | dict(kind='equivalence'))['verdict'] == 'holds') == (tost < .05)

def test_lower_is_better_turns_the_effect_round():
    c = dict(name='', kind='superiority', margin=.05, treatment=[.1, .11, .12, .1, .09], baseline=[.3, .31, .29, .3, .33])
    assert contrast(c | dict(higher_is_better=False))['verdict'] == 'holds' and contrast(c)['verdict'] == 'fails'

def test_four_seeds_or_a_missing_number_give_no_verdict():
    c = dict(name='few', kind='superiority', margin=0, treatment=[1.]*4, baseline=[0.]*4)
    with pytest.raises(ValueError, match='few: there are 4 seeds'): contrast(c)
    with pytest.raises(ValueError, match='one number for each seed'): contrast(c | dict(treatment=[1., 1, 1, 1, None], baseline=[0.]*5))

def test_a_broken_identity_gives_no_verdict_at_all():
    with pytest.raises(ValueError, match='frozen stays'): verdict(dict(contrasts=[], identities=[dict(name='frozen stays', passed=False)]))

# ---------- the machine

SPEC = '''paper = "HFT: Half Fine-Tuning for Large Language Models"
sentence = "s"
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
    p = tmp_path/'toy.toml'; p.write_text(text)
    if script: p.with_suffix('.py').write_text(script)
    return read_claim(p)

@pytest.fixture
def runs(tmp_path, monkeypatch):
    "A workplace of its own, and two old skills instead of all"
    monkeypatch.setenv('FTLAB_RUNS', str(tmp_path/'runs')); monkeypatch.setattr('ftlab.instruments.compare.old_skills', lambda data: ['add', 'reverse']); return tmp_path

def test_a_claim_runs_and_goes_on_where_it_stopped(runs, monkeypatch):
    claim, said = claim_at(runs), []
    r = run_claim(claim, said.append)
    assert set(r) >= {'contrasts', 'controls_ok', 'identities', 'seeds', 'verdict', 'scope', 'code', 'versions', 'seconds'} and json.loads(claim.result.read_text()) == json.loads(json.dumps(r))
    assert status(claim) == 'current' and sum('seed' in s for s in said) == 5
    assert r['tuning']['seed'] not in r['seeds'] and {len(a['tried']) for a in r['tuning']['arms'].values()} == {len(r['tuning']['arms']['full']['tried'])}
    claim.result.unlink(); monkeypatch.setattr('ftlab.instruments.claims.run_seed', lambda *a: pytest.fail('a finished seed was run again'))
    assert run_claim(claim)['contrasts'] == r['contrasts']

def test_a_changed_experiment_is_stale_and_a_changed_why_is_not(runs):
    claim = claim_at(runs); code = own_code(claim)
    assert own_code(claim_at(runs, SPEC.replace('why = "w"', 'why = "because"'))) == code
    assert own_code(claim_at(runs, SPEC.replace('margin = 0.5', 'margin = 0.4'))) != code

def test_an_arm_that_breaks_down_counts_as_the_worst(runs, monkeypatch):
    claim = claim_at(runs); arms, bench = arms_of(claim), Ground('lab-s', 'sort', items=6, old_items=2, steps=4, progress=False, batch_size=4)
    def broken(bench, arm, *a, **k):
        if arm['recipe'].name == 'hft': raise FloatingPointError('the loss is nan')
        return train_arm(bench, arm, *a, **k)
    monkeypatch.setattr('ftlab.instruments.claims.train_arm', broken); cells = run_seed(bench, arms, dict(hft=1e-3, full=1e-3), 0, 2)
    assert 'nan' in cells['hft']['error'] and cells['hft']['gain'] < 0 and cells['hft']['forgetting_matched'] >= cells['full']['forgetting_matched'] and cells['full']['error'] is None

def test_matched_numbers_are_those_of_the_first_look_at_the_target(runs):
    "Held against a run that is stopped there"
    from ftlab.instruments.claims import measured
    bench = Ground('lab-s', 'new-procedure', items=20, old_items=5, validation_items=20, steps=12, progress=False, batch_size=8, schedule='constant'); arms = {n: dict(recipe=get(n), grid=(1e-3,), steps=12) for n in ('full', 'hft')}
    cells = run_seed(bench, arms, dict(full=1e-3, hft=1e-3), 0, 4); target = target_gain([c['path'] for c in cells.values()])
    for name, c in cells.items():
        first = next(r['step'] for r in c['path'] if target is not None and r['gain'] >= target); assert c['matched_at'] == first
        run, see, _ = train_arm(bench, arms[name], 1e-3, 0, steps=first)
        m = measured(bench, run.model, run.tok, bench.data(0), 0, bench.before(0, None), bench.base(0)[0]); assert m['forgetting'] == pytest.approx(c['forgetting_matched'], abs=.02) and m['kl'] == pytest.approx(c['kl_matched'], rel=.02)

def test_a_script_claim_and_its_crash(runs):
    text = '''paper = "HFT: Half Fine-Tuning for Large Language Models"
sentence = "s"
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
    script = 'def tune(): return dict(x=2.)\ndef run(seed, tuned):\n    if seed == 3: raise RuntimeError("out of memory")\n    return dict(a=dict(m=tuned["x"] + seed/10), b=dict(m=seed/20))\ndef identities(): return {"one is one": 1 == 1}\n'
    r = run_claim(claim_at(runs, text, script))
    assert r['contrasts'][0]['treatment'] == [2., 2.1, 2.2, -1., 2.4] and r['verdict'] == 'unclear' and r['identities'][0]['passed']

@pytest.mark.parametrize('change, says', [
    (('seeds = [0, 1, 2, 3, 4]', 'seeds = [0, 1, 2, 3, 3]'), 'five different ones'), (('treatment = "hft"', 'treatment = "lora"'), "treatment is 'lora'"), (('scope = "lab"', 'scope = "moon"'), "scope is 'moon'"),
    (('steps = 4', ''), 'steps is None'), (('kind = "superiority"', 'kind = "better"'), 'superiority or equivalence'), (('margin = 0.5', ''), 'lacks margin'), (('why = "w"', 'y = "w"\nwhy = "w"'), "'y' is no key")])
def test_a_wrong_file_is_named_and_mended(tmp_path, change, says):
    with pytest.raises(ValueError, match=says) as e: claim_at(tmp_path, SPEC.replace(*change))
    assert 'toy.toml' in str(e.value)

def test_an_unknown_method_or_an_unequal_grid_is_refused(tmp_path):
    with pytest.raises(ValueError, match="arm 'hft'.*no method is called 'hff'"): arms_of(claim_at(tmp_path, SPEC.replace('hft = "hft"', 'hft = "hff"')))
    with pytest.raises(ValueError, match='as many learning rates'): arms_of(claim_at(tmp_path, SPEC.replace('hft = "hft"', 'hft = {recipe = "hft", grid = [1e-3]}')))

def test_outside_a_checkout_there_is_no_evidence(monkeypatch):
    monkeypatch.setattr(papers, 'claims_folder', lambda: None)
    e = papers.index(); assert e and all(x['verdict'] is None and x['evidence'] is None and 'no claims here' in x['note'] for x in e)
