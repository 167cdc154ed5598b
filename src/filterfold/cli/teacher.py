"""Options of distillation: whether a teacher takes part in training, which, and how much it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ..errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from ..data import ImageData
    from ..online import Distillation
    from .options import ModelOptions


_option = partial(Option, rich_help_panel="Distillation", hidden=True)


@dataclass(frozen=True)
class DistillationOptions:
    """Whether the smaller network learns from a teacher, too."""

    distill: Annotated[
        bool,
        Option(
            "--distill",
            rich_help_panel="Distillation",
            help="Learn from the uncut network, or --teacher, too.",
        ),
    ] = False
    distill_weight: Annotated[
        float | None, _option(help="Share of the teacher in the loss; the labels have the rest.", show_default="0.5")
    ] = None
    temperature: Annotated[
        float | None, _option(help="That both networks' class scores are divided by.", show_default="2")
    ] = None
    teacher: Annotated[
        Path | None,
        _option(help="Weights of another teacher, a network of the same model.", show_default="the uncut network"),
    ] = None

    @property
    def how(self) -> dict[str, Any]:
        """Keywords of `ff.Distillation`, as far as they are given."""
        given = {"weight": self.distill_weight, "temperature": self.temperature}
        return {name: value for name, value in given.items() if value is not None}

    def setting(self) -> dict[str, Any]:
        """What a setting notes: the teacher by its content."""
        from ..surgery.weights import Weights

        if self.teacher is None:
            return dict(self.how)
        return {**self.how, "teacher": str(self.teacher), "fingerprint": Weights.read(self.teacher).fingerprint}

    def methods(self, names: Sequence[str]) -> list[str]:
        """Methods with `+distill` for all that cut a network, if that is asked for.

        **Raises:** `ConfigError` for options that have no effect.

        >>> DistillationOptions(distill=True).methods(["dense", "l1", "online+early", "scratch"])
        ['dense', 'l1+distill', 'online+early+distill', 'scratch']
        """
        from ..bench.trials.method_names import Method

        found, taught = [], False
        for name in names:
            method = Method.parse(name)
            add = self.distill and method.kind in ("one-shot", "online") and not method.is_taught
            found.append(f"{name}+distill" if add else name)
            taught = taught or add or method.is_taught
        if self.distill and not taught:
            raise ConfigError(f"--distill: {', '.join(names)} cuts no network that could teach; give another method")
        self.refuse_unused(taught)
        return found

    def check(self, trained: bool) -> None:
        """Refuse what has no effect after a cut: a teacher without training, and options without a teacher."""
        if self.distill and not trained:
            raise ConfigError("--distill has no effect without --epochs")
        self.refuse_unused(self.distill)

    def refuse_unused(self, taught: bool) -> None:
        """Refuse options that say how a teacher teaches if there is none."""
        for name, value in {**self.how, "teacher": self.teacher}.items():
            if value is not None and not taught:
                option = "distill-weight" if name == "weight" else name
                raise ConfigError(f"--{option} has no effect without --distill")

    def distillation(self, uncut: nn.Module, chosen: ModelOptions, data: ImageData) -> Distillation | None:
        """The teacher, if there is to be one: the network of the file, or the uncut one."""
        from ..online import Distillation
        from ..surgery.weights import Weights

        if not self.distill:
            return None
        if self.teacher is not None:
            uncut = chosen.build(data)
            Weights.read(self.teacher).into(uncut, classes=len(data.classes))
        return Distillation(uncut, **self.how)
