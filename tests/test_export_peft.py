"An exported adapter computes in peft what the changed model computes, or it is refused"
import json
from functools import partial
import pytest, torch
from safetensors.torch import load_file
from torch import nn
from ftlab.adapters.attach import attach
from ftlab.adapters.delta import Offset
from ftlab.adapters.lowrank import LoRA, to_peft
from ftlab.adapters.select import parts
from ftlab.core.data import data
from ftlab.core.loading import load
from ftlab.instruments.card import write_card
from ftlab.methods import get
from ftlab.trainers.fit import fit
from tiny import example_inputs, tiny
from toys import TOK, classifier, lab_data, label_data, logits, toy

peft = pytest.importorskip('peft', reason='peft is in the bench extra')
pytestmark = pytest.mark.filterwarnings('ignore:fan_in_fan_out', 'ignore:Could not find a config file')
CASES = dict(llama=['q_proj', 'down_proj'], gpt2=['c_attn', 'c_fc'], qwen2=['q_proj', 'lm_head', 'embed_tokens'],
             gpt_neox=['query_key_value', 'embed_in', 'embed_out'])

def out(m):
    return logits(m, example_inputs())

@torch.no_grad()
def shake(att, scale=.1):
    g = torch.Generator().manual_seed(1)
    for p in att.parameters().values():
        p.add_(scale*torch.randn(p.shape, generator=g))

def chosen(model, ends):
    return [n for n, p in model.named_parameters() if p.ndim == 2
            and any(f'{e}.weight' in n for e in ends)]

def with_ranks(model, names, **more):
    "Attach LoRA of several ranks and scales"
    made = iter(range(len(names)))
    def make(W, mask):
        i = next(made)
        return LoRA(W, mask, r=2 + i % 3, alpha=[4., 16., 3.][i % 3], **more)
    return attach(model, dict.fromkeys(names, True), make)

@pytest.mark.peer('to_peft', 'peft',
                  'outputs of an exported LoRA with several ranks and scales', tolerance=1e-5)
@pytest.mark.parametrize('rs', [False, True])
@pytest.mark.parametrize('family', CASES)
def test_peft_computes_the_same(family, rs, tmp_path, tolerance):
    make = lambda: tiny(family, tie_word_embeddings=False)
    m = make()
    base, names = out(m), chosen(m, CASES[family])
    assert len(names) >= 3
    att = with_ranks(m, names, rs=rs)
    shake(att)
    changed = out(m)
    assert (changed - base).abs().max() > .05
    to_peft(att, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(out(theirs), changed, atol=tolerance, rtol=0)
    att.fold()
    torch.testing.assert_close(out(theirs), out(m), atol=tolerance, rtol=0)
    held = [k for k in load_file(tmp_path/'adapter_model.safetensors') if 'lora' in k]
    assert len(held) == 2*len(names)

def test_layers_under_two_scaling_rules(tmp_path):
    m = tiny('llama')
    names = chosen(m, ['q_proj', 'down_proj'])
    turn = iter([True, False]*len(names))
    att = attach(m, dict.fromkeys(names, True), lambda W, mask: LoRA(W, mask, r=4, rs=next(turn)))
    shake(att)
    to_peft(att, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny('llama'), tmp_path).eval()
    torch.testing.assert_close(out(theirs), out(m), atol=1e-5, rtol=0)

def saved(model, at):
    model.save_pretrained(at)
    TOK.save_pretrained(at)
    return at

@pytest.mark.parametrize('tied', [True, False])
def test_a_run_exported_as_an_adapter(tied, tmp_path):
    model, tok = load(saved(toy(tied=tied), tmp_path/'base'))
    run = fit(model, tok, lab_data(), get('lora(r=3, rs=True)'), steps=4, batch_size=4, lr=1e-2,
              progress=False)
    run.export(tmp_path/'adapter', form='peft')
    run.export(tmp_path/'plain')
    whole, _ = load(tmp_path/'plain')
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path/'adapter').eval()
    torch.testing.assert_close(logits(theirs), logits(whole), atol=1e-5, rtol=0)
    said = json.loads((tmp_path/'adapter'/'adapter_config.json').read_text())
    assert said['base_model_name_or_path'] == str(tmp_path/'base') and (tmp_path/'adapter'/'tokenizer.json').exists()

def test_a_classifier_with_its_head(tmp_path):
    base = saved(classifier(), tmp_path/'base')
    d = label_data()
    model, tok = load(base, labels=d.labels, seed=3)
    run = fit(model, tok, d, get('lora'), steps=4, batch_size=4, lr=1e-2, progress=False)
    run.export(tmp_path/'adapter', form='peft')
    from transformers import AutoModelForSequenceClassification
    again = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    theirs = peft.PeftModel.from_pretrained(again, tmp_path/'adapter').eval()
    x = dict(input_ids=torch.arange(5, 20)[None],
             attention_mask=torch.ones(1, 15, dtype=torch.long))
    torch.testing.assert_close(logits(theirs, x), logits(run.model, x), atol=1e-5, rtol=0)
    with run.disabled():
        assert (logits(theirs, x) - logits(run.model, x)).abs().max() > 1e-3

def test_the_names_of_the_labels_are_kept_beside_the_adapter(tmp_path):
    base = saved(classifier(2), tmp_path/'base')
    asked = [r['prompt'] for r in lab_data().train]
    d = data([dict(text=t, label=['zeta', 'alpha'][i % 2]) for i, t in enumerate(asked)])
    model, tok = load(base, labels=d.labels, seed=3)
    run = fit(model, tok, d, get('lora'), steps=2, batch_size=4, lr=1e-2, progress=False)
    at = run.export(tmp_path/'adapter', form='peft')
    names = {0: 'alpha', 1: 'zeta'}
    said = json.loads((at/'labels.json').read_text())
    assert said == dict(id2label={'0': 'alpha', '1': 'zeta'})
    text = write_card(run, at, form='peft').read_text()
    code = text.split('## To load it\n```python\n')[1].split('```')[0]
    scope = {}
    exec(code.replace('"this folder"', repr(str(at))), scope)
    theirs = scope['model'].eval()
    assert theirs.config.id2label == names
    x = dict(input_ids=torch.arange(5, 20)[None],
             attention_mask=torch.ones(1, 15, dtype=torch.long))
    torch.testing.assert_close(logits(theirs, x), logits(run.model, x), atol=1e-5, rtol=0)

def test_the_revision_of_the_base_is_kept(tmp_path):
    model, tok = load(saved(toy(), tmp_path/'base'))
    run = fit(model, tok, lab_data(), get('lora'), steps=1, batch_size=4, progress=False)
    model.config._commit_hash = 'abc'
    at = run.export(tmp_path/'adapter', form='peft')
    assert peft.PeftConfig.from_pretrained(at).revision == 'abc'

def test_what_answers_with_more_than_the_model_is_no_adapter_and_no_gguf(tmp_path):
    run = fit(toy(), TOK, lab_data(), get('copilot'), steps=1, batch_size=4, progress=False)
    for form in ('peft', 'gguf'):
        with pytest.raises(ValueError, match="answers with the model 'copilot' and a decoder of its own"):
            run.export(tmp_path/form, form=form)
    with pytest.raises(ValueError, match='the path to export to is empty'):
        run.export('')

def test_a_layer_whose_name_ends_another_is_refused(tmp_path):
    m = nn.ModuleDict(dict(out=nn.Linear(4, 4), more=nn.ModuleDict(dict(out=nn.Linear(4, 4)))))
    att = attach(m, {'out.weight': True}, partial(LoRA, r=2))
    with pytest.raises(ValueError, match="peft takes 'out' for 'more.out' as well"):
        to_peft(att, tmp_path)

def test_what_an_adapter_cannot_hold_is_refused(tmp_path):
    model = toy()
    run = fit(model, TOK, lab_data(), get('full'), steps=1, batch_size=4, progress=False)
    with pytest.raises(ValueError, match='is trained directly; export the whole model as a plain folder'):
        run.export(tmp_path/'a', form='peft')
    with pytest.raises(ValueError, match="form is 'x'; it must be plain, peft"):
        run.export(tmp_path/'a', form='x')
    m = tiny('llama')
    offsets = attach(m, parts()(m), Offset)
    with pytest.raises(ValueError, match='is changed by Offset'):
        to_peft(offsets, tmp_path/'a')
    offsets.detach()
    norm = next(n for n, p in m.named_parameters() if p.ndim == 1)
    both = attach(m, {**parts()(m), norm: True}, partial(LoRA, r=2), also=(norm,))
    with pytest.raises(ValueError, match=f'{norm!r} is trained directly'):
        to_peft(both, tmp_path/'a')
    assert not (tmp_path/'a').exists()

class Scaled(nn.Embedding):
    def forward(self, x):
        return 2*super().forward(x)

def test_a_layer_with_arithmetic_of_its_own_is_refused(tmp_path):
    m = tiny('llama', tie_word_embeddings=False)
    m.model.embed_tokens.__class__ = Scaled
    att = attach(m, {'model.embed_tokens.weight': True}, partial(LoRA, r=2))
    with pytest.raises(ValueError, match='belongs to a Scaled'):
        to_peft(att, tmp_path)

def test_a_tied_embedding_is_never_half_changed(tmp_path):
    m = tiny('llama', tie_word_embeddings=True)
    with pytest.raises(ValueError, match='tied to'):
        attach(m, {'model.embed_tokens.weight': True}, partial(LoRA, r=2))

def test_a_base_that_differs_from_its_files_is_refused(tmp_path):
    model, tok = load(saved(toy(), tmp_path/'base'))
    run = fit(model, tok, lab_data(), get('lora'), steps=1, batch_size=4, progress=False)
    model.load_notes = ['only the text part of Gemma3ForConditionalGeneration was loaded']
    with pytest.raises(ValueError, match='the base is not what its files hold'):
        run.export(tmp_path/'a', form='peft')
