"The linear probe against a fit by hand; its control task; what it refuses"
import numpy as np
import pytest, torch
from torch.nn import functional as F
from ftlab.evaluators.linear_probe import control_labels, linear_probe
from sklearn.model_selection import train_test_split

def points(n=200, width=6, seed=0):
    "Features of which the first column tells the label, mostly"
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=g)
    return x, (x[:, 0] + .3*torch.randn(n, generator=g) > 0).long()

def fit_by_hand(x, y, test, seed, penalty=1.):
    "Multinomial regression by LBFGS in double precision: sum of the losses + penalty/2 of the squared weights"
    a, b, ya, yb = train_test_split(x.numpy(), y.numpy(), test_size=test, random_state=seed)
    a, b, ya, yb = (torch.from_numpy(v) for v in (a, b, ya, yb))
    mean, std = a.mean(0), a.std(0, correction=0)
    a, b = ((v - mean).double()/std for v in (a, b))
    w = torch.zeros(a.shape[1], dtype=torch.double, requires_grad=True)
    c = torch.zeros((), dtype=torch.double, requires_grad=True)
    opt = torch.optim.LBFGS([w, c], max_iter=500, tolerance_grad=1e-9,
                            line_search_fn='strong_wolfe')

    def loss():
        opt.zero_grad()
        out = F.binary_cross_entropy_with_logits(a @ w + c, ya.double(), reduction='sum')
        out = out + penalty/2*w.square().sum()
        out.backward()
        return out
    opt.step(loss)
    return float(((b @ w + c > 0) == yb).float().mean())

@pytest.mark.parametrize('penalty', [1., 100.])
def test_accuracies_are_those_by_hand(penalty):
    x, y = points()
    found = linear_probe(x, y, seeds=3, penalty=penalty)
    by_hand = [fit_by_hand(x, y, .3, s, penalty) for s in range(3)]
    assert found.accuracy == pytest.approx(by_hand, abs=1e-6) and found.converged
    assert found.mean()['accuracy'] > .75 and found.rows == 200
    assert found.selectivity == tuple(a - c for a, c in zip(found.accuracy, found.control))
    assert abs(found.mean()['control'] - .5) < .12

def test_a_probe_that_learns_types_by_heart_has_no_selectivity():
    "One-hot types: any labels of the types can be read, so the control task is as easy"
    g = torch.Generator().manual_seed(0)
    types = torch.randint(0, 12, (400,), generator=g)
    y = torch.randint(0, 2, (12,), generator=g)[types]
    found = linear_probe(torch.eye(12)[types], y, types.tolist(), seeds=2)
    assert found.mean()['accuracy'] == 1 and found.mean()['control'] > .95
    without = linear_probe(torch.eye(12)[types], y, seeds=2)
    assert without.mean()['control'] < .7

def test_control_labels():
    y = list('aaab')*25
    assert sorted(control_labels(y, seed=1)) == sorted(y)
    types = [i % 10 for i in range(100)]
    drawn = control_labels(y, types, 3)
    assert all(len({d for d, t in zip(drawn, types) if t == k}) == 1 for k in range(10))
    for same in (types, torch.tensor(types), np.array(types)):
        assert (drawn == control_labels(y, same, 3)).all()

def test_everything_is_repeatable_and_nothing_global_moves():
    x, y = points()
    state, numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert linear_probe(x, y, seeds=2) == linear_probe(x.numpy(), y.numpy(), seeds=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy).all()
    assert linear_probe(x, ['no', 'yes']*100, seeds=1).majority == .5
    assert not linear_probe(x, y, seeds=1, steps=1).converged

@pytest.mark.parametrize('change, says', [
    (lambda x, y: (x[None], y), 'must be'), (lambda x, y: (x, y[:-1]), 'must be'),
    (lambda x, y: (x.index_fill(0, torch.tensor(3), torch.nan), y),
     '1 rows of the features are NaN'),
    (lambda x, y: (x, torch.zeros(200)), '1 different labels'),
    (lambda x, y: (x[:4], y[:4]), 'at least 10 rows')])
def test_bad_input_is_named(change, says):
    with pytest.raises(ValueError, match=says):
        linear_probe(*change(*points()))

def test_bad_settings_are_named():
    x, y = points()
    for more, says in ((dict(seeds=0), 'seeds is 0'), (dict(test=1.), 'test is 1'),
                       (dict(penalty=0.), 'penalty 0'),
                       (dict(types=[1]), '1 types')):
        with pytest.raises(ValueError, match=says):
            linear_probe(x, y, **more)
