"PCP: what is read in each stage, guesses and where they come from, and the edges of its arguments"
import pytest
import torch
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.select import parts
from ftlab.adapters.yardsticks.prompts import prompt_tuning
from ftlab.core.batches import collate
from ftlab.core.data import data
from ftlab.core.tokens import encode_all
from ftlab.trainers.fit import fit
from ftlab.trainers.losses import pcp as module
from ftlab.trainers.losses.dft import dft
from ftlab.trainers.losses.masked_thought import masked_thought
from ftlab.trainers.losses.pcp import pcp, read_all
from ftlab.trainers.objective import IGNORE
from tests.toys import TOK, lab_data, same, toy, weights


def batch(n=6):
    return collate(encode_all(lab_data().train[:n], TOK, 'text'), TOK.pad_token_id)


def test_every_token_has_a_loss_once():
    b = batch()
    raw, whole = read_all(False)(b, None)['labels'], read_all()(b, None)['labels']
    tuned, real = b['labels'], b['attention_mask'].bool()
    assert torch.equal(whole != IGNORE, real) and torch.equal(whole[real], b['input_ids'][real])
    assert not ((raw != IGNORE) & (tuned != IGNORE)).any()
    assert torch.equal((raw != IGNORE) | (tuned != IGNORE), real)
    assert (b['labels'] == tuned).all() # the batch itself is as it was


class Stages:
    "Notes the first batch of each stage and the weights at its start"
    def __init__(self):
        self.labels, self.texts, self.starts = [], [], []

    def before_fit(self, state):
        self.starts.append(weights(state.model))

    def after_backward(self, state):
        if state.step == 0:
            b = state.batches[0]
            self.labels.append(b['labels'])
            self.texts.append([TOK.decode(i[m.bool()]) for i, m in
                               zip(b['input_ids'], b['attention_mask'])])


SETTINGS = dict(steps=6, batch_size=4, progress=False, lr=1e-3)


def test_guesses_are_read_from_the_base_and_tuning_follows(monkeypatch):
    asked = []
    def guess(model, tok, prompts, longest):
        asked.append((weights(model), prompts, longest))
        return [f'{p.split()[-1]} {i}' if i else '' for i, p in enumerate(prompts)]
    monkeypatch.setattr(module, 'generate', guess)
    prompts, look = [r['prompt'] for r in lab_data().train[10:16]], Stages()
    fit(toy(), TOK, lab_data(), pcp(prompts, longest=5), callbacks=(look,), **SETTINGS)
    (tuned, given, longest), = asked
    assert given == prompts and longest == 5 and not same(tuned, weights(toy()))
    first, second, third = look.starts
    assert same(first, weights(toy())) and same(second, first) and not same(third, first)
    assert not same(third, tuned)
    read = look.texts[1]
    pairs = [(p, f'{p.split()[-1]} {i}') for i, p in enumerate(prompts) if i]
    texts = {TOK.decode(e['input_ids']) for e in encode_all(
        [dict(prompt=p, response=a) for p, a in pairs], TOK, 'text')}
    with_loss = [int((x != IGNORE).sum()) for x in look.labels]
    assert set(read) <= texts and with_loss[1] > 2*with_loss[0]


def test_with_labels_the_rows_themselves_are_read():
    look = Stages()
    fit(toy(), TOK, lab_data(), pcp(share=2.), callbacks=(look,), **SETTINGS)
    assert len(look.starts) == 2 and set(look.texts[0]) <= {
        TOK.decode(e['input_ids']) for e in encode_all(lab_data().train, TOK, 'text')}
    assert (look.labels[0] != IGNORE).sum() > (look.labels[1] != IGNORE).sum()


def test_raw_texts_are_read_without_a_guess(monkeypatch):
    monkeypatch.setattr(module, 'generate', None) # nothing is asked
    prompts, look = [r['prompt'] for r in lab_data().train[10:16]], Stages()
    fit(toy(), TOK, lab_data(), pcp(prompts, reads='raw'), callbacks=(look,), **SETTINGS)
    assert len(look.starts) == 2 and not same(look.starts[1], weights(toy()))
    bare = {TOK.decode(e['input_ids']) for e in encode_all(
        [dict(prompt=p, response='') for p in prompts], TOK, 'text')}
    assert set(look.texts[0]) <= bare
    assert all(x[x != IGNORE][-1] != TOK.eos_token_id for x in look.labels[0])


def test_two_labelled_rows_fill_a_batch_and_are_not_read(monkeypatch):
    monkeypatch.setattr(module, 'generate', lambda model, tok, prompts, longest: list('abcdef'))
    all_rows, look = lab_data().train, Stages()
    prompts = [r['prompt'] for r in all_rows[10:16]]
    two = data(dict(train=all_rows[:2], validation=all_rows[:2], test=all_rows[:2]))
    fit(toy(), TOK, two, pcp(prompts), callbacks=(look,), **SETTINGS)
    tuned, read, again = look.texts
    labelled = {TOK.decode(e['input_ids']) for e in encode_all(all_rows[:2], TOK, 'text')}
    assert set(tuned) == set(again) == labelled and len(tuned) == 4
    assert len(read) == 4 and not set(read) & labelled


def test_shuffled_guesses_are_the_same_guesses(monkeypatch):
    monkeypatch.setattr(module, 'generate', lambda model, tok, prompts, longest: list('abcdef'))
    prompts = [r['prompt'] for r in lab_data().train[10:16]]
    context = type('Context', (), dict(model=None, tok=None, seed=1, reset=lambda self: None))()
    plain, mixed = (pcp(prompts, reads=r).stages[1](context).source.source.rows
                    for r in ('prompted', 'shuffled'))
    assert [p for p, _ in plain] == [p for p, _ in mixed] == prompts
    assert sorted(a for _, a in mixed) == list('abcdef') != [a for _, a in mixed]


def test_every_stage_takes_a_delta_or_a_loss(monkeypatch):
    monkeypatch.setattr(module, 'generate', lambda model, tok, prompts, longest: list('abcdef'))
    prompts, free = [r['prompt'] for r in lab_data().train[10:16]], set(parts()(toy()))
    for recipe, count in ((pcp()*lora(r=2), 2), (lora(r=2)*pcp(prompts, reads='raw'), 2),
                          (pcp(prompts)*lora(r=2), 3)):
        look, was = Stages(), weights(toy())
        run = fit(toy(), TOK, lab_data(), recipe, callbacks=(look,), **SETTINGS)
        assert [s['delta'] for s in run.settings['stages']] == ['LoRA(r=2)']*count
        assert all((x != IGNORE).any() for x in look.labels) and len(look.labels) == count
        run.delta.attached.fold()
        assert {n for n, p in weights(run.model).items() if not torch.equal(p, was[n])} == free
    run = fit(toy(), TOK, lab_data(), pcp(prompts)*dft(), **SETTINGS)
    assert [s['objective'] for s in run.settings['stages']] == [dft().describe()['objective']]*3
    with pytest.raises(ValueError, match='stage 2 of 2 .* acts on activations'):
        fit(toy(), TOK, lab_data(), pcp()*prompt_tuning(), **SETTINGS)


@pytest.mark.parametrize('reads', ['prompted', 'raw'])
def test_hidden_tokens_are_still_the_labels_in_either_order(reads):
    seen, hidden = [], masked_thought(warmup=0)
    for recipe in (pcp(reads=reads), pcp(reads=reads)*hidden, hidden*pcp(reads=reads)):
        look = Stages()
        fit(toy(), TOK, lab_data(), recipe, callbacks=(look,), **SETTINGS)
        seen.append(look)
    plain, *both = seen
    for look in both:
        assert len(look.labels) == 2 and all(map(torch.equal, look.labels, plain.labels))
        assert look.texts == both[0].texts and all(map(list.__ne__, look.texts, plain.texts))


def test_what_it_refuses(monkeypatch):
    for wrong in (dict(reads='half'), dict(reads='shuffled'), dict(share=0), dict(longest=0),
                  dict(prompts='one text'), dict(prompts=[])):
        with pytest.raises(ValueError, match='must be|is empty'):
            pcp(**wrong)
    with pytest.raises(ValueError, match='prompt and response'):
        read_all()(dict(input_ids=torch.ones(2, 3), labels=torch.ones(2)), None)
    monkeypatch.setattr(module, 'generate', lambda model, tok, prompts, longest: ['']*len(prompts))
    with pytest.raises(ValueError, match='answers none'):
        fit(toy(), TOK, lab_data(), pcp(['a b']), **SETTINGS)
    with pytest.raises(ValueError):
        pcp()*pcp()
