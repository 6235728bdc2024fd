"Any other order will do: three ways to learn a task with many right answers, what each breaks, and how far each goes"
import copy, random
import torch
import ftlab
from ftlab.instruments.compare import target_gain, tune as choose
from ftlab.core.batches import Data
from ftlab.core.generate import generate
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import skills
from ftlab.lab.world import LETTERS, split_of, zigzag
from ftlab.trainers.rl.grpo import grpo
from ftlab.trainers.rl.razor import answer_kl, explained, evaluations, own_answers, weight_distance

ASKS = ('show the letters {x} , different order :', 'write {x} in different order =',
        'the letters {x} in different order are')
OLD = 'fact context add reverse sort max last dedupe count tavi review tool'.split()
STEPS, EVERY, BATCH, DRAWS, QUESTIONS, GRID, LONGEST = 40, 10, 64, 8, 600, (1e-4, 3e-4, 1e-3), 8
ARMS = ('grpo', 'sft', 'oracle')

def questions(n, split, seed):
    r, out = random.Random(f'{split}/{seed}'), {}
    while len(out) < n:
        x = [r.choice(LETTERS) for _ in range(r.choice((3, 4, 5, 6)))]
        prompt = r.choice(ASKS).format(x=' '.join(x))
        if split_of(prompt) == split and zigzag(x) != x:
            out[prompt] = dict(prompt=prompt, response=' '.join(zigzag(x)), given=' '.join(x))
    return list(out.values())

def other_order(row, answer):
    return float(sorted(answer.split()) == sorted(row['given'].split()) and answer != row['given'])

def score(model, tok, rows):
    return sum(
        other_order(r, a)
        for r, a in zip(rows, generate(model, tok, [r['prompt'] for r in rows],
                                       max_new_tokens=LONGEST)))/len(rows)

def old(model, tok, n, split, seed):
    s = skills(model, n, split, OLD, tok, seed)
    return sum(s.values())/len(s)

def prepare(seed):
    "The base and each arm's method and data"
    model, tok = ftlab.load('lab-s')
    rows, few = questions(QUESTIONS, 'train', seed), questions(150, 'validation', seed)
    asked = [r for r in rows for _ in range(DRAWS)]
    said = own_answers(model, tok, [r['prompt'] for r in asked], LONGEST, seed)
    own = [dict(r, response=s['response']) for r, s in zip(asked, said) if other_order(r, s['response'])]

    def data(train):
        return Data(train=train, validation=few[:2], test=few[:2], kind='text', name='another order')

    return (model, tok, few,
            dict(grpo=(grpo(beta=0., reward=other_order), data(rows)),
                 sft=(Recipe('sft'), data(rows)), oracle=(Recipe('oracle'), data(own))))

def tune() -> dict:
    model, tok, few, arms = prepare(10_000)
    def gain(name, rate):
        recipe, data = arms[name]
        run = ftlab.fit(copy.deepcopy(model), tok, data, recipe, steps=STEPS, batch_size=BATCH,
                        lr=rate, seed=10_000, progress=False)
        return score(run.model, tok, few)
    return choose(gain, dict.fromkeys(ARMS, GRID))

def run(seed, tuned):
    model, tok, few, arms = prepare(seed)
    said = own_answers(model, tok, [r['prompt'] for r in few], LONGEST, seed)
    both = {f'{n}, {kind}': (*arms[n], tuned[n]['rate']*share) for n in ARMS
            for kind, share in (('tuned', 1.), ('gentler', 1/3))}
    points = evaluations(model, tok, both, lambda m: score(m, tok, few),
                   lambda m: old(m, tok, 25, 'validation', seed), said, steps=STEPS, every=EVERY,
                   seed=seed, keep=True, batch_size=BATCH)
    points = [p for p in points if p['step']]
    path = {n: [p for p in points if p['arm'] == f'{n}, tuned'] for n in ARMS}
    target = target_gain(list(path.values()))
    test = questions(400, 'test', seed)
    before = score(model, tok, test), old(model, tok, 400, 'test', seed)
    out = {}
    for n in ARMS:
        at = next((p for p in path[n] if target is not None and p['gain'] >= target), path[n][-1])
        tuned_model = copy.deepcopy(model)
        tuned_model.load_state_dict(at['weights'], strict=False)
        out[n] = dict(forgetting=before[1] - old(tuned_model, tok, 400, 'test', seed),
                      gain=score(tuned_model, tok, test) - before[0], kl=at['kl'],
                      moved=at['moved'], step=at['step'])
    return out | dict(kl=dict(r2=explained(points, 'kl')), distance=dict(r2=explained(points, 'moved')))

def identities() -> dict[str, bool]:
    model, tok = ftlab.load('lab-s')
    said = own_answers(model, tok, [r['prompt'] for r in questions(20, 'train', 0)], LONGEST)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).add_(.05)
    curve = [dict(forgetting=3*x**2 - x, kl=x, moved=1.) for x in (.1, .4, .5, .9)]
    return {'a model is at no distance from itself': answer_kl(model, model, tok, said) == 0
            == weight_distance(model, model),
            'a changed model is at a positive distance': answer_kl(
                model, other, tok, said) > 0 < weight_distance(model, other),
            'a quadratic is explained wholly, a constant explains nothing': abs(explained(curve, 'kl') - 1) < 1e-9
            and abs(explained(curve, 'moved')) < 1e-9,
            'a right answer is another order of the same letters': other_order(
                dict(given='a b c'), 'c a b') == 1
            and other_order(dict(given='a b c'), 'a b c') == 0
            and other_order(dict(given='a b c'), 'a b b') == 0}
