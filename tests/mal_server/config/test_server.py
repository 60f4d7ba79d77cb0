"""The server's settings: defaults, overrides, names of wrong fields, and their JSON Schema."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from mal.v1 import model_pb2

from mal_server import cli
from mal_server.api.serialization.model_messages import read_load, read_unload
from mal_server.config.server import ServerConfig, default_config, json_schema, load_config
from mal_server.errors import InvalidRequest
from mal_train.core.errors import ConfigError
from mal_train.core.yaml_config import field_paths, validate


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "server.yaml"
    path.write_text(text)
    return path


def test_the_default_file_is_valid_and_holds_the_defaults(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, default_config()))
    assert config == ServerConfig(checkpoint=Path("builtin"))
    assert config.plans == load_config(None).plans


def test_every_setting_of_the_default_file_has_a_comment_above_it() -> None:
    lines = default_config().splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line and not line.lstrip().startswith("#") and not line.endswith(":"):
            assert before.lstrip().startswith("#"), line


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("checkpoint: a\ngpu_id: [0]", "gpu_ids"),
        ("checkpoint: a\nport: 1", "listen.port"),
        ("checkpoint: a\nlisten: {port: 70000}", "listen.port: 70000"),
        ("checkpoint: a\nlisten: {host: 0.0.0.0}", "allow_plaintext"),
        ("checkpoint: a\nlisten: {host: example.org}", "allow_plaintext"),
        ("checkpoint: a\nbranch: pupil", "branch"),
        ("checkpoint: a\nmax_batch_size: '8'", "max_batch_size"),
        ("checkpoint: a\nmax_queue_crops: 10", "limits.max_boxes (1000)"),
        ("checkpoint: a\nmax_queue_crops: 1999", "limits.max_boxes (1000)"),
        ("checkpoint: a\nbatch_queue_share: 0.6", "limits.max_boxes (1000)"),
        ("checkpoint: a\ngpu_ids: [0, 0]", "gpu_ids: GPU 0"),
        ("checkpoint: a\ndrain_delay_s: .nan", "drain_delay_s"),
    ],
)
def test_a_wrong_setting_is_named_with_its_rule(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.yaml") as raised:
        load_config(written(tmp_path, text))
    assert named in str(raised.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_hosts_need_no_allow_plaintext(tmp_path: Path, host: str) -> None:
    assert load_config(written(tmp_path, f"checkpoint: a\nlisten: {{host: '{host}'}}")).listen.host == host


def test_other_hosts_are_accepted_with_allow_plaintext(tmp_path: Path) -> None:
    text = "checkpoint: a\nlisten: {host: 0.0.0.0, allow_plaintext: true}"
    assert load_config(written(tmp_path, text)).listen.host == "0.0.0.0"


def test_overrides_take_precedence_over_the_file(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "checkpoint: a\nlisten: {port: 1}"), ["listen.port=0", "gpu_ids=[]"])
    assert (config.listen.port, config.gpu_ids) == (0, ())


def test_a_secret_is_refused_on_the_command_line_and_shown_nowhere(tmp_path: Path) -> None:
    path = written(tmp_path, "checkpoint: a\ndecryption_key: hunter2")
    with pytest.raises(ConfigError, match="file:PATH") as raised:
        load_config(path, ["decryption_key=hunter2"])
    assert "hunter2" not in str(raised.value)
    assert "hunter2" not in repr(load_config(path))
    assert load_config(path, ["decryption_key=file:/key"]).decryption_key == "file:/key"


def test_the_model_is_named_after_its_file(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "checkpoint: results/cats.malckpt")).plans[0].name == "cats"
    assert load_config(written(tmp_path, "checkpoint: a\nmodel_name: dogs")).plans[0].name == "dogs"


def test_a_missing_settings_file_ends_the_command_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "-c", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_default_config_prints_a_valid_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["default-config"]) == 0
    load_config(written(tmp_path, capsys.readouterr().out))


def test_the_json_schema_accepts_the_default_file_and_refuses_wrong_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["default-config", "--json-schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    default = yaml.safe_load(default_config())
    assert list(validator.iter_errors(default)) == []
    for wrong in ({"gpu_id": [0]}, {"max_batch_size": 0}, {"listen": {"port": "a"}}, {"branch": "pupil"}):
        assert list(validator.iter_errors({**default, **wrong})), wrong


def test_the_json_schema_describes_every_setting() -> None:
    schema = json.loads(json_schema())
    sections = [schema, *(schema["$defs"][name] for name in ("Listen", "MetricsListen", "Limits", "Connections"))]
    fields = {name: field for section in sections for name, field in section["properties"].items()}
    assert {path.rpartition(".")[2] for path in field_paths(ServerConfig)} <= fields.keys()
    assert [name for name, field in fields.items() if not ({"description", "$ref"} & field.keys())] == []


def test_the_help_of_the_json_schema_has_the_line_for_editors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["default-config", "--help"])
    assert "# yaml-language-server: $schema=FILE" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("missing", ["torch", "grpc_health"])
def test_without_the_server_extra_the_command_prints_the_pip_line(tmp_path: Path, missing: str) -> None:
    config = written(tmp_path, "checkpoint: a\n")
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"from mal_server.cli import main; sys.exit(main(['serve', '-c', {str(config)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "pip install 'mask-auto-labeler[server]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["a/b", "two words", "x" * 65, "a\n", ""])
def test_settings_and_requests_refuse_the_same_model_names(name: str) -> None:
    for settings in ({"model_name": name}, {"models": [{"name": name, "checkpoint": "a"}]}):
        with pytest.raises(ConfigError, match="name"):
            validate(ServerConfig, settings)
    with pytest.raises(InvalidRequest, match="name"):
        read_load(model_pb2.LoadModelRequest(name=name))
    with pytest.raises(InvalidRequest, match="name"):
        read_unload(model_pb2.UnloadModelRequest(name=name))


def test_settings_and_requests_accept_the_longest_name_and_names_made_from_files() -> None:
    name = "Ä_1.@-" + "x" * 58
    assert validate(ServerConfig, {"model_name": name}).plans[0].name == name
    assert read_unload(model_pb2.UnloadModelRequest(name=name)) == name
    made = validate(ServerConfig, {"checkpoint": f"results/my model (2) {'x' * 99}.malckpt"}).plans[0].name
    assert made == ("my-model-2-" + "x" * 99)[:64]
    assert read_unload(model_pb2.UnloadModelRequest(name=made)) == made


def test_a_former_setting_is_refused_with_its_new_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_aging_s"):
        load_config(written(tmp_path, "batch_patience_s: 2.0"))  # former name
