"Every way in which an export can differ from its run is caught at its own stage; rounding is not"
import json
import pytest, torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from ftlab import cli
from ftlab.core.data import data
from ftlab.instruments.serving import serve_check
from ftlab.methods import get
from ftlab.trainers.fit import fit
from ftlab.trainers.run import merged_weights
from served import TEMPLATE, served
from toys import TOK, classifier, label_data

FAST = dict(n=3, max_new_tokens=6)

@pytest.fixture(scope='module', params=['lora', 'full'])
def run(request):
    model, tok = served(tie_word_embeddings=False)
    d = data([dict(prompt=f'the cat {i}', response='sat on the mat') for i in range(60)])
    return fit(model, tok, d, get(request.param), steps=3, batch_size=4, lr=1e-2, progress=False)

@pytest.fixture
def folder(run, tmp_path):
    return run.export(tmp_path/'tuned')

def stage(folder, run):
    return serve_check(folder, run, **FAST).parted

def edit(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))

def weights(folder, change):
    w = load_file(folder/'model.safetensors')
    save_file(change(w) or w, folder/'model.safetensors', metadata=dict(format='pt'))

def test_a_faithful_export_passes(run, folder):
    found = serve_check(folder, run, **FAST)
    assert found.parted is None and set(found.found['stages'].values()) == {'same'}, found
    assert found.found['logits'] < 1e-4 and 'no difference, on 3 prompts of at most' in repr(found)

def test_a_changed_template_parts_at_the_text(run, folder):
    (folder/'chat_template.jinja').write_text(TEMPLATE.replace("'\n' + m['content']", "' ' + m['content']"))
    found = serve_check(folder, run, **FAST)
    assert found.parted == 'text' and 'prompt 1, character 16' in found.found['stages']['text']

def test_an_added_bos_parts_at_the_tokens(run, folder):
    from tokenizers import Tokenizer
    t = Tokenizer.from_file(str(folder/'tokenizer.json'))
    t.post_processor = TemplateProcessing(single='<|begin|> $A',
                                          special_tokens=[('<|begin|>', run.tok.bos_token_id)])
    t.save(str(folder/'tokenizer.json'))
    assert stage(folder, run) == 'tokens'

def test_another_eos_token_parts_at_the_settings(run, folder):
    edit(folder/'tokenizer_config.json', lambda c: c.update(eos_token='<|im_end|>'))
    found = serve_check(folder, run, **FAST)
    assert found.parted == 'settings' and 'eos_token' in found.found['stages']['settings']

@pytest.mark.parametrize('change', [dict(do_sample=True, temperature=.7), dict(eos_token_id=5),
                                    dict(repetition_penalty=1.3)])
def test_other_generation_settings_part_at_the_settings(run, folder, change):
    edit(folder/'generation_config.json', lambda c: c.update(change))
    assert stage(folder, run) == 'settings'

def test_an_end_of_turn_that_generate_does_not_know(run, folder):
    edit(folder/'generation_config.json', lambda c: c.update(eos_token_id=run.tok.eos_token_id))
    assert "end of turn: the run ends an answer at" in serve_check(folder, run, **FAST).found['stages']['settings']

def test_one_matrix_that_was_not_folded(run, folder):
    name = 'model.layers.1.mlp.down_proj.weight'
    before = run.delta.attached.before(name)
    weights(folder, lambda w: w.update({name: before.clone().contiguous()}))
    found = serve_check(folder, run, **FAST)
    assert found.parted == 'weights' and name in found.found['stages']['weights']
    assert found.found['stages']['logits'] == 'not compared'

def test_two_layers_swapped(run, folder):
    def swap(w):
        a, b = (f'model.layers.{i}.self_attn.q_proj.weight' for i in (0, 1))
        w[a], w[b] = w[b], w[a]
    weights(folder, swap)
    assert stage(folder, run) == 'weights'

def test_one_value_by_one_percent(run, folder):
    def nudge(w):
        w['model.norm.weight'][3] *= 1.01
    weights(folder, nudge)
    assert stage(folder, run) == 'weights'

def test_an_output_matrix_tied_wrongly(run, folder):
    weights(folder, lambda w: {k: v for k, v in w.items() if k != 'lm_head.weight'})
    edit(folder/'config.json', lambda c: c.update(tie_word_embeddings=True))
    assert stage(folder, run) == 'weights'

@pytest.mark.parametrize('change',
                         [dict(hidden_act='gelu'), dict(rms_norm_eps=1e-2),
                          dict(num_key_value_heads=2,
                                    rope_parameters=dict(rope_type='default', rope_theta=50.))])
def test_another_configuration_parts_at_the_logits(run, folder, change):
    edit(folder/'config.json', lambda c: c.update(change))
    found = serve_check(folder, run, **FAST)
    assert found.parted == 'logits' and 'position' in found.found['stages']['logits']

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_rounding_passes_and_is_said_and_another_model_does_not(run, folder, dtype):
    weights(folder, lambda w: {k: v.to(dtype) for k, v in w.items()})
    edit(folder/'config.json', lambda c: c.update(dtype=str(dtype).removeprefix('torch.')))
    found = serve_check(folder, run, **FAST)
    assert found.parted is None and 'rounded to' in found.found['notes'][0]
    def nudge(w):
        w['model.layers.0.mlp.up_proj.weight'][0, 0] += .01
    weights(folder, nudge)
    assert stage(folder, run) == 'weights', 'less than rounding moves some values, and still found'

def test_a_run_in_bfloat16(tmp_path):
    model, tok = served()
    model.to(torch.bfloat16)
    d = data([dict(prompt=f'the cat {i}', response='sat on the mat') for i in range(60)])
    run = fit(model, tok, d, get('lora'), steps=2, batch_size=4, lr=1e-2, progress=False)
    at = run.export(tmp_path/'tuned')
    assert stage(at, run) is None
    name = 'model.layers.{}.mlp.up_proj.weight'
    weights(at, lambda w: w.update({name.format(1): w[name.format(0)].clone()}))
    assert stage(at, run) == 'weights'

CATS = [dict(prompt=f'the cat {i}', response='sat on the mat') for i in range(60)]

@pytest.mark.filterwarnings('ignore:rounding to')
def test_a_change_that_rounding_took_away(tmp_path):
    model, tok = served()
    model.to(torch.bfloat16)
    run = fit(model, tok, data(CATS), get('lora'), steps=5, batch_size=4, lr=1e-4, progress=False)
    with pytest.warns(UserWarning, match='rounding to bfloat16 changes what was trained by'):
        at = run.export(tmp_path/'tuned')
    found = serve_check(at, run, **FAST)
    base = {n: run.delta.attached.before(n).float() for n in run.delta.attached.deltas}
    held = {n: p.float() for n, p in merged_weights(run.model, run.delta.attached).items()}
    deltas = run.delta.attached.deltas
    want = {n: d.s*(d.B.float() @ d.A.float()).detach() for n, d in deltas.items()}
    off = sum(float((held[n] - base[n] - want[n]).square().sum()) for n in want)
    lost = (off/sum(float(w.square().sum()) for w in want.values()))**.5
    assert found.found['lost'] == pytest.approx(lost, rel=1e-3) and lost > .5
    assert found.parted == 'weights' and f'by {lost:.0%} of its size' in found.found['stages']['weights']

def test_a_float32_run_loses_nothing_and_nothing_is_said(run, tmp_path, recwarn):
    found = serve_check(run.export(tmp_path/'tuned'), run, **FAST)
    assert found.found['lost'] < 1e-4 and not found.found['notes']
    assert not [w for w in recwarn if 'rounding' in str(w.message)]

def tokenizer(folder, change):
    edit(folder/'tokenizer.json', change)

def swapped(t):
    words = t['model']['vocab']
    a, b = sorted(words, key=words.get)[300:302]
    words[a], words[b] = words[b], words[a]

def without_tool(t):
    t['added_tokens'] = [x for x in t['added_tokens'] if x['content'] != '<tool>']

@pytest.mark.parametrize('change', [
    swapped, without_tool, lambda t: t.update(decoder=None),
    lambda t: t.update(normalizer=dict(type='Lowercase')),
    lambda t: t['model'].update(merges=t['model']['merges'][:-1])])
def test_another_tokenizer_parts_at_the_tokens_whatever_the_prompts(run, folder, change):
    tokenizer(folder, change)
    assert stage(folder, run) == 'tokens'

def test_another_model_max_length(run, folder):
    edit(folder/'tokenizer_config.json', lambda c: c.update(model_max_length=8))
    assert 'model_max_length' in serve_check(folder, run, **FAST).found['stages']['tokens']

DYNAMIC = dict(rope_parameters=dict(rope_type='dynamic', factor=8., rope_theta=10000.))

@pytest.mark.parametrize('change', [DYNAMIC, dict(max_position_embeddings=16)])
def test_a_configuration_that_acts_on_longer_prompts(run, folder, change):
    edit(folder/'config.json', lambda c: c.update(change))
    found = serve_check(folder, run, **FAST)
    assert found.parted == 'logits' and f'config.{next(iter(change))}' in found.found['stages']['logits']

def test_a_branch_of_the_template_that_no_prompt_takes(run, folder):
    (folder/'chat_template.jinja').write_text("{% if messages[0]['role'] == 'system' %}x{% endif %}" + TEMPLATE)
    found = serve_check(folder, run, **FAST)
    assert found.parted == 'text' and 'none of these prompts' in found.found['stages']['text']

def test_all_prompts_of_the_user_are_asked_and_counted(run, folder):
    found = serve_check(folder, run, [f'the cat {i}' for i in range(23)], max_new_tokens=1)
    assert found.found['prompts'] == 23 and 'no difference, on 23 prompts of at most' in repr(found)
    long = serve_check(folder, run, ['the cat sat on the mat '*60], max_new_tokens=1)
    assert any('1 of the prompts were cut' in n for n in long.found['notes'])
    for wrong, say in [(dict(prompts='abc'), "prompts is the text 'abc'"), (dict(n=-1), 'n is -1'),
                       (dict(prompts=[]), 'no prompt')]:
        with pytest.raises(ValueError, match=say):
            serve_check(folder, run, **wrong)

def test_damaged_weights_are_named(run, folder):
    (folder/'model.safetensors').write_bytes((folder/'model.safetensors').read_bytes()[:99])
    with pytest.raises(ValueError, match='model.safetensors is not a safetensors file, or is damaged'):
        serve_check(folder, run, **FAST)

@pytest.mark.filterwarnings('ignore:llama.cpp ends', 'ignore:the tokenizer composes')
def test_what_llama_cpp_does_otherwise_is_said(tmp_path):
    pytest.importorskip('gguf', reason='gguf is in the bench extra')
    from tokenizers import normalizers
    model, tok = served('qwen2', rule='qwen2')
    model.generation_config.eos_token_id = tok.eos_token_id
    tok.chat_template = None
    run = fit(model, tok, data(CATS), get('lora'), steps=1, batch_size=4, progress=False)
    with pytest.warns(UserWarning, match="llama.cpp ends an answer at '<[|]im_end[|]>' as well"):
        at = run.export(tmp_path/'a.gguf', form='gguf')
    assert any('<|im_end|>' in n for n in serve_check(at, run, **FAST).found['notes'])
    tok.backend_tokenizer.normalizer = normalizers.NFC()
    with pytest.warns(UserWarning, match='loose accents'):
        at = run.export(tmp_path/'b.gguf', form='gguf')
    assert any('loose accents' in n for n in serve_check(at, run, **FAST).found['notes'])

def test_a_gguf_file_with_two_templates(tmp_path):
    pytest.importorskip('gguf', reason='gguf is in the bench extra')
    model, tok = served()
    tok.chat_template = {'default': TEMPLATE, 'tool use': TEMPLATE + 'x'}
    run = fit(model, tok, data(CATS), get('lora'), steps=1, batch_size=4, progress=False)
    at = run.export(tmp_path/'a.gguf', form='gguf')
    assert stage(at, run) is None
    tok.chat_template = {'default': TEMPLATE, 'tool use': TEMPLATE + 'y'}
    assert stage(at, run) == 'text'
    tok.chat_template = TEMPLATE
    assert stage(at, run) == 'text', 'a template that the run does not have'

def test_a_classifier(tmp_path):
    d = label_data()
    run = fit(classifier(), TOK, d, get('lora'), steps=2, batch_size=4, progress=False)
    at = run.export(tmp_path/'tuned')
    found = serve_check(at, run, n=4)
    assert found.parted is None and found.found['stages']['logits'] == 'same'
    edit(at/'config.json', lambda c: c['id2label'].update({'0': 'b', '1': 'a'}))
    assert stage(at, run) == 'settings'

@pytest.mark.parametrize('dtype', ['f32', 'f16', 'bf16'])
def test_a_gguf_file(dtype, tmp_path):
    pytest.importorskip('gguf', reason='gguf is in the bench extra')
    model, tok = served()
    d = data([dict(prompt=f'the cat {i}', response='sat on the mat') for i in range(60)])
    run = fit(model, tok, d, get('lora'), steps=2, batch_size=4, lr=1e-2, progress=False)
    at = run.export(tmp_path/'m.gguf', form='gguf', dtype=dtype)
    found = serve_check(at, run, **FAST)
    assert found.found['stages']['weights'] == found.found['stages']['logits'] == 'same', found
    assert found.parted is None, found
    keep = tok.chat_template
    tok.chat_template = keep + ' '
    assert stage(at, run) == 'text'
    tok.chat_template = keep
    other = fit(*served(seed=1), d, get('lora'), steps=2, batch_size=4, progress=False)
    assert stage(at, other) == 'weights'

def test_what_cannot_be_compared(run, tmp_path):
    with pytest.raises(FileNotFoundError, match='neither an exported folder'):
        serve_check(tmp_path/'x', run)
    (tmp_path/'a').mkdir()
    (tmp_path/'a'/'adapter_config.json').write_text('{}')
    with pytest.raises(ValueError, match='an adapter of peft'):
        serve_check(tmp_path/'a', run)

def files_at(tmp_path):
    "A model, data and prompts on the disk"
    model, tok = served()
    model.save_pretrained(tmp_path/'base')
    tok.save_pretrained(tmp_path/'base')
    rows = [dict(prompt=f'the cat {i}', response='sat on the mat') for i in range(60)]
    (tmp_path/'my.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    (tmp_path/'asked.txt').write_text('the cat\n\nthe dog\n')
    (tmp_path/'asked.jsonl').write_text(json.dumps(dict(messages=[dict(role='user', content='the cat')])) + '\n{}\n')

def test_the_commands_from_a_file_to_a_checked_model(tmp_path, monkeypatch, capsys):
    pytest.importorskip('gguf', reason='gguf is in the bench extra')
    files_at(tmp_path)
    monkeypatch.chdir(tmp_path)
    asked = '--model base --data my.jsonl --method lora --steps 2 --batch-size 4 --items 4 --out run --export tuned'
    assert cli.main(['fit', *asked.split()]) == 0
    capsys.readouterr()
    check = 'serve-check tuned --run run --prompts asked.txt --max-new-tokens 4 --json'
    assert cli.main(check.split()) == 0
    said = json.loads(capsys.readouterr().out)
    assert said['parted'] is None and said['prompts'] == 2
    assert cli.main('export run --out m.gguf --form gguf --gguf-dtype f16'.split()) == 0
    assert cli.main('serve-check m.gguf --run run --n 2 --max-new-tokens 4'.split()) == 0
    capsys.readouterr()
    edit(tmp_path/'tuned'/'config.json', lambda c: c.update(rms_norm_eps=.1))
    assert cli.main('serve-check tuned --run run --n 2 --max-new-tokens 4'.split()) == 1
    assert 'parts at: logits' in capsys.readouterr().out
    assert cli.main('serve-check tuned --run run --prompts asked.jsonl'.split()) == 1
    assert 'line 2 of asked.jsonl' in capsys.readouterr().err
    assert cli.main('export run --out b --form peft --gguf-dtype f16'.split()) == 1
    assert '--gguf-dtype f16 belongs to --form gguf' in capsys.readouterr().err
