"""Writes checkpoints of random weights, of any size, in seconds."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_NOISE_LEN = 1 << 22


@dataclass(frozen=True)
class Shape:
    """Of a decoder in the layout of Llama, embedding and last layer not tied."""

    vocab: int
    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    max_positions: int = 32768

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.ffn

    @property
    def step_weights(self) -> int:
        """Numbers that every decode step reads: all but the embedding."""
        return self.layers * self.layer_weights + self.vocab * self.hidden

    @property
    def kv_bytes_per_token(self) -> int:
        """Of a bf16 cache."""
        return self.layers * 2 * self.kv_heads * self.head_dim * 2


ASTRAI_1B = Shape(vocab=100_000, hidden=1536, layers=24, ffn=6912, heads=24, kv_heads=4)
TINY = Shape(vocab=512, hidden=64, layers=2, ffn=96, heads=4, kv_heads=2, max_positions=1024)


def write_model(folder: Path, shape: Shape, seed: int = 0) -> None:
    """A bf16 Llama checkpoint that transformers loads too; no tokenizer.

    Norm weights are 1; all others have mean 0 and a standard deviation of `0.7 / sqrt(columns)`, so that the
    numbers stay near 1 from layer to layer.
    """
    noise = np.random.default_rng(seed).standard_normal(_NOISE_LEN, dtype=np.float32)
    tensors = _tensors(shape)
    header, end = {}, 0
    for name, dims in tensors.items():
        begin, end = end, end + 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, dims in enumerate(tensors.values()):
            if len(dims) == 1:
                file.write(_bf16(np.ones(dims[0], np.float32)))
            else:
                scaled = _bf16(np.roll(noise, index * 7919) * np.float32(0.7 / dims[1] ** 0.5))
                for begin in range(0, 2 * dims[0] * dims[1], len(scaled)):
                    file.write(scaled[: 2 * dims[0] * dims[1] - begin])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))


def _tensors(shape: Shape) -> dict[str, list[int]]:
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors = {"model.embed_tokens.weight": [shape.vocab, shape.hidden]}
    for layer in range(shape.layers):
        for name, dims in {
            "input_layernorm": [shape.hidden],
            "self_attn.q_proj": [q, shape.hidden],
            "self_attn.k_proj": [kv, shape.hidden],
            "self_attn.v_proj": [kv, shape.hidden],
            "self_attn.o_proj": [shape.hidden, q],
            "post_attention_layernorm": [shape.hidden],
            "mlp.gate_proj": [shape.ffn, shape.hidden],
            "mlp.up_proj": [shape.ffn, shape.hidden],
            "mlp.down_proj": [shape.hidden, shape.ffn],
        }.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = dims
    tensors["model.norm.weight"] = [shape.hidden]
    tensors["lm_head.weight"] = [shape.vocab, shape.hidden]
    return tensors


def _bf16(numbers: np.ndarray) -> memoryview:
    """The upper halves of f32 numbers, as bytes."""
    return (numbers.view(np.uint32) >> 16).astype("<u2").data.cast("B")
