# shellcheck shell=sh
# At the head of scripts that run Python. In the home directory Python and uv would take files there for theirs.
cd / || exit
. ./unset_python.sh

# Whether the environment in the directory $1 is complete. Its Python may have gone since it was made, as with an update
# of the system.
whole() { [ -f "$1/ready" ] && [ -x "$1/bin/python" ]; }
