"""README.md's table of what was loaded follows from docs/formats.md, which `make interop` writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from engine.config.formats import FORMATS


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("table", Path(__file__).parent / "interop" / "table.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_table_in_the_readme_is_the_one_that_was_written(table: ModuleType) -> None:
    readme, page = table.README.read_text(), table.PAGE.read_text()
    assert table.with_summary(readme, page) == readme
    assert all(f"{title}\n" in page for title in ("# What was loaded", "## Of a real model", "## In vLLM"))


def test_every_format_was_loaded(table: ModuleType) -> None:
    loaded = {row["format"].split("`")[1] for row in table._rows(table.PAGE.read_text())}
    assert loaded == set(FORMATS.names())


PAGE = """# What was loaded

| format | bits | group | grid | loader | weights | first prediction | logits differ by |
|---|---|---|---|---|---|---|---|
| `gguf` Q4_0 | 2 | 64 | asymmetric | llama 1 | – | 98.0 % | 0.1 |
| `awq` | 4 | row | asymmetric | gptqmodel 7 | – | 100.0 % | 0.1 |
| `awq` | 4 | 128 | asymmetric | gptqmodel 7 | – | 99.5 % | 0.1 |

## Of a real model

| format | bits | group | loader | tokens | first prediction | perplexity |
|---|---|---|---|---|---|---|
| `awq` | 4 | 64 | gptqmodel 7 | 9 | 99.90 % | 0.99100 |
| `awq` | 4 | 32 | gptqmodel 7 | 9 | 99.90 % | 1.00300 |

## In vLLM

| format | bits | group | loader | first prediction | perplexity | log-probability | written | kernel |
|---|---|---|---|---|---|---|---|---|
| `awq` | 4 | 32 | vllm 1 | 99.90 % | 1.00300 | 0.0100 | 98 % | torch |
"""


def test_a_row_is_the_worst_of_a_format_and_a_loader(table: ModuleType) -> None:
    assert table.summary(PAGE).splitlines()[2:] == [
        "| `gguf` Q4_0 | 2 (64) | llama 1 | 98.0 % | – |",
        "| `awq` | 4 (32, 64, 128, row) | gptqmodel 7 | 99.5 % | × 0.9910 |",
        "| `awq` | 4 (32) | vllm 1, torch in the place of its kernel | 99.9 % | × 1.0030 |",
    ]
    begin, end = table.MARKS
    again = table.with_summary(f"before {begin}typed by hand{end} after", PAGE)
    assert again == f"before {begin}{table.summary(PAGE)}{end} after"
    with pytest.raises(ValueError, match="no place for the table"):
        table.with_summary("no marks", PAGE)
