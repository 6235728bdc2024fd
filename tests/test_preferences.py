"Pairs, DPO held against trl's own loss, and self-play that begins anew each round"
from types import SimpleNamespace
import pytest, torch
import ftlab.trainers.rl.spin as spinning
from ftlab.core.data import data
from ftlab.core.tokens import encode
from ftlab.trainers.fit import fit
from ftlab.trainers.preferences import Pairs, answer_logp, judged_pairs, preference
from ftlab.trainers.rl.spin import SelfPlay, spin
from ftlab.trainers.rl.dpo import dpo
from toys import TOK, lab_data, same, toy, weights

def backwards(row):
    return ' '.join(row['response'].split()[::-1]) + ' a'

def pair_data(n=40):
    return data([dict(r, rejected=backwards(r)) for r in lab_data().train[:n]])

def state_of(d, batch_size=4, accumulate=1, max_length=None, **kw):
    return SimpleNamespace(
        data=d, tok=TOK,
        settings=dict(batch_size=batch_size, accumulate=accumulate, max_length=max_length),
        limit=max_length, pad_id=0, seed=0, step=0, **kw)

class Gradient:
    "Keeps the first step's gradient"

    def __init__(self):
        self.all = None

    def after_backward(self, state):
        if self.all is None:
            self.all = {n: p.grad.clone() for n, p in state.model.named_parameters()}

# ---------- pairs

def test_chosen_come_first_and_rejected_after_them_in_the_same_order():
    d = pair_data()
    s = state_of(d, 4, 2)
    batches = Pairs(s).next(s)
    assert len(batches) == 2
    by_prompt = {r['prompt']: r for r in d.train}
    for b in batches:
        assert len(b['labels']) == 4
        texts = [TOK.decode([i for i in row.tolist() if i != -100], skip_special_tokens=True)
                 for row in b['labels']]
        asked = [TOK.decode(ids[(y == -100) & m.bool()], skip_special_tokens=True)
                 for ids, y, m in zip(b['input_ids'], b['labels'], b['attention_mask'])]
        assert asked[:2] == asked[2:] and asked[0] != asked[1]
        for k in (0, 1):
            assert (texts[k] == by_prompt[asked[k]]['response']
                    and texts[k + 2] == by_prompt[asked[k]]['rejected'])
        for y, row in zip(b['labels'], b['input_ids']):
            assert 2 in y.tolist() # the end is part of the answer

def test_the_order_depends_on_seed_and_step_alone():
    d = pair_data()
    s = state_of(d)
    a, b = Pairs(s), Pairs(s)
    first = a.next(s)[0]['input_ids']
    s.step = 3
    a.next(s)
    s.step = 0
    assert (torch.equal(a.next(s)[0]['input_ids'], first)
            and torch.equal(b.next(s)[0]['input_ids'], first))
    s.step = 1
    assert not torch.equal(b.next(s)[0]['input_ids'], first)

def test_rows_without_a_worse_answer_are_refused_with_the_mend():
    with pytest.raises(ValueError, match="no text in the column 'rejected'.*columns="):
        Pairs(state_of(lab_data()))
    with pytest.raises(ValueError, match="batch_size is 4 and accumulate 3"):
        Pairs(state_of(pair_data(), 4, 3))
    with pytest.raises(ValueError, match='max_length=2 leaves no answer'):
        Pairs(state_of(pair_data(), max_length=2))
    with pytest.raises(ValueError, match='kind'):
        Pairs(state_of(data([dict(text='a b c')]*30)))

def test_a_preference_set_is_read_by_naming_its_columns(tmp_path):
    rows = [dict(prompt=f'sort {x} a =', chosen=f'a {x}', rejected=f'{x} a')
            for x in 'bcdefghijkl']*3
    d = data(rows, columns=dict(response='chosen'))
    assert d.kind == 'text' and all(set(r) == {'prompt', 'response', 'rejected'} for r in d.train)
    run = fit(toy(), TOK, d, dpo(), steps=1, batch_size=4, progress=False)
    assert run.log[0]['loss'] == pytest.approx(.693147, abs=1e-5)

def test_judged_pairs_keep_what_the_judge_tells_apart():
    rows = lab_data().train[:6]
    score = lambda row, a: len(a.split())
    got = judged_pairs(toy(tied=False), TOK, rows, score, draws=3, max_new_tokens=6, seed=1)
    assert got and all(score(r, r['response']) > score(r, r['rejected']) for r in got)
    assert got == judged_pairs(toy(tied=False), TOK, rows, score, draws=3, max_new_tokens=6, seed=1)
    assert judged_pairs(toy(), TOK, rows, lambda row, a: 0, draws=2, max_new_tokens=3) == []
    with pytest.raises(ValueError, match='draws is 1'):
        judged_pairs(toy(), TOK, rows, score, draws=1)

# ---------- the loss

def reference_loss(policy, reference, batch, beta):
    def logp(model):
        lp = model(input_ids=batch['input_ids'],
                   attention_mask=batch['attention_mask']).logits[:, :-1].log_softmax(-1)
        y = batch['labels'][:, 1:]
        return (lp.gather(-1, y.clamp(min=0)[..., None])[..., 0]*(y != -100)).sum(1)
    with torch.no_grad():
        r = logp(reference)
    c, w = (logp(policy) - r).chunk(2)
    return -torch.nn.functional.logsigmoid(beta*(c - w)).mean()

def trl_loss(policy, reference, d, batch, beta, folder):
    "The loss of trl's own trainer on the same tensors"
    trl = pytest.importorskip('trl', reason='trl is in the bench extra')
    import datasets
    args = trl.DPOConfig(output_dir=str(folder), beta=beta, use_cpu=True, bf16=False, report_to=[],
                         max_length=None, gradient_checkpointing=False, disable_tqdm=True)
    rows = datasets.Dataset.from_list([dict(prompt=r['prompt'], chosen=' ' + r['response'],
                                            rejected=' ' + r['rejected']) for r in d.train])
    trainer = trl.DPOTrainer(model=policy, ref_model=reference, args=args, processing_class=TOK,
                             train_dataset=rows)
    return trainer.compute_loss(
        policy, dict(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'],
                     completion_mask=(batch['labels'] != -100).long()))

@pytest.mark.peer('dpo', 'trl', 'loss and gradient', tolerance=dict(rtol=1e-5))
@pytest.mark.filterwarnings('ignore:`gradient_checkpointing`:FutureWarning',
                            'ignore:`is_gradient_checkpointing`:FutureWarning')
@pytest.mark.parametrize('whose', ['trl', 'by hand'])
def test_dpo_is_trl_s(whose, tmp_path, tolerance):
    torch.manual_seed(0)
    policy, reference = toy(0), toy(1)
    d = pair_data(10)
    n = len(d.train)
    s = state_of(d, n)
    batch = Pairs(s).next(s)[0]
    state = SimpleNamespace(batch=batch, batches=[batch], models=dict(reference=reference))
    state.forward = lambda: policy(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits
    ours = preference(.3)(state)
    ours.backward()
    mine = torch.cat([p.grad.flatten() for p in policy.parameters()])
    other = toy(0)
    if whose == 'trl':
        theirs = trl_loss(other, reference, d, batch, .3, tmp_path)
    else:
        theirs = reference_loss(other, reference, batch, .3)
    theirs.backward()
    grad = torch.cat([p.grad.flatten() for p in other.parameters()])
    assert (abs(float(ours.detach()) - .693147) > .01
            and float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=tolerance['rtol'])
            and (mine - grad).norm() < tolerance['rtol']*grad.norm() > 0)

def test_dpo_learns_to_prefer():
    d, model = pair_data(), toy()
    before = margin(model, toy(), d)
    run = fit(model, TOK, d, dpo(), steps=30, batch_size=8, lr=1e-3, progress=False)
    assert (before == 0 and margin(model, toy(), d) > 1
            and run.log[-1]['loss'] < .65 < run.log[0]['loss']) # -log sigmoid(.1*1) is .64

def margin(model, base, d):
    s = state_of(d, len(d.train))
    b = Pairs(s).next(s)[0]
    lp = lambda m: answer_logp(
        m(input_ids=b['input_ids'], attention_mask=b['attention_mask']).logits, b['labels'])
    with torch.no_grad():
        c, w = (lp(model) - lp(base)).chunk(2)
    return float((c - w).mean())

# ---------- self-play

class Rounds:
    "What each round begins with: the weights, the reference's, the pairs"

    def __init__(self):
        self.seen = []

    def before_fit(self, state):
        ref = state.models['reference']
        self.seen.append(
            dict(now=weights(state.model), reference=weights(ref), pairs=state.source.pairs))

def play(recipe, steps=9, **kw):
    look = Rounds()
    run = fit(toy(tied=False), TOK, lab_data(), recipe, steps=steps, batch_size=8, lr=1e-3,
              callbacks=(look,), progress=False, **kw)
    return run, look.seen

def test_every_round_begins_with_a_new_opponent():
    run, seen = play(spin(rounds=3, max_new_tokens=4))
    assert len(seen) == 3 and len(run.log) == 9
    for s in seen:
        assert same(s['now'], s['reference'])
    assert (same(seen[0]['now'], weights(toy(tied=False)))
            and not same(seen[1]['now'], seen[0]['now'])
            and not same(seen[2]['now'], seen[1]['now']))
    for k in (0, 3, 6):
        assert run.log[k]['loss'] == pytest.approx(.693147, abs=1e-5) # player and opponent are one
    assert run.log[2]['loss'] < .69

def test_the_chosen_are_the_data_s_answers_and_the_rejected_the_opponent_s_own():
    model = toy(tied=False)
    torch.manual_seed(5)
    s = state_of(lab_data(), model=model, steps=2, tokens=0)
    source = SelfPlay(max_new_tokens=4)
    pairs = source(s)
    assert len(pairs.own) == 8 and len(pairs.pairs) == 8 and s.tokens > 0
    data_rows = {r['prompt']: r['response'] for r in lab_data().train}
    for r, (c, w) in zip(pairs.own, pairs.pairs):
        assert (data_rows[r['prompt']] == r['response']
                and c['input_ids'] == encode(r, TOK, 'text')['input_ids'] and w['input_ids']
                == encode(dict(r, response=r['rejected']), TOK, 'text')['input_ids'])
    assert any(r['rejected'] != r['response'] for r in pairs.own)

def test_the_last_round_s_pairs_come_back_once():
    _, seen = play(spin(rounds=3, max_new_tokens=4))
    first, second, third = ([str(p) for p in s['pairs']] for s in seen)
    assert (set(first) & set(second) and not set(first) - set(second) and len(second) > len(first)
            and set(second) & set(third) and not set(first) <= set(third))
    _, alone = play(spin(rounds=2, reuse=False, max_new_tokens=4), steps=6)
    assert not {str(p) for p in alone[0]['pairs']} & {str(p) for p in alone[1]['pairs']}

def test_beta_of_the_last_round():
    run, _ = play(spin(rounds=2, last=5., max_new_tokens=4), steps=6)
    said = [s['objective'] for s in run.settings['stages']]
    assert said == ['preference(0.1)', 'preference(5)']

def test_an_opponent_that_says_what_the_data_say_teaches_nothing(monkeypatch):
    answers = {r['prompt']: r['response'] for r in lab_data().train}
    monkeypatch.setattr(spinning, 'generate',
                        lambda m, t, prompts, **kw: [answers[p] for p in prompts])
    model = toy()
    was = weights(model)
    look = Gradient()
    fit(model, TOK, lab_data(), spin(rounds=1), steps=1, batch_size=8, callbacks=(look,),
        progress=False)
    assert max(float(g.abs().max()) for g in look.all.values()) < 1e-7
    monkeypatch.undo()
    look = Gradient()
    fit(toy(), TOK, lab_data(), spin(rounds=1, max_new_tokens=4), steps=1, batch_size=8,
        callbacks=(look,), progress=False)
    assert max(float(g.abs().max()) for g in look.all.values()) > 1e-4

def test_a_round_at_least():
    with pytest.raises(ValueError, match='rounds is 0'):
        spin(rounds=0)

def test_a_function_that_gives_no_worse_answer_is_named():
    with pytest.raises(ValueError, match='rejected returned None for the prompt .*; it must return a string'):
        fit(toy(), TOK, lab_data(), dpo(rejected=lambda row: None), steps=1, batch_size=8,
            progress=False)

def test_self_play_on_whole_conversations_is_refused_by_name():
    def chat(row):
        return dict(messages=[dict(role='user', content=row['prompt']),
                              dict(role='assistant', content=row['response'])])
    rows = [chat(r) for r in lab_data().train[:16]]
    with pytest.raises(ValueError, match="need rows with a prompt and a response; .* kind 'chat'"):
        fit(toy(), TOK, data(dict(train=rows, validation=rows[:2], test=rows[:2])), spin(rounds=1),
            steps=1, batch_size=8, progress=False)

@pytest.mark.parametrize('asked', [None, .5])
def test_the_opponent_draws_at_the_temperature_that_was_asked_for(asked, monkeypatch):
    real, seen = spinning.generate, []

    def noted(*args, **kw):
        seen.append((kw['sample'], kw['temperature']))
        return real(*args, **kw)

    monkeypatch.setattr(spinning, 'generate', noted)
    recipe = spin(rounds=2, max_new_tokens=2, **{} if asked is None else dict(temperature=asked))
    fit(toy(), TOK, lab_data(), recipe, steps=2, batch_size=8, progress=False)
    assert seen == [(True, asked or 1.)]*2

def test_a_run_that_does_not_read_the_rejected_answers_says_so():
    rows = [dict(r, rejected='a') for r in lab_data().train[:8]]
    d = data(rows, validation=rows[:2], test=rows[:2])
    assert 'rejected' in d.train[0]
    notes = {name: ' '.join(fit(toy(), TOK, d, recipe, steps=1, batch_size=4, lr=1e-4).notes)
             for name, recipe in dict(plain=None, dpo=dpo()).items()}
    assert '8 of 8 training rows have a rejected answer, which this method does not read' in notes['plain']
    assert 'rejected' not in notes['dpo']
