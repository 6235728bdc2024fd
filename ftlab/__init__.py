"Fine-tune language models by published methods, and see what each gained and what it broke"
import importlib, inspect, os, re

# OpenMP threads that spin while they wait can make a step ten times slower on a busy machine;
# torch reads this when it is first imported
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
# a short spin all the same: without one, small steps take twice as long on an idle machine
os.environ.setdefault('GOMP_SPINCOUNT', '20000')

__version__ = '0.1.0'

# public name -> (module, name there); None: the module itself. Imported on first use, so that `import ftlab` is quick.
_PUBLIC = dict(
    load=('ftlab.core.loading', 'load'), data=('ftlab.core.data', 'data'),
    mix=('ftlab.core.mix', 'mix'), anatomy=('ftlab.core.anatomy', 'anatomy'),
    generate=('ftlab.core.generate', 'generate'), skills=('ftlab.core.scorers', 'skills'),
    Recipe=('ftlab.core.recipe', 'Recipe'),
    attach=('ftlab.adapters.delta', 'attach'), load_delta=('ftlab.adapters.delta', 'load_delta'),
    fit=('ftlab.trainers.fit', 'fit'), Run=('ftlab.trainers.run', 'Run'),
    export=('ftlab.instruments.card', 'exported'),
    Monitor=('ftlab.instruments.monitor', 'Monitor'),
    compare=('ftlab.instruments.compare', 'compare'), methods=('ftlab.methods', None),
    report=('ftlab.instruments.report', 'report'), Report=('ftlab.instruments.report', 'Report'),
    show=('ftlab.instruments.show', 'show'),
    doctor=('ftlab.instruments.doctor', 'doctor'), explore=('ftlab.instruments.explore', None),
    papers=('ftlab.papers', None), claims=('ftlab.instruments.claims', None),
    native=('ftlab.native', None), start=('ftlab.map', 'start'), chapter=('ftlab.map', 'chapter'),
    exercise=('ftlab.exercises', 'exercise'), check=('ftlab.map', 'check'), quiz=('ftlab.map', 'quiz'))

__all__ = sorted(_PUBLIC)

def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f'module ftlab has no attribute {name!r}')
    module, attr = _PUBLIC[name]
    module = importlib.import_module(module)
    value = module if attr is None else getattr(module, attr)
    if inspect.isfunction(value):
        _explain(value)
    globals()[name] = value
    return value

def _explain(f):
    """Add the comments beside the parameters to the docstring,
    since `help` and Shift-Tab show no comments"""
    if f.__doc__ is None:  # `python -OO` drops docstrings
        return
    try:
        source = inspect.getsource(f)
    except OSError:  # installed without its source
        return
    said = {}
    for name, text in re.findall(r'^(?:def \w+\()?[\s*,]*(\w+)\b.*?# (.+)$', source, re.M):
        if name in inspect.signature(f).parameters:
            said.setdefault(name, text)
    if said:
        f.__doc__ += '\n\nParameters:\n' + '\n'.join(f'    {n}: {t}' for n, t in said.items())

def __dir__():
    return sorted({*globals(), *_PUBLIC} - {'importlib', 'inspect', 'os', 're'})
