"SliceFine: against coordinate descent by hand, and the edges of its arguments"
import json
import pytest
import torch
from ftlab.adapters.subsets.slicefine import slicefine, slices_of
from ftlab.trainers.fit import fit
from tests.pages import ROOT
from tests.tiny import tiny
from tests.toys import TOK, lab_data, toy


def trained(steps, **k):
    "Train with a slice of 4 columns that moves every two steps, and note the change after each step"
    seen = []

    class Look:
        def after_step(self, state):
            pairs = {n: state.attached.weight(n) for n in state.attached.deltas}
            seen.append({n: tuned - base for n, (base, tuned) in pairs.items()})
    run = fit(toy(), TOK, lab_data(), slicefine(4, every=2), steps=steps, batch_size=4, lr=1e-2,
              progress=False, callbacks=(Look(),), weight_decay=0., **k)
    return run, seen


def test_only_the_active_slice_moves_and_the_others_stay():
    run, seen = trained(6, schedule='constant')
    for n in seen[0]:
        size = seen[0][n].shape[1]
        starts = slices_of(size, 4)
        first = starts.index(int((seen[0][n] != 0).any(0).nonzero()[0]))
        for step, (before, after) in enumerate(zip(seen, seen[1:]), 1):
            start = starts[(first + step//2) % len(starts)]
            moved = (before[n] - after[n]).abs().amax(0) > 1e-6
            assert moved[start:start + 4].any() and moved.sum() <= 4, (n, step)
            assert not moved[:start].any(), (n, step)


def test_the_optimizer_starts_anew_after_a_move():
    "Adam's first step is the rate in every entry, as at the start of a run"
    _, seen = trained(4, schedule='constant')
    steps = [{n: (b[n] - a[n]) for n in a} for a, b in zip(seen[1:], seen[2:])]
    name = next(iter(seen[0]))
    size = steps[0][name].abs()
    assert torch.allclose(size[size > 1e-4].max(), torch.tensor(1e-2), rtol=1e-3)


def test_slices_cover_a_weight_and_the_last_fits():
    assert slices_of(10, 4) == [0, 4, 6] and slices_of(8, 4) == [0, 4] and slices_of(3, 3) == [0]


@pytest.mark.parametrize('rows', (True, False))
@pytest.mark.parametrize('make', (toy, lambda: tiny('gpt2')))
def test_the_width_and_the_budget_are_met(make, rows):
    model = make()
    masks = slicefine(2, rows).select(model)
    assert all(m.sum() in (2*m.shape[0], 2*m.shape[1]) for m in masks.values())
    total = sum(p.numel() for p in model.parameters())
    for budget in (.002, .005, .05, .2):
        some = slicefine(rows=rows, budget=budget).select(model)
        largest = max(max(m.shape) for m in masks.values())
        count = sum(int(m.sum()) for m in some.values())
        assert 0 <= budget*total + .5 - count < largest + 1, budget


def test_with_a_budget_all_matrices_have_the_same_share_to_within_a_slice():
    model = toy(hidden=64)
    masks = slicefine(budget=.1).select(model)
    total = sum(p.numel() for p in model.parameters())
    inside = sum(m.numel() for m in slicefine().select(model).values())
    for m in masks.values():
        width = int(m.any(0).sum())
        assert abs(width - .1*total/inside*m.shape[1]) < 1


def test_a_run_that_was_cut_off_continues_bit_for_bit(tmp_path):
    whole, _ = trained(6)
    folder = tmp_path/'run'

    class Stop:
        def after_step(self, state):
            if state.step == 5:
                raise KeyboardInterrupt
    k = dict(steps=6, batch_size=4, lr=1e-2, progress=False, weight_decay=0.,
             out=folder, save_every=2)
    fit(toy(), TOK, lab_data(), slicefine(4, every=2), callbacks=(Stop(),), **k)
    again = fit(toy(), TOK, lab_data(), slicefine(4, every=2), resume=True, **k)
    want, have = whole.delta.tensors(), again.delta.tensors()
    assert all(torch.equal(want[n], have[n]) for n in want)


def test_the_page_on_the_real_model_says_that_its_slice_never_moved():
    "nbs/instruments/real.ipynb, below the table of one fit each; true of the report that is kept"
    report = json.loads((ROOT/'bench/results/real_papers/slicefine.json').read_text())
    settings = report.get('result', report)['settings']
    every, steps = settings['recipe']['arguments']['every'], settings['steps']
    page = (ROOT/'nbs/instruments/real.ipynb').read_text()
    said = f'its slice every {every} steps by default, and its run in the table above has {steps}: its slice stayed'
    assert every >= steps and said in page


@pytest.mark.parametrize('make, says', [
    (lambda: slicefine(0), 'at least 1'), (lambda: slicefine(every=-1), '0 or more'),
    (lambda: slicefine(budget=.999).select(toy()), 'more than all'),
    (lambda: slicefine(budget=1e-6).select(toy()), 'the smallest slice has'),
    (lambda: slicefine(targets=('experts',)).select(toy()), 'no matrix among experts'),
    (lambda: slicefine(budget=-1.).select(toy()), 'share of the parameters')])
def test_wrong_arguments_say_what_is_wrong(make, says):
    with pytest.raises(ValueError, match=says):
        make()
