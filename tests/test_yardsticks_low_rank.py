"The relatives of LoRA against peft: the same start, the same training, on the same tensors (skipped without peft)"
import gc, json, math, warnings, weakref
from functools import partial
from types import SimpleNamespace
import pytest, torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from ftlab import methods
from ftlab.adapters.attach import attach
from ftlab.adapters.lowrank import LoRA, to_peft
from ftlab.adapters.select import parts
from ftlab.adapters.store import load_delta
from ftlab.adapters.yardsticks import low_rank
from ftlab.adapters.yardsticks.low_rank import (OFT, STARTS, DoRA, Rescale, Started, TwoRates,
                                                VeRA, frozen_pair)
from ftlab.commands.memory import training_bytes
from ftlab.core.batches import batch_at
from ftlab.core.recipe import Recipe, With
from ftlab.core.tokens import encode_all
from ftlab.trainers.fit import fit
from ftlab.trainers.step import schedule
from tiny import example_inputs, inputs_for, tiny
from toys import TOK, assert_resumes, lab_data, logits, toy

NAMES = ('dora', 'ia3', 'lora_plus', 'milora', 'oft', 'olora', 'pissa', 'rslora', 'vera')
STEPS = 3

class Start:
    "Keeps the parameters and the outputs before the first step"
    def before_fit(self, state):
        self.parameters = {n: p.detach().clone() for n, p in state.attached.parameters().items()}
        self.logits = logits(state.model)

def ours(recipe, lr=3e-3, **more):
    start = Start()
    run = fit(toy(), TOK, lab_data(), recipe, steps=STEPS, batch_size=8, lr=lr, clip=None,
              **dict(schedule='constant') | more, callbacks=(start,), progress=False)
    return run, start

def trained(model, lr=3e-3, optimizer=None, factor=lambda s: 1.):
    "Train a peft model on the same batches"
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    opt = optimizer or torch.optim.AdamW(params, lr=lr, betas=(.9, .999), weight_decay=0.)
    rows = encode_all(lab_data().train, TOK, 'text', 256)
    rates = torch.optim.lr_scheduler.LambdaLR(opt, factor)
    for s in range(STEPS):
        model(**batch_at(rows, s, 8, TOK.pad_token_id)).loss.backward()
        opt.step()
        rates.step()
        opt.zero_grad()

def alike(run, start, theirs, pairs, atol, lr=3e-3, optimizer=None, **more):
    """Start peft's model where ours started, compare outputs, train, compare parameters and outputs.
    `pairs` is {our parameter: (peft's, function from its value to ours)}; return the largest gaps"""
    params = dict(theirs.named_parameters())
    free = {n for n, p in params.items() if p.requires_grad}
    assert set(pairs) == set(start.parameters) and {n for n, _ in pairs.values()} == free
    first = (logits(theirs) - start.logits).abs().max()
    trained(theirs, lr, optimizer, **more)
    now = run.delta.attached.parameters()
    assert min((now[k] - start.parameters[k]).abs().max() for k in pairs) > 1e-4, 'nothing was learned'
    last = max((now[k].detach() - f(params[n].detach())).abs().max() for k, (n, f) in pairs.items())
    out = (logits(theirs) - logits(run.model)).abs().max()
    gaps = dict(start=float(first), parameters=float(last), outputs=float(out))
    print(gaps)
    assert all(v <= atol for v in gaps.values()), gaps
    return gaps

def same(t):
    return t

def below(n, k):
    return f'base_model.model.{n.removesuffix(".weight")}.{k}'

def modules(run):
    return sorted({n.split('.')[-2] for n in run.delta.attached.deltas})

def lora_pairs(start, extra=()):
    "{ours: peft's} for parameters called A and B, and more by (end, peft's name)"
    ends = {'A': 'lora_A.default.weight', 'B': 'lora_B.default.weight', **dict(extra)}
    return {k: (below(k.split('::')[0], ends[k.split('::')[1].split('.')[-1]]), same)
            for k in start.parameters}

@torch.no_grad()
def copied(theirs, start, pairs):
    params = dict(theirs.named_parameters())
    for k, (n, _) in pairs.items():
        params[n].copy_(start.parameters[k].view_as(params[n]))

# ---------- equal to peft

@pytest.fixture
def peft():
    return pytest.importorskip('peft', reason='peft is in the bench extra')

@pytest.mark.peer('dora', 'peft',
                  'outputs at the start; parameters and outputs after three steps', tolerance=1e-6)
def test_dora(peft, tolerance):
    run, start = ours(methods.dora(r=4, alpha=8.))
    theirs = peft.get_peft_model(toy(), peft.LoraConfig(
        r=4, lora_alpha=8, use_dora=True, target_modules=modules(run), lora_dropout=0.))
    pairs = lora_pairs(start, {'m': 'lora_magnitude_vector.default.weight'})
    params = dict(theirs.named_parameters())
    assert all(torch.equal(start.parameters[k], params[n]) for k, (n, _) in pairs.items()
               if k.endswith('m'))
    copied(theirs, start, pairs)
    alike(run, start, theirs, pairs, tolerance)

@pytest.mark.peer('pissa, olora', 'peft',
                  'outputs at the start; parameters and outputs after three steps', tolerance=1e-5)
@pytest.mark.parametrize('name', ['pissa', 'olora'])
@pytest.mark.parametrize('alpha', [4., 10.])
def test_starts(peft, name, alpha, tolerance):
    run, start = ours(methods.make_of(name)(r=4, alpha=alpha))
    theirs = peft.get_peft_model(toy(), peft.LoraConfig(
        r=4, lora_alpha=alpha, init_lora_weights=name, target_modules=modules(run),
        lora_dropout=0.))
    pairs, params = lora_pairs(start), dict(theirs.named_parameters())
    # nothing is copied: the starts themselves are the same
    assert all(torch.equal(start.parameters[k], params[n]) for k, (n, _) in pairs.items())
    alike(run, start, theirs, pairs, tolerance)

@pytest.mark.peer('rslora', 'peft',
                  'outputs at the start; parameters and outputs after three steps', tolerance=1e-6)
def test_rslora(peft, tolerance):
    run, start = ours(methods.rslora(r=4, alpha=8.))
    theirs = peft.get_peft_model(toy(), peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules=modules(run), lora_dropout=0.))
    pairs = lora_pairs(start)
    copied(theirs, start, pairs)
    alike(run, start, theirs, pairs, tolerance)

@pytest.mark.peer('lora_plus', 'peft',
                  'outputs at the start; parameters and outputs after three steps', tolerance=1e-6)
@pytest.mark.parametrize('ratio', [16., 3.])
def test_lora_plus(peft, ratio, tolerance):
    from peft.optimizers import create_loraplus_optimizer
    lr = 1e-3
    run, start = ours(methods.lora_plus(ratio, r=4, alpha=8.), lr)
    theirs = peft.get_peft_model(toy(), peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=modules(run), lora_dropout=0.))
    pairs = lora_pairs(start)
    copied(theirs, start, pairs)
    opt = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=ratio)
    alike(run, start, theirs, pairs, tolerance, lr, opt)

@pytest.mark.peer('lora_plus, dora', 'peft',
                  'parameters and outputs after three steps, with decay and a schedule',
                  tolerance=1e-6)
@pytest.mark.parametrize('dora', [False, True])
def test_lora_plus_with_decay_and_a_schedule(peft, dora, tolerance):
    "Of DoRA, the lengths are fast too, because peft and the authors' code count vectors with B"
    from peft.optimizers import create_loraplus_optimizer
    how = dict(r=4, alpha=8.)
    recipe = (methods.dora(**how)*Recipe('plus', step=With(TwoRates, ratio=8.)) if dora
              else methods.lora_plus(8., **how))
    run, start = ours(recipe, 1e-3, weight_decay=.1, schedule='linear', warmup=1)
    theirs = peft.get_peft_model(toy(), peft.LoraConfig(
        r=4, lora_alpha=8, use_dora=dora, target_modules=modules(run), lora_dropout=0.))
    pairs = lora_pairs(start, {'m': 'lora_magnitude_vector.default.weight'})
    copied(theirs, start, pairs)
    opt = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.,
                                    loraplus_weight_decay=.1)
    alike(run, start, theirs, pairs, tolerance, 1e-3, opt, factor=schedule('linear', STEPS, 1))

@pytest.mark.peer('ia3', 'peft',
                  'outputs at the start; parameters and outputs after three steps', tolerance=1e-6)
def test_ia3(peft, tolerance):
    run, start = ours(methods.ia3(), 1e-2)
    theirs = peft.get_peft_model(toy(), peft.IA3Config(
        target_modules=modules(run), feedforward_modules=['down_proj']))
    pairs = {k: (below(k.split('::')[0], 'ia3_l.default'), lambda t: t.flatten() - 1)
             for k in start.parameters}
    assert modules(run) == ['down_proj', 'k_proj', 'v_proj']
    alike(run, start, theirs, pairs, tolerance, 1e-2)

@pytest.mark.peer('ia3', 'peft', 'outputs of a T5', tolerance=1e-5)
def test_ia3_where_a_decoder_reads_an_encoder(peft, tolerance):
    "T5, the paper's model: its cross-attention has keys and values too"
    m, x = tiny('t5'), inputs_for('t5')
    base, recipe = logits(m, x), methods.ia3()
    att = attach(m, recipe.select(m), recipe.delta)
    shake(att)
    changed = logits(m, x)
    theirs = peft.get_peft_model(tiny('t5'), peft.IA3Config(
        target_modules=['k', 'v', 'wo'], feedforward_modules=['wo']))
    params = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    pairs = {k: below(k.split('::')[0], 'ia3_l.default') for k in att.parameters()}
    assert set(pairs.values()) == set(params) and len(pairs) == 16
    with torch.no_grad():
        for k, p in att.parameters().items():
            params[pairs[k]].copy_((1 + p).view_as(params[pairs[k]]))
    torch.testing.assert_close(logits(theirs.eval(), x), changed, atol=tolerance, rtol=0)
    assert (changed - base).abs().max() > .01

@pytest.mark.peer('vera', 'peft',
                  'outputs at the start; parameters and outputs after three steps', tolerance=1e-6)
def test_vera(peft, tolerance):
    run, start = ours(methods.vera(r=8, targets='q_proj'))
    theirs = peft.get_peft_model(toy(), peft.VeraConfig(
        r=8, target_modules=['q_proj'], projection_prng_key=0))
    base = theirs.base_model
    A, B = frozen_pair(32, 32, 8)
    assert torch.equal(base.vera_A['default'], A) and torch.equal(base.vera_B['default'], B)
    pairs = {k: (below(k.split('::')[0], f'vera_lambda_{k[-1]}.default'), same)
             for k in start.parameters}
    alike(run, start, theirs, pairs, tolerance)

@pytest.mark.peer('oft', 'peft',
                  'outputs at the start; parameters and outputs after three steps, with the exact rotation '
                  '(the default of peft is a series)', tolerance=1e-5)
def test_oft(peft, tolerance):
    run, start = ours(methods.oft(block=16))
    theirs = peft.get_peft_model(toy(), peft.OFTConfig(
        r=0, oft_block_size=16, target_modules=modules(run), use_cayley_neumann=False,
        module_dropout=0.))
    pairs = {k: (below(k.split('::')[0], 'oft_R.default.weight'), same)
             for k in start.parameters}
    alike(run, start, theirs, pairs, tolerance)

# ---------- by formula

def test_milora_starts_at_the_weakest_directions():
    W = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    d = Started(W, r=4, alpha=8., start='milora')
    part = d.s*(d.B @ d.A).detach()
    values, V = torch.linalg.eigh(W.T.double() @ W.double())  # ascending
    weakest = W.double() @ V[:, :4] @ V[:, :4].T
    torch.testing.assert_close(part.double(), weakest, atol=1e-4, rtol=0)
    # as in the authors' code: both factors hold the root of S/s
    S = values[:4].flip(0).sqrt().float()/d.s
    torch.testing.assert_close(d.A.square().sum(1).detach(), S, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(d.B.square().sum(0).detach(), S, atol=1e-4, rtol=1e-4)

def test_the_norm_of_dora_has_no_gradient():
    W = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    d = DoRA(W, r=2)
    torch.nn.init.normal_(d.low.B)
    G = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    (d(W)*G).sum().backward()
    V = d.low(W).detach()
    scale = (d.m/V.norm(dim=1)).detach()[:, None]
    torch.testing.assert_close(d.low.B.grad, d.low.s*(scale*G) @ d.low.A.detach().T)

def test_a_rotation_is_one():
    d = OFT(torch.randn(6, 12), block=5)  # 5 does not divide 12, so blocks of 4
    torch.nn.init.normal_(d.Q)
    R = d.rotation()
    assert R.shape == (3, 4, 4)
    torch.testing.assert_close(R @ R.mT, torch.eye(4).expand(3, 4, 4), atol=1e-5, rtol=0)

# ---------- saved, folded, resumed; the promises are tested with all other methods' in test_contract

@pytest.mark.parametrize('name', NAMES)
def test_resumed_is_uninterrupted(name, tmp_path):
    how = dict(steps=4, batch_size=4, lr=1e-2, progress=False)
    recipe = methods.get(name)
    assert_resumes(lambda **more: fit(toy(), TOK, lab_data(), recipe, **how, **more), tmp_path)

def test_a_saved_start_needs_no_decomposition_of_the_same_library(tmp_path, monkeypatch):
    "What A and B started at is in the file: another processor's SVD may differ"
    run = fit(toy(), TOK, lab_data(), methods.pissa(r=2), steps=2, batch_size=4, lr=1e-2,
              progress=False)
    tuned = logits(run.model)
    run.delta.save(tmp_path/'x.safetensors')
    flipped = lambda W, r, s, was=STARTS['pissa']: tuple(-t for t in was(W, r, s))
    monkeypatch.setitem(STARTS, 'pissa', flipped)
    fresh = toy()
    load_delta(fresh, tmp_path/'x.safetensors')
    assert torch.equal(logits(fresh), tuned)

@torch.no_grad()
def shake(att, scale=.05):
    g = torch.Generator().manual_seed(1)
    for p in att.parameters().values():
        p.add_(scale*torch.randn(p.shape, generator=g))

@pytest.mark.peer('to_peft', 'peft',
                  'outputs of exported DoRA, PiSSA, OLoRA, MiLoRA, rsLoRA and LoRA+',
                  tolerance=1e-5)
@pytest.mark.filterwarnings('ignore:fan_in_fan_out', 'ignore:Could not find a config file')
@pytest.mark.parametrize('family', ['llama', 'gpt2', 'qwen2'])
@pytest.mark.parametrize('name', ['dora', 'pissa', 'olora', 'milora', 'rslora', 'lora_plus'])
def test_written_for_peft_on_the_untouched_base(peft, name, family, tmp_path, tolerance):
    m, x = tiny(family), example_inputs()
    base = logits(m, x)
    att = attach(m, parts()(m), methods.make_of(name)(r=3, alpha=5.).delta)
    shake(att)
    changed = logits(m, x)
    assert (changed - base).abs().max() > .03
    to_peft(att, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, x), changed, atol=tolerance, rtol=0)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(logits(merged, x), changed, atol=tolerance, rtol=0)

@pytest.mark.peer('pissa', 'peft', 'tensors of the exported adapter', tolerance=1e-5)
def test_a_pissa_is_written_as_peft_converts_it(peft, tmp_path, tolerance):
    run, _ = ours(methods.pissa(r=4, alpha=10.))
    run.export(tmp_path/'ours', form='peft')
    theirs = peft.get_peft_model(toy(), peft.LoraConfig(
        r=4, lora_alpha=10, init_lora_weights='pissa', target_modules=modules(run),
        lora_dropout=0.))
    theirs.peft_config['default'].init_lora_weights = True # as peft's docs say, before the start is saved
    theirs.save_pretrained(tmp_path/'start')
    theirs.peft_config['default'].init_lora_weights = 'pissa'
    trained(theirs)
    theirs.save_pretrained(tmp_path/'theirs',
                           path_initial_model_for_weight_conversion=str(tmp_path/'start'))
    a, b = (load_file(tmp_path/k/'adapter_model.safetensors') for k in ('ours', 'theirs'))
    assert set(a) == set(b) and max((a[k] - b[k]).abs().max() for k in a) < tolerance
    x, y = (json.loads((tmp_path/k/'adapter_config.json').read_text()) for k in ('ours', 'theirs'))
    assert (x['r'], x['lora_alpha']) == (y['r'], y['lora_alpha']) == (8, 20)

def test_what_no_peft_folder_of_lora_holds(tmp_path):
    for name in ('vera', 'oft', 'ia3'):
        m = tiny('llama')
        recipe = methods.get(name)
        att = attach(m, recipe.select(m), recipe.delta)
        with pytest.raises(ValueError, match='consists of LoRA alone, or of DoRA, PiSSA'):
            to_peft(att, tmp_path/name)
    m = tiny('llama')
    made = iter([DoRA, LoRA])
    q, v = (f'model.layers.0.self_attn.{k}_proj.weight' for k in 'qv')
    att = attach(m, {q: True, v: True}, lambda W, mask: next(made)(W, mask, r=2))
    with pytest.raises(ValueError, match='one rule for all'):
        to_peft(att, tmp_path/'both')
    m = tiny('llama', tie_word_embeddings=False)
    att = attach(m, {'model.embed_tokens.weight': True}, partial(DoRA, r=2))
    with pytest.raises(ValueError, match='lengths of the columns'):
        to_peft(att, tmp_path/'embedding')

def test_layers_of_one_shape_share_the_matrices_of_vera():
    m = toy()
    recipe = methods.vera(r=8)
    att = attach(m, recipe.select(m), recipe.delta)
    shapes = {tuple(W.shape) for _, W, _ in att.weights()}
    assert len(shapes) < len(att.deltas)
    assert len({d.A.data_ptr() for d in att.deltas.values()}) == len(shapes)
    assert len({d.B.data_ptr() for d in att.deltas.values()}) == len(shapes)
    known = weakref.ref(next(iter(att.deltas.values())).A)
    att.detach()
    del att
    gc.collect() # modules and their hooks refer to each other
    assert known() is None, 'kept for nobody'

def test_other_matrices_from_the_same_seed_are_refused(tmp_path, monkeypatch):
    run = fit(toy(), TOK, lab_data(), methods.vera(r=4), steps=1, batch_size=4, progress=False)
    run.delta.save(tmp_path/'x.safetensors')
    load_delta(toy(), tmp_path/'x.safetensors')
    monkeypatch.setattr(low_rank, 'frozen_pair',
                        lambda o, i, r, *_: (torch.ones(r, i), torch.ones(o, r)))
    with pytest.raises(ValueError, match='other fixed matrices from the seed'):
        load_delta(toy(), tmp_path/'x.safetensors')

@pytest.mark.parametrize('name', [n for n in NAMES if n != 'ia3'])
def test_matrices_that_are_stored_in_by_out(name):
    m, x = tiny('gpt2'), example_inputs()
    base = logits(m, x)
    att = attach(m, parts()(m), methods.get(name).delta)
    torch.testing.assert_close(logits(m, x), base, atol=0, rtol=0)
    shake(att)
    tuned = logits(m, x)
    assert (tuned - base).abs().max() > 1e-3
    att.fold()
    torch.testing.assert_close(logits(m, x), tuned, atol=1e-5, rtol=0)

@pytest.mark.parametrize('name', NAMES)
def test_half_precision_starts_as_the_base_and_trains_in_full(name):
    m = toy().bfloat16()
    base = logits(m)
    recipe = methods.get(name)
    att = attach(m, recipe.select(m), recipe.delta)
    assert torch.equal(logits(m), base)
    assert {p.dtype for p in att.parameters().values()} == {torch.float32}

# ---------- wrong arguments

W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
MASK = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) > .5

@pytest.mark.parametrize('make, says', [
    (lambda: DoRA(W, MASK), 'cannot use a mask'), (lambda: DoRA(W, r=5), 'rank 5 does not fit'),
    (lambda: DoRA(W*torch.tensor([[1.], [1], [0], [1], [1], [1]]), r=2),
     '1 of the 6 rows are zero, the first of them row 2; leave'),
    (lambda: Started(W, MASK), 'cannot use a mask'), (lambda: Started(W, r=5), 'rank 5 does not fit'),
    (lambda: Started(W, r=2, start='pisa'), "start is 'pisa'; it must be pissa"),
    (lambda: Started(W, r=2, alpha=0.), 'above 0'), (lambda: Started(W, r=2, alpha=math.nan), 'above 0'),
    (lambda: Rescale(W, MASK), 'mask of some entries'),
    (lambda: Rescale(W, side='up'), 'out or in'),
    (lambda: VeRA(W, MASK), 'cannot use a mask'), (lambda: VeRA(W, r=0), 'whole number and at least 1'),
    (lambda: OFT(W, MASK), 'cannot use a mask'), (lambda: OFT(torch.zeros(2, 7), block=4), 'divides the 7 inputs'),
    (lambda: OFT(W, block=1), 'no size from 2 to 1'),
    (lambda: TwoRates({'a::B': torch.nn.Parameter(W)}, SimpleNamespace(), 0.), 'above 0'),
    (lambda: TwoRates({'a::B': torch.nn.Parameter(W)}, SimpleNamespace(), math.inf), 'and finite'),
    (lambda: VeRA(W, r=2, d=math.nan), 'd is nan'), (lambda: VeRA(W, r=2.), 'rank 2.0'),
    (lambda: OFT(W, block=2.), 'block is 2.0'), (lambda: LoRA(W, r='2'), "rank '2' does not fit")])
def test_wrong_arguments_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()

def test_lora_plus_needs_a_b():
    with pytest.raises(ValueError, match='none is trained'):
        fit(toy(), TOK, lab_data(), methods.hft()*Recipe(step=TwoRates), steps=1, batch_size=4,
            progress=False)

def test_lora_plus_goes_with_dora():
    both = methods.dora(r=2)*Recipe('plus', step=TwoRates)
    run = fit(toy(), TOK, lab_data(), both, steps=1, batch_size=4, lr=1e-4, clip=None,
              progress=False)
    d = next(iter(run.delta.attached.deltas.values()))
    assert float(d.low.B.detach().abs().max()) == pytest.approx(16e-4, rel=1e-2)

def test_fused_queries_are_refused_by_ia3():
    with pytest.raises(ValueError, match='no matrices of its own for keys and values'):
        methods.ia3().select(tiny('gpt2'))

def test_a_plain_lora_is_what_rslora_is():
    d = methods.rslora(r=4, alpha=8.).delta(W)
    assert type(d) is LoRA and d.s == 4.

def test_an_error_names_the_weight():
    m = toy()
    name = 'model.layers.1.mlp.up_proj.weight'
    with torch.no_grad():
        m.get_parameter(name)[3] = 0.
    with pytest.raises(ValueError, match=f"'{name}': DoRA divides .* row 3"):
        attach(m, parts()(m), methods.dora().delta)

@pytest.mark.parametrize('name', ['lora', *(n for n in NAMES if n != 'ia3')])
def test_a_dry_run_counts_without_values_and_leaves_nothing_behind(name):
    "IA3 marks its columns by a mask, whose values a dry run reads"
    recipe = methods.get(name)
    with FakeTensorMode():
        planned = training_bytes(toy(), recipe)
    m = toy()
    att = attach(m, recipe.select(m), recipe.delta)
    assert planned['trainable'] == sum(p.numel() for p in att.parameters().values())
    held = {t.data_ptr(): t for d in att.deltas.values() for t in (*d.parameters(), *d.buffers())}
    assert planned['delta'] == sum(t.numel()*t.element_size() for t in held.values())
    logits(m) # nothing of the dry run is in use

@pytest.mark.parametrize('family, has', [('qwen2', True), ('llama', False)])
def test_biases_that_ia3_leaves_are_said(family, has):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        methods.ia3().select(tiny(family))
    assert [str(w.message).split(';')[0] for w in said] == ['IA3 scales keys and values with their biases']*has
