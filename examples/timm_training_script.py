"""Online clustering in a training script that is not to be rewritten, such as timm's or torchvision's.

The lines marked (1) go where the script has made model, optimizer and moving average, and before its loop, which stays
as it is: hooks of the optimizer do the rest. Here the parts are timm's own (`create_optimizer_v2`, `ModelEmaV3`,
`NativeScaler`, `create_scheduler_v2`), put together as its `train.py` does, on scikit-learn's handwritten digits.

    python examples/timm_training_script.py

Such scripts save state dicts, which know no sizes: keep the small network with `ff.save` or `ff.save_pretrained`.
Their own `--resume` does not go on from a network that was cut.
"""

import logging
from itertools import count

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split

from filterfold import OnlineFilterClustering, Schedule

_log = logging.getLogger(__name__)


def main(epochs: int = 8) -> float:
    """Train, print what happens, return the moving average's test accuracy in percent."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    images = functional.interpolate(images, scale_factor=4)  # 32 x 32 pixels
    train, test = random_split(TensorDataset(images, labels), [0.8, 0.2])
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)

    model = timm.create_model("resnet10t", num_classes=10, in_chans=1, stem_width=16, channels=(16, 32, 64, 64))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    model_ema = ModelEmaV3(model, decay=0.95)
    loss_scaler = NativeScaler(device="cpu")
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=1)

    # --8<-- [start:lines]
    schedule = Schedule.small_cuts(steps=epochs * len(loader), every=len(loader) // 2, end=0.5)  # (1)
    online = OnlineFilterClustering(  # (1)
        model, images[:1], optimizer, averaged=model_ema.module, macs=0.5, schedule=schedule
    )
    steps = count(1)  # (1)
    optimizer.register_step_pre_hook(lambda *_: online.add_gradients())  # (1)
    optimizer.register_step_post_hook(lambda *_: _log.info(online.step(next(steps))))  # (1)
    # --8<-- [end:lines]

    for epoch in range(epochs):
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = functional.cross_entropy(model(x), y)
            loss_scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            model_ema.update(model)
        scheduler.step(epoch + 1)

    model_ema.eval()
    with torch.inference_mode():
        right = [model_ema(x).argmax(1) == y for x, y in DataLoader(test, batch_size=512)]
    accuracy = 100 * torch.cat(right).float().mean().item()
    for cut in online.cuts:
        print(cut)
    print(f"test accuracy {accuracy:.1f} %, {online.cuts[-1].macs[1] / online.cuts[0].macs[0]:.2f} of the work")
    return accuracy


if __name__ == "__main__":
    main()
