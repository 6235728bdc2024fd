"""The CUDA kernels where there is no GPU: compiled by the C++ compiler and run by a stand-in for
CUDA (tests/native/cuda_shim.h) against the C++ of the CPU.
Under the address and undefined-behaviour sanitizers they run in test_native.py, with the other
fuzzed loops; here under the thread sanitizer. And on a GPU."""
import os, subprocess
import pytest, torch
from ftlab.native import backend, extension, kth_magnitude, magnitude, unpack_mask
from pages import ROOT

NATIVE, RULES = ROOT/'tests'/'native', dict(TSAN_OPTIONS='halt_on_error=1')
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU here')
compiled = pytest.mark.skipif(not extension.compiler(), reason='there is no C++ compiler here')

def build(source, exe, sanitizer):
    r = subprocess.run([extension.compiler(), '-std=c++17', *extension._CXX, '-O1', '-g',
                        f'-fsanitize={sanitizer}', '-fno-sanitize-recover=all',
                        f'-I{extension._SOURCES}', str(source), '-o', str(exe)],
                       capture_output=True, text=True)
    if 'cannot find' in r.stderr and 'san' in r.stderr:
        pytest.skip('this compiler has no sanitizers')
    assert r.returncode == 0, r.stderr

def run(exe, *args):
    return subprocess.run([str(exe), *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, **RULES})

@pytest.mark.slow
@compiled
def test_no_two_threads_of_a_kernel_race(tmp_path):
    """Noise, selection, packed vectors, the optimizer and rows of logits, over fuzzed shapes:
    the CPU's bits, every barrier where it must be, no place written twice without an atomic"""
    build(NATIVE/'cuda.cpp', tmp_path/'race', 'thread')
    r = run(tmp_path/'race', 1)
    assert r.returncode == 0 and 'ok' in r.stdout, r.stdout + r.stderr

@pytest.mark.slow
@compiled
@pytest.mark.parametrize(
    'sanitizer, found',
    [('address,undefined', {1: 'wrong', 2: 'a thread ended while others wait',
                            4: 'heap-buffer-overflow', 5: 'wrong', 6: 'not all lanes'}),
     ('thread', {1: 'data race', 2: 'a thread ended while others wait', 3: 'data race', 5: 'wrong',
                 6: 'not all lanes', 7: 'data race'})])
def test_the_stand_in_finds_a_mistake_that_is_there(tmp_path, sanitizer, found):
    """No barrier, a barrier for some, two blocks at one place, beyond the end,
    shared memory taken to be 0, a shuffle for some: a stand-in that finds nothing proves nothing"""
    build(NATIVE/'stand_in'/'broken.cpp', tmp_path/'broken', sanitizer)
    r = run(tmp_path/'broken', 0)
    assert r.returncode == 0, r.stdout + r.stderr
    for mistake, say in found.items():
        r = run(tmp_path/'broken', mistake)
        assert r.returncode and say in r.stdout + r.stderr, (mistake, r.stdout + r.stderr)

# --- on a GPU

@cuda
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_the_gpu_chooses_what_the_cpu_chooses(dtype):
    assert backend('cuda') == 'cuda'
    torch.manual_seed(0)
    for sizes in ((5,), (64, 0, 200), (300_000, 7, 900_001), (130,)*200):
        ts = [(torch.randn(n)*4).round().to(dtype) for n in sizes]
        gpu = [t.cuda() for t in ts]
        total = sum(sizes)
        for k, drop in ((1, 0),
                        (total, 0),
                        (total//20 + 1, 0),
                        (total//3, total//3),
                        (1, total - 1)):
            assert torch.equal(torch.ops.ftlab.kth_find(gpu, k, drop).cpu(),
                               magnitude._find(ts, k, drop))
            for give in ('mask', 'indices'):
                assert all(torch.equal(g.cpu(), c) for g, c in zip(
                               kth_magnitude(gpu, k, give, drop), kth_magnitude(ts, k, give, drop)))
    flat = torch.randn(10_001, device='cuda').to(dtype)[1:]
    assert unpack_mask(kth_magnitude(flat, 77, 'mask'), flat).sum() == 77

@cuda
def test_it_takes_less_than_two_megabytes_on_a_gpu():
    x = torch.randn(50_000_000, device='cuda')
    kth_magnitude(x, 2_500_000)
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    kth_magnitude(x, 2_500_000)
    assert torch.cuda.max_memory_allocated() - start < 2e6
    mask = kth_magnitude(x, 2_500_000, 'mask')
    assert torch.cuda.max_memory_allocated() - start < 2e6 + mask.nbytes

@cuda
@pytest.mark.skipif(not os.environ.get('FTLAB_LARGE'), reason='takes 6 GB: set FTLAB_LARGE=1')
def test_more_than_two_to_the_31_on_a_gpu():
    n = 2**31 + 5000
    p = torch.zeros(n, dtype=torch.bfloat16, device='cuda')
    p[-1], p[2**31], p[7] = 3., -2., 1.
    mask = kth_magnitude(p, 2, 'mask')
    assert (kth_magnitude(p, 2) == 2. and mask.count_nonzero() == 2 and mask[2**28] == 1
            and mask[-1] == 1 << (n - 1) % 8)
