"""What a build with CUDA kernels is like on a machine that has no GPU."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import moca_fast
from moca_fast import _C, _cuda

BUILT = bool(_cuda.compiled())
needs_cuda_code = pytest.mark.skipif(not BUILT, reason="this build has no CUDA code; make cuda")


@pytest.mark.parametrize(
    ("arch", "runs", "fails"),
    [
        ("80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("86", [(8, 6), (8, 9)], [(8, 0)]),
        ("90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("100", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("100a", [(10, 0)], [(10, 3)]),
        ("100f", [(10, 0), (10, 3)], [(11, 0), (12, 0)]),
        ("120", [(12, 0), (12, 1)], [(10, 0)]),
    ],
)
def test_where_code_runs(arch, runs, fails):
    assert all(_cuda.runs_on(arch, gpu) for gpu in runs)
    assert not any(_cuda.runs_on(arch, gpu) for gpu in fails)
    with pytest.raises(ValueError, match="expected an architecture such as '90a', got 'native'"):
        _cuda.runs_on("native", (9, 0))


class Gpu:
    name, major, minor = "Some GPU", 7, 5


def test_a_gpu_without_code_is_told(monkeypatch):
    monkeypatch.setattr(_cuda, "compiled", lambda: ("80", "90a"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Gpu)
    monkeypatch.setattr(_cuda, "old_driver", lambda: None)
    reason = _cuda.missing_code.__wrapped__(0)
    assert "holds CUDA code for sm_80, sm_90a, none of which runs on Some GPU (sm_75)" in reason
    monkeypatch.setattr(Gpu, "major", 8)
    assert _cuda.missing_code.__wrapped__(0) is None


@pytest.mark.parametrize(
    ("driver", "runs"), [(12080, False), (12990, False), (13000, True), (14010, True)]
)
def test_an_older_driver_is_told(driver, runs, monkeypatch):
    native = SimpleNamespace(cuda_versions=lambda: (driver, 13020))
    monkeypatch.setattr(_cuda, "_C", native)
    monkeypatch.setattr(_cuda, "compiled", lambda: ("80",))
    told = f"this build is of CUDA 13.2, the driver runs CUDA {driver // 1000}."
    reason = _cuda.old_driver.__wrapped__()
    assert reason is None if runs else reason.startswith(told)
    if not runs:
        monkeypatch.setattr(_cuda, "old_driver", lambda: reason)
        assert _cuda.missing_code.__wrapped__(0) == reason


def test_a_gpu_and_a_build_without_cuda_are_told(monkeypatch):
    monkeypatch.setattr(_cuda, "_C", SimpleNamespace())  # which has no cuda_versions
    monkeypatch.setattr(_cuda, "compiled", lambda: ())
    assert _cuda.missing_code.__wrapped__(0) == _cuda.NO_CODE


@needs_cuda_code
def test_versions_of_this_build():
    driver, runtime = _C.cuda_versions()
    assert driver >= 0 and runtime // 1000 >= 12


def test_the_module_loads_neither_torch_nor_a_driver():
    script = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_C", {_C.__file__!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
maps = open("/proc/self/maps").read()
assert "_C." in maps
assert not any(name in maps for name in ("libtorch", "libc10", "libcuda.so", "libcudart"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_cuda_code
def test_tensors_of_the_cpu_are_refused():
    hidden, bounds = torch.ones(4, 8), torch.tensor([0, 4], dtype=torch.int32)
    assert moca_fast.explain("pool", hidden, bounds).backend == "cpu"
    message = "backend 'cuda' cannot run this call: tensors are on cpu.*'auto' would take cpu"
    with pytest.raises(ValueError, match=message):
        moca_fast.pool(hidden, bounds, backend="cuda")


@needs_cuda_code
@pytest.mark.skipif(torch.cuda.is_available(), reason="the launch would succeed")
def test_a_launch_that_fails_says_which():
    params = _C.MaskedPatchMseParams(
        pred=0, patches=0, index=0, rows=8, row_size=16, num_patches=4,
        pred_dtype=_C.DType.float32, patches_dtype=_C.DType.float32, normalize=False, threads=1,
    )  # fmt: skip
    shape = r"masked_patch_mse_forward \(M = 8, P = 16, N = 4\) was not launched: "
    with pytest.raises(RuntimeError, match=shape):
        _C.masked_patch_mse_forward_cuda(params, 0, _C.Queue(0, 0))
