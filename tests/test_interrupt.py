"""Ctrl-C at any moment: the model stays usable, in its own mode,
with no hook left and no change half on, and the same call works again"""
import sys, time
from functools import lru_cache
import pytest
import ftlab
from ftlab.adapters.subsets.hft import hft
from ftlab.adapters.modules.lora import lora
from ftlab.core.recipe import Recipe, Stages
from ftlab.core.scorers import nll
from ftlab.trainers.fit import fit
from toys import TOK, lab_data, same, toy, weights

# functions of torch's own context managers, and what is interrupted
LEFT_ALONE = ('<genexpr>', '__setattr__', 'train', 'children', 'named_children', 'modules', 'named_modules')
WATCHED = '/ftlab/', 'torch/nn/modules', 'transformers/models'

@lru_cache(None)
def watched(file, name) -> bool:
    "Not inside torch's own context managers: nobody could fix those"
    return name not in LEFT_ALONE and any(p in file for p in WATCHED)

class Interrupts:
    """Raises KeyboardInterrupt at the n-th call of a Python function, as a signal would;
    `None` counts the calls alone"""

    def __init__(self, n=None):
        self.n, self.seen = n, 0

    def __enter__(self):
        sys.settrace(self.note)
        return self

    def __exit__(self, *a):
        sys.settrace(None)

    def note(self, frame, event, arg):
        "Called at every call of a Python function; as it returns nothing, its lines are not traced"
        if not watched(frame.f_code.co_filename, frame.f_code.co_name):
            return
        self.seen += 1
        if self.seen == self.n:
            raise KeyboardInterrupt

def moments(do, n=6) -> list[int]:
    "Calls at which to interrupt `do`: the first and last ones, and some in between"
    with Interrupts() as whole:
        do()
    return sorted({1, 5, 20, whole.seen - 5, whole.seen - 1,
                   *(whole.seen*i//(n + 1) for i in range(1, n + 1))} - {0})

def state_of(model):
    "All that an interrupted call must not leave otherwise"
    # transformers puts some of its own on for good
    ours = lambda h: getattr(h, '__module__', type(h).__module__).startswith('ftlab')
    hooks = sum(map(ours, [h for m in model.modules()
                           for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]))
    return dict(hooks=hooks, names=[n for n, _ in model.named_modules()],
                trains=[p.requires_grad for p in model.parameters()],
                modes=[m.training for m in model.modules()])

def interrupted(do, n):
    "What `do` returns, or None where the interrupt came out of it"
    try:
        with Interrupts(n):
            return do()
    except KeyboardInterrupt:
        return None

RECIPES = dict(full=Recipe, lora=lambda: lora(dropout=.1), hft=hft,
               edited=lambda: Recipe(
                   'edited', edit=lambda changes, model: {n: v/2 for n, v in changes.items()}),
               stages=lambda: Recipe('two', loop=Stages(hft(), lora())))

@pytest.mark.parametrize('name', RECIPES)
def test_fit(name):
    def go(model):
        return fit(model, TOK, lab_data(), RECIPES[name](), steps=4, batch_size=8, lr=3e-3,
                   progress=False)

    base, first = weights(toy()), state_of(toy())
    went = set()
    for n in moments(lambda: go(toy())):
        model = toy()
        run = interrupted(lambda: go(model), n)
        went.add(run is None)
        assert not model.training, n
        if run is None:
            assert same(weights(model), base) and state_of(model) == first, n
        else:
            now = weights(model)
            with run.disabled():
                assert same(weights(model), base), n
            assert same(weights(model), now) and not any(m.training for m in model.modules())
            run.delta.attached.detach()
            assert same(weights(model), base), n
        assert len(go(model).log) == 4, n
    assert went == {True, False} # some came back with a run, some without

def same_again(do, model, also=lambda: None, n=3):
    "Interrupt `do` at many moments: the model is as it was each time, and `do` works afterwards"
    first, was = state_of(model), weights(model)
    for n in moments(do, n):
        interrupted(do, n)
        assert state_of(model) == first and same(weights(model), was), n
        also()
    do()
    assert state_of(model) == first

@pytest.mark.parametrize('training', [False, True])
def test_asking(training):
    model, rows = toy(dropout=.1).train(training), lab_data().test[:20]
    same_again(lambda: ftlab.generate(model, TOK, [r['prompt'] for r in rows], max_new_tokens=4),
               model)
    same_again(lambda: ftlab.skills(model, 3, names=['reverse', 'sort'], tok=TOK), model)
    same_again(lambda: nll(model, TOK, rows), model)

@pytest.mark.parametrize('recipe', [Recipe, lora], ids=['full', 'lora'])
def test_report_and_doctor_of_a_run(recipe, tmp_path):
    run = fit(toy(), TOK, lab_data(), recipe(), steps=4, batch_size=8, lr=3e-3, progress=False)
    on = lambda: run.delta.attached.enabled or pytest.fail('the change is switched off')
    same_again(lambda: ftlab.report(run, items=4, old_items=1, rows=20, matrices=2,
                                    cache=tmp_path/'none'/str(time.time())),
               run.model, on)
    same_again(lambda: ftlab.doctor(run), run.model, on)

@pytest.mark.parametrize('on_disk', [False, True])
def test_the_weights_come_back_whole(on_disk, tmp_path):
    "Interrupted at every call of a context in which the model is the base, its way back included"
    run = fit(toy(), TOK, lab_data(), steps=2, batch_size=8, lr=3e-3, progress=False)
    tuned = weights(run.model)

    def go():
        with run.delta.attached.disabled(tmp_path if on_disk else None):
            pass
    with Interrupts() as whole:
        go()
    for n in range(1, whole.seen + 1):
        interrupted(go, n)
        assert same(weights(run.model), tuned) and run.delta.attached.enabled, n

@pytest.mark.parametrize('recipe', [Recipe, lora], ids=['full', 'lora'])
def test_doctor_before_a_run(recipe):
    model = toy()
    same_again(lambda: ftlab.doctor(model, TOK, lab_data(), recipe(), batch_size=8), model)

def test_compare(tmp_path):
    model = toy()
    ask = dict(seeds=1, steps=4, batch_size=8, items=4, old_items=1, validation_items=4, tune=False,
               progress=False)
    same_again(lambda: ftlab.compare(['full', 'lora'], (model, TOK), lab_data(),
                                     out=tmp_path/str(time.time()), **ask),
               model, n=1)
