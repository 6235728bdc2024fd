"Our LoRA against peft's: the same adapters, the same outputs, the same training (skipped where peft is not installed)"
from functools import partial
import pytest, torch
from safetensors.torch import load_file
from ftlab.adapters.attach import attach
from ftlab.adapters.delta import Offset
from ftlab.adapters.lowrank import LoRA, from_peft, to_peft
from ftlab.adapters.modules.randlora import RandLoRA, random_bases, randlora
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.select import parts
from ftlab.core.batches import batch_at
from ftlab.core.tokens import encode_all
from ftlab.trainers.fit import fit
from ftlab.trainers.losses.dft import dft
from tiny import example_inputs, tiny
from toys import TOK, lab_data, logits, toy

peft = pytest.importorskip('peft', reason='peft is in the bench extra')
pytestmark = pytest.mark.filterwarnings('ignore:fan_in_fan_out',
                                        'ignore:Could not find a config file',
                                        'ignore:`is_gradient_checkpointing`:FutureWarning')
TARGETS = dict(llama=['q_proj', 'down_proj'], gpt2=['c_attn', 'c_fc'], bert=['query', 'output.dense'])
SCALE = dict(plain=dict(alpha=16.), rs=dict(alpha=4., rs=True), odd=dict(alpha=3.))

def out(m):
    return logits(m, example_inputs())

@torch.no_grad()
def shake(model):
    g = torch.Generator().manual_seed(1)
    for n, p in model.named_parameters():
        if p.requires_grad:
            p.add_(.1*torch.randn(p.shape, generator=g))

@pytest.mark.peer('to_peft', 'peft',
                  'outputs of an exported LoRA', tolerance=dict(atol=1e-6, rtol=1e-6))
@pytest.mark.parametrize('scale', SCALE)
@pytest.mark.parametrize('family', TARGETS)
def test_peft_reads_ours(family, scale, tmp_path, tolerance):
    m = tiny(family)
    base = out(m)
    att = attach(m, parts()(m), partial(LoRA, r=4, **SCALE[scale]))
    shake(m)
    changed = out(m)
    assert (changed - base).abs().max() > .01
    to_peft(att, tmp_path/'adapter')
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path/'adapter').eval()
    assert sum('lora_A' in n for n, _ in theirs.named_parameters()) == len(att.deltas) == len(
        parts()(tiny(family)))
    torch.testing.assert_close(out(theirs), changed, **tolerance)
    with theirs.disable_adapter():
        assert torch.equal(out(theirs), base)

@pytest.mark.peer('from_peft', 'peft',
                  'outputs of a LoRA that peft saved',
                  tolerance=dict(read=dict(atol=1e-6, rtol=1e-6),
                                 folded=dict(atol=1e-5, rtol=1e-5)))
@pytest.mark.parametrize('scale', SCALE)
@pytest.mark.parametrize('family', TARGETS)
def test_we_read_peft_s(family, scale, tmp_path, tolerance):
    s = SCALE[scale]
    cfg = peft.LoraConfig(r=3, lora_alpha=s['alpha'], use_rslora=s.get('rs', False),
                          target_modules=TARGETS[family], lora_dropout=.5,
                          fan_in_fan_out=family == 'gpt2')
    theirs = peft.get_peft_model(tiny(family), cfg)
    shake(theirs)
    changed = out(theirs.eval())
    theirs.save_pretrained(tmp_path/'adapter')
    m = tiny(family)
    base = out(m)
    att = from_peft(m, tmp_path/'adapter')
    assert att.deltas and (changed - base).abs().max() > .01
    torch.testing.assert_close(out(m), changed, **tolerance['read'])
    assert torch.equal(out(m), out(m))
    with att.disabled():
        assert torch.equal(out(m), base)
    to_peft(att, tmp_path/'back')
    a, b = (load_file(tmp_path/f/'adapter_model.safetensors') for f in ('adapter', 'back'))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    att.fold()
    torch.testing.assert_close(out(m), out(theirs.merge_and_unload()), **tolerance['folded'])

@pytest.mark.peer('lora', 'peft',
                  'five steps of AdamW', tolerance=dict(parameters=1e-6, losses=1e-5))
@pytest.mark.parametrize('rs', [False, True])
def test_the_two_train_alike(rs, tolerance):
    steps, lr = 5, 3e-3
    start = {}
    class Start:
        def before_fit(self, state):
            start.update({n: p.detach().clone() for n, p in state.attached.parameters().items()})
    run = fit(toy(), TOK, lab_data(), lora(r=4, alpha=8., rs=rs), steps=steps, batch_size=8, lr=lr,
              clip=None, schedule='constant', callbacks=(Start(),), progress=False)
    names = sorted({n.split('.')[-2] for n in run.delta.attached.deltas})
    theirs = peft.get_peft_model(
        toy(),
        peft.LoraConfig(r=4, lora_alpha=8, use_rslora=rs, target_modules=names, lora_dropout=0.))
    params = {n: p for n, p in theirs.named_parameters() if p.requires_grad}

    def name(n, k):
        return f'base_model.model.{n.removesuffix(".weight")}.lora_{k}.default.weight'

    pairs = {k: name(*k.split('::')) for k in start}
    assert (set(pairs.values()) == set(params)
            and all(start[k].any() == k.endswith('A') for k in start))
    with torch.no_grad():
        for k, n in pairs.items():
            params[n].copy_(start[k])
    opt, rows, nlls = (torch.optim.AdamW(params.values(), lr=lr, betas=(.9, .999), weight_decay=0.),
                       encode_all(lab_data().train, TOK, 'text', 256), [])
    theirs.train()
    for s in range(steps):
        loss = theirs(**batch_at(rows, s, 8, TOK.pad_token_id)).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        nlls.append(float(loss.detach()))
    ours = run.delta.attached.parameters()
    assert min((ours[k] - start[k]).abs().max() for k in start) > 1e-3
    for k, n in pairs.items():
        torch.testing.assert_close(ours[k].detach(), params[n].detach(), rtol=0,
                                   atol=tolerance['parameters'])
    assert [r['nll'] for r in run.log] == pytest.approx(nlls, abs=tolerance['losses'])

def test_what_is_no_plain_lora_is_refused(tmp_path):
    m = tiny('llama')
    att = attach(m, parts()(m), Offset)
    with pytest.raises(ValueError, match='only a change that consists of LoRA alone'):
        to_peft(att, tmp_path/'x')
    mixed = attach(tiny('llama'),
                   {'model.layers.0.mlp.up_proj.weight': True, 'model.norm.weight': True},
                   lora().delta, also=('model.norm.weight',))
    with pytest.raises(ValueError, match='only a change that consists of LoRA alone'):
        to_peft(mixed, tmp_path/'x')
    assert not (tmp_path/'x').exists()
    for i, (more, says) in enumerate(((dict(use_dora=True), 'use_dora; load it with ftlab.load'),
                                      (dict(bias='all'), 'bias'),
                                      (dict(rank_pattern={'q_proj': 2}), 'rank_pattern'),
                                      (dict(modules_to_save=['norm']), 'modules_to_save'))):
        config = peft.LoraConfig(r=3, target_modules=['q_proj', 'v_proj'], **more)
        peft.get_peft_model(tiny('llama'), config).save_pretrained(tmp_path/str(i))
        m = tiny('llama')
        with pytest.raises(ValueError, match=says):
            from_peft(m, tmp_path/str(i))
        assert all(p.requires_grad for p in m.parameters())
    # tensors that no setting tells of: an embedding's adapter would be lost without a word
    peft.get_peft_model(tiny('gpt2'),
                        peft.LoraConfig(r=3, target_modules=['wpe', 'c_attn'],
                                        fan_in_fan_out=True)).save_pretrained(tmp_path/'e')
    with pytest.raises(ValueError, match='also holds .*lora_embedding'):
        from_peft(tiny('gpt2'), tmp_path/'e')

# ---------- trl

def by_hand(outputs, labels):
    "The same formula: the mean over all tokens with a loss of -p log p, p taken as a constant"
    logp = outputs.logits[:, :-1].log_softmax(-1)
    y = labels[:, 1:]
    logp = logp.gather(-1, y.clamp(min=0)[..., None])[..., 0]
    return -(logp.exp().detach()*logp)[y != -100].mean()

def by_trl(model, rows, batch, folder):
    trl = pytest.importorskip('trl', reason='trl is in the bench extra')
    import datasets
    args = trl.SFTConfig(output_dir=str(folder), loss_type='dft', use_cpu=True, bf16=False,
                         report_to=[], max_length=None, gradient_checkpointing=False,
                         disable_tqdm=True)
    trainer = trl.SFTTrainer(model=model, args=args, processing_class=TOK,
                             train_dataset=datasets.Dataset.from_list([dict(r) for r in rows[:8]]))
    return trainer.compute_loss(model, dict(batch))

@pytest.mark.peer('dft', 'trl',
                  'one batch', tolerance=dict(loss=dict(rtol=1e-4), gradient=dict(rtol=1e-5)))
@pytest.mark.parametrize('whose', ['trl', 'by hand'])
def test_dft_is_trl_s(whose, tmp_path, tolerance):
    m = toy()
    rows = encode_all(lab_data().train, TOK, 'text', 256)
    batch = batch_at(rows, 0, 8, TOK.pad_token_id)
    theirs = (by_trl(m, rows, batch, tmp_path) if whose == 'trl'
              else by_hand(m(**{k: batch[k] for k in ('input_ids', 'attention_mask')}), batch['labels']))
    theirs.backward()
    look = Gradient()
    run = fit(toy(), TOK, lab_data(), dft(), steps=1, batch_size=8, callbacks=(look,),
              progress=False)
    near = tolerance['loss']['rtol']
    assert run.log[0]['loss'] == pytest.approx(float(theirs.detach()), rel=near)
    a, b = (torch.cat([g.flatten() for g in gs])
            for gs in ([p.grad for p in m.parameters()], look.all.values()))
    assert a.norm() > 0 and (a - b).norm() < tolerance['gradient']['rtol']*a.norm()

class Gradient:
    def after_backward(self, state):
        self.all = {n: p.grad.clone() for n, p in state.model.named_parameters()}

# ---------- RandLoRA

def randlora_of(family, r, names, **kw):
    torch.manual_seed(0)
    alpha = kw.pop('alpha', 20*r)
    config = peft.RandLoraConfig(r=r, target_modules=names, randlora_alpha=alpha,
                                 fan_in_fan_out=family == 'gpt2', **kw)
    return peft.get_peft_model(tiny(family), config).eval()

def layer_of(theirs, name):
    "peft's layer that changes the parameter `name`"
    return theirs.base_model.model.get_submodule(name.removesuffix('.weight'))

def bases_of(layer, d):
    """peft's bases A [r, shorter] and B [longer, N, r],
    cut to the shape of `d` and in the order of ours"""
    (r, short), (long, n, _) = d.A.shape, d.B.shape
    A = layer.randlora_A['default'][:, 0, :short]
    B = layer.randlora_B['default'][:long, :n].flatten(1).view(long, r, n).transpose(1, 2)
    return A, B

@torch.no_grad()
def copy_all(d, layer):
    """What peft trains and what it has drawn, into ours.
    The bases too: peft draws in half precision, for which torch's generator gives other numbers in other versions"""
    d.lam.copy_(layer.randlora_lambda['default'])
    d.gamma.copy_(layer.randlora_gamma['default'])
    for ours, base in zip((d.A, d.B), bases_of(layer, d)):
        ours.copy_(base)

@pytest.mark.peer('randlora', 'peft',
                  'the random bases, where peft is made to draw in full precision',
                  tolerance=dict(atol=1e-6, rtol=1e-6))
@pytest.mark.parametrize('sparse', [False, True])
@pytest.mark.parametrize('r', [3, 8])
def test_randlora_draws_the_bases_that_peft_draws_in_full_precision(r, sparse, monkeypatch,
                                                                    tolerance):
    """One rule on one generator, so the same bases under any version of torch,
    once peft draws in our precision"""
    def in_full(shape, generator):
        return torch.nn.init.kaiming_uniform_(torch.empty(shape), a=5**.5, generator=generator)
    monkeypatch.setattr('peft.tuners.randlora.model._kaiming_init', in_full)
    # of one shape: peft cuts nothing
    theirs, m = randlora_of('llama', r, ['q_proj', 'o_proj'], sparse=sparse), tiny('llama')
    att = attach(m, parts('q', 'o')(m), partial(RandLoRA, r=r, sparse=sparse))
    assert len(att.deltas) >= 2
    for n, d in att.deltas.items():
        for ours, base in zip((d.A, d.B), bases_of(layer_of(theirs, n), d)):
            torch.testing.assert_close(ours, base, **tolerance)

@pytest.mark.peer('randlora', 'peft',
                  'outputs in double precision, with the same bases',
                  tolerance=dict(atol=1e-9, rtol=1e-9))
@pytest.mark.parametrize('sparse', [False, True])
@pytest.mark.parametrize('r', [3, 8])
def test_randlora_says_what_peft_says_with_the_same_bases(r, sparse, tolerance):
    """In double precision: the two add up in another order,
    and what is left must be rounding under any version of torch"""
    theirs = randlora_of('llama', r, ['q_proj', 'o_proj'], sparse=sparse).double()
    shake(theirs)
    changed, m = out(theirs), tiny('llama').double()
    base = out(m)
    att = attach(m, parts('q', 'o')(m), partial(RandLoRA, r=r, sparse=sparse))
    assert torch.equal(out(m), base)
    for n, d in att.deltas.items():
        layer = layer_of(theirs, n)
        assert d.lam.shape == layer.randlora_lambda['default'].shape
        assert d.gamma.shape == layer.randlora_gamma['default'].shape
        copy_all(d, layer)
    assert (changed - base).abs().max() > .01
    torch.testing.assert_close(out(m), changed, **tolerance)
    att.fold()
    torch.testing.assert_close(out(m), changed, **tolerance)

@pytest.mark.parametrize('family', TARGETS)
def test_randlora_of_any_shape_is_peft_s_once_its_bases_are_cut_to_the_shape(family):
    theirs, m, seen = randlora_of(family, 5, TARGETS[family], alpha=7), tiny(family), 0
    start = {n: p.detach().clone() for n, p in theirs.named_parameters() if p.requires_grad}
    shake(theirs)
    theirs.double()
    for n in parts()(m):
        layer = layer_of(theirs, n)
        if not hasattr(layer, 'randlora_lambda'):
            continue
        seen += 1
        W = m.get_parameter(n).detach()
        W = W.T if family == 'gpt2' else W
        d = RandLoRA(W, r=5, alpha=7)
        for k, v in dict(lam='lambda', gamma='gamma').items():
            theirs_at_start = start[f'base_model.model.{n.removesuffix(".weight")}.randlora_{v}.default']
            assert torch.equal(d.state_dict()[k], theirs_at_start), 'another start'
        d.double()
        copy_all(d, layer)
        delta = layer.get_delta_weight('default')
        nothing = torch.zeros(W.shape, dtype=torch.float64)
        torch.testing.assert_close(d(nothing), delta.T if family == 'gpt2' else delta, atol=1e-9,
                                   rtol=1e-9)
        assert delta.abs().max() > 1e-3
    assert seen >= 4

def test_randlora_counts_rank_and_what_it_refuses():
    for out_, in_, r in ((20, 12, 5), (12, 20, 5), (16, 16, 16), (16, 16, 1)):
        W = torch.randn(out_, in_)
        d = RandLoRA(W, r=r)
        assert (torch.equal(d(W), W) and d.A.std() == pytest.approx(1, abs=1e-5)
                and d.B.std() == pytest.approx(1, abs=1e-5))
        with torch.no_grad():
            [p.normal_() for p in d.parameters()]
        change = (d(W) - W).detach()
        n = -(-min(W.shape)//r)
        assert (sum(p.numel() for p in d.parameters()) == n*(r + min(W.shape))
                and torch.linalg.matrix_rank(change) == min(W.shape))
        by_hand = sum(d.B[:, j] @ torch.diag(d.lam[:, j]) @ d.A @ torch.diag(d.gamma[j])
                      for j in range(n)).detach()*d.s # the formula, term by term
        torch.testing.assert_close(change, by_hand.T if out_ < in_ else by_hand, atol=1e-3,
                                   rtol=1e-3)
        x = torch.randn(4, in_)
        torch.testing.assert_close(d.branch(x), x @ change.T, atol=1e-2, rtol=1e-3)
    with pytest.raises(ValueError, match='rank 13 does not fit'):
        RandLoRA(torch.zeros(12, 20), r=13)
    with pytest.raises(ValueError, match='whole matrices'):
        RandLoRA(torch.zeros(4, 4), torch.ones(4, 4, dtype=torch.bool))
    assert set(RandLoRA(torch.zeros(64, 64), sparse=True).B.sign().unique().tolist()) == {
        -1., 0., 1.}

def test_randlora_has_two_scales_and_the_run_draws_its_bases():
    W = torch.zeros(20, 12)
    assert RandLoRA(W, r=5).s == 20
    assert RandLoRA(W, r=5, scale='paper').s == pytest.approx(2/3**.5) # three terms
    assert RandLoRA(W, r=5, alpha=15, scale='paper').s == pytest.approx(3/3**.5)
    for make in (randlora, partial(RandLoRA, W)):
        with pytest.raises(ValueError, match="scale is 'papers'; it must be 'peft' or 'paper'"):
            make(scale='papers', r=5)

    def bases(run_seed, **options):
        run = fit(toy(), TOK, lab_data(), randlora(r=5, **options), steps=1, batch_size=2,
                  seed=run_seed, progress=False)
        return [d.B for d in run.delta.attached.deltas.values()], run.delta.attached.deltas

    one, deltas = bases(1)
    again, other, fixed = bases(1)[0], bases(2)[0], bases(2, seed=0)[0]
    for a, b, c, d, delta in zip(one, again, other, fixed, deltas.values()):
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert torch.equal(d, random_bases(len(d), delta.A.shape[1], 5)[1]) # of peft's key, 0
        assert delta.config['seed'] == 1

STARTS = dict(plain=True, gaussian='gaussian', orthogonal='orthogonal', pissa='pissa',
              pissa_niter_4='pissa_niter_4', olora='olora', mica='mica')

@pytest.mark.peer('from_peft', 'peft',
                  'outputs of LoRA that peft saved: four starts, and PiSSA and OLoRA on the base peft changed',
                  tolerance=dict(atol=1e-5, rtol=1e-5))
@pytest.mark.parametrize('start', STARTS)
def test_a_start_that_changes_the_base_is_refused_and_every_other_is_read_right(start, tmp_path,
                                                                                tolerance):
    """peft 0.21 changes the base under PiSSA and OLoRA:
    read as plain LoRA they were wrong by more than a tenth in the logits"""
    theirs = peft.get_peft_model(
        tiny('llama'), peft.LoraConfig(r=4, lora_alpha=8, target_modules=['q_proj', 'v_proj'],
                                       init_lora_weights=STARTS[start]))
    shake(theirs)
    changed = out(theirs.eval())
    theirs.save_pretrained(tmp_path/'a')
    m = tiny('llama')
    base = out(m)
    if start.startswith(('pissa', 'olora')):
        with pytest.raises(ValueError,
                           match=f"init_lora_weights='{start}', which changes the base"):
            from_peft(m, tmp_path/'a')
        assert torch.equal(out(m), base) and all(p.requires_grad for p in m.parameters())
        # on the base that peft has changed, and said so, A and B are right
        import json
        c = json.loads((tmp_path/'a'/'adapter_config.json').read_text())
        (tmp_path/'a'/'adapter_config.json').write_text(json.dumps(dict(c, init_lora_weights=True)))
        m.load_state_dict({n.removeprefix('base_model.model.').replace('.base_layer', ''): t
                           for n, t in theirs.state_dict().items() if 'lora_' not in n})
        from_peft(m, tmp_path/'a')
    else:
        from_peft(m, tmp_path/'a')
        assert (changed - base).abs().max() > .01
    torch.testing.assert_close(out(m), changed, **tolerance)

def test_a_pissa_that_peft_has_converted_is_read_right(tmp_path):
    m = tiny('llama')
    theirs = peft.get_peft_model(
        m, peft.LoraConfig(r=4, lora_alpha=8, target_modules=['q_proj'], init_lora_weights='pissa'))
    theirs.peft_config['default'].init_lora_weights = True
    theirs.save_pretrained(tmp_path/'start')
    theirs.peft_config['default'].init_lora_weights = 'pissa'
    shake(theirs)
    changed = out(theirs.eval())
    theirs.save_pretrained(tmp_path/'a', path_initial_model_for_weight_conversion=str(tmp_path/'start'))
    m = tiny('llama')
    from_peft(m, tmp_path/'a')
    torch.testing.assert_close(out(m), changed, atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize(
    'setting',
    [dict(alora_invocation_tokens=[3]), dict(target_parameters=['a.b']), dict(use_bdlora=dict(x=1)),
     dict(layer_replication=[[0, 1]]), dict(arrow_config=dict(x=1)),
     dict(a_setting_of_a_later_peft=1), dict(alpha_pattern={'q_proj': 3})])
def test_settings_that_change_what_a_and_b_mean_are_refused(setting, tmp_path):
    import json
    peft.get_peft_model(tiny('llama'),
                        peft.LoraConfig(r=4, target_modules=['q_proj'])).save_pretrained(tmp_path)
    file = tmp_path/'adapter_config.json'
    c = json.loads(file.read_text())
    from_peft(tiny('llama'), tmp_path).detach()
    file.write_text(json.dumps(dict(c, **setting)))
    m = tiny('llama')
    with pytest.raises(ValueError, match=next(iter(setting))):
        from_peft(m, tmp_path)
    file.write_text(json.dumps(dict(c, a_setting_of_a_later_peft=None)))
    from_peft(m, tmp_path) # not set: it means nothing

def test_every_setting_of_this_peft_is_known_or_refused():
    import dataclasses
    from ftlab.adapters.lowrank import BEYOND
    from ftlab.core.peft_folder import HARMLESS, USED
    refused = set('use_dora rank_pattern alpha_pattern modules_to_save lora_bias layer_replication '
                  'velora_config alora_invocation_tokens use_qalora trainable_token_indices '
                  'monteclora_config target_parameters use_bdlora arrow_config kasa_config '
                  'megatron_config ensure_weight_tying'.split())
    known = {*HARMLESS, *USED} - {*BEYOND}
    assert {f.name for f in dataclasses.fields(peft.LoraConfig)} - known <= refused, (
        'a new setting of peft: does it change what A and B mean?')

def test_adapters_that_do_not_fit_are_refused_and_leave_the_model_alone(tmp_path):
    from safetensors.torch import save_file
    peft.get_peft_model(tiny('llama'),
                        peft.LoraConfig(r=4, target_modules=['q_proj'])).save_pretrained(tmp_path)
    file = tmp_path/'adapter_model.safetensors'
    good = load_file(file)
    a, b = sorted(good)[:2]
    for change, says in (
            ({a: good[a][:1]}, 'it must be .4, 32.'),
            ({b: good[b].double()/0}, 'NaN or infinite'),
            ({a: good[a].to(torch.int8)}, 'floating point'),
            ({a.replace('q_proj', 'nope'): good[a].clone()}, 'no parameter of that name'),
            ({'x': good[a].clone()}, "also holds 'x'"),
            ({a: None}, 'has no lora_A')):
        save_file({k: v.contiguous() for k, v in {**good, **change}.items() if v is not None}, file)
        m = tiny('llama')
        base = out(m)
        with pytest.raises(ValueError, match=says):
            from_peft(m, tmp_path)
        assert torch.equal(out(m), base) and all(p.requires_grad for p in m.parameters())
    file.write_bytes(b'no tensors')
    with pytest.raises(ValueError, match='adapter_model.safetensors.*cannot be read'):
        from_peft(tiny('llama'), tmp_path)
