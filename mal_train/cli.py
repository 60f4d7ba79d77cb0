"""The command `mal-train`: parses arguments, runs a command, and converts errors to one line and an exit code.

Exit codes: 0 done · 1 unexpected error · 2 usage or configuration · 3 done, but some items failed · 4 disk or
permission · 5 training stopped on non-finite values · 130 interrupted · 141 the reader of the output closed it ·
143 terminated after saving.
"""
# ruff: noqa: PLC0415
# Each command imports its own modules: torch takes seconds, and without torch `main` can name the package to install.

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from mal_train.commands.default_spec import SPECS, json_schema, name_and_overrides, spec_text
from mal_train.core.atomic_io import stdout_exit_code
from mal_train.core.command_line import RenamedOption, add_common_options, parse_arguments, prepare_process
from mal_train.core.console import Console, escape_control, print_result
from mal_train.core.errors import ConfigError, MalError, OutputError
from mal_train.core.numbers import counted
from mal_train.core.threads import wait_passively
from mal_train.distributed.env import LAUNCHED, TUNER, read_distributed_env

SOME_FAILED = 3
NEEDS_TRAIN = "mal-train needs the training packages: pip install 'mask-auto-labeler[train]'"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    prepare_process()
    arguments = parse_arguments(_parser(), argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    wait_passively()
    try:
        code = command(arguments)
        if sys.stdout is not None:  # None after `>&-`
            sys.stdout.flush()
        return code
    except MalError as error:
        rank = os.environ.get("RANK", "0")
        sender = "mal-train" if rank == "0" else f"mal-train: process {rank}"
        print(f"{sender}: {escape_control(str(error))}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in {"mal_train", ""}:
            raise
        print(f"{NEEDS_TRAIN}  (no module named {error.name})", file=sys.stderr)
        return ConfigError.exit_code
    except KeyboardInterrupt:
        print("mal-train: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        return _output_error(error)
    except Exception:  # every unexpected error ends the command with exit code 1 and a stack trace
        traceback.print_exc()
        return MalError.exit_code


def _output_error(error: OSError) -> int:
    """Returns the exit code of an error of standard output; prints the trace of any other."""
    lost = stdout_exit_code(error)
    if lost is None:
        traceback.print_exception(error)
        return MalError.exit_code
    if lost == OutputError.exit_code:
        print(f"mal-train: standard output: {error.strerror}; free disk space", file=sys.stderr)
    return lost


def _train(arguments: argparse.Namespace) -> int:
    from mal_train.config.spec import load_spec
    from mal_train.training.run_files import note_failure

    env = read_distributed_env()
    is_first = env.is_rank_zero and env.launcher != "mal-train"
    spec = load_spec(arguments.spec, arguments.overrides, "train", Console().print if is_first else lambda _: None)
    if arguments.fast_dev_run:
        from mal_train.commands.fast_dev_run import shortened

        spec = shortened(spec)
    if env.launcher == "none" and spec.train.num_nodes > 1:
        raise ConfigError(
            f"train.num_nodes: {spec.train.num_nodes}; start the command on each machine with torchrun or srun "
            "(docs/distributed.md)"
        )
    from mal_train.distributed.launch import end_with_parent, launch

    parent = os.environ.get(LAUNCHED if env.launcher == "mal-train" else TUNER)
    if parent is not None:
        end_with_parent(parent)
    if env.launcher == "none" and spec.train.num_gpus > 1:
        code = launch(arguments.argv, spec.train.num_gpus)
        if code:
            note_failure(spec.task_dir("train"), f"a process of the training failed; exit code {code}")
        return code
    from mal_train.commands.train import fast_dev_run, train

    if arguments.fast_dev_run:
        closing = fast_dev_run(spec, Console())
        if env.is_rank_zero:
            print_result(closing)
        return 0
    result = train(spec, Console())
    if not env.is_rank_zero:
        return 0
    if result.report is not None and result.report.overall.count:
        print_result(result.report.table())
    print_result(f"checkpoint: {result.checkpoint}")
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    from mal_train.commands.tune import tune
    from mal_train.config.spec import load_spec

    result = tune(load_spec(arguments.spec, arguments.overrides, "tune", Console().print), Console())
    print_result(result.summary())
    return SOME_FAILED if result.failed else 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from mal_train.commands.evaluate import evaluate
    from mal_train.config.spec import load_spec

    report = evaluate(load_spec(arguments.spec, arguments.overrides, "evaluate", Console().print), Console())
    print_result(report.table())
    return 0 if report.measured and not report.failed_count else SOME_FAILED


def _inference(arguments: argparse.Namespace) -> int:
    from mal_train.config.spec import load_spec

    spec = load_spec(arguments.spec, arguments.overrides, "inference", Console().print)
    if spec.inference.engine == "ray":
        from mal_train.commands.ray_inference import inference_on_ray as inference
    else:
        from mal_train.commands.inference import inference

    result = inference(spec, Console())
    if result.report is not None:
        print_result(result.report.table())
    for reason, count in result.failed.most_common():
        print_result(f"{counted(count, 'box')} without a mask: {reason}")
    if (nothing := result.nothing_done) is not None:
        print_result(nothing)
    return SOME_FAILED if result.failed or nothing is not None else 0


def _import(arguments: argparse.Namespace) -> int:
    from mal_train.commands.convert import import_checkpoint

    import_checkpoint(arguments.file, arguments.output, arguments.overrides, Console())
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from mal_train.commands.export import export
    from mal_train.config.spec import load_spec

    spec = load_spec(arguments.spec, arguments.overrides, "export", Console().print)
    report = export(
        spec,
        arguments.output,
        Console(),
        license=arguments.license,
        average_with=arguments.average or (),
        int8=arguments.int8,
    )
    if report is not None:
        print_result(report.table())
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from mal_train.commands.inspect import description
    from mal_train.kernel.checkpoint import builtin
    from mal_train.kernel.checkpoint.keys import parse_key

    key = parse_key(arguments.key, purpose="decryption", source="command line")
    for line in description(builtin.resolve(arguments.file), key):
        print_result(line)
    return 0


def _encrypt(arguments: argparse.Namespace) -> int:
    from mal_train.commands.checkpoint_files import copy_with_key, require_encryption

    require_encryption(arguments.file, is_encrypted=False)
    copy_with_key(arguments.file, arguments.output, key=None, new_key=arguments.to, console=Console())
    return 0


def _decrypt(arguments: argparse.Namespace) -> int:
    from mal_train.commands.checkpoint_files import copy_with_key, require_encryption

    require_encryption(arguments.file, is_encrypted=True)
    copy_with_key(arguments.file, arguments.output, key=arguments.key, new_key=None, console=Console())
    return 0


def _rekey(arguments: argparse.Namespace) -> int:
    from mal_train.commands.checkpoint_files import copy_with_key, require_encryption

    require_encryption(arguments.file, is_encrypted=True)
    copy_with_key(arguments.file, arguments.output, key=arguments.key, new_key=arguments.to, console=Console())
    return 0


def _sign(arguments: argparse.Namespace) -> int:
    from mal_train.commands.checkpoint_files import sign

    sign(arguments.file, arguments.key, Console())
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from mal_train.commands.checkpoint_files import verify

    sha256 = verify(arguments.file, arguments.signer or [], arguments.sha256)
    print_result(f"{arguments.file}: trusted, sha256 {sha256}")
    return 0


def _keygen(arguments: argparse.Namespace) -> int:
    if arguments.signing:
        from mal_train.kernel.checkpoint.trust import write_signing_key

        signer = write_signing_key(arguments.output)
        print_result(f"wrote {arguments.output}: keep it secret; it signs checkpoints for those who trust this signer:")
        print(signer)
        return 0
    from mal_train.kernel.checkpoint.keys import write_identity

    recipient = write_identity(arguments.output)
    print_result(f"wrote {arguments.output}: keep it secret; it decrypts what is encrypted to this recipient:")
    print(recipient)
    return 0


def _default_spec(arguments: argparse.Namespace) -> int:
    words = [*arguments.words, *arguments.overrides]
    if arguments.json_schema and words:
        raise ConfigError(f"default-spec --json-schema: {words[0]!r}; the schema takes no NAME and no a.b=c")
    text = json_schema() if arguments.json_schema else spec_text(*name_and_overrides(words))
    if arguments.output is None:
        sys.stdout.write(text)
        return 0
    try:
        with arguments.output.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OutputError(f"{arguments.output}: cannot be written: {error.strerror}") from error
    return 0


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mal-train", description="Predict instance masks from boxes: train, evaluate, label."
    )
    add_common_options(parser)
    commands: Commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = _add(commands, "train", _train, "Train a network on boxes.", overrides=True)
    _add_spec_option(train, "YAML spec", required=True)
    train.add_argument(
        "--fast-dev-run",
        action="store_true",
        help="check the spec in minutes: every phase of the training on a few batches and images, in the folder "
        "<output folder>-fast-dev-run",
    )
    tune = _add(commands, "tune", _tune, "Search fields of a spec for the best validation metric.", overrides=True)
    _add_spec_option(tune, "YAML spec with a section tune", required=True)
    _add_evaluate_and_inference(commands)
    _add_default_spec(commands)
    _add_inspect(commands)
    _add_import(commands)
    _add_export(commands)
    _add_keygen(commands)
    _add_encryption_commands(commands)
    _add_signature_commands(commands)
    return parser


def _add(
    commands: Commands, name: str, command: Callable[[argparse.Namespace], int], text: str, *, overrides: bool = False
) -> argparse.ArgumentParser:
    epilog = "a.b=c replaces a field of the spec, e.g. train.lr=1e-6." if overrides else None
    parser = commands.add_parser(name, help=text, description=text, epilog=epilog)
    parser.set_defaults(command=command, takes_overrides=overrides)
    return parser


def _add_spec_option(parser: argparse.ArgumentParser, text: str, *, required: bool = False) -> None:
    parser.add_argument("-e", "--experiment_spec", dest="spec", type=Path, required=required, help=text)


def _add_evaluate_and_inference(commands: Commands) -> None:
    for name, command, text, example in (
        (
            "evaluate",
            _evaluate,
            "Compare the masks of a checkpoint with those of dataset.val_ann_path.",
            "dataset.val_ann_path=FILE dataset.val_img_dir=DIR",
        ),
        (
            "inference",
            _inference,
            "Label the boxes of inference.ann_path with masks.",
            "inference.ann_path=FILE inference.img_dir=DIR",
        ),
    ):
        parser = _add(commands, name, command, text, overrides=True)
        _add_spec_option(parser, "YAML spec; without it, all fields have defaults")
        parser.epilog = (
            f"{parser.epilog} checkpoint=FILE is short for {name}.checkpoint=FILE; builtin is the model in the "
            f"package. Without a spec: mal-train {name} checkpoint=builtin {example}"
        )


def _add_default_spec(commands: Commands) -> None:
    text = "Print a spec with every field, its default and its meaning."
    parser = _add(commands, "default-spec", _default_spec, text, overrides=True)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="NAME a.b=c",
        help=f"one of {', '.join(SPECS)} (tao: TAO's defaults; others: recipes), and fields to change",
    )
    parser.add_argument(
        "--json-schema", action="store_true", help="print the JSON schema of a spec instead, for editors"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"""{parser.epilog}

Editors check a spec against the schema FILE if its first line is
  # yaml-language-server: $schema=FILE"""
    parser.add_argument("-o", "--output", type=Path, help="file to write instead of printing; it must not exist")


def _add_inspect(commands: Commands) -> None:
    parser = _add(commands, "inspect", _inspect, "Print the content of a checkpoint: network, settings, provenance.")
    parser.add_argument("file", type=Path, help="a .malckpt file, or builtin for the model in the package")
    parser.add_argument("--key", help="key that decrypts it: env:NAME or file:PATH")
    parser.set_defaults(override_hints={"decryption_key": "give the key as --key env:NAME or --key file:PATH"})


def _add_import(commands: Commands) -> None:
    text = "Convert a published TAO checkpoint (6.25 to 7.0) to a .malckpt file."
    parser = _add(commands, "import", _import, text, overrides=True)
    parser.add_argument("file", help="the published checkpoint")
    parser.add_argument("-o", "--output", type=Path, required=True, help=".malckpt file to write")


def _add_export(commands: Commands) -> None:
    text = "Write one network of evaluate.checkpoint in float16, for labeling."
    parser = _add(commands, "export", _export, text, overrides=True)
    _add_spec_option(parser, "YAML spec; thresholds are fitted to its validation set")
    parser.add_argument("--average", action="append", metavar="FILE", help="checkpoint to average with; repeatable")
    parser.add_argument(
        "--int8",
        action="store_true",
        help="calibrate for precision int8 (network_engine: openvino) on crops of dataset.train_ann_path",
    )
    parser.add_argument("--license", metavar="SPDX", help="license of these weights, stored in the file")
    parser.add_argument("--licence", action=RenamedOption, new="--license")  # former name
    parser.add_argument("-o", "--output", type=Path, required=True, help=".malckpt file to write")


def _add_keygen(commands: Commands) -> None:
    text = "Create a secret key: an identity that decrypts checkpoints, or a key that signs them; print the public key."
    parser = _add(commands, "keygen", _keygen, text)
    parser.add_argument("-o", "--output", type=Path, required=True, help="file for the secret; it must not exist")
    parser.add_argument(
        "--signing", action="store_true", help="create a key that signs checkpoints instead, and print its public key"
    )


def _add_encryption_commands(commands: Commands) -> None:
    key = "key that decrypts it: env:NAME or file:PATH"
    to = "key that encrypts the copy: a recipient age1..., file:PATH or env:NAME"
    for name, command, text, needs_key, needs_to in (
        ("encrypt", _encrypt, "Write an encrypted copy of a plain checkpoint.", False, True),
        ("decrypt", _decrypt, "Write a plain copy of an encrypted checkpoint, readable by its owner.", True, False),
        ("rekey", _rekey, "Write a copy of an encrypted checkpoint that is encrypted with another key.", True, True),
    ):
        parser = _add(commands, name, command, text)
        parser.add_argument("file", type=Path, help="a .malckpt file")
        parser.add_argument("-o", "--output", type=Path, required=True, help="file to write; it must not exist")
        if needs_key:
            parser.add_argument("--key", required=True, help=key)
        if needs_to:
            parser.add_argument("--to", required=True, metavar="KEY", help=to)


def _add_signature_commands(commands: Commands) -> None:
    parser = _add(commands, "sign", _sign, "Sign a checkpoint; the signature is written beside it, as FILE.sig.")
    parser.add_argument("file", type=Path, help="a .malckpt file")
    parser.add_argument("--key", required=True, help="key of keygen --signing: env:NAME or file:PATH")
    parser = _add(commands, "verify", _verify, "Check that a checkpoint comes from a trusted signer, or is one file.")
    parser.add_argument("file", type=Path, help="a .malckpt file")
    parser.add_argument("--signer", action="append", metavar="ed25519:...", help="public key to trust; repeatable")
    parser.add_argument("--sha256", metavar="HEX", help="SHA-256 that the file must have")


if __name__ == "__main__":
    sys.exit(main())
