"SMT: against the official score and layer, written out, and the edges of its arguments"
import pytest
import torch
from ftlab.adapters.attach import attach
from ftlab.adapters.slices import in_blocks
from ftlab.adapters.subsets.smt import smt, strongest_blocks
from ftlab.core.batches import Unread
from ftlab.trainers.statistics import gradients
from tests.toys import toy


IDS = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(0))
BATCHES = [dict(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS)]


@pytest.mark.parametrize('by', ('mean_abs', 'abs_mean'))
def test_the_blocks_are_those_of_the_official_score(by):
    "smt_helper.py: blocks of all weights in one list by |mean| (or mean of |.|), the first n"
    model = toy()
    names = [n for n, _ in model.named_parameters() if any(f'{r}_proj' in n for r in 'qkv')]
    ranked = []
    for n, g in gradients(model, BATCHES, names, 'mean').items():
        for i in range(0, g.shape[0], 8):
            for j in range(0, g.shape[1], 8):
                block = g[i:i + 8, j:j + 8]
                score = block.mean().abs() if by == 'mean_abs' else block.abs().mean()
                ranked.append((float(score), n, i, j))
    total = sum(p.numel() for p in model.parameters())
    budget = 5*64/total
    best = {(n, i, j) for _, n, i, j in sorted(ranked, reverse=True)[:5]}
    chosen = strongest_blocks(budget, 8, by)(model, BATCHES)
    found = {(n, 8*int(i), 8*int(j)) for n, m in chosen.items() for i, j in m[::8, ::8].nonzero()}
    assert found == best
    assert sum(int(m.sum()) for m in chosen.values()) == 5*64


def test_the_gradient_of_a_block_is_that_of_the_official_layer():
    "smt.py: the gradient of a block is grad_output[rows]^T input[columns], summed over rows of the batch"
    model = toy()
    name, x = 'model.layers.0.self_attn.q_proj.weight', torch.randn(3, 7, 32)
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[8:16, 24:32] = mask[16:24, :8] = True
    att = attach(model, {name: mask}, in_blocks(8))
    out = model.model.layers[0].self_attn.q_proj(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    for (i, j), g in zip(((8, 24), (16, 0)), att.deltas[name].value.grad):
        want = torch.matmul(grad.permute(0, 2, 1)[:, i:i + 8], x[:, :, j:j + 8]).sum(0)
        torch.testing.assert_close(g, want, rtol=1e-5, atol=1e-5)


def test_random_blocks_depend_on_the_seed_alone():
    a, b = (smt(.05, 4, 'random').select(toy(), Unread(), s) for s in (1, 2))
    again = smt(.05, 4, 'random').select(toy(), None, 1)
    assert a.keys() == again.keys() and all(torch.equal(m, again[n]) for n, m in a.items())
    assert a.keys() != b.keys() or any(not torch.equal(m, b[n]) for n, m in a.items())


@pytest.mark.parametrize('make, says', [
    (lambda: smt(size=0), 'at least 1'), (lambda: smt(by='abs'), 'mean_abs, abs_mean, random'),
    (lambda: smt(1e-6).select(toy(), Unread()), 'smallest unit'),
    (lambda: smt(0.).select(toy(), Unread()), 'budget is'),
    (lambda: smt(.9, 4).select(toy(), Unread()), 'the budget allows'),
    (lambda: smt().select(toy()), 'training rows'),
    (lambda: smt(targets=('experts',)).select(toy(), Unread()), 'no matrix among experts')])
def test_wrong_arguments_say_what_is_wrong(make, says):
    with pytest.raises(ValueError, match=says):
        make()
