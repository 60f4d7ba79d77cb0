"""Settings files of the former release: they load as before, or the error names the new setting."""

from pathlib import Path

import pytest
import yaml

from mal_server.config.server import default_config, load_config
from mal_train.cli import main
from mal_train.config.spec import FORMER_SPELLINGS, load_spec
from mal_train.core.errors import ConfigError

FILES = Path(__file__).parent
RENAMED_SERVER_SETTINGS = {
    "batch_patience_s": "batch_aging_s",  # former name
}


def with_new_names(name: str, renamed: dict[str, str], folder: Path) -> Path:
    """Writes a copy of a file with the current names of renamed settings."""
    text = (FILES / name).read_text()
    for former, current in renamed.items():
        text = text.replace(f"{former}:", f"{current}:")
    (folder / name).write_text(text)
    return folder / name


def test_the_default_spec_is_still_the_default(tmp_path: Path) -> None:
    assert main(["default-spec", "-o", str(tmp_path / "current.yaml")]) == 0
    assert load_spec(FILES / "spec.yaml", []) == load_spec(tmp_path / "current.yaml", [])


def test_every_field_of_a_trainings_spec_is_read() -> None:
    written = load_spec(FILES / "experiment.yaml", []).model_dump(mode="json")
    for section, fields in yaml.safe_load((FILES / "experiment.yaml").read_text()).items():
        if isinstance(fields, dict):
            for name, value in fields.items():
                path = f"{section}.{name}"
                current = FORMER_SPELLINGS.get(path, path).removeprefix(f"{section}.")
                assert written[section][current] == value, path


SPELLINGS = ["color_augmentation", "colour_augmentation"]  # former name


@pytest.mark.parametrize("in_file", [*SPELLINGS, None])
@pytest.mark.parametrize("in_override", [*SPELLINGS, None])
def test_both_spellings_of_a_field_set_it_and_the_override_wins(
    in_file: str | None, in_override: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("" if in_file is None else f"train:\n  {in_file}: false\n")
    overrides = [] if in_override is None else [f"train.{in_override}={str(in_file is not None).lower()}"]
    # The file sets false, the override the opposite of the value before it; the default is true.
    assert load_spec(path, overrides).train.color_augmentation is ((in_file is None) == (in_override is None))


def test_both_spellings_in_one_file_are_refused_by_both_names(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("train:\n" + "".join(f"  {name}: true\n" for name in SPELLINGS))
    with pytest.raises(ConfigError) as caught:
        load_spec(path, [])
    for name in (str(path), *(f"train.{name}" for name in SPELLINGS)):
        assert name in str(caught.value)


@pytest.mark.parametrize(("former", "current"), RENAMED_SERVER_SETTINGS.items())
def test_a_renamed_server_setting_is_refused_with_its_new_name(former: str, current: str) -> None:
    with pytest.raises(ConfigError, match=f"{former}: .*{current}"):
        load_config(FILES / "server.yaml")


def test_the_default_server_settings_are_still_the_default(tmp_path: Path) -> None:
    (tmp_path / "current.yaml").write_text(default_config())
    former = load_config(with_new_names("server.yaml", RENAMED_SERVER_SETTINGS, tmp_path))
    assert former == load_config(tmp_path / "current.yaml")
