"""The real lane: what works on the lab's models works on SmolLM2-135M-Instruct. `make real` installs it;
without it these tests are skipped. Two or three minutes of one core once its file has been unpacked"""
import copy
import json
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import ftlab
from ftlab.core.loading import smollm2_file
from ftlab.core.tokens import IGNORE, encode
from ftlab.instruments.real import joined
from test_fit import At, stop
from toys import same, weights

ROWS = [dict(prompt=f'My card {what}. What is this about?', response=about) for what, about in (
    ('was stolen in the bus', 'lost or stolen card'), ('has not come after two weeks', 'card arrival'),
    ('does not work in the machine', 'card not working'), ('was charged twice', 'transaction charged twice'))]
TRAIN = dict(steps=4, batch_size=4, max_length=64, progress=False)
METHODS = dict(full=dict(recipe='full', lr=1e-4), lora=dict(recipe='lora', lr=3e-3),
               hft=dict(recipe='hft', lr=3e-4), qlora=dict(recipe='lora', lr=3e-3, quantize='nf4'))
TRAINED = dict(full=(1, 1), lora=(.01, .03), hft=(.4, .7), qlora=(.01, .03)) # shares, least and most


@pytest.fixture(scope='module')
def real():
    "The model and its tokenizer; nobody changes them"
    try:
        path = smollm2_file()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    pytest.importorskip('gguf', reason='gguf is in the bench extra')
    return path, *ftlab.load(path)


@pytest.fixture(scope='module')
def data():
    return ftlab.data(dict(train=ROWS, validation=ROWS, test=ROWS))


def logits(model, tok, text='The capital of France is'):
    with torch.no_grad():
        return model(**tok(text, return_tensors='pt')).logits


def tuned(real, data, name, **more):
    how = dict(METHODS[name])
    path, model, tok = real
    if 'quantize' in how:
        pytest.importorskip('bitsandbytes', reason='`make real` installs bitsandbytes')
        model, tok = ftlab.load(path, quantize=how.pop('quantize'))
    else:
        model = copy.deepcopy(model)
    recipe = ftlab.methods.get(how['recipe'])
    return ftlab.fit(model, tok, data, recipe, lr=how['lr'], **TRAIN | more)


def loss(model, tok, row):
    "Nats a token of a text, as transformers computes it"
    e = encode(row, tok, 'lm')
    with torch.no_grad():
        return model(**{k: torch.tensor([e[k]]) for k in ('input_ids', 'labels')}).loss.item()


def check_report(run, name):
    "What the report says of loss and cost is what transformers computes and what was trained"
    text = dict(text=joined('In 1998 , the band sold 2 @,@ 500 copies .'))
    said = json.loads(json.dumps(ftlab.report(run, old=dict(wikitext=[text]), matrices=2).json()))
    new, old = said['sets']
    how = METHODS[name]
    assert said['recipe']['name'] == how['recipe'] and 'SmolLM2-135M-Instruct' in said['model']
    assert said['settings'].get('quantize') == how.get('quantize')
    assert (new['old'], new['n'], old['old'], old['name']) == (False, 4, True, 'wikitext')
    assert new['before'] == pytest.approx(run.log[0]['nll'], rel=1e-4), 'the same four rows'
    assert new['after'] < .8*new['before']
    after = loss(run.model, run.tok, text)
    with run.disabled():
        before = loss(run.model, run.tok, text)
    # float32 sums over 49,152 words, in another order on each side
    assert (old['before'], old['after']) == pytest.approx((before, after), abs=5e-4)
    assert -old['change'] == pytest.approx(after - before, abs=1e-4)
    assert abs(after - before) > 1e-3, 'a text that the change does not touch says nothing'
    least, most = TRAINED[name]
    assert least <= said['cost']['trainable']/said['change']['parameters'] <= most


def test_it_knows_what_it_should_and_the_answer_alone_is_learned(real, data):
    _, model, tok = real
    assert tok.decode(logits(model, tok)[0, -1].argmax()) == ' Paris'
    row = encode(data.train[0], tok, data.kind)
    learned = [t for t, l in zip(row['input_ids'], row['labels'], strict=True) if l != IGNORE]
    assert tok.decode(learned).strip() == f'{ROWS[0]["response"]}<|im_end|>'


@pytest.mark.parametrize('name', METHODS)
def test_every_kind_of_method_learns_goes_on_reports_and_is_exported(real, data, name, tmp_path):
    run = tuned(real, data, name)
    assert run.log[-1]['loss'] < .8*run.log[0]['loss']
    cut = tuned(real, data, name, out=tmp_path/'cut', save_every=2, callbacks=(At(2, stop),))
    assert cut.interrupted and len(cut.log) == 2
    again = tuned(real, data, name, out=tmp_path/'cut', save_every=2, resume=True)
    assert again.log == run.log and same(weights(again.model), weights(run.model)), 'resume is bit-equal'
    check_report(run, name)
    want = logits(run.model, run.tok)
    run.export(tmp_path/'out')
    plain = AutoModelForCausalLM.from_pretrained(tmp_path/'out', dtype=torch.float32)
    tok = AutoTokenizer.from_pretrained(tmp_path/'out')
    text = 'The capital of France is'
    assert tok(text).input_ids == run.tok(text).input_ids
    torch.testing.assert_close(logits(plain, tok), want, atol=1e-3, rtol=0)
