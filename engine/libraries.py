"""How torch and transformers are loaded: it is most of what a run takes before it does anything."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_HIDDEN = ("sklearn", "torchvision")
"""What transformers loads wherever it is installed: for one way of assisted writing, and for images. Nothing
here asks it for either."""


@contextmanager
def libraries() -> Iterator[None]:
    """Load torch, and of transformers what the file of every model in it asks for; inside, what needs them is
    imported.

    Importing makes objects by the hundred thousand that live as long as the process, and hardly any garbage;
    looking for it all the same takes a quarter of the time. So nothing is collected meanwhile, and never
    among what was made.

    Raises:
        ImportError: for a library that is not installed, or is broken.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with _hidden(_HIDDEN):
            import torch  # noqa: F401
            import transformers.generation.utils
            import transformers.masking_utils  # noqa: F401
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


@contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    """Modules that cannot be found by what is imported meanwhile; one that is loaded already is left alone.
    A transformers that is loaded already remembers what is there, and would count on it."""
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    hidden = [name for name in names if name not in modules] if "transformers" not in modules else []
    modules.update(dict.fromkeys(hidden))  # how Python says that there is no such module
    try:
        yield
    finally:
        for name in hidden:
            if modules.get(name, ...) is None:
                del modules[name]
