"""What `python -m moca_fast --wheel` reads out of a wheel."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from moca_fast import _C, _cuda, _wheel
from moca_fast.__main__ import wheel_report

SOURCE = "__global__ void fill(float* x) { x[threadIdx.x] = 1.0f; }\n"
THIS_MODULE = Path(_C.__file__)


def wheel(folder: Path, **members: bytes) -> Path:
    path = folder / "thing-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"moca_fast/{name}.so", data)
        archive.writestr("moca_fast/__init__.py", "")
    return path


def compiled(nvcc: str, folder: Path, *options: str) -> bytes:
    """A shared library of one kernel."""
    (folder / "fill.cu").write_text(SOURCE)
    command = [nvcc, "--shared", "-Xcompiler", "-fPIC", *options, "fill.cu", "-o", "fill.so"]
    libraries = Path(nvcc).parents[1] / "lib"  # where nvcc's packages have them
    subprocess.run([*command, f"-L{libraries}"], cwd=folder, check=True)
    return (folder / "fill.so").read_bytes()


def code(arch: str) -> tuple[str, str]:
    return "-gencode", f"arch=compute_{arch},code=sm_{arch}"


@pytest.mark.parametrize("compression", ["none", "size"])
def test_architectures(nvcc, tmp_path, compression):
    wanted = ("80", "90", "90a", "100a", "120")
    options = [option for arch in wanted for option in code(arch)]
    options += ["-gencode", "arch=compute_120,code=compute_120"]
    library = compiled(nvcc, tmp_path, f"--compress-mode={compression}", *options)
    (found,) = _wheel.modules(wheel(tmp_path, fill=library))
    assert found.name == "moca_fast/fill.so" and found.size == len(library)
    assert found.architectures == ("80", "90", "90a", "100a", "120", "120 PTX")
    assert found.unwanted == ()


def test_a_runtime_that_is_not_inside_is_told(nvcc, tmp_path):
    library = compiled(nvcc, tmp_path, "--cudart=none", *code("80"))
    with pytest.raises(ValueError, match="would not load without torch's or the driver's") as told:
        wheel_report(wheel(tmp_path, fill=library))
    assert "__cudaRegisterFatBinary" in str(told.value) and "cudaLaunchKernel" in str(told.value)


def test_this_build(tmp_path):
    path = wheel(tmp_path, _C=THIS_MODULE.read_bytes())
    (found,) = _wheel.modules(path)
    assert found.architectures == _cuda.compiled()
    assert found.unwanted == () and any(x.startswith("libc.so") for x in found.libraries)
    text = wheel_report(path)
    assert "cuda code for" in text and "of torch or the driver: nothing" in text
    done = subprocess.run(
        [sys.executable, "-m", "moca_fast", "--wheel", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == text


def test_a_module_that_needs_torch_is_told(tmp_path):
    (module,) = (Path(torch.__file__).parent).glob("_C.cpython*.so")
    with pytest.raises(ValueError, match=r"of torch or the driver: libtorch_python\.so"):
        wheel_report(wheel(tmp_path, _C=module.read_bytes()))


@pytest.mark.parametrize("keep", [3, 60, 5000, -100])
def test_a_module_that_is_cut_short(tmp_path, keep):
    data = THIS_MODULE.read_bytes()[:keep]
    with pytest.raises(ValueError, match=r"moca_fast/_C\.so: expected a whole 64-bit ELF file"):
        _wheel.modules(wheel(tmp_path, _C=data))


def test_a_module_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(_wheel, "MODULE_BYTES", 1000)
    with pytest.raises(ValueError, match=r"moca_fast/_C\.so is over"):
        _wheel.modules(wheel(tmp_path, _C=bytes(1001)))


def test_what_is_no_wheel(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        _wheel.modules(tmp_path / "none.whl")
    with pytest.raises(ValueError, match="expected a wheel, which is a zip file"):
        _wheel.modules(Path(__file__))
    with pytest.raises(ValueError, match="holds no native module"):
        wheel_report(wheel(tmp_path))
