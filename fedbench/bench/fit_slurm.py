"""What `fedbench check` finds of Slurm: whether its controller answers, and the limits of the site that sweeps meet.

Slurm's own commands are asked, each with a deadline; no job is submitted.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence

from fedbench.bench.fit import Row, judged

_DEADLINE_S = 15.0
_LIMITS = ("MaxArraySize", "MaxJobCount", "MpiDefault", "KillWait", "JobRequeue")

#: Start forms of fedbench's scripts besides mpirun inside the allocation, which needs no plugin.
_PLUGINS = ("pmix", "pmi2")


def rows() -> list[Row]:
    """Return one row where there is no Slurm, or its controller is silent; else one on limits and one on plugins."""
    if shutil.which("sbatch") is None:
        return [Row("Slurm", "none", "none; sweeps run here by `sweep submit --local`")]
    config = _asked(["scontrol", "show", "config"])
    if config is None:
        advice = "log in where jobs are submitted, or ask the site: `scontrol ping`"
        return [Row("Slurm", "sbatch is there, the controller does not answer", "an answer", "warn", advice)]
    found = limits(config)
    version = found.get("SLURM_VERSION", "unknown version")
    told = ", ".join(f"{name} {found[name]}" for name in _LIMITS if name in found)
    size = found.get("MaxArraySize", "")
    none = size.isdigit() and int(size) < 2
    first = judged(
        "Slurm",
        f"{version}: {told}",
        "arrays (MaxArraySize from 2)",
        warn="this site has no job arrays: a sweep becomes single jobs" if none else "",
    )
    return [first, _plugins()]


def limits(config: str) -> dict[str, str]:
    """Return the settings of `scontrol show config` by name."""
    return {name: value.strip() for name, value in re.findall(r"^(\w+)\s*= (.*)$", config, re.MULTILINE)}


def _plugins() -> Row:
    """Look at the ways in which `srun` can start MPI ranks."""
    said = _asked(["srun", "--mpi=list"]) or ""
    names = sorted({word for word in re.findall(r"[a-z]\w*", said) if word.startswith("pmi")})
    usable = [name for name in names if name.startswith(_PLUGINS)]
    return Row(
        "srun plugins",
        ", ".join(names) or "none",
        "none with mpirun inside the allocation (the default); pmix for Open MPI, pmi2 for MPICH",
        "ok" if usable else "warn",
        "" if usable else "leave launcher = mpirun: srun would start ranks that don't know each other",
    )


def _asked(words: Sequence[str]) -> str | None:
    """Return all that a command prints, or None where it fails or does not end."""
    try:
        ran = subprocess.run(words, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout + ran.stderr if ran.returncode == 0 else None
