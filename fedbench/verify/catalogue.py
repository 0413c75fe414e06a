"""All claims, and the ones that words of a command line name."""

from __future__ import annotations

from collections.abc import Sequence

from fedbench.base.errors import ConfigError, nearest
from fedbench.verify import cooperllm, fedspzo, memory, plus, traffic, untested
from fedbench.verify.claims import Claim

CLAIMS: tuple[Claim, ...] = (
    *cooperllm.CLAIMS, *memory.CLAIMS, *fedspzo.CLAIMS, *plus.CLAIMS, *traffic.CLAIMS, *untested.CLAIMS,
)  # fmt: skip


def choose(words: Sequence[str]) -> tuple[Claim, ...]:
    """Return the claims that words name, in the catalogue's order; all for no word.

    A word is a whole name, what stands before the dot of one, or else the beginning of some names.
    """
    chosen = {name for word in words for name in _named(word)}
    return tuple(claim for claim in CLAIMS if not words or claim.name in chosen)


def _named(word: str) -> list[str]:
    names = [claim.name for claim in CLAIMS]
    families = list(dict.fromkeys(name.partition(".")[0] for name in names))
    found = [name for name in names if word in (name, name.partition(".")[0])]
    found = found or [name for name in names if word and name.startswith(word)]
    if not found:
        raise ConfigError(
            f"claim: found {word!r}; allowed: {', '.join(names)}, or the beginning of one."
            f"{nearest(word, [*names, *families])}"
        )
    return found
