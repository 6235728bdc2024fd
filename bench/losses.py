"""Two questions that the first edition of the claims of ASFT and Masked Thought did not ask, on its ground.

    python bench/losses.py           # writes bench/results/losses.json; finished runs are kept there

ASFT: would a KL penalty alone do as well (the paper's third baseline), and does the weight of its
README differ from that of its code? Masked Thought: does the model come to depend more on the
question, as the paper finds? Both were measured after the claims had run, on validation questions
of seeds that no claim uses."""
import json
import platform
import random
from dataclasses import replace
from pathlib import Path

import torch

import ftlab
from ftlab.core.tokens import encode
from ftlab.core.recipe import Recipe
from ftlab.core.scorers import WORLD, exact_match
from ftlab.instruments.bench import kl_to_base as drift
from ftlab.lab.world import LETTERS
from ftlab.trainers.losses.asft import asft
from ftlab.trainers.losses.dft import dft
from ftlab.trainers.losses.masked_thought import masked_thought
from ftlab.trainers.objective import IGNORE, kl_to_base, nll

OUT = Path(__file__).parent/'results'/'losses.json'
SEEDS = (20, 21, 22)
ITEMS = 500
LEANING = 300  # questions in which a letter is swapped


def penalized(weight: float) -> Recipe:
    "Plain fine-tuning with `weight` times KL(base || model)"
    return Recipe(objective=nll() + kl_to_base(weight))


# The rates of ASFT, DFT and plain fine-tuning are those that their claim tuned; SFT + KL gets both, and two weights.
ASFT = {
    'ASFT, weight 0.1': (asft(), 3e-4),
    'ASFT, weight 0.05': (asft(weight=.05), 3e-4),
    'DFT': (dft(), 3e-4),
    'plain': (Recipe(), 1e-4),
    'SFT + KL, weight 0.1, rate 1e-4': (penalized(.1), 1e-4),
    'SFT + KL, weight 0.1, rate 3e-4': (penalized(.1), 3e-4),
    'SFT + KL, weight 0.5, rate 1e-4': (penalized(.5), 1e-4),
    'SFT + KL, weight 0.5, rate 3e-4': (penalized(.5), 3e-4),
}
MASKED = {
    'plain': Recipe(),
    'masks': masked_thought(),
    'random words': masked_thought(noise='random'),
}


def scrambled(seed: int):
    "Lists reversed, the letters of half of the training answers in a random order"
    data, rng = ftlab.data('reverse', seed=seed), random.Random(f'scrambled/{seed}')

    def spoil(row):
        words = row['response'].split()
        if rng.random() >= .5:
            return row
        return dict(row, response=' '.join(rng.sample(words, len(words))))

    return replace(data, train=[spoil(r) for r in data.train])


def anchored(name: str, seed: int) -> dict[str, float]:
    "Gain on held-out questions and KL(base || model) in nats a token, after the claim's training"
    recipe, rate = ASFT[name]
    data = scrambled(seed)
    ask = WORLD.rows('reverse', ITEMS, 'validation', seed)
    base, tok = ftlab.load('lab-s', revision='step-500')
    model, _ = ftlab.load('lab-s', revision='step-500')
    ftlab.fit(model, tok, data, recipe, steps=60, lr=rate, seed=seed, batch_size=32,
              progress=False)
    gain = exact_match(model, tok, ask) - exact_match(base, tok, ask)
    return dict(gain=gain, drift=drift(base, model, tok, ask, data))


@torch.no_grad()
def leaning(model, tok, rows: list[dict], in_answer: bool, rng: random.Random) -> float:
    """Mean change of the predictions after one swapped letter, of the question or of the answer so
    far, in [0, 1]"""
    letters, out = set(tok.convert_tokens_to_ids(LETTERS)), []
    for row in rows:
        coded = encode(row, tok, 'text')
        x, labels = torch.tensor([coded['input_ids']]), coded['labels']
        first = next(i for i, y in enumerate(labels) if y != IGNORE)
        sites = [i for i, w in enumerate(coded['input_ids']) if w in letters
                 and (i >= first) == in_answer]
        i = rng.choice(sites[:-1] if in_answer else sites)  # nothing follows the last letter but the end
        other = x.clone()
        other[0, i] = rng.choice(sorted(letters - {int(x[0, i])}))
        p, q = (model(z).logits[0, max(i, first - 1):-2].softmax(-1) for z in (x, other))
        out.append(float((p - q).abs().sum(-1).mean()/2))
    return sum(out)/len(out)


def dependence(name: str, seed: int) -> dict[str, float]:
    "Right answers, and how much the predictions depend on the question and on the answer so far"
    ask = WORLD.rows('reverse', ITEMS, 'validation', seed)
    model, tok = ftlab.load('lab-s', revision='step-250')
    data = ftlab.data('reverse', seed=seed, n=200)
    ftlab.fit(model, tok, data, MASKED[name], steps=240, lr=3e-4, seed=seed, progress=False)
    swap = {k: leaning(model, tok, ask[:LEANING], k == 'answer', random.Random(seed)) for k in ('question', 'answer')}
    # one swapped letter of a list changes exactly one letter of its reverse, and none after a slip of one's own
    perfect = sum(1/len(r['response'].split()) for r in ask[:LEANING])/LEANING
    return dict(right=exact_match(model, tok, ask), **swap, perfect_question=perfect)


def main() -> None:
    "Run what is missing, one run after another, and write the file after each"
    found = json.loads(OUT.read_text()) if OUT.exists() else dict(asft={}, masked_thought={})
    parts = (('masked_thought', MASKED, dependence), ('asft', ASFT, anchored))
    for seed in SEEDS:
        for part, arms, measure in parts:
            for name in arms:
                kept = found[part].setdefault(name, {})
                if str(seed) in kept:
                    continue
                kept[str(seed)] = {k: round(v, 4) for k, v in measure(name, seed).items()}
                found['settings'] = dict(items=ITEMS, leaning=LEANING, seeds=SEEDS)
                found['versions'] = dict(python=platform.python_version(), torch=torch.__version__)
                OUT.write_text(json.dumps(found, indent=1) + '\n')
                print(part, name, seed, kept[str(seed)], flush=True)


if __name__ == '__main__':
    main()
