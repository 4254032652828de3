# shellcheck shell=sh
# Runs beside the client, in a session of its own, and outlives it. Reads numbers of jobs from standard input, one on
# each line. An end of it without the line "done" means that the client has died: then the jobs are cancelled, and those
# that are called $1, whose numbers the client may not have known yet. A controller that does not answer is asked again.
jobs=
while read -r line; do
  case $line in "done") exit 0 ;; esac
  jobs="$jobs $line"
done
# The agents end with their client: without the signal, the guards of the jobs that run would look for some seconds
# whether their agents have gone. A job that waits cannot be sent one, and scancel would go on trying.
end() {
  running=$(squeue --noheader --states=RUNNING --format=%i "$@")
  # shellcheck disable=SC2086
  if [ "$running" ]; then scancel --batch --signal=USR1 $running; fi
}
for pause in 0 5 20 60 300 900; do
  sleep "$pause"
  failed=
  if [ "$1" ]; then
    end --user="$(id -u)" --name="$1"
    scancel --user="$(id -u)" --name="$1" || failed=yes
  fi
  if [ "$jobs" ]; then
    end --jobs="$(echo "$jobs" | tr -s " " ",")"
    # shellcheck disable=SC2086
    scancel $jobs || failed=yes
  fi
  if [ -z "$failed" ]; then exit 0; fi
done
