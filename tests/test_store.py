"Saved changes: files of version 0.1, kinds and where they are found, and 200 files that are wrong"
import json
from pathlib import Path
import pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from ftlab.adapters.attach import attach
from ftlab.adapters.delta import Entries, Offset
from ftlab.adapters.lowrank import LoRA
from ftlab.adapters.modules.lofit import HeadOffset
from ftlab.adapters.select import parts
from ftlab.adapters.store import (FORMATS, OLD_KINDS, class_of, identity, kind_of, load_delta, pack,
                                  save_delta)
from mutations import mutated, sources, state, differ, verdict
from tiny import tiny

DATA = Path(__file__).parent/'data'/'deltas'
OLD = dict(lowrank=LoRA, places=Entries, entries=Entries, head_offset=HeadOffset)

def old_base():
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    m = LlamaForCausalLM(config).eval()
    m.load_state_dict(load_file(DATA/'base.safetensors'), strict=False)
    return m

def logits(m):
    with torch.no_grad():
        return m(torch.arange(14).view(2, 7) % 32).logits.clone()

# ---------- files of version 0.1, made at a54be3c

def the_same_by_hand(m, name):
    """The change made from the tensors of the file, without `load_delta`, is that which it loads,
    bit for bit on this machine"""
    with safe_open(DATA/f'{name}.safetensors', 'pt') as f:
        kinds = json.loads(f.metadata()['kinds'])
        tensors = {k: f.get_tensor(k) for k in f.keys()}
    assert all(k[0] in OLD_KINDS for k in kinds.values())
    for n, (_, config) in kinds.items():
        W = m.get_parameter(n).detach()
        d = OLD[name](W, **config)
        d.load_state_dict(
            {k.partition('::')[2]: t for k, t in tensors.items() if k.startswith(n + '::')},
            strict=name != 'entries')
        if d.site == 'weight':
            loaded = load_delta(old_base(), DATA/f'{name}.safetensors').weight(n)[1]
            torch.testing.assert_close(d(W), loaded, atol=0, rtol=0)

@pytest.mark.parametrize('name', OLD)
def test_files_of_version_0_1_load(name, tmp_path):
    m = old_base()
    base, home = logits(m), identity(m)
    att = load_delta(m, DATA/f'{name}.safetensors')
    now = logits(m)
    assert {type(d) for d in att.deltas.values()} == {OLD[name]} and (now - base).abs().max() > 1e-3
    said = load_file(DATA/'logits.safetensors')
    torch.testing.assert_close(now, said[name], atol=1e-6, rtol=1e-6) # another processor may round in another way
    att.detach()
    assert torch.equal(logits(m), base)
    the_same_by_hand(m, name)
    # saved again it names its kind, and is the same change
    att = load_delta(m, DATA/f'{name}.safetensors')
    save_delta(tmp_path/'new', *pack(att), home)
    att.detach()
    with safe_open(tmp_path/'new', 'pt') as f:
        meta = f.metadata()
    assert (meta['format'] == FORMATS[1]
            and {k[0] for k in json.loads(meta['kinds']).values()} == {OLD[name].kind})
    load_delta(m, tmp_path/'new')
    assert torch.equal(logits(m), now)

# ---------- kinds

def test_every_delta_of_ftlab_has_a_kind_by_which_it_is_found():
    import importlib, pkgutil, ftlab
    found = {}
    for info in pkgutil.walk_packages(ftlab.__path__, 'ftlab.'):
        if not info.name.startswith(('ftlab.adapters', 'ftlab.beyond', 'ftlab.trainers', 'ftlab.evaluators')):
            continue
        for v in vars(importlib.import_module(info.name)).values():
            if (isinstance(v, type) and issubclass(v, torch.nn.Module) and v.__module__ == info.name
                and hasattr(v, 'site')):
                found[v] = vars(v).get('kind')
    nameless = [c.__name__ for c, k in found.items() if not k]
    assert len(found) >= 7 and not nameless, nameless
    assert (len(set(found.values())) == len(found)
            and all(class_of(k) is c for c, k in found.items()))

def test_a_subclass_is_a_kind_of_its_own():
    class Mine(LoRA):
        "A class of one's own, which must not be saved as its parent"

    assert (kind_of(LoRA(torch.zeros(4, 4), r=1)) == 'lowrank'
            and kind_of(Mine(torch.zeros(4, 4), r=1)).endswith(':test_a_subclass_is_a_kind_of_its_own.<locals>.Mine'))
    for odd in ('cli', 'lofit.lasso', 'os:system', '..', 'Lowrank', 'entries.x', 'ftlab.adapters.delta:Nope', ''):
        with pytest.raises(ValueError, match='not part of ftlab'):
            class_of(odd)

# ---------- wrong files

@pytest.fixture(scope='module')
def healthy(tmp_path_factory):
    return sources(tmp_path_factory.mktemp('deltas'))

def test_healthy_files_load(healthy, tmp_path):
    for name, content in healthy.items():
        m = tiny('llama')
        was = state(m)
        v = verdict(m, was, tmp_path/'d.safetensors', content, content)
        assert v['result'] == 'accepted' and v['finite'] and not v['wrong'], (name, v)

def test_two_hundred_wrong_files(healthy, tmp_path):
    """None changes the model and is refused, none ends in an error that is not ftlab's,
    none is taken unless it is a bit flip in a file without a digest"""
    m = tiny('llama')
    was = state(m)
    refused = 0
    for seed in range(200):
        name, how, content = mutated(seed, healthy)
        v = verdict(m, was, tmp_path/f'd{seed}.safetensors', content, healthy[name])
        assert not v['wrong'], (seed, name, how, v)
        refused += v['result'] == 'refused'
        m = m if not differ(was, state(m)) else tiny('llama')
        if v['result'] == 'accepted' and how == 'flip':
            assert name.endswith('0.1') or content == healthy[name], (seed, name, how)
    assert refused > 120

@pytest.mark.parametrize(
    'tensors, kinds, base, says',
    [({'model.norm.weight': torch.ones(1)}, {'model.norm.weight': 'value'}, None, 'must be'),
     ({'model.norm.weight': torch.ones(32).double()}, {'model.norm.weight': 'value'}, None, 'torch.float64'),
     ({'model.norm.weight': torch.full((32,), float('nan'))}, {'model.norm.weight': 'value'}, None,
      'NaN or infinite'),
     ({'model.norm.weight': torch.ones(32), 'x': torch.ones(1)}, {'model.norm.weight': 'value'},
      None, "'x', which belongs to none"),
     ({}, {'model.norm.weight': 'value'}, None, 'is missing'),
     ({'model.norm.weight': torch.ones(32)}, {'model.norm.weight': 'value'}, {}, 'another base'),
     ({'a': torch.ones(2)}, {'a': 'value'}, None, 'no parameter of that name'),
     ({'model.norm.weight::index': torch.tensor([40], dtype=torch.int32), 'model.norm.weight::value': torch.ones(1)},
      {'model.norm.weight': ['entries', dict(count=1)]}, None, 'the weight has 32 entries')])
def test_what_is_wrong_is_said_with_the_file_s_name(tensors, kinds, base, says, tmp_path):
    m = tiny('llama')
    was = state(m)
    save_delta(tmp_path/'wrong.safetensors', tensors, kinds, identity(m) if base is None else base)
    with pytest.raises(ValueError, match=f'wrong.safetensors.*{says}'):
        load_delta(m, tmp_path/'wrong.safetensors')
    assert not differ(was, state(m))

def test_a_change_that_fails_while_it_is_placed_is_taken_back(tmp_path, monkeypatch):
    from ftlab.adapters import attach as module
    m = tiny('llama')
    home = identity(m)
    att = attach(m, {**parts('q')(m), 'model.norm.weight': True}, Offset,
                 also=('model.norm.weight',))
    save_delta(tmp_path/'d', *pack(att), home)
    att.detach()
    m.lm_head.weight.requires_grad_(False)
    was = state(m)

    def full(model, values):
        model.get_parameter('model.norm.weight').data.fill_(7.) if values else None
        monkeypatch.undo()
        raise RuntimeError('no memory')

    monkeypatch.setattr(module, 'set_weights', full)
    with pytest.raises(RuntimeError, match='no memory'):
        load_delta(m, tmp_path/'d')
    assert not differ(was, state(m))
