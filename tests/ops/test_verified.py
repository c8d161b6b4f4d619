"""Kernels for GPUs are taken by "auto" only where the table says that their tests have passed."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from moca_fast import _dispatch, _verified
from moca_fast.__main__ import main

HOW = {detail: "x" for detail in _verified.DETAILS}
GPU = (torch.empty(0, device="meta"),)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Calls of pool come from an sm_90, where every backend but cpu could run them."""

    def refusal(op, backend, inputs):
        return "for the CPU" if backend == "cpu" else None

    monkeypatch.setattr(_dispatch, "_refusal", refusal)
    monkeypatch.setattr(_dispatch, "_device", lambda inputs: torch.device("cuda", 0))
    monkeypatch.setattr(_dispatch, "_module", lambda op, backend: backend)
    monkeypatch.setattr(_verified, "architecture", lambda device: "sm_90")
    _dispatch._warn_of_unproven.cache_clear()
    yield lambda table: monkeypatch.setattr(_verified, "table", lambda: table)
    _dispatch._warn_of_unproven.cache_clear()


@pytest.mark.parametrize(
    ("table", "chosen"),
    [
        ({}, "reference"),
        ({"pool": {"cuda": {"sm_90": HOW}, "triton": {"sm_90": HOW}}}, "cuda"),
        ({"pool": {"cuda": {"sm_80": HOW}, "triton": {"sm_90": HOW}}}, "triton"),
        ({"pool": {"triton": {"sm_90": HOW}}}, "triton"),
        ({"attention": {"cuda": {"sm_90": HOW}}}, "reference"),
    ],
)
@pytest.mark.filterwarnings("ignore:moca_fast.pool")
def test_auto_takes_what_is_proven(on_a_gpu, table, chosen):
    on_a_gpu(table)
    assert _dispatch.select("pool", "auto", *GPU).module == chosen


def test_a_named_backend_runs_unproven(on_a_gpu):
    on_a_gpu({})
    for name in ("cuda", "triton"):
        assert _dispatch.select("pool", name, *GPU).module == name


def test_reasons_say_what_is_unproven(on_a_gpu):
    on_a_gpu({"pool": {"triton": {"sm_90": HOW}}})
    reasons = _dispatch._reasons("pool", GPU)
    assert "its tests have not passed on sm_90" in reasons["cuda"]
    assert reasons["triton"] is None


def test_the_slow_way_warns_once(on_a_gpu):
    on_a_gpu({})
    with pytest.warns(UserWarning, match="pool: the reference runs, slowly") as told:
        _dispatch.select("pool", "auto", *GPU)
    assert len(told) == 2
    for name, warning in zip(("cuda", "triton"), told, strict=True):
        assert f"MOCA_BACKEND={name} runs it all the same" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _dispatch.select("pool", "auto", *GPU)


def test_the_table_of_this_version_is_one():
    assert isinstance(_verified.read(_verified.TABLE), dict)


def test_record_adds_and_replaces(tmp_path, monkeypatch):
    path = tmp_path / "verified.json"
    _verified.record({"pool": {"cuda": {"sm_90": HOW}}}, path)
    newer = {**HOW, "date": "later"}
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"pool": {"cuda": {"sm_90": newer, "sm_80": HOW}}}))
    monkeypatch.setattr(_verified, "TABLE", path)
    monkeypatch.setattr("sys.argv", ["moca_fast", "--record", str(results)])
    main()
    assert _verified.read(path) == {"pool": {"cuda": {"sm_80": HOW, "sm_90": newer}}}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"cpu": {"sm_90": HOW}}, "pool, cpu, sm_90: expected a backend of"),
        ({"cuda": {"90a": HOW}}, "pool, cuda, 90a: expected an architecture such as sm_90"),
        ({"cuda": {"sm_90": {"date": "x"}}}, r"expected \('date', 'gpu'.*got \('date',\)"),
    ],
)
def test_wrong_entries(tmp_path, entry, message):
    path = tmp_path / "verified.json"
    with pytest.raises(ValueError, match=message):
        _verified.record({"pool": entry}, path)
    assert not path.exists()
    path.write_text(json.dumps({"pool": entry}))
    with pytest.raises(ValueError, match=message):
        _verified.read(path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], r"expected names with values, got \[\]"),
        ({"attention": 3}, ": attention: expected names with values, got 3"),
        ({"pool": {"cuda": "sm_90"}}, "pool, cuda: expected names with values, got 'sm_90'"),
        ({"pool": {"cuda": {"sm_90": ["date"]}}}, "pool, cuda, sm_90: expected names with"),
    ],
)
def test_what_is_no_table(tmp_path, table, message):
    path = tmp_path / "verified.json"
    path.write_text(json.dumps(table))
    for given in (lambda: _verified.read(path), lambda: _verified.record(table, tmp_path / "new")):
        with pytest.raises(ValueError, match=message):
            given()


def test_a_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "verified.json"
    _verified.record({"pool": {"cuda": {"sm_90": HOW}}}, path)
    before = path.read_bytes()

    def full_disk(self, text, **options):
        self.write_bytes(text.encode()[:9])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        _verified.record({"pool": {"triton": {"sm_90": HOW}}}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_wheel_and_a_record_are_not_asked_for_together(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["moca_fast", "--wheel", "a.whl", "--record", "b.json"])
    with pytest.raises(SystemExit):
        main()
    assert "--record: not allowed with argument --wheel" in capsys.readouterr().err


def test_what_is_not_json(tmp_path, capsys, monkeypatch):
    path = Path(tmp_path, "x.json")
    path.write_text("no")
    monkeypatch.setattr("sys.argv", ["moca_fast", "--record", str(path)])
    with pytest.raises(SystemExit):
        main()
    assert "expected JSON" in capsys.readouterr().err
