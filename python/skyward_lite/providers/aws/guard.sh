#!/bin/sh
# Powers this machine off when no client has been heard of for @ORPHAN@ s. While a client lives, the timer that powers the
# machine off after @TTL@ s is set anew again and again.
mkdir -p @DIRECTORY@
chown @USER@ @DIRECTORY@
# Signs of life are counted in ticks: the clock may jump.
left=@ORPHAN@ since=0
while [ "$left" -gt 0 ]; do
  sleep @TICK@
  since=$((since + @TICK@))
  if rm @DIRECTORY@/alive 2>/dev/null; then
    left=@ORPHAN@
    if [ "$since" -ge @RENEW@ ]; then
      systemctl stop @UNIT@.timer
      # If the timer could not be started, the next sign of life tries again.
      systemd-run --unit=@UNIT@ --on-active=@TTL@s systemctl poweroff && since=0
    fi
  else
    left=$((left - @TICK@))
  fi
done
systemctl poweroff || shutdown -h now
