"""Conjugate prompting in two languages: lab-l is tuned on stories in one, and asked in another.

    python bench/two_languages.py       # writes bench/results/two_languages.json, about 7 CPU-minutes

lab-l answers questions about a story in English, tavi and oruk, and labels words by example in
English and tavi. It is fine-tuned in one language on stories of the skill `story` with another answer:
the first word of the story (`first`), or one sentence for all (`refuse`). Then it gets the old
questions as they were, and as conjugate prompts: translated, answered, the answer translated back.

Ways to ask, each also of the untuned model (which is what the way itself costs):
`direct`: in the language of the tuning.
`renamed`: in the same language, each noun, verb and adjective replaced by the next of its kind. This
can be undone as well, but does not leave the tuning data.
`tavi`, `oruk`, `english`: translated. oruk also reverses each sentence; `label` is not asked in it.
At the larger rate lab-l is also tuned in tavi and asked in English: is it the distance from the
tuning data that counts, or does one of the languages suffer less from any tuning? (Both rates were
planned; the smaller one was left out for time.)

`back` = (way - direct)/(untuned direct - direct), in shares of right answers: the part of the loss
that comes back, below 0 where the way is worse than asking directly. It is read at the first
evaluation at which half or more of the direct answers are lost. Questions whose right answer is the
story's first word are left out.

Written before any tuned model had been asked in another way than directly. Rates and steps were set
by pilots that asked directly, in English, on validation questions (seed 900; at 1e-4 half of `label`
is not lost there). One earlier try is known to us: `first`, 1e-3, 40 questions, where tavi was no
better than English after 8 steps and after 16.

Expected of tavi, for `story` after tuning in English: three tenths of the loss come back (the
catalogue's threshold) as the mean of three seeds, more than nothing on each seed, and a tenth more
than under `renamed`. The idea is borne out in lab-l if that is so for both lessons at both rates, and
in part if for some of the four. Our guess: not for `first`, because of the try; for `refuse` we do not
know. `label`, oruk and the tuning in tavi decide nothing; they are shown."""
import json
import time
from functools import cache
from pathlib import Path
import torch
import ftlab
from ftlab.core.io import write_atomically
from ftlab.core.record import versions
from ftlab.core.scorers import WORLD, answers
from ftlab.evaluators.mechanisms.conjugate_prompting import conjugate
from ftlab.lab.lookup import from_language, to_language
from ftlab.lab.world import ADJECTIVES, NOUNS, VERBS
from ftlab.trainers.callbacks import Every

SEEDS, QUESTIONS, BATCH = (70, 71, 72), 60, 8
AT = {1e-3: (1, 2, 4, 6, 8), 1e-4: (12, 24, 36, 48, 72)} # evaluations, by rate; the last ends the run
RATES = dict(english=tuple(AT), tavi=(max(AT),)) # by the language of the tuning
NO = 'i can not help with that'
LESSONS = dict(first=lambda prompt: prompt.split()[0], refuse=lambda prompt: NO)
NEXT = {a: b for words in (NOUNS, VERBS, ADJECTIVES) for a, b in zip(words, words[1:] + words[:1])}
OUT = Path(__file__).parent/'results'/'two_languages.json'

def replaced(words:dict[str, str], text:str) -> str:
    return ' '.join(words.get(x, x) for x in text.split())

def reversed_sentences(text:str) -> str:
    return ' . '.join(' '.join(reversed(s.split())) for s in text.split(' . '))

# from English, and back
FORMS = dict(
    english=(str, str),
    tavi=(lambda x: to_language(WORLD, x, 'tavi'), lambda x: from_language(WORLD, x, 'tavi')),
    oruk=(lambda x: to_language(WORLD, reversed_sentences(x), 'oruk'),
          lambda x: from_language(WORLD, x, 'oruk')),
    renamed=(lambda x: replaced(NEXT, x), lambda x: replaced({b: a for a, b in NEXT.items()}, x)))

def ways(skill:str, tuned_in:str) -> dict[str, tuple]:
    "Return {way: (English prompt -> the prompt that is asked, its answer -> the English answer)}"
    there, home = FORMS[tuned_in]
    renamed, named = FORMS['renamed']
    others = [k for k in ('english', 'tavi', 'oruk') if k != tuned_in]
    if skill == 'label':
        others.remove('oruk')
    return (dict(direct=(there, home), renamed=(lambda x: there(renamed(x)),
                                                lambda x: named(home(x))))
            | {k: FORMS[k] for k in others})

@cache
def asked(skill:str, seed:int) -> list[dict]:
    "Return the test questions of a seed, in English"
    rows = WORLD.rows(skill, 2*QUESTIONS, 'test', seed)
    return [r for r in rows if r['response'] != r['prompt'].split()[0]][:QUESTIONS]

def shares(model, tok, skill:str, tuned_in:str, seed:int, lesson:str|None=None) -> dict:
    """Return {way: [share of right answers, share of answers of the lesson]}. The lesson's answer is
    the one to the prompt that was asked, which may be translated."""
    rows, found = asked(skill, seed), {}
    for way, (there, home) in ways(skill, tuned_in).items():
        said = []

        def ask(prompts, said=said):
            said += answers(model, tok, [dict(prompt=p, response='') for p in prompts], 3)
            return said

        translate = lambda prompts, there=there: [there(p) for p in prompts]
        back = lambda texts, home=home: [home(t) for t in texts]
        got = conjugate(ask, translate, back)([r['prompt'] for r in rows])
        right = sum(g == r['response'] for g, r in zip(got, rows))
        taught = [LESSONS[lesson](there(r['prompt'])) for r in rows] if lesson else []
        as_taught = sum(s == ' '.join(t.split()[:3]) for s, t in zip(said, taught))
        found[way] = [round(right/len(rows), 4), round(as_taught/len(rows), 4)]
    return found

def one(lesson:str, rate:float, tuned_in:str, seed:int) -> list[dict]:
    "Fine-tune once; return the shares on the way"
    model, tok = ftlab.load('lab-l')
    there, answer = FORMS[tuned_in][0], LESSONS[lesson]
    told = [there(r['prompt']) for r, _ in zip(WORLD.stream('story', 'train', seed),
                                               range(BATCH*AT[rate][-1]))]

    def measure(state):
        if state.step == 0:
            return {} # the untuned model is asked once for all runs of a seed
        return {skill: shares(state.model, tok, skill, tuned_in, seed, lesson)
                for skill in ('story', 'label')}

    run = ftlab.fit(model, tok, dict(train=[dict(prompt=p, response=answer(p)) for p in told]),
                    ftlab.methods.full(), steps=AT[rate][-1], batch_size=BATCH, lr=rate, seed=seed,
                    progress=False, callbacks=[Every(set(AT[rate]), measure)])
    return run.path[1:]

def untuned(tuned_in:str, seed:int) -> dict:
    model, tok = ftlab.load('lab-l')
    found = {skill: shares(model, tok, skill, tuned_in, seed) for skill in ('story', 'label')}
    return {skill: {way: right for way, (right, _) in of.items()} for skill, of in found.items()}

def main() -> None:
    torch.set_num_threads(1)
    new = dict(untuned={}, runs={}, cpu_seconds=0.)
    kept = json.loads(OUT.read_text()) if OUT.exists() else new
    before = kept['cpu_seconds']

    def write():
        result = kept | dict(
            model='lab-l', seeds=SEEDS, questions=QUESTIONS, batch_size=BATCH, threads=1,
            cpu_seconds=round(before + time.process_time(), 1), versions=versions())
        write_atomically(OUT, lambda tmp: tmp.write_text(json.dumps(result) + '\n'))

    for tuned_in in RATES:
        for seed in SEEDS: # an interrupted run of this script goes on
            of = kept['untuned'].setdefault(tuned_in, {})
            if str(seed) not in of:
                of[str(seed)] = untuned(tuned_in, seed)
            for lesson in LESSONS:
                for rate in RATES[tuned_in]:
                    of = kept['runs'].setdefault(tuned_in, {}).setdefault(lesson, {})
                    of = of.setdefault(f'{rate:g}', {})
                    if str(seed) not in of:
                        of[str(seed)] = one(lesson, rate, tuned_in, seed)
                        print(seed, tuned_in, lesson, rate, time.process_time(), flush=True)
                        write()

if __name__ == '__main__':
    main()
