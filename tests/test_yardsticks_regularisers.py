"NEFTune, R-Drop, L2-SP, EWC, focal loss, replay and SDFT against their peers, on the same tensors"
import math, warnings
from functools import partial
import pytest, torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.loss.loss_for_object_detection import sigmoid_focal_loss
from ftlab import methods
from ftlab.adapters.attach import attach
from ftlab.adapters.delta import Offset
from ftlab.adapters.lowrank import LoRA
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.select import top
from ftlab.commands.memory import training_bytes
from ftlab.commands.words import with_options
from ftlab.core.batches import collate
from ftlab.core.data import Data, data
from ftlab.core.generate import answers_and_ends, generate, render
from ftlab.core.recipe import CannotCompose, Recipe
from ftlab.core.state import State
from ftlab.core.tokens import IGNORE, encode, encode_all
from ftlab.trainers.fit import fit
from ftlab.trainers.objective import token_nll
from ftlab.trainers.source import Rows
from ftlab.trainers.yardsticks.regularisers import (AtEmbeddings, Replaying, acceptable,
                                                    distance_to_start, fisher_distance, focal_loss,
                                                    has_dropout, old_rows, rewritten, two_passes,
                                                    uniform_noise)
from toys import TOK, assert_resumes, classifier, lab_data, label_data, logits, toy

NAMES = ('ewc', 'focal', 'l2_sp', 'neftune', 'r_drop', 'replay', 'sdft')
OLD = data('sort', n=60)
MADE = dict(ewc=dict(old=OLD, rows=4), replay=dict(old=OLD, share=.25), r_drop=dict(dropout=.1),
            sdft=dict(template='{prompt}', max_new_tokens=4))

def made(name):
    return getattr(methods, name)(**MADE.get(name, {}))

def tune(recipe, model=None, d=None, **more):
    how = dict(steps=3, batch_size=8, lr=1e-2, progress=False) | more
    return fit(model or toy(), TOK, d or lab_data(), recipe, **how)

def state_of(model, attached=None, rows=6, parts=1):
    "A state with its first batch, in `parts` micro-batches"
    s = State(model, TOK, attached=attached, data=lab_data())
    enc = [encode(r, TOK, 'text') for r in lab_data().train[:rows]]
    s.batches = [collate(enc[j::parts], 0) for j in range(parts)]
    s.batch, s.count = s.batches[0], sum(sum(l != IGNORE for l in e['labels'][1:]) for e in enc)
    return s

def gap(a, b):
    "How far two tensors are apart, as a share of their size"
    a, b = a.detach(), b.detach()
    return float((a - b).norm()/b.norm())

def equal(ours, theirs, params, most=1e-5):
    "Compare two losses and their gradients; print the gaps"
    mine = torch.autograd.grad(ours, params, retain_graph=True, allow_unused=True)
    other = torch.autograd.grad(theirs, params, retain_graph=True, allow_unused=True)
    assert [x is None for x in mine] == [x is None for x in other]
    flat = lambda g: torch.cat([x.flatten() for x in g if x is not None])
    assert flat(other).norm() > 0 and abs(theirs) > 0
    gaps = dict(loss=gap(ours, theirs), gradient=gap(flat(mine), flat(other)))
    print(gaps)
    assert max(gaps.values()) < most, gaps

# ---------- NEFTune

@pytest.mark.peer('neftune', 'transformers', 'outputs and gradients of one pass', tolerance=0)
@pytest.mark.parametrize('alpha', [5., 15.])
def test_neftune_is_that_of_transformers(alpha, tolerance):
    from transformers.integrations.neftune import activate_neftune, deactivate_neftune
    ours, theirs = toy(), toy()
    hook = AtEmbeddings(uniform_noise(alpha))
    hook.before_fit(State(ours))
    handle = activate_neftune(theirs, alpha)
    s = state_of(ours)
    inputs = {k: s.batch[k] for k in ('input_ids', 'attention_mask')}
    found = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        out = model(**inputs, labels=s.batch['labels'])
        out.loss.backward()
        found.append((out.logits, [p.grad for p in model.parameters()]))
    (a, ga), (b, gb) = found
    for x, y in zip([a, *ga], [b, *gb], strict=True):
        assert (x - y).abs().max() <= tolerance
    assert not torch.equal(a, logits(toy(), s.batch)) # the noise is there
    for model in (ours.eval(), theirs.eval()):
        assert torch.equal(logits(model), logits(toy()))
    hook.after_fit(None)
    deactivate_neftune(theirs, handle)
    assert torch.equal(logits(ours.train()), logits(toy()))

@pytest.mark.peer('neftune', 'transformers', 'outputs and losses of three steps', tolerance=0)
def test_neftune_trains_as_transformers_trainer_s_hook_does(tolerance):
    "Three steps of ours, and three of plain fine-tuning on a model with transformers' hook"
    from transformers.integrations.neftune import activate_neftune
    theirs = toy()
    activate_neftune(theirs, 5.)
    a, b = tune(methods.neftune(5.)), tune(Recipe(), theirs)
    assert (logits(a.model) - logits(b.model.eval())).abs().max() <= tolerance
    for x, y in zip(a.log, b.log, strict=True):
        assert abs(x['loss'] - y['loss']) <= tolerance
    assert not torch.equal(logits(a.model), logits(tune(Recipe()).model))

def test_neftune_leaves_no_hook_behind_and_no_noise_in_the_reference():
    run = tune(methods.get('asft * neftune * lora'))
    assert not run.model.get_input_embeddings()._forward_hooks
    class Broken:
        def after_step(self, state):
            raise RuntimeError('here')
    model = toy()
    with pytest.raises(RuntimeError, match='here'):
        tune(methods.neftune(), model, callbacks=(Broken(),))
    assert not model.get_input_embeddings()._forward_hooks
    assert torch.equal(logits(model), logits(toy()))

# ---------- pulls

def changes():
    "(name, model, its change) for three representations, moved away from the start"
    lo = lambda: attach(model, lora().select(model), partial(LoRA, r=2))
    for kind in ('whole', 'lora', 'sparse'):
        model = toy()
        if kind == 'whole':
            att = attach(model, {n: True for n, _ in model.named_parameters()})
        else:
            att = lo() if kind == 'lora' else attach(model, top(torch.abs, .1)(model))
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(1)
            for p in att.parameters().values():
                p += .02*torch.randn_like(p)
        yield kind, model, att

def by_hand(att, base):
    "(name, weight minus start), each computed in another way than by the delta's forward"
    for n, p in att.parameters().items():
        if '::' not in n:
            yield n, p - base[n]
    for n, d in att.deltas.items():
        if isinstance(d, LoRA):
            yield n, d.s*d.B @ d.A
        else:
            yield n, torch.zeros(base[n].numel()).index_put((d.index.long(),), d.value).view_as(
                base[n])

def test_l2_sp_is_its_formula_for_weights_and_through_deltas():
    base = dict(toy().named_parameters())
    for kind, model, att in changes():
        s = state_of(model, att, parts=2)
        ours = sum(distance_to_start(.3)(s) for s.batch in s.batches)
        theirs = .15*sum(x.square().sum() for _, x in by_hand(att, base))
        assert bool(att.deltas) == (kind != 'whole')
        print(kind)
        equal(ours, theirs, list(att.parameters().values()))

def old_fisher(names):
    "The Fisher by `backward`, a row at a time, with the rows that the term reads"
    s = state_of(toy())
    rows = old_rows(OLD, s, 4)
    found = {n: 0. for n in names}
    for r in rows:
        model = toy()
        b = collate([r], 0)
        lp = model(b['input_ids'], b['attention_mask']).logits[0, :-1].log_softmax(-1)
        y = b['labels'][0, 1:]
        on = y != IGNORE
        lp[on, y[on]].sum().backward()
        p = dict(model.named_parameters())
        found = {n: f + p[n].grad**2/len(rows) for n, f in found.items()}
    return found

def test_ewc_is_its_formula_for_weights_and_through_deltas():
    base = dict(toy().named_parameters())
    for kind, model, att in changes():
        s = state_of(model, att, parts=2)
        before = logits(model)
        term = fisher_distance(OLD, 50., 4)
        ours = sum(term(s) for s.batch in s.batches)
        assert torch.equal(logits(model), before)
        assert {n: p.requires_grad for n, p in att.parameters().items()} == dict.fromkeys(
            att.parameters(), True)
        want = dict(by_hand(att, base))
        fisher = old_fisher(want)
        found = term.fisher(s)
        assert found.keys() == want.keys()
        flat = lambda d: torch.cat([d[n].flatten() for n in want])
        print(kind, 'Fisher', gap(flat(found), flat(fisher)))
        assert gap(flat(found), flat(fisher)) < 1e-5
        theirs = 25*sum((fisher[n]*x.square()).sum() for n, x in want.items())
        equal(ours, theirs, list(att.parameters().values()))
        trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trains == sum(p.numel() for p in att.parameters().values())

def test_pulls_of_half_precision_are_computed_in_float32():
    model, base = toy().bfloat16(), dict(toy().bfloat16().named_parameters())
    att = attach(model, {n: True for n, _ in model.named_parameters()})
    s = state_of(model, att)
    fisher = fisher_distance(OLD, 50., 40).fisher(s)
    want = {n: torch.zeros(p.shape) for n, p in base.items()}
    for r in old_rows(OLD, s, 40):
        b = collate([r], 0)
        out = model(input_ids=b['input_ids'], attention_mask=b['attention_mask'])
        loss = token_nll(out.logits, b['labels']).sum()
        for n, g in zip(want, torch.autograd.grad(loss, list(model.parameters()))):
            want[n] += g.float().square()/40
    assert all(gap(fisher[n], f) < 1e-5 for n, f in want.items() if f.norm() > 0)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for p in model.parameters():
            p += .02*torch.randn_like(p)
    far = sum((p.float() - base[n].float()).square().sum() for n, p in model.named_parameters())
    assert gap(distance_to_start(.3)(s), .15*far) < 1e-5

def conv1d(**more):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(
            vocab_size=len(TOK), n_positions=32, n_embd=30, n_layer=1, n_head=2, bos_token_id=1,
            eos_token_id=2, pad_token_id=0, **more)).eval()

def test_pulls_of_weights_that_are_stored_transposed():
    model = conv1d()
    att = attach(model, lora().select(model), partial(LoRA, r=2))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for p in att.parameters().values():
            p += .02*torch.randn_like(p)
    s, far = state_of(model, att), {n: d.s*d.B @ d.A for n, d in att.deltas.items()}
    term = fisher_distance(OLD, 50., 4)
    want = 25*sum((term.fisher(s)[n].T*x.square()).sum() for n, x in far.items())
    assert gap(distance_to_start(.3)(s), .15*sum(x.square().sum() for x in far.values())) < 1e-5
    assert gap(term(s), want) < 1e-5

def test_the_dry_run_counts_what_pulls_and_passes_hold():
    size = 4*toy().num_parameters()
    of = lambda r: training_bytes(toy(), r, shape=(4, 16))
    plain, twice = of(Recipe()), of(methods.r_drop())
    assert of(methods.l2_sp())['reference'] == 2*size and of(made('ewc'))['reference'] == 3*size
    assert twice['activations'] == 2*plain['activations'] and not plain['reference']
    model = toy()
    under = 4*sum(model.get_parameter(n).numel() for n in lora().select(model))
    assert of(methods.l2_sp()*methods.lora())['reference'] == under
    assert of(made('ewc')*methods.lora())['reference'] == 2*under

@pytest.mark.parametrize('name, none, strong', [('l2_sp', dict(alpha=0.), dict(alpha=1e3)),
                                                ('ewc', dict(strength=0.), dict(strength=1e6))])
def test_a_pull_of_nothing_is_plain_and_a_strong_one_holds(name, none, strong):
    make = partial(getattr(methods, name), **MADE.get(name, {}))
    assert torch.equal(logits(tune(make(**none)).model), logits(tune(Recipe()).model))
    far = lambda r: float(sum((v - toy().get_parameter(n)).detach().square().sum()
                              for n, v in r.delta.attached.values().items()))
    held, plain = (tune(r, steps=20, lr=1e-3) for r in (make(**strong), Recipe()))
    assert far(held) < .7*far(plain)

def test_ewc_keeps_old_rows_likelier_than_plain_fine_tuning():
    "On the model that learned them: the Fisher knows which weights matter"
    old_nll = lambda model: float(F.cross_entropy(*(lambda b: (
        logits(model, b)[:, :-1].flatten(0, 1), b['labels'][:, 1:].flatten()))(
            collate(encode_all(OLD.train, TOK, 'text'), 0))))
    base = tune(Recipe(), d=OLD, steps=80, lr=3e-3).model.state_dict()
    def after(recipe):
        model = toy()
        model.load_state_dict(base)
        return old_nll(tune(recipe, model, steps=25, lr=1e-3).model)
    plain, held = after(Recipe()), after(methods.ewc(OLD, strength=1e4, rows=40))
    assert held < plain - .1

def test_pulls_refuse_a_change_of_activations():
    for penalty in (methods.l2_sp(), made('ewc')):
        with pytest.raises(ValueError, match='changes activations'):
            tune(Recipe(select=lora().select, delta=Offset)*penalty)

# ---------- focal

@pytest.mark.peer('focal', 'transformers',
                  'loss and gradient for two classes', tolerance=dict(rtol=1e-5))
@pytest.mark.parametrize('gamma', [.5, 1., 2.])
def test_focal_is_that_of_transformers_for_two_classes(gamma, tolerance):
    x = torch.randn(40, generator=torch.Generator().manual_seed(0)).mul(3).requires_grad_()
    y = torch.arange(40) % 2
    s = State(lambda **_: type('Out', (), dict(logits=torch.stack([torch.zeros(40), x], 1))))
    s.batch, s.count = dict(labels=y), 40
    p, ce = x.sigmoid(), F.binary_cross_entropy_with_logits(x, y.float(), reduction='none')
    right = p*y + (1 - p)*(1 - y)
    equal(focal_loss(gamma)(s), (ce*(1 - right)**gamma).mean(), [x]) # the formula
    # one column, so that theirs is the mean over the 40 examples
    theirs = sigmoid_focal_loss(x[:, None], y.float()[:, None], 40, alpha=-1, gamma=gamma)
    equal(focal_loss(gamma)(s), theirs, [x], tolerance['rtol'])

@pytest.mark.parametrize('gamma', [0., .5, 2.])
def test_focal_is_its_formula_over_a_vocabulary(gamma):
    s = state_of(toy(), parts=2)
    ours = theirs = 0.
    for s.batch in s.batches:
        ours = ours + focal_loss(gamma)(s)
        y = s.batch['labels'][:, 1:]
        p = s.forward()[:, :-1].softmax(-1)[y != IGNORE]
        p = p.gather(1, y[y != IGNORE][:, None])
        theirs = theirs - ((1 - p)**gamma*p.log()).sum()/s.count
    equal(ours, theirs, list(s.model.parameters()))

def test_focal_of_a_certain_token_has_a_finite_gradient():
    x = torch.tensor([[200., 0.], [0., 1.]], requires_grad=True)
    s = State(lambda **_: type('Out', (), dict(logits=x)))
    s.batch, s.count = dict(labels=torch.tensor([0, 0])), 2
    focal_loss(.5)(s).backward()
    assert x.grad.isfinite().all()

def test_focal_with_gamma_0_trains_as_plain():
    assert torch.equal(logits(tune(methods.focal(0.)).model), logits(tune(Recipe()).model))

# ---------- R-Drop

def official_kl(p, q):
    "compute_kl_loss of the official README, before it is summed"
    p_loss = F.kl_div(F.log_softmax(p, -1), F.softmax(q, -1), reduction='none')
    q_loss = F.kl_div(F.log_softmax(q, -1), F.softmax(p, -1), reduction='none')
    return (p_loss.sum(-1) + q_loss.sum(-1))/2

@pytest.mark.parametrize('alpha', [0., 1., 1e5])
def test_r_drop_is_the_official_formula(alpha):
    # in double precision, because alpha multiplies a difference of nearly equal numbers
    s = state_of(toy(dropout=.5).double().train())
    torch.manual_seed(0)
    ours = two_passes(alpha)(s)
    torch.manual_seed(0)
    first, second = (s.forward()[:, :-1] for _ in range(2))
    y = s.batch['labels'][:, 1:]
    on = y != IGNORE
    nll = sum(F.cross_entropy(x[on], y[on]) for x in (first, second))/2
    theirs = nll + alpha*official_kl(first, second)[on].mean()
    equal(ours, theirs, list(s.model.parameters()))

def test_r_drop_says_that_a_model_has_no_dropout():
    with pytest.raises(ValueError, match=r'this model has none.*r_drop\(dropout=.1\)'):
        tune(methods.r_drop())
    assert not has_dropout(toy()) and has_dropout(toy(dropout=.1))
    assert has_dropout(torch.nn.Sequential(torch.nn.Dropout(.1)))
    run = tune(methods.r_drop(), toy(dropout=.1))
    assert math.isfinite(run.log[-1]['loss'])
    # a fresh LoRA gives equal passes; its dropout counts all the same, and so does NEFTune's noise
    tune(methods.get('lora(dropout=.1) * r_drop'))
    tune(methods.get('neftune * r_drop'))

def test_r_drop_of_a_classifier():
    d = label_data()
    run = fit(classifier(len(d.labels)), TOK, d, methods.r_drop(dropout=.2), steps=2, batch_size=4,
              progress=False)
    assert run.log[0]['loss'] != run.log[0]['nll']

# ---------- replay

@pytest.mark.parametrize('share, batch_size, parts', [
    (.1, 8, 1), (.25, 6, 2), (.5, 4, 4), (1/3, 9, 3)])
def test_replay_counts(share, batch_size, parts):
    new = encode_all(lab_data().train, TOK, 'text')
    s = State(toy(), TOK, data=lab_data(), rows=new,
              settings=dict(batch_size=batch_size, accumulate=parts))
    source = Replaying(s, OLD, share)
    known = {tuple(e['input_ids']) for e in source.old}
    assert not known & {tuple(e['input_ids']) for e in new}
    seen, first = 0, []
    for s.step in range(12):
        batches = source.next(s)
        assert [len(b['labels']) for b in batches] == [batch_size//parts]*parts
        rows = [tuple(i[m.bool()].tolist()) for b in batches
                for i, m in zip(b['input_ids'], b['attention_mask'])]
        seen += sum(r in known for r in rows)
        first += [r for r in rows if r not in known]
        assert seen == math.floor(share*batch_size*(s.step + 1) + 1e-9)
    # the new rows are the first ones of plain fine-tuning
    plain = Rows(new, batch_size, seed=s.seed)
    want = [tuple(i[m.bool()].tolist()) for s.step in range(12) for b in plain.next(s)
            for i, m in zip(b['input_ids'], b['attention_mask'])]
    assert sorted(first) == sorted(want[:len(first)])

def test_replay_reads_what_mix_reads_and_says_what_is_wrong():
    d = label_data()
    with pytest.raises(ValueError, match=r'as in \'replay\(old="sort"\)\'') as e:
        tune(methods.replay())
    assert with_options(str(e.value), ['old']) == str(e.value) # --old is another thing
    with pytest.raises(ValueError, match='old rows are needed'):
        tune(methods.ewc())
    with pytest.raises(ValueError, match="old rows are of kind 'label'"):
        tune(methods.replay(d))
    rows = [dict(r) for r in OLD.train]
    read = methods.replay(rows)
    assert isinstance(dict(read.source.options)['old'], Data)
    assert 'prompt' not in str(read.describe()) and len(str(read.describe())) < 300
    mixed = {'sort': .5, 'reverse': .5}
    assert methods.replay(mixed).arguments['old'] == mixed
    assert len(old_rows(mixed, state_of(toy()), 10)) == 10

@pytest.mark.parametrize('make', [methods.replay, methods.ewc])
def test_another_content_of_a_file_is_another_run(make, tmp_path):
    file, told = tmp_path/'old.jsonl', []
    for word in 'ab':
        rows = (f'{{"prompt": "{word} {i}", "response": "b"}}\n' for i in range(40))
        file.write_text(''.join(rows))
        told += [make(str(file)).describe(), make({str(file): .5, 'sort': .5}).describe()]
    assert told[0] != told[2] and told[1] != told[3]
    assert str(file) in told[0]['arguments']['old']
    assert make('sort').arguments['old'] == 'sort'

def test_replay_of_labels_in_another_order():
    new = label_data()
    names = list(reversed(new.labels))
    old = data([dict(text=f'{r["text"]} a', label=new.labels[r['label']]) for r in new.train],
               labels=names)
    assert old.labels == names
    s = State(classifier(3), TOK, data=new)
    got = [e['labels'] for e in old_rows(old, s)]
    assert [new.labels[i] for i in got] == [old.labels[r['label']] for r in old.train]

# ---------- SDFT

def talker():
    "A model that ends some answers early and others not; one with tied embeddings says nothing"
    model = toy(1, hidden=64, tied=False)
    with torch.no_grad():
        model.lm_head.weight[TOK.eos_token_id] *= 2.5
    return model

def always(row, said):
    return True

def test_sdft_trains_on_what_a_hand_written_generation_accepts():
    rows = lab_data().train[:20]
    model = talker()
    def accept(row, said):
        return len(said.split()) > 2
    own = rewritten(model, TOK, rows, '{prompt} {response}', accept, max_new_tokens=6)
    found = []
    for r, o in zip(rows, own):
        ids = torch.tensor(render([f'{r["prompt"]} {r["response"]}'], TOK))
        new = []
        for _ in range(6):
            new.append(int(model(ids).logits[0, -1].argmax()))
            if new[-1] == TOK.eos_token_id:
                break
            ids = torch.cat([ids, torch.tensor([[new[-1]]])], 1)
        said = TOK.decode(new, skip_special_tokens=True).strip()
        ended = new[-1] == TOK.eos_token_id
        found.append((ended, accept(r, said)))
        assert o == (dict(r, response=said) if ended and accept(r, said) else r)
    assert {(False, True), (True, True)} <= set(found)

def test_an_answer_that_was_cut_is_not_accepted():
    "Also if the position table cuts it, before `max_new_tokens`"
    rows, model = lab_data().train[:20], conv1d(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[TOK.eos_token_id] *= 2.5
    asked = [r['prompt'] for r in rows]
    found = answers_and_ends(model, TOK, asked, 40)
    assert [said for said, _ in found] == generate(model, TOK, asked, 40)
    own = rewritten(model, TOK, rows, '{prompt}', always, max_new_tokens=40)
    assert {ended for _, ended in found} == {True, False}
    assert own == [dict(r, response=said) if ended else r for r, (said, ended) in zip(rows, found)]

def test_sdft_with_nothing_accepted_is_plain_and_otherwise_not():
    never = methods.sdft('{prompt}', accept=lambda row, said: False, max_new_tokens=3)
    with pytest.warns(UserWarning, match='none of 24 rewritings is acceptable, so sdft is plain'):
        same = tune(never)
    assert torch.equal(logits(same.model), logits(tune(Recipe()).model))
    all_of_them = methods.sdft('{prompt}', accept=always, max_new_tokens=60)
    with warnings.catch_warnings(action='error'):
        run = tune(all_of_them, talker(), steps=1)
    assert run.source.rows != encode_all(lab_data().train, TOK, 'text')

def test_what_is_acceptable():
    plain = dict(prompt='why?', response='because')
    assert acceptable(plain, 'it is so') and not acceptable(plain, '')
    assert not acceptable(plain, 'As the Reference Answer says') and not acceptable(plain, 'Your turn')
    lab = OLD.train[0]
    assert acceptable(lab, lab['response']) and not acceptable(lab, lab['response'] + ' a')

# ---------- all of them: resumed, combined, as values, wrong arguments

def to_resume(name):
    "With a source that differs from the data, also for SDFT"
    if name == 'sdft':
        return methods.sdft('{prompt}', accept=always, max_new_tokens=6)
    return made(name)

@pytest.mark.parametrize('name', NAMES)
def test_resumed_is_uninterrupted(name, tmp_path):
    how = dict(steps=4, lr=1e-3)
    def tune(recipe, **more):
        return fit(talker(), TOK, lab_data(), recipe, batch_size=8, progress=False, **more)

    whole = assert_resumes(lambda **more: tune(to_resume(name), **how, **more), tmp_path, 2)
    plain = tune(Recipe(), **how)
    assert not torch.equal(logits(whole.model), logits(plain.model))

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('other', ['lora', 'hft'])
def test_with_deltas(name, other):
    run = tune(made(name)*methods.get(other))
    assert not torch.equal(logits(run.model), logits(toy()))
    with run.disabled():
        assert torch.equal(logits(run.model), logits(toy()))

def test_what_goes_together():
    both = methods.get('neftune * l2_sp * dft * masked_thought')
    assert len(both.terms) == 1 and both.views and both.callbacks
    tune(both)
    tune(made('replay')*methods.get('masked_thought')*made('ewc')*methods.l2_sp())
    for a, b in (('focal', 'r_drop'), ('focal', 'dft'), ('replay', 'sdft'), ('replay', 'dpo')):
        with pytest.raises(CannotCompose):
            methods.get(f'{a} * {b}')

@pytest.mark.parametrize('name', NAMES)
def test_recipes_are_values(name):
    assert made(name) == made(name) and made(name) != Recipe()

@pytest.mark.parametrize('make, says', [
    (lambda: methods.neftune(-1.), 'alpha is -1.0; it must be a number of at least 0'),
    (lambda: methods.neftune('5'), "alpha is '5'"), (lambda: methods.l2_sp(-.1), 'alpha is -0.1'),
    (lambda: methods.focal(-2.), 'gamma is -2.0'), (lambda: methods.ewc(OLD, -1.), 'strength is -1.0'),
    (lambda: methods.ewc(OLD, rows=0), 'rows is 0; it must be a whole number of at least 1'),
    (lambda: methods.replay(OLD, 1.), 'share is 1.0; it must be above 0 and below 1'),
    (lambda: methods.replay(OLD, 0), 'share is 0'), (lambda: methods.r_drop(-1.), 'alpha is -1.0'),
    (lambda: methods.r_drop(dropout=1.), 'dropout is 1.0; it must be at least 0 and below 1'),
    (lambda: methods.sdft('{response}'), 'leaves out {prompt}'),
    (lambda: methods.sdft(temperature=-1.), 'temperature is -1.0'),
    (lambda: methods.sdft(max_new_tokens=0), 'max_new_tokens is 0; it must be a whole number of at least 1'),
    (lambda: tune(methods.sdft('{prompt} {answer}')), 'cannot be filled'),
    (lambda: tune(methods.sdft(), classifier(), label_data()), "of kind 'label'"),
    (lambda: AtEmbeddings(uniform_noise()).before_fit(State(torch.nn.Linear(2, 2))),
     'uniform_noise.*Linear has none')])
def test_wrong_arguments_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()
