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

from collections.abc import Sequence
from typing import Any

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
        self._told: list[int] = []
        self._last: dict[int, int] = {}

    def missed(self, device: int, number: int) -> int:
        """Return the bytes that a device fetches before the plan of a round."""
        if self._catch_up is CatchUp.NEWEST:
            return min(next((reply for reply in reversed(self._replies) if reply), 0), self._model_bytes)
        last = self._last.get(device)
        since = 0 if last is None else last
        bytes_ = self._history[number] - self._history[since]
        if last is not None:
            bytes_ -= self._plans[last]
        return min(bytes_, self._model_bytes)

    def ahead(self, device: int, number: int) -> int:
        """Return those of the missed bytes that did not come in the course of the last round with this device.

        Between two exchanges of a round its devices need the reply at once; bytes are counted with the next round,
        as those of the last exchange are, but their time was spent.
        """
        last = self._last.get(device)
        return self.missed(device, number) if last is None else max(0, self.missed(device, number) - self._told[last])

    def round(
        self,
        number: int,
        devices: Sequence[int],
        plan_bytes: int,
        reply_bytes: int,
        answered: int | None = None,
        told_bytes: int = 0,
    ) -> list[int]:
        """Return the bytes that each of the devices fetches that take part in a round, and remember the round.

        `answered` of them came in time and stand in the reply (None: all); `told_bytes` of the replies came between
        its exchanges.
        """
        downs = [self.missed(device, number) + plan_bytes for device in devices]
        behind = len(devices) if answered is None else answered
        ids = ID_BYTES * behind if self._catch_up is CatchUp.REPLAY_OF_DEVICES else 0
        reply = reply_bytes + ids if reply_bytes else 0
        self._plans.append(plan_bytes)
        self._replies.append(reply)
        self._told.append(told_bytes)
        self._history.append(self._history[-1] + plan_bytes + reply)
        self._last.update(dict.fromkeys(devices, number))
        return downs

    def to_edges(self) -> int:
        """Return the bytes that all edges together fetch of the latest round."""
        return self._edges * (self._plans[-1] + self._replies[-1])

    def closing(self) -> int:
        """Return the bytes that a device of the last round fetches when training has ended."""
        return min(self._replies[-1], self._model_bytes) if self._replies else 0

    def state(self) -> dict[str, Any]:
        """Return a tree that JSON can hold."""
        last = [[device, number] for device, number in self._last.items()]
        return {"plans": self._plans, "replies": self._replies, "told": self._told, "last": last}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        self._plans, self._replies, self._told = (list(state[name]) for name in ("plans", "replies", "told"))
        self._history = [0]
        for plan, reply in zip(self._plans, self._replies, strict=True):
            self._history.append(self._history[-1] + plan + reply)
        self._last = {int(device): int(number) for device, number in state["last"]}
