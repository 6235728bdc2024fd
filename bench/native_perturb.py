"""Seeded noise on 50 million float32 numbers.

The C++ kernel against the best that torch does, and against the time that memory alone takes.

    python bench/native_perturb.py            # writes bench/results/native_perturb.json; about five minutes"""
from native import N, best, main

def contestants():
    "{name: (function, bytes that it holds between calls)}"
    import torch
    from ftlab.native import perturb_
    p, buf, make = torch.randn(N), torch.empty(N), torch.Generator()
    small = buf[:1 << 18]
    eps = 1e-3

    def buffer():
        make.manual_seed(7)
        p.add_(buf.normal_(generator=make), alpha=eps)

    def fresh():
        make.manual_seed(7)
        p.add_(torch.randn(N, generator=make), alpha=eps)

    def chunks():
        make.manual_seed(7)
        for c in p.split(len(small)):
            c.add_(small[:len(c)].normal_(generator=make), alpha=eps)

    def coins():
        make.manual_seed(7)
        p.add_(buf.bernoulli_(.5, generator=make), alpha=2*eps).sub_(eps)

    def coin_chunks():
        make.manual_seed(7)
        for c in p.split(len(small)):
            c.add_(small[:len(c)].bernoulli_(.5, generator=make), alpha=2*eps).sub_(eps)
    normal_ = torch.compile(lambda p: p.add_(torch.randn_like(p), alpha=eps))
    sign_ = torch.compile(lambda p: p.add_((torch.rand_like(p) > .5).to(p.dtype)*2 - 1, alpha=eps))

    def compiled():
        torch.manual_seed(7)
        normal_(p)

    def coins_compiled():
        torch.manual_seed(7)
        sign_(p)

    whole, part = 4*N, 4*len(small)
    return {'ours, normal': (lambda: perturb_([p], 7, eps), 0),
            'torch, normal: a buffer': (buffer, whole),
            'torch, normal: fresh noise (MeZO)': (fresh, 0),
            'torch, normal: in chunks': (chunks, part),
            'torch, normal: compiled': (compiled, 0),
            'ours, rademacher': (lambda: perturb_([p], 7, eps, 'rademacher'), 0),
            'torch, rademacher: a buffer': (coins, whole),
            'torch, rademacher: in chunks': (coin_chunks, part),
            'torch, rademacher: compiled': (coins_compiled, 0),
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
