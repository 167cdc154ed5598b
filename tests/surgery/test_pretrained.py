"""A network as a folder, and on a stand-in of the hub: it comes back the same, and nothing in it is executed."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import filterfold as ff
from filterfold.bench.trials.start import noted_input
from filterfold.errors import CheckpointError, FilterfoldError, ModelError, OutputError
from filterfold.surgery.weights import Weights
from filterfold.zoo import Expected, build

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, end: Callable[[Tensor], Tensor] = torch.abs) -> None:
        super().__init__()
        self.end = end
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.body(x).mean((2, 3)))


def small(model: nn.Module) -> tuple[nn.Module, ff.Plan]:
    return model, ff.prune(model, X[:1], criterion="l1", keep=0.5, verify=False).plan


def saved(folder: Path, **options: Any) -> nn.Module:
    model, plan = small(build("vgg_small", classes=5))
    arguments = {"classes": 5}
    ff.save_pretrained(model, folder, "vgg_small", X[:1], arguments=arguments, plan=plan, **options)
    return model.eval()


def test_the_folder_is_one_checkpoint_its_config_and_its_card(tmp_path: Path) -> None:
    card = ff.Card(
        license="apache-2.0", base_model="user/big", figures={"Top-1, %": (69.8, "69.1 ± 0.2")}, text="For toys: #1.",
        expects=Expected((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 32),
    )  # fmt: skip
    model = saved(tmp_path / "small", card=card)
    again = ff.from_pretrained(tmp_path / "small")
    assert not again.training
    assert torch.equal(again(X), model(X))
    assert torch.equal(
        ff.load(tmp_path / "small" / "model.safetensors", lambda: build("vgg_small")).eval()(X), model(X)
    )

    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert (config["factory"], config["arguments"]) == ("vgg_small", {"classes": 5})
    assert ff.Plan.from_json(json.dumps(config["plans"][0])).widths["features.0"] == (32, 16)
    assert config["input"] == {"mean": [0.5] * 3, "std": [0.25] * 3, "image_size": 32}
    assert noted_input(Weights.read(tmp_path / "small" / "model.safetensors")) == config["input"]

    repocard = pytest.importorskip("huggingface_hub").ModelCard.load(tmp_path / "small" / "README.md")
    assert (repocard.data.license, repocard.data.base_model) == ("apache-2.0", "user/big")
    assert (repocard.data.library_name, repocard.data.tags) == ("filterfold", ["filterfold", "pruning"])
    weights = load_file(tmp_path / "small" / "model.safetensors")
    parameters = sum(tensor.numel() for name, tensor in weights.items() if name.endswith(("weight", "bias")))
    assert f"| {parameters:,} |" in repocard.text
    assert "| Top-1, % | 69.8 | 69.1 ± 0.2 |" in repocard.text
    assert "For toys: #1." in repocard.text
    assert 'network = ff.from_pretrained("small")' in repocard.text


def test_a_network_of_ones_own_needs_its_factory(tmp_path: Path) -> None:
    model, plan = small(Net())
    ff.save_pretrained(model, tmp_path, Net, X, plan=[plan])
    with pytest.raises(CheckpointError, match="its code is in no library: give the factory"):
        ff.from_pretrained(tmp_path)
    again = ff.from_pretrained(tmp_path, Net)
    assert torch.equal(again(X), model.eval()(X))
    assert ", your_factory)" in (tmp_path / "README.md").read_text()
    assert "license" in (tmp_path / "README.md").read_text().split("---")[1]


def test_children_of_one_network_are_saved_alike(tmp_path: Path) -> None:
    model = build("vgg_small", classes=5)
    for child in ff.shrink(model, X[:1], macs=[0.6, 0.3], calibration=[X], criterion="l1", remedy=None):
        folder, arguments = tmp_path / f"{child.share}", {"classes": 5}
        ff.save_pretrained(child.network, folder, "vgg_small", X[:1], arguments=arguments, plan=child.plan)
        assert torch.equal(ff.from_pretrained(folder)(X), child.network.eval()(X))


@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:squeezenet1_1"])
def test_a_network_of_a_library_comes_back_as_its_own_class(tmp_path: Path, name: str) -> None:
    pytest.importorskip(name.split(":")[0])
    model, plan = small(build(name, classes=7))
    ff.save_pretrained(model.half(), tmp_path, name, X.half(), arguments={"classes": 7}, plan=plan)
    again = ff.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert [tuple(p.shape) for p in again.parameters()] == [tuple(p.shape) for p in model.parameters()]
    assert again.num_classes == 7
    assert torch.equal(again(X.half()), model.eval()(X.half()))


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        (Net, None, "give its number of classes"),
        (lambda: build("vgg_small", classes=5, width=0.5, channels=1), None, "expected"),
        (lambda: 3, None, "returned a int, not a module"),
        ("vgg_small", None, "arguments={'classes': 5}"),
        ("vgg_small", {"classes": "5"}, "its arguments are numbers"),
        ("vgg_small", {"depth": 5}, "its arguments are numbers"),
        ("test_pretrained.py:Net", None, "give the factory itself"),
        ("os:getcwd", None, "give the factory itself"),
        ("resnet21", None, "give the factory itself"),
        (Net, {"classes": 5}, "a callable has its own"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, factory: Any, arguments: Any, message: str) -> None:
    model, plan = small(build("vgg_small", classes=5))
    with pytest.raises(FilterfoldError) as caught:
        ff.save_pretrained(model, tmp_path / "new", factory, X, arguments=arguments, plan=plan)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_the_same_weights_in_another_network_are_refused(tmp_path: Path) -> None:
    model, _ = small(Net())
    with pytest.raises(CheckpointError, match="builds another network: with the same weights its outputs are off by"):
        ff.save_pretrained(model, tmp_path, lambda: Net(torch.exp), X)


@pytest.mark.parametrize("factory", ["{file}:run", "timm:{file}:run", "evil:run", 3, {"a": 1}, "timm:hf-hub:a/b"])
def test_a_config_names_no_code(tmp_path: Path, factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "small")
    (tmp_path / "evil.py").write_text("import pathlib; pathlib.Path('ran').touch()\ndef run(): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    config["factory"] = factory.format(file=tmp_path / "evil.py") if isinstance(factory, str) else factory
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        ff.from_pretrained("small")
    assert not (tmp_path / "ran").exists()


def test_a_damaged_folder_is_one_line(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            ff.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)

    refused("config.json: can't be read")
    saved(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    refused("not of a network that save_pretrained")
    (tmp_path / "config.json").write_text(re.sub(r'"plans": .*\n', '"plans": []\n', config))
    refused("are of two networks")
    (tmp_path / "config.json").write_text(re.sub(r'"plans": .*\n', '"plans": [3]\n', config))
    refused("damaged plans")
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:999])
    refused("model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    refused("no such file")
    for name in ("./nowhere", "/no/where", "a/b/c", "nowhere"):
        with pytest.raises(CheckpointError, match="no such folder, and no network's id"):
            ff.from_pretrained(name)


# --- the hub -------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that creating a repository, a commit and a download ask for."""

    repositories: dict[str, dict[str, bytes]]
    asked: list[str]
    private: list[bool]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        self.asked.append(f"POST {self.path}")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.repositories.setdefault(name, {})
            self.private.append(asked.get("visibility") == "private" or asked.get("private", False))
            self.answer({"url": self.url(name)})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.repositories[found[1]][value["path"]] = base64.b64decode(value["content"])
            self.answer(
                {"success": True, "commitOid": "c" * 40, "commitUrl": self.url(f"{found[1]}/commit/{'c' * 40}")}
            )
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/(.+)/tree/.+", path):
            files = self.repositories[found[1]]
            self.answer(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": self.tag(data)}
                    for name, data in files.items()
                ]
            )
        elif (found := re.fullmatch(r"/api/models/(.+)/revision/.+", path)) and found[1] in self.repositories:
            files = [{"rfilename": name} for name in self.repositories[found[1]]]
            self.answer(
                {"id": found[1], "sha": "c" * 40, "siblings": files, "private": False, "downloads": 0, "tags": []}
            )
        elif found := re.fullmatch(r"/(.+)/resolve/[^/]+/(.+)", path):
            data = self.repositories[found[1]][found[2]]
            self.send(data, {"ETag": f'"{self.tag(data)}"', "X-Repo-Commit": "c" * 40})
        else:
            self.send_error(404)

    def tag(self, data: bytes) -> str:
        return hashlib.sha1(data, usedforsecurity=False).hexdigest()

    def url(self, path: str) -> str:
        return f"http://{self.headers['Host']}/{path}"

    def answer(self, value: Any) -> None:
        self.send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    """A server on this machine that the hub's client takes for the hub."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    own = type("Own", (Hub,), {"repositories": {}, "asked": [], "private": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), own) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "none")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield own
        server.shutdown()
        thread.join()


def test_what_is_pushed_comes_back_from_the_hub(hub: type[Hub], tmp_path: Path) -> None:
    model = saved(tmp_path / "small")
    (tmp_path / "small" / "notes.txt").write_text("not for the hub")
    address = ff.push_to_hub(tmp_path / "small", "user/small-vgg", private=True)
    assert address.endswith("/user/small-vgg/commit/" + "c" * 40)
    assert hub.private == [True]
    (repository,) = hub.repositories.values()
    assert sorted(repository) == ["README.md", "config.json", "model.safetensors"]
    assert repository["model.safetensors"] == (tmp_path / "small" / "model.safetensors").read_bytes()
    assert b'ff.from_pretrained("user/small-vgg")' in repository["README.md"]
    assert 'ff.from_pretrained("small")' in (tmp_path / "small" / "README.md").read_text()

    hub.asked.clear()
    assert torch.equal(ff.from_pretrained("user/small-vgg")(X), model(X))
    assert not [line for line in hub.asked if "README" in line]
    hub.repositories.clear()
    assert torch.equal(ff.from_pretrained("user/small-vgg", revision="c" * 40)(X), model(X))  # from the client's cache
    for name in ("user/other", "user/small-vgg@"):
        with pytest.raises(CheckpointError, match=r"^user/") as caught:
            ff.from_pretrained(name)
        assert "\n" not in str(caught.value)


def test_without_a_network_it_is_one_line(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    saved(tmp_path / "small")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=r"^user/x: no folder here, and can't be had from the hub \(.*\); is there"
    ) as had:
        ff.from_pretrained("user/x")
    with pytest.raises(
        OutputError, match=r"^user/x: can't be pushed \(.*\); is there a network, and a token\?$"
    ) as put:
        ff.push_to_hub(tmp_path / "small", "user/x")
    assert "\n" not in f"{had.value}{put.value}"
    assert hub.asked == []
    (tmp_path / "small" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="can't be read"):
        ff.push_to_hub(tmp_path / "small", "user/x")


def test_without_the_client_local_folders_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    saved(tmp_path)
    ff.from_pretrained(tmp_path)
    needs = r"needs huggingface_hub: pip install 'filterfold\[hub\]'$"
    with pytest.raises(ModelError, match=needs):
        ff.push_to_hub(tmp_path, "user/x")
    with pytest.raises(ModelError, match=needs):
        ff.from_pretrained("user/x")
