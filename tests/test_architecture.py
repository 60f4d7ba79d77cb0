"""Promises of the house: who imports whom, empty package files, no pickle, no silent excepts, clients without torch."""

import ast
import io
import json
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Import name of each package and its folder.
PACKAGES = {
    "mal_train": ROOT / "mal_train",
    "mal_server": ROOT / "mal_server",
    "mal_client": ROOT / "clients" / "mal_client",
    "mal_client.integrations": ROOT / "clients" / "integrations",
    "mal": ROOT / "protos" / "mal",
}
OWN_CODE = [*PACKAGES.values(), ROOT / "deploy", ROOT / "benchmarks", ROOT / "tests"]

TORCHLESS = tuple(
    f"mal_train.labeling.{name}"
    for name in (
        *(
            "coco",
            "coco_output",
            "detections",
            "coco_stream",
            "box_filter",
            "rle",
            "geometry",
            "images",
            "settings",
            "baselines",
        ),
        *("evaluation", "evaluation_report", "miou", "score_quality", "coco_ap", "average_precision"),
        *("polygons", "encodings"),
    )
)
LEAVES = ("mal_train.errors", "mal_train.labeling.settings")

# Who may import what of the project; names cover what lies below them, and the longest name that fits a module decides.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "mal": ("mal",),
    "mal_client": (
        *("mal_client", "mal", "mal_train.atomic", "mal_train.loopback", "mal_train.report"),
        *TORCHLESS,
        *LEAVES,
    ),
    "mal_client.integrations": ("mal_client", "mal_train.atomic", *TORCHLESS, *LEAVES),
    "mal_server": (
        "mal_server",
        "mal_train.labeling",
        "mal_train.model",
        "mal_train.errors",
        "mal_train.loopback",
        "mal_train.strictyaml",
        "mal_train.threads",
    ),
    "mal_server.service": ("mal_server", "mal", "mal_train.labeling", "mal_train.errors"),
    "mal_server.codec": ("mal_server", "mal", "mal_train.labeling", "mal_train.errors"),
    "mal_server.codec_evaluation": ("mal_server", "mal", "mal_train.labeling", "mal_train.errors"),
    "mal_server.codec_model": ("mal_server", "mal", "mal_train.labeling", "mal_train.errors"),
    "mal_server.server": ("mal_server", "mal", "mal_train.labeling", "mal_train.errors", "mal_train.loopback"),
    "mal_server.batcher": tuple(f"mal_server.{name}" for name in ("company", "lanes", "pace", "priority")),
    "mal_server.lanes": ("mal_server.priority",),
    **dict.fromkeys((f"mal_server.{name}" for name in ("company", "pace", "priority")), ()),
    "mal_server.worker": ("mal_train.labeling", "mal_train.errors"),
    "mal_train": (),
    "mal_train.errors": (),
    "mal_train.atomic": ("mal_train.errors",),
    "mal_train.threads": (),
    "mal_train.loopback": (),
    "mal_train.world": ("mal_train.errors",),
    "mal_train.launch": ("mal_train.world", "mal_train.errors"),
    "mal_train.screen": ("mal_train.errors",),
    "mal_train.strictyaml": ("mal_train.errors",),
    "mal_train.config": ("mal_train.sections", "mal_train.strictyaml", *LEAVES),
    "mal_train.sections": ("mal_train.sections", "mal_train.strictyaml"),
    "mal_train.cli": ("mal_train",),
    "mal_train.tasks": ("mal_train",),
    "mal_train.labeling": LEAVES,
    "mal_train.labeling.settings": ("mal_train.errors",),
    "mal_train.labeling.rle": ("mal_train.labeling.geometry", *LEAVES),
    "mal_train.labeling.coco": ("mal_train.labeling.geometry", "mal_train.labeling.rle", *LEAVES),
    "mal_train.labeling.coco_output": (
        "mal_train.labeling.coco",
        "mal_train.labeling.rle",
        "mal_train.atomic",
        *LEAVES,
    ),
    "mal_train.labeling.coco_stream": (
        *("mal_train.labeling.coco", "mal_train.labeling.coco_output", "mal_train.atomic"),
        *LEAVES,
    ),
    "mal_train.labeling.detections": ("mal_train.labeling.coco", *LEAVES),
    "mal_train.labeling.box_filter": ("mal_train.labeling.coco", "mal_train.labeling.geometry", *LEAVES),
    "mal_train.labeling.miou": ("mal_train.labeling.coco", *LEAVES),
    "mal_train.labeling.score_quality": ("mal_train.labeling.miou",),
    "mal_train.labeling.coco_ap": (
        *("mal_train.labeling.coco", "mal_train.labeling.rle", "mal_train.labeling.miou"),
        *("mal_train.labeling.average_precision", *LEAVES),
    ),
    "mal_train.labeling.average_precision": (),
    "mal_train.labeling.evaluation_report": (*TORCHLESS, *LEAVES),
    "mal_train.labeling.polygons": ("mal_train.labeling.rle",),
    "mal_train.labeling.encodings": ("mal_train.labeling.polygons", "mal_train.labeling.rle", *LEAVES),
    "mal_train.labeling.parts": (),
    "mal_train.labeling.overlaps": ("mal_train.labeling.geometry",),
    "mal_train.labeling.scoring": ("mal_train.labeling.overlaps", "mal_train.labeling.parts", *LEAVES),
    "mal_train.labeling.views": ("mal_train.labeling", *LEAVES),
    "mal_train.labeling.evaluation": (*TORCHLESS, *LEAVES),
    "mal_train.labeling.baselines": ("mal_train.labeling.geometry", "mal_train.labeling.rle", *LEAVES),
    "mal_train.labeling.labeler": (
        "mal_train.labeling.images",
        "mal_train.labeling.geometry",
        "mal_train.labeling.overlaps",
        "mal_train.labeling.parts",
        "mal_train.labeling.scoring",
        "mal_train.labeling.rle",
        "mal_train.model",
        *LEAVES,
    ),
    "mal_train.labeling.parallel": ("mal_train.labeling", "mal_train.model", *LEAVES),
    "mal_train.labeling.bulk": ("mal_train.labeling", *LEAVES),
    "mal_train.labeling.splitting": ("mal_train.labeling.labeler", *LEAVES),
    # Pages and pictures for people, of whoever has something to show: no torch below them.
    "mal_train.report": ("mal_train.report", *TORCHLESS, *LEAVES),
    "mal_train.model": ("mal_train.model", "mal_train.atomic", *LEAVES),
    "mal_train.losses": ("mal_train.losses", *LEAVES),
    "mal_train.data": ("mal_train.data", "mal_train.labeling", *LEAVES),
    "mal_train.training": (
        "mal_train.training",
        "mal_train.data",
        "mal_train.losses",
        "mal_train.labeling",
        "mal_train.model",
        "mal_train.report",
        "mal_train.screen",
        "mal_train.atomic",
        "mal_train.world",
        *LEAVES,
    ),
    "mal_train.specs": (),
}

# What only an extra installs.
NOT_IN_BASE_INSTALL = (
    *("torch", "torchvision", "lightning", "timm", "tensorboard"),
    *("pydantic", "yaml", "pyrage", "safetensors", "grpc_health", "aiohttp"),
    *("httpx2", "cvat_sdk", "opentelemetry"),
)
# Modules of the client that say which extra they need.
WITH_AN_EXTRA = (
    *(f"mal_client.integrations.label_studio.{name}" for name in ("app", "pictures")),
    *(f"mal_client.integrations.cvat.{name}" for name in ("site", "interactor")),
    *(f"mal_client.playground.{name}" for name in ("app", "serve")),
    "mal_client.web_serving",
)
PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
HARMLESS = {"UnpicklingError", "PicklingError", "PickleError"}  # exceptions, which other libraries raise


def module_files() -> dict[str, Path]:
    """Every module of the four packages by its import name."""
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
    """Line and module of each import of the project's own, also inside functions and under TYPE_CHECKING."""
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
            if any(covers(package, name) for package in PACKAGES):
                yield node.lineno, name


def forbidden_imports(source: str, module: str, *, is_package: bool = False) -> list[str]:
    rule = max((name for name in MAY_IMPORT if covers(name, module)), key=len)
    return [
        f"line {line}: {module} may not import {imported}; {rule} may import {', '.join(MAY_IMPORT[rule]) or 'nothing'}"
        for line, imported in imported_modules(source, module, is_package=is_package)
        if not any(covers(allowed, imported) for allowed in MAY_IMPORT[rule])
    ]


def import_rings(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which reaches itself by way of the others, sorted."""

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
    """Imports of picklers, torch.load without weights_only=True, and numpy files with allow_pickle."""
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
    """Bare excepts, and broad ones without a comment on their own line or on one beside it."""
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
        ("mal_train.losses.crf", "from mal_train.model.network import MalNetwork"),
        ("mal_train.model.vit", "def build():\n    from mal_train.data import augment"),
        ("mal_train.labeling.geometry", "from mal_train.labeling import labeler"),
        ("mal_train.labeling.geometry", "from . import labeler"),
        ("mal_train.new", "import mal_train.cli"),
        ("mal_server.batcher", "from mal_server.worker import Worker"),
        ("mal_server.pipeline", "from mal.v1 import labeling_pb2"),
        ("mal_client.client", "import mal_train.labeling.labeler as labeler"),
    ],
)
def test_import_against_an_arrow_is_found(module: str, source: str) -> None:
    assert len(forbidden_imports(source, module)) == 1


def test_no_modules_import_each_other_in_a_ring() -> None:
    arrows = {
        module: {name for _, name in imported_modules(path.read_text(), module) if name != module}
        for module, path in MODULES.items()
        if path.stem != "__init__"
    }
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


def test_clients_and_the_kernel_under_them_import_with_the_base_install_alone() -> None:
    names = sorted(
        name
        for name in MODULES
        if any(covers(base, name) for base in ("mal_client", "mal", "mal_train.report", *TORCHLESS, *LEAVES))
        and name not in WITH_AN_EXTRA
    )
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
        failures[name] = str(error)
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
    assert json.loads(finished.stdout.splitlines()[-1]) == {}
