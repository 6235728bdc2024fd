"""Do verdicts survive another grid and other seeds? Some claims run again; none of that is their evidence.

    python bench/claims_again.py [KEY ...]

Six claims, drawn by a hash of their key, run on their grids times 1.33; five others with other seeds.
With keys, only those of them; calls with different keys may run side by side. Results go to
bench/results/claims_again.json, one entry a run, as they are finished; a stopped call goes on.
"""
import hashlib, json, os, platform, sys
from dataclasses import replace
from pathlib import Path
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
from ftlab.core.io import write_atomically
from ftlab.instruments.claims import EDITION, own_code, read_result, run_claim, status
from ftlab.papers import claims

OUT = Path(__file__).parent/'results'/'claims_again.json'
GRIDS, SEEDS, FACTOR, LATER = 6, 5, 1.33, 100

def drawn():
    "The claims of each kind of rerun, by a hash of their key"
    known = [c for c in claims() if c.edition == EDITION and c.spec.get('contrast')
             and c.result.exists()]
    order = sorted(known, key=lambda c: hashlib.blake2s(c.key.encode()).hexdigest())
    return [('grid', c) for c in order[:GRIDS]] + [('seeds', c) for c in order[GRIDS:GRIDS + SEEDS]]

def moved(claim):
    "The claim on its grids times `FACTOR`; a dial moves by a third of its step, as far as its bounds"
    spec = json.loads(json.dumps(claim.spec))
    if spec.get('spacing') == 'linear':
        low, high = spec.get('bounds', (0, float('inf')))
        shift = lambda g: [min(high, max(low, round(x + (g[1] - g[0])/3, 4))) for x in g]
    else:
        shift = lambda g: [float(f'{x*FACTOR:.3g}') for x in g]
    for where in (spec, *(a for a in spec['arms'].values() if isinstance(a, dict))):
        if 'grid' in where:
            where['grid'] = shift(where['grid'])
    return replace(claim, spec=spec)

def later(claim):
    return replace(claim, spec=claim.spec | dict(seeds=[s + LATER for s in claim.spec['seeds']]))

def found():
    return json.loads(OUT.read_text()) if OUT.exists() else {}

def main(only):
    for kind, claim in drawn():
        name, code = f'{claim.key}, {kind}', own_code(claim)
        if only and claim.key not in only or found().get(name, {}).get('code') == code:
            continue
        if status(claim) not in ('current', 'core changed'):
            print(f'{claim.key}: its evidence is {status(claim)}')
            continue
        was = read_result(claim)
        r = run_claim(dict(grid=moved, seeds=later)[kind](claim), print, write=False)
        effects = [[c['name'], c['primary'], c['treatment'], c['baseline'], c['rates']] for c in r['contrasts']]
        row = dict(code=code, was=was['verdict'], now=r['verdict'], reason=r['reason'],
                   contrasts=effects, flipped={was['verdict'], r['verdict']} == {'holds', 'fails'},
                   cpu_seconds=r['seconds'], machine=platform.processor() or platform.machine())
        everything = found() | {name: row}  # read again: other calls may have finished meanwhile
        write_atomically(OUT, lambda p: p.write_text(json.dumps(everything, indent=1) + '\n'))
        print(f'{name}: {was["verdict"]} -> {r["verdict"]} {r["reason"]}', flush=True)

if __name__ == '__main__':
    main(sys.argv[1:])
