"""Activation, path and cross-model patching against TransformerLens and against a forward pass by hand; attached
changes, errors, and that nothing is left on the model"""
import copy
from functools import partial
import pytest, torch
from torch.nn import functional as F
from ftlab.adapters.attach import attach
from ftlab.core.anatomy import UnknownArchitecture, anatomy
from ftlab.core.model import tokens_before
from ftlab.adapters.yardsticks.prompts import prompt_tuning
from ftlab.evaluators.patching import (Paths, Site, ablated, activations, all_heads, columns,
                                       edited, head_sizes, mean_activations, patch, patched,
                                       path_patch, put)
from tiny import changed, example_inputs, tiny, tiny_models
from toys import same

FAMILIES = ('llama', 'gpt2', 'bert')
MORE = ('qwen2', 'qwen3', 'gemma2', 'phi', 'phi3', 'opt', 'gpt_neox', 'roberta')
CLEAN, OTHER = example_inputs(0), example_inputs(1)
PADDED = dict(OTHER, attention_mask=torch.tensor([[1]*7, [0] + [1]*6]))
LENS = dict(gpt2='GPT2LMHeadModel', llama='LlamaForCausalLM', gpt_neox='GPTNeoXForCausalLM')

def within(atol):
    return partial(torch.testing.assert_close, atol=atol, rtol=0)

close = within(2e-5)

@torch.no_grad()
def logits(model, batch=CLEAN):
    return model(**batch).logits

def hooks(model):
    "How many hooks a model has"
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

def moved(model, seed=7):
    "A copy with other weights, as after a fine-tune"
    model, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(.1*torch.randn(p.shape, generator=g))
    return model

# ---------- by hand

class Hand:
    "The forward pass of a GPT-2 or BERT written out; `changed` {name: tensor} replaces what it computes"
    def __init__(self, model):
        self.w = {n: p.detach() for n, p in model.named_parameters()}
        self.family, self.sizes = model.config.model_type, head_sizes(model)

    def norm(self, x, name):
        eps = 1e-5 if self.family == 'gpt2' else 1e-12
        return F.layer_norm(x, x.shape[-1:], self.w[f'{name}.weight'], self.w[f'{name}.bias'], eps)

    def linear(self, x, name):
        W = self.w[f'{name}.weight']
        return x @ (W if self.family == 'gpt2' else W.T) + self.w[f'{name}.bias']

    def attend(self, q, k, v):
        n, d = self.sizes.heads, self.sizes.width
        q, k, v = (x.unflatten(-1, (n, d)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(2, 3)/d**.5
        if self.family == 'gpt2':
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def __call__(self, batch, changed={}):
        ids, seen = batch['input_ids'], {}

        def step(name, x):
            seen[name] = changed.get(name, x)
            return seen[name]
        x = self.start(ids)
        for b in (0, 1):
            x = step(f'residual {b}', self.block(x, b, step))
        return self.end(x), seen

    def start(self, ids):
        if self.family == 'gpt2':
            places = self.w['transformer.wpe.weight'][:ids.shape[1]]
            return self.w['transformer.wte.weight'][ids] + places
        at = 'bert.embeddings'
        x = (self.w[f'{at}.word_embeddings.weight'][ids] + self.w[f'{at}.token_type_embeddings.weight'][0]
             + self.w[f'{at}.position_embeddings.weight'][:ids.shape[1]])
        return self.norm(x, f'{at}.LayerNorm')

    def block(self, x, b, step):
        if self.family == 'gpt2':
            at = f'transformer.h.{b}'
            qkv = self.linear(self.norm(x, f'{at}.ln_1'), f'{at}.attn.c_attn').chunk(3, -1)
            z = step(f'heads {b}', self.attend(*(step(f'{r} {b}', y) for r, y in zip('qkv', qkv))))
            x = x + self.linear(z, f'{at}.attn.c_proj')
            up = self.linear(self.norm(x, f'{at}.ln_2'), f'{at}.mlp.c_fc')
            return x + step(f'mlp {b}', self.linear(F.gelu(up, approximate='tanh'), f'{at}.mlp.c_proj'))
        at = f'bert.encoder.layer.{b}'
        names = dict(q='query', k='key', v='value')
        qkv = [step(f'{r} {b}', self.linear(x, f'{at}.attention.self.{n}'))
               for r, n in names.items()]
        z = step(f'heads {b}', self.attend(*qkv))
        to = f'{at}.attention.output'
        x = self.norm(x + self.linear(z, f'{to}.dense'), f'{to}.LayerNorm')
        up = F.gelu(self.linear(x, f'{at}.intermediate.dense'))
        down = step(f'mlp {b}', self.linear(up, f'{at}.output.dense'))
        return self.norm(x + down, f'{at}.output.LayerNorm')

    def end(self, x):
        if self.family == 'gpt2':
            return self.norm(x, 'transformer.ln_f') @ self.w['transformer.wte.weight'].T
        at = 'cls.predictions'
        x = F.gelu(self.linear(x, f'{at}.transform.dense'))
        x = self.norm(x, f'{at}.transform.LayerNorm')
        return x @ self.w['bert.embeddings.word_embeddings.weight'].T + self.w[f'{at}.bias']

def head_of(x, value, head, width=8, at=slice(None)):
    "`x` with one head's columns of `value`"
    x = x.clone()
    x[:, at, head*width:(head + 1)*width] = value[:, at, head*width:(head + 1)*width]
    return x

@pytest.fixture(params=['gpt2', 'bert'])
def pair(request):
    model = tiny(request.param)
    return model, Hand(model)

def test_activations_are_those_by_hand(pair):
    model, hand = pair
    out, seen = hand(CLEAN)
    close(logits(model), out)
    sites = [Site(k, b) for k in ('residual', 'mlp', 'heads') for b in (0, 1)]
    sites += [Site(k, b, h) for k in ('head', 'q', 'k', 'v') for b in (0, 1) for h in range(4)]
    for s, x in activations(model, CLEAN, sites).items():
        whole = seen[f'{"heads" if s.kind == "head" else s.kind} {s.block}']
        close(x, whole if s.head is None else whole[..., 8*s.head:8*s.head + 8])

@pytest.mark.parametrize('kind', ['residual', 'mlp', 'heads', 'head', 'q', 'k', 'v'])
def test_activation_patching_is_that_by_hand(pair, kind):
    model, hand = pair
    head = 2 if kind in ('head', 'q', 'k', 'v') else None
    name = f'{"heads" if kind == "head" else kind} 0'
    (_, a), (_, b) = hand(CLEAN), hand(OTHER)
    x = a[name].clone()
    new = b[name] if head is None else head_of(x, b[name], head)
    x[:, [1, 4]] = new[:, [1, 4]]
    close(patch(model, CLEAN, OTHER, [Site(kind, 0, head)], [1, 4]), hand(CLEAN, {name: x})[0])
    close(patch(model, CLEAN, OTHER, [Site(kind, 0, head)]), hand(CLEAN, {name: new})[0])

@pytest.mark.parametrize('role', [None, 'q', 'k', 'v'])
@pytest.mark.parametrize('through_mlps', [False, True])
def test_path_patching_is_that_by_hand(pair, role, through_mlps):
    "Everything between sender and receiver is clean; after the receiver everything computes"
    model, hand = pair
    (_, a), (_, b) = hand(CLEAN), hand(OTHER)
    kept = ('heads',) if through_mlps else ('heads', 'mlp')
    frozen = {n: x for n, x in a.items() if n.startswith(kept)}
    frozen['heads 0'] = head_of(a['heads 0'], b['heads 0'], 1, at=[3])
    out, seen = hand(CLEAN, frozen)
    receivers = [Site(role, 1, 3)] if role else []
    if role:
        out, _ = hand(CLEAN, {f'{role} 1': head_of(a[f'{role} 1'], seen[f'{role} 1'], 3)})
    found = path_patch(model, CLEAN, OTHER, [Site('head', 0, 1)], receivers, at=3,
                       through_mlps=through_mlps)
    close(found, out)
    assert (found - logits(model)).abs().max() > 1e-4 # there is something to see

def test_shared_keys_in_a_fused_projection():
    "Phi-3 with two keys for four queries: queries, then keys, then values"
    model, seen = tiny('phi3', num_key_value_heads=2), []
    module = model.get_submodule('model.layers.0.self_attn.qkv_proj')
    handle = module.register_forward_hook(lambda m, args, out: seen.append(out))
    x = activations(model, CLEAN, [Site(k, 0, h) for k in 'qkv' for h in (1, 2)])
    handle.remove()
    parts = [seen[0][..., 8*i:8*i + 8] for i in (1, 2, 4, 5, 6, 7)]
    assert all(torch.equal(a, b) for a, b in zip(x.values(), parts))

def test_shared_keys_and_rotary_positions_by_hand():
    "Llama: two query heads share a key; a head is rebuilt from its query, key and value"
    model = tiny('llama')
    sites = [Site(k, 0, 3) for k in ('q', 'k', 'v', 'head')] + [Site(k, 0, 2) for k in ('k', 'v')]
    x = activations(model, CLEAN, sites)
    assert all(torch.equal(x[Site(k, 0, 2)], x[Site(k, 0, 3)]) for k in 'kv')
    cos, sin = model.model.rotary_emb(x[sites[0]], torch.arange(7)[None])
    rotated = lambda y: y*cos + torch.cat([-y[..., 4:], y[..., :4]], -1)*sin
    scores = rotated(x[sites[0]]) @ rotated(x[sites[1]]).transpose(1, 2)/8**.5
    scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    close(x[sites[3]], scores.softmax(-1) @ x[sites[2]])

# ---------- the peer

def lens_of(model):
    "A TransformerLens model around a copy of this one"
    pytest.importorskip('transformer_lens', reason='transformer_lens is in the bench extra')
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    return build_bridge_from_module(
        copy.deepcopy(model), LENS[model.config.model_type], hf_config=model.config,
                 dtype=torch.float32, device='cpu').eval()

@torch.no_grad()
def lens_run(lens, batch, values={}):
    "Logits and cache of TransformerLens, with hooks that replace {hook point: [(rest of the index, tensor)]}"
    def writer(x, hook, todo):
        x = x.clone()
        for index, value in todo:
            x[index] = value
        return x
    seen = {}

    def reader(x, hook, name):
        seen[name] = x.clone()
    ends = ('attn.hook_z', 'attn.hook_q', 'attn.hook_k', 'attn.hook_v', 'hook_mlp_out', 'hook_resid_post')
    points = [f'blocks.{b}.{e}' for b in (0, 1) for e in ends]
    out = lens.run_with_hooks(batch['input_ids'], return_type='logits',
                              fwd_hooks=[(n, partial(writer, todo=t)) for n, t in values.items()]
                              + [(n, partial(reader, name=n)) for n in points])
    return out, seen

@pytest.mark.peer('patching.activations, patch', 'transformer_lens',
                  'activations and patched outputs (GPT-2, Llama, GPT-NeoX)', tolerance=2e-5)
@pytest.mark.parametrize('family', LENS)
def test_transformer_lens_patches_the_same_activations(family, tolerance):
    model = tiny(family)
    lens, close = lens_of(model), within(tolerance)
    (clean, a), (_, b) = lens_run(lens, CLEAN), lens_run(lens, OTHER)
    close(logits(model), clean)
    ours = activations(model, CLEAN, [Site('residual', 0), Site('mlp', 1), *all_heads(model)])
    close(ours[Site('residual', 0)], a['blocks.0.hook_resid_post'])
    close(ours[Site('mlp', 1)], a['blocks.1.hook_mlp_out'])
    for s in all_heads(model):
        point, index = f'blocks.{s.block}.attn.hook_z', (slice(None), [2, 5], s.head)
        close(ours[s], a[point][:, :, s.head])
        theirs, _ = lens_run(lens, CLEAN, {point: [(index, b[point][index])]})
        close(patch(model, CLEAN, OTHER, [s], [2, 5]), theirs)
    for kind, point in (('residual', 'blocks.0.hook_resid_post'), ('mlp', 'blocks.0.hook_mlp_out')):
        theirs, _ = lens_run(lens, CLEAN, {point: [((slice(None), 3), b[point][:, 3])]})
        close(patch(model, CLEAN, OTHER, [Site(kind, 0)], 3), theirs)

@pytest.mark.peer('Paths', 'transformer_lens',
                  'outputs with paths patched (GPT-2, Llama, GPT-NeoX)', tolerance=2e-5)
@pytest.mark.parametrize('family', LENS)
@pytest.mark.parametrize('through_mlps', [False, True])
def test_transformer_lens_patches_the_same_paths(family, through_mlps, tolerance):
    "The three steps written with its hooks, from each head of block 0 to the logits and to a query and value"
    model, every = tiny(family), (slice(None),)
    lens, close = lens_of(model), within(tolerance)
    (_, a), (_, b) = lens_run(lens, CLEAN), lens_run(lens, OTHER)
    kept = ['attn.hook_z'] + ([] if through_mlps else ['hook_mlp_out'])
    paths = Paths(model, CLEAN, OTHER, through_mlps)
    for h in range(4):
        frozen = {n: [(every, a[n])] for n in (f'blocks.{i}.{k}' for i in (0, 1) for k in kept)}
        z = 'blocks.0.attn.hook_z'
        frozen[z] += [((slice(None), slice(None), h), b[z][:, :, h])]
        direct, seen = lens_run(lens, CLEAN, frozen)
        close(paths([Site('head', 0, h)]), direct)
        for role in 'qv':
            point = f'blocks.1.attn.hook_{role}'
            # head 3 of the Llama works with the second of two values
            of = 3 if role == 'q' or family != 'llama' else 1
            index = (slice(None), slice(None), of)
            theirs, _ = lens_run(lens, CLEAN, {point: [(index, seen[point][index])]})
            close(paths([Site('head', 0, h)], [Site(role, 1, 3)]), theirs)

@pytest.mark.peer('patch', 'transformer_lens',
                  'outputs with a head of a tuned model (GPT-2)', tolerance=2e-5)
def test_transformer_lens_patches_across_models(tolerance):
    model = tiny('gpt2')
    tuned = moved(model)
    lens, other = lens_of(model), lens_of(tuned)
    _, b = lens_run(other, CLEAN)
    point, index = 'blocks.0.attn.hook_z', (slice(None), slice(None), 2)
    theirs, _ = lens_run(lens, CLEAN, {point: [(index, b[point][index])]})
    within(tolerance)(patch(model, CLEAN, CLEAN, [Site('head', 0, 2)], source_model=tuned), theirs)

# ---------- identities, on every kind of model

@pytest.mark.parametrize('family', FAMILIES + MORE)
def test_identities(family):
    """From itself nothing changes; from another model the last block is that model's, and all heads of all blocks
    by themselves are the sites `heads`; the sum of the heads through the projection is what the attention adds"""
    model = tiny(family)
    before, state = logits(model), copy.deepcopy(model.state_dict())
    everything = [Site('residual', 0), Site('mlp', 1), *all_heads(model), Site('q', 1, 3),
                  Site('v', 0, 1)]
    close(patch(model, CLEAN, CLEAN, everything), before)
    close(patch(model, CLEAN, OTHER, [Site('residual', 1)]), logits(model, OTHER))
    whole = patch(model, CLEAN, OTHER, [Site('heads', 0), Site('heads', 1)])
    close(patch(model, CLEAN, OTHER, all_heads(model)), whole)
    close(Paths(model, CLEAN, CLEAN)([Site('head', 0, 1)], [Site('k', 1, 0)]), before)
    one, last = activations(model, CLEAN, [Site('head', 0, 3), Site('heads', 0)]).values()
    assert torch.equal(last[..., -one.shape[-1]:], one)
    assert hooks(model) == 0 and torch.equal(logits(model), before)
    assert same(model.state_dict(), state)

@pytest.mark.parametrize('family', FAMILIES)
def test_the_last_block_acts_directly_or_through_its_mlp(family):
    model = tiny(family)
    paths = Paths(model, CLEAN, OTHER, through_mlps=True)
    for h in range(4):
        head = [Site('head', 1, h)]
        close(paths(head, at=[0, 6]), patch(model, CLEAN, OTHER, head, [0, 6]))
    qkv = [Site(r, 1, h) for r in 'qkv' for h in range(4)]
    assert (paths([Site('head', 0, 2)], qkv) - paths.logits).abs().max() > 1e-5

def test_models_with_experts_and_two_stacks():
    models = tiny_models()
    model, batch = models['mixtral']
    with pytest.raises(ValueError, match='experts'):
        Paths(model, batch, OTHER)
    Paths(model, batch, OTHER, through_mlps=True)([Site('head', 0, 1)], [Site('q', 1, 2)])
    model, batch = models['t5']
    with pytest.raises(ValueError, match='one stack'):
        Paths(model, batch, batch, through_mlps=True)
    found = activations(model, batch, [Site('residual', 3), Site('head', 0, 1)])
    assert found[Site('head', 0, 1)].shape == (2, 7, 8)
    model, batch = models['vit']
    assert torch.equal(patch(model, batch, batch, all_heads(model)), logits(model, batch))

# ---------- attached changes

@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('kind', ['lora', 'hft'])
def test_an_attached_change_stays_in_place(family, kind):
    "All functions give with a change attached what they give on the model into which it is folded"
    model, folded = tiny(family), tiny(family)
    att = changed(model, kind)
    count = hooks(model)
    changed(folded, kind).fold()
    close(logits(model), logits(folded))
    sites = [Site('head', 0, 1), Site('mlp', 1), Site('residual', 0), Site('q', 1, 2)]
    for s in sites:
        close(patch(model, CLEAN, OTHER, [s], [2, 3]), patch(folded, CLEAN, OTHER, [s], [2, 3]))
    a, b = Paths(model, CLEAN, OTHER), Paths(folded, CLEAN, OTHER)
    close(a([Site('head', 0, 3)], [Site('v', 1, 0)]), b([Site('head', 0, 3)], [Site('v', 1, 0)]))
    # across models: from the changed one into its base
    base = tiny(family)
    close(patch(base, CLEAN, CLEAN, all_heads(base), source_model=model),
          patch(base, CLEAN, CLEAN, all_heads(base), source_model=folded))
    assert hooks(model) == count and att.enabled
    att.detach()
    close(logits(model), logits(base))

def test_tokens_before_the_text_are_left_out():
    model, plain = tiny('llama'), tiny('llama')
    recipe = prompt_tuning(tokens=3)
    attach(model, recipe.select(model, None, 0), recipe.delta)
    assert tokens_before(model) == 3
    x = activations(model, CLEAN, [Site('residual', 0), Site('head', 1, 2)])
    assert all(v.shape[1] == 7 for v in x.values())
    close(patch(model, CLEAN, CLEAN, [Site('residual', 0)]), logits(model))
    given = patch(plain, CLEAN, CLEAN, [Site('residual', 1)], source_model=model)
    close(given, logits(model)) # the last block's output is all that the head reads

# ---------- nothing is left, nothing is disturbed

def test_mode_random_state_and_hooks_are_restored():
    model = tiny('gpt2', attn_pdrop=.5, resid_pdrop=.5).train()
    state = torch.get_rng_state()
    first = patch(model, CLEAN, OTHER, [Site('head', 0, 0)])
    assert torch.equal(first, patch(model, CLEAN, OTHER, [Site('head', 0, 0)])) # no dropout
    assert model.training and torch.equal(torch.get_rng_state(), state) and hooks(model) == 0

    def fails(x):
        raise KeyError('inside')
    with pytest.raises(KeyError), edited(model, {Site('mlp', 0): fails}):
        model(**CLEAN)
    assert hooks(model) == 0

def test_generation_without_cache():
    "Each forward pass has the whole text, so that a position from the start stays the same"
    model, site = tiny('llama'), Site('head', 0, 1)
    value, ids = activations(model, OTHER, [site]), CLEAN['input_ids']
    with torch.no_grad(), patched(model, value, 2):
        out = model.generate(**CLEAN, max_new_tokens=3, do_sample=False, use_cache=False)
        for _ in range(3):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)

def test_gradients_pass():
    "A context leaves gradients on: the replacement gets its own"
    model = tiny('llama')
    value = activations(model, OTHER, [Site('head', 0, 1)])[Site('head', 0, 1)].requires_grad_()
    with patched(model, {Site('head', 0, 1): value}, [2]):
        model(**CLEAN).logits[:, -1].sum().backward()
    assert value.grad[:, 2].abs().sum() > 0 and value.grad[:, :2].abs().sum() == 0

# ---------- means

def test_mean_ablation():
    model = tiny('llama')
    sites = [Site('head', 0, 1), Site('heads', 1)]
    a, b = activations(model, CLEAN, sites), activations(model, OTHER, sites)
    means = mean_activations(model, [CLEAN, OTHER], sites)
    for s in sites:
        close(means[s], torch.cat([a[s], b[s]]).mean(0))
    with torch.no_grad(), ablated(model, means, sites[:1], at=[1]):
        found = model(**CLEAN).logits
    with torch.no_grad(), patched(model, {sites[0]: means[sites[0]].expand(2, 7, 8)}, [1]):
        close(found, model(**CLEAN).logits)
    # without padding, and one mean for all tokens
    padded = dict(CLEAN, attention_mask=torch.tensor([[1]*7, [1]*4 + [0]*3]))
    x = activations(model, padded, sites[:1])[sites[0]]
    mean = mean_activations(model, [padded], sites[:1], per_position=False)[sites[0]]
    close(mean, torch.cat([x[0], x[1, :4]]).mean(0))
    with torch.no_grad(), ablated(model, {sites[0]: mean}):
        model(**CLEAN)

def test_means_in_half_precision():
    "A count in bfloat16 stops growing at 256; these rows have 420 tokens"
    model, site = tiny('llama').bfloat16(), Site('head', 0, 1)
    batches = [example_inputs(i, batch=1) for i in range(60)]
    each = torch.cat([activations(model, b, [site])[site].float() for b in batches])
    found = mean_activations(model, batches, [site], per_position=False)[site]
    close(found, each.mean((0, 1)))

# ---------- positions

def test_positions():
    assert columns(None, 2, 5) is None
    assert columns(-1, 2, 5).tolist() == [[4], [4]]
    assert columns([0, -2], 2, 5).tolist() == [[0, 3], [0, 3]]
    assert columns(torch.tensor([[0, 1], [2, 3]]), 2, 5).tolist() == [[0, 1], [2, 3]]
    x, y = torch.zeros(2, 5, 1), torch.arange(1., 7).reshape(2, 3, 1)
    out = put(x, y, torch.tensor([[0], [4]]), torch.tensor([[2], [0]]))
    assert out[..., 0].tolist() == [[3, 0, 0, 0, 0], [0, 0, 0, 0, 4]] and x.sum() == 0

def test_prompts_of_different_length_with_positions():
    model, long = tiny('llama'), example_inputs(1, length=9)
    found = patch(model, CLEAN, long, [Site('residual', 1)], at=-1, source_at=-1)
    close(found[:, -1], logits(model, long)[:, -1])

# ---------- errors

@pytest.mark.parametrize('make, says', [
    (lambda: Site('neuron', 0), 'no kind of site'),
    (lambda: Site('head', 0), 'needs the number of a head'),
    (lambda: Site('mlp', 0, 1), 'belongs to no single head')])
def test_sites_that_cannot_be(make, says):
    with pytest.raises(ValueError, match=says):
        make()

@pytest.mark.parametrize('sites, more, says', [
    ([Site('head', 0, 4)], {}, 'heads 0 to 3'),
    ([Site('mlp', 2)], {}, 'blocks 0 to 1'),
    ([Site('mlp', 0)], dict(source=example_inputs(1, length=6)), 'prompts of one length'),
    ([Site('mlp', 0)], dict(source=example_inputs(1, batch=3), at=0), 'as many rows'),
    ([Site('mlp', 0)], dict(source=PADDED), r'rows \[1\]'),
    ([Site('mlp', 0)], dict(at=7), 'from -7 to 6'),
    ([Site('mlp', 0)], dict(at=torch.zeros(3, 1).long()), 'positions for 3 rows'),
    ([Site('mlp', 0)], dict(at=CLEAN['input_ids'] == 3), 'whole numbers'),
    ([Site('mlp', 0)], dict(at=2.5), 'whole numbers'),
    ([Site('mlp', 0)], dict(at=[0, 1], source_at=[0]), 'give as many in both'),
    ([Site('mlp', 0)], dict(source_model=tiny('gpt2')), 'models do not match'),
    ([Site('mlp', 0)], dict(source_model=tiny('llama', num_hidden_layers=3)), 'do not match')])
def test_bad_input_is_named(sites, more, says):
    with pytest.raises(ValueError, match=says):
        patch(tiny('llama'), **(dict(batch=CLEAN, source=OTHER, sites=sites) | more))

def test_paths_and_means_that_cannot_be():
    model = tiny('llama')
    paths = Paths(model, CLEAN, OTHER)
    for senders, receivers, says in (([], [], 'at least one'), ([Site('mlp', 0)], [], 'of kind head'),
                                     ([Site('head', 0, 0)], [Site('mlp', 1)], 'no queries'),
                                     ([Site('head', 1, 0)], [Site('q', 1, 0)], 'no receiver comes after'),
                                     ([Site('head', 0, 9)], [Site('q', 1, 0)], 'heads 0 to 3')):
        with pytest.raises(ValueError, match=says):
            paths(senders, receivers)
    with pytest.raises(ValueError, match='no batches'):
        mean_activations(model, [], [Site('mlp', 0)])
    with pytest.raises(ValueError, match='batches of one length'):
        mean_activations(model, [CLEAN, example_inputs(length=5)], [Site('mlp', 0)])
    means = mean_activations(model, [CLEAN], [Site('mlp', 0)])
    with pytest.raises(ValueError, match='no mean of'), ablated(model, means, [Site('mlp', 1)]):
        pass
    with pytest.raises(ValueError, match='the mean is of 7 positions'), ablated(model, means):
        model(**example_inputs(length=5))

def test_positions_on_padding():
    "The last column of a row that is padded on the right is no token"
    model, short = tiny('llama'), torch.tensor([[1]*7, [1]*4 + [0]*3])
    a, b = dict(CLEAN, attention_mask=short), dict(OTHER, attention_mask=short)
    ends, site = short.sum(1, keepdim=True) - 1, Site('residual', 1)
    found = patch(model, a, b, [site], ends)
    close(found[[0, 1], [6, 3]], logits(model, b)[[0, 1], [6, 3]])
    found = patch(model, CLEAN, b, [site], at=-1, source_at=ends)
    close(found[:, -1], logits(model, b)[[0, 1], [6, 3]])
    paths, head = Paths(model, a, b), [Site('head', 0, 0)]
    for call, says in ((lambda: patch(model, a, b, [site], -1), r'at is on padding in rows \[1\]'),
                       (lambda: patch(model, CLEAN, b, [site], -1), 'at is on padding'),
                       (lambda: patch(model, a, b, [site], ends, source_at=-1), 'source_at is on padding'),
                       (lambda: paths(head, at=-1), 'at is on padding'),
                       (lambda: paths(head, [Site('q', 1, 0)], ends, receiver_at=-1), 'receiver_at is on padding'),
                       # without a mask all columns are tokens
                       (lambda: patch(model, dict(input_ids=CLEAN['input_ids']), b, [site]), r'rows \[1\]')):
        with pytest.raises(ValueError, match=says):
            call()

def test_models_that_cannot_be_mapped_or_have_no_head():
    with pytest.raises(UnknownArchitecture):
        all_heads(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match='gives no logits'):
        patch(tiny('llama', 'none'), CLEAN, OTHER, [Site('mlp', 0)])
    assert len(all_heads(tiny('llama'))) == 8 == 4*len(anatomy(tiny('llama')).blocks)
