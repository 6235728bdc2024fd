"""What the page of `ftlab.core.anatomy` does not show: that the roles are the right ones,
judged by what the model computes"""
import copy
from collections import Counter
import pytest, torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from ftlab.core.anatomy import FAMILIES, Family, Layout, UnknownArchitecture, anatomy
from tiny import (DECODERS, ENCODERS, MIXED, OTHERS, PLAIN, USUAL, example_inputs, inputs_for, tiny,
                  tiny_models)

EVERY = DECODERS + ENCODERS
CASES = ([(f, None) for f in EVERY] + [(f, h) for f in ENCODERS for h in ('classifier', 'none')]
         + [(f, 'classifier') for f in ('llama', 'gpt2', 'opt', 'gpt_neox', 'phi')]
         + [(f, 'none') for f in ('qwen2', 'gpt2', *PLAIN)] + [(f, None) for f in (*PLAIN, *MIXED)])

def listed(a):
    "Every name in the fields of an Anatomy, as often as it occurs"
    inside = [n for b in a.blocks for d in (b.attention, b.mlp, b.norms, b.biases, b.positions,
                                         b.experts)
              for n in d.values() if n]
    outside = [a.embedding, a.positions, None if a.tied else a.head, *a.norms.values(),
               *a.biases.values(), *a.around, *a.other]
    return Counter(inside + [n for n in outside if n])

def output(model, inputs):
    "The main output tensor, whatever the head"
    with torch.no_grad():
        out = model(**inputs)
    return out['logits'] if 'logits' in out else out['last_hidden_state']

def change(model, a, role, to):
    "Apply `to` in place to a role's weight and bias in every block"
    params = dict(model.named_parameters())
    with torch.no_grad():
        for b in a.blocks:
            for n in ((b.attention | b.mlp)[role], b.biases[role]):
                if n:
                    to(params[n])

def zero(p):
    p.zero_()

def shake(p):
    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))

# ---------- one place for everything

def test_the_families_are_the_ones_in_the_table():
    assert {*EVERY, *PLAIN, *OTHERS, *MIXED} == set(FAMILIES) == set(USUAL)

@pytest.mark.parametrize('family,head', CASES)
def test_every_parameter_has_exactly_one_place(family, head):
    m = tiny(family, head)
    a = anatomy(m)
    names = [n for n, _ in m.named_parameters()]
    assert listed(a) == Counter(names) and list(a.locations) == names
    assert all(a.shapes[n] == tuple(p.shape) for n, p in m.named_parameters())
    assert ([b.index for b in a.blocks] == [0, 1]
            and all(n.startswith(b.name + '.') for b in a.blocks for n in b.parameters))
    for b in a.blocks: # place and the fields agree
        for part, d in dict(attention=b.attention, mlp=b.mlp, norm=b.norms, bias=b.biases).items():
            for role, n in d.items():
                assert not n or a.location(n) == (b.index, part, role)
    assert {i for i, part, _ in a.locations.values() if part == 'other'} <= {None}

@pytest.mark.parametrize('family,head', CASES)
def test_the_embedding_and_the_head_are_those_that_transformers_names(family, head):
    m = tiny(family, head)
    a = anatomy(m)
    params = dict(m.named_parameters())
    assert params[a.embedding] is m.get_input_embeddings().weight
    if head is None:
        assert params[a.head] is m.get_output_embeddings().weight
    elif head == 'classifier':
        assert params[a.head].shape == (m.config.num_labels, 32) and a.location(a.head) == (None, 'head', 'head')
    else:
        assert a.head is None
    assert a.tied == (head is None
                      and m.get_output_embeddings().weight is m.get_input_embeddings().weight)

@pytest.mark.parametrize('family', ['llama', 'gpt2', 'bert', 'roberta'])
@pytest.mark.parametrize('tie', [True, False])
def test_tying_is_read_from_the_tensors(family, tie):
    m = tiny(family, tie_word_embeddings=tie)
    a = anatomy(m)
    assert (a.tied == tie == (a.head == a.embedding)
            and a.location(a.head)[1] == ('embedding' if tie else 'head'))
    assert listed(a) == Counter(n for n, _ in m.named_parameters())
    assert ('head' in a.biases) == (family in ENCODERS)

@pytest.mark.parametrize('family', EVERY)
def test_transposed_means_conv1d(family):
    m = tiny(family)
    a = anatomy(m)
    assert a.transposed == {n + '.weight' for n, x in m.named_modules() if isinstance(x, Conv1D)}
    assert (set(a.matrices()) == a.transposed) if family == 'gpt2' else not a.transposed

def test_biases_where_the_config_asks_for_them():
    with_, without = (anatomy(tiny('llama', attention_bias=b, mlp_bias=b)) for b in (True, False))
    for b, c in zip(with_.blocks, without.blocks):
        assert set(b.biases) == set(c.biases) and not any(c.biases.values())
        assert (b.biases['q'] == b.attention['q'].replace('weight', 'bias') and b.biases['down']
                and not b.biases['mlp'])

def test_matrices_go_block_by_block():
    a = anatomy(tiny('qwen2'))
    b0, b1 = a.blocks
    assert a.matrices() == [*b0.attention.values(), *b0.mlp.values(), *b1.attention.values(),
                            *b1.mlp.values()]
    assert (a.matrices('mlp') == [*b0.mlp.values(), *b1.mlp.values()]
            and a.matrices('attention') == [*b0.attention.values(), *b1.attention.values()])
    with pytest.raises(ValueError, match="'norm'.*'attention', 'mlp'"):
        a.matrices('norm')
    with pytest.raises(KeyError, match='no parameter called .model.layers.9'):
        a.location('model.layers.9.mlp.up_proj.weight')

def test_blocks_are_counted_as_numbers():
    assert [b.name for b in anatomy(tiny('llama', num_hidden_layers=12)).blocks] == [
        f'model.layers.{i}' for i in range(12)]

# ---------- the roles are what they say, judged by the forward pass

@pytest.mark.parametrize('family', EVERY + PLAIN)
def test_o_is_the_only_way_between_tokens(family):
    m = tiny(family)
    a = anatomy(m)
    x = example_inputs()
    y = copy.deepcopy(x)
    y['input_ids'][:, 0] = 5 + x['input_ids'][:, 0] % 7
    assert not torch.equal(output(m, x)[:, -1], output(m, y)[:, -1])
    change(m, a, 'o', zero)
    assert torch.allclose(output(m, x)[:, -1], output(m, y)[:, -1], atol=1e-6)

@pytest.mark.parametrize('family', EVERY + PLAIN)
def test_up_and_gate_act_only_through_down(family):
    m = tiny(family)
    a = anatomy(m)
    x = example_inputs()
    for role in set(a.blocks[0].mlp) - {'down'}:
        n = copy.deepcopy(m)
        change(n, a, role, shake)
        assert not torch.allclose(output(n, x), output(m, x), atol=1e-4)
    change(m, a, 'down', zero)
    before = output(m, x)
    for role in set(a.blocks[0].mlp) - {'down'}:
        change(m, a, role, shake)
    assert torch.equal(output(m, x), before)
    change(m, a, 'o', shake)
    assert not torch.allclose(output(m, x), before, atol=1e-4)

@pytest.mark.parametrize('family', [f for f in EVERY if f != 'gpt2'] + ['phi', 'opt'])
def test_without_queries_keys_do_nothing_and_values_still_do(family):
    m = tiny(family)
    a = anatomy(m)
    x = example_inputs()
    change(m, a, 'q', zero)
    before = output(m, x)
    change(m, a, 'k', shake)
    assert torch.allclose(output(m, x), before, atol=1e-6)
    change(m, a, 'v', shake)
    assert not torch.allclose(output(m, x), before, atol=1e-4)

@pytest.mark.parametrize('family', [f for f in EVERY if f != 'gpt2'] + ['phi', 'opt'])
def test_a_query_acts_on_its_own_token_and_keys_and_values_on_others(family):
    m = tiny(family)
    b = anatomy(m).blocks[0]
    x = example_inputs()
    noise = torch.Generator().manual_seed(2)
    def mixed(role=None): # what enters block 0's output matrix, when `role` said something else at the first token
        at = lambda r: m.get_submodule(b.attention[r].removesuffix('.weight'))
        seen = []
        hooks = [at('o').register_forward_pre_hook(lambda _, i: seen.append(i[0]))]

        def other(_, i, o):
            return torch.cat([o[:, :1] + torch.randn(o[:, :1].shape, generator=noise), o[:, 1:]], 1)

        if role:
            hooks.append(at(role).register_forward_hook(other))
        output(m, x)
        for h in hooks:
            h.remove()
        return seen[0]
    moved = {r: (mixed(r) - mixed()).abs().amax((0, 2)) > 1e-5 for r in 'qkv'} # by position
    # the first token of a decoder sees only itself, so its query has nothing to choose
    assert not moved['q'][1:].any() and moved['q'][0] == (family in ENCODERS)
    assert moved['k'][1:].all() and moved['v'].all()

@pytest.mark.parametrize('family', [f for f in DECODERS if f != 'gpt2'])
def test_a_gate_passes_through_the_activation_and_up_does_not(family):
    a = anatomy(m := tiny(family))
    # up enters linearly: twice the up matrix is twice the MLP's output; the gate does not
    mlp = m.get_submodule(a.blocks[0].name + '.mlp')
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    params = dict(m.named_parameters())
    with torch.no_grad():
        y = mlp(x)
        params[a.blocks[0].mlp['up']].mul_(2)
        z = mlp(x)
        params[a.blocks[0].mlp['gate']].mul_(2)
        w = mlp(x)
    assert (torch.allclose(z, 2*y, rtol=1e-4, atol=1e-6)
            and not torch.allclose(w, 2*z, rtol=1e-2, atol=1e-6))

@pytest.mark.parametrize('family', EVERY + ['phi3', 'opt', 'gpt_neox'])
def test_norms_are_called_where_their_role_says(family):
    m = tiny(family)
    b = anatomy(m).blocks[0]
    calls = []
    roles = dict(b.attention) | dict(b.mlp) | {'norm ' + r: n for r, n in b.norms.items()}
    for role, n in roles.items():
        m.get_submodule(n.removesuffix('.weight')).register_forward_hook(
            lambda *_, role=role: calls.append(role))
    output(m, example_inputs())
    at = {r: i for i, r in enumerate(calls)}
    assert sorted(calls) == sorted(roles) # each of them once
    q, o, up, down, attention, mlp = (at.get('q', at.get('qkv')), at['o'],
                                      at.get('up', at.get('gate_up')), at['down'],
                                      at['norm attention'], at['norm mlp'])
    if family in ENCODERS:
        assert q < o < attention < up < down < mlp
    else:
        assert attention < q < o < mlp < up < down
    if 'norm attention_post' in at:
        assert o < at['norm attention_post'] < mlp and down < at['norm mlp_post']
    if 'norm q_norm' in at:
        assert q < at['norm q_norm'] < o and at['k'] < at['norm k_norm'] < o

@pytest.mark.parametrize('family', ['qwen3', 'gemma3_text'])
def test_the_norms_of_queries_and_keys_get_queries_and_keys(family):
    m = tiny(family)
    b = anatomy(m).blocks[0]
    size = {}
    for role in 'qk':
        m.get_submodule(b.attention[role].removesuffix('.weight')).register_forward_hook(
            lambda _, i, o, r=role: size.update({r: o.numel()}))
        m.get_submodule(b.norms[role + '_norm'].removesuffix('.weight')).register_forward_hook(
            lambda _, i, o, r=role: size.update({r + '_norm': o.numel()}))
    output(m, example_inputs()) # four query heads, two key heads
    assert size['q_norm'] == size['q'] == 2*size['k'] == 2*size['k_norm']

# ---------- what a row of the table is

def test_another_family_is_another_row():
    coder = AutoModelForCausalLM.from_config(
        AutoConfig.for_model('starcoder2', vocab_size=64, hidden_size=32, intermediate_size=80,
                             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                             max_position_embeddings=64, bos_token_id=0, eos_token_id=0))
    row = Family('embed_tokens',
                 (Layout('layers.#', {r: f'self_attn.{r}_proj' for r in 'qkvo'},
                         dict(up='mlp.c_fc', down='mlp.c_proj'),
                         dict(attention='input_layernorm', mlp='post_attention_layernorm')),),
                 dict(final='norm'), ('lm_head',))
    a = anatomy(coder, FAMILIES | dict(starcoder2=row))
    assert listed(a) == Counter(n for n, _ in coder.named_parameters()) and not a.other
    assert 'starcoder2' not in FAMILIES

# ---------- families with parts of their own

def placed(m):
    "The anatomy of `m`, every parameter in exactly one place"
    a = anatomy(m)
    assert (listed(a) == Counter(n for n, _ in m.named_parameters())
            and list(a.locations) == [n for n, _ in m.named_parameters()])
    return a

@pytest.mark.parametrize('family', ['phi', 'gpt_neox'])
def test_parallel_blocks_read_the_same_input(family):
    "The MLP's output does not change when the attention of the same block is silenced"
    m = tiny(family)
    b = anatomy(m).blocks[0]
    seen = []
    m.get_submodule(b.mlp['up'].removesuffix('.weight')).register_forward_hook(
        lambda _, i, o: seen.append(o))
    output(m, example_inputs())
    with torch.no_grad():
        m.get_parameter(b.attention['o']).zero_()
        m.get_parameter(b.biases['o']).zero_()
    output(m, example_inputs())
    assert torch.equal(*seen)
    assert set(b.norms) == ({'attention'} if family == 'phi' else {'attention', 'mlp'})

def test_phi_may_normalise_queries_and_keys():
    a = placed(tiny('phi', qk_layernorm=True))
    assert set(a.blocks[1].norms) == {'attention', 'q_norm', 'k_norm'} and a.blocks[1].biases['q_norm']
    assert a.biases['head'] == 'lm_head.bias' and set(placed(tiny('phi')).blocks[0].norms) == {'attention'}

@pytest.mark.parametrize('before', [True, False])
def test_opt_with_a_narrow_embedding(before):
    m = tiny('opt', word_embed_proj_dim=16, do_layer_norm_before=before)
    a = placed(m)
    assert (a.location('model.decoder.project_in.weight') == (None, 'embedding', 'project_in')
            and a.location('model.decoder.project_out.weight') == (None, 'head', 'project_out'))
    assert (a.positions == 'model.decoder.embed_positions.weight' and ('final' in a.norms) == before
            and not a.other and 'project_in' in a.describe())
    assert not placed(tiny('opt')).around

def test_vit_has_patches_for_words():
    a = placed(tiny('vit'))
    assert (a.location('vit.embeddings.patch_embeddings.projection.weight') == (None, 'embedding', 'tokens')
            and a.location('vit.embeddings.patch_embeddings.projection.bias') == (None, 'bias', 'tokens'))
    assert (a.location('vit.embeddings.cls_token') == (None, 'embedding', 'cls')
            and a.positions == 'vit.embeddings.position_embeddings'
            and a.head == 'classifier.weight' and not a.other)
    bare = placed(tiny('vit', 'none'))
    assert bare.head is None and bare.other == ('pooler.dense.weight', 'pooler.dense.bias')

@pytest.mark.parametrize('family', OTHERS)
def test_a_silenced_part_is_silent(family):
    "In ViT and T5 too, o is the attention's only way out and down the MLP's"
    m = tiny(family)
    a = anatomy(m)
    x = inputs_for(family)
    for out, into in (('o', 'v'), ('down', 'up')):
        n = copy.deepcopy(m)
        change(n, a, into, shake)
        assert not torch.allclose(output(n, x), output(m, x), atol=1e-5)
        n = copy.deepcopy(m)
        change(n, a, out, zero)
        before = output(n, x)
        change(n, a, into, shake)
        assert torch.equal(output(n, x), before)

def test_t5_has_two_stacks():
    m = tiny('t5', num_decoder_layers=3)
    a = placed(m)
    inputs = inputs_for('t5')
    params = dict(m.named_parameters())
    assert ([b.name for b in a.blocks]
            == [f'encoder.block.{i}' for i in range(2)] + [f'decoder.block.{i}' for i in range(3)]
            and [b.index for b in a.blocks] == list(range(5)))
    assert (
        [set(b.positions) for b in a.blocks] == [{'relative'}, set(), {'relative'}, set(), set()]
        and a.location(a.blocks[2].positions['relative']) == (2, 'embedding', 'relative'))
    cross = {'cross_q', 'cross_k', 'cross_v', 'cross_o'}
    assert (not any(cross & set(b.attention) for b in a.blocks[:2])
            and all(cross <= set(b.attention) and 'cross' in b.norms for b in a.blocks[2:]))
    assert (set(a.norms) == {'encoder_final', 'final'} and a.embedding == 'shared.weight'
            and params[a.embedding] is m.get_input_embeddings().weight)
    other = inputs | dict(input_ids=inputs['input_ids'].flip(1))
    assert not torch.allclose(output(m, other), output(m, inputs))
    with torch.no_grad():
        [params[b.attention['cross_o']].zero_() for b in a.blocks[2:]]
    # the only way from the text that is read to the text that is written
    assert torch.equal(output(m, other), output(m, inputs))

@pytest.mark.parametrize('head', ['none', 'classifier'])
def test_t5_with_other_heads(head):
    a = placed(tiny('t5', head))
    assert a.head == (None if head == 'none' else 'classification_head.out_proj.weight')

def test_t5_gated_and_without_a_decoder():
    gated = placed(tiny('t5', feed_forward_proj='gated-gelu'))
    assert all(set(b.mlp) == {'gate', 'up', 'down'} and b.mlp['up'].endswith('wi_1.weight')
               for b in gated.blocks)
    from transformers import T5EncoderModel
    a = placed(T5EncoderModel(tiny('t5').config))
    assert len(a.blocks) == 2 and set(a.norms) == {'encoder_final'}
    m = tiny('t5')
    del m.encoder.block[1].layer[1].DenseReluDense.wi
    with pytest.raises(UnknownArchitecture, match=r'has no encoder\.block\.1\.layer\.1\.DenseReluDense\.wi\.weight'):
        anatomy(m)

# ---------- what cannot be mapped says so

def test_unknown_model_type_is_named_with_the_known_ones():
    m = AutoModelForCausalLM.from_config(
        AutoConfig.for_model('gpt_neo', vocab_size=64, hidden_size=32, num_layers=2, num_heads=4,
                             attention_types=[[['global'], 2]], bos_token_id=0, eos_token_id=0))
    with pytest.raises(UnknownArchitecture) as e:
        anatomy(m)
    assert ("'gpt_neo'" in str(e.value) and all(f in str(e.value) for f in FAMILIES)
            and isinstance(e.value, ValueError))

def test_a_module_without_config_is_named_by_its_class():
    for m in (nn.Linear(2, 2), nn.Sequential(tiny('llama'))):
        with pytest.raises(UnknownArchitecture, match=f'{type(m).__name__} has no config.model_type'):
            anatomy(m)

class Shell(nn.Module):
    "Holds a model one level down and passes its attributes on, as peft's wrapper does"

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def __getattr__(self, k):
        try:
            return super().__getattr__(k)
        except AttributeError:
            return getattr(self.base_model, k)

def test_wrapped_models_are_refused_with_advice():
    for m in (Shell(tiny('llama')), torch.compile(tiny('llama')), Shell(tiny('bert'))):
        with pytest.raises(UnknownArchitecture, match='has its embedding in .*it has .*pass the plain model inside'):
            anatomy(m)

def test_peft_models_are_refused_or_mapped_inside():
    peft = pytest.importorskip('peft')
    m = tiny('llama')
    before = anatomy(m)
    p = peft.get_peft_model(m, peft.LoraConfig(r=2, target_modules=['q_proj']))
    for x in (p, m): # m now carries the adapters
        with pytest.raises(UnknownArchitecture, match='adapters, pass the plain model inside'):
            anatomy(x)
    assert anatomy(p.unload()) == before

@pytest.mark.parametrize('family,path', [('llama', 'model.layers.1.self_attn'),
                                         ('gpt2', 'transformer.h.1.attn'),
                                         ('bert', 'bert.encoder.layer.1.output')])
def test_a_parameter_that_no_rule_places_in_a_block_is_named(family, path):
    m = tiny(family)
    m.get_submodule(path).register_parameter('extra', nn.Parameter(torch.zeros(2)))
    with pytest.raises(UnknownArchitecture, match=f'{path}.extra'):
        anatomy(m)

def test_a_missing_weight_is_named():
    m = tiny('qwen3')
    m.model.layers[1].self_attn.k_norm = nn.Identity()
    with pytest.raises(UnknownArchitecture,
                       match=r'model\.layers\.1 .*has no model\.layers\.1\.self_attn\.k_norm\.weight'):
        anatomy(m)
    m = tiny('llama')
    m.model.norm = nn.Identity()
    with pytest.raises(UnknownArchitecture, match=r'no norm model\.norm'):
        anatomy(m)
    m = tiny('llama')
    m.model.layers = nn.ModuleList()
    with pytest.raises(UnknownArchitecture, match=r'none of its parameters is in a block model\.layers\.#'):
        anatomy(m)

def test_cross_attention_has_no_row():
    with pytest.raises(UnknownArchitecture, match='no rule places .*crossattention'):
        anatomy(tiny('gpt2', add_cross_attention=True))

def test_blocks_that_share_a_tensor_are_refused():
    m = tiny('llama')
    m.model.layers[1].mlp.up_proj.weight = m.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UnknownArchitecture, match=r'has no model\.layers\.1\.mlp\.up_proj\.weight'):
        anatomy(m)

# ---------- what a reader sees

def test_the_table_joins_equal_blocks_and_keeps_unequal_ones_apart():
    m = tiny('llama', num_hidden_layers=4)
    text = anatomy(m).describe()
    assert 'block 0-3' in text and text.count('self_attn.q_proj.weight') == 1
    m.model.layers[1].mlp.up_proj = nn.Linear(32, 80, bias=True)
    html = anatomy(m)._repr_html_()
    assert (all(f'>{w}<' in html for w in ('block 0', 'block 1', 'block 2-3'))
            and str(anatomy(m)) == anatomy(m).describe())

def test_the_models_are_the_same_each_time():
    for f, (m, x) in tiny_models().items():
        n, y = tiny(f), inputs_for(f)
        assert torch.equal(output(m, x), output(n, y)) and not m.training

@pytest.mark.parametrize('family', PLAIN + OTHERS)
def test_selections_and_changes_work_by_place(family):
    "LoRA on what `parts` selects starts as the identity and folds into the weights that it stood beside"
    from ftlab.adapters.attach import attach
    from ftlab.methods import lora
    from ftlab.adapters.select import parts
    m, x = tiny(family), inputs_for(family)
    before = output(m, x)
    chosen = parts('attention', 'mlp')(m)
    assert sorted(chosen) == sorted(anatomy(m).matrices())
    att = attach(m, chosen, lora(r=2).delta)
    assert torch.equal(output(m, x), before)
    with torch.no_grad():
        for i, p in enumerate(att.parameters().values()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i))*.1)
    changed = output(m, x)
    assert not torch.allclose(changed, before, atol=1e-4)
    att.fold()
    assert (torch.allclose(output(m, x), changed, atol=2e-4)
            and anatomy(m).matrices() == sorted(chosen, key=anatomy(m).matrices().index))
