"""What shrinking the intruders of a LoRA of SmolLM2-135M-Instruct takes back, beside shrinking its whole change"""
from statistics import fmean
from ftlab.adapters.edit import attach_change, scale
from ftlab.evaluators.mechanisms.intruders import count_intruders, shrink_intruders
from ftlab.instruments.claims import beside
from ftlab.instruments.frontier import at_gain

lines = beside('lines/real')
RATES = dict(lora=3e-3, full=1e-4)  # where both gain the same on the tuning seed
DOSES = (.3, .5, .7, .85)

def counted(name, seed):
    "Intruders of each matrix"
    model, _ = lines.bench().base(seed)
    change = lines.change_of(name, RATES[name], seed)
    att = attach_change(model, {n: c for n, c in change.items() if c.ndim == 2})
    return [k for n, k in count_intruders(att).items() if 'embed' not in n]

def shrunk(seed, split):
    model, _ = lines.bench().base(seed)
    change = lines.change_of('lora', RATES['lora'], seed)
    plain = lines.found(change, seed, split)
    att = attach_change(model, change)  # intruders are read off the tuned matrix
    cut = shrink_intruders(.7)(change, model)
    att.detach()
    less = lines.found(cut, seed, split)
    path = [dict(step=d, **lines.found(scale(d)(change, model), seed, split)) for d in DOSES]
    path.append(dict(step=1, **plain))
    # the whole change shrunk until it gains the same; where it gains less at every dose, the dose that gains most
    same = at_gain(path, less['gain']) or max(path, key=lambda r: r['gain'])
    undone = lambda r: 1 - r['forgetting']/plain['forgetting']
    return dict(gain=plain['gain'], rise=plain['forgetting'], lost=plain['gain'] - less['gain'],
                undone=undone(less), scaled_undone=undone(same), scaled_gain=same['gain'])

def run(arm, rate, seed, split, steps):
    if arm == 'shrunk':
        return shrunk(seed, split)
    counts = counted(arm, seed)
    out = dict(intruders=fmean(counts), touched=fmean(k > 0 for k in counts))
    return out | lines.found(lines.change_of(arm, RATES[arm], seed), seed, split)

def derive(found):
    "The whole change, shrunk until it gains what the model with shrunk intruders gains"
    if 'shrunk' not in found:
        return {}
    s = found['shrunk']
    return dict(scaled=dict(undone=s['scaled_undone'], gain=s['scaled_gain'], error=None))
