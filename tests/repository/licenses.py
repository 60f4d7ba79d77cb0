"""Checks the license of every installed package against a list: `python -m tests.repository.licenses`, in `make check`.

The list holds licenses under which the project may use and redistribute a package without conditions on its own code.
"""

import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distributions

ALLOWED = {
    *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "ISC", "MIT", "MIT-0", "MIT-CMU"),
    *("MPL-2.0", "PSF-2.0", "Zlib", "Apache-2.0 WITH LLVM-exception"),
}
OTHER_NAMES = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "FreeBSD": "BSD-2-Clause",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
"""Names in metadata that predate SPDX expressions -> SPDX."""

EXCEPTIONS = {
    "axe-playwright-python": "MIT, which its metadata does not state; the script in it MPL-2.0",
    "codespell": "GPL-2.0, a program of `make check`; nothing imports or ships it",
    "cuda-toolkit": "names NVIDIA's packages and holds no code",
    "pyrage": "MIT, which its metadata does not state",
    "supervisor": "of the BSD kind (Repoze), a program of tests; nothing imports or ships it",
}
"""Packages that the list does not cover, each with its reason."""

NVIDIA = re.compile(r"nvidia-")
"""CUDA libraries, which PyTorch's wheels for CUDA require: proprietary, free to use and redistribute with a program."""


def stated(package: Distribution) -> list[str]:
    """Returns the licenses that a package states: its expression, else its classifiers, else its free text."""
    metadata = package.metadata
    classifiers = (text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier", []) if "License ::" in text)
    named = [name for name in classifiers if name != "DFSG approved"]
    text = "\n".join(metadata.get_all("License-Expression", [])) or " AND ".join(named)
    text = text or "\n".join(metadata.get_all("License", [])) or "no license"
    parts = re.split(r" AND | OR ", text.strip().splitlines()[0])
    return [OTHER_NAMES.get(part, part) for part in parts]


def findings(packages: Iterable[Distribution]) -> Iterator[str]:
    """Yields a line for each package whose license is not allowed."""
    for package in packages:
        if package.name in EXCEPTIONS or NVIDIA.match(package.name):
            continue
        for name in stated(package):
            if name not in ALLOWED:
                yield f"{package.name} {package.version}: {name[:80]!r} is not an allowed license"


def installed() -> list[Distribution]:
    """Returns the packages of this environment, without those that other packages hold as copies."""
    return list(distributions(path=[sysconfig.get_path("purelib")]))


def main() -> int:
    """Prints the findings; returns 1 if there are any."""
    packages = installed()
    lines = sorted(set(findings(packages)))
    for line in lines:
        print(f"licenses: {line}; use another package, or add the license or an exception to {__file__}")
    if not lines:
        print(f"licenses: all {len(packages)} packages have an allowed license")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
