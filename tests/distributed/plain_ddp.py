"""A user's own loop with PyTorch's DDP, cut while it trains: runs in two processes, and asserts by itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from filterfold import data, zoo
from filterfold.data import batches
from filterfold.online import OnlineFilterClustering, Schedule


def same_everywhere(tensor: Tensor) -> bool:
    others = [torch.zeros_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(others, tensor.contiguous())
    return all(torch.equal(other, tensor) for other in others)


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def check_gradients(ddp: DistributedDataParallel, images: Tensor, labels: Tensor) -> None:
    """DDP's gradients after the cut are the means of those that every process computes by itself."""
    alone = copy.deepcopy(ddp.module)
    cross_entropy(alone(images), labels).backward()
    expected = flat(parameter.grad for parameter in alone.parameters())
    dist.all_reduce(expected)
    ddp.zero_grad()
    cross_entropy(ddp(images), labels).backward()
    torch.testing.assert_close(flat(parameter.grad for parameter in ddp.parameters()), expected / 2)


def go(options: dict[str, Any], *, compiled: bool = False) -> None:
    torch.manual_seed(dist.get_rank())
    digits = data.load("digits", train_limit=400)
    model = zoo.build("vgg_small", channels=1, image_size=8, width=0.5)
    ddp = DistributedDataParallel(model, **options)
    network: Any = torch.compile(ddp, backend="eager") if compiled else ddp
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    online = OnlineFilterClustering(
        network, torch.zeros(1, 1, 8, 8), optimizer, keep=0.5, schedule=Schedule(updates=(1,), milestones=((2, 1.0),))
    )
    called: list[int] = []
    ddp.register_forward_hook(lambda *_: called.append(1))
    losses = []
    for epoch in (1, 2, 3, 4):
        for number, (images, labels) in enumerate(batches(digits.train, 40, shuffle=True, epoch=epoch)):
            if number % 2 != dist.get_rank():
                continue
            optimizer.zero_grad()
            loss = cross_entropy(network(images), labels)
            (loss + online.loss()).backward()
            optimizer.step()
        losses.append(loss.item())
        assert same_everywhere(flat(parameter.grad for parameter in model.parameters()))
        assert same_everywhere(flat(model.parameters()))
        online.step(epoch)
        assert same_everywhere(flat(model.parameters()))
    assert [group.size for group in online.groups if group.frozen is None] == [8, 8, 16, 16, 16]
    assert losses[-1] < losses[0]
    assert len(called) == 20
    assert ddp.training
    if not options.get("static_graph"):
        check_gradients(ddp, images, labels)


def run(_folder: Path) -> dict[str, Any]:
    """Three kinds of DDP."""
    kinds: list[tuple[dict[str, Any], bool]] = [
        ({}, False),
        ({"gradient_as_bucket_view": True, "find_unused_parameters": True, "bucket_cap_mb": 1}, False),
        ({"static_graph": True}, True),
    ]
    for options, compiled in kinds:
        go(options, compiled=compiled)
    return {"recovered": len(kinds)}
