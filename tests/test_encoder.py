"The lab's encoder: how it was trained, and that what is shipped is what the page says"
import contextlib, io, json
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
import ftlab
from ftlab.instruments.bench import score
from ftlab.core.loading import lab_folder
from ftlab.core.scorers import WORLD
from ftlab.lab.models import lab_tokenizer
from ftlab.lab.pretrain import (hide, predictions, pretrain, pretraining_rows, teacher_forced,
                                to_batches)

TOK = lab_tokenizer()

def batch(n=64):
    return to_batches(pretraining_rows(WORLD, 'lab-e', 0, n=n), TOK, 1)[0]

def test_hiding_keeps_marks_and_lengths():
    ids, labels = batch()
    shown, asked = hide(ids, labels, TOK.mask_token_id, seed=3)
    hidden = asked != -100
    assert (torch.equal(shown[~hidden], ids[~hidden]) and (shown[hidden] == TOK.mask_token_id).all()
            and torch.equal(asked[hidden], ids[hidden]))
    assert (ids[hidden] > TOK.mask_token_id).all() # no special token
    answer = (labels != -100) & (ids > TOK.mask_token_id)
    whole = (hidden == answer).all(1)
    assert .3 < whole.float().mean() < .7 and (hidden & ~answer)[~whole].any()
    again = hide(ids, labels, TOK.mask_token_id, seed=3)
    assert (torch.equal(again[0], shown)
            and not torch.equal(hide(ids, labels, TOK.mask_token_id, seed=4)[0], shown))
    asked_all = hide(ids, labels, TOK.mask_token_id, None)[1]
    assert torch.equal(asked_all != -100, answer)

def test_it_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(
        'ftlab.lab.pretrain.pretraining_rows',
        lambda world, name, step, seed=0: pretraining_rows(world, name, step, 16, seed))
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain('lab-e', tmp_path/'a', steps=4, every=2, until=2)
        a = pretrain('lab-e', tmp_path/'a', steps=4, every=2)
        b = pretrain('lab-e', tmp_path/'b', steps=4, every=2)
    x, y = load_file(a/'model.safetensors'), load_file(b/'model.safetensors')
    log = [json.loads(l) for l in (a/'pretraining.jsonl').read_text().splitlines()]
    assert (x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
            and {v.dtype for v in x.values()} == {torch.float16})
    assert (json.loads((a/'config.json').read_text())['dtype'] == 'float32'
            and [r['step'] for r in log] == [2, 4])

def test_the_language_models_are_trained_as_before():
    "What `predictions` pairs for a causal model is the next token, as ever"
    m = ftlab.load('lab-s')[0]
    ids, labels = batch(4)
    with torch.no_grad():
        logits, want = predictions(m, ids, labels)
    assert torch.equal(want, labels[:, 1:]) and logits.shape[1] == ids.shape[1] - 1

def test_what_is_shipped():
    m, tok = ftlab.load('lab-e')
    disk = load_file(lab_folder('lab-e')/'model.safetensors')
    assert (type(m).__name__ == 'BertForMaskedLM' and m.dtype == torch.float32
            and {v.dtype for v in disk.values()} == {torch.float16}
            and .6e6 < m.num_parameters() < 1.1e6)
    assert (tok('sort b a =').input_ids == TOK('<bos> <user> sort b a =').input_ids
            and tok.get_vocab() == TOK.get_vocab())
    a, b = ftlab.anatomy(m), ftlab.anatomy(ftlab.load('lab-e', labels=['bad', 'good'])[0])
    assert len(a.blocks) == len(b.blocks) == 4 and a.tied and b.head == 'classifier.weight'
    log = [json.loads(l)
           for l in (lab_folder('lab-e')/'pretraining.jsonl').read_text().splitlines()]
    assert log[-1]['loss'] < .5*log[0]['loss']

def test_the_package_stays_small():
    assert (
        sum(f.stat().st_size for f in lab_folder('lab-e').parent.rglob('*') if f.is_file()) < 30e6)

def test_the_table_is_what_the_model_does():
    m, tok = ftlab.load('lab-e')
    known = json.loads(
        (Path(__file__).parent.parent/'bench/results/lab_v1_encoder.json').read_text())['skills']
    best = sorted(known, key=lambda s: -known[s]['answers'])[:3]
    now = teacher_forced(m, TOK, WORLD, best, 100, 'test')
    assert (all(abs(now[s] - known[s]['answers']) < .1 for s in best)
            and min(known[s]['answers'] for s in best) > .8)

@pytest.mark.parametrize('method', ['full', 'lora'])
def test_it_learns_a_label_through_fit(method):
    rows = lambda n, split: [dict(text=r['prompt'], label=r['skill'])
                             for s in ('sort', 'max', 'tavi', 'stack')
                             for r in WORLD.rows(s, n, split)]
    data = ftlab.data(rows(60, 'train'), validation=rows(10, 'validation'), test=rows(25, 'test'))
    m, tok = ftlab.load('lab-e', labels=data.labels)
    before = score('accuracy', m, tok, data.test, data)
    ftlab.fit(m, tok, data, ftlab.methods.get(method), steps=30, batch_size=16,
              lr=1e-3 if method == 'full' else 1e-2, progress=False)
    assert score('accuracy', m, tok, data.test, data) > max(.8, before)
