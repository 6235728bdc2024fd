"spider: what its page cannot say about itself"
from types import SimpleNamespace
import pytest
import torch
import torch.nn.functional as F
from tiny import inputs_for, tiny
from toys import TOK, assert_resumes, classifier, lab_data, label_data, toy, weights
from ftlab.adapters.attach import attach
from ftlab.adapters.select import everything
from ftlab.adapters.subsets.spider import PullBack, discrepancy, importance, spider
from ftlab.methods import get
from ftlab.trainers.fit import fit

SETTINGS = dict(batch_size=8, lr=1e-2, weight_decay=0., schedule='constant', clip=None,
                progress=False)


class Batches:
    "Keep the batches of a run"
    def __init__(self):
        self.seen = []

    def before_batch(self, state):
        self.seen += state.batches


def rank(q):
    "What the official code calls the rank"
    a = q.abs()
    z = (a - a.mean())/((a - a.mean())**2).sum().div(a.numel() - 1)**.5
    return 1/(1 + torch.exp(-z)) if a.max() > 0 else 0*a


def challenge(W0, G):
    "The official mask, in other words"
    r0, r = rank(W0), rank(G)
    more = r > r0
    s = torch.zeros_like(W0)
    s[more] = (r/(r0 + r))[more]
    mean = s.sum()/max(1, int((s != 0).sum()))
    return torch.minimum(s/mean, torch.ones(())) if mean > 0 else s


def by_hand(batches, lr=1e-2):
    "The official loop in plain torch: AdamW, then back towards the start by the mask"
    model = toy().train()
    params = list(model.parameters())
    base, sums = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    opt = torch.optim.AdamW(params, lr=lr, weight_decay=0.)
    for b in batches:
        logits = model(input_ids=b['input_ids'], attention_mask=b['attention_mask']).logits
        labels = b['labels'][:, 1:]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100,
                               reduction='sum')
        (loss/(labels != -100).sum()).backward()
        opt.step()
        with torch.no_grad():
            for p, W0, G in zip(params, base, sums):
                G += p.grad
                s = challenge(W0, G)
                p.copy_(W0*(1 - s) + p*s)
        opt.zero_grad()
    return weights(model)


def test_the_mask_is_the_official_one():
    g = torch.Generator().manual_seed(0)
    for shape in ((7, 5), (40,), (12, 30)):
        W0, G = torch.randn(shape, generator=g), torch.randn(shape, generator=g)**3
        torch.testing.assert_close(discrepancy(W0, G), challenge(W0, G), atol=1e-5, rtol=0)
    assert not discrepancy(torch.ones(4), torch.randn(4, generator=g)).any() # no spread: it stays
    assert torch.equal(discrepancy(torch.zeros(4), torch.tensor([1., 2, 3, 4])), torch.ones(4)) # a fresh bias is free
    assert not importance(torch.zeros(3)).any()
    assert not discrepancy(torch.randn(4, generator=g), torch.zeros(4)).any()


def test_two_steps_are_those_of_the_official_loop():
    look = Batches()
    run = fit(toy(), TOK, lab_data(), spider(), steps=2, callbacks=(look,), **SETTINGS)
    ours, theirs, base = weights(run.model), by_hand(look.seen), weights(toy())
    share = lambda x: sum(int(m.sum()) for m in x)/sum(p.numel() for p in base.values())
    off = share((ours[n] - theirs[n]).abs() > 1e-4 for n in base)
    stayed = share(ours[n] == base[n] for n in base)
    assert off < 1e-3 and .3 < stayed < .95, (off, stayed)


@pytest.mark.parametrize('family', 'llama qwen2 gemma gpt2 opt gpt_neox bert vit mixtral'.split())
def test_a_step_is_pulled_back_by_the_official_mask_on_every_family(family):
    model = tiny(family)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    att = attach(model, everything(model))
    state = SimpleNamespace(model=model, attached=att, device='cpu', data=SimpleNamespace(kind='text'))
    pull = PullBack()
    pull.before_load(state)
    model(**inputs_for(family))[0].float().square().mean().backward()
    pull.after_backward(state)
    grads = {n: 0*p if p.grad is None else p.grad for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p += .05
    pull.after_step(state)
    for n, W0 in base.items():
        s = challenge(W0, grads[n])
        torch.testing.assert_close(model.get_parameter(n).detach(), W0 + .05*s, atol=1e-5, rtol=0)
    assert 0 < sum(int((model.get_parameter(n) == W0).sum()) for n, W0 in base.items())


def test_no_entry_keeps_only_a_little():
    "What the page says: a share is 0, or above a half"
    g = torch.Generator().manual_seed(0)
    s = discrepancy(torch.randn(80, 80, generator=g), torch.randn(80, 80, generator=g))
    assert s[s > 0].min() > .5 and 0 < int((s == 0).sum())


def test_a_fresh_classifier_is_not_pulled_back():
    run = fit(classifier(), TOK, label_data(), spider(), steps=2, **SETTINGS)
    moved = {n: float((c != 0).float().mean()) for n, c in run.delta.tensors().items()}
    assert moved['classifier.weight'] > .99
    assert moved['bert.encoder.layer.0.output.dense.weight'] < .9


def test_it_goes_on_after_a_stop(tmp_path):
    run = lambda **more: fit(toy(), TOK, lab_data(), spider(), steps=4, **SETTINGS, **more)
    assert_resumes(run, tmp_path, at=2)


def test_it_goes_with_a_selection_of_whole_weights_and_says_why_not_with_others():
    run = fit(toy(), TOK, lab_data(), get('spider * hft'), steps=1, **SETTINGS)
    assert len(run.delta.tensors()) < len(weights(toy()))
    for other in ('lora(r=2)', 'lift(every=0)'):
        with pytest.raises(ValueError, match='needs whole weights that train themselves'):
            fit(toy(), TOK, lab_data(), get(f'spider * {other}'), steps=1, **SETTINGS)


def test_a_run_without_gradients_is_refused():
    with pytest.raises(ValueError, match='spider sums gradients, and this run computes none'):
        fit(toy(), TOK, lab_data(), get('spider * mezo'), steps=1, **SETTINGS)
