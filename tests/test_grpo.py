"GRPO: what is compared is what was drawn from, and what the clip does"
import pytest
import torch
from toys import TOK, lab_data, same, toy, weights

from ftlab.core.model import model_inputs
from ftlab.trainers.fit import fit
from ftlab.trainers.rl.grpo import (Rollouts, advantages, centered, clipped_policy, grpo,
                                    reward_alone, token_logp)


def letters(row, answer):
    "A reward that a random model sometimes gets: a longer answer is better"
    return len(answer)/10


def asked(steps=4, callbacks=(), more=None, **kw):
    recipe = grpo(**dict(group=4, max_new_tokens=4, reward=letters) | kw)
    return fit(toy(), TOK, lab_data(), recipe, steps=steps, batch_size=8, lr=3e-3, progress=False,
               callbacks=callbacks, **(more or {}))


class Batches:
    "Keeps the batches, and what the sampler's distribution says of the answers before the step"
    def __init__(self, temperature=1.):
        self.temperature, self.seen = temperature, []

    def before_batch(self, state):
        batch, = state.batches
        state.model.eval()
        with torch.no_grad():
            logits = state.model(**model_inputs(batch)).logits
        state.model.train()
        p = (logits/self.temperature).log_softmax(-1)[:, :-1]
        y = batch['labels'][:, 1:]
        said = p.gather(2, y.clamp(min=0)[..., None])[..., 0]*(y != -100)
        self.seen.append(dict(batch, sampler=said))


@pytest.mark.parametrize('temperature', [.5, 1., 2.])
def test_old_log_probabilities_are_those_of_the_sampler(temperature):
    look = Batches(temperature)
    asked(steps=1, callbacks=(look,), temperature=temperature)
    batch, = look.seen
    assert batch['old'].abs().max() > .1
    torch.testing.assert_close(batch['old'], batch['sampler'], atol=1e-5, rtol=0)


def test_the_sampler_is_what_transformers_draws_from():
    # with scores as `generate` gives them after its own processing, one answer, no padding
    model, ids = toy(), torch.tensor([TOK(lab_data().train[0]['prompt']).input_ids])
    torch.manual_seed(0)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4,
                         min_new_tokens=4, do_sample=True, temperature=.5, top_k=0, top_p=1.,
                         output_scores=True, return_dict_in_generate=True,
                         pad_token_id=TOK.pad_token_id)
    with torch.no_grad():
        logits = model(out.sequences).logits[0, ids.shape[1] - 1:-1]
    for score, row in zip(out.scores, logits):
        open_ = score[0].isfinite()
        torch.testing.assert_close(score[0][open_].log_softmax(-1), (row/.5)[open_].log_softmax(-1),
                                   atol=1e-5, rtol=0)


def test_the_gradient_is_the_policy_gradient_of_the_sampler():
    logits = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y, A = torch.tensor([[-100, 1, 2]]*4), torch.tensor([1., -1., .5, -.5])
    p = (logits/.5).log_softmax(-1)[:, :-1].gather(2, y[:, 1:, None])[..., 0]
    batch = dict(labels=y, old=p.detach(), advantage=A)
    state = type('State', (), dict(batch=batch, batches=[batch], forward=lambda self: logits))()
    g, = torch.autograd.grad(clipped_policy(beta=0., temperature=.5)(state), logits)
    want, = torch.autograd.grad(-(p.mean(1)*A).mean(), logits)
    torch.testing.assert_close(g, want)


def test_the_kl_is_to_the_reference_at_the_same_temperature():
    logits, other = torch.randn(2, 1, 3, 6, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[-100, 1, 2]])

    def logp(x):
        return (x/.5).log_softmax(-1)[:, :-1].gather(2, y[:, 1:, None])[..., 0]

    batch = dict(labels=y, old=logp(logits), advantage=torch.zeros(1), input_ids=y,
                 attention_mask=y, position_ids=y)
    reference = lambda **inputs: type('Out', (), dict(logits=other))()
    state = type('State', (), dict(batch=batch, batches=[batch], models=dict(reference=reference),
                                   forward=lambda self: logits))()
    more = logp(other) - logp(logits)
    want = float((more.exp() - more - 1).mean())
    assert (want > .1
            and float(clipped_policy(beta=.5, temperature=.5)(state)) == pytest.approx(.5*want))


@pytest.mark.parametrize('updates, acts', [(1, False), (2, True)])
def test_the_clip_acts_from_the_second_update_on(updates, acts):
    tight, loose = (weights(asked(updates=updates, clip=clip, beta=0.).model) for clip in (.2, 1e6))
    assert same(tight, loose) != acts


def asked_in(batch):
    "The questions of a rollout"
    before = (batch['labels'] != -100).cumsum(1) == 0
    return [TOK.decode(ids[on & seen.bool()])
            for ids, on, seen in zip(batch['input_ids'], before, batch['attention_mask'])]


def test_a_rollout_serves_as_many_updates_as_were_asked_for():
    look = Batches()
    run = asked(steps=6, callbacks=(look,), updates=3)
    ids = [b['input_ids'] for b in look.seen]
    assert len(run.log) == 6 and ids[0] is not ids[3]
    for first in (0, 3):
        assert all(torch.equal(ids[first], ids[first + k]) for k in (1, 2))
        ratios = [(b['sampler'] - b['old']).abs().max() for b in look.seen[first:first + 3]]
        assert ratios[0] < 1e-5 < 1e-3 < min(ratios[1:])
    once = Batches()
    asked(steps=2, callbacks=(once,))
    assert ids[0].shape != ids[3].shape or not torch.equal(ids[0], ids[3])
    assert torch.equal(once.seen[0]['input_ids'], ids[0])
    # the second rollout asks the next questions, as it would with one update for each
    assert asked_in(look.seen[3]) == asked_in(once.seen[1]) != asked_in(once.seen[0])


def test_a_run_resumes_between_the_updates_of_a_rollout_bit_for_bit(tmp_path):
    class Stop:
        def after_step(self, state):
            if state.step == 2:
                raise KeyboardInterrupt
    whole = weights(asked(steps=5, updates=3).model)
    kept = dict(out=tmp_path, save_every=1)
    assert asked(steps=5, updates=3, callbacks=(Stop(),), more=kept).interrupted
    run = asked(steps=5, updates=3, more=kept | dict(resume=True))
    assert len(run.log) == 5 and same(weights(run.model), whole)


def test_accumulated_updates_are_the_same_to_rounding():
    a, b = (weights(asked(updates=2, more=dict(accumulate=k)).model) for k in (1, 2))
    off = sum((a[n] - b[n]).square().sum() for n in a)/sum(p.numel() for p in a.values())
    assert off**.5 < 1e-3*3e-3


def test_no_update_at_all_is_an_error():
    with pytest.raises(ValueError, match='updates is 0; it must be at least 1'):
        asked(updates=0)


@pytest.mark.parametrize('kw, said', [
    (dict(updates=1.5), 'updates is 1.5; it must be at least 1, and a whole number'),
    (dict(group=0), 'batch_size is 8 and the group 0'),
    (dict(group=1), 'a group needs at least 2 answers'),
    (dict(temperature=0), 'temperature is 0; it must be above 0'),
    (dict(temperature=float('nan')), 'temperature is nan'),
    (dict(reward=lambda row, answer: None), 'is None; .* must return a finite number'),
    (dict(reward=lambda row, answer: float('nan')), 'is nan; .* must return a finite number'),
    (dict(reward=lambda row, answer: 'good'), "is 'good'; .* must return a finite number")])
def test_what_cannot_be_is_named(kw, said):
    with pytest.raises(ValueError, match=said):
        asked(steps=1, **kw)


@pytest.mark.parametrize('kind', [int, bool, torch.tensor])
def test_a_reward_may_be_any_kind_of_number(kind):
    as_float = asked(steps=2, reward=lambda row, answer: float(len(answer) % 2))
    other = asked(steps=2, reward=lambda row, answer: kind(len(answer) % 2))
    assert same(weights(other.model), weights(as_float.model))
    assert not same(weights(other.model), weights(toy()))


@pytest.mark.parametrize('clip', [.2, .5])
def test_the_clip_holds_at_the_edge_of_the_ratio(clip):
    # ratios of 1 + clip + .1 and 1 - clip - .1, each with both signs of the advantage
    far = torch.tensor([1 + clip + .1, 1 + clip + .1, 1 - clip - .1, 1 - clip - .1])
    logits = torch.zeros(4, 2, 5, requires_grad=True)
    y, A = torch.tensor([[-100, 1]]*4), torch.tensor([1., -1., 1., -1.])
    old = (torch.tensor(.2)/far).log()[:, None]
    batch = dict(labels=y, old=old, advantage=A)
    state = type('State', (), dict(batch=batch, batches=[batch], forward=lambda self: logits))()
    loss = clipped_policy(clip, beta=0.)(state)
    want = -((1 + clip) - far[1] + far[2] - (1 - clip))/4
    assert float(loss.detach()) == pytest.approx(float(want), abs=1e-6)
    g, = torch.autograd.grad(loss, logits)
    assert [bool(row.any()) for row in g] == [False, True, True, False]


def test_each_answer_counts_alike_however_long_it_is():
    logits = torch.zeros(2, 4, 5)
    y = torch.tensor([[-100, 1, -100, -100], [-100, 1, 2, 3]])
    old, A = torch.full((2, 3), .2).log(), torch.tensor([1., -2.])
    batch = dict(labels=y, old=old*(y[:, 1:] != -100), advantage=A)
    state = type('State', (), dict(batch=batch, batches=[batch], forward=lambda self: logits))()
    assert float(clipped_policy(beta=0.)(state)) == pytest.approx(-(1. - 2.)/2)


def test_an_answer_counts_up_to_its_first_end_and_with_it(monkeypatch):
    letter, end = TOK('a', add_special_tokens=False).input_ids[0], TOK.eos_token_id
    real, heard = Rollouts.answer, []

    def fixed(self, state, rows):
        questions, _ = real(self, state, rows)
        said = torch.tensor([[letter, end, letter, end]]).expand(len(questions['input_ids']), 4)
        return questions, torch.cat([questions['input_ids'], said], 1)

    def reward(row, answer):
        heard.append(answer)
        return 0.

    monkeypatch.setattr(Rollouts, 'answer', fixed)
    look = Batches()
    asked(steps=1, callbacks=(look,), reward=reward)
    batch, = look.seen
    want = torch.tensor([letter, end, -100, -100])
    assert (batch['labels'][:, -4:] == want).all() and (batch['labels'][:, :-4] == -100).all()
    assert (batch['attention_mask'][:, -4:] == torch.tensor([1, 1, 0, 0])).all()
    assert heard == ['a']*8 and (batch['old'][:, -2:] == 0).all()


@pytest.mark.parametrize('advantage, want', [
    (centered, [.75, -.25, -.25, -.25]), (reward_alone, [1., 0., 0., 0.]),
    (advantages, [1.5, -.5, -.5, -.5])])
def test_the_weights_of_the_answers_are_those_that_were_asked_for(advantage, want):
    torch.testing.assert_close(advantage(torch.tensor([[1., 0., 0., 0.]]))[0], torch.tensor(want),
                               atol=1e-3, rtol=0)
    look = Batches()
    asked(steps=1, callbacks=(look,), advantage=advantage, beta=0.)
    batch, = look.seen
    heard = [letters(None, TOK.decode(ids[y != -100], skip_special_tokens=True).strip())
             for ids, y in zip(batch['input_ids'], batch['labels'])]
    rewards = torch.tensor(heard).view(-1, 4)
    assert rewards.std() > 0
    torch.testing.assert_close(batch['advantage'].view(-1, 4), advantage(rewards))


def test_rewards_alone_are_fine_tuning_on_the_right_answers():
    def right(row, answer):
        return float(len(answer) % 2)
    look = Batches()
    run = asked(steps=1, callbacks=(look,), advantage=reward_alone, beta=0., reward=right)
    batch, = look.seen
    assert 0 < batch['advantage'].sum() < 8
    model = toy()
    rows = batch['advantage'] > 0
    logits = model(**model_inputs({k: v[rows] for k, v in batch.items()})).logits
    labels = batch['labels'][rows]
    nll = (token_logp(logits, labels)*-1).sum(1)/(labels != -100).sum(1)
    (nll.sum()/8).backward()
    named = dict(run.model.named_parameters())
    for n, p in model.named_parameters():
        moved = (named[n] - p).detach()
        sure = p.grad.abs() > 1e-5
        assert (moved[sure].sign() == -p.grad[sure].sign()).all()


def test_another_advantage_is_named_in_the_recipe():
    assert 'centered' in repr(grpo(advantage=centered).source)
    assert repr(grpo().source) == 'rollouts(group=8)'
