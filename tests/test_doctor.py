"Every check of the doctor finds the failure that was planted for it, by name, and is silent on healthy runs"
import copy, json, re, sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
import pytest, torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
import ftlab
from ftlab import methods
from ftlab.instruments import doctor as diagnosis
from ftlab.adapters.lowrank import LoRA
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.select import named, parts
from ftlab.core.batches import Data
from ftlab.core.paper import Method
from ftlab.core.recipe import Recipe, Stages, viewed
from ftlab.instruments.doctor import CHECKS, Case, Check, doctor
from ftlab.trainers.fit import fit
from ftlab.trainers.objective import nll, token_nll
from ftlab.trainers.source import Rows
from ftlab.trainers.step import NotFinite
from toys import TOK, classifier, lab_data, label_data, logits, same, toy, weights

SHORT = dict(steps=13, batch_size=16)
def before(recipe=None, model=None, tok=TOK, data=None, **kw): return doctor(model or toy(), tok, data or lab_data(), recipe, **SHORT | kw)
def trained(recipe=None, model=None, data=None, tok=TOK, **kw): return fit(model or toy(), tok, data or lab_data(), recipe, progress=False, **SHORT | kw)
def after(*a, **kw): return doctor(trained(*a, **kw))

@pytest.fixture(autouse=True)
def _few_questions(monkeypatch, request):
    "Toys can do nothing, so they are asked little"
    if 'found[old-skills' not in request.node.name: monkeypatch.setattr(diagnosis, 'ASKED', 4); monkeypatch.setattr(diagnosis, 'old_skills', lambda data, tok=None: ['max', 'last'])

# ---------- broken things

def tokenizer(**attributes):
    t = copy.deepcopy(TOK)
    for k, v in attributes.items(): setattr(t, k, v)
    return t

def post_processed(single):
    t = tokenizer(chat_template=None)
    t.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[(w, TOK.convert_tokens_to_ids(w)) for w in ('<bos>', '<eos>')]); return t

def letters_tokenizer():
    "Byte pairs in which 'ab' is one token, as 'a' and 'b' are"
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    words = ['<pad>', '<eos>', 'a', 'b', 'c', 'ab', ' ']
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [('a', 'b')])), pad_token='<pad>', eos_token='<eos>', model_max_length=64)

def llama(kind=LlamaForCausalLM, seed=0, **more):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(LlamaConfig(**dict(vocab_size=len(TOK), hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                                       tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2) | more)).eval()

class ShiftsTwice(LlamaForCausalLM):
    def forward(self, *a, labels=None, **kw): return super().forward(*a, labels=None if labels is None else labels.roll(-1, 1), **kw)

class SeesPadding(LlamaForCausalLM):
    def forward(self, input_ids=None, **kw): out = super().forward(input_ids=input_ids, **kw); out.logits = out.logits + .1*input_ids.shape[1]; return out

class Dead(LoRA):
    def __init__(self, W, mask=True, **kw): super().__init__(W, mask, **kw); self.A.data.zero_()
class Crooked(LoRA):
    def __init__(self, W, mask=True, **kw): super().__init__(W, mask, **kw); self.B.data.fill_(.01)
class Leaky(LoRA):
    def __init__(self, W, mask=True, **kw): super().__init__(W, mask, **kw); self.weight = [W]
    def branch(self, x):
        if self.training: self.weight[0].data.mul_(1.0001)
        return super().branch(x)
class TwoFaced(LoRA):
    def branch(self, x): return 1.5*super().branch(x)
class Forgetful(LoRA):
    "Its scale is not saved"
    def __init__(self, W, mask=True, scale=1., **kw): super().__init__(W, mask, **kw); self.s *= scale
def odd(cls, **kw):
    make = partial(cls, **kw); make.site = 'weight'; return Recipe(Method('odd', lr=1e-2, lrs=(1e-3, 1e-2)), select=parts(), delta=make)

def masked(batch, state): return dict(batch, labels=torch.full_like(batch['labels'], -100))
def moved_labels(batch, state): return dict(batch, labels=batch['labels'].roll(-1, 1))
def mean_of_means(state): nll = token_nll(state.forward(), state.batch['labels']); return nll.sum()/(nll != 0).sum()/len(state.batches)
def uphill(state): return -nll()(state)
def by_place(state): nll = token_nll(state.forward(), state.batch['labels']); return (nll*torch.arange(len(nll))[:, None]).sum()/state.count

def rows(n, start=0): return [dict(prompt=f'reverse {" ".join("abcdefghij"[int(d)] for d in str(start + i).zfill(4))} =', response='a b') for i in range(n)]
def text_data(train, test=(), validation=()): return Data(list(train), list(validation), list(test), 'text')
def labelled(train, test): return Data([dict(text=f'sort {"abcdef"[i % 6]} {"ghij"[i % 4]} =', label=l) for i, l in enumerate(train)], [], [dict(text='max a b =', label=l) for l in test], 'label', ['x', 'y', 'z'])
def sides():
    colour = lambda rs: [dict(text=r['prompt'] + (' red' if i % 2 else ' blue'), label='lr'[i % 2]) for i, r in enumerate(rs)]; d = ftlab.data(colour(lab_data().train))
    return replace(d, test=[dict(r, label=d.labels.index(r['label'])) for r in colour(lab_data().test[:40])])
def chat(n=40):
    turns = lambda rs: [dict(messages=[dict(role='user', content=r['prompt']), dict(role='assistant', content=r['response'])]) for r in rs]
    return Data(turns(rows(n)), [], turns(rows(20, 500)), 'chat')

def frozen_first():
    m = toy(); m.model.layers[0].requires_grad_(False); return m
def broken_weight():
    m = toy(); m.model.norm.weight.data[3] = float('nan'); return m
def with_statistics():
    m = toy(); m.model.extra = nn.BatchNorm1d(4); return m
def no_end(): return tokenizer(chat_template=TOK.chat_template.replace(" + ' ' + eos_token", ''))
def padded_beyond():
    t = copy.deepcopy(TOK); t.add_special_tokens(dict(pad_token='[PAD]')); return t

def changed_back():
    run = trained(lora())
    for d in run.delta.attached.deltas.values(): d.B.data.zero_()
    return run
def hooked():
    run = trained(lora()); run.model.lm_head.register_forward_hook(lambda m, a, out: out*1.01); return run
def with_nan(): run = trained(); run.log[3]['loss'] = float('nan'); return run
def ruined_at_once():
    "A rate of 1 on what lab-s knows: the loss is low on the first batch, enormous on the second, and falls from then on"
    model, tok = ftlab.load('lab-s'); d = ftlab.data('sort', n=64); run = trained(model=model, tok=tok, data=d, steps=20, lr=1.)
    nll = [r['nll'] for r in run.log]; assert sum(nll[:4]) > 1.2*sum(nll[-4:]) and nll[0] < .5; return run
def stopped_early():
    def breaks(state): return nll()(state)*(float('nan') if state.step == 5 else 1.)
    with pytest.raises(NotFinite) as e: trained(Recipe('breaks', objective=breaks))
    return e.value.run
def forgot_scale():
    run = trained(odd(Forgetful, r=2, scale=3.)); return run
def base_folder(tmp): toy().save_pretrained(tmp/'base'); TOK.save_pretrained(tmp/'base'); return tmp/'base'
def by_heart():
    d = lab_data(); few = Data(d.train[:6], d.validation, d.test, 'text'); return trained(model=toy(hidden=48), data=few, steps=250, batch_size=6, lr=1e-2)
def forgets():
    model, tok = ftlab.load('lab-s'); return trained(model=model, tok=tok, steps=25, batch_size=16, lr=3e-3)
def left_training(run): run.model.train(); return run

# ---------- one planted failure (or more) for each check: what finds it, and what must be seen

PLANTED = {
    'selection-empty': [(lambda t: before(Recipe(select=named('c_attn'))), r'0 of \d+ tensors')],
    'selection-thin': [(lambda t: before(Recipe(select=parts(blocks=(1,))), llama(num_hidden_layers=8)), r'1 of 8 blocks')],
    'names-unmatched': [(lambda t: before(lora(targets='q_proj|c_attn')), 'c_attn matches nothing'), (lambda t: before(lora(targets=r'(q|v|qkv)_proj\.weight')), r'\(qkv\)_proj'),
                        (lambda t: before(Recipe(select=parts('q', 'qkv'))), 'qkv matches nothing in this LlamaForCausalLM, 1 of 2')],
    'frozen-but-selected': [(lambda t: before(model=frozen_first()), r'9 of \d+ selected tensors had requires_grad=False')],
    'tied-under-delta': [(lambda t: before(lora(targets='embed_tokens')), 'one tensor with lm_head.weight')],
    'labels-all-masked': [(lambda t: before(Recipe(source=viewed(masked))), r'after the recipe.s view, 0 of \d+ tokens')],
    'answers-cut': [(lambda t: before(max_length=8), 'longer than 8 tokens and lose part of the answer')],
    'labels-shifted': [(lambda t: before(model=llama(ShiftsTwice)), r'own loss on 6 rows is'), (lambda t: before(Recipe(source=viewed(moved_labels))), 'one place later')],
    'border-split': [(lambda t: before(model=llama(vocab_size=7), tok=letters_tokenizer(), data=text_data([dict(prompt='c' + 'a'*(i % 5 + 1), response='b') for i in range(20)])), "'ab'")],
    'asked-otherwise': [(lambda t: before(tok=post_processed('$A <eos>')), '20 of 20 prompts')],
    'end-not-learned': [(lambda t: before(tok=no_end()), r"0 of \d+ rows price an end mark; it would be '<eos>'"), (lambda t: before(Recipe(source=viewed(lambda b, s: dict(b, labels=b['labels'].masked_fill(b['labels'] == 2, -100))))), '0 of 16 rows')],
    'bos-not-once': [(lambda t: before(tok=tokenizer(chat_template='{{ bos_token + " " }}' + TOK.chat_template)), "'<bos>' twice"),
                     (lambda t: before(tok=(lambda p: (setattr(p, 'chat_template', TOK.chat_template.replace('{{ bos_token }}', '')), p)[1])(post_processed('<bos> $A'))), 'begin without')],
    'template-missing': [(lambda t: before(tok=tokenizer(chat_template=None), data=chat()), 'no chat template')],
    'train-test-overlap': [(lambda t: before(data=text_data(rows(60), [dict(prompt=r['prompt'].upper() + ' .', response='a') for r in rows(1)] + rows(1) + rows(30, 500))), r'2 of 32 test rows ask what a training row asks, 1 of them')],
    'duplicate-rows': [(lambda t: before(data=text_data(rows(40) + rows(1)*10)), r'10 of 50 training rows repeat .* 11 times')],
    'answers-contradict': [(lambda t: before(data=text_data(rows(8) + [dict(rows(1)[0], response='z')])), r"1 of 8 questions have more than one answer, e.g. .reverse a a a a =.: 'a b' and 'z'"),
                           (lambda t: before(model=classifier(), data=labelled([0, 1]*12 + [2], [0])), r"1 of 12 questions have more than one answer, e.g. .*: 'x' and 'z'")],
    'few-test-rows': [(lambda t: before(data=text_data(rows(8), rows(1, 500))), r'1 test row: one answer more or less moves a score by 100 points'),
                      (lambda t: before(data=text_data(rows(40), rows(10, 500))), r'10 test rows: .* by 10 points'), (lambda t: before(data=text_data(rows(40))), r'no test row, .*ftlab\.report refuses')],
    'labels-missing': [(lambda t: before(model=classifier(), data=labelled([0, 1]*20, [-1, 2])), '2 of 2 test rows have labels that no training row has: -1, 2')],
    'labels-unbalanced': [(lambda t: before(model=classifier(), data=labelled([0]*90 + [1]*30 + [2], [0])), "'x' has 90 training rows, 'z' has 1")],
    'passes-over-data': [(lambda t: before(steps=400), r'each of the \d+ training rows \d\d times'), (lambda t: before(steps=1), r'see 16 of \d+ training rows')],
    'unknown-words': [(lambda t: before(data=text_data([dict(prompt=f'Qx{i} zz', response='vv') for i in range(40)])), r"% of the tokens are '<unk>'")],
    'pad-unusable': [(lambda t: before(tok=padded_beyond()), r'padding token is number \d+')],
    'vocabulary-mismatch': [(lambda t: before(model=llama(vocab_size=100)), r'embedding has rows 0 to 99')],
    'too-long-for-positions': [(lambda t: before(model=llama(max_position_embeddings=16), max_length=64), 'the model has 16 positions')],
    'learning-rate': [(lambda t: before(lr=3e-3), 'the rate is 0.003; full is known to learn at 0.0001 to 0.001'), (lambda t: before(lora(), lr=2e-5), 'hardly move'), (lambda t: before(lr=-1.), 'must be above 0'), (lambda t: after(lr=1.), 'the rate is 1;')],
    'updates-round-away': [(lambda t: before(model=toy().bfloat16(), lr=3e-5), r'\d\d% of the bfloat16 weights')],
    'fp16-unscaled': [(lambda t: before(model=toy().half()), r'\d+ tensors that train are float16')],
    'nonfinite-weights': [(lambda t: before(model=broken_weight()), r'1 numbers in 1 tensors are NaN .* model.norm.weight')],
    'left-in-train-mode': [(lambda t: before(model=toy(dropout=.1).train()), 'dropout of up to 0.1'), (lambda t: doctor(left_training(trained())), 'in training mode')],
    'dropout-and-accumulation': [(lambda t: before(model=toy(dropout=.1), accumulate=2), 'cut into 2 micro-batches')],
    'statistics-move': [(lambda t: before(lora(), model=with_statistics()), '1 layers keep running statistics')],
    'padding-changes-answers': [(lambda t: before(model=llama(SeesPadding)), 'answered differently')],
    'zero-gradient': [(lambda t: before(odd(Dead, r=2)), 'exactly zero')],
    'starts-elsewhere': [(lambda t: before(odd(Crooked, r=2)), r'differ from the base.s by up to')],
    'refused': [(lambda t: before(batch_size=5, accumulate=2), 'the first a multiple of the second'), (lambda t: before(data=label_data()), 'no classifier')],
    'outputs-unchanged': [(lambda t: doctor(changed_back()), 'equal, bit for bit')],
    'nothing-moved': [(lambda t: after(lr=0.), r'0 of \d+ numbers differ'), (lambda t: after(model=toy().bfloat16(), lr=1e-7), r'selected numbers')],
    'off-is-not-base': [(lambda t: doctor(hooked()), "logits differ from a fresh base's"), (lambda t: after(odd(Leaky, r=2)), 'tensors are not what they were')],
    'frozen-moved': [(lambda t: after(odd(Leaky, r=2)), r'14 of \d+ tensors that were to stay')],
    'loss-not-finite': [(lambda t: doctor(with_nan()), 'at 1 of 13 steps, first at step 3'), (lambda t: doctor(stopped_early()), 'stopped after 5 of 13 steps')],
    'loss-flat': [(lambda t: after(steps=20, lr=1e-7), r'the loss went from 6\.\d+')],
    'loss-rose': [(lambda t: after(Recipe('uphill', objective=uphill), steps=30, lr=1e-2), 'the loss went up from'), (lambda t: doctor(ruined_at_once()), r'on training rows the loss rose from 0\.\d+ \(base\) to \d')],
    'reload-differs': [(lambda t: doctor(forgot_scale()), 'logits differ by up to')],
    'fold-differs': [(lambda t: after(odd(TwoFaced, r=2)), "its logits differ from the run's")],
    'export-differs': [(lambda t: doctor(trained(lora()), exported=base_folder(t)), "its logits are the base's")],
    'accumulation-changes-result': [(lambda t: after(Recipe('means', objective=mean_of_means)), r'two micro-batches of 8, the first gradient differs by')],
    'order-changes-result': [(lambda t: after(Recipe('places', objective=by_place)), r'in another order, the first gradient differs by')],
    'validation-gap': [(lambda t: doctor(by_heart()), r'on validation rows the loss rose from .* on training rows it fell')],
    'old-skills-lost': [(lambda t: doctor(forgets()), r'of 2\d old skills fell to less than half')]}

def test_at_least_twenty_checks_each_with_a_planted_failure_and_a_source():
    assert len(CHECKS) >= 20 and len({k.name for k in CHECKS}) == len(CHECKS) and PLANTED.keys() == {k.name for k in CHECKS}
    for k in CHECKS:
        assert re.fullmatch(r'[\w.-]+/[\w.-]+#\d+', k.learned) and k.severity in diagnosis.SEVERITIES and k.when in ('before', 'after', 'both') and re.fullmatch(r'[a-z0-9-]+', k.name)
        assert len(k.why.split()) > 4 and len(k.mend.split()) > 2 and k.look.__name__.isidentifier()

@pytest.mark.parametrize('name, plant, seen', [(n, *p) for n, ps in PLANTED.items() for p in ps], ids=[f'{n}-{i}' for n, ps in PLANTED.items() for i, _ in enumerate(ps)])
def test_planted_failure_is_found(name, plant, seen, tmp_path):
    d = plant(tmp_path); found = {f.name: f for f in d}
    assert name in found, d
    assert re.search(seen, found[name].seen) and 'broke' not in found[name].seen, found[name]
    assert not [f for f in d if 'the check itself broke' in f.seen], d

def test_a_recipe_that_draws_its_own_rows_gets_a_few_batches():
    "One batch of equal rewards says nothing; four in a row do"
    class Late:
        def __init__(self, state, n): self.rows, self.n = Rows(state.rows, 16), n
        def next(self, state): return [dict(b, weight=torch.tensor(float(state.step >= self.n))) for b in self.rows.next(state)]
    def weighed(state): return nll()(state)*state.batch['weight']
    late = lambda n: before(Recipe('late', source=lambda s: Late(s, n), objective=weighed))
    assert not late(0) and not late(2)
    d = late(9); assert d.names == ['zero-gradient'] and d[0].severity == 'warning' and '4 batches in a row' in d[0].seen

# ---------- silence

@cache
def healthy():
    "Diagnoses of healthy patients, before and after, that together let every check run"
    out = {}
    for name, recipe, model, data, kw in (('full', None, toy, lab_data(), {}), ('lora', lora(targets='(q|v|up)_proj'), lambda: ftlab.load('lab-s')[0], lab_data(), {}), ('labels', Recipe(Method('full', lr=5e-3, lrs=(1e-3, 5e-3))), lambda: classifier(2), sides(), dict(steps=48)), ('chat', lora(), toy, chat(), {}),
                                          ('bf16', Recipe(Method('full', lr=1e-3)), lambda: toy().bfloat16(), lab_data(), {}), ('dropout', None, lambda: toy(dropout=.1), lab_data(), {}), ('blocks', Recipe(select=parts(blocks=(0, 1, 2))), lambda: llama(num_hidden_layers=4), lab_data(), {})):
        m = model(); s = dict(steps=24 if name != 'chat' else 6, batch_size=16) | kw
        out[name, 'before'] = doctor(m, TOK, data, recipe, **s)
        if name in ('full', 'lora', 'labels', 'bf16'): out[name, 'after'] = doctor(fit(m, TOK, data, recipe, progress=False, **s))
    return out

@pytest.mark.parametrize('name', [k.name for k in CHECKS])
def test_silent_on_healthy_runs(name):
    assert not {k: d[d.names.index(name)] for k, d in healthy().items() if name in d.names}
    assert name in NEVER_RUNS_HEALTHY or any(name in d.ran for d in healthy().values())
NEVER_RUNS_HEALTHY = set()

def test_a_finding_is_never_without_its_reasons():
    d = before(lr=3e-3); f = d[0]
    assert len(d) == 1 and d.errors == 0 and bool(d) and f.why and f.mend and f.learned == 'huggingface/peft#3552' and 'WARNING learning-rate' in repr(d)
    assert 'learning-rate' in d._repr_html_() and json.loads(json.dumps(d.json()))['findings'][0]['name'] == 'learning-rate'
    fine = before(); assert not fine and re.search(r'nothing found; \d\d checks ran, \d+ did not apply', repr(fine)) and 'the data have no labels' in repr(fine)
    assert set(fine.ran) | set(fine.skipped) == {k.name for k in CHECKS if k.when != 'after'}

def test_the_patient_is_left_as_it_was():
    for recipe in (None, lora(), methods.get('hft * dft'), Recipe('two', loop=Stages(lora(), Recipe('norms', select=parts('norm'))))):
        m = toy(); m.model.norm.weight.requires_grad_(False); was, flags, modes = weights(m), [p.requires_grad for p in m.parameters()], [x.training for x in m.modules()]
        state = torch.get_rng_state(); doctor(m, TOK, lab_data(), recipe, **SHORT)
        assert same(weights(m), was) and flags == [p.requires_grad for p in m.parameters()] and modes == [x.training for x in m.modules()] and torch.equal(state, torch.get_rng_state())
        assert all(p.grad is None for p in m.parameters()) and set(dict(m.named_parameters())) == set(was)
    run = trained(lora()); now = logits(run.model); tensors = run.delta.tensors(); doctor(run)
    assert torch.equal(logits(run.model), now) and same(run.delta.tensors(), tensors) and not run.model.training

def test_a_check_that_breaks_is_reported_under_its_name():
    def breaks(case): raise ZeroDivisionError('division by zero')
    c = Case(toy(), TOK, lab_data(), Recipe(), diagnosis.SETTINGS | SHORT)
    d = diagnosis._examine(c, 'before', [Check('breaks', 'before', 'error', breaks, 'why', 'mend', 'a/b#1'), *CHECKS[:2]])
    assert d.names == ['breaks'] and 'the check itself broke and saw nothing: ZeroDivisionError: division by zero' in d[0].seen and d.ran == ['breaks', 'selection-empty', 'selection-thin']

def test_what_it_cannot_look_at_it_says():
    m = llama(); m.config.model_type = 'unheard-of'; d = doctor(m, TOK, lab_data(), methods.get('hft'), **SHORT)
    assert 'cannot look' in d.skipped['selection-empty'] and d.names == ['refused'] and 'unheard-of' in d[0].seen

def test_pictures_are_looked_at_without_a_tokenizer():
    from ftlab.adapters.subsets.difffit import difffit
    from ftlab.lab.digits import digits, flow, load
    for model, data, recipe in ((load('digits-vit'), digits(), Recipe('full')), (load('digits-flow'), digits((8, 9), 'classes'), difffit()*flow())):
        d = doctor(model, None, data, recipe, steps=60, batch_size=32); run = fit(model, None, data, recipe, steps=4, batch_size=32, progress=False); e = doctor(run)
        assert not d and not e and {'learning-rate', 'zero-gradient'} <= set(d.ran) and 'nothing-moved' in e.ran and 'no tokenizer' in ' '.join(d.skipped.values()), (d, e)

def test_arguments_that_do_not_fit():
    run = trained(steps=2)
    with pytest.raises(ValueError, match='call doctor\\(run\\)'): doctor(run, TOK)
    with pytest.raises(ValueError, match='model, tok and data'): doctor(toy())
    with pytest.raises(ValueError, match='held against a finished run'): doctor(toy(), TOK, lab_data(), exported='x')
    with pytest.raises(TypeError, match="no setting 'epochs'"): doctor(toy(), TOK, lab_data(), epochs=3)
    with pytest.raises(ValueError, match="model is 'lab-s', a name; load it first"): doctor('lab-s', TOK, lab_data())
    with pytest.raises(ValueError, match="recipe is 'lora'; give a Recipe"): doctor(toy(), TOK, lab_data(), 'lora')
    with pytest.raises(FileNotFoundError, match="no folder 'nowhere'"): doctor('nowhere')

# ---------- on the command line

def command(capsys, text):
    from ftlab.cli import main
    code = main(text.split()); return code, capsys.readouterr()

def test_command_says_what_it_found_and_ends_with_one_for_an_error(capsys, tmp_path):
    code, said = command(capsys, 'doctor --model lab-s --data new-procedure --method lora'); assert code == 0 and 'nothing found' in said.out
    code, said = command(capsys, 'doctor --model lab-s --data new-procedure --max-length 9 --json'); found = json.loads(said.out)
    assert code == 1 and found['errors'] >= 1 and 'answers-cut' in [f['name'] for f in found['findings']]
    code, said = command(capsys, 'doctor --model lab-s'); assert code == 1 and '--model and --data' in said.err
    code, said = command(capsys, f'fit --model lab-s --data new-procedure --method lora --steps 3 --items 2 --out {tmp_path}/run'); assert code == 0
    code, said = command(capsys, f'doctor {tmp_path}/run --json'); found = json.loads(said.out); assert code == 0 and found['when'] == 'after' and not found['findings'] and 'reload-differs' in found['ran']
    assert doctor(tmp_path/'run').json() == found # the folder will do in Python, too
    ftlab.load('lab-s')[0].save_pretrained(tmp_path/'base')
    code, said = command(capsys, f'doctor {tmp_path}/run --exported {tmp_path}/base'); assert code == 1 and "its logits are the base's" in said.out

# ---------- a sample of the sweep

sys.path.insert(0, str(Path(__file__).parent.parent/'bench'))
SAMPLE = [('hft', 'new-facts', 'qwen2'), ('dft', 'tool', 'gpt2'), ('lora', 'review', 'bert'), ('full', 'stack', 'opt'), ('lora', 'boxes', 'phi'), ('full', 'oruk', 'gemma')]

@pytest.mark.parametrize('recipe, skill, model', SAMPLE)
def test_no_false_alarm_in_a_sample_of_the_sweep(recipe, skill, model):
    import doctor_sweep
    row = doctor_sweep.one(recipe, skill, model); assert row['before']['findings'] == [] == row['after']['findings'], row

def test_the_sweep_covers_everything_and_its_table_is_silent():
    import doctor_sweep
    from ftlab.lab.world import SKILLS
    runs, names = doctor_sweep.plan(), set(methods.names())
    on_lab = [r for r, s, m in runs if m == 'lab-s']
    assert set(on_lab) == names and all(on_lab.count(n) == 1 for n in names - {'full'}), 'each method runs once on lab-s'
    assert len(runs) <= len(names) + len(SKILLS) + 24
    assert {r[1] for r in runs} == set(SKILLS) and {*doctor_sweep.ARCHITECTURES, 'lab-s'} == {r[2] for r in runs} and len(doctor_sweep.ARCHITECTURES) == 10
    table = json.loads((doctor_sweep.ROOT/'bench'/'results'/'doctor_sweep.json').read_text()); most = table['most_seconds_on_lab_s']
    said = [f for x in table['table'] for w in ('before', 'after') for f in x[w]['findings']]; sure = sum(len(x['confirmed']) for x in table['table'])
    assert len(said) == sure == table['confirmed'] and table['false_alarms'] == 0 == table['refused'] and table['runs'] == len(table['table']) and most['before'] < 5 and most['after'] < 20

def test_a_new_method_changes_no_other_run_of_the_sweep(monkeypatch):
    import doctor_sweep
    before, names = doctor_sweep.plan(), methods.names()
    monkeypatch.setattr(methods, 'names', lambda: ['aaa', *names, 'zzz'])
    after = doctor_sweep.plan()
    assert set(before) < set(after) and {r[0] for r in set(after) - set(before)} == {'aaa', 'zzz'} and len(after) == len(before) + 2
    monkeypatch.setattr(methods, 'names', lambda: [n for n in names if n != 'hft'])
    assert set(before) - set(doctor_sweep.plan()) == {next(r for r in before if r[0] == 'hft' and r[2] == 'lab-s')}
