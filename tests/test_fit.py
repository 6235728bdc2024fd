"The loop: what is logged, that it repeats and resumes, what stops it, and what a run leaves behind"
import math, os, signal, subprocess, sys
from pathlib import Path
import pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
import torch.nn.functional as F
from ftlab import methods
from ftlab.adapters.delta import Offset
from ftlab.adapters.edit import scale
from ftlab.adapters.store import load_delta
from ftlab.core.io import DiskFull
from ftlab.adapters.subsets.hft import hft
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.select import named, parts, top
from ftlab.core.batches import batch_at
from ftlab.core.tokens import encode_all
from ftlab.core.paper import Method
from ftlab.core.recipe import Recipe, Share, Stages
from ftlab.trainers.callbacks import EarlyStop, Every, validation_nll
from ftlab.trainers.fit import fit
from ftlab.trainers.objective import kl_to_base, nll, token_nll
from ftlab.trainers.rl.grpo import advantages, grpo
from ftlab.trainers.losses.dft import dft
from ftlab.trainers.step import Backprop, NotFinite, schedule
from tiny import tiny
from toys import TOK, classifier, lab_data, label_data, logits, probe, same, toy, weights

ROOT = Path(__file__).parents[1]

def tune(recipe=None, model=None, data=None, steps=4, **more):
    return fit(model or toy(), TOK, data or lab_data(), recipe,
               **dict(steps=steps, batch_size=8, progress=False) | more)

def sparse():
    return Recipe('sparse', select=top(torch.abs, .1))

METHODS = dict(full=Recipe, hft=hft, lora=lora, entries=sparse)

class At:
    "Does something after a step"

    def __init__(self, step, do):
        self.step, self.do = step, do

    def after_step(self, state):
        if state.step == self.step:
            self.do(state)

class First:
    "Does something before the first step"

    def __init__(self, do):
        self.do = do

    def before_fit(self, state):
        self.do(state)

class Misspelt:
    def after_stepp(self, state):
        pass

def stop(state):
    raise KeyboardInterrupt

# ---------- the log

def first_nll(model, batch): # written out: the mean over all tokens with a loss of -log p
    p = model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits.softmax(
        -1)
    y = batch['labels']
    prices = [-p[i, t - 1, y[i, t]].log() for i in range(len(y))
              for t in range(1, y.shape[1]) if y[i, t] != -100]
    return torch.stack(prices)

@pytest.mark.parametrize('accumulate', [1, 4])
def test_the_plain_nll_is_logged_whatever_is_minimised(accumulate):
    batch = batch_at(encode_all(lab_data().train, TOK, 'text', 256), 0, 8, TOK.pad_token_id)
    prices = first_nll(toy(), batch).detach()
    p = (-prices).exp()
    plain, dynamic, penalised = (
        tune(r, accumulate=accumulate).log[0]
        for r in (None, dft(), Recipe(objective=nll() + (lambda s: 3./len(s.batches)))))
    assert (plain['nll'] == pytest.approx(float(prices.mean()), abs=1e-5)
            and plain['loss'] == pytest.approx(plain['nll'], abs=1e-6))
    logits = toy()(**{k: batch[k] for k in ('input_ids', 'attention_mask')}).logits
    of_torch = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch['labels'][:, 1:].flatten())
    assert plain['nll'] == pytest.approx(float(of_torch.detach()), abs=1e-5)
    # trl's DFT: -(p.detach() * log p), a mean over all tokens with a loss of the batch
    assert (dynamic['nll'] == pytest.approx(plain['nll'], abs=1e-6)
            and dynamic['loss'] == pytest.approx(float((p*prices).mean()), rel=1e-4)
            and dynamic['loss'] < .1*dynamic['nll'])
    assert (penalised['nll'] == pytest.approx(plain['nll'], abs=1e-6)
            and penalised['loss'] == pytest.approx(plain['nll'] + 3, abs=1e-4))

def test_the_log_has_a_row_for_every_step():
    run = tune(steps=5, schedule='linear', warmup=2, lr=1e-3)
    assert ([r['step'] for r in run.log] == list(range(5))
            and [r['lr'] for r in run.log] == pytest.approx([5e-4, 1e-3, 1e-3, 2e-3/3, 1e-3/3]))
    rows = encode_all(lab_data().train, TOK, 'text', 256)
    sizes = [int(batch_at(rows, s, 8, 0)['attention_mask'].sum()) for s in range(5)]
    assert [r['tokens'] for r in run.log] == [sum(sizes[:i + 1]) for i in range(5)] and run.cost['tokens'] == sum(sizes)
    assert (run.cost['trainable'] == sum(p.numel() for p in toy().parameters())
            and run.cost['head'] == 0 and run.cost['seconds'] > 0)

def test_the_nll_falls():
    run = tune(steps=60, lr=3e-3)
    assert run.log[-1]['nll'] < .5*run.log[0]['nll']

# ---------- settings

def test_a_recipe_s_own_schedule_holds_where_none_is_asked_for():
    steady, falling = Recipe(Method('steady', schedule='constant')), Recipe('falling')
    assert [r['lr'] for r in tune(steady, steps=3, lr=1e-3).log] == [1e-3]*3
    assert tune(steady, steps=3, schedule='linear').settings['schedule'] == 'linear'
    both = tune(Recipe('both', loop=Stages(steady, falling)), steps=6, lr=1e-3)
    assert [r['lr'] for r in both.log] == pytest.approx([1e-3]*3 + [1e-3, 2e-3/3, 1e-3/3])
    assert (steady*Recipe('edited', edit=scale(.5))).schedule == 'constant'

def test_the_schedule_of_two_recipes_is_that_of_the_step():
    low, other = methods.lora(r=2), methods.mezo()
    assert (low*other).schedule == (other*low).schedule == 'constant'
    assert (low*other).lr == low.lr and (low*methods.lisa()).schedule == 'linear'

def test_a_stage_that_says_nothing_but_its_name_has_the_rates_of_the_whole():
    rates = dict(lr=1e-3, lrs=(1e-3,), schedule='constant')
    def second(context):
        return Recipe('second')
    parts = Stages(Recipe('first'), second, Recipe(Method('own', lr=2e-3)))
    run = tune(Recipe(Method('whole', **rates), loop=parts), steps=6, lr=None)
    assert [r['lr'] for r in run.log] == pytest.approx([1e-3]*4 + [2e-3, 1e-3])
    spun = tune(methods.spin(rounds=2, max_new_tokens=2), steps=2, lr=None)
    assert [r['lr'] for r in spun.log] == [methods.spin().lr]*2 != [Method().lr]*2

def test_schedules():
    f = {k: [schedule(k, 10, 2)(s) for s in range(10)] for k in ('linear', 'cosine', 'constant')}
    for v in f.values():
        assert v[:3] == [.5, 1., 1.]
    assert (f['linear'][2:] == pytest.approx([1 - i/8 for i in range(8)])
            and f['cosine'][6] == pytest.approx(.5) and f['constant'][9] == 1)
    with pytest.raises(ValueError, match="'step'; it must be linear, cosine, constant"):
        tune(schedule='step')
    for odd in ('cosin', 5, ['linear']):
        with pytest.raises(ValueError, match='it must be linear, cosine, constant'):
            tune(schedule=odd)
    with pytest.raises(ValueError, match="stage 1 of 2 .*'cosin'; it must be linear"):
        tune(Recipe('two', loop=Stages(Recipe('a'), Recipe('b'))), schedule='cosin')
    run = tune(Recipe('two', loop=Stages(methods.mezo(), Recipe('b'))), steps=4, lr=1e-4,
               schedule='cosine')
    assert [r['lr'] for r in run.log] == pytest.approx([1e-4, 5e-5]*2)

@pytest.mark.parametrize('clip', [.01, None])
def test_clipping_bounds_the_gradient_and_none_does_not(clip):
    told, taken = [], []
    class Seen(Backprop):
        def __call__(self, state, prices):
            real = self.opt.step

            def step():
                taken.append(float(sum(p.grad.square().sum() for p in self.params)**.5))
                real()

            self.opt.step = step
            super().__call__(state, prices)
            self.opt.step = real
            told.append(state.extra['grad_norm'])
            return 0.
    tune(Recipe(step=Seen), clip=clip, steps=3)
    # the norm that is told is the one before clipping
    assert min(told) > .1 and taken == pytest.approx([.01]*3 if clip else told, rel=1e-3)

def test_weight_decay_is_decoupled():
    a, b = (weights(tune(steps=1, lr=1e-3, weight_decay=w).model) for w in (0., .5))
    base = weights(toy())
    for n in a:
        torch.testing.assert_close(b[n], a[n] - 1e-3*.5*base[n], atol=1e-6, rtol=1e-5)

def test_seeds_and_the_caller_s_random_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = tune(lora(dropout=.2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    b, c = tune(lora(dropout=.2)), tune(lora(dropout=.2), seed=1)
    pa, pb, pc = (x.delta.attached.parameters() for x in (a, b, c))
    assert same(pa, pb) and a.log == b.log and not same(pa, pc)
    assert (not a.model.training and all(not m.training for m in a.model.modules())
            and all(p.grad is None for p in a.model.parameters()))

@pytest.mark.parametrize('name', METHODS)
def test_bf16_runs_and_leaves_float32_weights(name):
    run = tune(METHODS[name](), precision='bf16', steps=20, lr=3e-3)
    exact = tune(METHODS[name](), steps=20, lr=3e-3)
    assert (run.log[-1]['nll'] < run.log[0]['nll'] and run.log[0]['nll'] != exact.log[0]['nll']
            and run.log[0]['nll'] == pytest.approx(exact.log[0]['nll'], rel=.02))
    assert all(p.dtype == torch.float32 for p in run.model.parameters())

def test_bf16_rollouts_are_priced_as_they_are_trained():
    # the ratio of the first step is 1 and the KL 0 only if the old prices were taken in the same precision
    recipe = lambda: grpo(group=4, max_new_tokens=4, reward=lambda r, a: len(a)/10)
    assert abs(tune(recipe(), precision='bf16', steps=1).log[0]['loss']) < 1e-6
    assert abs(tune(recipe(), steps=1).log[0]['loss']) < 1e-6

@pytest.mark.parametrize(
    'settings, says',
    [(dict(device='cuda'), 'device.*cuda'),
     (dict(device='cuda:7'), 'device.*cuda:7'),
     (dict(device='gpu'), "device is 'gpu'"),
     (dict(precision='fp8'), 'precision'),
     (dict(precision='fp16'), 'fp16.*bf16|bf16.*fp16'),
     (dict(steps=0), 'steps is 0'),
     (dict(steps=1.5), 'steps is 1.5.*whole'),
     (dict(steps='10'), "steps is '10'"),
     (dict(steps=True), 'steps is True; it must be a whole number of at least 1'),
     (dict(batch_size='8'), "batch_size is '8'; it must be a whole number of at least 1"),
     (dict(batch_size=0), 'batch_size is 0; it must be a whole number of at least 1'),
     (dict(accumulate=2.), 'accumulate is 2.0; it must be a whole number of at least 1'),
     (dict(warmup=-1), 'warmup is -1; it must be a whole number of at least 0'),
     (dict(warmup=.1), 'warmup is 0.1; it must be a whole number'),
     (dict(seed='a'), "seed is 'a'; it must be a whole number"),
     (dict(save_every='2'), "save_every is '2'; it must be a whole number of at least 0"),
     (dict(max_length='9'), "max_length is '9'; it must be a whole number of at least 1"),
     (dict(weight_decay='a'), "weight_decay is 'a'; it must be a number of at least 0"),
     (dict(clip=-1), 'clip is -1; it must be a number of at least 0'),
     (dict(callbacks=3), 'callbacks is 3; it must be a list of objects'),
     (dict(callbacks=[3]), 'callbacks holds 3, which has no method named after an event .*after_step'),
     (dict(callbacks=[First]), 'callbacks holds the class First; it must hold objects of it'),
     (dict(callbacks=[Misspelt()]), "'after_stepp' is no event, did you mean 'after_step'"),
     (dict(lr='abc'), "lr is 'abc'.*1e-3"),
     (dict(betas=.9), r'betas is 0.9; it must be two numbers from 0 to below 1, such as \(.9, .999\)'),
     (dict(betas=(.9, 1.)), r'betas is \(0.9, 1.0\)'),
     (dict(resume='yes', out='x'), "resume is 'yes'; it must be True, False or None"),
     (dict(out=3), 'out is 3; it must be the path of a folder'),
     (dict(lr=math.nan), 'lr is nan'),
     (dict(lr=-1.), 'lr is -1.0'),
     (dict(batch_size=8, accumulate=3), 'batch_size is 8 and accumulate 3'),
     (dict(max_length=4), 'max_length=4'),
     (dict(max_length=0), 'max_length is 0'),
     (dict(resume=True), 'out='),
     (dict(save_every=2), 'out='),
     (dict(recipe=lora(r=99)), 'rank 99'),
     (dict(recipe=Recipe(select=named('nope'))), 'matches nothing'),
     (dict(recipe=grpo(group=3)), 'batch_size is 8 and the group 3'),
     (dict(recipe=grpo(group=4), accumulate=3), 'batch_size is 8 and accumulate 3'),
     (dict(schedule='up'), 'schedule'),
     (dict(recipe=Recipe('two', loop=Stages(hft(), dft())), steps=1), '1 steps are too few for 2 stages')])
def test_impossible_settings_are_refused_and_the_model_is_as_it_was(settings, says):
    if settings.get('device') == 'cuda' and torch.cuda.is_available():
        pytest.skip('there is a GPU here')
    m = toy()
    m.model.norm.weight.requires_grad_(False)
    was = weights(m)
    for recipe in ([settings.pop('recipe')] if 'recipe' in settings else [None, lora()]):
        with pytest.raises(ValueError, match=says):
            tune(recipe, m, **settings)
        assert (same(weights(m), was)
                and [n for n, p in m.named_parameters() if not p.requires_grad]
                == ['model.norm.weight'] and not m.training)
        assert not any('delta' in n or 'parametriz' in n for n, _ in m.named_modules())

def test_what_is_no_model_or_no_recipe_is_named():
    m = toy()
    for recipe, says in (('lora', r"recipe is 'lora'.*ftlab\.methods\.lora\(\)"),
                         (lora, r'recipe is <function lora.*such as lora\(\)')):
        with pytest.raises(TypeError, match=says):
            tune(recipe, m)
    with pytest.raises(TypeError, match="model is 'lab-s'.*ftlab.load"):
        tune(None, 'lab-s')
    with pytest.raises(TypeError, match="tok is 'lab-s'; fit takes a loaded tokenizer"):
        fit(m, 'lab-s', lab_data())
    with pytest.raises(TypeError, match=r'model is a tuple of 2;.*pass \*ftlab.load\(...\), or model, tok'):
        fit((m, TOK), lab_data())
    with pytest.raises(TypeError, match='data is None; fit takes a loaded model, its tokenizer and the data'):
        fit(m, TOK)

def test_a_method_that_is_almost_an_event_is_named_where_others_are_right():
    class Both(Misspelt):
        def after_step(self, state):
            pass
    with pytest.warns(UserWarning, match="'after_stepp' is no event, did you mean 'after_step'"):
        assert len(tune(steps=1, callbacks=(Both(),)).log) == 1

def test_models_that_do_not_fit_the_data_are_refused():
    with pytest.raises(ValueError, match=r'LlamaForCausalLM has no classifier; .*load\(name, labels=data.labels\)'):
        tune(data=label_data())
    with pytest.raises(ValueError, match=r'have 3 labels, the classifier has 4; .*load\(name, labels=data.labels\)'):
        tune(model=classifier(4), data=label_data())
    for m in (classifier(), tiny('bert', vocab_size=len(TOK)),
              tiny('llama', 'none', vocab_size=len(TOK))):
        with pytest.raises(ValueError, match='cannot generate text'):
            tune(model=m)

def test_rows_that_lose_their_answers_are_refused_with_the_length_that_would_do():
    with pytest.raises(ValueError, match=r'max_length=5 leaves no label in any of the 200 rows.* '
                                         r'With max_length=\d+ every row fits'):
        tune(max_length=5)

@pytest.mark.parametrize('name', METHODS)
def test_packed_rows_train_as_padded_ones(name):
    wide = []
    class Wide:
        def before_batch(self, s):
            wide.append(sum(b['input_ids'].numel() for b in s.batches))
    how = dict(lr=1e-3, max_length=128, callbacks=(Wide(),))
    packed, padded = tune(METHODS[name](), packing=True, **how), tune(METHODS[name](), **how)
    for a, b in zip(packed.log, padded.log):
        assert a == pytest.approx(b, rel=1e-4)
    off = (sum((a - b).square().sum()
               for a, b in zip(packed.model.parameters(), padded.model.parameters()))/sum(
               p.numel() for p in padded.model.parameters()))**.5
    assert off < 1e-4*1e-3
    assert (wide[:4] != wide[4:] and len(wide) == 8
            and [r['tokens'] for r in packed.log] == [r['tokens'] for r in padded.log])

def test_packing_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match='grpo has its own source'):
        tune(grpo(group=4), packing=True)
    with pytest.raises(ValueError, match="kind 'label' cannot be packed"):
        tune(None, classifier(), label_data(), packing=True)
    with pytest.raises(NotFinite, match='the batch holds . rows, the first'):
        tune(Recipe(objective=poisoned(0)), packing=True)

# ---------- killed and resumed

SCRIPT = '''
import os, signal, sys, json
sys.path[:0] = [{root!r}, {tests!r}]
import torch; torch.set_num_threads(1)
from test_fit import METHODS, At, tune, toy
from ftlab.trainers.callbacks import Every, validation_nll
def die(state): os.kill(os.getpid(), signal.SIGKILL)
name, out, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
tune(METHODS[name](), toy(dropout=.2), steps=9, lr=1e-3, accumulate=2, out=out, save_every=2,
     callbacks=(At(step, die), Every(3, validation_nll)))
'''

@pytest.mark.parametrize('name, step', [('lora', 5), ('full', 7)])
def test_a_killed_run_goes_on_as_if_nothing_had_been(name, step, tmp_path):
    r = subprocess.run(
        [sys.executable, '-c', SCRIPT.format(root=str(ROOT), tests=str(ROOT/'tests')), name,
         tmp_path/'run', str(step)],
        capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert r.returncode == -signal.SIGKILL, r.stderr
    torch.set_num_threads(1)
    how = dict(steps=9, lr=1e-3, accumulate=2, callbacks=(Every(3, validation_nll),))
    whole = tune(METHODS[name](), toy(dropout=.2), **how)
    seen = []
    again = tune(METHODS[name](), toy(dropout=.2), out=tmp_path/'run', save_every=2, resume=True,
                 **how | dict(callbacks=(*how['callbacks'], First(lambda s: seen.append(s.step)))))
    assert (seen == [(step - 1)//2*2]
            and same(again.delta.attached.parameters(), whole.delta.attached.parameters())
            and again.log == whole.log and again.path == whole.path)
    assert (again.cost['tokens'] == whole.cost['tokens']
            and torch.equal(logits(again.model), logits(whole.model)))
    with again.disabled():
        assert torch.equal(logits(again.model), logits(toy()))

@pytest.mark.parametrize('name', METHODS)
def test_every_step_can_be_resumed_from(name, tmp_path):
    whole = tune(METHODS[name](), toy(dropout=.2), steps=5)
    for k in (1, 3, 5):
        part = (tune(METHODS[name](), toy(dropout=.2), steps=5, out=tmp_path/str(k), save_every=1,
                     callbacks=(At(k, stop),)) if k < 5
                else tune(METHODS[name](), toy(dropout=.2), steps=5, out=tmp_path/str(k),
                          save_every=1))
        # the checkpoint is written after the callbacks: what the interrupt hit is done again
        again = tune(METHODS[name](), toy(dropout=.2), steps=5, out=tmp_path/str(k), save_every=1,
                     resume=True)
        assert (same(again.delta.attached.parameters(), whole.delta.attached.parameters())
                and again.log == whole.log and part.interrupted == (k < 5))

def test_resuming_something_else_is_refused(tmp_path):
    tune(out=tmp_path, save_every=2, lr=1e-3)
    kept = (tmp_path/'checkpoint.safetensors').read_bytes()
    for other, says in (
            (dict(lr=2e-3), 'lr=0.001, this one has 0.002'),
            (dict(lr=1e-3, steps=6), 'steps=4, this one has 6'),
            (dict(lr=1e-3, seed=3), 'seed=0'),
            (dict(lr=1e-3, recipe=dft()), 'recipe'),
            (dict(lr=1e-3, batch_size=16), 'batch_size'),
            (dict(lr=1e-3, model=toy(1)), 'model='),
            (dict(lr=1e-3, data=type(lab_data())(lab_data().train[:50], [], [], 'text')), 'data=')):
        m = other.get('model', toy())
        was = weights(m)
        with pytest.raises(ValueError, match=says):
            tune(**{**other, 'model': m}, out=tmp_path, save_every=2, resume=True)
        assert same(weights(m), was) and (tmp_path/'checkpoint.safetensors').read_bytes() == kept
    assert len(tune(out=tmp_path, save_every=2, lr=1e-3, resume=True).log) == 4
    with pytest.raises(ValueError, match='recipe='):
        tune(Recipe('two', loop=Stages(hft(), dft())), out=tmp_path, save_every=2, lr=1e-3,
             resume=True)

def test_resuming_with_the_trained_model_is_refused(tmp_path):
    # it is not the base any more: its weights would be kept as the originals
    m = toy()
    tune(model=m, out=tmp_path, save_every=2)
    with pytest.raises(ValueError, match='model='):
        tune(model=m, out=tmp_path, save_every=2, resume=True)

# ---------- what stops a run

def poisoned(at, where='loss', micro=None):
    """An objective that is NaN at step `at`; 'gradient': the number is right,
    its gradient is not"""
    calls = []
    def objective(state):
        nll = token_nll(state.forward(), state.batch['labels']).sum()/state.count
        calls.append(state.step)
        first = calls.count(state.step) == 1
        if state.step != at or (micro == 2 and first):
            return nll
        p = next(p for p in state.attached.parameters().values())
        zero = (p.flatten()[0] - p.detach().flatten()[0])
        return nll*math.nan if where == 'loss' else nll + zero.abs().sqrt()*0. if where == 'gradient' else nll*math.inf
    return objective

@pytest.mark.parametrize('where, micro',
                         [('loss', None), ('loss', 2), ('gradient', None), ('inf', None)])
@pytest.mark.parametrize('name', ['full', 'lora'])
def test_what_is_no_number_stops_the_run_before_it_does_harm(name, where, micro, tmp_path):
    r = METHODS[name]()
    bad = Recipe(name, select=r.select, delta=r.delta, objective=poisoned(3, where, micro))
    kept = []
    good = tune(
        r, steps=6, lr=1e-3,
        callbacks=(At(3, lambda s: kept.append(
                          {n: p.detach().clone() for n, p in s.attached.parameters().items()})),))
    m = toy()
    what = 'gradient' if where == 'gradient' else 'loss'
    with pytest.raises(NotFinite,
                       match=f'{what} is (nan|inf) at step 3.*the batch holds 8 rows, the first: .*zigzag') as e:
        tune(bad, m, steps=6, lr=1e-3, accumulate=2 if micro else 1, out=tmp_path, save_every=2)
    run = e.value.run
    now = run.delta.attached.parameters()
    assert run.model is m and run.interrupted and len(run.log) == 3 and not m.training
    if not micro:
        assert same(now, kept[0]) and run.log == good.log[:3]
    assert (all(p.isfinite().all() for p in m.parameters())
            and all(p.grad is None for p in m.parameters()))
    with safe_open(tmp_path/'checkpoint.safetensors', 'pt') as f:
        assert (f.metadata()['step'] == '3'
                and all(torch.equal(f.get_tensor(f'param|{n}'), p) for n, p in now.items()))
    with run.disabled():
        assert torch.equal(logits(m), logits(toy()))
    run.delta.attached.detach()
    assert same(weights(m), weights(toy()))

def test_in_a_later_stage_the_good_state_holds_all_that_was_done():
    with pytest.raises(NotFinite) as e:
        tune(Recipe('two', loop=Stages(lora(), Recipe('bad', objective=poisoned(1)))), m := toy(),
             steps=6)
    run = e.value.run
    assert len(run.log) == 4 and not torch.equal(logits(m), logits(toy()))
    with run.disabled():
        assert torch.equal(logits(m), logits(toy()))

def test_any_other_error_gives_the_model_back():
    def fail(state):
        raise RuntimeError('a callback went wrong')

    for r in (None, lora(), sparse(), Recipe('two', loop=Stages(hft(), lora()))):
        m = toy()
        m.model.norm.weight.requires_grad_(False)
        was = weights(m)
        calls = []
        class Late:
            def after_step(self, state):
                calls.append(1)
                if len(calls) == 4:
                    fail(state)
        with pytest.raises(RuntimeError, match='a callback went wrong'):
            tune(r, m, steps=5, callbacks=(Late(),))
        assert (same(weights(m), was)
                and [n for n, p in m.named_parameters() if not p.requires_grad]
                == ['model.norm.weight'] and not m.training)
        tune(r, m, steps=4)

@pytest.mark.parametrize('name', METHODS)
def test_an_interrupt_returns_the_run_so_far(name, tmp_path):
    part, whole = (tune(METHODS[name](), steps=6, callbacks=(At(3, stop),), out=tmp_path/'run'),
                   tune(METHODS[name](), steps=6))
    assert (part.interrupted and not whole.interrupted and part.log == whole.log[:3]
            and not part.model.training and 'interrupted' in repr(part))
    tuned = logits(part.model)
    part.delta.save(tmp_path/'d')
    fresh = toy()
    load_delta(fresh, tmp_path/'d')
    assert torch.equal(logits(fresh), tuned)
    with part.disabled():
        assert torch.equal(logits(part.model), logits(toy()))

def test_callbacks_refuse_numbers_below_one():
    for bad in (dict(n=0), dict(n=1.5), dict(patience=0), dict(rows=0), dict(rows=True)):
        (name, value), = bad.items()
        with pytest.raises(ValueError, match=f'{name} is {value}; it must be a whole number of at least 1'):
            EarlyStop(**bad)
    with pytest.raises(ValueError, match='n is 0'):
        Every(0, validation_nll)
    assert Every({3}, validation_nll).n == {3}

def test_early_stop_stops_and_starts_afresh(tmp_path):
    look = EarlyStop(2, patience=2, rows=20)
    for _ in range(2): # one object, two runs: nothing is carried over
        run = tune(steps=40, lr=1e-9, callbacks=(look,))
        seen = [r['validation_nll'] for r in run.path]
        assert (4 <= len(run.log) < 40 and len(seen) - 1 - seen.index(min(seen)) == 2
                and [r['step'] for r in run.path] == list(range(0, len(run.log) + 1, 2)))
    assert len(tune(steps=12, lr=3e-3, callbacks=(EarlyStop(2, patience=2, rows=20),)).log) == 12
    # interrupted between two looks and resumed, it stops at the same step
    how = dict(steps=40, lr=1e-9, out=tmp_path, save_every=1)
    tune(callbacks=(EarlyStop(2, 2, 20), At(3, stop)), **how)
    assert len(tune(callbacks=(EarlyStop(2, 2, 20),), resume=True, **how).log) == len(run.log)

# ---------- what a run leaves behind

LOAD = '''
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from safetensors.torch import load_file, save_file
kind = AutoModelForSequenceClassification if sys.argv[1] == 'label' else AutoModelForCausalLM
for folder in sys.argv[3:]:
    m, info = kind.from_pretrained(folder, output_loading_info=True)
    tok = AutoTokenizer.from_pretrained(folder)
    b = load_file(sys.argv[2])
    assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys'], info
    with torch.no_grad(): save_file(dict(logits=m.eval()(**b).logits), folder + '/out.safetensors')
assert 'ftlab' not in sys.modules and tok('sort a b').input_ids
'''

def reloaded(folders, kind, batch, tmp):
    "The logits that plain transformers gets from each folder, in a process of its own"
    save_file({k: v for k, v in batch.items() if k != 'labels'}, tmp/'batch.safetensors')
    r = subprocess.run([sys.executable, '-c', LOAD, kind, tmp/'batch.safetensors', *folders],
                       capture_output=True, text=True, cwd=tmp,
                       env=os.environ | dict(HF_HUB_OFFLINE='1', PYTHONPATH=''))
    assert r.returncode == 0, r.stderr
    return [load_file(f/'out.safetensors')['logits'] for f in folders]

def test_an_exported_folder_loads_without_ftlab(tmp_path):
    runs = {n: tune(make(), lr=1e-2) for n, make in METHODS.items()} | {
        'untied lora': tune(lora(), toy(tied=False), lr=1e-2),
        'stages': tune(Recipe('two', loop=Stages(lora(), sparse())), lr=1e-2)}
    folders = []
    for n, run in runs.items():
        before = logits(run.model)
        folders.append(run.export(tmp_path/n.replace(' ', '-')))
        assert torch.equal(logits(run.model), before) # the model itself stays as it was
        with run.disabled():
            assert not torch.equal(logits(run.model), before)
    for (n, run), got in zip(runs.items(), reloaded(folders, 'causal', probe(), tmp_path)):
        torch.testing.assert_close(got, logits(run.model), atol=1e-5, rtol=0, msg=n)
    assert not list(tmp_path.glob('*.tmp'))
    with pytest.raises(FileExistsError, match='is not empty'):
        runs['full'].export(tmp_path/'lora')
    (tmp_path/'file').write_text('old')
    for form in ('plain', 'peft'):
        with pytest.raises(FileExistsError, match="file' exists and is a file; name another path"):
            runs['full'].export(tmp_path/'file', form=form)
    assert (tmp_path/'file').read_text() == 'old'
    with pytest.raises(ValueError, match='acts on activations'):
        tune(Recipe('offset', select=parts(), delta=Offset)).export(tmp_path/'offset')

@pytest.mark.parametrize('name', METHODS)
def test_a_classifier_s_head_is_trained_saved_and_counted_apart(name, tmp_path):
    run = tune(METHODS[name](), m := classifier(), label_data(), steps=10, lr=1e-2)
    head = 32*3 + 3
    base = weights(classifier())
    tuned = logits(m, batch := {k: v for k, v in probe().items() if k != 'labels'})
    assert (run.cost['head'] == head and run.cost['trainable']
            == sum(p.numel() for p in run.delta.attached.parameters().values()) - head)
    if name == 'full':
        assert run.cost['trainable'] == sum(p.numel() for p in classifier().parameters()) - head
    now = weights(m)
    assert (not torch.equal(now['classifier.weight'], base['classifier.weight'])
            and not torch.equal(now['classifier.bias'], base['classifier.bias']))
    run.delta.save(tmp_path/'d')
    fresh = classifier()
    load_delta(fresh, tmp_path/'d')
    assert (torch.equal(logits(fresh, batch), tuned)
            and torch.equal(fresh.classifier.weight, m.classifier.weight))
    with run.disabled():
        assert torch.equal(logits(m, batch), logits(classifier(), batch))
    if name in ('full', 'lora'):
        got, = reloaded([run.export(tmp_path/'folder')], 'label', batch, tmp_path)
        torch.testing.assert_close(got, tuned, atol=1e-5, rtol=0)

def test_the_nll_of_labels_is_the_cross_entropy():
    d = label_data()
    batch = batch_at(encode_all(d.train, TOK, 'label', 64), 0, 8, 0)
    run = tune(None, m := classifier(), d, steps=1)
    assert run.log[0]['nll'] == pytest.approx(
        float(F.cross_entropy(logits(classifier(), batch), batch['labels'])), abs=1e-5)

def test_stages_give_one_change():
    one, two = lora(), Recipe('norms', select=parts('norm'))
    m = toy()
    was = weights(m)
    run = tune(Recipe('two', loop=Stages(one, two)), m, steps=5, lr=1e-3)
    now = weights(m)
    moved = {n for n in was if not torch.equal(was[n], now[n])}
    assert moved == set(parts()(toy())) | set(parts('norm')(toy())) == set(run.delta.tensors())
    assert all(torch.equal(now[n] - was[n], c) for n, c in run.delta.tensors().items())
    assert ([r['step'] for r in run.log] == list(range(5))
            and run.cost['tokens'] == run.log[-1]['tokens']
            and [r['tokens'] for r in run.log] == sorted(r['tokens'] for r in run.log))
    a = tune(one, steps=2, lr=1e-3)
    a.delta.attached.fold()
    b = tune(two, a.model, steps=3, lr=1e-3)
    assert same(weights(b.model), now) # the same by hand
    run.delta.attached.detach()
    assert same(weights(m), was)

def test_stages_share_the_steps():
    r = lambda *shares: Recipe(
        's', loop=Stages(*(Share(Recipe(f's{i}'), s) for i, s in enumerate(shares))))
    for shares, steps in (((1., 1.), 5), ((1., 1., 1.), 10), ((3., 1.), 9)):
        log = []
        class Count:
            def before_fit(self, s):
                log.append(s.steps)
        run = tune(r(*shares), steps=steps, callbacks=(Count(),))
        assert (sum(log) == len(run.log) == steps
                and all(abs(n - steps*s/sum(shares)) <= 1 for n, s in zip(log, shares)))

def test_a_user_s_frozen_parameter_is_as_it_was_after_detach():
    for make in METHODS.values():
        m = toy()
        m.model.embed_tokens.weight.requires_grad_(False)
        was = weights(m)
        run = tune(make(), m)
        run.delta.attached.detach()
        assert ([n for n, p in m.named_parameters() if not p.requires_grad]
                == ['model.embed_tokens.weight'] and same(weights(m), was))

def test_several_fits_one_after_the_other():
    m = toy()
    a = tune(None, m)
    b = tune(hft(), m, seed=1)
    tuned = logits(m)
    with b.disabled():
        assert torch.equal(logits(m), logits(tune().model)) # the second run's base is the first run's result
    c = tune(lora(), m)
    held = logits(m)
    for second in (None, lora()):
        with pytest.raises(ValueError, match='has a change already.*fold'):
            tune(second, m)
    assert torch.equal(logits(m), held)
    c.delta.attached.detach()
    assert torch.equal(logits(m), tuned)

# ---------- penalties and policies

def test_a_penalty_to_the_base_starts_at_nothing_and_composes_with_a_policy():
    r = Recipe('kl', objective=nll() + kl_to_base(1.))
    for recipe in (r, lora()*r):
        log = tune(recipe, toy(dropout=.0), steps=8, lr=1e-2).log
        assert (abs(log[0]['loss'] - log[0]['nll']) < 1e-6
                and log[-1]['loss'] > log[-1]['nll'] + 1e-4)
    assert len(tune(grpo(group=4, max_new_tokens=3)*r, steps=2).log) == 2

def test_the_reference_has_no_dropout():
    r = Recipe('kl', objective=nll() + kl_to_base(1.))
    seen = []
    class Look:
        def before_fit(self, s):
            b = {k: v for k, v in probe().items() if k != 'labels'}
            seen.append((s.models['reference'](**b).logits, s.model.training))
    for recipe in (r, lora()*r):
        tune(recipe, toy(dropout=.5), steps=1, callbacks=(Look(),))
    for ref, training in seen:
        assert training and torch.equal(ref, logits(toy()))

def test_advantages_by_hand():
    a = advantages(torch.tensor([[1., 0., 0., 1.], [2., 2., 2., 2.], [0., 0., 0., 4.]]))
    s = (1/3)**.5
    torch.testing.assert_close(
        a, torch.tensor([[.5/s, -.5/s, -.5/s, .5/s], [0.]*4, [-.5, -.5, -.5, 1.5]]), atol=1e-3,
        rtol=0)
    assert a.sum(1).abs().max() < 1e-5

# ---------- trackers

def tracker(fails=None, files=False):
    "A tracker of accelerate's kind that keeps what it is told"
    from accelerate.tracking import GeneralTracker
    class Kept(GeneralTracker):
        name, requires_logging_directory, tracker = 'kept', files, None

        def __init__(self):
            super().__init__()
            self.config, self.rows, self.finished = None, [], 0

        def store_init_configuration(self, values):
            self.config = values

        def log(self, values, step=None, **kw):
            if step == fails:
                raise ConnectionError('the line is dead')
            self.rows.append((step, values))

        def finish(self):
            self.finished += 1
    return Kept()

@pytest.mark.parametrize(
    'recipe',
    [Recipe, lambda: Recipe('two', loop=Stages(lora(), Recipe('norms', select=parts('norm'))))])
def test_a_tracker_gets_every_row_and_the_settings_and_is_finished(recipe):
    kept = tracker()
    run = tune(recipe(), steps=5, trackers=(kept,))
    assert kept.finished == 1
    assert ([s for s, _ in kept.rows] == list(range(5))
            and all(v == pytest.approx({k: r[k] for k in v})
                    for (_, v), r in zip(kept.rows, run.log))
            and {'loss', 'nll', 'lr', 'tokens'} == kept.rows[0][1].keys())
    assert (kept.config['steps'] == 5 and kept.config['recipe.name'] == recipe().name
            and all(isinstance(v, (str, int, float, bool, type(None)))
                    for v in kept.config.values()))
    assert ([r['loss'] for r in tune(recipe(), steps=5, trackers=kept).log]
            == [r['loss'] for r in run.log] and kept.finished == 2) # one alone, and again

def test_a_tracker_is_finished_whatever_happens_and_its_failure_costs_nothing():
    kept = tracker()
    with pytest.raises(NotFinite):
        tune(Recipe('bad', objective=poisoned(2)), trackers=(kept,))
    assert kept.finished == 1 and len(kept.rows) == 2
    ill = tracker(fails=1)
    with pytest.warns(UserWarning,
                      match="tracker 'kept' failed at step 1 and gets no more rows: ConnectionError: the line is dead"):
        run = tune(trackers=(ill,))
    assert (len(run.log) == 4 and len(ill.rows) == 1
            and same(weights(run.model), weights(tune().model)))

def test_trackers_that_are_not_there_are_refused(tmp_path):
    for t, says in (('nosuch', "no tracker 'nosuch'"), (tracker(files=True), "'kept' writes files; give out=")):
        with pytest.raises(ValueError, match=says):
            tune(trackers=(t,))
    kept = tracker(files=True)
    tune(trackers=(kept,), out=tmp_path)
    assert len(kept.rows) == 4

# ---------- a disk that fills

def full_after(n, code=28):
    "A `save_file` for which the disk is full from its n-th call on, after it has written half"
    import ftlab.core.io as files
    real, calls = files.save_file, []
    def save(tensors, path, metadata=None):
        calls.append(str(path))
        real(tensors, path, metadata)
        if len(calls) > n:
            b = Path(path).read_bytes()
            Path(path).write_bytes(b[:len(b)//2])
            raise OSError(code, os.strerror(code))
    return save

def test_a_checkpoint_without_room_is_a_warning_and_costs_nothing(tmp_path, monkeypatch):
    whole = tune(steps=6)
    monkeypatch.setattr('ftlab.core.io.save_file', full_after(2)) # the originals and the first checkpoint fit
    with pytest.warns(UserWarning,
                      match=r"step 4 could not be saved, and the run goes on: "
                            r"there was no room to write '.*checkpoint.safetensors': "
                            r"it needs [\d,]+ bytes, and [\d,]+ bytes are free there.*Make room"):
        run = tune(steps=6, out=tmp_path, save_every=2)
    assert (run.log == whole.log and same(weights(run.model), weights(whole.model))
            and sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint.safetensors', 'originals.safetensors'])
    with safe_open(tmp_path/'checkpoint.safetensors', 'pt') as f:
        assert f.metadata()['step'] == '2'
    monkeypatch.undo()
    assert tune(steps=6, out=tmp_path, save_every=2, resume=True).log == whole.log

@pytest.mark.parametrize('code', [28, 122, 27])
def test_a_change_without_room_keeps_the_old_file_and_can_be_saved_elsewhere(
    code, tmp_path, monkeypatch):
    run, path = tune(lora(), lr=1e-2), tmp_path/'d.safetensors'
    path.write_bytes(b'old')
    size = run.delta.nbytes
    monkeypatch.setattr('ftlab.core.io.save_file', full_after(0, code))
    with pytest.raises(DiskFull, match=f'd.safetensors.: it needs {size:,} bytes') as e:
        run.delta.save(path)
    assert (e.value.errno == code and isinstance(e.value, OSError)
            and ('quota' in str(e.value)) == (code != 28) and path.read_bytes() == b'old'
            and [p.name for p in tmp_path.iterdir()] == ['d.safetensors'])
    monkeypatch.undo()
    run.delta.save(path)
    fresh = toy()
    load_delta(fresh, path)
    assert torch.equal(logits(fresh), logits(run.model))

def test_without_room_for_the_originals_nothing_begins(tmp_path, monkeypatch):
    monkeypatch.setattr('ftlab.core.io.save_file', full_after(0))
    m = toy()
    with pytest.raises(DiskFull, match='originals.safetensors'):
        tune(model=m, out=tmp_path)
    assert same(weights(m), weights(toy())) and not list(tmp_path.iterdir())

def test_an_export_without_room_leaves_nothing(tmp_path, monkeypatch):
    run = tune(lora())
    real = type(run.model).save_pretrained

    def full(self, folder, **kw):
        real(self, folder, **kw)
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(type(run.model), 'save_pretrained', full)
    with pytest.raises(DiskFull, match=r"no room to write '.*there': it needs [\d,]+ bytes"):
        run.export(tmp_path/'there')
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert run.export(tmp_path/'there').is_dir()

def test_other_errors_of_the_disk_stay_what_they_are(tmp_path, monkeypatch):
    run = tune(lora())
    (tmp_path/'file').write_text('x')
    with pytest.raises(OSError) as e:
        run.delta.save(tmp_path/'file'/'d')
    assert not isinstance(e.value, DiskFull)

LIMITED = '''
import resource, sys, warnings
sys.path[:0] = [{root!r}, {tests!r}]
import torch; torch.set_num_threads(1)
from test_fit import *
out = Path(sys.argv[1]); run = tune(lora(), lr=1e-2); run.delta.save(out/'d'); old = (out/'d').read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for save in (lambda: run.delta.save(out/'d'), lambda: run.export(out/'folder')):
    try: save()
    except DiskFull as e: assert e.errno == 27 and 'limit on file sizes' in str(e), str(e)
    else: raise AssertionError('it was written')
assert (out/'d').read_bytes() == old and [p.name for p in out.iterdir()] == ['d'], list(out.iterdir())
'''

@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no such limit')
def test_a_real_limit_on_the_size_of_files(tmp_path):
    r = subprocess.run(
        [sys.executable, '-c', LIMITED.format(root=str(ROOT), tests=str(ROOT/'tests')), tmp_path],
        capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert r.returncode == 0, r.stderr

def test_an_encoder_decoder_is_refused_by_name():
    from tiny import tiny
    with pytest.raises(ValueError, match='T5.*is an encoder-decoder model'):
        fit(tiny('t5'), TOK, lab_data(), steps=1, progress=False)

# ---------- the same call after a crash

def test_a_run_that_was_cut_off_is_offered_and_not_replaced(tmp_path):
    whole = tune(steps=6)
    part = tune(steps=6, out=tmp_path, save_every=2, callbacks=(At(5, stop),))
    assert part.interrupted
    kept = (tmp_path/'checkpoint.safetensors').read_bytes()
    with pytest.raises(ValueError, match='holds this run, cut off at step 4 of 6; '
                                         'resume=True .*continues it, resume=False .*starts over'):
        tune(steps=6, out=tmp_path, save_every=2)
    assert (tmp_path/'checkpoint.safetensors').read_bytes() == kept
    assert tune(steps=6, out=tmp_path, save_every=2, resume=True).log == whole.log
    assert len(tune(steps=6, out=tmp_path, save_every=2).log) == 6 # a finished one may be run again
    tune(steps=6, out=tmp_path, save_every=2, resume=False, callbacks=(At(5, stop),))
    assert len(tune(steps=6, out=tmp_path, save_every=2, resume=False).log) == 6

def test_another_run_in_the_place_of_one_that_was_cut_off_is_told(tmp_path):
    tune(steps=6, out=tmp_path, save_every=2, callbacks=(At(5, stop),))
    with pytest.warns(UserWarning, match='holds another run, cut off at step 4 of 6 .its lr is '
                                         '.*this one starts over and replaces it'):
        tune(steps=6, lr=1e-3, out=tmp_path, save_every=2)
    two = Recipe('two', loop=Stages(hft(), dft()))
    tune(two, steps=6, out=tmp_path/'s', save_every=1, callbacks=(At(2, stop),))
    with pytest.raises(ValueError, match='holds this run, cut off in stage 1 at step 1 of 3'):
        tune(two, steps=6, out=tmp_path/'s', save_every=1)
