"""One run for people: what `fedbench show FILE` prints."""

from __future__ import annotations

from rich import box
from rich.table import Table

from fedbench.base.records import Run
from fedbench.report import units

#: Spans must add up to their rounds within this part of them, or the split of the time is not to be trusted.
OUTSIDE_LIMIT = 0.02


def summary_table(run: Run) -> Table:
    """Return the figures of one run in four blocks: what ran, accuracy, cost, identity."""
    s = run.summary
    target = "none" if s.target_accuracy is None else f"{s.target_accuracy:g} on dev"
    never = f"not in {s.rounds} rounds" if s.target_accuracy is not None else units.NOTHING
    hidden = units.NOTHING if s.hidden_fraction is None else f"{100 * s.hidden_fraction:.0f} %"
    memory = units.quantity(s.peak_device_bytes, "B") if s.peak_device_bytes is not None else "not known"
    blocks = (
        (
            ("method", s.method),
            ("rounds", f"{s.rounds} (stopped by: {s.stop_reason})"),
            ("seed", str(s.seed)),
            ("ranks / devices", f"{s.ranks} / {s.devices}"),
        ),
        (
            ("accuracy at start", units.fraction(s.initial_accuracy)),
            ("probe of the start model", units.fraction(s.probe_accuracy)),
            ("best accuracy", units.fraction(s.best_accuracy)),
            ("final accuracy", units.fraction(s.final_accuracy)),
            ("target", target),
            ("rounds to target", never if s.rounds_to_target is None else str(s.rounds_to_target)),
        ),
        (
            ("device FLOPs", units.quantity(s.device_flops, "FLOP")),
            ("cloud FLOPs", units.quantity(s.cloud_flops, "FLOP")),
            ("replayed entries", units.quantity(s.replay_ops, "")),
            ("uplink per device", units.quantity(s.uplink_bytes, "B")),
            ("uplink per device and round", units.quantity(s.uplink_bytes_per_device_round, "B")),
            ("downlink per device", units.quantity(s.downlink_bytes, "B")),
            ("bytes on the wire, all ranks", units.quantity(s.wire_bytes, "B")),
            ("peak device memory", memory),
            ("round time (median)", units.quantity(s.round_s_median, "s")),
            ("simulated time", units.quantity(s.sim_s, "s")),
            ("transfer hidden", hidden),
            ("time outside spans", _outside(s.unaccounted_fraction)),
        ),
        (
            ("weights", s.weights_sha256[:16]),
            ("trajectory", s.trajectory_sha256[:16]),
        ),
    )
    table = Table(title=s.run_id, box=box.SIMPLE, show_header=False, title_justify="left", title_style="bold")
    table.add_column("figure")
    table.add_column("value", justify="left")
    for rows in blocks:
        for i, row in enumerate(rows):
            table.add_row(*row, end_section=i == len(rows) - 1)
    return table


def _outside(fraction: float) -> str:
    """Return the time that no span covers, marked where it is more than the split of the time may leave out."""
    text = f"{100 * fraction:.1f} %"
    return (
        f"{text}: MORE THAN {100 * OUTSIDE_LIMIT:g} %, times by kind are incomplete"
        if fraction > OUTSIDE_LIMIT
        else text
    )
