"""Sparse changes: LIFT's places against the official formula, places that change hands,
tied matrices; LT-SFT's two stages and sums of changes"""
import dataclasses
import gc
import weakref
import numpy as np, pytest, torch
from ftlab.adapters.attach import attach
from ftlab.adapters.delta import Entries
from ftlab.adapters.store import identity, load_delta, pack, save_delta
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.select import coverage, parts
from ftlab.adapters.sparse import compose, overlap
from ftlab.adapters.subsets.lift import Refresh, top_k, lift, principal, scores
from ftlab.adapters.subsets.lt_sft import lt_sft, movable, moved_most, short
from ftlab.core.anatomy import anatomy
from ftlab.core.loading import load
from ftlab.trainers.fit import fit
from tiny import DECODERS, ENCODERS, USUAL, example_inputs, tiny
from toys import (TOK, assert_off_saved_folded, classifier, lab_data, label_data, logits, probe,
                  same, toy, weights)

def out(m):
    return logits(m, example_inputs())

def tune(recipe, steps=6, model=None, **more):
    return fit(model or toy(), TOK, lab_data(), recipe,
               **dict(dict(steps=steps, batch_size=8, progress=False, lr=1e-2), **more))

@torch.no_grad()
def shake(att, seed=1):
    g = torch.Generator().manual_seed(seed)
    for p in att.parameters().values():
        p.add_(.05*torch.randn(p.shape, generator=g))

# ---------- LIFT: which places

@pytest.mark.parametrize('rank, r', [(1, 1), (2, 4), (5, 3), (20, 2)])
def test_the_places_are_those_of_the_official_formula(rank, r):
    W = torch.randn(40, 20, generator=torch.Generator().manual_seed(rank))
    U, S, V = torch.svd(W)
    reconstructed = U[:, :rank] @ (S[:rank].unsqueeze(-1)*V[:, :rank].T) # sparseAdam.update_masks, mask_type 'lift'
    theirs = torch.topk(reconstructed.abs().flatten(), min((40 + 20)*r, 800)).indices
    assert set(top_k(scores(W, filter_rank=rank), r).tolist()) == set(theirs.tolist())
    if rank < 20:
        assert set(theirs.tolist()) != set(top_k(W.abs(), r).tolist()) or r >= 14

def test_budget_and_baselines():
    m = toy()
    att = attach(m, parts()(m), lora(r=3).delta)
    n = sum(p.numel() for p in att.parameters().values())
    att.detach()
    masks = {by: principal(3, by)(m) for by in ('principal', 'magnitude', 'random')}
    assert all(coverage(m, c)['parameters'] == n for c in masks.values())
    name = 'model.layers.1.mlp.up_proj.weight'
    W = m.get_parameter(name).abs()
    top = masks['magnitude'][name]
    assert W[top].min() >= W[~top].max()
    assert (not torch.equal(masks['random'][name], principal(3, 'random')(m, seed=1)[name])
            and torch.equal(masks['random'][name], principal(3, 'random')(m)[name]))
    assert top_k(torch.rand(4, 4), 100).numel() == 16 # a budget above the matrix takes all of it
    with pytest.raises(ValueError, match='filter_rank is 33'):
        principal(filter_rank=33)(m)
    with pytest.raises(ValueError, match='by is'):
        lift(by='gradient')
    with pytest.raises(ValueError, match='every is'):
        lift(every=-1)

@pytest.mark.parametrize('family', ['gpt2', 'gemma2', 'bert'])
def test_lift_fits_other_families(family):
    m = tiny(family)
    base = out(m)
    att = attach(m, principal(2)(m), Entries)
    assert torch.equal(out(m), base)
    shake(att)
    changed = out(m)
    assert not torch.equal(changed, base)
    home = {n: m.get_submodule(n.rpartition('.')[0]) for n in att.deltas}
    d = next(iter(att.deltas))
    values = att.values()[d]
    att.fold()
    torch.testing.assert_close(out(m), changed, atol=2e-5, rtol=1e-5)
    assert torch.equal(m.get_parameter(d), values) and home

# ---------- LIFT: places that change hands

class Look:
    "Notes the places, the numbers and the moments after every step"

    def __init__(self):
        self.rows = []

    def after_step(self, state):
        n, d = next(iter(state.attached.deltas.items()))
        moving = any(isinstance(c, Refresh) for c in state.callbacks)
        s = state.optimizer.state[d.value] if moving else {}
        self.rows.append(
            dict(index=d.index.clone(), value=d.value.detach().clone(),
                 weight=state.attached.values()[n].clone(), base=state.attached.before(n).clone(),
                 m={k: v.clone() for k, v in s.items() if torch.is_tensor(v)}))

def test_a_refresh_carries_the_moments_of_what_stays_and_starts_what_is_new_from_zero():
    look = Look()
    run = tune(lift(r=2, every=3), steps=8, callbacks=(look,))
    a, b, c = look.rows[1:4]  # the choice falls after the third step, before the look
    stayed, new = a['index'] == b['index'], a['index'] != b['index']
    assert stayed.any() and new.any()
    for k in ('exp_avg', 'exp_avg_sq'):
        assert (b['m'][k][new] == 0).all() and (b['m'][k][stayed] != 0).any()
    assert (b['value'][new] == 0).all() and float(b['m']['step']) == 3
    want = top_k(scores(b["weight"]), 2)
    assert set(want.tolist()) == set(b['index'].tolist())
    went = a['index'][new]
    assert torch.equal(c['weight'].flatten()[went], b['weight'].flatten()[went]) # left places keep what they have
    assert not torch.equal(c['weight'].flatten()[b['index']], b['weight'].flatten()[b['index']])
    frozen = torch.ones(b['weight'].numel(), dtype=torch.bool)
    [frozen.index_fill_(0, r['index'].long(), False) for r in look.rows]
    assert torch.equal(look.rows[-1]['weight'].flatten()[frozen], b['base'].flatten()[frozen])

def test_a_change_whose_places_moved_saves_folds_and_switches_off(tmp_path):
    base = logits(toy())
    run = tune(lift(r=2, every=2), steps=7)
    assert all(d.config['left'] > 0 for d in run.delta.attached.deltas.values())
    tuned = assert_off_saved_folded(run, base, toy(), logits, tmp_path/'d.safetensors')
    again = tune(lift(r=2, every=2), steps=7)
    assert torch.equal(logits(again.model), tuned)

def test_no_refresh_no_difference():
    a, b = tune(lift(r=2, every=0)), tune(dataclasses.replace(lift(r=2, every=0), delta=Entries))
    assert torch.equal(logits(a.model), logits(b.model))
    assert (not lift(by='random').callbacks and not lift(every=0).callbacks
            and len(lift().callbacks) == 1)

@pytest.mark.parametrize('stop', [3, 4, 5])
def test_a_run_that_chose_anew_goes_on_bit_for_bit(stop, tmp_path):
    class Kill:
        def after_step(self, s):
            if s.step == stop:
                raise KeyboardInterrupt
    how = dict(steps=7, lr=1e-2)
    whole = tune(lift(every=2), **how)
    part = tune(lift(every=2), **how, out=tmp_path, save_every=1, callbacks=(Kill(),))
    assert part.interrupted
    again = tune(lift(every=2), **how, out=tmp_path, save_every=1, resume=True)
    assert again.log == whole.log and torch.equal(logits(again.model), logits(whole.model))
    for n, d in whole.delta.attached.deltas.items():
        e = again.delta.attached.deltas[n]
        assert (len(d.left_index)
                and all(torch.equal(a, b)
                        for a, b in zip(d.state_dict().values(), e.state_dict().values()))
                and d.config == e.config)
    again.delta.save(tmp_path/'d')
    fresh = toy()
    load_delta(fresh, tmp_path/'d')
    assert torch.equal(logits(fresh), logits(whole.model))

def test_the_hook_goes_with_the_run():
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks
    before = len(hooks)
    tune(lift(every=2), steps=3)
    assert len(hooks) == before

def test_places_must_be_as_many():
    p = Entries(torch.zeros(3, 3), torch.eye(3) > 0)
    with pytest.raises(ValueError, match='3 different entries'):
        p.move(torch.tensor([0, 0, 1]))
    assert Entries(torch.zeros(4)).index.tolist() == [0, 1, 2, 3]

# ---------- a delta on a tied matrix

def by_hand(family, name, att):
    "A fresh model whose weight is what the attached change makes of it"
    m = tiny(family)
    m.get_parameter(name).data.copy_(att.values()[name])
    return m

@pytest.mark.parametrize('family', [f for f in DECODERS + ENCODERS if anatomy(tiny(f)).tied])
def test_a_tied_matrix_stays_tied(family, tmp_path):
    m = tiny(family)
    name = anatomy(m).embedding
    base, was, home = out(m), weights(m), identity(m)
    mask = torch.zeros_like(m.get_parameter(name), dtype=torch.bool)
    mask[5:9] = True
    names = [n for n, _ in m.named_parameters()]
    tie = lambda: m.get_input_embeddings().weight is m.get_output_embeddings().weight
    att = attach(m, {name: mask}, Entries)
    assert torch.equal(out(m), base)
    shake(att)
    changed = out(m)
    assert (torch.equal(m.get_input_embeddings().weight, m.get_output_embeddings().weight)
            and not torch.equal(changed, base)
            and torch.equal(out(by_hand(family, name, att)), changed))
    with att.disabled():
        assert torch.equal(out(m), base)
    save_delta(tmp_path/'d.safetensors', *pack(att), home)
    fresh = tiny(family)
    load_delta(fresh, tmp_path/'d.safetensors')
    assert torch.equal(out(fresh), changed)
    att.detach()
    assert (tie() and torch.equal(out(m), base) and same(weights(m), was)
            and [n for n, _ in m.named_parameters()] == names)
    att = attach(m, {name: mask}, Entries)
    shake(att)
    att.fold()
    assert tie() and torch.equal(out(m), changed)

# ---------- LT-SFT

class Ends:
    "Notes the weights at the end of each stage"

    def __init__(self):
        self.found, self.attached = [], []

    def after_fit(self, state):
        self.found.append(weights(state.model))
        self.attached.append(state.attached)

def test_what_moves_in_the_second_run_is_what_moved_most_in_the_first():
    ends = Ends()
    run = tune(lt_sft(density=.05), steps=10, callbacks=(ends,))
    base, first = weights(toy()), ends.found[0]
    names = [n for n in base if 'norm' not in n]
    diffs = torch.cat([(first[n] - base[n]).abs().flatten() for n in names]).numpy()
    k = round(.05*len(diffs))
    thresh = np.partition(diffs, len(diffs) - k)[len(diffs) - k] # unfreeze_k_most_changed_params
    theirs = {n: (first[n] - base[n]).abs() >= thresh for n in names}
    held = {n: torch.zeros_like(base[n], dtype=torch.bool).flatten().index_fill(
                0, d.index.long(), True).view_as(base[n])
            for n, d in run.delta.attached.deltas.items()}
    assert (sum(int(m.sum()) for m in held.values()) == k
            and all(not (held[n] & ~theirs[n]).any() for n in held)
            and sum(int(m.sum()) for m in theirs.values()) - k < 10)
    assert all(torch.equal(first[n], base[n]) for n in base if 'norm' in n), 'the norms are frozen'
    change = run.delta.tensors()
    assert (all(not t[~held[n]].any() for n, t in change.items())
            and sum(int((t != 0).sum()) for t in change.values()) > .9*k)
    assert (len({n for n in names if not theirs[n].any()} & set(held)) == 0
            and same(weights(run.model), base))

def norms_of(model) -> set[str]:
    "The weights and biases of every norm, by the class of its module and not by its name"
    return {f'{m}.{p}' for m, module in model.named_modules() if 'Norm' in type(module).__name__
            for p, _ in module.named_parameters(recurse=False)}

@pytest.mark.parametrize('family', USUAL)
def test_norms_are_frozen_with_their_biases_and_all_else_of_the_base_model_may_move(family):
    m = tiny(family)
    head = ({'lm_head.weight', 'lm_head.bias', 'classifier.weight', 'classifier.bias'}
            | {n for n in weights(m) if n.startswith(('cls.', 'lm_head.'))})
    assert set(movable(m)) == set(weights(m)) - norms_of(m) - head

def test_an_untied_head_is_frozen_where_no_prefix_says_so():
    "In most models the head stands outside the base's prefix; T5 has none"
    m = tiny('t5')
    m.lm_head.weight = torch.nn.Parameter(m.lm_head.weight.detach().clone())
    assert not anatomy(m).tied and 'lm_head.weight' in weights(m)
    assert set(movable(m)) == set(weights(m)) - norms_of(m) - {'lm_head.weight'}

@pytest.mark.parametrize('family', ['gpt2', 'bert'])
def test_a_model_without_a_head_is_all_base(family):
    m = tiny(family, 'none')
    assert set(movable(m)) == set(weights(m)) - norms_of(m)

def test_on_a_lab_model_what_may_move_is_what_it_was():
    m = load('lab-s')[0]
    assert movable(m) == parts('attention', 'mlp', 'bias', 'embedding', 'head', 'other')(m)

def test_the_norms_of_a_gpt2_stay_in_both_runs():
    ends, m = Ends(), tiny('gpt2', vocab_size=len(TOK), max_position_embeddings=128)
    was, norms = weights(m), norms_of(m)
    assert 'transformer.h.0.ln_1.bias' in norms
    tune(lt_sft(density=.5), model=m, steps=4, callbacks=(ends,))
    for after in ends.found:
        assert all(torch.equal(after[n], was[n]) for n in norms)
    assert any(not torch.equal(ends.found[0][n], was[n]) for n in was if n.endswith('bias')), 'other biases move'

def test_a_task_head_trains_whole_and_takes_no_part_in_the_ranking():
    ends, m = Ends(), classifier()
    was, norms, ranked = weights(m), norms_of(m), set(movable(m))
    head = {'classifier.weight', 'classifier.bias'}
    fit(m, TOK, label_data(), lt_sft(density=.05), steps=6, batch_size=8, lr=1e-2, progress=False,
        callbacks=(ends,))
    first, second = ends.found
    assert (all(not torch.equal(first[n], was[n]) for n in head)
            and all((second[n] != was[n]).all() for n in head))
    assert not ranked & head and not ranked & norms
    k = round(.05*sum(was[n].numel() for n in ranked))
    assert sum(len(d.index) for d in ends.attached[-1].deltas.values()) == k
    assert all(torch.equal(second[n], was[n]) for n in norms)

def test_the_second_run_starts_from_the_base_again():
    class First:
        seen = []

        def before_fit(self, state):
            state.model.eval()
            self.seen.append(logits(state.model))
            state.model.train()
    First.seen = []
    tune(lt_sft(), steps=6, callbacks=(First(),))
    base = logits(toy())
    assert len(First.seen) == 2 and all(torch.equal(x, base) for x in First.seen)

def test_the_price_of_distance():
    m = toy()
    total = sum(p.numel() for p in m.parameters())
    q = 'model.layers.0.self_attn.q_proj.weight'

    class State:
        model, device, batches, extra = m, torch.device('cpu'), [0, 1], {}

    for chosen in ({q: True}, {q: m.get_parameter(q) > 0}):
        State.attached = attach(m, chosen, None if chosen[q] is True else Entries)
        State.extra = {}
        price = short(3.)
        assert float(price(State).detach()) == 0.
        with torch.no_grad():
            next(iter(State.attached.parameters().values())).add_(-.5)
        n = next(iter(State.attached.parameters().values())).numel()
        torch.testing.assert_close(float(price(State).detach()), 3*.5*n/total/2, atol=1e-6,
                                   rtol=1e-5)
        State.attached.detach()

def test_the_price_keeps_the_change_short():
    far = [sum(float(t.abs().sum()) for t in tune(lt_sft(l1=w), steps=16).delta.tensors().values())
           for w in (0., 1e4)]
    assert 0 < far[1] < .5*far[0]

def test_sparse_changes_add_up_save_and_come_off(tmp_path):
    changes = []
    for s in (0, 1):
        run = tune(lt_sft(density=.03), steps=6, seed=s)
        changes.append({n: t.clone() for n, t in run.delta.tensors().items()})
    m = toy()
    base, was = logits(m), weights(m)
    att = compose(m, changes)
    both = logits(m)
    want = {n: was[n] + sum(c.get(n, 0.) for c in changes) for n in was}
    for n, v in att.values().items():
        torch.testing.assert_close(v, want[n], atol=1e-7, rtol=1e-6)
    with att.disabled():
        assert torch.equal(logits(m), base)
    size = save_delta(tmp_path/'both.safetensors', *pack(att), identity(toy()))
    att.detach()
    assert same(weights(m), was)
    dense = sum(p.numel()*4 for p in m.parameters())
    assert size < .5*dense
    load_delta(m, tmp_path/'both.safetensors')
    assert torch.equal(logits(m), both)
    # taking one away again leaves the other; and each holds alone
    m = toy()
    att = compose(m, [*changes, {n: -t for n, t in changes[0].items()}])
    torch.testing.assert_close(logits(m), logits(_with(changes[1])), atol=1e-5, rtol=0)
    with pytest.raises(ValueError):
        compose(toy(), [{n: torch.zeros_like(t) for n, t in changes[0].items()}])
    assert (overlap(changes[0], changes[0]) == 1. and 0 < overlap(*changes) < 1
            and overlap(dict(a=torch.ones(2)), dict(b=torch.ones(2))) == 0.)

@pytest.mark.parametrize('wrong, says', [
    (lambda w: overlap(w, dict(w=torch.ones(3))), r"'w' is \(2,\) in one change and \(3,\) in another"),
    (lambda w: overlap(w, toy()), r'b is a LlamaForCausalLM; it must be a change.*run.delta.tensors\(\)'),
    (lambda w: overlap([w], w), 'a is a list; it must be a change'),
    (lambda w: overlap(w, dict(w=3)), 'b holds a int; it must be a change'),
    (lambda w: compose(toy(), w), 'changes is a single change; it must be a list of changes'),
    (lambda w: compose(toy(), toy()), 'changes is a LlamaForCausalLM; it must be a list'),
    (lambda w: compose(toy(), [w, 3]), r'changes\[1\] is a int; it must be a change'),
    (lambda w: compose(toy(), [w, dict(w=torch.ones(3))]), r"'w' is \(2,\) in one change")])
def test_what_is_no_change_is_named(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong(dict(w=torch.ones(2)))

def _with(change):
    m = toy()
    compose(m, [change])
    return m

def test_compose_turns_matrices_as_the_model_stores_them():
    m = tiny('gpt2')
    n = next(n for n in anatomy(m).matrices()
             if m.get_parameter(n).shape[0] != m.get_parameter(n).shape[1])
    t = torch.zeros_like(m.get_parameter(n))
    t[1, 2], t[0, 5] = 1., -2.
    W = m.get_parameter(n).detach().clone()
    att = compose(m, [{n: t}])
    torch.testing.assert_close(att.values()[n], W + t)

def test_impossible_densities_are_refused():
    for d in (0., 1.1):
        with pytest.raises(ValueError, match='density is'):
            lt_sft(density=d)
    for l1 in (-.1, float('nan'), float('inf')): # below 0 it would pay for going far
        with pytest.raises(ValueError, match=f'l1 is {l1}; the weight of a penalty must be 0 or more'):
            lt_sft(l1=l1)
    assert moved_most(toy(), weights(toy(1)), ['model.norm.weight', 'model.embed_tokens.weight'],
                      1e-9)['model.embed_tokens.weight'].sum() == 1

# ---------- no second model in memory

@pytest.mark.parametrize('delta', [Entries])
@pytest.mark.parametrize('family', DECODERS + ENCODERS)
def test_a_weight_made_anew_on_the_way_back_gives_the_same_gradients(family, delta):
    m = tiny(family)
    att = attach(m, principal(2)(m), delta)
    shake(att)
    x = example_inputs()

    def grads(within):
        m.zero_grad()
        within(lambda: m(**x).logits.float().pow(2).mean()).backward()
        return {n: p.grad.clone() for n, p in att.parameters().items()}

    def recompute(loss):
        with att.recompute():
            return loss()
    a = grads(lambda price: price())
    assert same(a, grads(recompute)) and any(g.any() for g in a.values())

@pytest.mark.parametrize('recompute', [False, True])
def test_the_way_back_holds_no_second_model(recompute, monkeypatch):
    "Bytes that a price keeps until its gradient, for tensors as large as weights"
    m = toy(hidden=64)
    att = attach(m, principal(2)(m), Entries)
    kept = []

    def pack(t):
        kept.append((t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()))
        return t

    theirs = torch.autograd.graph.saved_tensors_hooks
    sizes = {v.numel()*4 for v in att.values().values()}
    bases = {att.weight(n)[0].data_ptr() for n in att.deltas}
    if recompute:
        class Both(theirs): # what our hook passes on is what is kept
            def __init__(self, ours, back):
                super().__init__(lambda t: pack(o) if isinstance(o := ours(t), torch.Tensor) else o,
                                 back)
        monkeypatch.setattr(torch.autograd.graph, 'saved_tensors_hooks', Both)
        with att.recompute():
            loss = m(**probe()).loss
    else:
        with theirs(pack, lambda t: t):
            loss = m(**probe()).loss
    held = sum(n for at, n in set(kept) if n in sizes and at not in bases)
    loss.backward()
    assert (held == 0) == recompute and all(p.grad is not None for p in att.parameters().values())

def test_a_change_that_moved_before_its_gradient_was_taken_is_an_error():
    m = toy()
    att = attach(m, principal(2)(m), Entries)
    with att.recompute():
        loss = m(**probe()).loss
    shake(att)
    with pytest.raises(RuntimeError, match='changed between a loss and its gradient'):
        loss.backward()

def test_a_value_computed_beside_the_loss_keeps_nothing_alive():
    "Its graph, which no backward frees, holds the hook that holds the model"
    m = toy()
    att, gone = attach(m, principal(2)(m), Entries), weakref.ref(m)
    with att.recompute():
        logits = m(**probe()).logits
        size, loss = logits.exp().std().item(), logits.square().mean()
    loss.backward()
    assert size > 0
    del m, att, logits, loss
    gc.collect()
    assert gone() is None

def test_lift_without_the_cpp_ends_at_the_same_weights(monkeypatch):
    def changed():
        return [tune(r).delta.attached.changes()
                for r in (lift(r=2, every=3), lift(r=2, every=3, by='magnitude'), lt_sft(.05))]

    ours = changed()
    monkeypatch.setenv('FTLAB_NATIVE', 'torch')
    assert all(same(a, b) and any(t.any() for t in a.values()) for a, b in zip(ours, changed()))
