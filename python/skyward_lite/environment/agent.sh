#!/bin/sh
# Start the agent by the command in the arguments, the first of which is the interpreter of an environment, unless
# another user could change the environment: time may have passed since the probe found it safe. Part of a command, as
# unsafe.sh is.
. ./unsafe.sh
bad=$(unsafe "${1%/*/*/*}");
if [ "$bad" ]; then echo "$1 is not safe from other users: $bad" >&2; exit 77; fi;
. ./unset_python.sh
exec "$@";
