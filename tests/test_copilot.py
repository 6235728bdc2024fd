"A Copilot watches, keeps a log, corrects, and changes nothing of its Pilot"
from contextlib import nullcontext
from types import SimpleNamespace
import pytest
import torch
import ftlab
from ftlab.core.batches import collate, pack
from ftlab.core.tokens import encode
from ftlab.core.generate import generate
from ftlab.core.model import model_inputs
from ftlab.evaluators.decoding.copilot import (Copilot, MistakeLog, answer_together, copilot,
                                               examples_of, foresight, mistake_log, mistakes,
                                               thoughts)
from ftlab.adapters.modules.lora import lora
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import exact_match
from ftlab.trainers.fit import fit
from ftlab.trainers.run import load_learners
from test_fit import At, stop
from toys import TOK, lab_data, logits, probe, same, toy, weights

def tune(recipe, steps=6, **kw):
    return fit(toy(tied=False), TOK, lab_data(), recipe, steps=steps, batch_size=8, lr=3e-3,
               progress=False, **kw)

def prompts(n=8):
    return [r['prompt'] for r in lab_data().test[:n]]

def test_a_mistake_is_truth_minus_belief():
    b = probe()
    l = mistakes(logits(toy()), b['labels'])
    p = logits(toy()).softmax(-1)
    on = 0
    for i, row in enumerate(b['labels'].tolist()):
        for t in range(len(row)):
            if t + 1 < len(row) and row[t + 1] != -100:
                want = -p[i, t].clone()
                want[row[t + 1]] += 1
                torch.testing.assert_close(l[i, t], want)
                on += 1
            else:
                assert (l[i, t] == 0).all()
    assert on > 10

def test_the_pilot_is_trained_as_if_alone():
    alone, watched = tune(Recipe()), tune(copilot())
    assert same(weights(alone.model), weights(watched.model))
    assert ([r['nll'] for r in alone.log] == [r['nll'] for r in watched.log]
            and 'copilot_loss' in watched.log[0])
    assert same(weights(tune(lora(r=2)).model), weights(tune(lora(r=2)*copilot()).model))

def test_the_copilot_learns_the_mistakes():
    run = tune(copilot(lr=3e-3), steps=40)
    said = [r['copilot_loss'] for r in run.log]
    assert sum(said[-5:]) < .97*sum(said[:5])
    trained = run.models['copilot']
    assert trained.head.weight.abs().max() > 0

def at_a_step(batches, model, learner, log, step=0, **kw):
    "What `foresight` sees of a run of one process"
    acc = SimpleNamespace(num_processes=1, process_index=0, autocast=nullcontext)
    return SimpleNamespace(batches=batches, model=model, models=dict(copilot=learner), seed=0,
                           steps=9,
                           step=step, accelerator=acc,
                           extra={'mistake log': log}, **kw)

def foreseen(state):
    "The loss of a whole step: one call a micro-batch, as in a run"
    state.extra['mistake log'].before_batch(state)
    losses = []
    for state.batch in state.batches:
        state.logits = logits(state.model, state.batch)
        losses.append(foresight(state))
    return sum(losses)

def loud(seed=0, **kw):
    "A Copilot that says something"
    torch.manual_seed(seed)
    c = Copilot(32, len(TOK), width=16, **kw)
    torch.nn.init.normal_(c.head.weight)
    return c

def test_foresight_is_the_root_of_the_mean_squared_length():
    m, b = toy(), probe()
    l, n = mistakes(logits(m), b['labels']), int((b['labels'][:, 1:] != -100).sum())
    untrained = Copilot(32, len(TOK), width=16) # says 0
    said = foreseen(at_a_step([b], m, untrained, MistakeLog(9)))
    assert float(said.detach()) == pytest.approx(float((l.square().sum()/n).sqrt()), rel=1e-5)
    c = loud()
    with torch.no_grad():
        read = thoughts(m(**model_inputs(b), output_hidden_states=True))
        f = c(c.noted(torch.nn.functional.pad(l[:, :-1], (0, 0, 1, 0))), read, b['attention_mask'])
        want = ((f - l)[:, :-1].square().sum(-1)*(b['labels'][:, 1:] != -100)).sum()/n
    said = float(foreseen(at_a_step([b], m, c, MistakeLog(9))).detach())
    assert said == pytest.approx(float(want.sqrt()), rel=1e-5) and said > 1

# ---------- the log

def test_the_log_keeps_what_earlier_rounds_collected_and_the_step_is_drawn_from_all_of_it(
    monkeypatch):
    drawn, logs, draw = [], [], MistakeLog.draw
    def noted(log, n, rng):
        some = draw(log, n, rng)
        drawn.append([x['round'] for x in some])
        logs.append((len(log.kept), log.seen))
        return some
    monkeypatch.setattr(MistakeLog, 'draw', noted)
    run = tune(copilot(width=16))
    assert logs == [(8*i, 8*i) for i in range(1, 7)] and [len(d) for d in drawn] == [8]*6
    assert drawn[0] == [0]*8 and len(set(drawn[-1])) > 2 # the last step learns from several rounds
    assert all(max(d) <= i for i, d in enumerate(drawn)) and len(run.log) == 6

def test_a_mistake_in_the_log_is_the_one_made_then():
    "What the log holds of a round is what the Pilot said in that round, whatever it says later"
    m, b = toy(tied=False), probe()
    log, c = MistakeLog(99), loud()
    foreseen(at_a_step([b], m, c, log))
    was = mistakes(logits(m), b['labels'])
    with torch.no_grad():
        m.lm_head.weight.mul_(100.)
    foreseen(at_a_step([b], m, c, log, step=1))
    now = mistakes(logits(m), b['labels'])
    assert len(log.kept) == 2*len(was) and not torch.allclose(was, now, atol=.01)
    for i, x in enumerate(log.kept):
        k = i % len(was)
        on = (b['labels'][k, 1:] != -100).nonzero()[:, 0]
        assert x['at'].tolist() == on.tolist() and x['round'] == i//len(was)
        torch.testing.assert_close(x['mistake'], (was if x['round'] == 0 else now)[k, on])
        assert len(x['read']) == b['attention_mask'][k].sum()

def test_the_states_in_the_log_are_those_before_the_step():
    "Algorithm 1, line 9: h_t is of the weights that made the mistakes of round t"
    m, first, seen = toy(tied=False), {}, {}
    class Look:
        def before_batch(self, state):
            first[state.step] = [read_of(m, b) for b in state.batches]

        def after_step(self, state):
            kept = state.extra['mistake log'].kept
            seen[state.step - 1] = [x for x in kept if x['round'] == state.step - 1]
    fit(m, TOK, lab_data(), copilot(width=16), steps=3, batch_size=8, lr=.1, progress=False,
        callbacks=(Look(),))
    for step in range(3):
        was = torch.cat([t for t in first[step]])
        assert len(seen[step]) == len(was) == 8
        for x, read in zip(seen[step], was):
            torch.testing.assert_close(x['read'], read[:len(x['read'])])
    assert not torch.allclose(read_of(m, probe()), read_of(toy(tied=False), probe()), atol=.01)

def test_a_full_log_keeps_all_rounds_alike():
    counts = torch.zeros(60)
    for seed in range(400):
        log, rng = MistakeLog(20), torch.Generator().manual_seed(seed)
        for start in range(0, 60, 6):
            log.collect(range(start, start + 6), rng)
        assert len(set(log.kept)) == 20 and log.seen == 60
        counts[log.kept] += 1
    assert (counts/400 - 1/3).abs().max() < 4.2*(2/9/400)**.5 # 4.2 standard deviations, for 60 of them
    some = log.draw(9, rng)
    assert len(set(some)) == 9 and set(some) <= set(log.kept) and len(log.draw(99, rng)) == 20

def test_a_log_of_no_size_is_refused_before_the_run():
    with pytest.raises(ValueError, match='room for 0 examples; it needs room for at least 1'):
        copilot(log=0)
    assert mistake_log(7)().size == 7 and 'mistake_log(512)' in str(copilot().describe())

@pytest.mark.parametrize('size', [99, 11]) # not full, and full
def test_a_resumed_run_draws_what_the_whole_one_draws(size, tmp_path):
    how = dict(steps=6, batch_size=8, lr=3e-3, progress=False)
    recipe = copilot(width=16, log=size)
    whole = fit(toy(tied=False), TOK, lab_data(), recipe, **how)
    part = fit(toy(tied=False), TOK, lab_data(), recipe, **how, out=tmp_path, save_every=1,
               callbacks=(At(3, stop),))
    assert part.interrupted and len(part.log) == 3
    again = fit(toy(tied=False), TOK, lab_data(), recipe, **how, out=tmp_path, save_every=1,
                resume=True)
    assert again.log == whole.log and same(weights(again.model), weights(whole.model))
    assert same(again.models['copilot'].state_dict(), whole.models['copilot'].state_dict())

def test_an_empty_and_a_full_log_survive_their_state_dict():
    full, empty = MistakeLog(99), MistakeLog(99)
    foreseen(at_a_step([probe()], toy(), loud(), full))
    for log in (full, empty):
        other = MistakeLog(99)
        other.load_state_dict(log.state_dict())
        assert other.seen == log.seen and len(other.kept) == len(log.kept)
        for x, y in zip(log.kept, other.kept):
            assert (x['round'] == y['round']
                    and all(torch.equal(x[k], y[k]) for k in ('read', 'at', 'mistake')))

# ---------- one step, however it is cut up

def test_micro_batches_change_nothing():
    """The same rows in one, two and four micro-batches give the same loss,
    gradient and trained Copilot"""
    found = {}
    for k in (1, 2, 4):
        run = tune(copilot(width=16), accumulate=k)
        found[k] = run.models['copilot'].state_dict(), [r['copilot_loss'] for r in run.log]
    for k in (2, 4):
        assert max(abs(a - b) for a, b in zip(found[1][1], found[k][1])) < 1e-5
        assert max(float((v - found[k][0][n]).abs().max()) for n, v in found[1][0].items()) < 1e-5

def test_two_processes_take_the_step_of_one(monkeypatch):
    """Each hears half of the micro-batches, both draw from all:
    the sum of their losses is that of one"""
    m, c = toy(), loud()
    halves = [{k: v[i:i + 3] for k, v in probe().items()} for i in (0, 3)]
    want = float(foreseen(at_a_step(halves, m, c, MistakeLog(9))).detach())
    heard = [(i, examples_of(b, logits(m, b), read_of(m, b), 0)) for i, b in enumerate(halves)]
    monkeypatch.setattr('ftlab.evaluators.decoding.copilot.gather_object', lambda own: heard[::-1])
    said = 0.
    for i, b in enumerate(halves):
        s = at_a_step(halves, m, c, MistakeLog(9), batch=b, logits=logits(m, b))
        s.accelerator = SimpleNamespace(num_processes=2, process_index=i, autocast=nullcontext)
        s.extra['mistake log'].before_batch(s)
        assert list(s.extra['mistake log'].read) == [i] # each reads its own micro-batches
        said += float(foresight(s).detach())
    assert said == pytest.approx(want, rel=1e-6)

def read_of(m, b):
    with torch.no_grad():
        return thoughts(m(**model_inputs(b), output_hidden_states=True))

def test_packed_lines_hold_the_same_examples():
    m, rows = toy(), [encode(r, TOK, 'text') for r in lab_data().validation[:6]]
    apart, packed = collate(rows, 0), pack(rows, 100, 0)
    assert len(packed['labels']) < 6
    one, two = (examples_of(b, logits(m, model_inputs(b)), read_of(m, b), 0)
                for b in (apart, packed))
    assert len(one) == len(two) == 6
    for x, y in zip(one, two):
        assert torch.equal(x['at'], y['at'])
        torch.testing.assert_close(x['read'], y['read'], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(x['mistake'], y['mistake'], atol=1e-5, rtol=1e-5)

# ---------- what it sees

def test_even_layers_attend_to_both_along_the_sequence():
    """Keys and values are Concat(X~, Pool(h)) along the sequence;
    the stream is the projected mistake alone"""
    torch.manual_seed(0)
    c, seen = Copilot(8, 20, width=16), []
    for layer in c.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args))
    notes, read = torch.randn(2, 6, 16), torch.randn(2, 6, 2, 8)
    c(notes, read, torch.ones(2, 6, dtype=torch.long))
    (x, own, self_mask), (_, both, cross_mask) = seen
    assert x is notes and own is notes # nothing of the Pilot's is added to the stream
    assert torch.equal(both, torch.cat([read[:, :, 0], read[:, :, 1]], 1)) # [batch, 2 tokens, hidden]
    assert torch.equal(cross_mask, torch.cat([self_mask, self_mask], -1))
    assert c.layers[0].k.in_features == 16 and c.layers[1].k.in_features == 8

def test_nothing_is_known_before_its_time():
    """What the Copilot says at a token does not depend on later tokens, nor on padding,
    and does depend on what came before"""
    torch.manual_seed(0)
    c = Copilot(8, 20, width=16)
    torch.nn.init.normal_(c.head.weight)
    notes, read, mask = (torch.randn(2, 6, 16), torch.randn(2, 6, 2, 8),
                         torch.ones(2, 6, dtype=torch.long))
    f = c(notes, read, mask)
    later, other = notes.clone(), read.clone()
    later[:, 4:] = torch.randn(2, 2, 16)
    other[:, 4:] = torch.randn(2, 2, 2, 8)
    for g in (c(later, read, mask), c(notes, other, mask)):
        torch.testing.assert_close(g[:, :4], f[:, :4])
        assert (g[:, 4:] - f[:, 4:]).abs().max() > .01
    before = notes.clone()
    before[:, 1] = torch.randn(2, 16)
    assert (c(before, read, mask)[:, 3] - f[:, 3]).abs().max() > 1e-3
    for half in (0, 1): # of the embeddings and of the hidden states alike
        before = read.clone()
        before[:, 1, half] = torch.randn(2, 8)
        assert (c(notes, before, mask)[:, 3] - f[:, 3]).abs().max() > 1e-3

    def padded(t):
        return torch.cat([torch.randn(2, 2, *t.shape[2:]), t], 1)

    h = c(padded(notes), padded(read), torch.cat([torch.zeros(2, 2, dtype=torch.long), mask], 1))
    torch.testing.assert_close(h[:, 2:], f, atol=1e-5, rtol=1e-5)

def test_untrained_or_unheard_it_corrects_nothing():
    run = tune(copilot(), steps=2)
    plain = generate(run.model, TOK, prompts(), max_new_tokens=8)
    assert any(plain)
    assert answer_together(run.model, run.models['copilot'], TOK, prompts(), 0., 8) == plain
    assert answer_together(run.model, Copilot(32, len(TOK)), TOK, prompts(), .3, 8) == plain
    loud = Copilot(32, len(TOK))
    loud.head.bias.data[TOK('a').input_ids[0]] = 9.
    assert answer_together(run.model, loud, TOK, prompts(), .3, 4) == ['a a a a']*8
    assert (answer_together(run.model, run.models['copilot'], TOK, prompts(5), .3, 8, batch_size=2)
            == answer_together(run.model, run.models['copilot'], TOK, prompts(5), .3, 8))

def test_what_it_reads_while_answering_is_what_it_read_while_learning():
    "Step by step, with the Pilot's cache, the features are those of one reading of the whole"
    m = toy()
    ids = TOK(prompts(1)[0], return_tensors='pt').input_ids
    with torch.no_grad():
        whole = thoughts(m(input_ids=ids, output_hidden_states=True))
        first = m(input_ids=ids[:, :-1], output_hidden_states=True, use_cache=True)
        last = m(input_ids=ids[:, -1:], past_key_values=first.past_key_values,
                 output_hidden_states=True)
    torch.testing.assert_close(torch.cat([thoughts(first), thoughts(last)], 1), whole, atol=1e-5,
                               rtol=1e-5)
    assert whole.shape == (1, ids.shape[1], 2, 32)

def test_it_is_saved_with_the_change(tmp_path):
    run = tune(copilot(width=16))
    run.delta.save(tmp_path/'d.safetensors')
    again = load_learners(tmp_path/'d.safetensors', copilot(width=16), toy(tied=False), TOK)
    assert same(again['copilot'].state_dict(), run.models['copilot'].state_dict())
    models = dict(tuned=run.model, copilot=again['copilot'])
    assert copilot(width=16).decode(models, TOK, prompts(4), max_new_tokens=5) == answer_together(
        run.model, run.models['copilot'], TOK, prompts(4), 1., 5)

def test_a_pilot_that_stands_still_can_be_foreseen_and_put_right():
    model, tok = ftlab.load('lab-s')
    data = ftlab.data('last', n=400, seed=3)

    def boxed(rows):
        return [dict(prompt=r['prompt'], response='box') for r in rows]

    rows = ftlab.data(
        dict(train=boxed(data.train), validation=boxed(data.validation[:20]), test=data.test[:2]))
    run = fit(model, tok, rows, lora(r=2)*copilot(lr=6e-3), steps=40, batch_size=16, lr=1e-7,
              progress=False)
    def heard(lam):
        def answer(m, t, p, **kw):
            return answer_together(m, run.models['copilot'], t, p, lam, **kw)

        return exact_match(model, tok, rows.validation, answer)
    assert heard(0.) == 0 and heard(1.) > .8
    assert run.log[-1]['copilot_loss'] < .5*run.log[0]['copilot_loss']

# ---------- odd sizes

@pytest.mark.parametrize('kw, said', [
    (dict(width=30), 'width is 30, layers 2 and heads 4; .* width a multiple of heads'),
    (dict(heads=0), 'heads 0'), (dict(layers=0), 'layers 0'),
    (dict(log=1.5), 'room for 1.5 examples')])
def test_sizes_that_cannot_be_are_named_before_the_run(kw, said):
    with pytest.raises(ValueError, match=said):
        copilot(**kw)

def test_a_log_of_one_example_still_teaches():
    run = tune(copilot(width=16, log=1))
    assert len(run.log) == 6 and run.models['copilot'].head.weight.abs().max() > 0

def test_a_pilot_in_bfloat16_is_watched_and_corrected():
    pilot = toy(tied=False).to(torch.bfloat16)
    run = fit(pilot, TOK, lab_data(), copilot(width=16), steps=4, batch_size=8, lr=3e-3,
              progress=False)
    head = run.models['copilot'].head
    assert head.weight.dtype == torch.float32 and head.weight.abs().max() > 0
    head.bias.data[TOK('a').input_ids[0]] = 9.
    assert answer_together(pilot, run.models['copilot'], TOK, prompts(4), 1., 3) == ['a a a']*4

def test_a_log_that_will_be_large_is_a_warning_with_its_size(monkeypatch):
    from ftlab.evaluators.decoding import copilot as module
    n = 6*8 # all that the run sees, fewer than the log could hold
    monkeypatch.setattr(module, '_LARGE', 1e4)
    said = rf'will hold {n} examples .* GB of memory .*copilot\(log='
    with pytest.warns(UserWarning, match=said):
        tune(copilot(width=16))
    with pytest.warns(UserWarning, match='will hold 2 examples'):
        tune(copilot(width=16, log=2))

def test_what_an_example_takes_is_what_is_said(recwarn):
    m, b = toy(), probe()
    for x, mask, y in zip(examples_of(b, logits(m, b), read_of(m, b), 0), b['attention_mask'],
                          b['labels']):
        n, a = int(mask.sum()), int((y[1:] != -100).sum())
        assert x['read'].nbytes + x['mistake'].nbytes == 8*n*32 + 4*a*len(TOK)
    tune(copilot(width=16))
    assert not [w for w in recwarn if 'mistake log' in str(w.message)]
