"A GGUF file is read as the model that it holds, or refused"
import json, shutil
import pytest, torch
import ftlab
from ftlab.core.generate import stop_ids
from ftlab.core.gguf_file import RULES, write_gguf
from ftlab.core.gguf_folder import PROBE, follow_rule, notes_in, plain_folder
from ftlab.core.loading import smollm2_file
from ftlab.core.model import notes_of
from served import TEXT, served
from test_gguf import CASES, X, llama_cpp, made, plain
from toys import logits

gguf = pytest.importorskip('gguf', reason='gguf is in the bench extra')

@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr('ftlab.core.gguf_folder.CACHE', tmp_path/'cache')
    return tmp_path/'cache'

def written(tmp_path, model, tok, dtype='f32', **keys):
    "The file of a model, with more keys in its header"
    write = gguf.GGUFWriter.write_header_to_file
    with pytest.MonkeyPatch.context() as m:
        def header(self, *args):
            for k, v in keys.items():
                key = f'{self.arch}.{k.replace("__", ".")}'
                (self.add_string if isinstance(v, str) else self.add_float32)(key, v)
            write(self, *args)
        m.setattr(gguf.GGUFWriter, 'write_header_to_file', header)
        return write_gguf(tmp_path/'m.gguf', model, tok, plain(model), dtype)

@pytest.mark.parametrize('case', CASES)
def test_the_same_model_comes_back(case, tmp_path):
    model, tok = made(case, **(dict(rule='qwen2') if 'qwen2' in case else {}))
    again, read = ftlab.load(write_gguf(tmp_path/'m.gguf', model, tok, plain(model)))
    torch.testing.assert_close(logits(again, X), logits(model, X), atol=1e-4, rtol=0)
    assert again.dtype == torch.float32 and not again.training
    assert read.chat_template == tok.chat_template
    assert (read.eos_token_id, read.pad_token_id) == (tok.eos_token_id, tok.pad_token_id)
    assert [read(t).input_ids for t in TEXT] == [tok(t).input_ids for t in TEXT]
    assert any('unpacked from m.gguf' in n for n in notes_of(again))

@pytest.mark.parametrize('rule', RULES)
def test_words_are_cut_by_the_rule_of_the_file(rule, tmp_path):
    model, tok = served('llama', rule)
    _, read = ftlab.load(write_gguf(tmp_path/'m.gguf', model, tok, plain(model)))
    for t in [*TEXT, 'a  1234567  b', "WE'RE don't\r\n\r\n x"]:
        assert read(t).input_ids == tok(t).input_ids, t

def test_a_rule_that_transformers_would_replace_is_refused(tmp_path, cache):
    model, tok = made('qwen2')
    with pytest.raises(ValueError, match='another rule'):
        ftlab.load(write_gguf(tmp_path/'m.gguf', model, tok, plain(model)))
    assert not list(cache.iterdir())

def test_it_is_unpacked_once(tmp_path, cache, monkeypatch):
    model, tok = made('llama')
    path = write_gguf(tmp_path/'m.gguf', model, tok, plain(model))
    folder = plain_folder(path)
    monkeypatch.setattr('ftlab.core.gguf_folder._unpack', None)
    shutil.copy(path, tmp_path/'other name.gguf')
    assert plain_folder(path) == folder
    assert [p.name for p in cache.iterdir()] == [folder.name]
    with pytest.raises(TypeError):  # another name is unpacked again: the notes name the file
        plain_folder(tmp_path/'other name.gguf')

@pytest.mark.parametrize('name', ['model.safetensors', 'config.json', 'ftlab_gguf.json'])
def test_a_damaged_folder_is_unpacked_again(name, tmp_path):
    model, tok = made('llama')
    path = write_gguf(tmp_path/'m.gguf', model, tok, plain(model))
    at = plain_folder(path)/name
    whole = at.read_bytes()
    at.write_bytes(whole[:len(whole)//2])
    ftlab.load(path)
    assert at.read_bytes() == whole
    at.unlink()
    ftlab.load(path)

def test_an_interrupted_unpacking_leaves_nothing(tmp_path, cache, monkeypatch):
    model, tok = made('llama')
    path = write_gguf(tmp_path/'m.gguf', model, tok, plain(model))
    def stop(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr('ftlab.core.gguf_folder._save_tokenizer', stop)
        with pytest.raises(KeyboardInterrupt):
            plain_folder(path)
    assert not list(cache.iterdir())
    assert (plain_folder(path)/'model.safetensors').is_file()

@pytest.mark.parametrize('dtype', ['f16', 'bf16'])
def test_half_precision_stays(dtype, tmp_path):
    model, tok = made('llama')
    again, _ = ftlab.load(write_gguf(tmp_path/'m.gguf', model, tok, plain(model), dtype))
    assert again.dtype == dict(f16=torch.float16, bf16=torch.bfloat16)[dtype]
    mine = dict(model.named_parameters())
    for n, p in again.named_parameters():
        assert torch.equal(p, mine[n].to(p.dtype)), n

@pytest.mark.parametrize('keys, name', [
    (dict(rope__scaling__type='yarn'), 'rope.scaling.type'), (dict(rope__scaling__factor=8.), 'rope.scaling.factor'),
    (dict(attn_logit_softcapping=30.), 'attn_logit_softcapping'), (dict(logit_scale=.1), 'logit_scale'),
    (dict(attention__scale=.2), 'attention.scale'), (dict(attention__scale=1.), 'attention.scale'),
    (dict(attn_logit_softcapping=1.), 'softcapping'), (dict(attention__sliding_window=1.), 'sliding_window')])
def test_what_would_be_left_out_is_refused(keys, name, tmp_path):
    path = written(tmp_path, *made('llama'), **keys)
    with pytest.raises(ValueError, match=f'llama.*{name}.*ignores'):
        ftlab.load(path)

def changed(tmp_path, model, tok, drop=(), **keys):
    "The file of a model whose header lacks some keys, or says something else"
    write = gguf.GGUFWriter.write_header_to_file
    with pytest.MonkeyPatch.context() as m:
        def header(self, *args):
            for k in [*drop, *keys]:
                del self.kv_data[0][k.replace('__', '.')]
            for k, v in keys.items():
                self.add_uint32(k.replace('__', '.'), v)
            write(self, *args)
        m.setattr(gguf.GGUFWriter, 'write_header_to_file', header)
        return write_gguf(tmp_path/'m.gguf', model, tok, plain(model))

@pytest.mark.parametrize('key', ['rope.dimension_count', 'attention.key_length', 'attention.value_length'])
def test_a_size_that_transformers_guesses_is_refused_where_the_file_says_another(key, tmp_path):
    model, tok = made('qwen2_tied', rule='qwen2')
    path = changed(tmp_path, model, tok, **{f'qwen2__{key.replace(".", "__")}': 8})
    with pytest.raises(ValueError, match=f'{key}=8.*has 16'):
        ftlab.load(path)

@pytest.mark.parametrize('key', ['llama.attention.layer_norm_rms_epsilon', 'llama.context_length',
                                 'tokenizer.ggml.eos_token_id'])
def test_nothing_is_made_up(key, tmp_path):
    with pytest.raises(ValueError, match='would be made up'):
        ftlab.load(changed(tmp_path, *made('llama'), drop=[key]))

def test_a_part_of_a_model_is_named(tmp_path, monkeypatch):
    write = gguf.GGUFWriter.write_header_to_file
    def header(self, *args):
        self.add_uint16('split.count', 3)
        write(self, *args)
    monkeypatch.setattr(gguf.GGUFWriter, 'write_header_to_file', header)
    model, tok = made('llama')
    with pytest.raises(ValueError, match='one of 3 parts'):
        ftlab.load(write_gguf(tmp_path/'m.gguf', model, tok, plain(model)))

def test_all_marks_that_end_an_answer_are_kept(tmp_path):
    model, tok = made('llama')
    tok.chat_template = None  # which would tell its end
    again, read = ftlab.load(write_gguf(tmp_path/'m.gguf', model, tok, plain(model)))
    assert stop_ids(again, read) == sorted(model.generation_config.eos_token_id)
    assert again.config.bos_token_id == tok.bos_token_id

def test_a_rule_has_other_names_and_its_own_beginning(tmp_path):
    model, tok = served('llama', 'llama-bpe')
    flags = ['tokenizer.ggml.add_bos_token', 'tokenizer.ggml.add_eos_token']
    path = changed(tmp_path, model, tok, drop=flags)  # as in the first files of Llama 3
    again, read = ftlab.load(path)
    for t in TEXT:
        assert read(t).input_ids == [tok.bos_token_id, *tok(t).input_ids], t
    again.save_pretrained(tmp_path/'saved')
    read.save_pretrained(tmp_path/'saved')
    assert ftlab.load(tmp_path/'saved')[1](TEXT[0]).input_ids == read(TEXT[0]).input_ids
    ask = llama_cpp(path)
    assert ask('tokenize', content=TEXT[0], add_special=True)['tokens'] == read(TEXT[0]).input_ids

def pieces(tmp_path, monkeypatch, prefix):
    "The file of a model with a sentencepiece vocabulary"
    words = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))]
    merged = ['▁t', 'he', '▁the', 'at', '▁c', '▁cat', '▁▁', 'in', '▁in']
    words += [*merged, *'▁abcdefghijklmnopqrstuvwxyz', '<|im_end|>', '<tool>']
    def vocabulary(w, *_):
        w.add_tokenizer_model('llama')
        w.add_token_list(words)
        w.add_token_scores([-float(i) for i in range(len(words))])
        w.add_token_types([2, 3, 3] + [6]*256 + [1]*(len(merged) + 27) + [3, 4])
        w.add_bos_token_id(1)
        w.add_eos_token_id(2)
        if prefix is not None:
            w.add_add_space_prefix(prefix)
    monkeypatch.setattr('ftlab.core.gguf_file._write_tokenizer', vocabulary)
    model, tok = served(rows=len(words))
    return write_gguf(tmp_path/'m.gguf', model, tok, plain(model)), words

@pytest.mark.parametrize('prefix', [None, True, False])
def test_sentencepiece_begins_words_as_llama_cpp_does(prefix, tmp_path, monkeypatch):
    path, words = pieces(tmp_path, monkeypatch, prefix)
    _, tok = ftlab.load(path)
    first = ['t', 'he'] if prefix is False else ['▁the']
    cut = lambda t: [words[i] for i in tok(t).input_ids]
    assert cut('the') == ['<s>', *first]
    assert cut('the<|im_end|>the') == ['<s>', *first, '<|im_end|>', *first]
    assert tok.decode(tok('the cat').input_ids, skip_special_tokens=True) == 'the cat'
    ask = llama_cpp(path)
    for t in ['the cat', ' the', '  in the', 'Ü cat', 'a<tool> cat', 'the<|im_end|>the',
              'the\ncat']:
        found = ask('tokenize', content=t, add_special=True, parse_special=True)
        assert found['tokens'] == tok(t).input_ids, t

def test_neutral_keys_are_no_trouble(tmp_path):
    path = written(tmp_path, *made('llama'), rope__scaling__type='none', rope__scaling__factor=1.,
                   attention__sliding_window=0.)
    ftlab.load(path)

def test_a_tensor_too_many_is_refused(tmp_path):
    model, tok = made('llama')
    write = gguf.GGUFWriter.write_header_to_file
    with pytest.MonkeyPatch.context() as m:
        def header(self, *args):
            self.add_tensor('rope_freqs.weight', torch.ones(8).numpy())
            write(self, *args)
        m.setattr(gguf.GGUFWriter, 'write_header_to_file', header)
        path = write_gguf(tmp_path/'m.gguf', model, tok, plain(model))
    with pytest.raises(ValueError, match='8 values more'):
        ftlab.load(path)

def test_bad_files_are_named(tmp_path):
    model, tok = made('llama')
    path = write_gguf(tmp_path/'m.gguf', model, tok, plain(model))
    whole = path.read_bytes()
    for n in (0, 3, 30, 2000, len(whole)//2, len(whole) - 64):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match='m.gguf'):
            ftlab.load(path)
    with pytest.raises(FileNotFoundError, match='nowhere.gguf'):
        ftlab.load(tmp_path/'nowhere.gguf')
    path.write_bytes(whole)
    with pytest.raises(ValueError, match='has none'):
        ftlab.load(path, revision='main')

def test_other_architectures_and_adapters_are_refused(tmp_path):
    for arch, kind, why in (('nothing', 'model', "'nothing'"), ('llama', 'adapter', 'not a whole model')):
        w = gguf.GGUFWriter(tmp_path/f'{kind}.gguf', arch)
        w.add_type(kind)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        with pytest.raises(ValueError, match=why):
            ftlab.load(tmp_path/f'{kind}.gguf')

def test_an_unknown_rule_is_said():
    rules = json.loads(served('llama')[1].backend_tokenizer.to_str())
    was = json.dumps(rules)
    assert "names 'chatglm-bpe' as the rule" in follow_rule(rules, 'chatglm-bpe')
    assert 'names no rule' in follow_rule(rules, None) and json.dumps(rules) == was
    assert follow_rule(rules, 'llama3') == '' and rules['model']['ignore_merges']

def test_no_token_is_made_up(tmp_path):
    model, tok = made('llama')
    _, read = ftlab.load(write_gguf(tmp_path/'m.gguf', model, tok, plain(model)))
    rows = model.get_input_embeddings().weight.shape[0]
    assert max(read.get_vocab().values()) < rows
    assert set(read.all_special_tokens) <= set(tok.all_special_tokens)

def test_a_fine_tune_of_a_file_is_a_plain_model(tmp_path):
    model, tok = made('llama')
    path = write_gguf(tmp_path/'m.gguf', model, tok, plain(model))
    rows = [dict(prompt=f'the cat {i}', response='sat') for i in range(40)]
    again, read = ftlab.load(path)
    run = ftlab.fit(again, read, rows, ftlab.methods.lora(), steps=3, progress=False)
    run.export(tmp_path/'out')
    out, _ = ftlab.load(tmp_path/'out')
    torch.testing.assert_close(logits(out, X), logits(run.model, X), atol=1e-4, rtol=0)
    assert not notes_in(tmp_path/'out')
    assert 'quantization' not in json.loads((tmp_path/'out/config.json').read_text())

# ---- a real model

def real():
    try:
        return smollm2_file()
    except FileNotFoundError as e:
        pytest.skip(str(e))

def test_smollm2_is_what_llama_cpp_reads(monkeypatch, tmp_path):
    path = real()
    monkeypatch.undo()  # unpacked once on this machine
    model, tok = ftlab.load(path)
    ask = llama_cpp(path)
    for t in ['The capital of France is', 'I paid  12345.67 in 2024\n\n  and 3', PROBE]:
        found = ask('tokenize', content=t, add_special=True, parse_special=True)
        assert found['tokens'] == tok(t).input_ids, t
    ids = tok('The capital of France is').input_ids
    found = ask('completion', prompt=ids, n_predict=1, temperature=0, n_probs=5, cache_prompt=False)
    mine = logits(model, dict(input_ids=torch.tensor([ids])))[0, -1].log_softmax(-1)
    for x in found['completion_probabilities'][0]['top_logprobs']:
        assert abs(x['logprob'] - float(mine[x['id']])) < .25  # it computes with activations in 8 bits
