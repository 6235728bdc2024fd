"""The loss of DFT over a head of 32,768 words, forward and backward: ours against torch's chunked
losses with the weight applied afterwards, against all logits at once, compiled and not, and against
the three matrix products that no version can avoid.

    python bench/native_crossentropy.py            # writes bench/results/native_crossentropy.json; about six minutes

Liger's kernels, the usual peer on a GPU, are written in Triton and do not run on a CPU."""
from native import best, main
from peers import there_and_back

T, H, V = 2048, 512, 32_768

def probability(nll, entropy=None):
    return (-nll).exp()

def weigh(nll):
    return (probability(nll.detach())*nll).sum()

def full(hidden, head, labels):
    import torch.nn.functional as F
    return weigh(F.cross_entropy(hidden @ head.T, labels, reduction='none'))

def losses_of(hidden, head, labels):
    "{name: function without arguments that gives a loss}; the first five are the same loss"
    import torch
    from ftlab.native import weighted_linear_cross_entropy as ours
    compiled = torch.compile(full)

    def torchs(reduction, **options):
        return torch.nn.functional.linear_cross_entropy(
            hidden, head, labels, reduction=reduction,
            options=torch.nn.LinearCrossEntropyOptions(**options))

    return {'ours': lambda: ours(hidden, head, labels, probability).loss,
            'torch, chunked: as it comes': lambda: weigh(torchs('none')),
            'torch, chunked: 512 rows': lambda: weigh(torchs('none', batch_chunk_size=512)),
            'torch, all logits: eager': lambda: full(hidden, head, labels),
            'torch, all logits: compiled': lambda: compiled(hidden, head, labels),
            'plain sum: ours': lambda: ours(hidden, head, labels).loss,
            'plain sum: torch, 512 rows': lambda: torchs('sum', batch_chunk_size=512)}

def check_same(who, right, names):
    "They give the same loss and the same gradients as `right`"
    want, (a, b) = who[right]()
    for k in names:
        value, grads = who[k]()
        assert abs(value - want) < 1e-4*abs(want), k
        assert all((g - w).norm() < 1e-4*w.norm() for g, w in zip(grads, (a, b))), k

def contestants():
    import torch
    make = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (T,), generator=make)
    hidden = torch.randn(T, H, generator=make).requires_grad_()
    head = (.04*torch.randn(V, H, generator=make)).requires_grad_()
    with torch.no_grad():
        hidden.add_(12*head[labels]) # a model that knows something: p from next to 0 to next to 1
    who = {k: there_and_back(f, hidden, head) for k, f in losses_of(hidden, head, labels).items()}
    check_same(who, 'torch, all logits: eager', list(who)[:5])
    room = torch.empty(T, V)

    def products():
        torch.mm(hidden.detach(), head.detach().t(), out=room)
        return room @ head.detach(), room.t() @ hidden.detach()

    return {k: (lambda f=f: f() and None, 0)
            for k, f in who.items()} | {'floor: three products': (products, 4*T*V)}

def pairs(times):
    chunked = best(times, 'torch, chunked')
    return {f'{chunked} over ours': (chunked, 'ours'),
            'torch, chunked: as it comes over ours': ('torch, chunked: as it comes', 'ours'),
            'torch, all logits: compiled over ours': ('torch, all logits: compiled', 'ours'),
            'torch, all logits: eager over ours': ('torch, all logits: eager', 'ours'),
            'ours over the floor': ('ours', 'floor: three products'),
            'plain sum: torch over ours': ('plain sum: torch, 512 rows', 'plain sum: ours')}

if __name__ == '__main__':
    main(__file__, contestants, pairs, 5, tokens=T, hidden=H, words=V,
         targets=dict(chunked=1.5, compiled=.9, memory_of_compiled=.5))
