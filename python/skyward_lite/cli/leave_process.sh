# shellcheck shell=sh disable=SC2086
# Starts a process that is to outlive the connection, as an agent does, and reports it. It ends by itself after a minute.
# Also reports what may end it: systemd's setting, and the control group of the session.
echo '== skyward_lite =='
if command -v sleep >/dev/null; then
  detached=$(command -v setsid)
  ( trap '' HUP; exec $detached sleep 60 ) </dev/null >/dev/null 2>&1 &
  echo "process=$!"
  echo "stat=$(cat /proc/$!/stat 2>/dev/null)"
fi
# The files that systemd reads; the last setting counts.
for directory in /usr/lib /run /etc; do
  for file in "$directory"/systemd/logind.conf "$directory"/systemd/logind.conf.d/*.conf; do
    grep -i '^ *KillUserProcesses *=' "$file" 2>/dev/null | sed 's/^/logind=/'
  done
done
echo "group=$(cut -d : -f 3 /proc/self/cgroup 2>/dev/null)"
