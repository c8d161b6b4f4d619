"""`compute-sanitizer python -m benchmarks.memory_check OP BACKEND`: small calls of one kernel on a
GPU, forward and backward, at the odd sizes of tests/ops/every_op.py.
"""

import sys

import torch

import moca_fast
from benchmarks.machine import ROOT


def main() -> None:
    op, backend = sys.argv[1:]
    sys.path.insert(0, str(ROOT / "tests" / "ops"))
    import every_op

    checked = 0
    names = [n for n in every_op.CALLS if n == op or n.removeprefix(op).startswith("_")]
    torch.set_default_device("cuda")
    with moca_fast.use_backend(backend):
        for name in names:
            for dtype in (torch.float32, torch.bfloat16):
                try:
                    every_op.run(name, dtype)
                    checked += 1
                except ValueError as error:  # there is no such kernel, or it does not take this
                    print(f"not checked: {name} {dtype}: {error}")
    torch.cuda.synchronize()
    print(f"checked {checked} calls")


if __name__ == "__main__":
    main()
