"Probes measure what they say, on every family of models, and leave the model and the random state alone"
import pytest, torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss
from tiny import DECODERS, ENCODERS, example_inputs, tiny
from ftlab.adapters.attach import attach, is_transposed, oriented
from ftlab.adapters.delta import Offset
from ftlab.adapters.lowrank import LoRA
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.select import everything, parts
from ftlab.core.anatomy import anatomy
from ftlab.core.recipe import Recipe
from ftlab.evaluators.calibration import brier, calibration, confidence, ece, reliability
from ftlab.evaluators.mechanisms.tuco import Split, at_token, steered, tuco
from ftlab.evaluators.probe import anatomy_of, cka, layers, moved, locations
from ftlab.evaluators.mechanisms.intruders import count_intruders, intruders, shrink_intruders
from ftlab.evaluators.spectra import spectrum, stable_rank
from ftlab.trainers.fit import fit
from toys import TOK, lab_data, toy, weights

def changed(model, kind, size=.05):
    "A random change of the model, in one of four forms"
    chosen = {n: True for n in (everything if kind == 'whole' else parts())(model)}
    if kind == 'mask':
        chosen = {n: torch.rand(p.shape) < .3 for n, p in model.named_parameters() if n in chosen}
    att = attach(model, chosen, dict(lora=LoRA, output=Offset).get(kind))
    with torch.no_grad():
        for p in att.parameters().values():
            p.add_(size*torch.randn(p.shape))
    return att

# ---------- calibration

def test_calibration_is_that_of_scikit_learn():
    g = torch.Generator().manual_seed(0)
    for n, bins in ((1000, 10), (57, 5), (300, 15)):
        sure = torch.rand(n, generator=g, dtype=torch.float64)
        right = (torch.rand(n, generator=g) < sure**2).double()
        sure[:3] = torch.tensor([0., 1., .5])
        true, said = calibration_curve(right.numpy(), sure.numpy(), n_bins=bins)
        rows = reliability(sure, right, bins)
        assert (len(rows) == len(true)
                and all(abs(r['right'] - t) < 1e-12 and abs(r['sure'] - s) < 1e-12
                        for r, t, s in zip(rows, true, said)))
        assert abs(brier(sure, right) - brier_score_loss(right.numpy(), sure.numpy())) < 1e-12
        which = torch.bucketize(sure, torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1])
        by_hand = sum(abs(float((sure[which == b] - right[which == b]).sum()))
                      for b in range(bins))/n
        assert abs(ece(sure, right, bins) - by_hand) < 1e-12 and sum(r['n'] for r in rows) == n

def test_confidence_reads_the_place_before_the_word():
    lg = torch.zeros(1, 4, 5)
    lg[0, 1, 3] = 9.
    lg[0, 2, 2] = 9.
    y = torch.tensor([[-100, -100, 3, 1]])
    sure, right = confidence(lg, y)
    assert right.tolist() == [1., 0.] and (sure > .99).all()
    sure, right = confidence(torch.tensor([[0., 2.], [3., 0.]]), torch.tensor([1, 1]))
    assert right.tolist() == [1., 0.]

@pytest.mark.parametrize(
    'sure, right, word',
    [([], [], 'at least one'), ([.5], [1., 0.], 'as many'), ([1.5], [1.], 'probabilities')])
def test_calibration_refuses_what_it_cannot_use(sure, right, word):
    with pytest.raises(ValueError, match=word):
        calibration(torch.tensor(sure), torch.tensor(right))

# ---------- the tuning contribution

@pytest.mark.parametrize('kind', ['whole', 'lora', 'mask', 'output'])
@pytest.mark.parametrize('family', DECODERS + ENCODERS)
def test_the_decomposition_is_exact_on_every_family(family, kind):
    torch.manual_seed(0)
    model, base, x = tiny(family), tiny(family), example_inputs()
    att = changed(model, kind)
    seen = []
    s = Split(model, att)
    last = model.get_submodule(anatomy_of(model).blocks[-1].name).register_forward_hook(
        lambda m, a, o: None if s.busy else seen.append(o[0] if isinstance(o, tuple) else o))
    with torch.no_grad():
        model(**x, use_cache=False)
    s.remove()
    last.remove()
    assert (s.start + s.ptc + s.ftc - seen[0]).abs().max() < 1e-5 and s.ftc.abs().max() > 1e-2
    found = tuco(model, att, x)
    assert (((0 < found) & (found < 1)).all()
            and torch.allclose(found, tuco(model, base, x), atol=1e-5))
    after = model(**x).logits
    with torch.no_grad(), steered(model, att, 1.):
        assert torch.allclose(model(**x).logits, after, atol=1e-5)
    if kind != 'whole': # all of the change lies within the blocks
        with torch.no_grad(), steered(model, att, 0.):
            assert (torch.allclose(model(**x).logits, base(**x).logits, atol=1e-5)
                    and not torch.allclose(after, base(**x).logits, atol=1e-3))

def test_no_change_no_contribution_and_more_change_more():
    x = example_inputs()
    assert tuco(tiny('llama'), tiny('llama'), x).max() == 0
    size = []
    for s in (.01, .03, .1):
        torch.manual_seed(0)
        m = tiny('llama')
        size.append(float(tuco(m, changed(m, 'lora', s), x).mean()))
    assert size == sorted(size) and size[0] < .5*size[2]

def test_padding_does_not_matter_nor_the_side():
    torch.manual_seed(0)
    m = tiny('llama')
    att = changed(m, 'lora')
    ids = torch.arange(4, 9)[None]
    pad = torch.ones(1, 3, dtype=torch.long)
    on = torch.ones_like(ids)
    alone = tuco(m, att, dict(input_ids=ids, attention_mask=on))
    right = dict(input_ids=torch.cat([ids, pad], 1), attention_mask=torch.cat([on, 0*pad], 1))
    assert torch.allclose(tuco(m, att, right), alone, atol=1e-5)
    # without position ids a left-padded row begins later, which rotary positions do not notice
    left = dict(input_ids=torch.cat([pad, ids], 1), attention_mask=torch.cat([0*pad, on], 1))
    assert torch.allclose(tuco(m, att, left), alone, atol=1e-4)
    h = torch.arange(8.)[None, :, None]
    assert at_token(h, left['attention_mask'], 'first').item() == 3 and at_token(h, right['attention_mask']).item() == 4

def test_hooks_and_settings_are_gone_afterwards():
    m = tiny('llama')
    att = changed(m, 'lora')
    x = example_inputs()
    was = m.generation_config.use_cache, m.config.use_cache
    n = lambda: sum(len(q._forward_hooks) for q in m.modules())
    before = n()
    tuco(m, att, x)
    with pytest.raises(RuntimeError), steered(m, att, .5):
        raise RuntimeError
    assert (n() == before and was == (m.generation_config.use_cache, m.config.use_cache)
            and att.enabled)
    with pytest.raises(ValueError, match='last or first'):
        tuco(m, att, x, at='end')

def test_steered_answers_are_those_of_the_base_and_of_the_tuned_model():
    torch.manual_seed(0)
    m, base = tiny('llama'), tiny('llama')
    att = changed(m, 'lora', .2)
    ids = example_inputs()['input_ids']
    ask = lambda x: x.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=1).tolist()
    plain, tuned = ask(base), ask(m)
    assert plain != tuned
    with steered(m, att, 0.):
        assert ask(m) == plain
    with steered(m, att, 1.):
        assert ask(m) == tuned

# ---------- the spectrum

def test_stable_rank_and_spectrum():
    g = torch.Generator().manual_seed(0)
    C = torch.randn(20, 30, generator=g)
    s = torch.linalg.svdvals(C)
    assert (torch.allclose(spectrum(C), s)
            and abs(stable_rank(C) - float(s.square().sum()/s[0]**2)) < 1e-4
            and stable_rank(3*C) == pytest.approx(stable_rank(C), rel=1e-5)
            and stable_rank(torch.zeros(4, 4)) == 0)

@pytest.mark.parametrize('shape', [(24, 40), (40, 24)])
def test_intruders_are_found_where_they_were_put(shape):
    g = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=g)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    k = len(S)
    assert (not intruders(W, W).any() and not intruders(W, -W).any()
            and not intruders(W, U @ torch.diag(S.flip(0)) @ Vh).any())
    new = U @ torch.full((k, 2), k**-.5)
    # spread evenly over the base's: cosine 1/sqrt(24) with each
    new[:, 1] = U @ torch.cat([torch.full((k//2,), k**-.5), -torch.full((k - k//2,), k**-.5)])
    for n in (1, 2):
        assert intruders(
            W, W + new[:, :n] @ (torch.diag(torch.tensor([90., 60.])[:n]) @ Vh[:n]))[:n].all()
    one = intruders(W, W + 90*new[:, :1] @ Vh[:1])
    assert one.sum() == 1 and one[0] and intruders(W, W + 90*new[:, :1] @ Vh[:1], eps=.1).sum() == 0
    assert len(intruders(W, W, k=100)) == k
    for bad in (dict(k=0), dict(eps=0.), dict(eps=1.5)):
        with pytest.raises(ValueError):
            intruders(W, W, **bad)
    with pytest.raises(ValueError, match='one shape'):
        intruders(W, W[:5])

@pytest.mark.parametrize(
    'recipe',
    [Recipe('full'), lora(r=2), lora(r=2, alpha=64.),
     Recipe('entries', select=lambda m, b=None, s=0: {
                n: torch.rand(p.shape, generator=torch.Generator().manual_seed(0)) < .5
                for n, p in m.named_parameters() if p.ndim > 1 and 'layers' in n})],
    ids=lambda r: r.name)
@pytest.mark.parametrize('lam, most', [(1., None), (.5, None), (.5, 1)])
def test_the_edit_is_what_it_says_for_every_form_of_change(recipe, lam, most):
    import dataclasses
    plain = fit(toy(), TOK, lab_data(), recipe, steps=6, lr=3e-2, batch_size=8, progress=False)
    pairs = {n: (a.clone(), b.clone()) for n, a, b in plain.delta.attached.weights()}
    edited = dataclasses.replace(recipe, edit=shrink_intruders(lam, most=most))
    run = fit(toy(), TOK, lab_data(), edited, steps=6, lr=3e-2, batch_size=8, progress=False)
    now = weights(run.model)
    some = 0
    for n, (W0, W1) in pairs.items():
        want = W1
        if W0.ndim == 2:
            U, S, Vh = torch.linalg.svd(W1, full_matrices=False)
            on = (torch.linalg.svd(W0, full_matrices=False).U.T @ U[:, :10]).abs().amax(0) < .5
            some += int(on.sum())
            for j in on.nonzero().flatten().tolist()[:most]: # the strongest first
                want = want - (1 - lam)*S[j]*torch.outer(U[:, j], Vh[j])
        torch.testing.assert_close(now[n], want, atol=1e-4, rtol=1e-4)
    assert some and sum(count_intruders(plain.delta.attached).values()) == some

@pytest.mark.parametrize('way', ['whole', 'lora', 'mask'])
def test_intruders_are_directions_of_the_output_on_gpt2_too(way):
    """GPT-2 stores [in, out]: one strong new output direction is one intruder,
    one new input direction is none, as on a Llama-like layout of the same matrices"""
    def planted(model, name, side):
        W = oriented(model, name, model.get_parameter(name).detach())
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        k = len(S)
        u, v = ((U @ torch.full((k,), k**-.5), Vh[0]) if side == 'output'
                else (U[:, 0], Vh.T @ torch.full((k,), k**-.5)))
        return 50*S[0]*torch.outer(u, v)
    for family, name in (('gpt2', 'transformer.h.0.mlp.c_fc.weight'), ('llama', 'model.layers.0.mlp.up_proj.weight')):
        for side, want in (('output', 1), ('input', 0)):
            m = tiny(family)
            C = planted(m, name, side)
            first = weights(m)[name]
            mask = {'whole': True, 'lora': True,
                    'mask': torch.ones_like(m.get_parameter(name), dtype=torch.bool)}[way]
            att = attach(m, {name: mask},
                         (lambda W, mask: LoRA(W, r=1, alpha=1.)) if way == 'lora' else None)
            with torch.no_grad():
                if way == 'whole':
                    m.get_parameter(name).add_(oriented(m, name, C))
                elif way == 'mask':
                    att.deltas[name].value.copy_(C.flatten())
                else:
                    U, S, Vh = torch.linalg.svd(C)
                    att.deltas[name].B.copy_(U[:, :1]*S[0])
                    att.deltas[name].A.copy_(Vh[:1])
            assert count_intruders(att, k=1)[name] == want, (family, side)
            less = shrink_intruders(0., k=1)(att.changes(), m)[name]
            assert less.shape == first.shape
            # without its intruder the matrix has lost that direction; without one nothing is done
            left = oriented(m, name, first + less)
            assert (left.norm() < 2*first.norm()) == bool(want)

# ---------- where the change lies

@pytest.mark.parametrize('kind', ['whole', 'lora', 'mask'])
@pytest.mark.parametrize('family', ['llama', 'gpt2', 'bert'])
def test_each_change_is_the_change_one_at_a_time(family, kind):
    torch.manual_seed(0)
    model, base = tiny(family), weights(tiny(family))
    att = changed(model, kind)
    all_of = att.changes()
    state = torch.get_rng_state()
    one = {n: (W0.clone(), W1.clone()) for n, W0, W1 in att.weights()}
    stored = lambda n, t: oriented(model, n, t)
    transposed = [n for n in one if is_transposed(model, n)]
    assert bool(transposed) == (family == 'gpt2')
    assert (one.keys() == all_of.keys()
            and all(torch.equal(stored(n, W0), base[n])
                    and torch.allclose(stored(n, W1 - W0), all_of[n], atol=1e-6)
                    for n, (W0, W1) in one.items()))
    assert all(W0.shape == base[n].shape[::-1] for n, (W0, _) in one.items() if n in transposed)
    assert (locations(model) == anatomy(tiny(family)).locations
            and torch.equal(torch.get_rng_state(), state))
    assert all(r['part'] in ('attention', 'mlp', 'norm', 'bias', 'embedding', 'head', 'other')
               and (r['block'] is not None or kind == 'whole') for r in moved(all_of, model))

def test_places_of_an_unknown_model_are_empty():
    assert locations(_unknown()) == {}

def _unknown():
    from transformers import ViTConfig, ViTModel
    return ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                  image_size=8, patch_size=4, model_type='unknown'))

def test_layers_are_means_over_real_tokens_and_alike_to_themselves():
    m, x = tiny('llama'), example_inputs(batch=6)
    plain = layers(m, x)
    assert len(plain) == 3 and all(abs(cka(h, h) - 1) < 1e-9 for h in plain)
    pad = torch.ones(6, 2, dtype=torch.long)
    padded = layers(m, dict(input_ids=torch.cat([x['input_ids'], pad], 1),
                            attention_mask=torch.cat([x['attention_mask'], 0*pad], 1)))
    assert (all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, padded))
            and abs(cka(plain[2], layers(tiny('llama', seed=1), x)[2]) - 1) > 1e-3)
