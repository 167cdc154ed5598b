"""Knowledge distillation: the small network learns from the uncut one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import CheckpointError, ConfigError, ModelError
from ..plan import Plan
from ..profiling.macs import measure
from ..surgery.layer_attributes import restore, snapshot
from ..utils.arguments import typed
from ..utils.inputs import call
from ..utils.modules import in_memory_order, memory_order, named_tensors, unwrap
from .channel_maps import ChannelMap, channel_maps, read_map, refuse_unfitting
from .output_losses import OutputLoss, check_losses, compared, wide


class Distillation:
    """A frozen copy of a network, in eval mode, that its smaller successor learns from.

    Make it before the cut (or from the network just before the last cut), and add it to the loss of any training loop:

        loss = (1 - weight) · task + weight · (output loss + Σ feature weight · feature loss)

    The output loss is by default that of Hinton et al. (2015, section 2), T² · KL(p ‖ q), where p and q are
    softmax(logits / T) of teacher and student: a mean over the batch and, for logit maps, over positions. T² keeps
    its gradients at the size of the task's. The feature loss (FitNets, Romero et al. 2015, without a regressor:
    the plan knows which channels correspond) is the mean of (student - teacher)² over the mean of teacher², over the
    channels that are left. Losses are computed in float32, also under autocast; nothing is cached between batches.

    **Arguments:**

    - `model`: what is copied as the teacher: the pretrained or fine-tuned network.
    - `temperature`: T, above 0. `weight`: of the teacher, from 0 to 1.
    - `losses`: how outputs are compared: `"kl"`, as above, along axis 1; `"binary"`, the same where each score stands
      for itself (sigmoid, not softmax); `"mse"`; or a function (student's output, teacher's output) → scalar. A
      mapping picks some of several outputs by key, index or attribute, and may be nested; their losses are summed:
      `{"logits": "kl", "aux": "mse"}`, `{0: "kl"}`. A name stands for the mean over all floating-point tensors in what
      it is given, lists of a detector's levels, say. None: the output is one tensor of class scores, (b, classes) or
      (b, classes, h, w); anything else is refused until `losses` says how to compare it.
    - `features`: names of modules whose outputs are compared too, or name → weight (1 by default). Needs
      `example_inputs` (as for `ff.prune`) to trace which channels they are. A folded channel is compared with what
      the plan makes of the teacher's. If a later layer writes in place over a module's output, what it wrote is
      compared, in both networks.
    - `student`: the network that learns, whose features are read by hooks; None: `model` itself. Compile it later.
    - `in_training`: names of modules that the teacher runs along their training branch, such as the head of a detector
      that decodes its outputs in eval mode.

    **Attributes:** `network`, the teacher; `followed`, the number of cuts that it knows of.

    **Raises:** `ConfigError` for a temperature, weight or loss that makes no sense, or a feature that can't be mapped.

    ```python
    >>> import filterfold as ff
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    >>> images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    >>> distillation = ff.Distillation(model, temperature=2.0, weight=0.7, features=["1"], example_inputs=images)
    >>> distillation.follow(ff.prune(model, images, keep=0.5).plan)
    >>> outputs = model(images)
    >>> distillation(images, outputs, task=functional.cross_entropy(outputs, labels)).backward()

    ```

    A segmentation network of one's own that returns a map of logits and one at half the size; the task's loss is
    whatever the loop makes of the labels, and the teacher is compared with output by output:

    ```python
    >>> class Segmenter(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.body, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
    ...     def forward(self, x):
    ...         logits = self.head(self.body(x).relu())
    ...         return {"out": logits, "aux": functional.avg_pool2d(logits, 2)}
    >>> model, masks = Segmenter(), torch.randint(4, (4, 8, 8))
    >>> distillation = ff.Distillation(model, losses={"out": "kl", "aux": "mse"})  # "kl": over classes, at each place
    >>> optimizer, result = torch.optim.AdamW(model.parameters(), 1e-3), ff.prune(model, images, keep=0.5)
    >>> for _ in range(2):
    ...     optimizer.zero_grad()
    ...     outputs = model(images)
    ...     distillation(images, outputs, task=functional.cross_entropy(outputs["out"], masks)).backward()
    ...     optimizer.step()

    ```
    """

    @typed
    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 2.0,
        weight: float = 0.5,
        losses: OutputLoss | Mapping[Any, Any] | None = None,
        features: Sequence[str] | Mapping[str, float] = (),
        example_inputs: Any = None,
        student: nn.Module | None = None,
        in_training: Sequence[str] = (),
    ) -> None:
        check_temperature(temperature)
        if not 0 <= weight <= 1:
            raise ConfigError(f"weight={weight}: the teacher's share of the loss, from 0 to 1")
        check_losses(losses)
        self.temperature, self.weight, self.losses = temperature, weight, losses
        self.features = _weights(features)
        self.network = copy.deepcopy(unwrap(model)).eval().requires_grad_(False)
        self.network.zero_grad(set_to_none=True)
        modules = dict(self.network.named_modules())
        for name in in_training:
            if name not in modules:
                raise ConfigError(f"in_training: the network has no module {name!r}")
            modules[name].training = True
        self.followed = 0
        self._maps: dict[str, list[ChannelMap]] = {}
        if self.features:
            if example_inputs is None:
                raise ConfigError("features: give example_inputs, which show which channels they are")
            self._maps = channel_maps(self.network, example_inputs, list(self.features))
            self._taught = _Watch(self.network, self.features, always=True)
            self._said = _Watch(unwrap(model if student is None else student), self.features, always=False)

    def __call__(self, inputs: Any, outputs: Any, task: Tensor) -> Tensor:
        """The whole objective: (1 - weight) · task + weight · teacher.

        **Arguments:**

        - `inputs`: what the student was given (a tuple: its arguments; a mapping: its keywords).
        - `outputs`: what it returned.
        - `task`: the task's own loss, a scalar.
        """
        if not isinstance(task, Tensor) or task.dim() != 0:
            raise ModelError("task: must be a scalar tensor, the mean of the task's loss over the batch")
        if self.weight == 0:
            return task
        return (1 - self.weight) * task + self.weight * self.loss(inputs, outputs)

    def loss(self, inputs: Any, outputs: Any) -> Tensor:
        """The teacher's part alone, unweighted, for an objective of one's own; runs the teacher once.

        **Returns:** a scalar that only the student has gradients of; 0 where it does as the teacher does.

        **Raises:** `ModelError` if the two networks' outputs have different structure or shapes, and `PlanError`
        if a feature's channels don't match: a cut that `follow` was not told of.
        """
        features = self._said.take() if self.features else {}
        with torch.no_grad():
            wanted = call(self.network, inputs)
        total = compared(self.losses, outputs, wanted, self.temperature)
        taught = self._taught.take() if self.features else {}
        for name, weight in self.features.items():
            total = total + weight * self._feature(name, features.get(name, []), taught.get(name, []))
        return total

    def follow(self, plan: Plan) -> None:
        """Learn of a cut: call it once with the plan of each, in their order. Only `features` need it.

        While a network shrinks: `for plan in online.plans[distillation.followed:]: distillation.follow(plan)`.

        **Raises:** `PlanError` if the plan is of a network of another size; nothing has changed then.
        """
        self._maps = {name: [each.follow(plan) for each in maps] for name, maps in self._maps.items()}
        self.followed += 1

    def for_student(self, student: nn.Module, plan: Plan) -> Distillation:
        """The same teacher for another student: a copy of this one's network that a plan has been applied to.

        The teacher's network is shared, not copied.

        **Raises:** `PlanError` if the plan is of a network of another size.
        """
        other = copy.copy(self)
        if self.features:
            student = unwrap(student)
            self._said.remove_copies(student)
            other._said = _Watch(student, self.features, always=False)
        other.follow(plan)
        return other

    def to(self, *args: Any, **kwargs: Any) -> Distillation:
        """Move the teacher as `nn.Module.to` does; it begins where the model was."""
        self.network.to(*args, **kwargs)
        return self

    def remove(self) -> None:
        """Take the hooks off the student again; features are then no longer seen."""
        if self.features:
            self._said.remove()

    def macs(self, example_inputs: Any) -> int:
        """Multiply-accumulates of the teacher's forward pass for one example: what each training step costs more."""
        return measure(self.network, example_inputs).macs

    def state_dict(self) -> dict[str, Any]:
        """The teacher's sizes and tensors and the features' channels, for `filterfold.utils.io.save_tree`."""
        return {
            "structure": snapshot(self.network),
            "tensors": {name: tensor.detach() for name, tensor in named_tensors(self.network)},
            "features": {name: [each.state_dict() for each in maps] for name, maps in self._maps.items()},
            "followed": self.followed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state. The model that this was made of may be the teacher's successor, of whatever size.

        **Raises:** `CheckpointError` if the state is of another architecture or other features, or damaged; nothing
        has changed then.
        """
        try:
            structure, tensors, features = state["structure"], state["tensors"], state.get("features", {})
            whole = {name: list(one.shape) for name, one in tensors.items()} == {
                name: list(shape) for name, (shape, _) in structure["tensors"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"distillation: a damaged state: {type(error).__name__}: {error}") from error
        if not whole:
            raise CheckpointError("distillation: a damaged state: its tensors have not the sizes that it says")
        if list(features) != list(self.features):
            raise CheckpointError(f"distillation: the state is of features {list(features)}, not {list(self.features)}")
        maps = {name: [read_map(each) for each in entries] for name, entries in features.items()}
        own = dict(named_tensors(self.network))
        orders = {name: memory_order(tensor) for name, tensor in own.items()}
        restore(self.network, structure)
        for name, tensor in own.items():  # a tensor keeps its order in memory: channels_last computes other bits
            tensor.data = in_memory_order(tensors[name].to(tensor.device), orders[name])
        self._maps, self.followed = maps, int(state.get("followed", 0))

    def _feature(self, name: str, said: list[Any], taught: list[Any]) -> Tensor:
        """Mean over a module's calls of the normalised squared difference."""
        maps = self._maps[name]
        if not len(said) == len(taught) == len(maps):
            raise ModelError(
                f"feature {name!r}: seen {len(said)} times in the student's last forward pass with gradients, "
                f"{len(taught)} in the teacher's, {len(maps)} when traced; is the student given, the very module that"
                " learns, and compiled only after this object was made?"
            )
        values = []
        for one, other, channels in zip(said, taught, maps, strict=True):
            if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
                raise ModelError(f"feature {name!r}: returns no tensor in training, but when traced")
            wanted = channels.of(wide(other))
            refuse_unfitting(name, one, wanted, channels.length, channels.axis)
            size = wanted.square().mean()
            values.append(functional.mse_loss(wide(one), wanted) / size.clamp_min(torch.finfo(size.dtype).tiny))
        return torch.stack(values).mean()


class _Watch:
    """Sees what some modules of one network return in its last forward pass, and nothing of the network's copies.

    **Arguments:**

    - `always`: also where no gradients are wanted: a student's validation should leave nothing behind.
    """

    def __init__(self, model: nn.Module, names: Mapping[str, float], *, always: bool) -> None:
        seen: dict[str, list[Any]] = {}
        modules = dict(model.named_modules(remove_duplicate=False))

        def begin(module: nn.Module, _inputs: Any) -> None:
            if module is model:  # a deep copy of the network has these hooks too
                seen.clear()

        def looking(name: str, own: nn.Module) -> Callable[..., None]:
            def look(module: nn.Module, _inputs: Any, output: Any) -> None:
                if module is own and (always or torch.is_grad_enabled()):
                    seen.setdefault(name, []).append(output)

            return look

        self._seen = seen
        self._handles = [model.register_forward_pre_hook(begin)]
        for name in names:
            if name not in modules:
                raise ConfigError(f"features: the student has no module {name!r}")
            self._handles.append(modules[name].register_forward_hook(looking(name, modules[name])))

    def take(self) -> dict[str, list[Any]]:
        """Module name → what it returned, once for each call."""
        found = dict(self._seen)
        self._seen.clear()
        return found

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def remove_copies(self, twin: nn.Module) -> None:
        """Take the hooks off a deep copy of the network, which has them too."""
        for module in twin.modules():
            for handle in self._handles:
                module._forward_hooks.pop(handle.id, None)
                module._forward_pre_hooks.pop(handle.id, None)


def check_temperature(temperature: float) -> None:
    """Raise `ConfigError` unless this is a number that logits can be divided by."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature={temperature}: must be a number above 0, such as 2")


def _weights(features: Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    if isinstance(features, str):
        raise ConfigError(f"features: give a list of names, [{features!r}]")
    found = dict(features) if isinstance(features, Mapping) else dict.fromkeys(features, 1.0)
    for name, weight in found.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"features: weight {weight} of {name!r} must be a number of 0 or more")
    return found
