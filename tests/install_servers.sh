#!/usr/bin/env bash
# Installs the servers that the end-to-end tests start themselves and that pip has not: one node of Ceph.
# Debian and Ubuntu; needs root. Without them the tests that use them are skipped, and say so.
set -euo pipefail
command -v radosgw >/dev/null && command -v ceph-mon >/dev/null && command -v ceph-osd >/dev/null && exit 0
as_root=""
[ "$(id -u)" = 0 ] || as_root="sudo -n"
export DEBIAN_FRONTEND=noninteractive
$as_root apt-get update -qq
$as_root apt-get install -y -qq --no-install-recommends ceph-mon ceph-osd radosgw
