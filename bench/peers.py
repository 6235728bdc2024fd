"What torch alone offers for the work of a kernel: the peers that every bench, on CPU or GPU, measures"

def compact(p, g, i, m, v, rate, root):
    "Gather, AdamW, scatter, as torch.compile is given it"
    x = g[i]
    m.lerp_(x, .1)
    v.mul_(.999).addcmul_(x, x, value=.001)
    p[i] = p[i] - rate*m/(v.sqrt()*root + 1e-8)

def adamw_eager(i, m, v, p, g):
    "Gather, AdamW, scatter in eager torch, with three buffers of the size of `m` that are kept"
    import torch
    x, d, q = (torch.empty_like(m) for _ in range(3))

    def step():
        torch.index_select(g, 0, i, out=x)
        m.lerp_(x, .1)
        v.mul_(.999).addcmul_(x, x, value=.001)
        torch.sqrt(v, out=d)
        d.add_(1e-8)
        torch.index_select(p, 0, i, out=q)
        q.addcdiv_(m, d, value=-1e-3)
        p.index_copy_(0, i, q)

    return step

def largest(x, k: int):
    """The k-th magnitude of `x` by kthvalue, the indices by topk,
    and the threshold of float32 by two counts"""
    import torch
    n = len(x)

    def kthvalue():
        return torch.kthvalue(x.abs(), n - k + 1).values

    def topk():
        return torch.topk(x.abs(), k, sorted=False).indices

    def by_groups():  # what one would write in torch: two counts of 16 bits each
        b = x.view(torch.int32) & 0x7fffffff
        c = torch.histc((b >> 16).float(), 32768, 0, 32768).flip(0).cumsum(0)
        group = int((c < k).sum())
        some = b[(b >> 16) == 32767 - group]
        return some.kthvalue(len(some) - (k - int(c[group - 1])) + 1).values

    return kthvalue, topk, by_groups

def there_and_back(loss, x, head):
    """Forward and backward as one call, which gives the loss and both gradients and keeps neither,
    so that the next one's memory is its own"""
    def call():
        value = loss()
        value.backward()
        grads = [x.grad, head.grad]
        x.grad = head.grad = None
        return value.detach(), grads

    return call
