"""Shrinking under PyTorch's DDP: every process makes the same calls, rank 0 decides, all cut alike.

Trains a small convolutional network on scikit-learn's handwritten digits, until half of each layer is left. What
differs from one process is marked (1) and (2).

    torchrun --nproc-per-node 2 examples/ddp.py
"""

import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from filterfold import OnlineFilterClustering, Schedule, zoo


# --8<-- [start:main]
def main(epochs: int = 6) -> None:
    """Train; rank 0 prints what happens."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    dist.init_process_group("nccl" if gpu else "gloo")
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=digits.target)
    dataset = TensorDataset(images[train], labels[train])
    sampler = DistributedSampler(dataset)  # each process its own part of every epoch
    loader = DataLoader(dataset, batch_size=32, sampler=sampler)

    network = zoo.build("vgg_small", channels=1, image_size=8, width=0.5).to(device)
    ddp = DistributedDataParallel(network, device_ids=[device.index] if gpu else None)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    online = OnlineFilterClustering(  # (1): the wrapped network; the wrapper takes up the new sizes
        ddp, images[:1].to(device), optimizer, keep=0.5, schedule=Schedule.gradual(epochs)
    )
    for epoch in range(1, epochs + 1):
        sampler.set_epoch(epoch)
        ddp.train()
        for x, y in loader:
            loss = functional.cross_entropy(ddp(x.to(device)), y.to(device)) + online.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        events = online.step(epoch)  # (2): in every process
        if dist.get_rank() == 0:
            print(f"epoch {epoch}  loss {loss.item():.3f}  {'; '.join(events)}")

    if dist.get_rank() == 0:
        network.eval()
        with torch.inference_mode():
            right = network(images[test].to(device)).argmax(dim=1).cpu() == labels[test]
        print(f"test accuracy {100 * right.float().mean():.1f} %, {online.cuts[-1].macs[1]:,} multiply-accumulates")
    dist.destroy_process_group()


# --8<-- [end:main]


if __name__ == "__main__":
    main()
