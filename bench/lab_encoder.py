"""What the lab's encoder knows, and what it is good for.

    python bench/lab_encoder.py [folder]       hidden words by skill, n = 400; two tasks with labels, fine-tuned by ftlab.fit

Results go to bench/results/lab_v1_encoder.json; what is there is kept, what is missing is measured.
"""
import json, os, sys
from pathlib import Path
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
import torch, ftlab
from ftlab.adapters.delta import write_atomically
from ftlab.comparison import score
from ftlab.core.loading import fresh_head
from ftlab.core.scorers import WORLD
from ftlab.lab.pretrain import hide, predictions, to_batches
from ftlab.lab.world import NEW, OLD
from transformers import AutoModelForSequenceClassification

OUT = Path(__file__).parent/'results/lab_v1_encoder.json'
def keep(x): write_atomically(OUT, lambda p: p.write_text(json.dumps(x, indent=1) + '\n'))

@torch.no_grad()
def hidden_words(model, tok, skill, n=400):
    "Share of answers wholly right and of their words right when the answer is hidden, and of any words right when 40% of all are"
    rows = WORLD.rows(skill, n); out = dict(answers=0., answer_words=[0, 0], any_words=[0, 0])
    for i, (ids, labels) in enumerate(to_batches(rows, tok, 4)):
        for what, (x, y) in dict(answer_words=hide(ids, labels, tok.mask_token_id, None), any_words=_cloze(ids, labels, tok, i)).items():
            logits, y = predictions(model, x, y); hit, asked = logits.argmax(-1) == y, y != -100
            out[what][0] += int((hit & asked).sum()); out[what][1] += int(asked.sum())
            if what == 'answer_words': out['answers'] += int((hit | ~asked).all(1).sum())/len(rows)
    return dict(answers=out['answers'], **{k: out[k][0]/out[k][1] for k in ('answer_words', 'any_words')})

def _cloze(ids, labels, tok, seed):
    "40% of the words of each row hidden, questions and answers alike"
    word = ids > tok.mask_token_id; hidden = word & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < .4)
    return torch.where(hidden, tok.mask_token_id, ids), torch.where(hidden, ids, -100)

def tasks():
    "Two tasks with labels, made of questions of the lab: is the aspect good or bad; which skill is asked for"
    def rows(skills, n, split, label): return [dict(text=r['prompt'], label=label(r)) for s in skills for r in WORLD.rows(s, n, split, seed=7)]
    few = ['reverse', 'sort', 'add', 'boxes', 'tavi', 'stack', 'tool', 'refuse']
    for name, skills, n, label in (('sentiment', ['review'], 1600, lambda r: r['response']), ('which skill', few, 100, lambda r: r['skill'])):
        yield name, ftlab.data(rows(skills, n, 'train', label), validation=rows(skills, n//8, 'validation', label), test=rows(skills, n//4, 'test', label))

def learn(name, where, data, fresh):
    "Accuracy on test rows before and after 150 steps of 32, for lab-e or for the same encoder with random numbers"
    model, tok = ftlab.load(where, labels=data.labels)
    if fresh: torch.manual_seed(0); model = fresh_head(AutoModelForSequenceClassification.from_config(model.config)).eval()
    before = score('accuracy', model, tok, data.test, data); run = ftlab.fit(model, tok, data, ftlab.methods.full(), steps=150, lr=1e-3, progress=False)
    return dict(labels=len(data.labels), train=len(data.train), test=len(data.test), before=before, after=score('accuracy', model, tok, data.test, data), seconds=round(run.cost['seconds'], 1))

if __name__ == '__main__':
    where = sys.argv[1] if len(sys.argv) > 1 else 'lab-e'; got = json.loads(OUT.read_text()) if OUT.exists() else dict(skills={}, tasks={})
    model, tok = ftlab.load(where)
    for s in OLD + NEW:
        if s not in got['skills']: got['skills'][s] = hidden_words(model, tok, s); keep(got); print(s, got['skills'][s], flush=True)
    for name, data in tasks():
        for kind in ('lab-e', 'fresh'):
            if f'{name}, {kind}' not in got['tasks']: got['tasks'][f'{name}, {kind}'] = learn(name, where, data, kind == 'fresh'); keep(got); print(name, kind, got['tasks'][f'{name}, {kind}'], flush=True)
