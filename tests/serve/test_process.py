"""The server, in its own process, with OpenAI's official client."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from moepress.compress import compress
from moepress.errors import InputError
from moepress.format.checkpoint import load_json, save_json
from moepress.hf import load_model
from moepress.serve import Limits, serve
from tests.conftest import small_recipe
from tests.test_chat import TEMPLATE

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

Folder = Callable[..., Path]
Writer = Callable[[str, int], str]
PRUNE, BITS = 0.45, 16  # how the model is served: not as its folder says
START_SECONDS = 120  # a limit for what hangs, not an expectation


@dataclass
class Served:
    url: str
    model: str
    client: Any
    process: subprocess.Popen[bytes]
    log: Path
    expected: Writer


@pytest.fixture(scope="module")
def served(
    model_folder: Folder, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served") / "model"
    compress(model_folder(), folder, small_recipe(text_file, bits=2))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    options = ["--threads", "1", "--prune", str(PRUNE), "--activation-bits", str(BITS)]
    process, url, log = start(folder, options)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    yield Served(url, str(folder), client, process, log, writer(folder, BITS, PRUNE))
    process.terminate()
    process.wait(30)


def start(folder: Path, options: Sequence[str]) -> tuple[subprocess.Popen[bytes], str, Path]:
    """A process that serves a folder, once it answers; its URL, and the file of its output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder.parent / "log"
    command = [sys.executable, "-m", "moepress", "serve", str(folder), "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen([*command, *options], stdout=file, stderr=file)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + START_SECONDS
    while not alive(url):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    return process, url, log


def writer(folder: str | Path, bits: int = 8, share: float | None = None) -> Writer:
    """A function that continues a prompt greedily, with the model loaded in this process."""
    model = load_model(Path(folder), "cpu", bits, share)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def write(prompt: str, tokens: int) -> str:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
            )
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    return write


def whole(text: str) -> str:
    """Strip incomplete characters from the end: a stream waits for their remaining bytes."""
    return text.rstrip("\ufffd")


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
    answer = served.client.chat.completions.create(**ask)
    text = served.expected("[user] def f2(x):\n[assistant] ", 10)
    assert answer.choices[0].message.content == text
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in served.client.chat.completions.create(**ask, stream=True)
        if chunk.choices
    ]
    assert whole("".join(pieces)) == whole(text) and len([p for p in pieces if p]) > 1


def test_two_clients_at_once_get_their_own_answers(served: Served) -> None:
    def stream(prompt: str) -> str:
        chunks = served.client.completions.create(
            model=served.model, prompt=prompt, max_tokens=30, temperature=0, stream=True
        )
        return whole("".join(chunk.choices[0].text for chunk in chunks))

    prompts = ["def f3(x):", "    return x +"]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(stream, prompts))
    assert answers == [whole(served.expected(prompt, 30)) for prompt in prompts]


def test_it_runs_pruned_and_at_the_precision_asked_for(served: Served) -> None:
    prompts = [f"def f{i}(x):\n    return" for i in range(2)]
    before = [complete(served, prompt, 80) for prompt in prompts]
    assert before == [served.expected(prompt, 80) for prompt in prompts]
    for bits, share in ((8, None), (BITS, None), (8, PRUNE)):
        other = writer(served.model, bits, share)
        assert before != [other(prompt, 80) for prompt in prompts]
    assert "Loading weights" not in served.log.read_text()


def test_a_client_that_leaves_midway_does_no_harm(served: Served) -> None:
    stream = served.client.completions.create(
        model=served.model, prompt="def f4(x):", max_tokens=200, temperature=0, stream=True
    )
    next(iter(stream))
    stream.close()
    assert complete(served, "def f5(x):") == served.expected("def f5(x):", 12)
    assert alive(served.url) and served.process.poll() is None


def test_what_cannot_be_served_is_refused_before_loading(
    served: Served, model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        serve(tmp_path)
    port = int(served.url.rpartition(":")[2])
    with pytest.raises(InputError, match="Cannot listen at"):
        serve(served.model, port=port)
    with pytest.raises(InputError, match="Cannot listen at"):
        serve(served.model, port=123456)
    with pytest.raises(InputError, match=r"Cannot listen at \[::1\]:123456"):
        serve(served.model, host="::1", port=123456)
    nameless = tmp_path / "nameless"
    shutil.copytree(served.model, nameless)
    config = load_json(nameless / "config.json")
    del config["architectures"]
    save_json(nameless / "config.json", config)
    with pytest.raises(InputError, match="names no architectures"):
        serve(nameless)
    with pytest.raises(InputError, match="is an original model"):
        serve(model_folder(), pruning=0.2)
    with pytest.raises(InputError, match="activation_bits is 4"):
        serve(served.model, activation_bits=4)
    with pytest.raises(InputError, match="context is 1000"):
        serve(served.model, port=0, limits=Limits(context=1000))
    with pytest.raises(InputError, match="concurrent is 0"):
        Limits(concurrent=0)
    with pytest.raises(InputError, match="API key"):
        serve(served.model, port=0, api_key="")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(InputError, match=r"pip install '\.\[serve\]' in the clone"):
        serve(served.model)


def ended_by(stop: signal.Signals, process: subprocess.Popen[bytes], url: str, model: str) -> None:
    """Send a signal to a server while it answers; it ends, and says so to its client."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0, timeout=60)
    stream = client.completions.create(
        model=model, prompt="def", max_tokens=240, n=60, stream=True, temperature=0
    )
    next(iter(stream))
    process.send_signal(stop)
    with pytest.raises(openai.APIError, match=r"stopping|[Cc]onnection"):
        for _ in stream:
            pass
    process.wait(30)  # a limit for what hangs


def test_ctrl_c_ends_it_also_while_it_answers(chat_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(chat_folder, folder)
    own = {"no_repeat_ngram_size": 3, "repetition_penalty": 1.0, "suppress_tokens": [7]}
    save_json(folder / "generation_config.json", own)
    process, url, log = start(folder, ["--threads", "1", "--api-key", "secret"])
    ended_by(signal.SIGINT, process, url, str(folder))
    said = log.read_text()
    assert "Traceback" not in said
    ignored = "no_repeat_ngram_size = 3, suppress_tokens = [7]"
    assert f"(The server does not follow these settings of the model: {ignored}.)" in said


def test_sigterm_ends_it_also_while_it_answers(served: Served) -> None:
    """The last test of this file: it ends the server of the others."""
    ended_by(signal.SIGTERM, served.process, served.url, served.model)
    assert "Traceback" not in served.log.read_text()
