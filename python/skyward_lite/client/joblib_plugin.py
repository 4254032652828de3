"""The plugins that come with the package: `joblib()`, which a pool has by default, and `sklearn()`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from .. import checks
from ..distributions import installed
from ..hooks import Plugin
from ..image import Image


def joblib(version: str | None = None) -> Plugin:
    """Return the plugin that makes `joblib.Parallel` run on the pool for the length of its block.

    A pool has it by default. The nodes get threadpoolctl as well if this process has it: `inner_max_num_threads` needs
    it there.

    Parameters
    ----------
    version : str, optional
        The nodes' version of joblib. None, the default, means this process's own, which is what pickles need, unless
        the image asks for another.

    Returns
    -------
    Plugin
    """
    if version is not None:
        checks.text("joblib", "version", version, '"1.5.0"')

    def transform(image: Image) -> Image:
        return _with_joblib(image, version)

    return Plugin("joblib", preload=["joblib"], transform=transform, around_client=_around_client)


def sklearn(version: str | None = None) -> Plugin:
    """Return the plugin that does what `joblib()` does, with scikit-learn on the nodes.

    Whatever has an `n_jobs` there runs on the pool. `joblib(version=...)` may stand beside it to pin joblib too, before
    or after.

    Parameters
    ----------
    version : str, optional
        The nodes' version of scikit-learn. None, the default, means this process's own, or the latest where this
        process has none, unless the image asks for another.

    Returns
    -------
    Plugin

    Examples
    --------
    >>> sky.pool(plugins=[sky.plugins.sklearn()]).plugins[0].name
    'sklearn'
    """
    if version is not None:
        checks.text("sklearn", "version", version, '"1.7.0"')

    def transform(image: Image) -> Image:
        return _with_joblib(image, None).with_package("scikit-learn", version)

    # sklearn.model_selection loads nearly all that tasks need (1 s), sklearn.ensemble adds the trees (0.1 s).
    preload = ["joblib", "sklearn.model_selection", "sklearn.ensemble"]
    return Plugin("sklearn", preload=preload, transform=transform, around_client=_around_client)


def _with_joblib(image: Image, version: str | None) -> Image:
    image = image.with_package("joblib", version)
    return image if installed("threadpoolctl") is None else image.with_package("threadpoolctl", None)


def _around_client(pool: Any) -> AbstractContextManager[object]:
    # Not at the module's head: importing joblib takes 0.1–0.4 s. The pool's start has done it here, by `preload`.
    from .joblib_backend import as_default_backend

    return as_default_backend(pool)
