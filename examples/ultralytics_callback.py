"""Online clustering in ultralytics' trainer, by its public callbacks.

Trains a detector, built from its YAML file with fresh weights, on made pictures of bright squares, and takes filters
out in small cuts between batches, until 60 % of its work is left. Needs `pip install ultralytics`, which is under
AGPL-3.0: whether that suits what you build is yours to judge.

    python examples/ultralytics_callback.py

What to know of this trainer: `last.pt` is the small network, `best.pt` may be one from before the last cut. A stopped
run does not go on, since the trainer builds the network anew from its YAML file. One process: `device=[0, 1]` starts
others, without these callbacks.
"""

import os
import tempfile
from pathlib import Path

import torch
from PIL import Image

os.environ.setdefault("YOLO_OFFLINE", "true")  # nothing is fetched, nothing is sent
from ultralytics import YOLO

from filterfold import OnlineFilterClustering, Schedule, measure

SIZE = 64


def make_pictures(folder: Path, count: int = 32) -> Path:
    """Noise with one bright square each, in the layout that the trainer reads."""
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        (folder / "images" / part).mkdir(parents=True)
        (folder / "labels" / part).mkdir(parents=True)
        for index in range(count):
            picture = torch.randint(0, 80, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
            side = int(torch.randint(16, 32, (1,), generator=generator))
            x, y = torch.randint(0, SIZE - side, (2,), generator=generator).tolist()
            picture[:, y : y + side, x : x + side] += 150
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / "images" / part / f"{index}.png")
            box = [(x + side / 2) / SIZE, (y + side / 2) / SIZE, side / SIZE, side / SIZE]
            (folder / "labels" / part / f"{index}.txt").write_text(" ".join(map(str, [0, *box])))
    data = folder / "squares.yaml"
    data.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames: [square]\n")
    return data


# --8<-- [start:main]
class Shrink:
    """Follows a run: `model.add_callback(event, method)` for each of its two events."""

    def __init__(self, macs: float) -> None:
        self.macs, self.steps = macs, 0
        self.online: OnlineFilterClustering | None = None

    def on_train_start(self, trainer: object) -> None:
        """Trace the network; the trainer's moving average of the weights is cut alike."""
        steps = trainer.epochs * len(trainer.train_loader) // trainer.accumulate
        self.online = OnlineFilterClustering(
            trainer.model,
            torch.zeros(1, 3, SIZE, SIZE, device=trainer.device),
            trainer.optimizer,
            averaged=trainer.ema.ema,
            macs=self.macs,
            schedule=Schedule.small_cuts(steps=steps, every=max(1, steps // 4), end=0.7),
        )
        trainer.optimizer.register_step_pre_hook(lambda *_: self.online.add_gradients())
        trainer.optimizer.register_step_post_hook(self._count)

    def on_train_batch_end(self, trainer: object) -> None:  # noqa: ARG002
        """Do what the schedule says, after each step of the optimizer."""
        if self.online.epoch < self.steps:
            for event in self.online.step(self.steps):
                print(f"step {self.steps}: {event}")

    def _count(self, *_: object) -> None:
        self.steps += 1


# --8<-- [end:main]


def main(epochs: int = 6) -> float:
    """Train, print what happens, return the share of the work that is left."""
    shrink = Shrink(macs=0.6)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = YOLO("yolov8n.yaml")
        for event in ("on_train_start", "on_train_batch_end"):
            model.add_callback(event, getattr(shrink, event))
        model.train(
            data=str(make_pictures(folder / "data")), epochs=epochs, imgsz=SIZE, batch=16, nbs=16, device="cpu",
            workers=0, project=str(folder), plots=False, verbose=False, seed=0, amp=False,
        )  # fmt: skip
        small = YOLO(next(folder.glob("**/weights/last.pt")))
        found = small.predict(str(folder / "data" / "images" / "val" / "0.png"), imgsz=SIZE, verbose=False)
        left = measure(small.model, torch.zeros(1, 3, SIZE, SIZE)).macs / shrink.online.cuts[0].macs[0]
    print(f"{left:.2f} of the work; {len(found[0].boxes)} boxes in a picture of its own")
    return left


if __name__ == "__main__":
    main()
