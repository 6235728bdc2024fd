"""Thousands of mutated files of saved changes through `load_delta`.

    python bench/mutations.py [HOW MANY]     # 5,000 take about two minutes

No file may end in an error that is not ftlab's own, and a file that is refused must leave the model
as it was."""
import json, resource, sys, tempfile, time
from collections import Counter
from pathlib import Path
import torch
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tests'))
from mutations import differ, mutated, sources, state, verdict
from tiny import tiny

def measured(n:int, seed:int=1_000_000) -> dict:
    "What became of `n` mutated files"
    results, by_how, wrong, accepted, infinite, start = (Counter(), Counter(), [], Counter(), 0,
                                                         time.process_time())
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        healthy = sources(folder)
        model = tiny('llama')
        was = state(model)
        for i in range(seed, seed + n):
            name, how, content = mutated(i, healthy)
            v = verdict(model, was, folder/'mutated.safetensors', content, healthy[name])
            if differ(was, state(model)):
                model = tiny('llama')
            same = content == healthy[name]
            results['unchanged by the mutation' if same else v['result']] += 1
            by_how[how] += 1
            if v['result'] == 'accepted' and not same:
                accepted[f'{how}, {"without" if name.endswith("0.1") else "with"} a digest'] += 1
                infinite += not v['finite']
            if v['wrong']:
                wrong.append(dict(seed=i, file=name, how=how, wrong=v['wrong'], says=v.get('says', '')))
    raw = sum(any('raw' in w for w in x['wrong']) for x in wrong)
    changed = sum(any('changed' in w for w in x['wrong']) for x in wrong)
    return dict(files=n, results=dict(results), mutations=dict(by_how),
                accepted=dict(sorted(accepted.items())), accepted_with_infinite_outputs=infinite,
                models_changed=changed, raw_errors=raw,
                unnamed=sum('the error does not name the file' in x['wrong'] for x in wrong),
                wrong=wrong[:20],
                cpu_seconds=round(time.process_time() - start, 1),
                peak_megabytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024)

if __name__ == '__main__':
    torch.set_num_threads(1)
    out = measured(int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
    if len(sys.argv) < 2:
        (ROOT/'bench'/'results'/'mutations.json').write_text(json.dumps(out, indent=1) + '\n')
    print(json.dumps(out, indent=1))
