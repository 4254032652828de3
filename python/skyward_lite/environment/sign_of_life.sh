# shellcheck shell=sh disable=SC2154
# Stands at the head of a long script. While the script and its session last, the guard sees that the client lives. The
# session is this shell's parent: without it the client is gone, even if the script goes on. The parent may be another
# user's, as slurmstepd is root's, so it is not asked for by a signal: an orphan has another parent. An hour is the longest.
( n=0
  while read -r stat <"/proc/$$/stat" && [ $((n += 1)) -lt 3600 ]; do
    # Behind the name, which may have blanks, come its state and its parent.
    # shellcheck disable=SC2086
    set -- ${stat##*)}
    [ "$2" = "$PPID" ] || break
    touch "$GIVEN_DIRECTORY/alive"
    sleep 1
  done
) >/dev/null 2>&1 </dev/null &
