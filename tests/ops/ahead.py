"""Compiles Triton kernels where there is no GPU, each just as its launch on one would.

The interpreter, which runs them there, is lenient: this finds what only the compiler refuses, and
shows what it made of them.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ARCHS = (80, 90)
ACCESS = re.compile(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[a-z]+(\d+)\s")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for one architecture.

    Args:
        name, arch: of the Triton function, and 10 times the compute capability.
        registers: of a thread.
        stack: bytes of a thread, where registers go that do not fit.
        access: bytes of the widest load or store of global memory.
    """

    name: str
    arch: int
    registers: int
    stack: int
    access: int


def compile_launches(code: str) -> list[Kernel]:
    """Every kernel that `code` launches, for every architecture. It runs in a process of its own,
    on tensors of the CPU; what the kernels should have written is left unwritten."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = [sys.executable, __file__, code]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return [Kernel(**found) for found in json.loads(done.stdout.splitlines()[-1])]


class NoDriver:
    """What Triton's launcher asks before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = USAGE.search(text).groups()
    return int(registers), int(stack)


def describe(compiled, arch: int) -> Kernel:
    widths = [int(n or 1) * int(bits) // 8 for n, bits in ACCESS.findall(compiled.asm["ptx"])]
    return Kernel(compiled.metadata.name, arch, *resources(compiled.asm["cubin"]), max(widths))


def main(code: str) -> None:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launch, found = JITFunction.run, {}

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
        found.setdefault((compiled.hash, arch), describe(compiled, arch))

    JITFunction.run = compile_only
    for arch in ARCHS:
        driver.set_active(NoDriver(arch))
        exec(code, {})
    print(json.dumps([vars(kernel) for kernel in found.values()]))


if __name__ == "__main__":
    main(sys.argv[1])
