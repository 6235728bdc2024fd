"The digits, the flow model and the reader; DiffFit on pictures and on words; the ELM neuron"
from pathlib import Path
import numpy as np, pytest, scipy.linalg, torch
import ftlab
from ftlab.adapters.attach import attach
from ftlab.adapters.subsets.difffit import Scale, difffit, scales_and_biases
from ftlab.beyond.brain.elm import ARMS, ELM, auc, elm, imitate, neuron, score
from ftlab.lab import digits as D
from ftlab.trainers.fit import fit
from toys import TOK, assert_off_saved_folded, lab_data, same, toy, weights

def small_flow(seed=0):
    torch.manual_seed(seed)
    m = D.Flow(D.FlowConfig(hidden=16, blocks=2, heads=2))
    with torch.no_grad(): # a fresh flow says nothing at all, whatever is changed inside
        for p in m.parameters():
            p.add_(.05*torch.randn(p.shape))
    return m.eval()

def ask(model):
    g = torch.Generator().manual_seed(3)
    return model(torch.randn(6, 1, 8, 8, generator=g), torch.rand(6, generator=g),
                 torch.arange(6)).detach()

# ---------- pictures

def test_every_picture_is_in_one_split_and_splits_do_not_depend_on_the_rest():
    all_ten, some = D.digits(), D.digits((8, 9), 'classes')
    keys = {s: {r['pixel_values'].numpy().tobytes() for r in getattr(all_ten, s)}
            for s in ('train', 'validation', 'test')}
    assert (sum(len(getattr(all_ten, s)) for s in keys) == 1797 and not keys['train'] & keys['test']
            and not keys['train'] & keys['validation'] and not keys['validation'] & keys['test'])
    for s in keys:
        assert (len(getattr(some, s)) == sum(r['labels'] >= 8 for r in getattr(all_ten, s))
                and all(r['pixel_values'].numpy().tobytes() in keys[s] for r in getattr(some, s)))
    assert D.digits(n=20, seed=1).fingerprint == D.digits(n=20, seed=1).fingerprint != D.digits(
        n=20, seed=2).fingerprint

def test_looks():
    up, inv, turn = (D.pictures(D.digits(variant=l).test)[0]
                     for l in ('upright', 'inverted', 'rotated'))
    assert (torch.equal(inv, -up) and torch.equal(turn.rot90(-1, (2, 3)), up)
            and not torch.equal(turn, up))
    assert up.min() == -1 and up.max() == 1

@pytest.mark.parametrize('kw', [dict(of=()), dict(of=(3, 10)), dict(key='label'),
                                dict(variant='mirrored'), dict(n=0), dict(n=5000)])
def test_bad_requests_are_refused(kw):
    with pytest.raises(ValueError, match=next(iter(kw))):
        D.digits(**kw)

def test_a_shift_moves_by_a_pixel_at_most_and_loses_no_ink_inside():
    x = -torch.ones(200, 1, 8, 8)
    x[:, 0, 3, 4] = 1.
    torch.manual_seed(0)
    y = D.shifted(dict(pixel_values=x))['pixel_values']
    at = y.flatten(1).argmax(1)
    places = {(int(i)//8 - 3, int(i) % 8 - 4) for i in at}
    assert (torch.equal(y.sum((1, 2, 3)), x.sum((1, 2, 3)))
            and places == {(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)})

# ---------- drawing

def test_a_fresh_flow_stands_still_and_patches_come_back_where_they_were():
    m = D.fresh('digits-flow')
    assert not ask(m).any()
    x = torch.randn(2, 1, 8, 8)
    u = torch.nn.functional.unfold(x, 2, stride=2)
    assert torch.equal(torch.nn.functional.fold(u, 8, 2, stride=2), x)
    with torch.no_grad():
        m.head.bias.copy_(torch.tensor([1., 2., 3., 4.]))
    assert torch.equal(ask(m)[0, 0, 2:4, 4:6], torch.tensor([[1., 2.], [3., 4.]]))

def test_the_flow_hears_class_and_time_and_its_parts_have_places():
    m = small_flow()
    x = torch.randn(1, 1, 8, 8).expand(2, -1, -1, -1)
    t = torch.tensor([.3, .3])
    assert (not torch.equal(*m(x, t, torch.tensor([1, 2])))
            and not torch.equal(*m(x, torch.tensor([.1, .9]), torch.tensor([1, 1]))))
    a = ftlab.anatomy(m, D.FLOW_FAMILIES)
    assert len(a.blocks) == 2 and len(a.matrices()) == 8 and a.head == 'head.weight'

def test_training_draws_better_repeats_and_resumes(tmp_path):
    def go(**kw):
        return fit(small_flow(), None, D.digits((0, 1), 'classes'), D.flow(), steps=12,
                   batch_size=16, lr=3e-3, progress=False, **kw)

    a, b = go(), go()
    assert (a.log[-1]['loss'] < a.log[0]['loss'] and a.log[0]['nll'] is None
            and same(weights(a.model), weights(b.model)))
    class Stop:
        def after_step(self, state):
            if state.step == 6:
                raise KeyboardInterrupt
    go(out=tmp_path, save_every=3, callbacks=(Stop(),))
    c = go(out=tmp_path, save_every=3, resume=True)
    assert same(weights(a.model), weights(c.model))

@pytest.mark.peer('frechet', 'scipy', 'distance of two samples', tolerance=dict(rtol=1e-6))
def test_frechet_is_scipys(tolerance):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 6))@rng.normal(size=(6, 6)), rng.normal(size=(200, 6)) + 1
    Ca, Cb = np.cov(a.T), np.cov(b.T)
    want = ((a.mean(0) - b.mean(0))**2).sum() + np.trace(Ca + Cb - 2*scipy.linalg.sqrtm(Ca@Cb).real)
    assert abs(D.frechet(torch.tensor(a), torch.tensor(b)) - want) < tolerance['rtol']*want
    with pytest.raises(ValueError, match='at least two'):
        D.frechet(torch.zeros(1, 3), torch.zeros(5, 3))

def test_the_models_that_ship():
    reader, drawer = D.load('digits-vit'), D.load('digits-flow')
    x, y = D.pictures(D.digits().test)
    assert (D.read(reader, x) == y).float().mean() > .93
    assert D.quality(drawer, reader, range(8), 160)['accuracy'] > .85 > .5 > D.quality(
        drawer, reader, (8, 9), 60)['accuracy']
    assert (D.CHECKPOINTS.exists()
            and sum(f.stat().st_size for f in D.CHECKPOINTS.rglob('*') if f.is_file()) < 2e6)
    with pytest.raises(ValueError, match='digits-vit, digits-flow'):
        D.load('digits')
    with pytest.raises(FileNotFoundError, match='pretrain'):
        D.load('digits-vit', Path('nowhere'))

def test_pretraining_writes_what_load_reads(tmp_path):
    for name in D.MODELS:
        D.pretrain(name, tmp_path/name, fit, steps=2)
        m = D.load(name, tmp_path)
        assert (not same(weights(m), weights(D.fresh(name)))
                and sorted(f.name for f in (tmp_path/name).iterdir())
                == ['config.json', 'model.safetensors', 'pretraining.jsonl'])

# ---------- DiffFit

def test_difffit_moves_what_it_says_and_no_matrix():
    m = small_flow()
    was = weights(m)
    run = fit(m, None, D.digits((8, 9), 'classes'), difffit()*D.flow(), steps=4, batch_size=8,
              progress=False)
    att = run.delta.attached
    att.fold()
    now = weights(run.model)
    moved = {n for n in was if not torch.equal(was[n], now[n])}
    scaled = {'blocks.0.o.weight', 'blocks.0.down.weight'}
    assert scaled <= moved and 'classes.weight' in moved
    assert (all(n.endswith('bias') or n in scaled | {'classes.weight'} for n in moved)
            and {n for n in was if n.endswith('bias')} <= moved)
    for n in scaled: # a row is scaled as a whole
        ratio = now[n]/was[n]
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), atol=1e-4, rtol=0)
        assert ratio[:, 0].std() > 0

def test_difffit_on_a_flow_keeps_its_promises(tmp_path):
    data = D.digits((8, 9), 'classes')
    base = ask(small_flow())
    m = small_flow()
    r = difffit()
    att = attach(m, r.select(m), r.delta)
    assert torch.equal(ask(m), base)
    att.detach()
    run = fit(small_flow(), None, data, difffit()*D.flow(), steps=5, batch_size=8, progress=False)
    tuned = assert_off_saved_folded(run, base, small_flow(), ask, tmp_path/'d.safetensors')
    assert not torch.equal(tuned, base)

def test_difffit_on_words():
    m = toy()
    chosen = scales_and_biases(1.)(m)
    a = ftlab.anatomy(m)
    assert {n for n, x in chosen.items() if x is True} == {
        n for b in a.blocks for n in (b.attention['o'], b.mlp['down'])}
    assert {n for n, x in chosen.items() if x is not True} == {
        n for n, p in m.named_parameters() if p.ndim == 1}
    assert not any(x is True for x in scales_and_biases(0.)(m).values())
    was = weights(m)
    run = fit(m, TOK, lab_data(), difffit(scaled=1.), steps=5, batch_size=8, progress=False)
    run.delta.attached.fold()
    now = weights(run.model)
    assert {n for n in was if not torch.equal(was[n], now[n])} == set(chosen)
    with pytest.raises(ValueError, match='between 0 and 1'):
        scales_and_biases(2.)

def test_scaling_rows_is_scaling_what_the_layer_writes():
    W, x = torch.randn(5, 3), torch.randn(7, 3)
    s = Scale(W)
    assert torch.equal(s(W), W)
    with torch.no_grad():
        s.more.copy_(torch.arange(5.))
    torch.testing.assert_close(x@s(W).T, torch.arange(1., 6.)*(x@W.T))

# ---------- the ELM neuron

def test_the_elm_neuron_is_causal_and_keeps_w_s_from_inhibiting():
    torch.manual_seed(0)
    m = ELM(4, memories=3)
    x = (torch.rand(2, 30, 4) < .2).float()
    y = x.clone()
    y[:, 20:] = 1 - y[:, 20:]
    assert torch.equal(m(x)[:, :20], m(y)[:, :20]) and not torch.equal(m(x)[:, 20:], m(y)[:, 20:])
    with torch.no_grad():
        m.w_s[0] = -1.
    assert not m.traces(x)[..., 0].any() and m.traces(x)[..., 1].any()

def test_a_trace_is_the_echo_of_one_spike():
    m = ELM(2, tau_s=4.)
    x = torch.zeros(1, 12, 2)
    x[0, 3, 1] = 1.
    s = m.traces(x)[0].detach()
    assert not s[:3].any() and not s[:, 0].any()
    torch.testing.assert_close(s[3:, 1], .5*torch.exp(-torch.arange(9.)/4))

def test_auc():
    e = torch.tensor([0., 0, 1, 1])
    assert (auc(torch.tensor([1., 2, 3, 4]), e) == 1 and auc(torch.tensor([4., 3, 2, 1]), e) == 0
            and auc(torch.ones(4), e) == .5)
    with pytest.raises(ValueError):
        auc(torch.ones(3), torch.zeros(3))

def test_the_study_learns_something_and_repeats():
    m = imitate('elm', 1e-2, steps=12, seed=7)
    assert .55 < score(m, 7, 'validation') < score(None, 7, 'validation')
    assert (same(weights(m), weights(imitate('elm', 1e-2, steps=12, seed=7)))
            and elm.paper.arxiv == '2306.16922')
    sizes = [sum(p.numel() for p in make().parameters()) for make in ARMS.values()]
    assert max(sizes) < 1.02*min(sizes)
    with pytest.raises(ValueError, match='elm, short, lstm'):
        imitate('gru', 1e-2)

def test_the_neuron_remembers():
    "Its plateaus outlast its input: long after the last burst it still fires more than one that had no burst"
    x, y, chance = neuron(400, 200, seed=5)
    recent = torch.stack([x[:, t - 20:t].sum((1, 2)) for t in (150,)], 1)[:, 0]
    before = x[:, 60:120].sum((1, 2))
    quiet = recent < recent.median()
    assert np.corrcoef(before[quiet], chance[quiet, 150])[0, 1] > .2
