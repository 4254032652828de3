#!/bin/sh
# Sweep every directory that may have environments: GIVEN_SECONDS and GIVEN_WHAT are the limit and $3 of `sweep`.
. ./places.sh
. ./sweep.sh
echo '== skyward_lite =='
for base in "$@"; do
  [ -d "$base" ] || continue
  look "$base"
  if [ -n "$bad" ]; then printf 'unsafe=%s is not safe from other users: %s\n' "$base" "$bad"; continue; fi
  sweep "$real" "$GIVEN_SECONDS" "$GIVEN_WHAT"
done
exit 0
