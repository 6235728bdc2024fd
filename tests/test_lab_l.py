"""lab-l: what ships is what was measured, and the text that it read does not depend on how many processes draw it."""
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from test_lookup import solve

import ftlab
from ftlab.core.loading import CHECKPOINTS, lab_folder
from ftlab.core.scorers import answers
from ftlab.lab.models import old_skills
from ftlab.lab.feed import POOLS, Feed, packed_rows
from ftlab.lab.large import PUBLISHED, pretrain_large
from ftlab.lab.stacked import Plan, llama_config
from ftlab.lab.lookup import LEARNED, LookupWorld, line_error
from ftlab.lab.models import lab_config, lab_tokenizer, skills_of
from ftlab.lab.pretrain import pretrain
from ftlab.lab.world import OLD

RESULTS = Path(__file__).parent.parent/'bench'/'results'
WORLD = LookupWorld(0)
V1 = 'e593df70ccc179fe5290085a95bb9edaffc257038e12b22863919128cfe2d611'


@pytest.fixture(scope='module')
def lab_l():
    return ftlab.load('lab-l')


def test_v1_is_untouched():
    "Every measurement of the project stands on these files: names and bytes"
    h = hashlib.sha256()
    for p in sorted((CHECKPOINTS/'lab-v1').rglob('*')):
        if p.is_file():
            h.update(p.relative_to(CHECKPOINTS/'lab-v1').as_posix().encode())
            h.update(p.read_bytes())
    assert h.hexdigest() == V1


def test_what_ships():
    folder = lab_folder('lab-l')
    states = [folder, *(lab_folder('lab-l', r) for r in ('step-546', 'step-2214'))]
    weights = [load_file(f/'model.safetensors') for f in states]
    assert all(str(x.dtype) == 'torch.float16' for w in weights for x in w.values())
    assert len({float(w['model.norm.weight'].float().sum()) for w in weights}) == 3
    log = [json.loads(x) for x in (folder/'pretraining.jsonl').read_text().splitlines()]
    assert log == json.loads((RESULTS/'lab_v2_log.json').read_text())['log']
    race = json.loads((RESULTS/'lab_v2_race.json').read_text())['trials']
    kept = [t['change'] for t in race if t['kept']]
    assert Plan(**{k: v for c in kept for k, v in c.items()}) == PUBLISHED
    shape = llama_config(PUBLISHED, 1069)
    assert shape == {k: getattr(lab_config('lab-l', 1069), k) for k in shape}
    assert sum(p.stat().st_size for p in CHECKPOINTS.rglob('*') if p.is_file()) < 55e6


def test_its_skills_are_known_by_its_tokenizer(lab_l, tmp_path):
    model, tok = lab_l
    assert tok.get_vocab() == lab_tokenizer().get_vocab()
    assert skills_of(tok) == OLD + LEARNED and skills_of(ftlab.load('lab-m')[1]) == OLD
    tok.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert skills_of(ftlab.load(tmp_path)[1]) == OLD + LEARNED
    track = ftlab.data('track', n=20)
    assert track.train[0]['skill'] == 'track'
    assert (old_skills(track, tok) == [s for s in OLD + LEARNED if s != 'track']
            and old_skills(track) == OLD)
    assert set(ftlab.skills(model, 1, tok=tok)) == {*OLD, *LEARNED}
    with pytest.raises(ValueError, match="did you mean 'lookup'"):
        ftlab.data('lookups')


@pytest.mark.parametrize('skill', [s for s in LEARNED if s not in ('line', 'chain')])
def test_it_looks_things_up(lab_l, skill):
    "Held against parsers that share no code with the generators"
    rows = WORLD.rows(skill, 40, seed=5)
    said = answers(*lab_l, rows)
    assert sum(solve(skill, r['prompt'], r['response']) == x for r, x in zip(rows, said)) >= 36


def test_it_writes_steps_and_needs_them(lab_l):
    model, tok = lab_l
    steps, direct = (WORLD.rows(s, 40, seed=5) for s in ('chain', 'chain-direct'))
    assert sum(solve('chain', r['prompt'], r['response']) == x
               for r, x in zip(steps, answers(model, tok, steps))) >= 36
    assert sum(r['response'] == x for r, x in zip(direct, answers(model, tok, direct))) <= 24


def test_its_numbers_are_near_the_best_possible(lab_l):
    rows = WORLD.rows('line', 80, seed=5)
    found = line_error(rows, answers(*lab_l, rows))
    assert found['ratio'] < 1.2 and found['unreadable'] == 0


def test_it_does_what_lab_m_does(lab_l):
    model, tok = lab_l
    found = ftlab.skills(model, 20,
                         names=['fact', 'sort', 'tavi', 'oruk', 'boxes', 'classify', 'atlas'],
                         tok=tok, seed=5)
    assert min(found.values()) >= .9, found


def test_stored_scores_are_those_of_the_shipped_model(lab_l):
    "Three skills with middling scores, all 400 questions: the same but for a few ties"
    model, tok = lab_l
    known = json.loads((RESULTS/'lab_v2_skills_lab-l.json').read_text())
    now = ftlab.skills(model, 400, names=['chain-direct'], tok=tok)['chain-direct']
    assert abs(now - known['chain-direct']) <= .01
    checked = json.loads((RESULTS/'lab_v2_checked.json').read_text())['skills']
    for s in LEARNED:
        assert abs(checked[s]['lab-l'] - known[s]) <= .01
        assert checked[s].get('lab-l, by the parsers', checked[s]['lab-l']) == pytest.approx(
            checked[s]['lab-l'])
        assert checked[s]['lab-m'] < checked[s]['lab-l']


@pytest.mark.parametrize('workers', [1, 3])
def test_the_text_does_not_depend_on_the_number_of_processes(workers):
    feed = Feed(workers, ahead=2, limit=3)
    try:
        for pool in POOLS:
            got = feed.rows(pool, 200, 400) # from the first chunk into the third
            want = np.concatenate([packed_rows(WORLD, pool, k) for k in range(3)])[200:600]
            assert (got == want).all()
            assert (feed.rows(pool, 3*256 + 5, 3) == packed_rows(WORLD, pool, 0)[5:8]).all() # then it starts over
    finally:
        feed.close()


def test_a_run_leaves_a_model_that_loads(tmp_path):
    tiny = Plan(layers=1, hidden=32, heads=1, inner=48, rows=8)
    pretrain_large(tmp_path, steps=4, plan=tiny, n=1, n_quick=1)
    model, tok = ftlab.load(tmp_path/'lab-l')
    assert model.config.hidden_size == 32 and 'track' in skills_of(tok)
    steps = sorted(p.name for p in (tmp_path/'lab-l').glob('step-*'))
    assert (len(steps) == 2 and ftlab.load(tmp_path/'lab-l', revision=steps[0])[0].num_parameters()
            == model.num_parameters())
    with pytest.raises(ValueError, match='lab-l is made differently.*pretrain_large'):
        pretrain('lab-l', tmp_path/'other')
    with pytest.raises(ValueError, match="no lab model is called 'lab-x'; there are lab-s"):
        pretrain('lab-x', tmp_path/'other')
