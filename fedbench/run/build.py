"""From a checked job file to the objects of a run: the only registry of methods.

`resolve` fills every default in and names the run; `construct` loads data and model. Both
raise errors of the user's kind alone, and neither sends a message or writes a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedbench.algorithms.agzo import AGZO
from fedbench.algorithms.baffle import Baffle
from fedbench.algorithms.base import Algorithm, Lab, Settings
from fedbench.algorithms.bitfit import BitFit
from fedbench.algorithms.cooperllm import CooperLLM
from fedbench.algorithms.cooperllm_plus import CooperLLMPlus
from fedbench.algorithms.decomfl import DeComFL
from fedbench.algorithms.fedavg import FedAvg
from fedbench.algorithms.fedavg_lora import FedAvgLora
from fedbench.algorithms.fedkseed import FedKSeed
from fedbench.algorithms.fedkseed_pro import FedKSeedPro
from fedbench.algorithms.fedmezo import FedMeZO
from fedbench.algorithms.fedspzo import FedSPZO
from fedbench.algorithms.fedzo import FedZO
from fedbench.algorithms.ferret import Ferret
from fedbench.algorithms.fwdllm import FwdLLM
from fedbench.algorithms.meerkat import Meerkat
from fedbench.algorithms.public_only import PublicOnly
from fedbench.algorithms.spry import Spry
from fedbench.base import account, config, identity
from fedbench.base.errors import ConfigError, nearest
from fedbench.base.job import Config
from fedbench.base.rng import generator
from fedbench.codec.codecs import CODECS
from fedbench.codec.coding import Codec
from fedbench.comm.inbox import Kept
from fedbench.data.partition import sampled_devices
from fedbench.data.private import PrivateRows, private_rows
from fedbench.data.rows import Batch, Splits
from fedbench.data.splits import load_splits
from fedbench.models import load, ondevice, parts
from fedbench.models.cut import Cut
from fedbench.models.mapped import Mapped
from fedbench.models.narrow import narrow
from fedbench.models.residency import RESIDENT
from fedbench.models.trainable import Trainable, select
from fedbench.sim.scene import Scene, scene_of
from fedbench.zo.kernels import cpu, gpu
from fedbench.zo.stream import Stream

METHODS: dict[str, type[Algorithm]] = {
    method.name: method
    for method in (
        FedAvg,
        FedAvgLora,
        BitFit,
        Ferret,
        Spry,
        FedMeZO,
        FedZO,
        FedKSeed,
        FedKSeedPro,
        FwdLLM,
        DeComFL,
        Baffle,
        FedSPZO,
        Meerkat,
        AGZO,
        CooperLLM,
        CooperLLMPlus,
        PublicOnly,
    )
}

#: Rows of one public batch, and of one piece of a pass over the whole public set.
PUBLIC_BATCH = 64


@dataclass(frozen=True)
class Job:
    """A run before anything is loaded: the config, the active method's settings, the whole as a tree, its name."""

    config: Config
    settings: Settings
    tree: Mapping[str, Any]
    run_id: str
    results: Path | None = None

    @property
    def scratch(self) -> Path:
        """The folder of working files, below the results: `results`, or where that is unset `results.dir`."""
        return (self.results or Path(self.config.results.dir)) / "scratch"

    @property
    def method(self) -> type[Algorithm]:
        """The active method."""
        return METHODS[self.config.method_name]

    def on_host(self) -> Job:
        """Return the job for a process that checks it and starts others: its device is looked for and not used."""
        if self.config.model.device == "cpu":
            return self
        ondevice.cuda()
        model = self.config.model.model_copy(update={"device": "cpu"})
        return replace(self, config=self.config.model_copy(update={"model": model}))

    @property
    def codec(self) -> Codec | None:
        """The codec of guides; None where it is chosen for each unit."""
        return CODECS.get(self.config.comm.codec)


@dataclass(frozen=True)
class Built:
    """A run ready to start on one rank."""

    job: Job
    splits: Splits
    cut: Cut
    trainable: Trainable
    algorithm: Algorithm
    lab: Lab
    scene: Scene | None = None

    def sampled(self, round_: int) -> tuple[int, ...]:
        """Return the devices of a round in ascending order."""
        if not self.algorithm.uses_devices:
            return ()
        federation = self.job.config.federation
        chosen = sampled_devices(self.job.config.run.seed, round_, federation.devices, federation.sampled_devices)
        return tuple(int(device) for device in chosen)


def resolve(job: Config, source: str, overridden: frozenset[tuple[str, ...]] = frozenset()) -> Job:
    """Return the job with the defaults of its method filled in; all tables of `[method.<name>]` are checked."""
    name = job.method_name
    if name not in METHODS:
        raise ConfigError(
            f"method.name: found {name!r}; allowed: {', '.join(sorted(METHODS))}."
            f"{nearest(name, METHODS)} (From {config.origin(('method', 'name'), source, overridden)})"
        )
    settings = Settings()
    for key, table in job.method.items():
        if key == "name":
            continue
        if key in METHODS and not isinstance(table, dict):
            said = config.origin(("method", key), source, overridden)
            raise ConfigError(f"method.{key}: found {table!r}; expected a table. (From {said})")
        if key not in METHODS:
            raise ConfigError(
                f"method.{key}: unknown method table. Allowed: name, {', '.join(sorted(METHODS))}."
                f"{nearest(key, METHODS)} (From {config.origin(('method', key), source, overridden)})"
            )
        checked = config.validate(
            METHODS[key].settings_type, table, prefix=("method", key), source=source, overridden=overridden
        )
        settings = checked if key == name else settings
    if name not in job.method:
        settings = METHODS[name].settings_type()
    tree = config.as_tree(job)
    tree["method"] = {"name": name, "settings": config.as_tree(settings)}
    tree["model"]["trainable"] = part_of(job)
    tree["federation"]["sampled"] = job.federation.sampled_devices
    return Job(job, settings, tree, identity.run_id(tree))


def part_of(job: Config) -> str:
    """Return the part that a job trains: what it says, or its method's own where that is fixed or nothing is said."""
    method = METHODS[job.method_name]
    return method.part if method.part_is_fixed else job.model.trainable or method.part


def construct(job: Job) -> Built:
    """Return everything a rank needs to take part in the run."""
    c = job.config
    scene = scene_of(c)
    account.use_threads(c.run.threads)
    cpu.set_threads(c.run.threads)
    device = ondevice.cuda() if c.model.device == "cuda" else None
    if device is not None:
        gpu.prepare(c.zo.distribution == "gaussian", device.device)
    origin = load.origin_of(c.model.name)
    text = c.data.private != "embedded"
    reading = partial(load.reading_of, origin, c.data.head) if text else None
    splits = load_splits(c.data, c.run.seed, load.tokeniser_of(origin) if text else None, reading)
    residency = RESIDENT
    if c.model.mapped:
        account.bound_heap()
        residency = Mapped(job.scratch)
    else:
        account.keep_heap()
    cut = load.build(origin, c.data, splits, c.run.seed, residency)
    part = part_of(c)
    parts.add(cut, part, c.model, c.run.seed)
    if device is not None:
        device.move(cut)
    trainable = select(cut, part)
    if c.model.dtype == "bfloat16":
        narrow(cut)
    if scene is not None:
        scene.check_memory(cut.residency.bytes_held() or sum(p.nbytes for p in cut.parameters()))
    rows = private_rows(c, splits.train)
    meter = account.Meter()
    lab = _lab(job, splits, rows, cut, trainable, meter)
    if c.model.mapped:
        account.give_back_free_memory()
        account.give_back_code()
    return Built(job, splits, cut, trainable, job.method(job.settings, lab), lab, scene)


def _lab(job: Job, splits: Splits, private: PrivateRows, cut: Cut, trainable: Trainable, meter: account.Meter) -> Lab:
    c = job.config
    seed = c.run.seed

    def public(round_: int, step: int) -> Batch:
        size = min(PUBLIC_BATCH, len(splits.public))
        chosen = generator(seed, "public batch", round_, step).choice(len(splits.public), size, replace=False)
        return splits.public.batch(np.sort(chosen))

    def public_rows() -> Sequence[Batch]:
        order = np.argsort(splits.public.lengths, kind="stable")
        pieces = max(1, round(len(order) / PUBLIC_BATCH))
        return [splits.public.batch(piece) for piece in np.array_split(order, pieces)]

    gaussian = c.zo.distribution == "gaussian"
    return Lab(
        seed=seed,
        rounds=c.run.rounds,
        devices=c.federation.devices,
        sampled=c.federation.sampled_devices,
        local_steps=c.federation.local_steps,
        perturbations=c.zo.perturbations,
        epsilon=c.zo.epsilon,
        cut=cut,
        trainable=trainable,
        stream=Stream(cut, trainable, meter, gaussian=gaussian, micro_batch=c.model.micro_batch),
        meter=meter,
        private=private.batch,
        public=public,
        public_rows=public_rows,
        guide_lag=c.comm.guide_lag,
        guide_reuse=c.comm.guide_reuse,
        kept=Kept,
    )
