"Stages that are functions, learners beside the policy, and batches that only an objective can price"
import types
from dataclasses import dataclass, replace
from functools import partial
import pytest, torch
from torch import nn
from ftlab import methods
from ftlab.adapters.delta import Offset
from ftlab.adapters.store import load_delta
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.select import parts
from ftlab.adapters.subsets.hft import hft
from ftlab.core.data import Data
from ftlab.core.paper import Method
from ftlab.core.recipe import CannotCompose, Learner, Loop, Recipe, Share, Stages, needing, viewed
from ftlab.trainers.objective import nll
from ftlab.trainers.fit import fit
from ftlab.trainers.losses.dft import dft
from ftlab.trainers.rl.spin import spin
from ftlab.trainers.run import load_learners
from ftlab.trainers.step import NotFinite
from ftlab.trainers.yardsticks.optimizers import schedule_free
from test_fit import At, First, stop, tune
from toys import TOK, lab_data, logits, probe, same, toy, weights

# ---------- stages that are functions

def test_what_was_before_lies_where_the_parameter_lies():
    """A parameter minus what it was before must work on every device: shown with 'meta',
    which every machine has"""
    from ftlab.trainers.reference import Placed
    model, seen = (torch.nn.Linear(3, 2, device='meta'),
                   dict(weight=torch.ones(2, 3), bias=torch.ones(2), gone=torch.ones(1)))
    before = Placed(seen, model)
    assert ({n: t.device.type for n, t in before.items()}
            == dict(weight='meta', bias='meta', gone='cpu') and len(before) == 3)
    with pytest.raises(KeyError):
        before['other']

def staged(*stages, name='staged'):
    return Recipe(name, loop=Stages(*stages))

def test_a_stage_function_sees_what_was_done_before_it():
    seen, m = {}, toy()
    was = weights(m)

    def second(ctx):
        seen.update(vars(ctx), now=weights(ctx.model), first={n: ctx.before[n] for n in ctx.before})
        return Recipe('norms', select=parts('norm'))

    run = tune(staged(lora(), second), m, steps=5, lr=1e-2)
    moved = {n for n in was if not torch.equal(was[n], seen['now'][n])}
    # what LoRA did is in the weights; what was before is there too
    assert moved == set(parts()(toy())) and same(seen['first'], was)
    assert (seen['model'] is m and seen['stage'] == 1 and seen['seed'] == 0
            and seen['data'] is run.data and seen['tok'] is TOK)
    (first,) = seen['runs']
    assert (first.recipe.name == 'lora' and [r['step'] for r in first.log] == [0, 1]
            and first.log == run.log[:2] and len(run.log) == 5)
    a = tune(lora(), steps=2, lr=1e-2)
    a.delta.attached.fold()
    b = tune(Recipe('norms', select=parts('norm')), a.model, steps=3, lr=1e-2)
    assert same(weights(b.model), weights(m)) # the same by hand
    with run.disabled():
        assert same(weights(m), was)

def test_reset_puts_everything_back_and_the_last_stage_s_delta_stays_what_it_is(tmp_path):
    def again(ctx):
        change = {n: (ctx.model.get_parameter(n).detach() - ctx.before[n]).abs()
                  for n in parts('q', 'v')(ctx.model)}
        ctx.reset()
        assert same(weights(ctx.model), weights(toy()))
        return Recipe(
            'moved most', select=lambda model, batches=None, seed=0: {
                n: c >= c.flatten().kthvalue(int(.9*c.numel())).values for n, c in change.items()})
    run = tune(staged(Recipe('look'), again), m := toy(), steps=6, lr=1e-2)
    att = run.delta.attached
    assert (set(att.deltas) == set(parts('q', 'v')(toy()))
            and all(type(d).__name__ == 'Entries' for d in att.deltas.values())) # no detour through whole weights
    tuned = logits(m)
    size = run.delta.save(tmp_path/'d')
    assert size < sum(toy().get_parameter(n).numel()*4 for n in att.deltas)
    fresh = toy()
    load_delta(fresh, tmp_path/'d')
    assert torch.equal(logits(fresh), tuned)
    with run.disabled():
        assert torch.equal(logits(m), logits(toy()))
    run.delta.attached.detach()
    assert same(weights(m), weights(toy()))

def offsets():
    return Recipe('offsets', select=parts('q', 'v'), delta=Offset)

def test_a_change_of_activations_can_be_looked_at_and_be_the_last():
    def keep_one(ctx):
        size = {n: float(d.b.detach().norm())
                for n, d in ctx.runs[-1].delta.attached.deltas.items()}
        ctx.reset()
        best = max(size, key=size.get)
        return Recipe('best', select=lambda model, batches=None, seed=0: {best: True}, delta=Offset)
    run = tune(staged(offsets(), keep_one), m := toy(), steps=4, lr=1e-2)
    assert len(run.delta.attached.deltas) == 1 and same(weights(m), weights(toy()))
    with run.disabled():
        assert torch.equal(logits(m), logits(toy()))
    assert not torch.equal(logits(m), logits(toy()))
    for second in (lora(), lambda ctx: lora()):
        with pytest.raises(ValueError, match=r'two, stage 2 of 2.*acts on activations and cannot be folded.*reset'):
            tune(staged(offsets(), second, name='two'), m := toy(), steps=4)
        assert same(weights(m), weights(toy())) and torch.equal(logits(m), logits(toy()))

def test_reference_is_the_model_at_the_start_of_its_stage():
    seen = []
    class Look:
        def before_fit(self, s):
            seen.append((s.models['reference'](
                             **{k: v for k, v in probe().items() if k != 'labels'}).logits.clone(),
                         logits(s.model)))
    tune(staged(
             Recipe('a', objective=nll() + needing(lambda s: 0., 'reference')),
             lambda ctx: Recipe('b', objective=nll() + needing(lambda s: 0., 'reference')),
             lambda ctx: lora()*Recipe('c', objective=nll() + needing(lambda s: 0., 'reference'))),
         steps=6, lr=1e-2, callbacks=(Look(),))
    assert (all(torch.equal(a, b) for a, b in seen) and not torch.equal(seen[0][0], seen[1][0])
            and not torch.equal(seen[1][0], seen[2][0]))

def test_the_source_of_a_stage_may_ask_the_model_as_it_is_then():
    from ftlab.trainers.source import Rows
    seen = []

    def source(state):
        seen.append(logits(state.model))
        return Rows(state.rows, 8)

    tune(staged(Recipe('a'), Recipe('b', source=source)), steps=4, lr=1e-2)
    first = tune(Recipe('a'), steps=2, lr=1e-2)
    assert torch.equal(seen[0], logits(first.model))

def test_a_function_s_share_and_name_count():
    def most(ctx):
        return Recipe('most')

    steps = []
    class Count:
        def before_fit(self, s):
            steps.append(s.steps)
    run = tune(staged(Recipe('a'), Share(most, 3.)), steps=8, callbacks=(Count(),))
    assert steps == [2, 6]
    assert (
        run.recipe.describe()['stages'] == [dict(name='a', lr=3e-4), dict(made_by='most', share=3.)]
        and [s['name'] for s in run.settings['stages']] == ['a', 'most'])

def test_errors_name_the_stage_and_the_model_is_given_back():
    def broken(ctx):
        raise RuntimeError('no such thing')

    def nothing(ctx):
        pass

    def deep(ctx):
        return staged(lora())

    def bad(ctx):
        return Recipe('bad', objective=lambda s: s.forward().sum()*float('nan'))

    def key(ctx):
        raise OSError(2, 'gone')

    for f, error, says in ((broken, RuntimeError, 'staged, stage 2 of 2 .broken.: no such thing'),
                           (nothing, ValueError, 'staged, stage 2 of 2 .nothing.: it returned a NoneType'),
                           (deep, ValueError, 'stages of its own')):
        with pytest.raises(error, match=says):
            tune(staged(Recipe('a'), f), m := toy(), steps=4, lr=1e-2)
        assert (same(weights(m), weights(toy())) and not m.training
                and all(p.requires_grad for p in m.parameters()))
    with pytest.raises(OSError) as e:
        tune(staged(Recipe('a'), key), steps=4)
    assert e.value.errno == 2 and 'stage 2 of 2 (key)' in e.value.__notes__[0]
    with pytest.raises(NotFinite,
                       match=r'staged, stage 2 of 2 \(bad\): the loss is nan at step 0') as e:
        tune(staged(Recipe('a'), bad), m := toy(), steps=4, lr=1e-2)
    assert (len(e.value.run.log) == 2 and e.value.run.model is m
            and not same(weights(m), weights(toy())))
    for stages, says in (((staged(lora()),), 'stage 1 is staged, which has stages'), ((3,), 'stage 1 is int')):
        with pytest.raises(ValueError, match=says):
            Recipe('x', loop=Stages(*stages))

def moved_most(ctx):
    size = {n: float((p.detach() - ctx.before[n]).norm())
            for n, p in ctx.model.named_parameters() if p.ndim == 2}
    ctx.reset()
    best = max(size, key=size.get)
    return Recipe('best', select=lambda model, batches=None, seed=0: {best: True})

@pytest.mark.parametrize('stages',
                         [(lora(), moved_most, Recipe('norms', select=parts('norm'))),
                          (Recipe('a'), moved_most, lora())],
                         ids=['folded', 'a delta in the end'])
@pytest.mark.parametrize('step', [2, 3, 5])
def test_stages_are_resumed_where_they_stopped(stages, step, tmp_path):
    how = dict(steps=6, lr=1e-2, accumulate=2)
    whole = tune(staged(*stages), toy(dropout=.2), **how)
    done = []
    class Stop:
        def after_step(self, s):
            done.append(1)
            if len(done) == step:
                raise KeyboardInterrupt
    class Begin(list):
        def before_fit(self, s):
            self.append((s.settings['stage'], s.step))
    part = tune(staged(*stages), toy(dropout=.2), **how, out=tmp_path, save_every=1,
                callbacks=(Stop(),))
    assert part.interrupted and len(part.log) == step
    begun = Begin()
    again = tune(staged(*stages), toy(dropout=.2), **how, out=tmp_path, save_every=1, resume=True,
                 callbacks=(begun,))
    assert (begun[0] == {2: (0, 1), 3: (1, 0), 5: (1, 2)}[step] and again.log == whole.log
            and same(weights(again.model), weights(whole.model))
            and torch.equal(logits(again.model), logits(whole.model)) and not again.interrupted)
    with again.disabled():
        assert torch.equal(logits(again.model), logits(toy()))
    assert (again.cost['tokens'] == whole.cost['tokens']
            and [s['name'] for s in again.settings['stages']]
            == [s['name'] for s in whole.settings['stages']])
    with pytest.raises(ValueError, match='seed=0, this one has 1'):
        tune(staged(*stages), toy(dropout=.2), **how, out=tmp_path, save_every=1, resume=True,
             seed=1)

def test_a_stage_of_activations_is_done_again(tmp_path):
    def best(ctx):
        size = {n: float(d.b.detach().norm())
                for n, d in ctx.runs[-1].delta.attached.deltas.items()}
        ctx.reset()
        n = max(size, key=size.get)
        return Recipe('best', select=lambda model, batches=None, seed=0: {n: True})

    how = dict(steps=4, lr=1e-2, out=tmp_path, save_every=1)
    done = []
    class Stop:
        def after_step(self, s):
            done.append(1)
            if len(done) == 4:
                raise KeyboardInterrupt
    tune(staged(offsets(), best), **how, callbacks=(Stop(),))
    assert not list(tmp_path.glob('stage*'))
    again = tune(staged(offsets(), best), **how, resume=True)
    whole = tune(staged(offsets(), best), steps=4, lr=1e-2)
    assert again.log == whole.log and same(weights(again.model), weights(whole.model))

# ---------- learners

class Head(nn.Module):
    def __init__(self, n=len(TOK)):
        super().__init__()
        self.l = nn.Linear(n, 1)

    def forward(self, x):
        return self.l(x)[..., 0]

def errs(state): # how surprised the policy is by each answer token, told from its logits
    from ftlab.trainers.objective import loss_mask, token_nll
    on = loss_mask(state.batch['labels'])
    nll = token_nll(state.logits, state.batch['labels'])
    return ((state.models['head'](state.logits[:, :-1]) - nll)[on]**2).sum()/state.count

def watched(**kw):
    return Recipe('watched',
                  loop=Loop(learners={'head': Learner(lambda state: Head(), errs, **kw)}))

@pytest.mark.parametrize('make', [Recipe, lora])
def test_a_learner_learns_and_the_policy_does_not_notice(make):
    run, alone = (tune(make()*watched(lr=1e-2), toy(dropout=.2), steps=20, lr=1e-3),
                  tune(make(), toy(dropout=.2), steps=20, lr=1e-3))
    assert (same(run.delta.attached.parameters(), alone.delta.attached.parameters())
            and [r['nll'] for r in run.log] == [r['nll'] for r in alone.log])
    assert (run.log[-1]['head_loss'] < .5*run.log[0]['head_loss']
            and isinstance(run.models['head'], Head) and not run.models['head'].training)
    assert (run.cost['learners'] == len(TOK) + 1
            and run.cost['trainable'] == alone.cost['trainable']
            and all(p.grad is None for p in run.models['head'].parameters()))

def test_a_learner_is_trained_as_by_hand():
    said = []
    class Keep:
        def after_step(self, s):
            said.append((s.batches[0], s.logits))
    run = tune(watched(lr=1e-2), steps=3, clip=None, schedule='constant', callbacks=(Keep(),))
    seen = {}
    kept = Learner(lambda s: seen.setdefault('m', Head()), lambda s: errs(s)*0)
    tune(Recipe('x', loop=Loop(learners={'head': kept})), steps=1) # the same start
    head = seen['m']
    opt = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.)
    fresh = Learner(lambda s: Head(), errs)
    start = tune(
        Recipe('x', loop=Loop(learners={'head': Learner(fresh.make, lambda s: errs(s)*0.)})),
        steps=1).models['head']
    head.load_state_dict(start.state_dict())
    for b, x in said:
        state = types.SimpleNamespace(batch=b, logits=x, models=dict(head=head),
                                      count=int((b['labels'][:, 1:] != -100).sum()))
        loss = errs(state)
        loss.backward()
        opt.step()
        opt.zero_grad()
        assert not x.requires_grad
    assert (all(torch.allclose(p, q, atol=1e-6) for p, q in zip(head.parameters(), run.models['head'].parameters()))
            and float(loss.detach()) == pytest.approx(run.log[-1]['head_loss'], rel=1e-5))

def test_cutting_a_batch_does_not_change_a_learner():
    a, b = (tune(watched(lr=1e-2), steps=3, accumulate=k) for k in (1, 4))
    assert a.log[0]['head_loss'] == pytest.approx(b.log[0]['head_loss'], rel=1e-5)
    for p, q in zip(a.models['head'].parameters(), b.models['head'].parameters()):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=0)

def test_nothing_flows_back_even_where_the_objective_asks_the_policy():
    def greedy(state): # no no_grad anywhere
        return errs(state) + state.models['head'](
            state.model(input_ids=state.batch['input_ids']).logits).mean()**2
    run = tune(Recipe('x', loop=Loop(learners={'head': Learner(lambda s: Head(), greedy)})),
               steps=4, lr=1e-3)
    assert same(weights(run.model), weights(tune(steps=4, lr=1e-3).model))

def test_a_learner_is_resumed_saved_and_loaded(tmp_path):
    how = dict(steps=6, lr=1e-3, save_every=2)
    whole = tune(watched(), toy(dropout=.2), **how, out=tmp_path/'a')
    tune(watched(), toy(dropout=.2), **how, out=tmp_path/'b', callbacks=(At(5, stop),))
    again = tune(watched(), toy(dropout=.2), **how, out=tmp_path/'b', resume=True)
    assert (again.log == whole.log
            and same(again.models['head'].state_dict(), whole.models['head'].state_dict()))
    size = whole.delta.save(tmp_path/'d')
    assert size > whole.delta.nbytes > tune(None).delta.nbytes
    fresh = toy()
    load_delta(fresh, tmp_path/'d')
    assert torch.equal(logits(fresh), logits(whole.model))
    back = load_learners(tmp_path/'d', watched(), fresh, TOK)['head']
    assert same(back.state_dict(), whole.models['head'].state_dict()) and not back.training
    tune(None).delta.save(tmp_path/'plain')
    with pytest.raises(ValueError, match="holds no learner 'head'; it has none"):
        load_learners(tmp_path/'plain', watched(), fresh, TOK)

def test_a_look_at_a_learner_finds_it_at_rest():
    from ftlab.trainers.callbacks import Every
    modes = []
    class After:
        def after_step(self, s):
            modes.append((s.model.training, s.models['head'].training))
    tune(watched(), steps=2, callbacks=(
             Every(1, lambda s: modes.append((s.model.training, s.models['head'].training)) or {}),
             After()))
    assert modes == [(False, False), (False, False), (True, True), (False, False), (True, True)]

def test_learners_of_stages_are_all_there():
    def second(ctx):
        assert set(ctx.runs[0].models) == {'head'}
        return Recipe(
            'b',
            loop=Loop(learners={'other': Learner(lambda s: Head(),
                                                 lambda s: s.models['other'](s.logits).mean()**2)}))

    run = tune(staged(watched(), second), steps=4)
    assert (set(run.models) == {'head', 'other'} and 'head_loss' in run.log[0]
            and 'other_loss' in run.log[-1] and 'head_loss' not in run.log[-1])

def test_learners_that_cannot_be_are_refused():
    with pytest.raises(CannotCompose, match="both have a learner 'head'"):
        watched()*watched()
    with pytest.raises(ValueError, match="'policy'"):
        Recipe('x', loop=Loop(learners={'policy': Learner(Head, errs)}))
    with pytest.raises(ValueError, match='must map names'):
        Recipe('x', loop=Loop(learners={'head': Head}))
    for make, says in ((lambda s: 3, 'make returned a int'),
                       (lambda s: nn.ReLU(), 'nothing to train'),
                       (lambda s: nn.ModuleList([s.model]), 'parameters of the policy')):
        with pytest.raises(ValueError, match=says):
            tune(Recipe('x', loop=Loop(learners={'head': Learner(make, errs)})), m := toy())
        assert same(weights(m), weights(toy()))
    with pytest.raises(NotFinite, match="'head', after the policy had taken its step: the loss is nan at step 0"):
        tune(Recipe('x',
                    loop=Loop(learners={'head': Learner(lambda s: Head(), lambda s: errs(s)*float('nan'))})))

# ---------- stages times a recipe

def seen_at_first(ctx):
    "A stage that must see what the stage before did"
    assert any(not torch.equal(p, ctx.before[n]) for n, p in ctx.model.named_parameters())
    return Recipe('second')

def test_a_delta_trains_in_every_stage_as_by_hand():
    run = tune(staged(Recipe('first'), Share(seen_at_first, 2.))*lora(r=2), steps=6)
    assert [r['lr'] for r in run.log][:1] == [lora().lr] and len(run.log) == 6
    assert [s['name'] for s in run.settings['stages']] == ['first x lora', 'second x lora']
    a = tune(lora(r=2), steps=2)
    a.delta.attached.fold()
    b = tune(lora(r=2), a.model, steps=4)
    b.delta.attached.fold()
    assert same(weights(run.model), weights(b.model))
    moved = {n for n, p in weights(toy()).items() if not torch.equal(p, weights(run.model)[n])}
    assert moved == set(parts()(toy()))

def test_either_order_composes_and_names_what_it_is():
    two = staged(Recipe('a'), Share(seen_at_first, 2.))
    both = [two*dft(), dft()*two]
    named = lambda r: [s.get('name', s.get('made_by')) for s in r.describe()['stages']]
    assert list(map(named, both)) == [
        ['a x dft', 'seen_at_first x dft'], ['dft x a', 'dft x seen_at_first']]
    assert all(r.shares == (1., 2.) and r.stages[0].objective == dft().objective for r in both)
    runs = [tune(r, steps=6) for r in both]
    assert same(*(weights(r.model) for r in runs))
    by_hand = tune(staged(dft(), Share(dft(), 2.)), steps=6)
    assert same(weights(runs[0].model), weights(by_hand.model))

def test_rates_are_the_stage_s_unless_a_delta_or_a_step_comes():
    whole = Recipe(Method('whole', lr=5e-5, lrs=(5e-5,)), loop=Stages(
        Recipe('bare'), Recipe(Method('own', lr=7e-5)),
        lambda ctx: Recipe(Method('made', lr=8e-5))))
    for product, lrs in ((whole*dft(), (5e-5, 7e-5, 8e-5)), (dft()*whole, (5e-5, 7e-5, 8e-5)),
                         (whole*lora(r=2), (lora().lr,)*3)):
        log = tune(product, steps=3, schedule='constant').log
        assert tuple(r['lr'] for r in log) == lrs
    assert (whole*dft()).lrs == (dft()*whole).lrs == (5e-5,) and (whole*lora()).lrs == lora().lrs
    paced = Recipe('paced', loop=Stages(schedule_free(), schedule_free()))
    for product in (paced*lora(r=2), lora(r=2)*paced): # a schedule goes with its step
        said = [s if isinstance(s, Recipe) else s(None) for s in product.stages]
        assert [s.schedule for s in said] == ['constant']*2
    told = replace(whole, loop=Stages(Recipe(Method('told', arguments=dict(k=1))), dft()))
    for r in (told, told*hft()): # arguments are no rates, and a paper's method has its own
        assert [x['lr'] for x in tune(r, steps=2, schedule='constant').log] == [5e-5, dft().lr]

def test_an_edit_is_of_the_whole_change_and_decoding_of_the_whole_run():
    def halved(changes, model):
        return {n: c/2 for n, c in changes.items()}
    def read(models, tok, prompts):
        return prompts
    plain = staged(Recipe('a'), Recipe('b', select=parts('norm')))
    product = plain*Recipe('c', edit=halved, decode=read)
    assert product.edit == halved and product.decode == read
    assert all(s.edit is None and s.decode is None for s in product.stages)
    run, whole, was = tune(product, lr=1e-2), tune(plain, lr=1e-2), weights(toy())
    for n, p in weights(run.model).items():
        torch.testing.assert_close(p, (was[n] + weights(whole.model)[n])/2, rtol=0, atol=1e-6)
    with run.disabled():
        assert same(weights(run.model), was)

def test_a_clash_names_the_stage():
    plain = staged(lora(), Recipe('b'))
    with pytest.raises(CannotCompose, match="staged x hft, stage 1: lora x hft: both answer 'select'"):
        plain*hft()
    with pytest.raises(CannotCompose, match='both train in stages'):
        plain*plain
    late, m = staged(Recipe('a'), lambda ctx: lora())*hft(), toy()
    with pytest.raises(CannotCompose, match=r"stage 2 of 2 \(<lambda> x hft\): lora x hft: both answer 'select'"):
        tune(late, m)
    assert same(weights(m), weights(toy()))
    with pytest.raises(ValueError, match='it returned a int; a stage function'):
        tune(staged(Recipe('a'), lambda ctx: 3)*dft())

@pytest.mark.parametrize('noun, said', [('objective', 'an objective'), ('step', 'a step'), ('select', 'a select')])
def test_a_clash_asks_for_one_that_does_both(noun, said):
    with pytest.raises(CannotCompose, match=f'or write {said} that does both'):
        Recipe('a', **{noun: print})*Recipe('b', **{noun: len})

def scaled(state, k):
    return k*nll()(state)

def one_scaled(k):
    return staged(Recipe('a', objective=partial(scaled, k=k)), Recipe('b'))

def one_told(k):
    return staged(Recipe(Method('a', arguments=dict(k=k))), Recipe('b'))

@dataclass(frozen=True)
class make:
    k:float
    def __call__(self, context):
        return Recipe('b', objective=partial(scaled, k=self.k))

def one_of_a_class(k):
    return staged(Recipe('a'), Share(make(k), 2.))

def one_made(k):
    return staged(Recipe('a'), lambda ctx: Recipe('b', objective=partial(scaled, k=k)))

@pytest.mark.parametrize('whole', [one_scaled, one_told, one_of_a_class])
@pytest.mark.parametrize('part', [lora, hft])
def test_an_option_of_a_stage_is_in_the_record_of_a_product(whole, part):
    for product in (whole, lambda k: whole(k)*part(), lambda k: part()*whole(k),
                    lambda k: whole(k)*part()*Recipe('c', edit=print)):
        assert product(1).describe() == product(1).describe() != product(2).describe()

class Stop:
    "Stops a run after so many steps of all stages"
    def __init__(self, steps):
        self.left = steps

    def after_step(self, s):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

@pytest.mark.parametrize('whole', [one_scaled, one_told, one_made])
@pytest.mark.parametrize('step', [2, 4, 5]) # in the first stage, and twice in the second
def test_a_product_is_resumed_where_it_stopped(whole, step, tmp_path):
    how = dict(steps=6, lr=1e-2, accumulate=2)
    kept = how | dict(out=tmp_path, save_every=1)
    uncut = tune(whole(2)*lora(), toy(dropout=.2), **how)
    part = tune(whole(2)*lora(), toy(dropout=.2), **kept, callbacks=(Stop(step),))
    assert part.interrupted and len(part.log) == step
    if step == 5 or whole is not one_made: # what a function makes is known in its stage
        with pytest.raises(ValueError, match='recipe='):
            tune(whole(3)*lora(), toy(dropout=.2), **kept, resume=True)
    begun = []
    look = First(lambda s: begun.append((s.settings['stage'], s.step)))
    again = tune(whole(2)*lora(), toy(dropout=.2), **kept, resume=True, callbacks=(look,))
    assert begun[0] == {2: (0, 1), 4: (1, 0), 5: (1, 1)}[step] # a finished first stage is loaded
    assert again.log == uncut.log and same(weights(again.model), weights(uncut.model))
    assert [s['name'] for s in again.settings['stages']] == ['a x lora', 'b x lora']

def test_callbacks_and_learners_of_the_other_run_in_every_stage(tmp_path):
    seen = []
    class Note:
        def after_step(self, s):
            seen.append((s.settings['stage'], s.step, 'head' in s.models))
    noted = Recipe('noted', loop=Loop(callbacks=(Note,)))
    two = staged(Recipe('a'), Share(seen_at_first, 2.))
    plain, how = weights(tune(two, steps=6).model), dict(steps=6, out=tmp_path, save_every=1)
    for product in (two*noted*watched(), watched()*noted*two, (noted*watched())*two):
        seen.clear()
        run = tune(product, steps=6)
        assert seen == [(i, n, True) for i, steps in enumerate((2, 4)) for n in range(1, steps + 1)]
        assert same(weights(run.model), plain) and set(run.models) == {'head'}
        assert all('head_loss' in r for r in run.log)
    tune(two*watched(), **how, callbacks=(Stop(4),))
    again = tune(two*watched(), **how, resume=True)
    assert again.log == run.log and same(weights(again.model), plain)
    assert same(again.models['head'].state_dict(), run.models['head'].state_dict())

def labels_from_ids(batch, state):
    return dict(batch, labels=batch['input_ids'].clone())

def ones(batch, state):
    return dict(batch, input_ids=torch.ones_like(batch['input_ids']))

def test_a_stage_s_view_runs_first_in_either_order():
    first, hidden = Recipe('a', source=viewed(labels_from_ids)), Recipe('c', source=viewed(ones))
    two, seen = staged(first, lambda ctx: first), []
    look = At(1, lambda s: seen.append(s.batches[0]))
    tune(two, callbacks=(look,))
    plain = seen[:]
    for product in (two*hidden, hidden*two, hidden*two*lora()):
        assert product.stages[0].views == (labels_from_ids, ones)
        seen.clear()
        tune(product, callbacks=(look,))
        assert len(seen) == len(plain) == 2 and all((b['input_ids'] == 1).all() for b in seen)
        assert all(torch.equal(a['labels'], b['labels']) for a, b in zip(plain, seen))

def test_a_clash_with_what_a_function_makes_is_found_in_its_stage():
    with pytest.raises(CannotCompose, match="stage 2 of 2 .*both answer 'step'"):
        tune(methods.grafting()*methods.mezo())
    with pytest.raises(CannotCompose, match="stage 1 of 2 .*both answer 'objective'"):
        tune(spin(rounds=2, max_new_tokens=4)*dft())

@pytest.mark.parametrize('after', [True, False])
def test_self_play_goes_on_from_the_pairs_below_a_view(after):
    seen = []
    def counted(batch, state):
        seen.append(state.settings['stage'])
        return batch
    play, view = spin(rounds=2, max_new_tokens=4), Recipe('v', source=viewed(counted))
    run = tune(play*view if after else view*play)
    plain = tune(play)
    assert set(seen) == {0, 1} and run.log == plain.log
    assert same(weights(run.model), weights(plain.model)) and run.source.own == plain.source.own

# ---------- batches that only an objective can price

class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, pixel_values, **_):
        return types.SimpleNamespace(
            sample=self.b(self.a(pixel_values.flatten(1)).relu()).view_as(pixel_values))

def pictures(n=24, **more):
    g = torch.Generator().manual_seed(0)
    row = lambda i: dict(pixel_values=torch.rand(1, 4, 4, generator=g),
                         **{k: f(i) for k, f in more.items()})
    return Data([row(i) for i in range(n)], [row(i) for i in range(4)], [], 'image', name='pictures')

def denoise(state):
    x = state.batch['pixel_values']
    noise = torch.randn_like(x)
    return ((state.model(pixel_values=x + noise).sample - noise)**2).flatten(1).mean(
        1).sum()/state.count

def test_pictures_train_without_tokens_labels_or_a_tokenizer(tmp_path):
    torch.manual_seed(0)
    m = Denoiser()
    how = dict(steps=30, batch_size=8, lr=1e-2, progress=True)
    counts = []
    run = fit(m, None, pictures(), Recipe('denoise', objective=denoise),
              callbacks=(At(1, lambda s: counts.append(s.count)),), **how)
    assert (counts == [8] and run.log[0]['nll'] is None and run.log[-1]['loss'] < run.log[0]['loss']
            and run.cost['tokens'] == 240 and 'loss' in repr(run) and 'nll' not in repr(run))
    torch.manual_seed(0)
    twin = fit(Denoiser(), None, pictures(), Recipe('denoise', objective=denoise), **how)
    assert same(dict(m.named_parameters()), dict(twin.model.named_parameters()))
    run.delta.save(tmp_path/'d')
    torch.manual_seed(0)
    fresh = Denoiser()
    load_delta(fresh, tmp_path/'d')
    assert same(dict(m.named_parameters()), dict(fresh.named_parameters()))
    assert (pictures().fingerprint == run.data.fingerprint != pictures(23).fingerprint
            and 'pixel_values (1, 4, 4)' in repr(pictures()))
    torch.manual_seed(0)
    few = fit(
        Denoiser(), None, pictures(),
        Recipe('denoise', select=lambda m, b=None, seed=0: {'a.weight': True}, objective=denoise),
        **how)
    assert few.cost['trainable'] == 16*32

def test_pictures_with_labels_have_a_likelihood():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(16, 3)

        def forward(self, pixel_values):
            return types.SimpleNamespace(logits=self.l(pixel_values.flatten(1)))
    torch.manual_seed(0)
    m = Classifier()
    run = fit(m, None, pictures(labels=lambda i: i % 3), steps=5, batch_size=6, accumulate=2,
              progress=False)
    assert run.log[0]['nll'] == pytest.approx(run.log[0]['loss'], rel=1e-5)

def test_what_cannot_be_priced_is_refused():
    for data, tok, says in ((pictures(), None, 'cannot compute a loss'), (lab_data(), None, 'needs a tokenizer')):
        with pytest.raises(ValueError, match=says):
            fit(Denoiser() if data is not lab_data() else toy(), tok, data, steps=2, progress=False)
    with pytest.raises(NotFinite, match='the batch holds 8 rows of pixel_values'):
        fit(Denoiser(), None, pictures(), Recipe('x', objective=lambda s: denoise(s)*float('nan')),
            steps=1, batch_size=8, progress=False)
