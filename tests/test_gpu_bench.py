"""`make gpu` rehearsed: the parts run on a CPU, a piece that fails or ends its process reaches
no other, and a result is whole at every moment"""
import json
import os
import subprocess
import sys
import time
import pytest
from pages import ROOT

BENCH = ROOT/'bench'
sys.path.append(str(BENCH))
import gpu  # noqa: E402
import gpu_pieces  # noqa: E402

def python(*args, **env):
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), str(BENCH)]), **env}
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True,
                          cwd=ROOT, env=env)

def lines(path):
    return [json.loads(o) for o in path.read_text().splitlines()]

@pytest.mark.parametrize(
    'script, piece',
    [('gpu_kernels', 'magnitude'), ('gpu_small', 'ternary'), ('gpu_build', 'machine'), ('gpu_fit', 'mezo')])
def test_a_piece_is_rehearsed_on_the_cpu(tmp_path, script, piece):
    r = python(BENCH/f'{script}.py', '--device', 'cpu', '--tiny', '--to', tmp_path/'found.jsonl',
               piece)
    assert r.returncode == 0, r.stdout + r.stderr + (tmp_path/'found.jsonl').read_text()
    begun, over = lines(tmp_path/'found.jsonl')
    assert (begun == dict(piece=piece, state='begun') and over['state'] == 'passed'
            and over['piece'] == piece)

BROKEN = """
import os, sys, time
from gpu_pieces import arguments, run_pieces
def wrong(args): raise ValueError('as expected')
PIECES = dict(good=lambda a: dict(found=1), wrong=wrong, dies=lambda a: os._exit(7),
              hangs=lambda a: time.sleep(60), last=lambda a: None)
run_pieces(PIECES, arguments())
"""

@pytest.fixture
def runner(tmp_path):
    board = gpu.Board(tmp_path/'gpu_test.json', dict(card='test'), time.monotonic())
    return gpu.Runner(board, time.monotonic() + 60, {**os.environ, 'PYTHONPATH': str(BENCH)},
                      tmp_path)

def test_a_piece_that_fails_dies_or_hangs_reaches_no_other(tmp_path, runner):
    script = tmp_path/'broken.py'
    script.write_text(BROKEN)
    runner.run(gpu.Task('broken', [sys.executable, script], 3, ('good', 'wrong', 'dies', 'hangs', 'last')))
    found = json.loads((tmp_path/'gpu_test.json').read_text())['results']['broken']
    assert [found[k]['state'] for k in ('good', 'wrong', 'dies', 'hangs', 'last')] == [
        'passed', 'failed', 'failed', 'failed', 'passed']
    assert ('as expected' in found['wrong']['why'] and 'ended with 7' in found['dies']['why']
            and 'more than 3 s' in found['hangs']['why'])

def test_a_part_that_cannot_begin_fails_once_for_each_piece(tmp_path, runner):
    script = tmp_path/'broken.py'
    script.write_text('import nowhere_to_be_found')
    runner.run(gpu.Task('broken', [sys.executable, script], 3, ('a', 'b')))
    found = json.loads((tmp_path/'gpu_test.json').read_text())['results']['broken']
    assert all('nowhere_to_be_found' in found[k]['why'] for k in 'ab')

def test_no_time_left_is_said(tmp_path, runner):
    runner.end = time.monotonic() + 1
    runner.run(gpu.Task('late', [sys.executable, '-c', ''], 3, ('a',)))
    assert 'no time left' in runner.board.found['results']['late']['a']['why']

@pytest.mark.parametrize('output, code, state',
                         [('58 passed, 2 skipped in 3.1s', 0, 'passed'),
                          ('FAILED tests/a.py::b - x\n1 failed, 57 passed in 3.1s', 1, 'failed'),
                          ('60 skipped in 1s', 0, 'failed')])
def test_what_pytest_says_is_read(output, code, state):
    assert gpu.read_pytest(output, code)['state'] == state

def test_the_methods_that_trained_are_kept_with_the_day(runner):
    said = f'PASSED tests/test_gpu.py::{gpu.TRAINS}[lora * dft]\nPASSED tests/a.py::b[x]\n2 passed in 1s'
    runner.board.put('tests', 'tests', gpu.read_pytest(said, 0))
    row = runner.board.found['results']['tests']['tests']
    today = time.strftime('%Y-%m-%d', time.gmtime())
    assert row['methods'] == ['lora * dft'] and row['date'] == today
    assert f'def {gpu.TRAINS}(' in (ROOT/'tests/test_gpu.py').read_text()

@pytest.mark.parametrize(
    'output, code, state',
    [('========= ERROR SUMMARY: 0 errors', 0, 'passed'),
     ('========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)', 0, 'passed'),
     ('========= Invalid __global__ write\n========= ERROR SUMMARY: 10 errors', 9, 'failed'),
     ('', 0, 'failed')])
def test_what_the_checkers_say_is_read(output, code, state):
    assert gpu.read_checker(output, code)['state'] == state

def test_every_kernel_has_its_pieces():
    named = {p for k in gpu.KERNELS for p in gpu.kernel_pieces(k)}
    assert named == set(gpu.pieces_of('gpu_kernels')) and set(gpu.KERNELS) == set(gpu.pieces_of('gpu_small'))

def test_only_what_was_asked_for_runs_again_and_the_rest_stays(tmp_path):
    file = tmp_path/'gpu_test.json'
    results = dict(broken=dict(old=dict(state='passed'), good=dict(state='failed', why='x')),
                   other=dict(a=dict(state='passed')))
    file.write_text(json.dumps(dict(part='all', results=results)))
    board = gpu.Board(file, {}, time.monotonic(), gpu.earlier(file)['results'])
    runner = gpu.Runner(board, time.monotonic() + 60, {**os.environ, 'PYTHONPATH': str(BENCH)},
                        tmp_path, 'broken: go|^never')
    script = tmp_path/'script.py'
    script.write_text(BROKEN)
    for name in ('machine', 'broken', 'other'):
        runner.run(gpu.Task(name, [sys.executable, script], 3, ('good', 'wrong')))
    runner.run(gpu.Task('checker', [sys.executable, '-c', ''], 3))
    found = json.loads(file.read_text())['results']
    assert {t: sorted(p) for t, p in found.items()} == dict(
        broken=['good', 'old'], other=['a'], machine=['good', 'wrong'])
    assert (found['broken']['good']['state'] == 'passed'
            and [t for t, _, _ in board.rows()] == ['machine']*2 + ['broken'])

def test_without_a_gpu_it_says_so():
    r = python(BENCH/'gpu.py', PATH='')
    assert r.returncode == 1 and 'REHEARSE=1' in r.stderr and 'Traceback' not in r.stderr

def test_quartiles_of_one_number_are_that_number():
    assert gpu_pieces.quartiles([2.]) == dict(low_ms=2., median_ms=2., high_ms=2.)

def test_a_page_reads_what_a_gpu_left(tmp_path, capsys):
    from ftlab.native import gpu_table
    assert gpu_table('perturb', tmp_path) is None and 'Not yet measured' in capsys.readouterr().out
    row = dict(what='ours', median_ms=2., low_ms=1., high_ms=3., gb_per_s=1500.,
               extra_bytes=2_000_000)
    found = dict(card='A',
                 results={'ceilings': dict(ceilings=dict(copy_gb_per_s=3000.)),
                          'bench, perturb': dict(small=dict(state='passed', rows=[row, dict(what='theirs', error='x')]),
                                                 large=dict(state='failed', why='x'))})
    (tmp_path/'gpu_a.json').write_text(json.dumps(found))
    table = gpu_table('perturb', tmp_path)
    assert (len(table) == 1 and table.loc[('A', 'small', 'ours')].to_dict()
            == {'ms': 2., 'from': 1., 'to': 3., 'of a copy': .5, 'extra MB': 2.})
