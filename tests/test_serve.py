"""The server, as a process of its own, with the official client of OpenAI."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from moepress.checkpoint import load_json, save_json
from moepress.compress import compress
from moepress.errors import InputError
from moepress.evaluate import load_model
from moepress.serve import serve

from .conftest import small_recipe
from .test_chat import TEMPLATE

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

Folder = Callable[..., Path]
START_SECONDS = 120  # a limit for what hangs, not an expectation


@dataclass
class Served:
    url: str
    model: str
    client: Any
    process: subprocess.Popen[bytes]
    expected: Callable[[str, int], str]


@pytest.fixture(scope="module")
def served(
    model_folder: Folder, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served") / "model"
    compress(model_folder(), folder, small_recipe(text_file, bits=2))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (folder.parent / "log").open("wb")
    command = [sys.executable, "-m", "moepress.cli", "serve", str(folder), "--port", str(port)]
    process = subprocess.Popen([*command, "--threads", "1"], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + START_SECONDS
    while not alive(url):
        assert process.poll() is None, (folder.parent / "log").read_text()
        assert time.monotonic() < deadline, (folder.parent / "log").read_text()
        time.sleep(0.2)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    model, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder)

    def expected(prompt: str, tokens: int) -> str:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
            )
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    yield Served(url, str(folder), client, process, expected)
    process.terminate()
    process.wait(30)
    log.close()


def alive(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def complete(served: Served, prompt: str, tokens: int = 12) -> str:
    answer = served.client.completions.create(
        model=served.model, prompt=prompt, max_tokens=tokens, temperature=0
    )
    return str(answer.choices[0].text)


def test_completion_is_what_the_packed_model_writes(served: Served) -> None:
    assert complete(served, "def f1(x):") == served.expected("def f1(x):", 12)


def test_chat_goes_through_the_template_and_streams(served: Served) -> None:
    ask = {
        "model": served.model,
        "messages": [{"role": "user", "content": "def f2(x):"}],
        "max_tokens": 10,
        "temperature": 0,
    }
    whole = served.client.chat.completions.create(**ask)
    text = served.expected("[user] def f2(x):\n[assistant] ", 10)
    assert whole.choices[0].message.content == text
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in served.client.chat.completions.create(**ask, stream=True)
        if chunk.choices
    ]
    assert "".join(pieces) == text and len([p for p in pieces if p]) > 1


def test_two_clients_at_once_get_their_own_answers(served: Served) -> None:
    def stream(prompt: str) -> str:
        chunks = served.client.completions.create(
            model=served.model, prompt=prompt, max_tokens=30, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in chunks)

    prompts = ["def f3(x):", "    return x +"]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(stream, prompts))
    assert answers == [served.expected(prompt, 30) for prompt in prompts]


def test_malformed_requests_are_refused_and_the_server_lives_on(served: Served) -> None:
    for body in (b"{not json", b"[]", b'{"prompt": [1, 2]}', b'{"prompt": "x", "nonsense": 1}'):
        request = urllib.request.Request(
            f"{served.url}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        assert 400 <= refused.value.code < 500
    with pytest.raises(openai.BadRequestError):
        served.client.completions.create(model="another", prompt="x")
    assert complete(served, "def f1(x):") == served.expected("def f1(x):", 12)


def test_a_client_that_leaves_midway_does_no_harm(served: Served) -> None:
    stream = served.client.completions.create(
        model=served.model, prompt="def f4(x):", max_tokens=200, temperature=0, stream=True
    )
    next(iter(stream))
    stream.close()
    assert complete(served, "def f5(x):") == served.expected("def f5(x):", 12)
    assert alive(served.url) and served.process.poll() is None


def test_what_cannot_be_served_is_refused_before_loading(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        serve(tmp_path)
    port = int(served.url.rpartition(":")[2])
    with pytest.raises(InputError, match="Cannot listen at"):
        serve(served.model, port=port)
    with pytest.raises(InputError, match="Cannot listen at"):
        serve(served.model, port=123456)
    nameless = tmp_path / "nameless"
    shutil.copytree(served.model, nameless)
    config = load_json(nameless / "config.json")
    del config["architectures"]
    save_json(nameless / "config.json", config)
    with pytest.raises(InputError, match="names no architectures"):
        serve(nameless)
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    with pytest.raises(InputError, match=r"pip install 'moepress\[serve\]'"):
        serve(served.model)
