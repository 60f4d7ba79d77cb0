"""`mal-train default-spec`: the text of the specs in the package, and the JSON schema of a spec. No torch."""
# ruff: noqa: PLC0415
# The text of a shipped spec needs neither pydantic nor YAML.

import json
from collections.abc import Sequence
from importlib import resources

from mal_train.core.errors import ConfigError

SPECS = (
    "default",
    "tao",
    "small-cpu",
    "small-cpu-round2",
    "small-cpu-round3",
    "small-cpu-round4",
    "small-gpu",
    "coco-scale",
)


def name_and_overrides(words: Sequence[str]) -> tuple[str, list[str]]:
    """Splits `tao train.lr=1e-5` into the name of a spec and its overrides."""
    names = [word for word in words if "=" not in word]
    if len(names) > 1 or not set(names) <= set(SPECS):
        raise ConfigError(
            f"{' '.join(names)}: unknown spec; give one of {', '.join(SPECS)}, then a.b=c for each change"
        )
    return names[0] if names else SPECS[0], [word for word in words if "=" in word]


def spec_text(name: str, overrides: list[str]) -> str:
    """Returns the text of a shipped spec; with overrides, the complete changed spec, validated and commented."""
    shipped = resources.files("mal_train.specs").joinpath(f"{name}.yaml")
    if not overrides:
        return shipped.read_text(encoding="utf-8")
    from mal_train.config.spec import load_spec
    from mal_train.core.yaml_config import dump

    with resources.as_file(shipped) as path:
        spec = load_spec(path, overrides)
    # A line break would end the comment.
    changes = " ".join(overrides).replace("\n", " ")
    return f"# mal-train default-spec {name} {changes}\n{dump(spec)}"


def json_schema() -> str:
    """Returns the JSON schema of a spec."""
    from mal_train.config.spec import Spec

    return json.dumps(Spec.model_json_schema(), indent=2, ensure_ascii=False) + "\n"
