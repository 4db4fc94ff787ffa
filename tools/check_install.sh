#!/bin/sh
# Installs a build into an empty prefix, then builds and runs an example from there with the flags of bitsandbytes.pc.
# Usage: check_install.sh CMAKE BUILD_DIR EXAMPLE_C C_COMPILER [SANITIZERS]
# pkg-config is used where it exists; else the three variables of the .pc file are expanded here.
set -eu
cmake=$1 build=$2 example=$3 cc=$4 sanitize=${5:-}

prefix=$(mktemp -d)
trap 'rm -rf "$prefix"' EXIT
"$cmake" --install "$build" --prefix "$prefix" >/dev/null
pc=$(find "$prefix" -name bitsandbytes.pc)
test -n "$pc" || { echo "bitsandbytes.pc was not installed" >&2; exit 1; }

variable() { # the value of "NAME=..." or "NAME: ..." with ${...} expanded by the shell
    sed -n "s/^$1[=:] *//p" "$pc"
}
if command -v pkg-config >/dev/null 2>&1; then
    flags=$(PKG_CONFIG_PATH=$(dirname "$pc") pkg-config --cflags --libs bitsandbytes)
    libdir=$(PKG_CONFIG_PATH=$(dirname "$pc") pkg-config --variable=libdir bitsandbytes)
else
    pcfiledir=$(dirname "$pc")
    eval "prefix_pc=\"$(variable prefix)\""
    eval "libdir=\"$(variable libdir | sed 's/{prefix}/{prefix_pc}/')\""
    eval "includedir=\"$(variable includedir | sed 's/{prefix}/{prefix_pc}/')\""
    eval "flags=\"$(variable Cflags) $(variable Libs)\""
fi

# shellcheck disable=SC2086  # the flags are words
"$cc" -std=c11 -Wall -Wextra -Werror ${sanitize:+-fsanitize=$sanitize} "$example" -o "$prefix/example" $flags -lm
LD_LIBRARY_PATH=$libdir "$prefix/example"
