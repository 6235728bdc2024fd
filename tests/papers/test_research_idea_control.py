"research_idea_control: where the matrices stand, what strengths do, and what a schedule reads and learns"
import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny
from toys import TOK, assert_resumes, label_data, lab_data, logits, same, toy, weights

from ftlab.adapters.attach import attach
from ftlab.adapters.store import load_delta
from ftlab.core.generate import render
from ftlab.core.recipe import CannotCompose
from ftlab.methods import grpo
from ftlab.trainers.fit import fit
from ftlab.trainers.rl import research_idea_control as page
from ftlab.trainers.rl.research_idea_control import (
    Field, Graded, Schedule, Steer, Written, before_head, constant, folded_head, keep_strengths,
    learn_schedule, research_idea_control, steer_of, steered, strengths_of, write)


def size(row, answer):
    return len(answer.split())

def early(row, answer):
    return sum(w < 'e' for w in answer.split())

def attached(model, dims=2, seed=0, form='matrix'):
    "A model with matrices that do something"
    recipe = research_idea_control(at=(1.,)*dims, rank=4, form=form)
    attach(model, recipe.select(model), recipe.delta)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in steer_of(model).parameters():
            p.copy_(.3*torch.randn(p.shape, generator=draw))
    return model

def ids(rows=3, length=5):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(0))

def said(model, x):
    with torch.no_grad():
        return model(input_ids=x).logits

def tune(recipe, model=None, **more):
    how = dict(steps=3, batch_size=8, lr=1e-2, seed=0, progress=False) | more
    return fit(model or toy(), TOK, lab_data(), recipe, **how)

FAMILIES = ('llama', 'qwen2', 'gemma2', 'gpt2', 'phi', 'opt', 'gpt_neox', 'mixtral')

# ---------- the matrices

@pytest.mark.parametrize('family', FAMILIES)
def test_it_stands_where_the_head_reads(family):
    model, x = tiny(family), ids()
    base = said(model, x)
    attached(model)
    with steered(model, [0., 0.]):
        assert torch.equal(said(model, x), base)
    with steered(model, [1., -.5]):
        on = said(model, x)
    assert (on - base).abs().max() > 1e-3
    seen = []
    hook = steer_of(model).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    said(model, x)
    hook.remove()
    head = copy.deepcopy(model.get_output_embeddings())
    head.weight = torch.nn.Parameter(folded_head(model, [1., -.5]))
    with torch.no_grad():
        raw = head(seen[0])
    if cap := getattr(model.config, 'final_logit_softcapping', None):
        raw = torch.tanh(raw/cap)*cap
    torch.testing.assert_close(raw, on, atol=1e-4, rtol=1e-4)

def test_the_matrices_are_those_of_the_formula():
    steer = Steer(torch.zeros(6), at=(1., 1.), rank=2).double()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        steer.Q.copy_(torch.randn(steer.Q.shape, generator=draw))
    h, e = torch.randn(3, 4, 6, generator=draw).double(), torch.randn(3, 2, generator=draw).double()
    steer.now = e
    by_hand = torch.stack([h[i] + sum(e[i, d]*h[i] @ steer.P[d] @ steer.Q[d] for d in range(2))
                           for i in range(3)])
    torch.testing.assert_close(steer(h), by_hand)

@pytest.mark.parametrize('form', ['matrix', 'vector'])
def test_each_text_has_its_own_strengths(form):
    model, x = attached(tiny('llama'), form=form), ids()
    e = torch.tensor([[1., 0.], [0., -2.], [.5, .5]])
    with steered(model, e):
        together = said(model, x)
    for i in range(3):
        with steered(model, e[i]):
            alone = said(model, x[i:i + 1])
        torch.testing.assert_close(alone, together[i:i + 1], atol=1e-5, rtol=1e-5)
    wrong = 'strengths for 3 texts, and 2 are read'
    with steered(model, e), pytest.raises(ValueError, match=wrong):
        said(model, x[:2])

def test_a_vector_shifts_every_logit_alike_and_a_matrix_does_not():
    x = ids()
    for form, alike in dict(vector=True, matrix=False).items():
        model = tiny('llama')
        base = said(model, x)
        shift = said(attached(model, form=form), x) - base
        assert (shift - shift[:1, :1]).abs().max().lt(1e-4) == alike
    with pytest.raises(ValueError, match='cannot hold'):
        folded_head(attached(tiny('llama'), form='vector'), [1., 1.])

@pytest.mark.parametrize('e, wrong', [
    ([1.], 'one for each of the 2'), ([1., 2., 3.], 'one for each of the 2'),
    ([1., float('nan')], 'finite'), ([[[1., 1.]]], 'one for each')])
def test_strengths_that_do_not_fit_are_refused(e, wrong):
    model = attached(tiny('llama'))
    with pytest.raises(ValueError, match=wrong), steered(model, e):
        pass
    with pytest.raises(ValueError, match=wrong):
        keep_strengths(model, e)
    with pytest.raises(ValueError, match='no steering matrices'), steered(tiny('llama'), [1.]):
        pass

@pytest.mark.parametrize('family, head', [
    ('bert', 'classifier'), ('llama', 'classifier'), ('t5', None), ('vit', None),
    ('llama', 'none')])
def test_models_that_write_no_words_are_refused(family, head):
    with pytest.raises(ValueError, match='load a causal language model'):
        before_head(tiny(family, head))

@pytest.mark.parametrize('wrong, more', [
    ('rank is 0', dict(rank=0)), ('rank is 99', dict(rank=99)),
    ('form is', dict(form='plane')), ('finite', dict(at=(float('inf'),)))])
def test_what_cannot_be_built_is_refused(wrong, more):
    with pytest.raises(ValueError, match=wrong):
        Steer(torch.zeros(32), **more)
    with pytest.raises(ValueError, match='mask'):
        Steer(torch.zeros(32), torch.ones(32, dtype=torch.bool))
    with pytest.raises(ValueError, match='at has 3 strengths and there are 2 rewards'):
        research_idea_control((size, early), at=(1., 1., 1.))
    with pytest.raises(ValueError, match='at has 0 strengths'):
        research_idea_control(at=())

@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_kept_strengths_are_saved(family, tmp_path):
    made = lambda: tiny(family, vocab_size=len(TOK))
    run, x = tune(research_idea_control((size, early), rank=4), made(), lr=.1), ids()
    keep_strengths(run.model, (2., -.5))
    run.delta.save(tmp_path/'delta.safetensors')
    fresh = made()
    load_delta(fresh, tmp_path/'delta.safetensors')
    with run.disabled():
        assert (said(run.model, x) - said(fresh, x)).abs().max() > 1e-3
    assert steer_of(fresh).at == [2., -.5]
    assert torch.equal(said(fresh, x), said(run.model, x))

# ---------- training

def test_the_best_row_gets_1_and_the_worst_minus_1():
    found = strengths_of(torch.tensor([[0., 2.], [5., 4.], [10., 3.]]))
    assert found.tolist() == [[-1., -1.], [0., 1.], [1., 0.]]
    with pytest.raises(ValueError, match='reward 2 is 3 for all 2 rows'):
        strengths_of(torch.tensor([[0., 3.], [1., 3.]]))
    with pytest.raises(ValueError, match='NaN'):
        strengths_of(torch.tensor([[0.], [float('nan')]]))

def graded_batches(alone, accumulate=2, step=0):
    settings = dict(batch_size=8, accumulate=accumulate)
    state = SimpleNamespace(data=lab_data(), tok=TOK, limit=None, settings=settings, step=step,
                            seed=0, pad_id=TOK.pad_token_id)
    return Graded(state, (size, early), alone).next(state)

def test_a_row_teaches_one_matrix_or_all_of_them():
    parts = graded_batches(False)
    assert [len(p['strengths']) for p in parts] == [4, 4]
    texts = {tuple(r) for p in parts for r in p['input_ids'].tolist()}
    assert len(texts) > 4 and all(p['strengths'].abs().max() <= 1 for p in parts)
    both = torch.cat([p['strengths'] for p in parts])
    for step in (0, 1):
        one, other = (torch.cat([p['strengths'] for p in graded_batches(alone, 1, step)])
                      for alone in (True, False))
        assert ((one != 0).sum(1) <= 1).all()
        own = torch.arange(step, step + 8) % 2
        assert torch.equal(one[range(8), own], other[range(8), own])
    assert torch.equal(both, torch.cat([p['strengths'] for p in graded_batches(False, 1)]))

def test_rows_whose_strength_is_0_are_no_error():
    "A middle grade in a micro-batch of one row; strengths that are all off"
    sizes = sorted({size(r, r['response']) for r in lab_data().train})
    middle = sizes[len(sizes)//2]
    def grade(row, answer):
        return float((size(row, answer) >= middle) + (size(row, answer) > middle))
    tune(research_idea_control((grade,)), batch_size=4, accumulate=4, steps=6)
    run = tune(research_idea_control(at=(0.,)))
    assert not steer_of(run.model).Q.any()

def test_other_data_and_constant_rewards_are_refused():
    state = SimpleNamespace(data=label_data(), settings=dict(batch_size=8, accumulate=1))
    with pytest.raises(ValueError, match='kind'):
        Graded(state, (size,))
    with pytest.raises(ValueError, match='for all'):
        tune(research_idea_control((lambda row, answer: 1.,)))

def test_a_dial_makes_its_rows_likelier():
    run = tune(research_idea_control((early,)), steps=30, lr=3e-2, batch_size=16)
    rows = sorted(lab_data().train, key=lambda r: early(r, r['response'])/size(r, r['response']))
    def nll(row):
        x = torch.tensor([TOK(row['prompt'] + ' ' + row['response']).input_ids])
        n = size(row, row['response'])
        return -said(run.model, x).log_softmax(-1)[0, -n - 1:-1].gather(
            1, x[0, -n:, None]).mean()
    gap = {}
    for s in (-1., 1.):
        with steered(run.model, [s]):
            gap[s] = sum(map(nll, rows[:20])) - sum(map(nll, rows[-20:]))
    assert gap[1.] > gap[-1.]

def test_it_resumes(tmp_path):
    assert_resumes(lambda **more: tune(research_idea_control((size, early)), **more), tmp_path)

def test_with_grpo_the_matrices_that_are_on_learn_its_reward():
    base = toy()
    was = weights(base)
    start = {n: p.clone() for n, p in tune(research_idea_control(at=(1., 0.)), steps=1, lr=1e-9,
                                           weight_decay=0.).delta.attached.parameters().items()}
    recipe = research_idea_control(at=(1., 0.))*grpo(group=4, reward=size, beta=0.)
    run = tune(recipe, base, weight_decay=0.)
    steer = steer_of(run.model)
    assert steer.Q[0].abs().sum() > 0 and not steer.Q[1].any() and same(weights(run.model), was)
    assert any((p != start[n]).any() for n, p in run.delta.attached.parameters().items())
    with pytest.raises(CannotCompose):
        research_idea_control((size,))*grpo()

def test_the_base_is_back_when_it_is_off():
    base, run = logits(toy()), tune(research_idea_control((size, early)))
    with steered(run.model, [0., 0.]):
        assert torch.equal(logits(run.model), base)
    assert not torch.equal(logits(run.model), base)

# ---------- sentences

def scripted(monkeypatch, texts):
    "Let `write` draw these tokens, row by row"
    rows = [TOK(t, add_special_tokens=False).input_ids + [TOK.eos_token_id] for t in texts]
    step = iter(range(99))
    def draw(p, n, generator):
        k = next(step)
        return torch.tensor([[r[k] if k < len(r) else 5] for r in rows])
    monkeypatch.setattr(torch, 'multinomial', draw)

def test_strengths_change_with_the_sentences_and_what_is_read_is_the_base_s(monkeypatch):
    base, model = toy(tied=False), attached(toy(tied=False))
    prompts, texts = ['sort c a b', 'the cat'], ['a b . c . d', 'b . a']
    scripted(monkeypatch, texts)
    def pace(seen, memory):
        k = torch.zeros(len(seen), 1) if memory is None else memory
        return torch.cat([k, -k], 1), k + 1
    got = write(model, TOK, prompts, pace, sentences=3)
    assert got.texts == texts and got.begun.tolist() == [[True]*3, [True, True, False]]
    assert got.strengths[0].tolist() == [[0, 0], [1, -1], [2, -2]]
    assert got.strengths[1].tolist() == [[0, 0], [1, -1], [0, 0]]
    for i, (p, t) in enumerate(zip(prompts, texts)):
        asked = render([p], TOK)[0]
        whole = asked + TOK(t, add_special_tokens=False).input_ids
        with torch.no_grad():
            h = base.model(torch.tensor([whole])).last_hidden_state[0]
        n, stop = len(asked), whole.index(TOK.convert_tokens_to_ids('.'))
        torch.testing.assert_close(got.read[i, 0], h[:n].mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got.read[i, 1], h[n:stop].mean(0), atol=1e-5, rtol=1e-4)

def test_each_word_is_drawn_at_the_strengths_of_its_sentence(monkeypatch):
    model, seen = attached(toy(tied=False)), []
    words = iter(TOK('a . b', add_special_tokens=False).input_ids + [TOK.eos_token_id])
    def draw(p, n, generator):
        seen.append(p)
        return torch.tensor([[next(words)]])
    monkeypatch.setattr(torch, 'multinomial', draw)
    def pace(told, memory):
        k = torch.ones(1, 1) if memory is None else memory
        return torch.cat([k, 0*k], 1), k + 1
    write(model, TOK, ['sort a b'], pace)
    asked = render(['sort a b'], TOK)[0]
    x, n = asked + TOK('a . b', add_special_tokens=False).input_ids, len(asked)
    for strength, many in ((1., (0, 1)), (2., (2, 3))):
        with steered(model, [strength, 0.]):
            p = said(model, torch.tensor([x])).softmax(-1)[0]
        for k in many:
            torch.testing.assert_close(seen[k][0], p[n - 1 + k], atol=1e-5, rtol=1e-4)

def test_a_text_without_a_full_stop_keeps_its_first_strengths():
    model = attached(toy())
    got = write(model, TOK, ['sort a b'], constant([1., 0.]), sentences=2, max_new_tokens=3)
    again = write(model, TOK, ['sort a b'], constant([1., 0.]), sentences=2, max_new_tokens=3)
    assert got.texts == again.texts and got.begun[0, 0] and steer_of(model).now is None
    with pytest.raises(ValueError, match='end is'):
        write(model, TOK, ['sort a b'], constant([1., 0.]), end='a b')
    with pytest.raises(ValueError, match='no steering matrices'):
        write(toy(), TOK, ['sort a b'], constant([1., 0.]))

def test_a_schedule_starts_where_it_is_told_and_refuses_what_it_cannot_reach():
    seen = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    e, memory = Schedule(8, (1., -2.))(seen)
    again, _ = Schedule(8, (1., -2.))(seen, memory[:, :])
    for x in (e, again):
        torch.testing.assert_close(x, torch.tensor([[1., -2.]]*4))
    for start in ((4.,), (), (float('nan'),)):
        with pytest.raises(ValueError, match='start is'):
            Schedule(8, start)

@pytest.mark.parametrize('seed', [0, 1])
def test_a_schedule_learns_what_the_best_texts_were_written_with(monkeypatch, seed):
    "Two kinds of sentence, which want other strengths; texts carry their score"
    wanted = torch.tensor([[2., -1.], [-1., 1.]])
    @torch.no_grad()
    def fake(model, tok, prompts, pace, sentences=2, seed=0, **how):
        draw = torch.Generator().manual_seed(seed)
        read = torch.eye(2).repeat(1, 4)[None].expand(len(prompts), -1, -1)
        read, memory, e = read + .1*torch.randn(read.shape, generator=draw), None, []
        for k in range(2):
            now, memory = pace(read[:, k], memory)
            e.append(now)
        e = torch.stack(e, 1)
        score = -(e - wanted).square().sum((1, 2))
        texts, all_begun = [str(float(s)) for s in score], torch.ones(len(prompts), 2) > 0
        return Written(texts, read, e, all_begun)
    monkeypatch.setattr(page, 'write', fake)
    torch.manual_seed(seed)
    schedule = Schedule(8, (0., 0.))
    means = learn_schedule(schedule, None, None, [dict(prompt='')],
                           lambda row, answer: float(answer), seed=seed)
    assert means[-1] > means[0] + 2
    found = fake(None, None, ['']*50, schedule).strengths.mean(0)
    assert (found - wanted).abs().max() < 1.2 < (wanted.abs().max())

# ---------- the field

def test_an_idea_is_scored_by_its_rules():
    known = Field(3)
    row = known.rows(1)[0]
    assert Field(3).rows(5) == known.rows(5) != Field(4).rows(5)
    assert known.rows(5) != known.rows(5, 'test')
    kind = known.kind[row['who']]
    fits = [t for t in page.THINGS if known.kind[t] == kind]
    other = [t for t in page.THINGS if known.kind[t] != kind]
    usual = next(t for t in fits if t not in known.rare)
    rare = next(t for t in fits if t in known.rare)
    odd = lambda t: next(c for c in page.COLORS if c not in known.usual[t])
    idea = lambda *pairs: ' '.join(f'{lead} the {t} is {c} .'
                                   for lead, (t, c) in zip(page.LEADS, pairs))
    plain, new = (usual, known.usual[usual][0]), (rare, odd(rare))
    half = (usual, odd(usual))
    assert known.novelty(row, idea(*[plain]*4)) == 0
    assert known.feasibility(row, idea(*[plain]*4)) == pytest.approx(1)
    assert known.novelty(row, idea(*[new]*4)) == pytest.approx(1)
    assert known.feasibility(row, idea(*[new]*4)) == pytest.approx(.3)
    assert known.novelty(row, idea(half, plain, plain, half)) == pytest.approx(.25)
    assert known.feasibility(row, idea(half, plain, plain, half)) == pytest.approx(.65)
    wrong = (other[0], known.usual[other[0]][0])
    assert known.feasibility(row, idea(plain, wrong, plain, wrong)) == pytest.approx(.5)
    best = max(page.COLORS, key=lambda c: known.worth[kind, c])
    assert known.effect(row, idea(*[(usual, best)]*4)) == 1
    for text in ('', 'first the cup is red .', idea(*[plain]*4)[:-2], idea(*[plain]*4) + ' more',
                 idea(*[plain]*3, ('cat', 'red'))):
        assert not any(f(row, text) for f in known.rewards)
