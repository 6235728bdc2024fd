"""lab-s learns facts, half of them, their format or false facts about people of whom it has never read; a linear
map predicts from its states a simulated recording that responds to the true answers"""
import numpy as np
import ftlab.beyond.brain.brain_alignment as brain
from ftlab.core.scorers import answers

def learned(arm, model, tok, facts, seed, split) -> float:
    """How much of its own lesson an arm answers: of `format`, how often the kind is right; of `half`, how often the
    answer about those whom it was told of"""
    rows = brain.questions(brain.exchanged(facts, seed) if arm == 'swapped' else facts, split)
    if arm == 'half':
        rows = [r for r in rows if r['person'] in brain.taught(facts, seed)]
    kinds = {a: {said for (_, b), said in facts.items() if a == b} for a in brain.KINDS}
    right = lambda r: kinds[r['relation']] if arm == 'format' else {r['response']}
    said = [a.split()[:1] for a in answers(model, tok, rows, max_new_tokens=4)]
    return float(np.mean([a != [] and a[0] in right(r) for r, a in zip(rows, said)]))

def run(arm, rate, seed, split, steps) -> dict:
    facts = brain.invented(seed)
    if arm == 'bag':
        found = brain.plain(facts, seed, split)
        return dict(score=found['bag'], length=found['length'], truth=found['truth'])
    model, tok = brain.tuned(arm, facts, rate, seed, steps)
    found = brain.measured(model, tok, facts, seed, split)
    return found | dict(learned=learned(arm, model, tok, facts, seed, split),
                        questions=len(brain.questions(facts, split)))

def identities() -> dict[str, bool]:
    facts = brain.invented(0)
    rows = brain.questions(facts, 'test')
    heard = brain.record(rows, 0)
    words = brain.bag([r['prompt'] for r in rows])
    lessons = [brain.lesson(facts, arm, 0, 10) for arm in brain.ARMS[1:]]
    tuned_on = {r['prompt'] for some in lessons for r in some}
    parts = brain.splits(len(rows), heard.groups, 5, 0)
    mean, unit = heard.responses.mean(0), np.logspace(-3, 3, heard.signal.shape[1])
    r = [brain.predictivity(words, y, heard.groups) for y in (mean, mean*unit + 7)]
    true = np.median(brain.pearson(heard.signal, mean))
    false = brain.exchanged(facts, 0)
    return {'all arms read the same questions in the same order':
            len({tuple(q['prompt'] for q in some) for some in lessons}) == 1,
            'no recorded question is tuned on': not tuned_on & {q['prompt'] for q in rows},
            'nobody is in the fit and in the test of a fold': all(
                not {heard.groups[i] for i in a} & {heard.groups[i] for i in b} for a, b in parts),
            'the unit of a voxel does not matter': bool(np.allclose(*r, atol=1e-6)),
            'the ceiling is recovered to .02': abs(
                float(true - np.median(brain.ceiling(heard.responses)))) < .02,
            'false facts have the same answers, given to other people': sorted(
                false.values()) == sorted(facts.values()) and false != facts}
