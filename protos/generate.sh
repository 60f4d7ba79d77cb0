#!/usr/bin/env bash
# Writes the Python stubs beside the .proto files; `generate.sh --check` fails when the committed ones differ, and
# `generate.sh --tools` only makes the environment of the tools.
#
# The tools are pinned to the oldest grpcio that clients may run: newer stubs refuse older runtimes, and annotation tools
# pin old ones. They live in their own environment (.venv-protos, or $PROTOS_VENV), made on the first call.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
here=$PWD
venv=${PROTOS_VENV:-$here/../.venv-protos}
python=${PYTHON:-python3}
pins=(grpcio-tools==1.62.3 protobuf==4.25.9 grpcio==1.62.3 googleapis-common-protos==1.75.0 mypy-protobuf==3.6.0
      setuptools==75.8.0)

if ! [ -f "$venv/.pins" ] || [ "$(cat "$venv/.pins")" != "${pins[*]}" ]; then
    "$python" -m venv --clear "$venv"
    "$venv/bin/pip" install -qq --disable-pip-version-check "${pins[@]}"
    echo "${pins[*]}" >"$venv/.pins"
fi

out=$here
if [ "${1:-}" = --tools ]; then
    exit 0
elif [ "${1:-}" = --check ]; then
    out=$(mktemp -d)
    trap 'rm -rf "$out"' EXIT
elif [ $# -gt 0 ]; then
    echo "usage: generate.sh [--check | --tools]" >&2
    exit 2
fi

site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
PATH="$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc -I "$here" -I "$site" \
    --python_out="$out" --grpc_python_out="$out" --mypy_out="quiet:$out" --mypy_grpc_out="quiet:$out" "$here"/mal/v1/*.proto
rm "$out"/mal/v1/types_pb2_grpc.*  # it holds no service

if [ "$out" != "$here" ]; then
    for stub in "$out"/mal/v1/*_pb2*; do
        diff -u "$here/mal/v1/$(basename "$stub")" "$stub" || {
            echo "$(basename "$stub") is not what its .proto says: run protos/generate.sh" >&2
            exit 1
        }
    done
    if [ "$(ls "$here"/mal/v1/*_pb2* | wc -l)" -ne "$(ls "$out"/mal/v1/*_pb2* | wc -l)" ]; then
        echo "stubs without a .proto are left over in protos/mal/v1: delete them" >&2
        exit 1
    fi
    echo "stubs agree with the .proto files"
fi
