"""The common rules for merging against mergekit and peft (skipped without them), on the same tensors, and on
the command line"""
import inspect
import json
import math
import shutil
import pytest, torch
import ftlab
from ftlab import methods
from ftlab.adapters.edit import attach_change, merge, saved_changes
from ftlab.adapters.lowrank import to_peft
from ftlab.adapters.store import WrongBase
from ftlab.adapters.yardsticks.merges import (dare, dropped, elected, largest, linear, on_arc,
                                              slerp, stacked, task_arithmetic, thinned, ties)
from ftlab.cli import main
from ftlab.commands.merge import check_rule, merge_rules, merged_change, strength_of
from ftlab.trainers.fit import fit
from toys import TOK, lab_data, same, toy, weights

RULES = ('dare', 'linear', 'slerp', 'task_arithmetic', 'ties')
WEIGHTS = (None, (.3, .7, 1.1), (2., -.5, 1.))
CLOSE = dict(atol=1e-6, rtol=1e-6)

def drawn(seed, n=3, scale=.1):
    "A base and n changes of it, of several shapes"
    g = torch.Generator().manual_seed(seed)
    shapes = dict(matrix=(40, 25), vector=(32,), table=(60, 8), kernel=(3, 4, 5))
    base = {k: torch.randn(s, generator=g) for k, s in shapes.items()}
    return base, [{k: scale*torch.randn(s, generator=g) for k, s in shapes.items()}
                  for _ in range(n)]

class Base(torch.nn.Module):
    "A model that is nothing but these tensors"
    def __init__(self, tensors):
        super().__init__()
        for n, t in tensors.items():
            self.register_parameter(n, torch.nn.Parameter(t.clone()))

# ---------- equal to mergekit

@pytest.fixture
def kit():
    return pytest.importorskip('mergekit.merge_methods', reason='mergekit is in the bench extra')

def theirs(kit, name, base, changes, weights=None, models_only=False, **parameters):
    "Merge base + changes by mergekit, tensor by tensor; return the merged weights"
    out = {}
    for n, W in base.items():
        models = [W + c[n] for c in changes]
        w = [1.]*len(changes) if weights is None else list(weights)
        if not models_only:
            models, w = [W, *models], [0., *w]
        out[n] = kit.merge_tensors(models, name, base_index=None if models_only else 0,
                                   parameters=dict(weight=dict(enumerate(w)), **parameters))
    return out

def gap(base, merged, other):
    return max(float((base[n] + merged[n] - other[n]).abs().max()) for n in base)

def alike(base, merged, other, atol):
    assert merged.keys() == base.keys() and any(t.abs().max() > .01 for t in merged.values())
    found = gap(base, merged, other)
    print(f'largest gap {found:.1e}')
    assert found <= atol

@pytest.mark.peer('linear', 'mergekit', 'merged weights', tolerance=1e-6)
@pytest.mark.parametrize('given', WEIGHTS)
def test_linear_is_mergekit_s(kit, given, tolerance):
    base, changes = drawn(0)
    alike(base, linear(changes, weights=given),
          theirs(kit, 'linear', base, changes, given, True), tolerance)

@pytest.mark.peer('task_arithmetic', 'mergekit', 'merged weights', tolerance=1e-6)
@pytest.mark.parametrize('given', WEIGHTS)
@pytest.mark.parametrize('dial', [1., .3])
def test_task_arithmetic_is_mergekit_s(kit, given, dial, tolerance):
    base, changes = drawn(1)
    alike(base, task_arithmetic(changes, dial=dial, weights=given),
          theirs(kit, 'task_arithmetic', base, changes, given, **{'lambda': dial}),
          tolerance)

@pytest.mark.peer('slerp', 'mergekit',
                  'merged weights, or of their size where the changes are large', tolerance=1e-6)
@pytest.mark.parametrize('t', [0., .3, .5, 1.])
@pytest.mark.parametrize('scale', [.001, .1, 3.])
def test_slerp_is_mergekit_s(kit, t, scale, tolerance):
    base, changes = drawn(2, 2, scale)
    model = Base(base)
    both = {n: kit.merge_tensors([base[n] + c[n] for c in changes], 'slerp', base_index=0,
                                 parameters=dict(t=t)) for n in base}
    assert gap(base, slerp(changes, model, t), both) <= tolerance*max(1, scale)
    alone = {n: kit.merge_tensors([base[n], base[n] + changes[0][n]], 'slerp', base_index=0,
                                  parameters=dict(t=t)) for n in base}
    assert gap(base, slerp(changes[:1], model, t), alone) <= tolerance*max(1, scale)

@pytest.mark.peer('slerp', 'mergekit',
                  'parallel, opposite and zero vectors', tolerance=dict(atol=1e-6, rtol=1e-6))
@pytest.mark.parametrize('t', [.25, .5])
def test_an_arc_has_mergekit_s_corner_cases(kit, t, tolerance):
    x, zero = torch.tensor([3., 4.]), torch.zeros(2)
    across, near, nearer = (torch.tensor(v) for v in ([-4., 3.], [3., 4.3], [3., 4.1]))
    for a, b in ((x, x), (x, -x), (x, 2*x), (zero, x), (x, zero), (zero, zero), (x, across),
                 (x, near), (x, nearer)):
        want = kit.merge_tensors([a, b], 'slerp', base_index=0, parameters=dict(t=t))
        torch.testing.assert_close(on_arc(a, b, t), want, **tolerance)

@pytest.mark.peer('ties', 'mergekit', 'merged weights', tolerance=1e-6)
@pytest.mark.parametrize('given', WEIGHTS)
@pytest.mark.parametrize('density', [.01, .2, .5, 1.])
@pytest.mark.parametrize('normalize', [True, False])
def test_ties_is_mergekit_s(kit, given, density, normalize, tolerance):
    base, changes = drawn(3)
    alike(base, ties(changes, dial=.7, density=density, weights=given, normalize=normalize),
          theirs(kit, 'ties', base, changes, given, density=density, normalize=normalize,
                 int8_mask=False, **{'lambda': .7}), tolerance)

def our_masks(monkeypatch, changes, density, seed):
    "Give mergekit the masks that we draw: it asks tensor by tensor, and for each the changes in turn"
    import mergekit.sparsify as sparsify
    ones = [{n: torch.ones_like(t) for n, t in c.items()} for c in changes]
    masks = thinned(ones, density, seed, 'density')
    queue = [(c[n] != 0).float() for n in changes[0] for c in masks]
    monkeypatch.setattr(sparsify, 'bernoulli', lambda tensor, density, rescale_norm=None:
                        sparsify.rescaled_masked_tensor(tensor, queue.pop(0), rescale_norm))
    return queue

@pytest.mark.peer('dare', 'mergekit', 'merged weights with the same mask', tolerance=1e-6)
@pytest.mark.parametrize('then', ['linear', 'ties'])
@pytest.mark.parametrize('rescale', ['density', 'l1'])
@pytest.mark.parametrize('normalize', [True, False])
def test_dare_is_mergekit_s_with_the_same_mask(kit, monkeypatch, then, rescale, normalize,
                                               tolerance):
    base, changes = drawn(4)
    given, density = (.3, .7, 1.1), .4
    queue = our_masks(monkeypatch, changes, density, 5)
    # without its rescaling by size, the factor 1/density is the same for all and stands outside
    other = theirs(kit, f'dare_{then}', base, changes, given, density=density, normalize=normalize,
                   rescale=rescale == 'l1', int8_mask=False,
                   **{'lambda': 1. if rescale == 'l1' else 1/density})
    assert not queue
    alike(base, dare(changes, density=density, then=then, weights=given, normalize=normalize,
                     rescale=rescale, seed=5), other, tolerance)

@pytest.mark.peer('dare', 'mergekit',
                  'the change thinned by the same seed', tolerance=dict(atol=1e-5, rtol=1e-5))
@pytest.mark.parametrize('density', [.1, .5])
def test_a_mask_is_what_mergekit_draws_from_the_same_seed(kit, density, tolerance):
    from mergekit.sparsify import RescaleNorm, bernoulli
    c = torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    for rescale, norm in (('l1', RescaleNorm.l1), ('density', None)):
        torch.manual_seed(3)
        want = bernoulli(c, density, norm)/(1 if norm else density)
        got = dropped(c, density, torch.Generator().manual_seed(3), rescale)
        torch.testing.assert_close(got, want, **tolerance)

@pytest.mark.parametrize('rule', ['task_arithmetic', 'ties'])
def test_half_precision_is_rounded_once(kit, rule):
    "mergekit computes in bfloat16, so the two differ by its rounding; ours is the float32 result, rounded"
    base, changes = drawn(6)
    half = [{n: t.bfloat16() for n, t in c.items()} for c in changes]
    wide = [{n: t.float() for n, t in c.items()} for c in half]
    rules = {'ties': ties, 'task_arithmetic': task_arithmetic}
    got = rules[rule](half)
    assert same(got, rules[rule](wide)) and all(t.dtype == torch.float32 for t in got.values())
    if rule == 'task_arithmetic': # entries of equal size, which bfloat16 has many of, are trimmed in another order
        zero = {n: torch.zeros_like(t).bfloat16() for n, t in base.items()}
        other = theirs(kit, rule, zero, half)
        assert max((got[n] - other[n].float()).abs().max() for n in got) < .01

# ---------- equal to peft

@pytest.fixture
def peft():
    return pytest.importorskip('peft.utils.merge_utils', reason='peft is in the bench extra')

def by_peft(f, changes, *args):
    return {n: f([c[n] for c in changes], *args) for n in changes[0]}

@pytest.mark.peer('task_arithmetic, ties', 'peft',
                  'merged weights', tolerance=dict(atol=1e-6, rtol=1e-6))
def test_task_arithmetic_and_ties_are_peft_s(peft, tolerance):
    _, changes = drawn(7)
    w = torch.tensor([.3, .7, 1.1])
    close(task_arithmetic(changes, weights=w.tolist()), by_peft(peft.task_arithmetic, changes, w),
          **tolerance)
    pruned = [{n: largest(t, .3) for n, t in c.items()} for c in changes]
    close(task_arithmetic(pruned, weights=w.tolist()),
          by_peft(peft.magnitude_prune, changes, w, .3), **tolerance)
    for density in (.1, .2, .5):
        close(ties(changes, density=density), by_peft(peft.ties, changes, torch.ones(3), density),
              **tolerance)

def close(a, b, **within):
    assert a.keys() == b.keys()
    for n in a:
        torch.testing.assert_close(a[n], b[n], **within or CLOSE)
        assert a[n].abs().max() > .01

@pytest.mark.peer('dare', 'peft',
                  'merged weights with the same mask', tolerance=dict(atol=1e-6, rtol=1e-6))
@pytest.mark.parametrize('then', ['linear', 'ties'])
def test_dare_is_peft_s_with_the_same_mask(peft, monkeypatch, then, tolerance):
    _, changes = drawn(8)
    ones = [{n: torch.ones_like(t) for n, t in c.items()} for c in changes]
    masks = [{n: t.ne(0).float() for n, t in c.items()} for c in thinned(ones, .4, 5, 'density')]
    queue = [c[n] for n in changes[0] for c in masks]
    monkeypatch.setattr(peft.torch, 'bernoulli', lambda p: queue.pop(0))
    want = by_peft(getattr(peft, f'dare_{then}'), changes, torch.ones(3), .4)
    monkeypatch.undo()
    assert not queue
    close(dare(changes, density=.4, then=then, seed=5), want, **tolerance)

@pytest.mark.peer('dare', 'peft', 'the change thinned by the same seed', tolerance=0)
def test_a_mask_is_what_peft_draws_from_the_same_seed(peft, tolerance):
    c = torch.randn(30, 20)
    torch.manual_seed(3)
    want = peft.random_pruning(c, .3, True)
    found = dropped(c, .3, torch.Generator().manual_seed(3))
    assert (found - want).abs().max() <= tolerance

# ---------- what follows from the definitions

def test_one_change_alone():
    _, (c, *_) = drawn(9)
    for got in (linear([c]), task_arithmetic([c]), ties([c], density=1.), dare([c], density=1.),
                dare([c], density=1., then='ties')):
        close(got, c)
    assert same(ties([c], density=.3), {n: largest(t, .3) for n, t in c.items()})
    assert all(int((largest(t, .3) != 0).sum()) == int(.3*t.numel()) for t in c.values())

def test_a_tensor_that_one_change_lacks_counts_as_zero():
    base, (a, b) = drawn(10, 2)
    less = {n: t for n, t in b.items() if n != 'matrix'}
    zero = b | dict(matrix=torch.zeros_like(b['matrix']))
    model = Base(base)
    for rule in (linear, task_arithmetic, ties, slerp):
        close(rule([a, less], model), rule([a, zero], model))
    assert torch.equal(ties([a, less], density=1.)['matrix'], a['matrix'])
    names = [n for n, _ in stacked([less, a])]
    assert sorted(names) == sorted(base)
    assert same(dare([a, less], seed=3), dare([dict(reversed(a.items())), less], seed=3))

def test_linear_and_the_sum_by_hand():
    base, (a, b) = drawn(14, 2)
    for n in base: # the weighted average of the models, and base plus the weighted sum
        average = (3*(base[n] + a[n]) + base[n] + b[n])/4
        torch.testing.assert_close(base[n] + linear([a, b], weights=(3, 1))[n], average, **CLOSE)
        half = linear([a, b], dial=.5, weights=(3, 1))[n]
        torch.testing.assert_close(half, (average - base[n])/2, **CLOSE)
        torch.testing.assert_close(task_arithmetic([a, b], dial=.5, weights=(3, -1))[n],
                                   1.5*a[n] - .5*b[n], **CLOSE)

def test_slerp_by_hand():
    base, changes = drawn(15, 2, 1.)
    for n, c in slerp(changes, Base(base), .3).items():
        x, y = ((base[n] + c[n]).double() for c in changes)
        angle = torch.acos((x*y).sum()/(x.norm()*y.norm()))
        want = (torch.sin(.7*angle)*x + torch.sin(.3*angle)*y)/torch.sin(angle)
        torch.testing.assert_close((base[n] + c).double(), want, **CLOSE)
    # the line for a cosine of .9997, the arc for one of .9991
    unit_at = lambda a: (torch.tensor([1., 0.]), torch.tensor([math.cos(a), math.sin(a)]))
    line, arc = (float(on_arc(*unit_at(math.acos(x)), .5).norm()) for x in (.9997, .9991))
    assert line < 1 - 5e-5 and abs(arc - 1) < 1e-6

@pytest.mark.parametrize('normalize', [None, True, False])
@pytest.mark.parametrize('then', ['linear', 'ties'])
def test_dare_is_another_rule_on_thinned_changes(then, normalize):
    _, changes = drawn(16)
    given, parts = (.3, .7, 1.1), thinned(changes, .4, 2, 'density')
    got = dare(changes, None, .7, .4, then, given, normalize, seed=2)
    if then == 'ties':
        want = ties(parts, None, .7, 1., given, normalize is not False)
    else:
        want = (linear if normalize else task_arithmetic)(parts, None, .7, given)
    assert same(got, want)

def test_elected_by_hand():
    x = torch.tensor([[4., 1., -2., 0., 1.], [-1., 3., -1., 0., -1.], [-1., 0., 5., 0., 0.]])
    assert elected(x, (1, 1, 1)).tolist() == [4., 2., 5., 0., 1.] # a sum of zero is positive
    assert elected(x, (1, 1, 1), normalize=False).tolist() == [4., 4., 5., 0., 1.]
    assert elected(x, (1, 8, 1)).tolist() == pytest.approx([-1., 25/9, -10/9, 0., -1.])

def test_dare_repeats_for_a_seed_and_keeps_the_mean():
    c = dict(w=torch.ones(200, 100))
    one, again, other = (dare([c], density=.1, seed=s)['w'] for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert set(one.unique().tolist()) == {0., 10.} and abs(float(one.mean()) - 1) < .1
    two = thinned([c, c], .5, 0, 'density')
    assert not torch.equal(two[0]['w'], two[1]['w'])
    assert float(dare([c], density=.1, rescale='l1')['w'].sum()) == pytest.approx(20000, rel=1e-4)
    empty = dropped(torch.ones(3), 1e-9, torch.Generator().manual_seed(0), 'l1')
    assert not empty.any()

def test_the_arc_keeps_the_length():
    a, b = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    a, b = a/a.norm(), b/b.norm()
    assert abs(float(on_arc(a, b, .3).norm()) - 1) < 1e-6 < 1 - float((.7*a + .3*b).norm())

# ---------- wrong arguments

WRONG = {
    'density above 1': (lambda c: ties(c, density=1.5), 'density is 1.5'),
    'density of zero': (lambda c: dare(c, density=0), 'density is 0; it is the share'),
    'too few weights': (lambda c: linear(c, weights=(1,)), 'must be 2 finite numbers'),
    'weights that are no list': (lambda c: ties(c, weights=.5), 'a list with a number for each change'),
    'weights as text': (lambda c: ties(c, weights='12'), "weights is '12'; it must be a list"),
    'weights without an order': (lambda c: linear(c, weights={2, 1}), 'it must be a list'),
    'weights by number': (lambda c: dare(c, weights={0: 1, 1: 2}), 'it must be a list'),
    'a weight that is too large': (lambda c: linear(c, weights=(10**400, 1)), 'it must be a list'),
    'a switch that is text': (lambda c: ties(c, normalize='False'), "normalize is 'False'; it must be True or False$"),
    'a switch that is a number': (lambda c: dare(c, normalize=0), 'normalize is 0; .*True or False, or None'),
    'half a seed': (lambda c: dare(c, seed=1.5), 'seed is 1.5; it must be a whole number'),
    'no seed': (lambda c: dare(c, seed=None), 'seed is None'),
    'a weight that is NaN': (lambda c: task_arithmetic(c, weights=(1, float('nan'))), 'finite'),
    'weights that cancel': (lambda c: linear(c, weights=(1, -1)), 'adds up to zero'),
    'an unknown vote': (lambda c: dare(c, then='sum'), "then is 'sum'; it must be linear or ties"),
    'an unknown rescaling': (lambda c: dare(c, rescale='l2'), "rescale is 'l2'"),
    'three for slerp': (lambda c: slerp(c + c[:1], Base(drawn(0)[0])), 'there are 3 changes; give two'),
    'a name that the base lacks': (lambda c: slerp(c, Base({})), 'which the base does not have'),
    'no list': (lambda c: ties(c[0]), 'single change'),
    'no change': (lambda c: dare([]), 'no change to merge')}

@pytest.mark.parametrize('name', WRONG)
def test_what_makes_no_sense_is_an_error(name):
    call, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        call(drawn(11, 2)[1])

@pytest.mark.parametrize('rule', RULES)
def test_shapes_that_differ_are_not_of_one_base(rule):
    a, b = dict(w=torch.ones(4, 3)), dict(w=torch.ones(5, 3))
    with pytest.raises(ValueError, match="'w' is .4, 3. in one change and .5, 3. in another"):
        methods.merging_rule(rule)([a, b], Base(a))

# ---------- by name

def test_rules_are_found_by_their_marks():
    assert set(methods.merging_yardsticks()) == set(RULES)
    assert list(methods.merging_rules())[:2] == ['breadcrumbs', 'lines']
    for name in RULES:
        f = methods.merging_rule(name)
        assert f.paper.kind == 'yardstick' and f.paper.claim == ''
        assert f.dial == methods.merging_rules()[name]
        assert inspect.signature(f).parameters['dial'].default == f.dial and f.paper.source
        assert name not in methods.names()
        assert f.paper.url == (f'https://arxiv.org/abs/{f.paper.arxiv}' if name != 'slerp' else '')
    assert merge_rules() == {'task_arithmetic': 1.} | methods.merging_rules()

def test_settings_stand_in_the_text():
    base, changes = drawn(12, 2)
    got = merged_change(changes, None, 'dare(then="ties", density=.3, weights=(.2, .8))', .5)
    assert same(got, dare(changes, dial=.5, then='ties', density=.3, weights=(.2, .8)))
    assert same(merged_change(changes, Base(base), 'slerp'), slerp(changes, Base(base), .5))
    for text, words in {'ties(size=2)': "no setting 'size'; it takes density, weights, normalize",
                        'lines(beta=1)': 'it takes no settings', 'ties(.5)': 'with settings by name',
                        'ties(': 'cannot read', 'ties(density=x)': 'cannot read',
                        'ties(dial=2)': "no setting 'dial'", 'ties(weights={[1]: 2})': 'cannot read',
                        'ties(density=.5, density=.2)': 'cannot read', 'ties(density=open("x"))': 'cannot read',
                        'slurp': 'there are breadcrumbs, lines, dare'}.items():
        with pytest.raises(ValueError, match=words):
            merged_change(changes, None, text)

@pytest.mark.parametrize('text', ['task-arithmetic', ' task-arithmetic ', 'task-arithmetic(weights=(1, 1))'])
def test_the_sum_is_still_found_by_its_old_name(text):
    _, changes = drawn(17, 2)
    assert same(merged_change(changes, None, text), merge(changes, 1.))

def test_the_strength_is_found_however_a_rule_is_written():
    texts = {'slerp': .5, ' slerp ': .5, '(slerp)': .5, 'ties (density=.5)': 1., 'breadcrumbs': .2,
             'task-arithmetic': 1.}
    assert {t: strength_of(t) for t in texts} == texts

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_every_precision_is_trimmed(dtype):
    _, changes = drawn(18)
    transposed = [{n: t.T.to(dtype) for n, t in c.items() if t.ndim == 2} for c in changes]
    for n, t in ties(transposed).items():
        want = ties([{n: c[n].float()} for c in transposed])[n]
        assert t.dtype == (dtype if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(t.float(), want, **CLOSE)

@pytest.mark.parametrize('rule, count, words', [
    ('ties(density=2)', 2, 'density is 2'), ('ties(weights=(1,))', 2, 'must be 2 finite numbers'),
    ('slerp', 3, 'there are 3 changes'), ('linear(weights=(1, -1))', 2, 'adds up to zero'),
    ('dare(seed="x")', 1, "seed is 'x'"), ('lines(beta=1)', 1, 'it takes no settings')])
def test_a_rule_is_tried_before_a_model_is_loaded(rule, count, words, tmp_path, monkeypatch, capfd):
    with pytest.raises(ValueError, match=words):
        check_rule(rule, count)
    for name in 'abc'[:count]:
        (tmp_path/f'{name}.safetensors').touch()
    monkeypatch.setattr(ftlab, 'load', lambda *a, **k: pytest.fail('a model was loaded'))
    code, out, err = shell(capfd, 'merge', *tmp_path.iterdir(), '--model', 'x', '--rule', rule,
                           '--out', tmp_path/'out')
    assert code == 1 and words in err

@pytest.mark.parametrize('rule', merge_rules())
def test_rules_that_make_sense_pass(rule):
    check_rule(rule, 2)
    check_rule(rule, 1)

# ---------- changes as they are saved

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A folder with a base, two full changes, one of LoRA, and that as an adapter of peft"
    d = tmp_path_factory.mktemp('merges')
    model = toy()
    model.save_pretrained(d/'base')
    TOK.save_pretrained(d/'base')
    recipes = dict(a=None, b=None, low=methods.lora(r=2))
    for seed, (name, recipe) in enumerate(recipes.items()):
        run = fit(toy(), TOK, lab_data(), recipe, steps=3, batch_size=8, seed=seed, lr=1e-2,
                  progress=False)
        run.delta.save(d/f'{name}.safetensors')
        if name == 'low':
            to_peft(run.delta.attached, d/'adapter')
    return d

@pytest.mark.parametrize('rule', RULES)
def test_full_low_rank_and_peft_merge_with_one_another(saved, rule):
    model = toy()
    was = weights(model)
    a, low, adapter = saved_changes(model, saved/'a.safetensors', saved/'low.safetensors', saved/'adapter')
    assert same(weights(model), was) and low.keys() == adapter.keys() < a.keys()
    assert max((low[n] - adapter[n]).abs().max() for n in low) < 1e-6
    got = merged_change([a, adapter], model, rule)
    want = merged_change([a, low], model, rule)
    assert got.keys() == a.keys() and max((got[n] - want[n]).abs().max() for n in a) < 1e-5
    att = attach_change(model, got)
    assert not same(weights(model), was)
    att.detach()
    assert same(weights(model), was)

def shell(capfd, *line):
    try:
        code = main([str(x) for x in line])
    except SystemExit as e:
        code = e.code
    return (code, *capfd.readouterr())

@pytest.mark.parametrize('rule', ['ties(density=.5)', 'slerp', 'task-arithmetic'])
def test_the_command_merges_a_change_and_an_adapter(saved, tmp_path, capfd, rule):
    code, out, err = shell(capfd, 'merge', saved/'a.safetensors', saved/'adapter',
                           '--model', saved/'base', '--rule', rule, '--scale', '.6',
                           '--out', tmp_path/'out', '--json')
    assert code == 0, err
    r = json.loads(out)
    rule = rule.replace('-', '_')
    assert (r['rule'], r['scale']) == (rule, .6) and len(r['deltas']) == 2
    model, _ = ftlab.load(str(saved/'base'))
    changes = saved_changes(model, saved/'a.safetensors', saved/'adapter')
    change = merged_change(changes, model, rule, .6)
    merged, _ = ftlab.load(str(tmp_path/'out'))
    got, base = dict(merged.named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(got[n], base[n] + change[n]) for n in base)

def test_another_base_and_other_adapters_are_refused(saved, tmp_path, capfd):
    with pytest.raises(WrongBase, match='another base'):
        saved_changes(toy(seed=1), saved/'a.safetensors')
    for name, base in (('x', 'someone/big'), ('y', 'someone/small'), ('z', '/data/big/')):
        to = tmp_path/name
        to.mkdir()
        for file in (saved/'adapter').iterdir():
            (to/file.name).write_bytes(file.read_bytes())
        config = json.loads((to/'adapter_config.json').read_text())
        config |= dict(base_model_name_or_path=base)
        (to/'adapter_config.json').write_text(json.dumps(config))
    line = ['merge', '--model', saved/'base', '--out', tmp_path/'out', '--rule', 'ties']
    code, out, err = shell(capfd, *line, tmp_path/'x', tmp_path/'y')
    assert code == 1 and 'not made from one base' in err and "'someone/small' in" in err
    assert not (tmp_path/'out').exists()
    assert shell(capfd, *line, tmp_path/'x', tmp_path/'z')[0] == 0 # a folder and a name on the hub

@pytest.mark.parametrize('rule, code, words', [
    ('ties(size=2)', 1, "no setting 'size'"), ('ties(density=2)', 1, 'density is 2'),
    ('tied', 2, "invalid choice: 'tied'"), ('ties(weights=(1,))', 1, 'one for each change')])
def test_a_wrong_rule_leaves_nothing(saved, tmp_path, capfd, rule, code, words):
    got, out, err = shell(capfd, 'merge', saved/'a.safetensors', saved/'b.safetensors',
                          '--model', saved/'base', '--rule', rule, '--out', tmp_path/'out')
    assert got == code and words in err and out == '' and not list(tmp_path.iterdir())

def test_new_tokens_merge_with_the_same_and_not_with_none(saved, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = f'fit --model {saved}/base --data new-procedure --steps 2 --batch-size 4 --items 5 --lr 1e-2'.split()
    for name, more in (('a', []), ('b', ['--method', 'lora(r=2)'])):
        assert main([*train, '--add-tokens', '<x>', *more, '--out', name]) == 0
    shutil.copytree('b', 'plain')
    record = json.loads((tmp_path/'plain/run.json').read_text())
    assert record['add_tokens'] == ['<x>']
    (tmp_path/'plain/run.json').write_text(json.dumps(record | dict(add_tokens=None)))
    capfd.readouterr()
    code, out, err = shell(capfd, 'merge', 'a', 'b', '--rule', 'ties(density=1.)', '--out', 'both')
    assert code == 0, err
    model, tok = ftlab.load('both')
    base, _ = ftlab.load(str(saved/'base'), add_tokens=['<x>'])
    row = tok.convert_tokens_to_ids('<x>')
    moved = model.get_input_embeddings().weight[row] - base.get_input_embeddings().weight[row]
    changes = saved_changes(base, 'a/delta.safetensors', 'b/delta.safetensors')
    name = 'model.embed_tokens.weight'
    assert torch.allclose(moved, ties(changes, density=1.)[name][row], atol=1e-6)
    assert moved.abs().max() > 1e-3
    assert changes[1][name][row].any() # the rows of LoRA's run trained as well
    code, out, err = shell(capfd, 'merge', 'a', 'plain', '--rule', 'ties', '--out', 'none')
    assert code == 1 and 'not made from one base: add_tokens is' in err
    assert not (tmp_path/'none').exists()

def test_the_sum_is_that_of_merge():
    _, changes = drawn(13)
    assert same(task_arithmetic(changes, dial=.3), merge(changes, .3))
