"""The presets: what they promise, and what a published one repeats."""

from __future__ import annotations

import pytest

from engine.config.calibration import texts_of
from engine.config.data import BUILTIN
from engine.config.derived import resolve
from engine.config.loading import from_toml, load, load_sweep, preset_names, sweep_names
from engine.config.overrides import apply_overrides
from engine.config.run import RunConfig
from engine.config.sameness import config_hash
from engine.config.stages import stages_of
from engine.config.validation import validate
from engine.config.writing import to_toml


@pytest.mark.parametrize("name", preset_names())
def test_preset_is_valid_and_round_trips(name: str) -> None:
    config = resolve(load(name))
    assert config.name == name
    assert config.description
    if not config.model.source:  # a recipe, waiting for its model
        config = apply_overrides(config, {"model.source": "org/model"})
    validate(config)
    assert from_toml(to_toml(config)) == config
    assert config_hash(from_toml(to_toml(config))) == config_hash(config)


def test_presets_are_the_promised_ones() -> None:
    llamas = [
        f"{model}-{grid}"
        for model in ("llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3-8b")
        for grid in ("w2g64", "w2g128", "w3g128", "w4g128")
    ]
    assert set(preset_names()) >= {"paper", "smoke", "demo", "demo-w2", *llamas}
    for name in llamas:
        grid = load(name).grid
        assert name.endswith(f"-w{grid.bits}g{grid.group_size}")


@pytest.mark.parametrize(("bits", "weight", "e2e"), [(2, 2e-5, 2e-5), (3, 1e-5, 1e-5), (4, 1e-5, 1e-5)])
def test_paper_preset_is_the_published_recipe(bits: int, weight: float, e2e: float) -> None:
    paper = resolve(load("paper", overrides={"grid.bits": bits}))
    ap, qp = paper.block_ap, paper.e2e_qp
    assert (ap.sequences, ap.val_sequences, ap.sequence_length, ap.batch_size, ap.epochs) == (
        4096,
        64,
        2048,
        2,
        2,
    )
    assert (ap.loss, ap.lr_scaling, ap.lr_weight, ap.lr_quant) == ("mse", "absolute", weight, 1e-4)
    assert (ap.lr_final_fraction, ap.weight_decay, ap.grad_clip, ap.compute_dtype) == (0.05, 0, 0, "float16")
    assert (qp.sequences, qp.sequence_length, qp.batch_size, qp.epochs) == (4096, 4096, 32, 1)
    assert (qp.loss, qp.lr, qp.grad_clip, qp.warmup_fraction) == ("cross_entropy", e2e, 0.3, 0.03)
    assert (qp.train, qp.compute_dtype) == (("scales",), "bfloat16")
    assert (paper.grid.range, paper.data.source) == ("minmax", "redpajama")
    # What this project adds to recipes is left out of it: searched starts, errors that do not count, a share
    # of cross-entropy beside another loss, text of the model's own.
    assert (ap.start, ap.drop_largest, qp.text_weight) == ("range", 0, 0)
    assert [stage.name for stage in stages_of(paper)] == ["block_ap", "e2e_qp"]
    assert paper.data.mix is None
    assert not any(text.data.is_own for text in texts_of(paper.data))


def is_published(preset: str) -> bool:
    """Whether a preset repeats a paper, and so its text."""
    return preset.startswith("llama-") or "paper" in preset


def hub_texts(config: RunConfig) -> set[str]:
    """The calibration texts that somebody else keeps."""
    texts = [text.data for text in texts_of(config.data)]
    return {text.source for text in texts if not text.is_own and text.source != BUILTIN}


OURS = [name for name in (*preset_names(), *sweep_names()) if not is_published(name)]


@pytest.mark.parametrize("name", OURS)
def test_a_preset_of_ours_that_takes_its_text_from_the_hub_takes_web_and_prose(name: str) -> None:
    config = load_sweep(name)[0] if name in sweep_names() else load(name)
    assert hub_texts(config) in (set(), {"c4", "slimpajama"})


def test_methods_that_are_compared_learn_from_the_same_texts_and_a_paper_from_its_own() -> None:
    for name in ("gptq", "lr-qat", "full-qat", "peqa"):
        assert load(name).data.mix == ("c4:0.8", "slimpajama:0.2"), name
    assert hub_texts(load("small")) == {"c4", "slimpajama"}
    published = [name for name in preset_names() if is_published(name)]
    assert len(published) > 3
    assert all(load(name).data.mix is None and len(hub_texts(load(name))) == 1 for name in published)


@pytest.mark.parametrize("sweep", [False, True])
def test_methods_that_are_compared_take_as_many_steps_on_the_same_loss(sweep: bool) -> None:
    """Cross-entropy beside KL is worth some percent by itself."""
    names = {"lr-qat": "lr_qat", "peqa": "e2e_qp", "full-qat": "e2e_qat"}
    given = load_sweep("lr-qat-vs-others")[0] if sweep else None
    shared = ("sequences", "val_sequences", "sequence_length", "batch_size", "epochs", "loss", "text_weight")
    found = [getattr(given or load(name), section) for name, section in names.items()]
    assert len({tuple(getattr(section, field) for field in shared) for section in found}) == 1
    assert found[0].text_weight > 0
