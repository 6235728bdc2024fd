"locft_bf: what its page cannot say about itself"
import json
import sys
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
import pytest
import torch
from torch.nn.functional import cross_entropy
from tiny import tiny
from toys import TOK, assert_resumes, classifier, label_data, same, toy, weights
from ftlab.adapters.editing.locft_bf import (ASK, DepthFirst, best_place, edit_scores, fact_edits,
                                             locft_bf, one_place, scan)
from ftlab.core.batches import collate
from ftlab.core.data import data as as_data
from ftlab.core.recipe import Recipe
from ftlab.core.tokens import encode_all
from ftlab.instruments.claims import SENSITIVITY_SEEDS, named_claim, own_code, read_result
from ftlab.instruments.rates import SEEDS
from ftlab.instruments.verdicts import check_reviewed, judged
from ftlab.lab.world import LabWorld
from ftlab.trainers.fit import fit

sys.path.append(str(Path(__file__).parents[2]/'bench'))
import edits as other_edits  # noqa: E402

PLACE = 'model.layers.1.mlp.down_proj.weight'


def edited(recipe, n=6, model=None, **more):
    how = dict(steps=6, batch_size=2, lr=1e-2, clip=None, progress=False)
    return fit(model or toy(), TOK, fact_edits(n).data(), recipe, **how | more)


# ---------- as the official code computes it

def test_the_run_is_that_of_the_official_loop():
    """The same batches through the official loss, mask and Adam (execute_ft): the mean over rows of each row's mean
    over its answer tokens, and a batch below the threshold passed over. To 1e-6 after 6 steps"""
    plain = sorted(r['loss'] for r in edited(locft_bf(1, enough=0.)).log)
    enough, seen = (plain[2] + plain[3])/2, []

    class Listen:
        def before_batch(self, state):
            seen.append({k: v.clone() for k, v in state.batches[0].items()})
    run = edited(locft_bf(1, enough=enough), callbacks=(Listen(),))
    model = toy()
    for n, p in model.named_parameters():
        p.requires_grad_(n == PLACE)
    opt = torch.optim.Adam([model.get_parameter(PLACE)], lr=1e-2)
    skipped = 0
    for b in seen:
        opt.zero_grad()
        logits = model(b['input_ids'], attention_mask=b['attention_mask']).logits
        on = b['labels'][:, 1:] != -100
        each = cross_entropy(logits[:, :-1].transpose(1, 2), b['input_ids'][:, 1:], reduction='none')
        loss = ((each*on).sum(1)/on.sum(1)).mean()
        if loss.item() >= enough:
            loss.backward()
            opt.step()
        else:
            skipped += 1
    assert 0 < skipped < len(seen) == 6
    ours, theirs = run.model.get_parameter(PLACE), model.get_parameter(PLACE)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert {n for n in run.delta.attached.changes()} == {PLACE}


def test_micro_batches_are_one_batch():
    whole, cut = (edited(locft_bf(1), accumulate=k) for k in (1, 2))
    a, b = (r.model.get_parameter(PLACE).detach() for r in (whole, cut))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert abs(whole.log[0]['loss'] - cut.log[0]['loss']) < 1e-5


def test_depth_first_reads_each_batch_in_one_go_and_all_equally_often():
    rows = encode_all(fact_edits(7).rows, TOK, 'text')
    how = dict(batch_size=2, steps=12, accumulate=1)
    state = SimpleNamespace(rows=rows, seed=3, pad_id=0, settings=how)
    source, got = DepthFirst(state), []
    for state.step in range(12):
        batch, = source.next(state)
        got.append(tuple(map(tuple, batch['input_ids'].tolist())))
    assert [got.count(g) for g in dict.fromkeys(got)] == [3]*4
    assert got == sorted(got, key=list(dict.fromkeys(got)).index), 'a batch came back'
    last = got[-1]
    assert last[0] == last[1], 'the last batch has one row, twice'


@pytest.mark.parametrize('pipeline', ['breadth', 'depth'])
def test_a_run_resumes(pipeline, tmp_path):
    assert_resumes(lambda **more: edited(locft_bf(1, pipeline=pipeline), **more), tmp_path, at=3)


def test_packed_rows_are_refused():
    with pytest.raises(ValueError, match='use packing=False'):
        edited(locft_bf(1), packing=True)


def test_an_edit_may_come_twice_contradict_another_or_be_alone():
    rows = fact_edits(2).rows
    for given in ([*rows, *rows], [rows[0], dict(rows[0], response='red')], rows[:1]):
        data = as_data(dict(train=given, validation=given[:1], test=given[:1]))
        for pipeline in ('breadth', 'depth'):
            run = fit(toy(), TOK, data, locft_bf(1, pipeline=pipeline), steps=4, batch_size=5,
                      progress=False)
            assert len(run.log) == 4 and list(run.delta.attached.changes()) == [PLACE]


def test_one_batch_of_all_makes_the_pipelines_equal():
    a, b = (edited(locft_bf(1, pipeline=p), n=2).model.get_parameter(PLACE) for p in ('breadth', 'depth'))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_classifier_has_one_label_a_row():
    run = fit(classifier(), TOK, label_data(), locft_bf(1), steps=2, batch_size=4, progress=False)
    moved = [n for n in run.delta.attached.changes() if 'classifier' not in n]
    assert moved == ['bert.encoder.layer.1.output.dense.weight']


# ---------- where

@pytest.mark.parametrize('family', 'llama qwen2 gemma gpt2 opt gpt_neox phi bert'.split())
def test_the_place_on_every_family(family):
    model = tiny(family)
    (name,) = one_place()(model)
    assert '.1.' in name and one_place(layer=0)(model).keys() != {name}
    block = one_place('block', 1)(model)
    assert name in block
    assert set(block) == {n for n, _ in model.named_parameters() if '.1.' in n}, 'a bias or a norm is missing'


def test_late_is_the_official_block_of_llama():
    for blocks, want in ((32, 22), (28, 19), (4, 2), (1, 0)):
        (name,) = one_place()(tiny('llama', num_hidden_layers=blocks))
        assert f'.layers.{want}.' in name


@pytest.mark.parametrize('place, says', [((9,), '2 blocks'), ((-1,), '2 blocks'), ((0, 'qkv'), 'it has q, k, v, o'),
                                         ((0, 'c_fc'), 'no part or role is called .c_fc.*, k, o, q, qkv')])
def test_a_place_that_is_not_there(place, says):
    with pytest.raises(ValueError, match=says):
        one_place(*reversed(place) if len(place) == 2 else ('down', *place))(toy())


def test_a_scan_leaves_the_model_as_it_was():
    model, was = toy(), weights(toy())
    asked = []
    def measure(m):
        asked.append(m)
        return dict(reliability=len(asked), kept=1.)
    found = scan(model, TOK, fact_edits(4).data(), measure, ('o', 'down', 'none'), steps=2,
                 batch_size=2)
    assert [(r['layer'], r['module']) for r in found] == [(0, 'o'), (0, 'down'), (1, 'o'), (1, 'down')]
    assert same(weights(model), was) and best_place(found) == found[-1]


def test_a_scan_takes_one_name_and_refuses_places_that_are_nowhere():
    how = dict(steps=1, batch_size=2, progress=False)
    rows = fact_edits(2).data()
    found = scan(toy(), TOK, rows, lambda m: {}, 'down', **how)
    assert found == [dict(layer=0, module='down'), dict(layer=1, module='down')]
    with pytest.raises(ValueError, match="modules is .'donw',.*the model has q, k, v, o"):
        scan(toy(), TOK, rows, lambda m: {}, ['donw'], **how)
    with pytest.raises(ValueError, match='layers has -1; the model has 2 blocks'):
        scan(toy(), TOK, rows, lambda m: {}, layers=[-1], **how)


def test_a_scan_restores_the_model_when_measuring_fails():
    model, was = toy(), weights(toy())
    with pytest.raises(ZeroDivisionError):
        scan(model, TOK, fact_edits(2).data(), lambda m: 1/0, ['down'], steps=2, batch_size=2,
             lr=1e-2)
    assert same(weights(model), was)
    edited(locft_bf(1), model=model)


# ---------- the edits

@pytest.mark.parametrize('n', [1, 40, 300])
def test_edits_are_facts_with_other_values_and_questions_beside_them(n):
    e, world = fact_edits(n, seed=5), LabWorld(0)
    said = {w.format(p=p, a=a): (p, a) for w in ASK for p, a in world.facts}
    assert len(e.rows) == len(e.changed) == len(e.paraphrase) == n
    for row, other in zip(e.rows, e.paraphrase):
        about = said[row['prompt']]
        assert about == said[other['prompt']] and about in e.changed and row['prompt'] != other['prompt']
        assert row['response'] == other['response'] != world.facts[about]
    people = {p for p, _ in e.changed}
    for rows, edited in ((e.near, True), (e.far, False)):
        for row in rows:
            about = said[row['prompt']]
            assert row['response'] == world.facts[about] and about not in e.changed
            assert (about[0] in people) == edited
    assert len(e.data().train) == n and e == fact_edits(n, seed=5) != fact_edits(n, seed=6)


def test_scores_are_those_of_the_answers(monkeypatch):
    import ftlab.adapters.editing.locft_bf as module
    e = fact_edits(10, asked=7)
    taught = {r['prompt']: r['response'] for r in (*e.rows, *e.far)}
    def scored(model, tok, rows):
        return [float(taught.get(r['prompt']) == r['response']) for r in rows]
    monkeypatch.setattr(module, 'answer_scores', scored)
    found = edit_scores(None, None, e, asked=5)
    assert {k: (len(v), sum(v)) for k, v in found.items()} == dict(
        reliability=(5, 5), paraphrase=(5, 0), near=(5, 0), far=(5, 5))


@pytest.mark.parametrize('wrong', [dict(tiers='oftn'), dict(tiers=('never',)), dict(asked=0),
                                   dict(asked=-1)])
def test_edits_of_people_that_no_model_knows_or_without_questions(wrong):
    with pytest.raises(ValueError, match='tiers are of often, sometimes, rarely, atlas, and asked is 1 or more'):
        fact_edits(3, **wrong)
    assert fact_edits(3, tiers='often') == fact_edits(3, tiers=('often',))


@pytest.mark.parametrize('n', [0, 10**4])
def test_too_many_edits(n):
    with pytest.raises(ValueError, match='at most half'):
        fact_edits(n)


@pytest.mark.parametrize('wrong, says', [
    (dict(pipeline='df'), "pipeline is 'df'; it must be breadth or depth"), (dict(enough=-1.), 'enough is -1'),
    (dict(enough=float('nan')), 'enough is nan')])
def test_wrong_arguments_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        locft_bf(**wrong)


def test_full_fine_tuning_has_the_same_loss_on_answers_of_one_length():
    "The lab's facts are one word and an end mark: the mean over rows is the mean over tokens"
    ours, plain = edited(locft_bf(1)), edited(Recipe('down', select=one_place(layer=1)), schedule='constant')
    # rounded to a decimal, two that are equal may fall on either side of its edge
    assert [r['loss'] for r in ours.log] == pytest.approx([r['loss'] for r in plain.log], rel=1e-6)
    labels = collate(encode_all(fact_edits(3).rows, TOK, 'text'), 0)['labels']
    assert labels.ne(-100).sum(1).tolist() == [2]*3


# ---------- beside other edits (bench/edits.py)

def test_other_edits_differ_in_what_trains_alone():
    wrong = [k for k, ok in other_edits.identities().items() if not ok]
    assert not wrong and len(other_edits.ARMS) == 5


def test_other_edits_are_asked_on_seeds_of_their_own_and_beside_the_first_claim():
    claim, first = other_edits.claim(), named_claim('locft_bf')
    assert not set(claim.spec['seeds']) & {*first.spec['seeds'], *SEEDS, *SENSITIVITY_SEEDS}
    assert set(claim.spec['arms']) == {*other_edits.ARMS, 'base'} and claim.runs
    of = other_edits.first()
    assert claim.spec['steps'] == of.PASSES and len(of.edits_of(25, 'test').rows) == of.EDITS
    cells = read_result(first)['cells'].values()
    given = {c['metric']: c['trivial']['value'] for c in claim.spec['contrast']
             if 'value' in c['trivial']}
    assert given == {k: round(fmean(c['depth_1@0.001'][k] for c in cells), 3) for k in given}
    assert set(given) == {'forgetting', 'locality'}


def test_the_result_on_other_edits_belongs_to_its_script_and_follows_from_its_cells():
    found, claim = json.loads(other_edits.OUT.read_text()), other_edits.claim()
    check_reviewed(claim)
    assert found['code'] == own_code(claim), 'the claim or its script changed: run it again'
    assert found['first'] == own_code(named_claim('locft_bf')), 'its edits or its measure changed'
    assert (found['verdict'], found['reason']) == judged(found)
    spec = claim.spec
    assert (found['sentence'], found['seeds']) == (spec['sentence'], spec['seeds'])
    assert len(found['contrasts']) == len(spec['contrast'])
    for said, row in zip(spec['contrast'], found['contrasts']):
        assert [row['name'], *row['arms']] == [said['name'], said['treatment'], said['baseline']]
        for side, arm in zip(('treatment', 'baseline'), row['arms']):
            of = [c[f'{arm}@{row["rates"][arm]:g}'] for c in found['cells'].values()]
            assert row[side] == pytest.approx([c[row['metric']] for c in of], abs=1e-6)
            assert not any(c['error'] for c in of)
