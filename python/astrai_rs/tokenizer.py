"""Text to ids and back: `AutoTokenizer` over a folder, a tokenizer.json or a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from astrai_rs import gguf_tokenizer
from astrai_rs._core import CheckpointError
from astrai_rs.chat_template import ChatTemplate
from astrai_rs.control_tokens import mark_control_tokens
from astrai_rs.model import read_json, resolve

if TYPE_CHECKING:
    import tokenizers


_LONG_TEXT = 10_000
"""Characters that take about a millisecond to encode."""


class AutoTokenizer:
    """A model's tokenizer, special tokens, stop ids and chat template.

    >>> tokenizer = AutoTokenizer.from_pretrained("path/to/model")           # doctest: +SKIP
    >>> tokenizer.decode(tokenizer.encode("Hello"))                          # doctest: +SKIP
    'Hello'

    Special tokens are also attributes, as in AstrAI: `tokenizer.eos`, `tokenizer.eos_id`,
    `tokenizer.pad_token_id`; an `…_id` that the model does not have is None.

    Args:
        backend: the `tokenizers.Tokenizer`; truncation and padding are switched off.
        special_tokens: name → literal, `{"eos_token": "</s>", …}`.
        stop_ids: the ids that end a generation.
        chat_template: Jinja text, `{name: text}`, or None.
        astrai: an AstrAI folder: its chat templates are plain Jinja (no block trimming) and the rendered text
            is encoded with special tokens, as AstrAI does.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        stop_ids: Sequence[int] = (),
        chat_template: str | Mapping[str, str] | ChatTemplate | None = None,
        astrai: bool = False,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special = dict(special_tokens or {})
        self._astrai = astrai
        self._texts: dict[int, str] = {}
        self.stop_ids = list(stop_ids)
        """Ids that end a generation: the union of all eos ids of config, generation config and tokenizer."""
        self.chat_template: ChatTemplate | None = None
        if chat_template is not None:
            self.set_chat_template(chat_template)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> AutoTokenizer:
        """Read the tokenizer of a model folder, a GGUF file, or a model of the hub.

        Raises:
            FileNotFoundError: there is no such folder, or no tokenizer in it.
            NotImplementedError: a kind of tokenizer that is not supported; the message names it.
            CheckpointError: a file is damaged; the message names it.
        """
        path = resolve(path, tokenizer_only=True)
        return cls.from_gguf(path) if path.suffix == ".gguf" else cls._from_folder(path)

    @classmethod
    def from_gguf(cls, path: str | Path) -> AutoTokenizer:
        """The tokenizer inside a GGUF file."""
        from astrai_rs import _core

        metadata = _core.gguf_metadata(str(path))
        try:
            backend = gguf_tokenizer.build(metadata)
        except (CheckpointError, NotImplementedError) as error:
            raise type(error)(f"{path}: {error}") from error
        templates = {"default": metadata.get("tokenizer.chat_template")}
        for name in metadata.get("tokenizer.chat_templates", ()):
            templates[name] = metadata.get(f"tokenizer.chat_template.{name}")
        found = {name: text for name, text in templates.items() if text}
        return cls(
            backend,
            special_tokens=gguf_tokenizer.special_tokens(metadata),
            stop_ids=gguf_tokenizer.stop_ids(metadata),
            chat_template=_single(found),
        )

    @classmethod
    def _from_folder(cls, folder: Path) -> AutoTokenizer:
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        if not file.is_file():
            if (other := folder / "tokenizer.model").exists():
                raise NotImplementedError(f"{other}: only tokenizer.json and GGUF tokenizers are supported")
            raise FileNotFoundError(f"{file}: no such file; the folder has no tokenizer")
        try:
            backend = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file}: {error}") from error
        config = read_json(folder / "tokenizer_config.json")
        special = _special_tokens(folder, config)
        _add_missing(backend, config, special)
        return cls(
            backend,
            special_tokens=special,
            stop_ids=_stop_ids(folder, backend, config, special),
            chat_template=_chat_template(folder, config),
            astrai=_is_astrai(config),
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and, in `generation_config.json`, the stop ids;
        `from_pretrained` reads the same from them."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = {"special_tokens": self._special} if self._astrai else dict(self._special)
        if self.chat_template is not None:
            source = self.chat_template.source
            named = (
                [{"name": n, "template": t} for n, t in source.items()]
                if isinstance(source, dict)
                else source
            )
            config["chat_template"] = named
        generation = {**read_json(folder / "generation_config.json"), "eos_token_id": self.stop_ids}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    @overload
    def encode(
        self, text: str, add_special_tokens: bool = ..., *, out_ids: Literal[True] = ...
    ) -> list[int]: ...
    @overload
    def encode(
        self, text: list[str], add_special_tokens: bool = ..., *, out_ids: Literal[True] = ...
    ) -> list[list[int]]: ...
    @overload
    def encode(
        self,
        text: str | list[str] | list[list[str]],
        add_special_tokens: bool = ...,
        *,
        out_ids: bool = ...,
        is_pretokenized: bool = ...,
    ) -> Any: ...
    def encode(
        self,
        text: str | list[str] | list[list[str]],
        add_special_tokens: bool = True,
        *,
        out_ids: bool = True,
        is_pretokenized: bool = False,
    ) -> Any:
        """Ids of a text; of a list of texts, a list of ids each, encoded as a batch on all cores.

        Args:
            add_special_tokens: what the tokenizer puts around text, such as a begin token.
            out_ids: False gives token strings in place of ids.
            is_pretokenized: each text is a list of words.

        Raises:
            TypeError: something else is given.
            ValueError: a text is not valid Unicode.
        """
        single = isinstance(text, str) or (is_pretokenized and bool(text) and isinstance(text[0], str))
        if not single and not isinstance(text, (list, tuple)):
            raise TypeError(f"encode takes a string or a list of strings, not {type(text).__name__}")
        texts: list[Any] = [text] if single else list(text)
        for item in texts:
            if not isinstance(item, (list, tuple) if is_pretokenized else str):
                raise TypeError(
                    f"encode takes a string or a list of strings; the list has {type(item).__name__}"
                )
        options: dict[str, Any] = {
            "add_special_tokens": add_special_tokens,
            "is_pretokenized": is_pretokenized,
        }
        try:
            if single and len(texts[0]) < _LONG_TEXT:
                encoded = [self._backend.encode(texts[0], **options)]
            else:  # unlike the other one without the GIL
                encoded = self._backend.encode_batch_fast(texts, **options)
        except TypeError as error:  # of the right types as checked above
            raise ValueError("the text holds half of a surrogate pair, which is no Unicode") from error
        out = [item.ids if out_ids else item.tokens for item in encoded]
        return out[0] if single else out

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids. Ids outside the vocabulary have no text; incomplete characters become U+FFFD."""
        try:
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except OverflowError:
            known = [token_id for token_id in ids if 0 <= token_id < self.vocab_size]
            return self._backend.decode(known, skip_special_tokens=skip_special_tokens)

    def id_to_text(self, token_id: int) -> str:
        """One token alone as text, special tokens included."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._backend.decode([token_id], skip_special_tokens=False)
        return text

    def token_to_id(self, token: str) -> int | None:
        """The id of a token given as it stands in the vocabulary."""
        return self._backend.token_to_id(token)

    def set_chat_template(self, template: str | Mapping[str, str] | ChatTemplate) -> None:
        """Use another chat template."""
        if not isinstance(template, ChatTemplate):
            named = {k: v for k, v in self._special.items() if k.endswith("_token")}
            template = ChatTemplate(template, named, trim=not self._astrai)
        self.chat_template = template

    def apply_chat_template(
        self,
        messages: Sequence[Any],
        tools: Sequence[Mapping[str, Any]] | str | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        *,
        system_prompt: str | None = None,
        chat_template: str | None = None,
        continue_final_message: bool | str = False,
        **kwargs: Any,
    ) -> Any:
        """The ids (or, with `tokenize=False`, the text) of a conversation; of a list of conversations, a
        list.

        Args:
            messages: dicts with `role` and `content`.
            tools: JSON schemas of functions. (A string here is AstrAI's `system_prompt`.)
            add_generation_prompt: end with the header of an assistant message; off with
                continue_final_message.
            system_prompt: put this system message first.
            chat_template: Jinja text to use instead of the model's, or the name of one of its templates.
            kwargs: variables for the template, such as `enable_thinking`.

        Raises:
            ValueError: the model has no chat template, or `ChatTemplate.render` refuses.
        """
        if isinstance(tools, str):
            tools, system_prompt = None, tools
        batch = bool(messages) and isinstance(messages[0], (list, tuple))
        texts = [
            self._render(
                conversation,
                tools,
                system_prompt,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                **kwargs,
            )
            for conversation in (messages if batch else [messages])
        ]
        out: list[Any] = texts
        if tokenize:
            out = self.encode(texts, add_special_tokens=self._astrai)
        return out if batch else out[0]

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        system_prompt: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        sanitize_control_tokens: bool = False,
        **kwargs: Any,
    ) -> tuple[str, list[int]]:
        """One conversation as text and as ids; arguments and errors as `apply_chat_template`.

        Args:
            sanitize_control_tokens: control tokens in messages and tools become the ids of plain text.
        """
        mark = None
        if sanitize_control_tokens:
            given = [list(messages), tools, system_prompt, kwargs]
            marked, mark = mark_control_tokens(given, self.control_token_ids)
            messages, tools, system_prompt, kwargs = marked
        text = self._render(
            messages,
            tools,
            system_prompt,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            **kwargs,
        )
        if mark is None:
            return text, self.encode(text, add_special_tokens=self._astrai)
        first, *rest = text.split(mark)
        parts = [self.encode(first, add_special_tokens=self._astrai), *self.encode(rest, False)]
        return text.replace(mark, ""), [token_id for part in parts for token_id in part]

    def _render(
        self,
        conversation: Any,
        tools: Sequence[Mapping[str, Any]] | None,
        system_prompt: str | None,
        *,
        chat_template: str | None = None,
        **options: Any,
    ) -> str:
        template = self._template(chat_template)
        if isinstance(conversation, (str, Mapping)):  # unpacking would hide what it is
            raise TypeError(f"messages must be a list of dicts, not {type(conversation).__name__}")
        first = [{"role": "system", "content": system_prompt}] if system_prompt else []
        return template.render([*first, *conversation], tools=tools, **options)

    def _template(self, choice: str | None) -> ChatTemplate:
        own = self.chat_template
        if choice is not None:
            named = own is not None and isinstance(own.source, dict) and own.source.get(choice)
            return ChatTemplate(named or choice, own.special_tokens if own else self._special)
        if own is None:
            raise ValueError(
                "the model has no chat template: pass text, or set one with tokenizer.set_chat_template(...)"
            )
        return own

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token's name: `n` ids hold no more than `n` times that."""
        return max(map(len, self._backend.get_vocab()), default=1)

    @cached_property
    def control_token_ids(self) -> dict[str, int]:
        """The special tokens, which no user's text should turn into: literal → id."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def eos_token_ids(self) -> list[int]:
        """The same as `stop_ids`."""
        return self.stop_ids

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end-of-text id, else the first of `stop_ids`."""
        named = self._special_id("eos")
        return named if named is not None else next(iter(self.stop_ids), None)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Name → literal."""
        return dict(self._special)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The `tokenizers.Tokenizer` below."""
        return self._backend

    def __getattr__(self, name: str) -> Any:
        # Only called for names that are not there: `tok.eos`, `tok.eos_token`, `tok.eos_id`,
        # `tok.eos_token_id`.
        if not name.startswith("_"):
            if (literal := self._special_token(name)) is not None:
                return literal
            if name.endswith("_id"):
                return self._special_id(name.removesuffix("_id"))
            if name in ("bos_token", "eos_token", "pad_token", "unk_token"):
                return None
        raise AttributeError(f"AutoTokenizer has no attribute {name!r}")

    def _special_token(self, name: str) -> str | None:
        short = name.removesuffix("_token")
        return self._special.get(name) or self._special.get(short) or self._special.get(f"{short}_token")

    def _special_id(self, name: str) -> int | None:
        token = self._special_token(name)
        return None if token is None else self._backend.token_to_id(token)


def _is_astrai(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("special_tokens"), dict)


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Name → literal; literals may be given as `{"content": …}`."""
    if _is_astrai(config):
        return {str(name): str(literal) for name, literal in config["special_tokens"].items()}
    if "added_tokens_decoder" not in config:  # the file of older repositories
        config = {**read_json(folder / "special_tokens_map.json"), **config}
    found = {}
    for name, value in config.items():
        literal = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(literal, str):
            found[name] = literal
    return found


def _add_missing(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]
) -> None:
    """Tokens that tokenizer_config.json adds to tokenizer.json, and special tokens that it only names."""
    from tokenizers import AddedToken

    decoder = config.get("added_tokens_decoder", {})
    if not _maps_ids_to_tokens(decoder):
        raise CheckpointError(
            f"tokenizer_config.json: added_tokens_decoder must map ids to tokens; given: {decoder!r:.100}"
        )
    for number, entry in sorted(decoder.items(), key=lambda item: int(item[0])):
        content = entry["content"]
        if backend.token_to_id(content) is not None:
            continue
        flags = {
            name: bool(entry.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "normalized")
        }
        token = AddedToken(content, special=bool(entry.get("special", False)), **flags)
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(content) != int(number):
            got = backend.token_to_id(content)
            raise CheckpointError(
                f"tokenizer_config.json puts {content!r} at id {number}, but tokenizer.json at {got}"
            )
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    named = [t for t in special.values() if t not in added and backend.token_to_id(t) is not None]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in named])


def _maps_ids_to_tokens(decoder: object) -> bool:
    return isinstance(decoder, dict) and all(
        number.isdigit() and isinstance(entry, dict) and isinstance(entry.get("content"), str)
        for number, entry in decoder.items()
    )


def model_stop_ids(path: Path) -> list[int]:
    """The end-of-text ids that a model's own files name, whatever tokenizer it is used with."""
    if path.is_file():
        from astrai_rs import _core

        return gguf_tokenizer.stop_ids(_core.gguf_metadata(str(path)))
    model = read_json(path / "config.json")
    inner = model.get("text_config") or {}
    if not isinstance(inner, dict):
        file = path / "config.json"
        raise CheckpointError(f"{file}: text_config must be an object; given: {inner!r:.100}")
    sources = (model, inner, read_json(path / "generation_config.json"))
    ids = [source.get("eos_token_id") for source in sources]
    flat = [i for item in ids for i in (item if isinstance(item, list) else [item])]
    return list(dict.fromkeys(i for i in flat if isinstance(i, int)))


def _stop_ids(
    folder: Path, backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]
) -> list[int]:
    """The union of all eos ids. In an AstrAI folder, the mapped tokens that end something.

    AstrAI itself stops on every mapped special token, also on begin and padding tokens, which no text ends
    with.
    """
    names = [name for name in special if name == "eos_token" or (_is_astrai(config) and _ends(name))]
    named = [backend.token_to_id(special[name]) for name in names]
    return list(dict.fromkeys([*model_stop_ids(folder), *(i for i in named if i is not None)]))


def _ends(name: str) -> bool:
    return any(part in ("eos", "end", "eot") for part in name.lower().split("_"))


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Template files win over tokenizer_config.json."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    found = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
    if found:
        return _single(found)
    source = config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    if source is None or isinstance(source, str):
        return source
    entries = source if isinstance(source, list) else [source]
    if not all(isinstance(e, dict) and isinstance(e.get("template"), str) and "name" in e for e in entries):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list of named "
            f"templates; given: {source!r:.100}"
        )
    return {str(entry["name"]): entry["template"] for entry in entries}


def _single(found: dict[str, str]) -> str | dict[str, str] | None:
    """One default template as its text, several as they are, none as None."""
    return found["default"] if list(found) == ["default"] else found or None
