"""What must be exact in UL2: the counts and the draw of T5's spans, that nothing of a text is lost, and which tokens
have a loss"""
import random
from types import SimpleNamespace
import ftlab
from ftlab.core.batches import collate
from ftlab.core.scorers import WORLD
from ftlab.core.tokens import IGNORE, encode
from ftlab.trainers.losses.ul2 import MODES, SENTINELS, UL2, UL2R
from ftlab.trainers.losses.ul2 import Denoiser, denoise, hidden_spans, split

GAPPED = [d for d in UL2 + UL2R if d.span]

def t5_counts(n, rate, span) -> tuple[int, int]:
    "Hidden tokens and spans, as T5's random_spans_noise_mask counts them"
    noise = min(max(int(round(n*rate)), 1), n - 1)
    return noise, max(int(round(noise/span)), 1)

def counts_agree() -> bool:
    for how in GAPPED:
        for n in (64, 128, 512, 1024):
            spans = hidden_spans(n, how, random.Random(n))
            if (sum(b - a for a, b in spans), len(spans)) != t5_counts(n, how.rate, how.span):
                return False
    return True

def draws_agree() -> bool:
    "Three hidden tokens in two spans, five kept tokens in two: each of the 2 x 4 ways is as likely"
    how, rng, seen = Denoiser('R', 1, 1.5, 3/8), random.Random(0), {}
    for _ in range(8000):
        spans = tuple(hidden_spans(8, how, rng))
        seen[spans] = seen.get(spans, 0) + 1
    return len(seen) == 8 and all(abs(n - 1000) < 150 for n in seen.values())

def nothing_is_lost() -> bool:
    ids, marks = list(range(512)), list(range(1000, 1100))
    for how in GAPPED:
        seen, gone = split(ids, hidden_spans(512, how, random.Random(1)), marks)
        gaps, own = {}, None
        for i in gone:
            if i >= 1000:
                own = gaps.setdefault(i, [])
            else:
                own.append(i)
        if [x for i in seen for x in gaps.get(i, [i])] != ids:
            return False
    return True

def mixtures_agree() -> bool:
    "UL2R is half S, a quarter R, a quarter X; the end that S hides is a quarter of a text in UL2, half in UL2R"
    share = [sum(d.weight for d in UL2R if d.mode == m)/sum(d.weight for d in UL2R) for m in 'SRX']
    rng, mean = random.Random(0), []
    for mixture in (UL2, UL2R):
        how, = (d for d in mixture if d.mode == 'S')
        cuts = [hidden_spans(400, how, rng)[0] for _ in range(4000)]
        mean.append(sum(b - a for a, b in cuts)/4000/400)
    return share == [.5, .25, .25] and abs(mean[0] - .25) < .01 and abs(mean[1] - .5) < .02

def identities() -> dict[str, bool]:
    _, tok = ftlab.load('lab-s', add_tokens=[*MODES, *SENTINELS])
    state = SimpleNamespace(tok=tok, pad_id=tok.pad_token_id, limit=None)
    row = encode(WORLD.rows('reverse', 1, 'train', 20)[0], tok, 'text')
    batch = collate([row], tok.pad_token_id)
    plain = denoise((UL2R[0],), None, SENTINELS)(batch, state)
    named = denoise((UL2R[3],), MODES, SENTINELS)(batch, state)
    x, y = (named[k][0].tolist() for k in ('input_ids', 'labels'))
    first = x.index(tok.convert_tokens_to_ids(SENTINELS[0]))
    first = x.index(x[first], first + 1)
    return {'hidden tokens and spans are as many as in T5': counts_agree(),
            'all ways to place the spans are equally likely': draws_agree(),
            'the shares of UL2R and the mean length of a hidden end are the papers\'':
            mixtures_agree(),
            'gaps put back give the text': nothing_is_lost(),
            'without modes, the end of a text as target leaves the tokens alone':
            plain['input_ids'][0].tolist() == row['input_ids'],
            'the answer with its sentinels and the end mark have a loss, and nothing else':
            y == [IGNORE]*first + x[first:],
            'the mode token follows the first token': x[1] == tok.convert_tokens_to_ids(MODES[2])}
