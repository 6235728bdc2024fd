"""AdamW on a part of 50 million float32 numbers: the C++ kernel against the best that torch does with compact moments, and against dense AdamW.

    python bench/native_adamw.py            # writes bench/results/native_adamw.json; about five minutes

The job: a dense gradient is there, 5% or 50% of the numbers (chosen one by one, at random) or 5% of the rows are to be moved. Every contestant but the dense ones
keeps moments of the chosen numbers only. A second part trains a stack of layers in a process of its own and notes the most memory that it took."""
import json, os, subprocess, sys
from native import THREADS, best, main, peak

R, C = 12208, 4096
LAYERS, WIDTH, STEPS = 8, 1536, 3

def jobs():
    "{name: selected entries, as a bool mask of some shape and as what is given to SparseAdamW}"
    import torch
    from ftlab.native import rows
    g = torch.Generator().manual_seed(0); which = torch.randperm(R, generator=g)[:R//20].sort().values
    return {'5%': torch.rand(R, C, generator=g) < .05, '50%': torch.rand(R, C, generator=g) < .5, 'rows': rows(which)}, which

def compact(torch):
    "Gather, AdamW, scatter, as torch.compile is given it"
    def step(p, g, i, m, v, rate, root):
        x = g[i]; m.lerp_(x, .1); v.mul_(.999).addcmul_(x, x, value=.001); p[i] = p[i] - rate*m/(v.sqrt()*root + 1e-8)
    return step

def contestants():
    import torch
    import torch._inductor.config as inductor
    from torch._dynamo.utils import counters
    from ftlab.native import SparseAdamW
    torch.manual_seed(0); p, g = torch.nn.Parameter(torch.randn(R, C)), torch.randn(R, C)*.01; flat, grad = p.detach().view(-1), g.view(-1); p.grad = g
    selections, which = jobs(); rate, root = torch.tensor(1e-3), torch.tensor(1.); who = {}
    for name, s in selections.items():
        opt = SparseAdamW({p: s}, lr=1e-3); on = opt.selected(p); lists = SparseAdamW({p: s}, lr=1e-3).gather()
        def listed(lists=lists): p.grad = g; lists.grads(); lists.step(); lists.zero_grad(); p.grad = g
        who |= {f'ours, {name}': (opt.step, 0), f'ours, {name}: gathered, then stepped': (listed, 0)}
        at, of = (which, (p.detach(), g)) if name == 'rows' else (on.flatten().nonzero().flatten(), (flat, grad))
        m, v = torch.zeros(len(opt.state[p]['exp_avg'])).view(-1, C if name == 'rows' else 1).squeeze(1), None; v = torch.zeros_like(m)
        for kind, i in (('int64', at), ('int32', at.int())): # Inductor's graph, at fixed size: checked below to be in place
            f = torch.compile(compact(torch), dynamic=False, fullgraph=True); f(*of, i, m, v, rate, root)
            who[f'torch, {name}: compiled, {kind}'] = (lambda f=f, i=i, m=m, v=v, of=of: f(*of, i, m, v, rate, root), 0)
        buffers = torch.empty_like(m), torch.empty_like(m), torch.empty_like(m)
        def eager(i=at, m=m, v=v, of=of, buffers=buffers):
            x, d, q = buffers; torch.index_select(of[1], 0, i, out=x); m.lerp_(x, .1); v.mul_(.999).addcmul_(x, x, value=.001)
            torch.sqrt(v, out=d); d.add_(1e-8); torch.index_select(of[0], 0, i, out=q); q.addcdiv_(m, d, value=-1e-3); of[0].index_copy_(0, i, q)
        who[f'torch, {name}: eager, buffers'] = (eager, 3*m.nbytes)
    mask = selections['5%'].float(); dense, full = torch.optim.AdamW([p], lr=1e-3, weight_decay=0., fused=True), g.clone()
    def masked(): full.copy_(g).mul_(mask); p.grad = full; dense.step(); p.grad = g
    who |= {'torch, dense: fused AdamW, gradient times mask': (masked, 4*p.numel()), 'torch, dense: fused AdamW alone': (dense.step, 0), 'floor: p.mul_(c)': (lambda: flat.mul_(1.), 0)}
    assert counters['stats']['unique_graphs'] == 6 and not counters['graph_break']
    return who

def pairs(times):
    out = {}
    for name in ('5%', '50%', 'rows'):
        ours = f'ours, {name}'; compiled, eager = best(times, f'torch, {name}: compiled'), best(times, f'torch, {name}: eager')
        out |= {f'{name}: compiled gather, AdamW, scatter over ours': (compiled, ours), f'{name}: the same in eager torch over ours': (eager, ours),
            f'{name}: compiled over ours, gathered and then stepped': (compiled, f'{ours}: gathered, then stepped'),
            f'{name}: fused dense AdamW, gradient times mask, over ours': ('torch, dense: fused AdamW, gradient times mask', ours)}
    return out
