"Same-answer rates: what is cut, filled and reworded, what counts as the same, stand-ins whose rates are known, errors"
import json
import tomllib
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from ftlab.evaluators.mechanisms.cot_faithfulness import (by_share, continued, cot_faithfulness,
                                                          fillers, forced,
                                                          joined, own_chains, same_rate, split_at)
from ftlab.instruments.claims import script_of
from ftlab.instruments.verdicts import read_claim
from ftlab.map import measured
from ftlab.papers import claims_folder
from tests.toys import TOK, classifier, same, toy, weights

SPLIT = split_at('answer :', ';')
STEPS = {'sort b a': ['first : b a ;', 'sort : a b ;', 'last : b ;'],
         'sort c a': ['sort : a c ;', 'last : c ;']}


class StandIn(torch.nn.Module):
    "Writes the steps above; after the cue it gives the last letter of the question (knows), or of what it has written"
    def __init__(self, knows, silent=()):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.knows, self.silent, self.seen = knows, silent, []

    def can_generate(self):
        return True

    def says(self, text):
        question, _, begun = text.partition('<assistant>')
        question = question.rpartition('<user>')[2].strip()
        steps = STEPS[question]
        self.seen.append((question, begun.strip()))
        if SPLIT.cue not in begun:
            return question[-1] if question in self.silent else joined(*steps, SPLIT.cue,
                                                                       steps[-1].split()[-2])
        right = steps[-1].split()[-2]
        return right if self.knows else next((w for w in begun.split()[::-1] if w in 'abc'), '?')

    def generate(self, input_ids, **how):
        new = [TOK(self.says(TOK.decode(x))).input_ids + [TOK.eos_token_id] for x in input_ids]
        most = max(map(len, new))
        return torch.cat([input_ids, torch.tensor([n + [0]*(most - len(n)) for n in new])], 1)


def asked(model, **how):
    return cot_faithfulness(model, TOK, list(STEPS), SPLIT, SPLIT.cue, filler='.', **how)


def test_a_model_that_ignores_its_chain_has_one_everywhere():
    found = asked(StandIn(True), reword=lambda s: s.replace('last', 'final'))
    assert found['same'] == dict(early=1., filler=1., paraphrase=1.)
    assert found['full'] == found['written'] == 1


def test_a_model_that_reads_its_chain_has_the_rate_that_can_be_counted_by_hand():
    found = asked(StandIn(False), reword=lambda s: s.replace('last', 'biggest'))
    # 'b': nothing, 'b a', 'a b' -> ?, a, b; 'c': nothing, 'a c' -> ?, c
    assert found['same']['early'] == found['same']['filler'] == pytest.approx((1/3 + 1/2)/2)
    assert same_rate(found['cases']['early'], least=1) == pytest.approx((1/2 + 1)/2)
    assert found['same']['paraphrase'] == found['full'] == 1
    # own answers b, c; those after a cut ?, a, b, ?, c: two of ten pairs agree
    assert found['chance']['early'] == pytest.approx(2/10)
    assert found['kept']['early'] == {0.: 0., .25: 0., .5: 1.}


@pytest.mark.parametrize('steps, cut', [('b a ;', 0), ('b a ; sort : a b ;', 1)])
def test_in_the_claim_a_run_whose_chains_have_one_step_is_the_worst(steps, cut):
    "There is nothing to be cut behind it; so it counts as faithful, which is against the claim"
    class Writes(StandIn):
        def says(self, text):
            answer = text.partition('<assistant>')[0].split()[-3] # the last letter of the list
            return answer if SPLIT.cue in text else joined(steps, SPLIT.cue, answer)
    claim = script_of(read_claim(claims_folder()/'cot_faithfulness'))
    asked = [r['prompt'] for r in claim.rows(24, 'test', 0, 'steps')]
    found = claim.rates(Writes(True), TOK, asked)
    assert (found['written'], found['cut'], found['filled']) == (1, cut, cut)
    assert found.keys() == claim.NOTHING.keys()


def test_what_the_model_is_asked_after_each_change():
    model = StandIn(True)
    asked(model, reword=lambda s: s.replace('last', 'biggest'))
    begun = [b for q, b in model.seen if q == 'sort c a']
    assert begun[0] == '' and begun[1] == 'sort : a c ; last : c ; answer :'
    assert set(begun[2:]) == {'answer :', 'sort : a c ; answer :', '. . . . . . . . . answer :',
                              'sort : a c ; . . . . answer :',
                              'sort : a c ; biggest : c ; answer :'}


def test_answers_without_steps_are_left_out_and_counted():
    found = asked(StandIn(False, silent=('sort b a',)))
    assert found['written'] == .5 and {i for i, *_ in found['cases']['early']} == {0}
    with pytest.raises(ValueError, match='none of the 2 answers has steps.*check split'):
        asked(StandIn(False, silent=tuple(STEPS)))


def test_a_missing_answer_is_never_the_same():
    assert SPLIT('a ; b ;') == (['a ;', ' b ;'], '') and SPLIT('answer : c') == ([], 'c')
    assert split_at('So')('one\ntwo\nSo 7\nbye') == (['one\n', 'two\n'], '7')
    model = StandIn(False)
    model.says = lambda text: 'a ; answer : b' if SPLIT.cue not in text else ''
    assert asked(model)['same'] == dict(early=0., filler=0.)


def test_pieces_are_joined_and_filled():
    assert joined('', 'a ;', '', 'b\n', 'c') == 'a ; b\nc' and joined() == ''
    assert fillers('...', ['a b ;', 'c ;'], TOK).split() == ['...']*5
    assert same_rate([], 1) is None
    assert by_share([(0, 3, 4, True), (0, 0, 4, False)]) == {0.: 0., .75: 1.}


def test_a_real_model_is_read_only_and_goes_on_where_its_answer_begins():
    model = toy().train()
    before, rng = weights(model), torch.get_rng_state()
    texts = forced(model, TOK, ['sort b a', 'reverse a b c'], ['sort : a', ''], 4)
    assert texts[0].startswith('sort : a') and same(before, weights(model)) and model.training
    assert torch.equal(rng, torch.get_rng_state())
    row = TOK('<bos> <user> sort b a <assistant>').input_ids
    once = continued(model, [row], 6)[0]
    assert continued(model, [row + once[:2]], 4)[0] == once[2:]
    rows = [row, row[:3], row]
    assert continued(model, rows, 6, batch_size=1) == continued(model, rows, 6)
    assert continued(model, [row], 6, stops=[once[2]])[0] == once[:once.index(once[2])]
    assert own_chains(StandIn(True), TOK, ['sort b a'], SPLIT)[0].answer == 'b'


def test_what_it_refuses():
    for prompts, cue, said in (('sort b a', 'answer :', 'list'), ([], 'answer :', 'at least one'),
                               (['sort b a'], ' ', 'finishes a cut chain')):
        with pytest.raises(ValueError, match=said):
            cot_faithfulness(toy(), TOK, prompts, SPLIT, cue)
    with pytest.raises(ValueError, match='BertForSequenceClassification writes no text'):
        continued(classifier(), [[1, 2]], 2)
    for wrong, said in ((dict(cue='therefore :'), "cue is 'therefore :', which"),
                        (dict(cue=None), 'cue is empty'), (dict(filler='etc'), "filler is 'etc'")):
        with pytest.raises(ValueError, match=said):
            cot_faithfulness(StandIn(True), TOK, list(STEPS), SPLIT,
                             **dict(cue=SPLIT.cue, filler='.') | wrong)


def test_a_model_with_few_positions_loses_the_beginning_of_the_prompt_not_of_the_chain():
    small = GPT2LMHeadModel(GPT2Config(vocab_size=len(TOK), n_positions=32, n_embd=16, n_layer=1,
                                       n_head=2))
    start = 'sort : a b c d ; answer :'
    said = forced(small, TOK, ['sort ' + 'a b c d '*9, 'sort a b'], [start, start], 8)
    assert all(t.startswith(start) for t in said)
    with pytest.raises(ValueError, match='begins with 40 tokens leaves no room.*32 positions'):
        forced(small, TOK, ['sort a b'], ['a b c d '*10], 8)


def test_a_model_with_an_encoder_is_refused():
    both = T5ForConditionalGeneration(T5Config(vocab_size=len(TOK), d_model=16, d_kv=8, d_ff=16,
                                               num_layers=1,
                                               num_heads=2))
    with pytest.raises(ValueError, match='T5ForConditionalGeneration reads its prompt in an encoder'):
        continued(both, [[1, 2]], 2)


def test_the_claim_says_what_was_measured_of_lab_l():
    found = json.loads(measured('lab_l_chains.json').read_text())
    claim = tomllib.loads((claims_folder()/'cot_faithfulness'/'claim.toml').read_text())
    words = next(w for w in claim['left_out'] if 'lab-l writes' in w)
    of = lambda key, *arms: sorted(f'{by[a][key]:.2f}'[1:] for by in found['taught'].values()
                                   for a in arms)
    before, after = of('without', 'base'), of('without', 'answers@0.001', 'answers@0.01')
    score, same = (f'{found["as_it_is"][k]:.2f}'[1:]
                   for k in ('chain-direct', 'chain-direct, always the same'))
    for said in (f'{score} right at once, where always the same number has {same}',
                 f'{before[0]} to {before[-1]} right at once before',
                 f'{after[0]} to {after[-1]} after',
                 'full ' + ' and '.join(of('full', 'answers@0.001'))):
        assert said in words, said
    assert of('written', 'answers@0.01') == ['.00', '.00'] and 'no chain is left' in words
