"""A small model behind the endpoints, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("openai")  # and with it the HTTP client that TestClient needs

from fastapi.testclient import TestClient

from moepress.hf import load_model
from moepress.serve.app import build
from moepress.serve.asking import Served
from moepress.serve.guard import allowed_hosts
from moepress.serve.limits import Limits
from moepress.serve.model import opened
from tests.test_chat import TEMPLATE

NAME = "the-model"
Folder = Callable[..., Path]


@dataclass
class Here:
    """A served model and a client of it."""

    served: Served
    client: TestClient

    def complete(self, prompt: Any = "def f1(x):", **fields: Any) -> dict[str, Any]:
        """The answer to a completion; greedy unless asked otherwise."""
        body = {"model": NAME, "prompt": prompt, "temperature": 0, "max_tokens": 8, **fields}
        answer = self.client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def text(self, prompt: Any = "def f1(x):", **fields: Any) -> str:
        return str(self.complete(prompt, **fields)["choices"][0]["text"])

    def chat(self, **fields: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": "def f2(x):"}]
        body = {"messages": messages, "temperature": 0, "max_tokens": 8, **fields}
        answer = self.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def refused(self, path: str = "/v1/completions", **fields: Any) -> tuple[int, dict[str, Any]]:
        """Status and error of a request that is refused."""
        good: dict[str, Any] = {"prompt": "x"}
        if path.startswith("/v1/chat"):
            good = {"messages": [{"role": "user", "content": "x"}]}
        answer = self.client.post(path, json={**good, **fields})
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return answer.status_code, error

    def alone(self, prompt: str, tokens: int) -> str:
        """What `generate` writes, greedily."""
        tokenizer = self.served.prompts.tokenizer
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            out = self.served.engine.stepper.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
            )
        # Together: alone, tokens in the manner of SentencePiece lose the space before them.
        read, whole = (str(tokenizer.decode(x, skip_special_tokens=True)) for x in (ids[0], out[0]))
        assert whole.startswith(read)
        return whole[len(read) :]


def serving(folder: Path, limits: Limits, *, reuse: bool = True, **options: Any) -> Here:
    """A model of a folder, served in this process. Its engine runs until `engine.stop`."""
    served = opened(load_model(folder), folder, NAME, limits, remote=False, reuse=reuse)
    return started(served, **options)


def started(served: Served, **options: Any) -> Here:
    served.engine.start()
    app = build(served, hosts=allowed_hosts("127.0.0.1", ()), **options)
    return Here(served, TestClient(app, "http://localhost", raise_server_exceptions=False))


def again(here: Here, **options: Any) -> TestClient:
    """A client of the same model behind other endpoints: other limits, a key."""
    limits = replace(here.served.limits, **options.pop("limits", {}))
    options.setdefault("hosts", None)
    app = build(replace(here.served, limits=limits), **options)
    return TestClient(app, "http://localhost", raise_server_exceptions=False)


@pytest.fixture(scope="session")
def chat_folder(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uncompressed tiny model with a chat template: the server does not care."""
    import shutil

    folder = tmp_path_factory.mktemp("here") / "model"
    shutil.copytree(model_folder(), folder)
    template = TEMPLATE + "{% if a is defined %}{{ a }}{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="session")
def here(chat_folder: Path) -> Iterator[Here]:
    made = serving(chat_folder, Limits(max_tokens=100))
    yield made
    assert made.served.engine.stop(30)
