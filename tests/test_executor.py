"Runs that are made elsewhere: the same numbers, whatever ends first"

import math
import multiprocessing
import os
import pickle
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import ftlab
from ftlab.cli import main
from ftlab.instruments import executor
from ftlab.instruments.compare import compare
from sums import rows, save_small

TIMES = ('seconds', 'peak_bytes', 'cpu_seconds')


@pytest.fixture(scope='module')
def ask(tmp_path_factory) -> dict:
    d = tmp_path_factory.mktemp('executor')
    return dict(
        methods=['full', 'lora'],
        model=save_small(d / 'model'),
        data=ftlab.data(rows(d / 'sums.jsonl', 60)),
        seeds=2,
        steps=3,
        batch_size=8,
        lrs=[1e-3, 1e-2],
        max_runs=16,
        evaluations=2,
        items=6,
        validation_items=6,
    )


def backwards(f, jobs):
    "Make the last job first, and give the results in order"
    return reversed([f(job) for job in reversed(jobs)])


def numbers(x):
    "A result without what time and memory tell"
    if isinstance(x, dict):
        return {k: numbers(v) for k, v in x.items() if k not in TIMES and k != 'runs'}
    return [numbers(v) for v in x] if isinstance(x, (list, tuple)) else x


@pytest.fixture(scope='module')
def serial(ask, tmp_path_factory):
    heard = []
    c = compare(**ask, out=tmp_path_factory.mktemp('serial'), progress=heard.append)
    return numbers(c.json()), heard


def test_what_ends_first_does_not_matter(ask, serial, tmp_path):
    heard, sizes = [], []

    def counted(f, jobs):
        sizes.append(len(jobs))
        return backwards(f, jobs)

    c = compare(**ask, out=tmp_path, progress=heard.append, executor=counted)
    assert numbers(c.json()) == serial[0]
    heard, told = heard[1:], serial[1][1:]  # without what is said before the first
    said = ('run', 'method', 'rate', 'seed', 'kind', 'gain', 'forgetting')
    assert [[h[k] for k in said] for h in heard] == [[h[k] for k in said] for h in told]
    assert sum(sizes) == len(heard) == c.json()['runs']['made'] and max(sizes) > 1
    again = compare(**ask, out=tmp_path, progress=False, executor=lambda f, jobs: 1 / 0)
    assert numbers(again.json()) == serial[0] and again.json()['runs']['made'] == 0, (
        'all runs were kept'
    )


def test_what_cannot_be_is_said(ask, tmp_path):
    with pytest.raises(ValueError, match="must be 'ray', or a function"):
        compare(**ask, out=tmp_path, progress=False, executor='slurm')
    with pytest.raises(ValueError, match='keep'):
        compare(**ask, out=tmp_path, progress=False, executor=map, keep=True)


def test_two_processes_give_the_numbers_of_one(ask, serial, tmp_path):
    apart = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(2, mp_context=apart) as pool:
        c = compare(**ask, out=tmp_path, progress=False, executor=pool.map)
    assert numbers(c.json()) == serial[0]


class AsTheyEnd:
    "Give the results as they are there: here the last first"

    any_order = True

    def __init__(self, wrong=lambda found: found):
        self.wrong = wrong

    def __call__(self, f, jobs):
        return iter(self.wrong([f(job) for job in reversed(jobs)]))


def test_results_may_come_in_any_order_where_that_is_said(ask, serial, tmp_path):
    heard = []
    c = compare(**ask, out=tmp_path, progress=heard.append, executor=AsTheyEnd())
    assert numbers(c.json()) == serial[0]
    first = [[h['rate'] for h in of if h['run'] in (1, 2)] for of in (heard, serial[1])]
    assert first[0] == first[1][::-1] != first[1]


@pytest.mark.parametrize(
    'wrong, said',
    [
        (lambda found: found[1:], 'no result'),
        (lambda found: [*found, found[0]], 'a second one'),
        (lambda found: [*found, 3], 'something else'),
    ],
    ids=['too short', 'twice', 'no pair'],
)
def test_in_any_order_each_result_is_wanted_once(ask, tmp_path, wrong, said):
    few = ask | dict(seeds=1, tune=False, lrs=1e-3, max_runs=None, out=tmp_path, progress=False)
    with pytest.raises(ValueError, match=said):
        compare(**few, executor=AsTheyEnd(wrong))
    kept = 1 if said == 'no result' else 2
    assert len(list((tmp_path / 'runs').glob('*.json'))) == kept


def test_without_ray_one_sentence_says_so(ask, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(executor, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match='^the package ray is not installed: pip install ray$'):
        compare(**ask, out=tmp_path, progress=False, executor='ray')
    shell = [
        'compare',
        '--model=lab-s',
        '--data=new-procedure',
        '--methods=full',
        f'--out={tmp_path}',
    ]
    for background in ([], ['--background']):
        assert main([*shell, '--executor=ray', *background]) == 1
        assert (
            capsys.readouterr().err == 'ftlab: the package ray is not installed: pip install ray\n'
        )
    assert not list(tmp_path.iterdir()), 'nothing was begun'
    for option in ('--workers=2', '--ray-address=here:1', '--gpus-per-run=.5'):
        assert main([*shell, option]) == 1
        assert f'ftlab: {option.split("=")[0]} would not be used' in capsys.readouterr().err


WRONG = (
    dict(workers=0),
    dict(cpus_per_run=1.5),
    dict(gpus_per_run=-1),
    dict(gpus_per_run=1.5),
    dict(gpus_per_run=math.inf),
)


@pytest.mark.parametrize('wrong', WRONG, ids=str)
def test_wrong_numbers_for_ray_are_refused(wrong):
    with pytest.raises(ValueError, match=f'{next(iter(wrong))} is .*; it must be'):
        executor.ray_map(**wrong)


def on(device: str) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device))


@pytest.fixture
def stub(monkeypatch) -> SimpleNamespace:
    "What a machine with two cores and a GPU would say, without Ray"
    found, begun = SimpleNamespace(origin='here'), []
    ray = SimpleNamespace(
        begun=begun,
        is_initialized=lambda: bool(begun),
        init=lambda *a, **k: begun.append((a, os.environ.get('RAY_USAGE_STATS_ENABLED'))),
        shutdown=lambda: None,
        nodes=lambda: [dict(Alive=True, Resources=dict(CPU=2.0, GPU=1.0))],
        remote=lambda **needs: lambda f: f,
    )
    monkeypatch.setattr(executor, 'find_spec', lambda name: found)
    monkeypatch.setitem(sys.modules, 'ray', ray)
    monkeypatch.setenv('RAY_USAGE_STATS_ENABLED', 'unknown')
    monkeypatch.delenv('RAY_USAGE_STATS_ENABLED')
    monkeypatch.delenv('RAY_ADDRESS', raising=False)
    return ray


def test_a_ray_that_is_started_here_sends_nothing_home(stub, monkeypatch):
    with executor.ray_map(cpus_per_run=1).started(on('cpu')):
        pass
    assert stub.begun == [(('local',), '0')]
    stub.begun.clear()
    monkeypatch.setenv('RAY_USAGE_STATS_ENABLED', '1')
    with executor.ray_map(cpus_per_run=1).started(on('cpu')):
        pass
    assert stub.begun == [(('local',), '1')], 'unless one wants it'


@pytest.mark.parametrize(
    'given, device, said',
    [
        (dict(gpus_per_run=0.5), 'cpu', 'gpus_per_run is 0.5, but the comparison is on cpu'),
        (dict(gpus_per_run=0), 'cuda', 'gpus_per_run is 0, but the comparison is on cuda'),
        ({}, 'cuda:1', "device is 'cuda:1', but Ray gives each run a GPU of its own"),
        (dict(address='here:1'), 'cpu', "address is 'here:1', and this process uses a Ray already"),
    ],
)
def test_what_ray_would_not_use_is_refused(stub, given, device, said):
    if 'address' in given:
        stub.begun.append('by somebody else')
    before = list(stub.begun)
    with pytest.raises(ValueError, match=said), executor.ray_map(**given).started(on(device)):
        pass
    assert stub.begun == before


def test_room_for_a_single_run_is_said(stub):
    with pytest.warns(UserWarning, match='one run at a time.* a run takes 2 cores and 0 GPUs'):
        with executor.ray_map(cpus_per_run=2).started(on('cpu')):
            pass
    with executor.ray_map(workers=1, cpus_per_run=2).started(on('cpu')) as go:
        assert go.at_once == 1


def test_what_cannot_be_sent_is_said_in_one_line(stub):
    def put(what):
        try:
            pickle.dumps(what)
        except TypeError as e:
            raise TypeError('Could not serialize\n' + '====\n' * 40) from e

    stub.put = put
    job = (SimpleNamespace(name='full'), 1e-3, 0, 'test', 3, ())
    said = r"one of them cannot be sent \(TypeError: cannot pickle '_thread.lock' object\)$"
    with pytest.raises(ValueError, match=said):
        list(executor.RayTasks({}, 2)(partial(len, threading.Lock()), [job]))


@pytest.mark.parametrize(
    'failed, kind',
    [(torch.OutOfMemoryError, MemoryError), (KeyError, ValueError), (TypeError, RuntimeError)],
)
def test_a_run_that_failed_says_all_of_it(stub, failed, kind):
    class RayError(Exception):
        cause = failed('Version mismatch:\nRay 2 there')

    def get(ref):
        raise RayError

    stub.get, stub.put, stub.cancel = get, lambda what: what, lambda ref, force: None
    stub.wait = lambda refs: (refs[:1], refs[1:])
    stub.exceptions = SimpleNamespace(RayError=RayError, OutOfMemoryError=RayError)
    stub.remote = lambda **needs: lambda f: SimpleNamespace(remote=lambda *a: 'a reference')
    job = (SimpleNamespace(name='full'), 1e-3, 0, 'test', 3, ())
    said = '^full at 0.001, seed 0 .*: .*Version mismatch:.*Ray 2 there'
    with pytest.raises(kind, match=said):
        list(executor.RayTasks({}, 2)(len, [job]))


def test_threads_are_refused(ask, tmp_path):
    with ThreadPoolExecutor(4) as pool, pytest.raises(RuntimeError, match='threads'):
        compare(**ask, out=tmp_path, progress=False, executor=pool.map)
    assert not list((tmp_path / 'runs').glob('*')), 'nothing is kept'


@pytest.mark.parametrize(
    'wrong, said, kept',
    [
        (lambda f, jobs: [f(j) for j in reversed(jobs)], 'something else', 0),
        (lambda f, jobs: [f(j)[1] for j in jobs], 'something else', 0),
        (lambda f, jobs: [f(jobs[0])], 'no result', 1),
        (lambda f, jobs: [*map(f, jobs), f(jobs[0])], 'more than', 2),
    ],
    ids=['reversed', 'without names', 'too short', 'too long'],
)
def test_what_does_not_belong_to_its_job_is_refused(ask, tmp_path, wrong, said, kept):
    few = ask | dict(seeds=1, tune=False, lrs=1e-3, max_runs=None, out=tmp_path, progress=False)
    with pytest.raises(ValueError, match=said):
        compare(**few, executor=wrong)
    assert len(list((tmp_path / 'runs').glob('*.json'))) == kept
