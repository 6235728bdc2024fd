"""lab-s, taught a little about sixteen things, is tuned on a few descriptions of eight of them: by
guesses that are judged, by their names, by their names for half of the steps, or not at all"""
from functools import lru_cache
import copy
import random
import torch
import ftlab
from ftlab.core.data import Data
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import answers
from ftlab.trainers.callbacks import Every
from ftlab.trainers.rl.cls_rl import (base_and_new, base_to_new, cls_rl, described,
                                      equality_reward, question, typical_words)

THINGS, LISTED, SHOTS, HELD, ASKED = 16, 8, 8, 25, 50
QUESTIONS, GROUP = 6, 4 # of a step; answers to each, where they are drawn
STAGE, STAGE_ROWS, STAGE_RATE = 80, 32, 1e-3

def data_of(rows):
    return Data(train=rows, validation=rows[:2], test=rows[:2], kind='text', name='things')

@lru_cache(2)
def untuned(seed):
    "lab-s after a short stage on all sixteen things, lists of eight of them drawn anew"
    things, r = typical_words(THINGS, seed), random.Random(f'stage/{seed}')
    rows = []
    for e in described(things, STAGE*STAGE_ROWS//THINGS, f'stage/{seed}'):
        others = r.sample([c for c in things if c != e['label']], LISTED - 1)
        rows.append(dict(prompt=question(e['text'], [*others, e['label']], r),
                         response=e['label']))
    model, tok = ftlab.load('lab-s')
    ftlab.fit(model, tok, data_of(rows), steps=STAGE, batch_size=STAGE_ROWS, lr=STAGE_RATE,
              seed=seed, progress=False)
    return model, tok

@lru_cache(4)
def rows_of(seed, split):
    examples = described(typical_words(THINGS, seed), SHOTS + HELD + ASKED, f'{seed}/{split}')
    return base_to_new(examples, SHOTS, HELD, ASKED, seed)

@lru_cache(4)
def before(seed, split):
    return base_and_new(*untuned(seed), rows_of(seed, split))

class Best:
    "Keep the weights that name most of the held-out things, of those after each quarter of the steps"
    def __init__(self, held):
        self.held, self.best, self.weights, self.step = held, -1., None, None

    def look(self, state):
        if not state.step:
            return {}  # the untuned weights are no choice
        said = answers(state.model, state.tok, self.held)
        score = sum(map(equality_reward, self.held, said))/len(said)
        if score > self.best:
            kept = {n: p.detach().clone() for n, p in state.model.state_dict().items()}
            self.best, self.weights, self.step = score, kept, state.step
        return dict(held=score)

def run(arm, rate, seed, split, steps):
    rows, start = rows_of(seed, split), before(seed, split)
    if arm == 'zero':
        return start | dict(gain=0., questions=len(rows.asked['new']))
    base, tok = untuned(seed)
    model, best = copy.deepcopy(base), Best(rows.held)
    recipe, size = Recipe(arm), QUESTIONS
    if arm == 'cls_rl':
        recipe, size = cls_rl(group=GROUP), QUESTIONS*GROUP
    quarters = {round(steps*q) for q in (1/4, 1/2, 3/4, 1)}
    run = ftlab.fit(model, tok, data_of(rows.train), recipe, steps=steps, batch_size=size, lr=rate,
                    seed=seed, callbacks=(Every(quarters, best.look),), progress=False)
    model.load_state_dict(best.weights)
    found = base_and_new(model, tok, rows)
    return found | dict(gain=found['base'] - start['base'], kept_step=best.step,
                        read=run.log[-1]['tokens'], questions=len(rows.asked['new']))

def identities() -> dict[str, bool]:
    rows = rows_of(0, 'validation')
    trained = {r['response'] for r in rows.train}
    texts = lambda part: {r['prompt'].partition(' has ')[2] for r in part}
    asked = texts(rows.asked['base']) | texts(rows.asked['new'])
    row = dict(response='ring')
    group = torch.tensor([[equality_reward(row, a) for a in ('ring', 'a ring', 'Ring', 'cup')]])
    return {'eight labels of each of eight things': len(rows.train) == SHOTS*LISTED
            and trained == set(rows.base) and not trained & set(rows.new),
            'no description that is asked was trained or chosen by':
                not asked & (texts(rows.train) | texts(rows.held)),
            'the equality reward wants the label alone': group.tolist() == [[1., 0., 0., 0.]]}
