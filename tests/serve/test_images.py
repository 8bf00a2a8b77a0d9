"""Images in chats, with a composite model."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from moepress.serve.app import build
from moepress.serve.limits import Limits, fitting_body
from moepress.serve.model import served_by
from tests.families.images import image_prompt
from tests.families.models import make_model
from tests.serve.conftest import NAME, Here  # skips without the server's libraries

Image = pytest.importorskip("PIL.Image")
from fastapi.testclient import TestClient  # noqa: E402

FAMILY = "aria"


@dataclass
class Processor:
    """Makes the family's inputs of any image; keeps what it was given."""

    tokenizer: Any
    chat_template: str = "{{ messages }}"
    image_processor: object = field(default_factory=object)
    seen: list[Any] = field(default_factory=list)

    def apply_chat_template(self, messages: Any, tokenize: bool, **options: Any) -> Any:
        assert not tokenize
        return "def f1(x):"

    def __call__(self, text: str, images: Any, return_tensors: str) -> Any:
        self.seen.append((text, images))
        return image_prompt(FAMILY)


@pytest.fixture(scope="module")
def images(tokenizer_folder: Path) -> Iterator[Here]:
    processor = Processor(AutoTokenizer.from_pretrained(tokenizer_folder))
    served = served_by(make_model(FAMILY), processor, NAME, Limits())
    served.engine.start()
    client = TestClient(build(served, hosts=None), "http://localhost")
    yield Here(served, client)
    assert served.engine.stop(30)


def data_url(kind: str = "png", size: int = 3) -> str:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (200, 10, 10)).save(file, "png")
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def message(url: str) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": parts}]


def test_an_image_is_answered_as_generate_does(images: Here) -> None:
    answer = images.chat(messages=message(data_url()), max_tokens=6, logprobs=True, n=2)
    inputs = image_prompt(FAMILY)
    model = images.served.engine.stepper.model
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    expected = images.served.prompts.tokenizer.decode(
        out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert [choice["message"]["content"] for choice in answer["choices"]] == [expected] * 2
    assert answer["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
    text, [[image]] = images.served.prompts.processor.seen[-1]
    assert text == "def f1(x):" and image.getpixel((1, 1)) == (200, 10, 10)
    plain = images.chat(max_tokens=4)  # of the same model, without an image
    assert plain["choices"][0]["message"]["content"] == images.alone("def f1(x):", 4)


def test_nothing_is_fetched_and_no_file_is_read(images: Here, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    Image.new("RGB", (3, 3)).save(file)
    for url in (str(file), f"file://{file}", "http://127.0.0.1:1/x.png", "data:image/png,abc",
                "data:image/png;base64,AAAA", data_url()[:-30], ""):  # fmt: skip
        status, error = images.refused("/v1/chat/completions", messages=message(url))
        assert (status, error["param"]) == (400, "messages"), url
        assert str(tmp_path) not in error["message"]


def test_requests_with_images_may_be_larger(images: Here) -> None:
    context = images.served.prompts.context
    assert images.served.limits.body == fitting_body(context, images=True)
    assert fitting_body(context, images=True) > fitting_body(context, images=False) + 10_000_000


def test_images_of_requests_that_are_not_done_have_a_limit(images: Here) -> None:
    room = images.served.prompts.room
    end = time.monotonic() + 10
    while room.taken:  # by requests of other tests, of which the engine's thread lets go
        assert time.monotonic() < end
        time.sleep(0.01)
    size = sum(value.nbytes for name, value in image_prompt(FAMILY).items() if name != "input_ids")
    other = Processor(None)
    room.take(room.most - size + 1, other)
    body = {"messages": message(data_url())}
    answer = images.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 429 and "Retry-After" in answer.headers
    assert images.chat(max_tokens=1)["choices"]  # without images
    del other
    assert images.chat(messages=message(data_url()), max_tokens=1)["choices"]
