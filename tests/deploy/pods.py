"""Runs containers of rendered manifests as processes: their commands, arguments, variables and settings.

Paths of volumes lie below a folder, and addresses are on loopback; nothing else is replaced. Where the system permits
user namespaces, the processes have what the pods have: user 10001, no capabilities, and no file system that they may
write but the volumes.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.load.run import environment
from tests.deploy.rendered import Manifest

PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
USER = 10001
_RESTRICT = f"""
set -e
systems=/
while [ "$1" != -- ]; do
    systems="$systems $(df --output=target "$1" | tail -n 1)"
    mount --bind "$1" "$1"
    shift
done
shift
for system in $systems; do mount -o remount,bind,ro "$system"; done
exec unshare --user --map-user={USER} --map-group={USER} -- "$@"
"""
"""Binds folders, makes the root and the file systems of the folders read-only, and becomes another user."""
_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_]\w*)\)")


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Replaces $(NAME) as the kubelet does: unknown names stay, and $$ is a dollar sign.

    >>> expand("--shard=$(I)/$(N) $(X) $$(I)", {"I": "3", "N": "16"})
    '--shard=3/16 $(X) $(I)'
    """
    return _REFERENCE.sub(lambda match: "$" if match[0] == "$$" else variables.get(match[1], match[0]), text)


def variables_of(container: Manifest) -> dict[str, str]:
    """Returns the variables that the manifest of a container sets; resources of its own are resolved."""
    found = {}
    for entry in container.get("env", []):
        if "value" in entry:
            found[entry["name"]] = entry["value"]
        else:
            kind, _, resource = entry["valueFrom"]["resourceFieldRef"]["resource"].partition(".")
            found[entry["name"]] = container["resources"][kind][resource]
    return found


def arguments_of(container: Manifest) -> list[str]:
    """Returns the arguments of a container with its variables replaced."""
    return [expand(word, variables_of(container)) for word in container["args"]]


@cache
def can_restrict() -> bool:
    """Returns True if this system permits the namespaces of `restricted`."""
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(restricted(["true"], [Path(folder)]), capture_output=True, check=False).returncode == 0


def restricted(words: Sequence[str], writable: Sequence[Path]) -> list[str]:
    """Returns the words of a process that may write to these folders only. It keeps its process id and signals."""
    script = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _RESTRICT, "sh"]
    return [*script, *map(str, writable), "--", *words]


@dataclass(frozen=True)
class Host:
    """A machine in place of a cluster.

    Attributes:
        folder: root of the paths of the containers.
        replaced: texts of the manifests and what takes their place, in this order.
    """

    folder: Path
    replaced: Mapping[str, str] = field(default_factory=dict)

    def path(self, inside: str) -> Path:
        """Returns the path of a file of the containers, with its parent folder."""
        path = self.folder / inside.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def localize(self, text: str, mounts: Sequence[str]) -> str:
        """Returns a text of a manifest with the paths and addresses of this machine."""
        paths = "|".join(map(re.escape, mounts))
        text = re.sub(rf"(?<![\w/.])({paths})(?=/)", lambda match: f"{self.folder}{match[0]}", text)
        for old, new in self.replaced.items():
            text = text.replace(old, new)
        return text

    def mount(self, manifests: Sequence[Manifest], pod: Manifest) -> None:
        """Writes the files of the ConfigMaps that a pod mounts."""
        (container,) = pod["containers"]
        paths = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        maps = {one["metadata"]["name"]: one["data"] for one in manifests if one["kind"] == "ConfigMap"}
        for volume in pod["volumes"]:
            for name, content in maps.get(volume.get("configMap", {}).get("name"), {}).items():
                local = self.localize(content, list(paths.values()))
                self.path(f"{paths[volume['name']]}/{name}").write_text(local)

    def command(self, container: Manifest, given: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
        """Returns the words and the variables of a container's process.

        Args:
            container: of a manifest.
            given: variables that Kubernetes adds.
        """
        variables = {**given, **variables_of(container)}
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        words = [*container["command"], *container["args"]]
        local = [self.localize(expand(word, variables), mounts) for word in words]
        tmp = self.folder / "tmp"
        tmp.mkdir(exist_ok=True)
        return local, {**variables, "HOME": str(tmp), "TMPDIR": str(tmp)}

    def process(self, container: Manifest, more: Sequence[str], given: Mapping[str, str]) -> dict[str, Any]:
        """Returns the arguments of `subprocess` for a container."""
        words, variables = self.command(container, given)
        line = [*words, *more]
        if can_restrict():
            line = restricted(line, self.writable(container))
        # The commands are those of this environment, activated or not.
        return {"args": line, "env": {**environment(), "PATH": PATH, **variables}}

    def writable(self, container: Manifest) -> list[Path]:
        """Returns the folders of the volumes that a container may write; /dev/shm is this machine's."""
        mounts = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
        return [self.path(f"{mount}/x").parent for mount in mounts if mount != "/dev/shm"]

    def run(self, container: Manifest, *more: str, **given: str) -> "subprocess.CompletedProcess[str]":
        """Runs a container to its end, with more arguments."""
        process = self.process(container, more, given)
        return subprocess.run(**process, capture_output=True, text=True, check=False, timeout=240)

    @contextmanager
    def running(self, container: Manifest, *more: str, **given: str) -> "Iterator[subprocess.Popen[bytes]]":
        """Runs a container until the end of the block, and kills it if it then still runs."""
        with subprocess.Popen(**self.process(container, more, given)) as process:
            try:
                yield process
            finally:
                process.kill()


def execute(host: Host, container: Manifest, command: Sequence[str]) -> int:
    """Runs the command of an exec probe in a container, and returns its exit code."""
    return host.run({**container, "command": list(command), "args": []}).returncode
