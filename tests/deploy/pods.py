"""Runs containers of rendered manifests as processes: their commands, arguments, variables and settings.

Paths of volumes lie below a folder, and addresses are on loopback; nothing else is replaced.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.load.run import environment
from tests.deploy.rendered import Manifest

PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
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
        return [self.localize(expand(word, variables), mounts) for word in words], variables

    def run(self, container: Manifest, *more: str, **given: str) -> "subprocess.CompletedProcess[str]":
        """Runs a container to its end, with more arguments."""
        words, variables = self.command(container, given)
        return subprocess.run(
            [*words, *more], env=_environment(variables), capture_output=True, text=True, check=False, timeout=240
        )

    @contextmanager
    def running(self, container: Manifest, *more: str, **given: str) -> "Iterator[subprocess.Popen[bytes]]":
        """Runs a container until the end of the block, and kills it if it then still runs."""
        words, variables = self.command(container, given)
        with subprocess.Popen([*words, *more], env=_environment(variables)) as process:
            try:
                yield process
            finally:
                process.kill()


def execute(host: Host, container: Manifest, command: Sequence[str]) -> int:
    """Runs the command of an exec probe in a container, and returns its exit code."""
    return host.run({**container, "command": list(command), "args": []}).returncode


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables of a process; the commands are those of this environment, activated or not."""
    return {**environment(), "PATH": PATH, **variables}
