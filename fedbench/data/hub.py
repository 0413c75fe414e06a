"""Asks once whether the model hub has a name, so that a machine without network says so at once instead of retrying.

It downloads nothing.
"""

from __future__ import annotations

import re
from typing import Literal

TIMEOUT_S = 10.0

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_id(name: str) -> bool:
    """Return whether `name` could be a hub id: one or two parts of letters, digits, dots, dashes."""
    return _ID.fullmatch(name) is not None


def problem(name: str, kind: Literal["dataset", "model"]) -> str:
    """Return why the hub can't give `name`, or an empty string.

    In offline mode (HF_HUB_OFFLINE=1) nothing is asked: what was downloaded before decides.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    api = HfApi()
    ask = api.dataset_info if kind == "dataset" else api.model_info
    try:
        ask(name, timeout=TIMEOUT_S)
    except OfflineModeIsEnabled:
        return ""
    except RepositoryNotFoundError:
        return f"the hub has no {kind} of this name"
    except Exception as error:  # the client's transport errors share no type between its versions
        return f"the hub can't be reached ({first_line(error)})"
    return ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text without its full stop, or its type."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".: ") if text else type(error).__name__
