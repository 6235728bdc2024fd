"Our LoRA against peft's: the same adapters, the same outputs, the same training (skipped where peft is not installed)"
from functools import partial
import pytest, torch
from safetensors.torch import load_file
from ftlab.adapters.delta import Offset, attach
from ftlab.adapters.lowrank import LoRA, from_peft, to_peft
from ftlab.adapters.modules.randlora import RandLoRA
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.select import parts
from ftlab.core.batches import batch_at, encode_all
from ftlab.trainers.fit import fit
from ftlab.trainers.losses.dft import dft
from tiny import example_inputs, tiny
from toys import TOK, lab_data, logits, toy

peft = pytest.importorskip('peft', reason='peft is in the bench extra')
pytestmark = pytest.mark.filterwarnings('ignore:fan_in_fan_out', 'ignore:Could not find a config file', 'ignore:`is_gradient_checkpointing`:FutureWarning')
TARGETS = dict(llama=['q_proj', 'down_proj'], gpt2=['c_attn', 'c_fc'], bert=['query', 'output.dense'])
SCALE = dict(plain=dict(alpha=16.), rs=dict(alpha=4., rs=True), odd=dict(alpha=3.))
def out(m): return logits(m, example_inputs())

@torch.no_grad()
def shake(model):
    g = torch.Generator().manual_seed(1)
    for n, p in model.named_parameters():
        if p.requires_grad: p.add_(.1*torch.randn(p.shape, generator=g))

@pytest.mark.parametrize('scale', SCALE)
@pytest.mark.parametrize('family', TARGETS)
def test_peft_reads_ours(family, scale, tmp_path):
    m = tiny(family); base = out(m); att = attach(m, parts()(m), partial(LoRA, r=4, **SCALE[scale])); shake(m); changed = out(m); assert (changed - base).abs().max() > .01
    to_peft(att, tmp_path/'adapter'); theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path/'adapter').eval()
    assert sum('lora_A' in n for n, _ in theirs.named_parameters()) == len(att.deltas) == len(parts()(tiny(family)))
    torch.testing.assert_close(out(theirs), changed, atol=1e-6, rtol=1e-6)
    with theirs.disable_adapter(): assert torch.equal(out(theirs), base)

@pytest.mark.parametrize('scale', SCALE)
@pytest.mark.parametrize('family', TARGETS)
def test_we_read_peft_s(family, scale, tmp_path):
    s = SCALE[scale]; cfg = peft.LoraConfig(r=3, lora_alpha=s['alpha'], use_rslora=s.get('rs', False), target_modules=TARGETS[family], lora_dropout=.5, fan_in_fan_out=family == 'gpt2')
    theirs = peft.get_peft_model(tiny(family), cfg); shake(theirs); changed = out(theirs.eval()); theirs.save_pretrained(tmp_path/'adapter')
    m = tiny(family); base = out(m); att = from_peft(m, tmp_path/'adapter'); assert att.deltas and (changed - base).abs().max() > .01
    torch.testing.assert_close(out(m), changed, atol=1e-6, rtol=1e-6); assert torch.equal(out(m), out(m))
    with att.disabled(): assert torch.equal(out(m), base)
    to_peft(att, tmp_path/'back'); a, b = (load_file(tmp_path/f/'adapter_model.safetensors') for f in ('adapter', 'back')); assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    att.fold(); torch.testing.assert_close(out(m), out(theirs.merge_and_unload()), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('rs', [False, True])
def test_the_two_train_alike(rs):
    steps, lr = 5, 3e-3; start = {}
    class Start:
        def before_fit(self, state): start.update({n: p.detach().clone() for n, p in state.attached.parameters().items()})
    run = fit(toy(), TOK, lab_data(), lora(r=4, alpha=8., rs=rs), steps=steps, batch_size=8, lr=lr, clip=None, schedule='constant', callbacks=(Start(),), progress=False)
    names = sorted({n.split('.')[-2] for n in run.delta.attached.deltas})
    theirs = peft.get_peft_model(toy(), peft.LoraConfig(r=4, lora_alpha=8, use_rslora=rs, target_modules=names, lora_dropout=0.)); params = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    def name(n, k): return f'base_model.model.{n.removesuffix(".weight")}.lora_{k}.default.weight'
    pairs = {k: name(*k.split('::')) for k in start}; assert set(pairs.values()) == set(params) and all(start[k].any() == k.endswith('A') for k in start)
    with torch.no_grad():
        for k, n in pairs.items(): params[n].copy_(start[k])
    opt, rows, nlls = torch.optim.AdamW(params.values(), lr=lr, betas=(.9, .999), weight_decay=0.), encode_all(lab_data().train, TOK, 'text', 256), []; theirs.train()
    for s in range(steps):
        loss = theirs(**batch_at(rows, s, 8, TOK.pad_token_id)).loss; loss.backward(); opt.step(); opt.zero_grad(); nlls.append(float(loss.detach()))
    ours = run.delta.attached.parameters(); assert min((ours[k] - start[k]).abs().max() for k in start) > 1e-3
    for k, n in pairs.items(): torch.testing.assert_close(ours[k].detach(), params[n].detach(), atol=1e-6, rtol=0)
    assert [r['nll'] for r in run.log] == pytest.approx(nlls, abs=1e-5)

def test_what_is_no_plain_lora_is_refused(tmp_path):
    m = tiny('llama'); att = attach(m, parts()(m), Offset)
    with pytest.raises(ValueError, match='only a change that is LoRA'): to_peft(att, tmp_path/'x')
    mixed = attach(tiny('llama'), {'model.layers.0.mlp.up_proj.weight': True, 'model.norm.weight': True}, lora().delta, also=('model.norm.weight',))
    with pytest.raises(ValueError, match='only a change that is LoRA'): to_peft(mixed, tmp_path/'x')
    assert not (tmp_path/'x').exists()
    for i, (more, says) in enumerate(((dict(use_dora=True), 'use_dora'), (dict(bias='all'), 'bias'), (dict(rank_pattern={'q_proj': 2}), 'rank_pattern'), (dict(modules_to_save=['norm']), 'modules_to_save'))):
        peft.get_peft_model(tiny('llama'), peft.LoraConfig(r=3, target_modules=['q_proj', 'v_proj'], **more)).save_pretrained(tmp_path/str(i)); m = tiny('llama')
        with pytest.raises(ValueError, match=says): from_peft(m, tmp_path/str(i))
        assert all(p.requires_grad for p in m.parameters())
    # tensors that no setting tells of: an embedding's adapter would be lost without a word
    peft.get_peft_model(tiny('gpt2'), peft.LoraConfig(r=3, target_modules=['wpe', 'c_attn'], fan_in_fan_out=True)).save_pretrained(tmp_path/'e')
    with pytest.raises(ValueError, match='also holds .*lora_embedding'): from_peft(tiny('gpt2'), tmp_path/'e')

# ---------- trl

def by_hand(outputs, labels):
    "The same formula: the mean over all priced tokens of -p log p, p taken as a constant"
    logp = outputs.logits[:, :-1].log_softmax(-1); y = labels[:, 1:]; logp = logp.gather(-1, y.clamp(min=0)[..., None])[..., 0]
    return -(logp.exp().detach()*logp)[y != -100].mean()

def by_trl(model, rows, batch, folder):
    trl = pytest.importorskip('trl', reason='trl is in the bench extra'); import datasets
    args = trl.SFTConfig(output_dir=str(folder), loss_type='dft', use_cpu=True, bf16=False, report_to=[], max_length=None, gradient_checkpointing=False, disable_tqdm=True)
    trainer = trl.SFTTrainer(model=model, args=args, processing_class=TOK, train_dataset=datasets.Dataset.from_list([dict(r) for r in rows[:8]]))
    return trainer.compute_loss(model, dict(batch))

@pytest.mark.parametrize('whose', ['trl', 'by hand'])
def test_dft_is_trl_s(whose, tmp_path):
    m = toy(); rows = encode_all(lab_data().train, TOK, 'text', 256); batch = batch_at(rows, 0, 8, TOK.pad_token_id)
    theirs = by_trl(m, rows, batch, tmp_path) if whose == 'trl' else by_hand(m(**{k: batch[k] for k in ('input_ids', 'attention_mask')}), batch['labels']); theirs.backward()
    look = Gradient(); run = fit(toy(), TOK, lab_data(), dft(), steps=1, batch_size=8, callbacks=(look,), progress=False)
    assert run.log[0]['loss'] == pytest.approx(float(theirs.detach()), rel=1e-4)
    a, b = (torch.cat([g.flatten() for g in gs]) for gs in ([p.grad for p in m.parameters()], look.all.values())); assert a.norm() > 0 and (a - b).norm() < 1e-5*a.norm()

class Gradient:
    def after_backward(self, state): self.all = {n: p.grad.clone() for n, p in state.model.named_parameters()}

# ---------- RandLoRA

def randlora_of(family, r, names, **kw):
    torch.manual_seed(0); return peft.get_peft_model(tiny(family), peft.RandLoraConfig(r=r, target_modules=names, randlora_alpha=kw.pop('alpha', 20*r), fan_in_fan_out=family == 'gpt2', **kw)).eval()

@pytest.mark.parametrize('sparse', [False, True])
@pytest.mark.parametrize('r', [3, 8])
def test_randlora_draws_the_bases_that_peft_draws_and_says_the_same(r, sparse):
    names = ['q_proj', 'o_proj']; theirs = randlora_of('llama', r, names, sparse=sparse); shake(theirs); changed = out(theirs) # two matrices of one shape, so that peft cuts nothing
    m = tiny('llama'); base = out(m); att = attach(m, parts('q', 'o')(m), partial(RandLoRA, r=r, sparse=sparse)); assert torch.equal(out(m), base)
    with torch.no_grad():
        for n, d in att.deltas.items():
            layer = theirs.base_model.model.get_submodule(n.removesuffix('.weight')); assert d.lam.shape == layer.randlora_lambda['default'].shape and d.gamma.shape == layer.randlora_gamma['default'].shape
            d.lam.copy_(layer.randlora_lambda['default']); d.gamma.copy_(layer.randlora_gamma['default'])
            A, B = layer.randlora_A['default'][:, 0].float(), layer.randlora_B['default'].float().flatten(1).view(32, r, -1).transpose(1, 2)
            assert all(((x - y).abs() < .02).float().mean() > .97 for x, y in ((d.A, A), (d.B, B))); d.A.copy_(A); d.B.copy_(B) # peft draws in half precision, which turns the very largest draws into the smallest
    assert (changed - base).abs().max() > .01; torch.testing.assert_close(out(m), changed, atol=2e-5, rtol=1e-4)
    att.fold(); torch.testing.assert_close(out(m), changed, atol=2e-5, rtol=1e-4)

@pytest.mark.parametrize('family', TARGETS)
def test_randlora_of_any_shape_is_peft_s_once_its_bases_are_cut_to_the_shape(family):
    theirs = randlora_of(family, 5, TARGETS[family], alpha=7); start = {n: p.detach().clone() for n, p in theirs.named_parameters() if p.requires_grad}; shake(theirs); m = tiny(family); seen = 0
    for n in parts()(m):
        layer = theirs.base_model.model.get_submodule(n.removesuffix('.weight'))
        if not hasattr(layer, 'randlora_lambda'): continue
        W = m.get_parameter(n).detach(); W = W.T if family == 'gpt2' else W; d = RandLoRA(W, r=5, alpha=7); seen += 1; N = d.B.shape[1]
        assert all(torch.equal(d.state_dict()[k], start[f'base_model.model.{n.removesuffix(".weight")}.randlora_{v}.default']) for k, v in dict(lam='lambda', gamma='gamma').items()), 'another start'
        with torch.no_grad():
            d.lam.copy_(layer.randlora_lambda['default']); d.gamma.copy_(layer.randlora_gamma['default']); d.A.copy_(layer.randlora_A['default'][:, 0, :min(W.shape)])
            d.B.copy_(layer.randlora_B['default'][:max(W.shape), :N].flatten(1).view(max(W.shape), 5, N).transpose(1, 2)); delta = layer.get_delta_weight('default')
        torch.testing.assert_close((d(W) - W), delta.T if family == 'gpt2' else delta, atol=1e-5, rtol=1e-4); assert delta.abs().max() > 1e-3
    assert seen >= 4

def test_randlora_counts_rank_and_what_it_refuses():
    for out_, in_, r in ((20, 12, 5), (12, 20, 5), (16, 16, 16), (16, 16, 1)):
        W = torch.randn(out_, in_); d = RandLoRA(W, r=r); assert torch.equal(d(W), W) and d.A.std() == pytest.approx(1, abs=1e-5) and d.B.std() == pytest.approx(1, abs=1e-5)
        with torch.no_grad(): [p.normal_() for p in d.parameters()]
        change = (d(W) - W).detach(); n = -(-min(W.shape)//r); assert sum(p.numel() for p in d.parameters()) == n*(r + min(W.shape)) and torch.linalg.matrix_rank(change) == min(W.shape)
        by_hand = sum(d.B[:, j] @ torch.diag(d.lam[:, j]) @ d.A @ torch.diag(d.gamma[j]) for j in range(n)).detach()*d.s # the formula, term by term
        torch.testing.assert_close(change, by_hand.T if out_ < in_ else by_hand, atol=1e-3, rtol=1e-3); x = torch.randn(4, in_); torch.testing.assert_close(d.branch(x), x @ change.T, atol=1e-2, rtol=1e-3)
    with pytest.raises(ValueError, match='rank 13 does not fit'): RandLoRA(torch.zeros(12, 20), r=13)
    with pytest.raises(ValueError, match='whole matrices'): RandLoRA(torch.zeros(4, 4), torch.ones(4, 4, dtype=torch.bool))
    assert set(RandLoRA(torch.zeros(64, 64), sparse=True).B.sign().unique().tolist()) == {-1., 0., 1.}
