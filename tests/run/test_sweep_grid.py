"""What a sweep varies: values as they are typed and as files have them, and every combination of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.loading import load, load_sweep
from engine.config.sweeps import (
    MOST_RUNS,
    Combination,
    axes_of,
    combinations,
    settings_words,
    typed_axis,
    written_axes,
)
from engine.errors import UsageError

MIXES = "data.mix=c4:0.8,wikitext2:0.2|c4:0.5,wikitext2:0.5"


def combined(*typed: str, **fixed: object) -> list[dict[str, object]]:
    axes = axes_of((), [typed_axis(text) for text in typed], fixed)
    return [one.settings for one in combinations(load("smoke"), axes)]


def refusal(*typed: str, **fixed: object) -> str:
    with pytest.raises(UsageError) as caught:
        combined(*typed, **fixed)
    return str(caught.value)


def test_every_combination_is_made_and_the_last_field_varies_fastest() -> None:
    assert combined("grid.bits=2, 3", "runtime.seed=0,1") == [
        {"grid.bits": 2, "runtime.seed": 0},
        {"grid.bits": 2, "runtime.seed": 1},
        {"grid.bits": 3, "runtime.seed": 0},
        {"grid.bits": 3, "runtime.seed": 1},
    ]


def test_values_with_commas_are_separated_by_bars_and_read_as_set_reads_them() -> None:
    assert [one["data.mix"] for one in combined(MIXES)] == [
        ["c4:0.8", "wikitext2:0.2"],
        ["c4:0.5", "wikitext2:0.5"],
    ]
    assert combined("data.source=a, b.txt|c.txt") == [{"data.source": "a, b.txt"}, {"data.source": "c.txt"}]
    assert combined("data.mix=none|c4:1") == [{"data.mix": None}, {"data.mix": ["c4:1"]}]
    assert combined("export.formats=mlx") == [{"export.formats": ["mlx"]}]
    assert combined('export.formats=["mlx", "hf"]|hf')[0] == {"export.formats": ["mlx", "hf"]}


def test_derived_values_are_those_of_each_run() -> None:
    base = load("smoke", overrides={"block_ap.lr_scaling": "absolute"})
    found = combinations(base, [typed_axis("grid.bits=2,4")])
    assert [one.config.block_ap.lr_weight for one in found] == [2e-5, 1e-5]


def test_paths_are_those_of_where_it_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    first, _ = combinations(load("smoke"), [typed_axis("data.source=a.txt,builtin")])
    assert first.settings == {"data.source": "a.txt"}
    assert first.config.data.source == str(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["grid.bits"], "not of the form key=value,value"),
        (["bits=2"], "bits: there is no such field (did you mean grid.bits?)"),
        (["grid=2"], "grid: is a section"),
        (["grid.bits=2,,3"], "grid.bits: '2,,3' has an empty value"),
        (["grid.bits="], "grid.bits: '' has an empty value"),
        (["grid.bits=2,two"], "grid.bits: cannot be 'two'"),
        (["grid.bits=2,2"], "grid.bits: has the value 2 twice"),
        (["block_ap.lr_weight=0.001,1e-3"], "block_ap.lr_weight: has the value 0.001 twice"),
        (["grid.bits=2", "grid.bits=3"], "grid.bits: is swept twice"),
        (["name=a,b"], "name: is a label"),
        (["export.formats=mlx,hf"], "export.formats: is a list, whose members commas separate"),
        (["export.formats=mlx,hf"], "--sweep 'export.formats=mlx|hf'"),
        (["grid.group_size=32,64", "grid.bits=4,5"], "run 2 (grid.group_size=32, grid.bits=5): grid.bits"),
        ([f"runtime.seed={','.join(map(str, range(MOST_RUNS + 1)))}"], f"asks for {MOST_RUNS + 1} runs"),
        ([], "nothing is swept"),
    ],
)
def test_what_cannot_be_swept_is_refused_in_one_line(typed: list[str], words: str) -> None:
    assert words in refusal(*typed)


def test_a_field_cannot_be_set_and_swept() -> None:
    assert "grid.bits: is set and swept" in refusal("grid.bits=2,3", **{"grid.bits": 2})


def test_a_file_has_fields_with_lists_by_dotted_names_and_as_tables(tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(
        'extends = "smoke"\n[grid]\nsymmetric = true\n[sweep]\n"grid.bits" = [2, "3"]\n'
        'data.mix = ["c4:0.8,wikitext2:0.2", ["c4:1"]]\n[sweep.runtime]\nseed = [5]\n'
    )
    base, table = load_sweep(str(file))
    assert base.grid.symmetric
    axes = axes_of(written_axes(table), [typed_axis("runtime.seed=7,8")], ())
    found = combinations(base, axes)
    assert [settings_words(one.settings) for one in found[:3]] == [
        "grid.bits=2, data.mix=c4:0.8,wikitext2:0.2, runtime.seed=7",  # typed, in the place of the file's
        "grid.bits=2, data.mix=c4:0.8,wikitext2:0.2, runtime.seed=8",
        "grid.bits=2, data.mix=c4:1, runtime.seed=7",
    ]
    assert len(found) == 8
    assert all(one.config.grid.symmetric for one in found)


def test_a_file_of_a_sweep_is_no_single_run_and_not_inherited(tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text('extends = "smoke"\n[sweep]\n"grid.bits" = [2, 3]\n')
    with pytest.raises(UsageError, match=r"line 2: sweep: there is no such field .eqat sweep FILE makes"):
        load(str(file))
    child = tmp_path / "child.toml"
    child.write_text('extends = "grid.toml"\n')
    assert load_sweep(str(child)) == (load(str(child)), {})


@pytest.mark.parametrize("line", ['"grid.bits" = 2', '"grid.bits" = []', 'grid = "2,3"'])
def test_a_field_of_a_file_without_a_list_of_values_is_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(f'extends = "smoke"\n[sweep]\n{line}\n')
    with pytest.raises(UsageError, match=r"sweep\.grid.*must be a list of values"):
        list(written_axes(load_sweep(str(file))[1]))
    file.write_text('extends = "smoke"\nsweep = 3\n')
    with pytest.raises(UsageError, match="sweep: must be a table"):
        load_sweep(str(file))


# -- cases ---------------------------------------------------------------------------------------------

CASES = """extends = "smoke"
[sweep]
"grid.bits" = [2, 3]
[sweep.case.peqa]
block_ap.enabled = false
"e2e_qp.epochs" = 3
[sweep.case.as-it-is]
"""


def cased(tmp_path: Path, *typed: str, text: str = CASES, **fixed: object) -> list[Combination]:
    file = tmp_path / "cases.toml"
    file.write_text(text)
    base, table = load_sweep(str(file))
    axes = axes_of(written_axes(table), [typed_axis(one) for one in typed], fixed)
    return combinations(base, axes)


def test_a_case_sets_several_fields_and_is_combined_with_all_values(tmp_path: Path) -> None:
    found = cased(tmp_path)
    assert [one.settings for one in found] == [
        {"grid.bits": bits, "case": case} for bits in (2, 3) for case in ("peqa", "as-it-is")
    ]
    assert [one.config.block_ap.enabled for one in found] == [False, True] * 2
    assert [one.config.e2e_qp.epochs for one in found] == [3, 1, 3, 1]
    chosen = cased(tmp_path, "case=as-it-is", "runtime.seed=1,2")
    assert [settings_words(one.settings) for one in chosen[:2]] == [
        f"grid.bits=2, case=as-it-is, runtime.seed={seed}" for seed in (1, 2)
    ]


@pytest.mark.parametrize(
    ("typed", "text", "words"),
    [
        (["case=peqa,lora"], CASES, "case: there is no case 'lora' (there are peqa, as-it-is)"),
        (["case=peqa"], 'extends = "smoke"\n', "there is no case 'peqa' (a file has them"),
        (["case=peqa,peqa"], CASES, "case: has the value peqa twice"),
        (["e2e_qp.epochs=1,2"], CASES, "e2e_qp.epochs: is swept, and set by a case"),
        ([], CASES + "block_ap.epoch = 3\n", "block_ap.epoch: there is no such field"),
        ([], CASES + "block_ap.epochs = 'many'\n", "block_ap.epochs: cannot be 'many'"),
        ([], CASES + "block_ap.epochs = 0\n", "run 2 (grid.bits=2, case=as-it-is): block_ap.epochs"),
        ([], CASES + "[sweep.case.'a,b']\n", "'a,b' is no name for a case"),
        ([], 'extends = "smoke"\n[sweep]\ncase = ["peqa"]\n', "sweep.case: must be tables of settings"),
        ([], 'extends = "smoke"\n[sweep.case]\npeqa = 3\n', "sweep.case.peqa: must be a table of settings"),
    ],
)
def test_mistakes_in_cases_are_one_line(tmp_path: Path, typed: list[str], text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        cased(tmp_path, *typed, text=text)
    assert words in str(caught.value)


def test_what_a_case_sets_cannot_be_set_as_well(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"block_ap\.enabled: is set and swept"):
        cased(tmp_path, **{"block_ap.enabled": True})
