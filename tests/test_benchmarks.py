"""The benchmarks' own rules: a wrong result gets no time, and a report says what was saved."""

import copy
import json

import pytest
import torch

from benchmarks.bench_pool import Pool, moca, segment_mean
from benchmarks.harness import FACTOR, Call, WrongResult, check
from benchmarks.limits import Limits
from benchmarks.measure import extra_memory
from benchmarks.report import BEST, Run, main, read, section, targets

WORK = Pool(tokens=50, dim=8, documents=4)


def call(change=lambda out: out) -> Call:
    leaves, d_out = WORK.leaves("cpu"), WORK.d_out("cpu")
    right = moca(WORK, leaves, d_out, backend="cpu")
    return Call(lambda *x: change(right.function(*x)), leaves, d_out).prepared(WORK)


def test_a_right_result_passes():
    assert check(call(), WORK.expected("cpu"), torch.float32, FACTOR) <= 1
    peer = segment_mean(WORK, WORK.leaves("cpu"), WORK.d_out("cpu")).prepared(WORK)
    check(peer, WORK.expected("cpu"), torch.float32, FACTOR)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out + 1e-5, "result: off by"),
        (lambda out: out * torch.nan, "result: off by nan"),
        (lambda out: out[:-1], "shape"),
        (lambda out: out.detach() + 1.01 * (out - out.detach()), "gradient 0: off by"),
    ],
)
def test_a_wrong_result_is_no_benchmark(change, message):
    wrong = call(change)
    if message == "shape":
        wrong.d_out = wrong.d_out[:-1]
    with pytest.raises(WrongResult, match=message):
        check(wrong, WORK.expected("cpu"), torch.float32, FACTOR)


def test_extra_memory_sees_what_is_freed_again():
    size = 1 << 26

    def run():
        torch.ones(size, dtype=torch.uint8)
        return [torch.ones(size // 2, dtype=torch.uint8)]

    peak, extra = extra_memory(run, "cpu")
    assert peak == pytest.approx(size, rel=0.1)  # the first array is gone before the second comes
    assert extra == pytest.approx(size / 2, rel=0.2)


def test_roofline():
    rates = {"multiply_add": 100.0, "dot_product": 400.0, "gemm": 50.0, "copy": 10.0}
    single, half = Limits(**rates, dtype="float32"), Limits(**rates, dtype="bfloat16")
    assert single.attainable(flops=8, traffic=8) == 10  # bound by memory
    assert single.attainable(flops=800, traffic=8) == 100
    assert half.attainable(flops=800, traffic=8) == 400
    assert half.attainable(flops=1, traffic=0) == 400  # whose bytes are not known
    on_gpu = {**rates, "multiply_add": None, "dot_product": None}
    assert Limits(**on_gpu, dtype="bfloat16").peak == 50


def case(runner: str, median: float, **info) -> dict:
    shared = {
        "runner": runner, "ours": runner.startswith("moca_fast"),
        "yardstick": runner == "torch", "title": "pool T 8",
        "dtype": "float32", "device": "cpu", "threads": 2, "isa": "avx512", "targets": [],
        "axis": None, "avoided_bytes": 0, "extra_bytes": 3_000_000, "flops": 2e9, "traffic": 1e9,
        "gflops": 2 / median, "gbytes": 1 / median, "tokens_per_second": None,
        "limit_multiply_add": 500.0, "limit_dot_product": None, "limit_peak": 500.0,
        "limit_gemm": 200.0, "limit_copy": 20.0, "fraction_of_limit": 0.05 / median,
        "system_share": 0.25,
    }  # fmt: skip
    shared.update(info)
    return {
        "group": info.get("group", "pool T 8 float32 fwd"),
        "fullname": "bench",
        "stats": {"median": median, "rounds": 7},
        "extra_info": shared,
    }


TARGETS = [
    {"speedup": 3.0, "memory": 0.1, "limit": 0.6, "over": ""},
    {"speedup": 2.0, "memory": None, "limit": None, "over": BEST},
    {"speedup": 1.0, "memory": None, "limit": None, "over": "flash"},
]
SAVED = {
    "machine_info": {
        "cpu": {"brand_raw": "Some CPU"}, "threads": 2, "size": "full", "torch": "2.13.0",
        "moca_fast": "0.1.0", "python_version": "3.11.7",
    },
    "commit_info": {"id": "0123456789abcdef", "dirty": True},
    "datetime": "2026-11-21T08:00:00",
    "benchmarks": [
        case("moca_fast[cpu]", 0.1, targets=TARGETS, avoided_bytes=20_000_000,
             tile_efficiency=0.875),
        case("torch", 0.4, extra_bytes=8_000_000, system_share=0.6),
        case("torch index_add", 0.25),
        *(
            case(runner, 0.1 * size, title=f"attention tokens {size}", axis=["tokens", size],
                 group=f"attention tokens {size} bfloat16 fwd")
            for size in (1, 2)
            for runner in ("moca_fast[cpu]", "torch")
        ),
        case("moca_fast[cpu]", 0.5, title="cpt quickstart", group="cpt quickstart", traffic=0,
             gbytes=0.0, tokens_per_second=4000.0, profile=[["aten::mm", 0.4, 12]]),
        case("torch", 1.0, title="cpt quickstart", group="cpt quickstart", traffic=0,
             tokens_per_second=2000.0),
    ],
}  # fmt: skip


def test_section():
    text = section(Run("here", SAVED), ["performance/here-roofline.svg"])
    lines = text.splitlines()
    assert lines[0] == "## Some CPU, 2 threads"
    assert "commit 0123456789 with uncommitted changes, torch 2.13.0" in text
    assert "| multiply-add float32, GFLOP/s | 500 |" in lines
    assert "![here-roofline](performance/here-roofline.svg)" in lines
    row = "| T 8 float32 fwd | moca_fast[cpu] | 100 | 4.00x | 2.50x | 20 | 10 | 50 % | 3 | 8 | 3 |"
    assert any(line.startswith(row) and "87.5 %" in line for line in lines)
    assert "| cpt quickstart | moca_fast[cpu] | 4,000 | 2,000 | 2.00x | 10 % |" in lines
    assert "- cpt quickstart: `aten::mm` 40 %" in lines


def test_targets():
    row, best, missing = targets(Run("here", SAVED)).splitlines()[4:]
    assert "| torch | 4.00x (≥ 3.00x reached)" in row
    assert "| torch index_add | 2.50x (≥ 2.00x reached)" in best
    assert "| flash | not measured (target 1.00x)" in missing
    assert "15 % (≤ 10 % **missed**)" in row
    assert "50 % (≥ 60 % **missed**)" in row
    assert row.endswith("| 25 % | 60 % |") and missing.endswith("| 25 % |  |")
    alone = copy.deepcopy(SAVED)
    alone["benchmarks"] = alone["benchmarks"][:1]
    assert "not measured (target 3.00x)" in targets(Run("here", alone))


def test_report_of_saved_files(tmp_path):
    pytest.importorskip("matplotlib")
    saved = tmp_path / "here.json"
    saved.write_text(json.dumps(SAVED))
    (tmp_path / "here-notes.md").write_text("Why 15 % is missed.\n")
    output = tmp_path / "docs" / "performance.md"
    output.parent.mkdir()
    main([str(saved), f"--output={output}"])
    text = output.read_text()
    assert "\n\nWhy 15 % is missed.\n\n" in text
    for name in ("roofline", "scaling"):
        svg = output.parent / "performance" / f"here-{name}.svg"
        assert f"(performance/{svg.name})" in text
        assert svg.read_text().lstrip().startswith("<?xml")
    first = {path: path.read_bytes() for path in output.parent.rglob("*.svg")}
    main([str(saved), f"--output={output}"])
    assert first == {path: path.read_bytes() for path in output.parent.rglob("*.svg")}


def test_other_files_are_refused(tmp_path):
    other = copy.deepcopy(SAVED)
    other["benchmarks"] = [{"group": None, "fullname": "x", "extra_info": {}, "stats": {}}]
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="other: x is no case of these benchmarks"):
        read(path)
    other["benchmarks"] = []
    path.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="holds no cases"):
        read(path)
