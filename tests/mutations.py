"Files of saved changes, mutated: what a bit flip, a foreign tool or an ill will may do to them"
import json, random, struct
import torch
from safetensors.torch import load, save
from ftlab.adapters.attach import attach
from ftlab.adapters.delta import Offset
from ftlab.adapters.modules.lofit import HeadOffset, heads
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.modules.randlora import randlora
from ftlab.adapters.select import everything, parts, top
from ftlab.adapters.store import FORMATS, OLD_KINDS, identity, load_delta, pack, save_delta
from tiny import example_inputs, tiny

HOW = ('flip', 'flip_header', 'cut', 'length', 'meta', 'kinds', 'kinds', 'base', 'rename', 'dtype',
       'shape', 'shape', 'offsets', 'drop', 'drop', 'swap', 'extra', 'values', 'values', 'scalar',
       'scalar', 'cross')
JUNK = [None, True, 0, -1, 10**18, 1.5, '', 'value', [], {}, [[]], 'x'*100, 5, ['entries', {}],
        ['entries', {'count': -1}], ['entries', {'count': 10**12}], ['entries', {'left': 10**12}],
        ['entries', [1]], ['entries'], ['os:system', {}], ['builtins:exec', {}],
        ['ftlab.cli:main', {}], ['ftlab.adapters.delta:Nope', {}],
        ['ftlab.adapters.delta:Entries', {}], ['cli', {}], ['..', {}], ['', {}], [':', {}],
        ['offset', {'x': 1}], ['offset', {}], ['lowrank', {'r': 10**9}],
        ['lowrank', {'alpha': float('nan')}], ['randlora', {'seed': 10**30}],
        ['lofit.head_offset', {'count': 3}], ['difffit', {}], ['store', {}], ['lofit.lasso', {}]]
NUMBERS = [0, -1, 10**9, 1.5, 'x', None, [1], 2, float('nan'), {'a': 1}]
CHANGES = dict(full=lambda m: attach(m, everything(m)),
               lora=lambda m: attach(m, parts()(m), lora(r=2).delta),
               entries=lambda m: attach(m, top(torch.abs, .1)(m)),
               head_offset=lambda m: attach(m, heads([(0, 1), (1, 0)])(m), HeadOffset),
               offset=lambda m: attach(m, parts('q', 'norm')(m), Offset),
               randlora=lambda m: attach(m, parts('q')(m), randlora(r=8).delta))
OLD = {v: k for k, v in reversed(OLD_KINDS.items())}

def split(b):
    n, = struct.unpack('<Q', b[:8])
    return json.loads(b[8:8 + n]), b[8 + n:]

def join(header, body):
    j = json.dumps(header).encode()
    j += b' '*(-len(j) % 8)
    return struct.pack('<Q', len(j)) + j + body

def sources(folder) -> dict[str, bytes]:
    """Healthy files, by name: every kind of change,
    in the format of today and in that of version 0.1"""
    out = {}
    for name, make in CHANGES.items():
        torch.manual_seed(0)
        m = tiny('llama')
        home = identity(m)
        att = make(m)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in att.parameters().values():
                p.add_(.05*torch.randn(p.shape, generator=g))
        save_delta(folder/'healthy', *pack(att), home)
        out[name] = (folder/'healthy').read_bytes()
        header, body = split(out[name])
        meta = header['__metadata__']
        meta.pop('digest')
        meta['format'] = FORMATS[0]
        kinds = {n: k if k == 'value' else [OLD[k[0]], k[1]]
                 for n, k in json.loads(meta['kinds']).items()}
        out[f'{name}, 0.1'] = join(header | {'__metadata__': dict(meta, kinds=json.dumps(kinds))},
                                   body)
    return out

def mutated(seed:int, healthy:dict[str, bytes]) -> tuple[str, str, bytes]:
    "(which file, what was done to it, the result), fixed by the seed"
    r = random.Random(seed)
    name = r.choice(sorted(healthy))
    b = healthy[name]
    how = r.choice(HOW)
    if how in ('flip', 'flip_header', 'cut', 'length'):
        return name, how, _bytes(r, how, b)
    if how in ('drop', 'extra', 'swap', 'values', 'scalar', 'cross'):
        return name, how, _tensors(r, how, b, healthy)
    header, body = split(b)
    meta = header['__metadata__']
    if how == 'meta':
        _meta(r, header, meta)
    elif how in ('kinds', 'base'):
        _names(r, how, meta)
    else:
        _entry(r, how, header)
    # half of them with a digest that is right: the checks behind it must hold too
    return name, how, _signed(join(header, body)) if r.random() < .5 else join(header, body)

def _signed(b):
    "With a digest that fits, if the file can still be read"
    try:
        header, body = split(b)
        meta = header['__metadata__']
        tensors = load(b)
    except Exception:
        return b
    if (not isinstance(meta, dict) or 'digest' not in meta
        or not all(isinstance(meta.get(k), str) for k in ('kinds', 'base', 'recipe'))):
        return b
    from ftlab.adapters.store import _digest
    return join(header | {'__metadata__': dict(meta, digest=_digest(tensors, meta))}, body)

def _bytes(r, how, b):
    x = bytearray(b)
    n, = struct.unpack('<Q', b[:8])
    if how == 'cut':
        return b[:r.randrange(len(b))] if r.random() < .7 else b[r.randrange(1, 200):]
    if how == 'length':
        return (struct.pack('<Q', r.choice([0, 1, 2**63, 2**40, len(b), len(b) - 8, 2**64 - 1]))
                + b[8:])
    for _ in range(r.choice([1, 1, 5, 50])):
        x[r.randrange(8 + n if how == 'flip_header' else len(x))] ^= 1 << r.randrange(8)
    return bytes(x)

def _meta(r, header, meta):
    k, w = r.choice(['format', 'kinds', 'base', 'recipe']), r.random()
    if w < .3:
        meta.pop(k)
    elif w < .6:
        meta[k] = r.choice(['', 'null', '[]', '{}', '0', '"x"', '{', '['*5000, '{"a":'*3000, '\x00',
                            'NaN', '1'*5000, 'ftlab-delta-1', 'ftlab-delta-9'])
    elif w < .7:
        header['__metadata__'] = r.choice([None, [], 'x', {'a': 1}, {'format': ['ftlab-delta-1']}])
    elif w < .8:
        header.pop('__metadata__')
    else:
        meta[k] = meta[k][:r.randrange(len(meta[k]))]

def _names(r, how, meta):
    d = json.loads(meta[how])
    k, w = r.choice(list(d)), r.random()
    if how == 'base':
        if w < .3:
            d[k] = r.choice(['0'*16, None, 5, [], ''])
        elif w < .5:
            d.pop(k)
        elif w < .8:
            d = r.choice([{}, [], None, 'x', 5, {'x': 'y'}])
        else:
            d['extra.weight'] = '0'*16
    elif w < .5:
        d[k] = r.choice(JUNK)
    elif w < .6:
        d.pop(k)
    elif w < .7:
        d['model.nowhere.weight'] = d[k]
    elif w < .8:
        d[r.choice(['', '.', 'a.b.c', 'model', 'model.layers.0', '__class__',
                    'model.embed_tokens.weight', 'lm_head.weight',
                    'model.norm.weight'])] = r.choice([d[k], 'value'])
    elif w < .9 and isinstance(d[k], list):
        d[k][1] = dict(d[k][1],
                       **{r.choice(['r', 'count', 'scale', 'alpha', 'seed', 'x', 'left', 'mask',
                                    'W', 'dropout', 'rs', 'sigma']): r.choice(NUMBERS)})
    else:
        d = r.choice([[], {}, None, 'value', {n: 'value' for n in d}, [list(d)], 3])
    meta[how] = json.dumps(d)

def _entry(r, how, header):
    names = [k for k in header if k != '__metadata__']
    k = r.choice(names)
    entry = header[k]
    own = k.partition('::')[0]
    if how == 'rename':
        header[r.choice([k + 'x', k.upper(), 'x', '', k.replace('.', '/'), '../../' + k,
                         own + '::nope', own + '::value::x', '__class__',
                         'learner|x|y'])] = header.pop(k)
    if how == 'dtype':
        entry['dtype'] = r.choice(['F16', 'BF16', 'I32', 'I64', 'U8', 'BOOL', 'F64', 'F8_E4M3', 'C64', 'XX', 5, None])
    if how == 'shape':
        s = entry['shape']
        n = torch.Size(s).numel()
        entry['shape'] = r.choice(
            [[n], [1, n], [n, 1], s[::-1], s + [1], [1] + s, [], [0], [-1], [2**40, 2**40], [n*2],
             ['x'], None, [n//2, 2] if n % 2 == 0 else [n, 1, 1]])
    if how == 'offsets':
        a, z = entry['data_offsets']
        entry['data_offsets'] = r.choice(
            [[0, z], [z, a], [a, z + 8], [a, 2**63], [-1, z], [a], None, [0, 0], [a, 10**15],
             header[r.choice(names)]['data_offsets']])

def _tensors(r, how, b, healthy):
    """The file written again with other tensors, so that safetensors takes it;
    where there is a digest it is right half of the time"""
    meta, t = split(b)[0]['__metadata__'], load(b)
    k = r.choice(sorted(t))
    v = t[k]
    real = v.is_floating_point()
    if how == 'drop':
        t.pop(k)
    if how == 'extra':
        t[r.choice([k + '.copy', k.partition('::')[0] + '::extra', 'model.new.weight'])] = v.clone()
    if how == 'swap':
        o = r.choice(sorted(t))
        t[k], t[o] = t[o].clone(), v.clone()
    if how == 'scalar':
        t[k] = r.choice(
            [torch.tensor(7.), torch.full((1,), 7.), torch.zeros(0), torch.full((1, 1), 7.),
             v.flatten()[:3].clone(), v.to(torch.float64), v.to(torch.int8), torch.zeros(3, 3, 3),
             v[None].clone(), v.to(torch.complex64)])
    if how == 'values':
        t[k] = r.choice([torch.full_like(v, float('nan') if real else 2**31 - 1),
                         torch.full_like(v, float('inf') if real else -5),
                         v*1e30 if real else v + 10**6, torch.zeros_like(v) if not real else v/0])
    if how == 'cross':
        t = load(healthy[r.choice(sorted(healthy))])
    out = save({n: x.contiguous() for n, x in t.items()}, meta)
    return _signed(out) if r.random() < .5 else out

def state(m) -> dict:
    "Everything about a model that a refused file must leave alone"
    return dict(weights={n: p.detach().clone() for n, p in m.named_parameters()},
                trains=[p.requires_grad for p in m.parameters()],
                modules=[n for n, _ in m.named_modules()],
                buffers=[n for n, _ in m.named_buffers()],
                hooks=sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in m.modules()),
                training=m.training)

def differ(a, b) -> list[str]:
    "In what two states differ"
    out = [k for k in a if k != 'weights' and a[k] != b[k]]
    same = (a['weights'].keys() == b['weights'].keys()
            and all(torch.equal(b['weights'][n], w) for n, w in a['weights'].items()))
    return out + ([] if same else ['weights'])

def verdict(model, was:dict, path, content:bytes, healthy:bytes) -> dict:
    """What `load_delta` does with a file. `wrong` says what it should not have done;
    nothing in a good record."""
    path.write_bytes(content)
    out, wrong = {}, []
    try:
        att = load_delta(model, path)
        out['result'] = 'accepted'
        with torch.no_grad():
            y = model(**example_inputs()).logits
        out['finite'] = bool(torch.isfinite(y).all())
        att.detach()
    except (ValueError, FileNotFoundError) as e:
        out |= dict(result='refused', says=' '.join(str(e).split())[:160])
        if type(e).__name__ not in ('ValueError', 'WrongBase', 'FileNotFoundError'):
            wrong.append(f'raw {type(e).__name__}')
        if path.name not in str(e):
            wrong.append('the error does not name the file')
    except Exception as e:
        out |= dict(result='raw', says=f'{type(e).__name__}: {" ".join(str(e).split())[:160]}')
        wrong.append(f'raw {type(e).__name__}')
    if found := differ(was, state(model)):
        wrong.append('the model changed: ' + ', '.join(found))
    return dict(out, wrong=wrong)
