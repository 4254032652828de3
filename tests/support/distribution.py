"""Check what `make dist` has built, as somebody who installs it would find out.

The wheel: its size, its platform tag and its metadata; then, in a new environment without a compiler on the PATH and
away from this checkout, its installation, the time that `import skyward_lite` takes, the command, the README's program
and the demo; and the same with each later Python that is here. The source distribution: its metadata, and that pip
makes a wheel with the same files from it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

MAX_WHEEL_BYTES = 6_000_000
"""A wheel must not be larger. SSH hosts are sent what it has, once."""
MAX_GLIBC = (2, 28)
"""The newest glibc that the wheel may ask for: that of the oldest systems which are still maintained (RHEL 8)."""
MAX_IMPORT_MS = 5.0
"""Milliseconds that `import skyward_lite` may take, at best of ten."""
COMPILERS = ("cc", "gcc", "clang", "cargo", "rustc", "zig")

IMPORT_TIME = """
import sys, time
begin = time.perf_counter()
import skyward_lite
print((time.perf_counter() - begin) * 1000)
"""


def main() -> None:
    """Check the one wheel and the one source distribution of a directory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--skip-sdist", action="store_true", help="do not have pip build the source")
    arguments = parser.parse_args()
    wheel = only(arguments.directory, "*.whl")
    sdist = only(arguments.directory, "*.tar.gz")
    tool("twine", "check", "--strict", str(wheel), str(sdist))
    print(f"metadata     twine: wheel and source distribution pass, strictly; {sdist.name}")
    check_files(wheel)
    check_size(wheel)
    check_tag(wheel)
    with tempfile.TemporaryDirectory(prefix="skyward-dist-") as scratch:
        for interpreter in pythons():
            check_installation(wheel, interpreter, Path(scratch))
        if not arguments.skip_sdist:
            check_sdist(sdist, wheel, Path(scratch))


def only(directory: Path, pattern: str) -> Path:
    """Return the one file of the directory that has this pattern."""
    found = sorted(directory.glob(pattern))
    if len(found) != 1:
        sys.exit(f"{directory} has {len(found)} files {pattern} in place of one")
    return found[0].resolve()


def tool(name: str, *arguments: str) -> str:
    """Return what a tool of this interpreter's environment prints; end this program, and show it, if the tool fails."""
    return run([str(Path(sys.executable).parent / name), *arguments])


def run(command: list[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}\n{done.stdout}{done.stderr}")
    return str(done.stdout)


def check_files(wheel: Path) -> None:
    """Check that the wheel has every file of the package in this checkout."""
    tracked = run(["git", "ls-files", "skyward_lite"], cwd=ROOT / "python").split()
    missing = set(tracked) - files(wheel)
    if missing:
        sys.exit(f"the wheel lacks {', '.join(sorted(missing))}")
    print(f"files        all {len(tracked)} of the package")


def check_size(wheel: Path) -> None:
    size = wheel.stat().st_size
    with zipfile.ZipFile(wheel) as archive:
        core = max(archive.infolist(), key=lambda info: info.file_size)
    print(f"size         {size / 1e6:.1f} MB, of it {core.filename} {core.compress_size / 1e6:.1f} MB")
    if size > MAX_WHEEL_BYTES:
        sys.exit(f"the wheel has {size:,} bytes, and {MAX_WHEEL_BYTES:,} are allowed")


def check_tag(wheel: Path) -> None:
    """Check that the wheel is for the stable ABI and an old glibc, that auditwheel finds the same in its binary, and
    that it unwinds stacks with libgcc."""
    tag = re.search(r"-cp311-abi3-manylinux.*?_(\d+)_(\d+)_\w+\.whl$", wheel.name)
    if tag is None or (int(tag[1]), int(tag[2])) > MAX_GLIBC:
        sys.exit(f"{wheel.name} is not a wheel for all of Python 3.11 and later, and glibc {MAX_GLIBC} or older")
    shown = " ".join(tool("auditwheel", "show", str(wheel)).split())
    consistent = re.search(r'platform tag: "(manylinux_(\d+)_(\d+)_\w+)"', shown)
    if consistent is None or (int(consistent[2]), int(consistent[3])) > (int(tag[1]), int(tag[2])):
        sys.exit(f"auditwheel does not confirm the tag of {wheel.name}: {shown}")
    if "libgcc_s.so.1" not in shown:
        # As in the Makefile: a second unwinder crashes programs as they end.
        sys.exit(f"{wheel.name} has an unwinder of its own, not libgcc_s.so.1: {shown}")
    print(f"platform     auditwheel: {consistent[1]}, stable ABI of Python 3.11 and later; {wheel.name}")


def pythons() -> list[str]:
    """Return this interpreter, and one of each later minor version that is installed here."""
    found = [sys.executable]
    for minor in range(sys.version_info.minor + 1, 20):
        python = shutil.which(f"python3.{minor}")
        # pyenv has commands that only say which versions it could be.
        if python and subprocess.run([python, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
            found.append(python)
    return found


def check_installation(wheel: Path, interpreter: str, scratch: Path) -> None:
    """Install the wheel where no compiler is found, and use it from there."""
    environment = scratch / f"clean-{Path(interpreter).name}"
    run([interpreter, "-m", "venv", str(environment)])
    binaries = environment / "bin"
    python = str(binaries / "python")
    variables = {**os.environ, "PATH": str(binaries), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        variables.pop(name, None)
    found = [name for name in COMPILERS if shutil.which(name, path=variables["PATH"])]
    assert not found, found

    def clean(*arguments: str) -> str:
        return run([python, *arguments], cwd=scratch, env=variables)

    begin = time.perf_counter()
    clean("-m", "pip", "install", "--quiet", "--only-binary", ":all:", str(wheel))
    seconds = time.perf_counter() - begin
    home = clean("-c", "import skyward_lite; print(skyward_lite.__file__)").strip()
    assert Path(home).is_relative_to(environment), home
    took = min(float(clean("-c", IMPORT_TIME)) for _ in range(10))
    version = clean("-c", "import platform; print(platform.python_version())").strip()
    print(f"installed    on Python {version} in {seconds:.1f} s, without a compiler")
    print(f"import       import skyward_lite takes {took:.1f} ms")
    if took > MAX_IMPORT_MS:
        sys.exit(f"import skyward_lite takes {took:.1f} ms, and {MAX_IMPORT_MS} are allowed")
    version = run([str(binaries / "skyward"), "--version"], cwd=scratch, env=variables)
    print(f"command      skyward --version: {', '.join(version.splitlines()[:2])}")
    script, expected = readme_program()
    (scratch / "readme.py").write_text(script)
    begin = time.perf_counter()
    shown = clean("readme.py")
    if shown != expected:
        sys.exit(f"the program of the README printed {shown!r} in place of {expected!r}")
    print(f"README       its program has its result after {time.perf_counter() - begin:.1f} s")
    # The demo's own needs; the package needs neither.
    clean("-m", "pip", "install", "--quiet", "--only-binary", ":all:", "numpy", "scikit-learn")
    demo = shutil.copy(ROOT / "benches" / "demo.py", scratch)
    # All of it once; a part on the other interpreters, whose core is the same.
    for line in clean(str(demo), *(["--smoke"] if interpreter != sys.executable else [])).splitlines():
        print(f"demo         {line}")


def readme_program() -> tuple[str, str]:
    """Return the first program of the README, and what it prints."""
    block = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    return block[1], block[2]


def check_sdist(sdist: Path, wheel: Path, scratch: Path) -> None:
    """Have pip build the source distribution in a new environment, with a Rust toolchain."""
    environment, built = scratch / "build", scratch / "built"
    run([sys.executable, "-m", "venv", str(environment)])
    pip = [str(environment / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(built), str(sdist)], cwd=scratch)
    ours, theirs = (files(path) for path in (wheel, only(built, "*.whl")))
    if ours != theirs:
        sys.exit(f"the wheel that is built from {sdist.name} differs from the other in {sorted(ours ^ theirs)}")
    print(f"source       pip builds {sdist.name} to a wheel with the same {len(ours)} files")


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


if __name__ == "__main__":
    main()
