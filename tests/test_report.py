"What a report says is so: against the scorers, against known models, from a folder, on the command line"
import html.parser, json
import pytest, torch
import ftlab
from ftlab import methods
from ftlab.adapters.delta import Offset
from ftlab.adapters.edit import scale
from ftlab.adapters.subsets.hft import half
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.select import parts, top
from ftlab.cli import main
from ftlab.core.batches import collate
from ftlab.core.data import data
from ftlab.core.tokens import encode_all
from ftlab.core.recipe import Recipe, Stages
from ftlab.core.scorers import label_accuracy, nll, skills
from ftlab.evaluators.decoding.eft import eft
from ftlab.evaluators.forgetting import mean_flips, wilson
from ftlab.evaluators.old_sets import old_set
from ftlab.evaluators.probe import drift
from ftlab.instruments.report_page import Report, headline, layer_lines, signed, spread
from ftlab.instruments.report import as_base, paired, read_run, report
from ftlab.lab import digits
from ftlab.trainers.fit import fit
from toys import TOK, classifier, lab_data, logits, same, toy, weights
import ftlab.evaluators.old_sets as olds
import ftlab.instruments.report as reporting

RECIPES = dict(
    full=Recipe('full'), lora=lora(r=2), entries=Recipe('entries', select=top(torch.abs, .1)),
    half=Recipe('half', select=half(.5)), edited=Recipe('edited', edit=scale(.5)),
    stages=Recipe('stages', loop=Stages(lora(r=2), Recipe('norms', select=parts('norm')))),
    output=Recipe('output', select=parts('mlp'), delta=Offset),
    eft=eft(large=toy(1, hidden=64, tied=False)))
SMALL = dict(items=12, old_items=3, rows=30)

def tuned(recipe, rows=None, model=None, **more):
    return fit(model or toy(), TOK, rows or lab_data(), recipe,
               **dict(steps=8, lr=1e-2, batch_size=8, progress=False) | more)

def labels():
    r = [dict(text=r['prompt'], label='abc'[i % 3])
         for i, r in enumerate(lab_data().train + lab_data().test)]
    return data(dict(train=r[:200], test=r[200:260], validation=r[260:290]))

@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    "Three old skills instead of all 22, to be quick"
    monkeypatch.setattr(olds, 'old_skills', lambda data, tok=None: ['fact', 'sort', 'tavi'])

# ---------- the base is the base

@pytest.mark.parametrize('name', [n for n in RECIPES if n != 'eft'])
def test_the_base_is_bit_equal_within_and_the_tuned_model_after(name, tmp_path):
    run = tuned(RECIPES[name])
    after, was = logits(run.model), weights(run.model)
    with as_base(run.delta.attached, tmp_path):
        assert torch.equal(logits(run.model), logits(toy()))
    assert (torch.equal(logits(run.model), after) and same(weights(run.model), was)
            and not list(tmp_path.iterdir()))
    with pytest.raises(RuntimeError), as_base(run.delta.attached, tmp_path):
        raise RuntimeError
    assert torch.equal(logits(run.model), after)

def test_a_folded_change_is_refused():
    run = tuned(Recipe('full'))
    run.delta.attached.fold()
    run.delta.attached.originals = {}
    with pytest.raises(ValueError, match='before you fold'):
        report(run, **SMALL)

# ---------- every kind of change and data

@pytest.mark.parametrize('name', RECIPES)
def test_every_kind_of_change_has_a_report(name, tmp_path):
    run = tuned(RECIPES[name])
    was, state = weights(run.model), torch.get_rng_state()
    rep = report(run, **SMALL)
    r = json.loads(json.dumps(rep.json(), allow_nan=False))
    assert (same(weights(run.model), was) and torch.equal(torch.get_rng_state(), state)
            and not run.model.training)
    assert (len(r['sets']) == 4 and r['sets'][0]['name'] == 'new-procedure' and r['new']['kl'] > 0
            and r['old']['kl'] > 0 and 0 < r['tuco']['new']['mean'] < 1)
    moved = {n: int((was[n] != p).sum()) for n, p in weights(toy()).items()}
    if name == 'output':
        assert r['change']['moved'] == 0 and len(r['change']['elsewhere']) == 6
    elif not run.delta.attached.deltas or name == 'full':
        assert (
            r['change']['moved'] == sum(moved.values())
            and {w['name'] for w in r['change']['weights']} == {n for n, k in moved.items() if k})
    assert (r['change']['parameters'] == sum(p.numel() for p in toy().parameters())
            and headline(r) in rep._repr_html_().replace('&#x27;', "'"))
    again = Report.read(rep.save(tmp_path)/'report.json')
    assert again.json() == r and again._repr_html_() == rep._repr_html_()

def test_the_kinds_of_data():
    rows = lab_data().train[:60] + lab_data().test[:20]
    split = lambda r: data(dict(train=r[:60], test=r[60:]))
    lm = report(tuned(Recipe(), split([dict(text=f'{r["prompt"]} {r["response"]}') for r in rows])),
                **SMALL).json()
    assert lm['sets'][0]['metric'] == 'nll' and not [f for f in lm['flips'] if not f['old']]
    chat = report(tuned(Recipe(),
                        split([dict(messages=[dict(role='user', content=r['prompt']),
                                              dict(role='assistant', content=r['response'])])
                               for r in rows])),
                  **SMALL).json()
    text = report(
        tuned(Recipe(), split([dict(prompt=r['prompt'], response=r['response']) for r in rows])),
        **SMALL).json()
    # the lab's template writes both alike, so that both runs are one
    assert (chat['kind'] == 'chat' and text['kind'] == 'text'
            and chat['sets'][0]['after'] == pytest.approx(text['sets'][0]['after'], abs=1e-5)
            and [f['tuned'] for f in chat['flips']] == [f['tuned'] for f in text['flips']])
    asked = report(
        tuned(Recipe(), split([dict(prompt=r['prompt'], response=r['response']) for r in rows])),
        metric='exact', **SMALL).json()
    assert asked['sets'][0]['metric'] == 'exact' and asked['sets'][0]['n'] == 12

@pytest.mark.parametrize('recipe', [Recipe('full'), lora(r=2)], ids=lambda r: r.name)
def test_labels(recipe):
    d = labels()
    run = tuned(recipe, d, classifier(), steps=20)
    rep = report(run, items=60)
    r = rep.json()
    s = r['sets'][0]
    assert (s['after'] == pytest.approx(label_accuracy(run.model, TOK, d.test, d.labels))
            and s['before'] == pytest.approx(label_accuracy(classifier(), TOK, d.test, d.labels))
            and r['forgetting'] is None and r['old'] is None)
    assert (r['new']['after']['right'] == pytest.approx(s['after'], abs=1e-6)
            and r['tuco']['new']['token'] in ('first', 'last')
            and any(w['part'] == 'fresh head' for w in r['change']['weights']))
    assert (r['change']['parameters']
            == sum(p.numel() for n, p in classifier().named_parameters() if n.startswith('bert.'))
            and 'not measured' in rep.headline)

# ---------- the numbers are those of the scorers

def test_scores_and_drift_are_those_of_the_scorers():
    run = tuned(Recipe('full'), steps=15)
    r = report(run, items=20, old_items=4, metric='nll', rows=400).json()
    d = lab_data()
    rows = [d.test[i*len(d.test)//20] for i in range(20)]
    s = r['sets'][0]
    assert (s['after'] == pytest.approx(nll(run.model, TOK, rows), abs=1e-5)
            and s['before'] == pytest.approx(nll(toy(), TOK, rows), abs=1e-5)
            and s['change'] == pytest.approx(s['before'] - s['after']))
    assert r['new']['kl'] == pytest.approx(
        drift(toy(), run.model, collate(encode_all(rows, TOK, 'text'), TOK.pad_token_id)), rel=1e-4)
    found = skills(run.model, 4, names=[x['name'] for x in r['sets'][1:]], tok=TOK)
    assert {x['name']: x['after'] for x in r['sets'][1:]} == pytest.approx(found)
    assert r['forgetting']['mean'] == pytest.approx(
        sum(x['before'] - x['after'] for x in r['sets'][1:])/3)

def test_a_change_of_nothing_changes_nothing():
    run = tuned(lora(r=2))
    with torch.no_grad():
        [d.B.zero_() for d in run.delta.attached.deltas.values()]
    r = report(run, **SMALL).json()
    assert (r['new']['kl'] == r['old']['kl'] == 0 and not r['flips'] and r['change']['moved'] == 0
            and r['tuco']['new']['mean'] == 0 and all(s['change'] == 0 for s in r['sets']))
    assert (r['new']['before'] == r['new']['after']
            and all(abs(x - 1) < 1e-6 for x in r['new']['cka'] + r['old']['cka'])
            and 'a loss cannot be told from a gain' in headline(r)
            and 'Did not learn' in headline(r))

def test_flips_add_up_to_the_change():
    model, tok = ftlab.load('lab-s')
    run = ftlab.fit(model, tok, ftlab.data('new-procedure'), methods.full(), steps=25, lr=2e-3,
                    progress=False)
    r = report(run, items=20, old_items=10, rows=22).json()
    for s in r['sets']:
        mine = [f for f in r['flips'] if f['set'] == s['name']]
        won, lost = (sum(f['kind'] == k for f in mine) for k in ('won', 'lost'))
        assert (won - lost)/s['n'] == pytest.approx(s['change'])
        f = s['flips']
        assert ((f['lost']['count'], f['won']['count'], f['n'], f['correction'])
                == (lost, won, s['n'], 'none') and f['lost']['low'] <= f['lost']['share'] <= f['lost']['high'])
        assert (all(f['base'] == f['right'] != f['tuned'] for f in mine if f['kind'] == 'lost')
                and all(f['tuned'] == f['right'] != f['base'] for f in mine if f['kind'] == 'won'))
    assert any(f['kind'] == 'lost' for f in r['flips'])
    old = [s['flips'] for s in r['sets'] if s['old']]
    assert r['forgetting']['flips'] == mean_flips(old) and r['forgetting']['left_out'] == []
    assert (r['forgetting']['flips']['lost']['share'] - r['forgetting']['flips']['won']['share']
            == pytest.approx(r['forgetting']['mean']))

def test_old_data_of_ones_own():
    d = lab_data()
    old = data([dict(prompt=r['prompt'], response=r['response']) for r in d.train[:40]])
    run = tuned(Recipe('full'))
    r = report(run, old, items=10, old_items=15).json()
    assert ([s['old'] for s in r['sets']] == [False, True] and r['sets'][1]['metric'] == 'nll'
            and r['sets'][1]['n'] == 15 and r['forgetting']['sets'] == 1 and 'nats' in headline(r))
    with pytest.raises(ValueError, match='other labels'):
        report(tuned(Recipe('full'), labels(), classifier()),
               data([dict(text=r['prompt'], label='xy'[i % 2]) for i, r in enumerate(d.train)]))
    with pytest.raises(ValueError, match='no test row'):
        report(tuned(Recipe('full'), data(d.train[:3])), **SMALL)
    with pytest.raises(ValueError, match='metric is a function'):
        report(run, metric=lambda *a: 1.)

def test_what_is_no_run_and_no_number_is_refused(monkeypatch):
    run = tuned(Recipe('full'), steps=1)
    for thing in (toy(), None, 3):
        with pytest.raises(ValueError, match='give what ftlab.fit returned, or the folder'):
            report(thing)
    for wrong in (dict(items=0), dict(items=2.5), dict(old_items=-1), dict(rows=0),
                  dict(matrices=-1)):
        with pytest.raises(ValueError, match=f'{[*wrong][0]} is .*; it must be a whole number'):
            report(run, **wrong)

    class Small:
        rows = staticmethod(lambda skill, n, *a: (_ for _ in ()).throw(
                                ValueError(f'skill {skill!r} has only 7 questions')))

    monkeypatch.setattr(olds, 'WORLD', Small)
    with pytest.raises(ValueError, match="old_items is 99: skill 'fact' has only 7"):
        report(run, items=2, old_items=99)
    with pytest.raises(ValueError, match="'sortt' is neither a file nor a lab skill; did you mean 'sort'"):
        report(run, 'sortt')

def test_a_run_on_pictures_has_no_report_and_the_error_says_what_to_call_instead():
    rows = digits.digits()
    run = fit(digits.fresh('digits-vit'), None, rows, lora(r=2), steps=4, batch_size=8,
              progress=False)
    with pytest.raises(ValueError, match=r"of kind 'image'.*change_of\(run\).*run.model.*disabled"):
        report(run)
    found = reporting.change_of(run)
    assert found['moved'] > 0 and {r['part'] for r in found['weights']} == {'attention', 'mlp'}
    batch = dict(pixel_values=digits.pictures(rows.test[:4])[0])
    tuned = run.model(**batch).logits
    with run.delta.attached.disabled() as base:
        assert not torch.equal(base(**batch).logits, tuned)

def test_a_run_whose_folder_is_gone_still_has_its_report(tmp_path):
    "What is in memory is enough, but for the base's answers, which find no place beside the run"
    import shutil
    for recipe in (Recipe('full'), lora(r=2)):
        run = tuned(recipe, out=tmp_path/'run', steps=2)
        shutil.rmtree(tmp_path/'run')
        r = report(run, **SMALL).json()
        assert r['sets'] and r['change']['moved'] > 0
        shutil.rmtree(tmp_path/'run', ignore_errors=True)

# ---------- intervals

def test_the_interval_covers_a_ratio_of_means_too():
    """The loss per token is a ratio, rows being of different length:
    95 of 100 intervals contain the truth, here a fall of .3"""
    g = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(300):
        k = torch.randint(1, 20, (80,), generator=g)
        b = k*(2 + torch.randn(80, generator=g)*.3)
        a = b - k*(.3 + .5*torch.randn(80, generator=g))
        d = paired([(float(x), int(n)) for x, n in zip(b, k)],
                   [(float(x), int(n)) for x, n in zip(a, k)], -1)
        inside += d['low'] <= .3 <= d['high']
    assert .91 <= inside/300 <= .985

def test_all_right_is_not_certain():
    d = paired([(0., 1)]*100, [(1., 1)]*100)
    assert d['change'] == 1 and .96 < d['low'] < .99
    d = paired([(1., 1)]*100, [(1., 1)]*100)
    assert d['low'] < 0 < d['high']
    with pytest.raises(ValueError, match='larger max_length'):
        paired([(0., 0)], [(0., 0)])

# ---------- what the base said is kept

def test_the_base_is_asked_once(tmp_path, monkeypatch):
    run = tuned(lora(r=2))
    asked = []
    real = reporting.observe
    monkeypatch.setattr(reporting, 'observe', lambda *a, **k: asked.append(1) or real(*a, **k))
    go = lambda **k: report(run, cache=tmp_path, **SMALL | k).json()
    a, b = go(), go()
    assert (len(asked) == 3 and a['sets'] == b['sets'] and a['new'] == b['new']
            and len(list(tmp_path.iterdir())) == 1)
    go(items=11)
    assert len(asked) == 5 and len(list(tmp_path.iterdir())) == 2
    other = tuned(Recipe('full'))
    c = report(other, cache=tmp_path, **SMALL).json()
    assert len(asked) == 6
    assert [s['before'] for s in c['sets']] == [s['before'] for s in a['sets']] # the same base
    report(tuned(lora(r=2), model=toy(3)), cache=tmp_path, **SMALL)
    assert len(asked) == 8 # another one

# ---------- the page

class Page(html.parser.HTMLParser):
    VOID = {'meta', 'br'}

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.wrong = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        self.open += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

def test_the_page_stands_alone_and_is_well_made(tmp_path):
    d = lab_data()
    evil = '<script>alert(1)</script>'
    run = tuned(
        Recipe('full'),
        data(dict(train=d.train[:50], test=[dict(prompt=f'sort a b {evil}', response='a b')]*3)))
    rep = report(run, **SMALL)
    text = rep.html(tmp_path/'page.html').read_text()
    p = Page(text)
    assert (not p.open and not p.wrong and '<script' not in text
            and not any(k in a for _, a in p.seen for k in ('src', 'href')) and 'url(' not in text
            and '@import' not in text and 'http' not in text)
    svgs = [a for t, a in p.seen if t == 'svg']
    assert (3 <= len(svgs) <= 5
            and all(len(a['aria-label']) > 30 and a['role'] == 'img' for a in svgs))
    assert ('prefers-color-scheme:dark' in text and sum(t == 'details' for t, _ in p.seen) == 6
            and 'Traceback' not in repr(rep) and len(repr(rep).splitlines()) == 6)

def test_the_headline_says_how_sure_it_is():
    s = lambda name, old, b, a, h=.02, m='exact': dict(
        name=name, old=old, metric=m, before=b, after=a, change=a - b if m == 'exact' else b - a,
        low=(a - b if m == 'exact' else b - a) - h, high=(a - b if m == 'exact' else b - a) + h,
        n=100)
    r = lambda new, *old: dict(kind='text', new=dict(kl=.5), sets=[new, *old],
                               forgetting=reporting.forgotten([new, *old]))
    assert (headline(r(s('a', False, .1, .9), s('b', True, .9, .5), s('c', True, .9, .8)))
            == 'Learned a: right on 10% → 90%; lost 25.0 points on 2 old skills, most on b (90% → 50%).')
    assert (headline(r(s('a', False, .1, .11), s('b', True, .9, .9))).startswith('Did not learn a')
            and 'cannot be told' in headline(r(s('a', False, .1, .11), s('b', True, .9, .895)))
            and 'no change of more than 2 points' in headline(
                r(s('a', False, .1, .11), s('b', True, .9, .9))))
    assert (headline(r(s('a', False, 3., 1., .1, 'nll')))
            == 'Learned a: loss on the right answers 3.00 nats → 1.00 nats; '
               'it drifted 0.50 nats per token from its base (no old data were given).')
    assert ('Got worse' in headline(r(s('a', False, .9, .1)))
            and 'lost 0.50 nats per token on b (2.00 nats → 2.50 nats)' in headline(
                r(s('a', False, .1, .9), s('b', True, 2., 2.5, .1, 'nll'))))

def test_scores_and_losses_never_share_an_axis():
    """Rows of one's own taught to a lab model: the loss on the new set,
    right answers on the old skills"""
    d = lab_data()
    plain = lambda rs: [dict(prompt=r['prompt'], response=r['response']) for r in rs]
    rep = report(
        tuned(Recipe('full'), data(dict(train=plain(d.train[:50]), test=plain(d.test[:5])))),
        **SMALL)
    page = Page(rep._repr_html_())
    new, *old = rep.json()['sets']
    alt = [a['aria-label'] for t, a in page.seen if t == 'svg' and 'before and after' in a['aria-label']]
    assert new['metric'] == 'nll' and len(alt) == 2
    assert (alt[0].startswith('Negative log-likelihood') and 'sort' not in alt[0]
            and alt[1].startswith('Share right') and all(s['name'] in alt[1] for s in old)
            and 'nats' not in alt[1])

def test_one_question_is_no_verdict():
    "Neither for nor against: on one question there is no interval, and the page says so"
    s = lambda name, old, b, a: dict(name=name, old=old, metric='nll',
                                     **paired([(b, 1)], [(a, 1)], -1))
    sets = [s('a', False, 0., 27.), s('b', True, .1, 9.)]
    f = reporting.forgotten(sets)
    assert f['low'] is None and f['mean'] == pytest.approx(8.9)
    said = headline(dict(kind='text', sets=sets, forgetting=f, new=None))
    assert 'One question is too few' in said and 'too few old questions' in said and 'Did not learn' not in said
    d = lab_data()
    r = report(tuned(Recipe('full'), data(dict(train=d.train[:50], test=d.test[:1]))), items=1,
               old_items=1, rows=5)
    assert ('too few' in r.headline and 'too few questions for an interval' in repr(r)
            and r._repr_html_())

def test_what_was_known_before_is_not_called_a_failure_and_nothing_is_minus_nothing():
    s = dict(name='a', old=False, metric='nll', before=.004, after=.0041, change=-.0001, low=-.01,
             high=.01, n=50)
    r = dict(kind='label', sets=[s], forgetting=None)
    assert (headline(r).startswith('Already knew a: loss on the right answers 0.00 nats')
            and spread(s, 1., 2) == '+0.00 [-0.01, +0.01]'
            and signed(-.0001, 2) == '+0.00' == signed(0., 2))
    assert headline(dict(r, sets=[dict(s, before=1., after=1.)])).startswith('Did not learn a')

@pytest.mark.parametrize('sets', [1, 2])
def test_labels_of_lines_do_not_cover_each_other(sets):
    svg = layer_lines({k: [1., .9, .8] for k in ('new', 'old')[:sets]})
    at = [float(dict(a)['y']) for t, a in Page(svg).seen if t == 'text' and dict(a)['class'] in ('good', 'other')]
    assert len(at) == sets and (sets == 1 or abs(at[0] - at[1]) >= 14)

# ---------- from a folder, and on the command line

@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    def run(line):
        try:
            code = main(line.split())
        except SystemExit as e:
            code = e.code
        out, err = capfd.readouterr()
        return code, out, err
    return run

@pytest.fixture
def made(call, tmp_path):
    "A tiny model, data for it, and a run of `ftlab fit` with a fresh test set and renamed columns"
    m = toy()
    m.save_pretrained(tmp_path/'lm')
    TOK.save_pretrained(tmp_path/'lm')
    d = lab_data()
    rows = lambda rs: ''.join(json.dumps(dict(q=r['prompt'], a=r['response'])) + '\n' for r in rs)
    (tmp_path/'train.jsonl').write_text(rows(d.train[:80]))
    (tmp_path/'test.jsonl').write_text(rows(d.test[:20]))
    assert (call('fit --model lm --data train.jsonl --eval test.jsonl --columns '
                 'prompt=q,response=a --method lora(r=2) --lr 1e-2 --steps 6 --batch-size 8 '
                 '--items 10 --out run')[0] == 0)

def test_the_command_reports_on_the_folder_of_a_fit(call, made, tmp_path):
    code, out, err = call('report run --items 10 --old-items 2 --json')
    r = json.loads(out)
    assert (code == 0 and r['recipe']['name'] == 'lora(r=2)' and r['cost']['steps'] == 6
            and r['cost']['seconds'] > 0 and r['sets'][0]['n'] == 10
            and (tmp_path/'run/report.html').exists() and r['model'] == 'lm')
    run = read_run('run')
    assert report(run, items=10, old_items=2).json()['sets'] == r['sets'] # a Run says what its folder says
    code, out, err = call('report --delta run/delta.safetensors --model lm --data train.jsonl '
                          '--eval test.jsonl --columns prompt=q,response=a --items 10 --old-items '
                          '2 --matrices 0 --out there')
    assert (code == 0 and 'there/report.html' in out
            and json.loads((tmp_path/'there/report.json').read_text())['sets'] == r['sets']
            and json.loads((tmp_path/'there/report.json').read_text())['change']['top'] is None)
    # the old data have columns of their own
    assert call('report run --items 10 --old train.jsonl --columns prompt=q,response=a')[0] == 1

def test_errors_are_one_line(call, made, tmp_path, capfd):
    other = toy(5)
    other.save_pretrained(tmp_path/'other')
    TOK.save_pretrained(tmp_path/'other')
    (tmp_path/'bare').mkdir()
    (tmp_path/'bare/delta.safetensors').write_bytes((tmp_path/'run/delta.safetensors').read_bytes())
    capfd.readouterr() # the bars of save_pretrained
    for line, words in {
            'report': 'name the folder', 'report nowhere': "no folder 'nowhere'",
            'report lm': 'no delta at', 'report run/delta.safetensors': "name the folder that contains it, 'run'",
            'report run --model lab-x': 'neither a folder nor a lab model',
            'report run --old sortt': "did you mean 'sort'", 'report bare': 'no run.json beside',
            'report run --model other': 'another base', 'report run --items 0': 'above 0',
            'report run --metric rouge': "choose from 'exact'"}.items():
        code, out, err = call(line)
        assert (code and out == '' and len(err.strip().splitlines()) == 1 and words in err), (
            line, err)
    (tmp_path/'train.jsonl').write_text((tmp_path/'train.jsonl').read_text() + '{"q": "sort a", "a": "a"}\n')
    code, out, err = call('report run')
    assert code == 1 and 'no longer those of the run' in err
    (tmp_path/'train.jsonl').unlink()
    code, out, err = call('report run')
    assert (code == 1 and 'are gone' in err and 'run.json' in err and 'name them with --data' in err
            and len(err.strip().splitlines()) == 1)

def test_what_is_missing_of_a_saved_run_is_named(tmp_path):
    with pytest.raises(ValueError, match='give the folder that ftlab fit wrote, or delta=, model= and data='):
        read_run()
    (tmp_path/'delta.safetensors').touch()
    with pytest.raises(ValueError, match=r'model= \(--model\) and data= \(--data\)'):
        read_run(tmp_path)

def test_a_recipe_whose_decoder_is_lost_is_refused():
    with pytest.raises(ValueError, match='its own way'):
        reporting._recipe(dict(name='mine', decode='draw'))
    assert reporting._recipe(dict(name='mine')).name == 'mine' and reporting._recipe(dict(name='lora(r=2)')).delta

# ---------- probes are found by their marks

def test_a_probe_is_asked_because_it_is_marked(monkeypatch):
    """Not because the report knows its name: one of either kind is added, and what it says stands
    beside the others'"""
    found = {on: methods.probes(on) for on in ('directions', 'prompts')}
    assert list(found['directions']) == ['intruders'] and list(found['prompts']) == ['tuco']
    mine = dict(
        directions=lambda W0, W1, k, eps: torch.ones(min(k, *W0.shape), dtype=torch.bool),
        prompts=lambda model, change, batch, at: torch.full((len(batch['input_ids']),), .25))
    monkeypatch.setattr(reporting, 'probes', lambda on: found[on] | {'mine': mine[on]})
    r = report(tuned(RECIPES['half']), **SMALL).json()
    assert (r['mine']['new']['mean'] == .25 and r['mine']['old']['least'][0]['mine'] == .25
            and r['tuco']['new']['mean'] > 0)
    change = r['change']
    assert change['mine'] == change['examined'] > 0 and 0 <= change['intruders'] <= change['examined']

def _as_earlier(new):
    "A report as version 1 and as version 2 would have saved it, and what both should be read as"
    # version 2 counted no flips by set
    second = json.loads(json.dumps(dict(new, version=2)))
    for s in second['sets']:
        del s['flips']
    del second['forgetting']['flips'], second['forgetting']['left_out']
    first = json.loads(json.dumps(second).replace('"parameters"', '"numbers"')
                       .replace('"examined"', '"looked"')
                       .replace('"positions"', '"places"'))
    del first['version']
    upgraded = json.loads(json.dumps(new))
    for s in upgraded['sets']:
        s['flips'] = None
    upgraded['forgetting'].update(flips=None, left_out=[])
    return first, second, upgraded

def test_old_reports_are_read_and_a_newer_one_refused(tmp_path):
    rep = report(tuned(Recipe()), **SMALL)
    new = rep.json()
    first, second, upgraded = _as_earlier(new)
    # a user's own keys: arguments, settings, a probe's name
    mine = dict([('numbers', 1), ('looked', dict(places=2))])
    for r in (first, second, upgraded):
        r['recipe'] = dict(r['recipe'], arguments=mine)
        r['settings'] = dict(r['settings'], **mine)
        r['places'] = dict(why='numbers', numbers=3)
        r['change']['places'] = r['change']['weights'][0]['places'] = 4
    at = tmp_path/'report.json'
    for r in (first, second):
        at.write_text(json.dumps(r))
        assert Report.read(at).json() == upgraded
        page = Report.read(at)._repr_html_()
        lost, won = (sum(f['kind'] == k for f in new['flips']) for k in ('lost', 'won'))
        assert f'{lost} became wrong, {won} became right' in page or f'changed: {len(new["flips"])}' in page
    at.write_text(json.dumps(upgraded))
    assert Report.read(at).json() == upgraded
    at.write_text(json.dumps(dict(new, version=4)))
    with pytest.raises(ValueError, match='version 4.*update ftlab'):
        Report.read(at)

# ---------- several old sets

def test_several_old_sets_by_name(tmp_path):
    """Choices are corrected for guessing, losses have no flips and no part in the mean, the harvest
    is all right before; the page shows each with its interval"""
    d = lab_data()
    plain = [dict(prompt=r['prompt'], response=r['response']) for r in d.train[:20]]
    picked = [dict(r, choices=[r['response'], 'a', 'b']) for r in plain]
    (tmp_path/'mine.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in plain))
    (tmp_path/'asked.txt').write_text('sort c a b =\nthe capital of zig is')
    old = dict(mine=str(tmp_path/'mine.jsonl'), picked=picked, words=old_set(plain, metric='exact'))
    run = tuned(Recipe('full'))
    rep = report(run, old, items=10, old_items=15)
    r = rep.json()
    assert [(s['name'], s['metric'], s['n']) for s in r['sets'][1:]] == [
        ('mine', 'nll', 15), ('picked', 'choice', 15), ('words', 'exact', 15)]
    mine, picked, words = [s['flips'] for s in r['sets'][1:]]
    assert (mine is None and picked['correction'] == 'chance' and words['correction'] == 'none'
            and r['forgetting']['sets'] == 2 and r['forgetting']['left_out'] == ['mine']
            and r['forgetting']['flips']['correction'] == 'mixed')
    before, after = (r['sets'][2][k] for k in ('before', 'after'))
    # a model clearly below chance has no more lucky guesses than right answers
    lucky = lambda right: right if wilson(round(15*right), 15)[1] < 1/3 else (1 - right)/2
    assert picked['lost']['expected'] == pytest.approx(lucky(before)*(1 - after))
    assert picked['won']['expected'] == pytest.approx(lucky(after)*(1 - before))
    page = rep._repr_html_()
    assert 'right → wrong, corrected' in page and 'guessing among the options' in page
    assert 'greedy answers are not corrected (–)' in page
    assert not Page(page).wrong and Report.read(rep.save(tmp_path/'out')/'report.json').json() == r

def test_the_harvest_of_a_run_is_that_of_its_base():
    model, tok = ftlab.load('lab-s')
    run = ftlab.fit(model, tok, ftlab.data('new-procedure'), methods.full(), steps=15, lr=2e-3,
                    progress=False)
    was = weights(run.model)
    r = report(run, 'auto', items=5, rows=10).json()
    auto = r['sets'][1]
    assert auto['name'] == 'auto' and auto['before'] == 1 and auto['flips']['won']['count'] == 0
    assert 0 < auto['flips']['lost']['share'] and same(weights(run.model), was)
    base, _ = ftlab.load('lab-s')
    assert auto['n'] == len(olds.old_sets('auto', run.data, base, tok)[0].rows)

def test_sampled_answers_are_corrected_by_a_second_sampling_of_the_base():
    """A decoder that answers at random: base and tuned model flip as often as the base flips by
    itself"""
    def drawn(models, tok, prompts, **options):
        return ['a' if torch.rand(1) < .5 else 'b' for _ in prompts]

    run = tuned(Recipe('drawn', decode=drawn))
    old = old_set([dict(prompt=f'sort {c} {d}', response='a') for c in 'abcdefghij' for d in 'abcdefghij'],
                  metric='exact')
    choices = [dict(prompt=f'sort {c}', response='a', choices=['a', 'b']) for c in 'abcdefghij']
    f, g = [s['flips'] for s in report(run, dict(said=old, chosen=choices), items=5,
                                       old_items=100).json()['sets'][1:]]
    assert g['correction'] == 'chance' # a choice is not drawn
    assert f['correction'] == 'resampled' and f['lost']['share'] > .1 and f['lost']['expected'] > .1
    assert f['lost']['adjusted_low'] < 0 < f['lost']['adjusted_high']
    greedy = Recipe('first', decode=lambda models, tok, prompts, **options: ['a']*len(prompts))
    f = report(tuned(greedy), old, items=5, old_items=10).json()['sets'][1]['flips']
    assert f['correction'] == 'none'
