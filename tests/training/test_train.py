"""The loop against a loop written out here, and what callbacks and callers may rely on."""

from __future__ import annotations

import random
from typing import Any

import lightning_fabric  # noqa: F401  # it puts its own in torch.compile's place, which must not happen inside a test
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from filterfold import data, zoo
from filterfold.data import ImageData, batches
from filterfold.errors import ConfigError, DataError, ModelError, TrainingError
from filterfold.profiling.macs import measure
from filterfold.training import Callback, Recipe, Run, evaluate, fabric, train

FAST = Recipe(epochs=3, batch_size=32, lr=0.05)


def small(seed: int = 0, width: float = 0.25) -> nn.Module:
    torch.manual_seed(seed)
    return zoo.build("vgg_small", channels=1, image_size=8, width=width)


def same(left: nn.Module, right: nn.Module) -> bool:
    other = right.state_dict()
    return all(torch.equal(value, other[key]) for key, value in left.state_dict().items())


def test_it_does_what_a_plain_loop_does(digits: ImageData) -> None:
    recipe = Recipe(epochs=3, batch_size=32, lr=0.1, schedule="onecycle", label_smoothing=0.1, nesterov=True, seed=5)
    expected, found = small(), small()
    history = train(found, digits, recipe, device="cpu")
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    step = 0
    for epoch in range(1, 4):
        losses = []
        feed = batches(digits.train, 32, shuffle=True, augment="crop", seed=5, epoch=epoch, drop_last=True)
        for images, labels in feed:
            optimizer.param_groups[0]["lr"] = recipe.rate(step, 6)
            optimizer.zero_grad()
            loss = functional.cross_entropy(expected(images), labels, label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
        row = history.rows[epoch - 1]
        assert row["train_loss"] == pytest.approx(sum(losses) / 6)
        assert row["learning_rate"] == pytest.approx(recipe.rate(step - 1, 6))
    assert step == 18
    assert same(expected, found)


def test_it_learns_the_digits() -> None:
    digits = data.load("digits")
    model = small(width=0.5)
    history = train(model, digits, Recipe(epochs=5, batch_size=64, lr=0.1, schedule="onecycle"), device="cpu")
    assert evaluate(model, digits.test).top1 > 93
    assert history.last_top1 == evaluate(model, digits.validation).top1
    assert history.best_top1 == max(row["validation_top1"] or 0 for row in history.rows)
    assert history.seconds == sum(row["seconds"] for row in history.rows)
    assert [row["epoch"] for row in history.rows] == [1, 2, 3, 4, 5]
    assert {row["macs"] for row in history.rows} == {measure(model, digits.example).macs}
    assert {row["phase"] for row in history.rows} == {"train"}


def test_the_seed_decides(digits: ImageData) -> None:
    models = [small() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        train(model, digits, Recipe(epochs=1, batch_size=32, seed=seed), device="cpu")
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_nothing_is_left_behind(digits: ImageData) -> None:
    model = small().eval()
    torch_state, python_state = torch.random.get_rng_state(), random.getstate()
    threads = torch.get_num_threads()
    train(model, digits, Recipe(epochs=1, deterministic=True), device="cpu")
    assert torch.equal(torch_state, torch.random.get_rng_state())
    assert python_state == random.getstate()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_parameters_and_frozen_norms_stay(digits: ImageData) -> None:
    model = small()
    model.features[0].weight.requires_grad_(False)
    model.features[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, digits, FAST, device="cpu")
    after = model.state_dict()
    for key in ("features.0.weight", "features.1.running_mean"):
        assert torch.equal(before[key], after[key])
    assert not torch.equal(before["features.4.running_mean"], after["features.4.running_mean"])
    assert not model.features[1].training
    assert model.features[4].training


class Recorder(Callback):
    """Notes the calls, adds a loss term, and halves the gradients."""

    def __init__(self, strength: float = 0.0) -> None:
        self.calls: list[str] = []
        self.strength = strength

    def on_start(self, run: Run) -> None:
        self.calls.append(f"start {run.epoch}")

    def on_batch_loss(self, run: Run) -> Tensor | None:
        self.calls.append("loss")
        if not self.strength:
            return None
        return self.strength * sum(parameter.square().sum() for parameter in run.model.parameters())  # type: ignore[return-value]

    def after_backward(self, run: Run) -> None:
        self.calls.append("backward")
        assert all(parameter.grad is not None for parameter in run.model.parameters())

    def on_epoch_end(self, run: Run) -> None:
        self.calls.append(f"end {run.epoch} after {run.step}")
        run.event(f"noted {run.epoch}")


def test_callbacks_are_called_in_order_and_add_to_the_loss(digits: ImageData) -> None:
    recipe = Recipe(epochs=2, batch_size=100, lr=0.05, weight_decay=0.0)
    watched, pulled, decayed = small(), small(), small()
    recorder = Recorder()
    history = train(watched, digits, recipe, callbacks=[recorder], device="cpu")
    epoch = ["loss", "backward"] * 2
    assert recorder.calls == ["start 0", *epoch, "end 1 after 2", *epoch, "end 2 after 4"]
    assert [row["events"] for row in history.rows] == [["noted 1"], ["noted 2"]]
    # a term of half the squared norm is what SGD's weight decay is
    train(pulled, digits, recipe, callbacks=[Recorder(0.005)], device="cpu")
    train(decayed, digits, Recipe(epochs=2, batch_size=100, lr=0.05, weight_decay=0.01), device="cpu")
    for key, value in pulled.state_dict().items():
        torch.testing.assert_close(value, decayed.state_dict()[key], rtol=1e-3, atol=1e-5)
    assert not same(watched, pulled)


class Narrow(Callback):
    """Cuts the first layer to half its filters after an epoch, parameters staying the same objects."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_end(self, run: Run) -> None:
        if run.epoch == self.epoch:
            first, norm, second = (run.model.features[index] for index in (0, 1, 3))  # type: ignore[index]
            kept = first.out_channels // 2
            tensors = [(first.weight, 0), (norm.weight, 0), (norm.bias, 0), (second.weight, 1)]
            for tensor, axis in tensors:
                buffer = run.optimizer.state[tensor]["momentum_buffer"].narrow(axis, 0, kept).clone()
                run.optimizer.state[tensor]["momentum_buffer"] = buffer
                cut = tensor.data.narrow(axis, 0, kept).clone()
                tensor.grad = None
                tensor.data = torch.empty(0, dtype=torch.float16)
                tensor.data = cut
            for name in ("running_mean", "running_var"):
                getattr(norm, name).data = getattr(norm, name).data[:kept].clone()
            first.out_channels = second.in_channels = norm.num_features = kept
            run.structure_changed()
            run.event("narrowed")


@pytest.mark.parametrize("options", [{}, {"channels_last": True}, {"precision": "bf16-mixed"}])
def test_a_callback_may_change_the_structure(digits: ImageData, options: dict[str, Any]) -> None:
    model = small()
    history = train(model, digits, Recipe(epochs=3, batch_size=32, **options), callbacks=[Narrow(2)], device="cpu")
    assert [row["events"] for row in history.rows] == [[], ["narrowed"], []]
    dense, cut = history.rows[0]["macs"], history.rows[2]["macs"]
    assert history.rows[1]["macs"] == cut == measure(model, digits.example).macs
    assert dense - cut == 8 * 8 * 9 * (4 + 4 * 8)  # 4 filters fewer: their own kernels, and 8 readers' slices
    assert model.features[0].weight.shape == (4, 1, 3, 3)
    assert not any(torch.isnan(value).any() for value in model.state_dict().values())
    assert evaluate(model, digits.test).top1 > 20


@pytest.mark.slow
def test_compile_and_recompile(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, real = [], torch.compile

    def with_eager_backend(model: nn.Module, **options: Any) -> Any:
        compiled.append(model)
        return real(model, **{**options, "backend": "eager"})

    monkeypatch.setattr(torch, "compile", with_eager_backend)
    model, plain = small(), small()
    recipe = {"epochs": 3, "batch_size": 100}
    train(model, digits, Recipe(**recipe, compile=True), callbacks=[Narrow(2)], device="cpu")  # type: ignore[arg-type]
    train(plain, digits, Recipe(**recipe), callbacks=[Narrow(2)], device="cpu")  # type: ignore[arg-type]
    assert len(compiled) >= 2
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key])


def test_graphs_are_recorded_anew_after_a_cut(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the recorder is replaced by one that rehearses as the real one does."""
    recorded: list[tuple[torch.Size, bool]] = []

    def rehearse(network: nn.Module, images: tuple[Tensor], **_: Any) -> None:
        for _ in range(3):
            network(*images).sum().backward()
        network.zero_grad(set_to_none=True)
        recorded.append((images[0].shape, network.training))

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", rehearse)
    monkeypatch.setattr(fabric, "_accelerator", lambda *_: ("cpu", ""))
    models = [small(), small()]
    for model, cuda_graphs in zip(models, (True, False), strict=True):
        model.features[1].eval()  # type: ignore[index,union-attr]  # a frozen batch norm stays so
        recipe = Recipe(epochs=3, batch_size=100, cuda_graphs=cuda_graphs)
        train(model, digits, recipe, callbacks=[Narrow(2)], device="cpu")
    assert recorded == [(torch.Size([100, 1, 8, 8]), True)] * 2
    assert same(*models)  # running statistics and random state are those of before the rehearsal


def test_an_optimizer_of_the_callers_own(digits: ImageData) -> None:
    model = small()
    head, body = list(model.classifier.parameters()), list(model.features.parameters())
    optimizer = torch.optim.AdamW([{"params": body, "lr": 1e-3}, {"params": head, "lr": 2e-3}])
    recipe = Recipe(epochs=2, batch_size=50, lr=1e-3, schedule="cosine")
    train(model, digits, recipe, optimizer=optimizer, device="cpu")
    last = recipe.rate(7, 4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([last, 2 * last])
    assert all("exp_avg" in optimizer.state[parameter] for parameter in head)


def test_validation_can_be_rare_or_left_out(digits: ImageData) -> None:
    rows = train(small(), digits, Recipe(epochs=5), validate_every=2, device="cpu").rows
    assert [row["validation_top1"] is not None for row in rows] == [False, True, False, True, True]
    rows = train(small(), digits, Recipe(epochs=5, validate_every=3), device="cpu").rows
    assert [row["validation_top1"] is not None for row in rows] == [False, False, True, False, True]
    history = train(small(), digits, Recipe(epochs=2), validate_every=0, device="cpu")
    assert history.best_top1 is None
    empty = data.load("digits", validation=0, train_limit=100)
    assert train(small(), empty, Recipe(epochs=1), device="cpu").last_top1 is None


def test_a_batch_larger_than_the_data(digits: ImageData) -> None:
    rows = train(small(), digits, Recipe(epochs=2, batch_size=10_000), device="cpu").rows
    assert len(rows) == 2


def test_a_run_that_diverges_is_stopped(digits: ImageData) -> None:
    with pytest.raises(TrainingError, match=r"the loss of epoch \d is (nan|inf); lower the learning rate"):
        train(small(), digits, Recipe(epochs=5, lr=1e30), device="cpu")


def test_misfits_are_refused_before_training(digits: ImageData) -> None:
    with pytest.raises(DataError, match="the network has 3 outputs, the data 10 classes"):
        train(zoo.build("vgg_small", channels=1, image_size=8, classes=3), digits, device="cpu")
    with pytest.raises(ModelError, match="can't take images of 1x8x8"):
        train(zoo.build("resnet20"), digits, device="cpu")
    with pytest.raises(ConfigError, match="device='gpu'"):
        train(small(), digits, device="gpu")
    with pytest.raises(ConfigError, match="16-mixed' needs a GPU"):
        train(small(), digits, Recipe(precision="16-mixed"), device="cpu")
    with pytest.raises(ConfigError, match="cuda_graphs=True needs a CUDA GPU, not cpu"):
        train(small(), digits, Recipe(cuda_graphs=True), device="cpu")
    with pytest.raises(ConfigError, match="augment='flip'"):
        train(small(), digits, Recipe(augment="flip"), device="cpu")


def test_a_missing_gpu_is_named(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        train(small(), digits, device="cuda")


class TwoHeads(nn.Module):
    """Gives a tuple in training mode only, like networks with auxiliary heads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Any:
        logits = self.linear(images.flatten(1))
        return (logits, logits) if self.training else logits


def test_a_network_with_other_outputs_while_training(digits: ImageData) -> None:
    with pytest.raises(ModelError, match="TwoHeads returns a tuple in training mode"):
        train(TwoHeads(), digits, FAST, device="cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_on_a_gpu(digits: ImageData, precision: Any, cuda_graphs: bool) -> None:
    model = small(width=1.0)
    options = {"precision": precision, "channels_last": True, "cuda_graphs": cuda_graphs}
    recipe = Recipe(epochs=20, batch_size=50, lr=0.1, schedule="onecycle", **options)
    train(model, digits, recipe, callbacks=[Recorder(1e-5), Narrow(10)], device="cuda")
    assert next(model.parameters()).device.type == "cuda"
    assert evaluate(model, digits.test, precision=precision).top1 > 85
