#!/bin/sh
# Print a line, and the first $1 bytes of standard input as they are. It does not wait for the end of the input. Part of a
# command, as unsafe.sh is: standard input has the bytes.
echo "== skyward_lite bytes ==";
head -c "$1" || echo "head does not run there" >&2;
