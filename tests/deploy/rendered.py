"""Renders the folders of deploy/kubernetes as `kubectl apply -k` does."""

import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.paths import ROOT
from tests.tools import program

KUBERNETES = ROOT / "deploy" / "kubernetes"
Manifest = dict[str, Any]
POD_TEMPLATE_KEYS = ("template", "submitterPodTemplate")
"""Fields that hold a pod template, in kinds of any group."""


def folders() -> list[str]:
    """Returns the folders that can be applied, relative to deploy/kubernetes; components are not among them."""
    found = (path for path in KUBERNETES.rglob("kustomization.yaml") if "kind: Kustomization" in path.read_text())
    return sorted(str(path.parent.relative_to(KUBERNETES)) for path in found)


def render(folder: str | Path) -> list[Manifest]:
    """Returns the manifests of a folder of deploy/kubernetes, or of an absolute one."""
    return list(yaml.safe_load_all(_rendered(KUBERNETES / folder)))


def only(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """Returns the only manifest of a kind, or of a kind and name."""
    (found,) = (one for one in manifests if one["kind"] == kind and name in (None, one["metadata"]["name"]))
    return found


def pod_templates(value: object) -> Iterator[Manifest]:
    """Yields every pod template inside a manifest, at any depth."""
    if isinstance(value, dict):
        for key, child in value.items():
            if key in POD_TEMPLATE_KEYS and isinstance(child, dict) and "containers" in child.get("spec", {}):
                yield child
            else:
                yield from pod_templates(child)
    elif isinstance(value, list):
        for child in value:
            yield from pod_templates(child)


def pod_of(manifest: Manifest) -> Manifest:
    """Returns the pod's spec of a manifest with one pod template."""
    (template,) = pod_templates(manifest)
    spec: Manifest = template["spec"]
    return spec


@cache
def _rendered(folder: Path) -> str:
    done = subprocess.run([program("kubectl"), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
