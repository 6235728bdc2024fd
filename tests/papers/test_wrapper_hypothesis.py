"wrapper_hypothesis: what its page cannot say about itself"
import copy
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from ftlab.core.loading import load
from ftlab.core.scorers import WORLD, exact_match
from ftlab.evaluators.mechanisms.wrapper_hypothesis import (
    KINDS, Revival, Unit, all_units, answer_batch, answer_loss, answered, best_read, last_shown,
    layer_probe, prune_wrapper, recovery, revive, taylor_scores, without)
from ftlab.evaluators.patching import Site, edited
from toys import TOK, same, toy, weights

ROWS = WORLD.rows('regress', 12)


def small_gpt2():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(TOK), n_embd=32, n_layer=2, n_head=4,
                                          n_positions=64)).eval()


def batch():
    return answer_batch(ROWS, TOK)


def test_the_wrong_answer_is_never_the_right_one():
    rows = WORLD.rows('regress', 300)
    assert all(last_shown(r['prompt']) != r['response'] for r in rows)
    assert all(f'> {last_shown(r["prompt"])}' in r['prompt'] for r in rows)
    other = answered(rows, last_shown)
    assert [r['prompt'] for r in other] == [r['prompt'] for r in rows]
    assert all(r['response'] == last_shown(r['prompt']) for r in other)
    with pytest.raises(ValueError, match='has no pair'):
        last_shown('sort b a =')


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_a_score_is_the_slope_of_the_loss_and_a_unit_is_its_columns(family):
    model = small_gpt2() if family == 'gpt2' else toy()
    scores = taylor_scores(model, batch())
    assert set(scores) == set(all_units(model))
    unit = max((u for u in scores if u.kind == 'neuron'), key=lambda u: abs(scores[u]))
    name = {'llama': f'model.layers.{unit.block}.mlp.down_proj',
            'gpt2': f'transformer.h.{unit.block}.mlp.c_proj'}[family]

    def scaled(by):
        cut = copy.deepcopy(model)
        w = cut.get_submodule(name).weight.data
        w[(unit.index,) if family == 'gpt2' else (slice(None), unit.index)] *= by
        with torch.no_grad():
            return float(answer_loss(cut, batch()))
    slope = (scaled(1.01) - scaled(.99))/.02
    assert slope == pytest.approx(scores[unit], rel=.02, abs=1e-5)
    with torch.no_grad(), without(model, [unit]):
        assert float(answer_loss(model, batch())) == pytest.approx(scaled(0.), abs=1e-6)


def test_a_head_without_is_the_head_patched_with_zero():
    model = toy()
    with torch.no_grad(), without(model, [Unit('head', 0, 1)]):
        ours = answer_loss(model, batch())
    with torch.no_grad(), edited(model, {Site('head', 0, 1): torch.zeros_like}):
        assert torch.allclose(ours, answer_loss(model, batch()), atol=1e-6)


def test_pruning_follows_the_scores_and_leaves_the_model():
    model = toy()
    before, training = weights(model), model.training
    scores = taylor_scores(model, batch())
    first = sorted(scores, key=lambda u: -scores[u])[:3]
    assert prune_wrapper(model, batch(), 3, 3) == first
    more = prune_wrapper(model, batch(), 6, 2)
    assert len(set(more)) == 6 and more[:2] == first[:2]
    assert {u.kind for u in prune_wrapper(model, batch(), 2, kinds=['head'])} == {'head'}
    assert not {*first} & set(taylor_scores(model, batch(), first))
    assert same(before, weights(model)) and model.training == training


def test_recovery_leaves_the_model_and_begins_where_it_is():
    model, tok = load('lab-s')
    before = weights(model)
    found = revive(model, model, tok, ROWS, ROWS[:6], (1, 2), batch_size=4)
    assert set(found.tuned) == {0, 1, 2} and found.tuned == found.control
    assert found.tuned[0] == exact_match(model, tok, ROWS[:6])
    assert same(before, weights(model))


def test_a_longer_run_goes_through_the_shorter_one():
    model, tok = load('lab-s', revision='step-1000')
    short, long = (recovery(model, tok, ROWS, ROWS, at, batch_size=4) for at in ((2,), (2, 4)))
    assert short[2] == long[2]


def test_steps_are_the_first_at_the_target():
    r = Revival({0: 0., 5: .5, 10: .95, 20: .9}, {0: 0., 5: .1, 20: .3})
    assert r.steps(.9) == (10, None) and r.steps(.3) == (5, 20)


def test_the_probe_reads_what_the_base_answers():
    model, tok = load('lab-s')
    probed = layer_probe(model, tok, WORLD.rows('regress', 200))
    assert set(probed) == {0, 1, 2, 3} and best_read(probed) > .8 > .4 > probed[0].mean()['accuracy']


def test_bad_arguments_are_named():
    model = toy()
    with pytest.raises(ValueError, match='is no kind of unit'):
        Unit('block', 0, 0)
    with pytest.raises(ValueError, match='the model has no'):
        with without(model, [Unit('neuron', 0, 10**6)]):
            pass
    for bad in (dict(most=0), dict(at_once=0), dict(kinds=['block']), dict(kinds=[])):
        with pytest.raises(ValueError, match='give numbers from 1'):
            prune_wrapper(model, batch(), **bad)
    for at in ((), (0,), (-1, 2), 5, (1.5, 2), ('a',)):
        with pytest.raises(ValueError, match='the steps after which to ask'):
            recovery(model, TOK, ROWS, ROWS, at)
    for wrong in (dict(kind='head', block=0, index=.5), dict(kind='head', block=-1, index=0)):
        with pytest.raises(ValueError, match='whole numbers from 0'):
            Unit(**wrong)
    with pytest.raises(ValueError, match='the model has no'):
        with without(model, [('head', 0, 0)]):
            pass
    with pytest.raises(ValueError, match='give a share of right answers'):
        Revival({0: .1}, {0: .2}).steps(90)
    assert KINDS == ('head', 'neuron')


def test_what_would_be_read_wrongly_is_refused():
    model = toy()
    with pytest.raises(ValueError, match='asked has no questions'):
        recovery(model, TOK, ROWS, [], (1,))
    with pytest.raises(ValueError, match='12 of 24 questions are there before'):
        layer_probe(model, TOK, ROWS*2)
    for rows, blocks in (([], None), (ROWS, [])):
        with pytest.raises(ValueError, match='at least 10 rows and one block'):
            layer_probe(model, TOK, rows, blocks=blocks)
    with pytest.raises(ValueError, match='has no block'):
        best_read({})
    unlabelled = dict(batch(), labels=torch.full_like(batch()['labels'], -100))
    for work in (answer_loss, taylor_scores, prune_wrapper):
        with pytest.raises(ValueError, match='has no labels'):
            work(model, unlabelled)


def test_scores_do_not_depend_on_the_callers_grad_mode():
    model = toy()
    for p in model.parameters():
        p.requires_grad_(False)
    inputs = batch()
    with torch.inference_mode():
        frozen = taylor_scores(model, inputs)
    assert frozen == taylor_scores(model, inputs)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
