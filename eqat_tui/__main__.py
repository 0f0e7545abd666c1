"""The ``eqat`` program; ``python -m eqat_tui`` is the same."""

from __future__ import annotations

import gc
import os
import sys
from typing import NoReturn

from engine.system.standard_streams import open_standard_streams


def main() -> NoReturn:
    """Open the app where that is all that was asked for, else run a command.

    Reading a command line costs more time than importing the app, so without one there is no reading.
    """
    open_standard_streams()  # before anything opens a file
    # Importing makes objects by the hundred thousand and no garbage; the app turns collection on again.
    gc.disable()
    if len(sys.argv) > 1:
        from eqat_tui.cli import main as run_command

        gc.enable()
        run_command()
    from eqat_tui.terminal import Look, can_open_app, open_app

    if not can_open_app():
        gc.enable()
        from eqat_tui.cli import main as run_command

        run_command()
    from engine.config.tables import load_extensions
    from engine.errors import EqatError

    os.umask(os.umask(0o022) | 0o022)
    from eqat_tui.output import end, print_error

    try:
        load_extensions()
        code = open_app(None, look=Look())
    except EqatError as error:
        print_error(error, as_json=False)
        code = int(error.exit_code)
    end(code)


if __name__ == "__main__":
    main()
