"Folders of many shapes, each loaded right or refused in one clear sentence"
import json
from pathlib import Path
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from ftlab.core.loading import load, quiet, skeleton
from ftlab.core.model import notes_of
from ftlab.lab.models import lab_tokenizer
from tiny import example_inputs, tiny

tok = lab_tokenizer()

def stored(model, folder:Path) -> Path:
    with quiet():
        model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder

def wide(family='llama', **more):
    return tiny(family, vocab_size=len(tok), pad_token_id=tok.pad_token_id, **more)

def adapter(base:Path, folder:Path, cls=AutoModelForCausalLM, rows=None, **config) -> Path:
    "Write an adapter with peft, in which no tensor is 0"
    peft = pytest.importorskip('peft')
    model = cls.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = peft.get_peft_model(model, peft.LoraConfig(**config))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape)*.1)
    model.save_pretrained(folder)
    return folder

def by_peft(base, folder, cls=AutoModelForCausalLM, rows=None, merge=True):
    from peft import PeftModel
    model = cls.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = PeftModel.from_pretrained(model, folder).eval()
    return model.merge_and_unload() if merge else model

ATTENTION = ['q_proj', 'v_proj']
KINDS = dict(plain=dict(target_modules=ATTENTION),
             rs=dict(target_modules=ATTENTION, use_rslora=True),
             patterns=dict(target_modules=ATTENTION, rank_pattern={'q_proj': 5}, alpha_pattern={'layers.1.self_attn.v_proj': 3}),
             dora=dict(target_modules=ATTENTION, use_dora=True),
             head=dict(target_modules=ATTENTION, modules_to_save=['lm_head']),
             table=dict(target_modules=ATTENTION, modules_to_save=['embed_tokens']),
             tokens=dict(target_modules=ATTENTION, trainable_token_indices=[5, 9]),
             embedding=dict(target_modules=[*ATTENTION, 'embed_tokens']),
             both=dict(target_modules=["q_proj", "embed_tokens", "lm_head"]))

@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.filterwarnings('ignore')
def test_an_adapter_folder_is_loaded_as_peft_merges_it(tmp_path, kind, tied):
    base = stored(wide(tie_word_embeddings=tied), tmp_path/'base')
    folder = adapter(base, tmp_path/'adapter', r=3, lora_alpha=7, task_type='CAUSAL_LM', **KINDS[kind])
    # peft 0.21 changes the head too when it merges a LoRA on a tied embedding
    merge = not (tied and kind in ('embedding', 'both'))
    want, (model, own) = by_peft(base, folder, merge=merge), load(folder)
    x = example_inputs()
    plain = load(base)[0](**x).logits
    assert torch.allclose(model(**x).logits, want(**x).logits, atol=1e-5)
    assert not torch.allclose(model(**x).logits, plain, atol=1e-3)
    assert own.get_vocab() == tok.get_vocab()
    assert any(str(base) in n for n in notes_of(model)) and any(str(folder) in n for n in notes_of(model))
    # saved again, it is a plain model
    again = load(stored(model, tmp_path/'again'))[0]
    assert torch.allclose(again(**x).logits, want(**x).logits, atol=1e-5)
    bones = skeleton(folder)[0]
    assert bones.num_parameters() == load(base)[0].num_parameters()
