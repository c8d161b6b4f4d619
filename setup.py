"""Builds `moca_fast._C` with CMake and Ninja; everything else is declared in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
GIB_A_COMPILER = 2.0  # of memory: more than any of ours takes
PACKAGE_DIR = {
    "moca_fast": "moca_fast",
    "moca_triton": "kernels/moca_triton",
    "moca": "python/moca",
}


def packages() -> list[str]:
    found = []
    for name, folder in PACKAGE_DIR.items():
        if (ROOT / folder / "__init__.py").exists():
            found.append(name)
            found += [f"{name}.{sub}" for sub in find_packages(str(ROOT / folder))]
    return found


def setting(name: str) -> int | None:
    """A positive whole number from the environment, or None where it is not set."""
    value = os.environ.get(name, "")
    if value and (not value.isdigit() or int(value) < 1):
        raise SystemExit(f"{name}: expected a whole number of at least 1, got {value!r}")
    return int(value) if value else None


def free_gib() -> float:
    """Memory that is free now, in GiB; where the system does not say, all there is, or 2."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(x for x in lines if x.startswith("MemAvailable")).split()[1]) / 2**20
    except (OSError, StopIteration):
        pass
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return GIB_A_COMPILER


def parallelism() -> tuple[int, int]:
    """Compilers at a time, and architectures at a time in each nvcc.

    MAX_JOBS and NVCC_THREADS, else as many as there are cores (and up to 4 architectures) and
    free memory for.
    """
    room = max(1, int(free_gib() // GIB_A_COMPILER))
    jobs = setting("MAX_JOBS") or min(os.cpu_count() or 1, room)
    threads = setting("NVCC_THREADS") or min(4, max(1, room // jobs))
    return jobs, threads


def cuda_options() -> list[str]:
    """What MOCA_CUDA (0, 1 or unset: where there is an nvcc) and MOCA_CUDA_ARCHS say to CMake."""
    wanted = os.environ.get("MOCA_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"MOCA_CUDA: expected 0, 1 or nothing, got {wanted!r}")
    modes = {"": "AUTO", "0": "OFF", "1": "ON"}
    archs = os.environ.get("MOCA_CUDA_ARCHS", "")
    return [f"-DMOCA_CUDA={modes[wanted]}", f"-DMOCA_CUDA_ARCHS={archs}"]


def native_sources() -> list[str]:
    """What CMake builds from: a source distribution holds it."""
    csrc = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    return [str(path.relative_to(ROOT)) for path in (*csrc, ROOT / "CMakeLists.txt")]


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        jobs, nvcc_threads = parallelism()
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMOCA_VERSION={self.distribution.get_version()}",
            f"-DMOCA_MODULE_NAME={target.name}",
            f"-DMOCA_NVCC_THREADS={nvcc_threads}",
            *cuda_options(),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "-j", str(jobs)], check=True)


if __name__ == "__main__":
    setup(
        packages=packages(),
        package_dir=PACKAGE_DIR,
        ext_modules=[Extension("moca_fast._C", sources=[], depends=native_sources())],
        cmdclass={"build_ext": CMakeBuild},
    )
