#!/bin/sh
# Install Debian's Chromium for the browser tests, unless it is there: as root, or with a sudo that asks no password.
# Says what it does. Exit status: 0 if a browser is there in the end, 1 if not (the tests then skip, and in CI they fail).
set -u

CHROMIUM="${PARETUNE_BROWSER:-/usr/bin/chromium}"
PACKAGES="chromium fonts-dejavu-core"

fail() {
    echo "install_browser: $1" >&2
    echo "remedy: $2" >&2
    exit 1
}

if [ -x "$CHROMIUM" ]; then
    echo "install_browser: $CHROMIUM is there, nothing to do"
    exit 0
fi
[ -z "${PARETUNE_BROWSER:-}" ] || fail "there is no program $CHROMIUM, which PARETUNE_BROWSER names" "name an installed Chromium, or unset it"
command -v apt-get >/dev/null || fail "this system has no apt-get" "install Chromium and name it in PARETUNE_BROWSER"

AS_ROOT=""
if [ "$(id -u)" -ne 0 ]; then
    sudo -n true 2>/dev/null || fail "installing packages needs root, and sudo would ask for a password" "sudo apt-get install $PACKAGES"
    AS_ROOT="sudo -n"
fi

echo "install_browser: apt-get install $PACKAGES${AS_ROOT:+ (with sudo)}"
APT="$AS_ROOT env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 -o Acquire::Retries=2"
$APT update || echo "install_browser: the package lists could not be refreshed; trying those that are here" >&2
# shellcheck disable=SC2086 # both are lists of words
$APT install -y --no-install-recommends $PACKAGES >/dev/null || fail "apt-get could not install $PACKAGES" "see its words above"
[ -x "$CHROMIUM" ] || fail "$PACKAGES is installed, but there is no $CHROMIUM" "name the browser in PARETUNE_BROWSER"
echo "install_browser: installed $("$CHROMIUM" --version 2>/dev/null)"
