"A comparison in the background: one a folder, a page that tells the truth, and an end that keeps what is finished"

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from ftlab.cli import main
from ftlab.commands import background
from ftlab.commands.background import is_running, read_status, run_status, status_page
from sums import rows, save_small

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='there is no background on Windows')


@pytest.fixture(scope='module')
def ask(tmp_path_factory) -> list[str]:
    d = tmp_path_factory.mktemp('background')
    rows(d / 'sums.jsonl', 60)
    return [
        'compare',
        f'--model={save_small(d / "model")}',
        f'--data={d / "sums.jsonl"}',
        '--methods=full,hft',
        '--seeds=2',
        '--steps=2',
        '--no-tune',
        '--lrs=1e-3',
        '--items=5',
    ]


def wait(until, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.05)


def methods(folder: Path) -> list:
    "What must not depend on how a comparison ran"
    found = json.loads((folder / 'result.json').read_text())['methods']
    return [
        [s[k] for k in ('gain', 'forgetting', 'nll', 'drift', 'path')]
        for m in found
        for s in m['seeds']
    ]


def test_runs_to_the_end_and_gives_what_the_terminal_gives(ask, tmp_path, capsys):
    out = tmp_path / 'out'
    assert main([*ask, f'--out={out}', '--background', '--json']) == 0
    said = json.loads(capsys.readouterr().out)
    assert int((out / 'pid').read_text()) == said['pid'] == os.getsid(said['pid']) != os.getsid(0)
    assert 'http-equiv="refresh"' in (out / 'index.html').read_text()
    assert main([*ask, f'--out={out}', '--background']) == 1
    assert 'already runs' in capsys.readouterr().err
    wait(lambda: not is_running(out))
    assert main(['compare', f'--status={out}']) == 0
    assert capsys.readouterr().out == 'finished, 4 of 4 runs\n'
    assert 'refresh' not in (out / 'index.html').read_text() and (out / 'result.json').exists()
    assert [
        x.split(':')[0] for x in (out / 'log.txt').read_text().splitlines() if x.startswith('run')
    ] == [f'run {i} of 4' for i in (1, 2, 3, 4)]
    assert main([*ask, f'--out={tmp_path / "here"}', '--quiet']) == 0
    assert methods(out) == methods(tmp_path / 'here')


def test_stops_keeps_what_is_finished_and_goes_on(ask, tmp_path, capsys):
    long = [*ask, '--seeds=40', f'--out={tmp_path}', '--background']
    assert main(long) == 0
    wait(lambda: read_status(tmp_path)['runs'] or not is_running(tmp_path))
    assert main(['compare', f'--stop={tmp_path}']) == 0
    assert 'stopped' in capsys.readouterr().out
    said, kept = read_status(tmp_path), len(list((tmp_path / 'runs').glob('*.json')))
    assert (
        said['state'] == 'stopped'
        and 0 < kept < 80
        and 'refresh' not in (tmp_path / 'index.html').read_text()
    )
    assert main(['compare', f'--stop={tmp_path}']) == 1
    assert 'nothing runs' in capsys.readouterr().err
    assert main([*ask, f'--out={tmp_path}', '--background']) == 0, 'the lock went with the process'
    wait(lambda: not is_running(tmp_path))
    assert read_status(tmp_path)['state'] == 'finished' and read_status(tmp_path)['runs'][0]['kept']


def test_of_many_starts_at_once_one_wins(ask, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(background, 'WATCH', 'import time; time.sleep(20)')
    codes, gate = [], threading.Barrier(8)

    def begin():
        gate.wait()
        codes.append(main([*ask, f'--out={tmp_path}', '--background']))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(codes) == [0] + [1] * 7
    os.kill(int((tmp_path / 'pid').read_text()), signal.SIGKILL)
    wait(lambda: not is_running(tmp_path))
    said, text = run_status(str(tmp_path))
    assert said['state'] == 'failed' and 'its process is gone' in text


@pytest.mark.parametrize(
    'how, said',
    [
        ('import os; os.kill(os.getpid(), 9)', 'killed by SIGKILL, perhaps for want of memory'),
        ('import sys; sys.exit("ftlab: there is <no> file")', 'ftlab: there is <no> file'),
    ],
)
def test_a_crash_stands_in_status_and_page(ask, tmp_path, monkeypatch, how, said):
    monkeypatch.setattr(
        background, 'WATCH', f'import ftlab.commands.background as b; b.WORK = {how!r}; b.watch()'
    )
    assert main([*ask, f'--out={tmp_path}', '--background']) == 0
    wait(lambda: not is_running(tmp_path))
    found, page = read_status(tmp_path), (tmp_path / 'index.html').read_text()
    assert found['state'] == 'failed' and found['error'] == said
    assert said.replace('<', '&lt;').replace('>', '&gt;') in page and 'refresh' not in page


def test_what_cannot_be_is_said(ask, tmp_path, monkeypatch, capsys):
    def error(*options):
        assert main(list(options)) == 1
        return capsys.readouterr().err

    assert 'no comparison was started' in error('compare', f'--status={tmp_path}')
    assert 'no comparison was started' in error('compare', f'--stop={tmp_path}')
    assert '--dry-run' in error(*ask, '--background', '--dry-run')
    monkeypatch.setattr(background.os, 'name', 'nt')
    with pytest.raises(background.Failed, match='Windows'):
        background.start(None)


def test_a_page_escapes_what_it_shows():
    run = dict(
        run=1,
        of=2,
        exact=False,
        method='<x>',
        rate=0.1,
        seed=0,
        kind='tuning',
        gain=0.1,
        forgetting=0.0,
        ended='<script>',
        left=3.0,
    )
    page = status_page(dict(state='running', runs=[run], updated='now', pid=1))
    assert '<x>' not in page and '<script>' not in page and 'at most 2' in page
