"R-Tuning and plain tuning on facts about half of the lab's people, tested on the others and on sums"
import random
from functools import lru_cache
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
import ftlab
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, answers, judge
from ftlab.evaluators.trust.r_tuning import answer_nll, likelihood, r_tuning, statement

REVISION, TIERS = 'step-500', ('often', 'sometimes', 'rarely', 'never')
COVERAGE = 1/3 # of the questions are answered

def rows(tier, n, split, seed):
    return (WORLD.rows('new-facts', n, split, seed) if tier == 'never'
            else WORLD.rows('fact', n, split, seed, TIERS.index(tier) + 1))

@lru_cache(2)
def halves(seed, split):
    "Rows to tune on, and rows of one split about other people"
    rng, train, test = random.Random(f'people/{seed}'), [], []
    for t in TIERS:
        mine = set(rng.sample(sorted(WORLD.people[t]), len(WORLD.people[t])//2))
        about = lambda r: any(w in mine for w in r['prompt'].split())
        train += [r for r in rows(t, 800, 'train', seed) if about(r)][:400]
        test += [r for r in rows(t, 400, split, seed) if not about(r)][:180]
    return train, test

def certainty(model, tok, prompts, said):
    """The probability of 'know' beside 'do' as the word that follows the answer and '. i': one word
    against one, as the official script does it, so that a model that was never taught the
    statements is not judged by their lengths"""
    know = answer_nll(model, tok, prompts, [f'{a} . i know' for a in said])
    do = answer_nll(model, tok, prompts, [f'{a} . i do not know' for a in said])
    return torch.stack([(d[-4] - k[-2]).sigmoid() for k, d in zip(know, do)])

def asked(model, tok, questions):
    "The model's answers without statements; whether each is right; its likelihood and certainty"
    said = [a.split(' .')[0].strip() for a in answers(model, tok, questions, max_new_tokens=12)]
    right = [judge(r, a) == 1 for r, a in zip(questions, said)]
    prompts = [r['prompt'] for r in questions]
    return (torch.tensor(right), likelihood(model, tok, prompts, said),
            certainty(model, tok, prompts, said))

def made_up(right, confidence):
    "The share of wrong answers among the questions of which the model is surest"
    first = confidence.argsort(descending=True, stable=True)[:round(COVERAGE*len(right))]
    return float((~right[first]).float().mean())

def run(arm, rate, seed, split, steps):
    model, tok = ftlab.load('lab-s', revision=REVISION)
    teach, ask = halves(seed, split)
    if arm != 'base':
        data = ftlab.data(dict(train=teach, validation=ask[:2], test=ask[:2]))
        ftlab.fit(model, tok, data, r_tuning() if arm == 'r_tuning' else Recipe(), steps=steps,
                  lr=rate, seed=seed, schedule='constant', progress=False)
    right, like, sure = asked(model, tok, ask)
    sums = WORLD.rows('add', 400, split, seed)
    right_sum, like_sum, sure_sum = asked(model, tok, sums)
    by = dict(both=(like + sure)/2, likelihood=like, certainty=sure)
    out = {f'made_up_{k}': made_up(right, v) for k, v in by.items()}
    out |= {f'precision_{k}': float(average_precision_score(right, v)) for k, v in by.items()}
    of = dict(both=(like_sum + sure_sum)/2, likelihood=like_sum, certainty=sure_sum)
    mixed = 0 < int(right_sum.sum()) < len(sums)
    out |= {f'transfer_{k}': float(roc_auc_score(right_sum, v)) if mixed else .5
            for k, v in of.items()}
    # a reader who tunes plainly ranks by what costs nothing; R-Tuning ranks by the paper's mean
    own = 'both' if arm == 'r_tuning' else 'likelihood'
    out |= {k: out[f'{k}_{own}'] for k in ('made_up', 'precision', 'transfer')}
    n = max(1, int((sure > .5).sum()))
    return out | dict(right=float(right.float().mean()), right_sums=float(right_sum.float().mean()),
                      stated=float((sure > .5).float().mean()),
                      made_up_of_stated=float((~right[sure > .5]).sum())/n, questions=len(ask),
                      excluded={} if mixed else {'sums, all right or all wrong': len(sums)})

def identities():
    model, tok = ftlab.load('lab-s', revision=REVISION)
    teach, ask = halves(0, 'validation')
    few = random.Random(0).sample(teach, 200)
    seen = {}

    class Look:
        def before_fit(self, state):
            seen.update(knew=state.extra['knew'],
                        texts=[tok.decode(r['input_ids']) for r in state.source.rows])

    ftlab.fit(model, tok, ftlab.data(dict(train=few, validation=few[:2], test=few[:2])),
              r_tuning(), steps=1, batch_size=8, callbacks=(Look(),), progress=False)
    base, _ = ftlab.load('lab-s', revision=REVISION)
    knew = [judge(r, a) == 1 for r, a in zip(few, answers(base, tok, few))]
    people = lambda rs: {w for r in rs for w in r['prompt'].split() if w[0].isupper()}
    return {'a row says "know" where the untouched model was right, and only there': seen['knew']
            == knew and 0 < sum(knew) < len(knew),
            'every row teaches the right answer': all(
                statement(r['response'], k) in t
                for r, k, t in zip(few, knew, seen['texts'], strict=True)),
            'nobody who is taught is asked about': not people(teach) & people(ask)}
