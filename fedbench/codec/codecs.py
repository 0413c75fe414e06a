"""The codecs by name and by the number that stands for them in frames; a number is never used again for another one."""

from __future__ import annotations

from collections.abc import Mapping

from fedbench.codec.blocks import Blocks
from fedbench.codec.coding import Codec, Raw
from fedbench.codec.half import Half
from fedbench.codec.topk import TopK

RAW: Codec = Raw(0, "raw", 32.0, 1.0)

CODECS: Mapping[str, Codec] = {
    codec.name: codec
    for codec in (
        RAW,
        Half(2, "fp16", 16.0, 1.0),
        Blocks(3, "int8", 8.125, 0.9999, 8),
        Blocks(4, "int4", 4.125, 0.995, 4),
        Blocks(5, "int2", 2.125, 0.942, 2),
        Blocks(6, "sign", 1.125, 0.801, 1),
        TopK(7, "topk", 1.0625, 0.570),
    )
}

_BY_ID = {codec.id: codec for codec in CODECS.values()}


def by_id(number: int) -> Codec | None:
    """Return the codec that a frame names, or None where there is none of that number."""
    return _BY_ID.get(number)
