"""`python -m moca_fast`: what was built, what this machine has, and which backend runs each op.

python -m moca_fast --wheel FILE    what a wheel holds: architectures, and libraries it needs
python -m moca_fast --record FILE   add test results from a GPU to the table of what is proven
"""

import argparse
import os
import platform
from pathlib import Path

import torch

from moca_fast import _C, __version__, _cuda, _dispatch, _verified, _wheel


def report() -> str:
    """The text that `python -m moca_fast` prints."""
    build = _C.build_info()
    lines = [
        f"moca_fast {__version__} (native module {build['version']})",
        f"  compiled for   cpu: {build['cpu_isas'].replace(',', ', ')}; "
        f"cuda: {', '.join(_cuda.compiled()) or 'nothing'} (compiler {build['compiler']})",
        f"  this machine   {platform.machine()}, {os.cpu_count()} cores, "
        f"runs {', '.join(_C.supported_isas())}",
        f"  in use         {_C.cpu_isa()}, {torch.get_num_threads()} threads",
        f"  gpus           {_gpus()}",
        f"  torch          {torch.__version__}, python {platform.python_version()}",
        "ops",
    ]
    for op in _dispatch.op_names():
        lines += [f"  {line}" for line in _op_lines(op)]
    return "\n".join(lines)


def _op_lines(op: str) -> list[str]:
    lines = []
    for place, reasons in _places(op).items():
        asked = _dispatch.requested("auto")  # MOCA_BACKEND, if it is set
        order = _dispatch.BACKENDS if asked == "auto" else (asked,)
        chosen = next((name for name in order if reasons[name] is None), None)
        lines.append(f"{op}{place}: {chosen or 'nothing'} runs")
        for name, reason in reasons.items():
            if name != chosen:
                idle = "not asked for" if asked != "auto" else f"not needed, {chosen} comes first"
                lines.append(f"  {name:<9} {reason or idle}")
    return lines


def _places(op: str) -> dict[str, dict[str, str | None]]:
    """Where an op can run, "" for the CPU, and there why each backend does not."""
    present = _dispatch.backends()[op]
    elsewhere = {name: "runs on GPUs" for name in _verified.BACKENDS}
    places = {"": {name: reason or elsewhere.get(name) for name, reason in present.items()}}
    for index in range(torch.cuda.device_count()):
        architecture = _verified.architecture(torch.device("cuda", index))
        refusals = {"cpu": "runs on the CPU", "cuda": _cuda.missing_code(index)}
        if _dispatch.requested("auto") == "auto":
            for name in _verified.BACKENDS:
                unproven = _verified.reason(op, name, architecture)
                refusals[name] = refusals.get(name) or unproven
        reasons = {name: reason or refusals.get(name) for name, reason in present.items()}
        places[f" on {architecture}"] = reasons
    return places


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "; ".join(f"{gpu.name} (sm_{gpu.major}{gpu.minor})" for gpu in names)


def wheel_report(path: Path) -> str:
    """The text that `--wheel` prints; raises ValueError where a module needs torch or a driver."""
    found = _wheel.modules(path)
    if not found:
        raise ValueError(f"{path}: holds no native module")
    text = "\n".join(str(module) for module in found)
    if any(module.unwanted for module in found):
        raise ValueError(
            f"{text}\n{path}: would not load without torch's or the driver's libraries"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moca_fast", description="What was built, and what runs where."
    )
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--wheel", type=Path, metavar="FILE", help="what a wheel holds")
    one.add_argument("--record", type=Path, metavar="FILE", help="add a GPU's test results")
    given = parser.parse_args()
    try:
        if given.wheel:
            print(wheel_report(given.wheel))
        elif given.record:
            _verified.record(_verified.read(given.record), _verified.TABLE)
        else:
            print(report())
    except (ValueError, OSError, RuntimeError) as error:  # the last: a bad MOCA_CPU_ISA
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
