"What the test processes make once and share: they have one temporary folder above their own"
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from pages import ROOT


def folder(tmp_path_factory) -> Path:
    "The folder that all processes of this run share"
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get('PYTEST_XDIST_WORKER') else base


def once(home: Path, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` in `home` as `make` filled it: by the first process that asks,
    while the others wait. A failure is made again"""
    done, out = home/f'{name}.done', home/name
    home.mkdir(parents=True, exist_ok=True)
    with open(home/f'{name}.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            make(out)
            done.touch()
    return out


def nvcc_once(home: Path, nvcc: str) -> dict[str, str]:
    """The environment in which a source that nvcc has compiled, for whichever test,
    is not compiled again"""
    toolkit = os.environ.get('CUDA_HOME') or Path(nvcc).resolve().parent.parent
    path = f'{ROOT/"tests"/"native"/"once"}{os.pathsep}{os.environ["PATH"]}'
    return dict(PATH=path, FTLAB_TEST_NVCC=nvcc, FTLAB_TEST_KEPT=str(home/'nvcc'),
                CUDA_HOME=str(toolkit))
