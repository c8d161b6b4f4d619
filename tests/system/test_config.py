"""A run's configuration: YAML, overrides, and what is refused before anything heavy loads."""

import dataclasses

import pytest
from moca.config import (
    ConfigError,
    ContrastConfig,
    CptConfig,
    EmbedConfig,
    from_dict,
    load_config,
    save_config,
)

CPT = {"model": "m", "output": "o", "documents": ["d.jsonl"]}


def test_yaml_and_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\noutput: o\ndocuments: [a.jsonl]\nlr: 1e-3\nsteps: 5\n")
    config = load_config(CptConfig, path, ["steps=7", "resume=true", "betas=[0.9, 0.95]"])
    assert (config.steps, config.lr, config.resume) == (7, 1e-3, True)
    assert config.betas == [0.9, 0.95]
    assert config.documents == ["a.jsonl"]


def test_nested_override():
    config = load_config(
        ContrastConfig,
        None,
        ["model=m", "output=o", "pairs.gloss=g.jsonl", "task_weights.gloss=2", "batch_size=4"],
    )
    assert config.pairs == {"gloss": "g.jsonl"}
    assert config.task_weights == {"gloss": 2.0}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("My docs #2", "My docs #2"),
        ("2024", "2024"),
        ("2024-05-01", "2024-05-01"),
        ("{a: b", "{a: b"),
        ("'quoted #1'", "quoted #1"),
        ('"', '"'),
        ('""', ""),
    ],
)
def test_texts_are_taken_as_they_are(text, value):
    config = load_config(EmbedConfig, None, ["model=m", "source=s", f"output={text}"])
    assert config.output == value
    config = load_config(ContrastConfig, None, ["model=m", "output=o", f"pairs.x={text}"])
    assert config.pairs == {"x": value}


@pytest.mark.parametrize(
    ("text", "value"),
    [("manual #2/", ["manual #2/"]), ("[a, 'b #2']", ["a", "b #2"]), ("[2024-x]", ["2024-x"])],
)
def test_one_source_needs_no_brackets(text, value):
    config = load_config(CptConfig, None, ["model=m", "output=o", f"documents={text}"])
    assert config.documents == value
    assert from_dict(CptConfig, {**CPT, "documents": "a.jsonl"}).documents == ["a.jsonl"]


@pytest.mark.parametrize("key", ["source", "output"])
def test_a_text_that_is_needed_is_not_empty(key):
    with pytest.raises(ConfigError, match=f"{key}: expected str, got None"):
        load_config(EmbedConfig, None, ["model=m", "source=s", "output=o", f"{key}="])


def test_saved_config_reads_back(tmp_path):
    config = from_dict(CptConfig, {**CPT, "steps": 3, "flip": 0.25})
    save_config(config, tmp_path / "c.yaml")
    assert load_config(CptConfig, tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lerning_rate": 1.0}, "unknown key 'lerning_rate'"),
        ({"stpes": 5}, "did you mean 'steps'"),
        ({"steps": "many"}, "steps: expected int, got 'many'"),
        ({"steps": 1.5}, "steps: expected int, got 1.5"),
        ({"steps": True}, "steps: expected int, got True"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"resume": "yes please"}, "resume: expected bool"),
        ({"optimizer": "sgd"}, "optimizer: expected one of adamw, muon, got 'sgd'"),
        ({"muon_lr": 1e-3}, "muon_lr: needs optimizer=muon, got adamw"),
        ({"zoom": 1.0}, r"zoom: expected a number in \[0, 1\), got 1.0"),
        ({"mlm_probability": 1.4}, "mlm_probability: expected 0 to 1, got 1.4"),
        ({"lr": float("nan")}, "lr: expected a finite number in float32, got nan"),
        ({"lr": 1e300}, r"lr: expected a finite number in float32, got 1e\+300"),
        ({"lr": 10**400}, "lr: expected float, got 1000"),
        ({"seed": 2**63}, r"seed: expected less than 2\*\*63, got 9223372036854775808"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"lr": 0.0}, "lr: expected more than 0"),
        ({"betas": [0.9]}, "betas: expected two numbers"),
        ({"image_tokens": [256]}, r"image_tokens: expected \[least, most\] .* got \[256\]"),
        ({"image_tokens": [0, 9]}, r"image_tokens: .* 1 <= least, .* got \[0, 9\]"),
        ({"image_tokens": [8, 15]}, r"image_tokens: .* 2 \* least <= most .* got \[8, 15\]"),
        ({"image_tokens": [256, 1024], "max_length": 1000}, "most <= max_length - 2 = 998, got"),
        ({"image_tokens": [1.5, 2]}, r"image_tokens\[0\]: expected int, got 1.5"),
        ({"documents": []}, "documents: expected at least one source"),
        ({"documents": 3}, "documents: expected list"),
    ],
)
def test_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(CptConfig, {**CPT, **values})


def test_missing_key():
    with pytest.raises(ConfigError, match="missing key 'output'"):
        from_dict(CptConfig, {"model": "m", "documents": ["d"]})


def test_task_of_weights_must_exist():
    values = {"model": "m", "output": "o", "pairs": {"emoji": "e"}, "task_weights": {"emojy": 1}}
    with pytest.raises(
        ConfigError, match=r"task_weights: no such task 'emojy'; did you mean 'emoji'"
    ):
        from_dict(ContrastConfig, values)


def test_weights_are_of_every_task_or_of_none():
    values = {"model": "m", "output": "o", "pairs": {"a": "a", "b": "b", "c": "c"}}
    with pytest.raises(ConfigError, match=r"task_weights: .* every task, .* got none for b, c"):
        from_dict(ContrastConfig, {**values, "task_weights": {"a": 1}})
    assert from_dict(ContrastConfig, {**values, "task_weights": {"a": 1, "b": 1, "c": 2}})


def test_dropout_of_a_task_is_a_probability():
    values = {"model": "m", "output": "o", "pairs": {"emoji": "e"}}
    for wrong in (-0.1, 1.5):
        with pytest.raises(ConfigError, match=r"task_token_dropout\.emoji: expected 0 to 1, got"):
            from_dict(ContrastConfig, {**values, "task_token_dropout": {"emoji": wrong}})
    assert from_dict(ContrastConfig, {**values, "task_token_dropout": {"emoji": 0}})


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b\n", "\tx: 1"])
def test_file_that_is_no_config(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(CptConfig, path)


def test_a_key_that_stands_twice(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("model: m\noutput: o\npairs: {a: x, b: y, a: z}\n")
    with pytest.raises(ConfigError, match="key 'a' stands twice"):
        load_config(ContrastConfig, path)


@pytest.mark.parametrize("override", ["steps", "=5", "betas.x=1"])
def test_override_that_is_none(override):
    with pytest.raises(ConfigError):
        load_config(CptConfig, None, ["model=m", "output=o", "documents=[d]", "betas=5", override])


def test_defaults_are_valid():
    """Defaults build a valid config of every kind once the required keys are there."""
    for cls, values in ((CptConfig, CPT), (ContrastConfig, {**CPT, "pairs": {"t": "p"}})):
        known = {f.name for f in dataclasses.fields(cls)}
        assert from_dict(cls, {k: v for k, v in values.items() if k in known})
