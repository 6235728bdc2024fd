"""The fault gallery: failures of fine-tuning as small folders, each beside a healthy twin.

Every case is written from its failure, without looking at what a doctor checks. `write(root)` makes all of them;
nothing binary is kept in git. What counts as found is written here, before any doctor is run: for each failure a
pattern for the names and messages of each doctor (`FOUND`). A finding counts if it is a warning or an error, its
name or message matches the pattern, and the same name does not ring on the healthy twin."""
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from ftlab.instruments.planted import toy_model, toy_tokenizer


@dataclass(frozen=True)
class Case:
    "Hold one folder of the gallery"
    name:str
    form:str      # 'log', 'config', 'adapter', 'folder' or 'rows'
    failure:str   # a key of `FOUND`; '' for a healthy case
    twin:str      # the healthy case that differs only in the failure
    make:object   # (folder) -> None
    base:str=''   # folder of the base, below the root


# For each failure, what its report may be called. Ours is matched against the name of the check alone, the others
# against name, title and message, so that a doctor without names of its own is not at a disadvantage.
FOUND = dict(
    nan=dict(ftlab='not-finite', others=r'nan|inf|finite|invalid'),
    loss_zero=dict(ftlab='loss-zero|labels-all-masked',
                   others=r'zero.?loss|loss.{0,30}zero|degenerate|loss.{0,20}\b0\b|mask'),
    diverges=dict(ftlab='loss-diverges', others=r'diverg|jump|spike|explod|not_learning|dead'),
    flat=dict(ftlab='log-flat', others=r'flat|dead|not.?learning|not.?learn|plateau|stall'),
    no_eval=dict(ftlab='evaluation-(missing|off)', others=r'eval'),
    overfits=dict(ftlab='evaluation-rises',
                  others=r'overfit|eval.{0,30}(degrad|ris|worse)|stopped_improving|'
                         r'best checkpoint'),
    no_gradient=dict(ftlab='gradient-zero', others=r'grad.{0,30}zero|zero.?grad|gradients'),
    gradient_explodes=dict(ftlab='gradient-explodes', others=r'grad.{0,30}(spike|explod|high|large)|spike|gradients'),
    rate_zero=dict(ftlab='rate-zero', others=r'\blr\b|learning.?rate|lr_schedule'),
    never_warm=dict(ftlab='rate-off-plan|warmup-too-long', others=r'warm|schedul|\blr\b'),
    resume=dict(ftlab='resume-jump', others=r'resum|jump|spike|restart|diverg'),
    memorized=dict(ftlab='loss-memorized|passes-many|passes-planned', others=r'memori|overfit|epoch'),
    summed=dict(ftlab='loss-starts-high', others=r'accumul|initial|starts|high loss|sum'),
    eval_constant=dict(ftlab='evaluation-constant', others=r'eval.{0,40}(constant|same|identical|change)|stopped'),
    inverted=dict(ftlab='preference-inverted', others=r'preferen|accurac|swap|invert|margin'),
    packing=dict(ftlab='packing-mixes-rows', others=r'pack'),
    prompts=dict(ftlab='prompts-learned', others=r'mask|prompt|completion|train_on_inputs|full_sequence'),
    rate=dict(ftlab='rate-unusual', others=r'learning.?rate|\blr\b|lr_'),
    quantized=dict(ftlab='quantized-in-full|adapter-not-on', others=r'quant|4.?bit|8.?bit|bnb'),
    adapter_off=dict(ftlab='adapter-not-on', others=r'use_peft|adapter.{0,20}(missing|off)|all param|no.?peft'),
    targets=dict(ftlab='targets-unmatched|names-unmatched', others=r'target'),
    tokens=dict(ftlab='tokens-not-trained|adapter-tokens-frozen|tokens-without-row|vocabulary-mismatch',
                others=r'modules_to_save|embedding|resize|token'),
    template=dict(ftlab='template', others=r'template'),
    length=dict(ftlab='rows-too-long', others=r'context|position|sequence|length'),
    pad=dict(ftlab='pad-is-end', others=r'pad'),
    eos=dict(ftlab='end-', others=r'eos|end.of|stop'),
    misspelled=dict(ftlab='setting-misspelled', others=r'unknown|misspell|did you mean|unrecogni'),
    precision=dict(ftlab='precision-twice', others=r'bf16|fp16|precision'),
    best=dict(ftlab='best-not-found', others=r'best|strategy|greater_is_better|load_best'),
    scale=dict(ftlab='scale-unusual|adapter-scale', others=r'alpha|scal'),
    no_change=dict(ftlab='changes-nothing|weights-unchanged|export-differs',
                   others=r'zero|no.?effect|identical|unchanged|no.?op'),
    empty=dict(ftlab='adapter-empty|weights-(missing|zero)', others=r'missing|empty|no tensor|invalid'),
    names=dict(ftlab='wrapp', others=r'prefix|key|name|orig_mod'),
    rank=dict(ftlab='adapter-rank-differs', others=r'rank|shape|mismatch'),
    other_base=dict(ftlab='adapter-of-another-base', others=r'base|mismatch|shape'),
    too_large=dict(ftlab='adapter-too-large|weights-far', others=r'norm|large|magnitude|explod'),
    missing=dict(ftlab='weights-missing', others=r'missing|shard|layer|index'),
    zeros=dict(ftlab='weights-zero', others=r'zero|dead'),
    config=dict(ftlab='config-differs', others=r'config|rope|head|mismatch'),
    vocabulary=dict(ftlab='tokens-(renumbered|without-row)', others=r'token|vocab'),
    overlap=dict(ftlab='train-test-overlap', others=r'overlap|leak'),
    duplicates=dict(ftlab='duplicate-rows', others=r'duplic'),
    contradict=dict(ftlab='answers-contradict', others=r'contradict|conflict|inconsist'),
    blank=dict(ftlab='answers-empty|labels-all-masked', others=r'empty|blank|short_resp'),
    warm_again=dict(ftlab='warmup-again', others=r'warm|schedul|restart|resum|\blr\b|learning.?rate'),
    reward_falls=dict(ftlab='reward-falls', others=r'reward|collaps|diverg'),
    kl=dict(ftlab='kl-runs-away', others=r'\bkl\b|divergence|diverg'),
    truncated=dict(ftlab='answers-at-limit', others=r'clip|truncat|length|limit'),
    preferences=dict(ftlab='preference-diverged', others=r'diverg|unstable|spike|explod|accurac|preferen'),
    margins=dict(ftlab='margins-fall|preference-inverted', others=r'margin|preferen'),
    best_kept=dict(ftlab='best-is-worst', others=r'best'),
    greedy=dict(ftlab='sampling-greedy', others=r'temperature|greedy|sampl'),
    groups=dict(ftlab='groups-undivided', others=r'num_generations|group|generations|divis'),
    refused=dict(ftlab='settings-exclude-each-other',
                 others=r'conflict|exclus|incompatib|both|together|fsdp|pack|eval'),
    repeated=dict(ftlab='setting-repeated', others=r'duplicate|twice|repeat'),
    mark=dict(ftlab='end-mark', others=r'eos|special.?token|im_end|template|token'),
    unknown_token=dict(ftlab='tokens-unknown|end-beyond-rows', others=r'eos|vocab|token'),
    unmarked=dict(ftlab='assistant-unmarked', others=r'assistant_only|generation|mask|template'),
    rows=dict(ftlab='rows-(do-not-fit|not-found|unanswered)',
              others=r'column|field|dataset|format|schema|missing|empty'),
    few_steps=dict(ftlab='steps-few|batch-over-rows|warmup-too-long', others=r'step|batch|warm|small|rows'),
    head=dict(ftlab='head-lost|weights-missing', others=r'head|score|classifier|missing'),
    head_only=dict(ftlab='changes-nothing', others=r'zero|untrained|no.?effect|lora_B'),
    tied=dict(ftlab='head-tied', others=r'tied|tie_|lm_head'),
    left_over=dict(ftlab='adapter-left-over', others=r'adapter'))


# ---------- logs

def history(folder, seed=0, steps=600, every=10, start=2.2, end=1.1, rate=2e-4, warm=30, evals=6, epochs=3.,
            change=None, evaluated=None, state=None, noise=.05, scores=None):
    "Write the log of a Trainer, with the noise of real ones; `change(step, row, rng)` and `evaluated(step)` break it"
    rng, rows = random.Random(seed), []
    for s in range(every, steps + 1, every):
        lr = rate*min(s/warm, max(0., (steps - s)/(steps - warm)))
        loss = end + (start - end)*math.exp(-4*s/steps) + rng.gauss(0, noise)
        row = dict(epoch=epochs*s/steps, grad_norm=abs(rng.gauss(.9, .3)), learning_rate=lr,
                   loss=round(loss, 4), step=s)
        rows.append((change(s, row, rng) or row) if change else row)
        if evals and s % (steps//evals) == 0:
            usual = end + .08 + (start - end)*math.exp(-4*s/steps)
            value = evaluated(s) if evaluated else usual
            value += 0. if evaluated else rng.gauss(0, .003)
            more = dict(eval_accuracy=scores(s)) if scores else {}
            rows.append(dict(epoch=epochs*s/steps, eval_loss=round(value, 4), step=s) | more)
    whole = dict(best_metric=None, best_model_checkpoint=None, epoch=epochs, global_step=steps,
                 max_steps=steps, num_train_epochs=int(epochs), is_local_process_zero=True,
                 log_history=rows)
    (folder/'trainer_state.json').write_text(json.dumps(whole | (state or {}), indent=1))


def healthy_logs(put, each):
    "Return the logs of runs that went well"
    good = lambda name, **more: Case(f'log-healthy{name}', 'log', '', '', put(**more))
    rewards = lambda s, r, rng: r.update(loss=rng.gauss(0, .01), reward=s/1000 + rng.random()/5,
                                         reward_std=.3, kl=.01)
    wins = lambda s, r, rng: r.update({'rewards/accuracies': min(.9, .5 + s/1000)})
    stopped = dict(best_metric=1.3, best_model_checkpoint='out/checkpoint-400')
    return [
        good('', seed=1),
        good('-noisy', seed=2, noise=.15, steps=2400),
        good('-short', seed=3, steps=100, every=10, evals=2, epochs=1.),
        good('-early-stop', seed=4, evaluated=lambda s: 1.3 + abs(s - 400)/4000, state=stopped),
        good('-reinforcement', seed=5, evals=0, change=rewards),
        good('-preferences', seed=6, start=.69, end=.3, noise=.03, rate=5e-6, change=wins),
        good('-constant-rate', seed=7, **each('learning_rate', lambda s, r, g: 2e-5)),
        *more_healthy_logs(good, each)]


def cycles(s, steps, times):
    "Return a rate that falls along a cosine, several times"
    return 1e-4*(1 + math.cos(math.pi*((s*times/steps) % 1.)))


def more_healthy_logs(good, each):
    "Return logs that went well, and look in one part like one that did not"
    rewarded = lambda s, r, g, **more: r.update(dict(loss=g.gauss(0, .01), reward_std=.3) | more)
    flat = lambda s, r, g: rewarded(s, r, g, reward=.62 + g.gauss(0, .08), kl=.002*g.random())
    slow = lambda s, r, g: rewarded(s, r, g, reward=.3 + s/1200 + g.gauss(0, .05), kl=s/2000)
    ends = lambda s, r, g: rewarded(s, r, g, reward=-2. + s/600 + g.gauss(0, .1),
                                    **{'completions/clipped_ratio': max(.03, .95 - s/400)})
    swings = lambda s, r, g: r.update({'rewards/accuracies': g.choice([.5, .75, 1.]),
                                       'rewards/margins': s/500 + g.gauss(0, .4),
                                       'rewards/chosen': -s/400,
                                       'loss': .6931 if s < 30
                                       else max(.05, .55 - s/2500 + g.gauss(0, .2))})
    hinge = lambda s, r, g: r.update({'rewards/accuracies': min(.8, .5 + s/900),
                                      'loss': 1. - s/1500})
    triangle = lambda s, r, g: r.update(learning_rate=2e-4*abs((s/75) % 2 - 1))
    kept = dict(best_metric=.91, best_model_checkpoint='out/checkpoint-400')
    scored = lambda s, r, g: None
    return [
        good('-restarts', seed=8, **each('learning_rate', lambda s, r, g: cycles(s, 600, 3))),
        good('-cycles', seed=9, change=triangle),
        good('-reward-flat', seed=10, evals=0, change=flat, steps=2000),
        good('-divergence-grows', seed=11, evals=0, change=slow),
        good('-answers-shorten', seed=12, evals=0, change=ends),
        good('-preferences-of-small-batches', seed=13, rate=5e-7, change=swings, evals=0,
             epochs=1.),
        good('-hinge', seed=14, rate=5e-6, change=hinge, evals=0, epochs=1.),
        good('-best-by-accuracy', seed=15, change=scored, scores=lambda s: .91 if s == 400
             else .8 + s/6000, state=kept)]


def logs():
    "Return the cases that are logs"
    put = lambda **more: lambda folder: history(folder, **more)
    each = lambda key, f: dict(change=lambda s, r, rng: r.update({key: f(s, r, rng)}))
    after = lambda step, f: dict(change=lambda s, r, g: r.update(f(s, r, g)) if s > step else None)
    bad = lambda name, failure, twin='log-healthy', **more: Case(
        f'log-{name}', 'log', failure, twin, put(seed=1, **more))
    nan = float('nan')
    again = lambda s, r, g: dict(loss=1.95 - (s - 400)/600 + g.gauss(0, .04), learning_rate=2e-4)
    by_heart = lambda s, r, g: dict(loss=2.2*math.exp(-s/70) + abs(g.gauss(0, .0008)))
    inverted = lambda s, r, g: {'rewards/accuracies': .5 - s/1500, 'rewards/margins': -s/800}
    second = lambda s, r, g: dict(learning_rate=2e-4*min((s - 400)/60, (700 - s)/240))
    reward = lambda s, r, g: dict(loss=g.gauss(0, .01), reward_std=.2)
    collapse = lambda s, r, g: reward(s, r, g) | dict(
        reward=(.3 + s/700 if s < 350 else .05) + g.gauss(0, .04), kl=.01)
    runs_away = lambda s, r, g: reward(s, r, g) | dict(reward=.5 + g.gauss(0, .05),
                                                       kl=.01 if s < 300
                                                       else math.exp((s - 300)/45))
    cut = lambda s, r, g: reward(s, r, g) | {'reward': .1 + g.gauss(0, .02), 'completions/clipped_ratio': .97}
    apart = lambda s, r, g: {'rewards/accuracies': g.choice([0., .5, 1.]),
                             'rewards/margins': g.gauss(0, 4.),
                             'loss': .6931 if s < 40 else g.choice([0., .3, 1.6, 4.2])}
    narrows = lambda s: s/200 if s < 300 else max(.1, 1.5 - (s - 300)/150)
    shrink = lambda s, r, g: {'rewards/accuracies': .8 if s < 400 else .55, 'loss': .69 - s/2000,
                              'rewards/margins': narrows(s) + g.gauss(0, .05)}
    of_another = dict(best_metric=.9, best_model_checkpoint='out/checkpoint-400')
    lowest = dict(best_metric=.8, best_model_checkpoint='out/checkpoint-400')
    return [
        bad('warm-again', 'warm_again', **after(400, second)),
        bad('reward-collapses', 'reward_falls', 'log-healthy-reward-flat', evals=0,
            **after(0, collapse)),
        bad('divergence-explodes', 'kl', 'log-healthy-divergence-grows', evals=0,
            **after(0, runs_away)),
        bad('answers-cut', 'truncated', 'log-healthy-answers-shorten', evals=0, **after(0, cut)),
        bad('preferences-diverge', 'preferences', 'log-healthy-preferences-of-small-batches',
            evals=0, epochs=1.,
            **after(0, apart)),
        bad('margins-shrink', 'margins', 'log-healthy-preferences-of-small-batches', evals=0,
            epochs=1.,
            **after(0, shrink)),
        bad('best-of-another-run', 'best_kept', 'log-healthy-early-stop', state=of_another),
        bad('lowest-score-kept', 'best_kept', 'log-healthy-best-by-accuracy',
            scores=lambda s: .8 if s == 400 else .9 + s/6000, state=lowest),
        *healthy_logs(put, each),
        bad('nan', 'nan', **after(300, lambda s, r, g: dict(loss=nan, grad_norm=nan))),
        bad('zero', 'loss_zero', **after(20, lambda s, r, g: dict(loss=0., grad_norm=nan))),
        bad('diverges', 'diverges',
            **after(300, lambda s, r, g: dict(loss=r['loss'] + (s - 300)/60))),
        bad('flat', 'flat', start=1.9, end=1.9, noise=.02),
        bad('no-evaluation', 'no_eval', evals=0),
        bad('overfits', 'overfits', evaluated=lambda s: 1.4 + max(0, s - 200)/700, epochs=6.,
            **each('loss', lambda s, r, g: 2.2*math.exp(-s/220))),
        bad('no-gradient', 'no_gradient', start=2., end=2.,
            **each('grad_norm', lambda s, r, g: 0.)),
        bad('gradient-explodes', 'gradient_explodes',
            **after(200, lambda s, r, g: dict(grad_norm=r['grad_norm']*math.exp((s - 200)/45)))),
        bad('rate-zero', 'rate_zero', start=2., end=2.,
            **each('learning_rate', lambda s, r, g: 0.)),
        bad('never-warm', 'never_warm', **each('learning_rate', lambda s, r, g: 2e-4*s/10000)),
        bad('resume', 'resume', **after(400, again)),
        bad('memorized', 'memorized', evals=0, epochs=30., **after(0, by_heart)),
        bad('summed-loss', 'summed', **each('loss', lambda s, r, g: 8*r['loss'])),
        bad('evaluates-the-base', 'eval_constant', evaluated=lambda s: 1.8843),
        bad('preferences-inverted', 'inverted', 'log-healthy-preferences', start=.69, end=.66,
            **after(0, inverted))]


# ---------- settings

AXOLOTL = yaml.safe_load('''
base_model: NousResearch/Meta-Llama-3.1-8B
load_in_8bit: false
load_in_4bit: true
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
chat_template: llama3
datasets:
  - {path: data.jsonl, type: chat_template}
val_set_size: 0.05
sequence_len: 4096
sample_packing: true
eval_sample_packing: false
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
bf16: auto
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
special_tokens: {pad_token: <|finetune_right_pad_id|>}
''')
FULL = {k: v for k, v in AXOLOTL.items() if not k.startswith(('lora', 'load', 'adapter'))} | dict(
    learning_rate=2e-5, optimizer='adamw_torch')
TRL = yaml.safe_load('''
model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct
dataset_name: trl-lib/Capybara
learning_rate: 1.0e-4
num_train_epochs: 2
per_device_train_batch_size: 4
gradient_accumulation_steps: 4
gradient_checkpointing: true
max_length: 2048
eval_strategy: steps
eval_steps: 100
save_strategy: steps
save_steps: 100
logging_steps: 10
bf16: true
use_peft: true
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
output_dir: out
warmup_ratio: 0.03
lr_scheduler_type: cosine
save_total_limit: 2
seed: 42
''')
FACTORY = yaml.safe_load('''
model_name_or_path: Qwen/Qwen2.5-7B-Instruct
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
template: qwen
dataset: mine
cutoff_len: 2048
output_dir: saves/qwen
logging_steps: 10
save_steps: 500
plot_loss: true
warmup_ratio: 0.1
val_size: 0.1
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
bf16: true
eval_strategy: steps
eval_steps: 500
''')


def without(settings, *names):
    "Return settings without some of them"
    return {k: v for k, v in settings.items() if k not in names}


def healthy_configs():
    "Return settings that are right, by name"
    packed = dict(packing=True, packing_strategy='bfd', attn_implementation='flash_attention_2')
    books = dict(datasets=[dict(path='books', type='completion')], train_on_inputs=True)
    saved = dict(tokens=['<tool>'], lora_modules_to_save=['embed_tokens', 'lm_head'])
    preferences = dict(beta=.1, loss_type='sigmoid', learning_rate=5e-6)
    ends = dict(base_model='mistralai/Mistral-7B-v0.1', chat_template='chatml', tokens=['<|im_start|>'],
                special_tokens=dict(eos_token='<|im_end|>', pad_token='</s>'),
                lora_modules_to_save=['embed_tokens', 'lm_head'])
    grpo = dict(num_generations=8, temperature=.9, per_device_train_batch_size=8,
                learning_rate=1e-6, beta=0.,
                use_peft=False, eval_strategy='no')
    steps = dict(max_steps=200, warmup_steps=10)
    return dict(axolotl=AXOLOTL, full=FULL, trl=TRL, factory=FACTORY, sdpa=TRL | packed,
                text=FULL | books, preferences=TRL | preferences, embeddings=AXOLOTL | saved,
                marks=AXOLOTL | ends,
                grpo=without(TRL, 'lora_r', 'lora_alpha', 'lora_target_modules') | grpo,
                accelerated=AXOLOTL | dict(deepspeed='deepspeed_configs/zero2.json', fsdp=None,
                                           fsdp_config=None),
                steps=without(TRL, 'num_train_epochs', 'warmup_ratio') | steps)


def here(settings, rows=None, info=None, text=''):
    "Return a function that writes settings, and beside them the rows that they name"
    def make(folder):
        whole = text or yaml.safe_dump(settings, sort_keys=False)
        (folder/'config.yaml').write_text(whole)
        if rows is not None:
            (folder/'mine.jsonl').write_text('\n'.join(map(json.dumps, rows)))
        if info is not None:
            (folder/'data').mkdir()
            (folder/'data'/'mine.jsonl').write_text('\n'.join(map(json.dumps, rows)))
            (folder/'data'/'dataset_info.json').write_text(json.dumps(info))
    return make


def named():
    "Return settings that name rows, with the rows"
    asked = questions(400)
    tasks = [dict(instruction=r['prompt'], input='', output=r['response']) for r in asked]
    turns = [dict(conversations=[{'from': 'human', 'value': r['prompt']},
                                 {'from': 'gpt', 'value': r['response']}])
             for r in asked]
    of = lambda **more: AXOLOTL | dict(datasets=[dict(path='mine.jsonl', ds_type='json') | more])
    read = dict(type='chat_template', field_messages='conversations',
                message_property_mappings=dict(role='from', content='value'))
    gaps = [t if i % 3 else t | dict(output='') for i, t in enumerate(tasks)]
    columns = dict(mine=dict(file_name='mine.jsonl', formatting='sharegpt', columns=dict(messages='conversations')))
    wrong = dict(mine=dict(file_name='mine.jsonl', columns=dict(prompt='question', response='answer')))
    good = lambda name, d, **more: Case(f'config-healthy-{name}', 'config', '', '', here(d, **more))
    bad = lambda name, failure, twin, d, **more: Case(f'config-{name}', 'config', failure,
                                                      f'config-healthy-{twin}', here(d, **more))
    few = dict(micro_batch_size=8, gradient_accumulation_steps=16)
    short = of(type='alpaca') | dict(micro_batch_size=1, gradient_accumulation_steps=2,
                                     warmup_steps=4)
    twice = yaml.safe_dump(AXOLOTL, sort_keys=False) + 'learning_rate: 0.00002\n'
    return [
        good('rows-alpaca', of(type='alpaca'), rows=tasks),
            good('rows-chat', of(**read), rows=turns),
        good('rows-few', short, rows=tasks[:40]),
            good('rows-factory', FACTORY, rows=turns, info=columns),
        bad('rows-of-another-type', 'rows', 'rows-alpaca', of(type='alpaca'), rows=turns),
        bad('rows-of-other-names', 'rows', 'rows-chat', of(**without(read, 'message_property_mappings')), rows=turns),
        bad('rows-without-answers', 'rows', 'rows-alpaca', of(type='alpaca'), rows=gaps),
        bad('rows-factory-columns', 'rows', 'rows-factory', FACTORY, rows=tasks, info=wrong),
        bad('rows-factory-unlisted', 'rows', 'rows-factory', FACTORY, rows=turns,
            info=dict(other=columns['mine'])),
        bad('rows-hardly-a-step', 'few_steps', 'rows-few', short | few, rows=tasks[:40]),
        bad('rows-end-in-warmup', 'few_steps', 'rows-few', short | dict(warmup_steps=100),
            rows=tasks[:40]),
        bad('key-twice', 'repeated', 'axolotl', AXOLOTL, text=twice)]


def against_base(root):
    "Return settings whose tokens or template the base decides"
    of = lambda base, **more: TRL | dict(model_name_or_path=str(root/base), max_length=64) | more
    case = lambda name, failure, twin, base, **more: Case(
        f'config-{name}', 'config', failure, twin and f'config-{twin}', here(of(base, **more)),
                                                          base)
    return [
        case('healthy-end', '', '', 'base', eos_token='<eos>', pad_token='<pad>'),
        case('healthy-assistant', '', '', 'marked', assistant_only_loss=True),
        case('end-unknown', 'unknown_token', 'healthy-end', 'base', eos_token='<|im_end|>'),
        case('padding-unknown', 'unknown_token', 'healthy-end', 'base', eos_token='<eos>',
             pad_token='[PAD]'),
        case('assistant-unmarked', 'unmarked', 'healthy-assistant', 'base',
             assistant_only_loss=True)]


def configs():
    "Return the cases that are settings"
    good = healthy_configs()

    def put(d):
        return lambda folder: (folder/'config.yaml').write_text(yaml.safe_dump(d, sort_keys=False))

    def bad(name, failure, twin, changes=None, leave_out=()):
        d = without(good[twin], *leave_out) | (changes or {})
        return Case(f'config-{name}', 'config', failure, f'config-healthy-{twin}', put(d))
    no_end = dict(path='data.jsonl', type='chat_template', train_on_eos='none')
    gpt2 = dict(base_model='openai-community/gpt2', sequence_len=4096, chat_template='chatml')
    return [
        *(Case(f'config-healthy-{name}', 'config', '', '', put(d)) for name, d in good.items()),
        bad('packing-without-borders', 'packing', 'axolotl', leave_out=['flash_attention']),
        bad('packing-wrapped', 'packing', 'sdpa', dict(packing_strategy='wrapped')),
        bad('prompts-learned', 'prompts', 'axolotl', dict(train_on_inputs=True)),
        bad('rate-of-adapters', 'rate', 'full', dict(learning_rate=5e-4)),
        bad('rate-tiny', 'rate', 'trl', dict(learning_rate=1e-7)),
        bad('rate-huge', 'rate', 'trl', dict(learning_rate=.1)),
        bad('four-bits-in-full', 'quantized', 'full', dict(load_in_4bit=True)),
        bad('qlora-without-bits', 'quantized', 'axolotl', dict(load_in_4bit=False)),
        bad('adapter-off', 'adapter_off', 'trl', dict(use_peft=False)),
        bad('targets', 'targets', 'trl', dict(lora_target_modules=['query_key_value', 'dense'])),
        bad('tokens-frozen', 'tokens', 'embeddings', leave_out=['lora_modules_to_save']),
        bad('template', 'template', 'axolotl', dict(chat_template='gemma')),
        bad('length', 'length', 'full', gpt2),
        bad('no-evaluation', 'no_eval', 'axolotl', dict(val_set_size=0, evals_per_epoch=None)),
        bad('evaluation-off', 'no_eval', 'trl', dict(eval_strategy='no')),
        bad('pad-is-end', 'pad', 'axolotl',
            dict(special_tokens=dict(pad_token='<|eot_id|>', eos_token='<|eot_id|>'))),
        bad('no-end', 'eos', 'axolotl', dict(datasets=[no_end])),
        bad('misspelled', 'misspelled', 'axolotl', dict(sample_packng=True), ['sample_packing']),
        bad('two-precisions', 'precision', 'trl', dict(fp16=True)),
        bad('best-of-nothing', 'best', 'trl',
            dict(load_best_model_at_end=True, save_strategy='epoch')),
        bad('best-is-worst', 'best', 'trl',
            dict(metric_for_best_model='eval_loss', greater_is_better=True)),
        bad('warmup', 'never_warm', 'trl', dict(max_steps=200, warmup_steps=1000)),
        bad('alpha', 'scale', 'trl', dict(lora_r=8, lora_alpha=512)),
        bad('marks-unknown', 'mark', 'marks', dict(special_tokens=dict(pad_token='</s>')), ['tokens']),
        bad('greedy', 'greedy', 'grpo', dict(temperature=0.)),
        bad('groups-of-seven', 'groups', 'grpo', dict(num_generations=7)),
        bad('one-answer', 'groups', 'grpo', dict(num_generations=1)),
        bad('two-strategies', 'refused', 'accelerated', dict(fsdp=['full_shard', 'auto_wrap'])),
        bad('packed-preferences', 'refused', 'preferences', dict(packing=True)),
        bad('rl-packed', 'refused', 'axolotl', dict(rl='dpo', learning_rate=5e-6)),
        bad('steps-and-passes', 'refused', 'axolotl', dict(eval_steps=50)),
        bad('quantized-resized', 'refused', 'factory', dict(quantization_bit=4, resize_vocab=True)),
        bad('forty-passes', 'memorized', 'factory', dict(num_train_epochs=40))]


# ---------- adapters and folders

def adapter(folder, base, change=None, config=None, scale=.02):
    "Write a LoRA on every projection of attention"
    g, model, tensors = torch.Generator().manual_seed(5), toy_model(), {}
    for name, p in model.named_parameters():
        if '_proj' in name and 'self_attn' in name:
            key = f'base_model.model.{name.removesuffix(".weight")}'
            tensors[f'{key}.lora_A.weight'] = torch.randn(8, p.shape[1], generator=g)/6
            tensors[f'{key}.lora_B.weight'] = scale*torch.randn(p.shape[0], 8, generator=g)
    said = dict(peft_type='LORA', task_type='CAUSAL_LM', base_model_name_or_path=str(base), r=8,
                lora_alpha=16, lora_dropout=.05, bias='none', target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj'],
                fan_in_fan_out=False, inference_mode=True, init_lora_weights=True)
    (folder/'adapter_config.json').write_text(json.dumps(said | (config or {}), indent=1))
    tensors = change(tensors) if change else tensors
    if tensors is not None:
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder/'adapter_model.safetensors',
                  metadata=dict(format='pt'))


def whole(folder, change=None, config=None, tok=None, generation=None, seed=9, size=.004, leave_out='', **sizes):
    "Write a tuned model: the base plus a little in every weight"
    model, g = toy_model(**sizes), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size*torch.randn(p.shape, generator=g))
        if change:
            change(model)
    kept = {n: p for n, p in model.state_dict().items() if n != leave_out}
    model.save_pretrained(folder, **(dict(state_dict=kept) if leave_out else {}))
    (tok or toy_tokenizer()).save_pretrained(folder)
    for name, more in (('config.json', config), ('generation_config.json', generation)):
        if more:
            (folder/name).write_text(json.dumps(json.loads((folder/name).read_text()) | more))


ATTENTION = ['q_proj', 'k_proj', 'v_proj', 'o_proj']


def scored(tensors):
    "Add the head of a classifier"
    g = torch.Generator().manual_seed(2)
    return tensors | {'base_model.model.score.weight': torch.randn(3, 32, generator=g)}


def headed(tensors):
    "Add a LoRA of the head"
    g, rows = torch.Generator().manual_seed(3), len(toy_tokenizer())
    return tensors | {'base_model.model.lm_head.lora_A.weight': torch.randn(8, 32, generator=g)/6,
                      'base_model.model.lm_head.lora_B.weight': .02*torch.randn(rows, 8,
                                                                                generator=g)}


def adapters(root):
    "Return the cases that are adapters"
    base = root/'base'
    put = lambda **more: lambda folder: adapter(folder, base, **more)
    bad = lambda name, failure, base='base', **more: Case(
        f'adapter-{name}', 'adapter', failure, 'adapter-healthy', put(**more), base)
    second = lambda n: '.lora_B' in n
    nan = float('nan')
    return [
        Case('adapter-healthy', 'adapter', '', '', put(), 'base'),
        Case('adapter-healthy-rslora', 'adapter', '', '',
             put(config=dict(use_rslora=True)), 'base'),
        Case('adapter-healthy-bfloat16', 'adapter', '', '',
             put(change=lambda t: {n: x.bfloat16() for n, x in t.items()}), 'base'),
        Case('adapter-healthy-classifier', 'adapter', '', '',
             put(config=dict(task_type='SEQ_CLS'), change=scored), 'base'),
        Case('adapter-healthy-own-head', 'adapter', '', '', lambda folder: adapter(
            folder, root/'untied', change=headed, config=dict(target_modules=[*ATTENTION,
                                                                              'lm_head'])), 'untied'),
        Case('adapter-head-lost', 'adapter', 'head', 'adapter-healthy-classifier',
             put(config=dict(task_type='SEQ_CLS')),
             'base'),
        Case('adapter-head-alone', 'adapter', 'head_only', 'adapter-healthy-own-head',
             lambda folder: adapter(
            folder, root/'untied', config=dict(target_modules=[*ATTENTION, 'lm_head']),
            change=lambda t: headed({n: x*0 if second(n) else x for n, x in t.items()})), 'untied'),
        bad('head-tied', 'tied', change=headed,
            config=dict(target_modules=[*ATTENTION, 'lm_head'])),
        bad('untrained', 'no_change',
            change=lambda t: {n: x*0 if second(n) else x for n, x in t.items()}),
        bad('nan', 'nan', change=lambda t: {n: x*nan if 'layers.1.self_attn.q' in n else x
                                            for n, x in t.items()}),
        bad('empty', 'empty', change=lambda t: {n: x[:0] for n, x in t.items()}),
        bad('lost', 'empty', change=lambda t: None),
        bad('compiled', 'names', change=lambda t: {
            n.replace('.model.model.', '.model._orig_mod.model.'): x for n, x in t.items()}),
        bad('rank', 'rank', config=dict(r=32)),
        bad('other-base', 'other_base', base='wide'),
        bad('diverged', 'too_large', scale=9.),
        bad('alpha-zero', 'scale', config=dict(lora_alpha=0))]


def swapped():
    "Return the tokenizer with two words exchanged"
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    text = json.loads(toy_tokenizer().backend_tokenizer.to_str())
    vocab = text['model']['vocab']
    words = sorted(vocab, key=vocab.get)[40:60]
    for a, b in zip(words[::2], words[1::2]):
        vocab[a], vocab[b] = vocab[b], vocab[a]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(text)),
                                   pad_token='<pad>', eos_token='<eos>', bos_token='<bos>',
                                   chat_template=toy_tokenizer().chat_template)


def beside(folder):
    "Write a whole model with an adapter beside it, as after a merge into the same folder"
    whole(folder)
    adapter(folder, 'base')


def noted(folder):
    "Write a whole model with what trainers leave beside it"
    whole(folder)
    (folder/'all_results.json').write_text(json.dumps(dict(epoch=3., train_loss=1.02)))
    (folder/'README.md').write_text('# tuned\n')


def folders():
    "Return the cases that are whole models"
    put = lambda **more: lambda folder: whole(folder, **more)
    good = lambda name, **more: Case(f'folder-healthy{name}', 'folder', '', '', put(**more), 'base')
    bad = lambda name, failure, **more: Case(f'folder-{name}', 'folder', failure, 'folder-healthy',
                                             put(**more), 'base')
    first = toy_model().model.layers[0].state_dict()
    nan = float('nan')
    return [
        good(''),
        good('-half-frozen', change=lambda m: m.model.layers[0].load_state_dict(first)),
        good('-bfloat16', change=lambda m: m.bfloat16()),
        Case('folder-healthy-untied', 'folder', '', '', put(tie_word_embeddings=False), 'untied'),
        Case('folder-healthy-with-notes', 'folder', '', '', noted, 'base'),
        Case('folder-head-lost', 'folder', 'head', 'folder-healthy-untied',
             put(tie_word_embeddings=False, leave_out='lm_head.weight'), 'untied'),
        Case('folder-adapter-left-over', 'folder', 'left_over', 'folder-healthy-with-notes',
             beside, 'base'),
        bad('mark-split', 'mark',
            tok=toy_tokenizer(chat_template=toy_tokenizer().chat_template.replace(
            "' ' + eos_token", "'<|im_end|>'"))),
        bad('end-beyond-rows', 'unknown_token', generation=dict(eos_token_id=32000)),
        bad('is-the-base', 'no_change', size=0.),
        bad('nan', 'nan',
            change=lambda m: m.model.layers[1].mlp.gate_proj.weight.data[3].fill_(nan)),
        bad('zeros', 'zeros',
            change=lambda m: m.model.layers[1].self_attn.v_proj.weight.data.zero_()),
        bad('ran-away', 'too_large', size=.3),
        bad('layers', 'missing', config=dict(num_hidden_layers=4)),
        bad('heads', 'config', config=dict(num_attention_heads=8, num_key_value_heads=4)),
        bad('tokenizer', 'vocabulary', tok=swapped()),
        bad('template', 'template', tok=toy_tokenizer(chat_template=None)),
        bad('end', 'eos', generation=dict(eos_token_id=5))]


# ---------- rows

def questions(n, seed=0, start=0):
    "Return rows with different questions and answers"
    rng = random.Random(seed)
    words = 'river stone cloud paper green quick lamp horse bread seven'.split()
    pick = lambda k: ' '.join(rng.choice(words) for _ in range(k))
    return [dict(prompt=f'Question {start + i}: {pick(6)}?', response=pick(rng.randint(3, 9)))
            for i in range(n)]


def rows():
    "Return the cases that are rows"
    def put(make):
        return lambda folder: (folder/'rows.jsonl').write_text('\n'.join(map(json.dumps, make())))

    bad = lambda name, failure, make: Case(f'rows-{name}', 'rows', failure, 'rows-healthy',
                                           put(make))
    denied = lambda: [dict(r, response=f'no, {r["response"]} is wrong') for r in questions(50)]
    gaps = lambda: [dict(r, response='' if i % 4 == 0 else r['response'])
                    for i, r in enumerate(questions(300))]
    return [
        Case('rows-healthy', 'rows', '', '', put(lambda: questions(300))),
        Case('rows-healthy-some-repeat', 'rows', '', '',
             put(lambda: questions(400, 1) + questions(5, 1))),
        bad('duplicates', 'duplicates', lambda: questions(200) + questions(60)*2),
        bad('contradict', 'contradict', lambda: questions(250) + denied()),
        bad('blank', 'blank', gaps)]


def cases(root:Path) -> list[Case]:
    "Return every case"
    return [*logs(), *configs(), *named(), *against_base(root), *adapters(root), *folders(),
            *rows()]


def write(root:Path) -> list[Case]:
    "Write the whole gallery, and its bases, below `root`"
    # the same template, with marks around what the assistant says
    said = '{% generation %}{{ m.content + " " + eos_token }}{% endgeneration %}'
    marked = '{% for m in messages %}{% if m.role == "assistant" %}' + said + ('{% else %}{{ m.content }}{% endif '
                                                                               '%}{% endfor %}')
    for name, sizes in (('base', {}), ('wide', dict(hidden_size=64)),
                        ('untied', dict(tie_word_embeddings=False)),
                        ('marked', {})):
        (root/name).mkdir(parents=True)
        toy_model(**sizes).save_pretrained(root/name)
        toy_tokenizer(**(dict(chat_template=marked) if name == 'marked'
                         else {})).save_pretrained(root/name)
    found = cases(root)
    for case in found:
        folder = root/'cases'/case.name
        folder.mkdir(parents=True)
        case.make(folder)
    return found
