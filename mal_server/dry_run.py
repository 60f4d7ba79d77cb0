"""Implements `mal-server check`: the checks of `serve` before it opens its port, without a port or device memory."""

from collections.abc import Iterator

import torch

from mal_server.config.model_config import ModelPlan
from mal_server.config.server import ServerConfig
from mal_server.models.loader import pick_devices, read_checkpoint
from mal_server.security.auth import read_resume_key, read_tokens
from mal_server.security.tls import server_credentials
from mal_train.core.errors import ConfigError
from mal_train.core.settings import NetworkEngine
from mal_train.kernel.checkpoint.keys import parse_key
from mal_train.kernel.labeler.load import build_labeler
from mal_train.kernel.networks.precision import reported, resolve


def check(config: ServerConfig) -> Iterator[str]:
    """Yields one line for each part of the settings, after it has passed its check.

    Each checkpoint is read, verified to its last byte and built into a network in main memory.

    Raises:
        ConfigError: a certificate, token, key, folder, GPU or precision is not available.
        CheckpointError: a checkpoint is unusable.
    """
    read_tokens(config.tokens)
    encryption = "plaintext" if server_credentials(config.listen) is None else "TLS"
    if config.listen.tls_client_ca is not None:
        encryption = "TLS with client certificates"
    clients = ", ".join(f"{token.name} ({', '.join(token.scopes)})" for token in config.tokens)
    yield f"listen: {config.listen.host}, port {config.listen.port or 'any free port'}, {encryption}"
    yield f"clients: {clients or 'every client that reaches the port'}"
    metrics = config.metrics
    yield f"metrics: {'not served' if metrics.port is None else f'http://{metrics.host}:{metrics.port}/metrics'}"
    read_resume_key(config.resume_key)
    for data in config.data_folders:
        if not data.path.is_dir():
            raise ConfigError(f"data_folders: {data.name!r}: {data.path}: no such folder")
        yield f"data folder {data.name}: {data.path}, readable by every client that may label"
    for plan in config.plans:
        yield from _check_model(plan)
    for folder in config.model_folders:
        if not folder.path.is_dir():
            raise ConfigError(f"model_folders: {folder.name!r}: {folder.path}: no such folder")
        parse_key(folder.decryption_key, purpose="decryption", source="yaml")
        files = sum(1 for _ in folder.path.rglob("*.malckpt"))
        yield f"model folder {folder.name}: {folder.path}, {files} checkpoint{'s' * (files != 1)}"


def _check_model(plan: ModelPlan) -> Iterator[str]:
    devices = pick_devices(plan.gpu_ids, plan.cpu_workers)
    dtypes = [resolve(plan.precision, torch.device(device), plan.network_engine) for device in devices]
    shown = [f"{device} in {reported(dtype)}" for device, dtype in zip(devices, dtypes, strict=True)]
    yield f"devices: {', '.join(shown)}, network engine {plan.network_engine}"
    checkpoint, sha256 = read_checkpoint(plan)
    if plan.network_engine == NetworkEngine.TORCH:
        build_labeler(checkpoint, precision="float32")
    else:
        build_labeler(checkpoint, precision=plan.precision, network_engine=plan.network_engine)
    weights = sum(weight.numel() * weight.element_size() for weight in checkpoint.weights.values())
    yield (
        f"model: {plan.name}, {checkpoint.model.arch}, crop {checkpoint.labeler.crop_size} px, branch "
        f"{plan.branch}, {weights / 1e6:.1f} MB of weights on each device"
    )
    yield f"checkpoint: {plan.checkpoint}, sha256 {sha256}"
