"""Measure the memory of LoRA on a random Llama of 100 million parameters, its base in float32 and in 4 bits,
and compare it with the estimate of --dry-run. `python bench/quantize.py` writes bench/results/quantize.json;
it needs bitsandbytes"""
import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import ftlab
from ftlab.commands.memory import training_bytes
from ftlab.core.four_bits import quantize
from ftlab.core.record import versions
from ftlab.lab.models import lab_tokenizer
from ftlab.trainers.watch import free_memory

ROWS, TOKENS = 2, 64

def made(tok):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tok), hidden_size=768, intermediate_size=2048,
        num_hidden_layers=14, num_attention_heads=12,
        max_position_embeddings=512, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()

def resident() -> int:
    "Return the bytes of memory that this process holds now"
    gc.collect()
    free_memory()
    line = next(x for x in Path('/proc/self/status').read_text().splitlines() if x.startswith('VmRSS'))
    return 1024*int(line.split()[1])

def measure(kind:str) -> dict:
    tok, start = lab_tokenizer(), resident()
    model = made(tok)
    if kind == 'nf4':
        quantize(model)
    held = resident() - start
    row = dict(text='one two three four five '*60)
    data = ftlab.data([row]*8 + [dict(text=f'{i} {row["text"]}') for i in range(8)])
    recipe = ftlab.methods.get('lora')
    told = training_bytes(model, recipe, shape=(ROWS, TOKENS))
    run = ftlab.fit(model, tok, data, recipe, steps=2, batch_size=ROWS,
                    max_length=TOKENS, progress=False)
    return dict(parameters=sum(p.numel() for p in model.parameters()) - told['trainable'],
                parameter_bytes=told['weights'], resident_bytes=held,
                peak_bytes_of_training=run.cost['peak_bytes'],
                estimate=told, seconds_per_step=run.cost['seconds']/len(run.log))

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--one', choices=('float32', 'nf4'))
    p.add_argument('--out', default='bench/results/quantize.json')
    a = p.parse_args()
    if a.one:
        return print(json.dumps(measure(a.one)))
    found = dict(rows=ROWS, tokens=TOKENS, versions=versions())
    for kind in ('float32', 'nf4'): # a process each, so that no memory is shared
        said = subprocess.run([sys.executable, __file__, '--one', kind], stdout=subprocess.PIPE,
                              text=True, check=True)
        found[kind] = json.loads(said.stdout.splitlines()[-1])
    Path(a.out).write_text(json.dumps(found, indent=1) + '\n')
    print(json.dumps(found, indent=1))

if __name__ == '__main__':
    main()
