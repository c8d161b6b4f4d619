"""`python -m benchmarks.gpu` where there is no GPU: what is run, what survives a crash, what is
skipped by name, and what may be called proven."""

import json
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_stages, jobs, measure, outcomes
from benchmarks.bench_attention import Attention
from benchmarks.bench_attention import moca as attention
from benchmarks.bench_pool import Pool
from benchmarks.bench_pool import moca as pool
from benchmarks.gpu_report import markdown
from benchmarks.gpu_stages import FOUND, OUT_OF_TIME, Plan
from benchmarks.harness import FACTOR, WrongResult, check
from benchmarks.jobs import Done, Job
from benchmarks.outcomes import FAILED, PASSED, SKIPPED, STARTED, WAITING, Outcome
from moca_fast import _verified

ROOT = Path(__file__).parents[1]
MACHINE = {
    "gpu": "A GPU", "architecture": "sm_90", "driver": "580", "torch": "2.11", "triton": "3.6.0",
    "cuda": "13.0", "python_version": "3.12", "threads": 16, "moca_fast": "0.1.0",
}  # fmt: skip
# Packages that a machine with a GPU may lack.
ABSENT = ("hypothesis", "matplotlib", "datasets", "lxml", "pyarrow", "emoji", "fontTools", "pandas")
BARE = ("-p", "no:hypothesispytest", "-p", "absence")  # its plugin loads without being asked
ABSENCE = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        absent = name.partition(".")[0] in {ABSENT}
        return None if absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def plan(folder: Path, **changes) -> Plan:
    commit = {"id": "0123456789abcdef", "dirty": False}
    given = Plan(folder, "cuda", time.time() + 60, "", dict(MACHINE), commit)
    return replace(given, **changes)


def found(right: bool = True, **own) -> dict:
    return gpu_stages._found(right, "what it found", [], {}, **own)


@pytest.fixture
def stages(monkeypatch):
    """Stages that only note their names; what they return can be changed."""
    ran, results = [], {name: found() for name in gpu.STAGES}
    results["test"]["verified"] = {"pool": {"triton": {"sm_90": {"date": "today"}}}}

    def stage(name):
        def run(given):
            ran.append(name)
            return json.loads(json.dumps(results[name]))

        return run

    monkeypatch.setattr(gpu, "STAGES", {name: stage(name) for name in results})
    monkeypatch.setattr(gpu, "machine", lambda: dict(MACHINE))
    return ran, results


def run(folder: Path, *arguments: str) -> int:
    commit = () if "--commit" in arguments else ("--commit", "c1")
    return gpu.main([f"--output={folder}", "--device=cpu", *commit, *arguments])


def test_stages_run_in_order_and_alone(stages, tmp_path):
    ran, _ = stages
    assert run(tmp_path) == 0
    assert ran == ["build", "test", "bench"]
    ran.clear()
    assert run(tmp_path, "--stage", "tune", "--stage", "test") == 0
    assert ran == ["test", "tune"]


def test_a_wrong_stage_stops_no_other_but_a_failed_build_does(stages, tmp_path):
    ran, results = stages
    results["test"]["right"] = False
    assert run(tmp_path) == 1
    assert ran == ["build", "test", "bench"]
    ran.clear()
    results["build"]["right"] = False
    assert run(tmp_path) == 1
    assert ran == ["build"]


def test_a_stage_replaces_its_own_results_only(stages, tmp_path):
    _, results = stages
    run(tmp_path)
    results["bench"]["summary"] = "other numbers"
    run(tmp_path, "--stage", "bench")
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert set(saved["stages"]) == {"build", "test", "bench"}
    assert saved["stages"]["bench"]["summary"] == "other numbers"
    assert json.loads((tmp_path / "verified.json").read_text()) == saved["verified"] != {}
    assert "other numbers" in (tmp_path / "gpu.md").read_text()
    run(tmp_path, "--stage", "bench", "--commit", "c2")  # tests of another commit prove nothing
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert set(saved["stages"]) == {"bench"} and saved["verified"] == {}


def test_the_stages_start_where_nothing_is_built():
    code = "import sys, benchmarks.gpu; sys.exit('moca_fast' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_unknown_stages_and_missing_gpus_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--stage", "fly"])
    assert "invalid choice: 'fly'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            gpu.main([])
        assert "torch finds no CUDA device" in capsys.readouterr().err


CRASHING = """
import os, signal, pytest

def test_first(): pass

def test_wrong(): assert 1 + 1 == 3, "no"

def test_crash(): os.kill(os.getpid(), signal.SIGKILL)

@pytest.mark.parametrize("backend", ["triton"])
def test_after(backend): pass

def test_absent(): pytest.skip("something is not installed")
"""


def pytest_job(folder: Path, file: Path, *arguments: str) -> Job:
    here = plan(folder)
    return here.pytest("job", file, time.time() + 60, "--rootdir", str(folder), *arguments)


def test_a_crash_costs_one_result(tmp_path):
    (tmp_path / "test_it.py").write_text(CRASHING)
    file = tmp_path / "outcomes.jsonl"
    job = pytest_job(tmp_path, file, str(tmp_path / "test_it.py"))
    log = tmp_path / "log"
    done = jobs.run([job], parallel=1, deadline=time.time() + 60, log=log, folder=tmp_path)
    assert done["job"].status == 0, done["job"].output  # the second process had nothing wrong
    results = {name.partition("::")[2]: one for name, one in outcomes.read(file).items()}
    assert {name: one.outcome for name, one in results.items()} == {
        "test_first": PASSED, "test_wrong": FAILED, "test_crash": STARTED,
        "test_after[triton]": PASSED, "test_absent": SKIPPED,
    }  # fmt: skip
    assert results["test_wrong"].message.startswith("AssertionError: no")
    assert results["test_after[triton]"].backend == "triton"
    assert results["test_absent"].message == "something is not installed"
    assert "exit status -9" in log.read_text()


def test_what_never_ends_costs_one_result(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import time\ndef test_hangs(): time.sleep(99)\ndef test_after(): pass\n"
    )
    file, log = tmp_path / "outcomes.jsonl", tmp_path / "log"
    job = pytest_job(tmp_path, file, "--limit=2", str(tmp_path / "test_it.py"))
    done = jobs.run([job], parallel=1, deadline=time.time() + 60, log=log, folder=tmp_path)
    found = gpu_stages.outcomes_of(file, done["job"])
    assert [(one.outcome, one.message) for one in found] == [
        (STARTED, gpu_stages.CRASHED), (PASSED, ""),
    ]  # fmt: skip
    assert "exit status -14" in log.read_text()


def test_what_was_never_come_to_does_not_pass(tmp_path):
    file = tmp_path / "outcomes.jsonl"
    lines = [Outcome(name, WAITING) for name in "abc"]
    lines += [Outcome("a", STARTED), Outcome("a", PASSED), Outcome("b", STARTED)]
    file.write_text("".join(json.dumps(asdict(line)) + "\n" for line in lines))
    found = gpu_stages.outcomes_of(file, Done(None, ""))
    assert [(one.outcome, one.message) for one in found] == [
        (PASSED, ""), (STARTED, gpu_stages.STOPPED), (SKIPPED, OUT_OF_TIME),
    ]  # fmt: skip


def test_shards_share_the_tests_and_a_late_one_runs_none(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(7))\ndef test_it(i): pass\n"
    )
    shards = [tmp_path / f"{i}.jsonl" for i in range(3)]
    work = [
        replace(
            pytest_job(
                tmp_path, file, f"--shard={i}/2" if i < 2 else "--deadline=1", str(tmp_path)
            ),
            name=str(i),
        )
        for i, file in enumerate(shards)
    ]
    jobs.run(work, parallel=3, deadline=time.time() + 60, log=tmp_path / "log", folder=tmp_path)
    first, second, late = map(outcomes.read, shards)
    assert len(first) == 4 and len(second) == 3 and not set(first) & set(second)
    assert gpu_stages.skips(late.values()) == {OUT_OF_TIME: 7}


def test_what_takes_too_long_is_stopped_with_its_children(tmp_path):
    code = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    work = [Job(name, [sys.executable, "-c", code], {}) for name in ("first", "second")]
    began = time.monotonic()
    done = jobs.run(
        work, parallel=1, deadline=time.time() + 1, log=tmp_path / "log", folder=tmp_path
    )
    assert done["first"].status is done["second"].status is None
    assert time.monotonic() - began < 30


def test_a_bare_machine_collects_everything(tmp_path):
    """Whatever optional package is absent, GPU tests and benchmarks import; reasons are named."""
    (tmp_path / "absence.py").write_text(ABSENCE)
    files = [*gpu_stages.gpu_test_files(), "tests/ops/test_pool.py"]
    files += [f"benchmarks/bench_{name}.py" for name in gpu_stages.BENCHES]
    files = [file for file in files if (ROOT / file).exists()]
    arguments = ["--collect-only", "-qq", *BARE, "--size=tiny", "--peers"]
    command = [sys.executable, "-m", "pytest", *arguments, *files]
    environment = {**plan(tmp_path).environment(), "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] += os.pathsep + str(tmp_path)
    done = jobs.run(
        [Job("collect", command, environment)],
        parallel=1, deadline=time.time() + 300, log=tmp_path / "log", folder=ROOT,
    )["collect"]  # fmt: skip
    assert done.status == 0, done.output


def test_tests_that_want_hypothesis_are_skipped_by_name(tmp_path):
    (tmp_path / "absence.py").write_text(ABSENCE)
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent("""
        from hypothesis import given, settings
        from hypothesis import strategies as st

        @st.composite
        def drawn(draw): return draw(st.integers(0, 60))

        @settings(max_examples=1)
        @given(drawn())
        def test_drawn(number): pass

        def test_plain(): pass
        """)
    )
    file = tmp_path / "outcomes.jsonl"
    job = pytest_job(tmp_path, file, *BARE, str(tmp_path))
    path = job.environment["PYTHONPATH"] + os.pathsep + str(tmp_path)
    job = replace(job, environment={**job.environment, "PYTHONPATH": path})
    done = jobs.run(
        [job], parallel=1, deadline=time.time() + 60, log=tmp_path / "log", folder=tmp_path
    )
    assert done["job"].status == 0, done["job"].output
    drawn, plain = outcomes.read(file).values()
    assert (drawn.outcome, drawn.message) == (SKIPPED, "hypothesis is not installed")
    assert plain.outcome == PASSED


REFUSING = """
import pytest

@pytest.mark.parametrize("backend", [pytest.param("cuda", marks=pytest.mark.gpu), "triton"])
@pytest.mark.parametrize("reason", ["has no {} kernel; backend 'auto' would take cpu", "wrong"])
def test_it(backend, reason):
    if "kernel" in reason:
        reason = f"moca_fast.pool: backend {backend!r} cannot run this call: {reason}"
    raise ValueError(reason.format(backend))
"""


def test_what_has_no_cuda_kernel_is_skipped_by_name(tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "ops" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(REFUSING)
    file = tmp_path / "outcomes.jsonl"
    job = pytest_job(tmp_path, file, str(tmp_path))
    path = job.environment["PYTHONPATH"] + os.pathsep + str(ROOT / "tests" / "ops")
    job = replace(job, environment={**job.environment, "PYTHONPATH": path})
    done = jobs.run(
        [job], parallel=1, deadline=time.time() + 60, log=tmp_path / "log", folder=tmp_path
    )
    results = outcomes.read(file).values()
    assert sorted(one.outcome for one in results) == [FAILED] * 3 + [SKIPPED], done["job"].output
    assert gpu_stages.skips(results) == {"has no cuda kernel": 1}


def test_the_build_is_for_the_gpu_that_torch_sees(tmp_path, monkeypatch):
    monkeypatch.delenv("MOCA_CUDA_ARCHS", raising=False)
    hopper = gpu_stages.build_environment(plan(tmp_path))
    assert (hopper["MOCA_CUDA"], hopper["MOCA_CUDA_ARCHS"]) == ("", "90a")
    machine = {**MACHINE, "architecture": "sm_120"}
    assert gpu_stages.build_environment(plan(tmp_path, machine=machine))["MOCA_CUDA_ARCHS"] == "120"
    assert gpu_stages.build_environment(plan(tmp_path, device="cpu"))["MOCA_CUDA"] == "0"


def gpu_test(name: str, outcome: str = PASSED, backend: str = "", message: str = "") -> Outcome:
    return Outcome(f"tests/ops/test_{name}.py::test_it", outcome, message, backend=backend)


def test_only_what_passed_whole_is_proven(tmp_path):
    results = [
        gpu_test("pool_gpu", backend="triton"),
        gpu_test("pool_gpu", SKIPPED, "cuda", "this build holds no CUDA code"),
        gpu_test("masked_patch_mse_gpu", backend="cuda"),
        gpu_test("masked_patch_mse_gpu", backend="triton"),
        gpu_test("masked_patch_mse_gpu", FAILED, "triton"),
        gpu_test("info_nce_gpu", backend="triton"),
        gpu_test("info_nce_gpu", STARTED, "triton"),
        gpu_test("linear_cross_entropy_gpu", backend="triton"),
        gpu_test("linear_cross_entropy_gpu", SKIPPED, "triton", OUT_OF_TIME),
        gpu_test("attention_gpu", backend="triton"),
        gpu_test("patchify_gpu", backend="triton"),
        gpu_test("patchify_gpu", FAILED),  # of no backend in particular
    ]
    table = gpu_stages.proven(results, ["memcheck attention triton"], plan(tmp_path))
    assert {op: set(backends) for op, backends in table.items()} == {
        "pool": {"triton"}, "masked_patch_mse": {"cuda"},
    }  # fmt: skip
    _verified.check(table, "the table of what passed")
    entry = table["pool"]["triton"]["sm_90"]
    assert entry.pop("date") and entry == {
        "gpu": "A GPU", "driver": "580", "torch": "2.11", "triton": "3.6.0", "cuda": "13.0",
        "commit": "0123456789abcdef",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("status", "output", "verdict"),
    [
        (0, "not checked: float32\nchecked 1 calls\n= ERROR SUMMARY: 0 errors", "clean"),
        (0, "not checked: no kernel\nchecked 0 calls", "not checked: no kernel"),
        (
            1,
            "Error: terminated before first instrumented API call\nnot checked: no kernel\n"
            "checked 0 calls",
            "not checked: no kernel",
        ),
        (FOUND, "========= ERROR SUMMARY: 3 errors", "found 3 errors"),
        (1, "Error: Device not supported", "compute-sanitizer does not reach this GPU"),
        (1, "Traceback", "found exit status 1"),
        (None, "", OUT_OF_TIME),
    ],
)
def test_memory_verdict(status, output, verdict):
    assert gpu_stages.memory_verdict(Done(status, output)) == verdict


def test_report_names_what_is_wrong_and_what_was_skipped():
    tried = [{"tiles": "128, 64, 8, 2", "seconds": 2e-3, "used": "in the table"}]
    bench = found(False)
    bench["problems"] = [{"name": "bench[x]", "message": "out of | memory", "detail": ""}]
    bench["skipped"] = {"liger_kernel is not installed": 2, "never": 0}
    tuned = found(results=[{"kernel": "forward", "work": "attention", "tried": tried}])
    saved = {
        "machine_info": {**MACHINE, "size": "full"},
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "datetime": "2026-11-21T08:00:00",
        "benchmarks": [],
        "verified": {"pool": {"triton": {"sm_90": {}}}},
        "stages": {"bench": {**bench, "seconds": 3}, "tune": {**tuned, "seconds": 4}},
    }
    lines = markdown(saved).splitlines()
    assert lines[0] == "# A GPU"
    assert "Commit 0123456789 with uncommitted changes; sm_90, driver 580, CUDA 13.0" in lines[2]
    assert "| bench | **wrong** | 3 | what it found |" in lines
    assert "| bench | `bench[x]` | out of \\| memory |" in lines
    assert "| bench | liger_kernel is not installed | 2 |" in lines
    assert not any("never" in line for line in lines)
    assert "| pool | triton | sm_90 |" in lines
    assert "| 128, 64, 8, 2 | 2 | in the table |" in lines


def test_a_backward_alone_is_checked_and_timed():
    work = Pool(tokens=50, dim=8, documents=4, forward=False)
    assert work.group.endswith(" bwd")
    call = pool(work, work.leaves("cpu"), work.d_out("cpu"), backend="cpu").prepared(work)
    forwards = []
    call.function = forwards.append
    check(call, work.expected("cpu"), torch.float32, FACTOR)
    check(call, work.expected("cpu"), torch.float32, FACTOR)  # its graph is still there
    assert not forwards


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampled_heads_are_those_of_the_whole(dtype, monkeypatch):
    work = Attention(what="2", lengths=(40, 9), heads=12, kv_heads=4, dim=16, dtype=dtype)
    whole = work.expected("cpu")
    monkeypatch.setattr("benchmarks.bench_attention.MOST_CHECKED", 0)
    monkeypatch.setattr("benchmarks.bench_attention.ORACLE_SCORES", 12 * 40 * 7)
    sampled = work.expected("cpu")
    assert [x.exact.shape[1] for x in sampled] == [6, 6, 2, 2]
    for part, all_of_it in zip(sampled, whole, strict=True):
        torch.testing.assert_close(part.exact, part.part(all_of_it.exact))
    call = attention(work, work.leaves("cpu"), work.d_out("cpu"), backend="cpu").prepared(work)
    check(call, sampled, work.torch_dtype, FACTOR)
    right = call.function
    call.function = lambda *leaves: right(*leaves) * torch.linspace(1, 1.5, 12)[:, None]
    with pytest.raises(WrongResult):
        check(call, sampled, work.torch_dtype, FACTOR)


def test_a_work_is_given_up_before_the_next_is_made(monkeypatch):
    held = []
    monkeypatch.setattr(Pool, "leaves", lambda self, device: held.append(len(measure._at_hand)))
    monkeypatch.setattr(Pool, "expected", lambda self, device: [])
    first = Pool(tokens=5, dim=2, documents=1)
    measure.problem(first, "cpu")
    measure.problem(first, "cpu")
    assert len(held) == 1
    measure.problem(replace(first, tokens=6), "cpu")
    measure.problem(first, "cpu")
    assert len(held) == 3
