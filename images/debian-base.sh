#!/bin/sh
# Make the images' base from Debian packages, for machines that reach no image registry: Debian 12 with its
# Python 3.11, as the image spectraqlora-debian:bookworm. Needs root, debootstrap and a Debian mirror.
set -eu
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
name=spectraqlora-debian:bookworm
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
debootstrap --variant=minbase --include=python3,ca-certificates bookworm "$work/root" "$mirror" >"$work/log" 2>&1 ||
    { tail -5 "$work/log" >&2; exit 1; }
tar -C "$work/root" --exclude='./var/cache/apt/*' --exclude='./var/lib/apt/lists/*' --exclude='./var/log/*' \
    --exclude='./usr/share/doc/*' --exclude='./usr/share/man/*' --exclude='./usr/share/locale/*' -c . |
    docker import --change 'CMD ["python3"]' - "$name" >/dev/null
echo "$name"
