"CLS-RL: its rewards against the official code's rules, the split, the evaluator, other models, errors"
import random
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from ftlab.core.recipe import Recipe
from ftlab.instruments.claims import named_claim, script_of
from ftlab.trainers.fit import fit
from ftlab.trainers.rl.cls_rl import (WORDS, accuracy_reward, answer_in, base_and_new, base_to_new,
                                      cls_rl, described, equality_reward, format_reward, label_of,
                                      question, thinking_reward, typical_words)
from tests.tiny import tiny
from tests.toys import TOK, toy

ROW = dict(prompt='what is it ?', response='tabby cat')
SAID = ['tabby cat', 'Tabby cat', ' tabby cat ', 'a tabby cat', '', '<answer>tabby cat</answer>',
        '<think>a</think><answer>tabby cat</answer>', '<think>a</think>\n<answer> TABBY CAT </answer>',
        '<think>a\nb</think> <answer>tiger</answer>', '<think></think><answer></answer>',
        '<answer>tabby cat</answer><think>a</think>', 'so: <think>a</think><answer>tabby cat</answer>',
        '<think>a</think><answer>tabby cat</answer>.',
        '<think>a</think><answer>tabby cat</answer><answer>tiger</answer>',
        '<think>a</think><answer>tiger</answer><answer>tabby cat</answer>']


def official(said, label):
    """Format, accuracy and equality by the rules that the official code states, written anew: a full match of the
    form, the first answer without regard to case, the output as it is"""
    shape = re.compile('<think>.*?</think>' + r'\s*' + '<answer>.*?</answer>', re.S)
    first = re.search('<answer>(.*?)</answer>', said)
    inside = first.group(1).strip() if first else said.strip()
    return bool(shape.fullmatch(said)), inside.lower() == label.lower(), said == label


@pytest.mark.parametrize('said', SAID)
def test_rewards_are_those_of_the_official_rules(said):
    form, right, equal = official(said.strip(), 'tabby cat')
    assert format_reward(ROW, said.strip()) == form
    assert accuracy_reward(ROW, said) == right
    assert thinking_reward(ROW, said.strip()) == form + right
    assert equality_reward(ROW, said) == equal


def test_all_three_totals_occur():
    assert {thinking_reward(ROW, s) for s in SAID} == {0., 1., 2.}
    assert sum(equality_reward(ROW, s) for s in SAID) == 2


def test_labels_may_have_tags_themselves():
    row = dict(response='<answer> tabby cat </answer>')
    assert label_of(row) == 'tabby cat' == answer_in(row['response'])
    assert equality_reward(row, 'tabby cat') == 1 and equality_reward(row, 'Tabby cat') == 0


@pytest.mark.parametrize('row', [{}, dict(response=''), dict(response=' '), dict(response=None),
                                 dict(response='<answer></answer>'), dict(response=3)])
@pytest.mark.parametrize('reward', [equality_reward, accuracy_reward, thinking_reward])
def test_a_row_without_a_label_is_an_error(row, reward):
    with pytest.raises(ValueError, match='the label of a row is .*; the rewards need the name'):
        reward(row, '')


def examples(classes=6, each=9):
    return [dict(text=f'{c} {i}', label=f'class {c}') for c in 'abcdefghijkl'[:classes]
            for i in range(each)]


def test_only_base_classes_are_trained_and_all_rows_are_apart():
    split = base_to_new(examples(), shots=2, held=3, most=4, seed=1)
    assert len(split.base) == len(split.new) == 3 and not set(split.base) & set(split.new)
    names = lambda rows: sorted(r['response'] for r in rows)
    assert names(split.train) == sorted(split.base*2) and names(split.held) == sorted(split.base*3)
    assert names(split.asked['base']) == sorted(split.base*4)
    assert names(split.asked['new']) == sorted(split.new*4)
    texts = [r['prompt'].partition(' has ')[2] for part in (split.train, split.held,
             *split.asked.values()) for r in part]
    assert len(set(texts)) == len(texts)


def test_without_a_limit_every_row_is_used_once():
    split = base_to_new(examples(5), shots=1, seed=0)
    assert (len(split.base), len(split.new)) == (3, 2) and split.repeated == 0
    assert len(split.train) + sum(map(len, split.asked.values())) == 45


def test_a_question_lists_the_classes_of_its_own_side_in_its_own_order():
    split = base_to_new(examples(12), shots=4, seed=3, template='{text} : {classes}', between=' / ')
    orders = set()
    for side, rows in split.asked.items():
        for r in rows:
            text, _, listed = r['prompt'].partition(' : ')
            assert sorted(listed.split(' / ')) == sorted(getattr(split, side))
            assert f'class {text[0]}' == r['response']
            orders.add(listed)
    assert len(orders) > 20


def test_a_seed_fixes_the_split_and_the_order_of_the_examples_of_a_class_does_not_matter_to_the_sides():
    one, same, other = (base_to_new(examples(12), seed=s) for s in (0, 0, 1))
    assert one == same and set(one.base) != set(other.base)
    state = random.getstate()
    shuffled = random.Random(0).sample(examples(12), 108)
    assert set(base_to_new(shuffled, seed=0).base) == set(one.base) and random.getstate() == state


def test_a_text_with_braces_stays_as_it_is():
    r = random.Random(0)
    assert question('a {classes} b', ['x'], r).endswith('a {classes} b ?')


def test_repeated_texts_are_left_out_and_counted():
    split = base_to_new(examples() + examples()[:5], shots=2)
    assert split.repeated == 5
    assert len(split.train) + sum(map(len, split.asked.values())) == 54


@pytest.mark.parametrize('rows, kw, said', [
    (examples(3), {}, 'there are 3 classes'), ([], {}, 'there are 0 classes'),
    (examples(each=4), {}, r"each class needs more than 4 different texts.*'class a' has 4"),
    (examples(), dict(shots=0), 'shots is 0'), (examples(), dict(shots=True), 'shots is True'),
    (examples(), dict(held=-1), 'held is -1'), (examples(), dict(held=1.), 'held is 1.0'),
    (examples(), dict(most=0), 'most is 0'), (examples(), dict(template='{text} ?'), 'the template is'),
    (examples() + [dict(text='a 0', label='class b')], {}, "'a 0' has the labels 'class a' and 'class b'"),
    (examples() + [dict(text='x', label='Class a')], {}, 'differ in case alone'),
    ([dict(text='x', label=3)], {}, "example 0 has the text 'x' and the label 3"),
    ([dict(text='x', label=' y')], {}, 'without spaces around them'),
    ([dict(prompt='x')], {}, 'example 0 has the text None')])
def test_what_cannot_be_split_is_named(rows, kw, said):
    with pytest.raises(ValueError, match=said):
        base_to_new(rows, **kw)


def test_descriptions_have_typical_words_and_are_drawn_by_the_seed():
    things = typical_words(6, seed=2)
    rows = described(things, 5, 'x')
    assert len(rows) == 30 and rows == described(things, 5, 'x') != described(things, 5, 'y')
    for r in rows:
        words = r['text'].split()
        assert len(words) == 6 and set(words) <= set(WORDS)
        assert len(set(words) & set(things[r['label']])) >= 2


LETTERS = [dict(text=f'{c} {x} {y}', label=c) for c in 'abcd' for x in 'efgh' for y in 'ijkl']


def letter_split():
    return base_to_new(LETTERS, shots=2, most=6, template='{text} : {classes}')


@pytest.mark.parametrize('name', ['llama', 'gpt2'])
def test_evaluates_and_trains_models_of_several_kinds(name):
    sizes = {'vocab_size': len(TOK), 'max_position_embeddings': 64}
    model = toy() if name == 'llama' else tiny(name, **sizes)
    split = letter_split()
    found = base_and_new(model, TOK, split)
    assert {k: len(v) for k, v in found['items'].items()} == dict(base=12, new=12)
    assert 0 <= found['base'] <= 1 and 0 <= found['tokens'] <= 3
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    fit(model, TOK, split.data(), cls_rl(reward=lambda row, said: len(said) % 3, max_new_tokens=2),
        steps=2, batch_size=8, lr=1e-3, progress=False)
    assert any((p != before[n]).any() for n, p in model.named_parameters())


def test_counts_right_answers_of_each_side_and_their_tokens(monkeypatch):
    split = letter_split()
    gold = {r['prompt']: r['response'] for rows in split.asked.values() for r in rows}
    new = set(split.new)

    def said(model, tok, prompts, max_new_tokens):
        # all right on new classes; every third right on base classes, the rest empty and cut off
        return [(gold[p], True) if gold[p] in new or i % 3 == 0 else ('', False)
                for i, p in enumerate(prompts)]

    monkeypatch.setattr('ftlab.trainers.rl.cls_rl.answers_and_ends', said)
    found = base_and_new(None, TOK, split)
    assert found['new'] == 1 and found['base'] == pytest.approx(1/3)
    assert found['harmonic'] == pytest.approx(.5) and found['tokens'] == pytest.approx(2*16/24)
    assert base_and_new(None, TOK, split, right=lambda row, said: 0.)['harmonic'] == 0


def test_nothing_to_ask_is_an_error():
    split = letter_split()
    split.asked['new'].clear()
    with pytest.raises(ValueError, match='no rows of new classes'):
        base_and_new(toy(), TOK, split)


def test_the_recipe_is_grpo_with_the_reward_that_was_asked_for():
    plain, thinks = cls_rl(), cls_rl(thinking=True, max_new_tokens=50)
    assert plain.source.reward is equality_reward and plain.source.group == 4
    assert thinks.source.reward is thinking_reward and thinks.source.max_new_tokens == 50
    assert plain.objective == thinks.objective and plain.objective.beta == .04
    with pytest.raises(ValueError, match='a thought needs more tokens than a label'):
        cls_rl(thinking=True)


def test_both_arms_of_the_claim_see_the_same_questions():
    class Seen(list):
        def after_step(self, state):
            b = state.batch
            self.append({TOK.decode(i[(y == -100) & m.bool()]) for i, y, m in
                         zip(b['input_ids'], b['labels'], b['attention_mask'])})

    runs = []
    for recipe, size in ((Recipe(), 2), (cls_rl(max_new_tokens=2), 8)):
        seen = Seen()
        fit(toy(), TOK, letter_split().data(), recipe, steps=3, batch_size=size, seed=5,
            callbacks=(seen,), progress=False)
        runs.append(seen)
    assert all(len(q) == 2 for q in runs[0]) and runs[0] == runs[1]


def test_a_step_makes_the_label_likelier_that_was_guessed_once(monkeypatch):
    from ftlab.trainers.rl.grpo import Rollouts
    real, end = Rollouts.answer, TOK.eos_token_id
    asked = {}

    def fixed(self, state, rows):
        "The first answer of each group is the label, the others are another letter"
        questions, _ = real(self, state, rows)
        first = [TOK(r['response'], add_special_tokens=False).input_ids[0] for r in rows]
        other = TOK('l', add_special_tokens=False).input_ids[0]
        said = torch.tensor([[x, end] for f in first for x in (f, other, other, other)])
        asked.update(ids=questions['input_ids'], mask=questions['attention_mask'], first=first)
        return questions, torch.cat([questions['input_ids'], said], 1)

    monkeypatch.setattr(Rollouts, 'answer', fixed)
    model = toy()

    @torch.no_grad()
    def label_logp():
        # questions are padded on the left, so the last position is where the answer begins
        ids, mask = asked['ids'][::4], asked['mask'][::4]
        logits = model(input_ids=ids, attention_mask=mask,
                       position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
        return logits.log_softmax(-1)[range(len(ids)), asked['first']]

    class Before:
        def after_backward(self, state):
            seen['before'], seen['advantage'] = label_logp(), state.batch['advantage']

    seen = {}
    fit(model, TOK, letter_split().data(), cls_rl(beta=0., max_new_tokens=2), steps=1, batch_size=8,
        lr=1e-3, callbacks=(Before(),), progress=False)
    assert (label_logp() > seen['before']).all()
    torch.testing.assert_close(seen['advantage'].view(2, 4), torch.tensor([[1.5, -.5, -.5, -.5]]*2),
                               atol=1e-3, rtol=0)


def test_the_arm_known_to_be_worse_is_not_the_baseline_itself():
    "Without tuning there are no steps to halve: the rule would find no room, whatever the numbers are"
    spec = tomllib.loads((Path(__file__).parents[2]/'claims/cls_rl/claim.toml').read_text('utf-8'))
    for c in spec['contrast']:
        if c.get('primary') and c['kind'] == 'noninferiority':
            assert spec['arms'][c['baseline']] or c.get('worse') in spec['arms']


def test_the_claim_does_not_evaluate_a_checkpoint_that_cannot_be_kept():
    best = script_of(named_claim('cls_rl')).Best([])
    assert best.look(SimpleNamespace(step=0)) == {} and best.weights is None


@pytest.mark.parametrize('make, said', [
    (lambda: base_to_new(['a text']), "example 0 is 'a text'; it must have a text and a label"),
    (lambda: typical_words(31), 'n is 31; there are 30 things'),
    (lambda: typical_words(0), 'n is 0'),
    (lambda: described(typical_words(4), 2, 0, own=5), 'own is 5'),
    (lambda: described(typical_words(4), 2, 0, other=-1), 'other is -1')])
def test_what_cannot_be_drawn_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
