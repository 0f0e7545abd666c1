"""The page of promises names tests that are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"


def named() -> Iterator[tuple[str, str]]:
    """File and test of every proof on the page; ``::test`` alone is of the file before it in the row."""
    for row in PAGE.read_text().splitlines():
        file = ""
        for path, test in re.findall(r"`([\w/]+\.py)?(?:::(\w+))?`", row):
            file = path or file
            if path or test:
                yield file, test


def test_every_proof_on_the_page_is_a_test_that_is_there() -> None:
    proofs = list(named())
    assert len(proofs) > 40
    assert [proof for proof in proofs if not _is_there(*proof)] == []


def _is_there(file: str, test: str) -> bool:
    # Prose below the tables names files from the root.
    path = TESTS.parent / file if file.startswith("tests/") else TESTS / file
    return bool(file) and path.is_file() and (not test or f"def {test}(" in path.read_text())
