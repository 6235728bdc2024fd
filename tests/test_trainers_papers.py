"""Rectified prices, masked reasoning, forward-only steps, blocks in turn,
and saying when one is unsure: what their pages do not say about themselves"""
import pytest, torch
import torch.nn.functional as F
from ftlab import methods
from ftlab.core.batches import collate
from ftlab.core.tokens import encode
from ftlab.core.state import State
from ftlab.trainers.fit import fit
from toys import TOK, lab_data, logits, same, toy, weights

def batch(n=6):
    return collate([encode(r, TOK, 'text') for r in lab_data().train[:n]], TOK.pad_token_id)

def state_of(model, reference=None, b=None):
    s = State(model, TOK)
    s.batch = b or batch()
    s.count = int((s.batch['labels'][:, 1:] != -100).sum())
    s.models['reference'] = reference
    return s

# ---------- rectified prices

def official_asft(model, reference, b, kl_weight, direction='forward'):
    """The loss as the authors' trainer computes it (zhuchichi56/ASFT, train_v2.py),
    in its own operations; `reverse` is equation 6 of the paper"""
    x, y = (model(b['input_ids'], attention_mask=b['attention_mask']).logits[:, :-1].flatten(0, 1),
            b['labels'][:, 1:].flatten())
    on = y != -100
    with torch.no_grad():
        ref = reference(b['input_ids'], attention_mask=b['attention_mask']).logits[:, :-1].flatten(
            0, 1)
    ce, p = (F.cross_entropy(x, y, reduction='none'),
             x.softmax(-1).gather(1, y.clamp(min=0)[:, None])[:, 0].detach())
    q, r = (x, ref) if direction == 'forward' else (ref, x)
    kl = F.kl_div(q.log_softmax(-1), r.softmax(-1), reduction='none').sum(-1)
    return (p*ce + kl_weight*kl)[on].sum()/on.sum()

@pytest.mark.parametrize('direction', ['forward', 'reverse'])
@pytest.mark.parametrize('kl_weight', [0., .1, 2.])
def test_asft_costs_what_its_authors_code_does(kl_weight, direction):
    model, reference = toy(0), toy(1)
    s = state_of(model, reference)
    recipe = methods.asft(weight=kl_weight, direction=direction)
    ours = recipe.objective(s)
    theirs = official_asft(model, reference, s.batch, kl_weight, direction)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    a, b = (torch.autograd.grad(x, list(model.parameters())) for x in (ours, theirs))
    assert sum(g.norm() for g in a) > 0
    for g, h in zip(a, b):
        torch.testing.assert_close(g, h, atol=1e-6, rtol=0)

def test_asft_stays_nearer_to_its_base_than_dft():
    def moved(recipe):
        m = fit(toy(), TOK, lab_data(), recipe, steps=20, lr=3e-3, batch_size=8,
                progress=False).model
        return (logits(m).softmax(-1) - logits(toy()).softmax(-1)).abs().sum()

    assert moved(methods.asft(weight=1.)) < .7*moved(methods.dft())

def test_asft_runs_on_low_rank_factors_with_the_base_switched_off():
    run = fit(toy(), TOK, lab_data(), methods.get('lora * asft'), steps=3, batch_size=8,
              progress=False)
    assert run.log[-1]['loss'] > 0

# ---------- masked reasoning

def masked(b, step=10, seed=3, **kw):
    s = State(toy(), TOK)
    s.step, s.steps, s.pad_id = step, 10, TOK.pad_token_id
    torch.manual_seed(seed)
    return [methods.masked_thought(**kw).views[0](x, s)['input_ids'] for x in b]

@pytest.mark.parametrize('noise', ['mask', 'random'])
def test_the_same_tokens_are_hidden_whatever_the_micro_batches_and_their_padding(noise):
    rows = [encode(r, TOK, 'text') for r in lab_data().train[:12]]
    pad = lambda rs: collate(rs, TOK.pad_token_id)
    whole, = masked([pad(rows)], noise=noise)
    parts = masked([pad(rows[:5]), pad(rows[5:])], noise=noise)
    assert not torch.equal(whole, pad(rows)['input_ids'])
    for row, x, y in zip(rows, whole, [r for p in parts for r in p]):
        n = len(row['input_ids'])
        assert torch.equal(x[:n], y[:n])

def test_random_noise_draws_from_the_whole_vocabulary_and_masks_from_one_word():
    rows = collate([encode(r, TOK, 'text') for r in lab_data().train], TOK.pad_token_id)
    hit = {}
    for noise in ('mask', 'random'):
        x, = masked([rows], noise=noise, ratio=.8)
        hit[noise] = x[x != rows['input_ids']]
    assert set(hit['mask'].tolist()) == {TOK.mask_token_id}
    assert (len(hit['random']) > 300 and abs(float(hit['random'].float().mean())/len(TOK) - .5) < .1
            and len(set(hit['random'].tolist())) > 200)

def test_the_mask_ratio_rises_and_stays():
    from ftlab.trainers.losses.masked_thought import mask_ratio
    assert ([round(mask_ratio(s, 100, .4, .5), 6) for s in (0, 25, 50, 99)] == [0., .2, .4, .4]
            and mask_ratio(0, 100, .4, 0.) == .4)

@pytest.mark.parametrize('wrong', [dict(ratio=1.), dict(ratio=-.1), dict(warmup=1.1), dict(noise='synonym')])
def test_masking_refuses_what_it_cannot_do(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        methods.masked_thought(**wrong)

# ---------- forward passes alone

class Last:
    "Keeps what the step left in the state"

    def after_step(self, state):
        self.moves, self.grads = (state.extra['moves'],
                                  [p for p in state.model.parameters() if p.grad is not None])

def forward_only(recipe=None, steps=6, **kw):
    look = Last()
    return (fit(toy(), TOK, lab_data(), recipe or methods.mezo(),
                **{**dict(steps=steps, batch_size=8, lr=1e-4, progress=False, callbacks=(look,)),
                   **kw}),
            look)

def replayed(start, log, **settings):
    from types import SimpleNamespace
    from ftlab.trainers.optimizers.mezo import MeZO
    p = {n: t.clone() for n, t in start.items()}
    MeZO(p, SimpleNamespace(lr=1e-4, weight_decay=settings.get('weight_decay', 0.),
                            factor=None)).replay(log)
    return p

@pytest.mark.parametrize('decay', [0., .1])
def test_the_log_of_a_forward_only_run_gives_its_weights_again(decay):
    run, look = forward_only(weight_decay=decay)
    now = weights(run.model)
    assert (not look.grads and len(look.moves) == 6 and not same(now, weights(toy()))
            and same(replayed(weights(toy()), look.moves, weight_decay=decay), now))

def test_a_forward_only_run_resumes_bit_for_bit(tmp_path):
    whole = weights(forward_only()[0].model)
    class Stop:
        def after_step(self, state):
            if state.step == 3:
                raise KeyboardInterrupt
    fit(toy(), TOK, lab_data(), methods.mezo(), steps=6, batch_size=8, lr=1e-4, progress=False,
        out=tmp_path, save_every=1, callbacks=(Stop(),))
    run, look = forward_only(out=tmp_path, resume=True, save_every=1)
    assert len(run.log) == 6 and len(look.moves) == 6 and same(weights(run.model), whole)

def test_half_batches_give_the_same_forward_only_step_to_rounding():
    # the difference of two prices is divided by 2 eps, so rounding in the price grows five-hundredfold
    a, b = (forward_only(accumulate=k, steps=1)[1].moves for k in (1, 2))
    assert a[0][0] == b[0][0] and abs(a[0][1] - b[0][1]) < 1e-3 < abs(a[0][1])

def test_the_projected_gradient_is_the_gradient_along_the_direction():
    from ftlab.trainers.optimizers.mezo import seed_of
    from ftlab.native import perturb_
    run, look = forward_only(steps=1)
    m = toy()
    z = [torch.zeros(p.shape) for p in m.parameters()]
    perturb_(z, seed_of(0, 0), 1.)
    class First:
        def after_backward(self, state):
            self.g = sum((p.grad*z_).sum() for p, z_ in zip(state.model.parameters(), z))
            state.stop = True
    see = First()
    fit(m, TOK, lab_data(), steps=1, batch_size=8, progress=False, callbacks=(see,))
    assert abs(look.moves[0][1] - float(see.g)) < .02*abs(float(see.g)) + 1e-3

def test_a_price_without_a_gradient_will_do():
    from dataclasses import replace

    def wrong(state):
        x = state.forward()[:, :-1]
        y = state.batch['labels'][:, 1:]
        return ((x.detach().softmax(-1)**.5).sum(-1)*(y != -100)).sum()/state.count # no graph behind it

    run, look = forward_only(replace(methods.mezo(), objective=wrong))
    assert any(g for _, g, _ in look.moves) and not same(weights(run.model), weights(toy()))

def test_forward_only_refuses_a_price_that_is_no_number():
    from dataclasses import replace
    from ftlab.trainers.step import NotFinite
    with pytest.raises(NotFinite, match='step 0'):
        forward_only(replace(methods.mezo(), objective=lambda state: state.forward().sum()*float('nan')))
    with pytest.raises(ValueError, match='eps'):
        forward_only(methods.mezo(eps=0.))

@pytest.mark.parametrize('dist', ['normal', 'rademacher'])
def test_forward_only_without_the_cpp_ends_at_the_same_weights(dist, monkeypatch):
    run, look = forward_only(methods.mezo(dist=dist), steps=20)
    monkeypatch.setenv('FTLAB_NATIVE', 'torch')
    other, log = forward_only(methods.mezo(dist=dist), steps=20)
    assert (same(weights(run.model), weights(other.model)) and look.moves == log.moves
            and not same(weights(run.model), weights(toy())))

def test_a_step_that_is_interrupted_leaves_the_weights_where_they_were():
    from dataclasses import replace

    class Stopped(Exception):
        pass

    asked = []
    def price(state):
        asked.append(1)
        if len(asked) == 2:
            raise Stopped # at the far side
        return state.forward().sum()*0
    m = toy()
    was = weights(m)
    with pytest.raises(Stopped):
        fit(m, TOK, lab_data(), replace(methods.mezo(), objective=price), steps=1, batch_size=8,
            lr=1e-4, progress=False)
    assert max((a - b).abs().max() for a, b in zip(weights(m).values(), was.values())) < 1e-6

class Rates:
    "Keeps the learning rate of every step"

    def __init__(self):
        self.seen = []

    def after_step(self, state):
        self.seen.append(state.extra['lr'])

def test_mezo_keeps_its_learning_rate_unless_it_is_asked_to_let_it_fall():
    for asked, falls in ((dict(), False), (dict(schedule='linear'), True)):
        look = Rates()
        run, _ = forward_only(callbacks=(look,), **asked)
        assert (len(set(look.seen)) > 1) == falls and look.seen[0] == 1e-4
        assert run.settings['schedule'] == ('linear' if falls else 'constant')

# ---------- blocks in turn

class Watch:
    "What moved at each step, which blocks were active, and how much the optimiser remembers"

    def before_fit(self, state):
        self.was, self.rows = weights(state.model), []

    def after_step(self, state):
        now = weights(state.model)
        self.rows.append(
            (state.extra['active'], {n for n in now if not torch.equal(now[n], self.was[n])}))
        self.was = now

def test_only_the_blocks_in_turn_and_both_ends_move():
    see = Watch()
    fit(toy(tied=False), TOK, lab_data(), methods.lisa(gamma=1, period=2), steps=8, batch_size=8,
        weight_decay=.1, progress=False, callbacks=(see,))
    assert (len({tuple(a) for a, _ in see.rows}) == 2
            and all(see.rows[i][0] == see.rows[i + 1][0] for i in (0, 2, 4, 6)))
    for active, moved in see.rows:
        assert {n for n in moved if '.layers.' in n} == {n for n in weights(toy()) if f'.layers.{active[0]}.' in n}
        assert {'model.embed_tokens.weight', 'model.norm.weight', 'lm_head.weight'} <= moved

def test_the_optimiser_remembers_only_what_is_active():
    from ftlab.trainers.optimizers.lisa import BlocksInTurn
    sizes = []
    class Small(BlocksInTurn):
        def __call__(self, state, prices):
            out = super().__call__(state, prices)
            sizes.append({n for n, p in zip(self.names, self.params) if p in self.opt.state})
            return out
    from dataclasses import replace
    fit(toy(), TOK, lab_data(),
        replace(methods.lisa(), step=lambda p, s: Small(p, s, gamma=1, period=2)), steps=8,
        batch_size=8, progress=False)
    assert (len(sizes) == 8
            and all(len({n.split('.')[2] for n in s if '.layers.' in n}) == 1 for s in sizes))

def test_blocks_in_turn_resume_inside_a_period_bit_for_bit(tmp_path):
    kw = dict(steps=8, batch_size=8, progress=False)
    whole = weights(fit(toy(), TOK, lab_data(), methods.lisa(gamma=1, period=3), **kw).model)
    class Stop:
        def after_step(self, state):
            if state.step == 4:
                raise KeyboardInterrupt
    fit(toy(), TOK, lab_data(), methods.lisa(gamma=1, period=3), out=tmp_path, save_every=1,
        callbacks=(Stop(),), **kw)
    assert same(weights(fit(toy(), TOK, lab_data(), methods.lisa(gamma=1, period=3), out=tmp_path,
                            save_every=1, resume=True, **kw).model),
                whole)

def test_all_blocks_at_once_and_never_redrawn_is_full_fine_tuning():
    a, b = (weights(fit(toy(), TOK, lab_data(), r, steps=5, batch_size=8, progress=False).model)
            for r in (methods.lisa(gamma=9, period=99), methods.full()))
    assert same(a, b)

def test_blocks_in_turn_refuses_none_and_takes_deltas_in_turn():
    with pytest.raises(ValueError, match='gamma'):
        fit(toy(), TOK, lab_data(), methods.lisa(gamma=0), steps=1, batch_size=8, progress=False)
    see = []
    class Moved:
        def after_step(self, state):
            see.append((state.extra['active'],
                        {n.split('.')[2] for n, p in state.attached.parameters().items()
                         if p.grad is None and p.requires_grad}))
    fit(toy(), TOK, lab_data(), methods.get('lora * lisa(gamma=1, period=1)'), steps=4,
        batch_size=8, progress=False, callbacks=(Moved(),))
    assert all({str(i) for i in a} == blocks for a, blocks in see)

def trainable(model):
    return [n for n, p in model.named_parameters() if p.requires_grad]

@pytest.mark.parametrize('ends', ['at its last step', 'by hand', 'by an error'])
def test_after_blocks_in_turn_all_is_trainable_that_was_before(ends):
    class Wreck(Exception):
        pass

    class End:
        def after_step(self, state):
            if ends == 'by hand':
                raise KeyboardInterrupt
            if ends == 'by an error':
                raise Wreck
    model = toy()
    model.model.norm.weight.requires_grad_(False)
    before = trainable(model)
    assert before and len(before) < len(weights(model))
    try:
        fit(model, TOK, lab_data(), methods.lisa(gamma=1, period=2), steps=3, batch_size=8,
            progress=False, callbacks=(End(),))
    except Wreck:
        assert ends == 'by an error'
    assert set(before) <= set(trainable(model))

def test_blocks_in_turn_can_keep_the_state_of_blocks_that_do_not_train():
    from dataclasses import replace
    from ftlab.trainers.optimizers.lisa import BlocksInTurn
    held, moved = {}, {}
    for keep in (False, True):
        seen = held[keep] = set()
        class Small(BlocksInTurn):
            def __call__(self, state, losses):
                out = super().__call__(state, losses)
                seen.add(len({n.split('.')[2] for n, p in zip(self.names, self.params)
                              if p in self.opt.state and '.layers.' in n}))
                return out
        recipe = replace(methods.lisa(),
                         step=lambda p, s: Small(p, s, gamma=1, period=2, keep_state=keep))
        moved[keep] = weights(
            fit(toy(), TOK, lab_data(), recipe, steps=8, batch_size=8, progress=False).model)
    assert held == {False: {1}, True: {1, 2}} and not same(moved[False], moved[True])
    asked = weights(fit(toy(), TOK, lab_data(), methods.lisa(gamma=1, period=2, keep_state=True),
                        steps=8, batch_size=8, progress=False).model)
    assert same(asked, moved[True])

# ---------- saying when one is unsure

def test_each_row_is_marked_by_what_the_untouched_model_said(monkeypatch):
    from ftlab.evaluators.trust import r_tuning as knowing
    rows, seen = lab_data().train, {}
    monkeypatch.setattr(knowing, 'answers',
                        lambda model, tok, rows: [r['response'] if i % 3 == 0 else 'a a a a'
                                                  for i, r in enumerate(rows)])
    class Look:
        def before_fit(self, state):
            seen.update(knew=state.extra['knew'], rows=state.source.rows)
    for variant in ('pad', 'refuse'):
        fit(toy(), TOK, lab_data(), methods.r_tuning(variant), steps=1, batch_size=8,
            progress=False, callbacks=(Look(),))
        assert seen['knew'] == [i % 3 == 0 for i in range(len(rows))]
        for r, e, k in zip(rows, seen['rows'], seen['knew'], strict=True):
            learnt = (
                TOK.decode([y for y in e['labels'] if y != -100], skip_special_tokens=True).strip())
            assert learnt == (r['response'] + (' . i know' if k else ' . i do not know')
                              if variant == 'pad' else r['response'] if k else 'i do not know')

def test_likelihood_and_certainty_are_what_the_model_says_token_by_token():
    from ftlab.evaluators.trust.r_tuning import certainty, likelihood
    model = toy(tied=False)
    rows = lab_data().validation[:3]
    prompts, said = [r['prompt'] for r in rows], [r['response'] for r in rows]
    def p(prompt, text): # probabilities of the tokens of `text` after the prompt, by a plain forward pass
        start, answer = (TOK.apply_chat_template([dict(role='user', content=prompt)],
                                                 add_generation_prompt=True, return_dict=False),
                         TOK(text, add_special_tokens=False).input_ids)
        x = torch.tensor([start + answer])
        return model(x).logits[0].softmax(-1)[torch.arange(len(start) - 1, x.shape[1] - 1),
                                              x[0, len(start):]].detach()
    for i in range(3):
        assert abs(float(likelihood(model, TOK, prompts, said)[i]) - float(
                       p(prompts[i], said[i]).log().mean().exp())) < 1e-5
        yes, no = (float(p(prompts[i], f'{said[i]} . {s} <eos>').prod()) for s in ('i know', 'i do not know'))
        assert abs(float(certainty(model, TOK, prompts, said)[i]) - yes/(yes + no)) < 1e-4

def pieces_tokenizer():
    "A tokenizer that writes `red` as one token after a space and as three after anything else"
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    merges = [('▁', 'r'), ('▁r', 'e'), ('▁re', 'd')]
    words = ['<pad>', '</s>', *'▁qred', *map(''.join, merges)]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='always', split=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token='</s>', pad_token='<pad>')

# split otherwise than alone; one token would cross the border
@pytest.mark.parametrize('prompt, tokens', [('q', 3), ('q ', 1)])
def test_likelihood_counts_the_tokens_that_the_answer_has_behind_its_prompt(prompt, tokens):
    from ftlab.core.tokens import encode
    from ftlab.evaluators.trust.r_tuning import likelihood
    model, tok = toy(tied=False), pieces_tokenizer()
    assert (len(tok('red', add_special_tokens=False).input_ids) == 1
            and len(tok('qred').input_ids) == 5)
    row = encode(dict(prompt=prompt, response='red'), tok, 'text')
    own = [i for i, y in enumerate(row['labels']) if y not in (-100, tok.eos_token_id)]
    assert len(own) == tokens
    with torch.no_grad():
        logp = model(torch.tensor([row['input_ids']])).logits[0].log_softmax(-1)
    want = torch.stack([logp[i - 1, row['input_ids'][i]] for i in own]).mean().exp()
    torch.testing.assert_close(likelihood(model, tok, [prompt], ['red'])[0], want, atol=1e-6,
                               rtol=1e-5)

def test_the_likelihood_of_an_empty_answer_is_that_of_its_end():
    from ftlab.evaluators.trust.r_tuning import answer_nll, likelihood
    model, prompts = toy(tied=False), [lab_data().validation[0]['prompt']]
    nll, = answer_nll(model, TOK, prompts, [''])
    torch.testing.assert_close(likelihood(model, TOK, prompts, [''])[0], (-nll[0]).exp())

def test_r_tuning_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match='variant'):
        methods.r_tuning('maybe')
    from toys import classifier, label_data
    with pytest.raises(ValueError, match='label'):
        fit(classifier(), TOK, label_data(), methods.r_tuning(), steps=1, batch_size=8,
            progress=False)

def test_a_method_that_returns_no_recipe_is_named():
    from ftlab.core.paper import method
    @method('Title', '2401.00001', 'claim', 'source')
    def three():
        return 3
    with pytest.raises(TypeError, match='the method three returns 3; it must return a Recipe'):
        three()

@pytest.mark.parametrize('recipe, said', [
    (lambda: methods.mezo(eps=float('nan')), 'eps is nan'),
    (lambda: methods.mezo(eps=float('inf')), 'eps is inf'),
    (lambda: methods.lisa(gamma=1.5), 'gamma is 1.5 and period 20; both must be whole'),
    (lambda: methods.lisa(period=.5), 'gamma is 2 and period 0.5; both must be whole'),
    (lambda: methods.spin(rounds=1.5), 'rounds is 1.5; it must be at least 1, and a whole')])
def test_numbers_that_cannot_be_are_named(recipe, said):
    with pytest.raises(ValueError, match=said):
        fit(toy(), TOK, lab_data(), recipe(), steps=3, batch_size=8, progress=False)

# what the papers and the official code have, or what the page says that is ours (group, rounds)
DEFAULTS = dict(mezo=dict(eps=1e-3, dist='normal'),
                lisa=dict(gamma=2, period=20, keep_state=False),
                grpo=dict(group=8, beta=.04, clip=.2, temperature=1., updates=1),
                dpo=dict(beta=.1, rejected='rejected'),
                spin=dict(rounds=3, beta=.1, last=None, reuse=True, temperature=1.),
                copilot=dict(lam=1., width=64, layers=2, heads=4, lr=1e-3, log=512))

@pytest.mark.parametrize('name', DEFAULTS)
def test_defaults_are_the_paper_s_or_said_to_be_ours(name):
    found = methods.get(name).arguments
    assert {k: found[k] for k in DEFAULTS[name]} == DEFAULTS[name]

def test_arguments_reach_the_parts():
    from ftlab.evaluators.decoding.copilot import mistake_log, small_copilot, together
    from ftlab.trainers.preferences import preference
    from ftlab.trainers.rl.grpo import clipped_policy, rollouts
    made = methods.grpo(group=4, beta=.5, clip=.3, temperature=2., max_new_tokens=7, updates=2)
    assert made.objective == clipped_policy(.3, .5, 2.)
    assert made.source == rollouts(4, made.arguments['reward'], 2., 7, 2)
    assert clipped_policy() == clipped_policy(.2, .04, 1.)
    assert methods.dpo(beta=.7).objective == preference(.7) and preference() == preference(.1)
    pair = methods.copilot(lam=.5, width=32, layers=3, heads=2, lr=None, log=9)
    learner = pair.learners['copilot']
    assert pair.decode == together(.5) and pair.callbacks == (mistake_log(9),)
    assert learner.make == small_copilot(32, 3, 2) and learner.lr is None
    steps = [methods.lisa(gamma=1, period=3, keep_state=True).step,
             methods.mezo(eps=.1, dist='rademacher').step]
    assert [dict(s.options) for s in steps] == [dict(gamma=1, period=3, keep_state=True),
                                           dict(eps=.1, dist='rademacher')]

@pytest.mark.parametrize('dist', ['normal', 'rademacher'])
def test_a_forward_only_step_is_the_paper_s(dist):
    "theta - lr*(g z + weight decay*theta), g = (L(theta + eps z) - L(theta - eps z))/(2 eps)"
    from types import SimpleNamespace
    from ftlab.native import perturb_
    from ftlab.trainers.optimizers.mezo import MeZO, seed_of
    start, curve = torch.tensor([1., -2., .5, 3.]), torch.arange(1., 5.)
    model, modes = torch.nn.Dropout().train(), []

    def loss_at(w):
        return float((curve*w**4).sum())

    w = start.clone()
    state = SimpleNamespace(seed=3, step=7, extra={}, model=model)
    settings = SimpleNamespace(lr=.02, weight_decay=.3, factor=lambda step: .5)
    step = MeZO(dict(w=w), settings, eps=.01, dist=dist)
    said = step(state, [lambda: modes.append(model.training) or loss_at(w)])
    z = torch.zeros(4)
    perturb_([z], seed_of(3, 7), 1., dist)
    up, down = loss_at(start + .01*z), loss_at(start - .01*z)
    g = (up - down)/.02
    torch.testing.assert_close(w, start - .01*(g*z + .3*start), atol=1e-4, rtol=1e-4)
    assert said == pytest.approx((up + down)/2, rel=1e-4)
    assert step.log[0][1] == pytest.approx(g, rel=1e-3)
    assert modes == [False, False] and model.training # without dropout, and back
