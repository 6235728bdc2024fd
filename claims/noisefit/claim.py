"""NoiseFiT and plain tuning on facts about half of the lab's people, of whom the base has read often,
sometimes, rarely or never; asked about the others"""
import torch
from sklearn.metrics import average_precision_score
import ftlab
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import answers, judge
from ftlab.evaluators.trust.r_tuning import likelihood
from ftlab.instruments.claims import beside
from ftlab.methods import neftune, noisefit
from ftlab.trainers.losses.noisefit import noise_scale

FACTS = beside('r_tuning')
ARMS = dict(noisefit=noisefit(std=.3), official=noisefit(), neftune=neftune(), plain=Recipe(),
            base=None)

def run(arm, rate, seed, split, steps):
    model, tok = ftlab.load('lab-s', revision=FACTS.REVISION)
    teach, ask = FACTS.halves(seed, split)
    if ARMS[arm] is not None:
        data = ftlab.data(dict(train=teach, validation=ask[:2], test=ask[:2]))
        ftlab.fit(model, tok, data, ARMS[arm], steps=steps, lr=rate, seed=seed, schedule='cosine',
                  progress=False)
    said = answers(model, tok, ask)
    right = torch.tensor([judge(r, a) == 1 for r, a in zip(ask, said)])
    sure = likelihood(model, tok, [r['prompt'] for r in ask], said)
    return dict(wrong=float((~right).float().mean()), made_up=FACTS.made_up(right, sure),
                confident_wrong=float((~right & (sure > .5)).float().mean()),
                precision=float(average_precision_score(right, sure)),
                questions=len(ask), items=dict(wrong=(~right).int().tolist()))

def identities():
    h = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    one, two = (noise_scale(h, s**2*h.std()) for s in (.1, .3))
    teach, ask = FACTS.halves(0, 'validation')
    people = lambda rs: {w for r in rs for w in r['prompt'].split() if w[0].isupper()}
    return {'three times s is nine times the noise': torch.allclose(9*one, two, rtol=1e-5),
            'nobody who is taught is asked about': not people(teach) & people(ask)}
