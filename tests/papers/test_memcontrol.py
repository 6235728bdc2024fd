"memcontrol: a trial in plain torch, the front by its definition, budgets, and the edges of its arguments"
import random
import pytest
import torch
from ftlab import data
from ftlab.adapters.subsets.memcontrol import (Trial, best, front, filled, halves, masks,
                                               memcontrol, searched, tried)
from ftlab.core.batches import Sample, Unread, collate, order
from ftlab.core.recipe import CannotCompose
from ftlab.core.tokens import encode_all
from ftlab.trainers.fit import fit
from tests.losses import row_loss
from tests.tiny import tiny
from tests.toys import TOK, classifier, lab_data, label_data, same, toy, weights

ROWS = encode_all(lab_data().train[:24], TOK, 'text')


def sample(rows=ROWS, **more):
    return Sample(rows, TOK.pad_token_id, **more)


def test_a_trial_is_a_few_steps_of_adamw_and_two_losses_in_plain_torch():
    model, plain, how = toy(), toy(), searched(steps=3, lr=1e-2, size=4, rows=24)
    on = (1, 2)
    trial = how._try(model, how.units(model), on, sample(), 0)
    train, ask = halves(sample(), 24)
    names = [n for i in on for n in how.units(plain)[i]]
    plain.requires_grad_(False)
    moving = [plain.get_parameter(n).requires_grad_() for n in names]
    step = torch.optim.AdamW(moving, 1e-2, weight_decay=0.)
    at = order(len(train), 0, 0).tolist()
    for k in range(3):
        step.zero_grad()
        torch.stack([row_loss(plain, train[i]) for i in at[4*k:4*k + 4]]).mean().backward()
        step.step()
    with torch.no_grad():
        asked = float(torch.stack([row_loss(plain, r) for r in ask]).mean())
        known = float(torch.stack([row_loss(plain, r) for r in train]).mean())
    assert abs(trial.quality - asked) < 1e-4 and abs(trial.memory - (asked - known)) < 1e-4
    assert abs(known - 5.2) > .2 # it has moved


def test_a_trial_leaves_no_trace():
    model = toy()
    was = weights(model)
    frozen = model.get_parameter('model.norm.weight').requires_grad_(False)
    model.train()
    searched(2, 2, 1e-2, size=4).search(model, sample())
    assert same(weights(model), was) and model.training and not frozen.requires_grad
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ZeroDivisionError):
        with tried(model, {'model.norm.weight': True}, [collate(ROWS[:2], 0)], .1):
            assert not same(weights(model), was)
            1/0
    assert same(weights(model), was)


def test_the_front_is_what_no_other_trial_dominates():
    draw = random.Random(0)
    for _ in range(50):
        ts = [Trial((i,), draw.randint(0, 6), draw.randint(0, 6)) for i in range(8)]
        beaten = lambda t: any(o.quality <= t.quality and o.memory <= t.memory
                               and (o.quality, o.memory) != (t.quality, t.memory) for o in ts)
        assert ({(t.quality, t.memory) for t in front(ts)}
                == {(t.quality, t.memory) for t in ts if not beaten(t)})
        assert best(ts, 'quality').quality == min(t.quality for t in ts)
        assert best(ts, 'memory').memory == min(t.memory for t in ts)


def test_the_choice_is_between_the_ends():
    ts = [Trial((0,), 4., 0.), Trial((1,), 2.5, .2), Trial((2,), 2., 1.), Trial((3,), 5., .9)]
    assert [best(ts, by).on for by in ('both', 'quality', 'memory')] == [(1,), (2,), (0,)]
    assert best([Trial((0,), float('nan'), 0.), ts[3]]).on == (3,)
    with pytest.raises(ValueError, match='smaller search_lr'):
        best([Trial((0,), float('nan'), float('nan'))])


def test_masks_are_fair_coins_and_never_empty_or_equal():
    found = masks(10, 400, random.Random(0))
    assert len(set(found)) == 400 and () not in found
    assert abs(sum(map(len, found))/4000 - .5) < .03
    assert sorted(masks(2, 9, random.Random(0))) == [(0,), (0, 1), (1,)]
    assert len(masks(200, 3, random.Random(0))) == 3


def test_repeated_rows_stay_together():
    train, ask = halves(sample(ROWS*3), 12)
    assert len(train) == 3*9 and len(ask) == 3 and not any(r in train for r in ask)
    with pytest.raises(ValueError, match='two different rows'):
        halves(sample(ROWS[:1]*5), 12)


@pytest.mark.parametrize('budget', (.0001, .1))
def test_a_budget_is_met_exactly_whatever_the_mask(budget):
    model = toy(hidden=64)
    count = max(1, round(budget*sum(p.numel() for p in model.parameters())))
    units = searched().units(model)
    for on in masks(len(units), 4, random.Random(0)):
        chosen = filled(model, units, on, count)
        assert sum(int(m.sum()) for m in chosen.values()) == count
    run = fit(model, TOK, lab_data(), memcontrol(2, 1, budget=budget), steps=1, batch_size=4,
              progress=False)
    assert sum(p.numel() for p in run.delta.attached.parameters().values()) == count


def test_one_target_may_be_a_name():
    model = toy()
    assert (memcontrol(targets='attention').select.units(model)
            == memcontrol(targets=('attention',)).select.units(model))
    assert len(memcontrol(targets='attention').select.units(model)) == 2


def test_budgets_that_cannot_be_met_and_wrong_arguments():
    with pytest.raises(ValueError, match='more than the units have'):
        memcontrol(by='random', budget=1.).select(toy())
    for wrong in (dict(by='luck'), dict(trials=0), dict(steps=0), dict(search_lr=0.)):
        with pytest.raises(ValueError, match='must be one of'):
            memcontrol(**wrong)
    with pytest.raises(ValueError, match='give it a Sample'):
        memcontrol().select(toy())
    with pytest.raises(ValueError, match='nothing among experts'):
        memcontrol(targets=('experts',)).select(toy(), Unread())


def test_without_a_search_the_mask_is_random_and_reads_no_row():
    a, b = (memcontrol(by='random').select(toy(), None, s) for s in (0, 1))
    assert a != b and a == memcontrol(by='random').select(toy(), Unread(), 0)


@pytest.mark.parametrize('family', 'llama qwen2 gemma gpt2 opt gpt_neox mixtral'.split())
def test_units_of_every_family(family):
    model = tiny(family, vocab_size=len(TOK), max_position_embeddings=96)
    units = searched().units(model)
    assert len(units) == (2 if family == 'mixtral' else 4)
    chosen = memcontrol(1, 1, targets=('attention',)).select(model, sample(ROWS[:8]))
    assert chosen and all(m is True and '.norm' not in n for n, m in chosen.items())


def test_a_classifier_tries_with_its_head_and_an_image_model_has_units():
    model = classifier()
    run = fit(model, TOK, label_data(), memcontrol(2, 1, budget=.01), steps=1, batch_size=4,
              progress=False)
    assert run.log and len(searched().units(tiny('vit'))) == 4


def test_a_mask_composes_with_a_loss():
    from ftlab.methods import dft, hft, lora
    run = fit(toy(), TOK, data('sort', n=20), memcontrol(2, 1)*dft(), steps=1, batch_size=4,
              progress=False)
    assert run.log
    with pytest.raises(CannotCompose):
        memcontrol()*hft()
    with pytest.raises(CannotCompose):
        memcontrol(budget=.01)*lora()
