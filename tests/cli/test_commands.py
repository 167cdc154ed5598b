"""The commands do what they say, on digits: train, evaluate, prune, compare, demo; and go on after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from filterfold.bench.trials.records import Record, read_all
from filterfold.cli.app import app
from filterfold.cli.options import OnlineOptions, settings
from filterfold.data import load as load_data
from filterfold.online import Distillation
from filterfold.profiling.macs import measure
from filterfold.surgery.checkpoint import inspect, load
from filterfold.training import Recipe, evaluate
from filterfold.zoo import build

pytestmark = pytest.mark.slow

runner = CliRunner()

SMALL = ["--model", "vgg_small", "--data", "digits", "--width", "0.25", "--lr", "0.1", "--schedule", "onecycle"]
SMALL += ["--train-limit", "400", "--threads", "1"]


def run(*command: str, code: int = 0) -> str:
    result = runner.invoke(app, list(command))
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout


def dense() -> Any:
    return build("vgg_small", channels=1, image_size=8, width=0.25)


def figures(record: Record) -> dict[str, Any]:
    """What of a record must not depend on when and how often it was interrupted."""
    result = dict(record["result"] or {})
    del result["inference_seconds"], result["train_seconds"]
    history = [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in record["history"]]
    return {"result": result, "history": history, "clusters": record["clusters_history"], "options": record["options"]}


def same_weights(one: Path, other: Path) -> bool:
    """Bit for bit. The files differ: the order of a safetensors header is not fixed."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    run("train", *SMALL, "--epochs", "6", "--out", str(folder))
    return folder


def test_train_leaves_a_network_and_a_record_that_agree(trained: Path) -> None:
    [record] = read_all(trained)
    result = record["result"]
    assert result is not None
    model = load(trained / "model.safetensors", dense)
    data = load_data("digits")
    assert evaluate(model, data.test).top1 == pytest.approx(result["top1"], abs=1e-6)
    assert result["top1"] > 30  # six short epochs; chance is 10
    assert (len(record["history"]), record["status"], record["method"]) == (6, "finished", "dense")
    assert record["timing"] is not None
    assert record["environment"]["torch"]
    assert record["command"]


def test_train_again_is_refused_and_overwriting_gives_the_same(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    run("train", *SMALL, "--epochs", "1", "--out", str(other))
    before = (other / "model.safetensors").read_bytes()
    run("train", *SMALL, "--epochs", "2", "--out", str(other), code=2)
    assert (other / "model.safetensors").read_bytes() == before
    run("train", *SMALL, "--epochs", "6", "--out", str(other), "--overwrite")
    assert same_weights(other, trained)
    assert len(read_all(other)) == 1


def test_train_online_is_smaller(tmp_path: Path) -> None:
    text = run(
        "train", *SMALL, "--epochs", "4", "--method", "online", "--clusters", "4", "--out", str(tmp_path / "run")
    )
    [record] = read_all(tmp_path / "run")
    result, whole = record["result"], record["dense"]
    assert result is not None
    assert whole is not None
    assert result["widths"]["features.0"] == [8, 4]
    assert result["macs"] < whole["macs"] / 2
    assert record["clusters_history"]
    assert any(epoch["events"] for epoch in record["history"])
    assert measure(load(tmp_path / "run" / "model.safetensors", dense), _example()).macs == result["macs"]
    assert "online k=4" in text


def test_a_recipe_for_fine_tuning_and_cuts_between_batches(tmp_path: Path) -> None:
    command = [
        "train",
        *SMALL,
        "--lr",
        "0.002",
        "--optimizer",
        "adamw",
        "--schedule",
        "warmup-cosine",
        "--warmup",
        "0.1",
    ]
    command += ["--head-lr", "3", "--clip", "1", "--ema", "0.9", "--freeze-norms", "--label-smoothing", "0.1"]
    run(
        *command,
        "--epochs",
        "4",
        "--method",
        "online",
        "--keep",
        "0.5",
        "--milestones",
        "0.1,0.4",
        "--out",
        str(tmp_path),
    )
    [record] = read_all(tmp_path)
    asked = {"optimizer": "adamw", "warmup": 0.1, "head_lr": 3.0, "clip": 1.0, "ema": 0.9, "freeze_norms": True}
    assert asked.items() <= record["options"]["recipe"].items()
    assert record["options"]["online"]["schedule"] == "0.1,0.4"
    assert sum("mean_macs" in epoch for epoch in record["history"]) == 2
    model = load(tmp_path / "model.safetensors", dense)
    assert record["result"] is not None
    assert evaluate(model, load_data("digits").test).top1 == pytest.approx(record["result"]["top1"], abs=1e-6)


def test_a_teacher_on_the_command_line(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(trained / "model.safetensors")
    seen: list[dict[str, Any]] = []

    class Watched(Distillation):
        def __init__(self, model: Any, **options: Any) -> None:
            super().__init__(model, **options)
            seen.append({name: value.clone() for name, value in self.network.state_dict().items()} | options)

    monkeypatch.setattr("filterfold.online.Distillation", Watched)
    cut = ["prune", "-m", "vgg_small", "-d", "digits", "--width", "0.25", "-w", file, "--keep", "0.5", "--threads", "1"]
    plain, taught = tmp_path / "plain.safetensors", tmp_path / "taught.safetensors"
    run(*cut, "--epochs", "1", "--out", str(plain))
    assert not seen
    run(*cut, "--epochs", "1", "--distill", "--distill-weight", "0.7", "--temperature", "3", "--out", str(taught))
    [teacher] = seen  # the network before the cut
    assert {name: teacher.pop(name) for name in ("weight", "temperature")} == {"weight": 0.7, "temperature": 3.0}
    assert all(
        torch.equal(value, teacher[name])
        for name, value in load(trained / "model.safetensors", dense).state_dict().items()
    )
    first, second = load_file(plain), load_file(taught)
    assert any(not first[name].equal(second[name]) for name in first)
    run(
        "train",
        *SMALL,
        "--epochs",
        "1",
        "--method",
        "online",
        "--keep",
        "0.5",
        "--distill",
        "--teacher",
        file,
        "--out",
        str(tmp_path / "run"),
    )
    [record] = read_all(tmp_path / "run")
    assert record["method"] == "online+distill"
    assert record["options"]["distill"]["teacher"] == file
    assert len(record["options"]["distill"]["fingerprint"]) == 16
    assert record["dense"] is not None
    assert record["history"][0]["extra_macs"] == record["dense"]["macs"]


def test_stopping_in_time_and_going_on(tmp_path: Path, trained: Path) -> None:
    command = ["train", *SMALL, "--epochs", "6", "--out", str(tmp_path / "run")]
    text = run(*command, "--stop-after", "0.001s", code=3)
    assert "the same command goes on" in text
    assert not (tmp_path / "run" / "model.safetensors").exists()
    run(*command)
    assert same_weights(tmp_path / "run", trained)


def test_evaluate(trained: Path) -> None:
    [record] = read_all(trained)
    text = run(
        "evaluate", "-m", "vgg_small", "-d", "digits", "--width", "0.25", "-w", str(trained / "model.safetensors")
    )
    assert record["result"] is not None
    assert f"{record['result']['top1']:.2f} %" in text
    assert "359 test images" in text


def test_prune_and_evaluate_what_came_out(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    text = run(
        "prune", "-m", "vgg_small", "-d", "digits", "--width", "0.25", "-w", str(trained / "model.safetensors"),
        "--keep", "0.5", "--out", str(out), "--epochs", "2", "--lr", "0.01", "--threads", "1",
    )  # fmt: skip
    assert "verified: the cut network equals the masked one" in text
    about = inspect(out)
    assert about.plans[0].widths["features.0"] == (8, 4)
    assert measure(load(out, dense), _example()).macs < measure(dense(), _example()).macs / 3
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    after = about.metadata["test_top1"]["after retraining"]
    evaluated = run("evaluate", "-m", "vgg_small", "-d", "digits", "--width", "0.25", "-w", str(out))
    assert f"{after:.2f} %" in evaluated
    cut = about.metadata["test_top1"]["after the cut"]
    assert after > cut


def test_prune_to_a_budget(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    run(
        "prune", "-m", "vgg_small", "-d", "digits", "--width", "0.25", "-w", str(trained / "model.safetensors"),
        "--macs", "0.4", "--scope", "global", "--ignore", "classifier.*", "--out", str(out), "--no-evaluate",
    )  # fmt: skip
    share = measure(load(out, dense), _example()).macs / measure(dense(), _example()).macs
    assert 0.3 < share <= 0.4
    assert "classifier.0" not in inspect(out).plans[0].widths
    assert inspect(out).metadata["test_top1"] == {"before": None, "after the cut": None}


def test_prune_and_repair(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    text = run(
        "prune", "-m", "vgg_small", "-d", "digits", "--width", "0.25", "-w", str(trained / "model.safetensors"),
        "--keep", "0.5", "--repair", "--out", str(out), "--threads", "1",
    )  # fmt: skip
    top1 = inspect(out).metadata["test_top1"]
    assert list(top1) == ["before", "after the cut", "after repair"]
    assert top1["after repair"] > top1["after the cut"]
    assert "(test) after repair" in text
    assert f"{top1['after repair']:.2f} %" in run(
        "evaluate", "-m", "vgg_small", "-d", "digits", "--width", "0.25", "-w", str(out)
    )


def test_prune_to_onnx(trained: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    out, onnx = tmp_path / "small.safetensors", tmp_path / "small.onnx"
    command = ["prune", "-m", "vgg_small", "-d", "digits", "--width", "0.25", "-w", str(trained / "model.safetensors")]
    command += ["--keep", "0.5", "--out", str(out), "--onnx", str(onnx), "--no-evaluate", "--threads", "1"]
    run(*command)
    inputs = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    session = runtime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    [found] = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    expected = load(out, dense).eval()(inputs).detach()
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-4)
    before = onnx.read_bytes()
    out.unlink()
    run(*command, code=2)  # the ONNX file is in the way
    assert onnx.read_bytes() == before
    assert not out.exists()


def test_demo_twice(tmp_path: Path) -> None:
    command = ["demo", "--trials", "2", "--epochs", "2", "--latency-batches", "1,16", "--out", str(tmp_path / "demo")]
    first = run(*command)
    for label in ("dense", "l1 keep=0.5", "online keep=0.5"):
        assert f"{label} (n = 2): top-1 " in first
    assert str(tmp_path / "demo" / "report.html") in first
    assert "<html" in (tmp_path / "demo" / "report.html").read_text()
    table = (tmp_path / "demo" / "tables" / "comparison.md").read_text()
    for heading in ("Top-1, %", "Top-5, %", "Inference time, s", "MACs", "Parameters", "Training time, s"):
        assert heading in table
    found = read_all(tmp_path / "demo")
    assert len(found) == 6
    assert {record["timing"]["mode"] for record in found if record["timing"]} == {"together"}
    assert len({record["timing"]["together_with"] for record in found if record["timing"]}) == 1
    assert {size for record in found if record["timing"] for size in record["timing"]["batches"]} == {"1", "16"}
    base = {record["seed"]: record for record in found if record["method"] == "dense"}
    for record in found:
        if record["method"] == "l1":  # begins with the dense network of its seed, whose training counts
            assert record["history"][:2] == base[record["seed"]]["history"]
            assert [epoch["phase"] for epoch in record["history"]] == ["train", "train", "retrain"]
    second = run(*command)
    assert "[1/" not in second  # nothing ran
    assert read_all(tmp_path / "demo") == found


@pytest.mark.usefixtures("no_plots")
def test_retraining_by_another_schedule_is_another_trial(tmp_path: Path) -> None:
    command = ["compare", *SMALL, "--methods", "l1", "--epochs", "2", "--retrain-epochs", "2", "--keep", "0.5"]
    command += ["--trials", "1", "--latency-batches", "none", "--retrain-lr", "0.01"]
    run(*command, "--out", str(tmp_path / "constant"))
    run(*command, "--retrain-schedule", "warmup-cosine", "--out", str(tmp_path / "cosine"))
    [constant], [cosine] = read_all(tmp_path / "constant"), read_all(tmp_path / "cosine")
    assert "retrain" not in constant["options"]
    assert cosine["options"]["retrain"] == {"schedule": "warmup-cosine"}
    assert [row["learning_rate"] for row in constant["history"][2:]] == [0.01, 0.01]
    assert cosine["history"][3]["learning_rate"] < 0.005


COMPARE = ["compare", *SMALL, "--methods", "dense,l1,online", "--epochs", "8", "--retrain-epochs", "4", "--keep", "0.5"]
COMPARE += ["--trials", "1", "--latency-batches", "none"]


@pytest.mark.usefixtures("no_plots")
def test_a_killed_comparison_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    _kill_in_the_middle(killed)
    before = {record["id"]: record for record in read_all(killed)}
    assert before
    assert any((killed / "work").rglob("*.safetensors"))  # something was going on
    text = run(*COMPARE, "--out", str(killed))
    assert f"[{3 - len(before)}/{3 - len(before)}]" in text  # the missing ones ran, no other
    after = {record["id"]: record for record in read_all(killed)}
    assert len(after) == 3
    for name, record in before.items():
        assert (after[name]["started"], after[name]["finished"]) == (record["started"], record["finished"])
    run(*COMPARE, "--out", str(whole))
    assert {record["id"]: figures(record) for record in read_all(whole)} == {
        name: figures(record) for name, record in after.items()
    }
    assert not any((killed / "work").rglob("*"))


def _kill_in_the_middle(folder: Path) -> None:
    """Start a comparison in a process of its own, and kill it in a trial that is not the first."""
    command = [sys.executable, "-m", "filterfold", *COMPARE, "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            ended = list(folder.glob("records/*.json"))
            begun = [
                path for path in folder.glob("work/*/*.safetensors") if path.parent.name not in {p.stem for p in ended}
            ]
            if ended and begun:
                break
            time.sleep(0.002)
        else:
            pytest.fail("the comparison ended before it could be killed")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _example() -> Any:
    return torch.zeros(1, 1, 8, 8)


def test_settings_that_an_older_version_did_not_know_do_not_part_it_from_its_runs() -> None:
    assert set(settings(Recipe())) == {  # what the first version wrote
        "epochs", "batch_size", "lr", "momentum", "nesterov", "weight_decay", "decay_norms", "schedule", "step_every",
        "step_factor", "warmup", "label_smoothing", "augment", "precision", "channels_last", "compile", "deterministic",
    }  # fmt: skip


def test_a_pull_without_a_strength_has_its_own() -> None:
    assert OnlineOptions().keywords() == {"schedule": "gradual", "strength": 1e-3}  # as in every record so far
    assert OnlineOptions("early").keywords(trained=True) == {"schedule": "early", "strength": 1e-3}
    assert OnlineOptions(pull="centripetal").keywords() == {"schedule": "gradual", "pull": "centripetal"}
    assert OnlineOptions(pull="centripetal", strength=0.1).keywords()["strength"] == 0.1
    assert OnlineOptions(pull="none").keywords() == {"schedule": "gradual", "strength": 0.0}
