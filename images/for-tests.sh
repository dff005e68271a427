#!/bin/sh
# Build the images that `make e2e` tests. Without a Docker engine nothing is built, and the tests say so.
set -eu
cd "$(dirname "$0")/.."
public=python:3.11-slim-bookworm own=spectraqlora-debian:bookworm
if ! docker info >/dev/null 2>&1; then
    echo "e2e: no Docker engine answers, so nothing is tested in containers"
    exit 0
fi
if [ -z "${BASE_IMAGE:-}" ]; then
    if docker image inspect "$own" >/dev/null 2>&1; then
        BASE_IMAGE=$own
    elif docker image inspect $public >/dev/null 2>&1 || timeout 120 docker pull --quiet $public >/dev/null 2>&1; then
        BASE_IMAGE=$public
    else
        echo "e2e: $public cannot be pulled; making a base from Debian packages"
        BASE_IMAGE=$(sh images/debian-base.sh)
    fi
fi
export BASE_IMAGE
exec make images
