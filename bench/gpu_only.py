"""A plugin of pytest that keeps the tests which need a GPU: `pytest -p gpu_only` with this folder on the path."""

def needs_gpu(item) -> bool:
    "Is it skipped where there is no GPU?"
    return any(m.kwargs.get('reason') == 'there is no GPU here'
               for m in item.iter_markers('skipif'))

def pytest_collection_modifyitems(config, items):
    kept = [i for i in items if needs_gpu(i)]
    config.hook.pytest_deselected(items=[i for i in items if not needs_gpu(i)])
    items[:] = kept
