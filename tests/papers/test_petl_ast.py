"PETL of AST: the official forward pass by hand in every layout, models of every kind, and its errors"
import pytest
import torch
from torch import nn
from transformers import ASTConfig, ASTModel
from ftlab.adapters.attach import attach, first_matrix, owner_of, set_weights
from ftlab.adapters.modules.petl_ast import Parallel, Sequential, petl_ast
from ftlab.adapters.store import load_delta
from ftlab.core.anatomy import anatomy
from ftlab.trainers.fit import fit
from tests.tiny import inputs_for, tiny
from tests.toys import TOK, classifier, label_data, probe, toy

EVERY = [(p, k, r) for p in ('pfeiffer', 'houlsby') for k in ('parallel', 'sequential')
         for r in (False, True)]


def on(model, **kw):
    recipe = petl_ast(**dict(size=3) | kw)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return attach(model, recipe.select(model), recipe.delta)


@torch.no_grad()
def shaken(att, seed=1):
    "Move everything that trains, so that no part can be forgotten"
    g = torch.Generator().manual_seed(seed)
    for p in att.parameters().values():
        p.add_(.1*torch.randn(p.shape, generator=g))
    return att


def official_layer(layer, h, attention, mlp, place, layout, residual):
    """One layer as `ASTLayer_adapter.forward` computes it: src/AST_adapters.py of
    umbertocappellazzo/PETL_AST, commit 1fe23af, lines 209 to 269; adapters as functions"""
    read = layer.layernorm_before(h)
    wrote = layer.attention(read)
    wrote = wrote[0] if isinstance(wrote, tuple) else wrote
    if place == 'houlsby' and layout == 'parallel':
        h = wrote + h + attention(read) + (read if residual else 0)
    elif place == 'houlsby':
        h = attention(wrote) + h + (wrote if residual else 0)
    else:
        h = wrote + h
    read = layer.layernorm_after(h)
    wrote = layer.mlp.fc2(layer.mlp.activation_fn(layer.mlp.fc1(read)))
    if layout == 'parallel':
        return wrote + h + mlp(read) + (read if residual else 0)
    return mlp(wrote) + h + (wrote if residual else 0)


def bottleneck(d):
    "`Bottleneck_adapter.forward`, lines 76 to 80, with the tensors of ours"
    if d is None:
        return None
    down, up, act = (d.down.weight, d.down.bias), (d.up.weight, d.up.bias), nn.GELU()
    return lambda z: nn.functional.linear(act(nn.functional.linear(z, *down)), *up)


@torch.no_grad()
@pytest.mark.parametrize('place, layout, residual', EVERY)
def test_it_is_the_official_forward_pass_on_the_same_tensors(place, layout, residual):
    model, given = tiny('vit'), inputs_for('vit')
    base = model(**given).logits
    att = shaken(on(model, place=place, layout=layout, residual=residual))
    ours, made, norms = model(**given).logits, dict(att.deltas), att.values()
    att.detach()
    assert len(norms) == (4 if place == 'pfeiffer' else 8) + 2 # two blocks, and the last norm
    set_weights(model, norms) # which the code trains as well
    h = model.vit.embeddings(given['pixel_values'])
    for layer, b in zip(model.vit.layers, anatomy(model).blocks):
        two = (bottleneck(made.get(n)) for n in (b.attention['o'], b.mlp['down']))
        h = official_layer(layer, h, *two, place, layout, residual)
    logits = model.classifier(model.vit.layernorm(h)[:, 0])
    torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)
    assert (ours - base).abs().max() > .01


@torch.no_grad()
@pytest.mark.parametrize('family', 'llama gpt2 opt gpt_neox phi bert t5 vit'.split())
@pytest.mark.parametrize('place, layout', [('pfeiffer', 'parallel'), ('houlsby', 'parallel'),
                                           ('houlsby', 'sequential')])
def test_models_of_every_kind_start_as_the_base_and_see_each_sub_layer(family, place, layout):
    model, given = tiny(family), inputs_for(family)
    base = model(**given).logits
    att = on(model, place=place, layout=layout, norms=False)
    assert torch.equal(model(**given).logits, base)
    for n, d in att.deltas.items(): # each adapter by itself, by hooks of our own
        seen = {}
        first, last = (owner_of(model, m)[0] for m in (first_matrix(model, n), n))
        hooks = [first.register_forward_pre_hook(lambda m, args: seen.update(x=args[0])),
                 last.register_forward_hook(lambda m, args, out: seen.update(h=out))]
        model(**given)
        x, h = seen['x'], seen['h']
        d.up.weight.normal_(generator=torch.Generator().manual_seed(2))
        model(**given)
        expected = h + bottleneck(d)(x if layout == 'parallel' else h)
        torch.testing.assert_close(seen['h'], expected, atol=1e-4, rtol=1e-4)
        d.up.weight.zero_()
        for hook in hooks:
            hook.remove()
    with att.disabled():
        assert torch.equal(model(**given).logits, base)
    att.detach()
    assert torch.equal(model(**given).logits, base)
    assert not any('delta_' in n for n, _ in model.named_modules())


@pytest.mark.parametrize('layout', ('parallel', 'sequential'))
def test_everything_trains_and_nothing_else(layout):
    model = tiny('llama')
    was = {n: p.detach().clone() for n, p in model.named_parameters()}
    att = shaken(on(model, layout=layout, place='houlsby'))
    model(**inputs_for('llama')).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in att.parameters().values())
    plain = {n: p for n, p in model.named_parameters() if n in was}
    assert plain and all(p.grad is None and torch.equal(p, was[n]) for n, p in plain.items())


def test_two_zero_matrices_would_never_move_and_from_pretrained_draws_them(tmp_path):
    """What is said on the page of the official start: `Zeros` is its class in short, `WithZeros` an
    `ASTModel` with one, whose checkpoint lacks it"""
    class Zeros(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Linear(8, 2), nn.Linear(2, 8)
            for p in self.parameters():
                nn.init.zeros_(p)

        def forward(self, z):
            return self.up(nn.functional.gelu(self.down(z)))

    class WithZeros(ASTModel):
        def __init__(self, config):
            super().__init__(config)
            self.adapter = Zeros()
            self.post_init()

    alone, g = Zeros(), torch.Generator().manual_seed(0)
    opt = torch.optim.AdamW(alone.parameters(), lr=.1, weight_decay=.1)
    for _ in range(5):
        opt.zero_grad()
        (alone(torch.randn(4, 8, generator=g)) - 1).square().sum().backward()
        opt.step()
    assert not alone.down.weight.any() and not alone.up.weight.any() and alone.up.bias.all()
    config = ASTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, patch_size=4,
                       intermediate_size=16, num_mel_bins=8, max_length=8, frequency_stride=4,
                       time_stride=4)
    ASTModel(config).save_pretrained(tmp_path)
    made = WithZeros.from_pretrained(tmp_path).adapter
    for W in (made.down.weight, made.up.weight):
        assert W.abs().max() > 0 and W.std() < .1
    assert not made.down.bias.any() and not made.up.bias.any()


@torch.no_grad()
def test_a_missing_and_a_needless_residual_by_hand():
    W = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    h, x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1)).unbind(0)
    assert not Sequential(W, residual=False, size=2)(h).any() # the sub-layer is cut out
    assert torch.equal(Sequential(W, residual=True, size=2)(h), h)
    assert torch.equal(Parallel(W, residual=False, size=2)(h, x), h)
    assert torch.equal(Parallel(W, residual=True, size=2)(h, x), h + x)
    for layout, residual, waived in ((k, r, (k == 'sequential') != r)
                                     for k in ('parallel', 'sequential') for r in (False, True)):
        recipe = petl_ast(layout=layout, residual=residual)
        assert ('starts as the base' in recipe.waives) == waived


@torch.no_grad()
def test_half_precision_is_rounded_once():
    model = toy().to(torch.bfloat16)
    att = on(model)
    assert {p.dtype for p in att.parameters().values()} == {torch.float32}
    assert model(input_ids=probe()['input_ids']).logits.dtype == torch.bfloat16


def test_a_block_that_is_computed_again_has_the_same_gradient():
    grads = []
    for again in (False, True):
        model = toy()
        model.train()
        if again:
            model.config.use_cache = False
            model.activation_checkpointing_enable()
        att = shaken(on(model))
        ids = torch.arange(5, 13)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in att.parameters().values()]))
    torch.testing.assert_close(*grads)


def test_a_classifier_learns_saves_and_loads(tmp_path):
    model = classifier()
    recipe = petl_ast(place='houlsby', size=4)
    run = fit(model, TOK, label_data(), recipe, steps=3, batch_size=4, progress=False)
    run.delta.save(tmp_path/'d.safetensors')
    fresh = classifier()
    load_delta(fresh, tmp_path/'d.safetensors')
    b = {k: probe()[k] for k in ('input_ids', 'attention_mask')}
    with torch.no_grad():
        assert torch.equal(fresh(**b).logits, run.model.eval()(**b).logits)
    with pytest.raises(ValueError, match='cannot be folded'):
        run.delta.attached.fold()


def test_the_norm_that_an_mlp_reads_trains_also_where_attention_shares_it():
    for family, norm in (('phi', 'input_layernorm'), ('llama', 'post_attention_layernorm')):
        model = tiny(family)
        found = [n for n in petl_ast().select(model)
                 if 'layers.' in n and n.endswith('norm.weight')]
        assert found == [f'model.layers.{i}.{norm}.weight' for i in range(2)]


@torch.no_grad()
def test_a_last_matrix_by_itself_says_what_it_misses():
    model = toy()
    att, down = on(model), model.model.layers[0].mlp.down_proj
    x = torch.ones(1, 1, down.in_features)
    with pytest.raises(RuntimeError, match='needs what the first one reads'):
        down(x)
    with att.disabled():
        assert down(x).shape == (1, 1, 32)


@pytest.mark.parametrize('again', (True, False))
@pytest.mark.parametrize('family', 'llama gpt2 bert vit t5'.split())
def test_blocks_of_every_kind_can_be_computed_again(family, again):
    still = dict(bert=dict(attention_probs_dropout_prob=0., hidden_dropout_prob=0.),
                 gpt2=dict(attn_pdrop=0., embd_pdrop=0., resid_pdrop=0.), t5=dict(dropout_rate=0.))
    grads = []
    for kind in (None, dict(use_reentrant=again)):
        model, given = tiny(family, **still.get(family, {})), inputs_for(family)
        model.train()
        att = shaken(on(model, place='houlsby', norms=False))
        if kind:
            model.config.use_cache = False
            model.gradient_checkpointing_enable(kind)
        if 'pixel_values' in given: # the older kind needs an input that takes a gradient
            given['pixel_values'].requires_grad_(True)
        else:
            model.enable_input_require_grads()
        model(**given).logits.square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in att.parameters().values()]))
        hooks = [h for m in model.modules() for h in m._forward_pre_hooks.values()]
        left = [h.__self__.read for h in hooks if hasattr(getattr(h, '__self__', 0), 'read')]
        assert left and not any(x is not None for x in left)
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('make, says', [
    (lambda: petl_ast(place='mlp'), 'place is .mlp.; it must be pfeiffer or houlsby'),
    (lambda: petl_ast(layout='both'), 'it must be parallel or sequential'),
    (lambda: petl_ast(size=0), 'at least 1'), (lambda: petl_ast(size=2.), 'a whole number'),
    (lambda: petl_ast(size=True), 'a whole number'),
    (lambda: petl_ast(residual=1), 'residual is 1'),
    (lambda: petl_ast(norms=None), 'norms is None'),
    (lambda: on(toy(), size=33), 'between 1 and the width of the states, 32'),
    (lambda: on(tiny('mixtral')), 'mixture of experts'),
    (lambda: on(tiny('qwen2_moe')), 'mixture of experts'),
    (lambda: Parallel(torch.zeros(4, 4), torch.ones(4, 4, dtype=torch.bool)), 'mask of entries'),
    (lambda: attach(toy(), {'model.layers.0.mlp.up_proj.weight': True}, Parallel), 'not the last matrix')])
def test_wrong_arguments_say_what_is_wrong(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_model_stays_as_it_was_where_a_delta_cannot_stand():
    model = toy()
    was = [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError, match='not the last matrix'):
        attach(model, {'model.layers.0.mlp.gate_proj.weight': True}, petl_ast().delta)
    assert [n for n, _ in model.named_parameters()] == was
    assert all(p.requires_grad for p in model.parameters())
