"""AstrAI's documented examples on its own checkpoints: only the import names are changed."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from astrai_rs import AutoTokenizer
from astrai_rs.inference import GenerationRequest, InferenceEngine
from astrai_rs.model import AutoModel
from reference import GOLDEN, read_safetensors

FOLDERS = ["astrai", "astrai-tied", "astrai-qknorm-gated", "astrai-24q4kv", "astrai-lm"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def save_tokenizer(folder: Path, unused: int) -> None:
    """One word per id; `unused` ends a text."""
    vocabulary = {f"w{token}": token for token in range(128)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"special_tokens": {"eos": f"w{unused}"}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def words(ids: object) -> str:
    return " ".join(f"w{token}" for token in ids)  # type: ignore[attr-defined]


@pytest.fixture(scope="module", params=FOLDERS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A folder as AstrAI saves it, prompts as text, and what the reference engine answers greedily."""
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / request.param / name, folder)
    golden = read_safetensors(GOLDEN / request.param / "golden.safetensors")
    used = {int(token) for key in ("prompt_ids", "greedy_ids") for token in golden[key].ravel()}
    save_tokenizer(folder, next(token for token in range(128) if token not in used))
    prompts = [words(row) for row in golden["prompt_ids"]]
    answers = [words(row).replace(" ", "") for row in golden["greedy_ids"]]
    return folder, prompts, answers, golden["greedy_ids"].shape[1]


@pytest.fixture(scope="module")
def engine(case):
    folder = case[0]
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with InferenceEngine(model=model, tokenizer=tokenizer, max_batch_size=8, max_seq_len=128) as engine:
        yield engine


def plain(text: str) -> str:
    return text.replace(" ", "")


def test_generate_in_every_form(case, engine) -> None:
    _, prompts, answers, count = case
    greedy = {"max_tokens": count, "temperature": 0.0}
    assert plain(engine.generate(prompts[0], **greedy)) == answers[0]
    assert [plain(text) for text in engine.generate(prompts, **greedy)] == answers
    assert plain("".join(engine.generate(prompts[1], stream=True, **greedy))) == answers[1]
    texts = [""] * len(prompts)
    for index, piece in engine.generate(prompts, stream=True, **greedy):
        texts[index] += piece
    assert [plain(text) for text in texts] == answers
    assert plain(engine.generate(prompts[0], False, count, 1.0, 1.0, 1)) == answers[0]  # top_k 1

    async def stream() -> str:
        return "".join([piece async for piece in engine.generate_async(prompts[0], **greedy)])

    assert plain(asyncio.run(stream())) == answers[0]


def test_generation_request_with_messages(case, engine) -> None:
    _, prompts, answers, count = case
    first, _, rest = prompts[0].partition(" ")
    messages = [{"role": "system", "content": first}, {"role": "user", "content": rest}]
    fields = {"messages": messages, "temperature": 0.0, "top_p": 0.95, "top_k": 50, "max_len": count}
    streamed = "".join(engine.generate_with_request(GenerationRequest(**fields, stream=True)))
    assert plain(streamed) == answers[0]
    assert plain(engine.generate_with_request(GenerationRequest(**fields))) == answers[0]


def test_statistics(case, engine) -> None:
    engine.generate(case[1][0], max_tokens=3, temperature=0)
    stats = engine.get_stats()
    assert stats["total_tasks"] > 0
    assert stats["total_tokens"] > 0
    assert (stats["active_tasks"], stats["waiting_queue"]) == (0, 0)


def test_load_and_save(case, tmp_path: Path) -> None:
    folder, prompts, answers, count = case
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    model = AutoModel.from_pretrained(tmp_path / "saved")
    with InferenceEngine(model, AutoTokenizer.from_pretrained(folder)) as engine:
        assert plain(engine.generate(prompts[0], max_tokens=count, temperature=0)) == answers[0]
