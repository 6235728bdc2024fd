"""Half fine-tuning beside full fine-tuning: one task, a finished change half undone, a stream of
tasks with a new half for each"""
from functools import lru_cache
import ftlab
from ftlab.adapters.edit import scale, write_change
from ftlab.adapters.subsets.hft import half_reset, hft
from ftlab.core.lab import lab
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, answers, judge
from ftlab.trainers.callbacks import Every

MODEL, TASK, BATCH = 'lab-s', 'new-procedure', 32
STREAM = ('new-procedure', 'changed-rule', 'new-format')
# arm -> (round) -> the method of one task
METHODS = dict(full=lambda k: Recipe('full'), hft=lambda k: hft(round=k),
               quarter=lambda k: hft(.25), three_quarters=lambda k: hft(.75),
               same_half=lambda k: hft())
# edits of the change that full fine-tuning makes
EDITS = dict(half_reset=half_reset, halved=lambda seed: scale(.5))
ITEMS = dict(validation=(100, 50), test=(400, 100))  # of the task, of each old skill

@lru_cache(4)
def questions(names, seed, split, n):
    return {s: WORLD.rows(s, n, split, seed) for s in names}

def outcomes(model, tok, sets):
    return {s: [judge(r, a) for r, a in zip(rows, answers(model, tok, rows))]
            for s, rows in sets.items()}

def mean(found):
    return sum(sum(x)/len(x) for x in found.values())/len(found)

@lru_cache(2)
def asked(seed, split):
    "The questions of the task and of the old skills, and how the base answers them"
    model, tok = ftlab.load(MODEL)
    new, old = ITEMS[split]
    sets = (questions((TASK,), seed, split, new),
            questions(tuple(lab('models').skills_of(tok)), seed, split, old))
    return sets, [outcomes(model, tok, s) for s in sets]

def train(model, tok, skill, recipe, rate, seed, steps, callbacks=()):
    data = ftlab.data(skill, seed=seed, n=steps*BATCH)
    return ftlab.fit(model, tok, data, recipe, steps=steps, batch_size=BATCH, lr=rate, seed=seed,
                     callbacks=callbacks, progress=False)

@lru_cache(2)
def weights(arm, rate, seed, steps):
    "The weights of one task's run after an eighth, a quarter, half and all of its steps"
    model, tok = ftlab.load(MODEL)
    at = {round(steps*x) for x in (1/8, 1/4, 1/2, 1)}
    keep = Every(1, lambda s: dict(weights={n: p.detach().clone() for n, p in
                                            s.model.named_parameters()} if s.step in at else None))
    run = train(model, tok, TASK, METHODS[arm](0), rate, seed, steps, (keep,))
    return [p for p in run.path if p['weights']]

def one_task(arm, rate, seed, split, steps):
    sets, before = asked(seed, split)
    model, tok = ftlab.load(MODEL)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    path = []
    for point in weights('full' if arm in EDITS else arm, rate, seed, steps):
        change = {n: w - base[n] for n, w in point['weights'].items()}
        if arm in EDITS:
            change = EDITS[arm](seed=seed)(change, model)
        write_change(model, base, change)
        now = [outcomes(model, tok, s) for s in sets]
        gain, kept = (mean(a) - mean(b) for a, b in zip(now, before))
        path.append(dict(step=point['step'], gain=gain, forgetting=-kept,
                         items=dict(gain=now[0], forgetting=now[1])))
    return path[-1] | dict(path=path)

def stream(arm, rate, seed, split, steps):
    "One task after another; `op` and `bwt` as TRACE defines them, and the loss of the old skills"
    new, old = ITEMS[split]
    tasks = questions(STREAM, seed, split, new)
    model, tok = ftlab.load(MODEL)
    learned = {}
    for k, skill in enumerate(STREAM):
        train(model, tok, skill, METHODS[arm](k), rate, seed, steps//len(STREAM))
        learned |= outcomes(model, tok, {skill: tasks[skill]})
    last = outcomes(model, tok, tasks)
    back = [sum(last[s])/len(last[s]) - sum(learned[s])/len(learned[s]) for s in STREAM[:-1]]
    (_, skills), (_, before) = asked(seed, split)
    return dict(op=mean(last), bwt=sum(back)/len(back), learned=mean(learned),
                old=mean(before) - mean(outcomes(model, tok, skills)), items=dict(op=last))

def run(arm, rate, seed, split, steps):
    if arm.startswith('stream_'):
        return stream(arm.removeprefix('stream_'), rate, seed, split, steps)
    return one_task(arm, rate, seed, split, steps)
