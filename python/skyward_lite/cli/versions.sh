# shellcheck shell=sh disable=SC2086,SC2154
# Reports the versions of packages that an interpreter finds when it is started as an agent's would be.
echo '== skyward_lite =='
exec "$GIVEN_PYTHON" "$GIVEN_ISOLATION" - $GIVEN_PACKAGES <<'PYTHON_ENDS_HERE'
import sys
from importlib import metadata
for name in sys.argv[1:]:
    try:
        print(name + "=" + metadata.version(name))
    except metadata.PackageNotFoundError:
        pass
PYTHON_ENDS_HERE
