"Runs made by two workers of Ray: the numbers of one process, errors with names, and nothing left behind"

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ftlab
from ftlab.instruments import executor
from ftlab.instruments.compare import compare
from ftlab.instruments.executor import ray_map
from sums import rows, save_small
from test_executor import numbers

ray = pytest.importorskip('ray')
cluster_utils = pytest.importorskip('ray.cluster_utils')

ON_CPU = SimpleNamespace(device=torch.device('cpu'))  # what a comparison says of itself
JOBS = [(SimpleNamespace(name=n), 1e-3, 0, 'test', 3, ()) for n in ('full', 'lora')]
NAMES = [('full', 1e-3, 0, 'test'), ('lora', 1e-3, 0, 'test')]


def closed_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='module')
def address():
    cluster = cluster_utils.Cluster()
    for _ in range(2):
        add_node(cluster)
    yield cluster.address
    cluster.shutdown()


def add_node(cluster, tries: int = 3) -> None:
    "Ray gives up after 15 seconds where a machine is busy"
    while tries:
        try:
            cluster.add_node(num_cpus=1, include_dashboard=False)
            return
        except Exception:
            tries -= 1
            if not tries:
                raise


@pytest.fixture(scope='module')
def ask(tmp_path_factory) -> dict:
    d = tmp_path_factory.mktemp('ray')
    rows(d / 'sums.jsonl', 60)
    return dict(
        methods=['full', 'lora'],
        model=str(save_small(d / 'model')),
        data=str(d / 'sums.jsonl'),
        seeds=2,
        steps=3,
        batch_size=8,
        lrs=[1e-3, 1e-2],
        max_runs=16,
        items=6,
    )


@pytest.fixture(scope='module')
def serial(ask, tmp_path_factory) -> dict:
    return compare(**ask, out=tmp_path_factory.mktemp('serial'), progress=False).json()


def wait(until, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_two_workers_give_the_numbers_of_one(ask, serial, address, tmp_path):
    heard, handler = [], signal.getsignal(signal.SIGTERM)
    ours = ray_map(address=address)
    c = compare(**ask, out=tmp_path, progress=heard.append, executor=ours)
    assert numbers(c.json()) == numbers(serial)
    assert c.json()['runs']['made'] == serial['runs']['made'] == len(heard) - 1
    again = compare(**ask, out=tmp_path, progress=False, executor=ours)
    assert numbers(again.json()) == numbers(serial) and again.json()['runs']['made'] == 0
    assert not ray.is_initialized() and signal.getsignal(signal.SIGTERM) == handler


def test_a_result_is_there_as_soon_as_its_run_ends(address, tmp_path):
    def f(job):
        while job[0].name == 'full' and not (tmp_path / 'go').exists():
            time.sleep(0.05)
        return executor.job_name(job), dict(node=ray.get_runtime_context().get_node_id())

    with ray_map(address=address).started(ON_CPU) as go:
        assert go.at_once == 2
        found = go(f, JOBS)
        first = next(found)
        (tmp_path / 'go').touch()
        second = next(found)
    assert [first[0], second[0]] == NAMES[::-1]
    assert first[1]['node'] != second[1]['node'], 'both workers work'


def test_an_error_names_its_run(address):
    def f(job):
        if job[0].name == 'full':
            time.sleep(600)
        raise FileNotFoundError('no such folder:\nmodel')

    said = r'^lora at 0\.001, seed 0 \(test\), failed on a worker of Ray: FileNotFoundError: no such folder: model$'
    start = time.monotonic()
    with pytest.raises(ValueError, match=said), ray_map(address=address).started(ON_CPU) as go:
        list(go(f, JOBS))
    assert time.monotonic() - start < 120, 'the other run is not waited for'


def test_a_worker_with_other_versions_is_refused(address, monkeypatch):
    monkeypatch.setattr(executor, 'versions', lambda: dict(ftlab='0', torch=torch.__version__))
    said = f'full at .*: this worker has ftlab {ftlab.__version__}, not 0; install the same there'
    with pytest.raises(ValueError, match=said), ray_map(address=address).started(ON_CPU) as go:
        list(go(executor.job_name, JOBS[:1]))


def test_ctrl_c_ends_the_runs(address, tmp_path):
    def f(job):
        (tmp_path / str(os.getpid())).touch()
        time.sleep(600)

    def press():
        wait(lambda: len(list(tmp_path.iterdir())) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt), ray_map(address=address).started(ON_CPU) as go:
        list(go(f, JOBS))
    for p in tmp_path.iterdir():
        wait(lambda p=p: not Path('/proc', p.name, 'cmdline').exists())


def test_what_the_cluster_does_not_have_is_said(address):
    with ray_map(address=address, workers=1).started(ON_CPU) as go:
        assert go.at_once == 1
    with pytest.raises(ValueError, match='a run takes 2 cores and 0 GPUs, and no machine'):
        with ray_map(address=address, cpus_per_run=2).started(ON_CPU):
            pass
    with pytest.raises(ValueError, match='a run takes 1 cores and 1 GPUs, and no machine'):
        with ray_map(address=address).started(SimpleNamespace(device=torch.device('cuda'))):
            pass
    assert not ray.is_initialized()


def test_a_wrong_address_is_said_at_once(monkeypatch):
    nowhere = f'127.0.0.1:{closed_port()}'
    monkeypatch.setenv('RAY_ADDRESS', nowhere)
    with pytest.raises(ConnectionError, match=f"^no connection to Ray at '{nowhere}'"):
        with ray_map().started(ON_CPU):
            pass


def test_the_shell_starts_ray_and_ends_it(ask, serial, tmp_path):
    short = tempfile.mkdtemp()  # Ray's sockets lie there, and the path of a socket has at most 107 characters
    env = {k: v for k, v in os.environ.items() if k != 'RAY_ADDRESS'}
    env |= dict(RAY_TMPDIR=short, OMP_NUM_THREADS=str(torch.get_num_threads()))
    options = {k.replace('_', '-'): v for k, v in ask.items()}
    options |= {'methods': 'full,lora', 'lrs': '1e-3,1e-2', 'out': tmp_path, 'workers': 2}
    command = [sys.executable, '-c', 'import sys; from ftlab.cli import main; sys.exit(main())']
    command += ['compare', '--executor=ray', '--json', *(f'--{k}={v}' for k, v in options.items())]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    try:
        assert done.returncode == 0, done.stderr
        assert numbers(json.loads(done.stdout)) == numbers(serial)
        lines = done.stderr.splitlines()
        assert all(line.startswith(('run ', 'at most ', 'warning: ')) for line in lines), lines
        left = [p for p in Path('/proc').glob('[0-9]*/cmdline') if short.encode() in _read(p)]
        assert not left, 'processes of Ray'
    finally:
        shutil.rmtree(short)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b''
