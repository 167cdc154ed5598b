"""Where trials run: options that `compare` has for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from typer import Option

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..experiment.launch import Engine

WHERE = "Where trials run"


@dataclass(frozen=True)
class EngineOptions:
    """Here, one after the other or several at a time; or on a Ray cluster."""

    engine: Annotated[str, Option(help="local, or ray: a Ray cluster.", rich_help_panel=WHERE)] = "local"
    parallel: Annotated[
        int | None,
        Option(
            help="Trials at a time. They share the cores (or --threads), and the GPU or GPUs.",
            show_default="1; ray: as many as the cluster has room for",
            rich_help_panel=WHERE,
            min=1,
        ),
    ] = None
    address: Annotated[
        str | None,
        Option(
            help="ray: of the cluster, such as auto or ray://HOST:10001.",
            show_default="one of its own, on this machine",
            rich_help_panel=WHERE,
        ),
    ] = None
    share: Annotated[
        float,
        Option(help="ray: GPUs (without any: cores) that a trial takes, such as 0.25.", rich_help_panel=WHERE),
    ] = 1.0

    def choose(self) -> Engine:
        """The engine.

        **Raises:** `ConfigError` for one that there is not, or options that it does not have.
        """
        from ..experiment.launch import local
        from ..experiment.parallel import Parallel

        if self.engine == "ray":
            from ..experiment.cluster import RayCluster

            return RayCluster(self.address, parallel=self.parallel, share=self.share)
        if self.engine != "local":
            raise ConfigError(f"--engine {self.engine}: there are local and ray")
        if self.address is not None or self.share != 1.0:
            raise ConfigError("--address and --share are for a Ray cluster; add --engine ray")
        return local if self.parallel in (None, 1) else Parallel(self.parallel or 1)
