# shellcheck shell=sh disable=SC2154
# Reports whether the process GIVEN_PROCESS, which was born at GIVEN_BORN (in the words of proc(5)), lives on for
# GIVEN_TENTHS tenths of a second; then ends it.
echo '== skyward_lite =='
lives() {
  stat=$(cat "/proc/$GIVEN_PROCESS/stat" 2>/dev/null) || return
  # The name of the program is in parentheses, and may have blanks.
  # shellcheck disable=SC2086
  set -- ${stat##*)}
  [ "$1" != Z ] && [ "${20}" = "$GIVEN_BORN" ]
}
tenths=0
while lives && [ $((tenths += 1)) -le "$GIVEN_TENTHS" ]; do sleep 0.1 2>/dev/null || sleep 1; done
if lives; then
  kill "$GIVEN_PROCESS"
  echo lives=yes
else
  echo lives=no
fi
