"""The server's YAML: every setting, its default, its range and its meaning. Reads no checkpoint, opens no port.

Sections, and the entries of lists, stand with the part of the server that they are for: `listening`, `limits`, `plans`,
and the tokens in `access`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from mal_server.config.limits import MIB, Limits
from mal_server.config.listen import Listen, MetricsListen
from mal_server.config.model_config import (
    DataFolder,
    GpuIds,
    ModelFolder,
    ModelName,
    ModelPlan,
    ModelSetting,
    PrecisionName,
    name_from,
)
from mal_server.config.tokens import TokenSetting
from mal_train.core.errors import ConfigError
from mal_train.core.settings import Branch
from mal_train.core.yaml_config import Strict, apply_overrides, dump, load_yaml, parse_value, validate
from mal_train.kernel.checkpoint.builtin import BUILTIN

RETIRED = {
    "batch_patience_s": "renamed to batch_aging_s",  # former name
}
"""Former settings and what replaced them."""


class ServerConfig(Strict):
    """Everything that `mal-server serve` can be told."""

    checkpoint: Path | None = Field(
        default=None,
        description="Sealed checkpoint (.malckpt) to serve, of either kind; seen from the working folder. builtin: the "
        "model in\nthe package, for photographs. null: `models` says what is served, or builtin where it says nothing.",
    )
    decryption_key: str | None = Field(
        default=None,
        repr=False,
        description="Opens the checkpoint: file:PATH or env:NAME of an age identity or a passphrase. null: it is not "
        "encrypted.",
    )
    model_name: ModelName | None = Field(
        default=None,
        description="The model's name in answers: at most 64 letters, digits and characters of '._@-'. null: the "
        "checkpoint's\nfile name without its suffix, with '-' for other characters.",
    )
    branch: Branch = Field(
        default=Branch.STUDENT,
        description="Network that answers requests which name none: student, teacher or mixed.",
    )
    models: tuple[ModelSetting, ...] = Field(
        default=(),
        repr=False,
        description="Several models at once, in the place of checkpoint, decryption_key and model_name; the first one "
        "answers\nrequests that name none. Entries such as\n"
        "  - {name: cats, checkpoint: cats.malckpt, decryption_key: file:identity.txt, branch: teacher,\n"
        "     precision: auto, gpu_ids: [0], cpu_workers: 1}\n"
        "name and checkpoint are needed; the others fall back to the settings of the same name here. Each model has\n"
        "its own queue and its own workers; those of one GPU share it.",
    )
    model_folders: tuple[ModelFolder, ...] = Field(
        default=(),
        repr=False,
        description="Folders whose checkpoints `mal-client models load` may put into service while the server runs;\n"
        "[] = only those named above may be read anew. Entries such as\n"
        "  - {name: trained, path: results, decryption_key: file:identity.txt}",
    )
    max_models: int = Field(
        default=8, ge=1, le=1024, description="Models at once; loading one under a new name beyond is refused."
    )
    gpu_ids: GpuIds = Field(
        default=(0,),
        description="GPUs, one worker each; [] = CPU. On a machine without CUDA the CPU is used and a line says so.",
    )
    cpu_workers: int = Field(
        default=1,
        ge=1,
        le=256,
        description="Workers where the CPU is used; they share the weights, and each takes its part of the cores. More "
        "than one pays\nwhere a single crop cannot keep all cores busy.",
    )
    precision: PrecisionName = Field(
        default="auto",
        description="Number format of the network. auto: bfloat16 where the device is fast at it, else float32.",
    )
    max_batch_size: int = Field(default=16, ge=1, le=1024, description="Crops in one device batch.")
    max_queue_delay_ms: float = Field(
        default=5.0,
        ge=0.0,
        le=1000.0,
        description="How long an idle device waits at most for more crops before it runs a batch that is not full, in "
        "ms.\nIt waits only while others prepare a request or were just answered: a lone caller never does. A busy "
        "device's\nbatches fill by themselves.",
    )
    max_queue_crops: int = Field(
        default=2048,
        ge=1,
        le=1_000_000,
        description="Boxes that may wait for a device; requests beyond are refused (UNAVAILABLE) with the time to come "
        "back.\nEach takes up to 3 * crop_size^2 bytes of memory. At least limits.max_boxes.",
    )
    max_queue_bytes: int = Field(
        default=2048 * MIB,
        ge=MIB,
        description="Memory that waiting requests may hold: encoded images and 3 * crop_size^2 bytes a box. Requests "
        "beyond are refused\nlikewise; one that comes to an empty queue is always taken.",
    )
    batch_aging_s: float = Field(
        default=2.0,
        ge=0.0,
        le=3600.0,
        description="Age at which BATCH work (bulk streams, evaluations) counts against newer INTERACTIVE work. "
        "INTERACTIVE crops always\ngo into the next batch; if they keep the device busy, BATCH crops that waited this "
        "much longer get a quarter of it.\nCPU tasks and waits for max_decoded_bytes take milliseconds and go by age "
        "alone. 0: first come, first served.",
    )
    threads: int = Field(
        default=0, ge=0, le=1024, description="Threads that decode, crop and encode; 0 = one for each CPU core."
    )
    max_decoded_bytes: int = Field(
        default=1024 * MIB,
        ge=MIB,
        description="Memory for decoded pictures whose boxes are being cut: 8 bytes a pixel while one is decoded, 3 "
        "after that.\nRequests beyond wait their turn; BATCH ones get half of it. A larger picture is decoded when no "
        "other is.\nPictures up to 2 million pixels with up to 8 boxes are not counted: each thread holds one.",
    )
    image_cache_bytes: int = Field(
        default=256 * MIB,
        ge=0,
        description="Memory for pictures that LabelImage calls sent, so that a caller who moves a box sends a hash "
        "instead; 0: none.\nWhoever knows a picture's whole SHA-256 gets masks of it. mal_image_cache_hits_total and "
        "mal_image_cache_misses_total\ntell whether it is large enough.",
    )
    data_folders: tuple[DataFolder, ...] = Field(
        default=(),
        description="Folders on this machine whose files requests may name instead of sending them (ImageSource.uri);\n"
        "[] = none. Everybody who may label gets masks of every picture in them. Entries such as\n"
        "  - {name: photos, path: /srv/photos}",
    )
    max_evaluation_bytes: int = Field(
        default=4096 * MIB,
        ge=MIB,
        description="Memory that evaluations hold together: for data sets read here (thirteen times the annotations' "
        "file), for\nrecords that callers bring back, and for what was measured (about 5 KB an object). One that needs "
        "more while others\nhold too much is refused, or ends (UNAVAILABLE), and goes on later from its records; the "
        "one\nthat began first is taken.",
    )
    resume_key: str | None = Field(
        default=None,
        repr=False,
        description="Secret (file:PATH or env:NAME, 16 or more characters) that seals the records with which an\n"
        "evaluation goes on after a break. null: one of this process alone, so that none outlives a restart.",
    )
    drain_delay_s: float = Field(
        default=5.0,
        ge=0.0,
        le=3600.0,
        description="After SIGTERM: how long calls are still accepted while health says NOT_SERVING, so that load "
        "balancers notice.\nAn interrupt from the keyboard (SIGINT) skips it.",
    )
    grace_s: float = Field(
        default=30.0,
        ge=0.0,
        le=3600.0,
        description="After that: how long running calls may take to finish before they are cancelled.",
    )
    tokens: tuple[TokenSetting, ...] = Field(
        default=(),
        repr=False,
        description="Who may call; [] = everybody who reaches the port. Entries such as\n"
        "  - {name: annotators, token: file:/run/secrets/annotators, scopes: [label]}\n"
        "token is file:PATH or env:NAME of 16 or more characters; scopes are label, evaluate, and admin, which holds "
        "both.\nHealth checks need none. A token is a password: without TLS the network can read it.",
    )
    token_reload_s: float = Field(
        default=30.0,
        ge=0.0,
        le=86400.0,
        description="How often the tokens' files are read anew, in seconds; 0: only on SIGHUP, which also takes up "
        "this\nfile's `tokens`. A file that cannot be used is logged, and what counted before goes on.",
    )
    reflection: bool = Field(
        default=True,
        description="Whether tools such as grpcurl may ask which calls exist. With tokens, any of them opens it.",
    )
    tracing: bool = Field(
        default=False,
        description="Whether spans of calls and their stages go to OpenTelemetry, to where its own variables say\n"
        "(OTEL_EXPORTER_OTLP_ENDPOINT); needs the extra `tracing`.",
    )
    listen: Listen = Field(default_factory=Listen, description="Where the server listens.")
    metrics: MetricsListen = Field(default_factory=MetricsListen, description="Figures for monitoring.")
    limits: Limits = Field(default_factory=Limits, description="What requests must keep to.")

    @model_validator(mode="after")
    def _a_full_request_fits(self) -> Self:
        if self.max_queue_crops < self.limits.max_boxes:
            raise ValueError(
                f"max_queue_crops: {self.max_queue_crops} is below limits.max_boxes ({self.limits.max_boxes}): a "
                "request of full size could never be accepted; raise it or lower limits.max_boxes"
            )
        for where, ids in (
            ("gpu_ids", self.gpu_ids),
            *((f"models {m.name!r}: gpu_ids", m.gpu_ids) for m in self.models),
        ):
            if ids is not None and len(set(ids)) != len(ids):
                raise ValueError(f"{where}: {list(ids)} names a GPU twice")
        if self.resume_key is not None and not self.resume_key.startswith(("file:", "env:")):
            raise ValueError("resume_key: give file:PATH or env:NAME; the secret itself does not belong into this file")
        for field_name in ("tokens", "models", "model_folders", "data_folders"):
            names = [entry.name for entry in getattr(self, field_name)]
            if len(set(names)) != len(names):
                raise ValueError(f"{field_name}: a name stands twice")
        return self

    @model_validator(mode="after")
    def _something_is_served(self) -> Self:
        alone = [name for name in ("checkpoint", "decryption_key", "model_name") if getattr(self, name) is not None]
        if self.models and alone:
            raise ValueError(f"{alone[0]}: models are given, so it belongs into one of their entries")
        if len(self.models) > self.max_models:
            raise ValueError(f"models: {len(self.models)} entries, and max_models is {self.max_models}")
        return self

    @property
    def plans(self) -> tuple[ModelPlan, ...]:
        """What is to be served from the start; the first one is the default."""
        if self.models:
            return tuple(map(self._plan, self.models))
        checkpoint = self.checkpoint or Path(BUILTIN)
        return (self._plan_of(self.model_name or name_from(checkpoint), checkpoint, self.decryption_key),)

    def plan_from(self, folder: ModelFolder, checkpoint: Path, name: str, branch: Branch | None) -> ModelPlan:
        """What a file of a folder is loaded with; what the settings say of a model of this name holds for it too."""
        known = next((model for model in self.models if model.name == name), None)
        base = self._plan_of(name, checkpoint, folder.decryption_key) if known is None else self._plan(known)
        return replace(base, checkpoint=checkpoint, decryption_key=folder.decryption_key, branch=branch or base.branch)

    def _plan(self, model: ModelSetting) -> ModelPlan:
        base = self._plan_of(model.name, model.checkpoint, model.decryption_key)
        own = {
            name: getattr(model, name)
            for name in ("branch", "precision", "gpu_ids", "cpu_workers")
            if getattr(model, name) is not None
        }
        return replace(base, **own)

    def _plan_of(self, name: str, checkpoint: Path, decryption_key: str | None) -> ModelPlan:
        return ModelPlan(
            name=name,
            checkpoint=checkpoint,
            decryption_key=decryption_key,
            branch=self.branch,
            precision=self.precision,
            gpu_ids=self.gpu_ids,
            cpu_workers=self.cpu_workers,
            max_batch_size=self.max_batch_size,
        )


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> ServerConfig:
    """The settings in a YAML file (None: all defaults), `a.b=c` overrides applied.

    Raises:
        ConfigError: names the field, the value, the rule and the nearest valid name.
    """
    data = apply_overrides({} if path is None else load_yaml(path), overrides)
    for override in overrides:
        name, _, value = override.partition("=")
        if any(not secret.startswith(("file:", "env:")) for secret in _keys_in(name, value)):
            raise ConfigError(
                "decryption_key: a secret on the command line can be read by every user of the machine; give file:PATH "
                "or env:NAME"
            )
    return validate(ServerConfig, data, source=str(path or "command line"), retired=RETIRED)


def default_config() -> str:
    """A commented YAML file with every setting at its default, which serves the model in the package."""
    return dump(ServerConfig(checkpoint=Path(BUILTIN)))


def _keys_in(name: str, value: str) -> Iterator[str]:
    """Every decryption_key that an override holds, also inside of a list."""
    if name == "decryption_key":
        yield value
    elif name in {"models", "model_folders"}:
        entries = parse_value(value)
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and entry.get("decryption_key") is not None:
                yield str(entry["decryption_key"])
