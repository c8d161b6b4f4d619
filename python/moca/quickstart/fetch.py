"""Fetch Debian packages into a cache folder and unpack them there; nothing is ever installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

DEFAULT_CACHE = Path(".cache") / "quickstart"
PACKAGES = ("gimp-help-en", "gimp-help-common", "fonts-noto-color-emoji", "wordnet-base")
OWN_FOLDER = "`make quickstart DOCS=path/to/html/folder` uses any folder of HTML pages"

_COMPLETE = ".complete"
# A mirror that hangs must not hang the quickstart.
_NETWORK = ("-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=30")
_TIMEOUT_SECONDS = 600


class FetchError(RuntimeError):
    """The packages could not be had; the message says what to do instead."""


def fetch_debian(
    cache_dir: str | os.PathLike = DEFAULT_CACHE,
    say: Callable[[str], None] = print,
    packages: Sequence[str] = PACKAGES,
    instead: str = OWN_FOLDER,
) -> dict[str, Path]:
    """Make sure packages are unpacked below a folder.

    A package that is already there is not touched. The others are downloaded with ``apt-get
    download`` and unpacked with ``dpkg -x`` into a temporary folder that is renamed when complete,
    so an interrupted run leaves no half package. When the machine's package lists are empty or
    stale, fresh ones go into the cache folder: the system's own are never changed, and no rights
    are needed.

    Args:
        cache_dir: the folder; made when missing.
        say: is told what takes time.
        packages: their names.
        instead: what an error says can be done without them.

    Returns:
        Root of the unpacked tree (the folder that holds ``usr``) of each package.

    Raises:
        FetchError: apt-get or dpkg is missing or fails, or the folder cannot be written.
    """
    cache = Path(cache_dir).absolute()
    roots = {package: cache / package for package in packages}
    missing = [package for package, root in roots.items() if not (root / _COMPLETE).is_file()]
    if not missing:
        return roots
    absent = [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]
    if absent:
        raise FetchError(
            f"cannot fetch the Debian packages {', '.join(missing)}: "
            f"{' and '.join(absent)} cannot be found on this machine; {instead}"
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as temporary:
            archives = _download(missing, Path(temporary), cache / "apt", say)
            for package, archive in archives.items():
                _unpack(archive, Path(temporary) / package, roots[package])
    except OSError as error:
        raise FetchError(f"cannot write Debian packages to {cache}: {error}; {instead}") from error
    except FetchError as error:
        raise FetchError(f"{error}; {instead}") from error
    return roots


def _download(
    packages: list[str], folder: Path, apt_folder: Path, say: Callable[[str], None]
) -> dict[str, Path]:
    """Download packages into ``folder``; returns the archive of each."""
    say(f"fetching {', '.join(packages)}")
    command = ["apt-get", *_NETWORK, "download", *packages]
    problem = _run(command, folder)
    if problem:
        say("the package lists are empty or stale: fetching fresh ones into the cache folder")
        private = _private_state(apt_folder)
        problem = _run(["apt-get", *_NETWORK, *private, "update"], folder) or _run(
            ["apt-get", *_NETWORK, *private, "download", *packages], folder
        )
    archives = {package: next(folder.glob(f"{package}_*.deb"), None) for package in packages}
    lacking = [package for package, archive in archives.items() if archive is None]
    if problem or lacking:
        what = problem or f"apt-get brought no {' and no '.join(lacking)}"
        raise FetchError(f"cannot fetch the Debian packages: {what}")
    return {package: archive for package, archive in archives.items() if archive}


def _private_state(folder: Path) -> list[str]:
    """Options that keep apt's lists and caches in a folder of ours."""
    lists, cache = folder / "lists", folder / "cache"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    (cache / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    return ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}"]


def _unpack(archive: Path, temporary: Path, root: Path) -> None:
    problem = _run(["dpkg", "-x", str(archive), str(temporary)], archive.parent)
    if problem:
        raise FetchError(f"cannot unpack {archive.name}: {problem}")
    (temporary / _COMPLETE).write_text(f"{archive.name}\n")
    if root.exists():
        shutil.rmtree(root)
    os.replace(temporary, root)


def _run(command: list[str], folder: Path) -> str:
    """Run a command quietly; returns "" or what went wrong."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"{command[0]} did not finish within {_TIMEOUT_SECONDS} s"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E:", "dpkg"))] or lines[-1:]
    return "; ".join(errors[:3]) or f"{command[0]} ended with status {done.returncode}"
