"""Architecture: import arrows, no circles, empty package files, no pickle, explained excepts, clients without torch."""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT

# Import name of each package and its folder.
PACKAGES = {
    "mal_train": ROOT / "mal_train",
    "mal_server": ROOT / "mal_server",
    "mal_client": ROOT / "clients" / "mal_client",
    "mal": ROOT / "protos" / "mal",
}
NOT_SHIPPED = ("benchmarks", "deploy", "tests")
OWN_CODE = [*PACKAGES.values(), *(ROOT / name for name in NOT_SHIPPED)]

CORE, KERNEL = "mal_train.core", "mal_train.kernel"
# Each package and what it may import beside itself. The longest name that covers a module decides.
ARROWS: dict[str, tuple[str, ...]] = {
    "mal": (),
    CORE: (),
    "mal_train.core.images": (CORE,),
    "mal_train.core.masks": (CORE,),
    "mal_train.core.coco": (CORE,),
    "mal_train.core.metrics": (CORE,),
    "mal_train.core.report": (CORE,),
    KERNEL: (CORE,),
    "mal_train.kernel.networks": (CORE,),
    "mal_train.kernel.checkpoint": (CORE, "mal_train.kernel.networks"),
    "mal_train.kernel.labeler": (CORE, "mal_train.kernel.networks", "mal_train.kernel.checkpoint"),
    "mal_train.config": (CORE,),
    "mal_train.data": (CORE,),
    "mal_train.losses": (CORE,),
    "mal_train.distributed": (CORE, KERNEL),
    "mal_train.offline": (CORE, KERNEL),
    "mal_train.training": (
        *(CORE, KERNEL, "mal_train.data", "mal_train.losses"),
        *("mal_train.distributed", "mal_train.offline"),
    ),
    "mal_train.tuning": (CORE, "mal_train.config", "mal_train.distributed", "mal_train.training"),
    "mal_train.specs": (),
    "mal_train.commands": ("mal_train",),
    "mal_train": ("mal_train",),
    "mal_client": ("mal", CORE),
    # The dispatcher streams items of any kind.
    "mal_client.bulk": ("mal", "mal_client", "mal_train.core.errors"),
    "mal_server": ("mal", CORE, KERNEL),
    "mal_server.scheduling": ("mal_server.errors", "mal_train.core.errors"),
    "mal_server.config": ("mal_server.errors", CORE, KERNEL),
    "mal_server.security": ("mal_server.errors", "mal_server.config", CORE),
    "mal_server.ops": ("mal_server.errors", "mal_server.config", "mal_server.security", CORE),
    "mal_server.inference": ("mal_server.errors", "mal_server.scheduling", "mal_server.ops", CORE, KERNEL),
    "mal_server.models": (
        *("mal_server.errors", "mal_server.config", "mal_server.scheduling", "mal_server.inference"),
        *("mal_server.ops", CORE, KERNEL),
    ),
    "mal_server.evaluation": (
        *("mal_server.errors", "mal_server.config", "mal_server.scheduling", "mal_server.inference"),
        "mal_server.models",
        *(CORE, KERNEL),
    ),
    # Only the API knows messages; it knows none of the server's life.
    "mal_server.api": (
        *("mal", "mal_server.errors", "mal_server.config", "mal_server.scheduling", "mal_server.inference"),
        *("mal_server.models", "mal_server.evaluation", "mal_server.security", "mal_server.ops", CORE, KERNEL),
    ),
}

# What only an extra installs.
NOT_IN_BASE_INSTALL = (
    *("torch", "torchvision", "lightning", "timm", "tensorboard"),
    *("pydantic", "yaml", "pyrage", "safetensors", "grpc_health", "aiohttp"),
    *("httpx2", "cvat_sdk", "opentelemetry", "pyarrow"),
    *("fsspec", "s3fs", "gcsfs", "adlfs", "yarl"),
)
# Parts of the client that need an extra, and what it brings.
WITH_AN_EXTRA = {
    "mal_client.integrations.label_studio": ("aiohttp", "httpx2"),
    "mal_client.integrations.cvat": ("cvat_sdk",),
    "mal_client.playground": ("aiohttp",),
    "mal_client.web_server": ("aiohttp",),
}
PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
HARMLESS = {"UnpicklingError", "PicklingError", "PickleError"}  # exceptions, which other libraries raise


def module_files() -> dict[str, Path]:
    """Returns the file of every module of the four packages, by import name."""
    files = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            files[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return files


MODULES = module_files()
SOURCES = sorted(
    {path for folder in OWN_CODE for path in folder.rglob("*.py") if not path.stem.endswith(("_pb2", "_grpc"))}
)


def covers(name: str, module: str) -> bool:
    return module == name or module.startswith(f"{name}.")


def imported_modules(source: str, module: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Yields line and module of each import of our packages, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".") + ([""] if is_package else [])
            parents = parts[: -node.level] if node.level else []
            base = ".".join((*parents, *([node.module] if node.module else [])))
            deeper = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else base for name in deeper]
        else:
            continue
        for name in names:
            if any(covers(package, name) for package in (*PACKAGES, *NOT_SHIPPED)):
                yield node.lineno, name


def forbidden_imports(source: str, module: str, *, is_package: bool = False) -> list[str]:
    rule = max((name for name in ARROWS if covers(name, module)), key=len)
    allowed = (rule, *ARROWS[rule])
    return [
        f"line {line}: {module} may not import {imported}; {rule} may import {', '.join(allowed)}"
        for line, imported in imported_modules(source, module, is_package=is_package)
        if not any(covers(name, imported) for name in allowed)
    ]


def package_of(module: str) -> str:
    """Returns the package of a module. Modules at the top (errors, client, server) count as packages of their own."""
    package = module.rpartition(".")[0]
    return module if package in PACKAGES else package


def import_rings(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Returns the groups of modules that import each other in a circle, sorted."""

    def reached(module: str) -> set[str]:
        found: set[str] = set()
        ahead = [module]
        while ahead:
            new = arrows.get(ahead.pop(), set()) - found
            found |= new
            ahead += new
        return found

    reach = {module: reached(module) for module in arrows}
    rings = {tuple(sorted(m for m in reach[module] if module in reach[m])) for module in arrows}
    return sorted(list(ring) for ring in rings if ring)


def pickle_uses(source: str) -> list[str]:
    """Returns imports of picklers, torch.load without weights_only=True, and numpy files with allow_pickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"line {node.lineno}: import {a.name}" for a in node.names if a.name.split(".")[0] in PICKLERS]
        elif isinstance(node, ast.ImportFrom):
            root = (node.module or "").split(".")[0]
            names = {alias.name for alias in node.names}
            if (root in PICKLERS and not names <= HARMLESS) or (root == "torch" and "load" in names):
                found.append(f"line {node.lineno}: from {node.module} import {', '.join(sorted(names))}")
        elif isinstance(node, ast.Call):
            given = {word.arg: word.value for word in node.keywords}
            if ast.unparse(node.func) == "torch.load" and not is_true(given.get("weights_only")):
                found.append(f"line {node.lineno}: torch.load without weights_only=True")
            if is_true(given.get("allow_pickle")):
                found.append(f"line {node.lineno}: allow_pickle=True")
    return found


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def unexplained_excepts(source: str) -> list[str]:
    """Returns bare excepts, and broad ones without a comment on the same or an adjacent line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        if node.type is None:
            found.append(f"line {node.lineno}: bare except")
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        is_broad = any(ast.unparse(name).split(".")[-1] in {"Exception", "BaseException"} for name in caught)
        if is_broad and not commented & {node.lineno - 1, node.lineno, node.lineno + 1}:
            found.append(f"line {node.lineno}: except {ast.unparse(node.type)} without its reason beside it")
    return found


def path_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_module_imports_only_along_the_arrows(module: str) -> None:
    path = MODULES[module]
    assert forbidden_imports(path.read_text(), module, is_package=path.stem == "__init__") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mal_train.losses.crf", "from mal_train.kernel.networks.network import MalNetwork"),
        ("mal_train.kernel.networks.vit", "def build():\n    from mal_train.data import augment"),
        ("mal_train.core.masks.geometry", "from mal_train.kernel.labeler import labeler"),
        ("mal_train.core.masks.geometry", "from ...kernel.labeler import labeler"),
        ("mal_train.core.new", "import mal_train.cli"),
        ("mal_train.data.new", "from tests.scenes import scene"),
        ("mal_server.scheduling.batcher", "from mal_server.inference.worker import Worker"),
        ("mal_server.inference.pipeline", "from mal.v1 import labeling_pb2"),
        ("mal_client.client", "import mal_train.kernel.labeler.labeler as labeler"),
        ("mal_client.bulk.stream", "from mal_train.core.coco.annotations import CocoImage"),
    ],
)
def test_import_against_an_arrow_is_found(module: str, source: str) -> None:
    assert len(forbidden_imports(source, module)) == 1


def test_the_server_reads_no_address() -> None:
    found = {
        module: name
        for module, path in MODULES.items()
        if covers("mal_server", module)
        for _, name in imported_modules(path.read_text(), module)
        if covers("mal_train.core.storage", name) or covers("mal_train.core.images.files", name)
    }
    assert found == {}


def test_only_starting_weights_need_timm() -> None:
    # Its import takes as long as torch's, so nothing that serves may need it.
    starting_weights = "mal_train.kernel.convert.pretrained"
    imports_timm = re.compile(r"^\s*(?:import|from) timm\b", re.MULTILINE)
    assert {name for name, path in MODULES.items() if imports_timm.search(path.read_text())} == {starting_weights}
    assert not {
        module
        for module, path in MODULES.items()
        if covers("mal_server", module) or covers("mal_train.kernel.labeler", module)
        for _, name in imported_modules(path.read_text(), module)
        if name == starting_weights
    }


def imports_of_modules() -> dict[str, set[str]]:
    return {
        module: {name for _, name in imported_modules(path.read_text(), module) if name != module}
        for module, path in MODULES.items()
        if path.stem != "__init__"
    }


def test_no_modules_import_each_other_in_a_ring() -> None:
    assert import_rings(imports_of_modules()) == []


def test_no_packages_import_each_other_in_a_ring() -> None:
    arrows: dict[str, set[str]] = {}
    for module, imported in imports_of_modules().items():
        package = package_of(module)
        arrows.setdefault(package, set()).update({package_of(name) for name in imported} - {package})
    assert import_rings(arrows) == []


def test_a_ring_is_found_and_who_only_leads_to_it_is_not() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}, "f": {"f"}}
    assert import_rings(arrows) == [["a", "b", "c"], ["f"]]


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.name == "__init__.py" and "protos" not in p.parts], ids=path_id
)
def test_package_file_is_empty(path: Path) -> None:
    assert path.read_bytes() == b""


@pytest.mark.parametrize("path", SOURCES, ids=path_id)
def test_nothing_is_pickled(path: Path) -> None:
    assert pickle_uses(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_pickling_is_found(source: str) -> None:
    assert len(pickle_uses(source)) == 1


@pytest.mark.parametrize("path", SOURCES, ids=path_id)
def test_broad_excepts_state_their_reason(path: Path) -> None:
    assert unexplained_excepts(path.read_text()) == []


@pytest.mark.parametrize("caught", ["", " Exception", " (ValueError, Exception) as error", " builtins.BaseException"])
def test_unexplained_except_is_found(caught: str) -> None:
    assert len(unexplained_excepts(f"try:\n    work()\n\nexcept{caught}:\n    text = '# no comment'\n")) == 1


def test_clients_and_the_core_under_them_import_with_the_base_install_alone() -> None:
    names = sorted(name for name in MODULES if any(covers(base, name) for base in ("mal_client", "mal", CORE)))
    missing = missing_imports(names)
    assert {
        name: absent
        for name, absent in missing.items()
        if not any(covers(part, name) and absent in extra for part, extra in WITH_AN_EXTRA.items())
    } == dict.fromkeys(
        ["mal_train.core.yaml_config", "mal_train.core.yaml_text"], "yaml"
    )  # only the commands that read YAML use it


def missing_imports(names: list[str]) -> dict[str, str]:
    """Returns the modules that do not import with the base install, and the package that each lacks first."""
    script = f"""
import importlib, json, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {NOT_IN_BASE_INSTALL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, NotInstalled())
failures = {{}}
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        failures[name] = error.name.split(".")[0]
print(json.dumps(failures))
"""
    search_path = [str(ROOT), str(ROOT / "clients"), str(ROOT / "protos")]
    finished = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {search_path!r}\n{script}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    found: dict[str, str] = json.loads(finished.stdout.splitlines()[-1])
    return found
