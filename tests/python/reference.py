"""An independent reference in numpy, float64: a Llama forward pass, and sampling as vLLM documents it."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
GOLDEN = Path(__file__).parent.parent / "fixtures" / "golden"


def read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """Tensors of a safetensors file (F32, BF16 and I64 only)."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        data = raw[8 + size + begin : 8 + size + end]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(data, {"F32": np.float32, "I64": np.int64}[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"])
    return tensors


class Llama:
    """A plain Llama decoder: the whole sequence at once, no cache."""

    def __init__(self, name: str = "llama") -> None:
        self.config = json.loads((GOLDEN / name / "config.json").read_text())
        stored = read_safetensors(GOLDEN / name / "model.safetensors")
        self.weights = {key: value.astype(np.float64) for key, value in stored.items()}
        self.cache: dict[tuple[int, ...], Array] = {}

    def logits(self, ids: Sequence[int]) -> Array:
        """Raw logits ``[vocab]`` after the last of ``ids``."""
        key = tuple(ids)
        if key not in self.cache:
            self.cache[key] = self._forward(key)
        return self.cache[key]

    def _norm(self, x: Array, name: str) -> Array:
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return x / scale * self.weights[name]

    def _rotate(self, x: Array) -> Array:
        half = x.shape[-1] // 2
        theta = self.config["rope_parameters"]["rope_theta"]
        angles = np.arange(x.shape[0])[:, None] * theta ** (-np.arange(half) / half)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    def _attention(self, x: Array, prefix: str) -> Array:
        heads, kv_heads, dim = (
            self.config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim")
        )
        q, k, v = (x @ self.weights[f"{prefix}.{p}_proj.weight"].T for p in "qkv")
        q = self._rotate(q.reshape(-1, heads, dim))
        k = self._rotate(k.reshape(-1, kv_heads, dim)).repeat(heads // kv_heads, 1)
        v = v.reshape(-1, kv_heads, dim).repeat(heads // kv_heads, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim)
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out: Array = np.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1)
        return out @ self.weights[f"{prefix}.o_proj.weight"].T

    def _mlp(self, x: Array, prefix: str) -> Array:
        gate, up = (x @ self.weights[f"{prefix}.{p}_proj.weight"].T for p in ("gate", "up"))
        out: Array = (gate / (1 + np.exp(-gate)) * up) @ self.weights[f"{prefix}.down_proj.weight"].T
        return out

    def _forward(self, ids: tuple[int, ...]) -> Array:
        x = self.weights["model.embed_tokens.weight"][list(ids)]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x = x + self._attention(self._norm(x, f"{name}.input_layernorm.weight"), f"{name}.self_attn")
            x = x + self._mlp(self._norm(x, f"{name}.post_attention_layernorm.weight"), f"{name}.mlp")
        out: Array = self._norm(x, "model.norm.weight")[-1] @ self.weights["lm_head.weight"].T
        return out


@dataclass
class Filters:
    """The fields of ``SamplingParams`` that shape the distribution."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: list[int] | None = None
    forbidden: list[int] = field(default_factory=list)

    def penalised(self, logits: Array, prompt: Sequence[int], output: Sequence[int]) -> Array:
        """Bias and masks, then the penalties, as vLLM documents them."""
        logits = logits.copy()
        for token, bias in self.logit_bias.items():
            logits[token] += bias
        if self.allowed_token_ids is not None:
            logits[np.setdiff1d(np.arange(len(logits)), self.allowed_token_ids)] = -np.inf
        logits[self.forbidden] = -np.inf
        seen = np.unique([*prompt, *output]).astype(int)
        repeated = logits[seen]
        logits[seen] = np.where(
            repeated > 0, repeated / self.repetition_penalty, repeated * self.repetition_penalty
        )
        counts = np.bincount(np.asarray(output, dtype=int), minlength=len(logits))
        return logits - self.frequency_penalty * counts - self.presence_penalty * (counts > 0)

    def probabilities(self, logits: Array, prompt: Sequence[int] = (), output: Sequence[int] = ()) -> Array:
        """The distribution that the next token is drawn from, ``[vocab]``."""
        logits = self.penalised(logits, prompt, output) / self.temperature
        probs = softmax(logits)
        logits = np.where(probs < self.min_p * probs.max(), -np.inf, logits)
        if self.top_k > 0:
            threshold = np.sort(logits)[::-1][min(self.top_k, len(logits)) - 1]
            logits = np.where(logits < threshold, -np.inf, logits)
        if self.top_p < 1:
            probs = softmax(logits)
            order = np.argsort(-probs, kind="stable")
            before = np.cumsum(probs[order]) - probs[order]
            logits[order[before >= self.top_p]] = -np.inf
        return softmax(logits)


def softmax(logits: Array) -> Array:
    """Probabilities of ``logits``; minus infinity is zero."""
    weights: Array = np.exp(logits - logits.max())
    return weights / weights.sum()


def log_softmax(logits: Array) -> Array:
    """Natural logarithms of the probabilities."""
    shifted = logits - logits.max()
    out: Array = shifted - np.log(np.exp(shifted).sum())
    return out


def chi_square_fits(observed: Sequence[int], probabilities: Array, alpha: float = 1e-4) -> bool:
    """Whether draws follow ``probabilities`` (bins expected below 5 are merged; Wilson-Hilferty quantile)."""
    counts = np.bincount(np.asarray(observed), minlength=len(probabilities)).astype(float)
    if counts[probabilities == 0].any():
        return False
    expected = probabilities * len(observed)
    small = expected < 5
    expected = np.append(expected[~small], expected[small].sum())
    counts = np.append(counts[~small], counts[small].sum())
    keep = expected > 0
    statistic = ((counts[keep] - expected[keep]) ** 2 / expected[keep]).sum()
    freedom = max(int(keep.sum()) - 1, 1)
    normal = {1e-4: 3.719}[alpha]
    limit = freedom * (1 - 2 / (9 * freedom) + normal * np.sqrt(2 / (9 * freedom))) ** 3
    return bool(statistic <= max(limit, 15.2))
