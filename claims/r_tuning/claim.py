"R-Tuning and plain tuning on facts about half of the lab's people, tested on the other half and on sums"
import random
from sklearn.metrics import average_precision_score, roc_auc_score
import ftlab
from ftlab.instruments.compare import tune as choose
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, answers, judge
from ftlab.evaluators.trust.r_tuning import certainty, likelihood, statement

REVISION, STEPS, GRID, TIERS = (
    'step-500', 120, (1e-4, 3e-4, 1e-3), ('often', 'sometimes', 'rarely', 'never'))
ARMS = dict(r_tuning=ftlab.methods.r_tuning(), plain=Recipe())

def rows(tier, n, split, seed):
    return (WORLD.rows('new-facts', n, split, seed) if tier == 'never'
            else WORLD.rows('fact', n, split, seed, TIERS.index(tier) + 1))

def halves(seed, split):
    "Rows to tune on, and rows of one split about other people"
    rng, train, test = random.Random(f'people/{seed}'), [], []
    for t in TIERS:
        mine = set(rng.sample(sorted(WORLD.people[t]), len(WORLD.people[t])//2))
        about = lambda r: any(w in mine for w in r['prompt'].split())
        train += [r for r in rows(t, 800, 'train', seed) if about(r)][:400]
        test += [r for r in rows(t, 320, split, seed) if not about(r)][:150]
    return train, test

def said(model, tok, asked):
    return [a.split(' .')[0].strip() for a in answers(model, tok, asked, max_new_tokens=12)]

def train(arm, rate, seed, split):
    model, tok = ftlab.load('lab-s', revision=REVISION)
    teach, ask = halves(seed, split)
    data = ftlab.data(dict(train=teach, validation=ask[:2], test=ask[:2]))
    run = ftlab.fit(model, tok, data, ARMS[arm], steps=STEPS, lr=rate, seed=seed, progress=False)
    prompts, given = [r['prompt'] for r in ask], said(model, tok, ask)
    right = [judge(r, a) == 1 for r, a in zip(ask, given)]
    sure, doubts, out = likelihood(model, tok, prompts, given), [False]*len(ask), {}
    if arm == 'r_tuning':
        say = certainty(model, tok, prompts, given)
        sure, doubts, out = ((sure + say)/2, (say <= .5).tolist(),
                             dict(certainty_alone=average_precision_score(right, say),
                                  transfer=transfer(model, tok, split, seed)))
    share = lambda these: sum(these)/len(ask)
    return out | dict(
        right=share(right), made_up=share(not k and not d for k, d in zip(right, doubts)),
        willing=1 - share(doubts), average_precision=average_precision_score(right, sure),
        tokens=run.cost['tokens'])

def transfer(model, tok, split, seed):
    "Area under the curve of the certainty on sums; one half where they are all right or all wrong"
    ask = WORLD.rows('add', 400, split, seed)
    given = said(model, tok, ask)
    right = [judge(r, a) == 1 for r, a in zip(ask, given)]
    return (roc_auc_score(right, certainty(model, tok, [r['prompt'] for r in ask], given))
            if 0 < sum(right) < len(right) else .5)

def tune() -> dict:
    return choose(lambda arm, rate: train(arm, rate, 10_000, 'validation')['average_precision'],
                  {a: GRID for a in ARMS})

def run(seed, tuned):
    return {a: train(a, tuned[a]['rate'], seed, 'test') for a in ARMS}

def identities() -> dict[str, bool]:
    model, tok = ftlab.load('lab-s', revision=REVISION)
    teach, ask = halves(0, 'validation')
    few = random.Random(0).sample(teach, 200)
    seen = {}
    class Look:
        def before_fit(self, state):
            seen.update(knew=state.extra['knew'],
                        texts=[tok.decode(r['input_ids']) for r in state.source.rows])
    ftlab.fit(model, tok, ftlab.data(dict(train=few, validation=few[:2], test=few[:2])),
              ARMS['r_tuning'], steps=1, batch_size=8, callbacks=(Look(),), progress=False)
    base, _ = ftlab.load('lab-s', revision=REVISION)
    knew = [judge(r, a) == 1 for r, a in zip(few, answers(base, tok, few))]
    people = lambda rs: {w for r in rs for w in r['prompt'].split() if w[0].isupper()}
    return {'a row says "know" where the untouched model was right, and only there': seen['knew']
            == knew and 0 < sum(knew) < len(knew),
            'every row teaches the right answer': all(
                statement(r['response'], k) in t
                for r, k, t in zip(few, knew, seen['texts'], strict=True)),
            'nobody who is taught is asked about': not people(teach) & people(ask)}
