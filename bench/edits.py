"""An edit in one late matrix beside LoRA, a sparse change and full fine-tuning: the claim in bench/edits.toml.

    python bench/edits.py room      # the rates and the room, on the tuning seeds alone
    python bench/edits.py           # all of it, about 24 CPU-minutes: writes bench/results/edits.json

It is judged by the rule of every claim (nbs/instruments/verdicts.ipynb), and is no paper's claim: LocFT-BF's
own (claims/locft_bf) asks for order, batch and place, this one for what trains. The edits, the questions
and the measure are those of its script. All arms have LocFT-BF's loss, and pass over a batch below .01 as
it does. A stopped run goes on where it was."""
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
import torch
import ftlab
from ftlab.adapters.editing.locft_bf import locft_bf
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.yardsticks.few import shira
from ftlab.core.io import write_atomically
from ftlab.core.recipe import Recipe
from ftlab.instruments.claims import named_claim, own_code, run_claim, script_of, tuned_part
from ftlab.instruments.verdicts import Claim, read_claim, room

OUT = Path(__file__).parent/'results'/'edits.json'
RANK, WIDE = 32, 64
MATRIX, BLOCKS = 128*320, 4*(4*128*128 + 3*128*320) # entries: of the late matrix, of all in blocks

def trained(method:Recipe) -> Recipe:
    "Return LocFT-BF, but with what another method trains"
    return replace(locft_bf(), select=method.select, delta=method.delta)

def low_rank(rank:int=RANK) -> Recipe:
    return lora(r=rank, alpha=2*rank) # twice the rank, as by default

ARMS = dict(matrix=locft_bf, full=lambda: trained(Recipe('full')), lora=lambda: trained(low_rank()),
            lora_64=lambda: trained(low_rank(WIDE)),
            sparse=lambda: trained(shira(MATRIX/BLOCKS)))

@cache
def first():
    "Return the script of LocFT-BF's claim: its edits, its questions and its measure"
    return script_of(named_claim('locft_bf'))

def run(arm, rate, seed, split, steps):
    "Edit with one arm; `steps` is the number of passes"
    of = first()
    model, tok = ftlab.load(of.MODEL)
    if arm != 'base':
        ftlab.fit(model, tok, of.edits_of(seed, split).data(), ARMS[arm](),
                  steps=steps*of.EDITS//of.BATCH, batch_size=of.BATCH, lr=rate,
                  schedule='constant', clip=None, seed=seed, progress=False)
    found = of.measured(model, tok, seed, split)
    return found | dict(worth_reworded=found['paraphrase']*(1 - found['forgetting']))

def identities() -> dict[str, bool]:
    "The arms differ in what trains alone, and matrix and sparse change are of one size"
    recipes = {n: make() for n, make in ARMS.items()}
    model = ftlab.load(first().MODEL)[0]
    count = lambda arm: sum(model.get_parameter(n).numel() if m is True else int(m.sum())
                            for n, m in recipes[arm].select(model, seed=0).items())
    same = recipes['matrix']
    return {'all arms have one loss, one source and one loop':
                all((r.objective, r.source, r.loop) == (same.objective, same.source, same.loop)
                    for r in recipes.values()),
            'the matrix is that of the first claim': locft_bf() == first().ARMS['breadth'][0](),
            'the matrix has as many entries as is said': count('matrix') == MATRIX,
            'the sparse change has as many, to one in a hundred':
                abs(count('sparse') - MATRIX) <= MATRIX/100}

def claim() -> Claim:
    "Return the claim; its key is the paper's, on whose code it depends"
    return replace(read_claim(Path(__file__).parent, 'edits.toml'), key='locft_bf')

def main() -> None:
    torch.set_num_threads(1)
    say = lambda text: print(text, file=sys.stderr, flush=True)
    if sys.argv[1:] == ['room']:
        for row in tuned_part(claim(), say)[1]:
            print(f'{row["name"]}: {room(row) or "room"}')
        return
    of = own_code(named_claim('locft_bf')) # the edits, the questions and the measure are that claim's
    result = run_claim(claim(), say, write=False) | dict(first=of)
    write_atomically(OUT, lambda tmp: tmp.write_text(json.dumps(result, indent=1) + '\n'))
    print(f'{result["verdict"]} {result["reason"]}'.strip())

if __name__ == '__main__':
    main()
