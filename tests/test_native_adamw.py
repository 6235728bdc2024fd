"""Sparse AdamW: C++ against the plain version bit for bit, both against torch's AdamW,
the gradients that do not stay, and the narrow backward pass"""
import copy, json, math
import numpy as np, pytest, torch, torch.utils.checkpoint
from torch import nn
from ftlab.native import SparseAdamW, backend, blocks, columns, kth_magnitude, rows, selected_linear
from ftlab.native import adamw
from pages import ROOT

TYPES = (torch.float32, torch.bfloat16, torch.float16)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU here')
DEVICES = ['cpu', pytest.param('cuda', marks=cuda)]

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

def same(a, b):
    return all(torch.equal(x.nan_to_num(7, 8, 9), y.nan_to_num(7, 8, 9))
               for x, y in zip(a, b, strict=True))

def selections():
    "(shape, selection) of every kind, odd sizes among them"
    r = lambda shape, share: (shape, torch.rand(shape) < share)
    return [((5,), True), ((), True), ((0,), True), ((0, 3), torch.zeros(0, 3, dtype=torch.bool)),
            ((9, 7), torch.zeros(9, 7, dtype=torch.bool)), r((4097,), .01), r((4095,), .5),
            r((70, 130), .05), r((129, 64), .9), r((12289, 3), .2), ((), torch.tensor(True)),
            ((300,), torch.tensor([0, 7, 299], dtype=torch.int32)), ((300,), torch.arange(3, 203)),
            ((12, 5), rows([0, 11, 3])), ((3, 4, 5), rows([1])), ((6, 1), rows([2, 5])),
            ((12, 5), columns([4, 1])), ((3, 4, 5), columns([0, 4])),
            ((1, 8193), columns(range(0, 8193, 3))),
            ((12, 10), blocks([(1, 0), (0, 1), (2, 1)], (4, 5))), ((12, 10), blocks([(3, 4)], 2))]

def flat(p, s):
    layout = adamw._choose(p.detach(), s)
    i = adamw._positions(p, layout['at'], layout['length'], layout['stride'])
    return p.detach().view(-1)[i]

def train(cases, dtype, steps=4, lists=False, device='cpu', **settings):
    "A few steps on random gradients; what became of the parameters and moments"
    g = torch.Generator().manual_seed(5)
    ps = [nn.Parameter(torch.randn(shape, generator=g).to(device, dtype)) for shape, _ in cases]
    opt = SparseAdamW([(p, s) for p, (_, s) in zip(ps, cases)], lr=.01, **settings)
    for step in range(steps):
        for i, p in enumerate(ps):
            p.grad = torch.randn(p.shape, generator=g).to(device, dtype) if (i + step) % 3 else None
        if lists:
            opt.grads()
        opt.step()
        opt.zero_grad()
    return [p.detach().cpu() for p in ps], [opt.state[p][k].cpu() for p in ps for k in ('exp_avg', 'exp_avg_sq')]

# --- the arithmetic

@pytest.mark.parametrize('lists', [False, True], ids=['dense', 'gathered'])
@pytest.mark.parametrize('dtype', TYPES)
def test_the_step_is_the_plain_version_to_the_last_bit(dtype, lists, monkeypatch):
    ours = train(selections(), dtype, lists=lists, weight_decay=.1)
    monkeypatch.setenv('FTLAB_NATIVE', 'torch')
    torch.manual_seed(0)
    theirs = train(selections(), dtype, lists=lists, weight_decay=.1)
    assert same(ours[0], theirs[0]) and same(ours[1], theirs[1])

@pytest.mark.parametrize('dtype', TYPES)
def test_gathered_gradients_step_as_dense_ones_do(dtype):
    cases = selections()
    (a, b), (c, d) = train(cases, dtype), train(cases, dtype, lists=True)
    assert same(a, c) and same(b, d)

@pytest.mark.peer('SparseAdamW', 'torch',
                  'weights after 200 steps with everything selected', tolerance=2e-5)
@pytest.mark.parametrize('decay', [0., .1])
def test_with_everything_selected_it_is_torchs_adamw(decay, tolerance):
    """200 steps, float32, against torch's own in float64:
    no further from it than torch's float32 is, within a tenth"""
    def run(dtype, make):
        g = torch.Generator().manual_seed(1)
        ps = [nn.Parameter(torch.randn(s, generator=g).to(dtype))
              for s in [(40, 30), (7,), (2, 3, 4)]]
        opt = make(ps)
        for _ in range(200):
            for p in ps:
                p.grad = torch.randn(p.shape, generator=g).to(dtype) + p.detach()
            opt.step()
        return torch.cat([p.detach().flatten().double() for p in ps])
    torchs = lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=decay)
    exact, theirs = run(torch.float64, torchs), run(torch.float32, torchs)
    ours = run(torch.float32,
               lambda ps: SparseAdamW({p: True for p in ps}, lr=1e-2, weight_decay=decay))
    error = lambda x: (x - exact).pow(2).mean().sqrt()
    assert error(ours) <= 1.1*error(theirs) + 1e-9 and (ours - theirs).abs().max() < tolerance

@pytest.mark.peer('SparseAdamW', 'torch',
                  'weights after 20 steps on a selection', tolerance=dict(rtol=1e-5, atol=1e-6))
@pytest.mark.parametrize('decay', [0., .1])
@pytest.mark.parametrize('case', range(len(selections())))
def test_it_is_a_dense_adamw_with_masked_gradients_whose_other_weights_stay(case, decay, tolerance):
    shape, s = selections()[case]
    p = nn.Parameter(torch.randn(shape))
    q = nn.Parameter(p.detach().clone())
    start = p.detach().clone()
    ours, theirs = (SparseAdamW({p: s}, lr=.01, weight_decay=decay),
                    torch.optim.AdamW([q], lr=.01, weight_decay=decay))
    on = ours.selected(p)
    for _ in range(20):
        g = torch.randn(shape)
        p.grad, q.grad = g.clone(), g*on
        ours.step()
        theirs.step()
        q.data[~on] = start[~on]
    assert (torch.equal(p[~on], start[~on]) and torch.allclose(p, q, **tolerance)
            and on.sum() == len(ours.state[p]['exp_avg']))
    assert torch.allclose(ours.state[p]['exp_avg'], theirs.state[q]['exp_avg'][on], rtol=1e-4,
                          atol=1e-7)

@pytest.mark.parametrize('dtype', TYPES)
def test_one_step_errs_no_more_than_torch(dtype):
    "Against float64, from the same moments: the weights' error is one rounding"
    p0, m0, v0, g = (torch.randn(5000).to(dtype), torch.randn(5000)*.1, torch.rand(5000),
                     torch.randn(5000).to(dtype))
    p = nn.Parameter(p0.clone())
    opt = SparseAdamW({p: True}, lr=.1, weight_decay=.1)
    opt.state[p].update(step=9, exp_avg=m0.clone(), exp_avg_sq=v0.clone())
    p.grad = g
    opt.step()
    m, v = .9*m0.double() + .1*g.double(), .999*v0.double() + .001*g.double()**2
    exact = p0.double()*(1 - .01) - .1*(m/(1 - .9**10))/((v/(1 - .999**10)).sqrt() + 1e-8)
    unit = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert ((p.detach().double() - exact).abs() <= unit*exact.abs() + 1e-7).all()
    assert (torch.allclose(opt.state[p]['exp_avg'].double(), m, rtol=1e-6, atol=1e-7)
            and torch.allclose(opt.state[p]['exp_avg_sq'].double(), v, rtol=1e-6))

def test_threads_and_cuts_do_not_matter():
    cases = [((300_001,), torch.rand(300_001) < .3),
             ((5,), True),
             ((700, 400), rows(range(0, 700, 9))),
             ((400, 700), columns(range(0, 700, 9))),
             ((90_000,), torch.rand(90_000) < .02)]
    threads, out = torch.get_num_threads(), []
    try:
        for t in (1, 2, 3):
            torch.set_num_threads(t)
            out.append(train(cases, torch.float32)[0])
    finally:
        torch.set_num_threads(threads)
    assert same(out[0], out[1]) and same(out[0], out[2])

def test_many_small_tensors_go_as_one_by_one():
    ps = [nn.Parameter(torch.randn(1 + i % 40)) for i in range(300)]
    qs = [nn.Parameter(p.detach().clone()) for p in ps]
    together, apart = SparseAdamW({p: True for p in ps}), [SparseAdamW({q: True}) for q in qs]
    for p, q in zip(ps, qs):
        p.grad = torch.randn(p.shape)
        q.grad = p.grad.clone()
    together.step()
    [o.step() for o in apart]
    assert same([p.detach() for p in ps], [q.detach() for q in qs])

@pytest.mark.parametrize('dtype', TYPES)
def test_nan_and_infinity_stay_with_their_entry(dtype, monkeypatch):
    def run():
        p = nn.Parameter(torch.ones(64, dtype=dtype))
        opt = SparseAdamW({p: torch.arange(64) % 2 == 0})
        g = torch.ones(64, dtype=dtype)
        g[2], g[4], g[5], g[6] = math.nan, math.inf, math.nan, -math.inf
        p.grad = g
        opt.step()
        return p.detach()
    p = run()
    bad = ~p.isfinite()
    assert (bad.nonzero().flatten().tolist() == [2, 4, 6]
            and torch.equal(p[1::2], torch.ones(32, dtype=dtype)))
    monkeypatch.setenv('FTLAB_NATIVE', 'torch')
    assert same([p], [run()])

def test_misaligned_views_train_and_gradients_of_another_order_too():
    p = nn.Parameter(torch.randn(1001)[1:])
    q = nn.Parameter(p.detach().clone())
    a, b = SparseAdamW({p: torch.arange(1000) < 77}), SparseAdamW({q: torch.arange(1000) < 77})
    p.grad = torch.randn(1002)[2:]
    q.grad = p.grad.clone()
    a.step()
    b.step()
    assert same([p.detach()], [q.detach()])
    p = nn.Parameter(torch.randn(6, 4))
    q = nn.Parameter(p.detach().clone())
    a, b = SparseAdamW({p: rows([1])}), SparseAdamW({q: rows([1])})
    p.grad = torch.randn(4, 6).t()
    q.grad = p.grad.contiguous()
    a.step()
    b.step()
    assert same([p.detach()], [q.detach()])

# --- what is kept

def test_the_layout_is_the_smallest():
    def layout(mask):
        c = adamw._choose(torch.zeros(mask.shape), mask)
        return c['at'].dtype, c['length'], c['stride'], c['at'].nbytes

    m = torch.zeros(64, 96, dtype=torch.bool)
    one = m.clone()
    one[3, 5] = one[4, 9] = True
    assert layout(one) == (torch.int32, 1, 0, 8)
    dense = torch.rand(64, 96) < .3
    assert layout(dense) == (torch.uint8, 0, 0, 768)
    line = m.clone()
    line[[2, 60]] = True
    assert layout(line) == (torch.int32, 96, 0, 8)
    line = m.clone()
    line[:, [2, 60, 90]] = True
    assert layout(line) == (torch.int32, 1, 96, 12) and layout(~m) == (torch.int32, 64*96, 0, 4)

@pytest.mark.parametrize('density', [.02, .05, .5])
def test_the_state_takes_eight_bytes_for_each_entry_and_little_to_say_which(density):
    p = nn.Parameter(torch.randn(512, 640))
    n = p.numel()
    k = int(density*n)
    opt = SparseAdamW({p: kth_magnitude(p, k, 'mask')})
    p.grad = torch.randn(512, 640)
    opt.step()
    total = sum(t.nbytes for t in opt.state[p].values() if torch.is_tensor(t))
    assert 8*k <= total <= 8*k + min(4*k, n/8 + 8*(n/4096 + 1))

def test_every_way_of_saying_it_selects_the_same():
    p = torch.randn(33, 17)
    mask = torch.rand(33, 17) < .4
    want = mask.flatten().nonzero().flatten()
    bits = adamw._bits(mask.flatten())['at']
    for s in (mask, want, want.int(), bits):
        assert torch.equal(flat(p, s), p[mask])
    assert (torch.equal(flat(p, rows([30, 2])), p[[2, 30]].flatten())
            and torch.equal(flat(p, columns([16, 2])), p[:, [2, 16]].flatten()))
    q = torch.arange(24.).view(4, 6)
    assert flat(q, blocks([(1, 0), (0, 1)], (2, 3))).tolist() == [
        3, 4, 5, 9, 10, 11, 12, 13, 14, 18, 19, 20]

@pytest.mark.parametrize('kinds', [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0), (5, 1), (0, 5)])
def test_another_selection_keeps_the_moments_of_what_stays(kinds):
    ways = [torch.rand(24, 20) < .5, rows([1, 5, 9]), columns([0, 3]),
            blocks([(0, 0), (2, 1)], (4, 10)), torch.tensor([0, 21, 479]),
            torch.zeros(24, 20, dtype=torch.bool)]
    p = nn.Parameter(torch.randn(24, 20))
    opt = SparseAdamW({p: ways[kinds[0]]})
    p.grad = torch.randn(24, 20)
    opt.step()
    old, before = (opt.selected(p),
                   {k: torch.zeros(24, 20).masked_scatter(opt.selected(p), opt.state[p][k])
                    for k in ('exp_avg', 'exp_avg_sq')})
    opt.select(p, ways[kinds[1]])
    new = opt.selected(p)
    for k, v in before.items():
        assert torch.equal(opt.state[p][k], v[new]) and opt.state[p][k][~old[new]].eq(0).all()
    assert opt.state[p]['step'] == 1
    was = p.detach().clone()
    p.grad = torch.randn(24, 20)
    opt.step()
    assert torch.equal(p[~new], was[~new])

@pytest.mark.parametrize('dtype', TYPES)
def test_a_checkpoint_goes_on_to_the_last_bit(dtype):
    cases = selections()
    g = torch.Generator().manual_seed(2)
    ps = [nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape, _ in cases]
    opt = SparseAdamW([(p, s) for p, (_, s) in zip(ps, cases)], lr=.1)
    def go(ps, opt, n, seed):
        g = torch.Generator().manual_seed(seed)
        for _ in range(n):
            for p in ps:
                p.grad = torch.randn(p.shape, generator=g).to(dtype)
            opt.step()
    go(ps, opt, 3, 0)
    saved = copy.deepcopy(opt.state_dict())
    qs = [nn.Parameter(p.detach().clone()) for p in ps]
    saved['state'] = {i: {k: torch.as_tensor(v) for k, v in s.items()}
                      for i, s in saved['state'].items()} # numbers as tensors, as files hold them
    other = SparseAdamW([(q, True) for q in qs], lr=.5)
    other.load_state_dict(saved)
    assert all(other.state[q]['exp_avg'].dtype == torch.float32 for q in qs)
    go(ps, opt, 3, 1)
    go(qs, other, 3, 1)
    assert (same([p.detach() for p in ps], [q.detach() for q in qs])
            and other.param_groups[0]['lr'] == .1)

def test_a_checkpoint_of_other_parameters_changes_nothing():
    p, q = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(3, 5))
    opt, other = SparseAdamW({p: rows([3])}), SparseAdamW({q: rows([0])})
    before = copy.deepcopy(other.state_dict())
    for bad in (opt.state_dict(), torch.optim.AdamW([q]).state_dict(),
                SparseAdamW({p: True, q: True}).state_dict()):
        with pytest.raises(ValueError):
            other.load_state_dict(bad)
    adam = torch.optim.AdamW([q])
    q.grad = torch.zeros(3, 5)
    adam.step()
    with pytest.raises(ValueError, match='not of SparseAdamW'):
        other.load_state_dict(adam.state_dict())
    assert str(other.state_dict()) == str(before)

# --- gradients that do not stay

def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(64, 8)
    return net, x, x[:, :1]*x[:, 1:2]

def test_no_two_dense_gradients_are_there_at_once():
    net, x, y = small()
    opt = SparseAdamW({p: torch.rand(p.shape) < .5 for p in net.parameters()}).gather()
    seen = []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: seen.append(sum(q.grad is not None for q in net.parameters())))
    (net(x) - y).pow(2).mean().backward()
    assert seen == [0]*6 and len(opt.grads()) == 6 and all(p.grad is None for p in net.parameters())
    opt.gather(False)
    (net(x) - y).pow(2).mean().backward()
    assert all(p.grad is not None for p in net.parameters())

def test_accumulation_clipping_and_the_hook_are_what_torch_does_with_masks():
    "Two backward passes a step, clipped by the norm of what is selected"
    net, x, y = small()
    twin = copy.deepcopy(net)
    ps, qs = list(net.parameters()), list(twin.parameters())
    masks = [torch.rand(p.shape) < .4 for p in ps]
    ours, theirs = (SparseAdamW(zip(ps, masks), lr=.01).gather(),
                    torch.optim.AdamW(qs, lr=.01, weight_decay=0.))
    for _ in range(20):
        for half in (slice(0, 32), slice(32, 64)):
            (net(x[half]) - y[half]).pow(2).mean().backward()
            (twin(x[half]) - y[half]).pow(2).mean().backward()
        for q, m in zip(qs, masks):
            q.grad *= m
        a, b = ours.clip_grad_norm_(.3), nn.utils.clip_grad_norm_(qs, .3)
        assert torch.allclose(a, b, rtol=1e-5)
        ours.step()
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(ps, qs))

def test_a_gradient_that_is_no_number_shows_in_the_norm_before_anything_moves():
    p = nn.Parameter(torch.ones(10))
    opt = SparseAdamW({p: torch.arange(10) > 4}).gather()
    (p*torch.tensor([1.]*9 + [math.inf])).sum().backward()
    assert not opt.clip_grad_norm_(1.).isfinite()
    opt.zero_grad()
    opt.step()
    assert torch.equal(p, torch.ones(10)) and opt.state[p]['step'] == 0
    (p*torch.tensor([math.nan] + [1.]*9)).sum().backward()
    assert opt.clip_grad_norm_(math.inf).isfinite() # what is not selected does not count

def test_a_parameter_without_gradient_and_a_tied_one():
    tied, idle = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3))
    opt = SparseAdamW({tied: rows([0, 2]), idle: True}, lr=.1).gather()
    start = idle.detach().clone()
    x = torch.randn(5, 4)
    ((x @ tied.t()).tanh() @ tied).sum().backward()
    q = nn.Parameter(tied.detach().clone())
    ((x @ q.t()).tanh() @ q).sum().backward()
    assert torch.allclose(opt.grads()[0], q.grad[[0, 2]].flatten()) and len(opt.grads()) == 1
    opt.step()
    assert (torch.equal(idle, start) and opt.state[idle]['step'] == 0
            and opt.state[tied]['step'] == 1)

def test_groups_schedules_and_closures_work_as_with_torch():
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    opt = SparseAdamW([dict(selected={a: True}), dict(selected={b: True}, lr=.5)], lr=.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: .5**s)

    def closure():
        opt.zero_grad()
        loss = (a + b).sum()
        loss.backward()
        return loss

    assert (opt.step(closure) == 8. and torch.allclose(a, torch.tensor(.9))
            and torch.allclose(b, torch.tensor(.5)))
    schedule.step()
    assert [g['lr'] for g in opt.param_groups] == [.05, .25]
    opt.gather()
    opt.add_param_group(dict(selected={(c := nn.Parameter(torch.ones(2))): torch.tensor([1])}))
    c.sum().backward()
    assert c.grad is None and len(opt.grads()) == 3

def test_autograd_knows_that_parameters_moved():
    p = nn.Parameter(torch.ones(5))
    opt = SparseAdamW({p: True})
    y = (p*p).sum()
    p.grad = torch.ones(5)
    opt.step()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.backward()

def test_a_copy_goes_on_from_the_same_state():
    net = nn.Linear(4, 3)
    opt = SparseAdamW({net.weight: rows([1])}).gather()
    net(torch.ones(2, 4)).sum().backward()
    opt.step()
    other = copy.deepcopy(opt)
    w, = other.param_groups[0]['params']
    assert other.state[w]['step'] == 1 and other.selected(w)[1].all() and other.grads() == []
    w.grad = torch.full((3, 4), 2.)
    other.step()
    opt.step()
    assert torch.equal(w, net.weight)

def test_autocast_and_checkpointing_leave_the_narrow_layer_right():
    net, x = nn.Linear(6, 6), torch.randn(5, 6)
    opt = SparseAdamW({net.weight: rows([2, 3])})
    opt.narrow(net)
    with torch.autocast('cpu', torch.bfloat16):
        net(x).float().sum().backward()
    half, = opt.grads()
    assert (half.dtype == torch.float32
            and torch.allclose(half.view(2, 6), x.sum(0).expand(2, 6), rtol=2e-2, atol=5e-2))
    opt.zero_grad()
    torch.utils.checkpoint.checkpoint(lambda x: net(net(x)).pow(2).sum(), x.requires_grad_(),
                                      use_reentrant=False).backward()
    again, = opt.grads()
    opt.narrow(net, on=False)
    net(net(x)).pow(2).sum().backward()
    assert torch.allclose(again.view(2, 6), net.weight.grad[[2, 3]], rtol=1e-5, atol=1e-5)

# --- the narrow backward pass

WAYS = [rows([4, 1]), columns([0, 2, 5]), blocks([(0, 0), (0, 2), (2, 1)], 2),
        blocks([(0, 0), (1, 0), (1, 1)], (3, 2)), True]

def _part(W, s):
    return flat(W, s).clone()

@pytest.mark.parametrize('s', WAYS)
def test_gradcheck_of_the_narrow_layer(s):
    """The part's numbers are put into the weight first,
    so that the output depends on them as the gradient says"""
    shape, W = (6, 6), torch.randn(6, 6, dtype=torch.float64)
    c = adamw._choose(torch.zeros(shape), s)
    i = adamw._positions(W, c['at'], c['length'], c['stride'])

    def f(x, part, b):
        V = W.clone()
        V.view(-1)[i] = part.detach()
        return adamw._Narrow.apply(x, part, V, b, adamw._rectangles(W, c))

    part = W.view(-1)[i].clone().requires_grad_()
    x, b = (torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True),
            torch.randn(6, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(f, (x, part, b))

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('s', WAYS)
def test_the_narrow_gradient_is_the_dense_ones_part(s, dtype):
    W, b, x = (nn.Parameter(torch.randn(6, 6).to(dtype)), nn.Parameter(torch.randn(6).to(dtype)),
               torch.randn(2, 3, 6).to(dtype).requires_grad_())
    go = torch.randn(2, 3, 6).to(dtype)
    y = nn.functional.linear(x, W, b)
    y.backward(go)
    dense, db, dx = W.grad, b.grad, x.grad
    W.grad = b.grad = x.grad = None
    want = flat(dense, s)
    part = torch.zeros(len(want), dtype=dtype, requires_grad=True)
    z = selected_linear(x, W, part, s, b)
    z.backward(go)
    close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    assert (torch.equal(y, z) and W.grad is None and torch.allclose(part.grad, want, **close)
            and torch.equal(b.grad, db) and torch.allclose(x.grad, dx, **close))

def test_the_narrow_backward_never_makes_a_dense_gradient():
    "No product as large as the weight, by torch's own account of what was computed"
    from torch.utils._python_dispatch import TorchDispatchMode
    class Largest(TorchDispatchMode):
        size = 0
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **kwargs or {})
            storage = out.untyped_storage().nbytes() if isinstance(out, torch.Tensor) else 0
            Largest.size = max(Largest.size, storage if f.__name__.split('.')[0] not in ('t', 'detach', 'view') else 0)
            return out
    W, x = nn.Parameter(torch.randn(300, 200)), torch.randn(10, 200)
    part = torch.zeros(5, 200, requires_grad=True)
    y = selected_linear(x, W, part, rows(range(0, 300, 60)))
    with Largest():
        y.sum().backward()
    assert part.grad.shape == (5, 200) and Largest.size < W.numel()*4/10

@pytest.mark.parametrize('s', WAYS)
def test_narrow_layers_train_as_wide_ones(s):
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    thin, x = copy.deepcopy(wide), torch.randn(32, 6)
    y = x.roll(1, 1)
    select = lambda net: {l.weight: s for l in net if isinstance(l, nn.Linear)} | {
        net[0].bias: True}
    a, b = SparseAdamW(select(wide), lr=.01), SparseAdamW(select(thin), lr=.01)
    for l in (thin[0], thin[2]):
        b.narrow(l)
    for i in range(30):
        for net, opt in ((wide, a), (thin, b)):
            (net(x[:16]) - y[:16]).pow(2).mean().backward()
            (net(x[16:]) - y[16:]).pow(2).mean().backward()
        assert thin[0].weight.grad is None
        a.clip_grad_norm_(1.)
        b.clip_grad_norm_(1.)
        for opt in (a, b):
            opt.step()
            opt.zero_grad()
        if i == 15:
            [opt.select(net[0].weight, rows([0, 3])) for net, opt in ((wide, a), (thin, b))]
    assert all(torch.allclose(p, q, atol=2e-5)
               for p, q in zip(wide.parameters(), thin.parameters()))
    b.narrow(thin[0], on=False)
    thin(x).sum().backward()
    assert thin[0].weight.grad is not None

# --- a whole training

@pytest.mark.parametrize('hook', [False, True])
def test_200_steps_with_the_kernel_and_with_the_plain_version_end_alike(hook, monkeypatch):
    """A tenth of the weights, chosen anew every 50 steps, by hook or dense:
    the same weights and losses to the last bit"""
    def go(mode):
        monkeypatch.setenv('FTLAB_NATIVE', mode)
        net, x, y = small()
        ps = list(net.parameters())
        opt = SparseAdamW({p: kth_magnitude(p, max(1, p.numel()//10), 'mask') for p in ps},
                          lr=.01).gather(hook)
        for step in range(200):
            if step and step % 50 == 0:
                [opt.select(p, kth_magnitude(p, max(1, p.numel()//10), 'mask')) for p in ps]
            loss = (net(x) - y).pow(2).mean()
            loss.backward()
            opt.clip_grad_norm_(1.)
            opt.step()
            opt.zero_grad()
            if not step:
                first = loss.item()
        return [p.detach() for p in ps], loss.item(), first
    (ours, a, first), (theirs, b, _) = go('auto'), go('torch')
    assert same(ours, theirs) and a == b and a < first

# --- what is refused

@pytest.mark.parametrize(
    's, say', [(torch.ones(3, dtype=torch.bool), 'shape'),
               (torch.ones(2, dtype=torch.uint8), 'bytes'),
               (torch.ones(5, 6), 'float32'),
               (torch.tensor([255, 255, 255, 255], dtype=torch.uint8), 'beyond the last'),
               (torch.tensor([1, 1]), 'ascending'),
               (torch.tensor([5, 1]), 'ascending'),
               (torch.tensor([0, 30]), '0 to 29'),
               (torch.tensor([-1]), '0 to 29'),
               (None, 'not a selection'),
               (False, 'not a selection'),
               (rows([5]), 'rows has 5, but'),
               (columns([-1]), 'columns has -1, but'),
               (rows([1, 1]), 'has a duplicate'),
               (blocks([(0, 0)], 4), 'divide'),
               (blocks([(0, 2)], (5, 3)), 'no block')])
def test_what_is_no_selection_is_refused(s, say):
    p = nn.Parameter(torch.zeros(5, 6))
    with pytest.raises(ValueError, match=say):
        SparseAdamW({p: s})
    opt = SparseAdamW({p: True})
    with pytest.raises(ValueError, match=say):
        opt.select(p, s)
    assert opt.selected(p).all()

@pytest.mark.parametrize(
    'change, say', [(dict(lr=-1.), 'lr'),
                    (dict(lr=math.nan), 'lr'),
                    (dict(betas=(1., .9)), 'betas'),
                    (dict(eps=-1.), 'eps'),
                    (dict(weight_decay=-1.), 'weight_decay'),
                    (dict(selected={}), 'nothing'),
                    (dict(selected=[torch.zeros(2)]), 'must be a pair'),
                    (dict(selected={nn.Parameter(torch.zeros(2).double()): True}), 'float64'),
                    (dict(selected={nn.Parameter(torch.zeros(4, 6).t()): True}), 'not contiguous')])
def test_settings_that_make_no_sense_are_refused(change, say):
    with pytest.raises(ValueError, match=say):
        SparseAdamW(**(dict(selected={nn.Parameter(torch.zeros(3)): True}) | change))

def test_the_rest_that_is_refused():
    p, other = nn.Parameter(torch.zeros(4, 4)), nn.Linear(4, 4)
    with pytest.raises(ValueError, match='twice'):
        SparseAdamW([(p, rows([0])), (p, rows([1]))])
    opt = SparseAdamW({p: torch.eye(4).bool()})
    with pytest.raises(ValueError, match='does not have'):
        opt.select(other.weight, True)
    with pytest.raises(ValueError, match='does not have'):
        opt.narrow(other)
    with pytest.raises(ValueError, match='must be a set of rows'):
        SparseAdamW({other.weight: torch.eye(4).bool()}).narrow(other)
    with pytest.raises(ValueError, match='part has'):
        selected_linear(torch.zeros(2, 4), other.weight, torch.zeros(3), rows([0]))
    p.grad = torch.eye(4).to_sparse()
    with pytest.raises(ValueError, match='dense'):
        opt.step()
    assert opt.state[p]['step'] == 0

# --- the operators

@pytest.mark.parametrize('device', DEVICES)
def test_opcheck(device):
    for dtype in (torch.float32, torch.bfloat16):
        ps = [torch.randn(40, 30, device=device).to(dtype),
              torch.randn(300, device=device).to(dtype)]
        cs = [adamw._choose(ps[0], rows([1, 5])), adamw._choose(ps[1], torch.rand(300) < .4)]
        which = adamw._which(cs)
        m, v, lists = ([torch.rand(adamw._count(p, c), device=device) for p, c in zip(ps, cs)]
                       for _ in range(3))
        grads = [torch.randn_like(p) for p in ps]
        for add in (False, True):
            torch.library.opcheck(torch.ops.ftlab.gather_.default, (lists, grads, *which, add))
        for g, dense in ((grads, True), (lists, False)):
            torch.library.opcheck(
                torch.ops.ftlab.sparse_adamw_.default,
                (ps, m, v, g, *which, [.1, .2], [1.5, 1.], .9, .999, 1e-8, .99, dense))

def test_the_operators_check_what_they_are_given():
    if backend('cpu') != 'cpp':
        pytest.skip('needs the C++')
    p, m, g = torch.zeros(10), torch.zeros(2), torch.zeros(2)
    at, none = torch.tensor([3, 4], dtype=torch.int32), torch.zeros(0, dtype=torch.int64)
    op = torch.ops.ftlab.sparse_adamw_
    good = dict(tensors=[p], first=[m], second=[m.clone()], grads=[g], at=[at], before=[none],
                lengths=[1], strides=[0], rates=[.1], roots=[1.], beta1=.9, beta2=.999, eps=1e-8,
                decay=1., dense=False)
    for bad in (dict(grads=[torch.zeros(3)]), dict(dense=True), dict(grads=[]), dict(rates=[]),
                dict(at=[at.long()]), dict(at=[torch.zeros(1, dtype=torch.uint8)]),
                dict(lengths=[0]), dict(lengths=[3]), dict(first=[torch.zeros(3)]),
                dict(first=[m.double()])):
        with pytest.raises(RuntimeError):
            op(**(good | bad))
    op(**good)
    assert not p.any()

def test_positions_beyond_two_to_the_31():
    """A tensor that is never touched but at its ends takes no memory: the last entry moves,
    by bits and by rows"""
    if backend('cpu') != 'cpp':
        pytest.skip('needs the C++: the plain version goes through all of a mask')
    n = 2**31 + 4096
    try:
        # numpy asks for pages of zeros, which are there once they are touched
        p = torch.from_numpy(np.zeros(n, np.int16)).view(torch.bfloat16)
    except MemoryError:
        pytest.skip('this system does not promise memory that is not used')
    bits, before = (torch.from_numpy(np.zeros(n//8, np.uint8)),
                    torch.ones(n//4096, dtype=torch.int64))
    bits[0], bits[-1], before[0] = 1, 128, 0
    def move(k, at, before, length): # the gradients are 1, so the first step is minus the rate
        m, v, g = torch.zeros(k), torch.zeros(k), torch.ones(k)
        torch.ops.ftlab.sparse_adamw_([p], [m], [v], [g], [at], [before], [length], [0], [.5/.1],
                                      [.001**-.5], .9, .999, 1e-8, 1., False)
    move(2, bits, before, 0)
    assert p[0] == p[-1] == -.5 and p[1] == p[-2] == 0
    at = torch.tensor([0, n//4096 - 1], dtype=torch.int32)
    move(8192, at, before[:0], 4096)
    assert p[0] == p[-1] == -1 and p[4095] == p[-4096] == -.5 and p[4096] == p[-4097] == 0

def test_accelerate_prepares_it():
    accelerate = pytest.importorskip('accelerate')
    net, x, y = small()
    opt = SparseAdamW({p: torch.rand(p.shape) < .5 for p in net.parameters()}, lr=.01)
    acc = accelerate.Accelerator(cpu=True)
    net, prepared = acc.prepare(net, opt)
    opt.gather()
    on = {p: opt.selected(p) for p in net.parameters()}
    for _ in range(3):
        acc.backward((net(x) - y).pow(2).mean())
        assert len(opt.grads()) == 6
        prepared.step()
        prepared.zero_grad()
    assert all(opt.state[p]['step'] == 3 and torch.equal(opt.selected(p), m) for p, m in on.items())

# --- what was measured

def test_the_kept_result_keeps_the_promises_of_memory():
    r = json.loads((ROOT/'bench'/'results'/'native_adamw.json').read_text())
    assert r['numbers'] == 12208*4096
    ours = [o for o in r['rows'] if o['what'] in ('ours, 5%', 'ours, 50%', 'ours, rows') and o['heap'] == 'default']
    assert len(ours) == 3 and all(o['extra_bytes'] < 1e6 for o in ours)
    held = {o['way']: o for o in r['memory']}
    w = held['5%, hook']
    assert (w['peak_bytes'] < 1.2*w['layer_bytes'] + 1.5*w['state_bytes']
            and held['dense']['peak_bytes'] > 8*w['peak_bytes'])

# --- on a GPU

@cuda
@pytest.mark.parametrize('lists', [False, True], ids=['dense', 'gathered'])
@pytest.mark.parametrize('dtype', TYPES)
def test_the_gpu_gives_the_cpus_numbers(dtype, lists):
    assert backend('cuda') == 'cuda'
    cases = selections()*2 # more than one launch takes
    (a, b), (c, d) = train(cases, dtype, lists=lists), train(cases, dtype, lists=lists, device='cuda')
    assert same(a, c) and same(b, d)

@cuda
def test_parameters_on_several_devices():
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, device='cuda'))
    opt = SparseAdamW({p: True, q: True}).gather()
    (p.sum() + q.sum().cpu()).backward()
    assert torch.allclose(opt.clip_grad_norm_(1.).cpu(), torch.tensor(8**.5))
    opt.step()
    assert torch.equal(p, q.cpu())
