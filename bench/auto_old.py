"""How well old='auto' predicts what a fine-tune of lab-s really loses: 24 runs, where the truth is known.

    python bench/auto_old.py            # writes bench/results/auto_old.json, about 4 CPU-minutes

Two tasks, three methods, four rates each, 60 steps. `auto` is the share of harvested answers that
went from right to wrong; `truth` the mean fall over the old skills, on test questions that the
harvest has not seen; `drift` the KL divergence from the base on the new task's own questions, which
is what a user has without any old question. `elsewhere` is harder: the harvest asks about one half
of the old skills, and the truth is that of the other half; both ways round."""
import json, os, platform, time
from pathlib import Path
from statistics import fmean
from scipy.stats import spearmanr
import torch
import ftlab
from ftlab import methods
from ftlab.core.batches import collate
from ftlab.core.record import versions
from ftlab.core.scorers import WORLD, skills
from ftlab.core.tokens import encode_all
from ftlab.evaluators.forgetting import flips
from ftlab.evaluators.harvest import EACH
from ftlab.evaluators.old_sets import old_sets
from ftlab.evaluators.probe import drift
from ftlab.lab.models import old_skills

TASKS = ('new-language', 'new-procedure')
RATES = dict(full=(1e-4, 3e-4, 1e-3, 3e-3), hft=(1e-4, 3e-4, 1e-3, 3e-3),
             lora=(3e-4, 1e-3, 3e-3, 1e-2))
STEPS, ITEMS = 60, 50

def one(task:str, method:str, rate:float, known:dict) -> dict:
    "Fine-tune once and measure"
    data = ftlab.data(task)
    model, tok = ftlab.load('lab-s')
    run = ftlab.fit(model, tok, data, getattr(methods, method)(), steps=STEPS, lr=rate, seed=0,
                    progress=False)
    now = skills(model, ITEMS, names=list(known['truth']), tok=tok)
    kept = known['auto'].scores(model, tok)
    found = flips(known['scores'], kept)['lost']
    base, _ = ftlab.load('lab-s')
    rows = collate(encode_all(data.test[:100], tok, 'text'), tok.pad_token_id)
    return dict(task=task, method=method, rate=rate, auto=found['adjusted'], auto_low=found['low'],
                auto_high=found['high'], drift=drift(base, run.model, rows),
                truth=fmean(known['truth'][s] - v for s, v in now.items()),
                elsewhere=[dict(auto=fmean(a - b for a, b, s in zip(known['scores'], kept,
                                                                    known['skills']) if s in ask),
                                truth=fmean(known['truth'][s] - now[s] for s in other))
                           for ask, other in halves(list(known['truth']))])

def halves(names:list[str]) -> list[tuple[list[str], list[str]]]:
    "Return every other skill and the rest, both ways round"
    return [(names[::2], names[1::2]), (names[1::2], names[::2])]

def known_of(task:str) -> dict:
    "Return what the base can do, and the harvest"
    model, tok = ftlab.load('lab-s')
    data = ftlab.data(task)
    auto, = old_sets('auto', data, model, tok)
    names = old_skills(data, tok)
    of = {r['prompt']: s for s in names for r in WORLD.rows(s, EACH, 'validation', 0)}
    return dict(auto=auto, scores=auto.scores(model, tok),
                skills=[of[r['prompt']] for r in auto.rows],
                truth=skills(model, ITEMS, names=names, tok=tok))

def correlations(runs:list[dict]) -> dict:
    """Return Spearman's rank correlation with the truth, over all runs, within each task, and among
    runs that lost little"""
    of = lambda rs, key: round(float(spearmanr([r[key] for r in rs],
                                               [r['truth'] for r in rs])[0]), 3)
    groups = dict(all=runs) | {t: [r for r in runs if r['task'] == t] for t in TASKS}
    groups |= {f'truth below {x}': [r for r in runs if r['truth'] < x] for x in (.3, .05)}
    return {name: dict(runs=len(rs), auto=of(rs, 'auto'), drift=of(rs, 'drift'),
                       elsewhere=[of([r['elsewhere'][i] for r in rs], 'auto') for i in (0, 1)])
            for name, rs in groups.items()}

def main() -> None:
    torch.set_num_threads(1)
    start, runs, sizes = time.process_time(), [], {}
    for task in TASKS:
        known = known_of(task)
        sizes[task] = len(known['scores'])
        for method, rates in RATES.items():
            for rate in rates:
                runs.append(one(task, method, rate, known))
                print(runs[-1], flush=True)
    cpu = time.process_time() - start
    result = dict(model='lab-s', steps=STEPS, items=ITEMS, harvested=sizes,
                  rank_correlation=correlations(runs), runs=runs, cpu_seconds=round(cpu, 1),
                  machine=platform.processor() or platform.machine(), cores=os.cpu_count(),
                  threads=1, versions=versions())
    path = Path(__file__).parent/'results/auto_old.json'
    path.write_text(json.dumps(result, indent=1) + '\n')
    print(result['rank_correlation'], result['cpu_seconds'])

if __name__ == '__main__':
    main()
