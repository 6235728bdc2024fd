"""Every subset on eight architectures: it attaches, backpropagates and keeps to its budget; its change can be
switched off, saved, loaded and folded; or it says why it cannot. Losses whose own tests have one family train a step
on each model that writes text"""
import inspect
from functools import cache

import pytest
import torch
from ftlab import methods
from ftlab.adapters.attach import attach
from ftlab.adapters.select import allowed
from ftlab.adapters.store import identity, load_delta, pack, save_delta
from ftlab.core.batches import Sample, Unread
from ftlab.core.data import data
from ftlab.core.tokens import encode_all
from ftlab.trainers.fit import fit
from tiny import inputs_for, tiny
from toys import TOK, lab_data

DECODERS = 'llama qwen2 gemma gpt2 opt gpt_neox'.split()
FAMILIES = [*DECODERS, 'bert', 'vit']
SUBSETS = [n for n in methods.names()
           if methods.make_of(n).__module__.startswith('ftlab.adapters.subsets.')]
# no budget for what trains: whole matrices, or everything (GMT keeps to one in each step)
FREE = {'cofitune', 'difffit', 'gmt', 'hft', 'lift', 'lt_sft', 'spider'}
BUDGET = dict.fromkeys(set(SUBSETS) - FREE, .02) | dict(goodvibe=.01, layernorm_tuning=.001)
REFUSED = {('difffit', 'bert'): "'cls.predictions.bias' is tied to .* leave it out of the select"}
ON_ACTIVATIONS = {'nfts'}
LOSSES = 'tl_training pcp manyicl ul2'.split()


def of_family(family):
    "A toy that reads the lab's tokens, or images"
    more = {} if family == 'vit' else dict(vocab_size=len(TOK), max_position_embeddings=128)
    return tiny(family, **more)


@cache
def sample() -> Sample:
    encode = lambda rows, kind: encode_all(rows, TOK, kind)
    return Sample(encode(lab_data().train[:8], 'text'), TOK.pad_token_id, encode=encode)


@cache
def made(name):
    "The method, its first stage: within the budget, with a short search and another language"
    short = dict(lape=lambda: dict(others=(data('sort', n=30),)),
                 memcontrol=lambda: dict(trials=2, steps=1),
                 nfts=lambda: dict(population=2, generations=0, keep=1, supernet=1, steps=1))
    budget = dict(budget=BUDGET[name]) if name in BUDGET else {}
    return methods.make_of(name)(**budget, **short.get(name, dict)()).turns[0]


def test_only_those_without_a_budget_are_free_of_it():
    takes = lambda n: 'budget' in inspect.signature(methods.make_of(n)).parameters
    assert len(SUBSETS) >= 23 and FREE == {n for n in SUBSETS if not takes(n)} | {'gmt'}


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('name', SUBSETS)
def test_a_subset_attaches_backpropagates_keeps_to_its_budget_and_can_be_kept(name, family, tmp_path):
    recipe, model, x = made(name), of_family(family), inputs_for(family)
    base, most = model(**x).logits.detach(), allowed(model, BUDGET.get(name, 1.))
    every = dict.fromkeys((n for n, _ in model.named_parameters()), True)
    rows = Unread() if family == 'vit' else sample() # rows are text
    chosen = recipe.select(model, rows, 0) if recipe.select else every
    if (name, family) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, family]):
            attach(model, chosen, recipe.delta)
        return
    att = attach(model, chosen, recipe.delta)
    torch.testing.assert_close(model(**x).logits.detach(), base, rtol=0, atol=1e-5)
    labels = torch.tensor([0, 1]) if family == 'vit' else x['input_ids']
    model(**x, labels=labels).loss.backward()
    trained = list(att.parameters().values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert any(p.grad.any() for p in trained)
    mine = set(map(id, trained))
    assert all(p.grad is None for p in model.parameters() if id(p) not in mine)
    if name in BUDGET:
        # NeuroAda rounds to whole entries of each neuron
        neurons = sum(len(d.value) for d in att.deltas.values()) if name == 'neuroada' else 0
        assert .6*most <= sum(p.numel() for p in trained) <= most + neurons/2
    with torch.no_grad():
        for p in trained:
            p -= .02*p.grad/p.grad.abs().max().clamp(min=1e-12)
    assert_can_be_kept(name, att, model, of_family(family), x, base, tmp_path/'change.safetensors')


def assert_can_be_kept(kind, att, model, fresh, x, base, file):
    "A change that is not zero is off, saved, loaded into a `fresh` model, and folded"
    logits = lambda m: m(**x).logits.detach()
    changed = logits(model)
    assert (changed - base).abs().max() > 1e-3
    with att.disabled():
        torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-5)
    tensors, kinds = pack(att)
    save_delta(file, tensors, kinds, identity(fresh))
    load_delta(fresh, file)
    torch.testing.assert_close(logits(fresh), changed, rtol=0, atol=1e-6)
    if any(d.site != 'weight' for d in att.deltas.values()):
        assert kind in ON_ACTIVATIONS
        with pytest.raises(ValueError, match='cannot be folded'):
            att.fold()
        return
    att.fold()
    torch.testing.assert_close(logits(model), changed, rtol=0, atol=1e-4)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('name', LOSSES)
def test_a_loss_trains_a_step_wherever_text_is_written(name, family):
    make = methods.make_of(name)
    recipe, model = make(**make.paper.toy_arguments()), of_family(family)
    steps, before = len(recipe.turns), {n: p.detach().clone() for n, p in model.named_parameters()}
    tune = lambda: fit(model, TOK, lab_data(), recipe, steps=steps, batch_size=2, progress=False)
    if family not in DECODERS:
        with pytest.raises(ValueError, match='cannot generate text; load a causal language model'):
            tune()
        return
    run = tune()
    assert len(run.log) == steps and 0 < run.log[-1]['loss'] < 20
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) > .9*len(before)
