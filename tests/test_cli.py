"The command line: what it prints, what it leaves behind, and what it says when something is wrong"
import ast, json, os, re, subprocess, sys
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig,
                          BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast)
import ftlab
from ftlab.adapters.merging.lines import by_depth, merge_lines
from ftlab.adapters.edit import merge, saved_changes
from ftlab.adapters.merging.breadcrumbs import merge_breadcrumbs
from ftlab.adapters.yardsticks import merges
from ftlab.cli import main
from ftlab.commands.given import listed
from ftlab.commands.merge import merge_rules, merged_change

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder with a tiny language model, a tiny encoder and data for each"
    d = tmp_path_factory.mktemp('cli')
    torch.manual_seed(0)
    t = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(
                              ['<pad>', '<eos>', '<unk>', 'plus', 'is', *map(str, range(40))])},
                         unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=t, pad_token='<pad>', eos_token='<eos>',
                                  unk_token='<unk>')
    sizes = dict(vocab_size=len(tok), hidden_size=32, intermediate_size=80, num_hidden_layers=2,
                 num_attention_heads=4)
    for name, m in dict(
            lm=LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2,
                                            tie_word_embeddings=True, pad_token_id=0,
                                            eos_token_id=1)),
            enc=BertModel(BertConfig(**sizes, max_position_embeddings=64, pad_token_id=0))).items():
        m.save_pretrained(d/name)
        tok.save_pretrained(d/name)
    lines = lambda rows: ''.join(json.dumps(r) + '\n' for r in rows)
    (d/'sums.jsonl').write_text(lines([dict(prompt=f'{i} plus {j} is', response=str(i + j))
                                       for i in range(20) for j in range(20)]))
    (d/'big.jsonl').write_text(
        lines([dict(text=f'{i} plus {j}', label='big' if i + j > 20 else 'small') for i in range(20)
               for j in range(20)]))
    (d/'chosen.jsonl').write_text(
        lines([dict(prompt=f'{i} is', response=str(i), choices=[str(i), str(i + 1)])
               for i in range(30)]))
    (d/'broken.jsonl').write_text('{"prompt": "1", "response": "1"}\n{"prompt": "2", "resp\n')
    (d/'empty.jsonl').write_text('')
    (d/'asked.jsonl').write_text(
        lines([dict(question=f'{i} is', answer=str(i)) for i in range(40)]))
    (d/'odd.jsonl').write_text(
        lines([dict(text=f'{i}', label='odd' if i % 2 else 'even') for i in range(40)]))
    (d/'two.jsonl').write_text(lines([dict(prompt=x, response=x) for x in '12']))
    for name in ('pickled', 'adapter', 'badrun'):
        (d/name).mkdir()
    (d/'pickled/config.json').write_text((d/'lm/config.json').read_text())
    (d/'pickled/pytorch_model.bin').write_bytes(b'')
    (d/'adapter/adapter_config.json').write_text('{}')
    (d/'badrun/delta.safetensors').write_bytes(b'')
    (d/'badrun/run.json').write_text('{')
    return d

@pytest.fixture
def call(made, tmp_path, monkeypatch, capfd):
    """call(line) -> (exit code, standard output, standard error);
    {d} is the folder of models and data"""
    monkeypatch.chdir(tmp_path)
    def run(line):
        try:
            code = main([x.format(d=made) for x in line.split()])
        except SystemExit as e:
            code = e.code
        out, err = capfd.readouterr()
        return code, out, err
    return run

FAST = '--steps 4 --batch-size 4 --items 10'
LM = '--model {d}/lm --data {d}/sums.jsonl ' + FAST

def test_compare_prints_one_json_object_and_keeps_the_page(call, tmp_path):
    code, out, err = call(f'compare {LM} --methods full,lora(r=2,alpha=4) --seeds 1 --no-tune --out here --json')
    r = json.loads(out)
    assert code == 0 and [m['name'] for m in r['methods']] == ['full', 'lora(r=2,alpha=4)'] and 'full at' in err
    assert (json.loads((tmp_path/'here/result.json').read_text()) == r
            and (tmp_path/'here/index.html').exists() and (tmp_path/'here/tradeoff.png').exists())
    code, out, err = call(f'compare {LM} --methods full,lora(r=2,alpha=4) --seeds 1 --no-tune --out here')
    assert code == 0 and 'index.html' in out and 'gain' in out

def test_old_takes_several_sets_by_name(call, made, tmp_path):
    code, out, err = call(f'compare {LM} --methods full --seeds 1 --no-tune --old-items 6 --json '
                          '--old mine={d}/sums.jsonl,chosen={d}/chosen.jsonl --out here')
    r = json.loads(out)
    assert code == 0 and r['protocol']['old'] == ['mine', 'chosen'], err
    assert call(f'fit {LM} --out run')[0] == 0
    code, out, err = call('report run --items 5 --old-items 6 --matrices 0 --json '
                          '--old mine={d}/sums.jsonl,chosen={d}/chosen.jsonl')
    assert [(s['name'], s['metric'], s['n']) for s in json.loads(out)['sets'][1:]] == [
        ('mine', 'nll', 6), ('chosen', 'choice', 6)]
    # a path may have commas and = in its name
    odd = tmp_path/'a=1,b=2.jsonl'
    odd.write_text((made/'sums.jsonl').read_text())
    code, out, err = call(f'report run --items 5 --old-items 6 --matrices 0 --json --old {odd.name}')
    assert code == 0 and [s['n'] for s in json.loads(out)['sets']] == [5, 6], err

def test_tuning_takes_the_rates_given(call):
    r = json.loads(
        call(f'compare {LM} --methods full --seeds 1 --lrs 1e-3,3e-3 --out here --json')[1])
    assert ([x for x, _ in r['tuning']['methods']['full']['tried']][:1]
            and {1e-3, 3e-3} <= {x for x, _ in r['tuning']['methods']['full']['tried']})

def test_fit_then_merge_gives_the_model_that_was_exported(call, tmp_path):
    code, out, err = call(f'fit {LM} --method lora(r=2) --lr 1e-2 --out run --export merged --json')
    r = json.loads(out)
    assert (code == 0 and r['recipe']['name'] == 'lora(r=2)' and r['after'] != r['before']
            and r['saved_bytes'] == (tmp_path/'run/delta.safetensors').stat().st_size)
    assert (len((tmp_path/'run/log.jsonl').read_text().splitlines()) == 4
            and json.loads((tmp_path/'run/run.json').read_text())['data'].endswith('sums.jsonl'))
    assert call('merge --delta run/delta.safetensors --out again')[0] == 0 # run.json beside it knows the base
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path/f).state_dict() for f in ('merged', 'again'))
    assert all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()

def test_labels_survive_the_merge(call, tmp_path):
    assert (call(f'fit --model {{d}}/enc --data {{d}}/big.jsonl {FAST} --seed 3 --out run --export merged')[0]
            == 0 and call('merge --delta run/delta.safetensors --out again')[0] == 0)
    a, b = (AutoModelForSequenceClassification.from_pretrained(tmp_path/f) for f in ('merged', 'again'))
    assert (all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
            and set(b.config.id2label.values()) == {'big', 'small'})

def test_a_run_is_resumed(call, tmp_path):
    ask = 'fit --model {d}/lm --data {d}/sums.jsonl --steps 6 --batch-size 4 --items 10 --save-every 3 --out run'
    assert call(ask)[0] == 0
    whole = load_file(tmp_path/'run/delta.safetensors')
    (tmp_path/'run/delta.safetensors').unlink()
    assert call(ask + ' --resume')[0] == 0
    again = load_file(tmp_path/'run/delta.safetensors')
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)
    code, out, err = call(ask.replace('4 --items', '8 --items') + ' --resume')
    assert code == 1 and '--batch-size 4, this one has 8' in err

def test_columns_and_eval(call):
    code, out, err = call('fit --model {d}/lm --data {d}/asked.jsonl --eval {d}/asked.jsonl '
                          f'--columns prompt=question,response=answer {FAST} --out run --json')
    assert code == 0 and json.loads(out)['metric'] == 'nll'
    assert 'write ours=theirs' in call(
        f'fit --model {{d}}/lm --data {{d}}/asked.jsonl --columns question {FAST} --out run')[2]

def test_dry_run_says_what_it_takes_and_leaves_nothing(call, tmp_path):
    code, out, err = call(f'compare {LM} --methods full,lora(r=2) --seeds 3 --dry-run --json')
    e = json.loads(out)
    full, lora = e['methods']
    n = ftlab.load(json.loads(out)['model'])[0].num_parameters()
    assert (code == 0 and full['trainable'] == n
            and full['memory']['weights'] == full['memory']['gradients'] == 4*n
            and full['bytes'] == sum(full['memory'].values()) > lora['bytes'] > 4*n)
    # at most: two points on three test seeds; four rates, three further, two between,
    # three again and two more
    assert ((full['cells'], full['tuning']) == (6, 14) and e['seconds'] > 0 and e['fits']
            and not list(tmp_path.iterdir()))
    assert abs(full['tokens'] - 20*4*full['tokens_per_step']) <= 1
    thin = json.loads(call(f'compare {LM} --methods full,lora(r=2) --seeds 3 --max-runs 20 --dry-run --json')[1])
    assert sum(m['cells'] + m['tuning'] for m in thin['methods']) <= 20
    assert 'parameters trained' in call(f'fit {LM} --method lora(r=2) --dry-run')[1]

class Holds:
    "Notes the bytes of the gradients"

    def after_backward(self, state):
        self.bytes = sum(p.grad.numel()*p.grad.element_size()
                         for p in state.attached.parameters().values())

@pytest.mark.parametrize('method', ['full', 'lora(r=2)', 'hft', 'dft'])
@pytest.mark.parametrize('model,rows', [('lm', 'sums'), ('enc', 'big')])
def test_weights_gradients_and_averages_are_exact(call, made, tmp_path, method, model, rows):
    """What is planned from the config is what a run holds: its parameters, its gradients,
    and what AdamW puts into a checkpoint"""
    m = json.loads(call(f'fit --model {{d}}/{model} --data {{d}}/{rows}.jsonl {FAST} --method '
                        f'{method} --dry-run --json')[1])['methods'][0]
    planned = m['memory']
    data = ftlab.data(made/f'{rows}.jsonl')
    net, tok = ftlab.load(made/model, labels=data.labels)
    weights = sum(p.numel()*p.element_size() for p in net.parameters())
    held = Holds()
    run = ftlab.fit(net, tok, data, ftlab.methods.get(method), steps=1, batch_size=4,
                    out=tmp_path/'run', save_every=1, callbacks=(held,), progress=False)
    state = sum(v.numel()*v.element_size()
                for k, v in load_file(tmp_path/'run/checkpoint.safetensors').items()
                if k.startswith('step|'))
    assert ((planned['weights'], planned['gradients'], planned['optimizer'])
            == (weights, held.bytes, state)
            and m['trainable'] == run.cost['trainable'] + run.cost['head'])
    assert bool(planned['delta']) == ('lora' in method) and planned['activations'] > 0

def test_activations_are_what_a_real_pass_keeps(made):
    "Fake tensors keep what real ones keep, to the byte"
    from torch._subclasses.fake_tensor import FakeTensorMode
    from ftlab.commands.memory import kept_bytes
    from ftlab.core.loading import skeleton
    ids = torch.ones(3, 11, dtype=torch.long)
    real = kept_bytes(ftlab.load(made/'lm')[0].train(), dict(input_ids=ids), ids)
    with FakeTensorMode():
        ids = torch.ones(3, 11, dtype=torch.long)
        assert kept_bytes(skeleton(made/'lm', device='cpu')[0].train(), dict(input_ids=ids),
                          ids) == real > 0

PEAK = """
import torch, ftlab, json, sys
model, tok = ftlab.load('lab-s'); data = ftlab.data('new-procedure', n=400); torch.randn(64, 64) @ torch.randn(64, 64)
run = ftlab.fit(model, tok, data, ftlab.methods.get(sys.argv[1]), steps=3, batch_size=192, progress=False)
print(run.cost['peak_bytes'])
"""

@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='peak memory is read from /proc')
@pytest.mark.parametrize('method,mapped,factor', [('full', True, 1.5), ('lora', False, 3)])
def test_the_peak_is_as_near_to_the_plan_as_the_page_says(method, mapped, factor):
    """mapped: the C library gives every large tensor back to the system when it is freed,
    so that the process is as large as its tensors"""
    from ftlab.cli import parser
    from ftlab.commands.memory import PARTS, planned
    data = ftlab.data('new-procedure', n=400)
    m = planned(
        parser().parse_args(f'fit --model lab-s --data new-procedure --batch-size 192 --method {method}'.split()),
        ftlab.methods.get(method), data)['memory']
    env = (os.environ | dict(PYTHONPATH=str(Path(__file__).parent.parent), OMP_NUM_THREADS='1')
           | (dict(MALLOC_MMAP_THRESHOLD_='65536') if mapped else {}))
    run = subprocess.run([sys.executable, '-c', PEAK, method], capture_output=True, text=True,
                         env=env)
    assert run.returncode == 0, run.stderr
    # the model is loaded before the peak is taken
    peak, plan = int(run.stdout.split()[-1]), sum(m[k] for k in PARTS) - m['weights']
    assert plan/factor < peak < factor*plan, (peak, plan)

@pytest.fixture(scope='module')
def giant(made, tmp_path_factory):
    """A folder with the config of a model of 70 billion numbers and a weight file that nobody
    should open"""
    d = tmp_path_factory.mktemp('giant')
    tok = PreTrainedTokenizerFast.from_pretrained(made/'lm')
    tok.save_pretrained(d)
    LlamaConfig(vocab_size=128256, hidden_size=16384, intermediate_size=57344, num_hidden_layers=20,
                num_attention_heads=128, num_key_value_heads=8, dtype='bfloat16',
                architectures=['LlamaForCausalLM']).save_pretrained(d)
    write_hollow(d/'model.safetensors')
    return d

def write_hollow(path):
    """A whole safetensors file of half a gigabyte that takes no room on the disk: a header,
    and a hole"""
    size = 2*8192*1024
    head = {f'w{i}': dict(dtype='BF16', shape=[8192, 1024], data_offsets=[i*size, (i + 1)*size])
            for i in range(30)}
    text = json.dumps(head).encode()
    with open(path, 'wb') as f:
        f.write(len(text).to_bytes(8, 'little') + text)
        f.truncate(8 + len(text) + 30*size)

def test_what_is_too_large_says_so_and_is_not_opened(call, giant, tmp_path):
    code, out, err = call(f'compare --methods full,lora --model {giant} --data {{d}}/sums.jsonl '
                          f'{FAST} --dry-run --json')
    e = json.loads(out)
    m, lora = e['methods']
    assert (code == 1 and e['fits'] is False and e['seconds'] is None
            and 70e9 < m['trainable'] < 75e9 and m['memory']['weights'] == 2*m['trainable']
            and m['memory']['optimizer'] > 2*m['memory']['weights'])
    assert (lora['memory']['weights'] == m['memory']['weights']
            and 0 < lora['memory']['optimizer'] < m['memory']['optimizer']/50
            and 0 < lora['trainable'] < m['trainable']/50
            and not list(tmp_path.iterdir()))
    code, out, err = call(f'fit --model {giant} --data {{d}}/sums.jsonl {FAST} --dry-run')
    assert code == 1 and 'it does not fit' in out

def test_a_limit_on_memory_counts(call, monkeypatch):
    monkeypatch.setattr('ftlab.commands.memory.available', lambda device='cpu': 1000)
    monkeypatch.setattr(ftlab, 'load', lambda *a, **kw: pytest.fail('the weights were read'),
                        raising=False)
    code, out, err = call(f'compare {LM} --methods full,lift --dry-run --json'
                          if 'lift' in ftlab.methods.names() else f'compare {LM} --methods full --dry-run --json')
    assert code == 1 and json.loads(out)['fits'] is False
    monkeypatch.setattr('ftlab.commands.memory.available', lambda device='cpu': None)
    monkeypatch.undo()
    assert 'cuda:99' in call(f'compare {LM} --methods full --device cuda:99 --dry-run')[2]

def test_a_paper_is_found_by_its_key_its_number_and_its_title(call):
    for words in ('lt_sft', '2110.07560', 'composable'):
        code, out, err = call(f'papers {words}')
        assert code == 0 and out.startswith('lt_sft ') and out.count('\n') == 2, out
        assert 'nbs/adapters/subsets/lt_sft.ipynb, ftlab.adapters.subsets.lt_sft.lt_sft' in out

def test_methods_and_skills(call):
    code, out, err = call('methods --json')
    assert code == 0 and {'full', 'hft', 'lora', 'dft', 'grpo', 'eft'} <= set(json.loads(out))
    about = [m['about'] for m in json.loads(out).values()] # whole lines, about the method
    assert not [a for a in about if a[-1:] in ('', ':', ';', ',') or 'Raises' in a]
    assert ' at 0x' not in out and "reward: 'Callable' = judge" in json.loads(out)['grpo']['arguments']
    code, out, err = call('skills --model {d}/lm')
    assert code == 1 and 'does not speak the words of the lab' in err

def test_the_package_runs_as_the_command():
    told = subprocess.run([sys.executable, '-m', 'ftlab', '--help'], capture_output=True, text=True)
    assert told.returncode == 0 and told.stdout.startswith('usage: ftlab [-h] COMMAND')

def test_without_docstrings_the_package_is_there():
    code = 'import ftlab; assert ftlab.fit.__doc__ is None'
    subprocess.run([sys.executable, '-OO', '-c', code], check=True)

def test_help_and_tab_tell_what_a_newcomer_needs():
    "The comments beside the parameters, as the site's tables have them; no module that ftlab only uses"
    import inspect
    from fastcore.docments import docments
    for f in filter(inspect.isfunction, (getattr(ftlab, name) for name in ftlab.__all__)):
        told = dict(line.strip().split(': ', 1)
                    for line in inspect.getdoc(f).partition('Parameters:\n')[2].splitlines())
        said = {k: v for k, v in docments(f).items() if v and k != 'return'}
        beside = {k for k in said if k not in told and said[k] in told.values()} # two on one line
        assert {k: told.get(k) for k in said if k not in beside} == {
            k: said[k] for k in said if k not in beside}, f.__name__
    assert set(dir(ftlab)) >= set(ftlab.__all__) and not {'os', 're', 'importlib'} & set(dir(ftlab))
    offered = set(dir(ftlab.methods))
    assert offered >= {'full', 'lora', 'get'} and 'lru_cache' not in offered

# ---- wrong input: one line, the right exit code, nothing on standard output, no traceback
WRONG = {
    'unknown method': (f'compare {LM} --methods full,lorra', 1, ['lorra', 'did you mean lora']),
    'arguments a method does not take': (f'compare {LM} --methods lora(rank=4)', 1, ['rank', 'lora takes']),
    'a rank that does not fit': (f'fit {LM} --method lora(r=99)', 1, ['rank 99 does not fit', 'between 1 and']),
    'missing file': ('fit --model {d}/lm --data {d}/sum.jsonl', 1, ['no file', "did you mean 'sums.jsonl'"]),
    'broken line': ('fit --model {d}/lm --data {d}/broken.jsonl', 1, ['broken.jsonl, line 2', 'not JSON']),
    'no rows': ('compare --model {d}/lm --data {d}/empty.jsonl --methods full', 1, ['empty.jsonl has no rows']),
    'missing column': ('fit --model {d}/lm --data {d}/asked.jsonl', 1,
                       ['--columns prompt=question,response=answer']),
    'unknown skill': ('fit --model {d}/lm --data new-langage', 1, ["did you mean 'new-language'"]),
    'unknown lab model': ('fit --model lab-x --data new-language', 1,
                          ['lab-x is neither a folder nor a lab model', 'lab-s']),
    'unknown folder': ('fit --model {d}/none --data {d}/sums.jsonl', 1, ['is neither a folder nor a lab model']),
    'labels all masked': (f'fit {LM} --max-length 3', 1, ['--max-length 3 leaves no label', 'every row fits whole']),
    'labels for a language model': (f'compare {LM} --methods full --metric accuracy', 1, ['accuracy needs labels']),
    'an absent GPU': (f'compare {LM} --methods full --device cuda:99', 1, ['cuda:99', 'cpu']),
    'a delta that is not there': ('merge --model {d}/lm --delta none.safetensors --out x', 1, ['no delta at']),
    'a delta without its base': ('merge --delta {d}/sums.jsonl --out x', 1, ['name the base with --model']),
    'no command': ('', 2, ['required']), 'unknown command': ('comp', 2, ['invalid choice']),
    'no data': ('fit --model lab-s', 2, ['--data']),
    'steps that are no number': (f'fit {LM} --steps many', 2,
                                 ["'many' must be a whole number above 0"]),
    'a rate that is not a number': (f'fit {LM} --lr abc', 2, ["'abc' must be a number above 0"]),
    'a paper that is not here': ('papers lt-sft', 1, ["no paper here has 'lt-sft'", "did you mean 'lt_sft'"]),
    'no seeds': (f'compare {LM} --methods full --seeds 0', 2, ['above 0']),
    # ---- what the library says about a parameter, as options of the shell
    'a column without a name of ours': ('fit --model {d}/lm --data {d}/asked.jsonl --columns prompt=question,answer', 1,
                                  ["--columns has 'answer'; write ours=theirs"]),
    'a column that is not there': ('fit --model {d}/lm --data {d}/asked.jsonl '
                                   '--columns prompt=questoin,response=answer',
                                   1, ["no column 'questoin', which --columns names as 'prompt'", 'question']),
    'a name of ours that is none': ('fit --model {d}/lm --data {d}/asked.jsonl --columns ask=question', 1,
                                    ['--columns renames to ask; write the names', 'right of it']),
    'columns of a lab skill': ('fit --model lab-s --data new-procedure --columns prompt=a', 1, ['is a lab skill']),
    'a device that is none': (f'fit {LM} --device gpu', 1, ["--device is 'gpu'; it must be 'cpu'"]),
    'a GPU that is not there': (f'fit {LM} --device cuda:99', 1,
                                   ["--device 'cuda:99' was asked for", 'use --device cpu']),
    'two rates without tuning': (f'compare {LM} --methods full --lrs 1e-3,1e-4 --no-tune', 1,
                                 ['give one rate, or --tune']),
    'a rate in a list that is none': (f'compare {LM} --methods full --lrs 1e-3,much', 2,
                                      ["argument --lrs: 'much' must be a number above 0"]),
    'a rate of nothing': (f'compare {LM} --methods full --lrs 0', 2, ["argument --lrs: '0' must be a number above 0"]),
    'no method': (f'compare {LM} --methods ,', 1, ['no method was named']),
    'a method twice': (f'compare {LM} --methods full,full', 1, ["'full' is named twice; name each once"]),
    'a method that cannot be read': (f'fit {LM} --method lora(', 1, ["cannot read 'lora(' as a method"]),
    'too many settings': (f'fit {LM} --method full(3)', 1,
                                   ['full was given too many settings; full takes no settings']),
    'a setting that is unknown': (f'fit {LM} --method lift(rank=3)', 1,
                                  ["lift has no setting 'rank'; lift takes r, filter_rank, by, every"]),
    'a number format': (f'fit {LM} --dtype float8', 2, ["argument --dtype: invalid choice: 'float8'"]),
    'a metric': (f'fit {LM} --metric bleu', 2, ["argument --metric: invalid choice: 'bleu'"]),
    'a seed': (f'fit {LM} --seed -1', 2,
                                   ["argument --seed: '-1' must be a whole number, 0 or more"]),
    'checkpoints': (f'fit {LM} --save-every x', 2, ["argument --save-every: 'x' must be a whole number, 0 or more"]),
    'packing of another source': (f'fit {LM} --packing --method r_tuning', 1,
                                  ['--packing packs the data as given', 'leave --packing out']),
    'packing of labels': ('fit --model {d}/enc --data {d}/big.jsonl --packing', 1, ['leave --packing out']),
    'groups that do not fit': (f'fit {LM} --method grpo(group=3)', 1, ['--batch-size is 4 and the group 3']),
    'a tracker': (f'fit {LM} --trackers nobody', 1, ["no tracker 'nobody' here; name one of"]),
    'pairs without a second answer': (f'fit {LM} --method dpo', 1, ['--columns response=chosen']),
    'old rows with other labels': (f'compare --model {{d}}/enc --data {{d}}/big.jsonl --old {{d}}/odd.jsonl {FAST} '
                                   '--methods full', 1, ['one head cannot answer both', 'leave out --old']),
    'an old set without a name': (f'compare {LM} --methods full --old sort,own=auto', 1,
                                  ["--old has 'sort' without a name or without a source; write "
                                   "several sets as NAME=SOURCE,NAME=SOURCE"]),
    'an old set without a source': (f'compare {LM} --methods full --old mine=', 1, ["--old has 'mine' without"]),
    'an old set twice': (f'compare {LM} --methods full --old a=sort,a=add', 1, ["--old names 'a' twice"]),
    'an old file that is not there': (f'compare {LM} --methods full --old mine=nowhere.jsonl', 1,
                                      ['there is no file nowhere.jsonl']),
    'an old set that is none': (f'compare {LM} --methods full --old mine=sortt', 1,
                                ["the old set 'mine': 'sortt' is neither", "did you mean 'sort'"]),
    'old rows that are none': (f'compare {LM} --methods full --old mine={{d}}/empty.jsonl', 1, ["the old set 'mine'"]),
    'a model that never answers the same twice': (f'compare {LM} --methods full --old auto', 1,
                                                  ['did the model give the same answer twice']),
    'auto for a classifier': ('compare --model {d}/enc --data {d}/big.jsonl --methods full --old auto', 1,
                              ['--old auto asks the model for answers']),
    'a task without a name': (f'compare {LM} --methods full --old lm_eval:', 1, ["'lm_eval:' names no task"]),
    'a task without its package': (f'compare {LM} --methods full --old arc=lm_eval:arc_easy', 1,
                                   ['needs the package lm_eval', 'pip install lm_eval==']),
    'all rows for testing': ('fit --model {d}/lm --data {d}/two.jsonl --eval {d}/none.jsonl', 1, ['there is no file']),
    'a report of nothing': ('report', 1, ['name the folder that ftlab fit wrote, or --model, --delta and --data']),
    'a report of a folder without a run': ('report {d}/lm', 1, ['no delta at']),
    'a report of no folder': ('report {d}/nowhere', 1, ['no folder', '--out']),
    'a doctor without data': ('doctor --model lab-s', 1, ['--model and --data']),
    'a doctor with an export and no run': ('doctor --model lab-s --data sort --exported x', 1,
                                           ['--exported is compared with a finished run']),
    'skills of a model of another world': ('skills --model {d}/lm', 1, ['does not speak the words of the lab world']),
    'a skill that is none': ('skills --model lab-s --names sorting', 1, ["no skill is called 'sorting'", 'sort']),
    'a claim that is none': ('claims explain nothing', 1, ["no claim is called 'nothing'"]),
    'a claim with no name': ('claims explain', 1, ['ftlab claims explain hft']),
    'a reason that is missing': ('claims supersede hft', 1, ['--because']),
    'a model with pickled weights': ('fit --model {d}/pickled --data {d}/sums.jsonl', 1,
                                   ['python -c "from transformers']),
    'an adapter': ('fit --model {d}/adapter --data {d}/sums.jsonl', 1,
                   ['is of kind unknown, and only LORA can be folded']),
    'a base that cannot be read': ('merge {d}/badrun --out x', 1, ['badrun/run.json cannot be read as JSON']),
    'a page that is not there': ('lab nbs/nope.ipynb', 1, ["no page 'nbs/nope.ipynb'"])}

# Python, where the shell has words of its own
PYTHON = re.compile(r"\w=(?:\{|True|False|None|'|\")|\bftlab\.[\w.]+\(|Error\b|Traceback|\bNone\b"
                    r"|\b(?:old|columns|validation|test|kind|max_length|batch_size|save_every|old_items)=")

@pytest.mark.parametrize('name', WRONG)
def test_errors_are_one_line(call, name):
    line, want, words = WRONG[name]
    code, out, err = call(line)
    last = err.strip().splitlines()
    assert (code == want and out == '' and len(last) == 1 and last[0].startswith('ftlab: ')
            and all(w in last[0] for w in words)), err
    assert not PYTHON.search(last[0]), last[0]

def test_a_loss_has_one_sign(call):
    code, out, err = call(f'fit {LM} --out run')
    before, after = re.search(r'; nll on test rows (\S+) -> (\S+)', out).groups()
    r = json.loads(Path('run/run.json').read_text())
    assert float(before) > 0 < float(after) and abs(r['before'] - float(before)) < 1e-3
    assert f'nll {before[:2]}' in out.split(';')[0] and r['after'] > 0

# Errors and advice in the library that no command can print
NOT_IN_THE_SHELL = (
    'this sample cannot encode other rows',  # what a program made
    'use_cayley_neumann=False',           # what peft was asked for
    "use adjust='match_rms_adamw'",       # within a method's text, as the shell takes it
    'run.delta.attached.fold()',          # a model that was changed by hand
    'mask', 'model.eval()', 'requires_grad=False',  # models and recipes made in Python
    'Run', 'df.to_dict', 'side_by_side', 'a Recipe, such as', 'a name; load it first',
    'fit takes a loaded model', 'shard=True', 'state.emit', 'add_special_tokens=False',
    'len("house")',                       # expressions that a model is asked
    'args.to_dict()', 'model.merge_and_unload()', 'model.enable_input_require_grads()',
    'trainer.train(',                     # what the doctor says about a program that is not ours
    'data = ftlab.data(', 'model, tok = ftlab.load(X', 'model = AutoPeftModel',
    'run = ftlab.fit(',                   # code in a model card
    'call run.model(**batch)',            # pictures, which come from Python alone
    'leave executor or keep out', 'it must be a tokenizer',
    'ftlab.lab.',                         # parts of an error that PHRASES replaces as a whole
    'add them to this one when you load it', 'pack this one when you load it',  # what a program does before it calls
    'rows = [dict(messages=', 'call ray.shutdown()',
    'python -c')                          # a line for the shell

def strings(source):
    "Every text with a blank in it that is no docstring, an f-string with X for what it inserts"
    tree = ast.parse(source)
    joined = [n for n in ast.walk(tree) if isinstance(n, ast.JoinedStr)]
    skip = {id(v) for n in joined for v in ast.walk(n) if v is not n}
    skip |= {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for n in ast.walk(tree):
        if isinstance(n, (ast.Constant, ast.JoinedStr)) and id(n) not in skip:
            parts = n.values if isinstance(n, ast.JoinedStr) else [n]
            text = ''.join(str(v.value) if isinstance(v, ast.Constant) else 'X' for v in parts)
            if ' ' in text.strip() and not re.search(r'<\w+[ >]|="', text):
                yield text

@pytest.mark.parametrize('text, said', [
    ("no file lr=0.1/steps=9/b.json; give data=", "no file lr=0.1/steps=9/b.json; give --data"),
    ('no file steps=3.csv', 'no file steps=3.csv'),                           # it was typed
    ("'steps=3.csv' is no file; use lr=1", "'steps=3.csv' is no file; use --lr 1"),
    ('a.csv has the columns batch_size, lr, but no prompt', 'a.csv has the columns batch_size, lr, but no prompt'),
    ('line 1 has no column X; it has max_length, lr', 'line 1 has no column X; it has max_length, lr'),
    ("say columns={'prompt': 'my {q}', 'response': 'a'}", "say --columns 'prompt=my {q},response=a'"),
    ("use data='my file.jsonl'", "use --data 'my file.jsonl'"),
    ('the answer is steps=(3,4)', 'the answer is steps=(3,4)'),
    ('read https://x.org/?lr=3&steps=4', 'read https://x.org/?lr=3&steps=4'),
    ('use device=None', 'leave --device out'),
    ('folder is empty; use run=x', 'folder is empty; use run=x'),             # neither is an option
    ('see /x/ftlab.report/y, my-ftlab.fit.txt; ftlab.fit.', 'see /x/ftlab.report/y, my-ftlab.fit.txt; ftlab fit.'),
    ("convert them once: AutoModelForCausalLM.from_pretrained('a(1)').save_pretrained('a(1)')",
     "convert them once: python -c \"from transformers import AutoModelForCausalLM as M; "
     "M.from_pretrained('a(1)').save_pretrained('a(1)')\"")])
def test_the_users_own_words_are_not_translated(text, said):
    from ftlab.cli import _options, parser
    from ftlab.commands.words import spoken
    a = parser().parse_args('fit --model m --data steps=3.csv'.split())
    assert spoken(ValueError(text), _options(a)) == said

def test_a_positional_argument_is_no_option():
    from ftlab.cli import _options, parser
    assert not {'folder', 'run', 'command'} & {*_options(parser().parse_args(['report', 'x']))}
    assert 'names' in _options(parser().parse_args(['skills']))
    assert 'names' not in _options(parser().parse_args(['claims']))

def test_an_empty_text_means_the_default():
    """--out "$UNSET" must not write into the folder that the user is in"""
    from ftlab.cli import parser
    for line, out in (('fit', 'ftlab-runs/fit'), ('compare --methods full', 'ftlab-runs/compare')):
        a = parser().parse_args([*line.split(), '--model', 'm', '--data', 'd', '--out', ''])
        assert a.out == out
    rates = parser().parse_args([*'compare --methods full --model m --data d --lrs'.split(), ''])
    assert rates.lrs is None

def test_whatever_the_library_says_can_be_said_in_the_shell():
    """A new error that speaks Python fails here: word it for both, or add it to PHRASES"""
    from ftlab.cli import parser
    from ftlab.commands.words import in_shell_words
    commands = [parser().parse_args(x.split()) for x in (
        'fit --model m --data d', 'compare --model m --data d --methods full', 'report', 'doctor',
        'winner c --out w', 'export run --out new', 'push new me/new')]
    names = {n for a in commands for n in vars(a)}
    python = re.compile(r"(?<![\w('\"])[a-z]\w*=(?:True|False|None|\{|'|\"|[\s,;)])|ftlab\.\w+[\w.]*\(|\.\w+\([^)]*\)")
    library = Path(ftlab.__file__).parent
    parts = ('core', 'adapters', 'trainers', 'evaluators', 'instruments', 'lab', 'methods.py')
    found = [(p.name, text) for p in sorted(library.rglob('*.py'))
             if p.relative_to(library).parts[0] in parts for text in strings(p.read_text())]
    assert len(found) > 500
    wrong = [(n, said) for n, text in found if python.search(said := in_shell_words(text, names))
             and not any(o in said for o in NOT_IN_THE_SHELL)]
    assert not wrong, wrong

def test_a_delta_for_another_base(call, made, tmp_path):
    assert call(f'fit {LM} --out run')[0] == 0
    model, tok = ftlab.load(made/'lm')
    model.model.embed_tokens.weight.data += 1
    model.save_pretrained(tmp_path/'other')
    tok.save_pretrained(tmp_path/'other')
    code, out, err = call('merge --model other --delta run/delta.safetensors --out x')
    assert (code == 1 and 'another base' in err and 'embed_tokens' in err
            and not (tmp_path/'x').exists())

# ---- several changes, one model

@pytest.fixture(scope='module')
def tuned(made, tmp_path_factory):
    """Folders that ftlab fit wrote: `a` and `b` of one base,
    `x` and `y` classifiers whose heads begin at different seeds; and another base"""
    d = tmp_path_factory.mktemp('tuned')
    sums, big = f'--model {made}/lm --data {made}/sums.jsonl', f'--model {made}/enc --data {made}/big.jsonl'
    for name, ask in dict(a=sums, b=f'{sums} --method lora(r=2)', x=big,
                          y=f'{big} --seed 1').items():
        assert main(f'fit {ask} {FAST} --lr 1e-2 --out {d}/{name}'.split()) == 0
    model, tok = ftlab.load(made/'lm')
    model.model.embed_tokens.weight.data += 1
    model.save_pretrained(d/'other')
    tok.save_pretrained(d/'other')
    return d

def base_and_changes(made, tuned):
    model, _ = ftlab.load(made/'lm')
    return model, saved_changes(model, tuned/'a/delta.safetensors', tuned/'b/delta.safetensors')

def holds_base_plus(folder, model, change):
    "Is the folder's model the base plus this change, number by number, and not the base?"
    got = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    base = dict(model.named_parameters())
    assert got.keys() == base.keys()
    for n in got:
        assert torch.equal(got[n], base[n] + change[n] if n in change else base[n]), n
    assert any(not torch.equal(got[n], base[n]) for n in got)

BY_HAND = {'task_arithmetic': lambda cs, model, x: merge(cs, x),
           'breadcrumbs': lambda cs, model, x: merge_breadcrumbs(cs, x),
           'lines': lambda cs, model, x: merge_lines(cs, model, x),
           'linear': lambda cs, model, x: merges.linear(cs, dial=x),
           'slerp': lambda cs, model, x: merges.slerp(cs, model, x),
           'ties': lambda cs, model, x: merges.ties(cs, dial=x),
           'dare': lambda cs, model, x: merges.dare(cs, dial=x)}

@pytest.mark.parametrize('scale', [None, .3])
@pytest.mark.parametrize('rule', merge_rules())
def test_a_merge_of_several_is_that_of_the_python_call(call, made, tuned, tmp_path, rule, scale):
    code, out, err = call(f'merge {tuned}/a {tuned}/b/delta.safetensors --rule {rule}'
                          + (f' --scale {scale}' if scale else '') + ' --out merged --json')
    r = json.loads(out)
    x = scale or {'breadcrumbs': .2, 'lines': .5, 'slerp': .5}.get(rule, 1.)
    model, changes = base_and_changes(made, tuned)
    assert code == 0 and (r['rule'], r['scale'], len(r['deltas'])) == (rule, x, 2)
    holds_base_plus(tmp_path/'merged', model, BY_HAND[rule](changes, model, x))

def test_without_a_rule_several_changes_are_added_up(call, made, tuned, tmp_path):
    code, out, err = call(f'merge {tuned}/a --delta {tuned}/b --out merged')
    model, (a, b) = base_and_changes(made, tuned)
    assert code == 0 and out.splitlines() == ['2 changes by task_arithmetic, 1', 'merged']
    holds_base_plus(tmp_path/'merged', model, merge([b, a])) # the order of the two does not matter

def test_a_rule_works_on_one_change_too(call, made, tuned, tmp_path):
    model, (a, b) = base_and_changes(made, tuned)
    assert call(f'merge {tuned}/a --scale .5 --out half')[0] == 0
    holds_base_plus(tmp_path/'half', model, {n: .5*t for n, t in a.items()})
    assert call(f'merge {tuned}/a --rule lines --scale .25 --out sloped')[0] == 0
    holds_base_plus(tmp_path/'sloped', model, by_depth(.25, .75)(a, model))
    with pytest.raises(ValueError, match="is called 'sum'; there are breadcrumbs, lines, dare, linear"):
        merged_change([a, b], model, 'sum')

NO_MERGE = {
    'another base': ('{t}/a {t}/b --model {t}/other', 1, ['another base', 'tensors differ']),
    'an unknown rule': ('{t}/a {t}/b --rule sum', 2, ["invalid choice: 'sum'"]),
    'a folder that is not there': ('{t}/a {t}/c', 1, ['no delta at', 'c']),
    'a folder without a change': ('{t}/a {d}/lm', 1, ['no delta at', 'lm/delta.safetensors', 'ftlab fit']),
    'a scale that is not a number': ('{t}/a {t}/b --scale much', 2, ["'much'"]),
    'nothing to merge': ('', 1, ['name a saved change']),
    'two bases': ('{t}/a {t}/x', 1, ['not made from one base', 'model is']),
    'two heads': ('{t}/x {t}/y', 1, ['not made from one base: seed is 0 in', '1 in'])}

@pytest.mark.parametrize('name', NO_MERGE)
def test_what_cannot_be_merged_leaves_nothing(call, made, tuned, tmp_path, name):
    line, want, words = NO_MERGE[name]
    code, out, err = call('merge ' + line.format(t=tuned, d=made) + ' --out here')
    last = err.strip().splitlines()
    assert code == want and out == '' and len(last) == 1 and all(w in last[0] for w in words), err
    assert not list(tmp_path.iterdir())

def test_a_merge_never_writes_into_what_is_there(call, tuned, tmp_path):
    (tmp_path/'full').mkdir()
    (tmp_path/'full/mine').write_text('keep')
    (tmp_path/'file').write_text('keep')
    for out, why in (('full', 'is not empty; name a new folder'),
                     ('file', 'exists and is a file; name another path')):
        code, said, err = call(f'merge {tuned}/a {tuned}/b --out {out}')
        assert code == 1 and f"--out '{out}' {why}" in err
    assert (sorted(p.name for p in tmp_path.rglob('*')) == ['file', 'full', 'mine']
            and 'with --out' in call(f'merge {tuned}/a {tuned}/b')[2])

# ---- what fit can do and the line can say

def test_packing_gives_the_same_losses(call):
    ask = f'fit {LM} --method full --out run --json'
    packed, plain = (json.loads(call(ask + more)[1]) for more in (' --packing', ' --no-resume'))
    assert (packed['settings']['packing'] is True and plain['settings']['packing'] is False
            and packed['cost']['tokens'] == plain['cost']['tokens']
            and packed['after'] == pytest.approx(plain['after'], abs=1e-4))

def test_trackers_reach_fit(call, monkeypatch):
    code, out, err = call(f'fit {LM} --trackers nobody --out run')
    assert code == 1 and "there is no tracker 'nobody'" in err
    given = []
    monkeypatch.setattr(ftlab, 'fit',
                        lambda *a, trackers, **kw: given.extend(trackers)
                        or (_ for _ in ()).throw(ValueError('enough')),
                        raising=False)
    call(f'fit {LM} --trackers tensorboard,wandb --out run')
    call(f'fit {LM} --out run')
    assert given == ['tensorboard', 'wandb']

def test_data_without_test_rows_are_fitted_and_priced_by_their_kind(call, made):
    "A few rows of one's own, none of which falls among the test rows"
    (made/'few.jsonl').write_text(''.join(json.dumps(dict(prompt=f'{i} is', response=str(i))) + '\n' for i in range(3)))
    d = ftlab.data(made/'few.jsonl')
    code, out, err = call(f'fit --model {{d}}/lm --data {{d}}/few.jsonl {FAST} --out run --json')
    r = json.loads(out)
    assert code == 0 and r['metric'] == 'nll' and (d.test or r['before'] is r['after'] is None)

def test_debug_shows_where(call):
    with pytest.raises(KeyError):
        call(f'compare {LM} --methods lorra --debug')

def test_stopping_by_hand_is_not_success(call, monkeypatch):
    monkeypatch.setattr('ftlab.instruments.compare.fit',
                        lambda *a, **kw: (_ for _ in ()).throw(KeyboardInterrupt()))
    code, out, err = call(f'compare {LM} --methods full --seeds 1 --no-tune --out here')
    assert code == 130 and out == '' and 'finished is kept' in err

def test_an_existing_export_folder_is_refused_before_training(call, made, monkeypatch):
    monkeypatch.setattr(ftlab, 'fit', lambda *a, **kw: pytest.fail('trained first'), raising=False)
    code, out, err = call(f'fit {LM} --export {{d}}/enc')
    assert code == 1 and 'not empty' in err

def test_commas_inside_brackets_do_not_split():
    assert listed('full, lora(r=4,alpha=8),hft * dft') == ['full', 'lora(r=4,alpha=8)', 'hft * dft']

def test_the_command_runs_as_a_program(made, tmp_path):
    run = subprocess.run([sys.executable, '-c', 'import sys; from ftlab.cli import main; sys.exit(main())',
                          'fit', '--model', 'lab-x', '--data', 'new-facts'],
                         capture_output=True, text=True, cwd=tmp_path,
                         env=os.environ | dict(PYTHONPATH=str(Path(__file__).parent.parent)))
    assert (run.returncode == 1 and run.stdout == '' and run.stderr.startswith('ftlab: ')
            and 'Traceback' not in run.stderr)

def test_the_course_is_said_to_be_in_the_repository(call, monkeypatch, tmp_path):
    monkeypatch.setattr(ftlab, '__file__', str(tmp_path/'site-packages/ftlab/__init__.py'))
    code, out, err = call('lab')
    assert code == 1 and 'clone the repository' in err
