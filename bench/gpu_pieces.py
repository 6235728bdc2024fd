"""What the parts of `gpu.py` share: pieces that run one by one, and the clock.

A piece is written down as soon as it is over."""
import argparse
import json
import statistics
import sys
import time
import traceback
from pathlib import Path

def arguments() -> argparse.Namespace:
    "The command line of a part: which pieces, where to write, on which device, how large"
    p = argparse.ArgumentParser()
    p.add_argument('pieces', nargs='*', help='names of pieces; none: all')
    p.add_argument('--to', type=Path, required=True, help='file that gets a line of JSON for each piece')
    p.add_argument('--device', default='cuda')
    p.add_argument('--tiny', action='store_true', help='sizes at which a CPU is done in a moment')
    p.add_argument('--warm', action='store_true', help='run everything once, so that what is compiled is kept')
    return p.parse_args()

def note(path: Path, row: dict) -> None:
    "Append one line; a reader sees whole lines only"
    with path.open('a') as f:
        f.write(json.dumps(row) + '\n')
        f.flush()

def tail(text: str, size: int = 1500) -> str:
    "The end of a long text"
    return text if len(text) <= size else '...' + text[-size:]

def run_pieces(
    pieces: dict,                # name -> function(args) -> dict of what was found
    args: argparse.Namespace,    # as `arguments` gives it
    broken=lambda: False,        # after a failure: is this process of no more use?
) -> None:
    """Run what `args.pieces` names, or all; one that fails is written down, and the next one runs;
    ends with 1 if any failed"""
    failed = False
    for name in args.pieces or list(pieces):
        note(args.to, dict(piece=name, state='begun'))
        start = time.perf_counter()
        try:
            found = dict(pieces[name](args) or {})
            row = dict(piece=name, state=found.pop('state', 'passed'), **found)
        except Exception:
            row = dict(piece=name, state='failed', why=tail(traceback.format_exc()))
        note(args.to, row | dict(seconds=round(time.perf_counter() - start, 2)))
        failed = failed or row['state'] == 'failed'
        if row['state'] == 'failed' and broken():
            sys.exit(3)  # an error of the card stays with the process: the rest runs in a fresh one
    sys.exit(int(failed))

def card_is_broken() -> bool:
    "Does the card still answer this process?"
    try:
        import torch
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception:
        return True
    return False

# --- the clock

def quartiles(ms: list) -> dict:
    "Median and quartiles of milliseconds"
    if len(ms) < 2:
        ms = list(ms)*2
    low, median, high = statistics.quantiles(ms, n=4)
    return dict(low_ms=round(low, 4), median_ms=round(median, 4), high_ms=round(high, 4))

class Clock:
    "Times of calls on a device: by events on a GPU, by the system's clock on a CPU"
    def __init__(self, device: str):
        import torch
        self.torch = torch
        self.cuda = torch.device(device).type == 'cuda'
        size = torch.cuda.get_device_properties(device).L2_cache_size if self.cuda else 0
        self.flusher = torch.empty(2*size, dtype=torch.uint8, device=device) if self.cuda else None

    def flush(self) -> None:
        "Push out of the second-level cache whatever the last call left there"
        if self.cuda:
            self.flusher.zero_()

    def once(self, call) -> float:
        "Milliseconds of one call"
        if not self.cuda:
            start = time.perf_counter()
            call()
            return 1e3*(time.perf_counter() - start)
        first, last = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        self.torch.cuda.synchronize()
        first.record()
        call()
        last.record()
        self.torch.cuda.synchronize()
        return first.elapsed_time(last)

    def peak(self, call) -> int | None:
        """Bytes that a call took on the GPU at its highest,
        above what was held before; None on a CPU"""
        if not self.cuda:
            return None
        self.torch.cuda.synchronize()
        start = self.torch.cuda.memory_allocated()
        self.torch.cuda.reset_peak_memory_stats()
        call()
        self.torch.cuda.synchronize()
        return self.torch.cuda.max_memory_allocated() - start

    def compare(
        self,
        contestants: dict,       # name -> (function, bytes that must be read and written, or None)
        seconds: float = 4.,     # for all of them together
        most: int = 25,          # rounds
    ) -> list[dict]:
        """Every contestant in turn, round after round: a row each;
        one that fails has its error in its row"""
        rows, able, cost = [], {}, {}
        for name, (call, size) in contestants.items():
            row = dict(what=name)
            rows.append(row)
            try:
                call()
                cost[name] = self.once(call)
                row['extra_bytes'] = self.peak(call)
                able[name] = call
            except Exception as e:
                row['error'] = tail(f'{type(e).__name__}: {e}', 400)
        rounds = max(3, min(most, int(1e3*seconds/max(1e-6, sum(cost.values())))))
        times = {name: [] for name in able}
        for _ in range(rounds):
            for name, call in able.items():
                times[name].append(self.once(call))
        for row in rows:
            if row['what'] in times:
                row |= quartiles(times[row['what']])
                row['rounds'] = rounds
                if size := contestants[row['what']][1]:
                    row['needed_bytes'] = size
                    row['gb_per_s'] = round(size/row['median_ms']/1e6, 1)
        return rows
