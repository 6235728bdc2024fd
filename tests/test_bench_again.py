"What a second run of a script of bench/ measures, and what its result file keeps"
import json
import sys

import pytest
from pages import ROOT

sys.path.insert(0, str(ROOT/'bench'))
import slices
import smollm2_sft


@pytest.fixture
def peaks(tmp_path, monkeypatch):
    "`peaks(arms, bytes, cpu)` measures these arms as `slices.py memory` does, and returns the file"
    monkeypatch.setattr(slices, 'FILE', tmp_path/'slices.json')
    slices.FILE.write_text('{"budget": 0.05}')

    def measure(arms, size=100, cpu='a'):
        found = lambda arm: dict(above_model=size, with_model=2*size, trained=5, torch='2')
        monkeypatch.setattr(slices, 'run', found)
        monkeypatch.setattr(slices, 'machine', lambda torch: dict(cpu=cpu, torch=torch))
        slices.main('memory', *arms)
        return json.loads(slices.FILE.read_text())
    return measure


def test_each_peak_says_its_machine_and_those_of_another_are_not_mixed(peaks):
    found = peaks(['lora'])
    assert list(found['peak_bytes']) == ['shira', 'lora'], 'the ratios are to it'
    found = peaks(['lora'], 80)
    assert found['peak_ratio']['above_model'] == dict(shira=1., lora=.8) and found['budget'] == .05
    assert {(b['cpu'], b['torch']) for b in found['peak_bytes'].values()} == {('a', '2')}
    with pytest.raises(SystemExit, match='shira: of another processor or torch'):
        peaks(['lora'], cpu='b')
    assert json.loads(slices.FILE.read_text()) == found
    every = peaks([], cpu='b')
    assert {b['cpu'] for b in every['peak_bytes'].values()} == {'b'}
    assert list(every['peak_bytes']) == [*slices.ARMS, *slices.OTHERS]


def test_the_peaks_of_the_file_are_of_one_machine_and_say_what_trained():
    rows = json.loads((ROOT/'bench'/'results'/'slices.json').read_text())['peak_bytes']
    assert list(rows) == [*slices.ARMS, *slices.OTHERS] and all(b['trained'] for b in rows.values())
    assert len({(b['cpu'], b['torch']) for b in rows.values()}) == 1


def test_a_plan_with_other_steps_is_measured_again():
    plan, timed = smollm2_sft.SPEED[0], smollm2_sft.TIMED
    row = {k: plan[k] for k in timed}
    assert smollm2_sft.lacking([plan], [row], timed) == []
    for k in ('steps', 'timed', 'threads'):
        assert smollm2_sft.lacking([plan], [row | {k: 7}], timed) == [plan]
    kept = json.loads((ROOT/'bench'/'results'/'smollm2_sft.json').read_text())
    left = smollm2_sft.lacking(smollm2_sft.SPEED, kept['speed'], timed)
    assert len(left) == len(smollm2_sft.SPEED) - len(kept['speed'])
