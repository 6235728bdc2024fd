"""Run ftlab's doctor and its peers on the fault gallery, side by side: `python bench/gallery.py [--peers FOLDER]`.

Each peer is used through the interface that it documents, in a virtual environment of its own below FOLDER, which
is made if it is missing. A case is given to a peer in every form that the peer takes; what it finds in any of them
counts. The rule was written before the first run (`bench/gallery/cases.py`):

- *caught*: a warning or an error whose name or message matches the patterns of that failure, and whose name does
  not ring on the healthy twin;
- *missed*: the tool takes this kind of input and says nothing of the kind;
- *cannot judge*: it has no input of this kind, or could not read this one;
- *false alarm*: a warning or an error on a healthy case. Names that ring on more than half of the healthy cases of
  a kind are about the machine or about taste, and are not counted; the result lists them.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).with_suffix('')))
from cases import FOUND, cases, write  # noqa: E402

OUT = Path(__file__).parent/'results'/'gallery.json'
PEERS = {'peft-doctor': '0.9.2', 'guardtower': '0.1.0', 'trainproof': '0.22.0', 'finetune-doctor': '0.2.2',
         'finetunecheck': '2.0.2'}
NOT_RUN = dict(finetunecheck='it installs, but needs transformers < 5, which cannot read the tokenizers that '
                             'transformers 5 writes beside the models of this gallery (TokenizersBackend)')
EXTRA = {'finetune-doctor': ['numpy']} # what its package needs
BAD = ('warn', 'warning', 'error', 'fail', 'critical')


# ---------- the peers

def installed(peers:Path) -> dict[str, str]:
    "Make the environments; return {name: '' or why it cannot be used}"
    found = {}
    for name, number in PEERS.items():
        folder = peers/f'peer-{name}'
        if not (folder/'bin'/'python').exists():
            subprocess.run([sys.executable, '-m', 'venv', folder], check=True)
        alone = ['--no-deps'] if name == 'guardtower' else [] # it runs in this environment, which has torch
        wanted = [*alone, f'{name}=={number}', *EXTRA.get(name, [])]
        done = subprocess.run([folder/'bin'/'pip', 'install', '-q', *wanted],
                              capture_output=True, text=True)
        found[name] = '' if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
    return found


def called(*command, folder=None, limit=120) -> str:
    "Run a command and return what it printed; '' if it failed without a word"
    try:
        return subprocess.run(list(map(str, command)), capture_output=True, text=True,
                              timeout=limit, cwd=folder).stdout
    except subprocess.TimeoutExpired:
        return ''


def parsed(text:str):
    "Return the JSON in a text; None if there is none"
    at = min([i for i in (text.find('{'), text.find('[')) if i >= 0], default=-1)
    try:
        return json.JSONDecoder().raw_decode(text[at:])[0] if at >= 0 else None
    except ValueError:
        return None


def findings(value) -> list[tuple[str, str, str]]:
    "Return (severity, name, text) of everything in a report that has a severity"
    out = []
    if isinstance(value, dict):
        level = value.get('severity') or value.get('level')
        name = value.get('code') or value.get('id') or value.get('check')
        if isinstance(level, str) and isinstance(name, str):
            text = ' '.join(str(value.get(k) or '') for k in ('title', 'message', 'summary', 'evidence'))
            out.append((level.lower(), name, text))
        value = list(value.values())
    for item in value if isinstance(value, list) else []:
        out += findings(item)
    return out


def peft_doctor(python:Path, case, folder:Path, root:Path) -> list|None:
    "Ask every command of peft-doctor that takes this kind of input"
    run = lambda *a: parsed(called(python.parent/'peft-doctor', *a, '-o', 'json'))
    if case.form == 'log':
        reports = [run('monitor', file) for file in log_forms(folder)] + [run('scan-log', folder/'trainer_state.json')]
    elif case.form == 'config':
        reports = [run(*command) for command in config_commands(folder)]
    elif case.form == 'adapter':
        reports = [run(c, folder) for c in ('adapter-tensors', 'inspect-adapter', 'adapter-check', 'adapter-integrity',
                                            'serving-check')]
        reports.append(run('lora-config-check', folder/'adapter_config.json'))
        reports.append(run('inspect-adapter', folder, '--base-model', root/case.base))
    elif case.form == 'rows':
        commands = ('dataset-intel', 'dataset-doctor', 'inspect-dataset', 'conflicts', 'inspect-objective')
        reports = [run(c, folder/'rows.jsonl') for c in commands]
    else:
        return None
    return collected(reports)


def collected(reports) -> list|None:
    read = [r for r in reports if r is not None]
    return [f for r in read for f in findings(r)] if read else None


def log_forms(folder:Path) -> list[Path]:
    "Write a log as JSON lines, as a table and as what a Trainer prints; return all files"
    rows = json.loads((folder/'trainer_state.json').read_text())['log_history']
    forms = {'log.jsonl': '\n'.join(map(json.dumps, rows)), 'log.txt': '\n'.join(map(str, rows))}
    keys = sorted({k for r in rows for k in r})
    lines = [keys, *([str(r.get(k, '')) for k in keys] for r in rows)]
    forms['log.csv'] = '\n'.join(map(','.join, lines))
    out = folder.parent.parent/'forms'/folder.name
    out.mkdir(parents=True, exist_ok=True)
    for name, text in forms.items():
        (out/name).write_text(text)
    return [folder/'trainer_state.json', *(out/name for name in forms)]


FLAGS = dict(learning_rate='--learning-rate', per_device_train_batch_size='--batch-size',
             warmup_ratio='--warmup-ratio', micro_batch_size='--batch-size',
             gradient_accumulation_steps='--grad-accum', max_length='--sequence-length',
             sequence_len='--sequence-length', cutoff_len='--sequence-length', optim='--optim',
             optimizer='--optim', warmup_steps='--warmup-steps',
             lr_scheduler_type='--lr-scheduler-type', lr_scheduler='--lr-scheduler-type',
             attn_implementation='--attn-implementation', model_name_or_path='--model', base_model='--model',
             save_total_limit='--save-total-limit', max_grad_norm='--max-grad-norm')
SWITCHES = dict(load_in_4bit='--load-in-4bit', load_in_8bit='--load-in-8bit', bf16='--bf16', fp16='--fp16',
                packing='--packing', sample_packing='--packing', completion_only_loss='--completion-only-loss',
                assistant_only_loss='--assistant-only-loss')


def config_commands(folder:Path) -> list[list]:
    "Return the commands of peft-doctor for a configuration: as a file, as options, and as a training script"
    file, settings = folder/'config.yaml', yaml.safe_load((folder/'config.yaml').read_text())
    given = {k: flag for k, flag in FLAGS.items() if settings.get(k) is not None}
    options = [x for k, flag in given.items() for x in (flag, settings[k])]
    options += [flag for k, flag in SWITCHES.items() if settings.get(k) is True]
    out = folder.parent.parent/'forms'/folder.name
    out.mkdir(parents=True, exist_ok=True)
    (out/'train.py').write_text(script(settings))
    (out/'config.json').write_text(json.dumps(settings))
    lora = {ours: settings[k] for k, ours in LORA.items() if settings.get(k) is not None}
    if settings.get('lora_target_linear') or settings.get('lora_target') == 'all':
        lora['target_modules'] = 'all-linear'
    (out/'adapter_config.json').write_text(json.dumps(dict(peft_type='LORA') | lora))
    return [['sft-check', file], ['sft-check', out/'config.json'],
            *([['lora-config-check', out/'adapter_config.json']] if 'r' in lora else []),
            ['quantization-check', file], ['check', *options],
            ['check', out/'train.py', *options], ['investigate', out]]


LORA = {'lora_r': 'r', 'lora_rank': 'r', 'lora_alpha': 'lora_alpha', 'lora_dropout': 'lora_dropout',
        'lora_target_modules': 'target_modules', 'lora_modules_to_save': 'modules_to_save'}


def script(s:dict) -> str:
    "Write settings as the training script that a user of trl would have"
    names = {'lora_r': 'r', 'lora_alpha': 'lora_alpha', 'lora_target_modules': 'target_modules',
             'lora_modules_to_save': 'modules_to_save', 'lora_dropout': 'lora_dropout'}
    lora = ', '.join(f'{names[k]}={v!r}' for k, v in s.items() if k in names)
    rest = ', '.join(f'{k}={v!r}' for k, v in s.items() if not k.startswith(('lora', 'datasets', 'load_in')))
    four = ', quantization_config=BitsAndBytesConfig(load_in_4bit=True)'
    bits = four if s.get('load_in_4bit') else ''
    return ('from trl import SFTConfig, SFTTrainer\nfrom peft import LoraConfig\n'
            'from transformers import AutoModelForCausalLM, BitsAndBytesConfig\n'
            f'model = AutoModelForCausalLM.from_pretrained({s.get("model_name_or_path") or s.get("base_model")!r}'
            f'{bits})\n'
            f'peft_config = LoraConfig({lora})\nargs = SFTConfig({rest})\n'
            'trainer = SFTTrainer(model=model, args=args, peft_config=peft_config, train_dataset=rows)\n'
            'trainer.train()\n')


def trainproof(python:Path, case, folder:Path, root:Path) -> list|None:
    "Ask trainproof about a log in each of its forms, or about rows"
    tool = python.parent/'trainproof'
    if case.form == 'log':
        files = [f for f in log_forms(folder) if f.suffix != '.txt']
        return collected([parsed(called(tool, 'doctor', f, '--json')) for f in files])
    if case.form == 'rows':
        return collected([parsed(called(tool, 'preflight', folder/'rows.jsonl', '--json', *more))
                          for more in ((), ('--text-field', 'response'))])
    return None


def finetune_doctor(python:Path, case, folder:Path, root:Path) -> list|None:
    "Ask finetune-doctor about a log"
    if case.form != 'log':
        return None
    return collected([parsed(called(python.parent/'finetune-doctor', 'diagnose', p, '-f', 'json'))
                      for p in (folder, folder/'trainer_state.json')])


GUARD = '''
import json, sys, warnings
warnings.filterwarnings('ignore')
sys.path.append(sys.argv[1])
import torch, guardtower
from transformers import AutoModelForCausalLM

def watched(kind, folder, base):
    model = AutoModelForCausalLM.from_pretrained(base if kind == 'adapter' else folder)
    if kind == 'adapter':
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, folder, is_trainable=True)
    x = torch.arange(5, 25).reshape(2, 10)
    step = lambda: model(input_ids=x, labels=x).loss
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    report = guardtower.audit(model, step, optimizer=optimizer)
    return [dict(severity=f.severity.name, code=f.check, message=f.message)
            for f in report.findings]

for name, *case in json.loads(sys.argv[2]):
    try:
        found = watched(*case)
    except Exception:
        found = None # the model cannot be loaded, so no step can be watched
    print(json.dumps([name, found]), flush=True)
'''


@cache
def watched(python:Path, root:Path) -> dict[str, list|None]:
    "Let guardtower watch one training step of every model and adapter, in one process"
    site = next((python.parent.parent/'lib').glob('python3*/site-packages'))
    asked = [(c.name, c.form, str(root/'cases'/c.name), str(root/c.base)) for c in cases(root)
             if c.form in ('adapter', 'folder')]
    text = called(sys.executable, '-c', GUARD, site, json.dumps(asked), limit=1200)
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('["')]
    if len(lines) < len(asked):
        raise SystemExit(f'guardtower came to an end after {len(lines)} of {len(asked)} cases')
    return {name: None if found is None else findings(found) for name, found in lines}


def guardtower(python:Path, case, folder:Path, root:Path) -> list|None:
    "Say what guardtower saw of a model or an adapter"
    return watched(python, root).get(case.name) if case.form in ('adapter', 'folder') else None


def ours(python, case, folder:Path, root:Path) -> list:
    "Ask ftlab's doctor"
    from ftlab.instruments.doctor import doctor
    target = folder/'rows.jsonl' if case.form == 'rows' else folder
    found = doctor(target, base=root/case.base if case.base else None)
    return [(f.severity, f.name, f.seen) for f in found]


ASK = {'ftlab': ours, 'peft-doctor': peft_doctor, 'guardtower': guardtower,
       'trainproof': trainproof, 'finetune-doctor': finetune_doctor}


# ---------- the rule

def judged(tool, cases, said:dict) -> tuple[dict, list]:
    "Return {case: verdict} of one tool, and the names that are generic"
    bad = lambda found: None if found is None else [(n, t) for s, n, t in found if s in BAD]
    alarms = {c.name: bad(said[c.name]) for c in cases}
    generic = set()
    for form in {c.form for c in cases}:
        healthy = [alarms[c.name] for c in cases if c.form == form and not c.failure]
        healthy = [names for names in healthy if names is not None]
        count = Counter(n for names in healthy for n in {n for n, _ in names})
        generic |= {n for n, k in count.items() if k > len(healthy)/2}
    out = {}
    for c in cases:
        if alarms[c.name] is None:
            out[c.name] = 'cannot judge'
        elif not c.failure:
            out[c.name] = 'false alarm' if any(n not in generic for n, _ in alarms[c.name]) else 'silent'
        else:
            out[c.name] = 'caught' if caught(tool, c, alarms) else 'missed'
    return out, sorted(generic)


def caught(tool, case, alarms) -> bool:
    "Say whether a finding matches the failure and does not ring on the healthy twin"
    twin = {n for n, _ in alarms[case.twin] or []}
    pattern = FOUND[case.failure]
    fits = lambda n, t: (re.search(pattern['ftlab'], n) if tool == 'ftlab'
                         else re.search(pattern['others'], f'{n} {t}', re.I | re.S))
    return any(n not in twin and fits(n, t) for n, t in alarms[case.name])


def summary(verdicts) -> dict:
    "Count the verdicts of one tool"
    count = Counter(verdicts.values())
    return {k: count[k] for k in ('caught', 'missed', 'cannot judge', 'false alarm', 'silent')}


def kept(result:dict) -> dict:
    "Add the tools that were run before on the same cases"
    old = json.loads(OUT.read_text()) if OUT.exists() else {}
    tools = old['tools'] if old.get('cases') == result['cases'] else {}
    every = tools | result['tools']
    return dict(result, tools={name: every[name] for name in (*ASK, *NOT_RUN) if name in every})


def main():
    "Run every tool on every case, and write the result"
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--peers', type=Path, default=Path(tempfile.gettempdir()))
    p.add_argument('--only', nargs='*', default=list(ASK))
    p.add_argument('--limit', type=int, default=3600, help='seconds for each tool')
    a = p.parse_args()
    root = Path(tempfile.mkdtemp())
    cases, why = write(root), installed(a.peers)
    faults = sum(bool(c.failure) for c in cases)
    result = dict(faults=faults, healthy=len(cases) - faults, tools={},
                  cases=[dict(name=c.name, form=c.form, failure=c.failure) for c in cases])
    for name, reason in (NOT_RUN | {n: w for n, w in why.items() if w}).items():
        result['tools'][name] = dict(version=PEERS[name], not_run=reason)
    for name in (n for n in a.only if n not in result['tools']):
        said, why_not = asked(name, cases, a.peers/f'peer-{name}'/'bin'/'python', root, a.limit)
        number = version('ftlab') if name == 'ftlab' else PEERS[name]
        result['tools'][name] = dict(version=number)
        if why_not:
            result['tools'][name]['not_run'] = why_not
        else:
            verdicts, generic = judged(name, cases, said)
            result['tools'][name] |= dict(summary(verdicts), generic=generic, verdicts=verdicts,
                                          alarms=alarms_of(cases, said, verdicts, generic))
        print(f'\r{name}: {why_not or summary(verdicts)}', file=sys.stderr)
        OUT.write_text(json.dumps(kept(result), indent=1).replace(str(root), '') + '\n')


def asked(name, cases, python, root, limit) -> tuple[dict, str]:
    "Ask one tool about every case; return what it said, and why it was stopped, if it was"
    ask = lambda c: ASK[name](python, c, root/'cases'/c.name, root)
    said, start = {}, time.monotonic()
    # most doctors are processes of their own
    with ThreadPoolExecutor(1 if name in ('ftlab', 'guardtower') else 3) as pool:
        for c, found in zip(cases, pool.map(ask, cases)):
            said[c.name] = found
            print(f'\r{name}: {len(said)} of {len(cases)}', end='', flush=True, file=sys.stderr)
            if time.monotonic() - start > limit and len(said) < len(cases):
                pool.shutdown(cancel_futures=True)
                return said, f'stopped after {limit} s, with {len(said)} of {len(cases)} cases done'
    return said, ''


def alarms_of(cases, said, verdicts, generic) -> dict:
    "Return what a tool said on the healthy cases on which it raised an alarm"
    rang = [c for c in cases if verdicts[c.name] == 'false alarm']
    out = {}
    for c in rang:
        loud = [(n, t) for s, n, t in said[c.name] if s in BAD and n not in generic]
        texts = [f'{n}: {" ".join(t.split())}'[:200] for n, t in loud]
        out[c.name] = list(dict.fromkeys(texts))[:3]
    return out


if __name__ == '__main__':
    main()
