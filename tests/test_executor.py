"Runs that are made elsewhere: the same numbers, whatever ends first"

import math
import subprocess
import sys

import pytest

import ftlab
from ftlab.instruments.compare import compare
from ftlab.instruments.executor import mapped
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
    said = ('run', 'method', 'rate', 'seed', 'kind', 'gain', 'forgetting')
    assert [[h[k] for k in said] for h in heard] == [[h[k] for k in said] for h in serial[1]]
    assert sum(sizes) == len(heard) == c.json()['runs']['made'] and max(sizes) > 1
    again = compare(**ask, out=tmp_path, progress=False, executor=lambda f, jobs: 1 / 0)
    assert numbers(again.json()) == serial[0] and again.json()['runs']['made'] == 0, (
        'all runs were kept'
    )


def test_what_cannot_be_is_said(ask, tmp_path):
    with pytest.raises(ValueError, match="must be 'ray'"):
        compare(**ask, out=tmp_path, progress=False, executor='slurm')
    with pytest.raises(ValueError, match='keep'):
        compare(**ask, out=tmp_path, progress=False, executor=map, keep=True)


def test_without_ray_it_says_so():
    code = '''import sys; sys.modules["ray"] = None
from ftlab.instruments.executor import mapped
try:
    with mapped("ray", None): pass
except ImportError as e: print(e)'''
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'pip install ray' in said.stdout and said.stdout.count('\n') == 1, said.stderr


def test_two_workers_of_ray_find_what_this_process_finds(ask, serial, tmp_path):
    ray = pytest.importorskip('ray')
    ray.init(address='local', num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        c = compare(**ask, out=tmp_path, progress=False, executor='ray')
        with (
            pytest.raises(ValueError, match='steps|rate|lr') as e,
            mapped('ray', _bench(ask)) as run,
        ):
            list(run([(ftlab.methods.get('full'), math.nan, 0, 'test', 3, ())]))
        assert 'RayTaskError' not in str(e.value)
        assert ray.is_initialized(), 'a cluster of the caller stays'
    finally:
        ray.shutdown()
    assert numbers(c.json()) == serial[0]


def _bench(ask):
    from ftlab.instruments.bench import Bench

    return Bench(
        ask['model'], ask['data'], steps=3, batch_size=8, evaluations=2, items=6, progress=False
    )
