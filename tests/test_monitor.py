"The monitor: what it measures, what it draws, that it changes nothing, and that its button ends a run"
import os, re
import pytest
import ftlab, ftlab.instruments.monitor as m
from ftlab.adapters.subsets.hft import hft
from ftlab.adapters.modules.lora import lora
from ftlab.core.tokens import encode_all
from ftlab.evaluators.old_sets import old_set
from ftlab.core.recipe import Recipe, Stages
from ftlab.core.scorers import answers
from ftlab.lab.world import OLD
from ftlab.trainers.callbacks import EarlyStop
from ftlab.trainers.fit import fit
from toys import TOK, classifier, lab_data, label_data, same, toy, weights

def tune(recipe=None, steps=6, model=None, data=None, **more):
    return fit(model or toy(dropout=.2), TOK, data or lab_data(), recipe,
               **dict(steps=steps, batch_size=8, lr=3e-3, progress=False) | more)

class Press:
    "Presses the monitor's button after a step"

    def __init__(self, monitor, step):
        self.monitor, self.step = monitor, step

    def after_step(self, state):
        if state.step == self.step:
            self.monitor.stop.set()

@pytest.mark.parametrize('recipe', [None, lora(dropout=.2), hft()], ids=['full', 'lora', 'hft'])
def test_a_watched_run_is_the_same_run(recipe):
    a, b = tune(recipe), tune(recipe, callbacks=(ftlab.Monitor(every=2, questions=30, rows=20),))
    assert (a.log == b.log and same(a.delta.attached.parameters(), b.delta.attached.parameters())
            and same(weights(a.model), weights(b.model)))
    assert ([r['step'] for r in b.path] == [0, 2, 4, 6]
            and all(0 <= r['kept'] <= 1 and r['held_out_nll'] > 0 for r in b.path) and not a.path)

def test_early_stopping_does_not_mistake_the_monitor_s_looks_for_its_own():
    how = dict(steps=40, lr=3e-2)
    plain = tune(callbacks=(EarlyStop(2, 2, 20),), **how)
    watched = tune(callbacks=(ftlab.Monitor(every=1, questions=22, rows=20), EarlyStop(2, 2, 20)),
                   **how)
    assert len(plain.log) == len(watched.log) < 40 and not plain.interrupted

def test_given_exactly_counts_what_greedy_writing_writes():
    model, tok = ftlab.load('lab-s')
    rows = [r for s in ('boxes', 'reverse', 'addition') if s in OLD for r in m.WORLD.rows(s, 25, 'validation', 1)]
    assert len(rows) > 20
    wrote = answers(model, tok, rows)
    right = sum(a.split() == r['response'].split() for a, r in zip(wrote, rows))
    assert (0 < right < len(rows)
            and m.given_exactly(model, encode_all(rows, tok, 'text', 256), tok.pad_token_id)
            == right/len(rows))
    with pytest.raises(ValueError, match='no rows to evaluate'):
        m.given_exactly(model, [])

def test_what_is_asked():
    data = lab_data()
    n = len(m.old_skills(data))
    assert len(m.old_questions(data, TOK, n=44)) == 44//n*n
    assert (m.old_questions(label_data(), TOK) == []
            and len(m.old_questions(data, TOK, old=lab_data(), n=7)) == 7)
    rows = [dict(prompt=r['prompt'], response=r['response']) for r in data.train[:40]]
    for old, want in ((dict(mine=rows, other='sort', set=old_set(rows)), 6), (old_set(rows), 7),
                      (dict(train=rows), 7)):
        assert len(m.old_questions(data, TOK, old=old, n=7)) == want
    for old, words in (('auto', "old= is 'auto'.*needs rows with answers"),
                       (dict(a=rows, b='lm_eval:arc_easy'), "old= is 'lm_eval:arc_easy'"),
                       ({}, 'names .none.'), (dict(a=[]), "the old set 'a'.*no rows"),
                       (dict(a=label_data()), 'other labels')):
        with pytest.raises(ValueError, match=words):
            m.old_questions(data, TOK, old=old)
    labels = label_data()
    labels = ftlab.data(dict(train=labels.train, validation=labels.train[:9]))
    run = tune(model=classifier(), data=labels, callbacks=(ftlab.Monitor(every=3),))
    assert set(run.path[-1]) == {'step', 'held_out_nll'}
    run = tune(model=classifier(), data=labels, callbacks=(ftlab.Monitor(every=3, old=labels),))
    assert set(run.path[-1]) == {'step', 'held_out_nll', 'kept'}
    for wrong in (dict(every=0), dict(questions=0), dict(rows=0)):
        with pytest.raises(ValueError, match='at least 1'):
            ftlab.Monitor(**wrong)
    with pytest.raises(ValueError, match='neither a file nor a lab skill'): # not hidden by the end of the run
        tune(callbacks=(ftlab.Monitor(old='srot'),))

@pytest.mark.parametrize('recipe', [None, Recipe('two', loop=Stages(hft(), lora()))], ids=['full', 'stages'])
def test_the_button_ends_the_whole_run_and_gives_it_back(recipe, tmp_path):
    whole = tune(recipe, steps=8)
    monitor = ftlab.Monitor(every=4, questions=22, rows=20)
    part = tune(recipe, steps=8, callbacks=(monitor, Press(monitor, 2)), out=tmp_path,
                save_every=100)
    # pressed after step 2, told by the next one
    assert part.interrupted and part.log == whole.log[:3] and not part.model.training
    # what it ended on was kept, though no checkpoint was due
    again = tune(recipe, steps=8, out=tmp_path, resume=True, callbacks=(monitor,))
    assert (not again.interrupted and again.log == whole.log
            and same(weights(again.model), weights(whole.model)))

def test_pictures():
    log = [dict(step=i, loss=2. - i/100, nll=2. - i/100, lr=1e-3, tokens=i) for i in range(100)]
    path = [dict(step=s, held_out_nll=2.1, kept=k) for s, k in ((0, .9), (100, .4))]
    titles = lambda *a: [ax.get_title(loc='left') for ax in m.draw_run(*a).axes]
    assert (titles(log, path) == ['negative log-likelihood, nats per token',
                                  'old questions answered right, %', 'learning rate']
            and titles([]) == ['learning rate'])
    assert (titles([dict(r, loss=9.) for r in log])[1] == 'loss that is minimized'
            and titles([dict(r, nll=None) for r in log])[0] == 'loss that is minimized')
    tag = m.picture_tag(log, path, 200, '<b>')
    alt = re.search('alt="([^"]*)"', tag)[1]
    assert '90% to 40%' in alt and 'Step 100 of 200' in alt
    at, values = m.thinned([float(i) for i in range(1000)], 300)
    assert len(at) == 250 and at[-1] == 1000 and values[0] == 1.5
    kept = m.draw_run(log, path).axes[1].lines
    assert (list(kept[-1].get_ydata()) == pytest.approx([90, 40])
            and list(kept[0].get_ydata()) == pytest.approx([90, 90]))

def in_kernel(code):
    "Outputs of a cell in a fresh kernel"
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(nb, timeout=300, kernel_name='python3').execute()
    return [(o['output_type'], o.get('data', {})) for o in nb.cells[0].outputs]

def test_in_a_notebook_that_nobody_watches_there_is_one_picture_and_no_widget(monkeypatch):
    monkeypatch.delenv('JPY_SESSION_NAME', raising=False)
    out = in_kernel(f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
                    "from test_monitor import *\ntune(steps=3, callbacks=(ftlab.Monitor(every=1, "
                    "questions=22, rows=20),), progress=True); None")
    shown = [d['text/html'] for _, d in out if d.get('text/html')]
    assert (len(shown) == 1 and shown[0].startswith('<img')
            and not any('widget' in k for _, d in out for k in d))

def test_where_somebody_watches_the_widget_is_gone_in_the_end(monkeypatch):
    monkeypatch.setenv('JPY_SESSION_NAME', 'x.ipynb')
    out = in_kernel(f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
                    "from test_monitor import *\ntune(steps=3, callbacks=(ftlab.Monitor(every=1, "
                    "questions=22, rows=20),), progress=True); None")
    shown = [d['text/html'] for _, d in out if d.get('text/html')]
    assert (len(shown) == 1 and shown[0].startswith('<img')
            and not any('widget' in k for _, d in out for k in d))
