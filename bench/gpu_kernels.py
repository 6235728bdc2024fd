"""Every kernel against eager torch, torch.compile and the peer's kernel where there is one. A part of `gpu.py`.

What is worked on is many times the second-level cache, which is flushed before each call besides.
Contestants take turns, and before anything is timed it is checked that they do the same work."""
from gpu_pieces import Clock, arguments, card_is_broken, run_pieces
from peers import adamw_eager, compact, largest, there_and_back

def sized(args, tiny: int, large: int) -> int:
    return tiny if args.tiny else large

def same_work(a, b, limit: float) -> None:
    "The norm of the difference is at most `limit` of the norm of `b`; NaN never passes"
    a, b = a.detach().double(), b.detach().double()
    error = float((a - b).norm()/b.norm().clamp(min=1e-30))
    assert error <= limit, f'apart by {error:.2g} of the norm, at most {limit:.2g} expected'

def compiled(f, args):
    "torch.compile, except where sizes are tiny and compiling would take longest"
    import torch
    return f if args.tiny else torch.compile(f, dynamic=False, fullgraph=True)

def timed(args, who: dict, seconds: float = 3., **facts) -> dict:
    "Rows of all contestants; `--warm` calls each once"
    if not args.warm:
        return dict(rows=Clock(args.device).compare(who, .2 if args.tiny else seconds), **facts)
    errors = {}
    for name, (call, _) in who.items():
        try:
            call()
        except Exception as e:
            errors[name] = f'{type(e).__name__}: {e}'[-300:]
    return dict(errors=errors)

# --- noise

def perturb(args, dtype_name: str = 'float32') -> dict:
    "Seeded noise added in place"
    import torch
    from ftlab.native import perturb_
    n, eps, dtype, device = sized(args, 100_000,
                                  200_000_000), 1e-3, getattr(torch, dtype_name), args.device
    p = torch.randn(n, device=device).to(dtype)
    buffer, make = torch.empty_like(p), torch.Generator(device=device)
    normal_ = compiled(lambda p: p.add_(torch.randn_like(p), alpha=eps), args)
    sign_ = compiled(lambda p: p.add_((torch.rand_like(p) > .5).to(p.dtype)*2 - 1, alpha=eps), args)

    def by_buffer():
        make.manual_seed(7)
        p.add_(buffer.normal_(generator=make), alpha=eps)

    def fresh():
        make.manual_seed(7)
        p.add_(torch.randn(n, generator=make, device=device, dtype=dtype), alpha=eps)

    def coins():
        make.manual_seed(7)
        p.add_(buffer.bernoulli_(.5, generator=make), alpha=2*eps).sub_(eps)

    check = torch.zeros(min(n, 1_000_000), device=device)
    perturb_([check], 7, 1.)
    assert abs(float(check.mean())) < .02 and abs(float(check.std()) - 1) < .02, 'our noise is not normal'
    size = 2*n*p.element_size()
    who = {
        'ours, normal': (lambda: perturb_([p], 7, eps), size),
        'torch, normal: a buffer': (by_buffer, size),
        'torch, normal: fresh noise (MeZO)': (fresh, size),
        'torch, normal: compiled': (lambda: normal_(p), size),
        'ours, rademacher': (lambda: perturb_([p], 7, eps, 'rademacher'), size),
        'torch, rademacher: a buffer': (coins, size),
        'torch, rademacher: compiled': (lambda: sign_(p), size),
        'floor: p.mul_(c)': (lambda: p.mul_(1.), size)}
    return timed(args, who, numbers=n, dtype=dtype_name)

# --- selection

def magnitude(args, dtype_name: str = 'float32') -> dict:
    "The largest twentieth"
    import torch
    from ftlab.native import kth_magnitude, unpack_mask
    n, dtype = sized(args, 100_000, 200_000_000), getattr(torch, dtype_name)
    k = n//20
    x = torch.randn(n, device=args.device).to(dtype)

    kthvalue, topk, by_groups = largest(x, k)
    want = float(torch.kthvalue(x.abs().float(), n - k + 1).values)
    at = kth_magnitude(x, k, 'indices')
    assert kth_magnitude(x, k) == want, 'another threshold than kthvalue gives'
    assert len(at) == k and float(x[at.long()].abs().min()) == want, 'indices of others than the largest'
    assert bool((unpack_mask(kth_magnitude(x, k, 'mask'), x).nonzero().flatten()
                 == at).all()), 'mask and indices disagree'
    size = n*x.element_size()
    who = {
        'ours, threshold': (lambda: kth_magnitude(x, k), size),
        'ours, indices': (lambda: kth_magnitude(x, k, 'indices'), size + 4*k),
        'ours, mask': (lambda: kth_magnitude(x, k, 'mask'), size + n//8),
        'torch, threshold: kthvalue': (kthvalue, size), 'torch, indices: topk': (topk, size + 8*k),
        'floor: x.sum()': (lambda: x.sum(), size)}
    if dtype == torch.float32:
        who['torch, threshold: two counts'] = (by_groups, size)
    return timed(args, who, numbers=n, k=k, dtype=dtype_name)

# --- AdamW

def of_torch(args, name: str, at, p, g, like, size: int) -> dict:
    "The peers of one selection: `at` are the places in `p` and `g`, `like` is shaped as a moment"
    import torch
    rate, root = torch.tensor(1e-3, device=args.device), torch.tensor(1., device=args.device)
    m, v, f = torch.zeros_like(like), torch.zeros_like(like), compiled(compact, args)
    return {f'torch, {name}: compiled': (lambda: f(p, g, at, m, v, rate, root), size),
            f'torch, {name}: eager, buffers': (adamw_eager(at, m, v, p, g), size)}

def adamw_selections(r: int, c: int, device) -> dict:
    "{name: selection}: scattered entries, half of them, rows; and the numbers of the rows"
    import torch
    from ftlab.native import rows
    which = torch.randperm(r, device=device)[:r//20].sort().values
    return {'5%': torch.rand(r, c, device=device) < .05,
            '50%': torch.rand(r, c, device=device) < .5, 'rows': rows(which)}, which

def adamw(args, dtype_name: str = 'float32') -> dict:
    "AdamW on a part of a matrix: scattered entries, half of them, rows; and on all of it"
    import torch
    from ftlab.native import SparseAdamW
    r, c = (64, 256) if args.tiny else (24_416, 4096)
    dtype, device = getattr(torch, dtype_name), args.device
    p = torch.nn.Parameter(torch.randn(r, c, device=device).to(dtype))
    g = (torch.randn(r, c, device=device)*.01).to(dtype)
    p.grad, wide = g, p.element_size()
    selections, which = adamw_selections(r, c, device)
    who = {}
    for name, s in selections.items():
        opt = SparseAdamW({p: s}, lr=1e-3)
        k = int(opt.selected(p).sum())
        # gradient, number twice, moments twice, places
        size = k*(3*wide + 16) + (0 if name == 'rows' else min(4*k, r*c//8))
        who[f'ours, {name}'] = (opt.step, size)
        if dtype == torch.float32 and name == 'rows':
            who |= of_torch(args, name, which, p.detach(), g, g[which], size)
        elif dtype == torch.float32:
            at = opt.selected(p).flatten().nonzero().flatten()
            who |= of_torch(args, name, at, p.detach().view(-1), g.view(-1), g.view(-1)[at], size)
    q = torch.nn.Parameter(p.detach().clone())
    q.grad = g
    dense = torch.optim.AdamW([q], lr=1e-3, weight_decay=0., fused=True)
    who |= {'ours, all': (SparseAdamW({p: True}, lr=1e-3).step, r*c*(3*wide + 16)),
            'torch, all: fused AdamW': (dense.step, r*c*(3*wide + 4*wide)),
            'floor: p.mul_(c)': (lambda: p.detach().mul_(1.), 2*r*c*wide)}
    check_adamw(SparseAdamW, selections['5%'], p, g)
    return timed(args, who, numbers=r*c, dtype=dtype_name)

def check_adamw(make, mask, p, g) -> None:
    "One step on chosen entries is torch's step there, and nothing elsewhere"
    import torch
    a, b = (torch.nn.Parameter(p.detach().clone()) for _ in range(2))
    a.grad = b.grad = g
    make({a: mask}, lr=1e-2).step()
    torch.optim.AdamW([b], lr=1e-2, weight_decay=0., fused=True).step()
    assert torch.equal(a.detach()[~mask], p.detach()[~mask]), 'an entry that was not chosen has moved'
    same_work((a - p)[mask], (b - p)[mask], 1e-3 if p.dtype == torch.float32 else 2e-2)

# --- cross-entropy

def liger(scaled: bool):
    "Liger's loss over the head, as a sum; None where it is not installed"
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyLoss)
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss(reduction='sum', use_token_scaling=scaled)

def head_of_words(args, t: int, h: int, v: int):
    "States, head and labels of a model that knows something, bfloat16"
    import torch
    labels = torch.randint(0, v, (t,), device=args.device)
    x = torch.randn(t, h, device=args.device).bfloat16()
    head = (torch.randn(v, h, device=args.device)/h**.5).bfloat16()
    return (x + 6*head[labels]).requires_grad_(), head.requires_grad_(), labels

def probability(nll, entropy=None):
    return (-nll).exp()

def whole(x, head, labels):
    "DFT's loss over all logits"
    from torch.nn import functional as F
    nll = F.cross_entropy((x @ head.T).float(), labels, reduction='none')
    return (probability(nll.detach())*nll).sum()

def plain(x, head, labels):
    "The plain sum over all logits"
    from torch.nn import functional as F
    return F.cross_entropy((x @ head.T).float(), labels, reduction='sum')

def losses_of(args, x, head, labels) -> dict:
    "{name: function without arguments that gives a loss}"
    from torch.nn import functional as F
    from ftlab.native import weighted_linear_cross_entropy as ours
    by = lambda rows: ours(x, head, labels, probability, chunk=rows).loss
    fast, fast_plain = compiled(whole, args), compiled(plain, args)
    losses = {
        'ours': lambda: ours(x, head, labels, probability).loss,
        'ours, 64 MB of logits a chunk': lambda: by((64 << 20)//(2*len(head))),
        'ours, 1024 rows a chunk': lambda: by(1024),
        'ours, all rows at once': lambda: by(len(x)),
        'torch, all logits: eager': lambda: whole(x, head, labels),
        'torch, all logits: compiled': lambda: fast(x, head, labels),
        'plain sum: ours': lambda: ours(x, head, labels).loss,
        'plain sum: torch, all logits, compiled': lambda: fast_plain(x, head, labels)}
    if hasattr(F, 'linear_cross_entropy'):
        losses['plain sum: torch, chunked'] = lambda: F.linear_cross_entropy(
            x, head, labels, reduction='sum')
    if liger(True) and not args.tiny:
        losses |= {'liger': lambda: liger(True)(head, x, labels),
                   'plain sum: liger': lambda: liger(False)(head, x, labels)}
    return losses

def doubts_about(who: dict, names: list[str], right: str) -> dict:
    "{name: in which way it does other work than `right`}; an error of our own is raised"
    doubts, (want, gradients) = {}, who[right]()
    for name in names:
        try:
            value, grads = who[name]()
            assert abs(float(value) - float(want)) <= .02*abs(float(want)), (
                f'{float(value)} instead of {float(want)}')
            for a, b in zip(grads, gradients):
                same_work(a, b, .05)
        except Exception as e:
            if name.split(': ')[-1] == 'ours':
                raise
            doubts[name] = f'{type(e).__name__}: {e}'[-300:]
    return doubts

def crossentropy(args, tokens: int = 8192, hidden: int = 2048, words: int = 128_256) -> dict:
    "DFT's loss and the plain sum over a large head, forward and backward, bfloat16"
    t, h, v = (64, 32, 512) if args.tiny else (tokens, hidden, words)
    x, head, labels = head_of_words(args, t, h, v)
    who = {name: there_and_back(f, x, head)
           for name, f in losses_of(args, x, head, labels).items()}
    sums = [n for n in who if n.startswith('plain')]
    doubts = doubts_about(who, [n for n in who if n not in sums], 'torch, all logits: eager')
    doubts |= doubts_about(who, sums, 'plain sum: ours')
    y, w = x.detach(), head.detach()

    def products():
        logits = y @ w.T
        return logits @ w, logits.T @ y
    who = {name: (lambda f=f: f() and None, None) for name, f in who.items()} | {
        'floor: three products': (lambda: products() and None, None)}
    return timed(args, who, 4., tokens=t, hidden=h, words=v, dtype='bfloat16', doubts=doubts,
                 flops=6*t*h*v)

# --- packed signs

def ternary(args, dtype_name: str = 'bfloat16') -> dict:
    "Four packed vectors added to weights, and packing"
    import torch
    from ftlab.native import add_ternary_, pack_ternary, unpack_ternary
    n, factors, device = sized(args, 100_000, 200_000_000), (.4, -.3, .2, .1), args.device
    dtype = getattr(torch, dtype_name)
    w = torch.randn(n, device=device).to(dtype)
    vs = [pack_ternary(torch.randn(n, device=device), keep=n//20) for _ in factors]
    signs = [unpack_ternary(v).sign().to(torch.int8) for v in vs]
    dense = [unpack_ternary(v, dtype) for v in vs]
    s = [float(torch.tensor(f*v.scale)) for f, v in zip(factors, vs)]
    one_sum = compiled(lambda w, a, b, c, d: w.add_(a*s[0] + b*s[1] + c*s[2] + d*s[3]), args)

    def eager(parts, scales):
        for t, f in zip(parts, scales):
            w.add_(t, alpha=f)

    start = w.clone()
    add_ternary_(w, vs, factors)
    mine = w.clone()
    w.copy_(start)
    eager(signs, s)
    same_work(mine, w, 1e-5 if dtype == torch.float32 else 1e-2)
    del start, mine
    wide, x = 2*n*w.element_size(), torch.randn(n, device=device)*2
    who = {
        'ours': (lambda: add_ternary_(w, vs, factors), wide + n),
        'int8: compiled': (lambda: one_sum(w, *signs), wide + 4*n),
        'int8: eager': (lambda: eager(signs, s), None),
        'dense: eager': (lambda: eager(dense, factors), None),
        'ours, packing': (lambda: pack_ternary(x, keep=n//20), 4*n + n//4),
        'floor: w.mul_(c)': (lambda: w.mul_(1.), wide)}
    return timed(args, who, numbers=n, vectors=len(factors), dtype=dtype_name)

PIECES = {
    'perturb': perturb, 'perturb, bfloat16': lambda a: perturb(a, 'bfloat16'),
    'magnitude': magnitude, 'magnitude, bfloat16': lambda a: magnitude(a, 'bfloat16'),
    'adamw': adamw, 'adamw, bfloat16': lambda a: adamw(a, 'bfloat16'),
    'crossentropy': crossentropy,
    'crossentropy, 32k words': lambda a: crossentropy(a, 16_384, 2048, 32_000),
    'ternary': ternary, 'ternary, float32': lambda a: ternary(a, 'float32')}

if __name__ == '__main__':
    options = arguments()
    run_pieces(PIECES, options, card_is_broken)
