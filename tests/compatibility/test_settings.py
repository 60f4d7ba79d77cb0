"""Settings files of the former release: they load as before, or the error names the new setting."""

from pathlib import Path

import pytest
import yaml

from mal_server.config.server import default_config, load_config
from mal_train.cli import main
from mal_train.config.spec import load_spec
from mal_train.core.errors import ConfigError

FILES = Path(__file__).parent
RENAMED_SERVER_SETTINGS = {
    "batch_patience_s": "batch_aging_s",  # former name
}
RENAMED_SPEC_FIELDS = {
    "colour_augmentation": "color_augmentation",  # former name
}


def with_new_names(name: str, renamed: dict[str, str], folder: Path) -> Path:
    """Writes a copy of a file with the current names of renamed settings."""
    text = (FILES / name).read_text()
    for former, current in renamed.items():
        text = text.replace(f"{former}:", f"{current}:")
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(("former", "current"), RENAMED_SPEC_FIELDS.items())
def test_a_renamed_spec_field_is_refused_with_its_new_name(former: str, current: str) -> None:
    with pytest.raises(ConfigError, match=f"{former}: .*{current}"):
        load_spec(FILES / "spec.yaml", [])


def test_the_default_spec_is_still_the_default(tmp_path: Path) -> None:
    assert main(["default-spec", "-o", str(tmp_path / "current.yaml")]) == 0
    former = load_spec(with_new_names("spec.yaml", RENAMED_SPEC_FIELDS, tmp_path), [])
    assert former == load_spec(tmp_path / "current.yaml", [])


def test_every_field_of_a_trainings_spec_is_read(tmp_path: Path) -> None:
    path = with_new_names("experiment.yaml", RENAMED_SPEC_FIELDS, tmp_path)
    written = load_spec(path, []).model_dump(mode="json")
    for section, fields in yaml.safe_load(path.read_text()).items():
        if isinstance(fields, dict):
            for name, value in fields.items():
                assert written[section][name] == value, f"{section}.{name}"


@pytest.mark.parametrize(("former", "current"), RENAMED_SERVER_SETTINGS.items())
def test_a_renamed_server_setting_is_refused_with_its_new_name(former: str, current: str) -> None:
    with pytest.raises(ConfigError, match=f"{former}: .*{current}"):
        load_config(FILES / "server.yaml")


def test_the_default_server_settings_are_still_the_default(tmp_path: Path) -> None:
    (tmp_path / "current.yaml").write_text(default_config())
    former = load_config(with_new_names("server.yaml", RENAMED_SERVER_SETTINGS, tmp_path))
    assert former == load_config(tmp_path / "current.yaml")
