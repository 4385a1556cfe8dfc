"""A forward and backward of F.linear and of each path, for a profiler: 8192x4096x4096, r = 16.

    ncu --profile-from-start off … python -m benchmarks.profile_svd_linear

Everything is compiled and called once before the profiler is told to begin.
"""

from __future__ import annotations

import torch

from adalora_kernels.kernels.svd_linear import plans
from benchmarks.svd_linear_rivals import (
    FLOOR,
    GOAL_M,
    GOAL_R,
    GOAL_SHAPES,
    Case,
    make_inputs,
    rivals_of,
)


def main() -> None:
    device = torch.device("cuda")
    K, N = next(iter(GOAL_SHAPES))
    case = Case(K, N, GOAL_M, GOAL_R)
    (inputs,) = make_inputs(case, 1, device)
    found = rivals_of(case, device)
    rivals = [found[name] for name in (FLOOR, *plans.PATHS) if name in found]
    for rival in rivals:
        rival.step(inputs)
    torch.cuda.synchronize(device)
    with torch.cuda.profiler.profile():
        for rival in rivals:
            rival.step(inputs)
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
