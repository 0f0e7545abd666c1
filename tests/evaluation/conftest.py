"""The tiny models are shared with the tests of engine.models."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
torch.set_num_threads(1)
