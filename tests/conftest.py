"Which tests run, in which process, and what these processes share"
import gc
import os
from collections import Counter
from pathlib import Path

import pytest
from affected import Sources, plain

# the parameter by which a test of every paper tells which one it tests
MOST = 3  # CPU-seconds that a paper's contract should take
KEYED = {'test_contract.py': 'name', 'test_claims.py': 'claim'}
# these take a minute or more, so they begin first: else one process works on the last alone
FIRST = ['test_native.py', 'test_claims.py', 'test_compare.py', 'test_new_paper.py', 'test_contract.py',
         'test_project.py', 'test_interrupt.py', 'test_doctor.py', 'test_fit.py', 'test_cli.py',
         'test_main_job.py', 'test_resume.py', 'test_processes.py', 'test_executor.py']


def paper_of(item, keys: dict[str, str]) -> str | None:
    """The key of the paper that a test is about, or None for the library's: by its parameter,
    or by its file's name"""
    file = Path(str(item.fspath)).name
    params = getattr(item, 'callspec', None)
    value = params and (params.params.get('key') or params.params.get(KEYED.get(file, 'key')))
    return (keys.get(plain(str(getattr(value, 'name', value))))
            or keys.get(plain(Path(file).stem.removeprefix('test_'))))


def pytest_configure(config):
    config.addinivalue_line('markers', 'peer(ours, package, compared, tolerance): ours is compared '
                            'with another package on the same tensors (tools/equalities.py lists these)')


@pytest.fixture
def tolerance(request):
    """What the test's mark `peer` allows. tools/equalities.py reads the marks into the list of
    equalities, so the list says what the test holds"""
    return request.node.get_closest_marker('peer').kwargs['tolerance']


def demanded(report, peer: bool):
    "The report of a test or file; with FTLAB_PEERS=1, one that compares with another package must not be skipped"
    if peer and report.skipped and os.environ.get('FTLAB_PEERS') == '1':
        report.outcome, report.longrepr = 'failed', f'FTLAB_PEERS=1: {report.longrepr}'
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    return demanded((yield), item.get_closest_marker('peer') is not None)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    "A whole file may be skipped before its tests have marks"
    peer = (isinstance(collector, pytest.Module)
            and '@pytest.mark.peer' in collector.path.read_text(encoding='utf-8'))
    return demanded((yield), peer)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leave out the papers that FTLAB_TEST_KEYS does not name (unset: none is left out),
    and put the files first that take longest"""
    keys = {plain(k): k for k in Sources().papers}
    wanted = os.environ.get('FTLAB_TEST_KEYS')
    left = []
    for item in list(items):
        key = paper_of(item, keys)
        item.user_properties.append(('paper', key))
        if key and wanted is not None and key not in wanted.split():
            left.append(item)
            items.remove(item)
    rank = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
    if left:
        config.hook.pytest_deselected(items=left)


def pytest_collection_finish():
    """What was imported stays: the collector, which runs before every trial of a comparison,
    need not look through it each time (half a second)"""
    gc.collect()
    gc.freeze()


def used() -> float:
    "CPU-seconds of this process and of those that it has waited for"
    return sum(os.times()[:4])


def counted(item):
    "Note the CPU-seconds of a phase of a test, beside those of its other phases"
    start = used()
    try:
        return (yield)
    finally:
        item.user_properties.append(('cpu', used() - start))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from counted(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from counted(item))


def costs(terminalreporter) -> dict[str, tuple[str | None, float]]:
    "Return {test: (its paper, CPU-seconds of its fixtures and itself)}"
    found = {}
    for report in (r for rs in terminalreporter.stats.values() for r in rs):
        if getattr(report, 'when', '') == 'call':
            said = report.user_properties  # a call's hold its setup's too
            cpu = sum(v for k, v in said if k == 'cpu')
            found[report.nodeid] = dict(said).get('paper'), cpu
    return found


def pytest_terminal_summary(terminalreporter):
    """What costs most, in CPU-seconds, which a busy machine does not change:
    the tests (with the fixtures that they were the first to ask for) and the contracts"""
    cost = costs(terminalreporter)
    if (whole := sum(cpu for _, cpu in cost.values())) > 60:
        terminalreporter.section('most expensive tests, CPU-seconds')
        for name, (_, cpu) in sorted(cost.items(), key=lambda o: -o[1][1])[:30]:
            terminalreporter.write_line(f'{cpu:6.1f}  {name}')
        terminalreporter.write_line(f'{whole:6.0f}  {len(cost)} tests; the files:')
        files = Counter()
        for name, (_, cpu) in cost.items():
            files[name.partition('::')[0]] += cpu
        for name, cpu in files.most_common(20):
            terminalreporter.write_line(f'{cpu:6.0f}  {name}')
    papers = {}
    for name, (paper, cpu) in cost.items():
        if paper and 'test_contract.py' in name:
            papers[paper] = papers.get(paper, 0) + cpu
    if not papers:
        return
    terminalreporter.section('most expensive contracts, CPU-seconds')
    for key, cpu in sorted(papers.items(), key=lambda o: -o[1])[:10]:
        terminalreporter.write_line(f'{cpu:6.1f}  {key}')
    terminalreporter.write_line(f'{sum(papers.values()):6.1f}  {len(papers)} papers, '
                                f'{sum(c > MOST for c in papers.values())} above {MOST}')
