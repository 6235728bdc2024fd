"A comparison in the background: one a folder, a page that tells the truth, and an end that keeps what is finished"

import json
import os
import shlex
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
    pid = int((out / 'background/pid').read_text())
    assert pid == said['pid'] == os.getsid(pid) != os.getsid(0)
    assert 'http-equiv="refresh"' in (out / 'background/index.html').read_text()
    assert main([*ask, f'--out={out}', '--background']) == 1
    assert 'already runs' in capsys.readouterr().err
    wait(lambda: not is_running(out))
    assert main(['compare', f'--status={out}']) == 0
    assert capsys.readouterr().out == 'finished, 4 of 4 runs\n'
    page = (out / 'background/index.html').read_text()
    assert 'refresh' not in page and 'href="../index.html"' in page
    assert (out / 'index.html').exists() and (out / 'result.json').exists()
    begun = read_status(out)['begun']
    assert (begun['run'], begun['of']) == (0, 4) and begun['left'] > 0
    log = (out / 'background/log.txt').read_text().splitlines()
    assert log[0].startswith('at most 4 runs') and 'minutes' in log[0]
    runs = [x.split(':')[0] for x in log if x.startswith('run')]
    assert runs == [f'run {i} of 4' for i in (1, 2, 3, 4)]
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
        and 'refresh' not in (tmp_path / 'background/index.html').read_text()
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
    os.kill(int((tmp_path / 'background/pid').read_text()), signal.SIGKILL)
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
    (tmp_path / 'index.html').write_text('the result of an earlier comparison')
    assert main([*ask, f'--out={tmp_path}', '--background']) == 0
    wait(lambda: not is_running(tmp_path))
    assert (tmp_path / 'index.html').read_text() == 'the result of an earlier comparison'
    found, page = read_status(tmp_path), (tmp_path / 'background/index.html').read_text()
    assert found['state'] == 'failed' and found['error'] == said
    assert said.replace('<', '&lt;').replace('>', '&gt;') in page and 'refresh' not in page


def lose_the_watcher(out: Path) -> None:
    wait(lambda: read_status(out)['runs'])
    pid = int((out / 'background/pid').read_text())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert is_running(out)


def test_without_its_watcher_the_work_can_be_stopped_and_ends_well(ask, tmp_path, capsys):
    more = [*ask, '--seeds=10', f'--out={tmp_path}', '--background']
    assert main(more) == 0
    lose_the_watcher(tmp_path)
    assert main(['compare', f'--stop={tmp_path}']) == 0
    assert read_status(tmp_path)['state'] == 'stopped' and not is_running(tmp_path)
    assert main(more) == 0
    lose_the_watcher(tmp_path)
    wait(lambda: not is_running(tmp_path))
    assert read_status(tmp_path)['state'] == 'finished' and (tmp_path / 'result.json').exists()


def test_the_commands_that_it_prints_can_be_copied(ask, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(background, 'WATCH', 'import time; time.sleep(3)')
    out = tmp_path / "a b's"
    assert main([*ask, f'--out={out}', '--background']) == 0
    assert main([*ask, f'--out={out}', '--background']) == 1
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        for option in ('status', 'stop'):
            typed = text[text.index(f'ftlab compare --{option}') :].splitlines()[0]
            assert shlex.split(typed)[2].rstrip(',') == f'--{option}={out}'


def test_files_of_something_else_stay_as_they_are(ask, tmp_path, capsys):
    own = tmp_path / 'background'
    own.mkdir()
    for name, text in (('pid', 'mine'), ('status.json', '[1]'), ('status.json', '{"state": "x"}')):
        (own / name).write_text(text)
        assert main([*ask, f'--out={tmp_path}', '--background']) == 1
        said = capsys.readouterr().err
        assert 'name another' in said and 'unexpected' not in said
        assert (own / 'pid').read_text() == 'mine' and (own / name).read_text() == text
    assert main(['compare', f'--status={tmp_path}']) == 1
    assert 'was not written by' in capsys.readouterr().err


def test_a_slip_is_said_before_anything_starts(ask, tmp_path, capsys):
    for slip, said in (
        (['--model=nowhere'], 'nowhere'),
        (['--tune', '--lrs=1e-3,1e-2', '--max-runs=1'], 'max-runs'),
    ):
        assert main([*ask, *slip, f'--out={tmp_path}', '--background']) == 1
        assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_cannot_be_is_said(ask, tmp_path, monkeypatch, capsys):
    def error(*options):
        assert main(list(options)) == 1
        return capsys.readouterr().err

    assert 'no comparison was started' in error('compare', f'--status={tmp_path}')
    assert 'no comparison was started' in error('compare', f'--stop={tmp_path}')
    assert '--dry-run' in error(*ask, '--background', '--dry-run')
    assert 'is empty' in error('compare', '--status=') and 'is empty' in error('compare', '--stop=')
    assert 'not both' in error('compare', '--status=x', '--stop=x')
    assert '--background would not be used' in error(*ask[:1], '--background', '--status=x')
    assert '--out would not be used' in error(*ask[:1], '--out=y', '--stop=x')
    (tmp_path / 'file').write_text('')
    assert 'no comparison was started' in error('compare', f'--status={tmp_path / "file"}')
    monkeypatch.setattr('ftlab.cli.run_stop', lambda folder: (dict(stopped=False), 'not yet'))
    assert main(['compare', '--stop=x']) == 1, 'a script must notice that it goes on'
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
