"""The native kernels: C++ (and CUDA, where there is a GPU) against the plain version in torch,
bit for bit, and both against mathematics"""
import json, os, shutil, subprocess, sys
import pytest, torch
from scipy import stats
from ftlab.native import backend, kth_magnitude, low_halves, perturb_, restore_update_, unpack_mask
from ftlab.native import extension, magnitude, perturb
from pages import ROOT
import shared

TYPES, DISTS = (torch.float32, torch.bfloat16, torch.float16), ('normal', 'rademacher')
SHAPES = [(1,), (3,), (0,), (127,), (128,), (129, 7), (4095,), (4097,), (64, 128), (2, 3, 5, 7), ()]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU here')

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

def same(a, b):
    return all(torch.equal(x.nan_to_num(7, 8, 9), y.nan_to_num(7, 8, 9))
               for x, y in zip(a, b, strict=True))

def plain(tensors, seed, scale, dist, low=(), decay=1., first=0):
    out, rest = [p.clone() for p in tensors], [o.clone() for o in low]
    perturb._reference(out, rest, seed, scale, decay, dist == 'rademacher', first)
    return (out, rest) if low else out

def python(code, cwd=ROOT, **env):
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=cwd,
                       env={**os.environ, 'PYTHONPATH': str(ROOT), **env})
    assert r.returncode == 0, r.stderr
    return r.stdout + r.stderr

# --- the extension

@pytest.mark.skipif(not extension.compiler(), reason='there is no C++ compiler here')
def test_the_cpp_is_in_use_wherever_there_is_a_compiler():
    "Everything below would pass on torch alone; with a compiler at hand it must not"
    if os.environ.get('FTLAB_NATIVE') == 'torch':
        pytest.skip('FTLAB_NATIVE=torch asks for torch')
    assert backend('cpu') == 'cpp'

def test_without_a_compiler_torch_does_the_work_and_says_so_once(tmp_path):
    # a copy, as a build beside the package would be found without a compiler, rightly
    for name in ('__init__.py', 'native', 'csrc'):
        copy = shutil.copytree if (ROOT/'ftlab'/name).is_dir() else shutil.copy
        (tmp_path/'ftlab').mkdir(exist_ok=True)
        copy(ROOT/'ftlab'/name, tmp_path/'ftlab'/name)
    code = """from ftlab.native import backend, perturb_; import torch
p = torch.zeros(300); perturb_([p], 3, 1.); perturb_([p], 3, -1.); print(backend(), p.abs().max().item())"""
    out = python(code, cwd=tmp_path, PATH=str(tmp_path), CXX='', FTLAB_CACHE=str(tmp_path),
                 PYTHONPATH=str(tmp_path))
    assert out.startswith('torch 0.0') and out.count('RuntimeWarning') == 1 and 'ftlab.native.build()' in out

@pytest.mark.parametrize('mode', ['torch', 'cpp', 'auto'])
def test_every_mode_gives_the_same_numbers(mode):
    if mode == 'cpp' and not extension.compiler():
        pytest.skip('there is no C++ compiler here')
    out = python("""import torch
from ftlab.native import backend, perturb_
p = torch.zeros(1000, dtype=torch.bfloat16)
perturb_([p], 11, .3)
print(backend(), p.view(torch.int16).long().sum().item())""", FTLAB_NATIVE=mode)
    where, total = out.split()
    p, = plain([torch.zeros(1000, dtype=torch.bfloat16)], 11, .3, 'normal')
    assert int(total) == p.view(torch.int16).long().sum() and (where == mode or mode == 'auto')

def test_a_mode_that_is_unknown_is_refused(monkeypatch):
    monkeypatch.setenv('FTLAB_NATIVE', 'fast')
    with pytest.raises(ValueError, match='FTLAB_NATIVE'):
        perturb_([torch.zeros(3)], 0, 1.)

def test_a_change_of_the_sources_is_another_build(tmp_path, monkeypatch):
    old = extension.key()
    folder = tmp_path/'csrc'
    folder.mkdir()
    for f in extension._SOURCES.iterdir():
        (folder/f.name).write_bytes(f.read_bytes())
    monkeypatch.setattr(extension, '_SOURCES', folder)
    assert extension.key() == old
    (folder/'philox.h').write_text((folder/'philox.h').read_text() + '\n')
    assert extension.key() != old and extension.find() is None

@pytest.fixture
def cuda_build(tmp_path_factory, monkeypatch):
    "A build for CUDA beside any torch, of objects that the tests share"
    for name, value in (shared.nvcc_once(shared.folder(tmp_path_factory), extension.nvcc())
                        | dict(FTLAB_NATIVE='cuda')).items():
        monkeypatch.setenv(name, value)

@pytest.mark.skipif(not extension.nvcc(), reason='there is no nvcc here')
def test_the_cuda_side_compiles_and_spills_nothing(tmp_path, cuda_build, monkeypatch):
    monkeypatch.delenv('FTLAB_CUDA_ARCH', raising=False)
    for out, report in extension.compile_cuda(tmp_path):
        assert out.stat().st_size and 'sm_80' in report and 'sm_90' in report
        spills = [l for l in report.splitlines() if 'spill stores' in l]
        assert spills and all(' 0 bytes spill stores, 0 bytes spill loads' in l for l in spills)

def test_a_build_is_for_the_cards_that_are_named(monkeypatch):
    monkeypatch.delenv('FTLAB_CUDA_ARCH', raising=False)
    usual, key = extension.cards(), extension.key()
    assert ('arch=compute_80,code=sm_80' in usual
            and 'arch=compute_90,code=[sm_90,compute_90]' in usual)
    monkeypatch.setenv('FTLAB_CUDA_ARCH', '90,120')
    assert (extension.cards() == ['-gencode', 'arch=compute_90,code=sm_90', '-gencode', 'arch=compute_120,code=sm_120']
            and extension.key() != key)
    for wrong in ('9.0', 'sm_90', '90;80', 'native'):
        monkeypatch.setenv('FTLAB_CUDA_ARCH', wrong)
        with pytest.raises(ValueError, match='FTLAB_CUDA_ARCH'):
            extension.cards()

@pytest.mark.parametrize(
    'known, asks', [('', '0'), ('#define TORCH_VERSION_2_13_0 213', '0'), ('#define TORCH_VERSION_2_13_0 209', '1')])
def test_headers_that_do_not_know_the_newest_version_take_the_old_way_to_a_stream(known, asks):
    "Their preprocessor reads an unknown name as 0, which every version is newer than"
    text = (extension._SOURCES/'torch.h').read_text()
    part = text[
        text.index('#if defined(TORCH_VERSION_2_13_0)'):text.index('#if !FTLAB_ASKS_STREAM')]
    source = (f'#define TORCH_FEATURE_VERSION 210\n{known}\n{part}\n#if FTLAB_ASKS_STREAM\nasks 1\n'
              '#else\nasks 0\n#endif\n')
    if not extension.compiler():
        pytest.skip('there is no C++ compiler here')
    r = subprocess.run([extension.compiler(), '-E', '-x', 'c++', '-'], input=source,
                       capture_output=True, text=True)
    assert f'asks {asks}' in r.stdout, r.stderr

@pytest.mark.slow
@pytest.mark.skipif(not (extension.nvcc() and extension.compiler()), reason='there is no nvcc here')
def test_the_cuda_side_links_and_loads_where_there_is_no_gpu(tmp_path, cuda_build):
    "Compiled and bound beside any torch, so that a mistake in it shows on machines that cannot run it"
    out = python("""import torch
from torch._C import _dispatch_get_all_op_names, _dispatch_has_kernel_for_dispatch_key as has_kernel
from ftlab.native import backend, magnitude, perturb_, ternary
print(backend('cuda'))
perturb_([torch.zeros(4)], 7, 1.)
ours = [n for n in _dispatch_get_all_op_names() if n.startswith('ftlab::')]
print(all(has_kernel(n, 'CUDA') for n in ours))""", FTLAB_CACHE=str(tmp_path))
    assert out.split() == ['cuda', 'True']

# --- noise

@pytest.mark.parametrize('dist', DISTS)
@pytest.mark.parametrize('dtype', TYPES)
def test_perturb_is_the_plain_version_to_the_last_bit(dtype, dist):
    for seed in (0, 1, 2**62 + 12345):
        tensors = [torch.randn(s).to(dtype) for s in SHAPES]
        want = plain(tensors, seed, .37, dist)
        perturb_(tensors, seed, .37, dist)
        assert same(tensors, want)

@pytest.mark.parametrize('dist', DISTS)
def test_restore_update_is_a_move_and_a_decay(dist):
    tensors = [torch.randn(s) for s in SHAPES]
    want = plain(tensors, 4, 1e-3 - .1*.25, dist, decay=.999)
    restore_update_(tensors, 4, 1e-3, .1, .25, dist, decay=.999)
    assert same(tensors, want)

@pytest.mark.parametrize('dist', DISTS)
def test_the_lower_halves_make_bfloat16_move_as_float32(dist):
    ps = [torch.randn(s).bfloat16() for s in SHAPES]
    low = low_halves(ps)
    fs = [p.float() for p in ps]
    want = ps, low
    for i in range(20):
        want = plain(want[0], i, 1e-3, dist, want[1])
        perturb_(ps, i, 1e-3, dist, low=low)
        perturb_(fs, i, 1e-3, dist)
    assert (same(ps, want[0]) and same(low, want[1])
            and same([perturb._join(p, l) for p, l in zip(ps, low)], fs))
    assert all((p.float() - f).abs().max() <= 2**-8*f.abs().max()
               for p, f in zip(ps, fs) if f.numel())

@pytest.mark.parametrize('dtype', TYPES)
def test_the_error_is_a_rounding_and_no_more(dtype):
    """Against p + scale*z in float64, with the z of float32:
    half a unit in the last place of the result, and of the product in float32"""
    p = torch.randn(50_000).to(dtype)
    z = perturb.noise(5, 0, 0, 391, False)[:50_000].double()
    q = [p.clone()]
    perturb_(q, 5, .01)
    exact = p.double() + float(torch.tensor(.01))*z
    unit = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torchs = p + (.01*z).to(dtype)
    ours, theirs = (q[0].double() - exact).abs(), (torchs.double() - exact).abs()
    assert (ours <= unit*exact.abs() + 4e-8).all() and ours.mean() <= theirs.mean()*1.001

@pytest.mark.parametrize('dist', DISTS)
def test_threads_chunks_and_order_do_not_matter(dist):
    sizes = (300_001, 5, 70_000)
    whole = [torch.zeros(n) for n in sizes]
    perturb_(whole, 8, 1., dist)
    threads = torch.get_num_threads()
    try:
        for t in (1, 2, 3):
            torch.set_num_threads(t)
            again = [torch.zeros(n) for n in sizes]
            for i in (2, 0, 1):
                perturb_(again[i:i + 1], 8, 1., dist, first=i)
            assert same(whole, again)
    finally:
        torch.set_num_threads(threads)
    out = [torch.zeros(n) for n in sizes]
    perturb._reference(out, [], 8, 1., 1., dist == 'rademacher', 0, chunk=4096)
    assert same(whole, out)

def test_every_counter_word_and_key_word_counts():
    base = perturb.noise(1, 0, 0, 1, False)
    for seed, tensor, tile in ((1 + 2**32, 0, 0), (1, 1, 0), (1, 2**32, 0), (1, 0, 2**27)):
        other = perturb.noise(seed, tensor, tile, tile + 1, False)
        assert (base != other).float().mean() > .99
    p, = out = [torch.zeros(128)]
    perturb_(out, 1, 1., first=2**33)
    assert same(out, [perturb.noise(1, 2**33, 0, 1, False)])

@pytest.mark.parametrize('seed', range(3))
def test_moments_and_the_kolmogorov_smirnov_test(seed):
    n = 400_000
    z = [torch.zeros(n)]
    perturb_(z, seed, 1.)
    z = z[0].double()
    error = n**-.5
    assert (abs(z.mean()) < 4*error and abs(z.var() - 1) < 4*2**.5*error
            and abs((z**3).mean()) < 4*15**.5*error and abs((z**4).mean() - 3) < 4*96**.5*error)
    assert (stats.kstest(z.numpy(), 'norm').pvalue > 1e-3
            and all(abs((z[k:]*z[:-k]).mean()) < 4.5*error for k in (1, 2, 32, 64, 128)))
    s = [torch.zeros(n)]
    perturb_(s, seed, 1., 'rademacher')
    s = s[0]
    assert (set(s.unique().tolist()) == {-1., 1.} and abs(s.mean()) < 4*error
            and all(abs((s[k:]*s[:-k]).mean()) < 4.5*error for k in (1, 32, 4096)))

@pytest.mark.parametrize('dist', DISTS)
def test_there_and_back_again(dist):
    p = torch.randn(100_000)
    q = [p.clone()]
    perturb_(q, 3, 1e-3, dist)
    assert (q[0] != p).float().mean() > .99
    perturb_(q, 3, -2e-3, dist)
    perturb_(q, 3, 1e-3, dist)
    assert (q[0] - p).abs().max() < 1e-6

def test_infinities_and_nan_stay_what_they_are():
    for dtype in TYPES:
        p = torch.tensor([float('nan'), float('inf'), -float('inf'), 0., 1.]).repeat(60).to(dtype)
        q = [p.clone()]
        perturb_(q, 0, 1.)
        assert (torch.equal(q[0].isnan(), p.isnan()) and torch.equal(q[0].isinf(), p.isinf())
                and torch.equal(q[0].sign()[p.isinf()], p.sign()[p.isinf()]))
    big = torch.full((4096,), torch.finfo(torch.float16).max, dtype=torch.float16)
    want = plain([big], 0, 1e5, 'normal')
    perturb_([big], 0, 1e5)
    assert same([big], want) and big.isinf().any()
    tiny = (torch.randn(4096)*1e-6).half()
    want = plain([tiny], 0, 1e-7, 'normal')
    perturb_([tiny], 0, 1e-7)
    assert same([tiny], want)
    odd = torch.tensor([0x7fff, 0x7f80], dtype=torch.int16).view(torch.bfloat16)
    low = [torch.full((2,), 99, dtype=torch.int16)]
    perturb_([odd], 0, 1., low=low)
    assert odd[0].isnan()

def test_every_half_float_is_read_and_written_right():
    for dtype in (torch.float16, torch.bfloat16):
        p = torch.arange(-2**15, 2**15).to(torch.int16).view(dtype)
        q = [p.clone()]
        perturb_(q, 0, 0.)
        assert same(q, [p + 0.])

def test_misaligned_tensors_are_moved_and_views_of_another_order_refused():
    flat = torch.randn(1001)
    want = plain([flat[1:].clone()], 2, 1., 'normal')
    q = flat[1:]
    assert q.data_ptr() % 16
    perturb_([q], 2, 1.)
    assert same([q], want)
    for bad in (torch.zeros(4, 6).t(), torch.zeros(8)[::2], torch.zeros(1).expand(5)):
        with pytest.raises(ValueError, match='not contiguous'):
            perturb_([bad], 0, 1.)

@pytest.mark.parametrize(
    'change, say',
    [(dict(dist='uniform'), 'dist'),
     (dict(seed=-1), 'seed'),
     (dict(seed=2**63), 'seed'),
     (dict(scale=float('nan')), 'scale'),
     (dict(first=-1), 'first'),
     (dict(tensors=[torch.zeros(3, dtype=torch.float64)]), 'float64'),
     (dict(low=[torch.zeros(3, dtype=torch.int16)]), 'low'),
     (dict(tensors=[torch.zeros(3).bfloat16()], low=[torch.zeros(4, dtype=torch.int16)]), 'low'),
     (dict(low=[torch.zeros(3)]*2), 'one for each')])
def test_what_makes_no_sense_is_refused(change, say):
    p = torch.zeros(3)
    call = dict(tensors=[p], seed=0, scale=1.) | change
    with pytest.raises(ValueError, match=say):
        perturb_(**call)
    assert not p.any()

def test_parameters_move_and_autograd_knows():
    p = torch.nn.Parameter(torch.ones(5))
    y = (p*p).sum()
    perturb_([p], 0, 1.)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.backward()

@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=cuda)])
def test_opcheck(device):
    p, q = torch.randn(300, device=device), torch.randn(2, 3, device=device)
    for tensors, low in (([p, q], []), ([p.bfloat16()], low_halves([p.bfloat16()]))):
        torch.library.opcheck(torch.ops.ftlab.perturb_.default, (tensors, low, 7, .5, 1., False, 0))

def test_it_takes_no_memory():
    "100 MB moved: what the process holds at its highest rises by less than 1 MB"
    if backend('cpu') != 'cpp' or not os.path.exists('/proc/self/clear_refs'):
        pytest.skip('needs the C++, and a system that tells (Linux)')
    code = '''import torch
from ftlab.native import perturb_
status = lambda k: next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(k))
p = torch.zeros(25_000_000); perturb_([p], 0, 1.)
open('/proc/self/clear_refs', 'w').write('5'); start = status('VmRSS')
perturb_([p], 1, 1.); perturb_([p], 1, 1., 'rademacher'); print(status('VmHWM') - start)'''
    assert int(python(code)) < 1000

def small():
    "A small model, and 64 questions with answers"
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    x = torch.randn(64, 8)
    return net, x, x[:, :1]*x[:, 1:2]

def test_200_steps_without_gradients_end_alike():
    """A small model trained by MeZO's rule with the kernel and with the plain version:
    the same losses and the same weights"""
    def train(move):
        net, x, y = small()
        ps, losses = list(net.parameters()), []
        with torch.no_grad():
            for step in range(200):
                price = lambda: (net(x) - y).pow(2).mean().item()
                move(ps, step, 1e-3)
                up = price()
                move(ps, step, -2e-3)
                down = price()
                move(ps, step, 1e-3 - .01*(up - down)/2e-3)
                losses.append(up)
        return [p.detach() for p in ps], losses
    ours, losses = train(perturb_)
    theirs, other = train(lambda ps, s, c: perturb._reference(ps, [], s, c, 1., False, 0))
    assert same(ours, theirs) and losses == other and losses[-1] < losses[0]

# --- the k largest

SIZES = [(5,), (1, 1), (64, 0, 200), (63,), (300_000, 7, 900_001), (65_536, 65_537)]

def ranked(tensors):
    """Positions in all tensors together by magnitude, largest first,
    ties by the lowest position: sorting, which nobody doubts"""
    return magnitude.keys(torch.cat([t.flatten() for t in tensors])).sort(
        descending=True, stable=True).indices

@pytest.mark.parametrize('values', ['normal', 'ties', 'special'])
@pytest.mark.parametrize('dtype', TYPES)
def test_the_k_largest_are_those_that_sorting_gives(dtype, values):
    for sizes in SIZES:
        ts = [torch.randn(n).to(dtype) for n in sizes]
        total = sum(sizes)
        offset = [sum(sizes[:i]) for i in range(len(sizes))]
        if values == 'ties':
            ts = [(t*2).round() for t in ts]
        if values == 'special':
            [t[i::7].fill_(v) for t in ts
             for i, v in enumerate((float('nan'), -float('inf'), 0., -0., 1e-7))]
        order = ranked(ts)
        for k, drop in ((1, 0),
                        (total, 0),
                        (total//2, 0),
                        (total//20, 0),
                        (total//3, total//3),
                        (1, total - 1),
                        (total//2, 1)):
            if k < 1 or k + drop > total:
                continue
            want = order[drop:drop + k].sort().values
            got = kth_magnitude(ts, k, 'indices', drop)
            bits = kth_magnitude(ts, k, 'mask', drop)
            assert torch.equal(torch.cat([g + o for g, o in zip(got, offset)]).long(), want)
            assert all(g.dtype == torch.int32
                       and torch.equal(unpack_mask(m, t).nonzero().flatten().int(), g)
                       for g, m, t in zip(got, bits, ts))
            low, at = kth_magnitude(ts, k, drop=drop), torch.cat(ts).abs()[order]
            if drop:
                low, high = low
                assert (torch.tensor(high).to(dtype).equal(at[drop - 1]) or at[drop - 1].isnan()
                        and high != high)
            assert (torch.tensor(low).to(dtype).equal(at[drop + k - 1]) or at[drop + k - 1].isnan()
                    and low != low)
            assert torch.equal(torch.ops.ftlab.kth_find(ts, k, drop), magnitude._find(ts, k, drop))

@pytest.mark.parametrize(
    'make', [lambda n: torch.arange(n).float(), lambda n: torch.zeros(n),
             lambda n: torch.cat([torch.zeros(n - 5), torch.ones(5)]),
             lambda n: torch.randn(n).exp()**20, lambda n: torch.arange(n).remainder(16).float(),
             lambda n: torch.cat([torch.ones(n//2), 2 + torch.rand(n - n//2)])])
def test_a_wrong_guess_costs_time_and_not_the_truth(make):
    "Sorted, constant, rare and periodic numbers, of which a sample tells little"
    x = make(700_000)
    order = ranked([x])
    for k in (1, 5, 35_000, 350_000, 699_999):
        assert torch.equal(kth_magnitude(x, k, 'indices').long(), order[:k].sort().values)

def test_threads_do_not_change_what_is_chosen():
    x = torch.randn(2_000_000).round(decimals=2)
    threads = torch.get_num_threads()
    out = []
    try:
        for t in (1, 2, 3):
            torch.set_num_threads(t)
            out.append(kth_magnitude(x, 100_000, 'indices', 777))
    finally:
        torch.set_num_threads(threads)
    assert same(out[:1]*2, out[1:])

def test_a_misaligned_tensor_and_a_parameter_are_ranked():
    x = torch.randn(10_001)[1:]
    assert torch.equal(kth_magnitude(x, 9, 'indices').long(), ranked([x])[:9].sort().values)
    p = torch.nn.Parameter(torch.randn(9, 9))
    assert unpack_mask(kth_magnitude(p, 4, 'mask'), p).sum() == 4 and not kth_magnitude(p, 4, 'mask').requires_grad

@pytest.mark.parametrize(
    'call, say', [(dict(k=0), 'k is 0'),
                  (dict(k=7), 'from 1 to 6'),
                  (dict(k=5, drop=2), 'from 1 to 4'),
                  (dict(k=1, drop=-1), 'drop'),
                  (dict(k=1, give='list'), 'give'),
                  (dict(tensors=[], k=1), 'no tensors'),
                  (dict(tensors=torch.zeros(6, dtype=torch.float64), k=1), 'float64'),
                  (dict(tensors=torch.zeros(4, 6).t(), k=1), 'not contiguous'),
                  (dict(tensors=torch.zeros(0), k=1), 'k is 1'),
                  (dict(tensors=[torch.zeros(3), torch.zeros(3).half()], k=1), 'must have one dtype and device')])
def test_what_cannot_be_ranked_is_refused(call, say):
    with pytest.raises(ValueError, match=say):
        kth_magnitude(**(dict(tensors=torch.zeros(6)) | call))

@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=cuda)])
def test_opcheck_of_the_ranking(device):
    ts = [torch.randn(300, device=device), torch.randn(2, 3, device=device)]
    found = torch.ops.ftlab.kth_find(ts, 20, 3)
    torch.library.opcheck(torch.ops.ftlab.kth_find.default, (ts, 20, 3))
    torch.library.opcheck(torch.ops.ftlab.kth_count.default, (ts, found))
    bits = [torch.zeros(-(-t.numel()//8), dtype=torch.uint8, device=device) for t in ts]
    places = [torch.zeros(n, dtype=torch.int32, device=device)
              for n in torch.ops.ftlab.kth_count(ts, found).tolist()]
    for out in (bits, places):
        torch.library.opcheck(torch.ops.ftlab.kth_write_.default, (ts, found, out))

def test_200_steps_on_the_largest_end_alike(monkeypatch):
    """A small model of which only the 10% largest numbers train, chosen anew every 20 steps,
    with the kernel and with the plain version"""
    def train(mode):
        monkeypatch.setenv('FTLAB_NATIVE', mode)
        net, x, y = small()
        ps = list(net.parameters())
        for step in range(200):
            if step % 20 == 0:
                masks = [unpack_mask(m, p)
                         for m, p in zip(kth_magnitude([p.detach() for p in ps], 16, 'mask'), ps)]
            loss = (net(x) - y).pow(2).mean()
            grads = torch.autograd.grad(loss, ps)
            with torch.no_grad():
                [p.sub_(.05*g*m) for p, g, m in zip(ps, grads, masks)]
        return [p.detach() for p in ps], loss.item()
    (ours, a), (theirs, b) = train('auto'), train('torch')
    assert same(ours, theirs) and a == b

# --- more than 2^31 numbers

@pytest.mark.skipif(not os.environ.get('FTLAB_LARGE'), reason='takes 12 GB and minutes: set FTLAB_LARGE=1')
def test_a_tensor_of_more_than_two_to_the_31():
    """Both ends and the middle are what they should be; a mask reaches the last number,
    and indices are refused"""
    n = 2**31 + 5000
    p = torch.zeros(n, dtype=torch.bfloat16)
    perturb_([p], 3, 1.)
    for at in (0, 2**31 - 128, n//128*128 - 1280):
        z = perturb.noise(3, 0, at//128, at//128 + 10, False)[:n - at]
        assert torch.equal(p[at:at + len(z)], z.bfloat16())
    p.zero_()
    p[-1], p[2**31], p[7] = 3., -2., 1.
    with pytest.raises(ValueError, match='ask for a mask'):
        kth_magnitude(p, 3, 'indices')
    mask = kth_magnitude(p, 2, 'mask')
    assert (kth_magnitude(p, 2) == 2. and mask.count_nonzero() == 2 and mask[2**28] == 1
            and mask[-1] == 1 << (n - 1) % 8)

# --- the C++ alone, under the sanitizers

@pytest.mark.slow
@pytest.mark.skipif(not extension.compiler(), reason='there is no C++ compiler here')
@pytest.mark.parametrize('name', sorted(f.stem for f in (ROOT/'tests'/'native').glob('*.cpp')))
def test_sanitizers_find_nothing_over_fuzzed_shapes(tmp_path, name):
    """Buffers of exactly the needed size, every type,
    every instruction set that this processor has: no stray access, no undefined step,
    the same bits"""
    exe = tmp_path/'fuzz'
    flags = [f for f in extension._CXX if not f.startswith('-D')]
    r = subprocess.run(
        [extension.compiler(), '-std=c++17', *flags, '-O1', '-g', '-fsanitize=address,undefined',
         '-fno-sanitize-recover=all', f'-I{extension._SOURCES}',
         str(ROOT/'tests'/'native'/f'{name}.cpp'), '-o', str(exe)],
        capture_output=True, text=True)
    if 'cannot find' in r.stderr and 'san' in r.stderr:
        pytest.skip('this compiler has no sanitizers')
    assert r.returncode == 0, r.stderr
    r = subprocess.run([str(exe)], capture_output=True, text=True)
    assert r.returncode == 0 and 'ok' in r.stdout, r.stdout + r.stderr

# --- on a GPU

@cuda
@pytest.mark.parametrize('dist', DISTS)
@pytest.mark.parametrize('dtype', TYPES)
def test_the_gpu_gives_the_cpus_numbers(dtype, dist):
    assert backend('cuda') == 'cuda'
    tensors = [torch.randn(s).to(dtype) for s in SHAPES]
    gpu = [p.cuda() for p in tensors]
    perturb_(tensors, 6, .1, dist)
    perturb_(gpu, 6, .1, dist)
    assert same(tensors, [p.cpu() for p in gpu])

# --- what was measured

def test_the_kept_result_is_of_the_cpp_and_takes_no_memory():
    r = json.loads((ROOT/'bench'/'results'/'native_perturb.json').read_text())
    ours = [o for o in r['rows'] if o['what'].startswith('ours')]
    assert (len(ours) == 4 and all(o['extra_bytes'] < 1e6 for o in ours if o['heap'] == 'default')
            and r['numbers'] == 50_000_000)
    r = json.loads((ROOT/'bench'/'results'/'native_magnitude.json').read_text())
    ours = [o for o in r['rows'] if o['what'].startswith('ours')]
    assert (len(ours) == 6 and all(o['extra_bytes'] < 2e6 for o in ours if o['heap'] == 'default')
            and r['numbers'] == 50_000_000)
