"Runs made by two workers of Ray: the numbers of one process, errors with names, and nothing left behind"

import socket

import pytest

import ftlab
from ftlab.instruments.compare import compare
from ftlab.instruments.executor import ray_map
from sums import rows, save_small
from test_executor import numbers

ray = pytest.importorskip('ray')
cluster_utils = pytest.importorskip('ray.cluster_utils')

PORTS = (
    'metrics_agent_port',
    'metrics_export_port',
    'dashboard_agent_listen_port',
    'runtime_env_agent_port',
)


def ports() -> dict:
    "Free ports. With its ports given, a machine does not give up when its helpers start slowly"
    with_one = [socket.socket() for _ in PORTS]
    for s in with_one:
        s.bind(('127.0.0.1', 0))
    found = {k: s.getsockname()[1] for k, s in zip(PORTS, with_one)}
    for s in with_one:
        s.close()
    return found


@pytest.fixture(scope='module')
def address():
    cluster = cluster_utils.Cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=1, include_dashboard=False, **ports())
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope='module')
def ask(tmp_path_factory) -> dict:
    d = tmp_path_factory.mktemp('ray')
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


def test_two_workers_give_the_numbers_of_one(ask, address, tmp_path):
    serial = compare(**ask, out=tmp_path / 'serial', progress=False)
    heard = []
    c = compare(
        **ask, out=tmp_path / 'ray', progress=heard.append, executor=ray_map(address=address)
    )
    assert numbers(c.json()) == numbers(serial.json())
    assert c.json()['runs']['made'] == serial.json()['runs']['made'] == len(heard) - 1
    assert not ray.is_initialized()
