"""Ops in forked children, in data loaders' workers, and beside other threads and runtimes."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

RUNTIME = re.compile(r"lib(gomp|iomp5|omp)\b")
SECONDS = 120  # a hang is what is looked for: none of these takes ten


def run_python(code: str, **environment: str) -> str:
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


FORK = """
import os, sys, signal, torch, every_op
expected = every_op.run_all()  # OpenMP now has threads, which fork leaves behind
child = os.fork()
if not child:
    signal.alarm(100)
    torch.set_num_threads({threads})
    same = map(torch.equal, every_op.run_all(), expected)
    os._exit(0 if all(same) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_forked_child_after_the_parent_used_threads(threads):
    run_python(FORK.format(threads=threads))


WORKERS = """
import torch, every_op
from torch.utils.data import DataLoader

class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, index):
        return every_op.run_all()

expected = every_op.run_all()
loader = DataLoader(
    Items(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=100,
    worker_init_fn={init},
)
count = 0
for _ in range(2):
    for item in loader:
        assert all(map(torch.equal, item, expected))
        assert all(map(torch.equal, every_op.run_all(), expected))  # and the parent goes on
        count += 1
assert count == 12
"""


@pytest.mark.parametrize("init", ["None", "lambda worker: torch.set_num_threads(2)"])
def test_data_loader_with_two_workers(init):
    run_python(WORKERS.format(init=init))


DIGEST = """
import hashlib, torch, every_op
results = [x.numpy().tobytes() for x in every_op.run_all()]
print(torch.get_num_threads(), hashlib.sha256(b"".join(results)).hexdigest())
names = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line}
print(*sorted(n for n in names if n.startswith("/")), sep="\\n")
"""


def digest(**environment: str) -> tuple[int, str, set[str]]:
    """Threads, hash of all results, and the paths of the OpenMP runtimes in the process."""
    first, *mapped = run_python(DIGEST, **environment).splitlines()
    threads, value = first.split()
    return int(threads), value, {path for path in mapped if RUNTIME.match(Path(path).name)}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_threads_and_the_one_runtime():
    """Torch's wheel and the kernels both ask for libgomp.so.1, so one copy serves both."""
    one, two = digest(OMP_NUM_THREADS="1"), digest(OMP_NUM_THREADS="2")
    assert (one[0], two[0]) == (1, 2) and one[1] == two[1]
    assert len(one[2]) == 1


def other_runtimes() -> list[Path]:
    """The copy of libgomp in scikit-learn's wheel, and Intel's runtime if it is installed."""
    root, packages = sysconfig.get_path("data"), sysconfig.get_path("platlib")
    gomp = sorted(Path(packages, "scikit_learn.libs").glob("libgomp*.so*"))
    return gomp + sorted(Path(root, "lib").glob("libiomp5.so"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloads a library")
@pytest.mark.parametrize("path", other_runtimes(), ids=lambda path: path.name)
def test_another_openmp_runtime(path):
    """Loaded first, it takes the kernels' calls, while torch still brings its own."""
    threads, value, runtimes = digest(LD_PRELOAD=str(path))
    assert threads == 2 and value == digest()[1]
    assert str(path.resolve()) in runtimes
    run_python(FORK.format(threads=2), LD_PRELOAD=str(path))
