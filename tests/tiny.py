"Tiny random models of every family that `anatomy` maps, made from their configurations"
import torch
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM,
                          AutoModelForImageClassification, AutoModelForMaskedLM,
                          AutoModelForSeq2SeqLM, AutoModelForSequenceClassification)
from ftlab.adapters.attach import attach
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.select import parts
from ftlab.adapters.subsets.hft import half

VOCAB = 64
DECODERS = 'llama qwen2 qwen3 mistral gemma gemma2 gemma3_text gpt2'.split()
PLAIN = 'phi phi3 opt gpt_neox'.split() # further decoders, without a gate or with a fused one
ENCODERS = 'bert roberta'.split()
OTHERS = 'vit t5'.split()
MIXED = dict( # mixtures of experts
    mixtral=dict(num_local_experts=4), olmoe=dict(num_experts=4, num_experts_per_tok=2),
    qwen2_moe=dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=24),
    qwen3_moe=dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8,
                   mlp_only_layers=[1]))
HEADS = dict(causal=AutoModelForCausalLM, masked=AutoModelForMaskedLM,
             classifier=AutoModelForSequenceClassification, image=AutoModelForImageClassification,
             seq2seq=AutoModelForSeq2SeqLM, none=AutoModel)
USUAL = (dict.fromkeys([*DECODERS, *PLAIN, *MIXED], 'causal') | dict.fromkeys(ENCODERS, 'masked')
         | dict(vit='image', t5='seq2seq'))

def tiny(family:str,     # model_type, e.g. 'qwen2'
         head:str|None=None, # a key of HEADS; left out, the family's usual one
         seed:int=0,     # fixes every number
         **more          # goes to the configuration
        ):
    "A model of hidden size 32 with 2 blocks, in eval mode"
    sizes = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=64, bos_token_id=0, eos_token_id=2, pad_token_id=1)
    if family != 'gpt2':
        sizes['intermediate_size'] = 80
    sizes |= MIXED.get(family, {})
    if (family in DECODERS or family in MIXED) and family != 'gpt2':
        sizes['num_key_value_heads'] = 2
    if family in ('qwen3', 'gemma', 'gemma2', 'gemma3_text'):
        sizes['head_dim'] = 8
    if family == 'opt':
        sizes['ffn_dim'] = sizes.pop('intermediate_size')
    if family == 'vit':
        sizes = ({k: v for k, v in sizes.items() if not k.endswith('token_id')
                  and k not in ('vocab_size', 'max_position_embeddings')}
                 | dict(image_size=8, patch_size=4, num_channels=1))
    if family == 't5':
        sizes = dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=80, num_layers=2, num_heads=4,
                     decoder_start_token_id=0, pad_token_id=1, eos_token_id=2)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = HEADS[head or USUAL[family]].from_config(
            AutoConfig.for_model(family, **sizes | more)).eval()
        # fresh biases are 0 and fresh norms 1: a mistake about them would not show
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * .1)
    return model

def example_inputs(seed:int=0, batch:int=2, length:int=7) -> dict:
    "`input_ids` and `attention_mask`, no padding; ids below 4 are kept free for special tokens"
    ids = torch.randint(4, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))

def inputs_for(family:str, seed:int=0) -> dict:
    "What a forward pass of the family takes"
    x = example_inputs(seed)
    if family == 'vit':
        return dict(
            pixel_values=torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed)))
    return (x | dict(decoder_input_ids=example_inputs(seed + 1)['input_ids']) if family == 't5'
            else x)

def tiny_models() -> dict:
    """`{family: (model, inputs)}` for every family, each with its usual head;
    made afresh on every call"""
    return {f: (tiny(f), inputs_for(f)) for f in USUAL}

def changed(model, kind, seed=3):
    "Attach LoRA or HFT and move what it trains"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        att = (attach(model, parts()(model), lora().delta) if kind == 'lora'
               else attach(model, half()(model)))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in att.parameters().values():
            p.add_(.05*torch.randn(p.shape, generator=g))
    return att
