# shellcheck shell=sh disable=SC2154
# Installs a Python that can make environments: the distribution's, if it is of GIVEN_RELEASE, else the one that uv
# provides.
minor=$GIVEN_PYTHON
echo '== skyward_lite =='
can_make_environments() {
  version=$("python$minor" -I -c 'import sys, venv, ensurepip; print("%d.%d.%d" % sys.version_info[:3])' \
    </dev/null 2>/dev/null)
  case $version in "$GIVEN_RELEASE".*) ;; "$GIVEN_RELEASE") ;; *) return 1 ;; esac
}
if command -v dnf >/dev/null; then
  sudo -n dnf install -q -y "python$minor" "python$minor-pip" </dev/null >&2
elif command -v apt-get >/dev/null; then
  sudo -n apt-get -o DPkg::Lock::Timeout=300 update -qq </dev/null >&2
  sudo -n env DEBIAN_FRONTEND=noninteractive \
    apt-get -o DPkg::Lock::Timeout=300 install -y -qq "python$minor-venv" </dev/null >&2
fi
can_make_environments && exit 0
curl -LsSf https://astral.sh/uv/install.sh | env UV_NO_MODIFY_PATH=1 sh >&2
