"""The course in a real JupyterLab, in a real browser: the start page, a chapter, an exercise, the
quiz; a run that is watched, stopped, interrupted, killed and taken up again.

Needs Playwright (`pip install playwright`) and a Chromium, found on the path, in CHROMIUM, or
installed by `playwright install chromium`. With SHOTS=folder it leaves pictures of what it saw there."""
import json, os, re, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
import pytest
from pages import copy_project

api = pytest.importorskip('playwright.sync_api', reason='Playwright is not installed')
NAMES = 'chromium', 'chromium-browser', 'google-chrome'
CHROMIUM = (os.environ.get('CHROMIUM')
            or next(filter(None, map(shutil.which, NAMES)), None))
TOKEN, SLOW = 'a-token-of-the-test', 120_000  # milliseconds: the machine may be busy

def notebook(*cells:str) -> str:
    code = [dict(cell_type='code', id=f'c{i}', metadata={}, outputs=[], execution_count=None,
                 source=c) for i, c in enumerate(cells)]
    return json.dumps(
        dict(cells=code,
             metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')),
             nbformat=4, nbformat_minor=5))

LOAD = "import os, time, ftlab\nmodel, tok = ftlab.load('lab-s'); data = ftlab.data('new-language')"
AFTER = '''answers = ftlab.generate(model, tok, [data.test[0]['prompt']], max_new_tokens=4)
print('after:', run.interrupted, len(run.log) > 0, model.training, len(answers))
more = ftlab.fit(model, tok, data, steps=2, callbacks=(ftlab.Monitor(every=1),))
print('again:', len(more.log))'''
FIT = ("run = ftlab.fit(model, tok, data, steps=STEPS, out='kept', save_every=3, "
       "callbacks=(ftlab.Monitor(every=3),)MORE); print('steps:', len(run.log))")
PAGES = dict( # of runs that are watched, interrupted, killed
    watch=(LOAD, "run = ftlab.fit(model, tok, data, steps=5000, lr=1e-4, "
           "callbacks=(ftlab.Monitor(every=10),)); ended = time.time()", AFTER),
    interrupt=(LOAD, "run = ftlab.fit(model, tok, data, steps=5000, lr=1e-4)", AFTER),
    kill=(LOAD + "\nprint('pid:', os.getpid())", FIT.replace('STEPS', '200').replace('MORE', '')),
    resume=(LOAD, FIT.replace('STEPS', '200').replace('MORE', ', resume=True')))

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    """JupyterLab as `ftlab lab` starts it, on a copy of the project, behind a token,
    without a screen, and with its first port taken: (address, folder, what it said)"""
    tmp = tmp_path_factory.mktemp('lab with a space')
    root = copy_project(tmp/'project')
    for name, cells in PAGES.items():
        (root/'nbs'/'course'/f'{name}.ipynb').write_text(notebook(*cells))
    (root/'nbs'/'course'/'try.ipynb').write_text(
        notebook("import ftlab\nftlab.chapter('first_light')",
                 'def forgetting(before, after):\n    return sum(after[s] - before[s] for s in '
                 'before)/len(before)\n\nftlab.check(forgetting)',
                 'def forgetting(before, after):\n    return sum(before[s] - after[s] for s in '
                 'before)/len(before)\n\nftlab.check(forgetting)'))
    env = {k: v for k, v in os.environ.items() if k not in ('DISPLAY', 'WAYLAND_DISPLAY', 'JPY_SESSION_NAME')}
    env |= dict(PYTHONPATH=str(root), FTLAB_HOME=str(tmp/'home'), JUPYTER_TOKEN=TOKEN,
                JUPYTER_RUNTIME_DIR=str(tmp/'runtime'), JUPYTER_DATA_DIR=str(tmp/'data'),
                JUPYTER_CONFIG_DIR=str(tmp/'config'), HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
    with socket.socket() as taken, open(tmp/'log', 'w') as log:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = f"import sys; from ftlab.cli import main; sys.exit(main(['lab', '--port', '{port}']))"
        process = subprocess.Popen([sys.executable, '-c', code], cwd=root, env=env, stdout=log,
                                   stderr=log, start_new_session=True)
        try:
            yield address(process, tmp/'log'), root, tmp/'log'
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

def address(process, log:Path) -> str:
    end = time.time() + SLOW/1000
    while time.time() < end and process.poll() is None:
        if found := re.search(r'http://127\.0\.0\.1:\d+/', log.read_text()):
            return found[0]
        time.sleep(.3)
    pytest.fail(f'JupyterLab did not start:\n{log.read_text()[-2000:]}')

@pytest.fixture(scope='module')
def browser():
    with api.sync_playwright() as p:
        try:
            b = p.chromium.launch(executable_path=CHROMIUM,
                                  args=['--no-sandbox', '--disable-gpu', '--disable-quic',
                                        '--no-first-run', '--disable-background-networking'])
        except api.Error as e:
            pytest.skip(f'no Chromium: {str(e).splitlines()[0]}')
        yield b
        b.close()

@pytest.fixture
def page(browser, lab):
    page = browser.new_page(viewport=dict(width=1200, height=900))
    page.set_default_timeout(SLOW)
    page.errors, page.remote = [], []
    page.on('pageerror', lambda e: page.errors.append(str(e)))
    page.on('request', lambda r: page.remote.append(r.url) if r.url.startswith('http')
                       and not r.url.startswith(lab[0]) else None)
    yield page
    page.close()

def opened(page, lab, path:str=''):
    page.goto(f'{lab[0]}{path}?token={TOKEN}' + '&reset'*bool(path), wait_until='domcontentloaded')

def run_all(page):
    page.wait_for_selector('.jp-Notebook .jp-Cell')
    # before the kernel is there JupyterLab would ask for one
    page.wait_for_selector('#jp-main-statusbar :text("| Idle")')
    page.click('.lm-MenuBar-itemLabel:text-is("Run")')
    page.click('.lm-Menu-itemLabel:text-is("Run All Cells")')

def shot(page, name):
    if folder := os.environ.get('SHOTS'):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f'{folder}/{name}.png')

def test_a_taken_port_and_no_screen_are_told_and_survived(lab):
    said = lab[2].read_text()
    assert (re.search(r'ftlab: port \d+ is taken; using \d+', said)
            and lab[0].split(':')[-1].strip('/') == re.search(r'using (\d+)', said)[1])

def test_it_opens_on_the_start_page_and_goes_to_a_chapter(page, lab):
    opened(page, lab)
    page.wait_for_selector('.jp-MarkdownViewer h1')
    shot(page, 'start')
    assert ('Begin with First light' in page.inner_text('.jp-MarkdownViewer')
            and page.locator('.jp-MarkdownViewer table').count() == 2)
    page.wait_for_function("document.querySelector('.jp-MarkdownViewer img')?.naturalWidth > 0")
    page.locator('.jp-MarkdownViewer a', has_text='First light').first.click()
    page.wait_for_selector('.jp-Notebook .jp-Cell')
    page.wait_for_function("location.pathname.endsWith('/nbs/course/first_light.ipynb')")
    assert not page.errors and not page.remote

def test_an_exercise_answers_and_the_start_page_remembers(page, lab):
    opened(page, lab, 'lab/tree/nbs/course/try.ipynb')
    run_all(page)
    page.wait_for_selector('.jp-OutputArea-output:has-text("Right:")')
    shot(page, 'exercise')
    said = page.locator('.jp-Notebook .jp-OutputArea-output').all_inner_texts()
    assert ('Chapter 1 of' in said[0] and 'Not yet: forgetting. ' in said[1]
            and 'The sign is turned round' not in said[2])
    opened(page, lab, 'lab/tree/start.md')
    page.wait_for_selector('.jp-MarkdownViewer h1')
    assert 'Continue with First light: 4 exercises, 1 solved' in page.inner_text('.jp-MarkdownViewer')
    page.reload(wait_until='domcontentloaded')
    page.wait_for_selector('.jp-MarkdownViewer h1')
    assert '1 of 4' in page.inner_text('.jp-MarkdownViewer')

def test_the_quiz_says_where_to_begin(page, lab):
    from ftlab.map import CHAPTERS, questions
    opened(page, lab, 'lab/tree/nbs/course/start.ipynb')
    run_all(page)
    page.wait_for_selector('.widget-radio-box input')
    assert page.locator('.widget-radio-box').count() == len(questions())
    for i, q in enumerate(questions()):
        pick = q.options[0] if i < 1 else q.options[1]
        page.locator('.widget-radio-box').nth(i).locator('label', has_text=pick).click()
    page.wait_for_selector(f'.widget-html:has-text("Begin with {CHAPTERS[1].title}")')
    assert not page.errors and not page.remote

# ---------- runs

def said(page, text):
    return page.inner_text(f'.jp-OutputArea-output:has-text("{text}")')

def step_of(page) -> int:
    "The step that the picture's alt text tells"
    alt = page.get_attribute('.jp-OutputArea-output img[alt^="Step"]', 'alt')
    return int(re.match(r'Step (\d+) of', alt)[1])

def until(page, test, seconds=120):
    end = time.time() + seconds
    while time.time() < end:
        if test():
            return
        page.wait_for_timeout(100)
    pytest.fail('what was waited for did not come')

def test_the_monitor_draws_and_its_button_ends_the_run(page, lab):
    opened(page, lab, 'lab/tree/nbs/course/watch.ipynb')
    run_all(page)
    page.wait_for_selector('.jp-OutputArea-output img[alt^="Step"]')
    first = step_of(page)
    until(page, lambda: step_of(page) > first + 20)
    shot(page, 'monitor')
    t = time.time()
    page.click('button:has-text("Stop after this step")')
    page.wait_for_selector('.jp-OutputArea-output:has-text("after:")')
    took = time.time() - t
    print(f'stopped {took:.1f} s after the click')
    shot(page, 'monitor_stopped')
    assert ('after: True True False 1' in said(page, 'after:') and took < 30
            and page.locator('button:has-text("Stop after")').count() <= 1) # the next run's
    page.wait_for_selector('.jp-OutputArea-output:has-text("again: 2")')
    until(page, lambda: page.locator('button:has-text("Stop after")').count() == 0)
    assert (page.locator('.jp-OutputArea-output img[alt^="Step"]').count() == 2
            and page.locator('.jp-OutputArea-output:has-text("progress")').count() == 0)
    assert not page.errors and not page.remote

def test_an_interrupted_cell_returns_its_run(page, lab):
    opened(page, lab, 'lab/tree/nbs/course/interrupt.ipynb')
    run_all(page)
    page.wait_for_selector('.jp-OutputArea-output progress')
    page.wait_for_timeout(2000)
    page.click('[data-jp-item-name="interrupt"] button, jp-button[data-command="notebook:interrupt-kernel"]')
    page.wait_for_selector('.jp-OutputArea-output:has-text("after:")')
    assert 'after: True True False 1' in said(page, 'after:')
    page.wait_for_selector('.jp-OutputArea-output:has-text("again: 2")')
    until(page, lambda: page.locator('.jp-OutputArea-output progress').count() == 0)

def test_a_killed_kernel_s_run_is_found_offered_and_taken_up_again(page, lab):
    opened(page, lab, 'lab/tree/nbs/course/kill.ipynb')
    run_all(page)
    page.wait_for_selector('.jp-OutputArea-output:has-text("pid:")')
    kept = lab[1]/'nbs'/'course'/'kept'/'checkpoint.safetensors'
    until(page, kept.exists)
    page.wait_for_timeout(1500)
    os.kill(int(said(page, 'pid:').split(':')[1]), signal.SIGKILL)
    page.wait_for_selector('.jp-Dialog:has-text("restart")')
    page.click('.jp-Dialog button.jp-mod-accept')
    page.wait_for_selector('.jp-Dialog', state='detached')
    run_all(page)
    page.wait_for_selector('.jp-OutputArea-output:has-text("resume=True")')
    shot(page, 'cut_off')
    step = int(re.search(r"'kept' holds this run, cut off at step (\d+) of 200", said(page, 'cut off at'))[1])
    opened(page, lab, 'lab/tree/nbs/course/resume.ipynb')
    run_all(page)
    page.wait_for_selector('.jp-OutputArea-output:has-text("steps: 200")')
    assert (0 < step < 200 and step % 3 == 0
            and page.get_attribute('.jp-OutputArea-output img[alt^="Step"]', 'alt').startswith('Step 200 of 200'))

def test_the_first_chapter_runs_to_its_end(page, lab):
    opened(page, lab, 'lab/tree/nbs/course/first_light.ipynb')
    page.wait_for_selector('.jp-Notebook .jp-Cell')
    page.wait_for_selector('#jp-main-statusbar :text("| Idle")')
    shot(page, 'chapter')
    page.click('.lm-MenuBar-itemLabel:text-is("Kernel")')
    page.click('.lm-Menu-itemLabel:text-is("Restart Kernel and Run All Cells…")')
    page.click('.jp-Dialog button.jp-mod-accept')
    t = time.time()
    page.wait_for_timeout(3000)
    # the last cell has run; the kernel is idle now and then before
    page.wait_for_function("() => /\\[\\d+\\]/.test([...document.querySelectorAll("
                           "'.jp-CodeCell .jp-InputPrompt')].pop()?.innerText)", timeout=3*SLOW)
    print(f'first_light ran to its end in {time.time() - t:.0f} s')
    shot(page, 'chapter_end')
    page.keyboard.press('Control+s')
    page.wait_for_timeout(3000)
    nb = json.loads((lab[1]/'nbs'/'course'/'first_light.ipynb').read_text())
    cells = [dict(kind=c['cell_type'], count=c.get('execution_count'), outputs=c.get('outputs', []),
                  source=''.join(c['source'])) for c in nb['cells']]
    code = [c for c in cells if c['kind'] == 'code']
    assert all(c['count'] for c in code) and not [o for c in code for o in c['outputs'] if o['output_type'] == 'error']
    assert not page.errors and not page.remote
