"ul2: what its page cannot say about itself"
import random
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from ftlab.core.batches import collate
from ftlab.core.data import data
from ftlab.core.tokens import encode
from ftlab.methods import dft, lora
from ftlab.trainers.fit import fit
from ftlab.trainers.losses.ul2 import UL2, UL2R, Denoiser, denoise, hidden_spans, split, ul2
from toys import TOK, assert_resumes, classifier, lab_data, label_data, toy

TOY = dict(modes=('A', 'B', 'C'), sentinels=('D', 'E', 'F', '<mask>'))
SETTINGS = dict(steps=4, batch_size=4, lr=1e-3, seed=0, progress=False)
STATE = SimpleNamespace(tok=TOK, pad_id=TOK.pad_token_id, limit=None)


def t5_counts(n, rate, span):
    "Hidden tokens and spans of T5's random_spans_noise_mask"
    noise = int(np.clip(int(round(float(n)*rate)), 1, n - 1))
    return noise, max(int(round(float(noise)/span)), 1)


@pytest.mark.parametrize('how', [d for d in UL2 + UL2R if d.span], ids=str)
@pytest.mark.parametrize('n', [40, 128, 511])
def test_tokens_and_spans_are_as_many_as_in_t5(how, n):
    noise, k = t5_counts(n, how.rate, how.span)
    for seed in range(10):
        spans = hidden_spans(n, how, random.Random(seed))
        assert len(spans) == k and sum(b - a for a, b in spans) == noise
        flat = [x for s in spans for x in s]
        assert flat == sorted(set(flat)) and flat[0] > 0 and flat[-1] == n


def test_every_choice_of_spans_is_equally_likely():
    "Three hidden tokens in two spans and five kept in two: 2 x 4 ways"
    how, rng, seen = Denoiser('R', 1, 1.5, 3/8), random.Random(0), {}
    for _ in range(8000):
        spans = tuple(hidden_spans(8, how, rng))
        seen[spans] = seen.get(spans, 0) + 1
    assert len(seen) == 8 and all(abs(v - 1000) < 150 for v in seen.values())


def test_the_end_is_cut_anywhere():
    cuts = {hidden_spans(6, UL2R[0], random.Random(s))[0] for s in range(200)}
    assert cuts == {(i, 6) for i in range(1, 6)}


@pytest.mark.parametrize('mixture, mean', [(UL2, .25), (UL2R, .5)])
def test_the_mean_length_of_a_hidden_end(mixture, mean):
    "A quarter of the text in UL2 (its table 1), anywhere in UL2R"
    how, = (d for d in mixture if d.mode == 'S')
    cut = [hidden_spans(400, how, random.Random(s))[0] for s in range(4000)]
    hidden = [b - a for a, b in cut]
    assert abs(sum(hidden)/4000/400 - mean) < .01
    assert min(hidden) < 5 and abs(max(hidden)/400 - 2*mean) < .02


def test_half_of_ul2r_is_s_and_a_quarter_each_r_and_x():
    share = {m: sum(d.weight for d in UL2R if d.mode == m) for m in 'RSX'}
    assert share == dict(R=2, S=4, X=2)


def t5_mask(length, density, span, shuffle):
    """random_spans_noise_mask of google-research/text-to-text-transfer-transformer, commit 0068fa7,
    t5/data/preprocessors.py, in numpy, with its 32-bit floats"""
    n = max(length, 2)
    noise = int(np.round(np.float32(n)*np.float32(density)))
    noise = min(max(noise, 1), n - 1)
    k = max(int(np.round(np.float32(noise)/np.float32(span))), 1)

    def segments(items, parts):
        first = np.pad(shuffle((np.arange(items - 1) < parts - 1).astype(int)), (1, 0))
        return np.bincount(np.cumsum(first))
    gone, kept = segments(noise, k), segments(n - noise, k)
    starts = np.cumsum(np.stack([kept, gone], 1).reshape(-1))[:-1]
    return (np.cumsum(np.bincount(starts, minlength=n)) % 2 == 1)[:length]


@pytest.mark.parametrize('how', [d for d in UL2 + UL2R if d.span], ids=str)
def test_masks_are_among_those_of_t5(how):
    """As many hidden tokens and spans as T5's own function, but for three lengths at which 32-bit numbers round
    up; on short texts the same masks"""
    rng = np.random.default_rng(0)
    for n in range(2, 600):
        theirs = t5_mask(n, how.rate, how.span, rng.permutation)
        ours = hidden_spans(n, how, random.Random(n))
        if how.rate == .15 and n in (190, 350, 390):
            assert sum(b - a for a, b in ours) == theirs.sum() - 1
            continue
        assert sum(b - a for a, b in ours) == theirs.sum(), n
        assert len(ours) == (np.diff(theirs.astype(int)) == 1).sum() + theirs[0], n
    n = 9
    draws = {tuple(t5_mask(n, how.rate, how.span, rng.permutation)) for _ in range(500)}
    mine = set()
    for seed in range(500):
        spans = hidden_spans(n, how, random.Random(seed))
        mine.add(tuple(any(a <= i < b for a, b in spans) for i in range(n)))
    assert mine == draws


@pytest.mark.parametrize('n', [2, 3, 5])
def test_short_texts_keep_and_hide_something(n):
    for how in UL2 + UL2R:
        for seed in range(20):
            spans = hidden_spans(n, how, random.Random(seed))
            assert 0 < sum(b - a for a, b in spans) < n


def test_the_example_of_t5():
    "'X these truths Y self evident Z' of the official docstring, as inputs and answers"
    words = 'We hold these truths to be self evident that'.split()
    seen, gone = split(words, [(2, 4), (6, 8)], ['X', 'Y'])
    assert ' '.join(seen) == 'We hold X to be Y that'
    assert ' '.join(gone) == 'X these truths Y self evident'


def written(how, modes=TOY['modes'], row=None):
    batch = collate([encode(row or lab_data().train[0], TOK, 'text')], TOK.pad_token_id)
    new = denoise((how,), modes, TOY['sentinels'])(batch, STATE)
    return batch['input_ids'][0].tolist(), new['input_ids'][0].tolist(), new['labels'][0].tolist()


@pytest.mark.parametrize('how, mode', [(UL2R[1], 'A'), (UL2R[0], 'B'), (UL2R[3], 'C')])
def test_mode_text_answer_and_what_has_a_loss(how, mode):
    old, new, labels = written(how)
    assert new[0] == TOK.bos_token_id and TOK.decode(new[1]) == mode
    assert new[-1] == TOK.eos_token_id == labels[-1]
    first = next(i for i, y in enumerate(labels) if y != -100)
    assert labels[first:] == new[first:], 'the answer and its end have a loss, and nothing else'
    text, answer = new[2:first], new[first:-1]
    marks = TOK.convert_tokens_to_ids(list(TOY['sentinels']))
    if how.span is None:
        assert text + answer == old[1:-1]
    else:
        assert answer[0] == marks[0]
        gaps, own = {}, None
        for i in answer:
            if i in marks:
                own = gaps.setdefault(i, [])
            else:
                own.append(i)
        assert [x for i in text for x in gaps.get(i, [i])] == old[1:-1]


def test_without_modes_the_end_is_plain_training_on_it():
    old, new, labels = written(UL2R[0], modes=None)
    assert new == old and set(labels[:2]) == {-100}


class Seen:
    "Keeps all batches"

    def __init__(self):
        self.batches = []

    def after_step(self, state):
        self.batches += state.batches


def test_the_shares_of_the_mixture_are_met():
    seen = Seen()
    fit(toy(), TOK, lab_data(), ul2(**TOY), callbacks=(seen,),
        **SETTINGS | dict(steps=60, batch_size=16))
    ids = torch.tensor(TOK.convert_tokens_to_ids(list(TOY['modes'])))
    modes = torch.cat([b['input_ids'][:, 1] for b in seen.batches])
    share = (modes[:, None] == ids).float().mean(0).tolist()
    assert [abs(a - b) < .06 for a, b in zip(share, (1/4, 1/2, 1/4))] == [True]*3


def test_the_window_of_the_model_is_kept():
    seen, rows = Seen(), [dict(text=' '.join('abcdefgh'*10))]*8
    for limit in (40, 12):
        fit(toy(), TOK, data(dict(train=rows, validation=rows[:2], test=rows[:2])),
            ul2((Denoiser('X', 1, 12, .5),), **TOY), callbacks=(seen,), max_length=limit,
            **SETTINGS)
        assert seen.batches[-1]['input_ids'].shape[1] <= limit


def test_a_run_that_was_cut_off_goes_on_alike(tmp_path):
    def run(**more):
        return fit(toy(), TOK, lab_data(), ul2(**TOY), **SETTINGS | more)
    assert_resumes(run, tmp_path/'run')


def test_losses_and_changes_of_other_papers_go_with_it():
    assert fit(toy(), TOK, lab_data(), lora(r=2)*dft()*ul2(**TOY), **SETTINGS).log


def test_errors_say_what_is_wrong():
    for wrong in (dict(mixture=()), dict(modes=('A', 'B')), dict(sentinels=())):
        with pytest.raises(ValueError, match='three modes or None'):
            ul2(**wrong)
    for bad in (Denoiser('Q', 1, 3), Denoiser('R', 0, 3), Denoiser('R', 1, 3, 1.),
                Denoiser('X', 1, .5)):
        with pytest.raises(ValueError, match='is no denoiser'):
            ul2((bad,))
    with pytest.raises(ValueError, match='no token .*add_tokens'):
        fit(toy(), TOK, lab_data(), ul2(), **SETTINGS)
    with pytest.raises(ValueError, match='gaps and there are 1 sentinels'):
        one = ul2((Denoiser('X', 1, 1, .5),), TOY['modes'], ('D',))
        fit(toy(), TOK, lab_data(), one, **SETTINGS)
    for more in (dict(packing=True), dict(model=classifier())):
        d = label_data() if 'model' in more else lab_data()
        with pytest.raises(ValueError, match='one row a line'):
            fit(more.pop('model', toy()), TOK, d, ul2(**TOY), **SETTINGS | more)
