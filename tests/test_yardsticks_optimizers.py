"The relatives of AdamW against their origins: the same steps from the same gradients (skipped without the packages)"
from types import SimpleNamespace
import pytest, torch
from torch import nn
from ftlab import methods
from ftlab.commands.memory import planned, training_bytes
from ftlab.trainers.fit import fit
from ftlab.trainers.step import Backprop
from ftlab.trainers.yardsticks.optimizers import (Averaged, EightBit, GaLoreAdamW, LowRankMoments,
                                                  MuonAndAdamW, Orthogonal, ScheduleFreeAdamW,
                                                  eight_bit_bytes, hidden_matrices)
from tiny import tiny
from toys import TOK, assert_resumes, classifier, lab_data, label_data, toy, weights

NAMES = ('adam8bit', 'galore', 'muon', 'schedule_free')
STEPS, LR = 5, 3e-3
BETAS = (.9, .999)

def needs_package(name):
    if 'adam8bit' in name:
        pytest.importorskip('bitsandbytes', reason='adam8bit needs bitsandbytes')

def tuned(recipe, model=None, **more):
    how = dict(steps=STEPS, batch_size=8, lr=LR, clip=None, schedule='constant', progress=False)
    return fit(model or toy(), TOK, lab_data(), recipe, **how | more)

class Gradients:
    "Keeps the gradients of every step by name"
    def __init__(self):
        self.steps = []

    def after_backward(self, state):
        self.steps.append({n: p.grad.clone() for n, p in state.model.named_parameters()})

def beside(recipe, optimizers, **more):
    """Tune a toy by `recipe` and another one by torch optimizers on the same gradients;
    `optimizers(model)` makes them. Return both models."""
    seen, other = Gradients(), toy()
    run = tuned(recipe, callbacks=(seen,), **more)
    opts = optimizers(other)
    for gradients in seen.steps:
        for n, p in other.named_parameters():
            p.grad = gradients[n]
        for o in opts:
            o.step()
    return run.model, other

def gap(a, b):
    "The largest difference between two models' weights, all of which must have moved"
    a, b, start = weights(a), weights(b), weights(toy())
    assert min(float((a[n] - start[n]).abs().max()) for n in a) > 1e-4, 'a weight did not move'
    return max(float((a[n] - b[n]).abs().max()) for n in a)

def split(model):
    "The hidden matrices of a model and the rest"
    named = dict(model.named_parameters())
    ours = hidden_matrices(named, model)
    return [named[n] for n in ours], [p for n, p in named.items() if n not in ours]

# ---------- equal to where they come from

@pytest.mark.peer('muon', 'torch',
                  'weights after five steps on the same gradients (it calls torch.optim.Muon)',
                  tolerance=0)
@pytest.mark.parametrize('adjust, rest', [('match_rms_adamw', 1.), ('original', .05)])
def test_muon_is_torchs(adjust, rest, tolerance):
    def optimizers(model):
        ours, others = split(model)
        assert len(ours) == 14
        return (torch.optim.Muon(ours, lr=LR, weight_decay=.1, adjust_lr_fn=adjust),
                torch.optim.AdamW(others, lr=rest*LR, betas=BETAS, weight_decay=.1, fused=True))
    apart = gap(*beside(methods.muon(adjust=adjust, rest=rest), optimizers, weight_decay=.1))
    assert apart <= tolerance

def orthogonal(G):
    "The Newton-Schulz iteration by its formula, in the precision of the reference"
    X = (G if G.shape[0] <= G.shape[1] else G.T).bfloat16()
    X = X/(X.norm() + 1e-7)
    for _ in range(5):
        S = X @ X.T
        X = 3.4445*X + (-4.775*S + 2.0315*S @ S) @ X
    return (X if G.shape[0] <= G.shape[1] else X.T).float()

@pytest.mark.parametrize('shape', [(48, 20), (20, 48), (32, 32)])
def test_muon_is_the_formula_of_the_reference(shape):
    "KellerJordan/Muon, muon.py: momentum, Nesterov, five rounds, and the root of the ratio of the sides"
    g = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=g)
    p, M, theirs = nn.Parameter(W.clone()), torch.zeros(shape), W.clone()
    opt = MuonAndAdamW([p], [], 1., dict(momentum=.95, adjust_lr_fn='original'), lr=.02,
                       betas=BETAS, weight_decay=.1)
    for _ in range(STEPS):
        G = torch.randn(shape, generator=g)
        p.grad = G.clone()
        opt.step()
        M = .95*M + .05*G
        O = orthogonal(.05*G + .95*M)*max(1, shape[0]/shape[1])**.5
        theirs = theirs*(1 - .02*.1) - .02*O
    moved = (theirs - W).norm()
    apart = float((p.detach() - theirs).norm()/moved)
    print("muon beside the formula", shape, apart)
    assert apart < .03

@pytest.mark.peer('galore', 'galore_torch',
                  'weights after five steps on the same gradients', tolerance=1e-6)
@pytest.mark.parametrize('decay', [0., .1])
def test_galore_is_galore_torchs(decay, tolerance):
    pytest.importorskip('bitsandbytes', reason='galore_torch imports bitsandbytes')
    GaLoreProjected = pytest.importorskip(
        'galore_torch', reason='galore_torch is in the bench extra').GaLoreAdamW
    def optimizers(model):
        ours, others = split(model)
        small = dict(params=ours, rank=3, update_proj_gap=2, scale=2., proj_type='std')
        return (GaLoreProjected([small], lr=LR, betas=BETAS, eps=1e-8, weight_decay=decay,
                                no_deprecation_warning=True),
                torch.optim.AdamW(others, lr=LR, betas=BETAS, weight_decay=decay))
    apart = gap(*beside(methods.galore(r=3, alpha=2., every=2), optimizers, weight_decay=decay))
    print('galore', decay, apart)
    assert apart < tolerance

@pytest.mark.peer('adam8bit', 'bitsandbytes',
                  'weights after five steps on the same gradients (it calls AdamW8bit)',
                  tolerance=0)
def test_8_bit_adam_is_bitsandbytes(tolerance):
    bnb = pytest.importorskip('bitsandbytes', reason='adam8bit needs bitsandbytes')
    # the embedding is large enough for eight bits
    def optimizers(model):
        return (bnb.optim.AdamW8bit(model.parameters(), lr=LR, betas=BETAS, weight_decay=.1),)
    ours, theirs = beside(methods.adam8bit(), optimizers, weight_decay=.1)
    assert gap(ours, theirs) <= tolerance
    plain, start = weights(tuned(methods.full(), weight_decay=.1).model), weights(toy())
    for n, p in weights(ours).items():
        assert (p - plain[n]).norm() < (plain[n] - start[n]).norm()/3, n

@pytest.mark.peer('schedule_free', 'schedulefree',
                  'weights after five steps on the same gradients', tolerance=1e-6)
@pytest.mark.parametrize('decay, warmup', [(0., 0), (.1, 0), (.1, 3)])
def test_schedule_free_is_schedulefrees(decay, warmup, tolerance):
    peer = pytest.importorskip('schedulefree', reason='the peer of schedule_free')
    theirs = peer.AdamWScheduleFree
    made = []
    def optimizers(model):
        made.append(theirs(model.parameters(), lr=LR, betas=BETAS, weight_decay=decay,
                           warmup_steps=warmup))
        made[0].train()
        return made
    ours, other = beside(methods.schedule_free(), optimizers, weight_decay=decay, warmup=warmup)
    fast = gap(ours, other)
    made[0].eval()
    apart = gap(ours, other)
    print('schedule_free', decay, warmup, apart, 'the fast side', fast)
    assert apart < tolerance < fast

@pytest.mark.peer('schedule_free', 'schedulefree',
                  'a matrix while the rate changes', tolerance=1e-6)
@pytest.mark.parametrize('rates', [(.02, .04, .06, .06), (.06, .04, .02, 0., .05)])
def test_schedule_free_is_schedulefrees_while_the_rate_changes(rates, tolerance):
    "Large steps and decay, so that a decay taken at the average, or another weight of a step, shows"
    peer = pytest.importorskip('schedulefree', reason='the peer of schedule_free')
    g = torch.Generator().manual_seed(0)
    start = torch.randn(5, 7, generator=g)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = ScheduleFreeAdamW([p], lr=.1, betas=(.8, .99), weight_decay=.5)
    other = peer.AdamWScheduleFree([q], lr=.1, betas=(.8, .99), weight_decay=.5)
    for lr in rates:
        ours.look(ahead=True)
        other.train()
        torch.testing.assert_close(p.detach(), q.detach(), atol=tolerance, rtol=0)
        p.grad = torch.randn(5, 7, generator=g)
        q.grad = p.grad.clone()
        ours.param_groups[0]['lr'] = other.param_groups[0]['lr'] = lr
        ours.step()
        other.step()
        other.eval()
        torch.testing.assert_close(p.detach(), q.detach(), atol=tolerance, rtol=0)
    assert (p.detach() - start).abs().max() > .05

# ---------- Schedule-Free: the average is what everyone sees

def one(model):
    return model.get_parameter('model.layers.0.mlp.up_proj.weight').detach().clone()

class Sees:
    "Keeps the outputs of the model after each step, and the weights at each gradient"
    def __init__(self):
        self.between, self.within = [], []

    def after_backward(self, state):
        self.within.append(one(state.model))

    def after_step(self, state):
        self.between.append(one(state.model))

def test_callbacks_see_the_average_and_the_gradient_is_taken_elsewhere():
    sees = Sees()
    run = tuned(methods.schedule_free(), callbacks=(sees,))
    last = one(run.model)
    assert torch.equal(sees.between[-1], last)
    assert not torch.equal(sees.within[-1], sees.between[-2])

@pytest.mark.parametrize('trouble', [KeyboardInterrupt, FloatingPointError])
def test_what_stops_inside_a_step_leaves_the_average(trouble):
    class Stop(Sees):
        def after_backward(self, state):
            super().after_backward(state)
            if state.step == 3:
                raise trouble
    sees, model = Stop(), toy()
    if trouble is KeyboardInterrupt:
        assert tuned(methods.schedule_free(), model, callbacks=(sees,)).interrupted
        left = one(model)
        torch.testing.assert_close(left, sees.between[-1], atol=1e-7, rtol=0)
        assert (left - sees.within[-1]).abs().max() > 1e-5
    else:
        with pytest.raises(trouble):
            tuned(methods.schedule_free(), model, callbacks=(sees,))

def test_the_average_is_the_mean_of_the_fast_sequence():
    "At a constant rate every step has the same weight"
    p, z, fast = nn.Parameter(torch.zeros(3)), torch.zeros(3), []
    opt = ScheduleFreeAdamW([p], lr=.1, betas=BETAS, weight_decay=0.)
    g = torch.Generator().manual_seed(0)
    for _ in range(6):
        opt.look(ahead=True)
        p.grad = torch.randn(3, generator=g)
        opt.step()
        fast.append(p.detach() + opt.state[p]['d'])
    torch.testing.assert_close(p.detach(), torch.stack(fast).mean(0))

# ---------- resumed, and counted

MIXED = [m for n in NAMES for m in (n, f'lora * {n}', f'hft * {n}') if m != 'lora * galore']

@pytest.mark.parametrize('name', MIXED)
def test_resumed_is_uninterrupted(name, tmp_path):
    needs_package(name)
    how = dict(steps=4, batch_size=4, lr=1e-2, progress=False, warmup=3)
    recipe = methods.get(name.replace('galore', 'galore(r=3, every=3)'))
    assert_resumes(lambda **more: fit(toy(), TOK, lab_data(), recipe, **how, **more), tmp_path, 2)

def held(optimizer):
    "The bytes of an optimizer's tensors, each once"
    seen = {t.data_ptr(): t.numel()*t.element_size() for s in optimizer.state.values()
            for t in s.values() if torch.is_tensor(t)}
    return sum(seen.values())

class Holds:
    def after_step(self, state):
        self.bytes = held(state.optimizer)

@pytest.mark.parametrize('name', ['full', 'lora', *MIXED])
def test_the_dry_run_counts_what_a_run_holds(name):
    needs_package(name)
    holds, recipe = Holds(), methods.get(name)
    tuned(recipe, toy(hidden=64), callbacks=(holds,), steps=2)
    assert training_bytes(toy(hidden=64), recipe)['optimizer'] == holds.bytes

@pytest.mark.parametrize('name', ['full', 'lora', 'lora * muon', 'lora_plus', 'mezo', *NAMES])
def test_the_dry_run_counts_without_weights(name):
    from torch._subclasses.fake_tensor import FakeTensorMode
    needs_package(name)
    with FakeTensorMode():
        found = training_bytes(toy(), methods.get(name))
    assert found == training_bytes(toy(), methods.get(name))

@pytest.mark.parametrize('name', ['full', 'lora * muon', *NAMES])
def test_the_room_asked_for_is_about_the_size_of_the_checkpoint(name, tmp_path, monkeypatch):
    needs_package(name)
    from ftlab.trainers import stage
    asked = []
    monkeypatch.setattr(stage, 'check_room', lambda folder, need: asked.append(need))
    run = fit(toy(hidden=64), TOK, lab_data(), methods.get(name), steps=2, batch_size=4,
              progress=False, out=tmp_path, save_every=1)
    file = (tmp_path/'checkpoint.safetensors').stat().st_size
    # beside what is asked for: the random state, the record of the run, and the names
    assert 0 < file - asked[0] < 40_000, (asked, file)

@pytest.mark.parametrize('name', ['vera', 'randlora(r=4)', 'dora'])
def test_the_plan_of_what_starts_by_values_reads_the_weights(name):
    a = SimpleNamespace(device='cpu', model='lab-s', revision=None, dtype=None, head='auto',
                        quantize=None, max_length=None, batch_size=1, precision='no',
                        add_tokens=None, add_special_tokens=None, gradient_checkpointing=False)
    found = planned(a, methods.get(name), lab_data())
    assert found['trainable'] > 0 and found['memory']['optimizer'] > 8*found['trainable']

def test_eight_bits_are_counted_by_tensor():
    big, odd, small = (torch.zeros(n) for n in (8192, 4097, 4095))
    assert eight_bit_bytes([big, odd, small]) == (2*8192 + 8*32) + (2*4097 + 8*17) + 8*4095 + 2048

# ---------- which matrices

@pytest.mark.parametrize('name, count', [('llama', 14), ('gpt2', 8), ('bert', 12)])
def test_hidden_matrices_are_those_in_blocks(name, count):
    model = tiny(name)
    found = hidden_matrices(dict(model.named_parameters()), model)
    others = ('embed', 'wte', 'head', 'norm', 'ln_')
    assert len(found) == count and not any(w in n for n in found for w in others)

def test_muon_trains_the_factors_of_a_change_and_no_other_part_of_it():
    seen = {}
    class Look:
        def after_step(self, state):
            params = state.attached.parameters()
            seen.update({n: set(state.optimizer.state[p]) for n, p in params.items()})
    tuned(methods.get('dora * muon'), steps=1, callbacks=(Look(),))
    assert {n[-1] for n in seen} == set('ABm')
    for n, entries in seen.items():
        assert ('momentum_buffer' in entries) == (n[-1] in 'AB')
        assert ('exp_avg' in entries) == (n[-1] == 'm')

def test_a_fresh_head_is_not_made_orthogonal():
    holds = []
    class Look:
        def after_step(self, state):
            params = state.attached.parameters()
            kept = state.optimizer.state
            holds[:] = [n for n, p in params.items() if 'momentum_buffer' in kept[p]]
    fit(classifier(), TOK, label_data(), methods.muon(), steps=1, batch_size=4, progress=False,
        callbacks=(Look(),))
    assert len(holds) == 12 and all('encoder.layer' in n for n in holds)

def test_muon_accumulates_within_its_rounding():
    a, b = (tuned(methods.muon(), steps=3, accumulate=k) for k in (1, 2))
    start, one, two = weights(toy()), weights(a.model), weights(b.model)
    for n in one:
        assert (one[n] - two[n]).norm() < .02*(one[n] - start[n]).norm(), n

# ---------- refused

def made(cls, model=None, params=None, **options):
    model = model or toy()
    how = SimpleNamespace(lr=.1, weight_decay=0., betas=BETAS, clip=None, model=model)
    return cls(dict(model.named_parameters()) if params is None else params, how, **options)

VECTOR = {'norm': nn.Parameter(torch.ones(3))}

@pytest.mark.parametrize('make, says', [
    (lambda: made(Orthogonal, adjust='rms'), "adjust is 'rms'; it must be match_rms_adamw or original"),
    (lambda: made(Orthogonal, rest=0.), 'rest must be above 0'),
    (lambda: made(Orthogonal, momentum=1.), 'below 1'),
    (lambda: made(Orthogonal, params=VECTOR), 'this recipe trains none'),
    (lambda: made(Orthogonal, tiny('gpt2'), adjust='original'), 'stores its matrices transposed'),
    (lambda: made(LowRankMoments, r=0), 'at least 1'),
    (lambda: made(LowRankMoments, every=1.5), 'whole numbers'),
    (lambda: made(LowRankMoments, alpha=0.), 'alpha above 0'),
    (lambda: made(LowRankMoments, r=32), 'larger than 32 in both'),
    (lambda: made(LowRankMoments, params=VECTOR), 'larger than 4 in both'),
    (lambda: made(Averaged, toy().bfloat16()), 'half precision')])
def test_wrong_arguments_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()

@pytest.mark.parametrize('name, says', [
    ('lora * galore', 'small already'), ('ia3 * muon', 'trains none'),
    ('oft * muon', 'trains none'),
    ('lift * muon', 'trains none'), ('lift * galore', 'small already')])
def test_what_does_not_fit_together_is_refused(name, says):
    with pytest.raises(ValueError, match=says):
        tuned(methods.get(name), steps=1)
    with pytest.raises(ValueError, match=says):
        training_bytes(toy(), methods.get(name))

def test_lift_chooses_anew_only_with_moments_that_can_be_reset():
    needs_package('adam8bit')
    with pytest.raises(ValueError, match='use lift'):
        tuned(methods.get('lift * adam8bit'), steps=1)
    tuned(methods.get('lift(every=0) * adam8bit'), steps=1)

def test_new_entries_of_lift_start_at_the_average():
    "LIFT sets what is kept of new entries to zero; of Schedule-Free that is the distance from the average"
    run = tuned(methods.get('lift(every=2) * schedule_free'), steps=4, lr=1e-3)
    moved = max(float((p - weights(toy())[n]).abs().max()) for n, p in weights(run.model).items())
    assert moved < 5e-3

@pytest.mark.parametrize('name', ['muon', 'galore', 'lisa'])
def test_half_precision_that_rounds_steps_away_is_refused(name):
    with pytest.raises(ValueError, match='half precision'):
        tuned(methods.get(name), toy().bfloat16(), lr=1e-5)

@pytest.mark.parametrize('name', ['mezo', 'lora_plus', 'lora * muon', 'lora * schedule_free'])
def test_half_precision_is_fine_where_no_step_is_lost(name):
    "MeZO's rate is not the size of a step, and a change beside the weights is in float32"
    tuned(methods.get(name), toy().bfloat16(), lr=1e-5, steps=1)

@pytest.mark.parametrize('name', NAMES)
def test_sharded_weights_are_refused(name, monkeypatch):
    import ftlab.trainers.yardsticks.optimizers as page
    monkeypatch.setattr(page, 'DTensor', nn.Parameter)
    with pytest.raises(ValueError, match='use shard=False'):
        made({'muon': Orthogonal, 'galore': LowRankMoments, 'adam8bit': EightBit,
              'schedule_free': Averaged}[name])

def test_without_bitsandbytes_there_is_one_sentence(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'bitsandbytes', None)
    with pytest.raises(ImportError, match='pip install "bitsandbytes>=0.50"'):
        tuned(methods.adam8bit(), steps=1)

def test_the_plain_step_counts_as_before():
    params = dict(toy().named_parameters())
    assert made(Backprop).state_bytes() == sum(8*p.numel() + 4 for p in params.values())

def test_a_gradient_of_zeros_moves_nothing():
    p = nn.Parameter(torch.ones(6, 8))
    opt = GaLoreAdamW([p], [], 2, 1., 5, lr=.1, betas=BETAS, weight_decay=0.)
    p.grad = torch.zeros(6, 8)
    opt.step()
    assert torch.equal(p.detach(), torch.ones(6, 8))
