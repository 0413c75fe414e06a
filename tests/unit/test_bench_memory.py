"""`bench memory`: each arm in a process of its own, and the curve's verdicts on the published claim."""

from __future__ import annotations

from typing import Any

import pytest

from fedbench.base import account
from fedbench.base.errors import ConfigError, FedbenchError
from fedbench.bench import memory
from fedbench.bench.harness import Options

SMALL = Options(model="opt-tiny", batch=4, length=16, threads=1)


def test_an_arm_tells_what_it_held_from_its_start() -> None:
    found = {arm: memory.measure(arm, SMALL) for arm in ("zo_mapped", "zo_resident")}
    for arm in found.values():
        assert arm["peak_bytes"] >= arm["runtime_bytes"] > 50 << 20
    assert found["zo_mapped"]["loss"] == found["zo_resident"]["loss"]
    assert found["zo_mapped"]["weights_bytes"] > 0


def test_an_arm_that_fails_says_why() -> None:
    with pytest.raises(FedbenchError, match=r"zo_mapped ended with status 1: .*no-such-shape"):
        memory.measure("zo_mapped", Options(model="no-such-shape", batch=4, length=16, threads=1))


def test_single_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--batch: found 1; allowed for bench memory: 2 or more"):
        memory.measure("zo_resident", Options(batch=1))


def test_the_curve_says_where_the_claim_holds_and_leaves_out_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(arm: str, at: Options) -> dict[str, Any]:
        tokens = at.batch * at.length
        return {"peak_bytes": {"zo_resident": 10**9, "zo_mapped": 10**8, "adamw": 10**6 * tokens}[arm]}

    monkeypatch.setattr(memory, "measure", measured)
    monkeypatch.setattr(account, "available_bytes", lambda: 10**10)
    options = Options(batch=16, length=256)
    points = memory.curve(options, {arm: measured(arm, options) for arm in ("zo_resident", "zo_mapped", "adamw")})
    assert set(points) == {"4x64", "4x256", "16x64", "16x256", "32x256", "64x256"}
    assert (points["4x64"]["claim_holds_resident"], points["4x64"]["claim_holds_mapped"]) == (False, False)
    assert (points["4x256"]["claim_holds_resident"], points["4x256"]["claim_holds_mapped"]) == (False, True)
    assert points["32x256"]["claim_holds_resident"]
    assert "AdamW may want 16,384,000,000 bytes" in points["64x256"]["left_out"]
