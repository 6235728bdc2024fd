"""Packed ternary vectors: C++ (and CUDA, where there is a GPU) against the plain version in
torch, bit for bit, and both against dense vectors in float64"""
import json, os
import pytest, torch
from safetensors.torch import load_file, save_file
from ftlab.native import (Ternary, add_ternary_, backend, kth_magnitude, pack_ternary, unpack_mask,
                          unpack_ternary)
from ftlab.native import ternary
from pages import ROOT

TYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1,), (3,), (0,), (7,), (8,), (9, 7), (255,), (256,), (257,), (64, 129), (2, 3, 5, 7), ()]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU here')

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

def same(a, b):
    return all(torch.equal(x.nan_to_num(7, 8, 9), y.nan_to_num(7, 8, 9))
               for x, y in zip(a, b, strict=True))

def vectors(tensors, count):
    keep = max(1, sum(w.numel() for w in tensors)//3)
    return [pack_ternary([torch.randn(w.shape) for w in tensors], keep) for _ in range(count)]

def plain(tensors, vs, scales, chunk=1 << 18):
    out = [w.clone() for w in tensors]
    parts = [ternary._checked(w, [v[i] for v in vs], i, scales) for i, w in enumerate(out)]
    ternary._add(out, *([o for p in parts for o in p[k]] for k in range(3)), chunk=chunk)
    return out

def dense(tensors, vs, scales):
    """The rule in dense tensors: signs times scales, summed in float32 in order, one addition,
    one rounding"""
    out = []
    for i, w in enumerate(tensors):
        total = torch.zeros(w.shape)
        for v, s in zip(vs, scales):
            total += torch.tensor(s*v[i].scale)*unpack_ternary(v[i]).sign()
        out.append((w.float() + total).to(w.dtype))
    return out

# --- adding

@pytest.mark.parametrize('count', [1, 2, 4, 7, 128])
@pytest.mark.parametrize('dtype', TYPES)
def test_it_is_the_plain_version_and_the_dense_one_to_the_last_bit(dtype, count):
    ws = [torch.randn(s).to(dtype) for s in SHAPES]
    vs, scales = vectors(ws, count), torch.randn(count).tolist()
    ours = [w.clone() for w in ws]
    add_ternary_(ours, vs, scales)
    assert same(ours, plain(ws, vs, scales)) and same(ours, dense(ws, vs, scales))

@pytest.mark.parametrize('dtype', TYPES)
def test_one_vector_alone_is_torchs_own_addition(dtype):
    w = torch.randn(1001).to(dtype)
    v = pack_ternary(torch.randn(1001), keep=300, scale=.25)
    ours = w.clone()
    add_ternary_(ours, [v])
    assert torch.equal(ours, w + unpack_ternary(v, dtype))

@pytest.mark.parametrize('dtype', TYPES)
def test_the_error_is_no_more_than_torchs(dtype):
    """Against the sum in float64: no worse on average than the same sum by torch in the weights'
    type, and half a unit in the last place of the result"""
    w = torch.randn(50_000).to(dtype)
    vs, scales = [v for v, in vectors([w], 4)], [.3, -.7, .11, .5]
    ours = w.clone()
    add_ternary_(ours, vs, scales)
    terms = [torch.tensor(s*v.scale)*unpack_ternary(v).sign() for v, s in zip(vs, scales)]
    exact = w.double() + sum(t.double() for t in terms)
    a, b = ((ours.double() - exact).abs(),
            ((w + sum(t.to(dtype) for t in terms)).double() - exact).abs())
    unit = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert (a <= unit*exact.abs() + 4e-7).all() and a.mean() <= b.mean()

def test_threads_and_chunks_do_not_matter():
    ws = [torch.randn(n) for n in (300_001, 5, 70_000)]
    vs, scales = vectors(ws, 3), [1., -.5, .25]
    threads, out = torch.get_num_threads(), []
    try:
        for t in (1, 2, 3):
            torch.set_num_threads(t)
            out.append([w.clone() for w in ws])
            add_ternary_(out[-1], vs, scales)
    finally:
        torch.set_num_threads(threads)
    assert all(same(out[0], o) for o in (*out[1:], plain(ws, vs, scales, chunk=4096)))

def test_the_order_of_the_vectors_counts_and_is_kept():
    w = torch.zeros(40)
    big, small = (pack_ternary(torch.ones(40), scale=s) for s in (1e8, 1.))
    minus = pack_ternary(-torch.ones(40), scale=1e8)
    for order, want in (((big, small, minus), 0.), ((big, minus, small), 1.)):
        w.zero_()
        add_ternary_(w, order)
        assert (w == want).all()

def test_bfloat16_is_rounded_once():
    "Four halves of a step make two steps; one by one, each would be rounded away"
    w = torch.full((64,), 256.).bfloat16()
    v = pack_ternary(torch.ones(64))
    add_ternary_(w, [v]*4)
    assert (w == 260).all()
    w.fill_(256.)
    [add_ternary_(w, [v]) for _ in range(4)]
    assert (w == 256).all()

@pytest.mark.parametrize('dtype', TYPES)
def test_infinities_nan_and_minus_zero(dtype):
    w = torch.tensor([float('nan'), float('inf'), -float('inf'), 0., -0., 1., 65504., 3e38]).repeat(
        50).to(dtype)
    v = vectors([w], 2)
    ours = [w.clone()]
    add_ternary_(ours, v, [65504., -1.])
    assert same(ours, plain([w], v, [65504., -1.])) and torch.equal(ours[0].isnan(), w.isnan())
    zero = torch.full((300,), -0.).to(dtype)
    add_ternary_(zero, [pack_ternary(torch.zeros(300), scale=1.)])
    assert not zero.signbit().any() # -0 + 0 is 0

def test_misaligned_tensors_and_planes():
    flat, bits = torch.randn(1001), torch.randint(0, 256, (2, 127), dtype=torch.uint8)
    w = flat[1:]
    v = Ternary(bits[0, 1:126], bits[1, 2:127], .5, (1000,))
    assert w.data_ptr() % 16 and v.negative.data_ptr() % 2
    ours = w.clone()
    want = plain([w], [[v]], [1.])
    add_ternary_(w, [v])
    add_ternary_(ours, [v])
    assert same([w, ours], want*2)

def test_a_number_that_is_both_is_neither():
    both = Ternary(torch.full((40,), 255, dtype=torch.uint8),
                   torch.full((40,), 255, dtype=torch.uint8), .3, (320,))
    w = torch.randn(320)
    ours = w.clone()
    add_ternary_(ours, [both, both])
    assert torch.equal(ours, w)

def test_parameters_and_autograd():
    p = torch.nn.Parameter(torch.ones(5))
    y = (p*p).sum()
    add_ternary_(p, [pack_ternary(torch.ones(5))])
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.backward()

def test_nothing_to_add():
    w = torch.randn(9)
    ours = w.clone()
    add_ternary_(ours, [])
    add_ternary_([], [])
    add_ternary_([ours], [])
    assert torch.equal(ours, w)

# --- packing

@pytest.mark.parametrize('dtype', TYPES)
def test_pack_and_unpack_give_back_what_was_there(dtype):
    for shape in SHAPES:
        x = (torch.randint(-1, 2, shape)*.37).to(dtype)
        v = pack_ternary(x)
        out = unpack_ternary(v, dtype)
        assert (torch.equal(out, x) and out.shape == x.shape and v.nbytes == 2*-(-x.numel()//8) + 4
                and v.scale == (x.abs().max() if x.any() else 0))

@pytest.mark.parametrize('dtype', TYPES)
def test_the_planes_are_the_plain_versions(dtype):
    for n in (1, 63, 64, 65, 4097):
        x = torch.randn(n).to(dtype)
        x[::5] = 0
        x[1::7] = float('nan')
        x[2::11] = -float('inf')
        x[3::13] = -0.
        x[4::17] = 1e-7
        want = [torch.empty(-(-n//8), dtype=torch.uint8) for _ in range(2)]
        ternary._pack(x, *want, chunk=512)
        assert (same(ternary._planes(x), want) and torch.equal(unpack_mask(want[0], x), x > 0)
                and torch.equal(unpack_mask(want[1], x), x < 0))

def test_a_mask_and_a_plane_fit_together():
    x = torch.randn(1000)
    v, mask = pack_ternary(x, keep=77), kth_magnitude(x, 77, 'mask')
    assert torch.equal(v.positive | v.negative, mask)
    kept = unpack_mask(mask, x)
    assert (torch.equal(unpack_ternary(v).sign(), x.sign()*kept)
            and v.scale == pytest.approx(x[kept].abs().mean().item(), rel=1e-6))

def test_several_tensors_have_one_scale_and_are_chosen_from_together():
    xs = [torch.randn(100), 100*torch.randn(50), torch.zeros(0)]
    vs = pack_ternary(xs, keep=50)
    assert {v.scale for v in vs} == {vs[0].scale}
    chosen = [int(unpack_ternary(v).count_nonzero()) for v in vs]
    assert sum(chosen) == 50 and chosen[1] > 40 and [v.shape for v in vs] == [(100,), (50,), (0,)]

def test_zeros_among_the_largest_stay_zero():
    v = pack_ternary(torch.tensor([1., 0., -3., 0.]), keep=3)
    assert torch.equal(unpack_ternary(v).sign(), torch.tensor([1., 0., -1., 0.]))

def test_it_is_saved_and_loaded_whole(tmp_path):
    v = pack_ternary(torch.randn(7, 9), keep=20)
    save_file(v.tensors(), tmp_path/'v.safetensors')
    w = Ternary.of(load_file(tmp_path/'v.safetensors')).to('cpu')
    assert ((w.scale, w.shape) == (v.scale, v.shape)
            and torch.equal(unpack_ternary(w), unpack_ternary(v)))

# --- what is refused

@pytest.mark.parametrize('call, say',
                         [(dict(x=torch.tensor([1., -2.])), 'not ternary'),
                          (dict(x=torch.tensor([1., float('nan')])), 'not ternary'),
                          (dict(x=torch.tensor([float('inf'), 0.])), 'finite'),
                          (dict(x=torch.tensor([1., float('nan')]), keep=1), 'finite'),
                          (dict(x=torch.randn(3, dtype=torch.float64)), 'float64'),
                          (dict(x=torch.zeros(4, 6).t()), 'not contiguous'),
                          (dict(x=torch.randn(5), keep=6), 'keep is 6; it must be from 1 to 5'),
                          (dict(x=[torch.ones(5)]*2, keep=0), 'keep is 0; it must be from 1 to 10'),
                          (dict(x=[], keep=1), 'no tensors'),
                          (dict(x=torch.randn(5), keep=2, scale=float('nan')), 'scale is nan'),
                          (dict(x=torch.ones(5), scale=1e60), 'scale')])
def test_what_cannot_be_packed_is_refused(call, say):
    with pytest.raises(ValueError, match=say):
        pack_ternary(**call)

one = Ternary(torch.tensor([3], dtype=torch.uint8), torch.tensor([4], dtype=torch.uint8), 1., (6,))
@pytest.mark.parametrize(
    'call, say',
    [(dict(scales=[1., 2.]), 'one scale for each'),
     (dict(scales=[float('inf')]), 'scale of vector 0'),
     (dict(vectors=[one]*129), 'at most 128'),
     (dict(tensors=torch.zeros(2, 3)), 'must be the same'),
     (dict(tensors=torch.zeros(6, dtype=torch.float64)), 'float64'),
     (dict(tensors=torch.zeros(12)[::2]), 'not contiguous'),
     (dict(tensors=[torch.zeros(6)]*2, vectors=[[one, one]]), 'twice'),
     (dict(tensors=[torch.zeros(6)], vectors=[[one, one]]), '2 parts for 1 tensors'),
     (dict(vectors=[Ternary(one.positive, one.negative.float(), 1., (6,))]), 'uint8'),
     (dict(vectors=[Ternary(one.positive, torch.zeros(2, dtype=torch.uint8), 1., (6,))]), 'planes'),
     (dict(tensors=[torch.zeros(6), torch.zeros(6).t(), torch.zeros(7)], vectors=[[one]*3]), 'must be the same')])
def test_what_does_not_fit_is_refused_and_nothing_has_changed(call, say):
    call = dict(tensors=torch.zeros(6), vectors=[one]) | call
    ws = call['tensors']
    with pytest.raises(ValueError, match=say):
        add_ternary_(**call)
    assert not any(w.any() for w in ([ws] if isinstance(ws, torch.Tensor) else ws))

# --- the operators

@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=cuda)])
def test_opcheck(device):
    ws = [torch.randn(300, device=device), torch.randn(2, 3, device=device)]
    vs = [[v.to(device) for v in o] for o in vectors(ws, 2)]
    planes = [[getattr(v[i], k) for i in range(2) for v in vs] for k in ('positive', 'negative')]
    torch.library.opcheck(torch.ops.ftlab.add_ternary_.default, (ws, *planes, [.5, 1., .5, 1.]))
    torch.library.opcheck(
        torch.ops.ftlab.pack_signs_.default,
        (ws[0], *(torch.zeros(38, dtype=torch.uint8, device=device) for _ in range(2))))

def test_it_takes_no_memory_beside_the_weights():
    if backend('cpu') != 'cpp':
        pytest.skip('needs the C++')
    r = json.loads((ROOT/'bench'/'results'/'native_ternary.json').read_text())
    ours = [o for o in r['rows'] if o['what'].startswith('ours')]
    assert len(ours) == 2 and all(o['extra_bytes'] < 1e6 for o in ours if o['heap'] == 'default')
    assert r['numbers'] == 50_000_000 and r['vector_bytes']['ours'] == 4*(12_500_000 + 4)

def test_200_steps_of_ternary_updates_end_alike(monkeypatch):
    """A small model whose every step is packed to the largest tenth of its gradient,
    with the kernel and with the plain version"""
    def train(mode):
        monkeypatch.setenv('FTLAB_NATIVE', mode)
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        x = torch.randn(64, 8)
        y = x[:, :1]*x[:, 1:2]
        ps, losses = list(net.parameters()), []
        for _ in range(200):
            loss = (net(x) - y).pow(2).mean()
            losses.append(loss.item())
            change = pack_ternary(list(torch.autograd.grad(loss, ps)), keep=16)
            add_ternary_(ps, [change], [-.1])
        return [p.detach() for p in ps], losses
    (ours, a), (theirs, b) = train('auto'), train('torch')
    assert same(ours, theirs) and a == b and a[-1] < a[0]

@pytest.mark.skipif(not os.environ.get('FTLAB_LARGE'), reason='takes 6 GB and a minute: set FTLAB_LARGE=1')
def test_a_tensor_of_more_than_two_to_the_31():
    n = 2**31 + 5000
    w = torch.zeros(n, dtype=torch.bfloat16)
    w[-1], w[2**31], w[7] = 1., -1., 1.
    v = pack_ternary(w, scale=.5)
    add_ternary_(w, [v]*2)
    assert w.count_nonzero() == 3 and w[-1] == 2 and w[2**31] == -2 and w[7] == 2

@cuda
@pytest.mark.parametrize('dtype', TYPES)
def test_the_gpu_gives_the_cpus_numbers(dtype):
    assert backend('cuda') == 'cuda'
    ws = [torch.randn(s).to(dtype) for s in SHAPES]
    flat = torch.randn(1001).to(dtype)
    ws.append(flat[1:])
    gpu = [w.cuda() for w in ws[:-1]] + [flat.cuda()[1:]]
    vs, scales = vectors(ws, 3), [.5, -2., .1]
    assert all(same([p.cpu() for p in ternary._planes(g)], ternary._planes(w))
               for g, w in zip(gpu, ws))
    there = [[o.to('cuda') for o in v] for v in vs]
    assert all(o.positive.device.type == o.negative.device.type == 'cuda' for v in there for o in v)
    add_ternary_(gpu, there, scales)
    add_ternary_(ws, vs, scales)
    assert same([g.cpu() for g in gpu], ws)
    for v, w in zip(vs, there):
        for o, q in zip(v, w):
            back = q.to('cpu')
            assert ((back.scale, back.shape) == (o.scale, o.shape)
                    and same((back.positive, back.negative), (o.positive, o.negative)))
