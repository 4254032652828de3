"""Opening a pool: its nodes are brought up, and its threads begin to take what comes from them."""

from __future__ import annotations

import dataclasses
import importlib
import uuid
from collections.abc import Callable

from .. import _core
from .._signals import install_signal_handlers
from ..errors import PoolClosedError
from ..image import Image
from ..pickling.modules import Modules
from ..pickling.route import Route
from . import answers, inbox
from .display import Display
from .hello import Greeting, pickled_hooks
from .leaving import Leaving
from .lifecycle import Lifecycle, Stage
from .nodes import Nodes
from .output import Printer
from .settings import Settings
from .startup import Startup
from .tasks import Tasks


@dataclasses.dataclass(frozen=True)
class Opening:
    """The parts of a pool that is opened."""

    settings: Settings
    core: _core.Core
    lifecycle: Lifecycle
    tasks: Tasks
    nodes: Nodes
    printer: Printer
    display: Display
    leaving: Leaving
    remember: Callable[[], None]
    """Notes that the pool is open, so that it is closed at the latest when the interpreter ends."""

    def run(self) -> None:
        """Bring the nodes up. Raise `NodeStartError` if fewer than the minimum become ready."""
        image = self.settings.image
        for plugin in self.settings.plugins:
            if plugin.transform is not None:
                image = plugin.transform(image)
                if not isinstance(image, Image):
                    raise TypeError(f"plugin {plugin.name!r}: its transform gave {image!r}: return the sky.Image")
        sources = None
        if self.settings.ship_modules and not self.settings.provider.shares_files:
            # Not at the module's head: most pools have no use for it.
            from .sources import Sources

            sources = Sources(image.includes, image.packages())
        completions = self.tasks.completions
        modules = Modules(
            self.settings.provider.shares_files,
            image.includes,
            image.packages(),
            sources=sources,
            is_idle=lambda: not completions.count(),
        )
        self.tasks.use(modules)
        setup = pickled_hooks(self.settings.plugins, self.tasks.encode_hooks)
        greeting = Greeting(self.settings, uuid.uuid4().hex, image, modules, setup)
        self.nodes.comparison.begin(modules)
        if not self.lifecycle.advance(Stage.OPEN):
            raise PoolClosedError("this pool was closed while it started: make a new one with sky.pool()")
        if self.settings.provider.outlives_client:
            # A signal that ended this process at once would leave the machines running.
            install_signal_handlers(self.leaving.handled_signals)
        self.remember()
        self.tasks.completions.futures.start()
        self.printer.start()
        self.leaving.takers.append(inbox.start_taking(self.core, self.tasks.completions.is_pending))
        if modules.sources is not None:
            self.leaving.takers.append(answers.start_answering(self.core, modules.sources))
        self.display.begin_start(Startup(self.nodes.snapshot, self.nodes.machines, self.settings.wanted_nodes))
        machines = self.nodes.start(image, greeting.for_machine)
        # All machines of a pool are of one kind, and so are those that take their place.
        self.tasks.route = Route(all(machine.shares_files for machine in machines), to_client=False)
        self._preload()
        self.nodes.await_ready()
        self.display.end_start()
        self.display.open()

    def _preload(self) -> None:
        """Import here, too, what the plugins want the workers to import, while the nodes start."""
        for module in (module for plugin in self.settings.plugins for module in plugin.preload):
            try:
                importlib.import_module(module)
            except ImportError:
                pass
            except Exception as error:
                error.add_note(f"It was raised by `import {module}`, which a plugin's preload asks for.")
                raise
