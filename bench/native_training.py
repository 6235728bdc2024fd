"""What whole training takes: memory above the loaded model, and seconds a step.

Of LIFT, full fine-tuning, peft's SHiRA and MeZO, each in a process of its own.

    python bench/native_training.py           # about ten minutes; needs peft (the bench extra)

lab-m, and a random Llama of 100 million numbers, two rows of 64 tokens a step. LIFT has the budget
of LoRA of that rank that makes 5% of the matrices' numbers, SHiRA as many; its places are drawn,
not looked for. Freed memory goes back to the system at once (MALLOC_MMAP_THRESHOLD_), so that the
mark is what was held and not what was kept in store. Beside it stands what arithmetic says must be
held above the model: gradients, moments and what else a method cannot do without."""
import json, os, statistics, subprocess, sys, time
from pathlib import Path
from native import THREADS, machine, peak, save

MODELS = dict(lab_m='lab-m', llama_100m=None)
ARMS = ('forward only', 'mezo', 'full', 'lift', 'shira')
ROWS, TOKENS, STEPS = 2, 64, 5

def load(name):
    import ftlab, torch
    from transformers import LlamaConfig, LlamaForCausalLM
    if name == 'lab_m':
        return ftlab.load('lab-m')
    _, tok = ftlab.load('lab-s')
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=768,
                                        intermediate_size=2048, num_hidden_layers=14,
                                        num_attention_heads=12, tie_word_embeddings=True)), tok

def matrices(model):
    from ftlab.adapters.select import parts
    names = parts()(model)
    return {n: p.shape for n, p in model.named_parameters() if n in names and p.ndim == 2}

def rank(model):
    m = matrices(model)
    return max(1, round(.05*sum(a*b for a, b in m.values())/sum(a + b for a, b in m.values())))

class Clock:
    "When each step was over"

    def __init__(self):
        self.at = []

    def before_fit(self, state):
        self.at.append(time.perf_counter())

    def after_step(self, state):
        self.at.append(time.perf_counter())

def by_ftlab(model, tok, recipe, callbacks=()):
    import ftlab, torch
    from dataclasses import replace
    from ftlab.trainers.fit import fit
    clock, ids = Clock(), torch.randint(0, 500, (ROWS, TOKENS),
                                        generator=torch.Generator().manual_seed(0))
    class Same: # the same rows at every step
        def next(self, state):
            return [dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)]
    fit(model, tok, ftlab.data('sort', n=64), replace(recipe, source=lambda state: Same()),
        steps=STEPS, lr=1e-6, progress=False, callbacks=(clock, *callbacks))
    return [b - a for a, b in zip(clock.at, clock.at[1:])]

def by_peft(model, tok):
    import torch
    from peft import ShiraConfig, get_peft_model
    ids = torch.randint(0, 500, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    times = []
    model = get_peft_model(model,
                           ShiraConfig(r=rank(model),
                                       target_modules=sorted({n.split('.')[-2]
                                                              for n in matrices(model)}),
                                       random_seed=0))
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    for _ in range(STEPS):
        t = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        opt.step()
        opt.zero_grad()
        times.append(time.perf_counter() - t)
    return times

def forward(model):
    import torch
    ids, times = torch.randint(0, 500, (ROWS, TOKENS)), []
    with torch.no_grad():
        for _ in range(STEPS):
            t = time.perf_counter()
            model(input_ids=ids, labels=ids)
            times.append(time.perf_counter() - t)
    return times

def child(name, arm):
    import torch
    from ftlab import methods
    from ftlab.native import backend
    torch.set_num_threads(THREADS)
    assert backend() == 'cpp', 'the C++ is not in use'
    import peft, ftlab.trainers.fit # noqa: F401 - what is imported is not what training holds
    model, tok = load(name)
    size = sum(p.numel() for p in model.parameters())
    r = rank(model)
    chosen = sum(a + b for a, b in matrices(model).values())*r
    big = max(p.numel() for p in model.parameters())
    run = dict(mezo=lambda: by_ftlab(model, tok, methods.mezo()),
               full=lambda: by_ftlab(model, tok, methods.full()),
               lift=lambda: by_ftlab(model, tok, methods.lift(r=r, every=0)),
               shira=lambda: by_peft(model, tok)).get(arm, lambda: forward(model))
    times = []
    extra = peak(lambda: times.extend(run()))
    must = dict(full=12*size, lift=4*big + chosen*(4 + 8 + 4 + 4),
                # gradients and moments; a layer's gradient, and per entry gradient, moments, number, index
                shira=4*big + chosen*(4 + 8 + 4 + 4)).get(arm, 0)
    print(json.dumps(dict(model=name, arm=arm, numbers=size, model_bytes=4*size,
                          entries=chosen if arm in ('lift', 'shira') else None,
                          rank=r if arm in ('lift', 'shira') else None,
                          above_model_bytes=extra, must_hold_bytes=must,
                          seconds_a_step=round(statistics.median(times[1:]), 3),
                          torch=torch.__version__)))

def main():
    rows, env = [], {**os.environ, 'FTLAB_NATIVE': 'cpp', 'OMP_NUM_THREADS': str(THREADS),
                     'MALLOC_MMAP_THRESHOLD_': '65536', 'HF_HUB_OFFLINE': '1'}
    for name in MODELS:
        for arm in ARMS:
            r = subprocess.run([sys.executable, __file__, name, arm], env=env, capture_output=True,
                               text=True)
            if r.returncode:
                sys.exit(f'{name}, {arm}: ended with {r.returncode}\n{r.stderr}')
            rows.append(json.loads(r.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    version = rows[0]['torch']
    [r.pop('torch') for r in rows]
    save(Path(__file__).parent/'results'/'native_training.json',
         dict(rows_a_step=ROWS, tokens_a_row=TOKENS, **machine(version),
              targets=dict(mezo='at most 1.05 of inference, model included',
        lift='parameters, one layer\'s gradient and 5% states'), rows=rows))

if __name__ == '__main__':
    child(*sys.argv[1:]) if sys.argv[1:] else main()
