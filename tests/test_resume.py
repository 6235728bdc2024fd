"Runs that are cut off and go on: whose checkpoint it is, what is in it, what a killed process leaves, who may write"
import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
import ftlab.core.io as files
from ftlab.adapters.lowrank import LoRA
from ftlab.adapters.modules.lofit import lofit
from ftlab.adapters.modules.lora import lora
from ftlab.adapters.select import parts
from ftlab.adapters.subsets.lt_sft import lt_sft
from ftlab.core.io import (Busy, DiskFull, TemporaryFolder, check_room, leftovers, only_writer,
                           read_tensors, sweep, write_atomically, write_tensors, write_text)
from ftlab.core.recipe import Loop, Method, Recipe, Stages
from ftlab.core.state import State
from ftlab.instruments.bench import Budget
from ftlab.methods import get
from ftlab.trainers.callbacks import EarlyStop
from ftlab.trainers.checkpoint import cut_off, different, read_header
from ftlab.trainers.fit import fit
from ftlab.trainers.objective import nll
from ftlab.trainers.source import Rows
from test_fit import At, stop, tune
from toys import TOK, lab_data, logits, same, toy, weights

ROOT = Path(__file__).parent.parent
STEPS = dict(steps=6, lr=1e-2)

def python(code, *args, **more):
    "Start Python with this checkout and these tests on its path"
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT/'tests')]),
                            OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)

def alike(a, b):
    return (a.log == b.log and a.path == b.path and same(weights(a.model), weights(b.model))
            and a.cost['tokens'] == b.cost['tokens'])

# ---------- whose checkpoint is it?

OLDER = {'cut short': dict(callbacks=(Budget(150),)), 'lr': dict(lr=3e-2), 'seed': dict(seed=1)}

@pytest.mark.parametrize('other', OLDER.values(), ids=OLDER)
def test_a_stage_of_an_older_run_is_never_taken_and_never_in_the_way(other, tmp_path):
    whole = tune(lt_sft(), **STEPS)
    tune(lt_sft(), **STEPS | other, out=tmp_path, save_every=1)
    assert (tmp_path/'stage-0.safetensors').exists()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        part = tune(lt_sft(), **STEPS, out=tmp_path, save_every=1, resume=False,
                    callbacks=(At(2, stop),))
    assert part.interrupted and len(part.log) == 2
    again = tune(lt_sft(), **STEPS, out=tmp_path, save_every=1, resume=True)
    assert alike(again, whole) and torch.equal(logits(again.model), logits(whole.model))

def test_a_stage_that_something_unnamed_cut_short_is_not_mixed_with_a_whole_one(tmp_path):
    class Enough: # a callback of one's own, without `describe`
        def after_step(self, state):
            state.stop = state.step == 2 and state.settings['stage'] == 0
    how = dict(**STEPS, out=tmp_path, save_every=1)
    in_the_second = lambda s: stop(s) if s.settings['stage'] else None
    assert len(tune(lt_sft(), **how, callbacks=(Enough(), At(2, in_the_second))).log) == 4
    with pytest.raises(ValueError, match='or in one stage; it had Enough, At, this one has none'):
        tune(lt_sft(), **how, resume=True)
    assert alike(tune(lt_sft(), **how, resume=True, callbacks=(Enough(), At(9, stop))),
                 tune(lt_sft(), **STEPS, callbacks=(Enough(),)))

def test_what_stops_a_run_belongs_to_it(tmp_path):
    stops = (EarlyStop(n=1, patience=1, rows=10),)
    tune(**STEPS, out=tmp_path, save_every=1, callbacks=(*stops, At(3, stop)))
    for callbacks in ((), (EarlyStop(n=2, patience=1, rows=10),), (Budget(100),)):
        with pytest.raises(ValueError, match='callbacks='):
            tune(**STEPS, out=tmp_path, save_every=1, resume=True, callbacks=callbacks)
    whole = tune(**STEPS, callbacks=stops)
    assert alike(tune(**STEPS, out=tmp_path, save_every=1, resume=True, callbacks=stops), whole)

def test_a_run_that_an_unnamed_callback_ended_is_not_taken_for_another(tmp_path):
    class Enough:
        def after_step(self, state):
            state.stop = state.step == 3
    tune(**STEPS, out=tmp_path, save_every=1, callbacks=(Enough(),))
    assert cut_off(tmp_path/'checkpoint.safetensors') is None
    assert len(
        tune(**STEPS, out=tmp_path, save_every=1, resume=True, callbacks=(Enough(),)).log) == 3
    with pytest.raises(ValueError, match='ended early, as a whole or in one stage; it had Enough, this one has none'):
        tune(**STEPS, out=tmp_path, save_every=1, resume=True)

def test_arguments_of_a_method_and_tokens_of_the_data_belong_to_a_run(tmp_path):
    import copy
    tune(lora(r=2), **STEPS, out=tmp_path, save_every=1, callbacks=(At(3, stop),))
    with pytest.raises(ValueError, match='recipe='):
        tune(lora(r=3), **STEPS, out=tmp_path, save_every=1, resume=True)
    other = copy.deepcopy(TOK)
    other.model_max_length = 12
    with pytest.raises(ValueError, match='encoded=.*tokenizer or chat template'):
        fit(toy(), other, lab_data(), lora(r=2), **STEPS, batch_size=8, progress=False,
            out=tmp_path, save_every=1, resume=True)

STARTS = {'alone': lambda r: r, 'in a stage': lambda r: Recipe('own', loop=Stages(r)),
          'times stages': lambda r: get('spin')*r}

@pytest.mark.parametrize('within', STARTS.values(), ids=STARTS)
def test_a_run_of_another_start_is_not_taken_and_one_of_an_earlier_ftlab_goes_on(within, tmp_path):
    "`pissa` and `olora` under one name describe themselves alike"
    one, other = (within(get(n).named('own')) for n in ('pissa', 'olora'))
    assert one.describe() == other.describe()
    whole = tune(one, **STEPS)
    how = dict(**STEPS, out=tmp_path, save_every=1)
    tune(one, **how, callbacks=(At(3, stop),))
    with pytest.raises(ValueError, match="options=.*'start': 'pissa'.*'start': 'olora'"):
        tune(other, **how, resume=True)
    path = tmp_path/'checkpoint.safetensors'
    tensors, header = read_tensors(path)
    for k in ('whole', 'settings'): # as they were before the options were noted
        settings = json.loads(header[k])
        assert settings.pop('options')
        header[k] = json.dumps(settings)
    write_tensors(path, tensors, header)
    assert alike(tune(one, **how, resume=True), whole)

def test_options_are_noted_where_the_arguments_do_not_say_them_and_nothing_is_noted_as_such():
    assert tune(lora(r=2), **STEPS).settings['options'] == {}
    plain = Recipe('own', select=parts('q'), delta=partial(LoRA, r=2, alpha=2.))
    assert tune(plain, **STEPS).settings['options'] == {}, 'they are in the description'
    said, other = (tune(Recipe(Method('own', arguments=dict(r=2, alpha=2.)), select=parts('q'),
                               delta=partial(LoRA, r=2, alpha=alpha)), **STEPS).settings
                   for alpha in (2., 3.))
    assert said['options'] == {} and other['options'] == {'delta': {'alpha': 3.}}
    assert different(said, other) == different(other, said) == ['options']

def test_the_reason_is_known_before_the_stages_that_are_done_again(tmp_path):
    seen = []
    def second(ctx):
        seen.append(1)
        return Recipe('second')
    two = Recipe('two',
                 loop=Stages(Recipe('first', source=lambda state: Rows(state.rows, 8)), second))
    how = dict(out=tmp_path, save_every=1)
    tune(two, **STEPS, **how,
         callbacks=(At(2, lambda s: stop(s) if s.settings['stage'] else None),))
    seen.clear()
    with pytest.raises(ValueError, match='lr=0.01, this one has 0.02'):
        tune(two, steps=6, lr=2e-2, **how, resume=True)
    assert not seen

def test_other_versions_are_told(tmp_path, monkeypatch):
    tune(**STEPS, out=tmp_path, save_every=1, callbacks=(At(3, stop),))
    import ftlab.trainers.checkpoint as checkpoint
    real = checkpoint.versions()
    monkeypatch.setattr(checkpoint, 'versions', lambda: real | dict(torch='99.0'))
    with pytest.warns(UserWarning, match=r'with torch .* \(now 99.0\): the run goes on, but its results'):
        assert len(tune(**STEPS, out=tmp_path, save_every=1, resume=True).log) == 6

def damage(path, how):
    if how == 'cut':
        path.write_bytes(path.read_bytes()[:-100])
    if how == 'empty':
        path.write_bytes(b'')
    if how == 'words':
        path.write_text('these are words')
    if how == 'no run':
        save_file(dict(a=torch.zeros(2)), path)
    if how == 'older':
        tensors = load_file(path)
        with safe_open(path, 'pt') as f:
            meta = f.metadata()
        meta.pop('format')
        save_file(tensors, path, metadata=meta)

@pytest.mark.parametrize('how', ['cut', 'empty', 'words', 'no run', 'older'])
def test_a_damaged_checkpoint_is_named(how, tmp_path):
    tune(**STEPS, out=tmp_path, save_every=1, callbacks=(At(3, stop),))
    damage(tmp_path/'checkpoint.safetensors', how)
    m, was = toy(), weights(toy())
    says = {'no run': 'is not a checkpoint of a run',
            'older': 'written by an older ftlab'}.get(how, 'not a safetensors file, or is damaged')
    with pytest.raises(ValueError, match=f'checkpoint.safetensors.*{says}'):
        tune(model=m, **STEPS, out=tmp_path, save_every=1, resume=True)
    assert same(weights(m), was)
    with pytest.warns(UserWarning, match='replaces a checkpoint that cannot be used.*checkpoint.safetensors'):
        assert alike(tune(**STEPS, out=tmp_path, save_every=1), tune(**STEPS))

# ---------- what is in it

class Growing:
    "A source that remembers what it gave: every third step it repeats the first one"
    def __init__(self, state):
        self.rows, self.first, self.given = Rows(state.rows, 8), None, 0
    def next(self, state):
        self.given += 1
        batches = self.rows.next(state)
        self.first = self.first or batches
        return self.first if self.given % 3 == 0 else batches
    def state_dict(self):
        return dict(given=self.given, first=self.first)
    def load_state_dict(self, kept):
        self.given, self.first = kept['given'], kept['first']

class Running:
    "An objective with a running mean, and a callback that changes what it sees"
    def __init__(self):
        self.mean = torch.ones(())
    def __call__(self, state):
        loss = nll()(state)
        self.mean = .9*self.mean + .1*float(loss.detach())
        return loss*self.mean
    def state_dict(self):
        return dict(mean=self.mean)
    def load_state_dict(self, kept):
        self.mean = kept['mean']

class Slower:
    def __init__(self):
        self.history = []
    def after_backward(self, state):
        for p in state.attached.parameters().values():
            if p.grad is not None:
                p.grad *= 1/(1 + len(self.history))
        self.history.append([state.step, float(len(self.history)), None, 'x'])
    def state_dict(self):
        return dict(history=self.history, empty={}, nested=dict(a=[torch.arange(3), {1: True}]))
    def load_state_dict(self, kept):
        assert kept['empty'] == {} and kept['nested']['a'][1] == {1: True}
        assert torch.equal(kept['nested']['a'][0], torch.arange(3))
        self.history = kept['history']

def remembering(): # a fresh objective for every run
    return Recipe('remembering', source=Growing, objective=Running(),
                  loop=Loop(callbacks=(Slower,)))

@pytest.mark.parametrize('step', [1, 2, 3, 4, 5])
def test_whatever_has_a_state_dict_goes_on(step, tmp_path):
    whole = tune(remembering(), **STEPS)
    part = tune(remembering(), **STEPS, out=tmp_path, save_every=1, callbacks=(At(step, stop),))
    assert part.interrupted
    again = tune(remembering(), **STEPS, out=tmp_path, save_every=1, resume=True)
    assert alike(again, whole)

def test_parts_that_are_missing_are_named(tmp_path):
    tune(Recipe('same', source=Growing), **STEPS, out=tmp_path, save_every=1,
         callbacks=(At(3, stop),))
    # the settings cannot tell them apart
    forgetful = type('Growing', (), dict(__init__=Growing.__init__, next=Growing.next))
    with pytest.raises(ValueError, match="only the checkpoint has a state for 'source'"):
        tune(Recipe('same', source=forgetful), **STEPS, out=tmp_path, save_every=1, resume=True)

def test_what_a_file_cannot_hold_is_named_with_its_part(tmp_path):
    class Odd:
        def state_dict(self):
            return dict(when=object())
        def load_state_dict(self, kept):
            pass
    with pytest.raises(ValueError, match="the state_dict of callback 0 Odd holds a object; it may hold tensors"):
        tune(**STEPS, out=tmp_path, save_every=1, callbacks=(Odd(),))

def test_one_tensor_in_two_parts_is_kept_once(tmp_path):
    class Twin:
        def before_load(self, state):
            self.own = next(iter(state.attached.parameters().values()))
        def state_dict(self):
            return dict(whole=self.own.data, row=self.own.data[0])
        def load_state_dict(self, kept):
            self.kept = kept
    tune(lora(), **STEPS, out=tmp_path, save_every=1, callbacks=(Twin(), At(3, stop)))
    twin = Twin()
    again = tune(lora(), **STEPS, out=tmp_path, save_every=1, resume=True, callbacks=(twin,))
    assert torch.equal(twin.kept['whole'][0],
                       twin.kept['row']) and alike(again, tune(lora(), **STEPS))

def test_a_stage_that_is_done_again_leaves_the_later_checkpoint_alone(tmp_path):
    def second(ctx):
        return Recipe('second', select=parts('q', 'v'))
    # the first cannot be kept: its source remembers
    two = Recipe('two', loop=Stages(Recipe('first', source=Growing), second))
    how = dict(**STEPS, out=tmp_path, save_every=1)
    whole = tune(two, **STEPS)
    at_five = At(2, lambda s: stop(s) if s.settings['stage'] else None)
    tune(two, **how, callbacks=(at_five,))
    kept = (tmp_path/'checkpoint.safetensors').read_bytes()
    assert read_header(tmp_path/'checkpoint.safetensors')['settings']['stage'] == 1
    # killed again, while the first stage is done again
    tune(two, **how, resume=True, callbacks=(At(2, stop),))
    assert (tmp_path/'checkpoint.safetensors').read_bytes() == kept
    assert alike(tune(two, **how, resume=True), whole)

@pytest.mark.parametrize('staged', [False, True])
def test_a_run_with_another_option_is_another_run(staged, tmp_path):
    def own(alpha):
        one = Recipe('own', select=parts('q'), delta=partial(LoRA, r=2, alpha=alpha))
        two = Stages(one, Recipe('norms', select=parts('norm')))
        return Recipe('two', loop=two) if staged else one
    how = dict(**STEPS, out=tmp_path, save_every=1)
    tune(own(8), **how, callbacks=(At(2, stop),))
    with pytest.raises(ValueError, match="'alpha': 16"):
        tune(own(16), **how, resume=True)
    assert alike(tune(own(8), **how, resume=True), tune(own(8), **STEPS))

def test_the_stages_of_a_method_with_arguments_are_described_without_options(tmp_path):
    run = tune(lofit(.5), **STEPS, out=tmp_path, save_every=1)
    assert "'options'" not in str([run.settings[k] for k in ('recipe', 'stages')])
    assert 'options' not in read_header(tmp_path/'checkpoint.safetensors')['settings']['recipe']

def test_a_misspelt_field_of_the_state_is_an_error():
    s = State(toy())
    for name in ('batchs', 'optimiser', 'Step'):
        with pytest.raises(AttributeError):
            setattr(s, name, 1)
    class Typo:
        def after_step(self, state):
            state.stopp = True
    with pytest.raises(AttributeError, match='stopp'):
        tune(callbacks=(Typo(),))

def test_the_optimizer_is_on_the_state():
    seen = []
    class See:
        def after_step(self, state):
            seen.append(state.optimizer)
    run = tune(steps=2, callbacks=(See(),))
    assert isinstance(seen[0], torch.optim.AdamW) and seen[0] is seen[1] and len(run.log) == 2

# ---------- what a killed process leaves

KILLED = '''
import os, signal, sys
from test_resume import *
class Kill:
    def after_step(self, state):
        if state.step == 3: os.kill(os.getpid(), signal.SIGKILL)
tune(lora(), **STEPS, **eval(sys.argv[1]), callbacks=(Kill(),))
'''

def killed(**how):
    p = python(KILLED, repr(how))
    _, err = p.communicate()
    assert p.returncode == -signal.SIGKILL, err

posix = pytest.mark.skipif(os.name != 'posix', reason='signals and locks of POSIX')

@posix
def test_a_killed_run_goes_on_and_its_lock_and_leftovers_are_gone(tmp_path):
    killed(out=str(tmp_path), save_every=2)
    assert (tmp_path/files.LOCK).exists() # nobody removed it, and nobody holds it
    gone = python('import os; print(os.getpid())')
    dead = int(gone.communicate()[0])
    half = tmp_path/f'.checkpoint.safetensors.{socket.gethostname()}-{dead}.tmp'
    half.mkdir()
    (half/'.tmpAb12Cd').write_bytes(b'half of a file')
    (tmp_path/'.tmpXy34Zw').write_bytes(b'half of a file, of an older ftlab')
    (tmp_path/'.tmp-notes').write_text('mine')
    again = tune(lora(), **STEPS, out=tmp_path, save_every=2, resume=True)
    assert alike(again, tune(lora(), **STEPS))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.tmp-notes', 'checkpoint.safetensors']

@posix
def test_a_temporary_folder_of_a_killed_run_goes_with_the_next(tmp_path, monkeypatch):
    import tempfile
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    killed()
    (left,) = tmp_path.glob('ftlab-*')
    (tmp_path/'ftlab-notes').mkdir() # without a lock file it is nobody's leftover
    mine = TemporaryFolder()
    assert left.exists() # too fresh to be sure that its maker has ended
    for p in (left, mine.name):
        os.utime(p, (0, 0))
    assert sweep() == [left]
    assert not left.exists() and Path(mine.name).exists() and (tmp_path/'ftlab-notes').exists()
    mine.cleanup()
    assert not Path(mine.name).exists()

def test_half_written_files_of_the_living_are_left_alone(tmp_path):
    host, ended = socket.gethostname(), python('')
    ended.wait()
    cases = {f'.a.{host}-{os.getppid()}.tmp': False, f'.a.{host}-{ended.pid}.tmp': True,
             '.a.elsewhere-1.tmp': False, f'.b.{host}-{ended.pid}.tmp': False, '.a.tmp': False,
             'a': False}
    for name in cases:
        (tmp_path/name).mkdir()
    assert {p.name for p in leftovers(tmp_path, 'a')} == {n for n, dead in cases.items() if dead}
    os.utime(tmp_path/'.a.elsewhere-1.tmp', (0, 0)) # a day old: nobody writes that long
    assert len(leftovers(tmp_path, 'a')) == 2
    own = tmp_path/f'.c.{host}-{os.getpid()}.tmp'
    own.mkdir()
    assert not leftovers(tmp_path, 'c')
    os.utime(own, (0, 0)) # of a process before this one that had the same number
    assert leftovers(tmp_path, 'c') == [own]

def test_what_stands_beside_an_export_is_no_part_of_it(tmp_path):
    run = tune(lora(), **STEPS)
    (tmp_path/'model.tmp').mkdir()
    (tmp_path/'model.tmp'/'evil.py').write_text('print(1)')
    folder = run.export(tmp_path/'model')
    assert not (folder/'evil.py').exists() and (folder/'model.safetensors').exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['model', 'model.tmp']

def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    seen, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: (seen.append('fsync'), sync(fd))[1])
    monkeypatch.setattr(os, 'replace', lambda a, b: (seen.append('replace'), replace(a, b))[1])
    write_tensors(tmp_path/'x', dict(a=torch.zeros(3)))
    assert seen[:2] == ['fsync', 'replace'] and (os.name != 'posix'
                                                 or seen == ['fsync', 'replace', 'fsync'])
    assert read_tensors(tmp_path/'x')[0]['a'].shape == (3,)

@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError(5, 'I/O error'), ValueError('no')])
def test_an_interrupted_write_leaves_the_old_file_alone(error, tmp_path):
    write_text(tmp_path/'x', 'old')
    def write(tmp):
        tmp.write_text('ne')
        raise error
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        write_atomically(tmp_path/'x', write)
    assert (tmp_path/'x').read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['x']

# ---------- who may write, and whether there is room

def test_a_folder_has_one_writer(tmp_path):
    told = []
    class Second:
        def after_step(self, state):
            with pytest.raises(Busy, match=rf'another run writes into .* \(process {os.getpid()} on ') as e:
                tune(out=tmp_path)
            told.append(str(e.value))
    m = toy()
    run = tune(model=m, steps=2, out=tmp_path, save_every=1, callbacks=(Second(),))
    assert len(told) == 2 and len(run.log) == 2 and not (tmp_path/files.LOCK).exists()
    assert alike(run, tune(steps=2))

HOLD = '''
import sys, time
from ftlab.core.io import only_writer
with only_writer(sys.argv[1]):
    print('held', flush=True)
    time.sleep(60)
'''

@posix
@pytest.mark.parametrize('end', [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_process_holds_nothing(end, tmp_path):
    p = python(HOLD, tmp_path)
    assert p.stdout.readline() == 'held\n'
    with pytest.raises(Busy, match=f'process {p.pid} on {socket.gethostname()}'):
        tune(out=tmp_path)
    p.send_signal(end)
    p.communicate()
    tune(steps=1, out=tmp_path)
    assert not (tmp_path/files.LOCK).exists()

def test_without_locks_of_the_file_system_the_process_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(files, '_lock', lambda at: None)
    lock, ended = tmp_path/files.LOCK, python('')
    ended.wait()
    host = socket.gethostname()
    for holder, free in ((f'{host}-{os.getppid()}', False),
                         ('elsewhere-1', False),
                         (f'{host}-{ended.pid}', True),
                         ('', True)):
        lock.write_text(holder)
        if free:
            with only_writer(tmp_path):
                pass
            assert not lock.exists()
        else:
            with pytest.raises(Busy), only_writer(tmp_path):
                pass

def read_only(monkeypatch, folder):
    "Let nothing be written into `folder` (the tests may run as root, whom no mode stops)"
    real = Path.mkdir
    def mkdir(self, *a, **kw):
        if folder in self.parents:
            raise OSError(30, 'Read-only file system', str(self))
        return real(self, *a, **kw)
    monkeypatch.setattr(Path, 'mkdir', mkdir)

def never(state):
    pytest.fail('it trained first')

def test_a_read_only_folder_is_noticed_before_the_first_step(tmp_path, monkeypatch):
    read_only(monkeypatch, tmp_path)
    m, was = toy(), weights(toy())
    with pytest.raises(OSError, match=f'be written into .{tmp_path}.: Read-only file system; choose another') as e:
        tune(model=m, out=tmp_path, callbacks=(SimpleNamespace(before_fit=never),))
    assert e.value.errno == 30 and same(weights(m), was)
    (tmp_path.parent/'a file').write_text('x')
    with pytest.raises(OSError, match='a file'):
        tune(model=m, out=tmp_path.parent/'a file')

def test_a_full_disk_is_noticed_before_the_first_step(tmp_path, monkeypatch):
    import shutil
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: usage._replace(free=400_000))
    m, was = toy(), weights(toy())
    # the weights, two moments of each, and a count of steps for each tensor
    size = sum(3*p.numel()*4 + 4 for p in m.parameters())
    with pytest.raises(DiskFull,
                       match=f'it needs {size:,} bytes, and 400,000 bytes are free') as e:
        tune(model=m, out=tmp_path, save_every=2, callbacks=(SimpleNamespace(before_fit=never),))
    assert (e.value.errno == 28 and same(weights(m), was)
            and all(p.requires_grad for p in m.parameters()))
    tune(lora(), m, steps=1, out=tmp_path, save_every=1) # little moves, and there is room for that

def test_check_room_leaves_nothing(tmp_path):
    check_room(tmp_path/'new'/'folder')
    assert not list((tmp_path/'new'/'folder').iterdir())
    with pytest.raises(DiskFull, match='no room'):
        check_room(tmp_path, 1 << 60)

def test_a_negative_save_every_is_refused(tmp_path):
    with pytest.raises(ValueError, match='save_every is -1'):
        tune(out=tmp_path, save_every=-1)

# ---------- compare and the command line

def cells(tmp_path, **more):
    import ftlab
    data = ftlab.data('new-procedure', n=40)
    return ftlab.compare(['full'], (toy(), TOK), data, old=data, seeds=1, steps=2, tune=False,
                         items=4, old_items=4, validation_items=4, batch_size=4, evaluate_every=2,
                         out=tmp_path, progress=False, **more)

def test_compare_has_one_writer_and_notices_first_what_it_cannot_write(tmp_path, monkeypatch):
    with only_writer(tmp_path), pytest.raises(Busy):
        cells(tmp_path)
    monkeypatch.setattr('ftlab.instruments.compare._compared', lambda *a: never(None))
    read_only(monkeypatch, tmp_path)
    with pytest.raises(OSError, match='nothing can be written'):
        cells(tmp_path)

@pytest.mark.parametrize('text', ['', '{"gain": 1', '[]', '{"key": {}}', 'null', '\ufffd'])
def test_a_damaged_run_is_made_again(text, tmp_path):
    first = cells(tmp_path)
    (path,) = (tmp_path/'runs').glob('*.json')
    path.write_text(text)
    with pytest.warns(UserWarning, match=f'{path.name}.*is made again'):
        again = cells(tmp_path)
    kept = ['rate', 'gain', 'forgetting'] # the rest is time and memory
    assert again.table[kept].equals(first.table[kept])
    assert json.loads(path.read_text())['error'] is None

MAIN = 'import sys; from ftlab.cli import main; sys.exit(main(sys.argv[1:]))'

@posix
def test_a_closed_pipe_is_no_traceback():
    p = python(MAIN, 'methods')
    p.stdout.close() # before anything is printed
    err = p.stderr.read()
    assert p.wait() == 0 and err == ''

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='a device that is always full')
def test_an_output_that_is_full_is_one_line():
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    with open('/dev/full', 'w') as full:
        p = subprocess.run([sys.executable, '-c', MAIN, 'methods'], stdout=full,
                           stderr=subprocess.PIPE, text=True, env=env)
    assert p.returncode == 1 and p.stderr == 'ftlab: the result could not be printed: No space left on device\n'

LAB = '''
import sys
from ftlab.commands.jupyter import ended_by_signals, until_it_ends
until_it_ends.__defaults__ = (2.,)
with ended_by_signals():
    until_it_ends([sys.executable, '-c', sys.argv[1]], None)
'''
WAITS = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'
STUBBORN = 'import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); ' + WAITS

@posix
@pytest.mark.parametrize('child', [WAITS, STUBBORN], ids=['waits', 'stubborn'])
def test_sigterm_ends_what_the_lab_started(child):
    p = python(LAB, child)
    pid = int(p.stdout.readline())
    p.terminate()
    p.communicate()
    assert p.returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
