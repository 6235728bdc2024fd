"Polyhistor: its product by loops, its counts, mixed rows, saved files, models of several kinds, and its errors"
import copy
import pytest
import torch
from torch.nn import functional as F
from ftlab.adapters.attach import attach
from ftlab.adapters.modules.polyhistor import (FORMS, KEY, Adapter, Switch, Template, asking, kron,
                                               parameters, polyhistor, switches, task_adapters,
                                               tell_tasks)
from ftlab.adapters.store import load_delta
from ftlab.core.data import Data, data
from ftlab.core.generate import generate
from ftlab.core.state import State
from ftlab.lab.digits import digits, fresh, load, pictures
from ftlab.trainers.callbacks import validation_nll
from ftlab.trainers.fit import fit
from tests.tiny import inputs_for, tiny
from tests.toys import TOK, classifier, label_data, probe, toy

NAMES = ('low', 'high', 'odd')
SMALL = dict(rank=2, embedding=3)


def made(form='kron', tasks=NAMES, **kw):
    if form == 'kron':
        return polyhistor(tasks, **SMALL | kw)
    return task_adapters(form, tasks, **SMALL | kw)


def beside(model, form='kron', tasks=NAMES, **kw):
    "Adapters that say something: nothing is at its start"
    torch.manual_seed(3)
    recipe = made(form, tasks, **kw)
    att = attach(model, recipe.select(model), recipe.delta)
    with torch.no_grad():
        for p in att.parameters().values():
            p.add_(.3*torch.randn(p.shape))
    model.eval()
    return att


def text_rows():
    "Rows whose task is their first word"
    return [dict(prompt=f'{w} {a} {b} ?', response=a) for w in ('sort', 'reverse')
            for a in 'abcdefgh' for b in 'klm']


def of_text(**kw):
    first = lambda r: r['prompt'].split()[0]
    return polyhistor(('sort', 'reverse'), **dict(task=first, **SMALL) | kw)


# ---------- the formula

def test_the_product_is_kronecker_s_by_loops_and_by_torch():
    g = torch.Generator().manual_seed(0)
    K, T = torch.randn(3, 2, generator=g), torch.randn(4, 2, 5, generator=g)
    got = kron(K, T)
    assert got.shape == (4, 6, 10)
    for t in range(4):
        for i in range(3):
            for j in range(2):
                for a in range(2):
                    for b in range(5):
                        assert got[t, 2*i + a, 5*j + b] == K[i, j]*T[t, a, b]
        assert torch.equal(got[t], torch.kron(K, T[t]))


def test_a_template_is_the_product_of_what_two_maps_write():
    torch.manual_seed(0)
    T, z = Template(3, 6, 2, 4), torch.randn(5, 4)
    for t, one in zip(T(z), z):
        left, right = (T.left.weight @ one).view(3, 2), (T.right.weight @ one).view(2, 6)
        torch.testing.assert_close(t, left @ right)
    assert not Template(3, 6, 2, 4, zero=True)(z).any()
    assert torch.linalg.matrix_rank(T(z).detach()).tolist() == [2]*5


@torch.no_grad()
@pytest.mark.parametrize('form', FORMS)
def test_an_adapter_adds_a_bottleneck_to_its_layer(form):
    model = toy()
    att = beside(model, form)
    ds = list(att.deltas.values())
    assert len(ds) == 4 and [d.switch is not None for d in ds] == [True] + [False]*3
    h, d, common = torch.randn(2, 5, 32), ds[2], ds[0].switch
    for t, name in enumerate(NAMES):
        if form in ('kron', 'tables'):
            z = common.z if form == 'kron' else 3**.5*torch.eye(3)
            D = torch.kron(d.K, common.down(z)[t])
            U = torch.kron(d.V, common.up(z)[t])
        elif form == 'hyper':
            D, U = d.D @ common.z[t], d.U @ common.z[t]
        else:
            D, U = (M[0 if form == 'shared' else t] for M in (d.D, d.U))
        want = torch.stack([torch.stack([x + U @ F.gelu(D @ x) for x in row]) for row in h])
        with asking(model, name):
            torch.testing.assert_close(d(h), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('form', FORMS)
def test_as_many_train_as_the_formula_says(form):
    model = toy()
    att = beside(model, form, kernel=2)
    count = sum(p.numel() for p in att.parameters().values())
    assert count == parameters([32]*4, 3, form, rank=2, kernel=2, embedding=3)
    by_hand = dict(kron=3*3 + 2*3*2*(16 + 4) + 4*2*2**2, hyper=3*3 + 3*4*2*32*8,
                   separate=3*4*2*32*8, shared=4*2*32*8, tables=2*3*2*(16 + 4) + 4*2*2**2)
    assert count == by_hand[form]
    assert len({id(p) for p in att.parameters().values()}) == len(att.parameters())


def test_tables_can_say_all_that_hypernetworks_write_for_as_few_tasks():
    torch.manual_seed(0)
    T, z = Template(3, 6, 2, 5), torch.randn(4, 5)
    plain = Template(3, 6, 2, 4)
    with torch.no_grad():
        for mine, theirs in ((plain.left, T.left), (plain.right, T.right)):
            mine.weight.copy_((theirs.weight @ z.T)/2)
    torch.testing.assert_close(plain(2*torch.eye(4)), T(z))


def test_a_table_s_task_has_parameters_of_its_own():
    model = toy()
    att = beside(model, 'tables', ask='odd')
    (held,) = (d.switch for d in att.deltas.values() if d.switch is not None)
    b = {k: v for k, v in probe().items() if k != 'labels'}
    model(**b).logits.square().sum().backward()
    for M in (held.down.left, held.down.right, held.up.left, held.up.right):
        assert M.weight.grad[:, 2].any() and not M.weight.grad[:, :2].any()
    assert not hasattr(held, 'z')


def test_wider_layers_have_larger_kernels():
    wide = [32, 64, 128]
    assert parameters(wide, 4, rank=2, kernel=1) == 4*8 + 2*8*2*(32 + 8) + 2*(1 + 4 + 16)
    made = [Adapter(torch.zeros(d, 8), template=32, rank=2, holds=d == 32) for d in wide]
    for d, a in zip(wide, made):
        a.join(dict(enumerate(made)))
        assert [tuple(M.shape) for M in a.factors()] == [(1, d//4, d), (1, d, d//4)]


def test_a_fresh_adapter_neither_shrinks_nor_blows_up_its_input():
    "The down matrix of every form has the spread of a usual matrix, over 100 starts"
    x, spread = torch.randn(100, 64, generator=torch.Generator().manual_seed(1)), {}
    for form in FORMS:
        torch.manual_seed(0)
        found = []
        for _ in range(100):
            a = Adapter(torch.zeros(64, 8), form=form, tasks='a\nb', ask='a', template=32, rank=4)
            a.join(dict(a=a))
            D, U = a.factors()
            assert not U.any()
            found.append((x @ D[0].mT).square().mean().item())
        spread[form] = sum(found)/100
    assert all(.4 < s < 3 for s in spread.values()), spread


# ---------- which task is asked

@torch.no_grad()
@pytest.mark.parametrize('form', FORMS)
def test_mixed_rows_are_answered_as_each_alone(form):
    model, b = toy(), {k: v[:3] for k, v in probe().items() if k != 'labels'}
    base = model(**b).logits
    att = beside(model, form)
    with asking(model, ['odd', 'low', 'odd']):
        mixed = model(**b).logits
    alone = {}
    for name in NAMES:
        with asking(model, name):
            alone[name] = model(**b).logits
    want = torch.stack([alone[n][i] for i, n in enumerate(('odd', 'low', 'odd'))])
    torch.testing.assert_close(mixed, want, atol=1e-4, rtol=1e-4)
    assert torch.equal(alone['low'], alone['odd']) == (form == 'shared')
    with att.disabled():
        assert torch.equal(model(**b).logits, base)


@torch.no_grad()
def test_a_switch_that_nobody_set_and_wrong_rows_are_errors():
    model = toy()
    beside(model)
    b = {k: v for k, v in probe().items() if k != 'labels'}
    with pytest.raises(ValueError, match='which one is asked'):
        model(**b)
    with pytest.raises(ValueError, match="no task is called 'none'"):
        with asking(model, 'none'):
            pass
    with pytest.raises(ValueError, match='tasks for 2 rows'):
        with asking(model, ['low', 'odd']):
            model(**b)
    assert [s.now for s in switches(model)] == [None]
    with asking(model, 'odd'):
        with pytest.raises(ValueError, match='stop'):
            with asking(model, 'low'):
                raise ValueError('stop')
        assert [s.now for s in switches(model)] == [2]
    with pytest.raises(ValueError, match='no adapters'):
        with asking(toy(), 'low'):
            pass
    with pytest.raises(ValueError, match='no task is called'):
        Switch((), 'low')


def test_while_training_each_row_has_its_own_task():
    seen = []
    class Watch:
        def before_fit(self, state):
            (d,) = (d for d in state.attached.deltas.values() if d.switch is not None)
            asked = d.switch.asked
            def noted(h, training):
                t = asked(h, training)
                if training:
                    seen.append((state.batch, t))
                return t
            d.switch.asked = noted
    model = toy()
    run = fit(model, TOK, data(text_rows()), of_text(), steps=3, batch_size=8, accumulate=2,
              progress=False, callbacks=(Watch(),))
    word = TOK('reverse').input_ids[0]
    assert len(seen) == 3*2*4
    for batch, t in seen:
        assert torch.equal(t, (batch['input_ids'] == word).any(1).long()) and 0 < t.sum() < 4
    assert [s.batch for s in switches(run.model)] == [None]
    copy.deepcopy(run.model)


def test_measuring_on_validation_rows_asks_for_a_task():
    "They have no tasks, so nothing is guessed"
    rows = data(text_rows(), validation=text_rows()[:4], test=text_rows()[:4])
    how = dict(steps=2, batch_size=8, progress=False, keep='best')
    with pytest.raises(ValueError, match='which one is asked'):
        fit(toy(), TOK, rows, of_text(), **how)
    run = fit(toy(), TOK, rows, of_text(ask='sort'), **how)
    assert all('validation_nll' in r for r in run.path) and callable(validation_nll)


def test_tasks_are_learned_apart():
    "The same pictures, two answers: the frozen head says the digit, or nine minus it"
    few = digits(n=200)
    rows = [dict(pixel_values=r['pixel_values'], labels=y, task=t) for r in few.train
            for t, y in enumerate((r['labels'], 9 - r['labels']))]
    run = fit(load('digits-vit'), None, Data(rows, [], [], 'image'),
              polyhistor(('same', 'nine minus'), kernel=2), steps=40, batch_size=32, lr=3e-2,
              progress=False)
    x, y = pictures(few.test)
    share, said = lambda a, b: float((a == b).float().mean()), {}
    with torch.no_grad():
        for task in ('same', 'nine minus'):
            with asking(run.model, task):
                said[task] = run.model(pixel_values=x).logits.argmax(-1)
    assert share(said['same'], y) > .6 and share(said['nine minus'], y) < .4


# ---------- kept and carried along

@torch.no_grad()
@pytest.mark.parametrize('form', FORMS)
def test_a_saved_file_answers_every_task(form, tmp_path):
    from ftlab.adapters.store import identity, pack, save_delta
    model = toy()
    base = identity(model)
    att = beside(model, form, ask='odd')
    save_delta(tmp_path/'d.safetensors', *pack(att), base)
    again = toy()
    load_delta(again, tmp_path/'d.safetensors')
    b = {k: v for k, v in probe().items() if k != 'labels'}
    assert torch.equal(again(**b).logits, model(**b).logits)
    for name in NAMES:
        with asking(model, name), asking(again, name):
            assert torch.equal(again(**b).logits, model(**b).logits)
    twin = copy.deepcopy(again)
    next(p for n, p in again.named_parameters() if 'delta_' in n).add_(1.)
    with asking(twin, 'low'), asking(model, 'low'):
        assert torch.equal(twin(**b).logits, model(**b).logits)


def test_a_file_without_the_shared_part_is_refused(tmp_path):
    from ftlab.adapters.store import identity, pack, save_delta
    model = toy()
    base = identity(model)
    tensors, kinds = pack(beside(model))
    first = next(iter(kinds))
    rest = {n: t for n, t in tensors.items() if not n.startswith(first)}
    save_delta(tmp_path/'d.safetensors', rest, {n: k for n, k in kinds.items() if n != first}, base)
    again = toy()
    with pytest.raises(ValueError, match='exactly one must'):
        load_delta(again, tmp_path/'d.safetensors')
    assert not switches(again)


@torch.no_grad()
def test_generation_with_a_cache_says_what_whole_rows_say():
    model = toy(tied=False)
    beside(model, ask='odd')
    said = generate(model, TOK, ['sort a b', 'reverse c d e'], max_new_tokens=6)
    with asking(model, ['odd', 'odd']):
        assert generate(model, TOK, ['sort a b', 'reverse c d e'], max_new_tokens=6) == said


@torch.no_grad()
@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float64))
def test_other_precisions(dtype):
    model = toy().to(dtype)
    att = beside(model, ask='low')
    own = torch.float32 if dtype == torch.bfloat16 else dtype
    assert {p.dtype for p in att.parameters().values()} == {own}
    out = model(**{k: v for k, v in probe().items() if k != 'labels'}).logits
    assert out.dtype == dtype and torch.isfinite(out.float()).all()


# ---------- models

@torch.no_grad()
@pytest.mark.parametrize('family', ('llama', 'gpt2', 'bert', 'vit', 'gemma2', 'phi', 'opt', 't5'))
def test_models_of_several_kinds(family):
    model, x = tiny(family), inputs_for(family)
    before = model(**x).logits
    att = beside(model, ask='low')
    low = model(**x).logits
    assert (low - before).abs().max() > 1e-3
    with asking(model, 'odd'):
        assert not torch.equal(model(**x).logits, low)
    with asking(model, ['low', 'odd']):
        if family == 'opt': # flattens rows and tokens, so rows cannot be told apart
            with pytest.raises(ValueError, match='one task at a time'):
                model(**x)
        else:
            torch.testing.assert_close(model(**x).logits[0], low[0], atol=1e-4, rtol=1e-4)
    with att.disabled():
        assert torch.equal(model(**x).logits, before)
    att.detach()
    assert torch.equal(model(**x).logits, before) and not switches(model)


def test_a_classifier_and_a_reader_of_pictures_learn():
    many = made(tasks=('even', 'odd'), task=lambda r: ('even', 'odd')[len(r['text']) % 2], ask='odd')
    run = fit(classifier(), TOK, label_data(), many, steps=3, batch_size=8, progress=False)
    assert run.cost['trainable'] == parameters([32]*4, 2, **SMALL)
    rows = [dict(pixel_values=torch.randn(1, 8, 8), labels=i % 10, task=i % 3) for i in range(16)]
    run = fit(fresh('digits-vit'), None, Data(rows, [], [], 'image'), made(), steps=2, batch_size=8,
              progress=False)
    assert run.cost['trainable'] == parameters([64]*6, 3, **SMALL)


def test_decoders_train_themselves_and_without_tasks_there_is_one():
    rows = [dict(pixel_values=torch.randn(1, 8, 8), labels=i % 10) for i in range(16)]
    model = fresh('digits-vit')
    was = model.classifier.weight.detach().clone()
    run = fit(model, None, Data(rows, [], [], 'image'), made(tasks=(), decoders='^classifier'),
              steps=2, batch_size=8, progress=False)
    assert run.cost['trainable'] == parameters([64]*6, 1, **SMALL) + 650
    assert not torch.equal(run.model.classifier.weight, was)
    run.model(pixel_values=torch.randn(2, 1, 8, 8))
    with run.disabled():
        assert torch.equal(run.model.classifier.weight, was)


# ---------- errors

@pytest.mark.parametrize('given, said', [
    (dict(tasks='depth'), 'give several names'), (dict(tasks=('a', '')), 'give several names'),
    (dict(tasks=('a', 3)), 'give several names'), (dict(tasks=('a\nb',)), 'give several names'),
    (dict(tasks=('a', 'a')), 'there once'), (dict(tasks=('a',), ask='b'), 'one of the tasks'),
    (dict(down=0), 'down is 0'), (dict(rank=1.5), 'rank is 1.5'), (dict(kernel=True), 'kernel is True'),
    (dict(embedding=-1), 'embedding is -1')])
def test_wrong_arguments(given, said):
    with pytest.raises(ValueError, match=said):
        polyhistor(**given)


def test_a_form_that_there_is_not():
    with pytest.raises(ValueError, match='hyper, separate, shared, tables'):
        task_adapters('kron')


@pytest.mark.parametrize('given, said', [
    (dict(rank=3), 'rank is 3'), (dict(kernel=3), 'kernel is 3'), (dict(down=3), 'does not divide'),
    (dict(kernel=16), 'multiple of down'), (dict(targets='nowhere'), 'no layer was selected|matches nothing'),
    (dict(targets='norm'), 'shape .32'), (dict(decoders='nowhere'), 'no parameter matches'),
    (dict(targets='gate_proj|o_proj', kernel=1), 'must divide')])
def test_sizes_and_places_that_do_not_fit_the_model(given, said):
    model = toy()
    with pytest.raises(ValueError, match=said):
        recipe = polyhistor(**dict(rank=2) | given)
        attach(model, recipe.select(model), recipe.delta)
    assert not switches(model) and all(p.requires_grad for p in model.parameters())


def tell(batch, names=('a', 'b'), task='task'):
    return tell_tasks(names, task)(batch, State(None))


def test_pictures_need_a_column_of_numbers():
    x = torch.zeros(2, 1, 8, 8)
    assert tell(dict(pixel_values=x, task=torch.tensor([1, 0])))[KEY].tolist() == [1, 0]
    for task in (torch.tensor([.5, 1.]), torch.zeros(2, 2).long(), None):
        with pytest.raises(ValueError, match='column of whole numbers'):
            tell(dict(pixel_values=x) | ({} if task is None else dict(task=task)))
    with pytest.raises(ValueError, match='ranges from 0 to 2'):
        tell(dict(pixel_values=x, task=torch.tensor([2, 0])))


@pytest.mark.parametrize('rows, how, said', [
    (text_rows(), dict(task='skill'), "no task in 'skill'"),
    (text_rows(), dict(tasks=('sort', 'x')), "the task 'reverse'"),
    (text_rows(), dict(task=lambda r: None), 'has no task')])
def test_rows_of_text_need_a_known_task(rows, how, said):
    how = dict(tasks=('sort', 'reverse'), task=lambda r: r['prompt'].split()[0]) | how
    with pytest.raises(ValueError, match=said):
        fit(toy(), TOK, data(rows), polyhistor(**how, **SMALL), steps=1, batch_size=4,
            progress=False)


def test_one_text_in_two_tasks_and_packed_rows_are_refused():
    twice = [dict(prompt='sort a b', response='a', skill=s) for s in ('x', 'y') for _ in range(8)]
    how = polyhistor(('x', 'y'), 'skill', **SMALL)
    whole = data(dict(train=twice, validation=twice[:2], test=twice[:2]), carry=['skill'])
    with pytest.raises(ValueError, match='are in two tasks'):
        fit(toy(), TOK, whole, how, steps=1, batch_size=4, progress=False)
    with pytest.raises(ValueError, match='packing=False'):
        fit(toy(), TOK, data(text_rows()), of_text(), steps=1, batch_size=4, packing=True,
            progress=False)
