"""Every kernel on small and awkward shapes against the CPU. A part of `gpu.py`.

For the checkers of memory and races."""
from gpu_pieces import arguments, card_is_broken, run_pieces

SIZES = (1, 7, 129, 4095, 4097, 9001)

def types():
    import torch
    return torch.float32, torch.bfloat16, torch.float16

def alike(ours, theirs, what: str) -> None:
    "Bit for bit what the CPU gives"
    import torch
    assert torch.equal(ours.cpu(), theirs), f'{what}: not what the CPU gives'

def perturb(args) -> None:
    import torch
    from ftlab.native import low_halves, perturb_
    for dtype in types():
        for dist in ('normal', 'rademacher'):
            a = [torch.randn(n).to(dtype) for n in SIZES]
            b = [t.to(args.device) for t in a]
            perturb_(a, 3, .1, dist)
            perturb_(b, 3, .1, dist)
            for x, y in zip(a, b):
                alike(y, x, f'noise, {dist}, {dtype}, {len(x)} numbers')
    b = [torch.randn(n, device=args.device).bfloat16() for n in SIZES]
    perturb_(b, 3, .1, low=low_halves(b))

def magnitude(args) -> None:
    import torch
    from ftlab.native import kth_magnitude
    for dtype in types():
        a = [(torch.randn(n)*4).round().to(dtype) for n in SIZES]
        b = [t.to(args.device) for t in a]
        for k, drop in ((1, 0), (500, 0), (500, 300)):
            for give in ('mask', 'indices'):
                for x, y in zip(kth_magnitude(a, k, give, drop), kth_magnitude(b, k, give, drop)):
                    alike(y, x, f'selection, {give}, {dtype}')

def adamw(args) -> None:
    import torch
    from ftlab.native import SparseAdamW, blocks, columns, rows
    shape = (66, 130)
    choices = [True, rows([0, 5, 65]), columns([1, 129]), blocks([(0, 1), (2, 0)], (22, 65)),
               torch.rand(shape) < .02, torch.rand(shape) < .5]
    for dtype in types():
        for choice in choices:
            p, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
            found = []
            for device in ('cpu', args.device):
                q = torch.nn.Parameter(p.detach().clone().to(device))
                opt = SparseAdamW({q: choice}, lr=1e-2, weight_decay=.1)
                for lists in (False, True):
                    q.grad = g.clone().to(device)
                    if lists:
                        opt.grads()
                    opt.step()
                    opt.zero_grad()
                found.append(q.detach())
            alike(found[1], found[0], f'AdamW, {dtype}')

def crossentropy(args) -> None:
    import torch
    from ftlab.native import weighted_linear_cross_entropy
    for dtype in types():
        for words in (5, 257, 1003):
            x, head = torch.randn(37, 16).to(dtype), torch.randn(words, 16).to(dtype)
            z, other, labels = torch.randn(37, 16).to(dtype), torch.randn(words, 16).to(
                dtype), torch.randint(0, words, (37,))
            for direction in ('forward', 'reverse'):
                for kl in (0., .3):
                    losses = []
                    for device in ('cpu', args.device):
                        a, b = x.to(device).requires_grad_(), head.to(device).requires_grad_()
                        more = (dict(reference=(z.to(device), other.to(device)), kl=kl,
                                     direction=direction) if kl else {})
                        loss = weighted_linear_cross_entropy(a, b, labels.to(device),
                                                             lambda nll, entropy: (-nll).exp(),
                                                             chunk=10, **more).loss
                        loss.backward()
                        losses.append(float(loss.detach()))
                    assert abs(losses[0] - losses[1]) <= .02*abs(
                        losses[0]) + .02, f'{losses}: another loss than on the CPU'

def ternary(args) -> None:
    import torch
    from ftlab.native import add_ternary_, pack_ternary
    for dtype in types():
        for n in SIZES:
            w, vs = torch.randn(n).to(dtype), [pack_ternary(torch.randn(n), keep=max(1, n//3))
                                               for _ in range(3)]
            ours = w.to(args.device)
            add_ternary_(ours, [v.to(args.device) for v in vs], (.5, -1., 2.))
            add_ternary_(w, vs, (.5, -1., 2.))
            alike(ours, w, f'packed vectors, {dtype}, {n} numbers')
            x = torch.randn(n).to(dtype)
            alike(pack_ternary(x.to(args.device), keep=1).positive,
                  pack_ternary(x, keep=1).positive, 'packing')

PIECES = dict(perturb=perturb, magnitude=magnitude, adamw=adamw, crossentropy=crossentropy,
              ternary=ternary)

if __name__ == '__main__':
    run_pieces(PIECES, arguments(), card_is_broken)
