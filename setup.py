"""Builds `moca_fast._C` with CMake and Ninja; everything else is declared in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
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


def build_jobs() -> int:
    """MAX_JOBS, else one job a core but no more than one for each 2 GiB of memory."""
    if "MAX_JOBS" in os.environ:
        jobs = os.environ["MAX_JOBS"]
        if not jobs.isdigit() or int(jobs) < 1:
            raise SystemExit(f"MAX_JOBS: expected a whole number of at least 1, got {jobs!r}")
        return int(jobs)
    jobs = os.cpu_count() or 1
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        jobs = min(jobs, max(1, int(gib // 2)))
    return jobs


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if os.environ.get("MOCA_CUDA", "0") not in ("0", ""):
            raise SystemExit("MOCA_CUDA: this version has no CUDA sources; unset it or set it to 0")
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMOCA_VERSION={self.distribution.get_version()}",
            f"-DMOCA_MODULE_NAME={target.name}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "-j", str(build_jobs())], check=True)


setup(
    packages=packages(),
    package_dir=PACKAGE_DIR,
    ext_modules=[Extension("moca_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
