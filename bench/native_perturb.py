"""Seeded noise on 50 million float32 numbers: the C++ kernel against the best that torch does, and against the time that memory alone takes.

    python bench/native_perturb.py            # writes bench/results/native_perturb.json; about five minutes

In each round every contestant runs once, one after another, so that a busy machine slows them alike; ratios are taken within a round.
Memory is measured with the usual heap, as a warm one gives none back.
Once with the usual heap, where large buffers come fresh from the system, and once with a warm one, where freed memory is used again."""
import json, os, platform, statistics, subprocess, sys, time
from pathlib import Path

N, ROUNDS, THREADS = 50_000_000, 21, 2
HEAPS = dict(default={}, warm=dict(MALLOC_MMAP_MAX_='0', MALLOC_TRIM_THRESHOLD_=str(1 << 40), MALLOC_TOP_PAD_=str(1 << 28)))

def contestants():
    "{name: (function, bytes that it holds between calls)}; the first of each kind is ours"
    import torch
    from ftlab.native import perturb_
    p, buf, make = torch.randn(N), torch.empty(N), torch.Generator(); small = buf[:1 << 18]; eps = 1e-3
    def buffer(): make.manual_seed(7); p.add_(buf.normal_(generator=make), alpha=eps)
    def fresh(): make.manual_seed(7); p.add_(torch.randn(N, generator=make), alpha=eps)
    def chunks():
        make.manual_seed(7)
        for c in p.split(len(small)): c.add_(small[:len(c)].normal_(generator=make), alpha=eps)
    def coins(): make.manual_seed(7); p.add_(buf.bernoulli_(.5, generator=make), alpha=2*eps).sub_(eps)
    def coin_chunks():
        make.manual_seed(7)
        for c in p.split(len(small)): c.add_(small[:len(c)].bernoulli_(.5, generator=make), alpha=2*eps).sub_(eps)
    normal_ = torch.compile(lambda p: p.add_(torch.randn_like(p), alpha=eps))
    sign_ = torch.compile(lambda p: p.add_((torch.rand_like(p) > .5).to(p.dtype)*2 - 1, alpha=eps))
    def compiled(): torch.manual_seed(7); normal_(p)
    def coins_compiled(): torch.manual_seed(7); sign_(p)
    whole, part = 4*N, 4*len(small)
    return {'ours, normal': (lambda: perturb_([p], 7, eps), 0), 'torch, normal: a buffer': (buffer, whole),
        'torch, normal: fresh noise (MeZO)': (fresh, 0), 'torch, normal: in chunks': (chunks, part), 'torch, normal: compiled': (compiled, 0),
        'ours, rademacher': (lambda: perturb_([p], 7, eps, 'rademacher'), 0), 'torch, rademacher: a buffer': (coins, whole),
        'torch, rademacher: in chunks': (coin_chunks, part),
        'torch, rademacher: compiled': (coins_compiled, 0), 'floor: p.mul_(c)': (lambda: p.mul_(1.), 0)}

def status(key): return next(int(l.split()[1])*1024 for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(key + ':'))

def peak(f) -> int:
    "Bytes above the start that one call took at its highest, by the system's own mark (Linux)"
    Path('/proc/self/clear_refs').write_text('5'); start = status('VmRSS'); f(); return max(0, status('VmHWM') - start)

def child():
    import torch
    from ftlab.native import backend
    torch.set_num_threads(THREADS)
    assert backend('cpu') == 'cpp', 'the C++ is not in use, so this would measure torch against itself'
    who = contestants(); [f() for f, _ in who.values()]; times = {k: [] for k in who}
    extra = {k: held + min(peak(f) for _ in range(2)) for k, (f, held) in who.items()}
    for _ in range(ROUNDS):
        for k, (f, _) in who.items(): t = time.perf_counter(); f(); times[k].append(1e3*(time.perf_counter() - t))
    print(json.dumps(dict(times=times, extra=extra, torch=torch.__version__)))

def spread(v, digits=2): q = statistics.quantiles(v, n=4); return dict(low=round(q[0], digits), median=round(q[1], digits), high=round(q[2], digits))

def machine(version):
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    cpu = next((l.split(':')[1].strip() for l in lines if l.startswith('model name')), platform.processor())
    return dict(threads=THREADS, load=[round(o, 1) for o in os.getloadavg()], cpu=cpu, torch=version)

def main():
    rows, ratios = [], {}
    for heap, env in HEAPS.items():
        env = {**os.environ, **env, 'FTLAB_NATIVE': 'cpp', 'OMP_NUM_THREADS': str(THREADS)}
        r = subprocess.run([sys.executable, __file__, 'child'], env=env, capture_output=True, text=True)
        if r.returncode: sys.exit(f'{heap} heap: ended with {r.returncode}\n{r.stderr}')
        run = json.loads(r.stdout.splitlines()[-1]); times = run['times']
        for k, v in times.items():
            s = spread(v)
            rows.append(dict(heap=heap, what=k, median_ms=s['median'], low_ms=s['low'], high_ms=s['high'],
                extra_bytes=run['extra'][k] if heap == 'default' else None))
        for dist in ('normal', 'rademacher'):
            ours, best = times[f'ours, {dist}'], min((k for k in times if k.startswith(f'torch, {dist}')), key=lambda k: statistics.median(times[k]))
            ratios[f'{dist}: {best.split(": ")[1]} (torch at its best) over ours, {heap} heap'] = spread([a/b for a, b in zip(times[best], ours)])
            ratios[f'{dist}: ours over the floor, {heap} heap'] = spread([a/b for a, b in zip(ours, times['floor: p.mul_(c)'])])
    out = dict(numbers=N, rounds=ROUNDS, **machine(run['torch']), targets=dict(normal=4, rademacher=20, extra_bytes=0), ratios=ratios, rows=rows)
    Path('bench/results/native_perturb.json').write_text(json.dumps(out, indent=1) + '\n'); print(json.dumps(out['ratios'], indent=1))

if __name__ == '__main__': child() if sys.argv[1:] == ['child'] else main()
