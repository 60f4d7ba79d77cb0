"""The command `mal-train`: reads arguments, calls one task, turns errors into one line and an exit code.

Exit codes: 0 done · 1 unexpected · 2 usage or configuration · 3 finished, but some items failed · 4 disk or
permission · 5 training stopped on non-finite values · 130 interrupted · 141 whoever read the output closed it ·
143 terminated after saving.
"""
# ruff: noqa: PLC0415
# Tasks are imported by the commands that run them: torch takes seconds, and without it `main` can say what to install.

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from mal_train.core.atomic_io import stdout_exit_code
from mal_train.core.command_line import add_common_options
from mal_train.core.errors import ConfigError, MalError, OutputError
from mal_train.core.threads import wait_passively
from mal_train.distributed.env import world_of
from mal_train.distributed.launch import run_ranks, tie_to_parent

SOME_FAILED = 3
NEEDS_TRAIN = "mal-train needs the training packages: pip install 'mask-auto-labeler[train]'"
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
_INNOCENT = ("CROWD", "NO_GROUND_TRUTH")
"""Reasons for which an instance is not compared although nothing failed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # Overrides may stand anywhere, which argparse's own positional lists do not allow.
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    arguments.overrides = [text for text in rest if not text.startswith("-") and "=" in text]
    unknown = [text for text in rest if text not in arguments.overrides or not arguments.takes_overrides]
    if unknown:
        parser.error(f"not understood: {' '.join(unknown)}")
    command: Callable[[argparse.Namespace], int] = arguments.command
    wait_passively()
    try:
        code = command(arguments)
        if sys.stdout is not None:  # as it is after `>&-`
            sys.stdout.flush()
        return code
    except MalError as error:
        rank = os.environ.get("RANK", "0")
        print(f"mal-train: {'' if rank == '0' else f'process {rank}: '}{error}", file=sys.stderr)
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
        return _without_output(error)
    except Exception:  # the last line of defense of a command: whatever it is, exit code 1 and the trace
        traceback.print_exc()
        return MalError.exit_code


def _without_output(error: OSError) -> int:
    lost = stdout_exit_code(error)
    if lost is None:
        traceback.print_exception(error)
        return MalError.exit_code
    if lost == OutputError.exit_code:
        print(f"mal-train: standard output: {error.strerror}; free some space", file=sys.stderr)
    return lost


def _train(arguments: argparse.Namespace) -> int:
    from mal_train.config.spec import load_spec
    from mal_train.core.console import Console
    from mal_train.training.run_files import note_failure

    spec = load_spec(arguments.spec, arguments.overrides)
    world = world_of()
    if world.launcher == "none" and spec.train.num_gpus * spec.train.num_nodes > 1:
        code = run_ranks(arguments.argv, spec.train.num_gpus, nodes=spec.train.num_nodes)
        if code:
            note_failure(spec.task_dir("train"), f"a process of the training failed; exit code {code}")
        return code
    if world.launcher == "mal-train":
        tie_to_parent()
    from mal_train.commands.train import train

    result = train(spec, Console())
    if not world.is_first:
        return 0
    if result.report is not None:
        print(result.report.table())
    print(f"checkpoint: {result.checkpoint}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from mal_train.commands.evaluate import evaluate
    from mal_train.config.spec import load_spec
    from mal_train.core.console import Console

    report = evaluate(load_spec(arguments.spec, arguments.overrides), Console())
    print(report.table())
    return SOME_FAILED if any(row.reason not in _INNOCENT for row in report.skipped_rows) else 0


def _inference(arguments: argparse.Namespace) -> int:
    from mal_train.commands.inference import inference
    from mal_train.config.spec import load_spec
    from mal_train.core.console import Console

    result = inference(load_spec(arguments.spec, arguments.overrides), Console())
    if result.report is not None:
        print(result.report.table())
    for reason, count in result.failed.most_common():
        print(f"{count} boxes without a mask: {reason}")
    return SOME_FAILED if result.failed else 0


def _import(arguments: argparse.Namespace) -> int:
    from mal_train.commands.convert import import_checkpoint
    from mal_train.core.console import Console

    import_checkpoint(arguments.file, arguments.output, arguments.overrides, Console())
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from mal_train.commands.export import export
    from mal_train.config.spec import load_spec
    from mal_train.core.console import Console

    spec = load_spec(arguments.spec, arguments.overrides)
    report = export(spec, arguments.output, Console(), license=arguments.license, average_with=arguments.average or ())
    if report is not None:
        print(report.table())
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from mal_train.kernel.checkpoint import builtin
    from mal_train.kernel.checkpoint.checkpoint import read_header, sha256_of
    from mal_train.kernel.checkpoint.keys import parse_key

    key = parse_key(arguments.key, purpose="decryption", source="command line")
    path = builtin.resolve(arguments.file)
    header = read_header(path, key)
    seal = header.encryption
    print(f"file        {path}, {header.file_bytes} bytes")
    print(f"encryption  {seal.mode}")
    content = header.content
    if content is None:
        print("content     sealed; --key env:NAME or --key file:PATH shows it")
        return 0
    print(f"schema      {content.schema}")
    print(f"kind        {content.kind}: {content.tensors} tensors, {content.tensor_bytes} bytes")
    print(f"model       {json.dumps(content.model.to_dict())}")
    print(f"labeler     {json.dumps(content.labeler.to_dict())}")
    print(f"categories  {len(content.categories)}")
    for field, value in builtin.with_card(sha256_of(path), content.provenance).items():
        print(f"            {field}: {value}")
    return 0


def _keygen(arguments: argparse.Namespace) -> int:
    from mal_train.kernel.checkpoint.keys import write_identity

    recipient = write_identity(arguments.output)
    print(f"wrote {arguments.output}: keep it secret; it opens what is sealed to")
    print(recipient)
    return 0


def _default_spec(arguments: argparse.Namespace) -> int:
    text = _spec_text(*_name_and_overrides([*arguments.words, *arguments.overrides]))
    if arguments.output is None:
        sys.stdout.write(text)
        return 0
    try:
        with arguments.output.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OutputError(f"{arguments.output}: cannot be written: {error.strerror}") from error
    return 0


def _name_and_overrides(words: Sequence[str]) -> tuple[str, list[str]]:
    """`tao train.lr=1e-5` → which spec, and what to change in it."""
    names = [word for word in words if "=" not in word]
    if len(names) > 1 or not set(names) <= set(SPECS):
        raise ConfigError(f"{' '.join(names)}: not a spec; give one of {', '.join(SPECS)}, then a.b=c for each change")
    return names[0] if names else SPECS[0], [word for word in words if "=" in word]


def _spec_text(name: str, overrides: list[str]) -> str:
    """The shipped spec as it stands, or with overrides applied, checked as a whole, and every field commented."""
    shipped = resources.files("mal_train.specs").joinpath(f"{name}.yaml")
    if not overrides:
        return shipped.read_text(encoding="utf-8")
    from mal_train.config.spec import load_spec
    from mal_train.core.yaml_config import dump

    with resources.as_file(shipped) as path:
        spec = load_spec(path, overrides)
    # What follows on # may hold no line break that would begin a field.
    changes = " ".join(overrides).replace("\n", " ")
    return f"# mal-train default-spec {name} {changes}\n{dump(spec)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mal-train", description="Masks from boxes: train, evaluate, label.")
    add_common_options(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, command: Callable[[argparse.Namespace], int], text: str, *, overrides: bool = False
    ) -> argparse.ArgumentParser:
        epilog = "a.b=c: fields that replace those of the spec, e.g. train.lr=1e-6" if overrides else None
        sub = commands.add_parser(name, help=text, description=text, epilog=epilog)
        sub.set_defaults(command=command, takes_overrides=overrides)
        return sub

    for name, command, text in (
        ("train", _train, "Train from boxes."),
        ("evaluate", _evaluate, "Compare a checkpoint's masks with those of dataset.val_ann_path."),
        ("inference", _inference, "Give the boxes of inference.ann_path masks."),
    ):
        task = add(name, command, text, overrides=True)
        task.add_argument("-e", "--experiment_spec", dest="spec", type=Path, required=True, help="YAML spec")

    spec = add(
        "default-spec", _default_spec, "Print a spec with every field, its default and its meaning.", overrides=True
    )
    spec.add_argument(
        "words",
        nargs="*",
        metavar="NAME a.b=c",
        help=f"one of {', '.join(SPECS)} (tao: TAO's defaults; others: recipes), and fields to change in it",
    )
    spec.add_argument("-o", "--output", type=Path, help="a file to write instead of printing; it must not exist")

    inspect = add("inspect", _inspect, "Tell what a checkpoint holds.")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--key", help="env:NAME or file:PATH, for a sealed one")

    importing = add("import", _import, "Turn a published TAO checkpoint (6.25 to 7.0) into a .malckpt.", overrides=True)
    importing.add_argument("file")
    importing.add_argument("-o", "--output", type=Path, required=True, help="the .malckpt to write")

    exporting = add(
        "export", _export, "Write evaluate.checkpoint small, for labeling: one network, float16.", overrides=True
    )
    exporting.add_argument("-e", "--experiment_spec", dest="spec", type=Path, help="YAML spec; its data are fitted to")
    exporting.add_argument(
        "--average", type=Path, action="append", metavar="FILE", help="a checkpoint to average it with; may be repeated"
    )
    exporting.add_argument("--license", metavar="SPDX", help="of these weights, to be written into the file")
    exporting.add_argument("-o", "--output", type=Path, required=True, help="the .malckpt to write")

    keygen = add("keygen", _keygen, "Make an age identity to seal checkpoints with, and print its recipient.")
    keygen.add_argument("-o", "--output", type=Path, required=True, help="file for the identity; it must not exist")
    return parser


if __name__ == "__main__":
    sys.exit(main())
