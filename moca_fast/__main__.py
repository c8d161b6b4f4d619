"""`python -m moca_fast`: what was built, what this machine has, and which backend runs each op."""

import os
import platform

import torch

from moca_fast import _C, __version__, _dispatch


def report() -> str:
    """The text that `python -m moca_fast` prints."""
    build = _C.build_info()
    lines = [
        f"moca_fast {__version__} (native module {build['version']})",
        f"  compiled for   cpu: {build['cpu_isas'].replace(',', ', ')}; "
        f"cuda: {build['cuda_archs'] or 'nothing'} (compiler {build['compiler']})",
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
    reasons = _dispatch.backends()[op]
    asked = _dispatch.requested("auto")  # MOCA_BACKEND, if it is set
    order = _dispatch.BACKENDS if asked == "auto" else (asked,)
    chosen = next((name for name in order if reasons[name] is None), None)
    lines = [f"{op}: {chosen or 'nothing'} runs"]
    for name, reason in reasons.items():
        if name != chosen:
            idle = "not asked for" if asked != "auto" else f"not needed, {chosen} comes first"
            lines.append(f"  {name:<9} {reason or idle}")
    return lines


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "; ".join(f"{gpu.name} (sm_{gpu.major}{gpu.minor})" for gpu in names)


if __name__ == "__main__":
    print(report())
