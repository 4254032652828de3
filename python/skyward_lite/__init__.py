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

# What typing.TYPE_CHECKING is for type checkers, without the 10 ms that importing typing takes.
TYPE_CHECKING = False

_MODULES = {
    "AWS": "providers.aws",
    "ComputeFunction": "client.lazy",
    "ComputePool": "client.pool",
    "Cost": "providers",
    "EnvironmentMismatchError": "errors",
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
    from .providers.local import Local as Local
    from .providers.ssh import Host as Host, SSH as SSH
    # isort: on
else:

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = _MODULES[name]
        value = importlib.import_module(f".{home or name}", __name__)
        if home:
            value = getattr(value, name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted(__all__)


def _backend(**parameters):  # type: ignore[no-untyped-def]
    from .client.joblib_backend import SkywardBackend

    return SkywardBackend(**parameters)


# So that joblib's error for the name is ours also before the first pool. Where joblib is imported later, the first pool
# registers the name.
if hasattr(sys.modules.get("joblib"), "register_parallel_backend"):
    sys.modules["joblib"].register_parallel_backend("skyward", _backend)
