"GoodVibe: attribution by hooks, shared changes in every layout, budgets, and grouping against a plain k-means"
import math
import pytest
import torch
from sklearn.cluster import KMeans
from tiny import inputs_for, tiny
from toys import TOK, assert_resumes, lab_data, toy
from ftlab.adapters.attach import attach, oriented
from ftlab.adapters.subsets.goodvibe import Groups, attributions, goodvibe, grouped, of_behaviour
from ftlab.core.batches import Sample, Unread
from ftlab.core.recipe import With
from ftlab.core.tokens import encode_all
from ftlab.trainers.fit import fit
from ftlab.trainers.losses.dft import dft

ROWS = encode_all(lab_data().train[:8], TOK, 'text')
DOWNS = [f'model.layers.{i}.mlp.down_proj.weight' for i in range(2)]


def sample(**more):
    return Sample(ROWS, TOK.pad_token_id, **more)


def tune(recipe, model=None, steps=4, **more):
    given = dict(batch_size=4, lr=1e-3, progress=False) | more
    return fit(model or toy(), TOK, lab_data(), recipe, steps=steps, **given)


def test_the_attribution_is_activation_times_gradient():
    model, seen = toy(), {}

    def keep(name):
        def hook(module, args):
            args[0].retain_grad()
            seen[name] = args[0]
        return hook
    for n in DOWNS:
        model.get_submodule(n.removesuffix('.weight')).register_forward_pre_hook(keep(n))
    want = dict.fromkeys(DOWNS, 0.)
    for row in ROWS:
        labels = torch.tensor([row['labels']])
        logits = model(torch.tensor([row['input_ids']])).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]).backward()
        for n in DOWNS:
            want[n] = want[n] + (seen[n]*seen[n].grad).sum((0, 1))/len(ROWS)
    for n, s in zip(DOWNS, attributions(toy(), sample(), DOWNS)):
        torch.testing.assert_close(s, want[n].abs(), rtol=1e-3, atol=1e-8)


def test_the_highest_of_each_layer_train_with_all_their_weights():
    model = toy()
    masks = of_behaviour(.25)(model, sample())
    for n, s in zip(DOWNS, attributions(model, sample(), DOWNS)):
        best = torch.zeros(80, dtype=torch.bool).index_fill(0, s.topk(20).indices, True)
        assert torch.equal(masks[n], best.expand(32, 80))
        for role in ('gate', 'up'):
            assert torch.equal(masks[n.replace('down', role)], best[:, None].expand(80, 32))


@pytest.mark.parametrize('family', 'llama qwen2 gemma gpt2 opt gpt_neox bert vit'.split())
def test_a_group_shares_one_change_in_every_family(family):
    model = tiny(family)
    masks = of_behaviour(.25, size=4, by='random')(model)
    att = attach(model, masks, With(Groups, size=4))
    ask = lambda m: m(**inputs_for(family))[0].detach()
    before = ask(model)
    for i, d in enumerate(att.deltas.values()):
        assert d.value.shape[0 if d.rows else 1] == math.ceil(len(d.index)/4)
        draw = torch.Generator().manual_seed(i)
        d.value.data = .05*torch.randn(d.value.shape, generator=draw)
    fast, other = ask(model), tiny(family)
    params = dict(other.named_parameters())
    for n, d in att.deltas.items():
        W = oriented(other, n, params[n].data).clone()
        for j, g in zip(d.index.tolist(), d.group.tolist()): # one line after another
            if d.rows:
                W[j] += d.value[g].detach()
            else:
                W[:, j] += d.value[:, g].detach()
        params[n].data.copy_(oriented(other, n, W))
    torch.testing.assert_close(fast, ask(other), atol=1e-5, rtol=1e-4)
    assert (fast - before).abs().max() > 1e-3
    att.fold()
    torch.testing.assert_close(ask(model), fast, atol=1e-5, rtol=1e-4)


def test_neurons_that_fire_alike_are_grouped_and_the_seed_decides():
    g = torch.Generator().manual_seed(0)
    centres = 5*torch.randn(3, 10, generator=g)
    of = torch.arange(30) % 3
    X = centres[of] + .1*torch.randn(30, 10, generator=g)
    found = grouped(X, 3)
    assert all(len(found[of == k].unique()) == 1 for k in range(3)) and len(found.unique()) == 3
    assert torch.equal(grouped(X, 7, 1), grouped(X, 7, 1))


def test_groups_of_a_run_are_those_of_the_activations():
    run, rand = tune(goodvibe(.4, 8)), tune(goodvibe(.4, 8, alike='random'))
    deltas = run.delta.attached.deltas
    for down in DOWNS:
        three = [deltas[down.replace('down', r)] for r in ('gate', 'up', 'down')]
        for d in three:
            assert torch.equal(d.group, three[0].group) and torch.equal(d.index, three[0].index)
        assert not torch.equal(three[0].group, rand.delta.attached.deltas[down].group)
        base, tuned = run.delta.attached.weight(down)
        moved = (tuned - base)[:, three[2].index]
        for k in three[2].group.unique():
            mine = moved[:, three[2].group == k]
            assert mine.abs().max() > 0
            assert torch.allclose(mine, mine[:, :1].expand_as(mine), atol=1e-7)


def test_the_groups_are_a_plain_k_means_of_what_the_chosen_neurons_do():
    class Keep:
        def before_fit(self, state):
            self.rows, self.seed = state.rows, state.seed

    look = Keep()
    deltas = tune(goodvibe(.4, 8), steps=1, seed=3, callbacks=(look,)).delta.attached.deltas
    base, means = toy(), dict.fromkeys(DOWNS, ())
    for n in DOWNS:
        def keep(module, args, n=n): # mean over the tokens of one row, without padding
            means[n] += (args[0].detach()[0].mean(0),)
        base.get_submodule(n.removesuffix('.weight')).register_forward_pre_hook(keep)
    for batch in Sample(look.rows, TOK.pad_token_id, seed=look.seed).take(32, 1):
        base(batch['input_ids'])
    for n in DOWNS:
        X = torch.stack(means[n], 1)
        def of(places, X=X):
            return KMeans(4, n_init=1, random_state=3).fit_predict(X[places].double().numpy())
        want = torch.from_numpy(of(deltas[n].index)).long()
        assert len(deltas[n].index) == 32 and torch.equal(deltas[n].group, want)
        assert (of(torch.arange(32)) != want.numpy()).any()


@pytest.mark.parametrize('size', (1, 4, 7))
@pytest.mark.parametrize('share', (.003, .01, .05, .1))
def test_a_budget_is_met_to_within_one_group(share, size):
    model = toy(hidden=64)
    total = sum(p.numel() for p in model.parameters())
    cost, most = 3*64, 2*math.ceil(160/size)*3*64
    ask = lambda: of_behaviour(size=size, budget=share)(model, Unread())
    if round(share*total) >= most + cost:
        with pytest.raises(ValueError, match='the budget allows'):
            ask()
        return
    att = attach(model, ask(), With(Groups, size=size))
    trained = sum(d.value.numel() for d in att.deltas.values())
    assert 0 <= round(share*total) - trained < cost
    per = [d.value.shape[1] for n, d in att.deltas.items() if 'down' in n]
    assert max(per) - min(per + [0]*(2 - len(per))) <= 1


def test_an_mlp_in_one_matrix_is_refused_and_named():
    with pytest.raises(ValueError, match='gate and up in one matrix'):
        of_behaviour(.25, by='random')(tiny('phi3'))


def test_too_small_a_budget_names_the_smallest():
    with pytest.raises(ValueError, match='have 96 to'):
        of_behaviour(budget=1e-4)(toy(), Unread())


def test_all_neurons_train_without_confusing_rows_and_columns():
    run = tune(goodvibe(1., 8))
    assert {n: d.rows for n, d in run.delta.attached.deltas.items() if '.0.' in n} == {
        'model.layers.0.mlp.gate_proj.weight': True, 'model.layers.0.mlp.up_proj.weight': True,
        'model.layers.0.mlp.down_proj.weight': False}


def test_what_trains_and_the_file_scale_with_groups(tmp_path):
    found = {}
    for size in (1, 8):
        run = tune(goodvibe(.4, size), steps=1)
        run.delta.save(tmp_path/'x.safetensors')
        found[size] = run.cost['trainable'], (tmp_path/'x.safetensors').stat().st_size
    assert found[1][0] == 8*found[8][0] == 2*32*3*32
    assert found[1][1] - found[8][1] > .9*4*(found[1][0] - found[8][0])


def test_the_task_decides_if_it_is_given():
    asked = []
    encode = lambda rows, kind: asked.append(len(rows)) or encode_all(rows, TOK, kind)
    rows = [dict(prompt=r['prompt'], response='good') for r in lab_data().train[:10]]
    recipe = goodvibe(.25, task=rows)
    with_task = recipe.select(toy(), sample(encode=encode))
    without = of_behaviour(.25)(toy(), sample())
    assert asked == [10] and any(not torch.equal(with_task[n], without[n]) for n in DOWNS)
    assert recipe.arguments['task'] and tune(recipe, steps=1).cost['trainable'] > 0


def test_a_resumed_run_keeps_its_groups(tmp_path):
    assert_resumes(lambda **more: tune(goodvibe(.4, 8), **more), tmp_path, 2)


def test_another_loss_takes_part_and_half_precision_too():
    assert tune(goodvibe()*dft()).log[-1]['loss'] > 0
    run = tune(goodvibe(), toy().bfloat16())
    assert all(d.value.dtype == torch.float32 for d in run.delta.attached.deltas.values())


@pytest.mark.parametrize('wrong, says', [
    (dict(share=0.), 'share is 0.0'), (dict(budget=1.5), 'budget is 1.5'), (dict(size=0), 'size is 0'),
    (dict(size=True), 'size is True'), (dict(rows=.5), 'rows is 0.5'), (dict(by='x'), "by is 'x'"),
    (dict(alike='x'), "alike 'x'")])
def test_wrong_arguments_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        goodvibe(**wrong)


def test_rows_are_needed_and_a_mask_must_be_lines():
    with pytest.raises(ValueError, match='there are none'):
        goodvibe().select(toy(), None)
    with pytest.raises(ValueError, match='whole rows, or of whole columns'):
        Groups(torch.zeros(3, 4), torch.eye(3, 4).bool())
