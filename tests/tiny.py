"Tiny random models of every family that `anatomy` maps, made from their configurations"
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

VOCAB = 64
DECODERS = 'llama qwen2 qwen3 mistral gemma gemma2 gemma3_text gpt2'.split()
ENCODERS = 'bert roberta'.split()
HEADS = dict(causal=AutoModelForCausalLM, masked=AutoModelForMaskedLM, classifier=AutoModelForSequenceClassification, none=AutoModel)

def tiny(family:str,     # model_type, e.g. 'qwen2'
         head:str|None=None, # 'causal', 'masked', 'classifier' or 'none'; left out, the family's language model
         seed:int=0,     # fixes every number
         **more          # goes to the configuration
        ):
    "A model of hidden size 32 with 2 blocks, in eval mode"
    sizes = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
                 bos_token_id=0, eos_token_id=2, pad_token_id=1)
    if family != 'gpt2': sizes['intermediate_size'] = 80
    if family in DECODERS and family != 'gpt2': sizes['num_key_value_heads'] = 2
    if family in ('qwen3', 'gemma', 'gemma2', 'gemma3_text'): sizes['head_dim'] = 8
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = HEADS[head or ('causal' if family in DECODERS else 'masked')].from_config(AutoConfig.for_model(family, **sizes | more)).eval()
        # fresh biases are 0 and fresh norms 1: a mistake about them would not show
        for p in model.parameters(): p.add_(torch.randn(p.shape) * .1)
    return model

def example_inputs(seed:int=0, batch:int=2, length:int=7) -> dict:
    "`input_ids` and `attention_mask`, no padding; ids below 4 are kept free for special tokens"
    ids = torch.randint(4, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))

def tiny_models() -> dict:
    "`{family: (model, example_inputs)}` for all ten families, each with its language-model head; made afresh on every call"
    return {f: (tiny(f), example_inputs()) for f in DECODERS + ENCODERS}
