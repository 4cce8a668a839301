"""The installed wheel's engine on a GPU: what it computes, and what becomes of its memory and requests."""

import json
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from astrai_rs import Engine, SamplingParams
from conftest import IS_EMULATED

GOLDEN = Path(__file__).parents[1] / "fixtures/golden"
CACHE_TOKENS = 2048 if IS_EMULATED else 100_000


def golden_names() -> list[str]:
    """Models of token ids; attention on tensor cores needs heads of a multiple of 8."""
    folders = [folder for folder in GOLDEN.iterdir() if (folder / "golden.safetensors").exists()]
    return sorted(folder.name for folder in folders if folder.name != "astrai-24q4kv")


def golden(name: str) -> dict[str, np.ndarray]:
    data = (GOLDEN / name / "golden.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    types = {"F32": "<f4", "I64": "<i8", "I32": "<i4"}
    header = json.loads(data[8:start])
    return {
        name: np.frombuffer(data[start:], types[entry["dtype"]], int(np.prod(entry["shape"])), begin).reshape(
            entry["shape"]
        )
        for name, entry in header.items()
        if name != "__metadata__"
        for begin in [entry["data_offsets"][0]]
    }


@pytest.mark.parametrize("name", golden_names())
def test_goldens(name: str) -> None:
    expected = golden(name)
    prompts = expected["prompt_ids"].tolist()
    params = SamplingParams(
        temperature=0, max_tokens=expected["greedy_ids"].shape[1], ignore_eos=True, logprobs=0
    )
    for dtype, tolerance in (("float32", 1e-3), ("bfloat16", 0.25)):
        with Engine(GOLDEN / name, device="cuda", dtype=dtype, kv_cache_tokens=2048) as engine:
            outputs = engine.generate(prompts, params)
        for output, ids, logprobs in zip(
            outputs, expected["greedy_ids"], expected["greedy_logprobs"], strict=True
        ):
            if dtype == "float32":
                assert output.token_ids == ids.tolist()
            same = int((np.cumprod(np.array(output.token_ids) == ids)).sum())
            chosen = [
                step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)
            ]
            np.testing.assert_allclose(chosen[:same], logprobs[:same], atol=tolerance)


def test_auto_takes_the_gpu(folder: Path) -> None:
    with Engine(folder, kv_cache_tokens=CACHE_TOKENS) as engine:
        assert engine.device == "cuda"


def random_requests(shape, count: int, most: int) -> tuple[list[list[int]], list[SamplingParams]]:
    rng = random.Random(1)
    begun = [rng.randrange(3, shape.vocab) for _ in range(most // 2)]
    prompts, params = [], []
    for seed in range(count):
        start = begun[: rng.randrange(most // 2)] if rng.random() < 0.5 else []
        prompts.append(start + [rng.randrange(3, shape.vocab) for _ in range(rng.randrange(1, most // 2))])
        drawn = {"temperature": 0.9, "top_p": 0.9, "top_k": 40} if rng.random() < 0.5 else {"temperature": 0}
        params.append(
            SamplingParams(
                max_tokens=rng.randrange(1, 5 if IS_EMULATED else 48),
                seed=seed,
                ignore_eos=True,
                logprobs=2 if rng.random() < 0.3 else None,
                **drawn,
            )
        )
    return prompts, params


def test_the_batch_changes_nothing(folder: Path, shape) -> None:
    prompts, params = random_requests(shape, *((6, 60) if IS_EMULATED else (96, 1200)))

    def results(outputs) -> list:
        return [(output.token_ids, output.logprobs) for output in outputs]

    settings = {"device": "cuda", "kv_cache_tokens": CACHE_TOKENS}
    with Engine(folder, **settings, enable_prefix_caching=False) as engine:
        alone = results(engine.generate(*request) for request in zip(prompts, params, strict=True))
        assert results(engine.generate(prompts, params)) == alone
    for more in (
        {"max_num_batched_tokens": 48},
        {"kv_cache_tokens": 160 if IS_EMULATED else 5000},  # preempts
        {"max_num_seqs": 3},
    ):
        with Engine(folder, **(settings | more)) as engine:
            assert results(engine.generate(prompts, params)) == alone, more
            assert results(engine.generate(prompts, params)) == alone, more  # from the cache


def test_aborted_and_dropped_requests_leave_nothing(folder: Path, shape) -> None:
    rng = random.Random(2)
    with Engine(folder, device="cuda", kv_cache_tokens=CACHE_TOKENS) as engine:
        params = SamplingParams(max_tokens=20 if IS_EMULATED else 300, ignore_eos=True)

        def use(seed: int) -> None:
            stream = engine.stream([seed + 3] * 20, params)
            for number, _ in enumerate(stream):
                if number >= seed % 7:
                    break
            if seed % 2:
                stream.close()

        count = 8 if IS_EMULATED else 128
        threads = [threading.Thread(target=use, args=(seed,)) for seed in range(count)]
        for thread in threads:
            thread.start()
            time.sleep(rng.random() * 0.01)
        for thread in threads:
            thread.join()
        deadline = time.monotonic() + 60
        while engine.stats()["num_requests_running"] or engine.stats()["kv_blocks_used"]:
            assert time.monotonic() < deadline, engine.stats()
            time.sleep(0.01)
        assert len(engine.generate([5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True)).token_ids) == 3


def test_too_large_a_cache_is_named(folder: Path) -> None:
    with pytest.raises(MemoryError, match=r"a KV cache of 1000000000000 tokens needs \d+ bytes for each"):
        Engine(folder, device="cuda", kv_cache_tokens=10**12)
    with pytest.raises(MemoryError, match=r"gpu_memory_utilization is 0.0001"):
        Engine(folder, device="cuda", gpu_memory_utilization=0.0001)


def test_two_engines_share_a_gpu_and_give_its_memory_back(folder: Path) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    for _ in range(2):
        with (
            Engine(folder, device="cuda", gpu_memory_utilization=0.4) as one,
            Engine(folder, device="cuda", gpu_memory_utilization=0.4) as other,
        ):
            assert one.generate([3, 4, 5], greedy).token_ids == other.generate([3, 4, 5], greedy).token_ids
