"""What ``EQAT_EXTENSIONS=toy_extension`` imports."""

import toys

toys.register()
