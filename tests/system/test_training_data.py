"""What training makes of its data: sizes of images, bad records, hard negatives."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from moca.config import ConfigError
from moca.contrast import ContrastObjective, PairBatches, contrast
from moca.data.encode import Encoder
from moca.data.records import Document, Pair
from moca.embed import Embedder
from moca.model import MocaModel
from moca.pretrain import load_objective, pretrain
from moca.run import begin, read_log
from test_training_numbers import STAGES
from tiny import IMAGES, contrast_config, cpt_config


@pytest.mark.parametrize("stage", STAGES)
def test_image_tokens_bound_images_here_and_in_the_saved_model(data, tmp_path, stage):
    make, train = STAGES[stage]
    options = {"steps": 1, "max_length": 40, "image_tokens": [12, 24]}
    page = PIL.Image.new("RGB", (64, 60))
    (tmp_path / "pages").mkdir()
    for number in range(8):
        page.save(tmp_path / "pages" / f"{number}.png")
    rows = [
        {"text": f"number {n} <image>", "images": [f"{n}.png"]}
        if stage == "cpt"
        else {"qry": f"number {n}", "pos_text": f"page {n}", "pos_image_path": f"{n}.png"}
        for n in range(8)
    ]
    source = tmp_path / "pages" / "pages.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {"documents": [str(source)]} if stage == "cpt" else {"pairs": {"pages": str(source)}}
    train(make(data, tmp_path / "run", **options, **sources))
    model = MocaModel.from_pretrained(tmp_path / "run" / "model")
    assert MocaModel.from_pretrained(data["model"]).image_settings == IMAGES
    for side in (64, 8):  # as the checkpoint has them, 4 tokens and 1
        document = Document.of(PIL.Image.new("RGB", (side, side)))
        encoded = Encoder(model.tokenizer, model.image_settings)(document)
        assert len(encoded) - 2 == 16
    embedder = Embedder.from_pretrained(tmp_path / "run" / "model", max_length=26)
    assert embedder.encode([page]).shape == (1, 32)


@pytest.mark.parametrize("cache_images", [False, True])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_image_is_decoded_once_before_the_first_step(
    data, tmp_path, monkeypatch, stage, on_error, cache_images
):
    class FirstStep(Exception):
        pass

    def load_batches(batches, numbers, workers):
        found = len(opened)
        batches[0]
        assert (len(opened) == found) == cache_images
        raise FirstStep(found)

    opened, real = [], PIL.Image.open
    monkeypatch.setattr(PIL.Image, "open", lambda file: opened.append(file) or real(file))
    make, train = STAGES[stage]
    monkeypatch.setattr(f"{train.__module__}.load_batches", load_batches)
    options = {"on_error": on_error, "cache_images": cache_images}
    if stage == "contrast":  # 120 pairs that share 24 pictures
        lines = Path(data["pictures"]).read_text().splitlines()
        rows = [json.loads(line) for line in lines] * 5
        source = tmp_path / "pairs.jsonl"
        source.write_text(
            "".join(f"{json.dumps(r | {'qry': str(n)})}\n" for n, r in enumerate(rows))
        )
        root = str(Path(data["pictures"]).parent)
        options |= {"pairs": {"pictures": str(source)}, "image_root": root}
    with pytest.raises(FirstStep, match=r"^24$"):
        train(make(data, tmp_path / "run", **options))


def with_one_unreadable(data, folder: Path) -> str:
    rows = [json.loads(line) for line in Path(data["pictures"]).read_text().splitlines()]
    for row in rows:
        row["pos_image_path"] = str(Path(data["pictures"]).with_name(row["pos_image_path"]))
    (folder / "bad.png").write_bytes(b"no picture")
    rows[-1]["neg_text"], rows[-1]["neg_image_path"] = [""], [str(folder / "bad.png")]
    source = folder / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(source)


def test_stage2_finds_a_bad_record_before_its_first_step(data, tmp_path):
    """Also where no step would have come to it, as to this one's hard negative."""
    source = with_one_unreadable(data, tmp_path)
    config = contrast_config(
        data, tmp_path / "run", pairs={"pictures": source}, steps=1, hard_negatives=0
    )
    with pytest.raises(ValueError, match=r"pairs\.jsonl line 24: negative 0: image 0: .*bad\.png"):
        contrast(config)
    assert not (tmp_path / "run").exists()


def test_a_refused_resumption_names_what_has_changed(data, tmp_path):
    pairs = {"pictures": with_one_unreadable(data, tmp_path)}
    contrast(contrast_config(data, tmp_path / "run", pairs=pairs, steps=2, on_error="skip"))
    (tmp_path / "bad.png").write_bytes(
        (Path(data["pictures"]).parent / "red-frame.png").read_bytes()
    )
    resumed = contrast_config(data, tmp_path / "run", pairs=pairs, resume=True)
    message = r"made of other batches; .*on_error.*; on_error is 'raise', was 'skip'"
    with pytest.raises(ConfigError, match=message):
        contrast(resumed)


def pairs_with_negatives(*counts: int) -> list[Pair]:
    text = [Document.of(f"number {n}") for n in range(40)]
    return [
        Pair(text[n], text[10 + n], tuple(text[20 + 5 * n : 20 + 5 * n + count]))
        for n, count in enumerate(counts)
    ]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("counts", [(3, 1, 0), (0, 0, 0), (1, 1, 1)])
def test_a_query_has_its_own_hard_negatives_whatever_the_others_have(data, counts, symmetric):
    model = MocaModel.from_pretrained(data["model"])
    encoder = Encoder(model.tokenizer, model.image_settings, 64)
    options = {"temperature": 0.5, "learn_temperature": True, "symmetric": symmetric}
    config = contrast_config(data, "run", hard_negatives=2, **options)
    tasks = {"words": pairs_with_negatives(*counts)}
    batch = PairBatches(tasks, [("words", [0, 1, 2])], encoder, config)[0]
    assert batch.negatives == [min(count, 2) for count in counts]
    assert len(batch.batch) == 6 + sum(batch.negatives)
    states = torch.nn.functional.normalize(torch.randn(len(batch.batch), 16), dim=1)
    states.requires_grad_()
    model.embed = lambda packed: states
    objective = ContrastObjective(model, config)
    temperature = objective.loss.log_temperature
    got = objective(batch)
    d_got = torch.autograd.grad(got, [states, temperature])

    query, document, *hard = states.split([3, 3, *batch.negatives])
    scores = query @ document.T / temperature.exp()
    rows = [
        torch.cat([scores[n], hard[n] @ query[n] / temperature.exp()]).logsumexp(0) - scores[n, n]
        for n in range(3)
    ]
    want = torch.stack(rows).mean()
    if symmetric:
        back = (scores.logsumexp(0) - scores.diagonal()).mean()
        want = 0.5 * (want + back)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(d_got, torch.autograd.grad(want, [states, temperature]))


def test_the_log_tells_rates_temperature_and_what_was_cut(data, tmp_path):
    options = {"max_length": 6, "muon_lr": 6e-3, "learn_temperature": True}
    contrast(contrast_config(data, tmp_path / "run", **options))
    log = read_log(tmp_path / "run")
    assert all(line["muon_lr"] == pytest.approx(2 * line["lr"]) for line in log)
    truncated = [line["counts"]["documents truncated"] for line in log]
    assert 0 < truncated[0] < truncated[-1] and truncated == sorted(truncated)
    assert log[0]["temperature"] == pytest.approx(0.05)
    assert abs(log[-1]["temperature"] - 0.05) > 1e-5
    settings = tmp_path / "run" / "model" / "moca.json"
    saved = json.loads(settings.read_text())
    assert saved["temperature"] == pytest.approx(log[-1]["temperature"], rel=0.01)
    model = MocaModel.from_pretrained(tmp_path / "run" / "model")
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "moca.json").read_text()) == saved
    contrast(
        contrast_config({**data, "model": str(tmp_path / "again")}, tmp_path / "next", steps=1)
    )
    assert read_log(tmp_path / "next")[0]["temperature"] == pytest.approx(0.05)


def test_the_decoder_is_loaded_with_its_targets(data, tmp_path):
    for normalize in (True, False):
        output = tmp_path / str(normalize)
        pretrain(cpt_config(data, output, steps=1, normalize_patches=normalize))
        assert load_objective(output).normalize_patches is normalize


def test_activations_are_made_again_without_a_warning(data, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        pretrain(cpt_config(data, tmp_path / "run", steps=1, gradient_checkpointing=True))
    pretrain(cpt_config(data, tmp_path / "plain", steps=1))
    again, plain = (read_log(tmp_path / name)[0] for name in ("run", "plain"))
    assert again["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    "name", ["activation_checkpointing_enable", "gradient_checkpointing_enable"]
)
def test_one_name_of_gradient_checkpointing_is_enough(data, tmp_path, monkeypatch, name):
    calls = []
    model = SimpleNamespace(vlm=SimpleNamespace(**{name: lambda: calls.append(name)}))
    monkeypatch.setattr(MocaModel, "from_pretrained", lambda *_, **__: model)
    begin(cpt_config(data, tmp_path / "run", gradient_checkpointing=True))
    assert calls == [name]
