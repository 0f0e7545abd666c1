"""torch and transformers are loaded without what they need for nothing here."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.libraries import libraries

LOADED = """
import gc, sys
from engine.libraries import libraries
with libraries():
    pass
assert "transformers.generation.utils" in sys.modules and "transformers.masking_utils" in sys.modules
assert not {"sklearn", "torchvision"} & set(sys.modules)
assert gc.isenabled()
import sklearn, torchvision  # whoever needs them finds them afterwards
from transformers import LlamaForCausalLM
print(sklearn.__file__)
"""


def test_what_transformers_needs_for_nothing_here_is_not_loaded(tmp_path: Path) -> None:
    """As on a machine where both are installed, on which each takes seconds."""
    for name in ("sklearn", "torchvision"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("roc_curve = None")
    found = subprocess.run(
        [sys.executable, "-c", LOADED],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == str(tmp_path / "sklearn" / "__init__.py")


@pytest.mark.parametrize("collects", [True, False])
def test_collecting_goes_on_as_it_was(collects: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers  # noqa: F401  # that is loaded already, so that nothing may be hidden from it

    monkeypatch.setitem(sys.modules, "sklearn", None)  # hidden by somebody else
    try:
        (gc.enable if collects else gc.disable)()
        with libraries():
            assert not gc.isenabled()
        assert gc.isenabled() == collects
    finally:
        gc.enable()
    assert sys.modules["sklearn"] is None
