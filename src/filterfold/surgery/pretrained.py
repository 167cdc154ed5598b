"""A network as a folder that the Hugging Face hub understands: saved, loaded from there or from the hub, and pushed.

The folder holds `model.safetensors`, which is what `save` writes, `config.json` with the network's name in the zoo and
the plans, and a model card. Nothing in it is executed: code comes from the caller, or by name from the zoo, timm or
torchvision.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, ModelError, OutputError, PlanError, one_line
from ..plan import Plan
from ..profiling.macs import measure
from ..utils.inputs import difference, informative_inputs, outputs
from ..utils.io import write_text
from ..utils.model_state import preserved
from ..utils.modules import unwrap
from ..zoo import build, is_listed, quiet
from .checkpoint import contents, inspect, load, rebuild, write
from .model_card import LOADING, Card, load_command, markdown
from .verdict import TOLERANCES

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

Factory = str | Callable[[], nn.Module]


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    factory: Factory,
    example_inputs: Any,
    *,
    arguments: Mapping[str, Any] | None = None,
    plan: Plan | Sequence[Plan] | None = None,
    card: Card | None = None,
) -> None:
    """Write a network as a folder that `from_pretrained` reads and the Hugging Face hub understands.

    Before anything is written, the network is built anew as it will be on loading, and must compute the same.

    **Arguments:**

    - `model`: bare, or in the wrappers that `apply` knows. It stays as it is.
    - `folder`: made if it is not there; the three files are replaced.
    - `factory`: what builds the uncut network: a name of the zoo, `timm:NAME`, `torchvision:NAME`, which goes into
      `config.json`; or a callable, which whoever loads the network must then give, too.
    - `example_inputs`: a tensor, a tuple of arguments, or a dictionary of keyword arguments; for the comparison, and to
      count the work.
    - `arguments`: of `zoo.build`, for a name: `classes`, `channels`, `width`, `image_size`.
    - `plan`: the plan or plans that led here, kept for the record.
    - `card`: what the model card says besides.

    **Raises:** `CheckpointError` if the factory builds another network, `ModelError` if it builds none, `OutputError`
    if the folder can't be written.

    ```python
    >>> import tempfile, filterfold as ff
    >>> folder, x = Path(tempfile.mkdtemp()) / "small", torch.zeros(1, 3, 32, 32)
    >>> model = build("resnet20", classes=5)
    >>> plan = ff.prune(model, x, keep=0.5).plan
    >>> save_pretrained(model, folder, "resnet20", x, arguments={"classes": 5}, plan=plan, card=Card(license="mit"))
    >>> sorted(path.name for path in folder.iterdir())
    ['README.md', 'config.json', 'model.safetensors']
    >>> torch.equal(from_pretrained(folder)(x), model.eval()(x))
    True

    ```
    """
    from .. import __version__

    folder, model, card, name = Path(folder), unwrap(model), card or Card(), None
    if isinstance(factory, str):
        name, factory = factory, _named(factory, arguments or {})
    elif arguments:
        raise ModelError("arguments= go with a factory's name; a callable has its own")
    noted: dict[str, Any] = {} if name is None else {"factory": name, "arguments": dict(arguments or {})}
    noted |= {} if card.expects is None else {"input": asdict(card.expects)}
    found = contents(model, plan=plan, metadata=noted, path=folder / WEIGHTS)
    uncut = _built(factory, like=model)
    costs = measure(uncut, example_inputs), measure(model, example_inputs)
    _compare_shapes(model, uncut, example_inputs)
    rebuild(uncut, folder / WEIGHTS, found.header, found.tensors)
    _compare(model, uncut, example_inputs)
    config = {
        "library_name": "filterfold",
        "filterfold_version": __version__,
        **noted,
        "plans": json.loads(found.header["plans"]),
    }
    (folder / CONFIG).unlink(missing_ok=True)  # written last: a folder without it is not whole
    write(found, folder / WEIGHTS)
    write_text(folder / CARD, markdown(card, name, folder.resolve().name, costs))
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in config.items()]
    write_text(folder / CONFIG, "{\n" + ",\n".join(lines) + "\n}\n")


def from_pretrained(
    source: str | Path,
    factory: Callable[[], nn.Module] | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load a network that `save_pretrained` wrote.

    A network of timm comes back as timm's own class with other widths, and so on. Of a folder of the hub, only
    `config.json` and `model.safetensors` are fetched, into the hub's cache.

    **Arguments:**

    - `source`: the folder, or the network's id on the Hugging Face hub, `USER/NAME`.
    - `factory`: a callable that builds the uncut network; None: by the name in `config.json`, if it is one of the zoo,
      timm or torchvision.
    - `revision`: branch, tag or commit on the hub.
    - `device`: where the network goes.

    **Returns:** the network, in eval mode.

    **Raises:** `CheckpointError` if the folder is damaged or not to be had, or does not fit the factory.

    >>> from_pretrained("./nowhere")
    Traceback (most recent call last):
    filterfold.errors.CheckpointError: ./nowhere: no such folder, and no network's id on the hub (USER/NAME)
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _fetched(str(source), revision)
    config = _config(folder)
    if factory is None:
        if config.get("factory") is None:
            raise CheckpointError(
                f"{source}: its code is in no library: give the factory that builds the uncut network"
            )
        factory = _named(config["factory"], config.get("arguments"))
    if inspect(folder / WEIGHTS).plans != _plans(folder, config):
        raise CheckpointError(f"{source}: {CONFIG} and {WEIGHTS} are of two networks: their plans differ")
    return load(folder / WEIGHTS, factory, device=device).eval()


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a folder that `save_pretrained` wrote to the Hugging Face hub, as one commit.

    You must be logged in there (`hf auth login`). The command in the model card gets the id on the hub.

    **Arguments:**

    - `folder`: of which the three files are uploaded, and nothing else.
    - `repo_id`: `USER/NAME`; made if it is not there.
    - `private`: who may see it, if it is made.

    **Returns:** the commit's address.

    **Raises:** `CheckpointError` if the folder is not whole, `OutputError` if the hub can't be reached or refuses.
    """
    folder = Path(folder)
    _config(folder)
    files: dict[str, Path | bytes] = {name: folder / name for name in (WEIGHTS, CONFIG)}
    try:
        card = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CARD}: can't be read ({one_line(error)})") from error
    files[CARD] = re.sub(LOADING, lambda _: load_command(repo_id), card).encode()
    client = _client("push_to_hub")
    try:
        with quiet():
            hub = client.HfApi()
            hub.create_repo(repo_id, private=private, exist_ok=True)
            adding = [client.CommitOperationAdd(name, content) for name, content in files.items()]
            commit = hub.create_commit(repo_id, adding, commit_message="A network pruned with Filterfold")
    except Exception as error:  # what the client raises has no common kind
        raise OutputError(
            f"{repo_id}: can't be pushed ({one_line(error)}); is there a network, and a token?"
        ) from error
    return str(commit.commit_url)


def _named(name: Any, arguments: Any) -> Callable[[], nn.Module]:
    """What builds a network of the zoo, timm or torchvision by name; nothing else has a name."""
    if not isinstance(name, str) or not is_listed(name):
        raise ModelError(
            f"{name}: only networks of the zoo, timm: and torchvision: are built by name; give the factory itself"
        )
    known = {"classes": int, "channels": int, "width": int | float, "image_size": int}
    if not isinstance(arguments, Mapping) or not all(
        isinstance(arguments[key], known.get(key, ())) for key in arguments
    ):
        raise ModelError(f"{name}: its arguments are numbers for {', '.join(known)}, not {arguments!r}")
    return partial(build, name, **arguments)


def _built(factory: Callable[[], nn.Module], like: nn.Module) -> nn.Module:
    """The uncut network, with the type and on the device of the small one."""
    uncut = factory()
    if not isinstance(uncut, nn.Module):
        raise ModelError(f"the factory returned a {type(uncut).__name__}, not a module")
    own = next(like.parameters(), None)
    return unwrap(uncut if own is None else uncut.to(own.device, own.dtype))


def _compare_shapes(model: nn.Module, uncut: nn.Module, example_inputs: Any) -> None:
    with preserved(model, uncut):
        here, there = ([tuple(one.shape) for one in outputs(network, example_inputs)] for network in (model, uncut))
    if here != there:
        raise CheckpointError(
            f"the factory builds a network with outputs {there}, the one to save has {here}: "
            "give its number of classes, such as arguments={'classes': 5}"
        )


def _compare(model: nn.Module, rebuilt: nn.Module, example_inputs: Any) -> None:
    inputs = informative_inputs(example_inputs)
    with preserved(model, rebuilt):
        found = outputs(model, inputs)
        error = difference(found, outputs(rebuilt, inputs))
    if not error <= max((TOLERANCES.get(tensor.dtype, 0.0) for tensor in found), default=0.0):
        raise CheckpointError(
            f"the factory builds another network: with the same weights its outputs are off by {error:.1e}"
        )


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG}: can't be read ({one_line(error)})") from error
    if not isinstance(config, dict) or config.get("library_name") != "filterfold":
        raise CheckpointError(f"{folder / CONFIG}: not of a network that save_pretrained() wrote")
    return config


def _plans(folder: Path, config: Mapping[str, Any]) -> tuple[Plan, ...]:
    try:
        return tuple(Plan.from_json(json.dumps(entry)) for entry in config["plans"])
    except (KeyError, TypeError, PlanError) as error:
        raise CheckpointError(f"{folder / CONFIG}: damaged plans: {one_line(error)}") from error


def _client(wanted: str) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ModelError(f"{wanted} needs huggingface_hub: pip install 'filterfold[hub]'") from error


def _fetched(source: str, revision: str | None) -> Path:
    """Where the hub's client has put the files of a network."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise CheckpointError(f"{source}: no such folder, and no network's id on the hub (USER/NAME)")
    client = _client(f"{source} is no folder here; from the hub it")
    try:
        with quiet():
            return Path(client.snapshot_download(source, revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # what the client raises has no common kind
        raise CheckpointError(
            f"{source}: no folder here, and can't be had from the hub ({one_line(error)}); is there a network?"
        ) from error
