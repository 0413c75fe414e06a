"""The tables of a job file as frozen models, with every key's default, range and meaning.

Nothing is read here: `config.py` lays defaults, file and `--set` over each other and words the errors. The tables of
`[method.<name>]` stay raw; `run/build.py` checks them with the method's own `Settings`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fedbench.base.link import Link
from fedbench.base.quantity import bit_s, seconds, size_bytes


class Section(BaseModel):
    """Base of all tables: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


#: A rate such as 100Mbit/s, a time such as 20ms, a size such as 4GiB: text that `quantity` reads, kept as it was written.
Rate = Annotated[str, AfterValidator(lambda text: _read(bit_s, text))]
Time = Annotated[str, AfterValidator(lambda text: _read(seconds, text))]
Size = Annotated[str, AfterValidator(lambda text: _read(size_bytes, text))]


def _read(reader: Callable[[str], float], text: str) -> str:
    """Return the text; ValueError where it can't be read."""
    reader(text)
    return text


class RunSection(Section):
    """[run]"""

    rounds: int = Field(100, ge=1, description="rounds to play")
    seed: int = Field(0, ge=0, lt=2**31, description="the seed of every random stream")
    eval_every: int = Field(1, ge=1, description="rounds between evaluations; the start and the last round always are")
    eval_first: int = Field(0, ge=0, description="rounds from the start that are all evaluated, for arms that are fast")
    target_accuracy: float | None = Field(None, ge=0, le=1, description="dev accuracy whose first round is recorded")
    stop_at_target: bool = Field(False, description="end the run at the target instead of going on")
    threads: int = Field(1, ge=1, le=256, description="threads per rank")
    ranks: int = Field(1, ge=1, description="processes; -n or the launcher's world size replaces it")
    launcher: Literal["mpirun", "srun-pmix", "srun-pmi2"] = Field(
        "mpirun",
        description="what starts several ranks; srun in a Slurm allocation alone, by the plugin of the MPI library",
    )
    train_every: int = Field(
        1, ge=1, description="on a virtual clock one round in so many trains; the others are timed as the last that did"
    )


class FederationSection(Section):
    """[federation]"""

    devices: int = Field(8, ge=1, lt=2**31, description="devices in total")
    sampled: int | None = Field(None, ge=1, description="devices that take part in a round; unset: all")
    partition: Literal["iid", "dirichlet", "shards", "keyed"] = Field(
        "iid", description="how private rows are shared out; keyed: each device's are written from its key (embedded)"
    )
    rows: int = Field(64, ge=2, description="rows of a device where they are keyed")
    alpha: float = Field(0.5, gt=0, description="concentration of the Dirichlet partition; small is uneven")
    local_steps: int = Field(1, ge=1, description="steps of a device in one round")
    batch_size: int = Field(16, ge=2, description="private rows of one step")

    @model_validator(mode="after")
    def _sampled_fits(self) -> FederationSection:
        if self.sampled is not None and self.sampled > self.devices:
            raise ValueError(f"sampled = {self.sampled} is more than devices = {self.devices}")
        return self

    @property
    def sampled_devices(self) -> int:
        """Devices that take part in one round."""
        return self.devices if self.sampled is None else self.sampled


class ModelSection(Section):
    """[model]"""

    name: str = Field(
        "embedded", description="embedded, a folder, a hub id, package:NAME/SUBFOLDER, or shape:NAME (seeded weights)"
    )
    trainable: Literal["full", "bitfit", "lora", "adapter", "head"] | None = Field(
        None, description="the part that is trained; unset: the method's own default"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="how frozen matrices are stored; what is trained, and all arithmetic, is float32"
    )
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="where weights lie and everything is computed; cuda: the ranks of a host share its GPUs"
    )
    mapped: bool = Field(False, description="keep weights in a file and the stage at hand alone in memory; same bits")
    micro_batch: int = Field(0, ge=0, description="rows that a probe runs through a stage at a time; 0: all")

    lora_rank: int = Field(8, ge=1, description="rank of LoRA's matrices")
    lora_alpha: int = Field(16, ge=1, description="LoRA's scale times its rank")
    adapter_reduction: int = Field(16, ge=1, description="width of the states over that of an adapter's bottleneck")

    @model_validator(mode="after")
    def _fits(self) -> ModelSection:
        if self.micro_batch == 1:
            raise ValueError("micro_batch = 1 would run single rows, which have other bits; allowed: 0, or from 2")
        if self.mapped and self.dtype != "float32":
            raise ValueError("mapped = true keeps float32 files; allowed with it: dtype = 'float32'")
        if self.mapped and self.device != "cpu":
            raise ValueError("mapped = true maps memory of the host; allowed with it: device = 'cpu'")
        return self


class DataSection(Section):
    """[data]"""

    private: str = Field(
        "embedded", description="devices' data: embedded, a folder, a name under FEDBENCH_DATA, a hub id"
    )
    public: str = Field(
        "embedded", description="the cloud's data: as private, or embedded:poor; equal to private: cut off it"
    )
    text_columns: Annotated[tuple[str, ...], Field(strict=False, min_length=1, max_length=2)] = Field(
        ("text", "text2"), description="column of the text, and of the second text of a pair where there is one"
    )
    label_column: str = Field("label", description="column of the integer label")
    head: Literal["verbaliser", "prototype", "linear", "lm"] | None = Field(
        None, description="what is read off; unset: verbaliser (causal models) or prototype; lm: next tokens"
    )
    template: str | None = Field(
        None, description="a verbaliser's prompt; unset: {text} It was {mask}. (causal models: up to {mask})"
    )
    label_words: Annotated[tuple[str, ...] | None, Field(strict=False, min_length=2)] = Field(
        None, description="a verbaliser's words, one token a class; unset: the classes' names in lower case"
    )
    max_length: int = Field(64, ge=4, description="tokens of a row at most")
    public_per_class: int = Field(32, ge=1, description="public rows a class")
    public_labels: Literal["given", "shuffled"] = Field(
        "given", description="shuffled: the control without label information"
    )


class ZoSection(Section):
    """[zo]"""

    epsilon: float = Field(1e-3, gt=0, description="probing step per coordinate (root mean square)")
    perturbations: int = Field(1, ge=1, description="directions of one local step")
    distribution: Literal["rademacher", "gaussian"] = Field("rademacher", description="distribution of directions")


class CommSection(Section):
    """[comm]"""

    codec: Literal["raw", "fp16", "int8", "int4", "int2", "sign", "topk", "adaptive"] = Field(
        "raw", description="how guides travel (docs/codecs.md); everything else travels raw"
    )
    lz4: bool = Field(False, description="LZ4 frames around units that shrink by it")
    error_feedback: bool = Field(False, description="what a guide's coding lost is added to the next guide")
    adapt: Literal["nominal", "measured", "replay"] = Field(
        "nominal",
        description="what codec = 'adaptive' rests on: [link] and [profile], the rounds as they are played, or another run",
    )
    replay: str = Field("", description="run file whose chosen codecs adapt = 'replay' takes")
    guide_reuse: Literal["keep", "resend"] = Field(
        "keep", description="keep: devices hold the coded guide until the update; resend: it travels again for it"
    )
    guide_lag: int = Field(
        0, ge=0, le=1, description="rounds that a guide is old: 1 is made while devices compute, at the weights before"
    )
    overlap: bool = Field(
        True, description="compute while a plan arrives; false: wait for all of it first, the sequential control"
    )
    progress: Literal["none", "poll", "thread"] = Field(
        "poll", description="what moves messages while a rank computes: nothing, calls from its loop, or a thread"
    )
    poll_interval: Time = Field("1ms", description="time between two such calls at least, such as 1ms")
    chunk_bytes: int = Field(1 << 20, ge=4096, le=1 << 30, description="bytes of a bundle of uploads from an edge")
    topology: Literal["star", "tree"] = Field("star", description="tree: edges between the cloud and the devices")
    edges: int = Field(2, ge=1, description="edges of a tree; a small world makes fewer of its ranks edges")
    deadline_s: float = Field(300.0, gt=0, description="longest wait for a message before all ranks end")

    @model_validator(mode="after")
    def _fits(self) -> CommSection:
        if self.error_feedback and self.codec == "raw":
            raise ValueError(
                "error_feedback = true has nothing to give back with codec = 'raw'; allowed: another codec"
            )
        if (self.adapt == "replay") != bool(self.replay):
            raise ValueError(
                f"adapt = {self.adapt!r} with replay = {self.replay!r}; a run file goes with 'replay' alone"
            )
        if self.adapt == "replay" and self.codec != "adaptive":
            raise ValueError(
                f"adapt = 'replay' chooses nothing with codec = {self.codec!r}; allowed: codec = 'adaptive'"
            )
        return self


class LinkSection(Section):
    """[link]"""

    clock: Literal["none", "paced", "virtual"] = Field(
        "none", description="links: none: the bare transport; paced: held back in real time; virtual: a simulated clock"
    )
    down: Rate | None = Field(None, description="rate from the cloud to a device, such as 100Mbit/s; unset: no bound")
    up: Rate | None = Field(None, description="rate from a device to the cloud; unset: no bound")
    latency: Time = Field("0s", description="time of every message on a link besides its bytes, such as 20ms")
    jitter: Time = Field("0s", description="most that is added to it, uniform, drawn from the key")

    @property
    def link(self) -> Link:
        """The link that these keys describe."""
        down, up = (math.inf if rate is None else bit_s(rate) for rate in (self.down, self.up))
        return Link(down, up, seconds(self.latency), seconds(self.jitter))


class ProfileSection(Section):
    """[profile]"""

    name: Literal["3g", "lte", "5g", "wifi", "broadband", "ethernet"] | None = Field(
        None, description="link of the devices, for what [link] leaves at its default; unset: no bound"
    )
    device: Literal["raspberry-pi-4", "jetson-nano"] | None = Field(
        None, description="the devices' memory, speed and energy; unset: no bound, energy unknown"
    )
    memory: Size | None = Field(None, description="memory of a device, such as 4GiB, which its weights must fit in")
    flops_per_s: float | None = Field(None, gt=0, description="speed of a device in FLOP/s; unset: that of the profile")
    cloud_flops_per_s: float | None = Field(None, gt=0, description="speed of the cloud in FLOP/s; unset: no bound")
    spread: float = Field(
        0.0, ge=0, description="stragglers: spread of the logarithm of a device's speed and of its link's rates"
    )
    trunk: Rate | None = Field(
        None, description="rate of the cloud's own link and of each edge's, shared by all it serves; unset: no bound"
    )
    trunk_latency: Time = Field("0s", description="time of a message between cloud and edge besides its bytes")
    dropout: float = Field(0.0, ge=0, le=1, description="probability that a sampled device is not there in a round")
    deadline_s: float | None = Field(
        None, gt=0, description="simulated seconds of an exchange after which no answer counts; unset: none"
    )


class ResultsSection(Section):
    """[results]"""

    dir: str = Field("results", description="folder of run files and checkpoints")
    checkpoint_every: int = Field(0, ge=0, description="rounds between checkpoints; 0: any number")
    checkpoint_s: float | None = Field(
        None, ge=0, description="seconds between checkpoints at most; 0: no bound; unset: 60, a mapped model none"
    )
    trace_rounds: int = Field(8, ge=0, description="newest rounds whose spans are kept; 0: none")
    save_weights: bool = Field(False, description="keep the tuned weights beside the run file, for `fedbench export`")


class Config(Section):
    """A whole job: one run."""

    run: RunSection = RunSection()
    federation: FederationSection = FederationSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    zo: ZoSection = ZoSection()
    method: dict[str, Any]
    comm: CommSection = CommSection()
    link: LinkSection = LinkSection()
    profile: ProfileSection = ProfileSection()
    results: ResultsSection = ResultsSection()

    @property
    def method_name(self) -> str:
        """The active method."""
        return str(self.method["name"])

    @property
    def checkpoint_s(self) -> float:
        """Seconds between checkpoints at most, 0 for no bound; a checkpoint holds all trained weights in memory."""
        asked = self.results.checkpoint_s
        return asked if asked is not None else 0.0 if self.model.mapped else 60.0


#: Keys that can't change a result; everything else is part of `run_id`.
OUTSIDE_HASH = frozenset(
    {
        "results.dir", "results.checkpoint_every", "results.checkpoint_s", "results.trace_rounds", "results.save_weights",
        "comm.deadline_s", "run.launcher",
    }
)  # fmt: skip
