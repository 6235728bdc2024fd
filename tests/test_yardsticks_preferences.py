"IPO, SimPO, ORPO and KTO against trl's own losses on the same tensors (skipped without trl)"
import copy
from types import SimpleNamespace
import pytest, torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from ftlab import methods
from ftlab.core.batches import collate
from ftlab.core.data import data
from ftlab.core.state import State
from ftlab.core.tokens import IGNORE, encode
from ftlab.trainers.fit import fit
from ftlab.trainers.preferences import Pairs, answer_logp
from ftlab.trainers.yardsticks.preferences import (Judged, answer_lengths, desirability, log_odds,
                                                   margin_target, mean_margin, odds_ratio,
                                                   reference_point, with_answer_of)
from toys import TOK, assert_resumes, lab_data, logits, toy

NAMES = ('ipo', 'kto', 'orpo', 'simpo')
quiet = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::UserWarning')

def worse(row):
    return ' '.join(row['response'].split()[::-1][:3]) + ' a'

def pair_data(n=10):
    return data([dict(r, rejected=worse(r)) for r in lab_data().train[:n]])

def kto_data(n=12, label=lambda i: i % 3 > 0):
    return data([dict(prompt=r['prompt'], completion=r['response'], label=label(i))
                 for i, r in enumerate(lab_data().train[:n])], carry='label')

def state_of(d, source, batch_size=None, accumulate=1, limit=None):
    "A policy and another model as its reference, with the first batch"
    policy, reference = toy(0), toy(1)
    s = State(policy, TOK, dict(policy=policy, reference=reference), data=d, limit=limit,
              settings=dict(batch_size=batch_size or len(d.train), accumulate=accumulate))
    s.batches = source(s).next(s)
    s.batch = s.batches[0]
    return s

def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])

def equal(objective, state, theirs, rtol):
    """`theirs(policy) -> loss`; compare loss and gradient, and print the gaps, as shares of their
    size"""
    ours = objective(state)
    ours.backward()
    other = toy(0)
    loss = theirs(other)
    loss.backward()
    mine, g = gradient(state.model), gradient(other)
    gaps = dict(loss=float(abs(ours - loss).detach()/abs(loss).detach()),
                gradient=float((mine - g).norm()/g.norm()))
    print(type(objective).__name__, float(loss.detach()), gaps)
    assert g.norm() > 0 and max(gaps.values()) < rtol, gaps

def run_on(model, batch):
    return model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits

def token_logps(model, batch):
    "An independent way to the log-probabilities of the answers' tokens, and where they are"
    lp = run_on(model, batch)[:, :-1].log_softmax(-1)
    y = batch['labels'][:, 1:]
    on = y != IGNORE
    return lp.gather(-1, y.clamp(min=0)[..., None])[..., 0]*on, on

# ---------- equal to trl

@pytest.fixture
def trl():
    return pytest.importorskip('trl', reason='trl is in the bench extra')

def common(folder, **more):
    return dict(output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
                gradient_checkpointing=False) | more

def as_pairs(d):
    import datasets
    return datasets.Dataset.from_list([dict(prompt=r['prompt'], chosen=' ' + r['response'],
                                            rejected=' ' + r['rejected']) for r in d.train])

def as_answers(d):
    import datasets
    return datasets.Dataset.from_list([dict(prompt=r['prompt'], completion=' ' + r['response'],
                                            label=r['label']) for r in d.train])

@pytest.mark.peer('ipo', 'trl', 'loss and gradient', tolerance=dict(rtol=1e-5))
@quiet
@pytest.mark.parametrize('beta', [.1, .7])
def test_ipo_is_trl_s(trl, beta, tmp_path, tolerance):
    d = pair_data()
    s = state_of(d, Pairs)
    b = s.batch

    def theirs(policy):
        args = trl.DPOConfig(**common(tmp_path, beta=beta, loss_type='ipo', max_length=None))
        trainer = trl.DPOTrainer(model=policy, ref_model=toy(1), args=args, processing_class=TOK,
                                 train_dataset=as_pairs(d))
        return trainer.compute_loss(
            policy, dict(input_ids=b['input_ids'], attention_mask=b['attention_mask'],
                         completion_mask=(b['labels'] != IGNORE).long()))

    equal(margin_target(beta), s, theirs, **tolerance)

@pytest.mark.peer('simpo', 'trl', 'loss and gradient', tolerance=dict(rtol=1e-5))
@quiet
@pytest.mark.parametrize('beta, gamma', [(2., 1.), (.5, .3)])
def test_simpo_is_trl_s(trl, beta, gamma, tmp_path, tolerance):
    from trl.experimental.cpo import CPOTrainer
    s = state_of(pair_data(), Pairs)
    n = len(s.batch['labels'])//2
    half = lambda k, side: s.batch[k][side*n:(side + 1)*n]
    batch = {f'{name}_{k}': half(k, side) for side, name in enumerate(('chosen', 'rejected'))
             for k in ('input_ids', 'attention_mask', 'labels')}
    # its constructor needs no more than these for a loss; its collator would tokenize in another way
    trainer = object.__new__(CPOTrainer)
    vars(trainer).update(
        loss_type='simpo', simpo_gamma=gamma, beta=beta, cpo_alpha=0., alpha=0.,
        label_smoothing=0., is_encoder_decoder=False, aux_loss_enabled=False, pad_token_id=0,
        accelerator=SimpleNamespace(device=torch.device('cpu'), gather_for_metrics=lambda x: x))
    equal(mean_margin(beta, gamma), s,
          lambda policy: trainer.get_batch_loss_metrics(policy, batch)[0], **tolerance)

@pytest.mark.peer('orpo', 'trl',
                  'the comparison term on the odds, added to a cross-entropy of ours',
                  tolerance=dict(rtol=1e-5))
@quiet
@pytest.mark.parametrize('beta', [.1, 1.])
def test_orpo_is_trl_s(trl, beta, tolerance):
    from trl.experimental.orpo import ORPOTrainer
    s = state_of(pair_data(), Pairs)
    y = s.batch['labels']
    trainer = object.__new__(ORPOTrainer)
    vars(trainer).update(beta=beta, accelerator=SimpleNamespace(device=torch.device('cpu')))

    def theirs(policy):
        out = run_on(policy, s.batch)
        logps = trainer.get_batch_logps(out, y, average_log_prob=True)
        compared = trainer.odds_ratio_loss(*logps.chunk(2))[0]
        half = len(y)//2
        nll = F.cross_entropy(out[:half, :-1].flatten(0, 1), y[:half, 1:].flatten())
        return nll - compared.mean()

    equal(odds_ratio(beta), s, theirs, **tolerance)

@pytest.mark.peer('orpo', 'trl',
                  'loss and gradient where the prompt is one token', tolerance=dict(rtol=1e-5))
@quiet
@pytest.mark.parametrize('beta', [.1, 1.])
def test_orpo_is_all_of_trl_s_where_the_prompt_has_no_loss(trl, beta, tolerance):
    "Of a prompt of one token trl can learn nothing: its first term is then that of the answers"
    from trl.experimental.orpo import ORPOTrainer
    s = state_of(pair_data(), Pairs)
    rows = [cut_to_one(x, y) for x, y in zip(s.batch['input_ids'], s.batch['labels'])]
    s.batch = collate(rows, 0)
    s.batches = [s.batch]
    n = len(rows)//2
    batch = {f'{name}_{k}': s.batch[k][side*n:(side + 1)*n]
             for side, name in enumerate(('chosen', 'rejected'))
             for k in ('input_ids', 'attention_mask', 'labels')}
    trainer = object.__new__(ORPOTrainer)
    vars(trainer).update(
        beta=beta, is_encoder_decoder=False, aux_loss_enabled=False, padding_value=0,
        accelerator=SimpleNamespace(device=torch.device('cpu'), gather_for_metrics=lambda x: x))
    equal(odds_ratio(beta), s,
          lambda policy: trainer.get_batch_loss_metrics(policy, batch)[0], **tolerance)

def cut_to_one(ids, labels):
    "The last token of the prompt and the answer"
    on = [i for i, y in enumerate(labels.tolist()) if y != IGNORE]
    return dict(input_ids=ids[on[0] - 1:on[-1] + 1].tolist(),
                labels=labels[on[0] - 1:on[-1] + 1].tolist())

@pytest.mark.peer('kto', 'trl', 'loss and gradient', tolerance=dict(rtol=1e-5))
@quiet
@pytest.mark.parametrize('beta, wanted, unwanted', [(.1, 1., 1.), (.5, 1.3, .6)])
@pytest.mark.parametrize('seed', [1, 2]) # of the reference: with one z is 0
def test_kto_is_trl_s(trl, beta, wanted, unwanted, seed, tmp_path, tolerance):
    d = kto_data()
    s = state_of(d, Judged)
    s.models['reference'] = toy(seed)
    b = s.batch

    def theirs(policy):
        args = trl.KTOConfig(**common(
            tmp_path, beta=beta, desirable_weight=wanted, undesirable_weight=unwanted,
            per_device_train_batch_size=4, train_sampling_strategy='sequential', max_length=None))
        trainer = trl.KTOTrainer(model=policy, ref_model=toy(seed), args=args, processing_class=TOK,
                                 train_dataset=as_answers(d))
        mask = lambda y: (y != IGNORE).long()
        return trainer.compute_loss(
            policy, dict(input_ids=b['input_ids'], attention_mask=b['attention_mask'],
                         completion_mask=mask(b['labels']), label=b['wanted'],
                         KL_input_ids=b['other_input_ids'],
                         KL_attention_mask=b['other_attention_mask'],
                         KL_completion_mask=mask(b['other_labels'])))

    equal(desirability(beta, wanted, unwanted), s, theirs, **tolerance)
    print('z', float(reference_point(s)))

@quiet
def test_the_other_answers_are_those_that_trl_prepares(trl, tmp_path):
    "The answer of the row before, within a batch"
    d = kto_data()
    args = trl.KTOConfig(**common(tmp_path, per_device_train_batch_size=len(d.train),
                                  train_sampling_strategy='sequential', max_length=None))
    trainer = trl.KTOTrainer(model=toy(0), ref_model=toy(1), args=args, processing_class=TOK,
                             train_dataset=as_answers(d))
    rows = [e for e, _ in Judged(state_of(d, Judged)).rows]
    ours = [with_answer_of(e, before)['labels'] for e, before in zip(rows, [rows[-1], *rows])]
    theirs = [r['KL_completion_ids'] for r in trainer.train_dataset]
    assert [[y for y in ids if y != IGNORE] for ids in ours] == theirs
    s = state_of(d, Judged, 4)
    cut = lambda b, k: [[t for t, y in zip(x.tolist(), l.tolist()) if y != IGNORE]
                        for x, l in zip(b[f'{k}input_ids'], b[f'{k}labels'])]
    own = cut(s.batch, '')
    assert cut(s.batch, 'other_') == [own[-1], *own[:-1]]

# ---------- the formulas, by another way

def test_by_hand():
    s = state_of(pair_data(), Pairs)
    (lp, on), (ref, _) = token_logps(s.model, s.batch), token_logps(s.models['reference'], s.batch)
    n, total, base = on.sum(1), lp.sum(1), ref.sum(1).detach()
    first, second = slice(None, len(n)//2), slice(len(n)//2, None)
    gap = lambda x: x[first] - x[second]
    p = (total/n).exp()
    odds = p/(1 - p)
    want = {
        margin_target(.2): (gap((total - base)/n) - 2.5).square().mean(),
        mean_margin(2., 1.): -torch.sigmoid(2*gap(total/n) - 1).log().mean(),
        odds_ratio(.3): -total[first].sum()/n[first].sum()
                        - .3*torch.sigmoid((odds[first]/odds[second]).log()).log().mean()}
    for objective, value in want.items():
        torch.testing.assert_close(objective(s), value, atol=1e-5, rtol=1e-5)

def test_kto_by_hand():
    s = state_of(kto_data(), Judged)
    ratio = lambda b: (token_logps(s.model, b)[0] - token_logps(s.models['reference'], b)[0]).sum(1)
    other = {k.removeprefix('other_'): v for k, v in s.batch.items() if k.startswith('other_')}
    z = ratio(other).mean().detach().clamp(min=0)
    signed = torch.where(s.batch['wanted'], 1., -1.)*(ratio(s.batch) - z)
    w = torch.where(s.batch['wanted'], 2., .5)
    want = (w*(1 - torch.sigmoid(.3*signed))).mean()
    torch.testing.assert_close(desirability(.3, 2., .5)(s), want, atol=1e-5, rtol=1e-5)

def test_a_sure_answer_has_finite_odds():
    logp = torch.tensor([0., -1e-9, -1., -80.], requires_grad=True)
    odds = log_odds(logp)
    odds.sum().backward()
    assert odds.isfinite().all() and logp.grad.isfinite().all() and odds[2] < odds[1]

# ---------- the rows of KTO

def test_labels_as_files_have_them_and_pairs():
    d = kto_data()
    for said in (('true', 'False'), (1, 0), ('1', '0')):
        other = kto_data(label=lambda i: said[i % 3 == 0])
        a, b = (Judged(SimpleNamespace(data=x, tok=TOK, limit=None,
                                       settings=dict(batch_size=4, accumulate=1)), 'label')
                for x in (d, other))
        assert a.rows == b.rows
    pairs = pair_data()
    s = state_of(pairs, Judged, 4)
    rows = Judged(s).rows
    assert len(rows) == 2*len(pairs.train) and [good for _, good in rows[:4]] == [True, False]*2
    first = pairs.train[0]
    assert rows[0][0] == encode(first, TOK, 'text')
    assert rows[1][0] == encode(dict(first, response=first['rejected']), TOK, 'text')

def test_the_reference_point_is_of_the_whole_step_and_computed_once():
    one, two = (state_of(kto_data(), Judged, 6, k) for k in (1, 3))
    assert len(two.batches) == 3
    torch.testing.assert_close(reference_point(one), reference_point(two))
    calls = []
    two.model.register_forward_hook(lambda *_: calls.append(1))
    reference_point(two)
    assert not calls
    two.batches = list(two.batches)
    reference_point(two)
    assert len(calls) == 3 and float(reference_point(one)) >= 0

def dropping(seed):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(TOK), n_positions=128, n_embd=32, n_layer=2,
                                      n_head=2, initializer_range=.2))

def test_dropout_does_not_change_the_reference_point():
    "Otherwise it would differ between processes, which draw different numbers"
    s = state_of(kto_data(), Judged)
    s.model = dropping(0).eval()
    s.models = dict(policy=s.model, reference=dropping(1).eval())
    still = reference_point(s)
    s.extra.clear()
    s.model.train()
    random = torch.get_rng_state()
    assert still > 0 and reference_point(s) == still and s.model.training
    assert torch.equal(torch.get_rng_state(), random)

def test_an_answer_with_another_prompt_is_cut_to_the_limit():
    rows = [encode(r, TOK, 'text') for r in lab_data().train[:2]]
    at = [next(i for i, l in enumerate(r['labels']) if l != IGNORE) for r in rows]
    both = with_answer_of(*rows)
    assert both['input_ids'] == rows[0]['input_ids'][:at[0]] + rows[1]['input_ids'][at[1]:]
    assert both['labels'] == rows[0]['labels'][:at[0]] + rows[1]['labels'][at[1]:]
    assert len(with_answer_of(*rows, at[0] + 1)['labels']) == at[0] + 1
    # nothing of the answer is left: it counts as a log-ratio of 0, not as NaN
    s = state_of(kto_data(), Judged, limit=max(at) + 1)
    assert desirability()(s).isfinite()

def test_kto_raises_what_is_wanted_and_lowers_the_rest():
    d = kto_data(24, lambda i: i % 2 == 0)
    source = Judged(SimpleNamespace(data=d, tok=TOK, limit=None, pad_id=0, seed=0, step=0,
                                    settings=dict(batch_size=len(d.train), accumulate=1)))
    batch, = source.next(SimpleNamespace(step=0, seed=0, pad_id=0))
    logp = lambda m: answer_logp(logits(m, {k: batch[k] for k in ('input_ids', 'attention_mask')}),
                                 batch['labels'])
    run = fit(toy(), TOK, d, methods.kto(), steps=40, batch_size=8, lr=1e-3, progress=False)
    moved = logp(run.model) - logp(toy())
    good = batch['wanted']
    assert run.log[0]['loss'] == pytest.approx(.5, abs=1e-6) and run.log[-1]['loss'] < .48
    assert moved[good].mean() - moved[~good].mean() > 2

def test_conversations():
    talk = lambda r, text: [dict(role='user', content=r['prompt']),
                            dict(role='assistant', content=text)]
    rows = lab_data().train[:6]
    tok = copy.deepcopy(TOK)
    tok.chat_template = ("{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}"
                         "{{ eos_token }}{% endif %}{% endfor %}")
    d = data([dict(messages=talk(r, r['response']), label=i % 2) for i, r in enumerate(rows)],
             carry='label')
    assert d.kind == 'chat'
    run = fit(toy(), tok, d, methods.kto(), steps=1, batch_size=2, progress=False)
    assert run.log[0]['loss'] == pytest.approx(.5, abs=1e-6)

# ---------- saved, folded, resumed; the promises are tested with all other methods' in test_contract

@pytest.mark.parametrize('name', NAMES)
def test_resumed_is_uninterrupted(name, tmp_path):
    d = kto_data(24) if name == 'kto' else pair_data(24)
    how = dict(steps=4, batch_size=4, lr=1e-3, progress=False)
    recipe = methods.get(name)
    assert_resumes(lambda **more: fit(toy(), TOK, d, recipe, **how, **more), tmp_path)

@pytest.mark.parametrize('name', NAMES)
def test_micro_batches_add_up(name):
    "Their answers differ in length, and for KTO in kind"
    source, d = (Judged, kto_data()) if name == 'kto' else (Pairs, pair_data(12))
    gradients = []
    for accumulate in (1, 3):
        s = state_of(d, source, 6, accumulate)
        for s.batch in s.batches:
            methods.get(name).objective(s).backward()
        gradients.append(gradient(s.model))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('name', NAMES)
def test_with_lora(name):
    both = methods.get(f'lora * {name}')
    run = fit(toy(), TOK, pair_data(16), both, steps=3, batch_size=4, lr=1e-2, progress=False)
    assert not torch.equal(logits(run.model), logits(toy()))

def test_a_method_that_learns_unwanted_answers_says_so():
    d = kto_data(24)
    how = dict(steps=1, batch_size=4, progress=False)
    notes = lambda recipe: str(fit(toy(), TOK, d, recipe, **how).notes)
    assert '8 of 24 training rows are labelled false, and this' in notes(methods.full())
    assert 'labelled false' not in notes(methods.kto())

def test_recipes_are_values():
    assert methods.kto() == methods.kto() and methods.kto(.2) != methods.kto()
    assert repr(methods.ipo(.2).objective) == 'margin_target(beta=0.2)'
    assert not methods.simpo().needs and not methods.orpo().needs
    assert methods.ipo().needs == methods.kto().needs == {'reference'}

# ---------- wrong arguments

@pytest.mark.parametrize('make, says', [
    (lambda: methods.ipo(beta=0.), 'beta is 0.0; it must be a number above 0'),
    (lambda: methods.ipo(beta=float('inf')), 'beta is inf'), (lambda: methods.orpo('a'), "beta is 'a'"),
    (lambda: methods.simpo(gamma=float('nan')), 'gamma is nan; it must be a number of at least 0'),
    (lambda: methods.simpo(gamma=-1), 'gamma is -1'), (lambda: methods.kto(wanted=True), 'wanted is True'),
    (lambda: methods.simpo(beta=-1.), 'beta is -1.0'), (lambda: methods.orpo(beta=0.), 'beta is 0.0'),
    (lambda: methods.kto(unwanted=0.), 'unwanted is 0.0'),
    (lambda: state_of(lab_data(), Judged), "column 'label'.*carry='label'.*or a column 'rejected'"),
    (lambda: state_of(kto_data(), Judged, 1), 'batch_size is 1'),
    (lambda: state_of(kto_data(), Judged, 4, 3), 'accumulate 3'),
    (lambda: state_of(kto_data(), Judged, limit=2), 'max_length=2 leaves nothing'),
    (lambda: state_of(kto_data(label=lambda i: 'good'), Judged),
     "has 'good' in the column 'label'"),
    (lambda: state_of(data([dict(text='a b c')]*30), Judged, 4), "of kind 'lm'"),
    (lambda: state_of(data([dict(text='a b', label='x'), dict(text='b', label='y')]*9), Judged, 4),
     "of kind 'label'")])
def test_wrong_arguments_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()

def test_lengths_are_at_least_one():
    assert answer_lengths(torch.tensor([[IGNORE, 3, 4], [IGNORE]*3])).tolist() == [2, 1]
