"""What a page of yardsticks shows: its methods beside `full` and `lora`, each tuned alike, on one lab skill.
Those of preferences stand beside `full` and `dpo`, on pairs of the model's own answers; regularisers that read
old rows get 40 of each skill that the model knows; merges are compared in `merges.py`.

    python bench/yardsticks.py low_rank     # writes bench/results/yardsticks_low_rank.json

The kind is the name of the page's module. One tuning seed, two test seeds: a comparison, no verdict.
About 25 CPU-seconds a method (preferences: 60). Finished runs are kept in `ftlab-runs`, so the same call goes on."""
import json, sys
from pathlib import Path
import ftlab
from ftlab.core.io import write_atomically
from ftlab.core.mix import mix
from ftlab.core.record import versions
from ftlab.lab.models import skills_of
from ftlab.trainers.preferences import judged_pairs
from merges import merged

TASK, BESIDE = 'new-procedure', ('full', 'lora')
YOUNG = 'step-1000' # of lab-s: it writes lists, some of which break the rule
# small on purpose: minutes on one core. `max_runs` thins the search for rates
SETTINGS = dict(seeds=2, steps=40, batch_size=16, evaluations=2, items=80, old_items=12,
                validation_items=50, old_validation_items=6)
RUNS_PER_METHOD, MORE_RUNS = 6, dict(preferences=8) # two rates; three, extended once at an edge
# a method at a rate that the search passes over, though it gains on the test seeds
PASSED_OVER = dict(preferences=('kto', 9.49e-5))
# of a model without biases; and of one that has read only short rows, which twenty random words before a row confuse
ASKED = dict(bitfit='bitfit(norms=True)', prompt_tuning='prompt_tuning(tokens=4)',
             prefix_tuning='prefix_tuning(tokens=4)')
KEPT = ('gain', 'forgetting', 'forgetting_matched') # of each test seed

def setting(kind:str) -> tuple[tuple[str, ...], str, dict]:
    "Return the methods beside, what is learned in words, and `compare`'s arguments for it"
    if kind == 'regularisers':
        return ('full',), TASK, dict(data=TASK)
    if kind != 'preferences':
        return BESIDE, TASK, dict(data=TASK)
    asked = ftlab.data('write', n=400, seed=7)
    model, tok = ftlab.load('lab-s', revision=YOUNG)
    pairs = ftlab.data(dict(train=judged_pairs(model, tok, asked.train),
                            validation=asked.validation, test=asked.test))
    return ('full', 'dpo'), f'write, {len(pairs.train)} pairs', dict(data=pairs, revision=YOUNG)

def arms_of(kind:str, names:list[str]) -> list:
    "Return the methods, with arguments where their defaults mean nothing to a lab model"
    if kind != 'regularisers':
        return [ASKED.get(n, n) for n in names]
    known = skills_of(ftlab.load('lab-s')[1])
    old = mix({s: (ftlab.data(s, n=40), 1/len(known)) for s in known})
    given = dict(replay=dict(old=old), ewc=dict(old=old, rows=66), r_drop=dict(dropout=.1),
                 sdft=dict(template='{prompt}'))
    return [getattr(ftlab.methods, n)(**given.get(n, {})) for n in names]

def compared(kind:str) -> dict:
    "Compare the yardsticks of a kind; return settings and a row for each method"
    names = sorted(n for n, file in ftlab.methods.yardsticks().items() if file.stem == kind)
    if not names:
        kinds = sorted({file.stem for file in ftlab.methods.yardsticks().values()})
        raise SystemExit(f'no yardsticks of kind {kind!r}; there are {", ".join(kinds)}')
    beside, task, how = setting(kind)
    arms = [*beside, *arms_of(kind, names)]
    runs = MORE_RUNS.get(kind, RUNS_PER_METHOD)*len(arms)
    found = ftlab.compare(arms, 'lab-s', **how, max_runs=runs,
                          out=f'ftlab-runs/yardsticks_{kind}', **SETTINGS).json()
    tried = {n: m['tried'] for n, m in found['tuning']['methods'].items()}
    rows = {m['name']: dict(rate=m['rate'], rate_matched=m['rate_matched'], tried=tried[m['name']],
                            **{k: [row[k] for row in m['seeds']] for k in KEPT},
                            frontier=m['frontier'])
            for m in found['methods']}
    also = passed_over(*PASSED_OVER[kind], how, kind) if kind in PASSED_OVER else {}
    about = {k: found['protocol'][k] for k in ('metric', 'forgetting')}
    return dict(kind=kind, task=task, **about, settings=SETTINGS, target=found['target'],
                methods=rows, **also, versions=versions())

def passed_over(name:str, rate:float, how:dict, kind:str) -> dict:
    "Run a method at one rate on the test seeds, without a search"
    found = ftlab.compare([name], 'lab-s', **how, lrs=[rate], tune=False,
                          out=f'ftlab-runs/yardsticks_{kind}_{name}', **SETTINGS).json()
    gain = [row['gain'] for row in found['methods'][0]['seeds']]
    return dict(passed_over=dict(method=name, rate=rate, gain=gain))

if __name__ == '__main__':
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    result = merged() if sys.argv[1] == 'merges' else compared(sys.argv[1])
    file = Path(__file__).parent/'results'/f'yardsticks_{result["kind"]}.json'
    write_atomically(file, lambda p: p.write_text(json.dumps(result, indent=1) + '\n'))
    print(file)
