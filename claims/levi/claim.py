"""lab-e learns what a guest thought of most things, from rows in which the speaker nearly always gives it
away; then the speaker misleads."""
import random
import torch
import ftlab
from ftlab.core.batches import collate
from ftlab.core.model import evaluating, model_inputs
from ftlab.core.recipe import Recipe
from ftlab.core.tokens import encode
from ftlab.lab.world import ASPECTS, ATTRIBUTES, BAD, GOOD
from ftlab.methods import full, levi

COLORS = ATTRIBUTES['color']
SPEAKERS = dict(good='king', bad='queen') # the planted cue
CUE = dict(id=.9, ood=.1)                 # how often the speaker fits the label
ROWS = 320 # to learn from, 5 times in 100 steps of 16
SMALL_RATE = 3.16e-3                      # of the small model in the output ensemble, by the pilot

def head(model, batches=None, seed=0):
    "Select the classifier"
    return {n: True for n, _ in model.named_parameters() if n.startswith('classifier')}

ARMS = dict(levi=levi(), full=full(), probe=Recipe('probe', select=head))
ALONE = levi(taps=()) # the small model alone

def words(seed) -> dict:
    "The words of each label: known ones, and colours, whose meaning here pretraining cannot know"
    colors = random.Random(f'colors/{seed}').sample(COLORS, len(COLORS))
    k = len(COLORS)//2
    return dict(good=GOOD + colors[:k], bad=BAD + colors[k:])

def rows(n, split, seed, cue):
    "Guests who speak of three things; the label is what they thought of most of them"
    rng, say = random.Random(f'{split}/{seed}/{cue}'), words(seed)
    out = []
    for _ in range(n):
        label, other = rng.sample(('good', 'bad'), 2)
        thought = rng.sample([label, label, rng.choice((label, other))], 3)
        told = ' . '.join(f'the {a} is {rng.choice(say[t])}'
                          for a, t in zip(rng.sample(ASPECTS, 3), thought))
        who = SPEAKERS[label if rng.random() < cue else other]
        out.append(dict(text=f'{who} : {told} . good or bad ?', label=label))
    return out

def tune(recipe, data, rate, seed, steps):
    model, tok = ftlab.load('lab-e', labels=data.labels, seed=seed)
    run = ftlab.fit(model, tok, data, recipe, steps=steps, lr=rate, seed=seed, batch_size=16,
                    progress=False)
    return run, tok

@torch.no_grad()
def chances(model, tok, asked):
    "Probabilities of the labels, [rows, labels]"
    enc, out = [encode(r, tok, 'label') for r in asked], []
    with evaluating(model):
        for i in range(0, len(enc), 100):
            batch = collate(enc[i:i + 100], tok.pad_token_id)
            out.append(model(**model_inputs(batch)).logits.softmax(-1))
    return torch.cat(out)

def run(arm, rate, seed, split, steps):
    train = rows(ROWS, 'train', seed, CUE['id'])
    asked = {k: rows(1000, split, seed, cue) for k, cue in CUE.items()}
    data = ftlab.data(train, validation=asked['id'], test=asked['id'] + asked['ood'])
    made = [tune(ARMS['full' if arm == 'ensemble' else arm], data, rate, seed, steps)]
    if arm == 'ensemble':
        made.append(tune(ALONE, data, SMALL_RATE, seed, steps))
    p = torch.stack([chances(run.model, tok, data.test) for run, tok in made]).mean(0)
    hits = (p.argmax(-1) == torch.tensor([r['label'] for r in data.test])).int().tolist()
    own = dict(id=hits[:1000], ood=hits[1000:])
    return dict({k: sum(h)/1000 for k, h in own.items()}, questions=1000, items=own)

def derive(found):
    "The better of the two baselines, seed by seed, in each number"
    two = [found[a] for a in ('full', 'ensemble') if a in found]
    return dict(better={k: max(f[k] for f in two) for k in CUE}) if len(two) == 2 else {}

def identities():
    fits = {k: sum(r['text'].startswith(SPEAKERS[r['label']]) for r in rows(2000, 'train', 0, c))
            for k, c in CUE.items()}
    return {'the speaker fits 9 of 10 labels, within 3 in 100': abs(fits['id']/2000 - .9) < .03,
            'and 1 of 10 when it misleads': abs(fits['ood']/2000 - .1) < .03,
            'each label has as many words as the other':
            len(words(0)['good']) == len(words(0)['bad'])
            and not set(words(0)['good']) & set(words(0)['bad'])}
