"""Options of `pytest benchmarks/`, and the cases: every work of a module by everyone who does it.

A module `bench_<op>.py` has WORKS (by --size, and "gpu" for the full ones of a GPU),
`moca(work, leaves, d_out, backend)` and PEERS.
"""

import importlib.util
import traceback
from functools import partial

import pytest
import torch

import moca_fast
from benchmarks.clock import DeviceTime
from benchmarks.harness import OURS, Runner
from benchmarks.machine import machine
from benchmarks.measure import measure

BACKENDS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}


def pytest_addoption(parser):
    group = parser.getgroup("moca-fast benchmarks")
    group.addoption("--size", choices=("tiny", "full"), default="full", help="of the works")
    group.addoption("--device", choices=tuple(BACKENDS), default="cpu", help="that is measured")
    group.addoption(
        "--backend", action="append", help="of moca_fast, instead of all that are for the device"
    )
    group.addoption("--peers", action="store_true", help="run the optional peers too")


def pytest_configure(config):
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device")


def pytest_generate_tests(metafunc):
    if "runner" not in metafunc.fixturenames:
        return
    module, option = metafunc.module, metafunc.config.getoption
    device, size = option("device"), option("size")
    backends = option("backend") or BACKENDS[device]
    kind = "gpu" if (device, size) == ("cuda", "full") else size
    cases = [
        pytest.param(work, runner, marks=marks, id=f"{work.group} {runner.name}".replace(" ", "-"))
        for work in module.WORKS.get(kind, ())
        for runner, marks in _runners(module, work, device, backends, option("peers"))
    ]
    metafunc.parametrize(("work", "runner"), cases)


def pytest_collection_modifyitems(config, items):
    if config.getoption("device") == "cuda":
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=DeviceTime))


def _runners(module, work, device, backends, optional_peers):
    op = module.__name__.rpartition("bench_")[2]
    for backend in backends:
        # What is no op of its own (a training step) runs on whatever backends there are.
        reason = moca_fast.backends().get(op, {}).get(backend)
        build = partial(module.moca, backend=backend)
        yield Runner(f"{OURS}[{backend}]", build), _skip(reason)
    for peer in module.PEERS:
        if not peer.suits(work):
            continue
        if peer.package is not None and optional_peers:
            yield peer, _skip(_absence(peer, device))
        elif peer.package is None and device in peer.devices:
            yield peer, ()


def _absence(peer, device):
    """Why an optional peer cannot run, by name."""
    if importlib.util.find_spec(peer.package) is None:
        return f"{peer.package} is not installed"
    return None if device in peer.devices else f"{peer.name} does not run on {device}"


def _skip(reason):
    return (pytest.mark.skip(reason=reason),) if reason else ()


@pytest.fixture
def measured(benchmark, pytestconfig):
    """Measures one case: call it with a work and a runner."""
    device, size = pytestconfig.getoption("device"), pytestconfig.getoption("size")

    def attempt(work, runner):
        """Why the case has no time. As text: a traceback would keep its tensors in memory."""
        try:
            measure(benchmark, work, runner, device, size)
        except Exception as error:
            return f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}"

    def run(work, runner):
        if failure := attempt(work, runner):
            pytest.fail(failure, pytrace=False)

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    """Adds versions; drops what names the host and says nothing about its speed."""
    for name in ("node", "release"):
        machine_info.pop(name, None)
    machine_info.update(machine(), size=config.getoption("size"))


def pytest_benchmark_update_commit_info(config, commit_info):
    for name in ("project", "branch"):
        commit_info.pop(name, None)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Drops the parameters, which are objects: what is needed of them is in extra_info."""
    for case in output_json["benchmarks"]:
        del case["params"], case["options"]
