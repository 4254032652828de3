# shellcheck shell=sh disable=SC2154
# The batch script of a node's job. Ends the job when no agent has given a sign of life for GIVEN_ORPHAN s, which is the
# file `alive` in a directory of this job's own. At SIGTERM, which Slurm sends before it ends a job, what runs may have
# time to end: the script goes on until the agent has gone, or Slurm kills both.
directory=/tmp/skyward_lite-$GIVEN_KEY-$SLURM_JOB_ID
umask 077
mkdir "$directory" || exit 1
leaving=
trap 'rm -rf "$directory"' EXIT
trap 'leaving=yes' TERM
trap '' HUP INT
# Signs of life are counted in pauses: the clock may jump.
left=$GIVEN_ORPHAN
while [ "$left" -gt 0 ]; do
  if [ "$leaving" ]; then pause=3; else pause=2; fi
  was=$leaving
  sleep "$pause"
  # Slurm's signal may have ended the pause early.
  [ $? -gt 128 ] && continue
  if rm "$directory/alive" 2>/dev/null; then
    left=$GIVEN_ORPHAN
  elif [ "$was" ]; then
    exit 0
  else
    left=$((left - pause))
  fi
done
