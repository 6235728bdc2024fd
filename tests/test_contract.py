"Every method keeps the promises that it makes; and each check notices a method that breaks its promise"
import dataclasses, importlib, inspect, random
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
import ftlab
import pytest, torch
from transformers import AutoModelForCausalLM
from ftlab import methods
from ftlab.adapters.store import load_delta
from ftlab.adapters.edit import scale
from ftlab.adapters.subsets.hft import half
from ftlab.adapters.lowrank import LoRA
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.select import everything, parts, top
from ftlab.core.generate import generate
from ftlab.core.paper import ASKED_ON
from ftlab.core.recipe import PROMISES, Learner, Loop, Recipe, Share, Stages
from ftlab.evaluators.decoding.eft import eft
from ftlab.trainers.fit import fit
from ftlab.trainers.objective import token_nll, loss_mask
from ftlab.trainers.losses.dft import dft
from toys import TOK, lab_data, logits, same, toy, weights

PACKAGE = Path(ftlab.__file__).parent

def made(name):
    """A method with its toy arguments: those in place of defaults that would be slow,
    empty or impossible on a toy"""
    make = methods.make_of(name)
    return make(**make.paper.toy_arguments() if hasattr(make, 'paper') else {})

def looking_back(ctx):
    "Put all back and let the matrix move that moved most"
    moved = {n: float((p.detach() - ctx.before[n]).norm())
             for n, p in ctx.model.named_parameters() if p.ndim == 2}
    ctx.reset()
    return Recipe('the one that moved most',
                  select=lambda model, batches=None, seed=0: {max(moved, key=moved.get): True})

RECIPES = {n: partial(made, n) for n in methods.names()} | {
    'hft * dft': lambda: methods.get('hft * dft'), 'lora * dft': lambda: methods.get('lora * dft'),
    'hft * dft, scaled': lambda: dataclasses.replace(methods.get('hft * dft'), edit=scale(.5)),
    'lora, scaled': lambda: dataclasses.replace(lora(), edit=scale(.5)),
    'lora with dropout': lambda: lora(dropout=.3), 'lora * grpo': lambda: lora()*made('grpo'),
    'sparse': lambda: Recipe('sparse', select=top(torch.abs, .1)),
    'two stages': lambda: Recipe('two stages', loop=Stages(lora(), Recipe('norms', select=parts('norm')))),
    'three stages': lambda: Recipe(
        'three stages', loop=Stages(Share(Recipe('half', select=half(.5)), 2.), dft(), lora(r=2))),
    'stages, each by lora': lambda: Recipe(
        'two', loop=Stages(Recipe('first'), Share(lambda ctx: Recipe('second'), 2.)))*lora(r=2),
    'a stage that looks back': lambda: Recipe('a stage that looks back',
                                              loop=Stages(Recipe('first'), looking_back)),
    'watched': lambda: Recipe(
        'watched', loop=Loop(
            learners={'watcher': Learner(lambda state: torch.nn.Linear(len(TOK), 1,
                                                                       dtype=state.model.dtype),
                                         lambda state: state.models['watcher'](
                                             state.logits).square().mean()/len(state.batches))}))}

PACKAGES = {'adam8bit': 'bitsandbytes'} # method -> the optional package that it trains with

SETTINGS = dict(batch_size=8, weight_decay=.1, progress=False)

@lru_cache
def few_rows():
    "As many rows as the steps here use"
    whole = lab_data()
    return dataclasses.replace(whole, train=whole.train[:48], validation=whole.validation[:8])

def tune(recipe, steps=5, seed=0, model=None, **more):
    return fit(model or toy(), TOK, few_rows(), recipe, steps=steps, seed=seed, **SETTINGS | more)

class AtFirst:
    "Notes the outputs before the first step"
    def before_fit(self, state):
        if not hasattr(self, 'logits'):
            state.model.eval()
            self.logits = logits(state.model)
            state.model.train()

def selecting(recipe, free):
    """`recipe`, but whatever a stage may move is marked in `free` when its turn comes:
    a stage may be a function, and may choose by what the weights are then"""
    def note(r, model):
        for n, m in (r.select or everything)(model, None, 0).items():
            free[n] |= m
        return r
    if not recipe.stages:
        note(recipe, toy())
        return recipe
    def listening(s):
        def stage(ctx):
            return note(s if isinstance(s, Recipe) else s(ctx), ctx.model)

        return stage
    return dataclasses.replace(
        recipe,
        loop=Stages(*(Share(listening(s), x) for s, x in zip(recipe.stages, recipe.shares))))

def parameters(run) -> dict:
    return {n: p.detach().clone() for n, p in run.model.named_parameters()}

class Tuned:
    """A recipe's runs on a toy, each made once, when the first promise is read from it:
    one that stays as it is, the same once more that is folded in the end, one with another seed"""
    def __init__(self, recipe):
        self.recipe, self.at_first = recipe, AtFirst()

    @cached_property
    def run(self):
        return tune(self.recipe, lr=1e-2, callbacks=(self.at_first,))

    @cached_property
    def repeated(self):
        free = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in toy().named_parameters()}
        run = tune(selecting(self.recipe, free), lr=1e-2)
        return SimpleNamespace(run=run, free=free, parameters=parameters(run),
                               logits=logits(run.model), weights=weights(run.model))

    @cached_property
    def folded(self):
        model = self.repeated.run.model
        self.repeated.run.delta.attached.fold()
        return SimpleNamespace(weights=weights(model), logits=logits(model),
                               names={n for n, _ in model.named_parameters()})

    @cached_property
    def other(self):
        return tune(self.recipe, seed=1, lr=1e-2)

# ---------- one check for each promise; AssertionError where it is broken

def starts_as_the_base(it, tmp):
    assert it.run and torch.equal(it.at_first.logits, logits(toy()))

def frozen_stays(it, tmp):
    base, attached = toy(), it.repeated.run.delta.attached
    was = weights(base)
    if attached.deltas:
        assert same(it.repeated.weights, was), 'a weight under a delta was written to'
    if any(d.site != 'weight' for d in attached.deltas.values()):
        assert not torch.equal(it.repeated.logits, logits(base))
        return # nothing to fold: no weight moves at all
    now, free = it.folded.weights, it.repeated.free
    assert now.keys() == was.keys()
    for n in was:
        assert torch.equal(now[n][~free[n]], was[n][~free[n]]), n
    assert any((now[n] != was[n]).any() for n in was), 'nothing moved, so nothing was shown'

def off_is_the_base(it, tmp):
    base, tuned = logits(toy()), logits(it.run.model)
    with it.run.disabled():
        assert torch.equal(logits(it.run.model), base)
    assert torch.equal(logits(it.run.model), tuned) and not torch.equal(tuned, base)

def folds(it, tmp):
    tuned = it.repeated.logits
    assert set(it.folded.weights) == it.folded.names, 'modules are left on the model'
    assert (tuned - logits(toy())).abs().max() > 1e-2, 'the change is too small to show a wrong fold'
    torch.testing.assert_close(it.folded.logits, tuned, atol=1e-5, rtol=0)

def saves(it, tmp, classes=None):
    tuned = logits(it.run.model)
    it.run.delta.save(tmp/'delta.safetensors')
    fresh = toy()
    load_delta(fresh, tmp/'delta.safetensors', classes)
    assert torch.equal(logits(fresh), tuned)

def repeats(it, tmp):
    assert it.run.log == it.repeated.run.log
    first = parameters(it.run)
    assert same(first, it.repeated.parameters) and not same(first, parameters(it.other))

class Gradients:
    "Keeps the gradient of the first step"
    first = None
    def after_backward(self, state):
        if self.first is None:
            self.first = torch.cat(
                [p.grad.flatten().clone()
                 for p in state.attached.parameters().values() if p.grad is not None])

def accumulates(it, tmp):
    # AdamW and clipping hide a gradient twice too long, so the gradient itself is compared, before both. Measured here:
    # the right ones differ by at most 2e-7 of their length, those of a mean taken in each half by 1 (twice as long).
    looks = Gradients(), Gradients()
    n = 3*max(1, len(it.recipe.stages))
    # in double precision, because AdamW makes a whole step of a gradient that is nothing but rounding
    a, b = (tune(it.recipe, steps=n, model=toy().double(), accumulate=k, callbacks=(g,))
            for k, g in zip((1, 2), looks))
    g, h = looks[0].first, looks[1].first
    assert g.norm() > 0 and (g - h).norm() < 1e-5*g.norm()
    assert (abs(a.log[0]['nll'] - b.log[0]['nll']) < 1e-5
            and abs(a.log[0]['loss'] - b.log[0]['loss']) < 1e-5)
    # The root mean square, in units of the learning rate: 0.25 for means of halves
    x, y = ({n: p.detach() for n, p in m.model.named_parameters()} for m in (a, b))
    off = (sum((x[n] - y[n]).square().sum() for n in x)/sum(p.numel() for p in x.values()))**.5
    assert off < 1e-4*a.settings['lr']

CHECKS = {'starts as the base': starts_as_the_base, 'frozen stays': frozen_stays,
          'off is the base': off_is_the_base, 'folds': folds, 'saves': saves, 'repeats': repeats,
          'accumulates': accumulates}

# ---------- the contract

def test_every_promise_has_a_check_and_every_method_is_found():
    assert CHECKS.keys() == PROMISES.keys()
    assert ({'full', 'hft', 'lora', 'dft', 'grpo', 'eft'} <= set(methods.names())
            and set(methods.names()) <= set(RECIPES))
    for n in methods.names(): # every method can be called with no argument, and is named after its function
        assert (all(p.default is not p.empty
                    for p in inspect.signature(getattr(methods, n)).parameters.values())
                and getattr(methods, n)().name == n)

def test_marks_found_in_the_text_of_files_are_those_of_the_modules():
    """Nothing is imported to find them, so a mark written in another way would be passed over in
    silence"""
    at_home = {}
    for key, file in methods.paper_modules().items():
        module = importlib.import_module('.'.join(('ftlab', *file.parts[-3:-1], key)))
        at_home[key] = [f for f in vars(module).values()
                        if inspect.isfunction(f) and f.__module__.rpartition('.')[2] == key]

    def marked(kind):
        is_kind = lambda f: getattr(getattr(f, 'paper', None), 'kind', '') == kind
        return {key: list(filter(is_kind, there)) for key, there in at_home.items()}
    yardsticks, rules = methods.yardsticks(), methods.merging_yardsticks()
    assert not set(yardsticks) & set(rules)
    assert {key for key, there in marked('method').items() if there} == (
        set(methods.names()) - {'full', *yardsticks})
    files = {f for part in methods.PARTS for f in (PACKAGE/part).glob('yardsticks/[!_]*.py')}
    assert files == {*yardsticks.values(), *rules.values()}
    for file in files:
        module = importlib.import_module('.'.join(('ftlab', *file.parts[-3:-1], file.stem)))
        own = {n for n, f in vars(module).items() if inspect.isfunction(f) and hasattr(f, 'paper')
               and f.__module__ == module.__name__}
        assert own == {n for n, at in (yardsticks | rules).items() if at == file}
        assert all(getattr(module, n).paper.kind == 'yardstick' and getattr(module, n).paper.source
                   and not getattr(module, n).paper.claim for n in own)
    assert {(on, f) for on in ASKED_ON for f in methods.probes(on).values()} == {
        (f.paper.on, f) for there in marked('probe').values() for f in there if f.paper.on}
    of_papers = {key: [f for f in there if hasattr(f, 'dial')] for key, there in at_home.items()}
    assert {n: x for n, x in methods.merging_rules().items() if n not in rules} == {
        key: f.dial for key, there in of_papers.items() for f in there}
    assert all([methods.merging_rule(key)] == there for key, there in of_papers.items() if there)
    assert all(methods.merging_rule(n).dial == methods.merging_rules()[n] for n in rules)

def test_a_rule_that_a_paper_imports_is_not_its_own(monkeypatch):
    import ftlab.adapters.merging.breadcrumbs as theirs
    import ftlab.adapters.merging.lines as ours
    from types import ModuleType
    module = ModuleType(ours.__name__)
    vars(module).update(another=theirs.by_breadcrumbs, **vars(ours))
    monkeypatch.setattr(methods, '_module_of', lambda key: module)
    assert methods.merging_rule('lines').__module__ == ours.__name__

@pytest.mark.parametrize('mark, dial', [('.2', .2), ('dial=.25', .25), ('1e-1', .1), ('-1', -1.), ('1', 1.)])
def test_a_rule_s_dial_may_be_written_in_any_way(mark, dial, tmp_path, monkeypatch):
    file = tmp_path/'mine.py'
    file.write_text(f"@merging({mark})\ndef by_mine(changes, model, dial):\n    pass\n")
    monkeypatch.setattr(methods, '_files', lambda: {'mine': file})
    assert methods.merging_rules.__wrapped__()['mine'] == dial

def test_a_common_rule_s_dial_is_found_anywhere_in_its_mark(tmp_path, monkeypatch):
    file = tmp_path/'mine.py'
    body = '(changes, model, dial):\n    pass\n\n'
    file.write_text(f"@merging_yardstick('A (b)', '',\n    'dial=3 in it', dial=-.5)\ndef one{body}"
                    f"@merging_yardstick('A', '', 'read', dial=1e-1)\ndef two{body}")
    monkeypatch.setattr(methods, '_yardstick_files', lambda: [file])
    found = methods._common_rules.__wrapped__()
    assert {n: dial for n, (dial, _) in found.items()} == dict(one=-.5, two=.1)

@pytest.mark.parametrize('name', RECIPES)
def test_a_promise_is_waived_only_for_a_reason(name):
    r = RECIPES[name]()
    for s in (r, *(s for s in r.stages if isinstance(s, Recipe))):
        assert (all(len(why.split()) >= 4 for why in s.waives.values())
                and set(s.promises) | set(s.waives) == set(PROMISES))

@lru_cache(1)
def tuned(name):
    "Its runs, for all its promises in turn"
    return Tuned(RECIPES[name]())

@pytest.mark.parametrize('promise', PROMISES)
@pytest.mark.parametrize('name', RECIPES)
def test_contract(name, promise, tmp_path):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason=f'{name} needs {PACKAGES[name]}')
    it = tuned(name)
    if promise not in it.recipe.promises:
        pytest.skip(f'{name} does not promise it: {it.recipe.waives[promise]}')
    CHECKS[promise](it, tmp_path)

# ---------- every check notices a broken promise

class Crooked(LoRA):
    "Starts beside the identity"

    def __init__(self, W, mask=True, **kw):
        super().__init__(W, mask, **kw)
        self.B.data.fill_(.01)

class Leaky(LoRA):
    "Writes into the weight that it was to leave alone"

    def __init__(self, W, mask=True, **kw):
        super().__init__(W, mask, **kw)
        self.weight = [W]

    def branch(self, x):
        self.weight[0].data.mul_(1.0001)
        return super().branch(x)

class TwoFaced(LoRA):
    "Its fast path is not its definition"

    def branch(self, x):
        return 1.1*super().branch(x)

class Forgetful(LoRA):
    "Does not write down one of its settings"

    def __init__(self, W, mask=True, r=8, alpha=32.):
        super().__init__(W, mask, r, alpha)
        self.config = dict(r=r)

def with_delta(cls, **kw):
    return dataclasses.replace(lora(), delta=partial(cls, **kw))

class Nudge:
    "Moves a number that was not selected"
    def after_step(self, state):
        with torch.no_grad():
            next(p for n, p in state.model.named_parameters() if not p.requires_grad)[0] += 1e-3

def unseeded(state):
    return token_nll(state.forward(), state.batch['labels']).sum()/state.count*(
        1 + 1e-3*random.SystemRandom().random())

def mean_in_each_half(state):
    on = loss_mask(state.batch['labels'])
    return token_nll(state.forward(), state.batch['labels']).sum()/on.sum()

BROKEN = [('starts as the base', with_delta(Crooked)),
          ('frozen stays', dataclasses.replace(methods.hft(), loop=Loop(callbacks=(Nudge,)))),
          ('frozen stays', with_delta(Leaky)),
          ('off is the base', dataclasses.replace(lora(), loop=Loop(callbacks=(Nudge,)))),
          ('off is the base', with_delta(Leaky)),
          ('folds', with_delta(TwoFaced)),
          ('saves', with_delta(Forgetful, alpha=4.)),
          ('saves', dataclasses.replace(methods.hft(), loop=Loop(callbacks=(Nudge,)))),
          ('repeats', Recipe(objective=unseeded)),
          ('accumulates', Recipe(objective=mean_in_each_half)),
          ('accumulates', lora(dropout=.3))]

@pytest.mark.parametrize('promise, recipe', BROKEN,
                         ids=[f'{p}, {i}' for i, (p, _) in enumerate(BROKEN)])
def test_a_broken_promise_is_noticed(promise, recipe, tmp_path):
    check = (partial(CHECKS[promise], classes=dict(Forgetful=Forgetful)) if promise == 'saves'
             else CHECKS[promise])
    with pytest.raises(AssertionError):
        check(Tuned(recipe), tmp_path)

def test_each_promise_has_a_broken_recipe():
    assert {p for p, _ in BROKEN} == set(PROMISES)

# ---------- methods that answer with several models

def test_emulated_fine_tuning_says_what_the_large_model_says_until_something_was_learned():
    # a tied random model repeats the last word of the prompt, a mark, so that nothing would be heard
    large, prompts = toy(1, hidden=64, tied=False), [r['prompt'] for r in lab_data().test[:8]]
    recipe = eft(large=large)
    run = tune(recipe, lr=1e-2, steps=20)
    plain = generate(large, TOK, prompts, max_new_tokens=8)
    base, before = toy(), weights(large)
    assert all(plain)
    ask = lambda tuned, r=recipe: r.decode(dict(base=base, tuned=tuned), TOK, prompts,
                                           max_new_tokens=8)
    assert ask(toy()) == plain and ask(run.model, eft(large=large, beta=0.)) == plain
    with run.disabled():
        assert ask(run.model) == plain
    assert (ask(run.model) != plain and ask(run.model) == ask(run.model)
            and same(weights(large), before))
    # a large model that is the small base makes emulation exact
    assert ask(run.model, eft(large=base)) == generate(run.model, TOK, prompts, max_new_tokens=8)

def test_emulated_fine_tuning_needs_one_vocabulary():
    c = toy().config
    c.vocab_size += 1
    with pytest.raises(ValueError, match='vocabular'):
        eft(large=AutoModelForCausalLM.from_config(c)).decode(
            dict(base=toy(), tuned=toy()), TOK, ['sort a b'], max_new_tokens=2)
