"""Logical downlink bytes: what a device would have to fetch, whatever ranks it shares with others.

A device that takes part in round t holds the weights of its last participation t0. It
fetches the replies of rounds t0 .. t-1, with the numbers of the devices behind them
where the method needs them, and the plans of those rounds in which it did not take
part; or the newest reply alone where it stands for all before; or the model where that
is less (methods.md 2.17). Then it fetches the plan of round t. When training ends, the
devices of the last round fetch its reply. Where edges stand between them, each edge fetches every round's plan and
reply from the cloud once, whoever takes part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedbench.algorithms.base import CatchUp

#: Bytes of a device's number in a reply (fedbench's accounting constant).
ID_BYTES = 4


class Traffic:
    """Counts downlink payload per device, and that of `edges`; `model_bytes` is the size of the trainable part."""

    def __init__(self, model_bytes: int, catch_up: CatchUp = CatchUp.REPLAY_OF_DEVICES, edges: int = 0) -> None:
        self._model_bytes = model_bytes
        self._edges = edges
        self._catch_up = catch_up
        self._history = [0]
        self._plans: list[int] = []
        self._replies: list[int] = []
        self._resent = 0
        self._last: dict[int, tuple[int, int]] = {}

    def missed(self, device: int, number: int) -> int:
        """Return the bytes that a device fetches before the plan of a round."""
        return min(self._history_of(device, number), self._model_bytes)

    def ahead(self, device: int, number: int) -> int:
        """Return those of the missed bytes that did not come in the course of the last round with this device.

        Between two exchanges of a round its devices need the reply at once; bytes are counted with the next round,
        as those of the last exchange are, but their time was spent. A device that fetches the model gets all of it.
        """
        last, told = self._last.get(device, (None, 0))
        if self._catch_up is CatchUp.NEWEST and last != self._newest():
            told = 0
        return min(max(0, self._history_of(device, number) - told), self._model_bytes)

    def round(
        self,
        number: int,
        devices: Sequence[int],
        plan_bytes: int,
        reply_bytes: int,
        answered: int | None = None,
        told: Sequence[int] = (),
        resent_bytes: int = 0,
    ) -> list[int]:
        """Return the bytes that each of the devices fetches that take part in a round, and remember the round.

        `answered` of them came in time and stand in the reply (None: all). `told`: of each device, those of the
        replies' bytes that came between exchanges, less what it still has to get (none where left out). Plans that
        were sent again are the caller's to charge; edges fetch their `resent_bytes` too.
        """
        downs = [self.missed(device, number) + plan_bytes for device in devices]
        behind = len(devices) if answered is None else answered
        ids = ID_BYTES * behind if self._catch_up is CatchUp.REPLAY_OF_DEVICES else 0
        reply = reply_bytes + ids if reply_bytes else 0
        self._plans.append(plan_bytes)
        self._replies.append(reply)
        self._resent = resent_bytes
        self._history.append(self._history[-1] + plan_bytes + reply)
        self._last.update({d: (number, own) for d, own in zip(devices, told or [0] * len(devices), strict=True)})
        return downs

    def to_edges(self) -> int:
        """Return the bytes that all edges together fetch of the latest round."""
        return self._edges * (self._plans[-1] + self._replies[-1] + self._resent)

    def closing(self) -> int:
        """Return the bytes that a device of the last round fetches when training has ended."""
        return min(self._replies[-1], self._model_bytes) if self._replies else 0

    def state(self) -> dict[str, np.ndarray]:
        """Return int64: `plans` and `replies` [rounds], and `last` [devices, 3] of device, round and bytes told."""
        last = [(device, number, told) for device, (number, told) in self._last.items()]
        sums = {"plans": np.array(self._plans, np.int64), "replies": np.array(self._replies, np.int64)}
        return sums | {"last": np.array(last, np.int64).reshape(-1, 3)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take back what `state` returned."""
        self._plans, self._replies = (state[name].tolist() for name in ("plans", "replies"))
        self._history = [0]
        for plan, reply in zip(self._plans, self._replies, strict=True):
            self._history.append(self._history[-1] + plan + reply)
        self._last = {device: (number, told) for device, number, told in state["last"].tolist()}

    def _history_of(self, device: int, number: int) -> int:
        """Return the bytes of what a device missed before a round, be the model less or not."""
        if self._catch_up is CatchUp.NEWEST:
            newest = self._newest()
            return 0 if newest is None else self._replies[newest]
        last, _ = self._last.get(device, (None, 0))
        if last is None:
            return self._history[number]
        return self._history[number] - self._history[last] - self._plans[last]

    def _newest(self) -> int | None:
        """Return the latest round that had a reply."""
        return next((r for r in reversed(range(len(self._replies))) if self._replies[r]), None)
