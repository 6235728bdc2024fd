"""No false alarm: the doctor looks at healthy runs, before and after.

Of every recipe, every lab skill and ten architectures.

    python bench/doctor_sweep.py                 # all, about 20 seconds of one core a run
    python bench/doctor_sweep.py --missing       # what the table lacks, as after a method has joined
    python bench/doctor_sweep.py --only opt      # runs whose name contains a word, written nowhere

A run is short (8 steps of 16 rows, one pass), at the recipe's own rate. Whatever the doctor says of
it counts as a false alarm, with one exception: old skills that it says are lost are asked again on
100 other questions each, base and run, and if they really fell the finding is confirmed: that run
was not healthy. Who meets whom is drawn from the names alone, so that a new method changes no
other's run."""
import argparse, hashlib, json, re, sys, time
from pathlib import Path
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/'tests')]
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
import ftlab
from ftlab import methods
from ftlab.core import scorers
from ftlab.core.recipe import Recipe
from ftlab.lab.world import SKILLS
from ftlab.instruments.doctor import CHECKS, doctor
from ftlab.lab.models import lab_tokenizer

ASKED = sum(k.when != 'elsewhere' for k in CHECKS)  # the checks that a run of ours has

TOK = lab_tokenizer()
DECODERS = 'llama qwen2 mistral gemma gpt2 opt gpt_neox phi qwen3'.split()
ARCHITECTURES = [*DECODERS, 'bert']
SETTINGS = dict(steps=8, batch_size=16)

def random_model(family:str, seed:int=0):
    """A random model of 2 blocks with the lab's vocabulary and the family's own defaults,
    dropout included; BERT as a classifier of 2 labels"""
    sizes = dict(vocab_size=len(TOK), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    more = dict(opt=dict(ffn_dim=80, word_embed_proj_dim=32), gpt2={},
                bert=dict(intermediate_size=80, num_labels=2)).get(
                    family, dict(intermediate_size=80))
    if family in ('llama', 'qwen2', 'qwen3', 'mistral', 'gemma'):
        more |= dict(num_key_value_heads=2)
    if family in ('gemma', 'qwen3'):
        more |= dict(head_dim=8)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind = AutoModelForSequenceClassification if family == 'bert' else AutoModelForCausalLM
        return kind.from_config(AutoConfig.for_model(family, **sizes | more)).eval()

def rows_of(skill:str, labels:bool=False, n:int=128):
    data = ftlab.data(skill, n=n)
    if not labels:
        return data
    parts = {s: [dict(text=r['prompt'], label=['even', 'odd'][len(r['response'].split()) % 2]
                      if len({len(r['response'].split()) for r in data.train}) > 1
                      else ['even', 'odd'][i % 2]) for i, r in enumerate(getattr(data, s))]
             for s in ('train', 'validation', 'test')}
    return ftlab.data(parts['train'], validation=parts['validation'], test=parts['test'])

# where lab-s is always right all answers have one reward, and there is nothing to learn from
UNSURE = dict(grpo='boxes')
# a lab model is no toy: these learn from its own answers, so they get their own reward and length
DEFAULTS = ('grpo', 'spin')

def toy_arguments(name:str) -> dict:
    """The arguments with which a method's contract makes it small:
    those of its mark, or of the contract's table while that stands"""
    function = getattr(methods, name)
    try:
        from test_contract import INSTEAD
    except ImportError:
        INSTEAD = {}
    toy = getattr(function, 'toy', None) or INSTEAD.get(name, {})
    return toy() if callable(toy) else toy

def recipe_of(name:str) -> Recipe:
    "The method as the sweep runs it"
    return getattr(methods, name)(**({} if name in DEFAULTS else toy_arguments(name)))

# another number draws all pairs anew: where a check was fixed for what a sweep found,
# the next sweep must not be the same
DRAW = 1

def drawn(name:str, among:list[str]) -> str:
    "One of `among`, by a hash of `name`: the same whatever other names there are"
    return among[int(hashlib.sha256(f'{DRAW} {name}'.encode()).hexdigest(), 16) % len(among)]

def plan() -> list[tuple[str, str, str]]:
    """(recipe, skill, model): every method once and every skill once on lab-s,
    two plain methods on every architecture, and four more"""
    skills = list(SKILLS)
    runs = [(n, UNSURE.get(n) or drawn(n, skills), 'lab-s') for n in methods.names()]
    runs += [(n, drawn(f'{n} {a}', skills), a) for a in ARCHITECTURES for n in ('full', 'lora')]
    runs += [('full', s, 'lab-s') for s in skills]
    runs += [(n, 'new-procedure', a) for n, a in (('hft', 'qwen2'), ('dft', 'mistral'),
                                                  ('hft', 'bert'), ('dft', 'gpt2'))]
    return list(dict.fromkeys(runs))

def summary(diagnosis, seconds) -> dict:
    return dict(seconds=round(seconds, 2), ran=len(diagnosis.ran), skipped=diagnosis.skipped,
                findings=[f'{f.severity} {f.name}: {f.seen}' for f in diagnosis])

def really_lost(run, finding) -> bool:
    """Did all the skills that the doctor names fall by half at least, on 100 validation questions
    that it has not asked?"""
    names = re.findall(r'([\w-]+) \d+% -> \d+%', finding.seen)
    ask = lambda: scorers.skills(run.model, 100, split='validation', seed=1, names=names,
                                 tok=run.tok)
    now = ask()
    with run.disabled():
        was = ask()
    return bool(names) and all(now[n] < .5*was[n] for n in names)

def one(recipe:str, skill:str, model:str) -> dict:
    "One run with the doctor before and after"
    base, tok = ftlab.load('lab-s') if model == 'lab-s' else (random_model(model), TOK)
    data, r = rows_of(skill, model == 'bert'), recipe_of(recipe)
    row = dict(recipe=recipe, skill=skill, model=model)
    t = time.process_time()
    d = doctor(base, tok, data, r, **SETTINGS)
    row['before'] = summary(d, time.process_time() - t)
    t = time.process_time()
    try:
        run = ftlab.fit(base, tok, data, r, progress=False, **SETTINGS)
    except ValueError as e:
        return row | dict(refused=str(e)[:300])
    row['fit_seconds'] = round(time.process_time() - t, 2)
    t = time.process_time()
    d = doctor(run)
    row['after'] = summary(d, time.process_time() - t)
    row['confirmed'] = [f.name for f in d if f.name == 'old-skills-lost' and really_lost(run, f)]
    return row

def kept(path:Path, todo:list[tuple[str, str, str]]) -> list[dict]:
    """The rows of the table at `path` that are in the plan,
    if it asked as many checks as a run of ours has now; else none"""
    table = json.loads(path.read_text()) if path.exists() else dict(checks=0)
    if table['checks'] != ASKED:
        return []
    return [x for x in table['table'] if (x['recipe'], x['skill'], x['model']) in todo]

def with_all_rows() -> dict:
    "The doctor before and after one run on all rows of a skill"
    base, tok = ftlab.load('lab-s')
    data = ftlab.data('new-procedure')
    t = time.process_time()
    d = doctor(base, tok, data, methods.lora(), steps=250)
    found = dict(train_rows=len(data.train), before=summary(d, time.process_time() - t))
    run = ftlab.fit(base, tok, data, methods.lora(), steps=40, lr=1e-3, progress=False)
    t = time.process_time()
    found['after'] = summary(doctor(run), time.process_time() - t)
    return found

def result_of(rows:list[dict], full:dict) -> dict:
    "What is written down: the counts, and the rows"
    lab = [x for x in rows if x['model'] == 'lab-s' and 'after' in x]
    most = {w: max((x[w]['seconds'] for x in lab), default=None) for w in ('before', 'after')}
    found = sum(len(x.get(w, {}).get('findings', [])) for x in rows for w in ('before', 'after'))
    sure = sum(len(x.get('confirmed', [])) for x in rows)
    return dict(runs=len(rows), recipes=len({x['recipe'] for x in rows}),
                skills=len({x['skill'] for x in rows}), models=sorted({x['model'] for x in rows}),
                checks=ASKED, settings=SETTINGS, findings=found, confirmed=sure,
                false_alarms=found - sure, refused=sum('refused' in x for x in rows),
                most_seconds_on_lab_s=most, on_lab_s_with_all_rows=full,
                note='seconds are of one core (process time)', table=rows)

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--only', default='')
    p.add_argument('--missing', action='store_true')
    p.add_argument('--out', default=str(ROOT/'bench'/'results'/'doctor_sweep.json'))
    a = p.parse_args()
    torch.set_num_threads(1)
    todo = [r for r in plan() if a.only in ' '.join(r)]
    rows = kept(Path(a.out), todo) if a.missing else []
    for r in [r for r in todo if r not in {(x['recipe'], x['skill'], x['model']) for x in rows}]:
        rows.append(one(*r))
        x = rows[-1]
        print(' x '.join(r), *(f'{w} {x[w]["seconds"]:.1f}s {x[w]["findings"] or "silent"}'
                               for w in ('before', 'after') if w in x), x.get('confirmed') or '',
              x.get('refused', ''), flush=True)
    result = result_of(rows, with_all_rows())
    print(json.dumps({k: v for k, v in result.items() if k != 'table'}, indent=1))
    if not a.only:
        Path(a.out).write_text(json.dumps(result, indent=1) + '\n')

if __name__ == '__main__':
    main()
