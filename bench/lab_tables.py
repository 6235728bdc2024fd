"""What the lab models can do, and what teaching them something new costs.

    python bench/lab_tables.py skills lab-s lab-m      the skill table, on held-out questions, n = 400
    python bench/lab_tables.py teach lab-s             the six new skills, at two learning rates

New skills are taught by full fine-tuning, one by one.

Results go to bench/results/lab_v1_*.json; what is there is kept, what is missing is measured.
"""
import json, os, sys, time
from pathlib import Path
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
import ftlab
from ftlab.core.io import write_atomically
from ftlab.core.scorers import exact_match, skills, WORLD
from ftlab.lab.world import NEW, OLD, SKILLS
from ftlab.trainers.callbacks import Every
from ftlab.trainers.fit import fit

OUT = Path(__file__).parent/'results'

def keep(name, x):
    write_atomically(OUT/name, lambda p: p.write_text(json.dumps(x, indent=1) + '\n'))

def known(name):
    return json.loads((OUT/name).read_text()) if (OUT/name).exists() else {}

def skill_table(model, n=400):
    got = known(f'lab_v1_skills_{model}.json')
    m, tok = ftlab.load(model)
    for s in OLD + ['atlas']:
        if s not in got:
            got[s] = skills(m, n, names=[s], tok=tok)[s]
            print(model, s, got[s], flush=True)
            keep(f'lab_v1_skills_{model}.json', got)
    for lv, tier in ((2, 'fact: told sometimes'), (3, 'fact: told rarely')):
        if tier not in got:
            got[tier] = skills(m, n, names=['fact'], tok=tok, level=lv)['fact']
            keep(f'lab_v1_skills_{model}.json', got)

def teach(model, target=.95):
    """Full fine-tuning, constant rate, batches of 32 rows of at most 64 tokens,
    until the validation score reaches the target or 1,000 steps"""
    got = known(f'lab_v1_teach_{model}.json')
    for skill in NEW:
        for lr in (3e-4, 1e-3):
            key = f'{skill} at {lr:g}'
            if key in got:
                continue
            m, tok = ftlab.load(model)
            old = [k for k in OLD if k != SKILLS[skill].replaces]
            val = WORLD.rows(skill, 100, 'validation')
            before = skills(m, 100, names=old, tok=tok)
            def look(state):
                v = exact_match(state.model, tok, val)
                state.stop = v >= target
                return dict(new=v)
            t = time.time()
            run = fit(m, tok, ftlab.data(skill), steps=1000, lr=lr, schedule='constant',
                      max_length=64, callbacks=(Every(50, look),), progress=False)
            seconds = time.time() - t
            after = skills(m, 100, names=old, tok=tok)
            got[key] = dict(skill=skill, lr=lr, steps=len(run.log), seconds=round(seconds, 1),
                            new=exact_match(m, tok, WORLD.rows(skill, 400)),
                            old_before=sum(before.values())/len(old),
                            old_after=sum(after.values())/len(old), path=run.path, before=before,
                            after=after)
            keep(f'lab_v1_teach_{model}.json', got)
            print(key, {k: v for k, v in got[key].items() if k not in ('path', 'before', 'after')},
                  flush=True)

if __name__ == '__main__':
    what, *names = sys.argv[1:] or ['']
    if what not in ('skills', 'teach') or not names:
        sys.exit(__doc__)
    for n in names:
        dict(skills=skill_table, teach=teach)[what](n)
