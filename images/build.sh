#!/bin/sh
# Build every step image with one tag and print the sizes. Run by `make images`, after `make image-wheels`.
#
# DOCKER      docker client; one with BuildKit (buildx, or a client before 23)
# BASE_IMAGE  Debian with Python 3.11, default python:3.11-slim-bookworm; name@sha256:… pins it
# VARIANT     cpu or cuda
# REPOSITORY  what stands before the images' names, default spectraqlora
# TAG         default: the project's version
set -eu
cd "$(dirname "$0")/.."
VARIANT=${VARIANT:-cpu}
REPOSITORY=${REPOSITORY:-spectraqlora}
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' components/spectraqlora/__init__.py)
TAG=${TAG:-$version}
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain -- components images 2>/dev/null)" ] || revision="$revision-modified"

# Newer clients build with BuildKit only through buildx; Debian's has it built in.
docker=
for candidate in "${DOCKER:-docker}" /usr/bin/docker; do
    command -v "$candidate" >/dev/null || continue
    major=$("$candidate" version --format '{{.Client.Version}}' | cut -d. -f1)
    if [ "$major" -lt 23 ] || "$candidate" buildx version >/dev/null 2>&1; then docker=$candidate && break; fi
done
[ -n "$docker" ] || { echo "error: DOCKER: ${DOCKER:-docker}: expected a docker client with BuildKit" >&2; exit 2; }
export DOCKER_BUILDKIT=1

build() { # name, Dockerfile's folder, further arguments
    name=$1 folder=$2
    shift 2
    echo "building $REPOSITORY/$name:$TAG"
    "$docker" build --quiet --network none --file "images/$folder/Dockerfile" --tag "$REPOSITORY/$name:$TAG" "$@" . \
        >/dev/null
}

# Every image says by digest what it was built on.
BASE_IMAGE=${BASE_IMAGE:-python:3.11-slim-bookworm}
"$docker" image inspect "$BASE_IMAGE" >/dev/null 2>&1 || "$docker" pull --quiet "$BASE_IMAGE" >/dev/null
base=$("$docker" image inspect --format '{{if .RepoDigests}}{{index .RepoDigests 0}}{{else}}{{.Id}}{{end}}' "$BASE_IMAGE")
for target in base torch; do
    build "$target" base --target "$target" --build-arg VARIANT="$VARIANT" --build-arg "BASE_IMAGE=$BASE_IMAGE" \
        --label "org.opencontainers.image.base.name=$BASE_IMAGE" \
        --label "org.opencontainers.image.base.digest=${base#*@}"
done
set -- --build-arg VERSION="$version" --build-arg REVISION="$revision"
for lock in images/*/requirements.lock; do
    step=$(basename "$(dirname "$lock")")
    case $step in
    base) ;;
    light | mlflow) build "$step" "$step" --build-arg BASE="$REPOSITORY/base:$TAG" "$@" ;;
    *) build "$step" step --build-arg BASE="$REPOSITORY/torch:$TAG" --build-arg STEP="$step" "$@" ;;
    esac
done
for lock in images/*/requirements.lock; do
    image=$REPOSITORY/$(basename "$(dirname "$lock")"):$TAG
    "$docker" image inspect --format "{{.Size}}" "$image" | awk -v image="$image" '{printf "%8.0f MB  %s\n", $1 / 1e6, image}'
done
