from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_strategies import structs

from engine.config.data import DataConfig
from engine.config.derived import absolute_paths, resolve
from engine.config.field_docs import field_help
from engine.config.fields import field_names
from engine.config.loading import from_toml, load
from engine.config.overrides import apply_overrides
from engine.config.run import RunConfig
from engine.config.sameness import config_hash
from engine.config.validation import validate
from engine.config.writing import to_toml
from engine.errors import ExitCode, UsageError

SMOKE = load("smoke")


def get(config: RunConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def as_typed(value: Any) -> str:
    """A value as a person types it after ``--set name=``."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)


# -- round trips ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(structs(RunConfig))
def test_every_config_survives_toml(config: RunConfig) -> None:
    assert from_toml(to_toml(config)) == config


@settings(max_examples=60, deadline=None)
@given(structs(RunConfig))
def test_every_config_can_be_typed_as_overrides(config: RunConfig) -> None:
    typed = {name: as_typed(get(config, name)) for name in field_names()}
    # A text that reads "none", or nothing, means "left out" where a field may be.
    words = ("none", "null", "")
    expected = {
        name: None
        if isinstance(get(config, name), str) and _optional(name) and text.strip().lower() in words
        else get(config, name)
        for name, text in typed.items()
    }
    result = apply_overrides(SMOKE, typed)
    assert {name: get(result, name) for name in typed} == expected


def _optional(name: str) -> bool:
    return (
        name.rsplit(".", 1)[-1] in ("revision", "subset", "split", "column") or name == "instructions.source"
    )


def test_the_text_of_every_field_is_a_sentence_that_needs_no_other() -> None:
    leaning = r"(?i)\b(as in|as above|same as|likewise)\b"
    for name, text in field_help().items():
        assert re.fullmatch(r'[A-Z"a-z].* .*[^.]\.', text), (name, text)
        assert not re.search(leaning, text), (name, text)
        assert len(text) <= 160, (name, len(text))


# -- layers --------------------------------------------------------------------------------------------


def test_file_extends_a_preset_and_keeps_its_own_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('extends = "demo"\n[grid]\nbits = 4\n')
    config, demo = load(str(file)), load("demo")
    assert (config.name, config.description, config.grid.bits) == ("mine", "", 4)
    assert config.grid.group_size == demo.grid.group_size
    assert (config.block_ap, config.model) == (demo.block_ap, demo.model)


def test_file_extends_a_file_beside_it_but_not_itself(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("[grid]\nbits = 8\n")
    (tmp_path / "top.toml").write_text('extends = "base.toml"\n[grid]\ngroup_size = 32\n')
    grid = load(str(tmp_path / "top.toml")).grid
    assert (grid.bits, grid.group_size) == (8, 32)
    (tmp_path / "base.toml").write_text('extends = "top.toml"\n')
    with pytest.raises(UsageError, match="extends itself"):
        load(str(tmp_path / "top.toml"))


def test_another_source_drops_what_belonged_to_the_old_one() -> None:
    base = apply_overrides(
        RunConfig(), {"model.source": "a/b", "model.revision": "x", "model.trust_remote_code": "true"}
    )
    assert base.model.trust_remote_code
    other = apply_overrides(base, {"model.source": "c/d", "evaluation.data.source": "c4"})
    assert (other.model.revision, other.model.trust_remote_code) == (None, False)
    assert other.evaluation.data == DataConfig(source="c4")
    kept = apply_overrides(other, {"evaluation.data.source": "x/y", "evaluation.data.split": "dev"})
    assert kept.evaluation.data == DataConfig(source="x/y", split="dev")


def test_run_directory_loads_as_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(to_toml(SMOKE))
    assert load(str(tmp_path)) == SMOKE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("grid = {bits = 'two'}", "grid.bits"),
        ("[grid]\nbitz = 3", "did you mean grid.bits"),
        ("[grid\n", "not valid TOML"),
        ("[block_ap]\ntrain = ['weight']", "block_ap.train"),
        ("extends = 3", "extends"),
        ("extends = 'smok'", "did you mean smoke"),
        ("grid = 3", "grid"),
        (f"[evaluation]\nbatch_size = 0x{'f' * 5000}", "evaluation.batch_size: is a number of 20000 bits"),
        (f"[export]\nformats = [1, 0x{'f' * 5000}]", "export.formats: is a number of 20000 bits"),
        (f"extends = 0b{'1' * 20000}", "extends"),
    ],
)
def test_wrong_file_is_one_usage_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=said) as caught:
        load(str(file))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == ExitCode.USAGE


def test_file_that_is_missing_or_no_text_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load(str(tmp_path / "none.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        load(str(tmp_path / "binary.toml"))
    with pytest.raises(UsageError, match="did you mean demo"):
        load("demoo")


# -- overrides -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("block_ap.epoch", "block_ap.epochs"),
        ("epochs", "block_ap.epochs or e2e_qp.epochs"),
        ("grid.group", "grid.group_size"),
        ("e2e_qp.micro_batchsize", "e2e_qp.micro_batch_size"),
        ("grid.bits.x", "grid.bits"),
        ("grid", "grid.bits, grid.group_size"),
        ("zzz", "fields are in model, grid, data"),
    ],
)
def test_wrong_key_suggests_the_right_one(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        apply_overrides(SMOKE, {name: "3"})
    assert caught.value.where == name
    assert hint in caught.value.hint


@pytest.mark.parametrize("text", ["", ".", "..", "a.", ".a", "model.", "model..source", " "])
def test_malformed_key_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        apply_overrides(SMOKE, {text: "3"})


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("block_ap.lr_weight", "1e-4", 1e-4),
        ("block_ap.lr_weight", "none", None),
        ("block_ap.train", "scales, norms", ("scales", "norms")),
        ("block_ap.train", '["scales"]', ("scales",)),
        ("export.formats", "", ()),
        ("e2e_qp.enabled", "false", False),
        ("grid.group_size", "-1", -1),
        ("runtime.device", "cuda:1", "cuda:1"),
        ("grid.bits", 3, 3),
        ("block_ap.train", ["scales"], ("scales",)),
    ],
)
def test_override_is_read_as_the_field_wants(name: str, typed: object, value: object) -> None:
    assert get(apply_overrides(SMOKE, {name: typed}), name) == value


# -- hash and derived values ---------------------------------------------------------------------------


def test_hash_is_of_what_decides_the_result() -> None:
    same = {"name": "x", "description": "y", "runtime.device": "cpu", "runtime.threads": "3"}
    assert config_hash(apply_overrides(SMOKE, same)) == config_hash(SMOKE)
    assert config_hash(resolve(SMOKE)) == config_hash(SMOKE)
    for name, value in {"runtime.seed": "1", "grid.bits": "3", "e2e_qp.epochs": "2"}.items():
        changed = apply_overrides(SMOKE, {name: value})
        assert config_hash(changed) != config_hash(SMOKE), name


def test_resolve_fills_what_was_left_out_and_nothing_else() -> None:
    given = apply_overrides(SMOKE, {"block_ap.lr_weight": "0.5"})
    resolved = resolve(given)
    assert (resolved.block_ap.lr_weight, resolved.block_ap.lr_quant, resolved.e2e_qp.lr) == (
        0.5,
        0.005,
        0.005,
    )
    assert resolve(resolved) == resolved


def test_symmetric_grid_trains_no_zero_points() -> None:
    config = resolve(apply_overrides(SMOKE, {"grid.symmetric": "true"}))
    assert config.block_ap.train == ("weights", "scales", "norms")
    validate(config)


@pytest.mark.parametrize(("bits", "held"), [(2, 1), (3, 4), (4, 8), (8, 128)])
def test_a_fixed_zero_point_is_that_of_the_symmetric_grid_but_for_2_bits(bits: int, held: int) -> None:
    config = resolve(apply_overrides(SMOKE, {"grid.zero_point": "fixed", "grid.bits": bits}))
    assert config.block_ap.train == ("weights", "scales", "norms")
    assert config.grid.shared.fixed_zero_point == held
    assert config.grid.shared.symmetric == (bits > 2)
    validate(config)


def test_a_field_that_versions_before_did_not_have_changes_no_hash_where_it_has_its_default() -> None:
    tree = msgspec.to_builtins(resolve(SMOKE))
    for name in ("name", "description"):
        del tree[name]
    tree["runtime"] = {"seed": SMOKE.runtime.seed}
    for name in SMOKE.younger():
        del tree[name]
    for name, section in tree.items():
        for field in () if name == "runtime" else get(SMOKE, name).younger():
            del section[field]
    assert "zero_point" not in tree["grid"]
    before = hashlib.sha256(msgspec.json.encode(tree, order="deterministic")).hexdigest()
    assert config_hash(SMOKE) == before
    assert config_hash(apply_overrides(SMOKE, {"grid.zero_point": "learned"})) == before
    fixed = apply_overrides(SMOKE, {"grid.zero_point": "fixed", "grid.bits": 4})
    symmetric = apply_overrides(SMOKE, {"grid.symmetric": "true", "grid.bits": 4})
    assert len({config_hash(fixed), config_hash(symmetric), before}) == 3


def test_local_sources_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    config = apply_overrides(SMOKE, {"data.source": "text.txt", "evaluation.data.source": "c4"})
    made = absolute_paths(config)
    assert made.data.source == str(tmp_path.resolve() / "text.txt")
    assert (made.evaluation.data.source, made.model.source) == ("c4", "random://tiny-llama")


# -- validation ----------------------------------------------------------------------------------------

WRONG: list[tuple[str, Any]] = [
    ("name", ""),
    ("model.source", ""),
    ("model.source", "a\nb"),
    ("model.revision", " "),
    *[("grid.bits", bits) for bits in (0, 1, 5, 16, -2)],
    *[("grid.group_size", size) for size in (0, 16, 48, -2, 512)],
    *[("grid.search_norm", norm) for norm in (0.0, -1.0, 1e9)],
    *[(f"{data}.source", "") for data in ("data", "evaluation.data")],
    *[
        (f"{data}.{field}", "")
        for data in ("data", "evaluation.data")
        for field in ("subset", "split", "column", "revision")
    ],
    *[
        (f"{phase}.{field}", 0)
        for phase in ("block_ap", "e2e_qp")
        for field in ("sequences", "batch_size", "epochs")
    ],
    *[(f"{phase}.sequence_length", 1) for phase in ("block_ap", "e2e_qp", "evaluation")],
    *[
        (f"{phase}.{field}", -1)
        for phase in ("block_ap", "e2e_qp")
        for field in ("val_sequences", "patience")
    ],
    *[
        (f"{phase}.{field}", -0.1)
        for phase in ("block_ap", "e2e_qp")
        for field in ("lr_final_fraction", "weight_decay", "grad_clip")
    ],
    *[
        (f"{phase}.{field}", 1.5)
        for phase in ("block_ap", "e2e_qp")
        for field in ("lr_final_fraction", "weight_decay")
    ],
    *[(f"{phase}.train", ()) for phase in ("block_ap", "e2e_qp")],
    *[(f"{phase}.train", ("scales", "scales")) for phase in ("block_ap", "e2e_qp")],
    *[(f"{phase}.batch_size", 10**6) for phase in ("block_ap", "e2e_qp")],
    *[(name, lr) for name in ("block_ap.lr_weight", "block_ap.lr_quant", "e2e_qp.lr") for lr in (0.0, -1e-4)],
    ("e2e_qp.micro_batch_size", -1),
    ("e2e_qp.micro_batch_size", 3),
    ("e2e_qp.warmup_fraction", 1.1),
    ("evaluation.windows", -1),
    ("evaluation.batch_size", 0),
    ("export.formats", ("gptq_v2", "gptq_v2")),
    ("export.shard_gib", 0.0),
    *[("runtime.device", device) for device in ("", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu ", "cuda:٣")],
    *[("runtime.seed", seed) for seed in (-1, 2**63)],
    *[("runtime.threads", threads) for threads in (-1, 10**6)],
    ("runtime.host_memory_gib", -1.0),
    *[("runtime.checkpoint_minutes", minutes) for minutes in (-1.0, 1e9)],
    *[("runtime.checkpoint_share", share) for share in (0.0, -0.02, 1.5)],
    ("runtime.streams", "kept"),
]


def replaced(config: RunConfig, name: str, value: Any) -> RunConfig:
    section, _, field = name.rpartition(".")
    if not section:
        return msgspec.structs.replace(config, **{field: value})
    inner = msgspec.structs.replace(get(config, section), **{field: value})
    return replaced(config, section, inner)


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_value_is_refused_by_its_field_name(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        validate(replaced(SMOKE, name, value))
    assert caught.value.where == name
    assert caught.value.exit_code == ExitCode.USAGE
    assert "\n" not in str(caught.value)


FLOATS = [name for name in field_names() if isinstance(get(resolve(SMOKE), name), float)]
INTEGERS = [
    name
    for name in field_names()
    if isinstance(get(SMOKE, name), int) and not isinstance(get(SMOKE, name), bool)
]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", FLOATS)
def test_no_number_may_be_nan_or_infinite(name: str, value: float) -> None:
    with pytest.raises(UsageError) as caught:
        validate(replaced(SMOKE, name, value))
    assert caught.value.where == name


@pytest.mark.parametrize("value", [-(10**6), 10**30, "4", None])
@pytest.mark.parametrize("name", INTEGERS)
def test_no_count_may_be_negative_enormous_or_no_number(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        validate(replaced(SMOKE, name, value))
    assert caught.value.where.startswith(name)


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ({"block_ap.patience": "1", "block_ap.val_sequences": "0"}, "block_ap.patience"),
        ({"e2e_qp.patience": "1", "e2e_qp.val_sequences": "0"}, "e2e_qp.patience"),
        ({"grid.symmetric": "true", "block_ap.train": "zero_points"}, "block_ap.train"),
        ({"grid.symmetric": "true", "e2e_qp.train": "zero_points"}, "e2e_qp.train"),
        ({"grid.zero_point": "fixed", "block_ap.train": "zero_points"}, "block_ap.train"),
        ({"grid.zero_point": "fixed", "e2e_qp.train": "scales,zero_points"}, "e2e_qp.train"),
        ({"grid.zero_point": "fixed", "grid.symmetric": "true", "grid.bits": "2"}, "grid.zero_point"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(overrides: dict[str, str], where: str) -> None:
    with pytest.raises(UsageError) as caught:
        validate(apply_overrides(SMOKE, overrides))
    assert caught.value.where == where
    assert caught.value.hint
    with pytest.raises(UsageError) as resolved:
        validate(resolve(apply_overrides(SMOKE, overrides)))
    assert str(resolved.value) == str(caught.value), "deriving what was left out hides no reason"


@pytest.mark.parametrize(
    "overrides",
    [
        {"block_ap.enabled": "false", "block_ap.train": ""},  # PEQA: end to end from round-to-nearest
        {"e2e_qp.enabled": "false", "e2e_qp.train": ""},
        {"block_ap.enabled": "false", "e2e_qp.enabled": "false"},  # round-to-nearest alone
        {"export.formats": ""},
        {"block_ap.val_sequences": "0", "e2e_qp.val_sequences": "0"},
        {"runtime.device": "cuda:7"},
        {"grid.group_size": "-1", "grid.bits": "8"},
        {"e2e_qp.train": "scales,zero_points"},
        {"grid.zero_point": "fixed", "grid.symmetric": "true", "grid.bits": "4"},  # both say the middle
        {"grid.zero_point": "fixed", "e2e_qp.enabled": "false", "e2e_qp.train": "zero_points"},
    ],
)
def test_unusual_but_meaningful_configs_pass(overrides: dict[str, str]) -> None:
    validate(apply_overrides(SMOKE, overrides))


def refusal(check: Callable[[], object]) -> str:
    """The field that ``check`` refuses, or nothing."""
    try:
        check()
    except UsageError as error:
        return error.where.partition("[")[0]
    return ""


@settings(max_examples=150, deadline=None)
@given(structs(RunConfig, any_float=True))
def test_validation_says_yes_or_names_a_field(config: RunConfig) -> None:
    assert refusal(lambda: validate(config)) in ["", *field_names()]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(field_names()), st.text(max_size=10))
def test_any_text_typed_for_any_field_is_taken_or_refused(name: str, text: str) -> None:
    refused = refusal(lambda: validate(apply_overrides(SMOKE, {name: text})))
    assert refused in ["", *field_names()]
