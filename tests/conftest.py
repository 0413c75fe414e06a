"""Puts `tests/` on the path, so that every folder of tests shares its helpers (`realdata`, `mpi`)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
