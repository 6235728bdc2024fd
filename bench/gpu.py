"""Everything that only a GPU can tell, in one call of at most five minutes.

The build, the tests, the kernels' times, and `fit`; written to bench/results/gpu_<card>.json.

    make gpu                              # or PART=tests, PART=bench, PART=fit
    make gpu ONLY='tests|adamw|fit: lift' # what matches "task: piece" again; the rest stays
    make gpu REHEARSE=1                   # the same code at tiny sizes on the CPU
    make gpu PYTHON=python3 WHEELS=.whl   # with another Python, and wheels for what it lacks; nothing is downloaded

Without bitsandbytes, which Pythons with torch mostly lack, a base in 4 bits is not tested: give its wheel.

What finds mistakes runs first and at once: tests, checkers, and compiling for later. What is timed
runs after that, alone. Every part is a process of its own with a limit, and what is over is written
at once, so that a call which is cut short leaves what it had found."""
import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from gpu_pieces import tail

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PARTS = ('all', 'tests', 'bench', 'fit')
KERNELS = ('crossentropy', 'magnitude', 'perturb', 'adamw', 'ternary')
GPU_TESTS = ('test_native.py', 'test_native_cuda.py', 'test_native_adamw.py',
             'test_native_crossentropy.py', 'test_native_ternary.py', 'test_gpu.py')
TRAINS = 'test_a_method_trains_on_a_gpu_and_gives_the_model_back'

@dataclass
class Task:
    """A process, or as many as it takes:
    pieces of a part, or a command whose output says how it went"""
    name: str
    command: list
    seconds: float                # limit for each piece, or for the command
    pieces: tuple = ()            # names of pieces; none: the command is one
    read: object = None           # (output, exit code) -> what was found; for a command
    env: dict = field(default_factory=dict)

class Board:
    "All that was found so far, in a file that is whole at every moment"
    def __init__(self, path: Path, facts: dict, began: float, kept: dict | None = None):
        self.path, self.began, self.lock, self.ran = path, began, threading.Lock(), []
        self.found = dict(facts, results=kept or {})  # kept: results of an earlier call that this one does not repeat

    def put(self, task: str, piece: str, row: dict) -> None:
        "Note a row with its day, write the file, print a line"
        row = row | dict(date=time.strftime('%Y-%m-%d', time.gmtime()))
        with self.lock:
            self.found['results'].setdefault(task, {})[piece] = row
            self.ran.append((task, piece))
            self.found['seconds'] = round(time.monotonic() - self.began, 1)
            self.save()
            why = ('' if row['state'] != 'failed'
                   else ': ' + row.get('why', '').strip().splitlines()[-1][:200])
            title = task if task == piece else f'{task}: {piece}'
            print(f'[{time.monotonic() - self.began:6.1f} s] {title}: {row["state"]} '
                  f'({row.get("seconds", 0):.1f} s){why}', flush=True)

    def save(self) -> None:
        tmp = self.path.with_suffix('.tmp')
        tmp.write_text(json.dumps(self.found, indent=1) + '\n')
        tmp.replace(self.path)

    def rows(self):
        "Of this call only"
        for task, piece in self.ran:
            yield task, piece, self.found['results'][task][piece]

def stop(process: subprocess.Popen) -> None:
    "End a process and all that it started"
    for s in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, s)
            process.wait(3)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue

class Runner:
    "Runs tasks within the time that is left"
    def __init__(self, board: Board, end: float, env: dict, work: Path, only: str = ''):
        self.board, self.end, self.env, self.work = board, end, env, work
        self.only = re.compile(f'^machine: |{only}' if only else '')

    def left(self) -> float:
        return self.end - time.monotonic()

    def begin(self, task: Task, command: list, log) -> subprocess.Popen:
        env = {**self.env, **task.env}
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=env, stdout=log,
                                stderr=subprocess.STDOUT, start_new_session=True)

    def run(self, task: Task) -> None:
        """One task, or those of its pieces that were asked for;
        nothing that happens in it reaches the others"""
        asked = [p for p in task.pieces or [task.name] if self.only.search(f'{task.name}: {p}')]
        if not asked:
            return
        if task.pieces:
            task = replace(task, pieces=tuple(asked))
        try:
            self.run_pieces(task) if task.pieces else self.run_command(task)
        except Exception as e:
            self.board.put(task.name, task.name, dict(state='failed', why=f'{type(e).__name__}: {e}'))

    def run_command(self, task: Task) -> None:
        start, log = time.monotonic(), self.work/f'{re.sub("[^a-z0-9]+", "_", task.name)}.log'
        if self.left() < 5:
            row = dict(state='failed', why='there was no time left', seconds=0)
            self.board.put(task.name, task.name, row)
            return
        with log.open('w') as f:
            process = self.begin(task, task.command, f)
            try:
                code = process.wait(min(task.seconds, self.left()))
            except subprocess.TimeoutExpired:
                stop(process)
                code = None
        output = log.read_text(errors='replace')
        row = task.read(output, code)
        if code is None:
            why = f'stopped after {time.monotonic() - start:.0f} s\n' + tail(output)
            row = dict(row, state='failed', why=why)
        self.board.put(task.name, task.name, row | dict(seconds=round(time.monotonic() - start, 1)))

    def run_pieces(self, task: Task) -> None:
        "Pieces in one process; after one that ends it, the rest in a fresh one"
        todo, turn = list(task.pieces), 0
        while todo:
            turn += 1
            stem = f'{re.sub("[^a-z0-9]+", "_", task.name)}_{turn}'
            to, log = self.work/f'{stem}.jsonl', self.work/f'{stem}.log'
            to.touch()
            done, at_work, why = self.one_process(task, todo, to, log)
            if not done and not at_work:
                at_work = todo[0]  # it did not even begin: asking again would not help
            if at_work:
                said = tail(log.read_text(errors='replace')) if log.exists() else ''
                self.board.put(task.name, at_work,
                               dict(state='failed', why=f'{said}\n{why}', seconds=0))
            todo = [p for p in todo if p not in done and p != at_work]

    def one_process(self, task: Task, todo: list, to: Path,
                    log: Path) -> tuple[set, str | None, str]:
        """The pieces that were over when the process ended, the one that it ended in, and why it
        ended"""
        done, at, at_work = set(), 0, None
        if self.left() < 5:
            return done, None, 'there was no time left'
        with log.open('w') as f:
            process = self.begin(task, [*task.command, '--to', to, *todo], f)
            began = time.monotonic()
            while True:
                ended = process.poll() is not None
                lines = to.read_text().splitlines(keepends=True)
                for line in (o for o in lines[at:] if o.endswith('\n')):
                    at += 1
                    began = time.monotonic()
                    row = json.loads(line)
                    at_work = row.pop('piece')
                    if row['state'] != 'begun':
                        done.add(at_work)
                        self.board.put(task.name, at_work, row)
                        at_work = None
                if ended:
                    return done, at_work, f'the process ended with {process.returncode}'
                if time.monotonic() - began > task.seconds or self.left() <= 0:
                    stop(process)
                    why = f'stopped: more than {task.seconds:.0f} s' if self.left() > 0 else 'stopped: the time was up'
                    return done, at_work, why
                time.sleep(.1)

# --- what there is to do

def read_pytest(output: str, code, rehearsed: bool = False) -> dict:
    "Counts, what failed, and the methods that trained"
    last = next((line for line in reversed(output.splitlines())
                 if re.search(r'\d+ (passed|failed|skipped|error|deselected)', line)), '')
    counts = {k: int(n) for n, k in
              re.findall(r'(\d+) (passed|failed|skipped|errors?|deselected)', last)}
    failed = re.findall(r'^(?:FAILED|ERROR) (.*)$', output, re.M)
    trained = re.findall(rf'^PASSED \S*{TRAINS}\[(.*)\]$', output, re.M)
    row = dict(state='passed' if code == 0 else 'failed', counts=counts, failed=failed,
               methods=sorted(trained))
    if code == 0 and not counts.get('passed'):
        row |= (dict(state='rehearsed: skipped, needs CUDA') if rehearsed
                else dict(state='failed', why='no test ran'))
    if code != 0:
        row['why'] = tail(output, 60_000) + '\n' + '; '.join(o.split(' - ')[0]
                                                             for o in failed)[:300]
    return row

def read_checker(output: str, code) -> dict:
    "What compute-sanitizer says last, and its first complaints"
    said = [o for o in output.splitlines() if o.startswith('=========')]
    sums = [o for o in said if 'SUMMARY' in o]
    fine = code == 0 and bool(sums) and all(' 0 errors' in o or ' 0 hazards' in o for o in sums)
    row = dict(state='passed' if fine else 'failed', summary=sums[-1:])
    if not fine:
        row['why'] = '\n'.join(said[:40])[:4000] + '\n' + tail(output, 800) + '\n' + (sums or ['no summary'])[-1]
    return row

def pieces_of(script: str) -> tuple:
    "The names of a part's pieces, without running it"
    spec = importlib.util.spec_from_file_location(script, HERE/f'{script}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[script] = module
    spec.loader.exec_module(module)
    return tuple(module.PIECES)

def child(script: str, o) -> list:
    "The command that runs a part's pieces"
    size = ['--tiny'] if o.rehearse else []
    return [sys.executable, HERE/f'{script}.py', '--device', o.device, *size]

def test_tasks(o) -> list[Task]:
    "Tests, and the checkers of memory and races"
    workers = (['-n', str(min(10, os.cpu_count() or 1))] if importlib.util.find_spec('xdist')
               and not o.rehearse else [])
    files = [ROOT/'tests'/f for f in GPU_TESTS]
    command = [sys.executable, '-m', 'pytest', '-p', 'gpu_only', '-p', 'no:cacheprovider', *workers,
               '--tb=short', '-rfEp', *files]
    tests = Task('tests', command, 130, read=partial(read_pytest, rehearsed=o.rehearse),
                 env=dict(FTLAB_LARGE='1'))
    small = child('gpu_small', o)
    if o.rehearse:
        return [tests, Task('small shapes', small, 60, KERNELS)]
    checker = shutil.which('compute-sanitizer') or shutil.which('compute-sanitizer', path='/usr/local/cuda/bin')
    tasks = [tests, Task('small shapes', small, 60, KERNELS)]
    if checker:
        for tool, more, kernels in (('memcheck', ['--report-api-errors', 'no'], KERNELS),
                                    ('racecheck', [], ('magnitude', 'crossentropy', 'adamw'))):
            for k in kernels:
                command = [checker, '--tool', tool, *more, '--error-exitcode', '9', *small, '--to',
                           o.work/f'{tool}_{k}.jsonl', k]
                tasks.append(Task(f'{tool}, {k}', command, 130, read=read_checker,
                                  env=dict(PYTORCH_NO_CUDA_MEMORY_CACHING='1')))
    return tasks

def kernel_pieces(name: str) -> tuple:
    return tuple(p for p in pieces_of('gpu_kernels') if p.split(',')[0] == name)

def warm_tasks(o) -> list[Task]:
    "What torch compiles, compiled before anything is timed"
    if o.rehearse:
        return []
    return [Task(f'compile, {k}', [*child('gpu_kernels', o), '--warm'], 110, kernel_pieces(k))
            for k in KERNELS]

def timed_tasks(o) -> list[Task]:
    return [Task(f'bench, {k}', child('gpu_kernels', o), 60, kernel_pieces(k)) for k in KERNELS]

def fit_task(o) -> Task:
    env = dict(CUBLAS_WORKSPACE_CONFIG=':4096:8')  # else products of matrices may differ from run to run
    return Task('fit', child('gpu_fit', o), 60, pieces_of('gpu_fit'), env=env)

def together(runner: Runner, tasks: list) -> None:
    "All at once"
    if tasks:
        with ThreadPoolExecutor(len(tasks)) as pool:
            list(pool.map(runner.run, tasks))

def everything(runner: Runner, o) -> None:
    "The parts that were asked for, the most valuable first"
    runner.run(Task('machine', child('gpu_build', o), 150, ('machine', 'build')))
    first = test_tasks(o) if o.part in ('all', 'tests') else []
    first += warm_tasks(o) if o.part in ('all', 'bench') else []
    if o.rehearse:
        for task in first:  # a small machine is not asked for everything at once
            runner.run(task)
        runner.board.put('checkers', 'checkers', dict(state='rehearsed: skipped, needs CUDA'))
    else:
        together(runner, first)
    if o.part in ('all', 'bench'):
        runner.run(Task('ceilings', child('gpu_build', o), 40, ('ceilings',)))
        for task in timed_tasks(o):
            runner.run(task)
    if o.part in ('all', 'fit'):
        runner.run(fit_task(o))

# --- before and after

def card() -> tuple[str, str] | None:
    "Name and compute capability of the first GPU, by NVIDIA's own tool"
    if not shutil.which('nvidia-smi'):
        return None
    command = ['nvidia-smi', '--query-gpu=name,compute_cap', '--format=csv,noheader']
    r = subprocess.run(command, capture_output=True, text=True)
    lines = r.stdout.strip().splitlines()
    if r.returncode or not lines:
        return None
    name, _, capability = lines[0].rpartition(',')
    return name.strip(), capability.strip()

def install(wheels: Path, to: Path) -> None:
    "Unpack wheels into a folder, without a network and without what they ask for"
    files = sorted(wheels.glob('*.whl'))
    if not files:
        sys.exit(f'there is no wheel in {str(wheels)!r}')
    command = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-index', '--no-deps',
               '--no-compile', '--target', to, *files]
    r = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if r.returncode:
        sys.exit(f'the wheels could not be unpacked:\n{tail(r.stderr)}')

def surroundings(o, site: Path) -> dict:
    "The environment of every part"
    path = [str(p) for p in (site, ROOT, HERE, ROOT/'tests')] + os.environ.get(
        'PYTHONPATH', '').split(os.pathsep)
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(p for p in path if p), 'HF_HUB_OFFLINE': '1',
           'PYTHONUNBUFFERED': '1',
           'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', '2'),
           'TORCHINDUCTOR_COMPILE_THREADS': '2', 'TOKENIZERS_PARALLELISM': 'false'}
    if not o.rehearse:
        env['FTLAB_CUDA_ARCH'] = o.capability.replace('.', '')
        env['FTLAB_NATIVE'] = 'cuda'
    return env

def table(board: Board) -> None:
    "A short table of what was found"
    print()
    for task, piece, row in board.rows():
        for r in row.get('rows', []):
            what = f'{task.removeprefix("bench, ")} | {piece} | {r["what"]}'
            speed = f'{r.get("gb_per_s") or 0:8.0f} GB/s' if r.get('gb_per_s') else ' '*13
            print(f'{what:85.85} {r.get("median_ms", float("nan")):10.3f} ms {speed} {r.get("error", "")[:60]}')
        if 'tokens_per_s' in row:
            print(f'{"fit | " + piece:60.60} {row["step_ms"]:9.2f} ms/step {row["tokens_per_s"]:9} '
                  f'tokens/s, peak {row["peak_bytes"]}, nll {row["nll"]}')
    states = [(f'{t}: {p}', r['state']) for t, p, r in board.rows()]
    bad = [name for name, state in states if state == 'failed']
    print(f'\n{len(states) - len(bad)} of {len(states)} in '
          'order' + (f'; failed: {", ".join(bad)}' if bad else ''), flush=True)

def earlier(file: Path) -> dict:
    "What an earlier call found on this card: in the folder of results, or in the project's"
    for place in (file, HERE/'results'/file.name):
        if place.exists():
            return json.loads(place.read_text())
    return {}

def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--part', choices=PARTS, default='all')
    p.add_argument('--only', default='', help='a regular expression over "task: piece": what matches is done again')
    p.add_argument('--rehearse', action='store_true', help='tiny sizes, on the CPU')
    p.add_argument('--out', type=Path,
                   default=Path(os.environ.get('FTLAB_GPU_OUT') or HERE/'results'), help='folder of the result')
    p.add_argument('--wheels', type=Path, help='folder of wheels for what this Python lacks')
    p.add_argument('--limit', type=float, default=285., help='seconds for everything')
    return p.parse_args()

def main() -> None:
    o, began = options(), time.monotonic()
    found = None if o.rehearse else card()
    if not found and not o.rehearse:
        sys.exit('there is no NVIDIA GPU here (nvidia-smi finds none); make gpu REHEARSE=1 runs the '
                 'same code on the CPU')
    name, o.capability = found or ('rehearsal', '')
    o.device = 'cpu' if o.rehearse else 'cuda'
    with tempfile.TemporaryDirectory(prefix='ftlab-gpu-') as tmp:
        o.work = Path(tmp)
        o.out.mkdir(parents=True, exist_ok=True)
        file = (o.work if o.rehearse else o.out)/f'gpu_{re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")}.json'
        kept = earlier(file) if o.only else {}
        board = Board(file, dict(card=name, capability=o.capability, part=kept.get('part', o.part)),
                      began, kept.get('results'))
        board.save()
        if o.wheels:
            install(o.wheels, o.work/'site')
        runner = Runner(board, began + o.limit, surroundings(o, o.work/'site'), o.work, o.only)
        everything(runner, o)
        table(board)
        sys.exit(any(row['state'] == 'failed' for _, _, row in board.rows()))

if __name__ == '__main__':
    main()
