"""Masked and plain fine-tuning on the same 200 lists: held-out accuracy, and which predictions
change after one letter of the question, or of the answer so far, was swapped"""
import random
import torch
from torch.nn.utils.rnn import pad_sequence
import ftlab
from ftlab.core.recipe import Recipe
from ftlab.core.batches import collate
from ftlab.core.scorers import WORLD, answers, judge
from ftlab.core.state import State
from ftlab.core.tokens import encode
from ftlab.lab.world import LETTERS
from ftlab.trainers.losses.masked_thought import mask_answers
from ftlab.trainers.objective import IGNORE

SKILL, ROWS = 'reverse', 200
ITEMS, SEEN, SWAPPED = 1000, 200, 200 # questions at the end, on the way, and with a swapped letter
ARMS = dict(masked_thought=ftlab.methods.masked_thought(),
            random_words=ftlab.methods.masked_thought(noise='random'), full=Recipe(), base=None)

def swapped(row, tok, letters, rng, in_answer):
    """The tokens before and after one letter is swapped, the first prediction that sees it, and one
    prediction that shows whether the question is followed: its place and the right letter"""
    coded = encode(row, tok, 'text')
    ids, first = coded['input_ids'], next(i for i, y in enumerate(coded['labels']) if y != IGNORE)
    sites = [i for i, w in enumerate(ids) if w in letters and (i >= first) == in_answer]
    at = rng.choice(sites[:-1] if in_answer else sites) # only the end mark follows the last letter
    new = rng.choice(sorted(letters - {ids[at]}))
    mirrored = first - 1 + len(sites) - 1 - sites.index(at) # a question's letter in the answer
    shows = (at, ids[at + 1]) if in_answer else (mirrored, new)
    return ids, [*ids[:at], new, *ids[at + 1:]], max(at, first - 1), shows

@torch.no_grad()
def reactions(model, tok, rows, seed, in_answer) -> tuple[list[float], list[int]]:
    """For each row, the share of the later letters whose prediction changes after one letter was
    swapped, and whether the prediction that shows it follows the question"""
    letters, rng = set(tok.convert_tokens_to_ids(LETTERS)), random.Random(seed)
    cases = [swapped(r, tok, letters, rng, in_answer) for r in rows]
    before, after = (model(pad_sequence([torch.tensor(c[k]) for c in cases], batch_first=True,
                                        padding_value=tok.pad_token_id)).logits for k in (0, 1))
    changes, followed = [], []
    for p, q, (ids, _, start, (place, right)) in zip(before, after, cases):
        later = slice(start, len(ids) - 2) # the end mark is left out: only the length decides it
        changed = p[later].argmax(-1) != q[later].argmax(-1)
        changes.append(float(changed.float().mean()))
        followed.append(int(q[place].argmax() == right))
    return changes, followed

def measure(model, tok, rows, seed) -> dict:
    right = [judge(r, a) for r, a in zip(rows[:SEEN], answers(model, tok, rows[:SEEN]))]
    asked, followed = reactions(model, tok, rows[:SWAPPED], seed, False)
    own, kept = reactions(model, tok, rows[:SWAPPED], seed, True)
    share = {k: sum(v)/len(v) for k, v in dict(
        accuracy=right, question=asked, answer=own, followed=followed, kept=kept).items()}
    return share | dict(items=dict(gain=right, question=asked))

class Path:
    "The measurements at a quarter, a half, three quarters and all of the steps"

    def __init__(self, measure, steps):
        self.measure, self.steps, self.every, self.rows = measure, steps, max(1, steps//4), []

    def after_step(self, state):
        if state.step % self.every == 0 or state.step == self.steps:
            self.rows.append(dict(step=state.step, **self.measure(state.model)))

def run(arm, rate, seed, split, steps):
    model, tok = ftlab.load('lab-s', revision='step-250')
    rows = WORLD.rows(SKILL, ITEMS, split, seed)
    known = sum(judge(r, a) for r, a in zip(rows[:SEEN], answers(model, tok, rows[:SEEN])))/SEEN

    def seen(model):
        found = measure(model, tok, rows, seed)
        return found | dict(gain=found['accuracy'] - known)

    path = Path(seen, steps)
    if ARMS[arm] is not None:
        data = ftlab.data(SKILL, seed=seed, n=ROWS)
        ftlab.fit(model, tok, data, ARMS[arm], steps=steps, lr=rate, seed=seed, schedule='cosine',
                  batch_size=32, callbacks=(path,), progress=False)
    found = [judge(r, a) for r, a in zip(rows, answers(model, tok, rows))]
    end = path.rows[-1] if path.rows else seen(model)
    numbers = {k: end[k] for k in ('gain', 'question', 'answer', 'followed', 'kept')}
    return numbers | dict(score=sum(found)/len(found), path=path.rows,
                          items=dict(score=found, question=end['items']['question']))

def identities() -> dict[str, bool]:
    model, tok = ftlab.load('lab-s')
    s = State(model, tok)
    s.steps, s.step, s.pad_id = 100, 100, tok.pad_token_id
    b = collate([encode(r, tok, 'text') for r in ftlab.data(SKILL, n=200).train], tok.pad_token_id)
    new = mask_answers()(b, s)
    hidden = new['input_ids'] != b['input_ids']
    s.step = 0
    return {'the labels are as they were': torch.equal(new['labels'], b['labels']),
            'nothing of the question is hidden': not bool((hidden & (b['labels'] == IGNORE)).any()),
            'something of the answer is': bool(hidden.any()),
            'at the first step nothing is hidden': torch.equal(
                mask_answers()(b, s)['input_ids'], b['input_ids'])}
