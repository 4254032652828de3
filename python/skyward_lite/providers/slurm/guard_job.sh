# shellcheck shell=sh disable=SC2154
# The batch script of a node's job. Ends the job when no agent has given a sign of life for GIVEN_ORPHAN s, which is the
# file `alive` in a directory of this job's own; at SIGUSR1 at once. At SIGTERM, which Slurm sends before it ends a job,
# what runs may have time to end: the script goes on until the agent has gone, or Slurm kills both.
directory=/tmp/skyward_lite-$GIVEN_KEY-$SLURM_JOB_ID
umask 077
mkdir "$directory" || exit 1
leaving='' quiet=0
trap 'rm -rf "$directory"' EXIT
trap 'exit 0' USR1
trap 'leaving=yes' TERM
trap '' HUP INT
# What guards have left that were killed before they could remove it.
find /tmp -maxdepth 1 -type d -user "$(id -u)" -name 'skyward_lite-????????????-*' -mtime +7 -exec rm -rf {} + 2>/dev/null
# Signs of life are counted in pauses: the clock may jump.
left=$GIVEN_ORPHAN
while [ "$left" -gt 0 ]; do
  if [ "$leaving" ]; then pause=1; else pause=2; fi
  # A signal that comes meanwhile ends the wait.
  sleep "$pause" &
  if ! wait $!; then
    kill $! 2>/dev/null
    continue
  fi
  if rm "$directory/alive" 2>/dev/null; then
    left=$GIVEN_ORPHAN quiet=0
  elif [ "$leaving" ]; then
    # An agent on a machine with much to do may be late.
    quiet=$((quiet + 1))
    [ "$quiet" -lt 3 ] || exit 0
  else
    left=$((left - pause))
  fi
done
