"""maturin as the build backend, but for Windows: there the first step of a build says what to do.

pip builds from source where no wheel fits. On Windows the build would end in errors of a compiler, or in the request
for a Rust toolchain, which would not help.
"""

from __future__ import annotations

import sys

if sys.platform == "win32":
    raise SystemExit(
        "skyward_lite runs on Linux and macOS. On Windows install it within WSL, the Windows Subsystem for Linux: run "
        "`wsl --install` in PowerShell, open the new terminal, and `pip install skyward_lite` there."
    )

from maturin import *  # noqa: F403
