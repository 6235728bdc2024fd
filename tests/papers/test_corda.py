"corda: what its page cannot say about itself"
from types import SimpleNamespace
import pytest
import torch
from tiny import VOCAB, tiny
from toys import (TOK, assert_off_saved_folded, assert_resumes, classifier, lab_data, label_data,
                  logits, toy)
from ftlab.adapters.attach import attach, oriented
from ftlab.adapters.lowrank import to_peft
from ftlab.adapters.modules.corda import (ContextLoRA, StartByContext, corda, covariances, damped,
                                          split)
from ftlab.adapters.select import parts
from ftlab.adapters.yardsticks.low_rank import minor, principal
from ftlab.core.data import data
from ftlab.core.recipe import With
from ftlab.core.tokens import IGNORE, encode_all
from ftlab.trainers.fit import fit
from ftlab.trainers.losses.dft import dft

MODES = dict(preview=dict(mode='preview', rows=24), keep=dict(mode='keep', old='sort', rows=24))


def rows_of(n=24):
    return encode_all(lab_data().train[:n], TOK, 'text')


def ids(family, n=6, length=9):
    "Rows of text for a tiny model, with labels on the last three tokens, the last row two tokens shorter"
    draw = torch.Generator().manual_seed(3)
    x = torch.randint(3, VOCAB, (n, length), generator=draw)
    labels = x.clone()
    labels[:, :-3] = IGNORE
    on = torch.ones_like(x)
    on[-1, -2:] = 0
    return dict(input_ids=x, attention_mask=on, labels=labels)


def one_by_one(batch):
    "The batch's rows without their padding"
    for i, on in enumerate(batch['attention_mask'].bool()):
        yield {k: v[i:i + 1, on] for k, v in batch.items()}


def started(model, batch, mode, r=4, alpha=10.):
    chosen = {n: True for n in parts()(model) if model.get_parameter(n).ndim == 2}
    att = attach(model, chosen, With(ContextLoRA, r=r, alpha=alpha))
    C = covariances(model, [batch], chosen)
    for n, d in att.deltas.items():
        d.start(*split(att.weight(n)[0], C[n], r, d.s, mode))
    return att, C


# ---------- equal to peft

def of_peft(peft, model, batch, mode, r, alpha, names):
    "peft's model with CorDA's start, and the covariances that it read"
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda
    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=0., init_lora_weights='corda',
        target_modules=[n.removesuffix('.weight') for n in names],
        corda_config=CordaConfig(corda_method=dict(keep='kpm', preview='ipm')[mode],
                                 prune_temporary_fields=False))

    @torch.no_grad()
    def read():
        for row in one_by_one(batch):
            model(input_ids=row['input_ids'])
    preprocess_corda(model, config, run_model=read)
    seen = {n: model.get_submodule(n.removesuffix('.weight')).covariance_matrix for n in names}
    return peft.get_peft_model(model, config), seen


@pytest.mark.peer('corda', 'peft',
                  'the start: covariances beside their largest entry, the product beside that of the weight; '
                  'the lengths of the rows of A and the columns of B',
                  tolerance=dict(covariances=dict(rtol=1e-5), product=dict(rtol=1e-3),
                                 lengths=dict(rtol=1e-2)))
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('family', ['llama', 'gpt2', 'qwen2', 'opt'])
@pytest.mark.filterwarnings('ignore:fan_in_fan_out')
def test_the_start_is_that_of_peft(family, mode, tolerance):
    """Covariances to 1e-5 of their largest entry (another order of sums). The product, which has no sign to choose,
    to 1e-3 of the weight's largest entry, and to 5e-4 from peft's own covariance: float32 inverts a covariance of 54
    tokens no better, and peft is as far from the product in float64. The rows of A and columns of B are as long."""
    peft = pytest.importorskip('peft', reason='peft is in the bench extra')
    batch = ids(family)
    att, C = started(tiny(family), batch, mode)
    theirs, seen = of_peft(peft, tiny(family), batch, mode, 4, 10., list(C))
    params = dict(theirs.named_parameters())
    for n, d in att.deltas.items():
        W, before = att.weight(n)[0], f'base_model.model.{n.removesuffix(".weight")}'
        most = float(W.abs().max())
        near = tolerance['covariances']['rtol']*seen[n].abs().max()
        assert (C[n] - seen[n]).abs().max() <= near, n
        A, B = (params[f'{before}.lora_{k}.default.weight'].detach() for k in 'AB')
        assert (d.s*(d.B0 @ d.A0 - B @ A)).abs().max() <= tolerance['product']['rtol']*most, n
        a, b = split(W, seen[n], 4, d.s, mode)
        assert (d.s*(b @ a - B @ A)).abs().max() <= 5e-4*most, n
        torch.testing.assert_close(a.norm(dim=1), A.norm(dim=1), atol=0, **tolerance['lengths'])
        torch.testing.assert_close(b.norm(dim=0), B.norm(dim=0), atol=0, **tolerance['lengths'])
        exact = projected(W, damped(seen[n])[0], 4, mode)
        assert (d.s*(B @ A) - exact).abs().max() <= 1e-3*most, n
        frozen = oriented(att.model, n, params[f'{before}.base_layer.weight'].detach())
        assert (frozen + d.s*(B @ A) - W).abs().max() < 1e-4
        own = d(W) - d.s*(d.B @ d.A) # what is frozen of it
        assert (own + d.s*(d.B0 @ d.A0) - W).abs().max() < 1e-4
        assert (own - frozen).abs().max() <= 1e-3*most


def projected(W, C, r, mode):
    "The product in float64, without an inverse: the weight projected onto left singular vectors of W C"
    U = torch.linalg.svd(W.double() @ C.double(), full_matrices=False)[0]
    U = U[:, :r] if mode == 'preview' else U[:, -r:]
    return (U @ (U.T @ W.double())).float()


@pytest.mark.peer('corda', 'peft', 'outputs of the exported adapter', tolerance=1e-5)
@pytest.mark.parametrize('mode', MODES)
def test_it_trains_as_peft_does_and_its_folder_is_read_by_peft(mode, tmp_path, tolerance):
    peft = pytest.importorskip('peft', reason='peft is in the bench extra')
    run = fit(toy(), TOK, lab_data(), corda(r=4, **MODES[mode]), steps=3, batch_size=8, lr=1e-2,
              progress=False)
    tuned = logits(run.model)
    assert (tuned - logits(toy())).abs().max() > 1e-2
    to_peft(run.delta.attached, tmp_path)
    theirs = peft.PeftModel.from_pretrained(toy(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), tuned, atol=tolerance, rtol=0)


# ---------- the decomposition

def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('out, inp', [(24, 40), (40, 24)])
def test_the_identity_gives_pissa_and_milora(out, inp):
    W = gaussian(out, inp)
    for mode, plain in dict(preview=principal, keep=minor).items():
        want = plain(W, 5, 2.)
        for got, of in zip(split(W, None, 5, 2., mode), want):
            assert torch.equal(got, of)
        # damping scales the identity by 1.01, which moves between A and B and leaves the product
        a, b = split(W, torch.eye(inp), 5, 2., mode)
        torch.testing.assert_close(b @ a, want[1] @ want[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(a.norm()*1.01**.5, want[0].norm(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('out, inp', [(24, 40), (40, 24)])
def test_all_components_together_are_the_weight(out, inp):
    W, X = gaussian(out, inp), gaussian(inp, 500, seed=1)*torch.logspace(0, -2, inp)[:, None]
    a, b = split(W, X @ X.T/500, min(out, inp), 1., 'keep')
    assert (b @ a - W).abs().max() < 1e-4


def test_preview_and_keep_divide_the_components():
    W, X = gaussian(16, 16), gaussian(16, 200, seed=1)
    C = X @ X.T
    (a, b), (c, d) = split(W, C, 10, 1., 'preview'), split(W, C, 6, 1., 'keep')
    torch.testing.assert_close(b @ a + d @ c, W, atol=1e-4, rtol=0)


def test_on_what_the_context_excites_the_largest_components_do_all():
    "A layer that reads in 3 of 16 directions is held by 3 components; PiSSA, which does not know, misses half"
    W, X = gaussian(32, 16), torch.zeros(16, 300)
    X[[1, 5, 7]] = gaussian(3, 300, seed=1)
    missed = {}
    for name, C in dict(corda=X @ X.T/300, pissa=None).items():
        a, b = split(W, C, 3, 1., 'preview')
        missed[name] = float((W @ X - b @ a @ X).norm()/(W @ X).norm())
    assert missed['corda'] < .02 and missed['pissa'] > .5, missed


def test_a_flat_covariance_is_damped_until_its_inverse_holds():
    X = gaussian(64, 2)
    for C in (X @ X.T, 1e6*(X @ X.T), 1e-6*(X @ X.T)):
        full, inverse = damped(C)
        assert torch.dist(full @ inverse, torch.eye(64)) < .05
        added = (full - C).diagonal()/C.diagonal().mean()
        assert (added > .0099).all()
    with pytest.raises(ValueError, match='reads only zeros'):
        damped(torch.zeros(4, 4))


@pytest.mark.parametrize('at', [(0, 1), (0, 0)])
@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_a_covariance_without_finite_values_is_refused(at, value):
    "Off the diagonal no damping would ever be enough"
    C = torch.eye(3)
    C[at] = value
    with pytest.raises(ValueError, match='NaN or infinite'):
        damped(C)


@pytest.mark.parametrize('wrong, says', [
    (dict(mode='smallest'), "mode is 'smallest'"), (dict(r=0), 'rank 0'),
                                         (dict(r=6), 'rank 6 does not fit .* 7 x 5')])
def test_a_decomposition_that_does_not_exist_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        split(gaussian(7, 5), None, **dict(r=2, mode='keep') | wrong)


# ---------- what is read

@pytest.mark.parametrize('family', 'llama qwen2 gemma gpt2 opt gpt_neox bert qwen2_moe'.split())
def test_padding_and_the_size_of_batches_do_not_count(family):
    model, batch = tiny(family), ids(family)
    names = [n for n in parts()(model) if model.get_parameter(n).ndim == 2 and 'expert' not in n]
    was = {n: p.clone() for n, p in model.named_parameters()}
    whole, single = (covariances(model, b, names) for b in ([batch], one_by_one(batch)))
    for n in names:
        most = float(whole[n].abs().max())
        torch.testing.assert_close(whole[n], single[n], atol=1e-4*most, rtol=1e-3)
    assert all(torch.equal(was[n], p) for n, p in model.named_parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_padding_may_be_nan():
    model, batch = tiny('llama'), ids('llama')
    names, off = ['model.layers.1.mlp.down_proj.weight'], ~batch['attention_mask'].bool()[..., None]
    want = covariances(model, [batch], names)
    with model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
            lambda m, args: (args[0].masked_fill(off, torch.nan),)):
        found = covariances(model, [batch], names)
    torch.testing.assert_close(found, want, atol=0, rtol=0)


def test_a_row_may_count_as_longer_than_it_is():
    "Rows of 9 and 7 tokens count as 90; what moves is the balance of A and B, and not their product"
    model, batch = tiny('llama'), ids('llama')
    names = ['model.layers.1.mlp.down_proj.weight']
    rows = [next(iter(covariances(model, [b], names).values())) for b in one_by_one(batch)]
    long = covariances(model, [batch], names, length=90)[names[0]]
    want = torch.stack([C*90/(7 if i == len(rows) - 1 else 9) for i, C in enumerate(rows)]).mean(0)
    torch.testing.assert_close(long, want, atol=1e-5, rtol=1e-4)
    W = model.get_parameter(names[0]).detach()
    (a, b), (A, B) = split(W, long/100, 4, 1., 'keep'), split(W, long, 4, 1., 'keep')
    torch.testing.assert_close(b @ a, B @ A, atol=1e-3*float(W.abs().max()), rtol=0)
    torch.testing.assert_close(a.norm(), 10*A.norm(), atol=0, rtol=1e-3)
    torch.testing.assert_close(b.norm(), B.norm()/10, atol=0, rtol=1e-3)


def test_the_length_reaches_the_run():
    def sizes(**how):
        run = fit(toy(), TOK, lab_data(), corda(r=4, rows=16, mode='keep', old='sort', **how),
                  steps=1, batch_size=8,
                  progress=False)
        d = run.delta.attached.deltas['model.layers.1.mlp.down_proj.weight']
        return float(d.B0.norm()/d.A0.norm())
    assert 50 < sizes(length=2048)/sizes() < 1000


def test_a_layer_that_reads_zeros_is_named():
    model = toy()
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    with pytest.raises(ValueError, match='layers.0.mlp.down_proj.weight.: the mean .* reads only zeros'):
        fit(model, TOK, lab_data(), corda(r=4, rows=16), steps=1, batch_size=8, progress=False)


def test_a_base_in_half_precision_starts_as_itself():
    model = toy().to(torch.bfloat16)
    before = logits(model)
    fit(model, TOK, lab_data(), corda(r=4, rows=16), steps=1, batch_size=8, lr=1e-12,
        progress=False)
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)


def test_prompts_are_what_comes_before_the_answer():
    model, batch = tiny('llama'), ids('llama')
    names = list(parts()(model))
    cut = {k: v[:, :-3] for k, v in batch.items()} # a causal model reads a prompt alike without its answer
    only, short = covariances(model, [batch], names, prompts=True), covariances(model, [cut], names)
    for n in names:
        torch.testing.assert_close(only[n], short[n], atol=1e-5, rtol=1e-3)
    no_prompt = batch | dict(labels=batch['input_ids'])
    whole = covariances(model, [batch], names)
    read = covariances(model, [no_prompt], names, prompts=True)
    assert all(torch.equal(C, whole[n]) for n, C in read.items())


@pytest.mark.parametrize('mode', MODES)
def test_every_weight_starts_by_its_own_context(mode):
    run = fit(toy(), TOK, lab_data(), corda(r=3, alpha=6., **MODES[mode]), steps=1, batch_size=8,
              progress=False)
    start = StartByContext(**MODES[mode])
    state = SimpleNamespace(rows=rows_of(len(lab_data().train)), tok=TOK, seed=0, limit=128,
                            pad_id=TOK.pad_token_id, device='cpu')
    C = covariances(toy(), start.batches(state), run.delta.attached.deltas, prompts=mode == 'keep')
    for n, d in run.delta.attached.deltas.items():
        A, B = split(run.delta.attached.weight(n)[0], C[n], 3, 2., mode)
        torch.testing.assert_close(d.B0 @ d.A0, B @ A, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('wrong, says', [
    (dict(input_ids=0), 'reads text'), (dict(), 'read nothing')])
def test_rows_that_cannot_be_read(wrong, says):
    model = tiny('llama')
    batches = [dict(pixel_values=torch.zeros(1, 3))] if wrong else []
    with pytest.raises(ValueError, match=says):
        covariances(model, batches, list(parts()(model)))
    assert not any(m._forward_pre_hooks for m in model.modules())


# ---------- runs

@pytest.mark.parametrize('mode', MODES)
def test_saved_switched_off_folded_and_resumed(mode, tmp_path):
    tune = lambda model=None, **more: fit(
        model or toy(), TOK, lab_data(), corda(r=4, **MODES[mode]), steps=4, batch_size=8, lr=1e-2,
        progress=False, **more)
    assert_off_saved_folded(tune(), logits(toy()), toy(), logits, tmp_path/'delta.safetensors')
    assert_resumes(tune, tmp_path/'run', at=2)


def test_what_is_read_differs_by_mode_seed_and_data():
    def read(seed=0, **how):
        run = fit(toy(), TOK, lab_data(), corda(r=4, rows=16, **how), steps=1, batch_size=8,
                  seed=seed, progress=False)
        d = run.delta.attached.deltas['model.layers.1.mlp.down_proj.weight']
        return d.B0 @ d.A0
    found = [read(), read(seed=1), read(mode='keep', old='sort'), read(mode='keep', old='reverse')]
    assert torch.equal(found[0], read())
    for i, a in enumerate(found):
        assert not any(torch.allclose(a, b, atol=1e-4) for b in found[:i])


def test_it_goes_with_another_loss():
    both = corda(r=4, rows=16)*dft()
    run = fit(toy(), TOK, lab_data(), both, steps=2, batch_size=8, progress=False)
    assert both.name == 'corda x dft'
    assert all(d.A0.any() for d in run.delta.attached.deltas.values())


def test_a_classifier_is_read_whole():
    run = fit(classifier(), TOK, label_data(), corda(r=4, rows=16), steps=1, batch_size=8,
              progress=False)
    assert all(d.A0.any() for d in run.delta.attached.deltas.values())


def test_the_record_names_the_old_rows():
    assert corda(mode='keep', old='fact').describe()['arguments']['old'] == 'fact'
    own = data([dict(prompt='sort b a =', response='a b')]*3)
    assert own.fingerprint in corda(mode='keep', old=own).describe()['arguments']['old']
    assert corda(mode='keep', old='fact') == corda(mode='keep', old='fact') != corda()


@pytest.mark.parametrize('wrong, says', [
    (dict(mode='largest'), "mode is 'largest'"), (dict(mode='keep'), "'keep' needs old rows"),
    (dict(old='fact'), "'preview' reads the training rows"), (dict(rows=0), 'rows is 0'),
    (dict(rows=True), 'rows is True'), (dict(length=0), 'length is 0')])
def test_wrong_arguments_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        corda(**wrong)


@pytest.mark.parametrize('wrong, says', [
    (dict(alpha=0.), 'alpha is 0'), (dict(r=9), 'rank 9'),
    (dict(mask=torch.ones(8, 8, dtype=torch.bool)), 'whole matrices')])
def test_a_wrong_delta_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        ContextLoRA(gaussian(8, 8), **dict(r=2) | wrong)
