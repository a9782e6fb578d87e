"""``python -m bench.routes``: which SVD route is fastest where, beside what the cost model picks.

Processor seconds on one thread: the model counts work, and other processes must not disturb it.
"""

from __future__ import annotations

import statistics
import time

import torch

from fastagg import linalg

SIZES = (128, 512, 1024, 2048, 4096)
ROWS = (32, 160, 400, 800, 1600)
RANKS = (16, 64)
LIMIT = 4e10  # multiply-adds of the dense form: more is left out


def processor_seconds(route: str, A: torch.Tensor, Bt: torch.Tensor, rank: int) -> float:
    """The median of three runs."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        linalg.svd_of_stack(A, Bt, None, rank, route=route)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def main() -> None:
    """Prints a line for each shape; regret is the time of the model's choice over the best."""
    torch.set_num_threads(1)
    print(f"{'size':>6}{'R':>6}{'r':>5}{'gram':>10}{'random.':>10}{'dense':>10}  picked, regret")
    for size in SIZES:
        for rows in ROWS:
            for rank in RANKS:
                if size * size * rows > LIMIT:
                    continue
                A, Bt = torch.randn(1, rows, size), torch.randn(1, rows, size)
                routes = ("gram", "randomized", "dense")
                times = {route: processor_seconds(route, A, Bt, rank) for route in routes}
                picked = linalg.fastest_route(size, size, rows, 2 * rank)
                regret = times[picked] / min(times.values())
                row = "".join(f"{1e3 * seconds:10.1f}" for seconds in times.values())
                print(f"{size:6d}{rows:6d}{rank:5d}{row}  {picked}, {regret:.2f}", flush=True)


if __name__ == "__main__":
    main()
