#!/bin/sh
# Install locked packages from /wheels into the images' environment, without network; then drop what no step
# reads. Arguments: lock files. IMPORTS: modules; where given, only what they load is compiled to bytecode.
set -eu
site=/opt/venv/lib/python3.11/site-packages
pip=$(echo /wheels/pip-*.whl)
imports=${IMPORTS:-}
for lock in "$@"; do
    /opt/venv/bin/python "$pip/pip" install --quiet --no-index --find-links /wheels --no-deps --require-hashes \
        --no-cache-dir --disable-pip-version-check --root-user-action ignore ${imports:+--no-compile} \
        --requirement "$lock"
done

# Built from sources whose hashes were checked where they were built.
for package in ${SOURCES:-}; do
    /opt/venv/bin/python "$pip/pip" install --quiet --no-index --find-links /wheels --no-deps --no-cache-dir \
        --disable-pip-version-check --root-user-action ignore --no-compile "$package"
done

# Test suites, headers, type stubs.
for package in matplotlib networkx numpy pandas pyarrow scipy sympy; do
    [ ! -d "$site/$package" ] || find "$site/$package" -depth -type d -name tests -exec rm -rf {} +
done
rm -rf "$site/torch/include" "$site/torch/test" "$site/pyarrow/include" "$site/pyarrow/src"
find "$site" -name '*.pyi' -delete
# AWS services other than S3 and what signs in to it.
if [ -d "$site/botocore/data" ]; then
    find "$site/botocore/data" -mindepth 1 -maxdepth 1 -type d \
        -not -name s3 -not -name signin -not -name 'sso*' -not -name sts -exec rm -rf {} +
fi
# Arrow's network server, and second and third copies of a library for linking; fonts are only read by matplotlib, not made.
rm -rf "$site"/pyarrow/*flight* "$site"/pyarrow/libarrow_python*.so "$site"/pyarrow/*.so.*.*.*
[ ! -d "$site/fontTools" ] || find "$site/fontTools" -mindepth 1 -maxdepth 1 -type d -not -name misc -exec rm -rf {} +
# MLflow looks for parts of this package, which is left out of the locks, and expects the folder.
[ ! -d "$site/mlflow" ] || mkdir -p "$site/databricks"
# Templates of transformers' authors; and where there is no torch, models, which nothing could run there.
if [ -d "$site/transformers/models" ]; then
    find "$site/transformers/models" -name 'modular_*' -delete
    if [ ! -d "$site/torch" ]; then
        find "$site/transformers/models" -path '*/models/auto' -prune -o -type f \
            \( -name 'modeling_*' -o -name 'image_processing_*' -o -name 'video_processing_*' \) -exec rm -f {} +
    fi
fi
for module in $imports; do
    env -u PYTHONDONTWRITEBYTECODE /opt/venv/bin/python -c "import $module"
done
# The cluster's API client is a class a file, and only the command line loads it.
[ ! -d "$site/kubernetes" ] || find "$site/kubernetes" -name __pycache__ -prune -exec rm -rf {} +
