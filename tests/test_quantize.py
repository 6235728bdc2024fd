"A base in 4 bits: its values, what trains on it, what is refused, and what a run says of it"
import copy
import json
import pytest
import torch
from torch import nn
import ftlab
from ftlab.adapters.attach import attach
from ftlab.adapters.lowrank import LoRA
from ftlab.adapters.store import identity
from ftlab.core.four_bits import FourBit, held_bytes, made_whole, packed, quantization_of, quantize
from ftlab.core.loading import skeleton
from ftlab.instruments.bench import Base
from toys import TOK, lab_data, logits, toy

bits = pytest.importorskip('bitsandbytes.functional')

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('base')
    toy(hidden=64).save_pretrained(d)
    TOK.save_pretrained(d)
    return str(d)

def narrow(folder):
    return ftlab.load(folder, quantize='nf4')

def widened(model):
    "The same model with whole matrices, the values that the 4 bits give"
    out = toy(hidden=64)
    out.load_state_dict({n: made_whole(t) for n, t in model.state_dict().items()})
    return out

def trained(model, recipe='lora', rows=None, **more):
    return ftlab.fit(model, TOK, rows or lab_data(), ftlab.methods.get(recipe), steps=3,
                     batch_size=8, progress=False, **more)

# ---- the tensor
@pytest.mark.peer('FourBit', 'bitsandbytes',
                  'a matrix in nf4, made whole again (both by its functions)', tolerance=0)
def test_values_and_copies(tolerance):
    W = torch.randn(48, 70, generator=torch.Generator().manual_seed(0))
    codes, state = bits.quantize_4bit(W, blocksize=64, quant_type='nf4')
    Q = packed(W)
    assert (Q.whole() - bits.dequantize_4bit(codes, state)).abs().max() <= tolerance
    assert Q.shape == W.shape
    assert torch.equal(Q.T + 1, Q.whole().T + 1) and type(Q*2) is torch.Tensor
    assert held_bytes(Q) == 48*70//2 + 4*-(-48*70//64)
    for c in (Q.detach(), Q.clone(), Q.data, Q.float(),
              nn.Parameter(Q, requires_grad=False), copy.deepcopy(Q)):
        assert isinstance(c, FourBit) and torch.equal(c, Q)
    with pytest.raises(ValueError, match='cannot be changed in place'):
        Q.mul_(2)

@pytest.mark.parametrize('write', [
    lambda Q: Q.__setitem__(0, 0.), lambda Q: setattr(Q, 'data', torch.zeros(48, 70)),
    lambda Q: torch.mul(torch.ones(48, 70), 2, out=Q), lambda Q: torch._foreach_mul_([Q], 2),
    lambda Q: Q.copy_(torch.zeros(48, 70))], ids=['item', 'data', 'out', 'foreach', 'copy'])
def test_nothing_is_written_and_lost(write):
    Q = packed(torch.ones(48, 70))
    with pytest.raises(ValueError, match='cannot be changed in place'):
        write(Q)

def test_linear_by_keywords_of_one_row_and_in_float64():
    Q, x = packed(torch.randn(48, 70)), torch.randn(70).requires_grad_()
    bias = torch.zeros(48).requires_grad_()
    linear = nn.functional.linear
    y = linear(input=x, weight=Q, bias=bias)
    assert torch.equal(y, linear(x, Q.whole(), bias))
    y.sum().backward()
    torch.testing.assert_close(x.grad, Q.whole().sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(bias.grad, torch.ones(48))
    two = torch.ones(2, 70)
    assert torch.equal(linear(weight=two, input=Q), linear(Q.whole(), two))
    assert torch.equal(Q.double().whole(), Q.whole().double())
    assert torch.equal(packed(Q.double().whole()).whole(), packed(Q.whole()).whole().double())

def test_gradients_are_those_of_the_whole_matrix():
    layer = nn.Linear(70, 48)
    layer.weight = nn.Parameter(packed(layer.weight.detach()), requires_grad=False)
    x, y = (torch.randn(2, 3, 70).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    whole = nn.functional.linear(y, layer.weight.whole(), layer.bias)
    assert torch.equal(layer(x), whole)
    layer(x).square().sum().backward()
    mine, layer.bias.grad = layer.bias.grad.clone(), None
    whole.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine, layer.bias.grad, rtol=1e-5, atol=1e-5)

# ---- the model
def test_what_is_packed(folder):
    model, _ = narrow(folder)
    held = {n for n, p in model.named_parameters() if isinstance(p, FourBit)}
    assert len(held) == 14 and all('_proj' in n for n in held) and quantization_of(model) == 'nf4'
    assert quantization_of(toy()) is None and 'in 4 bits' in model.load_notes[-1]
    bones, _ = skeleton(folder, quantize='nf4')
    sizes = [sum(map(held_bytes, m.parameters())) for m in (bones, model, toy(hidden=64))]
    assert sizes[0] == sizes[1] < .6*sizes[2]
    with pytest.raises(ValueError, match='no linear layers'):
        quantize(nn.Embedding(3, 3))
    with pytest.raises(ValueError, match='quantize is'):
        ftlab.load(folder, quantize='int3')

@pytest.mark.parametrize('recipe', ['lora', 'dora', 'ia3'])
def test_a_run_equals_one_on_the_whole_matrices(folder, recipe):
    model, _ = narrow(folder)
    other = widened(model)
    runs = [trained(m, recipe) for m in (model, other)]
    for a, b in zip(*(r.delta.attached.parameters().values() for r in runs)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-4, atol=1e-4)
    assert quantization_of(model) == 'nf4'

@pytest.mark.peer('FourBit', 'peft',
                  'LoRA on a base in nf4',
                  tolerance=dict(outputs=dict(rtol=1e-4, atol=1e-5),
                                 gradients=dict(rtol=1e-3, atol=1e-6)))
def test_it_computes_what_peft_computes(folder, tolerance):
    peft = pytest.importorskip('peft')
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4',
                             bnb_4bit_compute_dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map='cpu')
    theirs = peft.prepare_model_for_kbit_training(theirs, use_gradient_checkpointing=False)
    theirs.train() # in eval mode bitsandbytes has a CPU kernel of its own, in bfloat16
    names = ['q_proj', 'v_proj']
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names)
    theirs = peft.get_peft_model(theirs, config).train()
    model, _ = narrow(folder)
    chosen = {n: True for n, _ in model.named_parameters() if any(k in n for k in names)}
    att = attach(model, chosen, lambda W, mask: LoRA(W, mask, r=4, alpha=8))
    for n, d in att.deltas.items():
        layer = theirs.base_model.model.get_submodule(n.removesuffix('.weight'))
        with torch.no_grad():
            d.B.normal_(std=.1)
            layer.lora_A['default'].weight.copy_(d.A)
            layer.lora_B['default'].weight.copy_(d.B)
    ids = torch.randint(3, len(TOK), (2, 9))
    found = [m(input_ids=ids, labels=ids) for m in (model, theirs)]
    torch.testing.assert_close(found[0].logits, found[1].logits, **tolerance['outputs'])
    for f in found:
        f.loss.backward()
    for n, d in att.deltas.items():
        layer = theirs.base_model.model.get_submodule(n.removesuffix('.weight'))
        for mine, other in ((d.A, layer.lora_A), (d.B, layer.lora_B)):
            theirs_grad = other['default'].weight.grad
            torch.testing.assert_close(mine.grad, theirs_grad, **tolerance['gradients'])

# ---- what is refused
@pytest.mark.parametrize('recipe, said', [('full', 'cannot train itself'), ('hft', 'cannot train itself'),
                                          ('breadcrumbs * lora', 'writes it into the weights')])
def test_weights_do_not_train_themselves(folder, recipe, said):
    model, _ = narrow(folder)
    before = identity(model)
    with pytest.raises(ValueError, match=said):
        trained(model, recipe)
    assert identity(model) == before

def test_a_change_is_not_folded_and_an_export_is_whole(folder, tmp_path):
    model, _ = narrow(folder)
    run = trained(model, rows=ftlab.data('new-procedure', n=200)) # a card's code makes them again
    after = logits(model)
    with pytest.raises(ValueError, match='cannot be folded'):
        run.delta.attached.fold()
    assert torch.equal(logits(model), after)
    ftlab.export(run, tmp_path/'e')
    again, _ = ftlab.load(tmp_path/'e')
    torch.testing.assert_close(logits(again), after, rtol=1e-4, atol=1e-4)
    card = (tmp_path/'e'/'README.md').read_text()
    assert "quantize='nf4'" in card and 'in 4 bits' in card, card.partition('No code on')[1:]
    assert any('in 4 bits' in n for n in run.notes)

def test_without_the_package(folder, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'bitsandbytes.functional', None)
    with pytest.raises(ImportError, match='pip install bitsandbytes'):
        narrow(folder)

def test_a_start_in_the_background_without_the_package(folder, monkeypatch):
    from ftlab.cli import main
    monkeypatch.setitem(__import__('sys').modules, 'bitsandbytes.functional', None)
    made = []
    monkeypatch.setattr('ftlab.cli.start', lambda a: made.append(a) or ({}, ''))
    asked = ['compare', '--background', '--methods=lora', '--quantize=nf4', f'--model={folder}']
    assert main([*asked, '--data=new-procedure', f'--out={folder}/c', '--seeds=1']) != 0
    assert not made

# ---- what a run knows
def test_bases_share_no_run(folder):
    bases = [Base(folder), Base(folder, quantize='nf4'), Base(narrow(folder)),
             Base((widened(narrow(folder)[0]), TOK))]
    prints = [b.fingerprint(0) for b in bases]
    assert len(set(prints)) == 3 and prints[1] == prints[2]
    with pytest.raises(ValueError, match='quantize goes with the name'):
        Base(narrow(folder), quantize='nf4')

def test_a_checkpoint_knows_its_base(folder, tmp_path):
    model, _ = narrow(folder)
    run = trained(model, out=tmp_path, save_every=1)
    assert run.settings['quantize'] == 'nf4'
    again, _ = narrow(folder)
    same = trained(again, out=tmp_path, resume=True)
    assert [x['nll'] for x in same.log] == [x['nll'] for x in run.log]
    with pytest.raises(ValueError):
        trained(widened(narrow(folder)[0]), out=tmp_path, resume=True)

def test_a_comparison_and_its_winner(folder, tmp_path):
    c = ftlab.compare(['lora'], folder, lab_data(), old=lab_data(), seeds=1, steps=2,
                      items=4, old_items=2, tune=False,
                      batch_size=4, quantize='nf4', out=tmp_path/'c', progress=False)
    assert json.loads((tmp_path/'c'/'result.json').read_text())['inputs']['quantize'] == 'nf4'
    run = c.train('lora', tmp_path/'w', progress=False)
    record = json.loads((tmp_path/'w'/'run.json').read_text())
    assert record['quantize'] == quantization_of(run.model) == 'nf4'
