"""Every shipped job takes every method by its name alone, with a tuned step size; the job page lists every key."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from fedbench.base import config
from fedbench.base.config import Setting
from fedbench.base.job import Config
from fedbench.run.build import METHODS, resolve

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.toml"))


def test_there_are_jobs() -> None:
    assert {"demo", "scale_1e6", "sst2_minilm", "trec_minilm"} <= {job.stem for job in JOBS}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_every_job_takes_every_method_with_its_own_step_size(job: Path, method: str) -> None:
    loaded = config.load(job, [Setting(("method", "name"), method)])
    resolved = resolve(loaded, str(job))
    assert resolved.tree["method"]["name"] == method
    assert "lr" in loaded.method[method], f"{job.name} has no tuned step size for {method}"
    assert resolved.settings.lr == loaded.method[method]["lr"]


def test_the_job_page_lists_every_key_with_its_meaning() -> None:
    page = (ROOT / "docs" / "job_file.md").read_text()
    for section, field in Config.model_fields.items():
        if section == "method":
            continue
        assert f"## [{section}]" in page
        part = page.partition(f"## [{section}]")[2].partition("\n## ")[0]
        table = field.annotation
        assert isinstance(table, type)
        assert issubclass(table, BaseModel)
        for name, key in table.model_fields.items():
            assert key.description, f"{section}.{name} has no description"
            row = next((line for line in part.splitlines() if line.startswith(f"| `{name}` ")), "")
            assert row.endswith(f"| {key.description} |"), f"docs/job_file.md: {section}.{name}"
