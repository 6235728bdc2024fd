"BitFit against torch, SHiRA against peft: the same training on the same tensors (SHiRA is skipped without peft)"
import copy
import pytest, torch
from ftlab import methods
from ftlab.adapters.attach import attach
from ftlab.adapters.yardsticks.few import biases, sparse_mask
from ftlab.core.batches import batch_at
from ftlab.core.tokens import encode_all
from ftlab.trainers.fit import fit
from test_yardsticks_low_rank import alike, below, modules, ours, same
from tiny import tiny
from toys import TOK, lab_data, logits, toy

STEPS, LR = 3, 1e-2

@pytest.fixture
def peft():
    return pytest.importorskip('peft', reason='peft is in the bench extra')

# ---------- equal to another's

@pytest.mark.peer('bitfit', 'torch',
                  'three steps of AdamW on the biases (those of the keys, which have no effect, left out)',
                  tolerance=dict(parameters=1e-6, outputs=2e-6))
def test_bitfit_is_adamw_on_the_biases(tolerance):
    base = tiny('gpt2', vocab_size=len(TOK), max_position_embeddings=128, resid_pdrop=0.,
                embd_pdrop=0., attn_pdrop=0.)
    theirs = copy.deepcopy(base)
    run = fit(base, TOK, lab_data(), methods.bitfit(), steps=STEPS, batch_size=8, lr=LR, clip=None,
              schedule='constant', progress=False)
    free = [p for n, p in theirs.named_parameters() if n.endswith('.bias')]
    theirs.requires_grad_(False)
    opt = torch.optim.AdamW([p.requires_grad_() for p in free], lr=LR, weight_decay=0.)
    theirs.train()
    rows = encode_all(lab_data().train, TOK, 'text', 128)
    for s in range(STEPS):
        theirs(**batch_at(rows, s, 8, TOK.pad_token_id)).loss.backward()
        opt.step()
        opt.zero_grad()
    theirs.eval()
    now = dict(run.model.named_parameters())
    away = {n: (now[n].detach() - p.detach()).abs() for n, p in theirs.named_parameters()}
    for n, t in away.items():
        if n.endswith('c_attn.bias'): # softmax ignores the bias of keys: its gradient is rounding alone
            t[32:64] = 0.
    gap = max(float(t.max()) for t in away.values())
    out = float((logits(run.model) - logits(theirs)).abs().max())
    print(dict(parameters=gap, outputs=out))
    assert gap <= tolerance['parameters'] and out <= tolerance['outputs']
    assert len(run.delta.attached.whole) == len(free)

@pytest.mark.peer('shira', 'peft',
                  'outputs at the start; parameters and outputs after three steps', tolerance=1e-6)
@pytest.mark.parametrize('by', ['random', 'magnitude'])
def test_shira(peft, by, tolerance):
    # as many entries as a rank of 1 has: q is 32 x 32, so 64 of 1024
    recipe = methods.shira(1/16, by, ('q',))
    run, start = ours(recipe)
    masks = {n: m for n, m in recipe.select(toy()).items()}
    left = iter(masks.values())
    config = peft.ShiraConfig(r=1, target_modules=modules(run))
    config.mask_fn = lambda layer, r, **_: next(left).to(layer.weight.dtype)
    theirs = peft.get_peft_model(toy(), config)
    pairs = {k: (below(k.split('::')[0], 'shira_weight.default'), same) for k in start.parameters}
    alike(run, start, theirs, pairs, tolerance)
    for n, d in run.delta.attached.deltas.items():
        assert torch.equal(masks[n].flatten().nonzero().squeeze(1), d.index.long())

# ---------- what is chosen

def test_every_bias_is_chosen_and_nothing_else():
    m = tiny('bert', 'classifier')
    chosen = biases()(m)
    assert set(chosen) == {n for n, _ in m.named_parameters() if n.endswith('bias')}
    more = biases(norms=True)(m)
    scales = {n for n, _ in m.named_parameters() if n.endswith('LayerNorm.weight')}
    assert set(more) - set(chosen) == scales

def test_biases_that_a_module_holds_beside_its_weights_are_chosen():
    attention = torch.nn.MultiheadAttention(8, 2)
    assert set(biases()(attention)) == {'in_proj_bias', 'out_proj.bias'}

def test_a_model_without_biases_is_refused_and_the_way_out_named():
    with pytest.raises(ValueError, match=r'has no biases.*bitfit\(norms=True\)'):
        fit(toy(), TOK, lab_data(), methods.bitfit(), steps=1, batch_size=4, progress=False)
    chosen = methods.bitfit(norms=True).select(toy())
    assert chosen and all('norm' in n for n in chosen)

def test_each_matrix_has_its_share_and_its_own_draw():
    m = toy()
    masks = sparse_mask(.02)(m, seed=3)
    sizes = {n: int(k.sum()) for n, k in masks.items()}
    assert sizes == {n: max(1, round(.02*m.get_parameter(n).numel())) for n in masks}
    again, other = sparse_mask(.02)(m, seed=3), sparse_mask(.02)(m, seed=4)
    assert all(torch.equal(masks[n], again[n]) for n in masks)
    assert any(not torch.equal(masks[n], other[n]) for n in masks)
    q = [k for n, k in masks.items() if 'q_proj' in n]
    assert not torch.equal(*q)

def test_magnitude_takes_the_largest():
    m = toy()
    for n, k in sparse_mask(.05, 'magnitude')(m).items():
        W = m.get_parameter(n).abs()
        assert W[k].min() >= W[~k].max()

def test_matrices_that_are_stored_in_by_out():
    m = tiny('gpt2')
    recipe = methods.shira(density=.05)
    chosen = recipe.select(m)
    att = attach(m, chosen, recipe.delta)
    was = {n: m.get_submodule(n.rpartition('.')[0]).weight.detach().clone() for n in chosen}
    for p in att.parameters().values():
        p.data.fill_(1.)
    att.fold()
    for n, mask in chosen.items():
        torch.testing.assert_close(m.get_parameter(n) - was[n] + mask.float(), 2.*mask.float())

# ---------- wrong arguments

@pytest.mark.parametrize('make, says', [
    (lambda: methods.shira(by='snip'), "by is 'snip'; it must be random or magnitude"),
    (lambda: methods.shira(density=0.), 'density is 0.0'),
    (lambda: methods.shira(density=1.5), 'density is 1.5')])
def test_wrong_arguments_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()
