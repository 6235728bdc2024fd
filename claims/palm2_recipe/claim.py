"""lab-s learns to solve word problems in steps; then it is tuned to tell its right solutions from its wrong ones, and
among 16 solutions to a question an answer is chosen by a vote, or by what it says of them"""
import random
from functools import lru_cache, partial
import torch
import ftlab
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import answers, row_nlls
from ftlab.core.text import split_of
from ftlab.lab.world import PEOPLE, THINGS, digits
from ftlab.trainers.curation.palm2_recipe import (LAB, clusters, contrasted, contrasts,
                                                  evaluator_scores, final_answer, judging,
                                                  outcomes, sample_solutions, verdict_words)

MORE, LESS = ('finds', 'takes'), ('sells', 'breaks')
ROWS, WRITING, JUDGING = 2000, 80, 120 # training rows; steps of each stage
RATE, BATCH = 1e-3, 16 # of writing; the judging has 8 pairs, of 16 solutions
DRAWN_FOR, DRAWS, MOST = 400, 4, 3 # training questions to learn judging from; solutions and pairs of each
N, TOP, LONGEST = 16, 4, 22 # solutions of a question, groups that are reranked, tokens of a solution
ASKED = dict(validation=50, test=80)
GREEDY = 200 # questions for a single, greedy answer of the generator

answer = partial(final_answer, marks=('=',))

def problem(r) -> dict:
    "A number of things and three changes, as a row"
    total = r.randrange(5, 25)
    said, steps = [digits(total, 2)], []
    for _ in range(3):
        way, by = r.choice((1, -1)) if total > 9 else 1, r.randrange(1, 10)
        total += way*by
        said.append(f'{r.choice(MORE if way > 0 else LESS)} {by}')
        steps.append(f'{"+" if way > 0 else "-"} {by} = {digits(total, 2)}')
    who, what = r.choice(PEOPLE), r.choice(THINGS)
    text = f'{who} has {said[0]} {what} , ' + ' , '.join(said[1:]) + f' : how many {what} ?'
    return dict(prompt=text, response=said[0] + ' ' + ' ; '.join(steps))

def problems(n, split, seed) -> list[dict]:
    r, out = random.Random(f'{seed} {split}'), {}
    while len(out) < n:
        row = problem(r)
        if split_of(row['prompt']) == split:
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
    "Right and wrong solutions of the generator to training questions"
    rows = problems(ROWS, 'train', seed)[:DRAWN_FOR]
    problem, gold = [r['prompt'] for r in rows], [r['response'] for r in rows]
    said = sample_solutions(*generator(seed), problem, DRAWS, 1., LONGEST, seed)
    return tuple(contrasts(problem, gold, said, answer, MOST, seed))

def evaluator(seed, rate, loss='pairwise'):
    "lab-s, tuned to judge the generator's solutions"
    model, tok = ftlab.load('lab-s')
    recipe = Recipe('evaluator', source=contrasted(pairs(seed), LAB),
                    objective=judging(verdict_words(tok, LAB), loss))
    train = problems(2, 'train', seed)
    data = ftlab.data(dict(train=train, validation=train, test=train))
    ftlab.fit(model, tok, data, recipe, steps=JUDGING, batch_size=BATCH//2, lr=rate, seed=seed,
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

def greedy(split, seed) -> dict:
    "The share of questions that the generator's greedy answer solves"
    rows = problems(GREEDY, split, seed + 2)
    right = [float(answer(s) == answer(r['response']))
             for s, r in zip(answers(*generator(seed), rows, LONGEST), rows)]
    return dict(solved=sum(right)/GREEDY, gain=sum(right)/GREEDY, items=dict(solved=right))

def run(arm, rate, seed, split, steps):
    if arm == 'first':
        return greedy(split, seed)
    problem, gold = asked(split, seed)
    said = drawn(seed, split, 1. if arm == 'reranked' else rate)
    if arm == 'majority':
        found = chosen(outcomes(said, gold, None, TOP, answer), 'maj')
        return found | dict(mixed=found['score'])
    if arm == 'likeliest':
        scores = each_once(problem, said, partial(likelihoods, seed))
        return chosen(outcomes(said, gold, scores, TOP, answer), 'rerank all')
    judge, tok = evaluator(seed, rate), generator(seed)[1]
    scores = each_once(problem, said, lambda c: evaluator_scores(judge, tok, c, LAB).tolist())
    found = chosen(outcomes(said, gold, scores, TOP, answer), 'rerank')
    return found | dict(mixed=found['weighted'], told=told(said, gold, scores))

def told(solutions, golds, scores) -> float:
    "How often a right solution has a higher score than a wrong one to the same question; a tie counts half"
    pairs = [(a, b) for said, gold, s in zip(solutions, golds, scores)
             for x, a in zip(said, s) if answer(x) == answer(gold)
             for y, b in zip(said, s) if answer(y) != answer(gold)]
    return sum(.5 + .5*((a > b) - (a < b)) for a, b in pairs)/max(len(pairs), 1)

WAYS = {'weighted': 'weighted', 'all': 'rerank all', 'same draws': 'maj', 'one draw': 'pass@1'}

def derive(found) -> dict:
    "Other ways of choosing among the solutions that were reranked"
    of = found.get('reranked')
    if of is None:
        return {}
    of = {k: v for k, v in of.items() if k != 'items'} # they are those of reranking
    return {name: dict(of, score=of[key], mixed=of[key]) for name, key in WAYS.items()}

def identities() -> dict[str, bool]:
    splits = {s: {r['prompt'] for r in problems(300, s, 0)}
              for s in ('train', 'validation', 'test')}
    said = [[r['response']]*N for r in problems(20, 'test', 0)]
    gold = [r['response'] for r in problems(20, 'test', 0)]
    perfect = outcomes(said, gold, [[1.]*N]*20, TOP, answer)
    return {'no problem is in two splits': not any(splits[a] & splits[b] for a in splits
                                                   for b in splits if a < b),
            'the answer follows from the numbers': all(
                int(answer(r['response']).replace(' ', '')) == sum(numbers(r))
                for r in problems(300, 'test', 1)),
            'where all solutions are right, every way of choosing is':
                all(min(v) == 1 for v in perfect.values()),
            'a question with one answer has one group': len(clusters([answer(said[0][0])]*N)) == 1}

def numbers(row) -> tuple:
    "The numbers of a problem, with their signs, as its text has them"
    first, *changes = row['prompt'].partition(' :')[0].split(' , ')
    signed = [int(by)*(1 if verb in MORE else -1) for verb, by in map(str.split, changes)]
    return int(''.join(w for w in first.split() if w.isdigit())), *signed
