"""`joblib.Parallel(n_jobs=-1)` means all workers on all your machines.

from joblib import Parallel, delayed
import skyward_lite as sky

with sky.pool(provider=sky.Local(nodes=2), worker=sky.Worker(concurrency=10)):
    results = Parallel(n_jobs=-1)(delayed(slow_task)(i) for i in range(2000))
"""

from __future__ import annotations

import importlib
import sys

from ._version import __version__ as __version__

if sys.platform == "win32":
    raise ImportError(
        "skyward_lite runs on Linux and macOS. On Windows use it within WSL, the Windows Subsystem for Linux: run "
        "`wsl --install` in PowerShell, open the new terminal, and install Python and skyward_lite there."
    )

# What typing.TYPE_CHECKING is for type checkers, without the 10 ms that importing typing takes.
TYPE_CHECKING = False

_MODULES = {
    "AWS": "providers.aws",
    "ComputeFunction": "client.lazy",
    "ComputePool": "client.pool",
    "Cost": "providers",
    "EnvironmentMismatchError": "errors",
    "Exec": "providers.command",
    "Host": "providers.ssh",
    "Image": "image",
    "LazyCall": "client.lazy",
    "LazyGroup": "client.lazy",
    "Local": "providers.local",
    "MessageError": "errors",
    "Node": "client.node_state",
    "NodeLostError": "errors",
    "NodeStartError": "errors",
    "PayloadTooLargeError": "errors",
    "Plugin": "hooks",
    "PoolClosedError": "errors",
    "Provider": "providers",
    "RemoteError": "errors",
    "RemoteTraceback": "errors",
    "SSH": "providers.ssh",
    "SkywardError": "errors",
    "Slurm": "providers.slurm",
    "Status": "client.node_state",
    "TaskTimeoutError": "errors",
    "Worker": "client.settings",
    "WorkerCrashedError": "errors",
    "WorkerInfo": "hooks",
    "__version__": "_version",
    "compute": "client.lazy",
    "errors": "",
    "gather": "client.lazy",
    "messages": "",
    "plugins": "",
    "pool": "client.pool",
    "progress": "client.progress",
}
"""Every public name → the module that has it; "" for a public module.

A name's module is imported when the name is first asked for: the agent and the worker, whose modules are in this
package too, start sooner without the client's part.
"""

__all__ = [*_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    # The same names once more, because type checkers do not run `__getattr__`. A test compares the two.
    # isort: off
    from . import errors as errors, messages as messages, plugins as plugins
    from .client.lazy import (
        ComputeFunction as ComputeFunction,
        LazyCall as LazyCall,
        LazyGroup as LazyGroup,
        compute as compute,
        gather as gather,
    )
    from .client.node_state import Node as Node, Status as Status
    from .client.pool import ComputePool as ComputePool, pool as pool
    from .client.progress import progress as progress
    from .client.settings import Worker as Worker
    from .errors import (
        EnvironmentMismatchError as EnvironmentMismatchError,
        MessageError as MessageError,
        NodeLostError as NodeLostError,
        NodeStartError as NodeStartError,
        PayloadTooLargeError as PayloadTooLargeError,
        PoolClosedError as PoolClosedError,
        RemoteError as RemoteError,
        RemoteTraceback as RemoteTraceback,
        SkywardError as SkywardError,
        TaskTimeoutError as TaskTimeoutError,
        WorkerCrashedError as WorkerCrashedError,
    )
    from .hooks import Plugin as Plugin, WorkerInfo as WorkerInfo
    from .image import Image as Image
    from .providers import Cost as Cost, Provider as Provider
    from .providers.aws import AWS as AWS
    from .providers.command import Exec as Exec
    from .providers.local import Local as Local
    from .providers.slurm import Slurm as Slurm
    from .providers.ssh import Host as Host, SSH as SSH
    # isort: on
else:

    def __getattr__(name):
        if name not in _MODULES:
            # With `name` and `obj` Python asks "Did you mean …?".
            text = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(text, name=name, obj=sys.modules[__name__])
        home = _MODULES[name]
        try:
            value = importlib.import_module(f".{home or name}", __name__)
        except ImportError as error:
            # Python names the package if the file is missing, and the file if the system's loader refuses it.
            if error.name == "_core" or (error.name == __name__ and "_core" in error.msg):
                error.add_note(
                    "The compiled part of skyward_lite is missing here, or was made for another Python or system. Run "
                    "`pip install --force-reinstall skyward_lite`; in a checkout, `make build`."
                )
            raise
        if home:
            value = getattr(value, name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted(__all__)


def _backend(**parameters):  # type: ignore[no-untyped-def]
    from . import messages

    if messages.in_worker():
        # As in tasks of Parallel: within a task the name means that calls run one after the other.
        from joblib.parallel import SequentialBackend

        return SequentialBackend(**parameters)
    from .client.joblib_backend import SkywardBackend

    return SkywardBackend(**parameters)


def _register(parallel):  # type: ignore[no-untyped-def]
    """Register the backend's name in joblib's module, so that the error for the name is ours also before a pool."""
    parallel.register_parallel_backend("skyward", _backend)
    unentered = sys.modules.get(f"{__name__}.client.unentered")
    if unentered is not None:
        # A pool was made before joblib was imported.
        unentered.watch()


class _UntilJoblib:
    """Waits, first among the import system's finders, until joblib is imported, and registers the backend then.

    It finds the module as the finders after it do, and goes. The module's own loader runs the module.
    """

    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != "joblib.parallel" or cls not in sys.meta_path:
            return None
        finders = sys.meta_path[sys.meta_path.index(cls) + 1 :]
        sys.meta_path.remove(cls)
        specs = (finder.find_spec(name, path, target) for finder in finders)
        spec = next((spec for spec in specs if spec is not None), None)
        loader = None if spec is None else spec.loader
        # Only a loader of this one module: those of zip archives are shared by all modules of their archive.
        if loader is not None and type(loader).__name__ == "SourceFileLoader":

            def run(module):  # type: ignore[no-untyped-def]
                del loader.exec_module
                loader.exec_module(module)
                _register(module)  # type: ignore[no-untyped-call]

            loader.exec_module = run  # type: ignore[method-assign]
        return spec


if hasattr(sys.modules.get("joblib.parallel"), "register_parallel_backend"):
    _register(sys.modules["joblib.parallel"])  # type: ignore[no-untyped-call]
elif "joblib.parallel" not in sys.modules:
    sys.meta_path.insert(0, _UntilJoblib)
