"""Conjugate prompting in two languages: lab-l is tuned on stories in one, and asked in another.

    python bench/two_languages.py       # writes bench/results/two_languages.json, about 7 CPU-minutes

lab-l answers questions about a story in English, tavi and oruk, and labels words by example in
English and tavi. It is fine-tuned in one language on stories of the skill `story` with another answer:
the first word of the story (`first`), or one sentence for all (`refuse`). Then it gets the old
questions as they were, and as conjugate prompts: translated, answered, the answer translated back.

Ways to ask, each also of the untuned model (which is what the way itself costs):
`direct`: in the language of the tuning.
`renamed`: in the same language, each noun, verb and adjective replaced by the next of its kind. This
gives another story of the same kind, so nothing should come back: it shows the noise of the reading.
`tavi`, `oruk`, `english`: translated. oruk also reverses each sentence; `label` is not asked in it.
At the larger rate lab-l is also tuned in tavi and asked in English: does one of the languages suffer
less from any tuning? (Both rates were planned; the smaller one was left out for time.)
No way tells a language that the model takes for another task from one that the update touches less.

Answers are read in two ways: `exact`, all of the up to three words; and `begins`, the first word, read
in English, tavi or oruk. `back` = (way - direct)/(untuned direct - direct), in shares of right answers:
the part of the loss that comes back, below 0 where the way is worse than asking directly. It is read at
the first evaluation at which half or more of the direct answers are lost, by the same reading.
Questions whose right answer is the first word of the story in any of the languages are left out.

Written before this script had asked a tuned model in another way than directly. Rates and steps were
set by pilots that asked directly, in English, on validation questions (seed 900; at 1e-4 half of
`label` is not lost there). One earlier try is known to us: `first`, 1e-3, 40 questions, where tavi was
no better than English after 8 steps and after 16.

Expected of tavi, for `story` after tuning in English: three tenths of the loss come back (the
catalogue's threshold) as the mean of three seeds, more than nothing on each seed, and a tenth more
than under `renamed`. The idea is borne out in lab-l if that is so for both lessons at both rates, and
in part if for some of the four. Our guess: not for `first`, because of the try; for `refuse` we do not
know. `label`, oruk and the tuning in tavi decide nothing; they are shown.

Added after a first run, which had the exact reading only, and in which the first word of a story in
oruk could be the answer: these questions are left out; `begins`, `refusal` and `other` are stored; and
the two sentences on what `renamed` and the ways can tell. A second reader had asked the models of that
run again before `begins` was added: after `refuse` tavi then brings back .50 instead of .93 at the
larger rate, and .40 and .43 instead of .44 and .73 on two seeds at the smaller."""
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
LANGUAGES = ('english', 'tavi', 'oruk')
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
    others = [k for k in LANGUAGES if k != tuned_in]
    if skill == 'label':
        others.remove('oruk')
    return (dict(direct=(there, home), renamed=(lambda x: there(renamed(x)),
                                                lambda x: named(home(x))))
            | {k: FORMS[k] for k in others})

@cache
def asked(skill:str, seed:int) -> list[dict]:
    "Return the test questions of a seed, in English; in no language is the first word the answer"
    forms = ways(skill, 'english').values()
    rows = [r for r in WORLD.rows(skill, 3*QUESTIONS, 'test', seed)
            if all(home(there(r['prompt']).split()[0]) != r['response'] for there, home in forms)]
    return rows[:QUESTIONS]

def first_word(said:str, home=str) -> set[str]:
    "Return what the first word of an answer may mean: read in each language, then as the way reads it"
    return {home(FORMS[k][1](' '.join(said.split()[:1]))) for k in LANGUAGES}

def shares(model, tok, skill:str, tuned_in:str, seed:int, lesson:str|None=None) -> dict:
    """Return {way: shares of the answers}: `exact` [right, of the lesson], all of the up to three words;
    `begins` [right, of the lesson], the first word in any language; `refusal`, with any word of the
    refusal; `other`, whose first word is right, but in another language than the prompt. The lesson's
    answer is the one to the prompt that was asked, which may be translated."""
    rows, found = asked(skill, seed), {}
    share = lambda each: round(sum(each)/len(rows), 4)
    for way, (there, home) in ways(skill, tuned_in).items():
        said = []

        def ask(prompts, said=said):
            said += answers(model, tok, [dict(prompt=p, response='') for p in prompts], 3)
            return said

        translate = lambda prompts, there=there: [there(p) for p in prompts]
        back = lambda texts, home=home: [home(t) for t in texts]
        got = conjugate(ask, translate, back)([r['prompt'] for r in rows])
        right = [r['response'] for r in rows]
        taught = [LESSONS[lesson](there(r['prompt'])) for r in rows] if lesson else []
        means = [first_word(s, home) for s in said]
        found[way] = dict(
            exact=[share(g == r for g, r in zip(got, right)),
                   share(s == ' '.join(t.split()[:3]) for s, t in zip(said, taught))],
            begins=[share(r in m for m, r in zip(means, right)),
                    share(bool(m & first_word(t, home)) for m, t in zip(means, taught))],
            refusal=share(bool(set(s.split()) & set(NO.split())) for s in said),
            other=share(r in m and s.split()[0] != there(r) for s, m, r in zip(said, means, right)))
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
    return {skill: shares(model, tok, skill, tuned_in, seed) for skill in ('story', 'label')}

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
