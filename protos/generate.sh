#!/usr/bin/env bash
# Writes the Python stubs beside the .proto files; `generate.sh --check` fails when the committed ones differ, and
# `generate.sh --tools` only makes the environment of the tools.
#
# First buf looks at the .proto files: their style, and whether callers of the last committed state (baseline.txtpb) could
# still talk to this one. What is new joins the baseline. `generate.sh --break` takes over a breaking change all the same.
#
# The tools are pinned to the oldest grpcio that clients may run: newer stubs refuse older runtimes, and annotation tools
# pin old ones. They live in their own environment (.venv-protos, or $PROTOS_VENV), made on the first call.
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
    echo "the .proto files break the style that buf.yaml asks for" >&2
    exit 1
}
if [ "$mode" != --break ]; then
    buf breaking "$scratch/image.binpb" --against baseline.txtpb --config buf.yaml || {
        echo "callers of the last committed state would break; if that is meant, run protos/generate.sh --break" >&2
        exit 1
    }
fi
buf build "$scratch/image.binpb" --exclude-source-info -o "$scratch/now.binpb"
# As messages: the layout of the text differs from one build of buf to the next.
buf build baseline.txtpb -o "$scratch/baseline.binpb" 2>/dev/null || true
if ! cmp -s "$scratch/now.binpb" "$scratch/baseline.binpb"; then
    if [ "$mode" = --check ]; then
        echo "baseline.txtpb does not hold what the .proto files say: run protos/generate.sh" >&2
        exit 1
    fi
    buf build "$scratch/now.binpb" -o baseline.txtpb
fi

PATH="$venv/bin:$PATH" "${protoc[@]}" \
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
    echo "the .proto files keep to buf.yaml and to the baseline, and the stubs agree with them"
fi
