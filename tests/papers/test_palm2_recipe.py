"The PaLM 2 recipe: its estimates against brute force, its scores against plain text, what its stages learn, errors"
import itertools
import math
import random
from types import SimpleNamespace
import pytest
import torch
import torch.nn.functional as F
from ftlab.core.data import Data
from ftlab.core.tokens import IGNORE, encode
from ftlab.core.recipe import Recipe
from ftlab.trainers.curation.palm2_recipe import (ENGLISH, LAB, Asking, clusters, contrasted,
                                                  contrasts, encode_cases, evaluator_scores,
                                                  evaluator_stage, final_answer, judging, log_odds,
                                                  outcomes, pair_losses, palm2_recipe, pass_at_k,
                                                  rerank, sample_solutions, verdict_words)
from ftlab.trainers.fit import fit
from tests.toys import TOK, Texts, lab_data, label_data, same, toy, weights


@pytest.mark.parametrize('n,right', [(1, 0), (1, 1), (5, 0), (5, 2), (6, 6), (7, 3)])
def test_pass_at_k_counts_all_choices(n, right):
    hits = [i < right for i in range(n)]
    for k in range(1, n + 1):
        every = list(itertools.combinations(hits, k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, every))/len(every))


def test_pass_at_k_is_unbiased_for_fresh_draws():
    p, n, k = .3, 6, 3
    chance = [math.comb(n, c)*p**c*(1 - p)**(n - c) for c in range(n + 1)]
    assert sum(q*pass_at_k(n, c, k) for c, q in enumerate(chance)) == pytest.approx(1 - (1 - p)**k)


def test_groups_are_sorted_by_size_and_then_by_the_first_draw():
    assert clusters(['b', 'a', None, 'a', 'b', 'c']) == [[0, 4], [1, 3], [5]]
    assert clusters([]) == clusters([None, None]) == []


def test_reranking_is_what_a_search_over_all_groups_finds():
    r = random.Random(0)
    for _ in range(200):
        said = [r.choice('abcde') for _ in range(12)]
        scores, groups = [r.random() for _ in said], clusters(said)
        for top, weighted in itertools.product((1, 2, 3, None), (False, True)):
            value = sum if weighted else max
            wanted = max(groups[:top], key=lambda g: value(scores[i] for i in g))
            assert rerank(groups, scores, top, weighted)[0] == wanted
        assert rerank(groups) == rerank(groups, [.5]*12) == groups
        assert rerank(groups, scores, 1) == groups[:1]


def test_every_way_of_handing_in_an_answer():
    said = [['x ; 7', 'x ; 7', 'y ; 5', 'z ; 9', 'x ; 7'],
            ['x ; 1', 'x ; 2', 'x ; 2', ' ', 'x ; 3']]
    found = outcomes(said, ['g ; 9', 'g ; 2'], [[.1, .2, .3, .9, .1], [.8, .1, .1, 1., .2]], top=2)
    assert found == {'pass@1': [.2, .4], 'pass@N': [1, 1], 'maj': [0, 1], 'maj top': [0, 1],
                     'rerank': [0, 0], 'rerank all': [1, 0],
                     'weighted': [0, 0], 'weighted all': [1, 0]}
    nothing = outcomes([['', ';']], ['1'], [[1., 1.]])
    assert not any(v[0] for v in nothing.values())
    assert final_answer('a ; b #### 1  2 ; 3') == '3' and final_answer('1  2') == '1 2'
    assert final_answer(';') is None


def test_solutions_belong_to_their_questions_and_leave_the_random_state():
    model, prompts = toy().train(), ['sort b a', 'reverse a b c d e f a b', 'max a']
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    said = sample_solutions(model, TOK, prompts, 4, max_new_tokens=6, seed=1, batch_size=5)
    assert [len(s) for s in said] == [4, 4, 4] and model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert said == sample_solutions(model, TOK, prompts, 4, max_new_tokens=6, seed=1, batch_size=5)
    cold = sample_solutions(model, TOK, prompts, 3, 1e-4, 6)
    assert all(len(set(s)) == 1 for s in cold) and len(set(said[0])) > 1


def test_the_score_is_the_share_of_the_right_word():
    model, cases = toy(), [('sort b a', 'a b'), ('max a c b d', 'c'), ('sort b a', 'b')]
    words = verdict_words(TOK, LAB)
    assert TOK.convert_ids_to_tokens(words) == ['good', 'bad']
    for (p, s), score in zip(cases, evaluator_scores(model, TOK, cases, batch_size=2)):
        row = encode(LAB.row(p, s), TOK, 'text')
        at = next(i for i, l in enumerate(row['labels']) if l != IGNORE)
        logits = model(torch.tensor([row['input_ids'][:at]])).logits[0, -1].detach()
        assert float(score) == pytest.approx(float(logits[list(words)].softmax(-1)[0]), abs=1e-5)
    train = toy().train()
    evaluator_scores(train, TOK, cases)
    assert train.training


def test_a_case_ends_in_its_verdict_and_loses_its_beginning():
    case = [('sort ' + 'a b '*60, 'a b')]
    for right, word in ((True, 'good'), (False, 'bad')):
        whole, cut = (encode_cases(case, TOK, LAB, right, limit)[0] for limit in (None, 12))
        assert cut['input_ids'] == whole['input_ids'][-12:] and len(whole['input_ids']) > 100
        assert [l for l in cut['labels'] if l != IGNORE] == TOK.convert_tokens_to_ids([word])
    assert evaluator_scores(toy(), TOK, case).shape == (1,)


def test_losses_are_those_of_the_formulas():
    g = torch.Generator().manual_seed(0)
    right, wrong = torch.randn(2, 50, generator=g)
    S = torch.sigmoid
    torch.testing.assert_close(pair_losses(right, wrong, 'margin', .4),
                               (S(wrong).log() - S(right).log() + .4).clamp(min=0))
    torch.testing.assert_close(pair_losses(right, wrong, 'pairwise'), -S(right - wrong).log())


def test_the_margin_loss_loses_its_pull_where_both_scores_are_near_1():
    both = torch.full((2, 1), 9., requires_grad=True)
    pull = lambda loss: float(torch.autograd.grad(pair_losses(*both, loss).sum(), both)[0][0])
    assert abs(pull('margin')) < 1e-3 and pull('pairwise') == pytest.approx(-.5)


@pytest.mark.parametrize('loss', ['pointwise', 'pairwise', 'margin'])
def test_the_loss_is_a_mean_over_pairs_however_they_are_cut(loss):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 5, 20, generator=g)
    y = torch.full((8, 5), IGNORE)
    for i, at in enumerate([4, 3, 2, 4, 4, 1, 2, 3]):
        y[i, at] = 7 if i < 4 else 9
    odds = torch.stack([logits[i, int((y[i] != IGNORE).nonzero()) - 1, [7, 9]] for i in range(8)])
    torch.testing.assert_close(log_odds(logits, y, (7, 9)), odds[:, 0] - odds[:, 1])
    objective = judging((7, 9), loss, .5)
    def of(*parts):
        batches = [dict(labels=y[p]) for p in parts]
        states = [SimpleNamespace(batch=b, batches=batches, forward=lambda p=p: logits[p])
                  for b, p in zip(batches, parts)]
        return sum(map(objective, states))
    whole, halves = of(list(range(8))), of([0, 1, 4, 5], [2, 3, 6, 7])
    torch.testing.assert_close(whole, halves)
    d = odds[:, 0] - odds[:, 1]
    said = y[y != IGNORE]
    before = (y != IGNORE).int().argmax(1) - 1
    wanted = dict(pairwise=lambda: F.softplus(d[4:] - d[:4]).mean(),
                  margin=lambda: F.relu(F.logsigmoid(d[4:]) - F.logsigmoid(d[:4]) + .5).mean(),
                  pointwise=lambda: F.cross_entropy(logits[torch.arange(8), before], said))
    torch.testing.assert_close(whole, wanted[loss]())


def test_pairs_are_of_one_question_and_each_is_there_once():
    problems, golds = ['p', 'q', 'r'], ['g ; 1', 'g ; 2', 'g ; 3']
    said = [['a ; 1', 'b ; 2', 'a ; 1', 'c ; 3', 'd ; 1'], ['x ; 1', ''], ['x ; 3', 'y ; 3']]
    found = contrasts(problems, golds, said)
    assert set(found) == {('p', 'a ; 1', 'b ; 2'), ('p', 'a ; 1', 'c ; 3'), ('p', 'd ; 1', 'b ; 2'),
                          ('p', 'd ; 1', 'c ; 3'), ('q', 'g ; 2', 'x ; 1'), ('q', 'g ; 2', '')}
    assert len(found) == 6
    few = contrasts(problems, golds, said, most=1)
    assert [p for p, *_ in few] == ['p', 'q'] and few == contrasts(problems, golds, said, most=1)


@pytest.mark.parametrize('loss', ['pointwise', 'pairwise', 'margin'])
def test_an_evaluator_learns_what_pairs_show(loss):
    pairs = tuple((p, 'a b', 'b a') for p in ('sort b a', 'max a', 'last b a', 'count a b'))
    model, words = toy(), verdict_words(TOK, LAB)
    recipe = Recipe('evaluator', source=contrasted(pairs, LAB), objective=judging(words, loss))
    fit(model, TOK, lab_data(), recipe, steps=30, batch_size=4, lr=1e-2, progress=False)
    right, wrong = (evaluator_scores(model, TOK, [('max b c', s)]) for s in ('a b', 'b a'))
    assert right > wrong


def test_the_stages_write_judge_and_write():
    look, model = Texts(), toy()
    before = weights(model)
    run = fit(model, TOK, lab_data(), palm2_recipe(samples=2, questions=6), steps=4, batch_size=4,
              progress=False, callbacks=(look,))
    first, judged, last = look.seen
    assert len(first) == len(last) == 4 and len(judged) == 8 and len(run.log) == 4
    assert [t.split()[-1] for t in judged] == ['good']*4 + ['bad']*4
    assert not same(before, weights(model))
    stage = evaluator_stage(samples=2, questions=6)(context())
    assert stage.name == 'evaluator' and {p for p, *_ in stage.source.pairs} <= {
        r['prompt'] for r in lab_data().train}


def context(data=None):
    return SimpleNamespace(model=toy(), tok=TOK, data=data or lab_data(), seed=0)


def test_what_it_refuses():
    for wrong in (dict(loss='best'), dict(samples=0), dict(samples=1.5), dict(most=0),
                  dict(questions=-1), dict(temperature=0.), dict(margin=-1.),
                  dict(margin=math.nan), dict(shares=(1., 1.)), dict(shares=(1., 0., 1.))):
        with pytest.raises(ValueError, match='must be'):
            palm2_recipe(**wrong)
    with pytest.raises(ValueError, match='of kind'):
        evaluator_stage()(context(label_data()))
    with pytest.raises(ValueError, match='nothing is to be told apart'):
        evaluator_stage(answer=lambda s: 'the same', samples=2)(context())
    for n, temperature in ((0, 1.), (1.5, 1.), (2, 0.), (2, math.inf)):
        with pytest.raises(ValueError, match='must be a whole number'):
            sample_solutions(toy(), TOK, ['max a'], n, temperature)
    for n, right, k in ((3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)):
        with pytest.raises(ValueError, match='must be 0 to n'):
            pass_at_k(n, right, k)
    groups = clusters('abca')
    for scores, how, said in (([1., 2.], {}, 'one score for each'), ([math.nan]*4, {}, 'NaN'),
                              (None, dict(top=0), 'from 1'),
                              ([-1.]*4, dict(weighted=True), 'negative where scores are added')):
        with pytest.raises(ValueError, match=said):
            rerank(groups, scores, **how)
    for golds, scores in ((['1'], None), (['1', '2'], [[1.]])):
        with pytest.raises(ValueError, match='equally many'):
            outcomes([['1'], ['2']], golds, scores)
    for asking in (('{problem} is', 'good', 'bad'), ('{problem} {solution}', 'good', 'good')):
        with pytest.raises(ValueError, match='must differ'):
            Asking(*asking)
    with pytest.raises(ValueError, match='same token'):
        verdict_words(TOK, ENGLISH) # the lab's vocabulary has neither word
    for loss, wrong in (('pointwise', 2), ('margin', 3)):
        with pytest.raises(ValueError, match='shapes must be equal'):
            pair_losses(torch.zeros(2), torch.zeros(wrong), loss)
    with pytest.raises(ValueError, match='shorter'):
        contrasts(['p', 'q'], ['1', '2'], [['1']])


def test_without_questions_all_are_drawn_for():
    rows = lab_data().train[:5]
    data = Data(rows, rows[:2], rows[:2], 'text')
    pairs = evaluator_stage(samples=3)(context(data)).source.pairs
    assert {p for p, *_ in pairs} == {r['prompt'] for r in rows}
