"""Checks custom resources by the models that are generated from their published schemas.

Runs in .venv-kubernetes, which `make tools` fills: reads a JSON list of manifests from stdin, writes a JSON list of
faults to stdout. The models ignore fields that they do not know, so what a model returns is compared with what it read.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from typing import Any

CLOUDCOIL = {
    ("keda.sh/v1alpha1", "ScaledObject"): "cloudcoil.models.keda.v1alpha1",
    ("monitoring.coreos.com/v1", "PrometheusRule"): "cloudcoil.models.prometheus_operator.v1",
    ("monitoring.coreos.com/v1", "ServiceMonitor"): "cloudcoil.models.prometheus_operator.v1",
}
"""Version and kind -> module with the model of the same name."""
KUBEFLOW = {("jobset.x-k8s.io/v1alpha2", "JobSet"): "JobsetV1alpha2JobSet"}
"""Version and kind -> model of `kubeflow_trainer_api`, whose runtimes are made of JobSets."""


def read_back(manifest: dict[str, Any]) -> Any:
    """Returns a manifest as its model understands it. Raises ValueError if the model refuses it."""
    kind = manifest["apiVersion"], manifest["kind"]
    if kind in KUBEFLOW:
        model = getattr(importlib.import_module("kubeflow_trainer_api.models"), KUBEFLOW[kind])
        return model.from_dict(manifest).to_dict()
    model = getattr(importlib.import_module(CLOUDCOIL[kind]), kind[1])
    return model.model_validate(manifest).model_dump(mode="json", by_alias=True, exclude_unset=True)


def lost(given: Any, read: Any, path: str) -> Iterator[str]:
    """Yields the path of each value that was not read, or read as another value or type."""
    if isinstance(given, dict) and isinstance(read, dict):
        for key, value in given.items():
            yield from lost(value, read.get(key), f"{path}.{key}")
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        for number, (one, other) in enumerate(zip(given, read, strict=True)):
            yield from lost(one, other, f"{path}[{number}]")
    elif (given, type(given)) != (read, type(read)):
        yield f"{path}: {given!r} is not in the schema"


def faults(manifest: dict[str, Any]) -> Iterator[str]:
    """Yields one line for each fault of a custom resource."""
    name = f"{manifest['kind']} {manifest['metadata']['name']}"
    try:
        yield from lost(manifest, read_back(manifest), name)
    except ValueError as error:
        yield f"{name}: {error}"


if __name__ == "__main__":
    json.dump([fault for manifest in json.load(sys.stdin) for fault in faults(manifest)], sys.stdout)
