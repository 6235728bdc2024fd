"The package, described by settings.ini; with the native operators where their sources and a C++ compiler are found"
import runpy
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
lines = lambda key: [o.strip() for o in cfg.get(key, '').splitlines() if o.strip()]
readme = here/'README.md'

def native() -> dict:
    """setup()'s arguments for the C++ operators: none without sources, torch or a compiler, for all
    works without them"""
    try:
        # the file alone: the package is not installed yet
        made = runpy.run_path(str(here/'ftlab'/'native'/'extension.py'))
        if not made['compiler']():
            return {}
        from torch.utils.cpp_extension import BuildExtension
        ext = made['extension']('build/native')
        ext.optional = True
    except (ImportError, OSError, RuntimeError) as e:
        print(f'without the C++ operators: {e}')
        return {}
    return dict(ext_modules=[ext],
                # ninja's failures are not optional
                cmdclass=dict(build_ext=BuildExtension.with_options(use_ninja=False)))

SHIPPED = ('claims/*/claim.toml', 'claims/*/claim.py', 'claims/*/result.json', 'claims/*/result.1.json',
           'claims/*/real.toml', 'claims/*/real.py', 'claims/*/real.json',
           'papers/catalogue.jsonl', 'bench/results/*.json',
           'bench/results/compare_lab_s/result.json',
           'bench/results/banking77/result.json', 'bench/results/banking77/hft_300/result.json')

class BuildPy(build_py):
    """The installed package knows its verdicts, and what its chapters show: claims, the catalogue
    and results go into ftlab/data"""
    def run(self):
        super().run()
        for p in [] if self.editable_mode else [p for kind in SHIPPED for p in here.glob(kind)]:
            to = Path(self.build_lib)/'ftlab'/'data'/p.relative_to(
                here/'bench' if p.is_relative_to(here/'bench') else here)
            self.mkpath(str(to.parent))
            self.copy_file(str(p), str(to))

build = native()
build['cmdclass'] = dict(build.get('cmdclass', {}), build_py=BuildPy)

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    keywords=cfg['keywords'], author=cfg['author'],
    license=cfg['license'], license_files=['LICENSE'], python_requires=f'>={cfg["min_python"]}',
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    packages=find_packages(include=['ftlab', 'ftlab.*']), include_package_data=False,
    package_data={'ftlab': ['checkpoints/**', 'data/**', 'csrc/**']},
    exclude_package_data={'ftlab': ['**/state.safetensors',
                                    '**/*.tmp']},  # what a pretraining resumes from is no part of its model
    install_requires=lines('requirements'),
    extras_require={k: lines(f'{k}_requirements') for k in ('dev', 'test', 'bench', 'docs')},
    entry_points={'console_scripts': lines('console_scripts'), 'nbdev': ['ftlab=ftlab._modidx:d']},
    zip_safe=False, **build)
