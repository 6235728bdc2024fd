"""How a kernel is measured: its contestants in turns in one process.

Ratios are taken within a round, with both heaps; memory is the system's own mark.

A benchmark says who runs and which pairs to compare, and calls `main`. In each round every
contestant runs once, one after another, so that a busy machine slows them alike. Once with the
usual heap, where large buffers come fresh from the system, and once with a warm one, where freed
memory is used again; memory is measured with the usual one, as a warm one gives none back. Nothing
is measured if the C++ is not in use."""
import json, os, platform, statistics, subprocess, sys, time
from pathlib import Path

N, THREADS = 50_000_000, 2
HEAPS = dict(default={}, warm=dict(MALLOC_MMAP_MAX_='0', MALLOC_TRIM_THRESHOLD_=str(1 << 40),
                                   MALLOC_TOP_PAD_=str(1 << 28)))

def status(key):
    return next(int(l.split()[1])*1024 for l in Path('/proc/self/status').read_text().splitlines()
                if l.startswith(key + ':'))

def peak(f) -> int:
    "Bytes above the start that one call took at its highest, by the system's own mark (Linux)"
    Path('/proc/self/clear_refs').write_text('5')
    start = status('VmRSS')
    f()
    return max(0, status('VmHWM') - start)

def spread(v, digits=2):
    q = statistics.quantiles(v, n=4)
    return dict(low=round(q[0], digits), median=round(q[1], digits), high=round(q[2], digits))

def machine(version):
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    cpu = next((l.split(':')[1].strip() for l in lines if l.startswith('model name')),
               platform.processor())
    return dict(threads=THREADS, load=[round(o, 1) for o in os.getloadavg()], cpu=cpu,
                torch=version)

def save(path:Path, found):
    tmp = path.with_suffix('.tmp')
    tmp.write_text(json.dumps(found, indent=1) + '\n')
    tmp.replace(path)

def child(contestants, rounds):
    """Run all and print what was seen;
    `contestants()` gives {name: (function, bytes to add to what the system sees)}"""
    import torch
    from ftlab.native import backend
    torch.set_num_threads(THREADS)
    assert backend('cpu') == 'cpp', 'the C++ is not in use, so this would measure torch against itself'
    who = contestants()
    [f() for f, _ in who.values()]
    times = {k: [] for k in who}
    extra = {k: max(0, held + min(peak(f) for _ in range(2))) for k, (f, held) in who.items()}
    for _ in range(rounds):
        for k, (f, _) in who.items():
            t = time.perf_counter()
            f()
            times[k].append(1e3*(time.perf_counter() - t))
    print(json.dumps(dict(times=times, extra=extra, torch=torch.__version__)))

def main(file, contestants, pairs, rounds, **facts):
    """Measure in a process of its own for each heap, and write results/<the file's name>.json;
    `pairs(times)` gives {what it says: (over, under)}"""
    if sys.argv[1:] == ['child']:
        return child(contestants, rounds)
    rows, ratios = [], {}
    for heap, env in HEAPS.items():
        env = {**os.environ, **env, 'FTLAB_NATIVE': 'cpp', 'OMP_NUM_THREADS': str(THREADS)}
        r = subprocess.run([sys.executable, file, 'child'], env=env, capture_output=True, text=True)
        if r.returncode:
            sys.exit(f'{heap} heap: ended with {r.returncode}\n{r.stderr}')
        run = json.loads(r.stdout.splitlines()[-1])
        times = run['times']
        for k, v in times.items():
            s = spread(v)
            extra = run['extra'][k] if heap == 'default' else None
            rows.append(dict(heap=heap, what=k, median_ms=s['median'], low_ms=s['low'],
                             high_ms=s['high'], extra_bytes=extra))
        ratios |= {f'{say}, {heap} heap': spread([x/y for x, y in zip(times[a], times[b])])
                   for say, (a, b) in pairs(times).items()}
    save(Path(file).parent/'results'/f'{Path(file).stem}.json',
         dict(rounds=rounds, **facts, **machine(run['torch']), ratios=ratios, rows=rows))
    print(json.dumps(ratios, indent=1))

def best(times, start):
    "The fastest of those whose names begin so"
    return min((k for k in times if k.startswith(start)), key=lambda k: statistics.median(times[k]))
