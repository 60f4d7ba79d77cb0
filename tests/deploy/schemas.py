"""Checks everything that deploy/kubernetes renders to; `make check` runs it: `python -m tests.deploy.schemas`.

Kinds of Kubernetes are checked strictly by its own schemas, at the oldest supported and the newest version. Custom
resources are checked by `crd_models`, and their pod templates like those of other kinds. No package holds the schema of
KubeRay's RayJob: only its pod templates are checked.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence

import kubernetes_validate

from tests.deploy import crd_models
from tests.deploy.rendered import Manifest, folders, pod_templates, render
from tests.paths import ROOT
from tests.tools import find_program, missing

OLDEST = "1.29"
"""The first version with `backoffLimitPerIndex` on by default."""
NEWEST = kubernetes_validate.latest_version()
MODELED = crd_models.CLOUDCOIL.keys() | crd_models.KUBEFLOW.keys()
UNCHECKED = {("ray.io/v1", "RayJob")}
"""Kinds of which only the pod templates are checked."""
PYTHON = ROOT / ".venv-kubernetes" / "bin" / "python"


def kind_of(manifest: Manifest) -> tuple[str, str]:
    """Returns version and kind."""
    return manifest["apiVersion"], manifest["kind"]


def is_custom(manifest: Manifest) -> bool:
    """Returns True for a kind that Kubernetes itself does not have."""
    return kind_of(manifest) in MODELED | UNCHECKED


def core_faults(manifest: Manifest) -> Iterator[str]:
    """Yields one line for each version of Kubernetes whose schema refuses a manifest."""
    for version in (OLDEST, NEWEST):
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            name = f"{manifest['kind']} {manifest['metadata'].get('name', '')}"
            yield f"{name}, Kubernetes {version}: {error.message}"


def custom_faults(manifests: Sequence[Manifest]) -> list[str]:
    """Returns one line for each fault of custom resources that have a published schema."""
    modeled = [manifest for manifest in manifests if kind_of(manifest) in MODELED]
    if not modeled:
        return []
    if not PYTHON.exists():
        missing(str(PYTHON), "`make tools` fills the environment with the models of custom resources")
    line = [str(PYTHON), crd_models.__file__]
    done = subprocess.run(line, input=json.dumps(modeled), stdout=subprocess.PIPE, text=True, check=True)
    found: list[str] = json.loads(done.stdout)
    return found


def faults(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Yields one line for each fault of rendered manifests."""
    for manifest in manifests:
        if is_custom(manifest):
            for template in pod_templates(manifest):
                yield from core_faults({"apiVersion": "v1", "kind": "Pod", "metadata": {}, "spec": template["spec"]})
        else:
            yield from core_faults(manifest)
    yield from custom_faults(manifests)


def main() -> int:
    """Prints every fault; returns 1 when there is one."""
    if find_program("kubectl") is None or not PYTHON.exists():
        print("kubernetes: kubectl or the models of custom resources are missing; run `make tools`", file=sys.stderr)
        return 2
    rendered = {folder: render(folder) for folder in folders()}
    found = [f"deploy/kubernetes/{folder}: {fault}" for folder in rendered for fault in faults(rendered[folder])]
    partly = ", ".join(sorted(kind for _, kind in UNCHECKED))
    count = sum(map(len, rendered.values()))
    passed = f"kubernetes: {count} manifests of {len(rendered)} folders are valid ({OLDEST} and {NEWEST})"
    print("\n".join(found) if found else f"{passed}; of {partly}, only the pod templates are checked")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
