"""`mal-client label | evaluate | info`: parse, call the client, say what happened.

Exit codes: 0 done · 2 usage, configuration or input · 3 finished, but some items failed · 4 disk or permission ·
1 the server was not there, or something unexpected · 130 interrupted; nothing was written ·
141 whoever read the output closed it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mal_client.client import DEFAULT_TIMEOUT_S, Client
from mal_client.dataset import client_version
from mal_client.progress import ProgressDisplay
from mal_client.types import DatasetResult, Evaluation, LabelOptions, ServerInfo
from mal_train.errors import ConfigError, MalError
from mal_train.labeling.settings import Branch

SOME_FAILED = 3
INTERRUPTED = 130
PIPE_CLOSED = 141
LISTED = 5

MAX_WORST = 10_000
"""Most instances that a server lists."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough (`| head`). Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except MalError as error:
        print(f"mal-client: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("mal-client: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    return code


def _label(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client, ProgressDisplay("label") as display:
        result = client.label_dataset(
            arguments.annotations,
            arguments.images,
            arguments.output,
            _options(arguments),
            only_missing=arguments.only == "missing",
            on_progress=display,
        )
    _print_result(result)
    return SOME_FAILED if result.failed else 0


def _evaluate(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    with _client(arguments) as client:
        with ProgressDisplay("evaluate") as display:
            evaluation = client.evaluate(
                arguments.annotations, arguments.images, options, worst_count=MAX_WORST, on_progress=display
            )
        if arguments.report is not None:
            _write_report(client, arguments, evaluation, options)
    print(evaluation.table())
    if arguments.output is not None:
        # Imported here, as below: what only one command needs, the others do not wait for.
        from mal_train.labeling.coco import write_json_atomic  # noqa: PLC0415

        write_json_atomic(arguments.output, evaluation.to_dict())
        print(f"figures: {arguments.output}")
    return SOME_FAILED if evaluation.failed_count else 0


def _info(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        print(_described(client.server_info()))
    return 0


def _client(arguments: argparse.Namespace) -> Client:
    return Client(
        arguments.server,
        timeout_s=arguments.timeout,
        tls=arguments.tls,
        tls_ca=arguments.tls_ca,
        client_cert=arguments.client_cert,
        client_key=arguments.client_key,
        token=None if arguments.token_file is None else _read_token(arguments.token_file),
    )


def _read_token(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise ConfigError(f"--token-file {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--token-file {path}: holds characters that no token has") from None


def _write_report(client: Client, arguments: argparse.Namespace, evaluation: Evaluation, options: LabelOptions) -> None:
    from mal_client.files import write_text_atomic  # noqa: PLC0415
    from mal_client.report import build_report, evaluation_sections  # noqa: PLC0415
    from mal_client.review import worst_cards  # noqa: PLC0415
    from mal_train.labeling.coco import read_coco  # noqa: PLC0415

    cards = worst_cards(
        client, evaluation, read_coco(arguments.annotations), arguments.images, options, count=arguments.worst
    )
    subtitle = f"{arguments.annotations.name} on {arguments.server}"
    page = build_report("Evaluation", evaluation_sections(evaluation, cards), subtitle)
    write_text_atomic(arguments.report, page)
    print(f"report: {arguments.report}")


def _print_result(result: DatasetResult) -> None:
    copied = f", {result.copied} copied" if result.copied else ""
    print(f"{result.output}: {result.labelled} annotations labelled{copied}, {len(result.failed)} failed")
    for row in result.failed[:LISTED]:
        print(f"  {row.error}", file=sys.stderr)
    if result.errors_file is not None:
        print(f"mal-client: all {len(result.failed)} failures are listed in {result.errors_file}", file=sys.stderr)


def _described(info: ServerInfo) -> str:
    return json.dumps(
        {
            "server_version": info.version,
            "client_version": client_version(),
            "model": info.model.name,
            "checkpoint_sha256": info.model.checkpoint_sha256,
            "branch": str(info.model.branch),
            "arch": info.arch,
            "crop_size": info.crop_size,
            "margin_rate": info.margin_rate,
            "mask_thresholds": info.mask_thresholds,
            "categories": info.categories,
            "devices": info.devices,
            "precision": info.precision,
            "limits": vars(info.limits),
        },
        indent=2,
    )


def _options(arguments: argparse.Namespace) -> LabelOptions:
    branch = None if arguments.branch is None else Branch(arguments.branch)
    return LabelOptions(branch, arguments.threshold, agreement=arguments.agreement, flip=arguments.flip)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mal-client", description="Masks from boxes, by a mal-server.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    label = _command(commands, "label", "give every box of a COCO file its mask")
    label.set_defaults(run=_label)
    _add_data(label)
    label.add_argument("--output", type=Path, required=True, metavar="OUT.json", help="the COCO file with masks")
    label.add_argument(
        "--only",
        choices=["missing"],
        help="label only annotations without a mask; by default all masks are made anew, and the old ones stay in the "
        "input file alone",
    )
    _add_options(label)

    evaluate = _command(commands, "evaluate", "measure the server's masks against those of a COCO file")
    evaluate.set_defaults(run=_evaluate)
    _add_data(evaluate)
    evaluate.add_argument("--output", type=Path, metavar="FIGURES.json", help="also write the figures as JSON")
    evaluate.add_argument("--report", type=Path, metavar="PAGE.html", help="also write one page with the worst masks")
    evaluate.add_argument("--worst", type=int, default=24, metavar="N", help="pictures in the report (default 24)")
    _add_options(evaluate)

    info = _command(commands, "info", "what the server serves and accepts")
    info.set_defaults(run=_info)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, description: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=description, description=f"{description[0].upper()}{description[1:]}.")
    parser.add_argument("--server", required=True, metavar="HOST:PORT", help="where mal-server listens")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help="seconds without any answer after which the server counts as lost (default %(default)g)",
    )
    parser.add_argument("--tls", action="store_true", help="encrypt, trusting the public authorities")
    parser.add_argument("--tls-ca", type=Path, metavar="CA.pem", help="encrypt, trusting this authority alone")
    parser.add_argument("--client-cert", type=Path, metavar="CERT.pem", help="certificate to show the server")
    parser.add_argument("--client-key", type=Path, metavar="KEY.pem", help="its key, if not in the same file")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="holds the token that the server asks for")
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--annotations", type=Path, required=True, metavar="IN.json", help="COCO file with boxes")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of its file names")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--branch", choices=[str(branch) for branch in Branch], help="network (default: the server's)")
    parser.add_argument("--threshold", type=float, metavar="P", help="mask above this probability, for all sizes")
    parser.add_argument("--agreement", action="store_true", help="also measure how far the two networks agree")
    parser.add_argument("--flip", action="store_true", help="average each map with its mirrored run")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text}: a positive number of seconds is needed")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
