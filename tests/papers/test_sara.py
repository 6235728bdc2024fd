"sara: against the official optimizer written out in plain torch, its budgets, and what it may be combined with"
import copy
import pytest
import torch
from tiny import tiny
from toys import TOK, assert_resumes, classifier, lab_data, label_data, toy
from ftlab.adapters.attach import attach, oriented
from ftlab.adapters.delta import Entries
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.subsets.sara import entries_of, nuclear_norm, sara, weak_weights
from ftlab.core.recipe import CannotCompose
from ftlab.trainers.fit import fit
from ftlab.trainers.losses.dft import dft
from ftlab.trainers.optimizers.mezo import mezo


def count(masks):
    return sum(int(m.sum()) for m in masks.values())


def tune(recipe, model=None, steps=6, **more):
    given = dict(batch_size=4, lr=1e-3, progress=False, schedule='constant') | more
    return fit(model or toy(), TOK, lab_data(), recipe, steps=steps, **given)


@pytest.mark.parametrize('family', 'llama qwen2 gemma gpt2 opt gpt_neox bert vit'.split())
def test_what_trains_is_below_the_threshold_in_every_family(family):
    model = tiny(family)
    masks = weak_weights(5e-3)(model)
    head = [] if model.get_output_embeddings() is not None else [
        n for n, _ in model.named_parameters() if not n.startswith(model.base_model_prefix + '.')]
    for n, p in model.named_parameters():
        want = p.abs() < 5e-3 if n not in head else torch.zeros(p.shape, dtype=torch.bool)
        assert torch.equal(masks.get(n, torch.zeros_like(want)), want), n


@pytest.mark.parametrize('budget', (1e-4, .003, .1, .5, 1.))
def test_a_budget_is_met_exactly_by_the_smallest(budget):
    model = toy()
    total = sum(p.numel() for p in model.parameters())
    for by in ('smallest', 'random', 'largest'):
        assert count(weak_weights(budget=budget, by=by)(model)) == max(1, round(budget*total))
    masks = weak_weights(budget=budget)(model)
    flat = torch.cat([p.detach().abs().flatten() for p in model.parameters()])
    bound = max(float(model.get_parameter(n)[m].detach().abs().max()) for n, m in masks.items())
    assert bound == float(flat.kthvalue(max(1, round(budget*total))).values)


def test_baselines_have_as_many_entries_and_the_seed_draws():
    model = toy()
    n = {by: count(weak_weights(5e-3, by=by)(model)) for by in ('smallest', 'random', 'largest')}
    assert len(set(n.values())) == 1
    a, b = (weak_weights(5e-3, by='random')(model, seed=s) for s in (0, 1))
    assert any(not torch.equal(a[k], b[k]) for k in a)
    assert not sara(by='random').callbacks and sara().callbacks


def official(model, batches, threshold, strength, after, lr):
    """`optim/adamw2.py` written out: a threshold, Adam at those entries, the norm of one drawn matrix in the gradient,
    the mask again after some steps. `adamw.py` starts Adam afresh there, and so do we"""
    params = dict(model.named_parameters())
    masks = {n: p.detach().abs() < threshold for n, p in params.items()}
    moments, t = {}, 0
    for step, batch in enumerate(batches):
        if step == after:
            masks = {n: m & (params[n].detach().abs() < threshold) for n, m in masks.items()}
            moments, t = {}, 0
        t += 1
        model.zero_grad()
        model(**batch).loss.backward()
        names = [n for n in params if params[n].ndim == 2 and 'embed' not in n and masks[n].any()]
        draw = torch.Generator().manual_seed(hash((0, step)) % 2**63)
        one = names[int(torch.randint(len(names), (1,), generator=draw))]
        U, S, V = torch.linalg.svd(params[one].detach()*masks[one], full_matrices=False)
        for n, p in params.items():
            g = p.grad + (strength*U @ V if n == one else 0)
            m, v = moments.get(n, (0., 0.))
            m, v = .9*m + .1*g, .999*v + .001*g**2
            moments[n] = m, v
            go = lr*(m/(1 - .9**t))/((v/(1 - .999**t)).sqrt() + 1e-8)
            p.data -= go*masks[n]
    return {n: p.detach() for n, p in params.items()}


class Batches:
    "Keep what the run reads"
    def before_fit(self, state):
        self.seen = []

    def after_backward(self, state):
        self.seen += [copy.deepcopy(b) for b in state.batches]


@pytest.mark.parametrize('strength', (0., .3))
def test_a_run_is_the_official_one_written_out(strength):
    look, model = Batches(), toy(hidden=64)
    run = tune(sara(1e-2, strength=strength), model, clip=None, callbacks=(look,), lr=3e-3)
    batches = [{k: b[k] for k in ('input_ids', 'attention_mask', 'labels')} for b in look.seen]
    want = official(toy(hidden=64), batches, 1e-2, strength, 3, 3e-3)
    got = run.delta.attached.values()
    off = torch.cat([(want[n] - got.get(n, want[n])).abs().flatten() for n in want])
    base = dict(toy(hidden=64).named_parameters())
    moved = torch.cat([(want[n] - base[n].detach()).flatten() for n in want])
    assert moved.abs().max() > 3e-3 and (off > 1e-4).float().mean() < 1e-3 and off.mean() < 1e-6


def test_the_norm_pulls_what_trains_down():
    runs = {s: tune(sara(1e-2, strength=s), lr=3e-3) for s in (0., 30.)}
    norms = {}
    for s, run in runs.items():
        names = [n for n in run.delta.attached.own if 'proj' in n]
        norms[s] = sum(float(torch.linalg.svdvals(entries_of(run.delta.attached, n).detach()).sum())
                       for n in names)
    assert norms[30.] < .97*norms[0.]


@pytest.mark.parametrize('family', 'llama gpt2 bert vit'.split())
def test_the_entries_are_those_of_the_weight_in_every_layout(family):
    model = tiny(family)
    masks = weak_weights(1e-2)(model)
    att = attach(model, masks, Entries)
    for n in att.own:
        if model.get_submodule(n.rpartition('.')[0]) and masks[n].ndim == 2:
            W = oriented(model, n, att.before(n)*masks[n])
            assert torch.equal(entries_of(att, n).detach(), W), n


def test_grown_entries_are_held_whatever_the_step():
    class Values:
        def before_fit(self, state):
            self.found = []

        def after_step(self, state):
            flat = [d.value.detach() for d in state.attached.own.values()]
            self.found.append(torch.cat(flat))

    for recipe, lr in ((sara(5e-3), 3e-3), (sara(5e-3, strength=0)*mezo(), 3e-2)):
        look, model = Values(), toy()
        base = {n: p.detach().clone() for n, p in model.named_parameters()}
        chosen = weak_weights(5e-3)(model)
        tune(recipe, model, callbacks=(look,), lr=lr, weight_decay=.1)
        W0 = torch.cat([base[n][m] for n, m in chosen.items()])
        middle, end = look.found[2], look.found[-1]
        grown = (W0 + middle).abs() >= 5e-3
        assert grown.any() and not grown.all()
        assert torch.equal(middle[grown], end[grown])
        assert (middle[~grown] != end[~grown]).float().mean() > .3
    look = Values()
    tune(sara(5e-3, progressive=1), callbacks=(look,), lr=3e-3)
    assert (look.found[2] != look.found[-1]).float().mean() > .9


def test_the_gradient_of_held_entries_takes_no_part_in_clipping():
    class Grads:
        def after_backward(self, state):
            own, held = state.attached.own, state.extra['held']
            self.last = [own[n].value.grad[at] for n, at in held.items()]

    look = Grads()
    tune(sara(5e-3), callbacks=(look,), lr=3e-3)
    assert sum(map(len, look.last)) > 100 and all((g == 0).all() for g in look.last)


def test_the_norm_counts_once_in_a_step_of_several_batches():
    class Grads:
        def after_backward(self, state):
            self.flat = torch.cat([d.value.grad.clone() for d in state.attached.own.values()])

    found = {}
    for strength, n in ((0., 1), (3., 1), (3., 2)):
        found[strength, n] = look = Grads()
        tune(sara(1e-2, strength=strength), steps=1, accumulate=n, callbacks=(look,))
    torch.testing.assert_close(found[3., 1].flat, found[3., 2].flat, atol=1e-5, rtol=1e-3)
    assert (found[3., 1].flat - found[0., 1].flat).abs().max() > .1


@pytest.mark.parametrize('at', (1, 4))
def test_a_resumed_run_holds_what_the_first_one_held(at, tmp_path):
    assert_resumes(lambda **more: tune(sara(5e-3), lr=3e-3, **more), tmp_path, at)


def test_the_file_scales_with_what_trains(tmp_path):
    sizes = {}
    for share in (.05, .2):
        run = tune(sara(budget=share), steps=2)
        total = sum(p.numel() for p in toy().parameters())
        assert run.cost['trainable'] == round(share*total)
        run.delta.save(tmp_path/'delta.safetensors')
        sizes[share] = (tmp_path/'delta.safetensors').stat().st_size, run.cost['trainable']
    more, entries = sizes[.2][0] - sizes[.05][0], sizes[.2][1] - sizes[.05][1]
    assert 7*entries <= more <= 9*entries # a float32 and where it stands


def test_a_fresh_classifier_trains_whole_and_is_not_counted():
    model = classifier()
    run = fit(model, TOK, label_data(), sara(budget=.1), steps=2, batch_size=4, progress=False)
    total = sum(p.numel() for p in classifier().parameters())
    assert run.cost['trainable'] == round(.1*total)
    assert 'classifier.weight' in run.delta.attached.whole


def test_an_untied_head_takes_part_and_its_norm_does_not():
    model = toy(tied=False)
    masks = weak_weights(5e-3)(model)
    assert 'lm_head.weight' in masks and 'model.embed_tokens.weight' in masks
    only = {n: m for n, m in masks.items() if 'lm_head' in n or 'embed' in n}
    att = attach(model, only, Entries)
    given = dict(attached=att, device=torch.device('cpu'), batches=[1], seed=0, step=0, extra={})
    state = type('State', (), given)
    assert float(nuclear_norm(1.)(state)) == 0.


def test_it_runs_in_half_precision():
    run = tune(sara(5e-3), toy().bfloat16(), lr=3e-3)
    assert all(d.value.dtype == torch.float32 for d in run.delta.attached.own.values())


def test_what_it_composes_with():
    assert tune(sara()*dft()).log[-1]['loss'] > 0
    with pytest.raises(CannotCompose):
        sara()*lora()


@pytest.mark.parametrize('wrong, says', [
    (dict(threshold=0.), 'threshold is 0.0; it must be a number above 0'), (dict(threshold=True), 'threshold is True'),
    (dict(budget=0.), 'budget is 0.0'), (dict(budget=1.5), 'budget is 1.5'), (dict(by='size'), "by is 'size'"),
    (dict(strength=-1.), 'strength is -1.0'), (dict(progressive=0.), 'progressive is 0.0'),
    (dict(progressive=2), 'progressive is 2')])
def test_wrong_arguments_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        sara(**wrong)
