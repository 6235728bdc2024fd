"Circuits against patching by hand, minimality on scores whose answer is known, masks that must find a planted head"
import pytest, torch
from ftlab.evaluators.circuits import (accuracy, circuit_logits, faithfulness, learn_mask,
                                       minimality, probability, prune, random_circuit)
from ftlab.evaluators.patching import (Site, ablated, activations, all_heads, edited,
                                       mean_activations, patch)
from tiny import changed, example_inputs, tiny

FAMILIES = ('llama', 'gpt2', 'bert')
CLEAN, OTHER = example_inputs(0, batch=6), example_inputs(1, batch=6)
CLOSE = dict(atol=2e-5, rtol=0)
H = [Site('head', b, h) for b in (0, 1) for h in range(4)]

@torch.no_grad()
def logits(model, batch=CLEAN):
    return model(**batch).logits

def means_of(model):
    return mean_activations(model, [CLEAN, OTHER], all_heads(model))

# ---------- a circuit runs as patching says

@pytest.mark.parametrize('family', FAMILIES)
def test_all_heads_are_the_model_and_none_is_the_ablated_model(family):
    model = tiny(family)
    means = means_of(model)
    assert torch.equal(circuit_logits(model, CLEAN, H, means), logits(model))
    with torch.no_grad(), ablated(model, means):
        torch.testing.assert_close(circuit_logits(model, CLEAN, [], means), model(**CLEAN).logits)
    with torch.no_grad(), ablated(model, means, [h for h in H if h not in (H[1], H[6])]):
        torch.testing.assert_close(circuit_logits(model, CLEAN, [H[1], H[6]], means),
                                   model(**CLEAN).logits)

@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('kind', ['lora', 'hft'])
def test_means_and_circuits_have_an_attached_change_in_them(family, kind):
    "They give with a change attached what they give on the model into which it is folded"
    model, folded = tiny(family), tiny(family)
    att = changed(model, kind)
    changed(folded, kind).fold()
    means, theirs = means_of(model), means_of(folded)
    for h in H:
        torch.testing.assert_close(means[h], theirs[h], **CLOSE)
    found = []
    for m, mean in ((model, means), (folded, theirs), (tiny(family), means)):
        with torch.no_grad(), ablated(m, mean, [H[1], H[6]], at=[2, 3]):
            found.append((m(**CLEAN).logits, circuit_logits(m, CLEAN, [H[0], H[5]], mean)))
    ours, other, without = found
    for a, b, c in zip(ours, other, without):
        torch.testing.assert_close(a, b, **CLOSE)
        assert (a - c).abs().max() > .01, 'the change does not show'
    assert att.enabled and torch.equal(circuit_logits(model, CLEAN, H, means), logits(model))

def test_heads_work_only_at_their_places():
    "Row by row: the last token for one head, a place of its own in each row for two others"
    model, means = tiny('llama'), means_of(tiny('llama'))
    where = torch.tensor([[0], [1], [2], [3], [4], [5]])
    circuit, at = dict(last=[H[0]], key=[H[0], H[5]]), dict(last=-1, key=where)
    found = circuit_logits(model, CLEAN, circuit, means, at)

    def by_hand(site):
        def edit(x):
            y = means[site].expand_as(x).clone()
            for r in range(6):
                on = ([6, r] if site == H[0] else [r] if site == H[5] else [])
                y[r, on] = x[r, on]
            return y
        return edit
    with torch.no_grad(), edited(model, {s: by_hand(s) for s in H}):
        torch.testing.assert_close(found, model(**CLEAN).logits)

def test_a_circuit_can_be_a_generator_and_a_batch_can_start_with_labels():
    model, means = tiny('llama'), means_of(tiny('llama'))
    found = circuit_logits(model, CLEAN, H[:3], means)
    assert torch.equal(circuit_logits(model, CLEAN, (h for h in H[:3]), means), found)
    batch = dict(labels=torch.zeros(6), **CLEAN)
    assert torch.equal(circuit_logits(model, batch, H[:3], means), found)

def test_answers_at_one_position_of_each_row():
    model, labels = tiny('llama'), torch.arange(6)
    at, x = torch.tensor([6, 5, 4, 3, 2, 1]), logits(model)
    expected = float(x[torch.arange(6), at].softmax(-1)[torch.arange(6), labels].mean())
    assert probability(labels, at)(x) == pytest.approx(expected)
    assert probability(labels, at[:, None])(x) == pytest.approx(expected)
    assert probability(labels, at.tolist())(x) == pytest.approx(expected)

def test_faithfulness_is_a_ratio():
    model, means = tiny('gpt2'), means_of(tiny('gpt2'))
    labels = logits(model)[:, -1].argmax(-1)
    out = faithfulness(model, CLEAN, H, means, accuracy(labels))
    assert out == dict(circuit=1., full=1., faithfulness=1.)
    alone = faithfulness(model, CLEAN, H[:3], means, probability(labels))
    by_hand = circuit_logits(model, CLEAN, H[:3], means)[:, -1].softmax(-1)[torch.arange(6), labels]
    assert alone['circuit'] == pytest.approx(float(by_hand.mean()))
    assert alone['faithfulness'] == pytest.approx(alone['circuit']/alone['full'])

def test_random_circuits_have_as_many_heads():
    model, like = tiny('llama'), dict(last=H[:3], key=H[:5])
    drawn = random_circuit(model, like, 1)
    assert {p: len(set(s)) for p, s in drawn.items()} == dict(last=3, key=5)
    assert drawn == random_circuit(model, like, 1) != random_circuit(model, like, 2)

# ---------- minimality, on scores of sets

def test_a_head_with_a_stand_in_is_needed_a_useless_one_is_not():
    """Heads 0 and 1 do the same, head 2 something of its own, head 3 nothing: leaving out one at a time misses 0
    and 1"""
    def score(heads):
        return .1 + .5*bool({H[0], H[1]} & heads) + .4*(H[2] in heads)
    whole = frozenset(H[:4])
    assert score(whole - {H[0]}) == score(whole)
    value = minimality(score, whole)
    assert value[H[0]] == value[H[1]] == pytest.approx(1/.5 - 1)
    assert value[H[2]] == pytest.approx(.5/.1 - 1) # without 0 and 1
    assert value[H[3]] == pytest.approx(0)
    assert prune(score, whole) == (H[0], H[1], H[2])
    assert prune(score, whole, share=0) == (H[2],)

def test_minimality_is_the_formula():
    "Against the formula with all pairs computed, on a random score"
    g = torch.Generator().manual_seed(0)
    table = {}

    def score(heads):
        if heads not in table:
            table[heads] = float(torch.rand((), generator=g)) + .1
        return table[heads]
    C = frozenset(H[:5])
    value = minimality(score, C, share=.4)
    for v in C:
        gain = {w: score(C - {w}) - score(C - {v, w}) for w in C - {v}}
        K = {w for w in sorted(gain, key=gain.get)[-2:] if gain[w] > 0}
        assert value[v] == pytest.approx(score(C - K)/score(C - K - {v}) - 1)
    assert minimality(lambda h: float(H[0] in h), [H[0], H[1]])[H[0]] == float('inf')

# ---------- masks

@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('kind', ['clamped', 'hard_concrete'])
def test_a_mask_finds_the_head_that_makes_the_answer(family, kind):
    "The wanted answers are those of a model in which one head is replaced, and its effect is large"
    model = tiny(family).requires_grad_(True)
    with torch.no_grad(): # let one head speak up, so that its effect is seen
        name = dict(llama='model.layers.0.self_attn.o_proj.weight', bert=
                    'bert.encoder.layer.0.attention.output.dense.weight',
                    gpt2='transformer.h.0.attn.c_proj.weight')[family]
        W = model.get_parameter(name)
        (W if family != 'gpt2' else W.T)[:, 8:16].mul_(20)
    want = patch(model, CLEAN, OTHER, [H[1]], -1)[:, -1].argmax(-1)
    before = {n: p.clone() for n, p in model.named_parameters()}
    mask = learn_mask(model, CLEAN, OTHER, want, H, at=-1, penalty=.02, steps=40, kind=kind)
    assert H[1] in mask.heads and mask.accuracy >= .8 and len(mask.heads) < len(H)
    assert mask.losses[-1] < mask.losses[0]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == 0

def test_masks_are_repeatable_and_a_high_penalty_empties_them():
    model, want = tiny('llama'), logits(tiny('llama'), OTHER)[:, -1].argmax(-1)

    def learn(**more):
        return learn_mask(model, CLEAN, OTHER, want, H, steps=5, kind='hard_concrete', **more)
    state = torch.get_rng_state()
    assert learn(seed=1) == learn(seed=1) and learn(seed=1).losses != learn(seed=2).losses
    assert torch.equal(torch.get_rng_state(), state)
    assert learn_mask(model, CLEAN, OTHER, want, H, penalty=1e3, steps=5).heads == ()
    with torch.inference_mode():
        assert learn(seed=1) == learn_mask(model, CLEAN, OTHER, want, H, steps=5, seed=1,
                                           kind='hard_concrete')

@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('kind', ['lora', 'hft'])
def test_a_mask_reads_an_attached_change_and_leaves_it_alone(family, kind):
    model, folded = tiny(family), tiny(family)
    att = changed(model, kind)
    changed(folded, kind).fold()
    before = {n: p.detach().clone() for n, p in att.parameters().items()}
    want = logits(folded, OTHER)[:, -1].argmax(-1)
    ours, theirs, without = (learn_mask(m, CLEAN, OTHER, want, H, at=-1, steps=5)
                             for m in (model, folded, tiny(family)))
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(theirs.losses), **CLOSE)
    torch.testing.assert_close(torch.tensor(list(ours.values.values())),
                               torch.tensor(list(theirs.values.values())), atol=1e-3, rtol=0)
    assert ours.heads == theirs.heads and ours.accuracy == theirs.accuracy
    assert abs(ours.losses[0] - without.losses[0]) > .001, 'the change does not show'
    assert att.enabled and len(before) > 0
    for n, p in att.parameters().items():
        assert p.grad is None and p.requires_grad and torch.equal(p, before[n])

def test_the_first_loss_is_the_wanted_logit():
    "The clamped mask starts with nothing from the source"
    model = tiny('gpt2')
    want = logits(model, OTHER)[:, -1].argmax(-1)
    mask = learn_mask(model, CLEAN, OTHER, want, H, steps=1)
    wanted = logits(model)[:, -1].gather(1, want[:, None])
    assert mask.losses[0] == pytest.approx(-float(wanted.mean()), abs=1e-5)
    assert set(mask.values) == set(H)
    assert activations(model, CLEAN, H)[H[0]].requires_grad is False

# ---------- errors

def test_bad_input_is_named():
    model, means = tiny('llama'), means_of(tiny('llama'))
    labels = torch.zeros(6, dtype=torch.long)
    for circuit, more, says in (([Site('mlp', 0)], {}, 'no heads'),
                                ([Site('head', 2, 0)], {}, 'are not in the model'),
                                (dict(last=H[:1]), {}, "no positions for 'last'"),
                                (H, dict(means={H[0]: means[H[0]]}), 'no mean of')):
        with pytest.raises(ValueError, match=says):
            circuit_logits(model, CLEAN, circuit, **(dict(means=means) | more))
    with pytest.raises(ValueError, match='scores 0.0'):
        faithfulness(model, CLEAN, H, means, lambda x: 0.)
    with pytest.raises(ValueError, match='one position for each row'):
        faithfulness(model, CLEAN, H, means, accuracy(labels, [0, 1]))
    for args, says in (((lambda h: 1., []), 'has 0 heads'), ((lambda h: 1., H, 2.), 'share is 2')):
        with pytest.raises(ValueError, match=says):
            minimality(*args)
    short = torch.ones(6, 7, dtype=torch.long)
    short[2, 5:] = 0
    padded = dict(CLEAN, attention_mask=short)
    with pytest.raises(ValueError, match=r"at\['last'\] is on padding in rows \[2\]"):
        circuit_logits(model, padded, dict(last=H[:1]), means, dict(last=-1))
    for more, says in (({}, r'rows \[2\]'), (dict(at=-1), 'at is on padding')):
        with pytest.raises(ValueError, match=says):
            learn_mask(model, CLEAN, padded, labels, H, **more)
    with pytest.raises(ValueError, match='answer_at is on padding'):
        learn_mask(model, padded, CLEAN, labels, H, at=0)
    for more, says in ((dict(kind='soft'), "kind is 'soft'"),
                       (dict(heads=[]), 'no heads were given')):
        with pytest.raises(ValueError, match=says):
            learn_mask(model, CLEAN, OTHER, labels, **(dict(heads=H) | more))
