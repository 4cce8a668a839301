"""GGUF metadata as Python objects."""

import struct

import pytest

from astrai_rs import _core

_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _array(kind: int, *values: bytes) -> bytes:
    return struct.pack("<IQ", kind, len(values)) + b"".join(values)


def test_every_type_becomes_what_python_has_for_it(tmp_path):
    numbers = {0: 200, 1: -3, 2: 60_000, 3: -300, 4: 1 << 31, 5: -70_000, 6: 0.5, 7: True}
    numbers |= {10: (1 << 64) - 1, 11: -(1 << 63), 12: 1e300}
    keys = {f"n{kind}": (kind, struct.pack(f"<{_FORMATS[kind]}", n)) for kind, n in numbers.items()}
    keys["text"] = (8, _string("ß\0"))
    keys["empty"] = (9, _array(8))
    keys["nested"] = (9, _array(9, _array(8, _string("a"), _string("")), _array(5, struct.pack("<i", 7))))
    file = tmp_path / "m.gguf"
    body = b"".join(_string(key) + struct.pack("<I", kind) + value for key, (kind, value) in keys.items())
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys)) + body)

    expected = {f"n{kind}": n for kind, n in numbers.items()}
    expected |= {"text": "ß\0", "empty": [], "nested": [["a", ""], [7]]}
    found = _core.gguf_metadata(str(file))
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {k: type(v) for k, v in expected.items()}

    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _string("k") + struct.pack("<I", 8) + b"\1")
    with pytest.raises(_core.CheckpointError, match='m.gguf: key "k"'):
        _core.gguf_metadata(str(file))
