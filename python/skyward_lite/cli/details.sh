# shellcheck shell=sh disable=SC1091,SC3045
# Reports what a session on the host has: its shell, cores, memory and limits. Memory is in kB, `group_memory` in bytes;
# `group_cores` is a time of all cores, and the period in which so much may be used: "150000 100000".
echo '== skyward_lite =='
echo "shell=${SHELL:-sh}"
echo "cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null)"
echo "memory=$(awk '$1 == "MemTotal:" { print $2 }' /proc/meminfo 2>/dev/null)"
echo "available=$(awk '$1 == "MemAvailable:" { print $2 }' /proc/meminfo 2>/dev/null)"
group=/sys/fs/cgroup
echo "group_memory=$(cat $group/memory.max 2>/dev/null || cat $group/memory/memory.limit_in_bytes 2>/dev/null)"
quota=$(cat $group/cpu.max 2>/dev/null || cat $group/cpu/cpu.cfs_quota_us $group/cpu/cpu.cfs_period_us 2>/dev/null)
echo "group_cores=$(echo "$quota" | awk '{ printf "%s ", $0 }' 2>/dev/null)"
echo "load=$(cut -d ' ' -f 1 /proc/loadavg 2>/dev/null)"
echo "release=$(. /etc/os-release 2>/dev/null; echo "${PRETTY_NAME:-$(uname -sr)}")"
echo "files=$(ulimit -n 2>/dev/null)"
echo "processes=$(ulimit -u 2>/dev/null || ulimit -p 2>/dev/null)"
