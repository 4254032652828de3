# shellcheck shell=sh disable=SC2154
# Powers this machine off when no client has been heard of for GIVEN_ORPHAN s. While a client lives, the timer that powers
# the machine off after GIVEN_TTL s is set anew again and again.
mkdir -p "$GIVEN_DIRECTORY"
chown "$GIVEN_USER" "$GIVEN_DIRECTORY"
# Signs of life are counted in ticks: the clock may jump.
left=$GIVEN_ORPHAN since=0
while [ "$left" -gt 0 ]; do
  sleep "$GIVEN_TICK"
  since=$((since + GIVEN_TICK))
  if rm "$GIVEN_DIRECTORY/alive" 2>/dev/null; then
    left=$GIVEN_ORPHAN
    if [ "$since" -ge "$GIVEN_RENEW" ]; then
      systemctl stop "$GIVEN_UNIT.timer"
      # If the timer could not be started, the next sign of life tries again.
      systemd-run --unit="$GIVEN_UNIT" --on-active="${GIVEN_TTL}s" systemctl poweroff && since=0
    fi
  else
    left=$((left - GIVEN_TICK))
  fi
done
systemctl poweroff || shutdown -h now
