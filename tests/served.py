"Small models with byte-level tokenizers, as they are served: each rule that llama.cpp has, trained in a blink"
from functools import lru_cache
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from ftlab.core.gguf_file import RULES

TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TEXT = ['the cat sat on the mat in 1999, and 12345 dogs', "it's fine, isn't it?\n\nyes  it  is",
        'Über große Straßen 東京 🙂', 'def f(x):\n    return x**2 + 3.14'] * 3

@lru_cache
def rules(name: str) -> str:
    fast = Tokenizer(models.BPE(ignore_merges=name == 'llama-bpe'))
    fast.pre_tokenizer = _rule(name)
    fast.decoder = decoders.ByteLevel()
    fast.train_from_iterator(TEXT,
                             trainers.BpeTrainer(vocab_size=320,
                                                 initial_alphabet=ByteLevel.alphabet(),
                                                       special_tokens=[], show_progress=False))
    return fast.to_str()

def _rule(name: str):
    steps = []
    for s in RULES[name]:
        if s['type'] == 'ByteLevel':
            steps.append(ByteLevel(add_prefix_space=False, use_regex=s['use_regex']))
        elif s['type'] == 'Digits':
            steps.append(Digits(individual_digits=True))
        else:
            steps.append(Split(Regex(s['pattern']['Regex']), 'isolated'))
    return steps[0] if len(steps) == 1 else Sequence(steps)

def tokenizer(name: str = 'gpt-2', bos: bool = True) -> PreTrainedTokenizerFast:
    "A tokenizer with the marks of a chat, of one of the rules"
    tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(rules(name)), eos_token='<|endoftext|>',
                                  pad_token='<|pad|>',
                                  **(dict(bos_token='<|begin|>') if bos else {}))
    tok.add_special_tokens(dict(additional_special_tokens=['<|im_start|>', '<|im_end|>']))
    tok.add_tokens([AddedToken('<tool>', special=False, normalized=False)])
    tok.chat_template = TEMPLATE
    return tok

def small(family: str = 'llama', rows: int = 336, seed: int = 0, **more):
    "A small model that answers something at random, in eval mode"
    sizes = dict(vocab_size=rows, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=128)
    sizes |= (dict(n_embd=64, n_head=4, n_layer=2) if family == 'gpt2' else
              dict(hidden_size=64, intermediate_size=96, num_key_value_heads=2))
    if family == 'gpt2':
        for k in ('num_hidden_layers', 'num_attention_heads', 'max_position_embeddings'):
            sizes.pop(k)
    if family == 'mistral':
        sizes['sliding_window'] = None
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family,
                                                                      **sizes | more)).eval()
        for p in model.parameters():
            p.add_(torch.randn(p.shape)*.1)
    return model

def served(family: str = 'llama', rule: str = 'gpt-2', **more):
    "A model and its tokenizer that agree about the tokens that end an answer"
    tok = tokenizer(rule)
    model = small(family, **more)
    ends = [tok.eos_token_id, tok.convert_tokens_to_ids('<|im_end|>')]
    for said in (model.config, model.generation_config):
        said.bos_token_id, said.pad_token_id = tok.bos_token_id, tok.pad_token_id
        said.eos_token_id = ends
    return model, tok
