"""The machine, and the extension: what is there, and how long compiling takes. A part of `gpu.py`."""
import importlib.util
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from gpu_pieces import arguments, run_pieces

PACKAGES = ('torch', 'triton', 'transformers', 'accelerate', 'peft', 'liger-kernel', 'numpy',
            'bitsandbytes')

def version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

def machine(args) -> dict:
    "Versions, the card, and what is missing"
    import torch
    found = dict(python=platform.python_version(), cores=os.cpu_count(), cuda=torch.version.cuda)
    found['packages'] = {name: version_of(name) for name in PACKAGES}
    wanted = ('datasets', 'ipywidgets', 'IPython', 'sklearn', 'scipy', 'pandas', 'yaml', 'xdist', 'ninja',
              'bitsandbytes')
    found['missing'] = [m for m in wanted if importlib.util.find_spec(m) is None]
    if torch.device(args.device).type == 'cuda':
        card = torch.cuda.get_device_properties(0)
        found |= dict(card=card.name, capability=f'{card.major}.{card.minor}',
                      memory=card.total_memory,
                      processors=card.multi_processor_count, l2_bytes=card.L2_cache_size)
    return found

def build(args) -> dict:
    "Compile the extension, unless it is there, and load it"
    from ftlab.native import backend, extension
    there = extension.find() is not None
    start = time.perf_counter()
    made = extension.build()
    seconds = round(time.perf_counter() - start, 2)
    kind = backend(args.device)
    wanted = 'cuda' if args.device == 'cuda' else 'cpp'
    assert kind == wanted, f'{kind} is in use on {args.device}; it must be {wanted}'
    return dict(build_seconds=None if there else seconds, file=made.name, cards=extension.cards())

def ceilings(args) -> dict:
    """What the card can do at most:
    bytes a second of a copy (read and written), operations a second of a product"""
    import torch
    from gpu_pieces import Clock
    n, m = (1 << 20, 256) if args.tiny else (1 << 31, 8192)
    x = torch.randint(0, 255, (n,), dtype=torch.uint8, device=args.device)
    y = torch.empty_like(x)
    a = torch.randn(m, m, device=args.device).bfloat16()
    b = torch.randn(m, m, device=args.device).bfloat16()
    copy, product = Clock(args.device).compare({'copy': (lambda: y.copy_(x), 2*n),
                                                'product': (lambda: a @ b, None)}, 1.5)
    return dict(copy_gb_per_s=copy['gb_per_s'],
                tflops_bf16=round(2*m**3/product['median_ms']/1e9, 1), rows=[copy, product])

if __name__ == '__main__':
    run_pieces(dict(machine=machine, build=build, ceilings=ceilings), arguments())
