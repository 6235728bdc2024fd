"Edits and merges of changes: against references written out by hand, over all architectures, from disk and back"
import pytest, torch
from ftlab.adapters.attach import attach
from ftlab.adapters.delta import Offset
from ftlab.adapters.select import parts
from ftlab.adapters.store import WrongBase, identity, pack, save_delta
from ftlab.adapters.edit import scale
from ftlab.adapters.merging.breadcrumbs import middle, breadcrumbs, merge_breadcrumbs
from ftlab.adapters.merging.lines import by_depth, depth, lines, merge_lines
from ftlab.adapters.edit import merge, attach_change, saved_changes
from ftlab.core.anatomy import anatomy
from ftlab.trainers.fit import fit
from tiny import DECODERS, ENCODERS, tiny
from toys import TOK, lab_data, logits, same, toy, weights

def change(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=g) for n, p in model.named_parameters()}

# ---------- LiNeS

def by_hand(name, alpha, beta, blocks):
    """The rule as the official code has it: the number in the name is the block;
    everything else is shallow"""
    l = next((int(x) for x in name.split('.') if x.isdigit()), None)
    return alpha + beta*l/(blocks - 1) if l is not None else alpha

@pytest.mark.parametrize('family', DECODERS + ENCODERS)
def test_blocks_are_scaled_as_in_the_official_code(family):
    m = tiny(family)
    a, c = anatomy(m), change(m)
    new = by_depth(.3, .6)(c, m)
    inside = {n for b in a.blocks for n in b.parameters}
    assert new.keys() == c.keys() and len(inside) > 8
    for n in inside:
        torch.testing.assert_close(new[n], by_hand(n, .3, .6, len(a.blocks))*c[n])
    torch.testing.assert_close(new[a.embedding], .3*c[a.embedding])
    if 'final' in a.norms:
        torch.testing.assert_close(new[a.norms['final']], .9*c[a.norms['final']])
    if a.head and not a.tied and a.head in c:
        torch.testing.assert_close(new[a.head], .9*c[a.head])

def test_a_tied_head_is_as_shallow_as_the_embedding_that_it_is():
    for tied in (True, False):
        m = toy(tied=tied)
        d = depth(m)
        assert d[anatomy(m).embedding] == 0. and (tied or d['lm_head.weight'] == 1.)

def test_the_recipe_edits_what_was_trained_and_nothing_before():
    plain, edited = (fit(toy(), TOK, lab_data(), r, steps=4, batch_size=8, progress=False)
                     for r in (None, lines(.25)))
    want = by_depth(.25, .75)(plain.delta.tensors(), plain.model)
    got = edited.delta.tensors()
    base = weights(toy())
    for n in want:
        torch.testing.assert_close(base[n] + want[n], base[n] + got[n], atol=1e-7, rtol=1e-6)
    assert (lines(.25).arguments == dict(alpha=.25, beta=.75)
            and lines(1., -.5).arguments['beta'] == -.5)

def test_a_merge_keeps_the_average_in_the_first_block():
    m = toy()
    cs = [change(m, s) for s in range(3)]
    plain = merge(cs)
    first = 'model.layers.0.mlp.up_proj.weight'
    last = first.replace('0', '1')
    got = merge_lines(cs, m, .4)
    torch.testing.assert_close(got[first], plain[first]/3)
    torch.testing.assert_close(got[last], plain[last]*(1/3 + .4))
    # a merge of half the size by another rule comes back to the size of the average:
    # the formula of the official code, norm_summed/norm_mtv/T
    half = merge_lines(cs, m, 0., merged=scale(.5)(plain, m))
    torch.testing.assert_close(half[first], plain[first]/3)
    with pytest.raises(ValueError, match='zero everywhere'):
        merge_lines(cs, m, merged=scale(0.)(plain, m))

# ---------- breadcrumbs

def reference(c, beta, gamma):
    "Entry by entry: its rank decides"
    flat = c.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: abs(flat[i]))
    out = [0.]*len(flat)
    for rank, i in enumerate(order):
        if round(beta*len(flat)) <= rank < round(gamma*len(flat)):
            out[i] = flat[i]
    return torch.tensor(out).view_as(c)

def mergekit_says(c, density, gamma):
    """The counts that mergekit's magnitude_outliers takes: the largest gamma go first,
    then as many small ones as leave `density`"""
    n = c.numel()
    top = int(gamma*n)
    bottom = n - int(density*n) - top
    at = c.abs().flatten().sort().indices[bottom:n - top]
    return torch.zeros(n).index_copy(0, at, c.flatten()[at]).view_as(c)

@pytest.mark.parametrize('beta, gamma', [(.85, .994), (0., 1.), (.5, 1.), (0., .9), (.2, .21)])
def test_the_band_is_what_ranks_say(beta, gamma):
    for shape in ((40, 25), (1000,), (3, 7), ()):
        c = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        new = middle(beta, gamma)(dict(w=c), None)['w']
        assert new.shape == c.shape and torch.equal(new, reference(c, beta, gamma))

def test_the_band_is_mergekit_s():
    c = torch.randn(50, 40, generator=torch.Generator().manual_seed(2))
    assert torch.equal(middle(.85, .99)(dict(w=c), None)['w'], mergekit_says(c, .14, .01))

def official_says(c, remove, keep):
    """src/task_vectors.py: along the last axis, int(remove n) largest go,
    then int(keep n) largest of what is left stay; a single number stays"""
    if not c.ndim:
        return c
    out, rows = torch.zeros_like(c).view(-1, c.shape[-1]), c.reshape(-1, c.shape[-1])
    for new, row in zip(out, rows):
        order = sorted(range(len(row)), key=lambda i: -abs(float(row[i])))[int(len(row)*remove):][
            :int(len(row)*keep)]
        new[order] = row[order]
    return out.view_as(c)

@pytest.mark.parametrize('keep, remove', [(.15, .006), (.2, .01), (.05, .001), (.5, .1), (1., 0.)])
@pytest.mark.parametrize('shape', [(5, 128), (3, 768), (2, 1000), (320,), (4, 3, 200), (6, 10), ()])
def test_a_row_keeps_the_official_counts(shape, keep, remove):
    c = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(middle(1 - keep, 1 - remove, 'row')(dict(w=c), None)['w'],
                       official_says(c, remove, keep))

def test_a_row_is_ranked_by_itself():
    c = torch.arange(1., 21).view(2, 10)
    new = middle(.5, .9, 'row')(dict(w=c), None)['w']
    assert [r.nonzero().flatten().tolist() for r in new] == [[4, 5, 6, 7, 8]]*2  # one of ten removed, five kept
    assert not torch.equal(new, middle(.5, .9)(dict(w=c), None)['w'])
    defaults = middle(per='row')(dict(a=torch.rand(2, 128) + 1, b=torch.rand(2, 768) + 1), None)
    assert [(t != 0).sum(1).tolist() for t in defaults.values()] == [[19, 19], [115, 115]]
    assert repr(middle(per='row')) != repr(middle())

@pytest.mark.parametrize(
    'bad', [dict(beta=.9, gamma=.8), dict(beta=-.1), dict(gamma=1.1), dict(per='layer')])
def test_what_cannot_be_a_band_is_refused(bad):
    with pytest.raises(ValueError, match='beta is|per is'):
        breadcrumbs(**bad)

def test_breadcrumbs_are_trimmed_one_by_one():
    m = toy()
    cs = [change(m, s) for s in range(2)]
    got = merge_breadcrumbs(cs, .3, .8, .99)
    for n in got:
        torch.testing.assert_close(got[n],
                                   .3*(reference(cs[0][n], .8, .99) + reference(cs[1][n], .8, .99)))
    by_row = merge_breadcrumbs(cs, .3, .8, .99, 'row')
    name = 'model.embed_tokens.weight'
    want = .3*sum(official_says(c[name], .01, .2) for c in cs)
    torch.testing.assert_close(by_row[name], want)
    assert not torch.equal(by_row[name], got[name])
    trimmed_after = middle(.8, .99)(merge(cs, .3), m)
    assert any(not torch.allclose(trimmed_after[n], got[n]) for n in got)

# ---------- any merge

def test_a_merge_names_what_any_change_names():
    a, b = dict(x=torch.ones(2)), dict(y=torch.ones(3))
    assert merge([a, b], .5).keys() == {'x', 'y'} and torch.equal(a['x'], torch.ones(2))
    with pytest.raises(ValueError, match='a single change'):
        merge({})
    with pytest.raises(ValueError, match='no change'):
        merge([])
    with pytest.raises(ValueError, match='not made from one base'):
        merge([a, dict(x=torch.ones(3))])

def test_a_change_of_activations_cannot_be_merged(tmp_path):
    m = toy()
    was, home = weights(m), identity(m)
    norm = 'model.norm.weight'
    att = attach(m, {**parts('q')(m), norm: True}, Offset, also=(norm,))
    save_delta(tmp_path/'o.safetensors', *pack(att), home)
    att.detach()
    with pytest.raises(ValueError, match=r"o.safetensors' cannot be merged: Offset at 'model.*q_proj.* activations"):
        saved_changes(m, tmp_path/'o.safetensors')
    assert same(weights(m), was)
    attach(m, {norm: True}) # nothing is left on the model
    with pytest.raises(FileNotFoundError):
        saved_changes(toy(), tmp_path/'none.safetensors')

def test_changes_from_disk_are_those_in_memory_and_the_base_stays(tmp_path):
    m = toy()
    was = weights(m)
    paths, kept = [], []
    for seed, recipe in enumerate((None, lines(.5))):
        run = fit(m, TOK, lab_data(), recipe, steps=3, batch_size=8, seed=seed, progress=False)
        run.delta.save(tmp_path/f'{seed}.safetensors')
        kept.append({n: t.clone() for n, t in run.delta.tensors().items()})
        run.delta.attached.detach()
        paths.append(tmp_path/f'{seed}.safetensors')
    got = saved_changes(m, *paths)
    assert same(weights(m), was) and all(same(a, b) for a, b in zip(got, kept))
    base = logits(m)
    att = attach_change(m, merge(got))
    merged = logits(m)
    assert not torch.equal(merged, base)
    with att.disabled():
        assert torch.equal(logits(m), base)
    save_delta(tmp_path/'merged.safetensors', *pack(att), identity(toy()))
    att.detach()
    assert same(weights(m), was)
    again, = saved_changes(m, tmp_path/'merged.safetensors')
    assert again.keys() == got[0].keys()
    attach_change(m, again)
    assert torch.equal(logits(m), merged)
    with pytest.raises(WrongBase):
        saved_changes(toy(seed=1), paths[0])

def test_a_merge_without_the_cpp_is_the_same_to_the_last_bit(monkeypatch):
    m = toy()
    cs = [change(m, s) for s in range(3)]
    cs[0] = {n: c.bfloat16() for n, c in cs[0].items()}
    ours = merge_breadcrumbs(cs, .3)
    monkeypatch.setenv('FTLAB_NATIVE', 'torch')
    assert same(ours, merge_breadcrumbs(cs, .3)) and any(c.any() for c in ours.values())
