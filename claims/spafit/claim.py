"""lab-e, an encoder with biases, learns to tell right answers from wrong ones: is an answer to a
question of one of four skills its own, or that of another question?"""
import random
import ftlab
from ftlab.adapters.attach import attach
from ftlab.core.scorers import WORLD, label_hits
from ftlab.methods import bitfit, full, lora, spafit

SKILLS = ('sort', 'reverse', 'fact', 'add')
TARGETS = ('q', 'v')
ARMS = dict(spafit=spafit(), lora=lora(targets=TARGETS), bitfit=bitfit(), full=full(),
            upside_down=spafit(reverse=True),
            thin=lora(r=4, alpha=8., targets=TARGETS))  # everywhere, as many values as SPAFIT

def judged(n, split, seed):
    "Questions of each skill with their own answer (yes) or another question's (no), half and half"
    rng, out = random.Random(f'{split}/{seed}'), []
    for skill in SKILLS:
        rows = WORLD.rows(skill, n//len(SKILLS), split, seed)
        answers = sorted({r['response'] for r in rows})
        for r in rows:
            right = rng.random() < .5
            others = [a for a in answers if a != r['response']]
            said = r['response'] if right else rng.choice(others)
            out.append(dict(text=f'{r["prompt"]} {said}', label='yes' if right else 'no'))
    return rng.sample(out, len(out))

def run(arm, rate, seed, split, steps):
    train, ask = judged(32*steps, 'train', seed), judged(1000, split, seed)
    data = ftlab.data(train, validation=ask, test=ask)
    model, tok = ftlab.load('lab-e', labels=data.labels, seed=seed)
    done = ftlab.fit(model, tok, data, ARMS[arm], steps=steps, lr=rate, seed=seed, progress=False)
    hits = label_hits(done.model, tok, data.test)
    trained = sum(p.numel() for p in done.delta.attached.parameters().values())
    return dict(gain=sum(hits)/len(hits), trained=trained, questions=len(hits),
                items=dict(gain=[int(h) for h in hits]))

def size(recipe) -> int:
    "How many values a method trains beside the classifier"
    model, _ = ftlab.load('lab-e')
    att = attach(model, recipe.select(model), recipe.delta)
    return sum(p.numel() for p in att.parameters().values())

def identities():
    rows = judged(400, 'train', 0)
    return {'as many right answers as wrong ones, within 10 in 100':
            abs(sum(r['label'] == 'yes' for r in rows)/len(rows) - .5) < .1,
            'SPAFIT trains at most half as many values as LoRA at all blocks':
            2*size(ARMS['spafit']) <= size(ARMS['lora']),
            'LoRA of rank 4 at all blocks has as many as SPAFIT, within 5 in 100':
            abs(size(ARMS['thin'])/size(ARMS['spafit']) - 1) < .05}
