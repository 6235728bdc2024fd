"A Copilot watches, corrects, and changes nothing of its Pilot"
from types import SimpleNamespace
import pytest, torch
from ftlab.core.generate import generate
from ftlab.evaluators.decoding.copilot import Copilot, answer_together, copilot, foresight, mistakes, thoughts
from ftlab.adapters.modules.lora import lora
from ftlab.core.recipe import Recipe
from ftlab.trainers.fit import fit
from ftlab.trainers.run import load_learners
from toys import TOK, lab_data, logits, probe, same, toy, weights

def tune(recipe, steps=6, **kw): return fit(toy(tied=False), TOK, lab_data(), recipe, steps=steps, batch_size=8, lr=3e-3, progress=False, **kw)
def prompts(n=8): return [r['prompt'] for r in lab_data().test[:n]]

def test_a_mistake_is_truth_minus_belief():
    b = probe(); l = mistakes(logits(toy()), b['labels']); p = logits(toy()).softmax(-1); on = 0
    for i, row in enumerate(b['labels'].tolist()):
        for t in range(len(row)):
            if t + 1 < len(row) and row[t + 1] != -100:
                want = -p[i, t].clone(); want[row[t + 1]] += 1; torch.testing.assert_close(l[i, t], want); on += 1
            else: assert (l[i, t] == 0).all()
    assert on > 10

def test_the_pilot_is_trained_as_if_alone():
    alone, watched = tune(Recipe()), tune(copilot()); assert same(weights(alone.model), weights(watched.model))
    assert [r['nll'] for r in alone.log] == [r['nll'] for r in watched.log] and 'copilot_loss' in watched.log[0]
    assert same(weights(tune(lora(r=2)).model), weights(tune(lora(r=2)*copilot()).model))

def test_the_copilot_learns_the_mistakes():
    run = tune(copilot(lr=3e-3), steps=40); said = [r['copilot_loss'] for r in run.log]; assert sum(said[-5:]) < .97*sum(said[:5])
    trained = run.models['copilot']; assert trained.head.weight.abs().max() > 0

def test_foresight_is_the_root_of_the_mean_squared_length():
    m = toy(); b = probe(); torch.manual_seed(0); c = Copilot(32, len(TOK), width=16); s = SimpleNamespace(batch=b, batches=[b], logits=logits(m), model=m, models=dict(copilot=c))
    l = mistakes(s.logits, b['labels']); n = int((b['labels'][:, 1:] != -100).sum()); assert float(foresight(s).detach()) == pytest.approx(float((l.square().sum()/n).sqrt()), rel=1e-5) # an untrained one says 0
    torch.nn.init.normal_(c.head.weight); assert float(foresight(s).detach()) > 1

def test_nothing_is_known_before_its_time():
    "What the Copilot says at a place does not depend on later places, nor on padding, and does depend on the mistakes before"
    torch.manual_seed(0); c = Copilot(8, 20, width=16); torch.nn.init.normal_(c.head.weight); notes, read, mask = torch.randn(2, 6, 16), torch.randn(2, 6, 16), torch.ones(2, 6, dtype=torch.long); f = c(notes, read, mask)
    later, other = notes.clone(), read.clone(); later[:, 4:] += 1; other[:, 4:] += 1; g = c(later, other, mask); torch.testing.assert_close(g[:, :4], f[:, :4]); assert (g[:, 4:] - f[:, 4:]).abs().max() > .01
    before = notes.clone(); before[:, 1] = torch.randn(2, 16); assert (c(before, read, mask)[:, 3] - f[:, 3]).abs().max() > 1e-3
    pad = lambda t: torch.cat([torch.randn(2, 2, 16), t], 1); h = c(pad(notes), pad(read), torch.cat([torch.zeros(2, 2, dtype=torch.long), mask], 1)); torch.testing.assert_close(h[:, 2:], f, atol=1e-5, rtol=1e-5)

def test_untrained_or_unheard_it_corrects_nothing():
    run = tune(copilot(), steps=2); plain = generate(run.model, TOK, prompts(), max_new_tokens=8); assert any(plain)
    assert answer_together(run.model, run.models['copilot'], TOK, prompts(), 0., 8) == plain
    assert answer_together(run.model, Copilot(32, len(TOK)), TOK, prompts(), .3, 8) == plain
    loud = Copilot(32, len(TOK)); loud.head.bias.data[TOK('a').input_ids[0]] = 9.; assert answer_together(run.model, loud, TOK, prompts(), .3, 4) == ['a a a a']*8
    assert answer_together(run.model, run.models['copilot'], TOK, prompts(5), .3, 8, batch_size=2) == answer_together(run.model, run.models['copilot'], TOK, prompts(5), .3, 8)

def test_what_it_reads_while_answering_is_what_it_read_while_learning():
    "Step by step, with the Pilot's cache, the features are those of one reading of the whole"
    m = toy(); ids = TOK(prompts(1)[0], return_tensors='pt').input_ids
    with torch.no_grad():
        whole = thoughts(m(input_ids=ids, output_hidden_states=True)); first = m(input_ids=ids[:, :-1], output_hidden_states=True, use_cache=True); last = m(input_ids=ids[:, -1:], past_key_values=first.past_key_values, output_hidden_states=True)
    torch.testing.assert_close(torch.cat([thoughts(first), thoughts(last)], 1), whole, atol=1e-5, rtol=1e-5); assert whole.shape == (1, ids.shape[1], 64)

def test_it_is_saved_with_the_change(tmp_path):
    run = tune(copilot(width=16)); run.delta.save(tmp_path/'d.safetensors'); again = load_learners(tmp_path/'d.safetensors', copilot(width=16), toy(tied=False), TOK)
    assert same(again['copilot'].state_dict(), run.models['copilot'].state_dict())
    models = dict(tuned=run.model, copilot=again['copilot']); assert copilot(width=16).decode(models, TOK, prompts(4), max_new_tokens=5) == answer_together(run.model, run.models['copilot'], TOK, prompts(4), .3, 5)

def test_a_pilot_that_stands_still_can_be_foreseen_and_put_right():
    import ftlab; from ftlab.core.scorers import exact_match
    model, tok = ftlab.load('lab-s'); data = ftlab.data('last', n=400, seed=3)
    rows = ftlab.data(dict(train=[dict(prompt=r['prompt'], response='box') for r in data.train], validation=[dict(prompt=r['prompt'], response='box') for r in data.validation[:20]], test=data.test[:2]))
    run = fit(model, tok, rows, lora(r=2)*copilot(lr=3e-3), steps=40, batch_size=16, lr=1e-7, progress=False); c = run.models['copilot']
    heard = lambda lam: exact_match(model, tok, rows.validation, lambda m, t, p, **kw: answer_together(m, c, t, p, lam, **kw))
    assert heard(0.) == 0 and heard(1.) > .8 and run.log[-1]['copilot_loss'] < .5*run.log[0]['copilot_loss']
