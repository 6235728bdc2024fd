"""What the lab's encoder knows, and what it is good for.

    python bench/lab_encoder.py [folder]

Hidden words by skill, n = 400; three tasks with labels, fine-tuned by ftlab.fit, three seeds.

Results go to bench/results/lab_v1_encoder.json; what is there is kept, what is missing is measured.
"""
import json, os, random, sys
from pathlib import Path
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
import torch, ftlab
from ftlab.core.io import write_atomically
from ftlab.instruments.bench import score
from ftlab.core.loading import fresh_head
from ftlab.core.scorers import WORLD
from ftlab.lab.pretrain import hide, predictions, to_batches
from ftlab.lab.world import ASK, ASPECTS, BAD, GOOD, NEW, OLD
from transformers import AutoModelForSequenceClassification

OUT = Path(__file__).parent/'results/lab_v1_encoder.json'

def keep(x):
    write_atomically(OUT, lambda p: p.write_text(json.dumps(x, indent=1) + '\n'))

@torch.no_grad()
def hidden_words(model, tok, skill, n=400):
    """Share of answers wholly right and of their words right when the answer is hidden,
    and of any words right when 40% of all are"""
    rows = WORLD.rows(skill, n)
    out = dict(answers=0., answer_words=[0, 0], any_words=[0, 0])
    for i, (ids, labels) in enumerate(to_batches(rows, tok, 4)):
        for what, (x, y) in dict(answer_words=hide(ids, labels, tok.mask_token_id, None),
                                 any_words=_cloze(ids, labels, tok, i)).items():
            logits, y = predictions(model, x, y)
            hit, asked = logits.argmax(-1) == y, y != -100
            out[what][0] += int((hit & asked).sum())
            out[what][1] += int(asked.sum())
            if what == 'answer_words':
                out['answers'] += int((hit | ~asked).all(1).sum())/len(rows)
    return dict(answers=out['answers'], **{k: out[k][0]/out[k][1] for k in ('answer_words', 'any_words')})

def _cloze(ids, labels, tok, seed):
    "40% of the words of each row hidden, questions and answers alike"
    word = ids > tok.mask_token_id
    hidden = word & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < .4)
    return torch.where(hidden, tok.mask_token_id, ids), torch.where(hidden, ids, -100)

def apart(things, seed, train=.7):
    "A part of `things` to learn from, and the rest, whose labels must come from elsewhere"
    things = random.Random(seed).sample(things, len(things))
    k = round(train*len(things))
    return things[:k], things[k:]

def tasks(seed):
    """Three tasks with labels. In the first two the test is about words and people
    that the labelled rows never mention, so that only pretraining can know them."""
    good, bad = apart(GOOD, seed), apart(BAD, seed)
    said = lambda i: [dict(text=f'guest : the {a} is {w} . good or bad {a} ?', label=l)
                      for l, ws in (('good', good[i]), ('bad', bad[i])) for w in ws
                      for a in ASPECTS]
    yield 'sentiment of new words', said(0), said(1)
    people = apart(WORLD.people['often'], seed)
    home = lambda i: [dict(text=q.format(a='city', p=p),
                           label=next(e for e in ('burg', 'ton', 'ville', 'port')
                                      if WORLD.facts[p, 'city'].endswith(e))) for p in people[i]
                      for q in ASK]
    yield 'sort of city of new people', home(0), home(1)
    few = ['reverse', 'sort', 'add', 'boxes', 'tavi', 'stack', 'tool', 'refuse']
    rows = lambda n, split: [dict(text=r['prompt'], label=r['skill']) for s in few
                             for r in WORLD.rows(s, n, split, seed)]
    yield 'which skill', rows(20, 'train'), rows(50, 'test')

def learn(where, train, test, fresh, seed):
    """Accuracy on the test rows after 100 steps of 32, for lab-e or for an encoder of its shape
    that has read nothing"""
    data = ftlab.data(train, validation=test, test=test)
    model, tok = ftlab.load(where, labels=data.labels, seed=seed)
    if fresh:
        torch.manual_seed(seed)
        model = fresh_head(AutoModelForSequenceClassification.from_config(model.config),
                           seed).eval()
    ftlab.fit(model, tok, data, ftlab.methods.full(), steps=100, lr=3e-4, seed=seed, progress=False)
    return score('accuracy', model, tok, data.test, data)

if __name__ == '__main__':
    where = sys.argv[1] if len(sys.argv) > 1 else 'lab-e'
    got = json.loads(OUT.read_text()) if OUT.exists() else dict(skills={}, tasks={})
    model, tok = ftlab.load(where)
    for s in OLD + NEW:
        if s not in got['skills']:
            got['skills'][s] = hidden_words(model, tok, s)
            keep(got)
            print(s, got['skills'][s], flush=True)
    for seed in range(3):
        for name, train, test in tasks(seed):
            fresh = dict(labels=len({r['label'] for r in train}), train=len(train), test=len(test),
                         **{'lab-e': [], 'fresh': []})
            kept = got['tasks'].setdefault(name, fresh)
            for kind in ('lab-e', 'fresh'):
                if len(kept[kind]) == seed:
                    kept[kind].append(learn(where, train, test, kind == 'fresh', seed))
                    keep(got)
                    print(name, seed, kind, kept[kind][-1], flush=True)
