"""AdamW on a part of 50 million float32 numbers.

The C++ kernel against the best that torch does with compact moments, and against dense AdamW.

    python bench/native_adamw.py            # writes bench/results/native_adamw.json; about five minutes

The job: a dense gradient is there, 5% or 50% of the numbers (chosen one by one, at random) or 5% of
the rows are to be moved. Every contestant but the dense ones keeps moments of the chosen numbers
only. Rows take so little time that each call makes ten steps. A second part trains a stack of
layers in a process of its own and notes the most memory that it took."""
import json, os, subprocess, sys
from native import THREADS, best, main, peak, status
from peers import adamw_eager, compact

R, C = 12208, 4096
LAYERS, WIDTH, STEPS = 8, 1536, 3

def jobs():
    "{name: selected entries, as a bool mask of some shape and as what is given to SparseAdamW}"
    import torch
    from ftlab.native import rows
    g = torch.Generator().manual_seed(0)
    which = torch.randperm(R, generator=g)[:R//20].sort().values
    return {'5%': torch.rand(R, C, generator=g) < .05, '50%': torch.rand(R, C, generator=g) < .5,
            'rows': rows(which)}, which

def gathered(opt, p, g):
    "A step in which the gradient is gathered first, as `gather` does during a backward pass"
    opt.gather()

    def step():
        p.grad = g
        opt.grads()
        opt.step()
        opt.zero_grad()
        p.grad = g

    return step

def of_torch(name, at, p, g, like):
    "The peers of one selection: `at` are the places in `p` and `g`, `like` is shaped as a moment"
    import torch
    m, v, who = torch.zeros_like(like), torch.zeros_like(like), {}
    rate, root = torch.tensor(1e-3), torch.tensor(1.)
    # Inductor's graph, at fixed size: checked below to be in place
    for kind, i in (('int64', at), ('int32', at.int())):
        f = torch.compile(compact, dynamic=False, fullgraph=True)
        f(p, g, i, m, v, rate, root)
        who[f'torch, {name}: compiled, {kind}'] = (
            lambda f=f, i=i: f(p, g, i, m, v, rate, root), 0)
    return who | {f'torch, {name}: eager, buffers': (adamw_eager(at, m, v, p, g), 3*m.nbytes)}

def masked(opt, p, g, mask):
    "The dense optimiser's step with the gradient times a mask"
    full = g.clone()

    def step():
        full.copy_(g).mul_(mask)
        p.grad = full
        opt.step()
        p.grad = g

    return step

def contestants():
    import torch
    import torch._inductor.config  # noqa: F401 - not while it is measured
    from torch._dynamo.utils import counters
    from ftlab.native import SparseAdamW
    torch.manual_seed(0)
    p, g = torch.nn.Parameter(torch.randn(R, C)), torch.randn(R, C)*.01
    flat, grad = p.detach().view(-1), g.view(-1)
    p.grad = g
    selections, which = jobs()
    who = {}
    for name, s in selections.items():
        opt = SparseAdamW({p: s}, lr=1e-3)
        who |= {f'ours, {name}': (opt.step, 0), f'ours, {name}: gathered, then stepped': (
            gathered(SparseAdamW({p: s}, lr=1e-3), p, g), 0)}
        if name == 'rows':
            who |= of_torch(name, which, p.detach(), g, g[which])
        else:
            at = opt.selected(p).flatten().nonzero().flatten()
            who |= of_torch(name, at, flat, grad, grad[at])
    dense = torch.optim.AdamW([p], lr=1e-3, weight_decay=0., fused=True)
    who |= {'torch, dense: fused AdamW, gradient times mask': (
                masked(dense, p, g, selections['5%'].float()), 4*p.numel()),
            'torch, dense: fused AdamW alone': (dense.step, 0),
            'floor: p.mul_(c)': (lambda: flat.mul_(1.), 0)}
    assert counters['stats']['unique_graphs'] == 6 and not counters['graph_break']
    return {k: (lambda f=f: [f() for _ in range(10)], held) if ', rows' in k else (f, held)
            for k, (f, held) in who.items()}

def pairs(times):
    out = {}
    for name in ('5%', '50%', 'rows'):
        ours = f'ours, {name}'
        compiled, eager = best(times, f'torch, {name}: compiled'), best(times, f'torch, {name}: eager')
        out |= {f'{name}: compiled gather, AdamW, scatter over ours': (compiled, ours),
                f'{name}: the same in eager torch over ours': (eager, ours),
                f'{name}: compiled over ours, gathered and then stepped': (compiled, f'{ours}: gathered, then stepped')}
        if name != 'rows':
            out |= {f'{name}: fused dense AdamW, gradient times mask, over '
                    'ours': ('torch, dense: fused AdamW, gradient times mask', ours)}
    return out

def net(width, layers):
    from torch import nn
    return nn.Sequential(*[o for _ in range(layers)
                           for o in (nn.Linear(width, width, bias=False), nn.Tanh())])

def optimiser(way, model, width):
    "The optimiser of a way that `memory` lists, for a model of `net`"
    import torch
    from ftlab.native import SparseAdamW, rows
    ps = list(model.parameters())
    if way == 'dense':
        return torch.optim.AdamW(ps, fused=True)
    some = lambda p: rows(range(0, width, 20)) if 'rows' in way else torch.rand(p.shape) < .05
    opt = SparseAdamW((p, some(p)) for p in ps)
    if 'hook' in way:
        opt.gather()
    if 'narrow' in way:
        [opt.narrow(l) for l in model if isinstance(l, torch.nn.Linear)]
    return opt

def some_steps(model, opt, width):
    import torch
    x = torch.randn(8, width)
    for _ in range(STEPS):
        model(x).pow(2).mean().backward()
        opt.step()
        opt.zero_grad()

def train(way):
    """The most memory that a few steps took above the parameters, moments and all;
    the ways are compared in processes of their own"""
    import torch
    from ftlab.native import backend
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    assert backend('cpu') == 'cpp'
    small = net(64, 2)
    some_steps(small, optimiser(way, small, 64), 64)
    model = net(WIDTH, LAYERS)
    model(torch.randn(8, WIDTH))
    start = status('VmRSS')
    opt = optimiser(way, model, WIDTH)
    held = status('VmRSS') - start
    top = held + peak(lambda: some_steps(model, opt, WIDTH))
    state = sum(t.nbytes for s in opt.state.values() for t in s.values()
                if torch.is_tensor(t) and t.ndim)
    print(json.dumps(dict(way=way, peak_bytes=top, state_bytes=state,
                          parameter_bytes=4*LAYERS*WIDTH**2, layer_bytes=4*WIDTH**2)))

def memory():
    "All ways; freed memory goes back to the system at once, so that the mark shows what is held"
    env, rows = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536', 'FTLAB_NATIVE': 'cpp',
                 'OMP_NUM_THREADS': str(THREADS)}, []
    for way in ('dense', '5%', '5%, hook', '5% rows, hook', '5% rows, narrow'):
        r = subprocess.run([sys.executable, __file__, 'train', way], env=env, capture_output=True,
                           text=True)
        if r.returncode:
            sys.exit(f'{way}: ended with {r.returncode}\n{r.stderr}')
        rows.append(json.loads(r.stdout.splitlines()[-1]))
    return rows

if __name__ == '__main__':
    if sys.argv[1:2] == ['train']:
        train(sys.argv[2])
    else:
        main(__file__, contestants, pairs, 9, numbers=R*C, memory=[] if sys.argv[1:] else memory(),
             targets={'5%': 1.2, '50%': 1., 'rows': 1.5})
