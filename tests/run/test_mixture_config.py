"""What is written of a mixture of texts: how it is typed, refused, stored, and what it leaves as it was."""

from __future__ import annotations

import shlex
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoints.identity import deciding_fields, default_fields, differing_field
from engine.config.calibration import (
    CalibrationConfig,
    Member,
    evaluated_share,
    read_part,
    shared_out,
    text_words,
    texts_of,
)
from engine.config.data import DataConfig
from engine.config.derived import absolute_paths, resolve
from engine.config.field_docs import field_help
from engine.config.lists import list_words, members
from engine.config.loading import load
from engine.config.run import RunConfig
from engine.config.sameness import config_hash, equivalent_command
from engine.config.validation import validate
from engine.config.writing import to_toml
from engine.errors import UsageError
from engine.offline import everything_is_local
from eqat_tui.configure import build_config
from eqat_tui.views.setup import HEAD, Draft, complaint, form_line

MIX = ("c4:0.8", "wikitext2:0.2")


def mixed(**settings: object) -> RunConfig:
    return build_config("paper", model="x", settings=[f"{name}={value}" for name, value in settings.items()])


def refused(settings: dict[str, str], base: str = "smoke") -> UsageError:
    with pytest.raises(UsageError) as caught:
        build_config(base, model="x", settings=[f"{name}={value}" for name, value in settings.items()])
    assert "\n" not in str(caught.value)
    return caught.value


def test_shares_are_exact_and_what_rounding_leaves_goes_to_the_largest_remainders() -> None:
    def counts(sequences: int, *shares: str) -> list[int]:
        mix = tuple(f"t{n}:{share}" for n, share in enumerate(shares))
        return shared_out(texts_of(CalibrationConfig(mix=mix)), sequences)

    assert counts(512, "0.8", "0.2") == [410, 102]  # 409.6 and 102.4
    assert counts(10, "1", "1", "1") == [4, 3, 3]
    assert counts(4, "80", "15", "5") == [3, 1, 0]
    assert counts(1000, ".1", "0.2", "0.7") == [100, 200, 700]  # in binary 0.1 + 0.2 + 0.7 is not 1


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=9), st.integers(1, 5000))
def test_any_shares_add_up_to_the_sequences_and_are_less_than_one_off(
    shares: list[int], sequences: int
) -> None:
    texts = [Member(DataConfig(), Fraction(share, sum(shares))) for share in shares]
    counts = shared_out(texts, sequences)
    assert sum(counts) == sequences
    assert all(abs(count - text.share * sequences) < 1 for count, text in zip(counts, texts, strict=True))


def test_each_part_has_options_of_its_own() -> None:
    one, other, third = texts_of(
        CalibrationConfig(
            mix=(
                "allenai/c4?subset=de&split=train&revision=a1:3",
                "a:b,c?.jsonl?column=x%26y%3Fz:0.5",
                " what?.txt : .5 ",
            )
        )
    )
    assert one == (
        DataConfig(source="allenai/c4", subset="de", split="train", revision="a1"),
        Fraction(3, 4),
    )
    assert other == (DataConfig(source="a:b,c?.jsonl", column="x&y?z"), Fraction(1, 8))
    assert third == (DataConfig(source="what?.txt"), Fraction(1, 8))


@pytest.mark.parametrize(
    ("settings", "where", "says"),
    [
        ({"data.mix": "c4"}, "data.mix", "'c4' has no share"),
        ({"data.mix": "c4:x"}, "data.mix", "a number above 0"),
        ({"data.mix": "c4:0"}, "data.mix", "a number above 0"),
        ({"data.mix": "c4:-1"}, "data.mix", "a number above 0"),
        ({"data.mix": "c4:nan"}, "data.mix", "a number above 0"),
        ({"data.mix": f"c4:{'9' * 5000}"}, "data.mix", "a number above 0"),
        ({"data.mix": ":1"}, "data.mix", "is empty"),
        ({"data.mix": "[]"}, "data.mix", "names no text"),
        ({"data.mix": "c4?splt=train:1"}, "data.mix", "has splt, which there is not"),
        ({"data.mix": "c4?split=a&split=b:1"}, "data.mix", "has split, twice"),
        ({"data.mix": "c4?split=:1"}, "data.mix", "is empty"),
        ({"data.mix": "c4:1,wikitext2:1,allenai/c4:1"}, "data.mix", "names one text twice"),
        ({"data.mix": "c4:1", "data.source": "wikitext2"}, "data.mix", "data.source another: wikitext2"),
        ({"data.mix": "c4:1", "data.split": "test"}, "data.split", "belongs to data.source"),
        ({"evaluation.data.mix": "c4:1"}, "evaluation.data.mix", "there is no such field"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_in_one_line(
    settings: dict[str, str], where: str, says: str
) -> None:
    error = refused(settings)
    assert error.where == where
    assert says in str(error)


def test_two_parts_of_one_data_set_are_two_texts(tmp_path: Path) -> None:
    validate(mixed(**{"data.mix": "c4?subset=de:1,c4?subset=fr:1"}))
    (tmp_path / "wikitext2").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "wikitext2" / name).write_text("text")
    both = ",".join(f"{tmp_path}/wikitext2/{name}:1" for name in ("a.txt", "b.txt"))
    validate(mixed(**{"data.mix": both}))
    same = ",".join(f"{tmp_path}/wikitext2/{name}:1" for name in ("a.txt", "../wikitext2/a.txt"))
    assert "twice" in refused({"data.mix": same}).message


def test_source_and_mixture_stand_in_the_place_of_each_other(tmp_path: Path) -> None:
    config = mixed(**{"data.mix": "c4:0.8,wikitext2:0.2"})  # over the preset's data.source
    assert (config.data.mix, config.data.source) == (MIX, "builtin")
    file = tmp_path / "own.toml"
    file.write_text(to_toml(config))
    assert load(str(file)) == config
    for source in ("builtin", "redpajama", str(file)):
        again = build_config(str(file), model="x", data=source)
        assert (again.data.mix, again.data.source) == (None, source)
    child = tmp_path / "child.toml"
    child.write_text('extends = "own.toml"\n[data]\nsource = "c4"\nsplit = "train"\n')
    assert load(str(child)).data == CalibrationConfig(source="c4", split="train")
    child.write_text('extends = "paper"\n[data]\nmix = ["c4:1", "builtin:1"]\n')
    assert load(str(child)).data == CalibrationConfig(mix=("c4:1", "builtin:1"))
    assert build_config(str(file), model="x", settings=["data.mix=none"]).data == CalibrationConfig()
    file.write_text(file.read_text().replace("c4:0.8", "c4"))
    with pytest.raises(UsageError, match=r"own\.toml, line \d+: data\.mix"):
        build_config(str(file), model="x")


def test_data_on_the_command_line_takes_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_config("smoke", data="c4:0.8,wikitext2:0.2").data == CalibrationConfig(mix=MIX)
    monkeypatch.chdir(tmp_path)
    Path("notes:1").write_text("a file of that name")
    assert build_config("smoke", data="notes:1").data.source == "notes:1"
    assert build_config("smoke", data="notes:x").data.source == "notes:x"
    odd = ["a, b.txt:1", 'quote".txt:1', "[x].txt:2"]
    assert members(list_words(odd)) == odd
    assert list_words(MIX) == "c4:0.8,wikitext2:0.2"
    assert build_config("smoke", data=list_words(odd)).data.mix == tuple(odd)


@given(st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12), max_size=4))
def test_lists_are_read_as_they_are_shown(texts: list[str]) -> None:
    assert members(list_words(texts)) == texts


def test_the_equal_command_makes_the_mixture_again() -> None:
    config = resolve(mixed(**{"data.mix": '["a, b?.txt:0.8","c4?split=train:0.2"]'}))
    words = shlex.split(equivalent_command(config))
    assert not any(word.startswith("data.source") for word in words)
    settings = [word for word in words if "=" in word]
    again = build_config("paper", settings=settings)
    assert again == config
    assert equivalent_command(resolve(mixed())) == "eqat run paper --set model.source=x"


def test_paths_of_parts_become_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("{}")
    config = absolute_paths(mixed(**{"data.mix": "a.jsonl?column=x:0.50,c4:0.5"}))
    assert config.data.mix == (f"{tmp_path.resolve()}/a.jsonl?column=x:0.50", "c4:0.5")
    assert read_part("data.mix", (config.data.mix or ("",))[0]).data.column == "x"


def test_a_run_without_a_mixture_is_what_it_was() -> None:
    # The hash is that of the version before there were mixtures.
    assert config_hash(load("smoke")) == SMOKE_HASH
    assert "mix" not in to_toml(load("paper"))
    here, there = deciding_fields(load("smoke")), deciding_fields(load("smoke"))
    del there["data.mix"]  # a checkpoint of that version
    assert differing_field(there, here, default_fields(load("smoke"))) is None
    other = deciding_fields(build_config("smoke", data="builtin:1"))
    assert differing_field(there, other, default_fields(load("smoke"))) == "data.mix"
    assert config_hash(build_config("smoke", data="builtin:1")) != SMOKE_HASH


SMOKE_HASH = "2b694fbc0907b3fe5fcf21c32e55f286fe5736dbe2731335624fd36d51e480f6"


def test_words_and_what_is_evaluated() -> None:
    data = CalibrationConfig(mix=("c4:0.8", "Salesforce/wikitext?split=train:0.15", "builtin:0.05"))
    assert text_words(data) == "80 % c4, 15 % wikitext2 (split train), 5 % builtin"
    assert text_words(CalibrationConfig(source="allenai/c4", split="train")) == "c4"
    assert evaluated_share(data, DataConfig(source="wikitext2", split="test")) == Fraction(3, 20)
    assert evaluated_share(data, DataConfig(source="fineweb-edu")) == 0
    assert "shares" in field_help()["data.mix"]
    assert "shortcut" in field_help()["data.source"]


def test_a_mixture_is_local_where_every_part_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert everything_is_local(build_config("smoke", data=f"{tmp_path}/a.txt:1,builtin:1"))
    assert not everything_is_local(build_config("smoke", data=f"{tmp_path}/a.txt:1,c4:1"))


def test_the_setup_form_takes_and_shows_a_mixture() -> None:
    def text_line(draft: Draft) -> str:
        (row,) = (row for row in HEAD if row.name == "data.source")
        return "".join(words for words, _ in form_line(row, draft, draft.shown(), frozenset(), "", 70))

    draft = Draft(base="smoke").set("data.source", "c4:0.8,wikitext2:0.2")
    assert draft.changes == {"data.mix": "c4:0.8,wikitext2:0.2"}
    assert "*Text" in text_line(draft)
    assert "c4:0.8,wikitext2:0.2" in text_line(draft)
    assert draft.command() == "eqat run smoke --set data.mix=c4:0.8,wikitext2:0.2"
    assert draft.config().data.mix == MIX
    other = draft.set("data.source", "c4")
    assert other.changes == {"data.source": "c4"}
    assert other.set("data.mix", "builtin:1").changes == {"data.mix": "builtin:1"}
    assert draft.set("data.source", "builtin").changes == {}
    assert draft.on("paper").shown().data.mix == MIX
    assert "has no share" in complaint(Draft(base="smoke"), "data.mix", "c4")
    assert "twice" in complaint(Draft(base="smoke"), "data.source", "c4:1,c4:2")


def test_the_setup_form_goes_back_to_one_text_on_a_base_that_is_mixed(tmp_path: Path) -> None:
    base = tmp_path / "mixed.toml"
    base.write_text('extends = "smoke"\n[data]\nmix = ["c4:1", "wikitext2:1"]\n')
    draft = Draft(base=str(base)).set("data.source", "builtin")
    assert draft.changes == {"data.source": "builtin"}
    assert draft.config().data == CalibrationConfig()
