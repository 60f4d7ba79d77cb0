"""Defines the server's settings: name, default, range and meaning of each. Reads no checkpoint and opens no port.

Sections and the entries of lists are defined in `listen`, `limits`, `connections`, `model_config` and `tokens`.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self, TypeVar

from pydantic import Field, model_validator

from mal_server.config.connections import Connections
from mal_server.config.limits import MIB, PIB, Limits
from mal_server.config.listen import Listen, MetricsListen
from mal_server.config.model_config import (
    DataFolder,
    GpuIds,
    ModelFolder,
    ModelName,
    ModelPlan,
    ModelSetting,
    name_from,
)
from mal_server.config.tokens import TokenSetting
from mal_train.core.errors import ConfigError
from mal_train.core.secrets import is_secret_reference
from mal_train.core.settings import Branch, NetworkEngine, Precision
from mal_train.core.yaml_config import Sha256, Signer, Strict, apply_overrides, dump, load_yaml, validate
from mal_train.core.yaml_text import parse_yaml
from mal_train.kernel.checkpoint.builtin import BUILTIN, trust_for
from mal_train.kernel.checkpoint.trust import TrustPolicy

T = TypeVar("T")

RETIRED = {
    "batch_patience_s": "renamed to batch_aging_s",  # former name
}
"""Former settings and what replaced them."""


class ServerConfig(Strict):
    """Settings of `mal-server serve`."""

    checkpoint: Path | None = Field(
        default=None,
        description="Checkpoint (.malckpt) to serve, of kind weights or resume; relative to the working folder. "
        "builtin: the model\nin the package, for photographs. null: `models`, or builtin if that is empty.",
    )
    checkpoint_sha256: Sha256 | None = Field(
        default=None,
        description="SHA-256 that the checkpoint must have (sha256sum FILE), checked before anything of it is read. "
        "null: any.\nEncryption does not tell who made a file: everybody who has the recipient, a public key, can make "
        "one.",
    )
    trusted_signers: tuple[Signer, ...] = Field(
        default=(),
        max_length=100,
        description="Public keys (ed25519:...) of authors. If given, every checkpoint that the server loads must have "
        "the signature of\none of them beside it (FILE.sig, from `mal-train sign`), checked before anything of it is "
        "read. [] = none\nis needed. The model in the package needs none.",
    )
    decryption_key: str | None = Field(
        default=None,
        repr=False,
        description="Key that opens the checkpoint: file:PATH or env:NAME of an age identity or a passphrase. null: "
        "not encrypted.",
    )
    model_name: ModelName | None = Field(
        default=None,
        description="Name of the model in responses: at most 64 letters, digits and characters of '._@-'. null: the "
        "file name of\nthe checkpoint without its suffix, with '-' for other characters.",
    )
    branch: Branch = Field(
        default=Branch.STUDENT,
        description="Network for requests that name none: student, teacher or mixed.",
    )
    models: tuple[ModelSetting, ...] = Field(
        default=(),
        repr=False,
        description="Several models, instead of checkpoint, decryption_key and model_name. Requests that name no model "
        "use the first.\nEntries such as\n"
        "  - {name: cats, checkpoint: cats.malckpt, decryption_key: file:identity.txt, branch: teacher,\n"
        "     network_engine: torch, precision: auto, gpu_ids: [0], cpu_workers: 1, checkpoint_sha256: null}\n"
        "name and checkpoint are required; fields left null inherit the server-wide setting of that name. Each model\n"
        "has its own queue and workers; workers on the same GPU share it.",
    )
    model_folders: tuple[ModelFolder, ...] = Field(
        default=(),
        repr=False,
        description="Folders with checkpoints that `mal-client models load` may load while the server runs; [] = only "
        "the\ncheckpoints named above may be reloaded. Entries such as\n"
        "  - {name: trained, path: results, decryption_key: file:identity.txt, checkpoint_sha256: []}\n"
        "checkpoint_sha256 lists the files that may be loaded; [] = every one in the folder.",
    )
    max_models: int = Field(
        default=8, ge=1, le=1024, description="Models served at once; loading one more under a new name is refused."
    )
    gpu_ids: GpuIds = Field(
        default=(0,),
        description="GPUs, one worker each; [] = CPU. Without CUDA the server prints a line and uses the CPU.",
    )
    cpu_workers: int = Field(
        default=1,
        ge=1,
        le=256,
        description="Workers on the CPU. They share the weights and divide the cores among them. One worker keeps all "
        "cores busy; with\nmore, interactive crops wait for smaller batches.",
    )
    network_engine: NetworkEngine = Field(
        default=NetworkEngine.TORCH,
        description="What runs the network. openvino: on CPUs (gpu_ids: []), in float32 or int8; needs the extra "
        "openvino. The\nself-test compares it with torch.",
    )
    precision: Precision = Field(
        default=Precision.AUTO,
        description="Number format of the network. auto: bfloat16 on devices that compute it fast, else float32; with "
        "openvino\nfloat32. int8: with openvino, and a checkpoint from `mal-train export --int8`.",
    )
    max_batch_size: int = Field(default=16, ge=1, le=1024, description="Crops in one device batch.")
    max_queue_delay_ms: float = Field(
        default=5.0,
        ge=0.0,
        le=1000.0,
        description="Longest time, in ms, that an idle device waits for more crops before it runs a batch that is not "
        "full.\nA single client never pays this delay; it applies only while more requests are expected. Batches of a "
        "busy\ndevice fill up without it.",
    )
    max_queue_crops: int = Field(
        default=2048,
        ge=1,
        le=1_000_000,
        description="Boxes that may wait for a device; further requests are refused (UNAVAILABLE) with a retry delay. "
        "At least\nlimits.max_boxes beside the part of BATCH work (batch_queue_share): twice, with one half.",
    )
    max_queue_bytes: int = Field(
        default=2048 * MIB,
        ge=MIB,
        le=PIB,
        description="Memory for requests, in bytes: twice the encoded image, and 4 * crop_size^2 for each box whose "
        "result is not sent\nyet (8 with compute_agreement). Further requests are refused likewise; an empty queue "
        "accepts a request of any size.",
    )
    batch_queue_share: float = Field(
        default=0.5,
        gt=0.0,
        lt=1.0,
        description="Part of max_queue_crops and max_queue_bytes that BATCH work may fill. INTERACTIVE work is never "
        "refused because of it.\nA single request that needs more is accepted while no other BATCH request is there.",
    )
    caller_queue_share: float = Field(
        default=0.5,
        gt=0.0,
        le=1.0,
        description="Part of what its priority may fill that one caller may: a token, or without tokens a connection. "
        "A single request\nthat needs more is accepted while the caller has no other. Callers take turns at the "
        "device.",
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
        le=PIB,
        description="Memory for decoded images that are being cropped, in bytes: 4 to 16 for each pixel during "
        "decoding, by format,\n3 afterwards and 4 for each pixel of the largest box with its margin. Further requests "
        "wait; BATCH requests may\nuse half of it. An image that exceeds it alone is decoded when no other is. Images "
        "that take up to 16 MiB, with up\nto 8 boxes, are not counted: each thread holds one.",
    )
    image_cache_bytes: int = Field(
        default=256 * MIB,
        ge=0,
        le=PIB,
        description="Memory for encoded images of LabelImage calls, in bytes, so that a client which moves a box sends "
        "a hash instead of\nthe image; 0: no cache. A client that knows the SHA-256 of an image gets masks of it. Many "
        "mal_image_cache_misses_total\nbeside mal_image_cache_hits_total mean that it is too small.",
    )
    data_folders: tuple[DataFolder, ...] = Field(
        default=(),
        description="Folders on this machine with images that requests may refer to instead of sending them\n"
        "(ImageSource.uri); [] = none. Every client that may label gets masks of every image in them. Entries "
        "such as\n"
        "  - {name: photos, path: /srv/photos}",
    )
    max_evaluation_bytes: int = Field(
        default=4096 * MIB,
        ge=MIB,
        le=PIB,
        description="Memory for all evaluations together, in bytes: datasets read on the server (twice the annotation "
        "file, and 500\nfor each row), images in flight, resume tokens of clients, and results (about 5 KB for each "
        "object). An evaluation\nthat does not fit beside the others is refused or ended (UNAVAILABLE) and can resume "
        "later; the one that started\nfirst continues. One that alone needs more is refused or ended for good "
        "(INVALID_ARGUMENT).",
    )
    resume_key: str | None = Field(
        default=None,
        repr=False,
        description="Secret (file:PATH or env:NAME, 16 or more characters) that seals resume tokens of evaluations.\n"
        "null: a random one, so that an evaluation cannot resume after a restart of the server.",
    )
    drain_delay_s: float = Field(
        default=5.0,
        ge=0.0,
        le=3600.0,
        description="Seconds after SIGTERM during which new calls are accepted while health is NOT_SERVING, so that "
        "load balancers\nnotice. SIGINT (Ctrl-C) skips it.",
    )
    grace_s: float = Field(
        default=30.0,
        ge=0.0,
        le=3600.0,
        description="Seconds after that for running calls to finish before they are cancelled.",
    )
    watchdog_s: float = Field(
        default=120.0,
        ge=0.0,
        le=3600.0,
        description="Seconds after which a process whose event loop stands still ends itself (exit code 1, the stacks "
        "of its threads on\nstderr), so that a supervisor starts a new one; 0: never. Loading a model and a drain do "
        "not stop the loop.",
    )
    tokens: tuple[TokenSetting, ...] = Field(
        default=(),
        repr=False,
        description="Bearer tokens of clients; [] = every client that reaches the port is served. Entries such as\n"
        "  - {name: annotators, token: file:/run/secrets/annotators, scopes: [label]}\n"
        "token is file:PATH or env:NAME of 16 or more characters; scopes are label, evaluate, and admin, which "
        "includes both.\nWith data_folders: [NAME, ...] an entry may name only these folders of the "
        "server. Health checks need no\ntoken. A token is a password: without TLS the network can read it.",
    )
    token_reload_s: float = Field(
        default=30.0,
        ge=0.0,
        le=86400.0,
        description="Interval in seconds at which token files are reloaded; 0: only on SIGHUP, which also reloads "
        "`tokens` from this\nfile. An invalid token file is logged; the previous tokens stay in force.",
    )
    reflection: bool = Field(
        default=True,
        description="Serves gRPC reflection, with which tools such as grpcurl list the methods. With tokens, it "
        "requires any one of them.",
    )
    tracing: bool = Field(
        default=False,
        description="Exports spans of calls and their stages by OpenTelemetry, to the endpoint in its variable\n"
        "OTEL_EXPORTER_OTLP_ENDPOINT; needs the extra `tracing`.",
    )
    listen: Listen = Field(default_factory=Listen, description="Address and encryption of the gRPC port.")
    metrics: MetricsListen = Field(default_factory=MetricsListen, description="Address of the metrics port.")
    limits: Limits = Field(default_factory=Limits, description="Bounds of one request.")
    connections: Connections = Field(
        default_factory=Connections, description="Bounds of connections, calls and streams."
    )

    @model_validator(mode="after")
    def _check_queue(self) -> Self:
        beside_batch = self.max_queue_crops * (1.0 - self.batch_queue_share)
        if beside_batch < self.limits.max_boxes:
            raise ValueError(
                f"max_queue_crops: {self.max_queue_crops} leaves {beside_batch:g} boxes beside BATCH work "
                f"(batch_queue_share {self.batch_queue_share:g}), below limits.max_boxes ({self.limits.max_boxes}), "
                "so an INTERACTIVE request of full size could be refused because of it; raise it or lower the others"
            )
        return self

    @model_validator(mode="after")
    def _check_duplicates(self) -> Self:
        for path, ids in (
            ("gpu_ids", self.gpu_ids),
            *((f"models {model.name!r}: gpu_ids", model.gpu_ids) for model in self.models),
        ):
            for gpu_id in _duplicates(ids or ()):
                raise ValueError(f"{path}: GPU {gpu_id} is listed more than once")
        for field_name in ("tokens", "models", "model_folders", "data_folders"):
            for name in _duplicates([entry.name for entry in getattr(self, field_name)]):
                raise ValueError(f"{field_name}: the name {name!r} is used more than once")
        return self

    @model_validator(mode="after")
    def _check_folders_of_tokens(self) -> Self:
        known = {folder.name for folder in self.data_folders}
        for token in self.tokens:
            for name in token.data_folders or ():
                if name not in known:
                    raise ValueError(
                        f"tokens {token.name!r}: data_folders: {name!r} is not among the data_folders of the "
                        "server; add it there, or leave it out"
                    )
        return self

    @model_validator(mode="after")
    def _check_resume_key(self) -> Self:
        if self.resume_key is not None and not is_secret_reference(self.resume_key):
            raise ValueError("resume_key: a secret in the settings file; give file:PATH or env:NAME")
        return self

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        for name in ("checkpoint", "checkpoint_sha256", "decryption_key", "model_name"):
            if self.models and getattr(self, name) is not None:
                raise ValueError(f"{name}: given together with models; move it to an entry of models")
        if len(self.models) > self.max_models:
            raise ValueError(f"models: {len(self.models)} entries exceed max_models ({self.max_models}); raise it")
        return self

    @property
    def plans(self) -> tuple[ModelPlan, ...]:
        """Models to serve from the start; the first one is the default."""
        if self.models:
            return tuple(map(self._plan, self.models))
        checkpoint = self.checkpoint or Path(BUILTIN)
        return (
            self._plan_of(
                self.model_name or name_from(checkpoint),
                checkpoint,
                self.decryption_key,
                _one(self.checkpoint_sha256),
            ),
        )

    def plan_from(self, folder: ModelFolder, checkpoint: Path, name: str, branch: Branch | None) -> ModelPlan:
        """Returns the plan for a checkpoint in a folder. Settings of a model with this name apply to it too."""
        model = next((model for model in self.models if model.name == name), None)
        own = self._plan_of(name, checkpoint, folder.decryption_key, folder.checkpoint_sha256)
        base = own if model is None else self._plan(model)
        return replace(
            base,
            checkpoint=checkpoint,
            decryption_key=folder.decryption_key,
            branch=branch or base.branch,
            trust=own.trust,
        )

    def _plan(self, model: ModelSetting) -> ModelPlan:
        base = self._plan_of(model.name, model.checkpoint, model.decryption_key, _one(model.checkpoint_sha256))
        own = {
            name: getattr(model, name)
            for name in ("branch", "network_engine", "precision", "gpu_ids", "cpu_workers")
            if getattr(model, name) is not None
        }
        return replace(base, **own)

    def _plan_of(self, name: str, checkpoint: Path, decryption_key: str | None, sha256: tuple[str, ...]) -> ModelPlan:
        return ModelPlan(
            name=name,
            checkpoint=checkpoint,
            decryption_key=decryption_key,
            branch=self.branch,
            network_engine=self.network_engine,
            precision=self.precision,
            gpu_ids=self.gpu_ids,
            cpu_workers=self.cpu_workers,
            max_batch_size=self.max_batch_size,
            trust=trust_for(checkpoint, TrustPolicy(sha256, self.trusted_signers)),
        )


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> ServerConfig:
    """Returns the settings of a YAML file (None: all defaults) with `a.b=c` overrides applied.

    Raises:
        ConfigError: an invalid field, value or override; names the field, the value, the rule and the nearest field.
    """
    data = apply_overrides({} if path is None else load_yaml(path), overrides)
    for override in overrides:
        name, _, value = override.partition("=")
        if not all(map(is_secret_reference, _decryption_keys(name, value))):
            raise ConfigError(
                "decryption_key: a secret on the command line is visible to every user of the machine; give file:PATH "
                "or env:NAME"
            )
    return validate(ServerConfig, data, source=str(path or "command line"), retired=RETIRED)


def default_config() -> str:
    """Returns a commented YAML file with every setting at its default, which serves the model in the package."""
    return dump(ServerConfig(checkpoint=Path(BUILTIN)))


def json_schema() -> str:
    """Returns the JSON Schema of the settings, with which editors complete and check the YAML file."""
    schema = ServerConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Settings of mal-server"
    return json.dumps(schema, indent=2)


def _one(sha256: str | None) -> tuple[str, ...]:
    return () if sha256 is None else (sha256,)


def _duplicates(values: Sequence[T]) -> list[T]:
    """Returns each value that occurs more than once.

    >>> _duplicates([3, 1, 3])
    [3]
    """
    return [value for value, count in Counter(values).items() if count > 1]


def _decryption_keys(name: str, value: str) -> Iterator[str]:
    """Yields every decryption_key in an override, also those in entries of a list."""
    if name == "decryption_key":
        yield value
    elif name in {"models", "model_folders"}:
        entries = parse_yaml(value)
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and entry.get("decryption_key") is not None:
                yield str(entry["decryption_key"])
