#!/usr/bin/env bash
# Generates the Python stubs next to the .proto files. `generate.sh --check` fails if the committed stubs differ;
# `generate.sh --tools` only creates the environment of the tools.
#
# First, buf checks the style of the .proto files, and their compatibility with the last committed state
# (baseline.txtpb). Compatible changes are added to the baseline; `generate.sh --break` accepts an incompatible change.
#
# The tools are pinned to the oldest supported grpcio: newer stubs refuse older runtimes, and annotation tools pin old
# versions. They are installed into their own environment (.venv-protos, or $PROTOS_VENV) on the first call.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
here=$PWD
venv=${PROTOS_VENV:-$here/../.venv-protos}
python=${PYTHON:-python3}
pins=(grpcio-tools==1.62.3 protobuf==4.25.9 grpcio==1.62.3 googleapis-common-protos==1.75.0 mypy-protobuf==3.6.0
      setuptools==75.8.0 buf-bin==1.75.0)

if ! [ -f "$venv/.pins" ] || [ "$(cat "$venv/.pins")" != "${pins[*]}" ]; then
    "$python" -m venv --clear "$venv"
    "$venv/bin/pip" install -qq --disable-pip-version-check "${pins[@]}"
    echo "${pins[*]}" >"$venv/.pins"
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mode=${1:-}
case "$mode" in
    --tools) exit 0 ;;
    --check) out=$scratch ;;
    "" | --break) out=$here ;;
    *)
        echo "usage: generate.sh [--check | --tools | --break]" >&2
        exit 2
        ;;
esac

site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
protoc=("$venv/bin/python" -m grpc_tools.protoc -I "$here" -I "$site")
buf() { "$venv/bin/buf" "$@"; }

"${protoc[@]}" --include_imports --include_source_info -o "$scratch/image.binpb" "$here"/mal/v1/*.proto
buf lint "$scratch/image.binpb" --config buf.yaml || {
    echo "protos: the .proto files violate the style in buf.yaml" >&2
    exit 1
}
if [ "$mode" != --break ]; then
    buf breaking "$scratch/image.binpb" --against baseline.txtpb --config buf.yaml || {
        echo "protos: incompatible with baseline.txtpb; if that is intended, run protos/generate.sh --break" >&2
        exit 1
    }
fi
buf build "$scratch/image.binpb" --exclude-source-info -o "$scratch/now.binpb"
# Compares messages, since the layout of the text differs between builds of buf.
buf build baseline.txtpb -o "$scratch/baseline.binpb" 2>/dev/null || true
if ! cmp -s "$scratch/now.binpb" "$scratch/baseline.binpb"; then
    if [ "$mode" = --check ]; then
        echo "protos: baseline.txtpb is out of date; run protos/generate.sh" >&2
        exit 1
    fi
    buf build "$scratch/now.binpb" -o baseline.txtpb
fi

PATH="$venv/bin:$PATH" "${protoc[@]}" \
    --python_out="$out" --grpc_python_out="$out" --mypy_out="quiet:$out" --mypy_grpc_out="quiet:$out" "$here"/mal/v1/*.proto
rm "$out"/mal/v1/types_pb2_grpc.*  # types.proto has no service

if [ "$out" != "$here" ]; then
    for stub in "$out"/mal/v1/*_pb2*; do
        diff -u "$here/mal/v1/$(basename "$stub")" "$stub" || {
            echo "protos: $(basename "$stub") is out of date; run protos/generate.sh" >&2
            exit 1
        }
    done
    if [ "$(ls "$here"/mal/v1/*_pb2* | wc -l)" -ne "$(ls "$out"/mal/v1/*_pb2* | wc -l)" ]; then
        echo "protos: protos/mal/v1 has stubs without a .proto; delete them" >&2
        exit 1
    fi
    echo "protos: style, baseline and stubs are up to date"
fi
