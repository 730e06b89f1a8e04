#!/usr/bin/env bash
# Install Chromium and its driver, in which the tests open reports, where they are not there.
set -euo pipefail
declare -A package=([chromium]=chromium [chromedriver]=chromium-driver)
missing=()
for program in "${!package[@]}"; do
    command -v "$program" >/dev/null || missing+=("${package[$program]}")
done
if [ ${#missing[@]} -eq 0 ]; then
    exit
elif [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed, and only root can, with apt-get: ${missing[*]}; tests in a browser are skipped" >&2
    exit
fi
if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; }; then
    echo "apt-get could not install ${missing[*]}; tests in a browser are skipped" >&2
fi
