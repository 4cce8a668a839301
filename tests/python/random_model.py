"""A Llama with random weights and SmolLM2's vocabulary: no sense, but every token, and no time."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

CONFIG = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": 2,
}


def write_random_model(folder: Path) -> None:
    """`config.json` and `model.safetensors`; the same weights every time."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    rng = np.random.default_rng(0)
    header, data, offset = {}, [], 0
    for name, shape in _shapes().items():
        scale = 0.6 if len(shape) == 2 else 0.0
        tensor = (scale * rng.standard_normal(shape) + (scale == 0)).astype(np.float32)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + tensor.nbytes]}
        data.append(tensor.tobytes())
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))


def _shapes() -> dict[str, list[int]]:
    hidden, inner, kv = 32, 64, 16
    shapes = {"model.embed_tokens.weight": [CONFIG["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for layer in range(2):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": [hidden],
                "post_attention_layernorm": [hidden],
                "self_attn.q_proj": [hidden, hidden],
                "self_attn.k_proj": [kv, hidden],
                "self_attn.v_proj": [kv, hidden],
                "self_attn.o_proj": [hidden, hidden],
                "mlp.gate_proj": [inner, hidden],
                "mlp.up_proj": [inner, hidden],
                "mlp.down_proj": [hidden, inner],
            }.items()
        }
    return shapes
