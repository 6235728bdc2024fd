"""Two skills, tuned separately from lab-s by full fine-tuning, merged by every common rule: `yardsticks.py merges`.

Each rule has three strengths, or weights, tried on the validation questions of a tuning seed; the one with the most
gain goes to the test seeds. Beside them: each fine-tune alone, and one run on both skills with as many steps in all."""
import ftlab
from ftlab.adapters.edit import attach_change
from ftlab.commands.merge import merged_change
from ftlab.core.record import versions
from ftlab.core.scorers import WORLD, answer_scores
from ftlab.lab.models import old_skills

SKILLS = ('new-format', 'new-procedure')
STEPS, BATCH, RATE = 40, 16, 1e-3   # of each fine-tune
TUNING, SEEDS = 10_000, (0, 1, 2, 3, 4)
ITEMS = dict(validation=(100, 12), test=(200, 24)) # of each new skill, of each old one
WEIGHTS = ((.3, .7), (.5, .5), (.7, .3))
TRIED = { # rule -> (text, scale) of what is tried
    'linear': [(f'linear(weights={w})', 1.) for w in WEIGHTS],
    'slerp': [('slerp', t) for t in (.3, .5, .7)],
    'task_arithmetic': [('task_arithmetic', x) for x in (.6, .8, 1.)],
    'ties': [('ties', x) for x in (1., 1.5, 2.)],
    'dare': [('dare', x) for x in (.6, .8, 1.)],
    'dare, then ties': [("dare(then='ties')", x) for x in (.6, .8, 1.)],
    'breadcrumbs': [('breadcrumbs', x) for x in (1., 1.5, 2.)],
    'lines': [('lines', x) for x in (.2, .5, .8)]}

def tuned(model, tok, data, steps, seed):
    "Return the change of one fine-tune; the model stays as it was"
    run = ftlab.fit(model, tok, data, steps=steps, batch_size=BATCH, lr=RATE, seed=seed,
                    progress=False)
    change = {n: t.clone() for n, t in run.delta.tensors().items()}
    run.delta.attached.detach()
    return change

def accuracy(model, tok, seed, split, old):
    "Return the accuracy on each new skill, and the mean over the old ones"
    new, few = ITEMS[split]
    mean = lambda s, n: sum(answer_scores(model, tok, WORLD.rows(s, n, split, seed)))/n
    return [mean(s, new) for s in SKILLS], sum(mean(s, few) for s in old)/len(old)

class Seed:
    "The fine-tunes of one seed, and what becomes of merges of them"
    def __init__(self, seed:int, split:str):
        self.seed, self.split = seed, split
        self.model, self.tok = ftlab.load('lab-s')
        self.data = [ftlab.data(s, seed=seed, n=2*STEPS*BATCH) for s in SKILLS]
        self.old = [s for s in old_skills(self.data[0]) if s in old_skills(self.data[1])]
        self.changes = [tuned(self.model, self.tok, d, STEPS, seed) for d in self.data]
        self.before = accuracy(self.model, self.tok, seed, split, self.old)

    def of(self, change) -> dict:
        "Return the gain on each skill and what was lost of the old, for a change of the base"
        att = attach_change(self.model, change)
        new, old = accuracy(self.model, self.tok, self.seed, self.split, self.old)
        att.detach()
        return dict(gains=[a - b for a, b in zip(new, self.before[0])], lost=self.before[1] - old)

    def merged(self, rule:str, scale:float) -> dict:
        return self.of(merged_change(self.changes, self.model, rule, scale))

    def both(self) -> dict:
        "Train on both skills in one run, with the steps of the two fine-tunes together"
        mixed = ftlab.mix(list(zip(self.data, (.5, .5))), seed=self.seed)
        return self.of(tuned(self.model, self.tok, mixed, 2*STEPS, self.seed))

def gain(found:dict) -> float:
    return sum(found['gains'])/len(found['gains'])

def merged() -> dict:
    "Choose each rule's strength on the tuning seed, merge on the test seeds; return settings and rows"
    tuning = Seed(TUNING, 'validation')
    tried = {rule: [dict(rule=text, scale=x, **tuning.merged(text, x)) for text, x in arms]
             for rule, arms in TRIED.items()}
    chosen = {rule: max(found, key=gain) for rule, found in tried.items()}
    rows = {name: [] for name in (*SKILLS, 'both in one run', *TRIED)}
    for seed in SEEDS:
        s = Seed(seed, 'test')
        for skill, change in zip(SKILLS, s.changes):
            rows[skill].append(s.of(change))
        rows['both in one run'].append(s.both())
        for rule, best in chosen.items():
            rows[rule].append(s.merged(best['rule'], best['scale']))
        print(f'seed {seed}:', {n: round(gain(r[-1]), 3) for n, r in rows.items()}, flush=True)
    settings = dict(skills=SKILLS, steps=STEPS, batch_size=BATCH, lr=RATE, tuning_seed=TUNING,
                    seeds=SEEDS, items=ITEMS)
    return dict(kind='merges', task=' and '.join(SKILLS), settings=settings, tried=tried,
                chosen={r: dict(rule=c['rule'], scale=c['scale']) for r, c in chosen.items()},
                methods=rows, versions=versions())
