"""Learning to Modulate: one entry for each row, gradients, counts, prompts, caches, models of several kinds, and
its errors"""
import copy
import pytest
import torch
from torch.nn import functional as F
from ftlab.adapters.attach import attach
from ftlab.adapters.lowrank import LoRA
from ftlab.adapters.store import load_delta
from ftlab.core.data import data
from ftlab.core.new_tokens import add_to, give_rows
from ftlab.trainers.continual.learning_to_modulate import (
    Choice, Keys, Modulators, Scales, keys_of, learning_to_modulate, prompts_in, queries, task_at)
from ftlab.trainers.fit import fit
from tests.tiny import inputs_for, tiny
from tests.toys import TOK, assert_resumes, classifier, lab_data, label_data, logits, toy


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pooled(model, **kw):
    recipe = learning_to_modulate(**dict(size=4, r=2) | kw)
    return attach(model, recipe.select(model), recipe.delta)


@torch.no_grad()
def shaken(att):
    "Give every entry a change that shows"
    for p in att.parameters().values():
        p.add_(torch.randn_like(p)*.3)
    return keys_of(att)


def choosing(keys, entries):
    "Let the rows choose these entries, whatever they ask"
    keys.choose = lambda q: torch.tensor(entries)


FAMILIES = 'llama gpt2 opt gpt_neox gemma3_text mixtral bert roberta'.split()


@pytest.mark.parametrize('family, kind', [(f, k) for f in FAMILIES for k in ('lora', 'ia3')
                                          if (f, k) not in (('gpt2', 'ia3'), ('gpt_neox', 'ia3'))])
def test_rows_of_one_batch_use_different_entries_and_only_those_get_gradients(family, kind):
    model, given = tiny(family), inputs_for(family)
    base = model(**given).logits
    att = pooled(model, kind=kind)
    assert torch.equal(model(**given).logits, base)
    keys = shaken(att)
    choosing(keys, [2, 0])
    both = model(**given).logits
    choosing(keys, [2, 2])
    same = model(**given).logits
    torch.testing.assert_close(both[0], same[0], atol=1e-4, rtol=1e-4)
    assert (both[1] - same[1]).abs().max() > 1e-3
    choosing(keys, [2, 0])
    model(**given).logits.square().mean().backward()
    for d in (d for d in att.deltas.values() if d is not keys):
        values = d.l if kind == 'ia3' else d.B
        assert [p.grad is not None for p in values] == [True, False, True, False]
    with att.disabled():
        assert torch.equal(model(**given).logits, base)
    with pytest.raises(ValueError, match='cannot be folded'):
        att.fold()
    att.detach()
    assert torch.equal(model(**given).logits, base)


@torch.no_grad()
def test_one_entry_is_lora():
    model, name, ids = toy(), 'model.layers.1.mlp.up_proj.weight', torch.randint(5, 90, (3, 8))
    att = pooled(model, size=1, r=4)
    shaken(att)
    d = att.deltas[name]
    for n in att.deltas:
        if n != name and hasattr(att.deltas[n], 'B'):
            att.deltas[n].B[0].zero_()
    ours, A, B = model(input_ids=ids).logits, d.A[0].clone(), d.B[0].clone()
    att.detach()
    lora = attach(model, {name: True}, lambda W, mask: LoRA(W, mask, 4, 8.))
    lora.deltas[name].A.copy_(A)
    lora.deltas[name].B.copy_(B)
    torch.testing.assert_close(model(input_ids=ids).logits, ours, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_query_is_the_mean_of_the_embedded_prompt_whatever_the_padding():
    model = toy()
    att = pooled(model)
    keys, E = keys_of(att), model.get_input_embeddings().weight
    ids = torch.tensor([[0, 0, 9, 10, 11], [7, 8, 9, 10, 11]])
    model(input_ids=ids, attention_mask=(ids > 0).long())
    torch.testing.assert_close(keys.now.q[0], E[[9, 10, 11]].mean(0))
    prompts = [r['prompt'] for r in lab_data().train[:5]]
    asked = queries(model, TOK, prompts)
    cos = F.cosine_similarity(asked[:, None], torch.stack(list(keys.key))[None], dim=-1)
    torch.testing.assert_close(keys.cosines(asked), cos)
    assert keys.choose(asked).equal(cos.argmax(1))


class Watch:
    "Keeps what each step was told and chose"

    def __init__(self):
        self.seen = []

    def after_backward(self, state):
        keys, b = keys_of(state.attached), state.batches[-1]
        E = state.model.get_input_embeddings().weight
        on = (b['labels'] == -100) & b['attention_mask'].bool()
        want = torch.stack([E[row[m]].mean(0) for row, m in zip(b['input_ids'], on)])
        torch.testing.assert_close(keys.now.q, want.detach())
        grads = [None if p.grad is None else p.grad.clone() for p in keys.key]
        counts = keys.before.clone(), keys.counts.clone()
        self.seen.append((keys.now.entries.tolist(), grads, *counts))


def test_in_training_the_prompt_asks_and_a_new_task_takes_an_entry_that_was_not_used():
    watch = Watch()
    run = fit(toy(), TOK, lab_data(), learning_to_modulate(size=8, r=2, tasks=2), steps=6,
              batch_size=4, progress=False, callbacks=(watch,))
    first = {e for entries, *_ in watch.seen[:3] for e in entries}
    second = {e for entries, *_ in watch.seen[3:] for e in entries}
    assert not first & second
    for entries, grads, *_ in watch.seen:
        assert [g is not None for g in grads] == [i in entries for i in range(8)]
    assert not watch.seen[2][2].any() and watch.seen[3][2].equal(watch.seen[2][3])
    keys = keys_of(run.delta.attached)
    assert keys.counts.sum() == 24 and keys.before.sum() == 12 and not keys.told


def test_what_nobody_chooses_does_not_move():
    "also not by the momentum or the weight decay of AdamW"
    class Keep:
        def after_step(self, state):
            if state.step == 3:
                self.kept = {n: p.detach().clone() for n, p in state.attached.parameters().items()}
                self.used = keys_of(state.attached).counts > 0
    keep = Keep()
    run = fit(toy(), TOK, lab_data(), learning_to_modulate(size=8, r=2, tasks=2), steps=6, lr=1e-2,
              weight_decay=.1, batch_size=4, progress=False, callbacks=(keep,))
    now = run.delta.attached.parameters()
    old = [n for n in now if keep.used[int(n.rpartition('.')[2])]]
    assert old and all(torch.equal(now[n], keep.kept[n]) for n in old)


def test_the_term_is_minus_half_the_mean_cosine():
    class Pairs:
        def after_step(self, state):
            row, keys = state.log[-1], keys_of(state.attached)
            self.term = row['loss'] - row['nll']
            self.rows = len(keys.now.entries)
    rate, look = 1e-12, Pairs() # so that the keys do not move
    run = fit(toy(), TOK, lab_data(), learning_to_modulate(size=4, r=2), steps=1, lr=rate,
              batch_size=4, progress=False, callbacks=(look,))
    keys = keys_of(run.delta.attached)
    assert look.term == pytest.approx(-.5*float(keys.similarity().detach().mean()), abs=1e-5)


def test_counts_push_used_entries_out_in_training_only():
    keys = Keys(torch.zeros(9, 2), size=3)
    for key, value in zip(keys.key, ([1., 0.], [.9, .1], [-.6, .8])):
        key.data = torch.tensor(value)
    q = torch.tensor([[1., 0.]])
    assert keys.train().choose(q).tolist() == [0]
    keys.counts[:] = torch.tensor([6., 2., 0.])
    assert keys.choose(q).tolist() == [0] # counts take effect at the border
    keys.turn()
    assert keys.choose(torch.tensor([[1., 1e-3]])).tolist() == [2] # 1e6 times the likeness of the worst
    keys.counts[2] = 1.
    keys.turn()
    by_hand = (keys.cosines(q)[0] + 1)/2/(keys.counts/9 + 1e-6)
    assert keys.choose(q).tolist() == [int(by_hand.argmax())]
    assert keys.eval().choose(q).tolist() == [0]


@pytest.mark.parametrize('step, task', [(0, 0), (3, 0), (4, 1), (6, 1), (7, 2), (9, 2)])
def test_tasks_share_the_steps(step, task):
    assert task_at(step, 10, 3) == task


def test_prompts_are_what_has_no_loss():
    batch = dict(input_ids=torch.ones(3, 4), attention_mask=torch.tensor([[1, 1, 1, 0]]*3),
                 labels=torch.tensor([[-100, 5, 5, -100], [5, 5, 5, -100], [-100]*4]))
    assert prompts_in(batch).tolist() == [[True, False, False, False], [True]*3 + [False]]*1 + [
        [True]*3 + [False]]
    assert prompts_in(batch | dict(labels=torch.tensor([1, 2, 0]))).sum() == 9


@torch.no_grad()
@pytest.mark.parametrize('family', ('llama', 'gpt2', 'gemma3_text'))
def test_an_answer_keeps_the_choice_of_its_prompt_and_beams_take_it_along(family):
    model = tiny(family)
    keys = shaken(pooled(model))
    ids = torch.randint(4, 60, (4, 6), generator=torch.Generator().manual_seed(1))
    kept = keys.choose(model.get_input_embeddings()(ids).mean(1))
    out = model(input_ids=ids, use_cache=True)
    model(input_ids=ids[:, :1], past_key_values=out.past_key_values)
    assert keys.now.entries.equal(kept) and keys.now.q is None
    how = dict(max_new_tokens=5, do_sample=False, pad_token_id=1, eos_token_id=None)
    together = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    for beams in (1, 3):
        both = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=beams, **how)
        for row, said in zip(ids, both):
            alone = model.generate(row[None], attention_mask=torch.ones_like(row[None]),
                                   num_beams=beams, **how)
            assert alone[0].equal(said)
    choosing(keys, kept.tolist()) # without a cache, but with the same choice
    how |= dict(use_cache=False)
    assert together.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **how))


@torch.no_grad()
def test_a_cache_that_is_cut_or_reset_and_one_of_fixed_size():
    "a fixed one answered from empty places, as the choice beside its layers changed what its mask was"
    model, ids = toy(), torch.randint(5, 90, (1, 6))
    keys = shaken(pooled(model))
    how = dict(max_new_tokens=5, do_sample=False, pad_token_id=1, eos_token_id=None)
    mask = torch.ones_like(ids)
    said = model.generate(ids, attention_mask=mask, **how)
    cut = model.generate(ids, attention_mask=mask, prompt_lookup_num_tokens=2, **how)
    assert said.equal(cut)
    with pytest.raises(ValueError, match='cache that grows'):
        model.generate(ids, attention_mask=mask, cache_implementation='static', **how)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    cache.reset()
    choosing(keys, [3])
    model(input_ids=ids, past_key_values=cache)
    assert keys.now.entries.tolist() == [3]
    choosing(keys, [1])
    model(input_ids=ids[:, :1], past_key_values=cache)
    assert keys.now.entries.tolist() == [3]


@torch.no_grad()
def test_the_base_model_alone_chooses_too():
    model = toy()
    keys = shaken(pooled(model))
    a, b = torch.randint(5, 90, (2, 7)), torch.randint(5, 90, (3, 7))
    model(input_ids=a)
    hidden = model.model(input_ids=b).last_hidden_state
    assert len(keys.now.entries) == 3
    torch.testing.assert_close(model.lm_head(hidden), model(input_ids=b).logits)


def test_a_classifier_learns_saves_and_loads(tmp_path):
    run = fit(classifier(), TOK, label_data(), learning_to_modulate(size=3, r=2), steps=3,
              batch_size=4, progress=False)
    run.delta.save(tmp_path/'d.safetensors')
    fresh = classifier()
    loaded = keys_of(load_delta(fresh, tmp_path/'d.safetensors'))
    assert loaded.counts.equal(keys_of(run.delta.attached).counts)
    ids = torch.randint(5, 90, (6, 9))
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=ids).logits, run.model.eval()(input_ids=ids).logits)
    assert keys_of(run.delta.attached).counts.sum() == 12


def test_it_resumes_with_its_counts(tmp_path):
    def run(**more):
        recipe = learning_to_modulate(size=6, r=2, tasks=2)
        return fit(toy(), TOK, lab_data(), recipe, steps=4, lr=1e-2, batch_size=4, progress=False,
                   **more)
    assert_resumes(run, tmp_path, at=2)


@torch.no_grad()
def test_half_precision_is_rounded_once_and_a_copy_is_independent():
    model = toy().to(torch.bfloat16)
    att = pooled(model)
    assert {p.dtype for p in att.parameters().values()} == {torch.float32}
    out = logits(model)
    assert out.dtype == torch.bfloat16
    twin = copy.deepcopy(model)
    shaken(att)
    assert torch.equal(logits(twin), out) and not torch.equal(logits(model), out)


def grown():
    model, tok = toy(), copy.deepcopy(TOK)
    give_rows(model, add_to(tok, ['<new>'])[0], TOK.get_vocab().values())
    return fit(model, tok, lab_data(), learning_to_modulate(size=2, r=2), steps=1, batch_size=2,
               progress=False)


@pytest.mark.parametrize('make, says', [
    (lambda: learning_to_modulate(kind='both'), "lora or ia3"),
    (lambda: learning_to_modulate(size=0), 'at least 1'),
    (lambda: learning_to_modulate(r=1.5), 'at least 1'),
    (lambda: learning_to_modulate(tasks=True), 'at least 1'),
    (lambda: learning_to_modulate(weight=-1), '0 or more'),
    (lambda: learning_to_modulate(weight=float('nan')), '0 or more'),
    (lambda: learning_to_modulate(init=0), 'above 0'),
    (lambda: pooled(toy(), r=99), 'at most'),
    (lambda: pooled(tiny('gpt2'), kind='ia3'), 'use the kind lora'),
    (lambda: pooled(tiny('vit')), 'no input embedding'),
    (lambda: pooled(tiny('t5')), 'encoder or a decoder'),
    (lambda: Modulators(torch.zeros(3, 4, 4)), 'whole matrices'),
    (lambda: Scales(torch.zeros(4, 4), torch.ones(4, 4, dtype=torch.bool)), 'mask of entries'),
    (lambda: Scales(torch.zeros(4, 4), side='top'), 'out or in'),
    (lambda: Keys(torch.zeros(4, 4), torch.ones(4, 4, dtype=torch.bool)), 'mask of entries'),
    (lambda: learning_to_modulate().delta(torch.zeros(4, 4)), 'call fitted'),
    (lambda: attach(toy(), {'model.layers.0.mlp.up_proj.weight': True},
                    learning_to_modulate().delta), 'the selection leaves out'),
    (lambda: attach(toy(), {'model.layers.0.mlp.up_proj.weight': True}, Keys), 'belong to the input embedding'),
    (lambda: fit(toy(), TOK, data([dict(prompt='a', response='b'), dict(prompt='b', response='c')]),
                 learning_to_modulate(size=2, r=2, tasks=30), steps=1, progress=False), 'divide among'),
    (grown, 'rows train beside the method')])
def test_wrong_arguments_say_what_is_wrong(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@torch.no_grad()
def test_inputs_that_it_cannot_read_say_so():
    model, ids = toy(), torch.randint(5, 90, (2, 6))
    att = pooled(model)
    with att.disabled():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match='begin a new cache'):
        model(input_ids=ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match='cannot be packed'):
        model(input_ids=ids, attention_mask=torch.ones(2, 1, 6, 6))
    keys_of(att).now = Choice(torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match='3 rows have chosen'):
        model.model.layers[0].mlp.up_proj(torch.zeros(2, 6, 32))
