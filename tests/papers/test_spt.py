"SPT: the official allocation written out, what a budget buys, and the edges of its arguments"
import pytest
import torch
from ftlab.adapters.attach import attach
from ftlab.adapters.subsets.spt import allocated, spt
from ftlab.core.batches import Sample, Unread
from ftlab.core.tokens import encode_all
from tests.tiny import tiny
from tests.toys import TOK, lab_data, toy

SHAPES = dict(a=(30, 20), b=(40, 30), c=(25, 25), n=(20,), v=(40,))


def sample():
    return Sample(encode_all(lab_data().train[:40], TOK, 'text'), TOK.pad_token_id)


def made(seed=0):
    draw = torch.Generator().manual_seed(seed)
    scale = dict(a=1., b=.5, c=2., n=1.5, v=.2)
    return {n: torch.rand(s, generator=draw)*scale[n] for n, s in SHAPES.items()}


def official(scores, marked, r, alpha=10., beta=5.):
    "get_sensitivity of engine.py for one number of marked entries: (whole tensors, total)"
    flat = torch.cat([s.flatten() for s in scores.values()])
    mask = torch.zeros_like(flat)
    mask[flat.topk(marked).indices] = 1.
    whole, total = set(), 0
    for (n, s), m in zip(scores.items(), mask.split([s.numel() for s in scores.values()])):
        k = int(m.sum())
        if s.ndim == 1:
            structured, cost = k >= s.shape[0]/beta, s.shape[0]
        else:
            cost = s.shape[1]*r + r*s.shape[0]
            structured = k >= cost/alpha
        total += cost if structured else k
        whole |= {n} if structured else set()
    return whole, total


@pytest.mark.parametrize('r', (2, 4))
@pytest.mark.parametrize('budget', (10, 60, 150, 260, 400))
def test_what_is_whole_is_that_of_the_official_code_at_the_largest_mark_that_fits(budget, r):
    scores = made()
    count = sum(s.numel() for s in scores.values())
    most = official(scores, count, r)[1]
    if budget > most:
        with pytest.raises(ValueError, match='larger r'):
            allocated(scores, budget, r)
        return
    totals = [0, *(official(scores, k, r)[1] for k in range(1, count + 1))]
    marked = max(k for k, total in enumerate(totals) if total <= budget)
    whole = official(scores, marked, r)[0] if marked else set()
    chosen = allocated(scores, budget, r)
    assert {n for n, m in chosen.items() if m is True or scores[n].ndim == 1 and m.all()} >= whole
    assert {n for n, m in chosen.items() if m is True} == {n for n in whole if scores[n].ndim == 2}
    cost = lambda n, m: r*sum(SHAPES[n]) if m is True else int(m.sum())
    assert sum(cost(n, m) for n, m in chosen.items()) == budget


def test_single_entries_are_the_highest_of_what_is_not_whole():
    scores = made(1)
    chosen = allocated(scores, 150, 2)
    single = {n: m for n, m in chosen.items() if m is not True and not m.all()}
    assert single
    least = min(float(scores[n][m].min()) for n, m in single.items())
    left = [n for n in scores if n in single or n not in chosen]
    assert all(float(scores[n][~single[n] if n in single else ...].max()) <= least for n in left)


@pytest.mark.parametrize('r', (0, 2, 8))
@pytest.mark.parametrize('budget', (.0005, .01, .03))
def test_a_budget_is_met_exactly(budget, r):
    model = toy()
    recipe = spt(budget, r, by='magnitude')
    att = attach(model, recipe.select(model), recipe.delta)
    trained = sum(p.numel() for p in att.parameters().values())
    att.detach()
    assert trained == round(budget*sum(p.numel() for p in model.parameters()))


def test_the_scores_are_squared_gradients_of_batches():
    model, s = toy(), sample()
    chosen = spt(.01, r=0, rows=40).select(model, s)
    total = {}
    for batch in s.take(40, 32):
        model.zero_grad()
        model(**batch).loss.backward()
        for n, p in model.named_parameters():
            if 'embed' not in n and 'lm_head' not in n:
                total[n] = total.get(n, 0) + p.grad**2
    model.zero_grad(set_to_none=True)
    flat = torch.cat([t.flatten() for t in total.values()])
    count = round(.01*sum(p.numel() for p in model.parameters()))
    bar = flat.sort(descending=True).values[count - 1]
    differ = sum(int((chosen.get(n, torch.zeros_like(t, dtype=torch.bool)) != (t >= bar)).sum())
                 for n, t in total.items())
    assert differ <= 2 and sum(int(m.sum()) for m in chosen.values()) == count


def test_a_matrix_that_gets_lora_gets_the_official_one():
    "y + B A x, unscaled"
    model = toy()
    recipe = spt(.05, r=4, by='magnitude')
    att = attach(model, recipe.select(model), recipe.delta)
    name, d = next((n, d) for n, d in att.deltas.items() if d.kind == 'lowrank')
    torch.nn.init.normal_(d.B)
    base, tuned = att.weight(name)
    torch.testing.assert_close(tuned, base + d.B @ d.A)


def test_head_and_embeddings_are_not_ranked():
    chosen = spt(.01, by='magnitude').select(tiny('gpt2'))
    assert not any('wte' in n or 'wpe' in n or 'lm_head' in n for n in chosen)


@pytest.mark.parametrize('make, says', [
    (lambda: spt(by='x'), 'gradient, magnitude, random'), (lambda: spt(r=-1), 'a rank, or 0'),
    (lambda: spt(matrix=0.), 'above 0 and at most 1'),
    (lambda: spt(vector=1.5), 'above 0 and at most 1'),
    (lambda: spt(.9, by='random').select(toy()), 'larger r'),
    (lambda: spt(.99, r=0, by='random').select(toy()), 'the budget allows'),
    (lambda: spt(0.).select(toy(), Unread()), 'share of the parameters')])
def test_wrong_arguments_say_what_is_wrong(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_matrix_at_its_threshold_gets_lora():
    first, other = torch.zeros(20, 15), torch.linspace(1, 2, 1200)[None]
    first.view(-1)[:7] = 10. # a tenth of 70, and 70*.1 is above 7 in floating point
    assert allocated(dict(a=first, b=other), 100, 2)['a'] is True
    assert official(dict(a=first, b=other), 37, 2) == ({'a'}, 100)
