"neuroada: what its page cannot say about itself"
import pytest
import torch
from tiny import inputs_for, tiny
from toys import TOK, lab_data, toy
from ftlab.adapters.attach import attach, oriented
from ftlab.adapters.delta import Entries
from ftlab.adapters.select import parts
from ftlab.adapters.subsets.neuroada import neuroada, per_neuron
from ftlab.core.batches import collate
from ftlab.core.tokens import encode
from ftlab.trainers.fit import fit


def count(masks):
    return sum(int(m.sum()) for m in masks.values())


def matrices(model):
    params = dict(model.named_parameters())
    names = [n for n in parts()(model) if params[n].ndim == 2]
    return {n: oriented(model, n, params[n].detach()) for n in names}


@pytest.mark.parametrize('family', 'llama qwen2 gemma gpt2 opt gpt_neox bert vit'.split())
def test_the_entries_are_those_of_the_official_code_on_every_family(family):
    "topk over each row of |W|, as in `select_perCell`, and the layer adds them as `update_model` does"
    model = tiny(family)
    masks, Ws = per_neuron(3)(model), matrices(model)
    assert masks.keys() == Ws.keys() and count(masks) == 3*sum(len(W) for W in Ws.values())
    changed = {}
    for n, W in Ws.items():
        at = W.abs().topk(3, dim=1).indices
        mask = torch.zeros_like(W, dtype=torch.bool).scatter(1, at, True)
        assert torch.equal(mask, oriented(model, n, masks[n]))
        changed[n] = oriented(model, n, W.scatter_add(1, at, torch.full(at.shape, .05)))
    att = attach(model, masks, Entries)
    for p in att.parameters().values():
        p.data.fill_(.05)
    ask = lambda m: m(**inputs_for(family))[0].detach()
    ours, other = ask(model), tiny(family)
    before = ask(other)
    for n, p in other.named_parameters():
        if n in changed:
            p.data.copy_(changed[n])
    torch.testing.assert_close(ours, ask(other), atol=1e-5, rtol=0)
    assert (ours - before).abs().max() > 1e-3


def test_a_narrow_row_trains_whole_and_a_wide_one_k():
    model = tiny('llama') # rows of 32 and of 80
    masks = per_neuron(40)(model)
    got = {W.shape[1]: int(masks[n].sum(1).max()) for n, W in matrices(model).items()}
    assert got == {32: 32, 80: 40}


def test_a_budget_is_a_share_of_the_model_in_steps_of_one_entry_a_neuron():
    model = toy()
    total = sum(p.numel() for p in model.parameters())
    rows = sum(len(W) for W in matrices(model).values())
    for share in (.001, .05, .2):
        got = count(per_neuron(budget=share)(model))
        assert got == rows*max(1, round(share*total/rows))
    for each in ('tensor', 'model'):
        got = count(per_neuron(budget=.05, each=each)(model))
        assert abs(got - .05*total) <= len(matrices(model))
    with pytest.raises(ValueError, match='use a smaller budget'):
        per_neuron(budget=1.)(model)


def test_the_baselines():
    model = toy()
    batches = [collate([encode(r, TOK, 'text') for r in lab_data().train[:4]], TOK.pad_token_id)]
    by = {b: per_neuron(2, by=b)(model, batches) for b in ('magnitude', 'smallest', 'gradient', 'random')}
    assert len({count(m) for m in by.values()}) == 1
    n = 'model.layers.0.mlp.up_proj.weight'
    W = model.get_parameter(n)
    model(**{k: v for k, v in batches[0].items()}).loss.backward()
    of = {b: lambda x: x.abs().topk(2, dim=1).indices.sort(1).values for b in by}
    for b, x in dict(magnitude=W, gradient=W.grad, smallest=1/W.detach()).items():
        assert torch.equal(by[b][n].nonzero()[:, 1].view(-1, 2), of[b](x)), b
    assert not torch.equal(by['random'][n], per_neuron(2, by='random')(model, seed=1)[n])
    in_model = per_neuron(2, each='model')(model)
    flat = torch.cat([w.abs().flatten() for w in matrices(model).values()])
    least = min(float(matrices(model)[k].abs()[m].min()) for k, m in in_model.items())
    assert least == float(flat.topk(count(in_model)).values.min())


def test_the_smallest_are_the_smallest_in_bfloat16_and_over_the_model():
    model = toy().bfloat16()
    Ws = {n: W.abs().float() for n, W in matrices(model).items()}
    rows = per_neuron(2, by='smallest')(model)
    for n, W in Ws.items(): # of equal ones any will do
        assert torch.equal(W[rows[n]].view(-1, 2).max(1).values, W.kthvalue(2, dim=1).values)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 50 # another spread must not change who competes
    Ws = {n: W.abs().float() for n, W in matrices(model).items()}
    masks = per_neuron(2, by='smallest', each='model')(model)
    flat, k = torch.cat([W.flatten() for W in Ws.values()]), count(masks)
    assert max(float(Ws[n][m].max()) for n, m in masks.items()) == float(flat.kthvalue(k).values)


@pytest.mark.parametrize('family', 'mixtral qwen2_moe'.split())
def test_in_a_mixture_of_experts_the_tensors_of_experts_stay(family):
    masks = per_neuron(2)(tiny(family))
    assert masks and not any('experts.' in n and 'shared' not in n for n in masks)


def test_the_file_scales_with_what_trains(tmp_path):
    sizes = {}
    for k in (1, 4):
        run = fit(toy(), TOK, lab_data(), neuroada(k), steps=1, batch_size=4, progress=False)
        values = [p for d in run.delta.attached.deltas.values() for p in d.parameters()]
        trained = sum(p.numel() for p in values)
        assert trained == run.cost['trainable'] == count(per_neuron(k)(toy()))
        run.delta.save(tmp_path/f'{k}.safetensors')
        sizes[k] = (tmp_path/f'{k}.safetensors').stat().st_size, run.cost['trainable']
    more, entries = sizes[4][0] - sizes[1][0], sizes[4][1] - sizes[1][1]
    assert 4*entries <= more <= 9*entries # float32 values, and where they stand


@pytest.mark.parametrize('wrong, says', [
    (dict(k=0), 'k is 0; it must be a whole number'), (dict(k=1.5), 'k is 1.5'), (dict(by='size'), "by is 'size'"),
    (dict(each='neuron'), "each 'neuron'"), (dict(budget=0.), 'budget is 0.0'), (dict(budget=1.5), 'budget is 1.5')])
def test_wrong_arguments_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        neuroada(**wrong)
