"""Every probe leaves what it measures as it was and repeats itself;
every study gives the same finite evidence for the same seed;
and each check notices one that does not"""
import importlib
import inspect
import re
import time
import pytest
import torch
from tiny import example_inputs, tiny
from ftlab.adapters.attach import attach
from ftlab.adapters.select import parts
from ftlab.beyond.brain.elm import ELM, elm, imitate, score
from ftlab.core.anatomy import UnknownArchitecture
from ftlab.core.paper import Evidence, probe, study
from ftlab.methods import paper_modules
from ftlab.trainers.rl.razor import another_order, evaluations, razor
from toys import TOK, classifier, toy


def marked(kind):
    "{key: function} of the papers of a kind, from the files' text"
    found = {}
    for key, file in paper_modules().items():
        if re.search(rf'^@{kind}\(', file.read_text(encoding='utf-8'), re.M):
            found[key] = getattr(
                importlib.import_module('.'.join(('ftlab', *file.parts[-3:-1], key))), key)
    return found


PROBES, STUDIES = marked('probe'), marked('study')
FAMILIES = ('llama', 'gpt2', 'bert')  # plain matrices, Conv1D, an encoder


def test_the_papers_of_each_kind_are_found():
    assert {'intruders', 'tuco'} <= PROBES.keys() and {'razor', 'elm'} <= STUDIES.keys()
    for kind, found in (('probe', PROBES), ('study', STUDIES)):
        for key, f in found.items():
            assert (f.paper.kind == kind and f.__name__ == key and f.paper.claim.endswith('.')
                    and f.paper.source)


# ---------- probes

def measured(f, model, change, batch):
    return (f.paper.toy['ask'] or f)(model, change, batch)


def plain(x):
    "A value in a form that can be compared bit by bit"
    if isinstance(x, torch.Tensor):
        return x.detach().clone().numpy().tobytes()
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    return [plain(v) for v in x] if isinstance(x, (list, tuple)) else x


def check_probe(f, family):
    """Raise `AssertionError` where the contract is broken;
    `ValueError` or `UnknownArchitecture` is the probe's own refusal"""
    torch.manual_seed(0)
    model, batch = tiny(family), example_inputs()
    change = attach(model, parts()(model))
    with torch.no_grad():
        for p in change.parameters().values():
            p.add_(.05*torch.randn(p.shape))
    odd = next(m for m in model.modules() if list(m.parameters(recurse=False)))
    # a mode that nobody would set, so that one that is set anew shows; without dropout it draws nothing
    odd.training = True
    state = {n: t.clone() for n, t in model.state_dict().items()}
    modes, rng = [m.training for m in model.modules()], torch.get_rng_state()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    grads = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    first = plain(measured(f, model, change, batch))
    assert modes == [m.training for m in model.modules()], 'the mode was changed'
    assert torch.equal(rng, torch.get_rng_state()), 'the random state was moved'
    now = model.state_dict()
    assert state.keys() == now.keys() and all(torch.equal(t, now[n]) for n, t in state.items()), 'the model was changed'
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()], 'hooks were left'
    assert grads == [(p.requires_grad, p.grad is None) for p in model.parameters()], 'gradients were touched'
    torch.manual_seed(123)
    assert first == plain(measured(f, model, change, batch)), 'the second answer differs'


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('key', PROBES)
def test_a_probe_is_read_only_and_repeats(key, family):
    try:
        check_probe(PROBES[key], family)
    except (UnknownArchitecture, ValueError) as e:
        assert family in str(e).lower() and len(str(e).split()) > 5, 'the error names the family'


def made_up(f):
    return probe('A Study of Nothing', '0000.00000', 'Nothing happens.', 'made up')(f)

def writes(model, change, batch):
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1

def sets_the_mode(model, change, batch):
    model.eval()

def draws(model, change, batch):
    torch.rand(1)

def leaves_a_hook(model, change, batch):
    model.register_forward_hook(lambda *a: None)

def hangs_on_luck(model, change, batch):
    with torch.random.fork_rng():
        return float(torch.rand(1))


@pytest.mark.parametrize('f, said', [(writes, 'model was changed'),
                                     (sets_the_mode, 'mode'),
                                     (draws, 'random state'),
                                     (leaves_a_hook, 'hooks'),
                                     (hangs_on_luck, 'second answer')])
def test_a_broken_probe_is_noticed(f, said):
    with pytest.raises(AssertionError, match=said):
        check_probe(made_up(f), 'llama')


# ---------- studies

def check_study(f):
    asked = inspect.signature(f).parameters
    assert 'seed' in asked and all(p.default is not p.empty for p in asked.values()), 'it runs with a seed alone'
    toy = f.paper.toy_arguments()
    rng = torch.get_rng_state()
    torch.manual_seed(7)
    start = time.process_time()
    first = f(seed=0, **toy)
    assert time.process_time() - start < 5, 'the toy setting takes over 5 s'
    assert isinstance(first, Evidence), 'no Evidence was returned'
    torch.manual_seed(123)
    assert f(seed=0, **toy) == first, 'the same seed gave other evidence'
    torch.set_rng_state(rng)
    assert f(seed=1, **toy) != first, 'another seed gave the same evidence'
    assert all(d['unit'] for d in first.to_dict().values()) and first.to_dict()


@pytest.mark.parametrize('key', STUDIES)
def test_a_study_gives_the_same_evidence_for_the_same_seed(key):
    check_study(STUDIES[key])


def invented(f):
    return study('A Study of Nothing', '0000.00000', 'Nothing happens.', 'made up')(f)

def unseeded(seed=0):
    return Evidence(dict(x=float(torch.rand(1))), dict(x='nothing'))

def constant(seed=0):
    return Evidence(dict(x=1.), dict(x='nothing'))

def numbers(seed=0):
    return dict(x=float(seed))

def slow(seed=0):
    return constant()


@pytest.mark.parametrize(
    'f, said',
    [(unseeded, 'same seed'), (constant, 'another seed'), (numbers, 'no Evidence'), (slow, 'over 5 s')])
def test_a_broken_study_is_noticed(f, said, monkeypatch):
    if f is slow:
        clock = iter((0., 5.1))
        monkeypatch.setattr(time, 'process_time', lambda: next(clock))
    with pytest.raises(AssertionError, match=said):
        check_study(invented(f))


def test_an_imitator_may_be_made_by_a_function_and_starts_as_one_layer_on_both_inputs():
    made = []
    def wide():
        made.append(ELM(48, tau_s=2.))
        return made[-1]
    model = imitate(wide, 0., seed=1, steps=1)
    assert model is made[0] and .3 < score(model, 1, 'validation') < 1
    torch.manual_seed(0)
    first = [*ELM(4, memories=5, hidden=500).from_synapses.parameters()]
    assert all(.99/3 < float(p.abs().max()) <= 1/3 for p in first)


def test_studies_refuse_a_wrong_model_in_a_sentence():
    with pytest.raises(ValueError, match='BertForSequenceClassification writes no text'):
        evaluations(classifier(), TOK, {}, None, None, [])
    with pytest.raises(ValueError, match="'lab-e' writes no text.*lab-s"):
        razor(model='lab-e')
    with pytest.raises(ValueError, match="rates has 'gru'; the arms are elm"):
        elm(rates=dict(gru=1.))
    with pytest.raises(ValueError, match="arm is 'gru'; it must be elm"):
        imitate('gru', 1e-2, steps=1)
    with pytest.raises(ValueError, match='nothing of its own to learn from'):
        another_order(toy(), TOK, [dict(prompt='sort a b', response='b a', given='a b')], [],
                      draws=1)


@pytest.mark.parametrize('values, units, said',
                         [(dict(x=float('nan')), dict(x='s'), 'finite'),
                          (dict(x=(1., float('inf'))), dict(x='s'), 'finite'),
                          (dict(x=1.), dict(y='s'), "'x' has no unit")])
def test_evidence_is_finite_and_has_units(values, units, said):
    with pytest.raises(ValueError, match=said):
        Evidence(values, units)


def test_evidence_is_a_value():
    e = Evidence({'elm.auc': .5, 'elm.steps': [1, 2]}, dict(auc='area', steps='steps'))
    assert (e == Evidence({'elm.auc': .5, 'elm.steps': (1., 2.)}, dict(auc='area', steps='steps'))
            and e['elm.auc'] == .5)
    assert e.arms() == dict(elm=dict(auc=.5, steps=(1., 2.)))
    assert e.to_dict() == {'elm.auc': dict(value=.5, unit='area'),
                           'elm.steps': dict(value=[1., 2.], unit='steps')}
