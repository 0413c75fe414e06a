"""The page on claims, docs/claims.md, written from the runs alone: no figure of it is typed in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedbench.base.stats import mean_sd
from fedbench.report import units
from fedbench.report.arms import cumulative
from fedbench.report.table import Grid, to_markdown
from fedbench.results.arms import setting
from fedbench.verify import paired, table
from fedbench.verify.claims import Found, Row
from fedbench.verify.race import sentence
from fedbench.verify.tasks import BUDGETS

#: Arms that are shown against all others, and the control that each stands beside.
_GUIDED = ("cooperllm", "cooperllm_plus")
_CONTROL = "public_only"


def render(rows: Sequence[Row], found: Sequence[Found], origins: Sequence[Mapping[str, Any]], *, quick: bool) -> str:
    """Return the page in Markdown."""
    command = "fedbench verify --quick --page docs/claims.md" if quick else "fedbench verify --page docs/claims.md"
    parts = [
        "# Published claims, tested\n",
        f"This page is written by `{command}`; it is not edited. The rules are in [verify.md](verify.md).\n",
        _provenance(found, origins),
        "## Verdicts\n",
        to_markdown(Grid("", table.headings(), tuple(table.cells(row) for row in rows))),
        _claims(rows),
    ]
    parts += [section for at in found if any(at.runs.values()) for section in _task(at)]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def _claims(rows: Sequence[Row]) -> str:
    parts = ["## What each verdict rests on\n"]
    for name in dict.fromkeys(row.claim.name for row in rows):
        own = [row for row in rows if row.claim.name == name]
        goal = own[0].claim.goal
        parts.append(f"### {name}\n\nPublished: {own[0].claim.published}." + (f" Goal: {goal.words}." if goal else ""))
        parts.append("")
        for row in own:
            told = [sentence(f"{row.verdict}{f': {row.why}' if row.why else ''}")]
            told += row.measured.detail if row.measured is not None else ()
            parts.append(f"- {f'{row.task}: ' if goal else ''}{' '.join(told)}")
        parts.append("")
    return "\n".join(parts)


def _task(found: Found) -> list[str]:
    budgets = [budget for budget in BUDGETS if budget <= _horizon(found)]
    parts = [f"## Runs on {found.task.name}\n"]
    parts.append(f"Job: `jobs/claims/{found.task.path.name}`, with the step sizes that were tuned on other seeds.\n")
    if budgets:
        heads = tuple(f"{budget}" for budget in budgets)
        told = (
            f"Test accuracy in %, mean ± SD over seeds, at the device FLOPs of so many rounds of {found.task.reference}"
        )
        parts.append(f"{told} (public-only: so many rounds).\n")
        parts.append(to_markdown(Grid("", ("arm", "seeds", *heads), tuple(_at_flops(found, budgets)))))
        parts.append("Test accuracy in % after so many rounds of its own.\n")
        parts.append(to_markdown(Grid("", ("arm", "seeds", *heads), tuple(_at_rounds(found, budgets)))))
        parts += _differences(found, budgets, heads)
    parts.append(_costs(found))
    return parts


def _differences(found: Found, budgets: Sequence[int], heads: tuple[str, ...]) -> list[str]:
    """Return, for each guided arm, its lead over every other arm at equal device FLOPs, public-only first."""
    parts = []
    others = sorted(found.runs, key=lambda name: (name != _CONTROL, name in _GUIDED, name))
    for ours in _GUIDED:
        rows = []
        for name in others if found.of(ours) else ():
            if name == ours:
                continue
            each = [paired.differences(_within(found, ours, b), _within(found, name, b)) for b in budgets]
            rows.append(
                (name, *("-" if at is None else f"{at.value:+.1f} ({table.interval(at, 'points')})" for at in each))
            )
        if rows:
            parts.append(f"{ours} minus another arm, in points, same seed against same seed, at equal device FLOPs.\n")
            parts.append(to_markdown(Grid("", ("against", *heads), tuple(rows))))
    return parts


def _costs(found: Found) -> str:
    rows = []
    for name, runs in found.runs.items():
        own = list(runs.values())
        reached = [run.summary.rounds_to_target for run in own if run.summary.rounds_to_target is not None]
        flops = [
            float(cumulative(run, "device_flops")[run.summary.rounds_to_target])
            for run in own
            if run.summary.rounds_to_target is not None
        ]
        count = sum(run.summary.rounds for run in own)
        up, down = (
            sum(float(run.rounds[column].sum()) for run in own) / count for column in ("uplink_bytes", "downlink_bytes")
        )
        lost = len(found.lost.get(name, {}))
        rows.append(
            (
                name,
                setting(own[0].config["method"]["settings"].get("lr")),
                f"{len(own)}" + (f" + {lost} diverged" if lost else ""),
                _percent([run.summary.final_accuracy for run in own]),
                f"{len(reached)} of {len(own) + lost}",
                units.count(sum(reached) / len(reached)) if reached else units.NOTHING,
                units.quantity(sum(flops) / len(flops) if flops else None, ""),
                units.quantity(up, "B"),
                units.quantity(down, "B"),
                units.count(max(run.summary.rounds for run in own)),
            )
        )
    target = {run.summary.target_accuracy for runs in found.runs.values() for run in runs.values()}
    heads = (
        "arm",
        "step size",
        "seeds",
        "final accuracy, %",
        "reached the target",
        "rounds to it",
        "device FLOPs to it",
    )
    text = f"Target on dev: {', '.join(f'{at:g}' for at in target if at is not None) or 'none'}; means over seeds.\n\n"
    return text + to_markdown(Grid("", (*heads, "up a round", "down a round", "rounds run"), tuple(rows)))


def _at_flops(found: Found, budgets: Sequence[int]) -> list[tuple[str, ...]]:
    return [
        (name, str(len(runs)), *(_percent(list(_within(found, name, budget).values())) for budget in budgets))
        for name, runs in found.runs.items()
    ]


def _at_rounds(found: Found, budgets: Sequence[int]) -> list[tuple[str, ...]]:
    rows = []
    for name, runs in found.runs.items():
        own = [[paired.accuracy_within(r, paired.flops_per_round(r), b) for r in runs.values()] for b in budgets]
        rows.append((name, str(len(runs)), *map(_percent, own)))
    return rows


def _within(found: Found, arm: str, budget: int) -> dict[int, float | None]:
    return paired.within(found, found.task.reference, arm, budget)


def _horizon(found: Found) -> int:
    return max((run.summary.rounds for run in found.of(found.task.reference).values()), default=0)


def _percent(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return units.NOTHING
    spread = mean_sd(known)
    return f"{spread.mean:.1f}" + ("" if spread.sd is None else f" ± {spread.sd:.1f}")


def _provenance(found: Sequence[Found], origins: Sequence[Mapping[str, Any]]) -> str:
    """Return when, with which commit and on which machine the runs were made."""
    trees = [run.provenance for at in found for runs in at.runs.values() for run in runs.values()] + list(origins)
    facts = {
        "last run": max((str(tree.get("ended", "")) for tree in trees), default=""),
        "commit": _joined(_commit(tree) for tree in trees),
        "processor": _joined(str(tree.get("cpu", "")) for tree in trees),
        "packages": _joined(
            ", ".join(f"{name} {version}" for name, version in tree.get("packages", {}).items()) for tree in trees
        ),
        "runs": str(sum(len(runs) for at in found for runs in at.runs.values())),
    }
    return to_markdown(Grid("", ("", ""), tuple(facts.items())))


def _commit(provenance: Mapping[str, Any]) -> str:
    commit = provenance.get("commit")
    if not isinstance(commit, Mapping):
        return str(commit or "")
    return f"{commit['hash'][:12]}{' with changes' if commit['dirty'] else ''}"


def _joined(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(value for value in values if value))
