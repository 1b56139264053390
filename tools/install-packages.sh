#!/usr/bin/env bash
# Installs what packages.txt lists and this machine lacks; says so first, silent when nothing is
# missing. Exit 5: something is missing and cannot be installed from here.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# `complain REASON PACKAGE...` tells the reader what to install by hand and stops.
complain() {
  printf 'kvtier: %s. Install these packages or their equivalents, then run this again:\n' "$1" >&2
  shift
  printf '  %s\n' "$@" >&2
  exit 5
}

mapfile -t packages < <(sed -e 's/#.*//' -e 's/[[:space:]]*$//' -e '/^$/d' "$root/tools/packages.txt")

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
  complain 'this system has no apt-get' "${packages[@]}"
fi

missing=()
for package in "${packages[@]}"; do
  state=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
  # A package that is installed for several architectures answers once for each.
  [[ $state == installed* ]] || missing+=("$package")
done
[ "${#missing[@]}" -gt 0 ] || exit 0

# Names and versions hold there; elsewhere they would be a guess.
# shellcheck source=/dev/null
system=$([ ! -r /etc/os-release ] || . /etc/os-release; printf '%s %s' "${ID:-unknown}" "${VERSION_ID:-}")
case $system in
  'debian 12' | 'debian 13' | 'ubuntu 24.04') ;;
  *) complain "this is '$system', not Debian 12, Debian 13 or Ubuntu 24.04" "${missing[@]}" ;;
esac

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || complain 'packages are missing, and sudo is not there' "${missing[@]}"
  as_root=(sudo)
fi

printf 'kvtier: installing with apt-get%s: %s\n' "${as_root[0]:+ (sudo)}" "${missing[*]}" >&2
mkdir -p "$root/build"
log=$root/build/install.log

# Waits for another apt that holds the lock, as the first minutes of a fresh machine often have.
apt() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get -y -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@"
}

# An unreachable third-party source fails the update and yet need not matter: the install decides.
apt update >"$log" 2>&1 || true
if ! apt install --no-install-recommends "${missing[@]}" >>"$log" 2>&1; then
  tail -n 20 "$log" >&2
  complain "apt-get failed (all of its output: $log)" "${missing[@]}"
fi
