#!/usr/bin/env bash
# Install Chromium and its driver, in which the tests open reports, where they are not there.
exec "$(dirname "$0")/install_missing.sh" "tests in a browser" chromium=chromium chromedriver=chromium-driver
