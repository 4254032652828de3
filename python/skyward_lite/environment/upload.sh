#!/bin/sh
# Write the first $5 bytes of standard input to the file $2 of the directory $1, unless a file of $3 bytes is there, and
# print "sent". It is executable with $4=program, and also compressed by gzip with $4=packed: the status is 3 if the host
# has no gzip. Part of a command, as unsafe.sh is: standard input has the content, and need not come to an end.
umask 077;
mkdir -p "$1" || exit;
cd "$1" || exit;
# Hosts may share the directory, and have the same process ids.
to=$2 new=$2.$(uname -n).$$ size=$3 kind=$4;
# A file that was cut off begins like the whole file: only the size tells them apart.
whole() { [ -f "$1" ] && [ "$(wc -c <"$1")" -eq "$size" ]; };
# The time of the directory tells when its file was last used.
if whole "$to"; then touch . 2>/dev/null; exit 0; fi;
if [ "$kind" = packed ]; then command -v gzip >/dev/null || exit 3; fi;
# Without content it is only asked whether the file is there.
[ "$5" -gt 0 ] || exit 1;
content="cat";
if [ "$kind" = packed ]; then content="gzip -dc"; fi;
head -c "$5" | $content >"$new" && whole "$new" && { [ "$kind" = file ] || chmod 700 "$new"; } && mv "$new" "$to" && echo sent && exit 0;
[ -f "$new" ] && echo "$(wc -c <"$new") of its $size bytes are there" >&2;
rm -f "$new";
exit 1;
