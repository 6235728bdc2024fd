"""The views in a real JupyterLab, by keyboard and by mouse. Needs what test_lab.py needs, whose Lab this is.

FTLAB_SHOTS=folder keeps the screenshots."""
import os, re
from pathlib import Path
import pytest
from test_lab import browser, lab, notebook, opened, page, run_all  # the fixtures, and how one opens and runs

SETUP = '''import ftlab
from ftlab.instruments.compare import Comparison
from ftlab.map import measured
from ftlab.instruments import explore
model, tok = ftlab.load('lab-s'); base, _ = ftlab.load('lab-s'); data = ftlab.data('new-procedure', n=400)
run = ftlab.fit(model, tok, data, steps=40, lr=1e-3, progress=False)'''
VIEWS = dict(tradeoff="explore.tradeoff(Comparison.read(measured('compare_lab_s/result.json')))",
             layers='explore.layers(run)', mask='explore.mask(base, tok, data.train[:16])',
             spectrum='explore.spectrum(run)',
             prices="explore.prices(run.model, tok, data.test[0]['prompt'], data.test[0]['response'], base)",
             side_by_side='explore.side_by_side(run)')

@pytest.fixture
def views(page, lab, request):
    "A notebook with the views that a test names, run; what the console said is kept"
    names = request.param
    (lab[1]/'nbs'/'course'/'views.ipynb').write_text(
        notebook(SETUP, *(f'{n} = {VIEWS[n]}\n{n}' for n in names)))
    said = []
    page.on('console', lambda m: said.append(m.text) if m.type == 'error' else None)
    page.said = said
    opened(page, lab, 'lab/tree/nbs/course/views.ipynb')
    run_all(page)
    for i in range(len(names)):
        page.wait_for_function(f'document.querySelectorAll(".jp-CodeCell")[{i + 1}]'
                               '?.querySelector(".widget-html-content")?.children.length > 0')
    page.wait_for_selector('#jp-main-statusbar :text("| Idle")')
    yield {n: page.locator('.jp-CodeCell').nth(i + 1) for i, n in enumerate(names)}

def alt(view) -> str:
    return view.locator('.widget-html-content img').get_attribute('alt')

def settled(page, view, words:str):
    page.wait_for_function('([e, w]) => e.querySelector(".widget-html-content img")?.alt.includes(w)',
                           arg=[view.element_handle(), words])

def stop(page, view, name, steps):
    "Move the slider of that name by the right arrow"
    view.locator('.widget-inline-hbox', has=page.locator(f'label:text-is("{name}")')).locator(
        '.noUi-handle').first.focus()
    for _ in range(steps):
        page.keyboard.press('ArrowRight')
def shot(view, name):
    if folder := os.environ.get('FTLAB_SHOTS'):
        Path(folder).mkdir(exist_ok=True)
        view.scroll_into_view_if_needed()
        view.screenshot(path=Path(folder)/f'view_{name}.png')

def quiet(page):
    return [m for m in page.said
            if not re.search(r'favicon|WebSocket|Failed to load resource|ERR_', m)]

@pytest.mark.parametrize('views', [['layers']], indirect=True)
def test_a_slider_follows_keys_and_mouse_and_the_last_place_wins(page, views):
    v = views['layers']
    handle = v.locator('.noUi-handle').first
    assert 'At alpha 1,' in alt(v)
    handle.focus()
    for _ in range(12):
        page.keyboard.press('ArrowLeft')
    settled(page, v, 'At alpha 0.4,')
    assert v.locator('.widget-readout').first.inner_text() == '0.40'
    page.keyboard.press('End')
    settled(page, v, 'At alpha 1.5,')
    page.keyboard.press('Home')
    settled(page, v, 'At alpha 0,')
    bar, at = v.locator('.noUi-target').first.bounding_box(), handle.bounding_box()
    y = at['y'] + at['height']/2
    page.mouse.move(at['x'] + at['width']/2, y)
    page.mouse.down()
    for i in range(60):
        page.mouse.move(bar['x'] + bar['width']*(i % 20)/20, y)
    page.mouse.move(bar['x'] + bar['width']*.5, y)
    page.mouse.up()
    last = float(v.locator('.widget-readout').first.inner_text())
    assert .6 < last < .9
    settled(page, v, f'At alpha {last:g},')
    page.wait_for_timeout(1500)
    assert f'At alpha {last:g},' in alt(v)
    shot(v, 'layers')
    assert not page.errors and not page.remote and not quiet(page)

def boxes_and_a_range(page, v):
    "Untick a method, and narrow what may be forgotten"
    assert all(f'5 of {m}' in alt(v) for m in ('full', 'hft', 'lora', 'dft'))
    v.get_by_label('dft').focus()
    page.keyboard.press('Space')
    page.wait_for_function('e => !e.querySelector(".widget-html-content img").alt.includes("dft")',
                           arg=v.element_handle())
    v.locator('.noUi-handle').nth(1).focus()
    for _ in range(20):
        page.keyboard.press('ArrowLeft')
    settled(page, v, 'to 21 points forgotten')
    assert ('full' not in v.locator('table').inner_text()
            and 'lora' in v.locator('table').inner_text())
    shot(v, 'tradeoff')

def buttons_and_a_list(page, v):
    "Choose scores by mouse and keyboard, and another matrix"
    v.get_by_label('gradient').check()
    settled(page, v, 'By gradient, 5%')
    v.get_by_label('magnitude').focus()
    page.keyboard.press('Space')
    settled(page, v, 'By magnitude')
    stop(page, v, 'matrix', 19)
    settled(page, v, 'up of block 2 gets')
    shot(v, 'mask')

@pytest.mark.parametrize('views', [['tradeoff', 'mask', 'spectrum']], indirect=True)
def test_boxes_ranges_and_lists(page, views):
    boxes_and_a_range(page, views['tradeoff'])
    buttons_and_a_list(page, views['mask'])
    v = views['spectrum']
    stop(page, v, 'rank', 1)
    settled(page, v, 'rank 9 keeps')
    stop(page, v, 'matrix', 24)
    settled(page, v, 'model.layers.3.self_attn.o_proj.weight: stable rank')
    shot(v, 'spectrum')
    assert not page.errors and not page.remote and not quiet(page)

@pytest.mark.parametrize('views', [['prices', 'side_by_side']], indirect=True)
def test_texts_are_taken_over_and_an_error_is_read(page, views):
    v = views['prices']
    box = v.get_by_label('answer')
    shot(v, 'prices')
    box.fill('d a')
    box.press('Enter')
    settled(page, v, "'d a'")
    box.fill(' ')
    box.press('Enter')
    v.locator('pre[role=alert]').wait_for()
    assert 'the answer is empty' in v.locator('pre[role=alert]').inner_text()
    box.fill('a d')
    box.press('Enter')
    settled(page, v, "'a d'")
    v = views['side_by_side']
    stop(page, v, 'example', 6)
    v.locator('td', has_text='backwards').first.wait_for()
    shot(v, 'side_by_side')
    v.get_by_label('or your own prompt').fill('list a b c backwards :')
    page.keyboard.press('Enter')
    v.locator('td', has_text='list a b c backwards :').wait_for()
    assert 'right answer' not in v.locator('table').inner_text()
    assert not page.errors and not page.remote and not quiet(page)
