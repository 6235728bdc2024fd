"Changes in rows, columns and blocks: equal to Entries and to torch, with the gradient of what is chosen alone"
import pytest
import torch
from torch.nn.functional import linear
from ftlab.adapters.attach import attach
from ftlab.adapters.delta import Entries
from ftlab.adapters.slices import Blocks, Slices, block_size, in_blocks
from ftlab.adapters.store import identity, load_delta, pack, save_delta
from tests.toys import logits, same, toy, weights

KINDS = ('columns', 'rows', 'blocks')


def masked(W, kind):
    "Return a mask of this kind on a matrix whose sides 4 divides"
    mask = torch.zeros(W.shape, dtype=torch.bool)
    if kind == 'columns':
        mask[:, 1::5] = True
    elif kind == 'rows':
        mask[2::7] = True
    else:
        mask[:4, 4:8] = mask[8:12, :4] = mask[8:12, 4:8] = True
    return mask


def made(kind, W, mask):
    return Blocks(W, mask, 4) if kind == 'blocks' else Slices(W, mask)


@pytest.mark.parametrize('kind', KINDS)
def test_branch_and_weight_are_entries_with_the_same_mask_and_gradient(kind):
    torch.manual_seed(0)
    W, x = torch.randn(12, 20, dtype=torch.float64), torch.randn(3, 5, 20, dtype=torch.float64)
    mask = masked(W, kind)
    d, e = made(kind, W, mask), Entries(W, mask)
    with torch.no_grad():
        d.value.normal_()
        e.value.copy_((d(W) - W)[mask])
    torch.testing.assert_close(d(W), e(W), rtol=0, atol=1e-12)
    assert torch.equal((d(W) - W) != 0, mask)
    xs = [x.clone().requires_grad_() for _ in range(3)]
    y = linear(xs[0], W) + d.branch(xs[0])
    for out in (y, linear(xs[1], e(W)), linear(xs[2], d(W))):
        out.sin().sum().backward(retain_graph=True)
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=0, atol=1e-12)
    d.value.grad = None
    y.sin().sum().backward()
    place = torch.zeros(12, 20, dtype=torch.float64)
    place[mask] = e.value.grad
    d2 = made(kind, W, mask) # its forward, with the gradient for a value
    d2.value.data.copy_(d.value.grad)
    torch.testing.assert_close(d2(W) - W, place, rtol=0, atol=1e-12)


@pytest.mark.parametrize('kind', KINDS)
def test_autograd_saves_no_weight_and_only_the_inputs_that_are_read(kind):
    W, x = torch.randn(64, 64), torch.randn(10, 64)
    mask = masked(W, kind)
    d, saved = made(kind, W, mask), {}

    def note(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()//4
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        d.branch(x)
    read = 10*int(mask.any(0).sum()) if kind == 'columns' else x.numel()
    # beside the inputs: the values, and indices of 8 bytes
    assert sum(saved.values()) <= read + d.value.numel() + 4*64, saved


def test_all_blocks_of_a_weight_are_one_product_each_way():
    W, x = torch.randn(64, 64), torch.randn(10, 64, requires_grad=True)
    d = Blocks(W, size=4)
    with torch.profiler.profile() as seen:
        d.branch(x).sum().backward()
    count = {e.key: e.count for e in seen.key_averages()}
    assert count['aten::bmm'] == 3 and not {'aten::mm', 'aten::addmm'} & count.keys()
    assert count['aten::index_add_'] == 2


@pytest.mark.parametrize('kind', KINDS)
def test_the_gradient_is_right_under_autocast_too(kind):
    torch.manual_seed(0)
    W, x = torch.randn(12, 20), torch.randn(3, 5, 20)
    d = made(kind, W, masked(W, kind))
    torch.nn.init.normal_(d.value)
    grads = []
    for on in (False, True):
        given = x.clone().requires_grad_()
        d.value.grad = None
        with torch.autocast('cpu', torch.bfloat16, enabled=on):
            out = d.branch(given)
        out.float().sum().backward()
        grads.append((given.grad, d.value.grad.clone()))
    for want, have in zip(*grads):
        torch.testing.assert_close(have, want, rtol=.05, atol=.05)


@pytest.mark.parametrize('kind', KINDS)
def test_attached_it_saves_loads_folds_and_leaves_the_rest(kind, tmp_path):
    model = toy(hidden=32)
    base, plain, names = weights(model), logits(model), identity(model)
    chosen = {f'model.layers.{i}.{n}.weight': masked(model.get_parameter(f'model.layers.{i}.{n}.weight'), kind)
              for i in range(2) for n in ('self_attn.q_proj', 'mlp.down_proj')}
    att = attach(model, chosen, in_blocks(4) if kind == 'blocks' else Slices)
    assert torch.equal(logits(model), plain)
    for d in att.deltas.values():
        torch.nn.init.normal_(d.value, std=.1)
    tuned = logits(model)
    assert (tuned - plain).abs().max() > 1e-3
    held = sum(t.nbytes for d in att.deltas.values() for t in (*d.parameters(), *d.buffers()))
    values = sum(4*int(m.sum()) for m in chosen.values())
    assert values == sum(p.nbytes for p in att.parameters().values()) # as many again for each moment of AdamW
    size = save_delta(tmp_path/'d.safetensors', *pack(att), names)
    described = int.from_bytes((tmp_path/'d.safetensors').read_bytes()[:8], 'little')
    assert size == 8 + described + held and held <= 1.25*values # beside the indices
    with att.disabled():
        assert torch.equal(logits(model), plain)
    for n, c in att.changes().items():
        assert torch.equal(c != 0, chosen[n])
    att.detach()
    assert same(weights(model), base)
    again = load_delta(model, tmp_path/'d.safetensors')
    assert torch.equal(logits(model), tuned)
    again.fold()
    torch.testing.assert_close(logits(model), tuned, rtol=0, atol=2e-5)


@pytest.mark.parametrize('rows', (True, False))
def test_a_move_changes_nothing_and_returning_continues(rows):
    torch.manual_seed(1)
    W, x = torch.randn(6, 8), torch.randn(4, 8)
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[(slice(0, 2) if rows else (slice(None), slice(0, 2)))] = True
    d = Slices(W, mask)
    torch.nn.init.normal_(d.value)
    first, value = d(W).clone(), d.value.detach().clone()
    d.move(torch.tensor([1, 4]))
    assert torch.equal(d(W), first) and d.left_index.tolist() == [0]
    torch.testing.assert_close(x @ W.T + d.branch(x), x @ d(W).T)
    with torch.no_grad():
        d.value.add_(1.)
    second = d(W).clone()
    d.move(torch.tensor([0, 5]))
    assert torch.equal(d(W), second) and d.left_index.tolist() == [1, 4] and d.config['left'] == 2
    back = d.value[0] if rows else d.value[:, 0]
    assert torch.equal(back, value[0] if rows else value[:, 0])
    d.check()
    kept = [t.clone() for t in (d.index, d.left_index, d.left_value, d.value)]
    e = Slices(W, rows=rows, count=2, left=1)
    e.hold(*kept[:3])
    e.value.data.copy_(kept[3])
    assert torch.equal(e(W), second)


@pytest.mark.parametrize('build, says', [
    (lambda W: Slices(W, torch.eye(8, 12) > 0), 'whole rows, or of whole columns'),
    (lambda W: Slices(W[0]), 'no rows and columns'),
    (lambda W: Slices(W, rows=True, count=9), '9 slices do not fit'),
    (lambda W: Slices(W, rows=False, count=1, left=-1), '-1 slices do not fit'),
    (lambda W: Slices(W).move(torch.tensor([0, 0])), 'move needs 8 different'),
    (lambda W: Blocks(W, size=3), 'do not divide'),
    (lambda W: Blocks(W, torch.eye(8, 12) > 0, 4), 'whole blocks of 4 x 4'),
    (lambda W: Blocks(W, size=4, count=7), '7 slices do not fit')])
def test_what_does_not_fit_says_so(build, says):
    with pytest.raises(ValueError, match=says):
        build(torch.zeros(8, 12))


def test_indices_of_a_file_are_checked():
    d, b = Slices(torch.zeros(4, 4), rows=True, count=2), Blocks(torch.zeros(8, 8), size=4, count=2)
    with pytest.raises(ValueError, match='twice'):
        d.check()
    d.index[1] = 4
    with pytest.raises(ValueError, match='ranges from 0 to 4'):
        d.check()
    with pytest.raises(ValueError, match='twice'):
        b.check()
    b.place[0, 0] = 2
    with pytest.raises(ValueError, match='outside'):
        b.check()


def test_the_side_of_blocks_divides_the_weight():
    assert [block_size(s, 16) for s in ((128, 64), (40, 128), (6, 9), (5, 7))] == [16, 8, 1, 1]
