"nfts: the supernet's step and a trial in plain torch, evolution on a known fitness, plans on every family"
import math
import random
import pytest
import torch
from ftlab import data
from ftlab.adapters.attach import attach
from ftlab.adapters.subsets.memcontrol import drawn, halves, tried
from ftlab.adapters.subsets.nfts import crossed, diverse, evolve, nfts, planned, tuned_or_offset
from ftlab.core.batches import Sample, Unread, order
from ftlab.core.recipe import CannotCompose
from ftlab.core.tokens import encode_all
from ftlab.trainers.fit import fit
from tests.losses import row_loss
from tests.tiny import tiny
from tests.toys import TOK, classifier, lab_data, label_data, logits, same, toy, weights

ROWS = encode_all(lab_data().train[:16], TOK, 'text')
SHORT = dict(population=3, generations=1, parents=2, keep=2, supernet=2, steps=1, rows=16, size=4)


def sample(**more):
    return Sample(ROWS, TOK.pad_token_id, **more)


def test_a_trial_of_a_plan_in_plain_torch():
    "Block 0 tuned, block 1 with an adapter: AdamW on the matrices and on vectors behind the norms"
    how = planned(**SHORT | dict(steps=2, lr=1e-2))
    model, plain = toy(), toy()
    support, query = halves(sample(), 16, held=.5)
    found = how._loss(model, (0, 3), sample(), support, query, {})
    plain.requires_grad_(False)
    tuned = [p.requires_grad_() for n, p in plain.named_parameters()
             if n.startswith('model.layers.0.') and p.ndim == 2]
    block = plain.model.layers[1]
    added = [torch.zeros(32, requires_grad=True) for _ in range(2)]
    for norm, b in zip((block.input_layernorm, block.post_attention_layernorm), added):
        norm.register_forward_hook(lambda m, args, out, b=b: out + b)
    assert len(tuned) == 7
    step = torch.optim.AdamW([*tuned, *added], 1e-2, weight_decay=0.)
    at = order(len(support), 0, 0).tolist()
    for k in range(2):
        step.zero_grad()
        torch.stack([row_loss(plain, support[i]) for i in at[4*k:4*k + 4]]).mean().backward()
        step.step()
    with torch.no_grad():
        asked = float(torch.stack([row_loss(plain, r) for r in query]).mean())
    assert abs(found - asked) < 1e-4 and added[1].abs().max() > 1e-3
    assert abs(how._loss(model, (2,), sample(), support, query, {}) - asked) > 1e-2


def test_a_step_of_the_supernet_moves_what_its_plan_has_and_keeps_the_rest():
    model, how = toy(), planned(**SHORT)
    shared = how._shared(model, sample(), ROWS, 4, random.Random(0))
    one = planned(**SHORT | dict(supernet=1))._shared(model, sample(), ROWS, 4, random.Random(0))
    assert same(weights(model), weights(toy())) and set(one) <= set(shared)
    assert all((v != 0).any() for v in one.values())
    with tried(model, how.select(model, range(4)), [], .1, tuned_or_offset(), start=shared) as att:
        for n, p in att.parameters().items():
            assert torch.equal(p, shared[n]) if n in shared else not p.any()
        assert not torch.equal(logits(model), logits(toy()))


def test_the_supernet_has_one_adamw_for_all_plans(monkeypatch):
    "Two steps of one plan are two steps of one AdamW; a plan between them that trains nothing of it changes nothing"
    how = planned(**SHORT | dict(supernet=3, lr=1e-2))
    plans = iter([[(0,)], [(3,)], [(0,)]])
    monkeypatch.setattr('ftlab.adapters.subsets.nfts.masks', lambda *a: next(plans))
    shared = how._shared(toy(), sample(), ROWS, 4, random.Random(0))
    model, batches = toy(), list(drawn(sample(), ROWS, 3, 4))
    with tried(model, how.select(model, (0,)), [batches[0], batches[2]], 1e-2,
               tuned_or_offset()) as att:
        plain = {n: p.detach().clone() for n, p in att.parameters().items()}
    assert len(plain) == 7
    assert all(torch.allclose(shared[n], p, atol=1e-6) for n, p in plain.items())
    assert len(shared) == 7 + 2


def test_evolution_climbs_and_never_tries_a_plan_twice():
    asked = []
    fitness = lambda p: asked.append(p) or float(len(p))
    known = evolve(fitness, 20, 8, 20, 4, random.Random(0))
    assert len(asked) == len(set(asked)) == len(known) <= 8 + 20*4 and () not in known
    assert max(known.values()) > max(len(p) for p in asked[:8]) + 3
    assert len(evolve(fitness, 3, 50, 2, 4, random.Random(0))) == 7
    assert len(evolve(fitness, 20, 1, 3, 4, random.Random(0))) == 1 # one plan has no partner


def test_a_child_has_each_bit_from_a_parent_and_a_twentieth_flips():
    rng = random.Random(0)
    assert crossed((0, 2), (0, 2), 4, rng, mutation=0.) == (0, 2)
    flips = sum(len(crossed((), (), 100, rng)) for _ in range(100))
    assert abs(flips/1e4 - .05) < .01
    mixed = sum(len(crossed(tuple(range(100)), (), 100, rng, 0.)) for _ in range(100))
    assert abs(mixed/1e4 - .5) < .02


def test_kept_plans_are_the_fittest_at_a_distance():
    rng = random.Random(1)
    plans = [tuple(i for i in range(8) if rng.random() < .5) or (0,) for _ in range(40)]
    known = {p: rng.random() for p in plans}
    v = {p: torch.tensor([float(i in p) for i in range(8)]) for p in known}
    far = lambda p, q: 1 - float(torch.nn.functional.cosine_similarity(v[p], v[q], 0))
    out = diverse(known, 4, .4)
    assert out[0] == max(known, key=known.get) and len(out) == 4
    assert all(far(p, q) >= .4 - 1e-6 for p in out for q in out if p != q)
    between = [p for p in known if known[out[1]] < known[p] < known[out[0]]]
    assert all(far(p, out[0]) < .4 for p in between)


def test_corners_and_budgets():
    model = toy(hidden=64)
    total = sum(p.numel() for p in model.parameters())
    count = lambda n, m: model.get_parameter(n).numel() if m is True else int(m.sum())
    size = lambda c: sum(count(n, m) for n, m in c.items())
    assert size(nfts(by='adapters').select(model)) == 2*2*64
    assert all(m is True for m in nfts(by='both').select(model).values())
    for budget in (.0005, .01, .3):
        for by in ('tuned', 'adapters', 'both', 'random'):
            chosen = nfts(by=by, budget=budget).select(model)
            assert size(chosen) == round(budget*total)
            att = attach(model, chosen, tuned_or_offset())
            assert sum(p.numel() for p in att.parameters().values()) == round(budget*total)
            att.detach()
    with pytest.raises(ValueError, match='all have too few|more than the units have'):
        nfts(by='tuned', budget=1.).select(model)


def test_wrong_arguments():
    for wrong in (dict(by='luck'), dict(population=0), dict(generations=-1),
                  dict(search_lr=math.nan)):
        with pytest.raises(ValueError, match='it must be search'):
            nfts(**wrong)
    with pytest.raises(ValueError, match='give it a Sample'):
        nfts().select(toy())
    with pytest.raises(CannotCompose):
        nfts()*__import__('ftlab.methods').methods.lora()


def test_seen_tasks_are_searched_and_the_own_rows_decide():
    asked = []
    encode = lambda rows, kind: asked.append(len(rows)) or encode_all(rows, TOK, kind)
    how = planned(**SHORT, seen=data('sort', n=40))
    model = toy()
    plan, known = how.search(model, sample(encode=encode))
    assert asked == [16] and plan in known and same(weights(model), weights(toy()))


@pytest.mark.parametrize('family', 'llama qwen3 gemma2 gpt2 opt gpt_neox mixtral'.split())
def test_a_plan_on_every_family(family):
    model = tiny(family, vocab_size=len(TOK), max_position_embeddings=96)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuned, norms = planned().units(model)
    assert len(tuned) == len(norms) == 2 and all(tuned) and all(norms)
    chosen = planned(**SHORT | dict(generations=0, population=2))(model, sample())
    assert chosen and all(torch.equal(p, base[n]) for n, p in model.named_parameters())


def test_a_classifier_and_an_image_model():
    short = nfts(population=2, generations=0, supernet=1, steps=1, keep=1)
    run = fit(classifier(), TOK, label_data(), short, steps=1, batch_size=4, progress=False)
    assert run.log and all(planned().units(tiny('vit'))[1])
    assert nfts().select(tiny('vit'), Unread())
