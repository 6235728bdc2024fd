"""The largest 5% of 50 million float32 numbers: the C++ kernel against the best that torch does, and against the time of reading them twice.

    python bench/native_magnitude.py            # writes bench/results/native_magnitude.json; about ten minutes

In each round every contestant runs once, one after another, so that a busy machine slows them alike; ratios are taken within a round.
Once with the usual heap, and once with a warm one, as in native_perturb.py, whose helpers it uses."""
import json, os, statistics, subprocess, sys, time
from pathlib import Path
from native_perturb import HEAPS, N, THREADS, machine, peak, spread

ROUNDS, K = 7, 2_500_000

def contestants():
    import torch
    from ftlab.native import kth_magnitude
    x = torch.randn(N, generator=torch.Generator().manual_seed(0))
    def kthvalue(): return torch.kthvalue(x.abs(), N - K + 1).values
    def topk(): return torch.topk(x.abs(), K, sorted=False).indices
    def by_groups(): # what one would write in torch: two counts of 16 bits each
        b = x.view(torch.int32) & 0x7fffffff; c = torch.histc((b >> 16).float(), 32768, 0, 32768).flip(0).cumsum(0); group = int((c < K).sum())
        some = b[(b >> 16) == 32767 - group]; return some.kthvalue(len(some) - (K - int(c[group - 1])) + 1).values
    want = float(kthvalue()); assert kth_magnitude(x, K) == want == by_groups().view(torch.float32).item()
    assert torch.equal(topk().sort().values.int(), kth_magnitude(x, K, 'indices'))
    return {'ours, threshold': lambda: kth_magnitude(x, K), 'ours, indices': lambda: kth_magnitude(x, K, 'indices'),
        'ours, mask': lambda: kth_magnitude(x, K, 'mask'),
        'torch, threshold: kthvalue': kthvalue, 'torch, threshold: two counts': by_groups,
        'torch, indices: topk': topk, 'floor: x.sum() twice': lambda: (x.sum(), x.sum())}

def child():
    import torch
    from ftlab.native import backend
    torch.set_num_threads(THREADS)
    assert backend('cpu') == 'cpp', 'the C++ is not in use, so this would measure torch against itself'
    who = contestants(); times = {k: [] for k in who}; answer = {'ours, indices': 4*K, 'ours, mask': N//8, 'torch, indices: topk': 8*K}
    extra = {k: max(0, min(peak(f) for _ in range(2)) - answer.get(k, 0)) for k, f in who.items()}
    for _ in range(ROUNDS):
        for k, f in who.items(): t = time.perf_counter(); f(); times[k].append(1e3*(time.perf_counter() - t))
    print(json.dumps(dict(times=times, extra=extra, torch=torch.__version__)))

def main():
    rows, ratios = [], {}
    pairs = dict(kthvalue=('torch, threshold: kthvalue', 'ours, threshold'), counts=('torch, threshold: two counts', 'ours, threshold'),
        topk=('torch, indices: topk', 'ours, indices'), topk_threshold=('torch, indices: topk', 'ours, threshold'),
        floor=('ours, threshold', 'floor: x.sum() twice'))
    for heap, env in HEAPS.items():
        env = {**os.environ, **env, 'FTLAB_NATIVE': 'cpp', 'OMP_NUM_THREADS': str(THREADS)}
        r = subprocess.run([sys.executable, __file__, 'child'], env=env, capture_output=True, text=True)
        if r.returncode: sys.exit(f'{heap} heap: ended with {r.returncode}\n{r.stderr}')
        run = json.loads(r.stdout.splitlines()[-1]); times = run['times']
        for k, v in times.items():
            s = spread(v)
            rows.append(dict(heap=heap, what=k, median_ms=s['median'], low_ms=s['low'], high_ms=s['high'],
                extra_bytes=run['extra'][k] if heap == 'default' else None))
        for a, b in pairs.values(): ratios[f'{a} over {b}, {heap} heap'] = spread([x/y for x, y in zip(times[a], times[b])])
    out = dict(numbers=N, k=K, rounds=ROUNDS, **machine(run['torch']), targets=dict(kthvalue=4, topk=8, extra_bytes=2_000_000), ratios=ratios, rows=rows)
    Path('bench/results/native_magnitude.json').write_text(json.dumps(out, indent=1) + '\n'); print(json.dumps(out['ratios'], indent=1))

if __name__ == '__main__': child() if sys.argv[1:] == ['child'] else main()
