"""``python -m eqat_tui`` is ``eqat``."""

from eqat_tui.cli import main

if __name__ == "__main__":
    main()
