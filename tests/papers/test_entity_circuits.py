"entity_circuits: what its page cannot say about itself"
import inspect
from functools import cache
from types import SimpleNamespace
import pytest, torch
from ftlab.core.loading import load
from ftlab.evaluators.mechanisms.entity_circuits import (
    GROUPS, PROPERTIES, base_circuit, box_accuracy, box_circuit, box_prompts, box_rows, by_place,
    circuit_accuracy, cmap_accuracy, corrupted, counterfactual, entity_circuits, everywhere,
    other_tokens, path_scores, property_mask, pruned, random_groups)
from ftlab.evaluators.circuits import circuit_logits, probability
from ftlab.evaluators.patching import Site, all_heads, mean_activations, patch, run_logits
from ftlab.instruments.claims import named_claim, script_of
from toys import TOK, toy


@pytest.mark.parametrize('moved', [False, True])
def test_the_three_places_hold_what_they_are_called(moved):
    tok = load('lab-l', revision='step-546')[1]
    p = box_prompts(tok, 12, 3, 4, moved)
    x, row = p.batch['input_ids'], torch.arange(12)
    name = p.names[row, p.asked]
    for place in ('query', 'label'):
        assert (x[row, p.at[place][:, 0]] == name).all()
    assert (p.at['label'] < p.at['query']).all() and (p.at['last'] == x.shape[1] - 1).all()
    assert (p.things[row, p.asked] == p.labels).all()
    # the same questions, to learn from
    for r, ids, label in zip(box_rows(12, 3, 4, moved), x, p.labels):
        assert r['prompt'] in tok.decode(ids) and r['response'] == tok.decode(label)
    absent = corrupted(p, tok, 4, moved)
    asked = absent.batch['input_ids'][row, absent.at['query'][:, 0]]
    assert all((r == a).sum() == 1 for r, a in zip(absent.batch['input_ids'], asked))
    # another position: or a head at the label that reports one would be patched with the same
    assert (absent.asked != p.asked).all() and absent.batch['input_ids'].shape == x.shape


@pytest.mark.parametrize('moved', [False, True])
def test_the_properties_want_what_they_say(moved):
    tok = load('lab-l', revision='step-546')[1]
    p, row = box_prompts(tok, 12, 3, 4, moved), torch.arange(12)
    for prop in PROPERTIES:
        s, wanted = counterfactual(p, tok, prop, 5, moved)
        asked = s.names[row, s.asked]
        if prop == 'label': # the box of that name is in the prompt, and is not the one asked about
            assert all(w == t[n == a] for w, t, n, a in zip(wanted, p.things, p.names, asked))
        else:
            assert (s.asked != p.asked).all()
            from_ = p.things if prop == 'position' else s.things
            assert torch.equal(wanted, from_[row, s.asked])
        assert (wanted != p.labels).all() or prop == 'object'


def test_all_heads_are_the_model_and_cmap_is_patching():
    tok = load('lab-l', revision='step-546')[1]
    model, _ = load('lab-l', revision='step-546')
    other, _ = load('lab-l', revision='step-2214')
    p = box_prompts(tok, 6, 0, 3)
    heads = all_heads(model)
    means = mean_activations(model, [p.batch], heads)
    everywhere = dict(fetcher=heads)
    logits = patch(model, p.batch, p.batch, heads, p.at['last'], source_model=other)
    by_hand = float((logits[:, -1].argmax(-1) == p.labels).float().mean())
    assert cmap_accuracy(model, other, p, everywhere) == by_hand
    assert cmap_accuracy(model, model, p, everywhere) == box_accuracy(model, p)
    assert 0 <= circuit_accuracy(model, p, everywhere, means) <= 1


def test_groups_are_found_backwards_and_pruned():
    model, tok = load('lab-s')
    groups = box_circuit(model, tok, 3, 0, 3, sizes=(2, 1, 1, 1))
    assert list(groups) == list(GROUPS) and set(by_place(groups)) == {'last', 'query', 'label'}
    assert len(groups['transmitter']) == 1 and set(groups['fetcher']).isdisjoint(groups['transmitter'])
    p = box_prompts(tok, 6, 5, 3)
    kept = pruned(model, p, groups, mean_activations(model, [p.batch], all_heads(model)))
    assert all(set(kept[g]) <= set(groups[g]) for g in groups)
    for seed in range(9): # as many different heads at each place, though two groups share the last token
        drawn = by_place(random_groups(model, groups, seed))
        wanted = {k: len(v) for k, v in by_place(groups).items()}
        assert {k: len(set(v)) for k, v in drawn.items()} == wanted
        others = random_groups(model, groups, seed, outside=True)
        inside = {s for sites in groups.values() for s in sites}
        assert {k: len(set(v)) for k, v in by_place(others).items()} == wanted
        assert not inside & {s for sites in others.values() for s in sites}
    assert all(set(heads) == set(all_heads(model)) - inside and len(heads) == len(set(heads))
               for heads in everywhere(model, groups).values())
    assert set(by_place(everywhere(model))) == {'last', 'query', 'label'}
    with pytest.raises(ValueError, match='asked for at one place, and there are 0 to draw from'):
        random_groups(model, dict(fetcher=all_heads(model)), outside=True)
    heads = groups['fetcher'] or [Site('head', 0, 0)]
    mask = property_mask(model, tok, heads, 'last', 'position', n=4, boxes=3, steps=2)
    assert 0 <= mask.accuracy <= 1 and len(mask.losses) == 2


def test_a_prompt_with_a_wrong_answer_does_not_decide_which_heads_matter():
    model, tok = load('lab-s')
    p = box_prompts(tok, 3, 0, 3)
    places = torch.arange(3), p.labels

    class Paths: # head 0 of block 0 matters in the two prompts that are right, and helps in the wrong one
        def __init__(self):
            self.model, self.logits = model, self.of(.9, .9, 1e-5)

        def of(self, *right):
            x = torch.zeros(3, 1, words := len(tok))
            odds = torch.tensor(right).logit() + torch.tensor(words - 1.).log()
            x[places[0], 0, places[1]] = odds
            return x

        def __call__(self, heads, receivers, at, source_at, read_at):
            return self.of(.3, .3, .01) if heads == [Site('head', 0, 0)] else self.logits

    scores = path_scores(Paths(), p, p, [], 'last')
    assert min(scores, key=scores.get) == Site('head', 0, 0)
    assert abs(scores[Site('head', 0, 0)] - (.61/1.80001 - 1)) < 1e-3


def test_a_circuit_that_is_found_once_is_the_one_that_the_study_finds(monkeypatch):
    "The claim finds it once for all rates"
    default = lambda f: {k: p.default for k, p in inspect.signature(f).parameters.items()}
    same = 'seed', 'boxes', 'prompts', 'sizes'
    assert all(default(base_circuit)[k] == default(entity_circuits)[k] for k in same)
    sizes, seen = (2, 1, 1, 1), []
    once = base_circuit(*load('lab-s'), 3, 3, 4, sizes)
    toy = dict(base='lab-s', revision=None, boxes=3, steps=2, prompts=4, sizes=sizes, controls=1,
               masks=0)
    monkeypatch.setitem(entity_circuits.__globals__, 'base_circuit',
                        lambda model, tok, *how: seen.append(how) or once)
    found = entity_circuits(3, **toy)
    assert seen == [(3, 3, 4, sizes)]
    assert entity_circuits(3, **toy, groups=once) == found and len(seen) == 1


def test_the_claim_finds_one_circuit_and_asks_for_the_middle_and_a_quarter(monkeypatch):
    claim, asked = script_of(named_claim('entity_circuits')), []
    monkeypatch.setattr(claim, 'circuit', cache(claim.circuit.__wrapped__))
    monkeypatch.setattr(claim, 'base_circuit', lambda *a, **k: asked.append((a[2:], k)) or 'groups')
    values = {'base.accuracy': .7, 'tuned.accuracy': .9, 'tuned.faithfulness': .95,
              'tuned.circuit': .85,
              'circuit.cmap': .88, 'outside.cmap': .76, 'others.cmap': .79, 'random.cmap': .81,
              'random.faithfulness': .2}
    how = []
    monkeypatch.setattr(claim, 'entity_circuits',
                        lambda seed, **k: how.append(k) or SimpleNamespace(values=values))
    o = [claim.run('tuned', rate, 7, 'test', 200) for rate in (1e-3, 1e-4)][0]
    assert asked == [((7,), dict(prompts=200))] # 33 for path patching, 50 for pruning
    assert {k['groups'] for k in how} == {'groups'} and {k['prompts'] for k in how} == {400}
    assert o['outside_above'] == pytest.approx(.76 - .75) and o['gain'] == pytest.approx(.2)
    arms = claim.derive(dict(tuned=o))
    assert {n: round(a['patched'], 3) for n, a in arms.items() if 'patched' in a} == dict(
        halfway=.8, random=.81, outside=.76, others=.79)
    assert arms['base'] == dict(circuit=.7) and arms['random']['faithfulness'] == .2


@pytest.mark.parametrize('moved', [False, True])
def test_heads_at_other_tokens_work_unless_one_asks_for_less(moved):
    model, tok = load('lab-s')
    p, heads = box_prompts(tok, 4, 0, 3, moved), all_heads(model)
    means = mean_activations(model, [box_prompts(tok, 4, 1, 3, moved).batch], heads)
    every = dict(fetcher=heads, detector=heads, reader=heads)
    at = p.at | dict(rest=other_tokens(p))
    places = torch.cat([*at.values()], 1).sort(1).values
    assert torch.equal(places, torch.arange(places.shape[1]).expand(4, -1))
    whole = run_logits(model, p.batch)
    same = circuit_logits(model, p.batch, by_place(every) | dict(rest=heads), means, at)
    assert torch.equal(same, whole)
    right = probability(p.labels)
    assert circuit_accuracy(model, p, every, means, probability) == right(whole)
    alone = circuit_logits(model, p.batch, by_place(every), means, p.at)
    assert circuit_accuracy(model, p, every, means, probability,
                            rest=False) == right(alone) != right(whole)


def test_each_group_is_pruned_beside_the_others_whole(monkeypatch):
    from ftlab.evaluators.mechanisms import entity_circuits as page
    seen = []
    right = lambda m, p, groups, *a: seen.append(groups) or 1.
    monkeypatch.setattr(page, 'circuit_accuracy', right)
    a, b, c = (Site('head', i, 0) for i in range(3))
    groups = dict(fetcher=(a,), detector=(b, c))
    assert pruned(None, None, groups, {}) == dict(fetcher=(), detector=())
    assert all(g['fetcher'] == (a,) or tuple(g['detector']) == (b, c) for g in seen)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match='boxes is 17'):
        box_prompts(TOK, 2, boxes=17)
    with pytest.raises(ValueError, match='asked must have 2 numbers from 0 to 2'):
        box_prompts(TOK, 2, boxes=3, asked=[0, 3])
    class Other: # of a model whose words are not one token each
        def convert_tokens_to_ids(self, word):
            return 0
        def convert_ids_to_tokens(self, i):
            return '<unk>'
    with pytest.raises(ValueError, match='the tokenizer has no token'):
        box_prompts(Other(), 2, boxes=3)
    with pytest.raises(ValueError, match="'answer' is no group"):
        by_place(dict(answer=()))
    with pytest.raises(ValueError, match='the models do not match'):
        cmap_accuracy(toy(), load('lab-s')[0], None, {})
    with pytest.raises(ValueError, match="'colour' is no property"):
        counterfactual(None, TOK, 'colour', 0)
    assert len(all_heads(toy())) == 8
