"""Tokenizers from GGUF metadata: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).

A GGUF file has vocabulary, merges or scores, and the *name* of its pre-tokenizer. `_SPLITS` says what the
names mean; llama.cpp defines them. A name that is not known here is refused: a near miss would give wrong ids
silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from astrai_rs._core import CheckpointError, merge_pairs

if TYPE_CHECKING:
    import tokenizers

_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6
"""Values of `tokenizer.ggml.token_type`."""

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN2 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN35 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_TEKKEN = _CASED % ("", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
_GPT4O = _CASED % (_ENGLISH + "?", _ENGLISH + "?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES
)

_SPLITS: dict[str, tuple[str, ...]] = {
    # Name → regular expressions applied one after the other; each match becomes a piece of its own.
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "qwen35": (_QWEN35,),
    "tekken": (_TEKKEN,),
    "gpt-4o": (_GPT4O,),
    "glm4": (_LLAMA3,),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3),
}
_ALIASES = {
    "llama-bpe": (
        "llama3",
        "llama-v3",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "lfm2",
        "dbrx",
        "smaug-bpe",
    ),
    "qwen2": ("deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "solar-open", "kormo"),
    "gpt-2": ("phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "roberta-bpe", "modern-bert"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "gpt-4o": ("llama4",),
    "glm4": ("glm5",),
}
_SPLITS |= {alias: _SPLITS[name] for name, aliases in _ALIASES.items() for alias in aliases}

_WHOLE_WORDS = {
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "tekken",
}
"""Names whose tokenizers take a word that is in the vocabulary before they look at merges."""

_ADD_BOS = {
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "tekken",
}
"""Names that put the begin token first when the file does not say."""


def build(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of a GGUF file from its metadata (`_core.gguf_metadata`).

    Raises:
        ValueError: a needed key is missing or inconsistent.
        NotImplementedError: the model or pre-tokenizer is not known; the message names it.
    """
    model = _get(metadata, "model")
    if model == "gpt2":
        tokenizer, add_bos = _byte_level(metadata)
    elif model == "llama":
        tokenizer, add_bos = _sentencepiece(metadata), True
    else:
        raise NotImplementedError(f"GGUF tokenizer model {model!r} is not supported (known: 'gpt2', 'llama')")
    _add_special(tokenizer, metadata)
    _add_ends(tokenizer, metadata, add_bos=add_bos)
    return tokenizer


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """`{"bos_token": text, …}` of the special tokens that the file names by id."""
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None and 0 <= i < len(tokens)}


def stop_ids(metadata: Mapping[str, Any]) -> list[int]:
    """End of text, of turn and of message, as far as the file names them."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(int(metadata[key]) for key in keys if metadata.get(key) is not None))


def _get(metadata: Mapping[str, Any], name: str) -> Any:
    key = f"tokenizer.ggml.{name}"
    if key not in metadata:
        raise CheckpointError(f"the GGUF file has no {key}; it was written without a tokenizer")
    return metadata[key]


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Token → id. A token that is not UTF-8 gets a unique stand-in: no text can contain it."""
    tokens = _get(metadata, "tokens")
    vocabulary: dict[str, int] = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(vocabulary) == len(tokens) and set(map(type, tokens)) <= {str}:
        return vocabulary
    vocabulary = {}
    for i, token in enumerate(tokens):
        text = token if isinstance(token, str) else f"\0bytes:{token.hex()}"
        vocabulary[text if text not in vocabulary else f"\0duplicate:{i}"] = i
    return vocabulary


def _byte_level(metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _SPLITS:
        raise NotImplementedError(
            f"GGUF pre-tokenizer {pre!r} is not supported (known: {', '.join(_SPLITS)})"
        )
    merges = merge_pairs(_get(metadata, "merges"))
    bpe = models.BPE(vocab=_vocabulary(metadata), merges=merges, ignore_merges=pre in _WHOLE_WORDS)
    tokenizer = Tokenizer(bpe)
    steps: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated") for split in _SPLITS[pre]]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre in _ADD_BOS


def _sentencepiece(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = _vocabulary(metadata)
    types = metadata.get("tokenizer.ggml.token_type")
    bpe = models.BPE(
        vocab=vocabulary,
        merges=_merges_from_scores(vocabulary, _get(metadata, "scores"), types),
        unk_token=special_tokens(metadata).get("unk_token"),
        fuse_unk=True,
        byte_fallback=types is None or _BYTE in types,
    )
    tokenizer = Tokenizer(bpe)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    decoding: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def _merges_from_scores(
    vocabulary: Mapping[str, int], scores: list[float], types: list[int] | None
) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose union scores best, so a union's rank is the rank of its score."""
    mergeable = {
        text: scores[i]
        for text, i in vocabulary.items()
        if types is None or types[i] not in (_CONTROL, _BYTE)
    }
    ranked = []
    for text, score in mergeable.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((-score, vocabulary[left], vocabulary[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _add_special(tokenizer: tokenizers.Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Control tokens are special, user-defined ones are found whole in text but are not special."""
    from tokenizers import AddedToken

    tokens = _get(metadata, "tokens")
    types = (metadata.get("tokenizer.ggml.token_type") or [])[: len(tokens)]
    named = [tokens.index(token) for token in special_tokens(metadata).values()]
    control = [i for i, kind in enumerate(types) if kind == _CONTROL]
    special = [tokens[i] for i in sorted({*control, *named})]
    plain = [tokens[i] for i, kind in enumerate(types) if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special if t])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain if t])


def _add_ends(tokenizer: tokenizers.Tokenizer, metadata: Mapping[str, Any], *, add_bos: bool) -> None:
    """Put begin and end tokens around encoded text where the file asks for it."""
    from tokenizers import processors

    names = special_tokens(metadata)
    bos = names.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", add_bos) else None
    eos = names.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    ends = [token for token in (bos, eos) if token is not None]
    if not ends:
        return
    single = [token for token in (bos, "$A", eos) if token is not None]
    ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(ends)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
