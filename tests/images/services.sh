#!/bin/sh
# Makes the file system of the scene's service image: a minimal Debian with the real servers of the shop.
#
#   services.sh SUITE MIRROR TAR     (as root; about two minutes)
set -eu
suite=$1 mirror=$2 tar=$3

# debootstrap takes no path with spaces, and needs a file system that allows devices.
work=$(mktemp -d /var/tmp/sidewarden-services.XXXXXX)
trap 'rm -rf --one-file-system "$work" "$tar.part"' EXIT
trap 'exit 130' INT TERM
root=$work/root

debootstrap --variant=minbase \
    --include=nginx-light,mariadb-server,python3,python3-pymysql,prometheus-alertmanager \
    "$suite" "$root" "$mirror"

# What no service of the scene reads: package lists, documentation, client and repair tools.
(
    cd "$root"
    rm -rf var/cache/apt/* var/lib/apt/lists/* var/log/*.log usr/share/doc/* usr/share/man/* usr/share/locale/*
    rm -f usr/bin/mariadb-* usr/bin/mysql* usr/bin/aria_* usr/bin/myisam* usr/bin/amtool
)

tar --create --file "$tar.part" --directory "$root" --one-file-system .
mv "$tar.part" "$tar"
