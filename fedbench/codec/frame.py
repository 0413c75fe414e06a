"""Frames: one array with a checked header, as bytes.

A frame is checked whole (magic, version, place, codec, sizes, checksum) before anything
in it is decoded, and it is decoded into a size that the receiver knows beforehand. This
module knows no MPI, no model and no pickle.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import lz4.frame
import numpy as np
import xxhash

from fedbench.base.arrays import Unit
from fedbench.base.errors import NumericsError, WireError
from fedbench.codec.codecs import RAW, by_id
from fedbench.codec.coding import Codec

MAGIC = 0x46445242
VERSION = 2

#: Flags: the note's `again`, and a payload that is an LZ4 frame around what the codec wrote.
AGAIN, LZ4 = 1, 2

_HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "<u2"),
        ("codec", "<u1"),
        ("flags", "<u1"),
        ("round", "<u4"),
        ("exchange", "<u4"),
        ("device", "<i4"),
        ("unit", "<u4"),
        ("dtype", "S4"),
        ("loss", "<f4"),
        ("raw_bytes", "<u8"),
        ("coded_bytes", "<u8"),
        ("compute_s", "<f4"),
        ("link_bit_s", "<f4"),
        ("flops", "<f8"),
        ("checksum", "<u8"),
    ]
)
HEADER_BYTES = _HEADER.itemsize
_CHECKSUM_AT = _HEADER.fields["checksum"][1]  # type: ignore[index]


class Place(NamedTuple):
    """Where in the run a frame belongs; `device` is -1 for frames from the cloud."""

    round: int
    exchange: int
    device: int
    unit: int


class Note(NamedTuple):
    """Telemetry in the header: it is shown to people and never enters an update.

    `link_bit_s` is the rate at which a plan came while its device waited for it; 0 where that could not be seen.
    """

    loss: float = float("nan")
    compute_s: float = 0.0
    flops: float = 0.0
    again: bool = False
    link_bit_s: float = 0.0


NO_NOTE = Note()


@dataclass(frozen=True)
class Packed:
    """A frame's bytes [n] (uint8) and the size of its coded payload."""

    frame: np.ndarray
    coded_bytes: int


def codec_of(unit: Unit, codec: Codec) -> Codec:
    """Return the codec that a unit travels in where `codec` is asked for.

    That is raw for what must arrive to the bit, and for what is so small that the codec would not make it smaller.
    """
    return codec if unit.lossy and codec.coded_bytes(unit.entries) < unit.raw_bytes else RAW


def coded_bytes(unit: Unit, codec: Codec) -> int:
    """Return the payload of a unit where `codec` is asked for, without LZ4 (of a unit `at_most`: at most)."""
    used = codec_of(unit, codec)
    return unit.raw_bytes if used is RAW else used.coded_bytes(unit.entries)


def bound(unit: Unit, codec: Codec = RAW) -> int:
    """Return the largest number of bytes that a frame of `unit` can have: LZ4 frames that don't shrink aren't sent."""
    return HEADER_BYTES + coded_bytes(unit, codec)


def pack(
    array: np.ndarray,
    unit: Unit,
    place: Place,
    codec: Codec = RAW,
    note: Note = NO_NOTE,
    out: np.ndarray | None = None,
    *,
    lz4: bool = False,
) -> Packed:
    """Return the frame of `array`, written into `out` (uint8, `bound` long) where given.

    NumericsError where a codec that loses something meets infinity or NaN.
    """
    own = unit.of_bytes(array.nbytes)
    if own is None or array.shape != own.shape or array.dtype != np.dtype(unit.dtype):
        most = " at most" if unit.at_most else ""
        raise WireError(f"{unit.name}: packing {array.dtype}{array.shape}, the unit is {unit.dtype}{unit.shape}{most}.")
    codec, size = codec_of(own, codec), coded_bytes(own, codec)
    frame = np.empty(HEADER_BYTES + size, np.uint8) if out is None else out[: HEADER_BYTES + size]
    if frame.size != HEADER_BYTES + size:
        raise WireError(f"{unit.name}: a frame of {HEADER_BYTES + size} bytes doesn't fit a buffer of {frame.size}.")
    payload = frame[HEADER_BYTES:]
    _encode(array, unit.name, codec, payload)
    flags = AGAIN if note.again else 0
    if lz4:
        shrunk = np.frombuffer(_compress(payload), np.uint8)
        if shrunk.size < size:
            size, flags = shrunk.size, flags | LZ4
            payload[:size] = shrunk
            frame = frame[: HEADER_BYTES + size]
    header = np.zeros(1, _HEADER)
    header["magic"], header["version"], header["codec"], header["flags"] = MAGIC, VERSION, codec.id, flags
    header["round"], header["exchange"], header["device"], header["unit"] = place
    header["dtype"] = np.dtype(unit.dtype).str[1:].encode()
    header["loss"], header["compute_s"], header["flops"] = note.loss, note.compute_s, note.flops
    header["link_bit_s"] = note.link_bit_s
    header["raw_bytes"], header["coded_bytes"] = own.raw_bytes, size
    frame[:HEADER_BYTES] = header.view(np.uint8)
    frame[_CHECKSUM_AT:HEADER_BYTES].view("<u8")[0] = _checksum(frame)
    return Packed(frame, size)


def unpack(
    frame: np.ndarray, unit: Unit, place: Place, allowed: Collection[Codec], sender: str
) -> tuple[np.ndarray, Note]:
    """Return the array and the note, or raise WireError naming `sender`; what travelled raw is a view into `frame`.

    `allowed` are the codecs that the sender may have been asked for.
    """

    def refuse(what: str, found: object, expected: object) -> WireError:
        return WireError(f"Frame of {unit.name} from {sender}: {what} is {found}, expected {expected}.")

    if frame.size < HEADER_BYTES:
        raise refuse("its size", frame.size, f"at least {HEADER_BYTES} bytes")
    header = frame[:HEADER_BYTES].view(_HEADER)[0]
    size, flags = int(header["raw_bytes"]), int(header["flags"])
    own = unit.of_bytes(size)
    expected: Sequence[tuple[str, object, object]] = (
        ("magic", int(header["magic"]), MAGIC),
        ("version", int(header["version"]), VERSION),
        ("round", int(header["round"]), place.round),
        ("exchange", int(header["exchange"]), place.exchange),
        ("device", int(header["device"]), place.device),
        ("unit", int(header["unit"]), place.unit),
        ("dtype", bytes(header["dtype"]), np.dtype(unit.dtype).str[1:].encode()),
        ("raw size", size, unit.raw_bytes if own is None else size),
        ("coded size", int(header["coded_bytes"]), frame.size - HEADER_BYTES),
        ("checksum", int(header["checksum"]), _checksum(frame)),
        ("flags", flags, flags & (AGAIN | LZ4)),
    )
    for what, found, wanted in expected:
        if found != wanted:
            raise refuse(what, found, wanted)
    assert own is not None
    payload = frame[HEADER_BYTES:]
    used, names = by_id(int(header["codec"])), {codec_of(own, codec).name for codec in allowed}
    if used is None or used.name not in names:
        raise refuse("codec", int(header["codec"]) if used is None else used.name, " or ".join(sorted(names)))
    coded = coded_bytes(own, used)
    if flags & LZ4:
        payload = np.frombuffer(_expand(payload, coded, f"Frame of {unit.name} from {sender}"), np.uint8)
    elif payload.size != coded:
        raise refuse(f"coded size of {used.name}", payload.size, coded)
    loss, compute_s, flops, link_bit_s = (float(header[name]) for name in ("loss", "compute_s", "flops", "link_bit_s"))
    note = Note(loss, compute_s, flops, bool(flags & AGAIN), link_bit_s)
    return _decode(payload, own, used, sender), note


def _encode(array: np.ndarray, name: str, codec: Codec, payload: np.ndarray) -> None:
    flat = np.require(array, requirements=["C", "A"]).reshape(-1)
    if codec is RAW:
        payload[:] = flat.view(np.uint8)
        return
    try:
        codec.encode(flat, payload)
    except NumericsError as error:
        raise NumericsError(f"{name}: {error}") from None


def _decode(payload: np.ndarray, unit: Unit, codec: Codec, sender: str) -> np.ndarray:
    if codec is RAW:
        return payload.view(np.dtype(unit.dtype)).reshape(unit.shape)
    array = np.empty(unit.entries, np.float32)
    try:
        codec.decode(payload, array)
    except WireError as error:
        raise WireError(f"Frame of {unit.name} from {sender}: {error}") from None
    return array.reshape(unit.shape)


def place_of(frame: np.ndarray) -> Place:
    """Return where a frame says that it belongs; nothing of it is checked."""
    header = frame[:HEADER_BYTES].view(_HEADER)[0]
    return Place(*(int(header[name]) for name in Place._fields))


def _checksum(frame: np.ndarray) -> int:
    digest = xxhash.xxh3_64(frame[:_CHECKSUM_AT].data)
    digest.update(frame[HEADER_BYTES:].data)
    return digest.intdigest()


def _compress(coded: np.ndarray) -> bytes:
    return lz4.frame.compress(coded.data, content_checksum=True, store_size=False)


def _expand(payload: np.ndarray, size: int, what: str) -> bytes:
    """Return exactly `size` bytes; more, less or trailing bytes are errors."""
    decoder = lz4.frame.LZ4FrameDecompressor()
    try:
        coded = decoder.decompress(payload.tobytes(), max_length=size)
        surplus = b"" if decoder.eof else decoder.decompress(b"", max_length=1)
    except (RuntimeError, EOFError) as error:
        raise WireError(f"{what}: LZ4 refuses it: {error}.") from None
    if len(coded) != size or surplus or not decoder.eof or decoder.unused_data:
        raise WireError(f"{what}: LZ4 data doesn't open to exactly {size} bytes.")
    return coded
