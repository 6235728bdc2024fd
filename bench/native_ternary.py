"""Four ternary task vectors of 5% each, added to 50 million float32 weights.

Packed, as int8, as dense vectors, and the time that the weights alone take.

    python bench/native_ternary.py            # writes bench/results/native_ternary.json; about five minutes"""
from native import N, best, main

FACTORS, WIDTH = (.4, -.3, .2, .1), dict(ours=(N//4 + 4), int8=N + 4, dense=4*N)

def contestants():
    import torch
    from ftlab.native import add_ternary_, pack_ternary, unpack_ternary
    w, make = torch.randn(N,
                          generator=torch.Generator().manual_seed(
                              0)), torch.Generator().manual_seed(1)
    vs = [pack_ternary(torch.randn(N, generator=make), keep=N//20) for _ in FACTORS]
    signs = [unpack_ternary(v).sign().to(torch.int8) for v in vs]
    dense = [unpack_ternary(v) for v in vs]
    buf = torch.empty(N)
    s = [torch.tensor(f*v.scale).item() for f, v in zip(FACTORS, vs)]
    one_sum_ = torch.compile(lambda w, a, b, c, d: w.add_(a*s[0] + b*s[1] + c*s[2] + d*s[3]))
    floats_ = torch.compile(lambda w, a, b, c, d: w.add_(a.float()*s[0] + b.float()*s[1]
                                                         + c.float()*s[2] + d.float()*s[3]))
    dense_ = torch.compile(lambda w, a, b, c, d: w.add_(a*FACTORS[0] + b*FACTORS[1] + c*FACTORS[2]
                                                        + d*FACTORS[3]))

    def int8_eager():
        [w.add_(t, alpha=f) for t, f in zip(signs, s)]

    def int8_buffer(): # what is converted goes into a buffer that is kept
        for t, f in zip(signs, s):
            w.add_(buf.copy_(t), alpha=f)

    def dense_eager():
        [w.add_(t, alpha=f) for t, f in zip(dense, FACTORS)]

    ours = lambda: add_ternary_(w, vs, FACTORS)
    start = w.clone()
    ours()
    mine = w.clone() # all contestants do the same work
    for f in (lambda: one_sum_(w, *signs), lambda: floats_(w, *signs), lambda: dense_(w, *dense),
              int8_eager, int8_buffer, dense_eager):
        w.copy_(start)
        f()
        torch.testing.assert_close(w, mine, rtol=1e-5, atol=1e-6)
    del start, mine
    return {'ours': (ours, 0), 'int8: compiled': (lambda: one_sum_(w, *signs), 0),
            'int8: compiled, to float first': (lambda: floats_(w, *signs), 0),
            'int8: eager': (int8_eager, 0), 'int8: eager, through a buffer': (int8_buffer, 4*N),
            'dense: compiled': (lambda: dense_(w, *dense), 0),
            'dense: eager': (dense_eager, 0), 'floor: w.mul_(c)': (lambda: w.mul_(1.), 0)}

def pairs(times):
    fastest, eager, dense = best(times, 'int8: compiled'), best(times, 'int8: eager'), best(times, 'dense')
    return {f'{fastest} over ours': (fastest, 'ours'), f'{eager} over ours': (eager, 'ours'),
            f'{dense} over ours': (dense, 'ours'), 'ours over the floor': ('ours', 'floor: w.mul_(c)')}

if __name__ == '__main__':
    main(__file__, contestants, pairs, 15, numbers=N, vectors=len(FACTORS),
         vector_bytes={k: v*len(FACTORS) for k, v in WIDTH.items()},
         targets=dict(compiled_int8=1.3, eager_int8=5, extra_bytes=0))
