"""What watching a run costs: seconds of `ftlab.fit` with a Monitor and without.

The two take turns in a kernel that believes somebody is watching.

    python bench/monitor.py           # writes bench/results/monitor.json

Both runs are the same to the last bit (tests/test_monitor.py), so the difference is the monitor's.
`share` is the median of the seconds that the monitor itself took, over the whole run's: looks at
old questions and validation rows, pictures and their way to the front end. `wall` compares whole
runs, which a busy machine blurs."""
import json, os, platform
from pathlib import Path
from statistics import median

CASES = dict(default={}, often=dict(every=5)) # looks every 25 steps, and every 5
STEPS, TURNS = 200, 2

CODE = '''
import json, os, time
os.environ['JPY_SESSION_NAME'] = 'bench' # as Jupyter's server sets it
import ftlab
spent = 0.
class Timed(ftlab.Monitor):
    "Counts its own seconds"
    def before_fit(self, state):
        self.count(super().before_fit, state)
    def after_step(self, state):
        self.count(super().after_step, state)
    def after_fit(self, state):
        self.count(super().after_fit, state)
    def count(self, what, state):
        global spent
        t = time.perf_counter()
        what(state)
        spent += time.perf_counter() - t

def go(monitor):
    global spent
    model, tok = ftlab.load('lab-s')
    spent, t = 0., time.perf_counter()
    run = ftlab.fit(model, tok, data, steps={steps}, lr=1e-3, progress=False,
                    callbacks=() if monitor is None else (monitor,))
    return dict(seconds=time.perf_counter() - t, spent=spent, looks=len(run.path))

data = ftlab.data('new-language')
go(Timed()) # what is imported and read once is not the monitor's daily cost
rows = [dict(plain=go(None), **{{name: go(Timed(**how)) for name, how in {cases!r}.items()}})
        for _ in range({turns})]
print('RESULT ' + json.dumps(rows))
'''

def in_kernel(code:str) -> str:
    "What `code` prints in a fresh kernel, with nobody at the other end"
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(nb, timeout=1800, kernel_name='python3').execute()
    return ''.join(o.get('text', '') for o in nb.cells[0].outputs)

if __name__ == '__main__':
    os.environ |= dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='passive', HF_HUB_OFFLINE='1')
    said = in_kernel(CODE.format(steps=STEPS, turns=TURNS, cases=CASES))
    rows = json.loads(said.split('RESULT ')[1])
    import ipykernel, matplotlib, torch
    cases = {c: dict(share=round(median(r[c]['spent']/r[c]['seconds'] for r in rows), 4),
                     looks=rows[0][c]['looks'],
                     wall=round(median(r[c]['seconds']
                                       for r in rows)/median(r['plain']['seconds']
                                                             for r in rows) - 1, 4),
                     seconds=[round(r[c]['seconds'], 2) for r in rows],
                     spent=[round(r[c]['spent'], 2) for r in rows]) for c in CASES}
    found = dict(cases=cases, plain=dict(seconds=[round(r['plain']['seconds'], 2) for r in rows]),
                 steps=STEPS, model='lab-s', threads=1,
                 versions=dict(python=platform.python_version(), torch=torch.__version__,
                               matplotlib=matplotlib.__version__, ipykernel=ipykernel.__version__))
    out = Path(__file__).parent/'results'/'monitor.json'
    out.write_text(json.dumps(found, indent=1) + '\n')
    print(json.dumps(found, indent=1))
