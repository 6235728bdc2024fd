"""Half fine-tuning beside full fine-tuning: a finished change half undone, and a stream of tasks
with a new half for each"""
from functools import lru_cache
import ftlab
from ftlab.adapters.edit import scale, write_change
from ftlab.adapters.subsets.hft import half_reset, hft
from ftlab.core.lab import lab
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, answers, judge

MODEL, TASK, BATCH = 'lab-s', 'new-procedure', 32
STREAM = ('new-procedure', 'changed-rule', 'new-format')
# arm -> (round) -> the method of one task
METHODS = dict(full=lambda k: Recipe('full'), hft=lambda k: hft(round=k), same_half=lambda k: hft())
# edits of the change that full fine-tuning makes, at the rate that learns best
EDITS, RATE = dict(half_reset=half_reset, halved=lambda seed: scale(.5)), 1e-3
ITEMS = dict(validation=(100, 50), test=(400, 100))  # of a task, of each old skill

def outcomes(model, tok, names, n, split, seed):
    rows = {s: WORLD.rows(s, n, split, seed) for s in names}
    return {s: [judge(r, a) for r, a in zip(x, answers(model, tok, x))] for s, x in rows.items()}

def mean(found):
    return sum(sum(x)/len(x) for x in found.values())/len(found)

def scores(model, tok, names, seed, split):
    "Outcomes of the tasks, and the mean over the old skills"
    new, old = ITEMS[split]
    skills = outcomes(model, tok, lab('models').skills_of(tok), old, split, seed)
    return outcomes(model, tok, names, new, split, seed), mean(skills)

@lru_cache(2)
def before(names, seed, split):
    return scores(*ftlab.load(MODEL), names, seed, split)

def train(model, tok, skill, recipe, rate, seed, steps):
    data = ftlab.data(skill, seed=seed, n=steps*BATCH)
    ftlab.fit(model, tok, data, recipe, steps=steps, batch_size=BATCH, lr=rate, seed=seed,
              progress=False)

@lru_cache(1)
def finished(seed, split, steps):
    "The change that full fine-tuning makes, with what it gains and forgets"
    model, tok = ftlab.load(MODEL)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, tok, TASK, Recipe('full'), RATE, seed, steps)
    change = {n: p.detach() - base[n] for n, p in model.named_parameters()}
    return base, change, measured(model, tok, seed, split)

def measured(model, tok, seed, split):
    (new, old), (was, had) = scores(model, tok, (TASK,), seed, split), before((TASK,), seed, split)
    return mean(new) - mean(was), had - old

def edited(arm, seed, split, steps):
    "The share of the gain that an edit keeps, and the share of the forgetting that it undoes"
    base, change, (gained, forgot) = finished(seed, split, steps)
    model, tok = ftlab.load(MODEL)
    write_change(model, base, EDITS[arm](seed=seed)(change, model))
    gain, forgetting = measured(model, tok, seed, split)
    kept, undone = gain/gained, 1 - forgetting/forgot
    return dict(gain=gain, forgetting=forgetting, kept=kept, undone=undone, both=kept + undone)

def stream(arm, rate, seed, split, steps):
    "One task after another; `op` and `bwt` as TRACE defines them, and the loss of the old skills"
    new = ITEMS[split][0]
    model, tok = ftlab.load(MODEL)
    learned = {}
    for k, skill in enumerate(STREAM):
        train(model, tok, skill, METHODS[arm](k), rate, seed, steps//len(STREAM))
        learned |= outcomes(model, tok, (skill,), new, split, seed)
    (last, old), (was, had) = scores(model, tok, STREAM, seed, split), before(STREAM, seed, split)
    back = [sum(last[s])/len(last[s]) - sum(learned[s])/len(learned[s]) for s in STREAM[:-1]]
    return dict(op=mean(last), gain=mean(last) - mean(was), bwt=sum(back)/len(back),
                learned=mean(learned), old=had - old, items=dict(op=last, gain=last))

def run(arm, rate, seed, split, steps):
    if arm in EDITS:
        return edited(arm, seed, split, steps)
    return stream(arm.removeprefix('stream_'), rate, seed, split, steps)
