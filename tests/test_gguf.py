"A GGUF file holds the model that was trained, or is refused"
import json, urllib.request
import pytest, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from ftlab.core.data import data
from ftlab.core.gguf_file import RULES, check_gguf, rule_of, write_gguf
from ftlab.methods import get
from ftlab.trainers.fit import fit
from served import TEMPLATE, TEXT, served, small
from toys import TOK, logits

gguf = pytest.importorskip('gguf', reason='gguf is in the bench extra')
CASES = dict(llama=dict(), llama_tied=dict(tie_word_embeddings=True),
             llama_theta=dict(rope_theta=5e5),
             llama_heads=dict(head_dim=32), llama_eps=dict(rms_norm_eps=1e-3), mistral=dict(),
             qwen2=dict(),
             gpt2=dict(), gpt2_untied=dict(tie_word_embeddings=False),
             qwen2_tied=dict(tie_word_embeddings=True))
X = dict(input_ids=torch.arange(3, 60)[None], attention_mask=torch.ones(1, 57, dtype=torch.long))

def made(case, **more):
    return served(case.partition('_')[0], **CASES[case] | more)

def plain(model):
    return {n: p.detach() for n, p in model.named_parameters()}

@pytest.mark.peer('write_gguf', 'transformers', 'outputs of the written file', tolerance=1e-4)
@pytest.mark.parametrize('case', CASES)
def test_transformers_reads_the_same_model(case, tmp_path, tolerance):
    model, tok = made(case)
    write_gguf(tmp_path/'m.gguf', model, tok, plain(model))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file='m.gguf',
                                                 dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again, X), logits(model, X), atol=tolerance, rtol=0)
    r = gguf.GGUFReader(tmp_path/'m.gguf')
    said = {k: f.contents() for k, f in r.fields.items()}
    assert said['tokenizer.chat_template'] == TEMPLATE and said['tokenizer.ggml.pre'] == 'gpt-2'
    assert said['tokenizer.ggml.eos_token_id'] == tok.eos_token_id
    assert said['tokenizer.ggml.eot_token_id'] == tok.convert_tokens_to_ids('<|im_end|>')
    assert said['tokenizer.ggml.padding_token_id'] == tok.pad_token_id
    kinds = said['tokenizer.ggml.token_type']
    assert kinds[tok.eos_token_id] == gguf.TokenType.CONTROL
    assert kinds[len(tok)] == gguf.TokenType.UNUSED
    assert kinds[tok.convert_tokens_to_ids('<tool>')] == gguf.TokenType.USER_DEFINED

@pytest.mark.parametrize('dtype, within', [('f16', 2e-3), ('bf16', 1e-2)])
@pytest.mark.parametrize('case', ['llama', 'gpt2'])
def test_half_precision_is_rounded_once(case, dtype, within, tmp_path):
    model, tok = made(case)
    write_gguf(tmp_path/'m.gguf', model, tok, plain(model), dtype)
    half = dict(f16=torch.float16, bf16=torch.bfloat16)[dtype]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file='m.gguf',
                                                 dtype=torch.float32).eval()
    mine = dict(model.named_parameters())
    for n, p in again.named_parameters():
        keep = p.ndim < 2 or n.endswith('wpe.weight')
        assert torch.equal(p, mine[n] if keep else mine[n].to(half).float()), n

@pytest.mark.parametrize('rule', RULES)
def test_the_tokenizer_is_read_back(rule, tmp_path):
    model, tok = served('llama', rule)
    assert rule_of(tok) == rule
    write_gguf(tmp_path/'m.gguf', model, tok, plain(model))
    said = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path/'m.gguf').fields.items()}
    assert said['tokenizer.ggml.pre'] == rule and said['tokenizer.ggml.add_bos_token'] is False
    assert said['tokenizer.ggml.tokens'][:len(tok)] == tok.convert_ids_to_tokens(range(len(tok)))

def llama_cpp(path):
    "Return a function that asks llama.cpp, which serves the file on this machine"
    xllamacpp = pytest.importorskip('xllamacpp', reason='llama.cpp is optional')
    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.warmup = str(path), 64, False
    p.n_parallel, p.cpuparams.n_threads = 1, 1
    server = xllamacpp.Server(p)
    def ask(what, **body):
        r = urllib.request.Request(f'{server.listening_address}/{what}', json.dumps(body).encode(),
                                   {'Content-Type': 'application/json'})
        return json.load(urllib.request.urlopen(r))
    return ask

@pytest.mark.parametrize('family, rule', [('llama', r) for r in RULES] + [('qwen2', 'qwen2'), ('gpt2', 'gpt-2')])
def test_llama_cpp_computes_the_same(family, rule, tmp_path):
    model, tok = served(family, rule)
    ask = llama_cpp(write_gguf(tmp_path/'m.gguf', model, tok, plain(model)))
    chat = tok.apply_chat_template([dict(role='user', content='a 12 <tool>')], tokenize=False)
    for text in [*TEXT[:4], chat]:
        found = ask('tokenize', content=text, add_special=True, parse_special=True)
        assert found['tokens'] == tok(text).input_ids, text
    compared = 0
    for n in range(1, 17):
        ids = tok(TEXT[0]).input_ids[:n]
        found = ask('completion', prompt=ids, n_predict=1, temperature=0, n_probs=3,
                    cache_prompt=False)
        mine = logits(model, dict(input_ids=torch.tensor([ids])))[0, -1].log_softmax(-1)
        for x in (found.get('completion_probabilities') or [dict(top_logprobs=[])])[0]['top_logprobs']:
            compared += 1
            assert abs(x['logprob'] - float(mine[x['id']])) < 5e-3 # its cache is in f16
    assert compared > 10 # it gives none where the token is half a character

def test_bos_is_added_as_the_tokenizer_adds_it(tmp_path):
    from tokenizers.processors import TemplateProcessing
    model, tok = served()
    def starts(word):
        marks = [(word, tok.convert_tokens_to_ids(word))]
        tok.backend_tokenizer.post_processor = TemplateProcessing(single=f'{word} $A',
                                                                  special_tokens=marks)
    starts('<|begin|>')
    write_gguf(tmp_path/'m.gguf', model, tok, plain(model))
    said = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path/'m.gguf').fields.items()}
    assert said['tokenizer.ggml.add_bos_token'] is True
    assert said['tokenizer.ggml.add_eos_token'] is False
    starts('<|im_start|>')
    with pytest.raises(ValueError, match='more than BOS and EOS'):
        write_gguf(tmp_path/'n.gguf', model, tok, plain(model))

ROPE = dict(rope_type='default', rope_theta=1e4)
REFUSED = [('llama', dict(hidden_act='gelu'), "activation of this llama model is 'gelu'"),
           ('llama', dict(attention_bias=True), 'attention bias'), ('llama', dict(mlp_bias=True), 'feed-forward'),
           ('mistral', dict(sliding_window=16), 'sliding window of this mistral model is 16'),
           ('mistral', dict(hidden_act='gelu'), 'activation'),
           ('qwen2', dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), 'sliding'),
           ('qwen2', dict(head_dim=32), 'head_dim'),
           ('llama', dict(rope_parameters=ROPE | dict(rope_type='linear', factor=2.)), 'rotary positions'),
           ('llama', dict(rope_parameters=ROPE | dict(partial_rotary_factor=.5)), 'partial'),
           ('gpt2', dict(activation_function='relu'), 'activation'),
           ('gpt2', dict(scale_attn_by_inverse_layer_idx=True), 'inverse_layer'),
           ('gpt2', dict(scale_attn_weights=False), 'scale_attn_weights')]

@pytest.mark.parametrize('family, change, says', REFUSED)
def test_what_the_file_cannot_say_is_refused_by_name(family, change, says, tmp_path):
    model, tok = served(family, **change)
    with pytest.raises(ValueError, match=says):
        write_gguf(tmp_path/'m.gguf', model, tok, plain(model))
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('family', ['qwen3', 'gemma', 'phi', 'gpt_neox', 'olmo2'])
def test_other_architectures_are_refused(family):
    with pytest.raises(ValueError, match=f'{family}.*cannot be written as GGUF'):
        check_gguf(small(family, **(dict(pad_token_id=0) if family == 'phi' else {})))

def test_an_extra_tensor_is_refused(tmp_path):
    model, tok = served()
    more = plain(model) | {'model.layers.0.self_attn.sinks': torch.zeros(4)}
    with pytest.raises(ValueError, match="'model.layers.0.self_attn.sinks' has no place"):
        write_gguf(tmp_path/'m.gguf', model, tok, more)

def test_other_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match='only byte-level BPE'):
        rule_of(TOK)
    for change, says in [(lambda r: r['pre_tokenizer'].update(add_prefix_space=True), 'none of those'),
                         (lambda r: r.update(normalizer=dict(type='Lowercase')), 'changes text first'),
                         (lambda r: r['model'].update(ignore_merges=True), 'ignore_merges'),
                         (lambda r: r['model'].update(byte_fallback=True), 'only byte-level'),
                         (lambda r: r['added_tokens'][0].update(lstrip=True), 'takes spaces')]:
        from tokenizers import Tokenizer
        model, tok = served()
        rules = json.loads(tok.backend_tokenizer.to_str())
        change(rules)
        tok.save_pretrained(tmp_path/'t')
        (tmp_path/'t'/'tokenizer.json').write_text(json.dumps(rules))
        odd = AutoTokenizer.from_pretrained(tmp_path/'t') if 'spaces' in says else tok
        if odd is tok:
            odd._tokenizer = Tokenizer.from_str(json.dumps(rules))
        with pytest.raises(ValueError, match=says):
            write_gguf(tmp_path/'m.gguf', model, odd, plain(model))

def test_a_run_is_exported_with_its_change(tmp_path):
    model, tok = served()
    d = data([dict(prompt=f'the cat {i}', response='sat on the mat') for i in range(60)])
    run = fit(model, tok, d, get('lora'), steps=3, batch_size=4, lr=1e-2, progress=False)
    with run.disabled():
        before = logits(model, X)
    made = run.export(tmp_path/'tuned.gguf', form='gguf')
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=made.name,
                                                 dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again, X), logits(model, X), atol=1e-4, rtol=0)
    assert (logits(again, X) - before).abs().max() > 1e-2
    with pytest.raises(FileExistsError):
        run.export(tmp_path/'tuned.gguf', form='gguf')
    with pytest.raises(ValueError, match='a folder keeps the dtype'):
        run.export(tmp_path/'x', dtype='f16')

def test_without_the_package_it_says_how_to_get_it(tmp_path, monkeypatch):
    import ftlab.core.gguf_file as G
    monkeypatch.setattr(G.importlib.util, 'find_spec', lambda name: None)
    model, tok = served()
    with pytest.raises(ImportError, match='pip install gguf'):
        write_gguf(tmp_path/'m.gguf', model, tok, plain(model))
