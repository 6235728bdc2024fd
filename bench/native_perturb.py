"""Seeded noise on 50 million float32 numbers.

The C++ kernel against the best that torch does, and against the time that memory alone takes.

    python bench/native_perturb.py            # writes bench/results/native_perturb.json; about five minutes"""
from native import N, best, main

def in_torch(p, buf, eps):
    "{name: function} of the ways that a buffer or fresh noise allows"
    import torch
    make, small = torch.Generator(), buf[:1 << 18]
    normal = lambda out: out.normal_(generator=make)
    coins = lambda out: out.bernoulli_(.5, generator=make)

    def fresh():
        make.manual_seed(7)
        p.add_(torch.randn(N, generator=make), alpha=eps)

    def added(draw, scale, shift, parts):
        "A function that adds `scale*draw - shift`, part by part"
        def add():
            make.manual_seed(7)
            for c in parts:
                c.add_(draw(buf[:len(c)]), alpha=scale)
                if shift:
                    c.sub_(shift)
        return add

    chunks = p.split(len(small))
    return {'torch, normal: a buffer': added(normal, eps, 0, [p]),
            'torch, normal: fresh noise (MeZO)': fresh,
            'torch, normal: in chunks': added(normal, eps, 0, chunks),
            'torch, rademacher: a buffer': added(coins, 2*eps, eps, [p]),
            'torch, rademacher: in chunks': added(coins, 2*eps, eps, chunks)}

def compiled(p, eps):
    "{name: function} of what torch.compile makes"
    import torch
    normal_ = torch.compile(lambda p: p.add_(torch.randn_like(p), alpha=eps))
    sign_ = torch.compile(lambda p: p.add_((torch.rand_like(p) > .5).to(p.dtype)*2 - 1, alpha=eps))

    def seeded(f):
        def call():
            torch.manual_seed(7)
            f(p)
        return call

    return {'torch, normal: compiled': seeded(normal_),
            'torch, rademacher: compiled': seeded(sign_)}

def contestants():
    "{name: (function, bytes that it holds between calls)}"
    import torch
    from ftlab.native import perturb_
    p, buf, eps = torch.randn(N), torch.empty(N), 1e-3
    held = {'a buffer': 4*N, 'in chunks': 4*(1 << 18)}
    torchs = in_torch(p, buf, eps) | compiled(p, eps)
    return {'ours, normal': (lambda: perturb_([p], 7, eps), 0),
            'ours, rademacher': (lambda: perturb_([p], 7, eps, 'rademacher'), 0),
            **{k: (f, held.get(k.split(': ')[1], 0)) for k, f in torchs.items()},
            'floor: p.mul_(c)': (lambda: p.mul_(1.), 0)}

def pairs(times):
    out = {}
    for dist in ('normal', 'rademacher'):
        ours, torchs = f'ours, {dist}', best(times, f'torch, {dist}')
        out |= {f'{dist}: {torchs.split(": ")[1]} (torch at its best) over ours': (torchs, ours),
                f'{dist}: ours over the floor': (ours, 'floor: p.mul_(c)')}
    return out

if __name__ == '__main__':
    main(__file__, contestants, pairs, 21, numbers=N,
         targets=dict(normal=4, rademacher=20, extra_bytes=0))
