"""Composites in the server, in `chat` and in `generate`: requests of text, and of text and image.

Their processors are transformers' own, made for the tiny models. Those that need torchvision are
tested where it is installed.
"""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tokenizers import AddedToken
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import moepress
from moepress.chat import Conversation
from moepress.compress import compress
from moepress.errors import InputError
from moepress.hf import load_model
from moepress.hf.mend import mend
from tests.conftest import TEXT, VOCAB, byte_level_bpe, small_recipe
from tests.families.composites import IMAGE, VIDEO
from tests.families.models import make_model, save_model, tiny_config
from tests.families.test_composites import joined

pytest.importorskip("fastapi")
Image = pytest.importorskip("PIL.Image")

PROMPT = "def f1(x):"
START, END = 370, 371  # tokens around an image
# Around a message: transformers' parser of answers looks for them where Qwen's models write.
MESSAGES = {372: "<|im_start|>", 373: "<|im_end|>"}


def torchvision() -> bool:
    """Whether it is installed, for the torch that is."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return True


@dataclass(frozen=True)
class Served:
    """A composite with its processor."""

    model: Callable[[], Any]
    processor: Callable[[Any], Any]  # of a tokenizer
    tokens: Mapping[int, str]  # that stand for images, or around them
    image: str  # what a chat template writes for an image
    needs_torchvision: bool = True


def llava(tokenizer: Any) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    side = {"height": 64, "width": 64}
    images = CLIPImageProcessor(size=side, crop_size=side)
    return LlavaProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="full"
    )  # without the class token


def qwen3_vl(tokenizer: Any) -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    size = {"shortest_edge": 64 * 64, "longest_edge": 64 * 64}
    images = Qwen2VLImageProcessor(patch_size=16, size=size)
    return Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor())


def glm4v(tokenizer: Any) -> Any:
    from transformers import Glm4vImageProcessor, Glm4vProcessor, Glm4vVideoProcessor

    size = {"shortest_edge": 56 * 56 * 2, "longest_edge": 56 * 56 * 2}
    return Glm4vProcessor(Glm4vImageProcessor(size=size), tokenizer, Glm4vVideoProcessor())


def llama4(tokenizer: Any) -> Any:
    from transformers import Llama4ImageProcessor, Llama4Processor

    side = {"height": 28, "width": 28}
    images = Llama4ImageProcessor(size=side, max_patches=1)
    return Llama4Processor(images, tokenizer, patch_size=14, pixel_shuffle_ratio=0.5)


SERVED = {
    "llava": Served(
        lambda: joined(
            tiny_config("mixtral"), "llava", model_type="clip_vision_model", projection_dim=32
        ),
        llava,
        {IMAGE: "<image>"},
        "<image>",
        needs_torchvision=False,
    ),
    "qwen3_vl_moe": Served(
        lambda: make_model("qwen3_vl_moe"),
        qwen3_vl,
        {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", START: "<|vision_start|>",
         END: "<|vision_end|>"},
        "<|vision_start|><|image_pad|><|vision_end|>",
    ),
    "glm4v_moe": Served(
        lambda: make_model("glm4v_moe"),
        glm4v,
        {IMAGE: "<|image|>", VIDEO: "<|video|>", START: "<|begin_of_video|>",
         END: "<|end_of_video|>"},
        "<|image|>",
    ),
    "llama4": Served(
        lambda: make_model("llama4").to(torch.bfloat16),  # as its images are
        llama4,
        {IMAGE: "<|patch|>", VIDEO: "<|image|>", START: "<|image_start|>", END: "<|image_end|>"},
        "<|image|>",
    ),
}  # fmt: skip


def tokenizer_with(named: Mapping[int, str]) -> Any:
    """The tests' tokenizer, with tokens of these ids."""
    tokenizer = byte_level_bpe(TEXT, START)
    named = {**named, **MESSAGES}
    added = [named.get(number, f"<|{number}|>") for number in range(START, VOCAB)]
    tokenizer.add_tokens([AddedToken(token, special=True) for token in added])
    assert all(tokenizer.token_to_id(token) == number for number, token in named.items())
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(
    scope="module",
    params=[n if n == "llava" else pytest.param(n, marks=pytest.mark.families) for n in SERVED],
)
def folder(
    request: Any, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Served, Path]:
    one = SERVED[request.param]
    if one.needs_torchvision and not torchvision():
        pytest.skip("its processor needs torchvision")
    path = tmp_path_factory.mktemp(request.param)
    save_model(one.model(), path / "original")
    processor = one.processor(tokenizer_with(one.tokens))
    processor.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}"
        "{{ m.content }}{% else %}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}"
        "{% else %}" + one.image + "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    processor.save_pretrained(path / "original")
    recipe = small_recipe(text_file, bits=2.5)
    return one, compress(path / "original", path / "out", recipe)


def picture(shade: int) -> Any:
    gradient = torch.arange(64 * 64).view(64, 64, 1).expand(64, 64, 3) // 32
    return Image.fromarray((gradient + shade).clamp(0, 255).to(torch.uint8).numpy())


def as_url(image: Any) -> str:
    file = io.BytesIO()
    image.save(file, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask(folder: Path, requests: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """The server's answers. In this process, without a port."""
    from starlette.testclient import TestClient

    answers: list[Any] = []

    def run(server: Any) -> None:
        client = TestClient(server.config.app, "http://localhost")
        for path, body in requests:
            answers.append(client.post(path, json={"model": str(folder), **body}))

    with mock.patch("uvicorn.Server.run", run):
        moepress.serve(folder, port=0)
    return answers


def chat(*pieces: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "user", "content": list(pieces)}]
    body = {"messages": messages, "max_tokens": 6, "temperature": 0}
    return "/v1/chat/completions", body


def test_texts_and_images(folder: tuple[Served, Path]) -> None:
    """What the server answers is what the model writes for its processor's inputs."""
    _, out = folder
    text = {"type": "text", "text": PROMPT}
    urls = [{"type": "image_url", "image_url": {"url": as_url(picture(s))}} for s in (0, 90)]
    asked = [chat(text), *(chat(url, text) for url in urls)]
    complete = "/v1/completions", {"prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    *chats, completed = ask(out, [*asked, complete])
    for answer in (*chats, completed):
        assert answer.status_code == 200, answer.text
    model = AutoModelForImageTextToText.from_pretrained(out).eval()
    mend(model)
    processor = AutoProcessor.from_pretrained(out)
    for answer, images in zip(chats, ([], [picture(0)], [picture(90)]), strict=True):
        content = [{"type": "image", "image": image} for image in images] + [text]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        with torch.inference_mode():
            made = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        new = made[0, inputs["input_ids"].shape[1] :] if made.shape[1] > 6 else made[0]
        expected = processor.decode(new, skip_special_tokens=True)
        assert answer.json()["choices"][0]["message"]["content"].strip() == expected.strip()
        assert ("pixel_values" in inputs) == bool(images)
    assert completed.json()["choices"][0]["text"]


def test_a_missing_library_is_named(
    tmp_path: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise ImportError("Qwen3VLVideoProcessor requires the Torchvision library")

    shutil.copytree(model_folder(), tmp_path / "model")
    (tmp_path / "model/preprocessor_config.json").write_text("{}")
    monkeypatch.setattr(AutoProcessor, "from_pretrained", fails)
    with pytest.raises(InputError, match="requires the Torchvision library"):
        ask(tmp_path / "model", [])


def test_generate_and_chat(folder: tuple[Served, Path]) -> None:
    _, out = folder
    assert moepress.generate(out, PROMPT, tokens=4).startswith(PROMPT)
    model, written = load_model(out), []
    conversation = Conversation(model, AutoTokenizer.from_pretrained(out), tokens=4, temperature=0)
    reply = conversation.say(PROMPT, written.append)
    assert reply.tokens > 0
    assert reply.text == "".join(written)
