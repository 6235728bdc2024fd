"""Kill runs at random moments, resume them, and compare with the run that nobody killed.

    python bench/kills.py --kills 60            # writes bench/results/kills.json
    nice -n 19 python bench/kills.py --kills 300 --pause 2

One process imports everything once and forks a child for each run, so that a kill costs about as
long as the run that it hits. SIGKILL falls at a random moment of the run, in the middle of a write
(the folder in which a file is written is there), or just after the file of a finished stage. A case
is killed up to three times. It is resumed in the end, and parameters, learners, log, path and
tokens must equal those of the uninterrupted run bit for bit. One case in four begins in a folder
where an older run with other settings was killed or finished; one in four is asked, once, without
`resume`, whether it says truly what is there. After each case the folder must hold nothing but the
run's own files. Results are written after every case, and `--kills` counts those of the file, too:
the same command goes on."""
import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

for name, value in dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='passive', HF_HUB_OFFLINE='1',
                        TOKENIZERS_PARALLELISM='false').items():
    os.environ.setdefault(name, value)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import LlamaConfig, LlamaForCausalLM
import ftlab
from ftlab import methods
from ftlab.core.io import read_metadata, write_text
from ftlab.instruments.bench import Budget
from ftlab.lab.models import lab_tokenizer
from ftlab.trainers.callbacks import EarlyStop, Every, validation_nll
from ftlab.trainers.checkpoint import cut_off
from ftlab.trainers.fit import fit

OUT = Path(__file__).parent/'results'/'kills.json'
TOK, DATA = lab_tokenizer(), ftlab.data('new-procedure', n=60)
PAIRS = ftlab.data([dict(prompt=r['prompt'], chosen=r['response'], rejected=r['prompt'].split()[-1])
                    for r in DATA.train])
HOW = dict(steps=12, batch_size=4, lr=3e-3, save_every=2, progress=False)
EARLY = dict(callbacks=(EarlyStop(n=2, patience=2, rows=4),), lr=3e-2)
KINDS = { # name -> () -> (recipe, arguments of fit that differ from `HOW`)
    'full': lambda: (methods.full(), {}),
    'full, dropout and accumulation': lambda: (methods.full(), dict(accumulate=2)),
    'full, early stop': lambda: (methods.full(), EARLY),
    'full, measured': lambda: (methods.full(),
                               dict(callbacks=(Every(3, lambda s: validation_nll(s, 4)),))),
    'full, packing': lambda: (methods.full(), dict(packing=True)),
    'full, bf16': lambda: (methods.full(), dict(precision='bf16')),
    'hft': lambda: (methods.hft(), {}),
    'lora': lambda: (methods.lora(dropout=.1), {}),
    'randlora': lambda: (methods.randlora(r=4), {}),
    'lift': lambda: (methods.lift(r=2, every=3), {}),
    'lofit': lambda: (methods.lofit(share=.5), {}),
    'lt_sft': lambda: (methods.lt_sft(), {}),
    'lt_sft, budget': lambda: (methods.lt_sft(l1=.1), dict(callbacks=(Budget(200),))),
    'lines': lambda: (methods.lines(), {}),
    'breadcrumbs': lambda: (methods.breadcrumbs(), {}),
    'lisa': lambda: (methods.lisa(gamma=1, period=3), {}),
    'mezo': lambda: (methods.mezo(), dict(lr=1e-4)),
    'asft': lambda: (methods.asft(), {}),
    'hft x dft': lambda: (methods.hft()*methods.dft(), {}),
    'masked_thought': lambda: (methods.masked_thought(), {}),
    'r_tuning': lambda: (methods.r_tuning(), {}),
    'copilot': lambda: (methods.copilot(width=16, layers=1, heads=2), {}),
    'dpo': lambda: (methods.dpo(), dict(data=PAIRS)),
    'spin': lambda: (methods.spin(rounds=2, max_new_tokens=4), {}),
    'grpo': lambda: (methods.grpo(group=2, max_new_tokens=4), {}),
}

def toy():
    "A Llama of two blocks with dropout, the same every time"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(TOK), hidden_size=32, intermediate_size=80,
                             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                             max_position_embeddings=128, attention_dropout=.1, pad_token_id=0,
                             bos_token_id=1, eos_token_id=2)
        return LlamaForCausalLM(config).eval()

def print_of(run) -> str:
    "A hash of everything that a run leaves"
    h = hashlib.blake2s()
    tensors = dict(run.model.state_dict())
    tensors |= {f'learner {n} {k}': v for n, m in run.models.items()
                for k, v in m.state_dict().items()}
    for n in sorted(tensors):
        bits = tensors[n].detach().contiguous().view(torch.uint8).numpy().tobytes()
        h.update(n.encode() + str(tensors[n].dtype).encode() + bits)
    h.update(json.dumps([run.log, run.path, run.cost['tokens'], run.interrupted,
                         run.settings]).encode())
    return h.hexdigest()

# ---------- one run, in a child

def child(kind:str, folder:Path, resume:bool|None, answer:Path, **other) -> int:
    "Fork a run; returns its process number. `answer` gets the hash, or what it raised"
    if pid := os.fork():
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        recipe, more = KINDS[kind]()
        more = dict(HOW, data=DATA) | more | other
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            try:
                data = more.pop('data')
                run = fit(toy(), TOK, data, recipe, **more, out=folder, resume=resume)
                said = dict(print=print_of(run))
            except ValueError as e:
                said = dict(refused=str(e))
        said['warnings'] = [str(w.message) for w in told
                            if 'starts over' in str(w.message) or 'replaces' in str(w.message)]
        answer.write_text(json.dumps(said))
        code = 0
    except BaseException:
        answer.write_text(json.dumps(dict(error=traceback.format_exc()[-2000:])))
    finally:
        os._exit(code)

def to_the_end(kind:str, folder:Path, resume:bool|None, answer:Path, **other) -> dict:
    answer.unlink(missing_ok=True)
    os.waitpid(child(kind, folder, resume, answer, **other), 0)
    return json.loads(answer.read_text()) if answer.exists() else dict(error='the child left no answer')

def ended(pid:int) -> bool:
    return os.waitpid(pid, os.WNOHANG)[0] == pid

def in_a_write(folder:Path) -> bool:
    return folder.exists() and any(p.name.endswith('.tmp') for p in folder.iterdir())

def kill(kind, folder, resume, answer, where:str, seconds:float, rng, **other) -> str|None:
    "Run, and kill it somewhere; returns where it was hit, `None` where it had ended"
    pid, start = child(kind, folder, resume, answer, **other), time.time()
    wait = rng.random()*seconds*1.05
    skip = rng.randrange(4) # not always the first write
    seen, inside = 0, False
    while not ended(pid):
        now = time.time() - start
        writing = in_a_write(folder)
        seen += writing and not inside
        inside = writing
        hit = dict(anywhere=now >= wait, write=writing and seen > skip,
                   stage=any(folder.glob('stage-*.safetensors')) and now >= .3)
        if hit[where]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return 'in a write' if in_a_write(folder) else where
        time.sleep(.0005 if where == 'write' else .002)
    return None

# ---------- a case: kills, and what became of it

def odd_files(folder:Path) -> list[str]:
    "What a finished run should not leave"
    own = ('checkpoint.safetensors', 'originals.safetensors', 'edited.safetensors',
           'base.safetensors')
    return sorted(p.name for p in folder.iterdir()
                  if p.name not in own and not p.match('stage-?.safetensors'))

def true_refusal(said:dict, folder:Path) -> bool:
    "Asked without `resume`: does it refuse exactly where there is a run that was cut off?"
    left = cut_off(folder/'checkpoint.safetensors')
    said = said['refused']
    return (left is not None and f'at step {left["step"]} of' in said
            and 'holds this run, cut off' in said)

def case(kind:str, base:dict, seconds:float, rng, place:Path) -> dict:
    folder, answer = place/'run', place/'answer'
    shutil.rmtree(folder, ignore_errors=True)
    found = dict(kind=kind, kills=[], older=None, asked=None)
    if rng.random() < .25: # an older run of other settings lies in the folder
        found['older'] = 'killed' if rng.random() < .5 else 'finished'
        other = dict(seed=5)
        if found['older'] == 'killed':
            kill(kind, folder, None, answer, 'anywhere', seconds, rng, **other)
        else:
            to_the_end(kind, folder, None, answer, **other)
    resume = False if found['older'] else None
    for _ in range(rng.choice((1, 1, 2, 3))):
        where = rng.choice(('anywhere', 'anywhere', 'write',
                            'stage' if KINDS[kind]()[0].stages else 'write'))
        hit = kill(kind, folder, resume, answer, where, seconds, rng)
        if hit is None:
            break
        found['kills'].append(hit)
        own = folder/'checkpoint.safetensors'
        mine = own.exists() and json.loads(read_metadata(own)['whole'])['seed'] == 0
        if found['older'] and not mine:
            # killed before its own first checkpoint: what is there is the other run's
            resume = False
            continue
        if rng.random() < .25 and mine:
            said = to_the_end_is_refused(kind, folder, answer)
            found['asked'] = 'true' if said is None else said
        resume = True
    return found | verdict(kind, base, folder, resume, answer)

def to_the_end_is_refused(kind, folder, answer) -> str|None:
    "Ask without `resume` where a run was cut off: `None` if it refuses for the true reason"
    left = cut_off(folder/'checkpoint.safetensors')
    if left is None:
        return None # its last step was done: the same call begins anew, as it should
    said = to_the_end(kind, folder, None, answer)
    if 'refused' in said and true_refusal(said, folder):
        return None
    return json.dumps(said)

def verdict(kind, base, folder, resume, answer) -> dict:
    said = to_the_end(kind, folder, resume, answer)
    odd = odd_files(folder)
    if 'print' in said:
        how = 'equal' if said['print'] == base['print'] else 'different'
    else:
        how = 'refused' if 'refused' in said else 'error'
    return dict(became=how, left=odd, said=None if how == 'equal' else said)

def summary(cases:list[dict], seconds:float, bases:dict) -> dict:
    kills = [k for c in cases for k in c['kills']]
    count = lambda key, rows: {v: rows.count(v) for v in sorted(set(rows), key=str)}
    by_kind = {}
    for c in cases:
        row = by_kind.setdefault(c['kind'], dict(cases=0, kills=0, equal=0))
        row['cases'] += 1
        row['kills'] += len(c['kills'])
        row['equal'] += c['became'] == 'equal'
    return dict(kills=len(kills), cases=len(cases), where=count('where', kills),
                became=count('became', [c['became'] for c in cases]),
                killed_more_than_once=sum(len(c['kills']) > 1 for c in cases),
                older_run_in_the_folder=count('older', [str(c['older']) for c in cases]),
                asked_without_resume=count('asked', [str(c['asked']) for c in cases]),
                leftovers=sum(bool(c['left']) for c in cases), seconds=round(seconds, 1),
                seconds_a_kill=round(seconds/max(1, len(kills)), 2), by_kind=by_kind,
                run_seconds=bases)

def run_cases(a, cases:list[dict], before:float, place:Path) -> dict:
    "Kill until there are enough; returns the summary, which is written after every case"
    rng, start, bases, kinds = random.Random(len(cases)), time.time(), {}, [
        a.only] if a.only else list(KINDS)
    facts = dict(steps=HOW['steps'], save_every=HOW['save_every'], python=platform.python_version(),
                 torch=torch.__version__, system=platform.system())
    found = summary(cases, before, {})
    while found['kills'] < a.kills:
        kind = kinds[len(cases) % len(kinds)]
        if kind not in bases:
            bases[kind] = baseline(kind, place/f'base-{len(bases)}', place/'answer')
        cases.append(case(kind, bases[kind], bases[kind]['seconds'], rng, place))
        found = summary(cases, before + time.time() - start,
                        {k: b['seconds'] for k, b in bases.items()})
        write_text(OUT, json.dumps(dict(summary=found, facts=facts, cases=cases), indent=1) + '\n')
        c = cases[-1]
        print(f'{found["kills"]:4} kills, {kind}: {c["became"]} after {c["kills"]}, older {c["older"]}, '
              f'asked {c["asked"]}, left {c["left"]}', flush=True)
        time.sleep(a.pause)
    return found

def baseline(kind:str, folder:Path, answer:Path) -> dict:
    "The run that nobody kills, and its seconds"
    start = time.time()
    base = to_the_end(kind, folder, None, answer)
    if 'print' not in base:
        sys.exit(f'{kind} does not run: {base}')
    return base | dict(seconds=round(time.time() - start, 2))

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--kills', type=int, default=60, help='in all, those in the result file included')
    p.add_argument('--pause', type=float, default=0., help='seconds of rest after each case')
    p.add_argument('--anew', action='store_true', help='forget the result file')
    p.add_argument('--only', help='one kind of recipe')
    a = p.parse_args()
    old = dict(cases=[], summary=dict(seconds=0.))
    if OUT.exists() and not a.anew:
        old = json.loads(OUT.read_text())
    with tempfile.TemporaryDirectory(prefix='kills-') as place:
        os.environ['TMPDIR'] = tempfile.tempdir = place
        found = run_cases(a, old['cases'], old['summary']['seconds'], Path(place))
    print(json.dumps({k: v for k, v in found.items() if k not in ('by_kind', 'run_seconds')},
                     indent=1))
    sys.exit(any(c['became'] != 'equal' or c['left'] or c['asked'] not in (None, 'true')
                 for c in old['cases']))

if __name__ == '__main__':
    main()
