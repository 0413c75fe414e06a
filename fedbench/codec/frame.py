"""Frames: one array with a checked header, as bytes.

A frame is checked whole (magic, version, place, size, checksum) before anything in
it is decoded, and it is decoded into a size that the receiver knows beforehand. This
module knows no MPI, no model and no pickle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import lz4.frame
import numpy as np
import xxhash

from fedbench.base.arrays import Unit
from fedbench.base.errors import WireError

MAGIC = 0x46445242
VERSION = 1
RAW, LZ4 = 0, 1

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
        ("reserved", "<u4"),
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
    """Telemetry in the header: it is shown to people and never enters an update."""

    loss: float = float("nan")
    compute_s: float = 0.0
    flops: float = 0.0
    again: bool = False


NO_NOTE = Note()


@dataclass(frozen=True)
class Packed:
    """A frame's bytes [n] (uint8) and the size of its coded payload."""

    frame: np.ndarray
    coded_bytes: int


def bound(unit: Unit) -> int:
    """Return the largest number of bytes that a frame of `unit` can have: what doesn't shrink travels raw."""
    return HEADER_BYTES + unit.raw_bytes


def pack(
    array: np.ndarray, unit: Unit, place: Place, codec: int, note: Note = NO_NOTE, out: np.ndarray | None = None
) -> Packed:
    """Return the frame of `array`, written into `out` (uint8, `bound` long) where given."""
    own = unit.of_bytes(array.nbytes)
    if own is None or array.shape != own.shape or array.dtype != np.dtype(unit.dtype):
        most = " at most" if unit.at_most else ""
        raise WireError(f"{unit.name}: packing {array.dtype}{array.shape}, the unit is {unit.dtype}{unit.shape}{most}.")
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    payload = raw if codec == RAW else np.frombuffer(_compress(raw), np.uint8)
    if payload.size >= raw.size:
        codec, payload = RAW, raw
    size = HEADER_BYTES + payload.size
    frame = np.empty(size, np.uint8) if out is None else out[:size]
    if frame.size != size:
        raise WireError(f"{unit.name}: a frame of {size} bytes doesn't fit a buffer of {frame.size}.")
    header = np.zeros(1, _HEADER)
    header["magic"], header["version"], header["codec"], header["flags"] = MAGIC, VERSION, codec, note.again
    header["round"], header["exchange"], header["device"], header["unit"] = place
    header["dtype"] = np.dtype(unit.dtype).str[1:].encode()
    header["loss"], header["compute_s"], header["flops"] = note.loss, note.compute_s, note.flops
    header["raw_bytes"], header["coded_bytes"] = raw.size, payload.size
    frame[HEADER_BYTES:] = payload
    frame[:HEADER_BYTES] = header.view(np.uint8)
    frame[_CHECKSUM_AT:HEADER_BYTES].view("<u8")[0] = _checksum(frame)
    return Packed(frame, payload.size)


def unpack(frame: np.ndarray, unit: Unit, place: Place, codec: int, sender: str) -> tuple[np.ndarray, Note]:
    """Return the array (a view into `frame` for the raw codec) and the note, or raise WireError naming `sender`."""

    def refuse(what: str, found: object, expected: object) -> WireError:
        return WireError(f"Frame of {unit.name} from {sender}: {what} is {found}, expected {expected}.")

    if frame.size < HEADER_BYTES:
        raise refuse("its size", frame.size, f"at least {HEADER_BYTES} bytes")
    header = frame[:HEADER_BYTES].view(_HEADER)[0]
    size = int(header["raw_bytes"])
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
    )
    for what, found, wanted in expected:
        if found != wanted:
            raise refuse(what, found, wanted)
    assert own is not None
    payload = frame[HEADER_BYTES:]
    used = int(header["codec"])
    if used not in (RAW, codec):
        raise refuse("codec", used, f"{RAW} or {codec}")
    raw = payload if used == RAW else np.frombuffer(_expand(payload, own, sender), np.uint8)
    array = raw.view(np.dtype(unit.dtype)).reshape(own.shape)
    return array, Note(float(header["loss"]), float(header["compute_s"]), float(header["flops"]), bool(header["flags"]))


def place_of(frame: np.ndarray) -> Place:
    """Return where a frame says that it belongs; nothing of it is checked."""
    header = frame[:HEADER_BYTES].view(_HEADER)[0]
    return Place(*(int(header[name]) for name in Place._fields))


def _checksum(frame: np.ndarray) -> int:
    digest = xxhash.xxh3_64(frame[:_CHECKSUM_AT].data)
    digest.update(frame[HEADER_BYTES:].data)
    return digest.intdigest()


def _compress(raw: np.ndarray) -> bytes:
    return lz4.frame.compress(raw.data, content_checksum=True, store_size=False)


def _expand(payload: np.ndarray, unit: Unit, sender: str) -> bytes:
    """Return exactly the unit's bytes; more, less or trailing bytes are errors."""
    decoder = lz4.frame.LZ4FrameDecompressor()
    try:
        raw = decoder.decompress(payload.tobytes(), max_length=unit.raw_bytes)
        surplus = b"" if decoder.eof else decoder.decompress(b"", max_length=1)
    except (RuntimeError, EOFError) as error:
        raise WireError(f"Frame of {unit.name} from {sender}: LZ4 refuses it: {error}.") from None
    if len(raw) != unit.raw_bytes or surplus or not decoder.eof or decoder.unused_data:
        raise WireError(f"Frame of {unit.name} from {sender}: LZ4 data doesn't open to exactly {unit.raw_bytes} bytes.")
    return raw
