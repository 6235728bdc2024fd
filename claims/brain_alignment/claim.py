"""lab-s learns facts about people of whom it has never read, or their format; a linear map predicts from its states a
simulated recording of people who read of them and know the facts, while something else is asked for"""
import numpy as np
import ftlab.beyond.brain.brain_alignment as brain
from ftlab.core.scorers import answers

def right(model, tok, facts, split) -> float:
    "How many questions about these facts a model answers"
    rows = brain.questions(facts, split)
    said = [a.split()[:1] for a in answers(model, tok, rows, max_new_tokens=4)]
    return float(np.mean([a == [r['response']] for r, a in zip(rows, said)]))

def parted(facts) -> tuple[dict, dict]:
    "Facts about people whom lab-s knows, and those about the others"
    old = brain.known(facts)
    return tuple({k: v for k, v in facts.items() if (k[0] in old) == known}
                 for known in (True, False))

def lesson_of(arm) -> str:
    "`format` is told the truth about those whom lab-s knows, as `half` is about half of the people"
    return 'half' if arm == 'format' else arm

def run(arm, rate, seed, split, steps) -> dict:
    facts = brain.acquainted(seed)
    old, new = parted(facts)
    if arm == 'bag':
        found = brain.read_plain(facts, seed, split)
        return dict(read=found['bag'], read_best=found['bag'], read_mean=found['bag'],
                    truth=found['truth'], known=found['known'],
                    score=brain.plain(new, seed, split)['bag'])
    model, tok = brain.tuned(lesson_of(arm), facts, rate, seed, steps, told=brain.known(facts))
    found = brain.read(model, tok, facts, seed, split)
    asked = brain.measured(model, tok, new, seed, split)
    return found | dict(score=asked['score'], reading=asked['reading'], learned=asked['accuracy'],
                        kept=right(model, tok, old, split),
                        sentences=len(brain.mentions(facts, split)))

def identities() -> dict[str, bool]:
    facts = brain.acquainted(0)
    old = brain.known(facts)
    rows = brain.mentions(facts, 'test')
    heard = brain.record(rows, 0, shares=brain.READ)
    words = brain.bag([r['prompt'] for r in rows])
    lessons = [brain.lesson(facts, lesson_of(arm), 0, 10, told=old) for arm in ('facts', 'format')]
    differ = {a['prompt'] for a, b in zip(*lessons) if a != b}
    tuned_on = {r['prompt'] for some in lessons for r in some}
    parts = brain.splits(len(rows), heard.groups, 5, 0)
    mean, unit = heard.responses.mean(0), np.logspace(-3, 3, heard.signal.shape[1])
    r = [brain.predictivity(words, y, heard.groups) for y in (mean, mean*unit + 7)]
    true = np.median(brain.pearson(heard.signal, mean))
    asked = {r['prompt'] for r in brain.questions(facts, 'test')}
    return {'both arms read the same questions in the same order':
            len({tuple(q['prompt'] for q in some) for some in lessons}) == 1,
            'their answers differ about new people alone':
            bool(differ) and not any(w in old for p in differ for w in p.split()),
            'no recorded sentence is tuned on, or asks for a fact that is':
            not (tuned_on | asked) & {q['prompt'] for q in rows}
            and not set(brain.BESIDE) & set(brain.KINDS),
            'nobody is in the fit and in the test of a fold': all(
                not {heard.groups[i] for i in a} & {heard.groups[i] for i in b} for a, b in parts),
            'the unit of a voxel does not matter': bool(np.allclose(*r, atol=1e-6)),
            'the ceiling is recovered to .02': abs(
                float(true - np.median(brain.ceiling(heard.responses)))) < .02}
