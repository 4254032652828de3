# shellcheck shell=sh disable=SC1091,SC3045
# Reports what a session on the host has: its shell, cores, memory and limits. Memory is in kB, `group_memory` in bytes.
echo '== skyward_lite =='
echo "shell=${SHELL:-unknown}"
echo "cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null)"
echo "memory=$(awk '$1 == "MemTotal:" { print $2 }' /proc/meminfo 2>/dev/null)"
echo "available=$(awk '$1 == "MemAvailable:" { print $2 }' /proc/meminfo 2>/dev/null)"
echo "group_memory=$(cat /sys/fs/cgroup/memory.max 2>/dev/null)"
echo "load=$(cut -d ' ' -f 1 /proc/loadavg 2>/dev/null)"
echo "release=$(. /etc/os-release 2>/dev/null; echo "${PRETTY_NAME:-$(uname -sr)}")"
echo "files=$(ulimit -n 2>/dev/null)"
echo "processes=$(ulimit -u 2>/dev/null || ulimit -p 2>/dev/null)"
