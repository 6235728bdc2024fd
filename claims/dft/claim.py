"""DFT and plain fine-tuning from a base that is right about three times in ten: on lists
reversed, where the letters of some training answers are scrambled, and on sums with steps,
where every training answer is right and the order of the summands is the writer's own"""
import random
from dataclasses import replace
from functools import lru_cache
import torch
import ftlab
from ftlab.core.batches import collate
from ftlab.core.model import model_inputs
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, answers
from ftlab.core.tokens import encode
from ftlab.trainers.losses.dft import probability
from ftlab.trainers.objective import loss_mask, token_nll

BASE = 'step-250'
SKILLS = dict(noise='reverse', paths='add-steps')
SCRAMBLED = .3   # the share of the training answers on the ground `noise`
KEPT = .5        # the share of the rows that the arm `filtered` trains on: those the base finds likeliest
ARMS = dict(dft=('noise', ftlab.methods.dft()), full=('noise', Recipe()),
            filtered=('noise', Recipe()), base=('noise', None),
            dft_paths=('paths', ftlab.methods.dft()), full_paths=('paths', Recipe()),
            base_paths=('paths', None))

def scramble(row, rng):
    "With probability `SCRAMBLED`, put the letters of the answer in a random order"
    words = row['response'].split()
    wrong = rng.random() < SCRAMBLED
    return dict(row, response=' '.join(rng.sample(words, len(words)))) if wrong else row

def reorder(row, rng):
    "Write each step of a sum as `i + j` or `j + i`: both are right"
    *steps, result = row['response'].split(' ; ')
    words = [s.split() for s in steps]
    other = [[w[2], '+', w[0], *w[3:]] if rng.random() < .5 else w for w in words]
    return dict(row, response=' ; '.join([*map(' '.join, other), result]))

@lru_cache(1)
def taught(ground, seed):
    "The data of a seed, with training answers as the ground has them"
    data, rng = ftlab.data(SKILLS[ground], seed=seed), random.Random(f'{ground}/{seed}')
    change = dict(noise=scramble, paths=reorder)[ground]
    return replace(data, train=[change(r, rng) for r in data.train])

@torch.no_grad()
def likelihoods(model, tok, rows) -> list[float]:
    "Mean log-likelihood of a token of each row's answer"
    out = []
    for i in range(0, len(rows), 100):
        batch = collate([encode(r, tok, 'text') for r in rows[i:i + 100]], tok.pad_token_id)
        loss = token_nll(model(**model_inputs(batch)).logits, batch['labels'])
        out += (-loss.sum(1)/loss_mask(batch['labels']).sum(1)).tolist()
    return out

@lru_cache(1)
def likeliest(seed):
    "The half of the noisy rows whose answers the base finds likeliest"
    data = taught('noise', seed)
    ranked = sorted(zip(likelihoods(*start(), data.train), range(len(data.train))), reverse=True)
    return replace(data, train=[data.train[i] for _, i in ranked[:round(KEPT*len(ranked))]])

def start():
    return ftlab.load('lab-s', revision=BASE)

def right(model, tok, rows) -> list[int]:
    "Whether each answer ends in the right result; the steps before it may be written in any way"
    def result(text):
        return text.split(' ; ')[-1].split()
    outputs = answers(model, tok, rows)
    return [int(result(a) == result(r['response'])) for r, a in zip(rows, outputs)]

def fit(model, tok, data, recipe, rate, seed, steps, callbacks=()):
    "The schedule of the official script: cosine, with a tenth of the steps to warm up"
    ftlab.fit(model, tok, data, recipe, steps=steps, lr=rate, seed=seed, schedule='cosine',
              warmup=steps//10, batch_size=32, callbacks=callbacks, progress=False)

def run(arm, rate, seed, split, steps):
    ground, recipe = ARMS[arm]
    rows = WORLD.rows(SKILLS[ground], 400, split, seed)
    model, tok = start()
    if recipe is not None:
        data = likeliest(seed) if arm == 'filtered' else taught(ground, seed)
        fit(model, tok, data, recipe, rate, seed, steps)
    found = right(model, tok, rows)
    return dict(score=sum(found)/len(found), items=dict(score=found))

def identities() -> dict[str, bool]:
    x, y = (torch.randn(6, 9, requires_grad=True, generator=torch.Generator().manual_seed(0)),
            torch.arange(6))
    nll = torch.nn.functional.cross_entropy(x, y, reduction='none')
    plain, = torch.autograd.grad(nll.sum(), x, retain_graph=True)

    def gradient(alpha):
        loss = (probability(alpha)(nll).detach()*nll).sum()
        return torch.autograd.grad(loss, x, retain_graph=True)[0]

    return {"a token's gradient is its probability times that of cross-entropy": torch.allclose(
                gradient(1.), (-nll).exp().detach()[:, None]*plain, atol=1e-7),
            'with alpha 0 it is plain fine-tuning': torch.equal(gradient(0.), plain)}
