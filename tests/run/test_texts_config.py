"""Several evaluation texts in a configuration: how they are typed, refused, stored, and what they leave as it
was."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.checkpoints.identity import deciding_fields, default_fields, differing_field
from engine.config.derived import absolute_paths, resolve
from engine.config.loading import from_toml, load
from engine.config.overrides import apply_overrides
from engine.config.run import RunConfig
from engine.config.sameness import config_hash, equivalent_command
from engine.config.validation import validate
from engine.config.writing import to_toml
from engine.errors import DataError, UsageError
from engine.offline import everything_is_local
from engine.plan.plan import make_plan


def with_texts(texts: object, **others: object) -> RunConfig:
    config = load("smoke", overrides={"evaluation.data": texts, **others})
    validate(config)
    return config


def test_one_text_is_what_it_was_in_hash_and_file() -> None:
    plain, named = load("smoke"), with_texts("builtin")
    assert config_hash(named) == config_hash(plain)
    assert to_toml(named) == to_toml(plain)
    assert "texts" not in to_toml(plain)
    assert "divergence" not in to_toml(plain)
    assert deciding_fields(named) == deciding_fields(plain)


@pytest.mark.parametrize(
    "texts",
    ["builtin,c4?subset=de&split=test,wikitext2", ["builtin", "c4?subset=de&split=test", "wikitext2"]],
)
def test_a_list_is_one_text_of_the_runs_own_and_others(texts: object) -> None:
    config = with_texts(texts)
    first, second, third = config.evaluation.every_text()
    assert (first.source, second.source, third.source) == ("builtin", "c4", "wikitext2")
    assert (second.subset, second.split) == ("de", "test")
    assert config.evaluation.text_names() == ["builtin", "c4 (subset de, split test)", "wikitext2"]
    assert from_toml(to_toml(config), earlier=True) == config
    assert config_hash(config) != config_hash(load("smoke"))


def test_a_file_may_have_a_string_or_a_list() -> None:
    one = from_toml('[evaluation]\ndata = "c4"\n')
    assert (one.evaluation.data.source, one.evaluation.texts) == ("c4", ())
    several = from_toml('[evaluation]\ndata = ["c4", "builtin"]\n')
    assert (several.evaluation.data.source, several.evaluation.texts) == ("c4", ("builtin",))
    table = from_toml('[evaluation]\ntexts = ["builtin"]\n[evaluation.data]\nsource = "c4"\n')
    assert table == several
    for wrong in ("3", "[3]", "[]", "true"):
        with pytest.raises(UsageError):
            validate(from_toml(f"[evaluation]\ndata = {wrong}\n"))


def test_naming_one_text_takes_the_others_away() -> None:
    several = with_texts("builtin,c4")
    assert apply_overrides(several, {"evaluation.data": "wikitext2"}).evaluation.texts == ()


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ("builtin,builtin", "names one text twice"),
        ("wikitext2,wikitext2?split=test", "names one text twice"),
        ("builtin,self", "not measured on what it writes itself"),
        ("self,builtin", "not measured on what it writes itself"),
        ("builtin,c4?colour=red", "has colour, which there is not"),
        ("", "names no text"),
        ([], "names no text"),
    ],
)
def test_what_cannot_be_measured_on_is_refused_in_a_line(texts: object, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        with_texts(texts)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("evaluation.")


def test_local_texts_become_absolute_and_the_command_names_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.txt").write_text("words")
    monkeypatch.chdir(tmp_path)
    config = absolute_paths(with_texts("builtin,own.txt?split=x"))
    assert config.evaluation.texts == (f"{tmp_path}/own.txt?split=x",)
    assert "evaluation.texts=" in equivalent_command(config)


def test_a_text_of_the_hub_makes_a_run_that_asks_the_hub() -> None:
    assert everything_is_local(with_texts("builtin"))
    assert not everything_is_local(with_texts("builtin,c4"))


def test_a_checkpoint_from_before_goes_on_with_one_text_and_not_with_two() -> None:
    before = deciding_fields(resolve(load("smoke")))
    assert "evaluation.texts" not in before
    one, two = resolve(load("smoke")), resolve(with_texts("builtin,c4"))
    assert differing_field(before, deciding_fields(one), default_fields(one)) is None
    assert differing_field(before, deciding_fields(two), default_fields(two)) == "evaluation.texts"


def test_divergence_is_no_part_of_what_a_run_is() -> None:
    """It changes nothing that is trained, so a run can be resumed with and without it."""
    off = load("smoke", overrides={"evaluation.divergence": "false"})
    assert deciding_fields(resolve(off)) == deciding_fields(resolve(load("smoke")))
    assert "divergence = false" in to_toml(off)


def test_the_plan_counts_all_texts_and_the_second_stream(tmp_path: Path) -> None:
    def plan(**settings: object) -> dict[str, tuple[float, int]]:
        config = load("smoke", overrides={"evaluation.windows": 8, "runtime.device": "cpu", **settings})
        made = make_plan(config, device="cpu", runs_dir=tmp_path)
        parts = {
            phase.name: (phase.seconds, phase.parts.get(f"activation store ({made.activation_store})", 0))
            for phase in made.phases
        }
        return {name: found for name, found in parts.items() if name.startswith("evaluate_")}

    alone, beside = plan(**{"evaluation.divergence": False}), plan()
    assert beside["evaluate_fp"] == alone["evaluate_fp"]
    for name in ("evaluate_rtn", "evaluate_block_ap", "evaluate_e2e_qp"):
        assert beside[name][0] > 1.5 * alone[name][0]
        assert beside[name][1] - alone[name][1] == alone["evaluate_fp"][1]
    both = plan(**{"evaluation.data": ["builtin", "wikitext2"]})
    assert both["evaluate_fp"][1] == 2 * alone["evaluate_fp"][1]


@pytest.mark.parametrize(
    ("field", "value", "where", "hint"),
    [
        ("data.source", "wikitext-2", "data.source = 'wikitext-2'", "wikitext2"),
        ("data.source", "c4:0.5,wikitext2", "data.source = ", "each has a share"),
        ("data.mix", "builtin:0.5,wikitxt:0.5", "data.mix = 'wikitxt'", "wikitext2"),
        ("evaluation.data", "wikitxt", "evaluation.data.source = 'wikitxt'", "wikitext2"),
    ],
)
def test_a_name_behind_which_no_text_can_lie_is_refused_by_the_plan(
    field: str, value: str, where: str, hint: str, tmp_path: Path
) -> None:
    config = load("smoke", overrides={field: value, "runtime.device": "cpu"})
    with pytest.raises(DataError, match="neither a file, nor a hub id") as caught:
        make_plan(config, device="cpu", runs_dir=tmp_path)
    assert caught.value.where.startswith(where)
    assert hint in caught.value.hint
    assert ("self" in caught.value.hint) == field.startswith("data."), "nothing is measured on own text"
