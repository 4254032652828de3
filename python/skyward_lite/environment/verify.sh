#!/bin/sh
# Report the path of the interpreter GIVEN_PYTHON, and a line `problem=...` for everything that a node needs and that it
# does not have: Python GIVEN_MINOR, in the release GIVEN_RELEASE if that is longer, skyward_lite GIVEN_VERSION and the
# requirements in GIVEN_PIP, a list in JSON.
echo '== skyward_lite =='
case $GIVEN_PYTHON in
  [~]/*) python=$HOME/${GIVEN_PYTHON#??} ;;
  *) python=$GIVEN_PYTHON ;;
esac
export GIVEN_MINOR GIVEN_RELEASE GIVEN_VERSION GIVEN_PIP
exec "$python" - <<'PYTHON_ENDS_HERE'
import json, os, sys
minor, version = os.environ["GIVEN_MINOR"], os.environ["GIVEN_VERSION"]
if "%d.%d" % sys.version_info[:2] != minor:
    print("problem=it is Python %d.%d, the client's is %s" % (sys.version_info[:2] + (minor,)))
    sys.exit()
# As -P, which an older Python does not know.
sys.path[:] = [path for path in sys.path if path]
print("python=" + sys.executable)
try:
    import skyward_lite
except ImportError as error:
    print("problem=skyward_lite is not installed in it (%s): install version %s" % (error, version))
    sys.exit()
if skyward_lite.__version__ != version:
    print("problem=it has skyward_lite %s, the client %s" % (skyward_lite.__version__, version))
from skyward_lite.image import Image
try:
    wanted = Image(python=os.environ["GIVEN_RELEASE"], pip=json.loads(os.environ["GIVEN_PIP"]))
    for problem in wanted.missing():
        print("problem=" + problem)
except ImportError as error:
    print("problem=skyward_lite lacks a package there that it needs itself: %s" % error)
PYTHON_ENDS_HERE
