"""lab-s learns to find two numbers with a given sum by trying; then it is tuned to tell its right
solutions from its wrong ones, and among 16 solutions to a question an answer is chosen by a vote,
by what it says of them, or by how likely it finds them"""
import copy
import itertools
import random
from functools import lru_cache, partial
import torch
import ftlab
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import row_nlls
from ftlab.core.text import split_of
from ftlab.lab.world import PEOPLE, digits
from ftlab.trainers.curation.palm2_recipe import (LAB, clusters, contrasted, contrasts,
                                                  evaluator_scores, judging, outcomes,
                                                  sample_solutions, verdict_words)

NUMBERS, FAILED = 5, 2 # numbers of a question; most tries that fail in a solution
ROWS, WRITING, JUDGING = 4000, 120, 80 # training rows; steps of each stage
RATE, BATCH = 1e-3, 16 # of writing: rows; of judging: pairs
DRAWN_FOR, DRAWS, MOST = 400, 8, 4 # questions to learn judging from; solutions and pairs of each
N, TOP, LONGEST = 16, 4, 22 # solutions, groups that are reranked, tokens of a solution
ASKED = dict(validation=50, test=80)

def answer(solution:str) -> str|None:
    "The two numbers of the last try, in order; None if there are not two"
    pair = [w for w in solution.rpartition(';')[2].split() if w.isdigit()][:2]
    return ' '.join(sorted(pair)) if len(pair) == 2 else None

def attempt(r, pair) -> str:
    a, b = r.sample(pair, 2)
    return f'{a} + {b} = {digits(a + b, 2)}'

def problem(r) -> dict:
    "Five numbers, and a sum that exactly two of them have, as a row"
    while True:
        have = r.sample(range(1, 10), NUMBERS)
        pairs = list(itertools.combinations(have, 2))
        right = r.choice(pairs)
        wrong = [p for p in pairs if sum(p) != sum(right)]
        if len(wrong) == len(pairs) - 1:
            break
    tries = [*r.sample(wrong, r.randint(0, FAILED)), right]
    steps = [attempt(r, p) for p in tries]
    text = f'{r.choice(PEOPLE)} has ' + ' , '.join(map(str, have))
    return dict(prompt=f'{text} : which sum is {digits(sum(right), 2)} ?',
                response=' ; '.join(steps))

def content(prompt:str) -> str:
    "The five numbers in order, and the sum: what two questions share that differ in words alone"
    have, _, want = prompt.partition(':')
    return ' '.join([*sorted(w for w in have.split() if w.isdigit()), 'to', want])

def problems(n, split, seed) -> list[dict]:
    r, out = random.Random(f'{seed} {split}'), {}
    while len(out) < n:
        row = problem(r)
        if split_of(content(row['prompt'])) == split:
            out.setdefault(row['prompt'], row)
    return list(out.values())

def asked(split, seed) -> tuple[list[str], list[str]]:
    rows = problems(ASKED[split], split, seed)
    return [r['prompt'] for r in rows], [r['response'] for r in rows]

# the caches hold the two tuning seeds, or the two of the sensitivity, which the tool takes in turn
@lru_cache(2)
def generator(seed):
    "lab-s, tuned on the data's solutions"
    model, tok = ftlab.load('lab-s')
    train = problems(ROWS, 'train', seed)
    data = ftlab.data(dict(train=train, validation=train[:2], test=train[:2]))
    ftlab.fit(model, tok, data, Recipe(), steps=WRITING, batch_size=BATCH, lr=RATE, seed=seed,
              progress=False)
    return model, tok

@lru_cache(2)
def pairs(seed) -> tuple:
    """Right and wrong solutions of the generator to training questions; those without an answer are
    never chosen, so not judged. Where none is right, the data's own would stand for it and could be
    known by its style; such questions are left out."""
    rows = problems(ROWS, 'train', seed)[:DRAWN_FOR]
    said = sample_solutions(*generator(seed), [r['prompt'] for r in rows], DRAWS, 1., LONGEST, seed)
    found = [(r['prompt'], r['response'], list(filter(answer, s))) for r, s in zip(rows, said)
             if answer(r['response']) in map(answer, s)]
    return tuple(contrasts(*map(list, zip(*found)), answer, MOST, seed))

def evaluator(seed, rate, loss='pairwise'):
    "The generator, tuned to judge its own solutions"
    model, tok = generator(seed)
    model = copy.deepcopy(model)
    recipe = Recipe('evaluator', source=contrasted(pairs(seed), LAB),
                    objective=judging(verdict_words(tok, LAB), loss))
    train = problems(2, 'train', seed)
    data = ftlab.data(dict(train=train, validation=train, test=train))
    ftlab.fit(model, tok, data, recipe, steps=JUDGING, batch_size=BATCH, lr=rate, seed=seed,
              progress=False)
    return model

@lru_cache(32)
def drawn(seed, split, temperature) -> list[list[str]]:
    problem, _ = asked(split, seed)
    return sample_solutions(*generator(seed), problem, N, temperature, LONGEST, seed + 1)

def each_once(problem, solutions, score) -> list[list[float]]:
    "Score every different solution to a question once"
    cases = list(dict.fromkeys((p, s) for p, said in zip(problem, solutions) for s in said))
    known = dict(zip(cases, score(cases)))
    return [[known[p, s] for s in said] for p, said in zip(problem, solutions)]

def likelihoods(seed, cases) -> list[float]:
    "How likely the generator finds each solution"
    rows = [dict(prompt=p, response=s) for p, s in cases]
    return torch.tensor([-nll for nll, _ in row_nlls(*generator(seed), rows)]).exp().tolist()

def chosen(found, name) -> dict:
    "An outcome whose score is that of one way of choosing"
    mean = {k: sum(v)/len(v) for k, v in found.items()}
    return dict(mean, score=mean[name], gain=mean[name], questions=len(found[name]),
                items=dict(score=found[name], gain=found[name]))

def run(arm, rate, seed, split, steps):
    problem, gold = asked(split, seed)
    said = drawn(seed, split, 1. if arm == 'reranked' else rate)
    if arm == 'majority':
        return chosen(outcomes(said, gold, None, TOP, answer), 'maj')
    if arm == 'likeliest':
        scores = each_once(problem, said, partial(likelihoods, seed))
        return chosen(outcomes(said, gold, scores, TOP, answer), 'rerank all')
    judge, tok = evaluator(seed, rate), generator(seed)[1]
    scores = each_once(problem, said, lambda c: evaluator_scores(judge, tok, c, LAB).tolist())
    found = chosen(outcomes(said, gold, scores, TOP, answer), 'rerank')
    return found | dict(told=told(said, gold, scores))

def told(solutions, golds, scores) -> float:
    """How often a right solution scores higher than one with a wrong answer to its question; a tie
    counts half. What has no answer can't be chosen, and is easy to tell"""
    pairs = [(a, b) for said, gold, s in zip(solutions, golds, scores)
             for x, a in zip(said, s) if answer(x) == answer(gold)
             for y, b in zip(said, s) if answer(y) not in (None, answer(gold))]
    return sum(.5 + .5*((a > b) - (a < b)) for a, b in pairs)/max(len(pairs), 1)

WAYS = {'weighted': 'weighted', 'all': 'rerank all', 'same draws': 'maj', 'one draw': 'pass@1',
        'oracle': 'maj top'}

def derive(found) -> dict:
    "Other ways of choosing among the solutions that were reranked"
    of = found.get('reranked')
    if of is None:
        return {}
    of = {k: v for k, v in of.items() if k != 'items'} # they are those of reranking
    return {name: dict(of, score=of[key]) for name, key in WAYS.items()}

def identities() -> dict[str, bool]:
    rows = {s: problems(300, s, 0) for s in ('train', 'validation', 'test')}
    asks = {s: {content(r['prompt']) for r in rows[s]} for s in rows}
    gold = [r['response'] for r in rows['test'][:20]]
    perfect = outcomes([[g]*N for g in gold], gold, [[1.]*N]*20, TOP, answer)
    turned = [' ; '.join([g, ' '.join(reversed(answer(g).replace(' ', ' + ').split()))])
              for g in gold]
    return {'no numbers with their sum are in two splits, whatever the order': not any(
                asks[a] & asks[b] for a in asks for b in asks if a < b),
            'two of the numbers have the sum, no other two, and they are the answer': all(
                solved(r['prompt']) == [answer(r['response'])] for r in rows['test']),
            'where all solutions are right, every way of choosing is':
                all(min(v) == 1 for v in perfect.values()),
            'two numbers in another order are one answer': all(
                len(clusters([answer(g), answer(t)])) == 1 for g, t in zip(gold, turned))}

def solved(prompt) -> list[str]:
    "Every two numbers of a question that have its sum"
    have, _, want = prompt.partition(':')
    want = int(''.join(w for w in want.split() if w.isdigit()))
    have = [w for w in have.split() if w.isdigit()]
    return [' '.join(sorted(p)) for p in itertools.combinations(have, 2)
            if sum(map(int, p)) == want]
