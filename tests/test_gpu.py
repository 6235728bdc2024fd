"Every method on a GPU: it trains there, as it does on a CPU, and gives the model back"
import pytest
import torch
from ftlab import methods
from ftlab.core.four_bits import FourBit, made_whole, packed
from ftlab.core.loading import load
from ftlab.core.generate import generate
from ftlab.evaluators.decoding.eft import eft
from ftlab.trainers.fit import fit
from test_contract import RECIPES
from toys import TOK, lab_data, probe, toy

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU here')
SAMPLES = {'grpo', 'lora * grpo', 'spin', 'eft', 'randlora', 'copilot', 'r_tuning',
           'lora with dropout', 'masked_thought'}  # what they draw or compute first may differ

def recipe_for(name, device):
    "The recipe of the contract's tests; a second model that it asks lies on the device, too"
    return eft(large=toy(1, hidden=64).to(device)) if name == 'eft' else RECIPES[name]()

def tuned(name, device, **more):
    recipe = recipe_for(name, device)
    settings = dict(steps=max(4, 2*len(recipe.stages)), batch_size=8, progress=False) | more
    return fit(toy().to(device), TOK, lab_data(), recipe, **settings)

def restored(run):
    "Every weight, after the change was taken off"
    run.delta.attached.detach()
    return {n: p.detach().cpu() for n, p in run.model.named_parameters()}

@cuda
@pytest.mark.parametrize('name', sorted(RECIPES))
def test_a_method_trains_on_a_gpu_and_gives_the_model_back(name):
    run, before = tuned(name, 'cuda'), dict(toy().named_parameters())
    assert all(p.device.type == 'cuda' for p in run.model.parameters())
    assert all(torch.isfinite(torch.tensor(r['loss'])) for r in run.log)
    if name not in SAMPLES:
        on_cpu = tuned(name, 'cpu')
        assert run.log[0]['loss'] == pytest.approx(on_cpu.log[0]['loss'], rel=2e-3, abs=2e-4)
    after = restored(run)
    assert after.keys() == before.keys()
    for n, p in before.items():
        assert torch.equal(after[n], p), n

@cuda
@pytest.mark.parametrize('name', ['full', 'lora', 'hft', 'lift', 'mezo', 'dft'])
def test_a_method_trains_in_bf16_on_a_gpu(name):
    run = tuned(name, 'cuda', precision='bf16')
    assert all(torch.isfinite(torch.tensor(r['loss'])) for r in run.log)
    wide = tuned(name, 'cuda')
    assert run.log[0]['nll'] == pytest.approx(wide.log[0]['nll'], rel=.02)

@cuda
def test_a_change_is_saved_on_a_gpu_and_loaded_on_a_cpu(tmp_path):
    from ftlab.adapters.store import load_delta
    run = tuned('lora', 'cuda')
    run.delta.save(tmp_path/'delta.safetensors')
    model = toy()
    load_delta(model, tmp_path/'delta.safetensors')
    batch = {k: v for k, v in probe().items() if k != 'labels'}
    with torch.no_grad():
        here, there = (model(**batch).logits,
                       run.model(**{k: v.cuda() for k, v in batch.items()}).logits.cpu())
    assert torch.allclose(here, there, atol=2e-3, rtol=1e-2)

@cuda
def test_a_lab_model_says_the_same_on_a_gpu():
    answers = []
    for device in ('cpu', 'cuda'):
        model, tok = load('lab-s', device=device)
        rows = lab_data().test[:16]
        answers.append(generate(model, tok, [r['prompt'] for r in rows], max_new_tokens=8))
    assert sum(a == b for a, b in zip(*answers)) >= 15

@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=cuda)])
def test_a_matrix_in_4_bits_has_the_gradients_of_the_whole_one(device):
    pytest.importorskip('bitsandbytes.functional', reason='a base in 4 bits needs bitsandbytes')
    W = torch.randn(48, 70, generator=torch.Generator().manual_seed(0))
    Q, whole = packed(W.to(device)), packed(W).whole()
    assert Q.packed.device.type == Q.scales.device.type == device
    torch.testing.assert_close(Q.whole().cpu(), whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(packed(W).to(device).whole().cpu(), whole, rtol=1e-6, atol=0)
    x, y = (torch.ones(2, 70, device=device, requires_grad=True) for _ in range(2))
    outputs = [torch.nn.functional.linear(v, m) for v, m in ((x, Q), (y, Q.whole()))]
    torch.testing.assert_close(*outputs)
    for o in outputs:
        o.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=cuda)])
@pytest.mark.parametrize('recipe', ['lora', 'dora', 'ia3'])
def test_a_base_in_4_bits_trains_as_the_same_values_do(recipe, device, tmp_path):
    pytest.importorskip('bitsandbytes.functional', reason='a base in 4 bits needs bitsandbytes')
    toy(hidden=64).save_pretrained(tmp_path)
    TOK.save_pretrained(tmp_path)
    narrow, _ = load(str(tmp_path), quantize='nf4', device=device)
    held = [p for p in narrow.parameters() if isinstance(p, FourBit)]
    assert len(held) == 14 and all(p.packed.device.type == device for p in held)
    wide = toy(hidden=64).to(device)
    wide.load_state_dict({n: made_whole(t) for n, t in narrow.state_dict().items()})
    settings = dict(steps=3, batch_size=8, progress=False)
    runs = [fit(m, TOK, lab_data(), methods.get(recipe), **settings) for m in (narrow, wide)]
    losses, changes = ([[r['loss'] for r in run.log] for run in runs],
                       [run.delta.attached.parameters() for run in runs])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for n, p in changes[0].items():
        torch.testing.assert_close(p, changes[1][n], rtol=1e-3, atol=1e-5)
    batch = {k: v.to(device) for k, v in probe().items()}
    for m, change in zip((narrow, wide), changes):
        for p in change.values():
            p.grad = None
            p.requires_grad_()
        m(**batch).loss.backward()
    for n, p in changes[0].items():
        assert p.grad.abs().max() > 0
        torch.testing.assert_close(p.grad, changes[1][n].grad, rtol=1e-3, atol=1e-5)
