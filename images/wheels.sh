#!/bin/sh
# Fetch the locked wheels into build/wheels, with pip's own configuration, and check their hashes.
# Run by `make image-wheels`. PYTHON: a Python with pip. VARIANT: cpu or cuda. TORCH_INDEX: where CPU wheels of
# torch are published, beside what pip's configuration names.
set -eu
cd "$(dirname "$0")/.."
VARIANT=${VARIANT:-cpu}
rm -rf build/wheels
mkdir -p build/wheels
# pip takes platforms literally: a wheel for an older glibc must be named to be found.
platforms=$(for minor in $(seq 5 28); do echo "--platform manylinux_2_${minor}_x86_64"; done)

fetch() {
    # shellcheck disable=SC2086
    "${PYTHON:-python3}" -m pip download --quiet --quiet --only-binary :all: --no-deps --require-hashes --dest build/wheels \
        --python-version 3.11 --platform manylinux2014_x86_64 --platform manylinux2010_x86_64 \
        --platform manylinux1_x86_64 $platforms "$@"
}

set --
for name in kfp pip requirements torch; do set -- "$@" --requirement "images/base/$name.lock"; done
for lock in images/*/requirements.lock; do set -- "$@" --requirement "$lock"; done
fetch "$@"
"${PYTHON:-python3}" -m pip wheel --quiet --quiet --no-deps --require-hashes --wheel-dir build/wheels \
    --requirement images/light/source.lock
if [ "$VARIANT" = cpu ]; then
    fetch --requirement images/base/torch-cpu.lock --retries 1 \
        --extra-index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
else
    fetch --requirement "images/base/torch-$VARIANT.lock"
fi
