#!/usr/bin/env bash
# Install Debian packages for programs that are not there: install_missing.sh WHAT_IS_SKIPPED PROGRAM=PACKAGE...
# Only root can; otherwise, and where apt-get fails, it says what is skipped without them.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
skipped=$1
shift
missing=()
for pair in "$@"; do
    command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
done
if [ ${#missing[@]} -eq 0 ]; then
    exit
elif [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed, and only root can, with apt-get: ${missing[*]}; $skipped are skipped" >&2
    exit
fi
if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; }; then
    echo "apt-get could not install ${missing[*]}; $skipped are skipped" >&2
fi
