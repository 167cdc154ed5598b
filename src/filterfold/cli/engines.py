"""How trials run: options of every command that runs many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from typer import Option

from ..errors import ConfigError
from .families import LOG_HELP

if TYPE_CHECKING:
    from ..experiment.launch import Engine

WHERE = "How trials run"

T = TypeVar("T")


@dataclass(frozen=True)
class EngineOptions:
    """Here, one after the other or several at a time, or on a Ray cluster; who looks on; how networks are timed."""

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

    log: Annotated[
        str | None,
        Option(help=LOG_HELP, rich_help_panel=WHERE),
    ] = None
    latency_batches: Annotated[
        str,
        Option(
            help="Batch sizes at which all networks are timed in the end, besides the whole test set; none: only that.",
            rich_help_panel=WHERE,
        ),
    ] = "1,8,64,512"

    def keywords(self) -> dict[str, Any]:
        """Arguments of `experiment.launch.compare`.

        **Raises:** `ConfigError` for what makes no sense.
        """
        text = "" if self.latency_batches == "none" else self.latency_batches
        sizes = listed(text, "--latency-batches", int)
        if min(sizes, default=1) < 1:
            raise ConfigError(f"--latency-batches {self.latency_batches}: a batch has at least 1 image")
        return {"engine": self.choose(), "trackers": listed(self.log, "--log", str), "batch_sizes": sizes}

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


def listed(text: str | None, option: str, kind: Callable[[str], T]) -> list[T]:
    """Comma-separated values.

    >>> listed("5,10", "--clusters", int), listed(None, "--keep", float)
    ([5, 10], [])
    """
    try:
        return [kind(part.strip()) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"{option} {text}: give comma-separated values, such as 5,10 or 0.5,0.25") from None
