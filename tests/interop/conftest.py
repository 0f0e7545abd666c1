"""The models these tests export are those of the normal suite."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# On matrices this small, compiling kernels and a second thread cost more than they compute.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))
