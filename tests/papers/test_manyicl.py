"manyicl: what its page cannot say about itself"
import pytest
import torch
from ftlab.core.data import data
from ftlab.core.recipe import Recipe
from ftlab.core.tokens import encode
from ftlab.methods import dft, lora
from ftlab.trainers.fit import fit
from ftlab.trainers.losses.manyicl import conversation, manyicl
from toys import TOK, assert_resumes, label_data, toy

SETTINGS = dict(steps=4, batch_size=4, lr=1e-3, seed=0, progress=False)
ROWS = [dict(prompt=f'{k} {a} {b} =', response=f'{b} {a}' if k == 'reverse' else a, task=k)
        for k in ('reverse', 'last') for a in 'abcdef' for b in 'abcdef']


class Seen:
    "Keeps all batches, and the gradient and loss of the first step"

    def __init__(self):
        self.batches, self.grads = [], None

    def after_backward(self, state):
        if self.grads is None:
            self.grads = [p.grad.clone() for p in state.attached.parameters().values()]
            self.loss = state.log[-1]['loss'] if state.log else None

    def after_step(self, state):
        self.batches += state.batches


def turns(ids) -> list[tuple[str, str]]:
    "The questions and answers of a line"
    parts = TOK.decode(ids).replace('<pad>', '').replace('<bos>', '').split('<user>')[1:]
    return [tuple(x.replace('<eos>', '').strip() for x in p.split('<assistant>')) for p in parts]


def drawn(recipe, rows=ROWS, **more) -> Seen:
    seen = Seen()
    d = data(dict(train=rows, validation=rows[:2], test=rows[:2]), carry=['task'])
    fit(toy(), TOK, d, recipe, callbacks=(seen,), **SETTINGS | more)
    return seen


def alone(model, shown, row) -> tuple[torch.Tensor, int]:
    "The loss of one answer after examples, as a sum over its tokens: written out, with no labels but its own"
    text = '<bos>' + ''.join(f' <user> {p} <assistant> {r} <eos>' for p, r in shown)
    before = TOK(f'{text} <user> {row[0]} <assistant>', add_special_tokens=False).input_ids
    answer = TOK(f' {row[1]} <eos>', add_special_tokens=False).input_ids
    logits = model(torch.tensor([before + answer])).logits[0].log_softmax(-1)
    return -sum(logits[len(before) + k - 1, i] for k, i in enumerate(answer)), len(answer)


@pytest.mark.parametrize('targets', ['all', 'last'])
def test_the_gradient_is_that_of_each_answer_after_the_examples_before_it(targets):
    seen, model = drawn(manyicl(3, targets)), toy()
    total, n = 0., 0
    for ids in seen.batches[0]['input_ids']:
        own = turns(ids)
        for i in range(len(own)) if targets == 'all' else [len(own) - 1]:
            loss, tokens = alone(model, own[:i], own[i])
            total, n = total + loss, n + tokens
    theirs = torch.autograd.grad(total/n, list(model.parameters()))
    for a, b in zip(seen.grads, theirs):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_examples_are_of_the_same_task_and_no_question_comes_twice():
    plain, many = drawn(Recipe(), steps=12), drawn(manyicl(5), steps=12)
    last = [turns(r)[0] for b in plain.batches for r in b['input_ids']]
    lines = [turns(r) for b in many.batches for r in b['input_ids']]
    assert [x[-1] for x in lines] == last, 'the last rows come in the usual order'
    task = {r['prompt']: r['task'] for r in ROWS}
    for line in lines:
        assert len(line) == 6 == len(set(line))
        assert len({task[q] for q, _ in line}) == 1
    assert len({x[0] for x in lines}) > 25, 'examples are drawn, not the first ones'


def test_rows_of_one_question_are_no_examples_of_each_other():
    rows = [dict(prompt='last a b =', response=x, task='t') for x in 'bcdef']
    rows += [dict(prompt=f'last {x} {x} =', response=x, task='t') for x in 'abc']
    for b in drawn(manyicl(7), rows, steps=10).batches:
        for ids in b['input_ids']:
            asked = [q for q, _ in turns(ids)]
            assert len(asked) == len(set(asked)) == 4, 'there are four questions'


def test_what_does_not_fit_is_left_out_and_the_last_question_stays_whole():
    whole = len(encode(ROWS[0], TOK, 'text')['input_ids'])
    for limit, examples in ((2*whole, 1), (whole, 0)):
        for b in drawn(manyicl(5), max_length=limit).batches:
            assert b['input_ids'].shape[1] <= limit and b['input_ids'][0, 0] == TOK.bos_token_id
            for ids in b['input_ids']:
                assert len(turns(ids)) >= examples + 1
                assert (turns(ids)[-1]) in {(r['prompt'], r['response']) for r in ROWS}


def test_the_answers_with_a_loss():
    for targets, n in (('all', 3), ('last', 1)):
        row = encode(conversation(ROWS[:3], targets), TOK, 'chat')
        ends = [i for i, y in zip(row['input_ids'], row['labels'])
                if i == y == TOK.eos_token_id]
        assert len(ends) == n and row['labels'][-1] == TOK.eos_token_id
        assert sum(y != -100 for y in row['labels']) == 3*n


def test_a_run_that_was_cut_off_goes_on_alike(tmp_path):
    d = data(dict(train=ROWS, validation=ROWS[:2], test=ROWS[:2]), carry=['task'])

    def run(**more):
        return fit(toy(), TOK, d, manyicl(3), **SETTINGS | more)
    assert_resumes(run, tmp_path/'run')


def test_losses_and_changes_of_other_papers_go_with_it():
    seen = drawn(lora(r=2)*dft()*manyicl(3))
    assert len(turns(seen.batches[0]['input_ids'][0])) == 4


def test_errors_say_what_is_wrong():
    for wrong in (dict(shots=0), dict(shots=1.5), dict(shots=True), dict(targets='first')):
        with pytest.raises(ValueError, match='whole number of at least 1'):
            manyicl(**wrong)
    with pytest.raises(ValueError, match='no task in .*carry='):
        drawn(manyicl(task='kind'))
    with pytest.raises(ValueError, match="'lone' has only one question"):
        drawn(manyicl(), [*ROWS, dict(prompt='last a =', response='a', task='lone')])
    with pytest.raises(ValueError, match='prompt and a response'):
        from toys import classifier
        fit(classifier(), TOK, label_data(), manyicl(), **SETTINGS)
    bare = type(TOK)(tokenizer_object=TOK.backend_tokenizer, pad_token='<pad>', eos_token='<eos>')
    with pytest.raises(ValueError, match='chat template'):
        fit(toy(), bare, data(ROWS[:40], carry=['task']), manyicl(), **SETTINGS)
