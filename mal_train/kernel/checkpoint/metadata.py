"""Reads the metadata of a checkpoint: everything in the file that is not a tensor.

Strings: schema, requires, kind, sha256; and as JSON (`json_tree`): model, labeler, categories, provenance and, where
there is one, training and int8.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from mal_train.core.errors import Altered, ConfigError, UnknownLayout
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.checkpoint.json_tree import from_json
from mal_train.kernel.checkpoint.tensorfile import DIGEST_NAME, MAX_SHOWN, PADDING_NAME, TensorFileHeader
from mal_train.kernel.networks.network import ModelConfig, check_map_size, check_score_model
from mal_train.kernel.networks.quantization import Int8Calibration

SCHEMA = "mal-ckpt/1"
REQUIRES = "mask-auto-labeler 0.1"
"""First version that reads this schema. Files state it, so that an older version can name it in its error."""
METADATA = frozenset(
    {"schema", "requires", "kind", "model", "labeler", "categories", "provenance", "training", "int8", DIGEST_NAME}
)
"""Names of the metadata. Others are refused: a changed letter must not hide a digest."""
WEIGHT_PREFIXES = ("student.", "teacher.")
TRAINING_PREFIX = "training/"

Kind: TypeAlias = Literal["weights", "resume"]


@dataclass(frozen=True)
class Settings:
    """The validated metadata; see `Checkpoint`."""

    header: TensorFileHeader
    kind: Kind
    model: ModelConfig
    labeler: LabelerConfig
    categories: list[dict[str, Any]]
    provenance: dict[str, Any]
    training_json: str
    int8: Int8Calibration | None


def parse_settings(header: TensorFileHeader, name: str) -> Settings:
    """Decodes the settings in a header, and checks the names of the tensors.

    Args:
        header: header of the safetensors content.
        name: path of the file, for error messages.

    Raises:
        UnknownLayout: another schema, an unexpected tensor, or settings that this version does not know.
        Altered: a setting is missing, damaged or of the wrong type.
    """
    _check_schema(header.metadata, name)
    for entry in header.entries:
        if not entry.name.startswith((*WEIGHT_PREFIXES, TRAINING_PREFIX)) and entry.name != PADDING_NAME:
            raise UnknownLayout(
                f"{name}: tensor {entry.name[:MAX_SHOWN]!r} belongs to neither the weights nor the training state"
            )
    try:
        kind = cast(Kind, header.metadata["kind"])
        model, labeler, categories, provenance = (
            from_json(header.metadata[part], {}) for part in ("model", "labeler", "categories", "provenance")
        )
        int8 = from_json(header.metadata.get("int8", "null"), {})
    except KeyError as error:
        raise Altered(f"{name}: {error} is missing from the settings") from None
    except ValueError as error:
        raise Altered(f"{name}: the settings are damaged: {str(error)[:MAX_SHOWN]}") from None
    are_objects = isinstance(categories, list) and all(isinstance(category, dict) for category in categories)
    if kind not in ("weights", "resume") or not are_objects or not isinstance(provenance, dict):
        raise Altered(f"{name}: kind, categories or provenance are of the wrong type or value")
    try:
        model_config, labeler_config = ModelConfig.from_dict(model), LabelerConfig.from_dict(labeler)
        check_map_size(model_config, labeler_config.crop_size)
        check_score_model(model_config, labeler_config.score_model)
        calibration = None if int8 is None else Int8Calibration.from_dict(int8)
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UnknownLayout(
            f"{name}: this version cannot use its model, labeler or int8 settings ({str(error)[:MAX_SHOWN]}); use a "
            "newer version, or create the file again"
        ) from error
    training_json = header.metadata.get("training", "")
    return Settings(header, kind, model_config, labeler_config, categories, provenance, training_json, calibration)


def _check_schema(metadata: Mapping[str, str], name: str) -> None:
    schema = metadata.get("schema")
    if schema == SCHEMA and not metadata.keys() <= METADATA:
        unknown = min(metadata.keys() - METADATA)[:MAX_SHOWN]
        raise UnknownLayout(f"{name}: unknown setting {unknown!r}; use a newer version, or create the file again")
    if schema is None:
        raise UnknownLayout(f"{name}: safetensors without a schema; not a checkpoint of this project")
    if schema != SCHEMA:
        raise UnknownLayout(
            f"{name}: schema {schema[:MAX_SHOWN]!r}; this version reads {SCHEMA!r}; "
            f"use {metadata.get('requires', 'the version that wrote it')[:MAX_SHOWN]} or newer"
        )
