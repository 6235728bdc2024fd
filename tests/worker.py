"""A process that has imported the heavy libraries once, and a fork of it for each page.

A fresh kernel pays two to three CPU-seconds for imports before its first cell. Here they are paid
once; each page runs in a forked process of its own, in a fresh namespace of IPython's shell,
so that nothing of one page is seen by another."""
import atexit
import builtins
import gc
import importlib
import io
import itertools
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

# What pages import, models' classes included, which transformers loads only when they are asked for.
# ftlab comes last: a broken module of ours must not hide what is wrong with each page,
# so that one which does not import is left to the pages.
HEAVY = '''torch torch.utils.data torch.func torch.nn.attention torch._dynamo
numpy pandas scipy.stats scipy.optimize sklearn.metrics sklearn.linear_model sklearn.decomposition
transformers transformers.models.auto.modeling_auto transformers.models.llama.modeling_llama
transformers.models.bert.modeling_bert transformers.models.vit.modeling_vit
transformers.models.gpt2.modeling_gpt2 transformers.models.qwen2.modeling_qwen2
transformers.models.auto.tokenization_auto transformers.tokenization_utils_tokenizers
transformers.generation.utils transformers.trainer_utils datasets accelerate safetensors.torch
tokenizers matplotlib.pyplot matplotlib.backends.backend_svg matplotlib_inline.backend_inline
IPython.display IPython.core.interactiveshell ipywidgets
fastcore.all nbdev.showdoc nbformat pytest tomllib'''.split()
OURS = '''ftlab.core.loading ftlab.core.tokens ftlab.core.batches ftlab.core.generate ftlab.core.scorers
ftlab.adapters.delta ftlab.trainers.loop ftlab.lab.models ftlab.lab.world ftlab.native
ftlab.instruments.report'''.split()


def preload(names: list[str]) -> list[str]:
    """Import what pages need, and freeze it for the garbage collector;
    the modules that could not be imported"""
    os.environ['MPLBACKEND'] = 'module://matplotlib_inline.backend_inline'
    missing = []
    for name in names:
        before = set(sys.modules)
        try:
            importlib.import_module(name)
        except Exception:  # the page that needs it says what is wrong
            missing.append(name)
            for half in [m for m in set(sys.modules) - before if m.startswith('ftlab.')]:
                del sys.modules[half]
    gc.collect()
    gc.freeze()
    return missing


class Outputs(list):
    "The outputs of one cell, as a notebook stores them"
    def __init__(self):
        self.clear_next = False

    def add(self, **output) -> None:
        if self.clear_next:
            self.clear()
            self.clear_next = False
        last = self[-1] if self else {}
        if output['output_type'] == 'stream' == last.get('output_type') and last['name'] == output['name']:
            last['text'] += output['text']
        else:
            self.append(output)

    def clear_output(self, wait: bool = False) -> None:
        if wait:
            self.clear_next = True
        else:
            self.clear()


class Stream(io.TextIOBase):
    "A standard stream that writes into the running cell's outputs"
    encoding = 'utf-8'

    def __init__(self, name: str, page, fd: int):
        self.name, self.page, self.fd = name, page, fd

    def fileno(self) -> int:
        return self.fd

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if text:
            self.page.outputs.add(output_type='stream', name=self.name, text=text)
        return len(text)


class Page:
    "A notebook's shell in this process: `run(source)` runs a cell and returns its outputs"
    def __init__(self, home: str):
        from IPython.core.displayhook import DisplayHook
        from IPython.core.displaypub import DisplayPublisher
        from IPython.core.interactiveshell import InteractiveShell
        from traitlets.config import Config
        page, self.outputs, self.shown = self, Outputs(), {}

        class Publisher(DisplayPublisher):
            def publish(self, data, metadata=None, source=None, *, transient=None, update=False,
                        **kwargs):
                page.display(data, metadata or {}, (transient or {}).get('display_id'), update)

            def clear_output(self, wait=False):
                page.outputs.clear_output(wait)

        class Hook(DisplayHook):
            def write_output_prompt(self):
                pass

            def write_format_data(self, format_dict, md_dict=None):
                page.outputs.add(output_type='execute_result', data=format_dict,
                                 metadata=md_dict or {})

            def finish_displayhook(self):
                pass

        class Shell(InteractiveShell):
            "IPython's shell as a kernel has it: no terminal, no history on the disk"
            kernel = SimpleNamespace()  # ftlab and ipywidgets ask whether there is one

            def _showtraceback(self, etype, evalue, stb):
                text = {'ename': etype.__name__, 'evalue': str(evalue), 'traceback': list(stb)}
                page.outputs.add(output_type='error', **text)

            def ask_exit(self):
                pass

            def enable_gui(self, gui=None):
                pass

        config = Config({
            'HistoryManager': {'enabled': False, 'hist_file': ':memory:'},
            'InteractiveShell': {'colors': 'nocolor', 'xmode': 'Context'},
            'IPKernelApp': {},  # progress bars ask for this
        })
        main = ModuleType('__main__')
        main.__dict__.update(__builtins__=builtins, __builtin__=builtins)
        os.environ['IPYTHONDIR'] = home
        Shell.displayhook_class, Shell.display_pub_class = Hook, Publisher
        self.shell = Shell.instance(config=config, user_module=main, ipython_dir=home)
        sys.modules['__main__'] = main
        sys.stdout, sys.stderr = Stream('stdout', self, 1), Stream('stderr', self, 2)
        self.shell.enable_matplotlib('inline')

    def display(self, data, metadata, display_id, update) -> None:
        if update:
            for shown in self.shown.get(display_id, ()):
                shown.update(data=data, metadata=metadata)
            return
        self.outputs.add(output_type='display_data', data=data, metadata=metadata)
        if display_id:
            self.shown.setdefault(display_id, []).append(self.outputs[-1])

    def run(self, source: str) -> Outputs:
        self.outputs = Outputs()
        self.shell.run_cell(source, store_history=True)
        return self.outputs


def plain(text: str) -> str:
    "`text` without the terminal's colours"
    return re.sub(r'\x1b\[[0-9;]*m', '', text)


def wrong(number: int, source: str, outputs: list[dict]) -> str:
    "What a kernel's client would say of a failed cell: its source and the traceback"
    said = [o for o in outputs if o['output_type'] == 'error']
    if not said:
        return ''
    rule = '-'*18
    trace = plain('\n'.join(said[-1]['traceback']))
    return f'cell {number}\n{rule}\n{source.strip()}\n{rule}\n{trace}\n{said[-1]["ename"]}: {plain(said[-1]["evalue"])}'


DATA = re.compile(r'^#\|\s*data\b', re.M)
SHOWN = ('text/html', 'text/markdown', 'image/svg+xml', 'text/plain')
WORDS = re.compile(r'aria-label="([^"]*)"|<text[^>]*>([^<]*)')


def words(picture: str) -> str:
    "The words of a picture, a line each: where its lines lie differs with the version that draws it"
    return '\n'.join(a or b for a, b in WORDS.findall(picture))


def shown(outputs: list[dict]) -> list[str]:
    "What a reader sees of outputs, as text: streams joined, of results the richest form"
    said, streams = [], {}
    for o in outputs:
        text = ''.join(o.get('text', ''))
        if o['output_type'] == 'stream':
            streams[o['name']] = streams.get(o['name'], '') + text
        elif kind := next((k for k in SHOWN if k in o.get('data', {})), None):
            text = ''.join(o['data'][kind])
            said.append(words(text) or text if kind == 'image/svg+xml' else text)
    return [s.strip() for s in (*streams.values(), *said)]


def stale(cells: list[dict], fresh: dict[int, list[dict]]) -> str:
    """What is wrong with cells marked `#| data`, whose outputs restate what is in files, such as
    verdicts, counts and tables: '', or the first line in which the stored output differs from the
    fresh one"""
    wrong = []
    for number, cell in enumerate(cells):
        if cell['cell_type'] != 'code' or number not in fresh or not DATA.search(''.join(cell['source'])):
            continue
        old, new = ('\n'.join(shown(o)).splitlines() for o in (cell['outputs'], fresh[number]))
        if old != new:
            a, b = next((a, b) for a, b in itertools.zip_longest(old, new, fillvalue='(nothing)')
                        if a != b)
            wrong.append(f'cell {number} restates data, and what is stored is no longer so:\n'
                         f'  stored: {a[:200]}\n  fresh:  {b[:200]}')
    return ('\n'.join(wrong)
            and '\n'.join((*wrong, 'to store what is so now: python tests/run_notebooks.py --store PAGE')))


NEEDS = re.compile(r'^#\|\s*needs:\s*(.+)$', re.M)


def lacks(cell: dict) -> str:
    """The first package that a cell marked `#| needs: a b` needs and this machine lacks, or ''.
    Such a cell is left out: what is stored is what a reader without the package sees, too"""
    named = cell['cell_type'] == 'code' and NEEDS.search(''.join(cell['source']))
    return next((p for p in named[1].split() if find_spec(p) is None), '') if named else ''


def run_cells(page: Page, cells: list[dict], timeout: int) -> tuple[str, dict[int, list[dict]]]:
    "Run the code cells until one fails: (what went wrong or '', {cell number: its outputs})"
    kept = {}

    def too_long(*_):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)  # a cell that catches the error, or never comes back to Python, is ended
        raise TimeoutError(f'the cell took more than {timeout} seconds')

    for number, cell in enumerate(cells):
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or not source.strip() or lacks(cell):
            continue
        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(timeout)
        kept[number] = outputs = page.run(source)
        signal.alarm(0)
        failed = wrong(number, source, outputs)
        if failed and 'raises-exception' not in cell.get('metadata', {}).get('tags', ()):
            return failed, kept
    return '', kept


def in_child(path: Path, timeout: int, result: str) -> None:
    """Run the notebook at `path` in this forked process, write what came of it to `result`,
    and end the process"""
    try:
        said = {'wrong': 'the process ended before the page did'}
        random.seed()
        if numpy := sys.modules.get('numpy'):
            numpy.random.seed(int.from_bytes(os.urandom(4)))
        os.chdir(path.parent)
        here = str(Path(__file__).resolve().parent)
        sys.path[:] = ['', *(p for p in sys.path if p not in ('', here))]
        sys.argv = ['ipykernel_launcher.py']
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        with tempfile.TemporaryDirectory() as home:
            failed, outputs = run_cells(Page(home), cells, timeout)
        said = {'wrong': failed or stale(cells, outputs), 'outputs': outputs}
    except BaseException:  # whatever it is, the other pages still run
        said = {'wrong': traceback.format_exc()}
    finally:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        Path(result).write_text(json.dumps(said, default=repr), encoding='utf-8')
        atexit._run_exitfuncs()  # temporary folders that the page left open
        os._exit(0)


class Workers:
    "Runs pages, `most` at a time, each in a fork of this process"
    def __init__(self, most: int = 2, timeout: int = 600):
        self.most, self.timeout, self.running = most, timeout, {}

    def start(self, name: str, path: Path) -> None:
        fd, result = tempfile.mkstemp('.json')
        os.close(fd)
        sys.stdout.flush()
        sys.stderr.flush()
        began = time.perf_counter()
        pid = os.fork()
        if not pid:
            in_child(path, self.timeout, result)
        self.running[pid] = name, result, began

    def wait(self) -> tuple[str, dict]:
        """The next page that ends: its name and wrong, outputs, seconds,
        CPU-seconds (of its own child processes, too)"""
        pid, status, used = os.wait4(-1, 0)
        name, result, began = self.running.pop(pid)
        try:
            said = json.loads(Path(result).read_text(encoding='utf-8'))
        except ValueError:
            said = {'wrong': f'the page\'s process died (status {os.waitstatus_to_exitcode(status)})'}
        Path(result).unlink()
        outputs = {int(k): v for k, v in said.pop('outputs', {}).items()}
        return (name, {'outputs': outputs, 'seconds': time.perf_counter() - began,
                       'cpu': used.ru_utime + used.ru_stime, **said})

    def run(self, first: list[tuple[str, Path]], then: list[tuple[str, Path]] = (),
            between=lambda: None):
        """Yield (name, result) for every page as it ends;
        `between()` is called when all of `first` have been started"""
        first, then = list(first), list(then)
        while first or then or self.running:
            while (first or then) and len(self.running) < self.most:
                if not first:
                    between()
                    first, then, between = then, [], lambda: None
                self.start(*first.pop(0))
            yield self.wait()
