"Folders of many shapes, each loaded right or refused in one clear sentence"

import json
import shutil
import warnings
from pathlib import Path
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.select import parts
from ftlab.adapters.subsets.hft import hft
from ftlab.core.anatomy import anatomy
from ftlab.core.data import data as as_data
from ftlab.core.loading import load, quiet, skeleton
from ftlab.core.model import notes_of
from ftlab.core.paper import Method
from ftlab.core.recipe import Recipe
from ftlab.lab.models import lab_tokenizer
from ftlab.trainers.fit import fit
from tiny import MIXED, example_inputs, tiny

tok = lab_tokenizer()


def stored(model, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def wide(family='llama', **more):
    return tiny(family, vocab_size=len(tok), pad_token_id=tok.pad_token_id, **more)


def adapter(base: Path, folder: Path, cls=AutoModelForCausalLM, rows=None, **config) -> Path:
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
                p.add_(torch.randn(p.shape) * 0.1)
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
KINDS = dict(
    plain=dict(target_modules=ATTENTION),
    rs=dict(target_modules=ATTENTION, use_rslora=True),
    patterns=dict(
        target_modules=ATTENTION,
        rank_pattern={'q_proj': 5},
        alpha_pattern={'layers.1.self_attn.v_proj': 3},
    ),
    dora=dict(target_modules=ATTENTION, use_dora=True),
    head=dict(target_modules=ATTENTION, modules_to_save=['lm_head']),
    table=dict(target_modules=ATTENTION, modules_to_save=['embed_tokens']),
    tokens=dict(target_modules=ATTENTION, trainable_token_indices=[5, 9]),
    embedding=dict(target_modules=[*ATTENTION, 'embed_tokens']),
    both=dict(target_modules=["q_proj", "embed_tokens", "lm_head"]),
)


@pytest.mark.peer('loading.load', 'peft',
                  'outputs of a base with an adapter of peft, nine kinds',
                  tolerance=dict(atol=1e-5, rtol=1e-5))
@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.filterwarnings('ignore')
def test_an_adapter_folder_is_loaded_as_peft_merges_it(tmp_path, kind, tied, tolerance):
    base = stored(wide(tie_word_embeddings=tied), tmp_path/'base')
    folder = adapter(
        base, tmp_path/'adapter', r=3, lora_alpha=7, task_type='CAUSAL_LM', **KINDS[kind]
    )
    # peft 0.21 changes the head too when it merges a LoRA on a tied embedding
    merge = not (tied and kind in ('embedding', 'both'))
    want, (model, own) = by_peft(base, folder, merge=merge), load(folder)
    x = example_inputs()
    plain = load(base)[0](**x).logits
    assert torch.allclose(model(**x).logits, want(**x).logits, **tolerance)
    assert not torch.allclose(model(**x).logits, plain, atol=1e-3)
    assert own.get_vocab() == tok.get_vocab()
    assert any(str(base) in n for n in notes_of(model)) and any(
        str(folder) in n for n in notes_of(model)
    )
    # saved again, it is a plain model
    again = load(stored(model, tmp_path/'again'))[0]
    assert torch.allclose(again(**x).logits, want(**x).logits, **tolerance)
    bones = skeleton(folder)[0]
    assert bones.num_parameters() == load(base)[0].num_parameters()


PLAIN = dict(r=3, lora_alpha=7, task_type='CAUSAL_LM', target_modules=ATTENTION)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
    'family, targets', [('gpt2', ['c_attn', 'c_proj']), ('qwen2', ['q_proj', 'down_proj'])]
)
def test_adapters_on_transposed_matrices_and_in_half_precision(tmp_path, family, targets):
    "GPT-2 stores its matrices as [in, out]; a base in bfloat16 is changed in float32 and rounded once"
    base = stored(
        wide(family).to(torch.float32 if family == 'gpt2' else torch.bfloat16), tmp_path/'base'
    )
    folder = adapter(base, tmp_path/'adapter', **PLAIN | dict(target_modules=targets))
    want, model = by_peft(base, folder), load(folder)[0]
    assert model.dtype == want.dtype
    for a, b in zip(model.parameters(), want.parameters(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-6 if family == 'gpt2' else 1e-2)


@pytest.mark.filterwarnings('ignore')
def test_an_adapter_with_a_head_for_labels(tmp_path):
    base = stored(wide(), tmp_path/'base')
    folder = adapter(
        base,
        tmp_path/'adapter',
        AutoModelForSequenceClassification,
        r=3,
        lora_alpha=7,
        task_type='SEQ_CLS',
        target_modules=ATTENTION,
    )
    want, x = by_peft(base, folder, AutoModelForSequenceClassification), example_inputs()
    for labels in (None, ['no', 'yes']):
        model = load(folder, labels=labels)[0]
        assert torch.allclose(model(**x).logits, want(**x).logits, atol=1e-5)
        assert list(model.config.id2label.values()) == (labels or ['LABEL_0', 'LABEL_1'])
    assert any(n.endswith('weights, and 1 tensor replaced') for n in notes_of(model))
    with pytest.raises(ValueError, match='does not fit this base.*score'):
        load(folder, labels=['a', 'b', 'c'])


@pytest.mark.filterwarnings('ignore')
def test_an_adapter_with_more_tokens_than_its_base(tmp_path):
    base, rows = stored(wide(), tmp_path/'base'), len(tok) + 3
    folder = adapter(
        base,
        tmp_path/'adapter',
        rows=rows,
        **PLAIN | dict(modules_to_save=['embed_tokens', 'lm_head']),
    )
    model, x = load(folder)[0], example_inputs()
    assert torch.allclose(
        model(**x).logits, by_peft(base, folder, rows=rows)(**x).logits, atol=1e-5
    )
    assert any(f'{rows - 3} rows, and the adapter needs {rows}' in n for n in notes_of(model))
    assert skeleton(folder)[0].get_input_embeddings().weight.shape[0] == rows


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    "A base and an adapter beside it"
    there = tmp_path_factory.mktemp('pair')
    base = stored(wide(), there/'base')
    return base, adapter(base, there/'adapter', **PLAIN)


def changed(folder, new, **config):
    "Copy an adapter's folder with other entries in its configuration"
    shutil.copytree(folder, new)
    said = json.loads((new/'adapter_config.json').read_text())
    (new/'adapter_config.json').write_text(json.dumps(said | config))
    return new


def test_where_the_base_is(pair, tmp_path, monkeypatch):
    base, folder = pair
    want = load(folder)[0]

    def same(*a, **k):
        return all(
            torch.equal(x, y)
            for x, y in zip(want.parameters(), load(*a, **k)[0].parameters(), strict=True)
        )

    shutil.copytree(base, tmp_path/'model')
    beside = changed(folder, tmp_path/'beside', base_model_name_or_path='../model')
    assert same(beside) and same(tmp_path, revision='beside')
    lost = changed(folder, tmp_path/'lost', base_model_name_or_path='./gone')
    with pytest.raises(
        FileNotFoundError, match=r"needs its base, './gone'.*base=.*base_model_name_or_path"
    ):
        load(lost)
    assert same(lost, base=base)
    with pytest.raises(ValueError, match='names no base; give it: base='):
        load(changed(folder, tmp_path/'none', base_model_name_or_path=None))
    with pytest.raises(ValueError, match='is not the folder of an adapter'):
        load(base, base=base)
    other = stored(tiny('gpt2', vocab_size=len(tok)), tmp_path/'other')
    with pytest.raises(ValueError, match='does not fit this base .GPT2LMHeadModel.*q_proj'):
        load(folder, base=other)


@pytest.mark.parametrize(
    'config, says',
    [
        (dict(peft_type='IA3'), 'of kind IA3'),
        (dict(peft_type='VERA'), 'of kind VERA'),
        (dict(init_lora_weights='pissa'), "init_lora_weights='pissa'"),
        (dict(layer_replication=[[0, 1]]), 'uses layer_replication'),
        (dict(target_parameters=['x']), 'uses target_parameters'),
        (dict(task_type='TOKEN_CLS'), 'was trained for TOKEN_CLS'),
        (dict(lora_alpha='8'), "lora_alpha='8'"),
    ],
)
def test_an_adapter_that_cannot_be_read_is_named(pair, tmp_path, config, says):
    with pytest.raises(ValueError, match=says):
        load(changed(pair[1], tmp_path/'new', **config))


def test_an_adapter_whose_base_leads_back_to_it(pair, tmp_path):
    "Else it would call itself until Python gives up"
    one, two = tmp_path/'one', tmp_path/'two'
    for folder, base in ((one, two), (two, one)):
        shutil.copytree(pair[1], folder)
        config = json.loads((folder/'adapter_config.json').read_text())
        config['base_model_name_or_path'] = str(base)
        (folder/'adapter_config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r'leads back here; give the model: ftlab.load\('):
        load(two)


def test_a_pickled_adapter_is_not_read(pair, tmp_path, monkeypatch):
    folder = changed(pair[1], tmp_path/'new')
    torch.save(load_file(folder/'adapter_model.safetensors'), folder/'adapter_model.bin')
    (folder/'adapter_model.safetensors').unlink()
    monkeypatch.setattr(torch, 'load', lambda *a, **k: pytest.fail('a pickle was read'))
    with pytest.raises(ValueError, match='only adapter_model.bin, a pickle.*save it again'):
        load(folder)


def test_tensors_that_do_not_belong_or_are_not_finite(pair, tmp_path):
    folder = changed(pair[1], tmp_path/'new')
    tensors, file = (
        load_file(folder/'adapter_model.safetensors'),
        folder/'adapter_model.safetensors',
    )
    first = next(iter(tensors))
    for bad, says in (
        (
            tensors | {'base_model.model.model.layers.9.x.weight': torch.ones(2)},
            'no such place: model.layers.9.x',
        ),
        (tensors | {first: tensors[first] * float('nan')}, 'not a tensor of finite'),
        (tensors | {first: tensors[first][:2].contiguous()}, 'does not fit this base'),
        ({k: v for k, v in tensors.items() if k != first}, 'which ftlab cannot fold'),
    ):
        save_file(bad, file)
        with pytest.raises(ValueError, match=says):
            load(folder)


def test_an_adapter_left_beside_whole_weights_is_left_out_or_folded_in_if_asked(pair, tmp_path):
    base, folder = pair
    both = changed(folder, tmp_path/'both')
    shutil.copytree(base, both, dirs_exist_ok=True)
    with pytest.warns(UserWarning, match='loaded without the adapter.*base='):
        model = load(both)[0]
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), load(base)[0].parameters(), strict=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        on_top = load(both, base=both)[0]
    assert all(
        torch.equal(a, b)
        for a, b in zip(on_top.parameters(), load(folder)[0].parameters(), strict=True)
    )
    assert not any('without the adapter' in n for n in notes_of(on_top))


def in_pieces(folder):
    with quiet():
        wide().save_pretrained(folder, max_shard_size='30KB')
    tok.save_pretrained(folder)
    files = sorted(p.name for p in folder.glob('model-*'))
    assert len(files) > 2
    return folder, files


def test_folders_of_several_files(tmp_path):
    folder, files = in_pieces(tmp_path/'m')
    want = [p.clone() for p in wide().parameters()]

    def same():
        return all(
            torch.equal(a, b) for a, b in zip(want, load(folder)[0].parameters(), strict=True)
        )

    assert same()
    index = folder/'model.safetensors.index.json'
    said = json.loads(index.read_text())
    first = load_file(folder/files[0])
    # a tensor that no one asked for is counted; one that the index forgot is read all the same
    save_file(first | {'stray': torch.ones(2)}, folder/files[0], metadata=dict(format='pt'))
    assert same() and any('left out (1): stray' in n for n in notes_of(load(folder)[0]))
    save_file(first, folder/files[0], metadata=dict(format='pt'))
    name = next(
        k for k, f in said['weight_map'].items() if list(said['weight_map'].values()).count(f) > 1
    )
    source = said['weight_map'][name]
    index.write_text(
        json.dumps(
            said | dict(weight_map={k: v for k, v in said['weight_map'].items() if k != name})
        )
    )
    assert same()
    index.write_text(json.dumps(said))
    # the same tensor in two files
    save_file(
        first | {name: load_file(folder/source)[name] + 1},
        folder/files[0],
        metadata=dict(format='pt'),
    )
    with pytest.raises(ValueError, match=f'{name} of .* is in {files[0]} and in {source}'):
        load(folder)
    save_file(first, folder/files[0], metadata=dict(format='pt'))

def test_a_stale_index_and_missing_files(tmp_path):
    folder, files = in_pieces(tmp_path/'m')
    index = folder/'model.safetensors.index.json'
    said = json.loads(index.read_text())
    with quiet():
        wide(seed=1).save_pretrained(tmp_path/'single')
    shutil.copy(tmp_path/'single' / 'model.safetensors', folder)
    model = load(folder)[0]
    assert any('model.safetensors is read and the index is not' in n for n in notes_of(model))
    assert torch.equal(next(model.parameters()), next(wide(seed=1).parameters()))
    (folder/'model.safetensors').unlink()
    index.unlink()
    with pytest.raises(
        ValueError, match='neither model.safetensors nor model.safetensors.index.json'
    ):
        load(folder)
    index.write_text(json.dumps(said))
    (folder/files[1]).unlink()
    with pytest.raises(ValueError, match=f"'{files[1]}', which does not exist"):
        load(folder)


TEXT = dict(
    vocab_size=len(tok),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
)
EYES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)


def reads_pictures(kind):
    torch.manual_seed(0)
    if kind == 'llava':
        return LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=CLIPVisionConfig(**EYES),
                text_config=LlamaConfig(**TEXT),
                image_token_index=5,
            )
        ).eval()
    if kind == 'gemma3':
        return Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=Gemma3TextConfig(**TEXT, head_dim=8),
                vision_config=SiglipVisionConfig(**EYES),
            )
        ).eval()
    return Idefics3ForConditionalGeneration(
        Idefics3Config(text_config=LlamaConfig(**TEXT), vision_config=EYES, image_token_id=5)
    ).eval()


@pytest.mark.parametrize(
    'kind, made',
    [
        ('llava', 'LlamaForCausalLM'),
        ('gemma3', 'Gemma3ForCausalLM'),
        ('idefics3', 'LlamaForCausalLM'),
    ],
)
def test_the_text_part_of_a_model_that_reads_pictures(tmp_path, kind, made):
    whole = reads_pictures(kind)
    model, x = load(stored(whole, tmp_path/'m'))[0], example_inputs()
    assert type(model).__name__ == made and torch.allclose(
        model(**x).logits, whole(**x).logits, atol=1e-5
    )
    said = ' '.join(notes_of(model))
    left = {
        n
        for n, _ in whole.named_parameters()
        if 'vision' in n or 'connector' in n or 'multi_modal' in n
    }
    assert f'what is saved or exported is a {made}' in said and f'left out ({len(left)})' in said
    again = load(stored(model, tmp_path/'again'))[0]
    assert torch.equal(again(**x).logits, model(**x).logits)


def test_classes_without_a_text_part_are_named(tmp_path):
    rope = dict(rope_parameters=dict(rope_type='default', mrope_section=[1, 1, 2]))
    eyes = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, patch_size=4)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=TEXT | rope, vision_config=eyes)
    )
    with pytest.raises(
        ValueError, match='cannot load alone.*transformers itself loads it: Qwen2VLForCond'
    ):
        load(stored(model, tmp_path/'vl'))
    sizes = {
        f'{p}_{k}': v
        for p in ('encoder', 'decoder')
        for k, v in dict(layers=1, attention_heads=2, ffn_dim=32).items()
    }
    ears = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(tok),
            d_model=32,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            **sizes,
        )
    )
    with pytest.raises(
        ValueError,
        match='is a WhisperForConditionalGeneration, and transformers has no AutoModelForSeq2SeqLM',
    ):
        load(stored(ears, tmp_path/'ears'))


@pytest.mark.parametrize('kind', MIXED)
def test_mixtures_of_experts(tmp_path, kind):
    folder = stored(wide(kind), tmp_path/'m')
    model = load(folder)[0]
    assert any("does not add the router's auxiliary loss" in n for n in notes_of(model))
    a = anatomy(model)
    assert a.location('model.layers.0.mlp.gate.weight') == (0, 'experts', 'router')
    assert a.location('model.layers.0.mlp.experts.down_proj') == (0, 'experts', 'expert_down')
    assert not a.other and ('mlp' in a.locations[a.matrices()[-1]] or kind != 'qwen3_moe')
    data = as_data([dict(prompt=f'sort {i} b', response='a b') for i in range(24)])
    how = dict(steps=1, batch_size=4, progress=False)
    run = fit(load(folder)[0], tok, data, lora(r=2), **how)
    trained = set(run.delta.attached.deltas)
    assert trained and trained == set(a.matrices())
    with pytest.raises(
        ValueError, match=r'experts.gate_up_proj. is a stack of 4 .*experts.*by name'
    ):
        fit(load(folder)[0], tok, data, lora(r=2, targets=('experts',)), **how)
    run = fit(
        load(folder)[0], tok, data, Recipe(Method('experts only'), select=parts('experts')), **how
    )
    assert all('.mlp.' in n for n in run.delta.attached.chosen)
    assert {a.location(n)[1] for n in run.delta.attached.chosen} == {'experts'}
    assert any('experts' in n for n in hft().select(model, None, 0))
