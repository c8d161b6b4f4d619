"""What MOCA_CUDA, MOCA_CUDA_ARCHS, MAX_JOBS and NVCC_THREADS mean."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")


def archs(wanted: str, **environment: str) -> subprocess.CompletedProcess:
    """What the build makes of MOCA_CUDA_ARCHS, on a machine that has no program but `bin`."""
    if CMAKE is None:
        pytest.skip("no cmake here")
    script = ROOT / "csrc/cuda_archs.cmake"
    return subprocess.run(
        [CMAKE, f"-DMOCA_CUDA_ARCHS={wanted}", "-P", str(script)],
        env={"PATH": "/nothing", **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("wanted", "meaning"),
    [
        ("90a", "90a"),
        ("80;90a;100a;120", "80;90a;100a;120"),
        ("80, 86 90a", "80;86;90a"),
        ("100f;100f", "100f"),
        ("", "80;90a;100;120"),
    ],
)
def test_architectures(wanted, meaning):
    done = archs(wanted)
    assert done.returncode == 0 and done.stderr.strip() == meaning


@pytest.mark.parametrize("wrong", ["sm_90", "9.0", "75", "90b", "80a", "90f", "1000", "fast"])
def test_wrong_architectures(wrong):
    done = archs(f"80;{wrong}")
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "MOCA_CUDA_ARCHS: expected architectures from 80 on" in message
    assert f'got "{wrong}"' in message


@pytest.fixture
def gpus(tmp_path):
    """Puts an nvidia-smi that finds these compute capabilities on the PATH that it returns."""

    def prepare(*capabilities: str) -> str:
        lines = "".join(f"echo {x}\n" for x in capabilities)
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{lines}")
        program.chmod(0o755)
        return str(tmp_path)

    return prepare


def test_a_machine_with_gpus_compiles_for_them(gpus):
    path = gpus("9.0", "9.0", "12.0")
    for wanted in ("", "native"):
        assert archs(wanted, PATH=path).stderr.strip() == "90a;120"
    assert archs("native;80", PATH=path).stderr.strip() == "90a;120;80"
    assert archs("80", PATH=path).stderr.strip() == "80"


def test_gpus_that_are_too_old(gpus):
    path = gpus("7.5")
    assert archs("", PATH=path).stderr.strip() == "80;90a;100;120"
    assert "nvidia-smi finds no GPU from sm_80 on" in archs("native", PATH=path).stderr


@pytest.mark.parametrize(
    ("cores", "gib", "jobs", "threads"),
    [(2, 4.5, 2, 1), (2, 18.0, 2, 4), (16, 120.0, 16, 3), (64, 8.0, 4, 1), (8, 0.5, 1, 1)],
)
def test_compilers_fit_in_memory(setup_py, monkeypatch, cores, gib, jobs, threads):
    for name in ("MAX_JOBS", "NVCC_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setup_py.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(setup_py, "free_gib", lambda: gib)
    assert setup_py.parallelism() == (jobs, threads)
    assert jobs * threads * setup_py.GIB_A_COMPILER <= max(gib, setup_py.GIB_A_COMPILER)


def test_settings_of_compilers(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py, "free_gib", lambda: 64.0)
    monkeypatch.setenv("MAX_JOBS", "3")
    monkeypatch.setenv("NVCC_THREADS", "2")
    assert setup_py.parallelism() == (3, 2)
    for name in ("MAX_JOBS", "NVCC_THREADS"):
        monkeypatch.setenv(name, "many")
        with pytest.raises(SystemExit, match=f"{name}: expected a whole number .* got 'many'"):
            setup_py.parallelism()
        monkeypatch.setenv(name, "1")


def test_free_memory_is_some(setup_py):
    assert 0 < setup_py.free_gib() < 1e6


@pytest.mark.parametrize(("value", "mode"), [("", "AUTO"), ("0", "OFF"), ("1", "ON")])
def test_moca_cuda(setup_py, monkeypatch, value, mode):
    monkeypatch.setenv("MOCA_CUDA", value)
    monkeypatch.setenv("MOCA_CUDA_ARCHS", "90a")
    assert setup_py.cuda_options() == [f"-DMOCA_CUDA={mode}", "-DMOCA_CUDA_ARCHS=90a"]


def test_wrong_moca_cuda(setup_py, monkeypatch):
    monkeypatch.setenv("MOCA_CUDA", "yes")
    with pytest.raises(SystemExit, match="MOCA_CUDA: expected 0, 1 or nothing, got 'yes'"):
        setup_py.cuda_options()
