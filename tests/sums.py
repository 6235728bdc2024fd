"A tiny language model that reads sums, and rows of them, as files"

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


def rows(path: Path, n: int = 40, ours: tuple = ('prompt', 'response')) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        ''.join(
            json.dumps(dict(zip(ours, (f'{i} plus {i % 7} is', str(i + i % 7))))) + '\n'
            for i in range(n)
        ),
        encoding='utf-8',
    )
    return path


def words() -> PreTrainedTokenizerFast:
    names = ['<pad>', '<eos>', '<unk>', 'plus', 'is', *map(str, range(60))]
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=t, pad_token='<pad>', eos_token='<eos>', unk_token='<unk>'
    )


def save_small(folder: Path) -> Path:
    "Save a model of one block and its tokenizer"
    torch.manual_seed(0)
    tok = words()
    sizes = dict(
        vocab_size=len(tok),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    for made in (LlamaForCausalLM(LlamaConfig(**sizes)), tok):
        made.save_pretrained(folder)
    return folder


def save_encoder(folder: Path) -> Path:
    "Save an encoder of one block, which gets a head for labels when it is loaded, and its tokenizer"
    sizes = dict(vocab_size=80, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    BertModel(BertConfig(**sizes, num_attention_heads=2, pad_token_id=0)).save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


def labelled(path: Path, *labels: str, n: int = 60) -> Path:
    "Write rows of text with these labels in turn"
    lines = [json.dumps(dict(text=f'{i} plus', label=labels[i % len(labels)])) for i in range(n)]
    path.write_text('\n'.join(lines))
    return path
