# shellcheck shell=sh disable=SC2154
# Stands at the head of a long script. While the script and its session last, the guard sees that the client lives. The
# session is this shell's parent: without it the client is gone, even if the script goes on. An hour is the longest.
( n=0
  while kill -0 $$ && kill -0 $PPID && [ $((n += 1)) -lt 3600 ]; do touch "$GIVEN_DIRECTORY/alive"; sleep 1; done
) >/dev/null 2>&1 </dev/null &
