"""The form: what it changes, what it calls it, and the command that does the same."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.base import Section
from engine.config.field_docs import field_help
from engine.config.fields import field_names
from engine.config.run import register_section, unregister_section
from engine.config.stages import STAGES, Stage
from engine.config.writing import to_dict
from engine.errors import UsageError
from engine.plan.plan import make_plan
from eqat_tui.cli import app
from eqat_tui.configure import build_config
from eqat_tui.lines import plain
from eqat_tui.plan_text import plan_text
from eqat_tui.views import methods
from eqat_tui.views import setup as views
from eqat_tui.views.setup import Draft

FIELDS = [name for name in field_names() if name not in ("name", "description")]
SOME = {
    "grid.bits": (2, 3, 4, 8),
    "grid.group_size": (32, 64, -1),
    "grid.symmetric": (True, False),
    "grid.zero_point": ("fixed", "learned"),
    "grid.head_bits": (0, 4, 8),
    "block_ap.epochs": ("1", "7"),
    "block_ap.lr_weight": ("1e-4", "none"),
    "block_ap.train": ("weights", "scales,zero_points"),
    "data.source": ("builtin", "c4", "a text with 'quotes'.txt"),
    "model.source": ("org/name", "/a folder/model"),
    "model.trust_remote_code": (True,),
    "runtime.device": ("cpu", "cuda:1"),
    "runtime.seed": ("3",),
}


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["smoke", "demo", "paper", "llama-2-7b-w2g64"]),
    st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in SOME.items()}),
)
def test_the_shown_command_makes_the_same_configuration(base: str, changes: dict[str, object]) -> None:
    draft = Draft(base=base)
    for name, value in changes.items():
        draft = draft.set(name, value)
    words = shlex.split(draft.command(Path("runs")))
    assert words[:2] == ["eqat", "run"]
    command = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    given = command.make_context("run", words[2:], resilient_parsing=True).params
    try:
        wanted = draft.config()
    except UsageError:
        return  # a combination that the form explains and the command refuses
    made = build_config(
        given["target"],
        model=given["model"],
        bits=given["bits"],
        group_size=given["group_size"],
        data=given["data"],
        device=given["device"],
        settings=given["settings"] or (),
        trust_remote_code=bool(given["trust_remote_code"]),
    )
    assert to_dict(made) == to_dict(wanted)


def test_every_setting_is_in_the_form_with_its_meaning() -> None:
    everything = views.rows(frozenset(methods.sections()))
    shown = {row.name for row in everything if row.kind in ("field", "model")}
    of_imports = {name for name in FIELDS if name.startswith("imported.")}  # eqat import sets them
    assert shown | set(methods.switches()) | of_imports == set(FIELDS)
    draft = Draft(base="smoke")
    for row in everything:
        assert views.meaning(row, draft, draft.shown()).strip()


def test_every_setting_says_what_it_means() -> None:
    texts = field_help()
    assert set(FIELDS) <= set(texts)
    assert [name for name in FIELDS if not texts[name]] == []
    assert texts["block_ap.epochs"] == "A block is trained for this many passes over the training sequences."
    assert texts["e2e_qp.lr_scaling"] == texts["block_ap.lr_scaling"]
    assert "``" not in "".join(texts.values())


def test_the_value_of_the_preset_is_no_change() -> None:
    draft = Draft(base="smoke").set("grid.bits", 3)
    assert draft.changes == {"grid.bits": 3}
    assert draft.set("grid.bits", 4).changes == {}
    assert draft.set("grid.bits", "4").changes == {}
    assert draft.reset(["grid.bits"]).changes == {}


def test_a_wrong_value_is_marked_where_it_is() -> None:
    draft = Draft(base="smoke").set("block_ap.batch_size", "0")
    with pytest.raises(UsageError) as caught:
        draft.config()
    assert caught.value.where == "block_ap.batch_size"
    unfolded = frozenset({"block_ap"})
    rows = views.rows(unfolded)
    lines = {
        row.name: plain(
            views.form_line(row, draft, draft.shown(), frozenset({"block_ap"}), caught.value.where, 60)
        )
        for row in rows
    }
    assert lines["block_ap.batch_size"].endswith("!")
    assert "!" in lines["block_ap"]
    assert not lines["grid.bits"].endswith("!")


def test_a_fixed_zero_point_is_chosen_in_the_form_and_the_plan_says_what_it_opens() -> None:
    assert views.choices("grid.zero_point") == ("learned", "fixed")
    assert "grid.zero_point" in views.section_fields("grid")
    for value, words in (("learned", ""), ("fixed", "all 1: exact in GGUF Q2_0")):
        config = Draft(base="smoke").set("grid.bits", 2).set("grid.group_size", 64)
        plan = make_plan(config.set("grid.zero_point", value).config()).to_dict()
        form = " ".join(map(plain, views.plan_lines(plan, 40)))
        assert [f"zero points {words}" in form, "zero points" in form] == [bool(words)] * 2
        text = [line for line in plan_text(plan).splitlines() if "zero points" in line]
        assert [line.split(None, 2)[2] for line in text] == ([words] if words else [])


def test_a_quantized_head_is_chosen_in_the_form_and_the_plan_says_what_it_saves() -> None:
    assert views.choices("grid.head_bits") == (0, 4, 8)
    assert "grid.head_bits" in views.section_fields("grid")
    assert views.what_it_takes("grid.head_bits") == "0 (16-bit numbers), 4 or 8"
    for bits in (0, 8):
        draft = Draft(base="smoke").set("grid.head_bits", bits).set("export.formats", "mlx")
        plan = make_plan(draft.config()).to_dict()
        form = " ".join(map(plain, views.plan_lines(plan, 40)))
        assert ("at 8 bits" in form) is bool(bits)
        text = [line for line in plan_text(plan).splitlines() if line.startswith("  head ")]
        assert len(text) == bool(bits)
    assert "rounded to nearest, not trained" in text[0]


METHODS = {
    "EfficientQAT: Block-AP, then E2E-QP": ("block_ap", "e2e_qp"),
    "Block-AP, then E2E-QAT": ("block_ap", "e2e_qat"),
    "Block-AP, then LR-QAT": ("block_ap", "lr_qat"),
    "Block-AP only": ("block_ap",),
    "GPTQ, then E2E-QP": ("gptq", "e2e_qp"),
    "GPTQ, then E2E-QAT": ("gptq", "e2e_qat"),
    "GPTQ, then LR-QAT": ("gptq", "lr_qat"),
    "GPTQ only": ("gptq",),
    "E2E-QP only, on rounded weights": ("e2e_qp",),
    "E2E-QAT only, on rounded weights": ("e2e_qat",),
    "LR-QAT only, on rounded weights": ("lr_qat",),
    "rounding only, nothing is trained": (),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_what_they_say(name: str) -> None:
    draft = Draft(base="smoke")
    for stage in ("block_ap", "gptq", "e2e_qp", "e2e_qat", "lr_qat"):
        draft = draft.set(f"{stage}.enabled", stage in METHODS[name])
    assert methods.method_of(draft.shown()) == name
    assert Draft(base="smoke").with_method(name) == draft


def test_methods_are_chosen_from_in_the_same_order() -> None:
    assert list(methods.methods()) == list(METHODS)


def test_sections_are_called_as_their_stages_are() -> None:
    assert methods.sections() == {
        "model": "Model",
        "grid": "Grid",
        "data": "Calibration text",
        "block_ap": "Block-AP",
        "gptq": "GPTQ",
        "e2e_qp": "E2E-QP",
        "e2e_qat": "E2E-QAT",
        "lr_qat": "LR-QAT",
        "instructions": "Instructions",
        "evaluation": "Evaluation",
        "export": "Export",
        "runtime": "Where and how it runs",
    }


def test_settings_are_found_by_name_before_meaning() -> None:
    assert views.matching("epochs")[:2] == ["block_ap.epochs", "e2e_qp.epochs"]
    assert "runtime.checkpoint_minutes" in views.matching("kill loses")
    assert views.matching("no such word") == []


class ToyConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A method of somebody's package."""

    enabled: bool = False
    """Whether the toy is played with."""
    turns: int = 3
    """Turns that are taken with the toy."""


@pytest.fixture
def toy() -> Iterator[None]:
    register_section("toy", ToyConfig)
    STAGES.register(Stage(name="toy", label="Toy method", scope="block"))
    yield
    STAGES.unregister("toy")
    unregister_section("toy")


@pytest.mark.usefixtures("toy")
def test_an_extensions_stage_is_chosen_as_a_method_and_its_section_is_edited() -> None:
    assert list(methods.methods()) == [
        "EfficientQAT: Block-AP, then E2E-QP",
        "Block-AP, then E2E-QAT",
        "Block-AP, then LR-QAT",
        "Block-AP only",
        "GPTQ, then E2E-QP",
        "GPTQ, then E2E-QAT",
        "GPTQ, then LR-QAT",
        "GPTQ only",
        "Toy method, then E2E-QP",
        "Toy method, then E2E-QAT",
        "Toy method, then LR-QAT",
        "Toy method only",
        "E2E-QP only, on rounded weights",
        "E2E-QAT only, on rounded weights",
        "LR-QAT only, on rounded weights",
        "rounding only, nothing is trained",
    ]
    draft = Draft(base="smoke").with_method("Toy method only").set("toy.turns", "5")
    assert "--set toy.turns=5" in draft.command()
    assert methods.method_of(draft.shown()) == "Toy method only"
    assert methods.method_of(draft.with_method("Block-AP only").shown()) == "Block-AP only"
    rows = views.rows(frozenset(["toy"]))
    folded = [row.label for row in rows if row.kind == "section"]
    assert folded[3:9] == ["Block-AP", "GPTQ", "E2E-QP", "E2E-QAT", "LR-QAT", "Toy method"]
    (turns,) = [row for row in rows if row.name == "toy.turns"]
    shown = plain(views.form_line(turns, draft, draft.shown(), frozenset(["toy"]), "", 60))
    assert shown.split() == ["*turns", "5"]
    assert "Turns that are taken with the toy." in views.meaning(turns, draft, draft.shown())
