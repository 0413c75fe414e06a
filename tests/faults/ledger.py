"""The table of a fault campaign: what was injected, and what came of it. It judges nothing; tests do."""

from __future__ import annotations

from dataclasses import dataclass, field

HEAD = ("fault", "injected", "noticed", "readable cause", "made good", "complete and lost", "incomplete and counted")


@dataclass
class Row:
    """One kind of fault; a pair counts (held, due)."""

    injected: int = 0
    pairs: dict[str, list[int]] = field(default_factory=lambda: {name: [0, 0] for name in ("noticed", "cause", "good")})
    lost: int = 0
    counted: int = 0

    def cells(self) -> list[str]:
        """Return the row as text; a dash where nothing is due, such as a cause of what nobody is left to tell of."""
        pairs = [f"{held} of {due}" if held < due else str(due or "-") for held, due in self.pairs.values()]
        return [str(self.injected), *pairs, str(self.lost), str(self.counted)]


class Ledger:
    """Counts injected faults by kind."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def note(
        self,
        fault: str,
        *,
        noticed: bool | None = None,
        cause: bool | None = None,
        good: bool | None = None,
        lost: int = 0,
        counted: int = 0,
    ) -> None:
        """Count one injected fault: whether it was noticed, told in a readable line, and made good; None: not due."""
        row = self.rows.setdefault(fault, Row())
        row.injected += 1
        row.lost += lost
        row.counted += counted
        for pair, held in zip(row.pairs.values(), (noticed, cause, good), strict=True):
            if held is not None:
                pair[0] += held
                pair[1] += 1

    def markdown(self) -> str:
        """Return the table with its sums."""
        total = Row(*(sum(getattr(row, name) for row in self.rows.values()) for name in ("injected",)))
        for row in self.rows.values():
            total.lost, total.counted = total.lost + row.lost, total.counted + row.counted
            for name, pair in row.pairs.items():
                total.pairs[name] = [a + b for a, b in zip(total.pairs[name], pair, strict=True)]
        lines = [HEAD, tuple("---" for _ in HEAD)]
        lines += [(fault, *row.cells()) for fault, row in self.rows.items()]
        lines += [("**all**", *total.cells())]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
