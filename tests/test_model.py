"What core/model owns: the length of rows on a model with a table of 64 positions, through everything that reads rows"
import json

import pytest
import torch
from toys import TOK, classifier, toy
from transformers import (GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, RobertaConfig,
                          RobertaModel)

import ftlab
from ftlab import cli
from ftlab.core.batches import collate
from ftlab.core.data import Data, data
from ftlab.core.tokens import encode_all
from ftlab.core.generate import generate, render_within
from ftlab.core.model import (answer_room, device_of, evaluating, model_inputs, pad_id,
                              position_table, positions, row_limit, to_device)
from ftlab.core.scorers import exact_match, label_accuracy, nll
from ftlab.evaluators.decode import combined
from ftlab.evaluators.decoding.copilot import Copilot, answer_together

WORDS = 'a b c d e f'.split()
SIZES = dict(vocab_size=len(TOK), n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
             eos_token_id=2, pad_token_id=0)


def gpt2(**more) -> GPT2LMHeadModel:
    "64 positions in a table, two blocks, the lab's vocabulary"
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**SIZES, **more)).eval()


def long_rows(n: int = 40, words: int = 120) -> list[dict]:
    "Rows of `words` words, most of them in the response"
    row = lambda i: dict(prompt=' '.join(WORDS[(i + j) % 6] for j in range(20)),
                         response=' '.join(WORDS[(i*j) % 6] for j in range(words - 20)),
                         rejected=' '.join(WORDS[(i + 1 + j) % 6] for j in range(words - 20)))
    return [row(i) | dict(prompt=f'{WORDS[i % 6]} {WORDS[i//6 % 6]} ' + row(i)['prompt'])
            for i in range(n)]


def long_data() -> Data:
    rows = long_rows()
    return data(rows[:28], validation=rows[28:34], test=rows[34:])


# the rule itself

def test_a_table_is_told_from_computed_positions():
    roberta = RobertaModel(
        RobertaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                      intermediate_size=16, max_position_embeddings=66, pad_token_id=1))
    assert ((position_table(gpt2()), position_table(classifier()), position_table(toy()),
             position_table(roberta)) == (64, 64, None, 64))
    assert positions(toy()) == 128
    roberta(torch.full((1, 64), 5))  # the offset: 64 tokens fit, 65 do not
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, 65), 5))


@pytest.mark.parametrize('asked, table, rotary',
                         [(None, 64, 128), (40, 40, 40), (100, 64, 100), (1000, 64, 1000)])
def test_what_is_asked_for_comes_first_but_a_table_ends(asked, table, rotary):
    assert row_limit(gpt2(), TOK, asked) == table
    assert row_limit(toy(), TOK, asked) == rotary


def test_without_a_tokenizer_rows_are_not_cut():
    assert row_limit(toy(), None) is None and row_limit(toy(), None, 7) == 7


def test_room_for_an_answer_does_not_depend_on_the_batch():
    model, prompts = gpt2(), [r['prompt'] for r in long_rows(4)] + ['a b c =', ' '.join(WORDS*20)]
    assert (answer_room(8, model) == (56, 8) and answer_room(200, model) == (32, 32)
            and answer_room(200, toy()) == (None, 200))
    assert answer_room(8, toy(), model) == (56, 8)  # the shortest of several
    ids, new = render_within(prompts, TOK, 200, model)
    assert new == 32 and max(map(len, ids)) == 32
    together = generate(model, TOK, prompts, max_new_tokens=200)
    assert together == [generate(model, TOK, [p], max_new_tokens=200)[0] for p in prompts]


def test_every_decoder_keeps_to_the_room():
    model, prompts = gpt2(), [r['prompt'] for r in long_rows(4, 150)] + [' '.join(WORDS*20)]
    said = generate(model, TOK, prompts, max_new_tokens=9)
    assert combined(dict(one=model), TOK, prompts, lambda p: p['one'], 9) == said
    assert combined(dict(one=model, two=toy()), TOK, prompts, lambda p: p['one'], 9) == said
    assert answer_together(model, Copilot(32, len(TOK)), TOK, prompts, 0., 9, batch_size=2) == said


# evaluation

def test_every_part_gets_its_own_mode_back_after_an_error():
    a, b = toy().train(), toy().eval()
    a.model.layers[0].eval()
    before = [m.training for x in (a, b) for m in x.modules()]
    with pytest.raises(KeyboardInterrupt), evaluating(a, len, b):
        assert not any(m.training for x in (a, b) for m in x.modules())
        raise KeyboardInterrupt
    assert [m.training for x in (a, b) for m in x.modules()] == before and any(before)


def test_inputs_leave_out_what_a_model_does_not_know():
    batch = (collate(encode_all([dict(prompt='a', response='b')], TOK, 'text'), pad_id(TOK))
             | dict(tokens=torch.ones(1), old=torch.ones(1)))
    assert set(model_inputs(batch)) == {'input_ids', 'attention_mask'}
    assert all(v.device == device_of(toy()) for v in to_device(batch, device_of(toy())).values())
    assert pad_id(None) == 0


# 64 positions and rows of 120 words, through everything

def test_scores():
    model, rows = gpt2(), long_rows(6)
    cut = encode_all(rows, TOK, 'text', 64)
    assert cut.truncated == 6
    assert nll(model, TOK, rows) == nll(model, TOK, rows, max_length=64) == nll(
        model, TOK, rows, max_length=500)
    assert exact_match(model, TOK, rows) == 0.


def test_labels():
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(GPT2Config(**SIZES, num_labels=2)).eval()
    rows = [dict(text=r['response'], label=i % 2) for i, r in enumerate(long_rows(6))]
    assert 0 <= label_accuracy(model, TOK, rows, ['a', 'b']) <= 1


@pytest.mark.parametrize('method', ['full', 'dpo', 'spin(rounds=2)', 'r_tuning', 'masked_thought', 'asft'])
@pytest.mark.parametrize('max_length', [None, 100])
def test_methods(method, max_length):
    model = gpt2()
    run = ftlab.fit(model, TOK, long_data(), ftlab.methods.get(method), steps=2, batch_size=4,
                    max_length=max_length, progress=False)
    assert len(run.log) == 2 and all(torch.isfinite(torch.tensor(r['loss'])) for r in run.log)


def test_no_pair_is_longer_than_a_row_may_be():
    from ftlab.trainers.preferences import Pairs
    seen = []

    class Look:
        def before_batch(self, state):
            seen.extend(b['input_ids'].shape[1] for b in state.batches)
            assert isinstance(state.source, Pairs)
    for model in (gpt2(), toy()):  # the Llama has 128 positions, computed: before, its rows went through whole
        seen.clear()
        ftlab.fit(model, TOK, data(long_rows(words=200)), ftlab.methods.get('dpo'), steps=1,
                  batch_size=4, progress=False, callbacks=(Look(),))
        assert max(seen) == positions(model)


def test_instruments(tmp_path):
    old = data(long_rows(12, 100))
    c = ftlab.compare(['full'], (gpt2(), TOK), long_data(), old=old, metric='exact', seeds=1,
                      steps=2, batch_size=4, tune=False, old_items=4, out=tmp_path/'compare',
                      progress=False)
    assert c.json()['methods'][0]['seeds'][0]['error'] is None
    run = ftlab.fit(gpt2(), TOK, long_data(), steps=2, batch_size=4, progress=False)
    assert ftlab.report(run, old, items=4, old_items=4).json()
    found = ftlab.doctor(gpt2(), TOK, long_data())
    assert not [f for f in found if 'IndexError' in f.seen or 'out of range' in f.seen]
    assert 'too-long-for-positions' in ftlab.doctor(gpt2(), TOK, long_data(), max_length=100).names


def test_cli(tmp_path, capsys):
    gpt2().save_pretrained(tmp_path/'model')
    TOK.save_pretrained(tmp_path/'model')
    (tmp_path/'rows.jsonl').write_text('\n'.join(map(json.dumps, long_rows())))
    shared = ['--model', str(tmp_path/'model'), '--data', str(tmp_path/'rows.jsonl'), '--json']
    assert cli.main(['fit', *shared, '--steps', '2', '--batch-size', '4', '--out', str(tmp_path/'run')]) == 0
    capsys.readouterr()
    assert cli.main(['compare', *shared, '--methods', 'full', '--dry-run']) == 0
    assert json.loads(capsys.readouterr().out)['methods'][0]['longest_row'] == 64
