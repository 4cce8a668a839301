"""Where models are found, and AutoModel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import astrai_rs
from astrai_rs.model import AutoModel, Transformer, resolve
from conftest import LIMIT, python


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def test_local_paths(folder, tmp_path):
    assert resolve(folder) == folder
    assert resolve(str(folder)) == folder
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert resolve(file) == file


def test_a_folder_of_gguf_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither config.json nor a GGUF file"):
        resolve(tmp_path)
    (tmp_path / "a-Q4_0.gguf").touch()
    assert resolve(tmp_path).name == "a-Q4_0.gguf"
    (tmp_path / "a-Q8_0.gguf").touch()
    with pytest.raises(ValueError, match="several GGUF files, name one of them: a-Q4_0.gguf, a-Q8_0.gguf"):
        resolve(tmp_path)


@pytest.mark.parametrize("name", ["/no/such", "./no-such", "missing.gguf", "owner/missing.gguf", "a b", "x"])
def test_missing_paths(name):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        resolve(name)


class Hub:
    """Stands in for huggingface_hub.snapshot_download."""

    def __init__(self, folder: Path, *files: str, error: Exception | None = None) -> None:
        self.folder, self.error, self.calls = folder, error, []
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")

    def __call__(self, repository, **options):
        self.calls.append((repository, options))
        if self.error:
            raise self.error
        return str(self.folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub

    def make(*files, error=None):
        stub = Hub(tmp_path, *files, error=error)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", stub)
        return stub

    return make


def test_hub_folder(hub, tmp_path):
    stub = hub("config.json", "model.safetensors")
    assert resolve("owner/name") == tmp_path
    repository, options = stub.calls[0]
    assert repository == "owner/name"
    assert "*.safetensors" in options["allow_patterns"]
    resolve("owner/name", tokenizer_only=True)
    assert "*.safetensors" not in stub.calls[1][1]["allow_patterns"]


def test_hub_gguf(hub, tmp_path):
    stub = hub("m-Q4_K_M.gguf")
    assert resolve("owner/name:q4_k_m") == tmp_path / "m-Q4_K_M.gguf"
    assert "*Q4_K_M*.gguf" in stub.calls[0][1]["allow_patterns"]
    with pytest.raises(FileNotFoundError, match="no GGUF file with 'Q8_0'"):
        resolve("owner/name:Q8_0")


def test_hub_gguf_without_a_name(hub):
    hub("README.json")
    with pytest.raises(ValueError, match="add its name: owner/name:Q4_K_M"):
        resolve("owner/name")


def test_offline(hub):
    from huggingface_hub.errors import LocalEntryNotFoundError

    hub(error=LocalEntryNotFoundError("offline"))
    with pytest.raises(FileNotFoundError, match="not in the local cache, and the hub cannot be reached"):
        resolve("owner/name")


def test_importing_is_cheap():
    heavy = ("jinja2", "tokenizers", "huggingface_hub", "asyncio")
    code = f"import sys, astrai_rs; print([m for m in {heavy} if m in sys.modules])"
    with python("-c", code) as process:
        assert process.communicate(timeout=LIMIT) == ("[]\n", "")


def test_public_names():
    for name in astrai_rs.__all__:
        assert getattr(astrai_rs, name).__doc__, name
    assert set(astrai_rs.__all__) <= set(dir(astrai_rs))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        astrai_rs.nothing  # noqa: B018


@pytest.fixture
def checkpoint(folder) -> Path:
    (folder / "config.json").write_text('{"model_type": "transformer", "dim": 4}')
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("not copied")
    return folder


def test_auto_model(checkpoint, tmp_path):
    model = AutoModel.from_pretrained(checkpoint)
    assert isinstance(model, Transformer)
    assert model.config["dim"] == 4
    assert model.to("cpu").device == "cpu"
    assert model.dtype == "float32"
    assert model.to("cuda", "torch.bfloat16").dtype == "bfloat16"
    model.save_pretrained(tmp_path / "copy")
    names = sorted(file.name for file in (tmp_path / "copy").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert AutoModel.from_pretrained(tmp_path / "copy").config == model.config
    model.save_pretrained(checkpoint)
    assert (checkpoint / "model.safetensors").read_bytes() == b"weights"


def test_auto_model_of_a_gguf_file(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    model = AutoModel.from_pretrained(tmp_path / "m.gguf")
    model.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy/m.gguf").read_bytes() == b"GGUF"


def test_register(checkpoint, monkeypatch):
    monkeypatch.setattr(AutoModel, "_registry", dict(AutoModel._registry))

    @AutoModel.register("my_model")
    class Mine(AutoModel): ...

    (checkpoint / "config.json").write_text(json.dumps({"model_type": "My_Model"}))
    assert type(AutoModel.from_pretrained(checkpoint)) is Mine
    assert AutoModel.get_model_class("my_model") is Mine
    assert AutoModel.get_model_class("transformer") is Transformer


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: AutoModel.from_pretrained(p, strict=False), ValueError, "strict=False is not supported"),
        (
            lambda p: AutoModel.from_pretrained(p, False),
            ValueError,
            "disable_random_init=False is not supported",
        ),
        (lambda p: AutoModel.from_pretrained(p, weights_format="hf"), ValueError, "weights_format='hf'"),
        (lambda p: Transformer.from_pretrained(p), ValueError, "call AutoModel.from_pretrained"),
        (lambda p: AutoModel.get_model_class("none"), ValueError, "Unknown model_type: 'none'"),
        (lambda p: AutoModel.register("x")(int), TypeError, "int must be a subclass of AutoModel"),
        (lambda p: AutoModel.from_pretrained(p).to(3), ValueError, "to takes a device"),
        (lambda p: AutoModel.from_pretrained(p / "none"), FileNotFoundError, "none: no such file"),
    ],
)
def test_refusals(checkpoint, call, error, message):
    with pytest.raises(error, match=message):
        call(checkpoint)


def test_broken_config(checkpoint):
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        AutoModel.from_pretrained(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="Config file not found"):
        AutoModel.from_pretrained(checkpoint)
