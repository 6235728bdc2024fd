"""`fit` on a random Llama of a hundred million numbers. A part of `gpu.py`.

Measured and checked: speed, memory, that the loss falls, that the base comes back.

The text is a walk over 512 words in which each word has one successor, so that there is something
to learn at once."""
import tempfile
import time
from pathlib import Path
from gpu_pieces import arguments, card_is_broken, run_pieces

WORDS, WARM = 512, 4
LEARNS = {'full', 'lora', 'hft', 'lift'}  # whose loss must fall in so few steps

def sizes(args) -> dict:
    "Of the model and of a step"
    if args.tiny:
        return dict(vocab=512, hidden=32, layers=2, heads=2, rows=2, tokens=32, steps=6)
    return dict(vocab=32_000, hidden=768, layers=12, heads=12, rows=8, tokens=1024, steps=24)

def llama(args, dtype: str = 'float32', seed: int = 0):
    "A Llama made from a config, in evaluation mode"
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    s = sizes(args)
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=s['vocab'], hidden_size=s['hidden'],
                         intermediate_size=8*s['hidden']//3, num_hidden_layers=s['layers'],
                         num_attention_heads=s['heads'], num_key_value_heads=s['heads'],
                         max_position_embeddings=s['tokens'], tie_word_embeddings=True,
                         pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device(args.device):
        return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()

class Walk:
    "A source of batches: fixed by the step alone"
    def __init__(self, s: dict):
        import torch
        following = torch.randperm(WORDS - 8, generator=torch.Generator().manual_seed(1))
        walks = [torch.arange(len(following))]
        for _ in range(s['tokens'] - 1):
            walks.append(following[walks[-1]])
        self.rows, self.walks = s['rows'], torch.stack(walks, 1) + 8  # one from each word

    def next(self, state) -> list[dict]:
        "Ids, mask and labels of one step"
        import torch
        start = torch.randint(0, len(self.walks), (self.rows,),
                              generator=torch.Generator().manual_seed(state.step))
        ids = self.walks[start]
        return [dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)]

class Times:
    "When each step was over, the device waited for"
    def __init__(self, device: str):
        self.device, self.at = device, []

    def after_step(self, state) -> None:
        import torch
        if self.device == 'cuda':
            torch.cuda.synchronize()
        self.at.append(time.perf_counter())

    def median_ms(self) -> float:
        import statistics
        return 1e3*statistics.median(b - a for a, b in zip(self.at[WARM:], self.at[WARM + 1:]))

def recipes() -> dict:
    "name -> (recipe, learning rate)"
    from ftlab import methods
    return dict(full=(methods.full(), 3e-4), lora=(methods.lora(), 3e-3), hft=(methods.hft(), 3e-4),
                dft=(methods.dft(), 3e-4),
                mezo=(methods.mezo(), 1e-6), lift=(methods.lift(every=0), 3e-3))

def measured(args, name: str, dtype: str = 'float32') -> dict:
    "One method: with weights in float32 under bf16 autocast, or with weights in bfloat16"
    import torch
    from dataclasses import replace
    import ftlab
    from ftlab.lab.models import lab_tokenizer
    from ftlab.trainers.fit import fit
    s, (recipe, lr) = sizes(args), recipes()[name]
    model = llama(args, dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    held = sum(p.numel()*p.element_size() for p in before.values())
    times, walk, start = Times(args.device), Walk(s), time.perf_counter()
    run = fit(model, lab_tokenizer(), ftlab.data('sort', n=64),
              replace(recipe, source=lambda state: walk), steps=s['steps'], lr=lr,
              precision='bf16' if dtype == 'float32' else 'no', progress=False, callbacks=(times,),
              max_length=None)
    seconds, ms = time.perf_counter() - start, times.median_ms()
    nll = [r['nll'] for r in run.log]
    assert all(torch.isfinite(torch.tensor([r['loss'] for r in run.log]))), 'a loss that is not finite'
    falls = sum(nll[-3:]) < sum(nll[:3])
    assert falls or args.tiny or name not in LEARNS, f'the loss did not fall: {nll[:3]} to {nll[-3:]}'
    changes = run.delta.tensors()
    assert any(bool(t.count_nonzero()) for t in changes.values()), 'nothing has moved'
    del changes
    run.delta.attached.detach()
    apart = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert not apart, f'not given back: {apart[:3]}'
    above = run.cost['peak_bytes'] and run.cost['peak_bytes'] - 2*held*(args.device == 'cuda')
    return dict(dtype=dtype, step_ms=round(ms, 2), tokens_per_s=round(1e3*s['rows']*s['tokens']/ms),
                peak_bytes=run.cost['peak_bytes'],
                above_two_models_bytes=above, trainable=run.cost['trainable'],
                numbers=sum(p.numel() for p in before.values()),
                set_up_seconds=round(seconds - ms*s['steps']/1e3, 2),
                nll=[round(nll[0], 3), round(nll[-1], 3)], falls=falls)

def by_peft(args) -> dict:
    "peft's LoRA on the same model and batches"
    import torch
    from types import SimpleNamespace
    from peft import LoraConfig, get_peft_model
    s, times, walk, nll = sizes(args), Times(args.device), Walk(sizes(args)), []
    where = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
    model = get_peft_model(llama(args),
                           LoraConfig(r=8, lora_alpha=16, target_modules=where)).train()
    free = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(free, lr=3e-3, weight_decay=0., fused=True)
    if args.device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    for step in range(s['steps']):
        batch = {k: v.to(args.device) for k, v in walk.next(SimpleNamespace(step=step))[0].items()}
        with torch.autocast(args.device, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(free, 1.)
        opt.step()
        opt.zero_grad()
        nll.append(float(loss.detach()))
        times.after_step(None)
    ms = times.median_ms()
    peak = torch.cuda.max_memory_allocated() if args.device == 'cuda' else None
    return dict(step_ms=round(ms, 2), tokens_per_s=round(1e3*s['rows']*s['tokens']/ms),
                peak_bytes=peak,
                trainable=sum(p.numel() for p in free), nll=[round(nll[0], 3), round(nll[-1], 3)])

class StopAt:
    "As if somebody pressed Ctrl-C after so many steps"
    def __init__(self, step: int):
        self.step = step

    def after_step(self, state) -> None:
        if state.step == self.step:
            raise KeyboardInterrupt

def resumed(args, name: str) -> dict:
    """A run that was stopped after its checkpoint and taken up again ends where one that ran
    through does, bit for bit"""
    import torch
    import ftlab
    from ftlab.lab.models import lab_tokenizer
    from ftlab.trainers.fit import fit
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.use_deterministic_algorithms(True, warn_only=True)  # attention's gradient is summed in any order otherwise
    tok, data = lab_tokenizer(), ftlab.data('new-procedure', n=200)
    recipe, lr = recipes()[name]

    def run(folder, **more):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=128,
                                             intermediate_size=256, num_hidden_layers=2,
                                             num_attention_heads=4,
                                             max_position_embeddings=256, pad_token_id=0,
                                             bos_token_id=1, eos_token_id=2,
                                             attention_dropout=.1)).to(args.device)
        return fit(model, tok, data, recipe, steps=6, lr=lr, batch_size=8, save_every=3, out=folder,
                   precision='bf16', progress=False, **more)

    try:
        with tempfile.TemporaryDirectory() as tmp:
            whole = run(Path(tmp)/'whole')
            run(Path(tmp)/'cut', callbacks=(StopAt(4),))
            again = run(Path(tmp)/'cut', resume=True)
            theirs, apart = dict(again.model.named_parameters()), []
            for n, p in whole.model.named_parameters():
                if not torch.equal(p, theirs[n]):
                    apart.append((n, float((p - theirs[n]).detach().abs().max())))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not apart, f'{len(apart)} tensors differ after resuming: {apart[:3]}'
    return dict(steps=len(again.log))

NAMES = ('full', 'lora', 'hft', 'dft', 'mezo', 'lift')
PIECES = {n: (lambda a, n=n: measured(a, n)) for n in NAMES}
PIECES |= {f'{n}, resumed': (lambda a, n=n: resumed(a, n)) for n in NAMES}
PIECES |= {f'{n}, bfloat16 weights': (lambda a, n=n: measured(a, n, 'bfloat16'))
           for n in ('lift', 'full', 'lora', 'mezo')}
PIECES |= {'peft lora': by_peft}

if __name__ == '__main__':
    options = arguments()
    run_pieces(PIECES, options, card_is_broken)
