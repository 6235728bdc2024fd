"The views: pure pictures, models that stay as they are, widgets that follow and go"
import copy, json, os, re, subprocess, sys
import pytest, torch
import ftlab
from matplotlib.figure import Figure
from ftlab.instruments.compare import Comparison
from ftlab.core.generate import generate
from ftlab.core.scorers import WORLD, answer_length
from ftlab.evaluators.mechanisms.intruders import intruders
from ftlab.evaluators.spectra import stable_rank
from ftlab.instruments.explore import (CRITERIA, RANKED, View, choice, entry_scores, lab_questions,
                                       layers, mask, model_and_change, prices, question_batches,
                                       ranks, rows_as_html, several, side_by_side, slider, span,
                                       spectrum, teacher_forced, text, token_prices, tradeoff)
from ftlab.adapters.subsets import lift
from ftlab.adapters.edit import write_change
from ftlab.adapters.merging.lines import by_depth
from ftlab.lab.world import OLD, SKILLS, exact
from ftlab.map import measured
from ftlab.trainers.objective import loss_mask, token_nll

@pytest.fixture(scope='module')
def run():
    model, tok = ftlab.load('lab-s')
    return ftlab.fit(model, tok, ftlab.data('new-procedure', n=200), steps=6, lr=1e-3,
                     progress=False)

@pytest.fixture(scope='module')
def lora():
    model, tok = ftlab.load('lab-s')
    return ftlab.fit(model, tok, ftlab.data('new-procedure', n=200), ftlab.methods.lora(r=4),
                     steps=3, progress=False)

@pytest.fixture(scope='module')
def views(run):
    base, tok = ftlab.load('lab-s')
    r = run.data.test[0]
    return dict(
        tradeoff=(tradeoff(Comparison.read(measured('compare_lab_s/result.json'))),
                  dict(methods=('lora', 'dft'), gain=(60., 97.))),
        layers=(layers(run, new=run.data.test[:8], old=lab_questions(n=1)), dict(alpha=.45)),
        mask=(mask(base, tok, run.data.train[:8]), dict(by='gradient', density=17)),
        spectrum=(spectrum(run), dict(rank=3, matrix='model.layers.3.mlp.up_proj.weight')),
        prices=(prices(run.model, tok, r['prompt'], r['response'], base), dict(chance=.7)),
        side_by_side=(side_by_side(run), dict(temperature=1.5, seed=4)))

NAMES = 'tradeoff layers mask spectrum prices side_by_side'.split()

def curve(power):
    fig = Figure(figsize=(2, 1))
    fig.subplots().plot([0, .5, 1], [0, .5**power, 1])
    fig.set_label(f'At one half: {.5**power:g}.')
    return fig

def view():
    return View(curve, 'A power.', power=slider(2, 1, 9, 1, 'power'))

# --- pictures

@pytest.mark.parametrize('name', NAMES)
def test_the_same_settings_give_the_same_picture(views, name):
    v, other = views[name]
    first = v.picture().html
    moved = v.picture(**other).html
    torch.rand(3)
    assert (v.picture().html == first != moved == v.picture(**other).html
            and v.settings == {n: c.value for n, c in v.controls.items()})

@pytest.mark.parametrize('name', NAMES)
def test_every_picture_has_words_that_follow_it(views, name):
    v, other = views[name]
    a, b = v.picture(), v.picture(**other)
    alts = re.findall(r'<img[^>]* alt="([^"]{30,})"', a.html)
    if name == 'side_by_side':
        assert '<th' in a.html and 'tuned' in a.html
    else:
        assert a.alt != b.alt and len(alts) == a.html.count('<img') == 1
    if a.svg:
        assert a.svg.startswith('<svg role="img" aria-label="') and '<dc:date' not in a.svg

@pytest.mark.parametrize('name', ['layers', 'spectrum', 'side_by_side', 'prices'])
def test_the_model_is_bit_equal_after_use(views, run, name):
    kept = {n: p.clone() for n, p in run.model.state_dict().items()}
    wanted = [p.requires_grad for p in run.model.parameters()]
    rng = torch.random.get_rng_state()
    v, other = views[name]
    v.picture(**other)
    v.picture()
    v.live()
    v.close()
    assert (all(torch.equal(t, kept[n]) for n, t in run.model.state_dict().items())
            and wanted == [p.requires_grad for p in run.model.parameters()]
            and torch.equal(rng, torch.random.get_rng_state()))

def test_pyplot_is_left_alone(views):
    import matplotlib, matplotlib.pyplot as plt
    was, rc = plt.get_fignums(), dict(matplotlib.rcParams)
    for v, other in views.values():
        v.picture(**other)
    assert plt.get_fignums() == was and dict(matplotlib.rcParams) == rc

def test_a_still_shows_states_side_by_side():
    v = view()
    p = v.still(dict(power=1), dict(power=3), dict(power=5), columns=2)
    assert (p.svg.count('<svg') == 4 and all(f'At one half: {.5**k:g}.' in p.alt for k in (1, 3, 5))
            and re.search(r'width="288pt" height="144pt"', p.svg))
    import xml.etree.ElementTree as tree
    tree.fromstring(p.svg)
    assert v.still().svg == v.picture().svg

def test_what_is_not_a_picture_is_refused():
    with pytest.raises(ValueError, match='gave back a int'):
        View(lambda: 3, '').picture()
    assert View(lambda: ('<p>a</p>', curve(1)), 'Both.').picture().svg is None

@pytest.mark.parametrize('cell', ['<script>', 'x <script>', 'a & b'])
def test_cells_are_escaped(cell):
    assert (cell not in rows_as_html([['head'], [cell]])
            and cell not in rows_as_html([[cell, 'x']], head=False))

# --- wrong input

@pytest.mark.parametrize('make, words',
                         [(lambda: slider(3, 0, 1, 1, 'share'), "'share' starts at 3"),
                          (lambda: choice([], 'matrix'), "'matrix' starts at None"),
                          (lambda: choice(['a'], 'x', 'b'), "not among"),
                          (lambda: choice({}, 'x', 'b'), "not among"),
                          (lambda: View(curve, '', power=2), "'power' is not a control"),
                          (lambda: view().picture(height=2), "no setting 'height'; it has power"),
                          (lambda: model_and_change(3), 'base is a int'),
                          (lambda: model_and_change(torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)),
                           'is not in both models with the same shape'),
                          (lambda: ranks({}, 'sideways'), "ranked is 'sideways'"),
                          (lambda: mask(None, rows=[{}]), 'without a tokenizer'),
                          (lambda: side_by_side(torch.nn.Linear(2, 2)), 'needs a Run')])
def test_wrong_input_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()

@pytest.mark.parametrize('name, bad, words',
                         [('tradeoff', dict(methods=('magic',)), "'magic'; the methods are full"),
                          ('layers', dict(alpha=-1.), 'alpha is -1'),
                          ('mask', dict(density=0), 'density is 0'),
                          ('mask', dict(by='luck'), "no scores by 'luck'"),
                          ('mask', dict(matrix='x'), "no matrix 'x'"),
                          ('spectrum', dict(matrix='x'), "matrix 'x'"),
                          ('spectrum', dict(rank=0), 'rank is 0'),
                          ('prices', dict(answer=' '), 'answer is empty'),
                          ('prices', dict(chance=1.), 'chance is 1'),
                          ('side_by_side', dict(temperature=-1.), 'temperature is -1'),
                          ('side_by_side', dict(example='x'), "no example 'x'")])
def test_a_wrong_setting_is_named(views, name, bad, words):
    with pytest.raises(ValueError, match=words):
        views[name][0].picture(**bad)

def test_equal_models_and_a_model_of_ones_own_without_questions_are_refused(run):
    model, tok = ftlab.load('lab-s')
    with pytest.raises(ValueError, match='equal in every weight'):
        spectrum(model, copy.deepcopy(model))
    with pytest.raises(ValueError, match='layers needs the tokenizer and new questions'):
        layers(model, run.model)

# --- what they show is right

@pytest.mark.parametrize('trained', [False, True])
def test_one_pass_is_right_where_generation_is(run, trained):
    "Row by row, on every skill that is judged word for word, the new one among them"
    model, tok = (run.model, run.tok) if trained else ftlab.load('lab-s')
    seen = set()
    for skill in [s for s in (*OLD, 'new-procedure') if SKILLS[s].judge is exact]:
        rows = WORLD.rows(skill, 12)
        b = question_batches(rows, tok, parts=1)[0]
        order = sorted(range(12), key=lambda i: len(tok(rows[i]['prompt'] + ' ' + rows[i]['response']).input_ids))
        said = generate(model, tok, [r['prompt'] for r in rows],
                        max_new_tokens=answer_length(rows, tok) + 4)
        by_hand = [said[i].split() == rows[i]['response'].split() for i in order]
        one = teacher_forced(model, b).tolist()
        assert one == by_hand, skill
        seen |= set(one)
    assert seen == {True, False}

def test_an_answer_must_end_to_be_right():
    base, tok = ftlab.load('lab-s')
    r = WORLD.rows('reverse', 1)[0]
    cut = dict(prompt=r['prompt'], response=' '.join(r['response'].split()[:-1]))
    ask = lambda row: bool(teacher_forced(base, question_batches([row], tok)[0]))
    assert ask(r) and not ask(cut)
    with pytest.raises(ValueError, match='no token of an answer'):
        teacher_forced(base, dict(input_ids=torch.ones(1, 3).long(),
                                  attention_mask=torch.ones(1, 3), labels=torch.full((1, 3), -100)))

@pytest.mark.parametrize('which', ['run', 'lora'])
def test_base_and_change_come_apart_bit_for_bit(request, which):
    run = request.getfixturevalue(which)
    base, _ = ftlab.load('lab-s')
    kept = {n: p.clone() for n, p in run.model.state_dict().items()}
    model, change = model_and_change(run)
    assert (all(torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters()))
            and set(change) <= {n for n, _ in base.named_parameters()})
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert (all(torch.equal(t, kept[n]) for n, t in run.model.state_dict().items())
            and all(torch.equal(c, run.delta.tensors()[n]) for n, c in change.items()))

def test_settings_do_not_drift(run):
    v = layers(run, new=run.data.test[:6], old=lab_questions(n=1))
    bench = v.draw.args[0]
    for a, f in ((1.5, .2), (.05, 1.), (.7, .3)):
        bench.right(a, f)
    fresh, _ = model_and_change(run)
    base = {n: p.clone() for n, p in fresh.named_parameters()}
    write_change(fresh, base, by_depth(.7*.3, .7*.7)(bench.change, fresh))
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), bench.model.parameters()))
    assert bench.factors(.7, .3) == pytest.approx([.21, .21 + .49/3, .21 + .98/3, .7])
    bench._asked(1., 1.)
    assert all(torch.allclose(p, q, atol=1e-6)
               for p, q in zip(bench.model.parameters(), run.model.parameters()))

def test_masks_are_those_of_the_selections():
    base, tok = ftlab.load('lab-s')
    rows = WORLD.rows('fact', 8)
    S = entry_scores(base, tok, rows)
    assert list(S) == list(CRITERIA)
    from ftlab.adapters.select import top
    W = {n: p.detach() for n, p in base.named_parameters()}
    for by, name in (('LIFT', 'principal'), ('magnitude', 'magnitude')):
        want = top(lambda w: lift.scores(w, name), .07)(base)
        got = {n: r < round(.07*r.numel())/r.numel() for n, r in ranks(S[by], RANKED[1]).items()}
        assert want.keys() == got.keys() and all(torch.equal(want[n], got[n]) for n in want)
    together = ranks(S['magnitude'], RANKED[0])
    low = min(float(W[n].abs()[r < .1].min()) for n, r in together.items() if (r < .1).any())
    high = max(float(W[n].abs()[r >= .1].max()) for n, r in together.items())
    assert low >= high
    b = question_batches(rows, tok, 1)[0]
    logits = base(input_ids=b['input_ids'], attention_mask=b['attention_mask']).logits
    (token_nll(logits, b['labels']).sum()/loss_mask(b['labels']).sum()).backward()
    assert all(torch.allclose(S['gradient'][n], p.grad.abs(), atol=1e-6)
               for n, p in base.named_parameters() if n in S['gradient'])

def test_the_spectrum_is_the_evaluators(run):
    v = spectrum(run)
    found = v.draw.args[0]
    name = list(found)[5]
    W0, C = found[name]
    v.picture(matrix=name, rank=3)
    d = found.known[name]
    s = torch.linalg.svdvals(C)
    assert (d.stable == stable_rank(C) and torch.equal(d.new, intruders(W0, W0 + C))
            and float(d.kept[2])
            == pytest.approx(float(s[:3].square().sum()/s.square().sum()), rel=1e-4))
    assert f'rank 3 keeps {100*float(d.kept[2]):.0f}%' in v.picture(matrix=name, rank=3).alt

def test_prices_are_the_objectives(run):
    base, tok = ftlab.load('lab-s')
    r = run.data.test[0]
    tokens, p = token_prices(run.model, tok, r['prompt'], r['response'], 0., base=base, weight=.5)
    assert (tokens[:-1] == r['response'].split()
            and torch.allclose(p['DFT'], p['NLL']*(-p['NLL']).exp())
            and (p['ASFT'] >= p['DFT']).all() and (p['ASFT'] > p['DFT'] + 1e-4).any())
    assert torch.allclose(p['masked'].mean(0), p['NLL'], atol=1e-4)
    again = token_prices(run.model, tok, r['prompt'], r['response'], .6, base=base)[1]['masked']
    assert (not torch.allclose(again[:, -1], p['NLL'][-1].expand(16))
            and torch.allclose(again[:, 0], p['NLL'][0].expand(16), atol=1e-4))

@pytest.mark.parametrize('chance', [0., .4, .8])
def test_the_prices_are_those_of_the_papers(run, chance):
    "The view computes them itself, as it imports no paper"
    from types import SimpleNamespace
    from ftlab.core.batches import collate
    from ftlab.core.tokens import encode
    from ftlab.trainers.losses.dft import probability
    from ftlab.trainers.losses.masked_thought import mask_answers
    tok, row = run.tok, run.data.test[2]
    p = token_prices(run.model, tok, row['prompt'], row['response'], chance, draws=5, seed=3)[1]
    batch = collate([encode(row, tok, 'text')], tok.pad_token_id)
    many = {k: v.expand(5, -1) for k, v in batch.items()}
    torch.manual_seed(3)
    hidden = mask_answers(chance, 0.)(
        many, SimpleNamespace(tok=tok, step=1, steps=1, pad_id=tok.pad_token_id))
    with torch.no_grad():
        logits = (
            run.model(input_ids=hidden['input_ids'], attention_mask=many['attention_mask']).logits)
    on = loss_mask(batch['labels'])[0]
    assert torch.equal(p['masked'], token_nll(logits, many['labels'])[:, on])
    assert torch.equal(p['DFT'], probability()(p['NLL'])*p['NLL'])

def test_the_frame_counts_what_lies_in_it(views):
    v = views['tradeoff'][0]
    p = v.picture(forgetting=(0., 14.))
    r = json.loads(measured('compare_lab_s/result.json').read_text())
    inside = {m['name']: sum(s['forgetting'] <= .14 for s in m['seeds']) for m in r['methods']}
    assert any(inside.values()) and not all(inside.values())
    for m, n in inside.items():
        assert (f'{n} of {m}' in p.alt) == bool(n)
    assert (p.html.count('<tr>') == 1 + sum(map(bool, inside.values()))
            and 'No run is inside' in v.picture(methods=()).html)

def test_side_by_side_asks_the_base_and_the_tuned_model(run):
    base, tok = ftlab.load('lab-s')
    r = run.data.test[1]
    a, b = (generate(m, tok, [r['prompt']], 40)[0] for m in (base, run.model))
    plain = lambda h: re.sub(r'<[^>]+>', '', h)
    for v in (side_by_side(run), side_by_side(base, run.model, tok)):
        said = plain(v.picture(prompt=r['prompt']).html)
        assert f'base{a}' in said and f'tuned{b}' in said
    assert '<script>' not in side_by_side(run).picture(prompt='<script> what').html

# --- still and live

def bundle(v):
    return v._repr_mimebundle_()

WIDGET = 'application/vnd.jupyter.widget-view+json'

@pytest.fixture
def reader(monkeypatch):
    monkeypatch.setenv('JPY_SESSION_NAME', 'a.ipynb')

@pytest.fixture(autouse=True)
def nobody(monkeypatch):
    monkeypatch.delenv('JPY_SESSION_NAME', raising=False)

def registry():
    from ipywidgets.widgets import widget
    return set(widget._instances)

def test_without_a_reader_a_view_is_a_picture(views):
    was = registry()
    for n, (v, _) in views.items():
        b = bundle(v)
        assert WIDGET not in b and ('text/html' if n in ('tradeoff', 'side_by_side') else 'image/svg+xml') in b
    assert registry() == was

def test_the_module_loads_and_shows_without_widgets():
    code = ("import sys; sys.modules['ipywidgets'] = None; from ftlab.instruments.explore import "
            "View, slider; print(sorted(View(lambda x: f'<b>{x}</b>', 'x', x=slider(1, 0, 2, 1, "
            "'x'))._repr_mimebundle_()))")
    env = {k: v for k, v in os.environ.items() if k != 'JPY_SESSION_NAME'}
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert "['text/html', 'text/plain']" in out.stdout, out.stderr

def test_with_a_reader_it_is_alive_and_follows(reader):
    v = view()
    assert WIDGET in bundle(v)
    leaf = v.leaves['power'][0]
    before = v.shown.value
    leaf.value = 7
    assert (before != v.shown.value == v.picture().html == view().picture(power=7).html
            and 'At one half: 0.0078125' in v.shown.value and leaf.description == 'power'
            and v.settings == dict(power=7))
    for x in [3, 9, 1, 4, 8, 2, 6]*5:
        leaf.value = x
    assert v.shown.value == view().picture(power=6).html
    v.close()

@pytest.mark.parametrize('name', NAMES)
def test_every_handle_changes_its_view_and_close_ends_all(views, reader, name):
    v, other = views[name]
    was = registry()
    bundle(v)
    assert len(registry() - was) > 5 and v.error is None
    for n, value in other.items():
        before = v.shown.value
        if v.controls[n].kind == 'Checkbox':
            for option, leaf in zip(v.controls[n].options['options'], v.leaves[n]):
                leaf.value = option in value
        else:
            v.leaves[n][0].value = value
        assert v.settings[n] == value and v.error is None and (v.shown.value != before or n == 'seed')
    assert v.shown.value == v.picture(**other).html
    v.close()
    assert registry() == was and v.settings == {n: c.value for n, c in v.controls.items()}

def test_an_error_is_shown_and_goes_away_again():
    def draw(x):
        if x == 2:
            raise RuntimeError('no <two>')
        return f'<p>{x}</p>'
    v = View(draw, '', x=slider(1, 0, 3, 1, 'x'))
    v.live()
    v.leaves['x'][0].value = 2
    assert ('role="alert"' in v.shown.value and 'RuntimeError: no &lt;two&gt;' in v.shown.value
            and str(v.error) == 'no <two>')
    v.leaves['x'][0].value = 3
    assert '<p>3</p>' in v.shown.value and v.error is None
    v.close()

def test_every_kind_of_handle_has_a_name_beside_it():
    v = View(lambda **k: str(k), '', a=slider(1., 0., 2., .5, 'one'), b=choice('xy', 'two'),
             c=several('pq', 'three'), d=span(0., 9., 1., 'four'), e=text('t', 'five'))
    import ipywidgets
    box = v.live()
    names = [b.description if not isinstance(b, ipywidgets.HBox) else b.children[0].value
             for b in box.children[:-1]]
    assert ([choice('abcde', 'x').kind, choice('abcdef', 'x').kind]
            == ['RadioButtons', 'SelectionSlider'] and choice(dict(shown=3), 'x').value == 3)
    assert (names == ['one', 'two', 'three', 'four', 'five']
            and v.settings == dict(a=1., b='x', c=('p', 'q'), d=(0., 9.), e='t'))
    v.close()
