"""Variables of chat templates: those that a template reads, and nothing else of transformers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from moepress.serve.prompts import Prompts
from moepress.serve.template import variables
from tests.serve.conftest import Here  # skips without the server's libraries

Image = pytest.importorskip("PIL.Image")
from tests.serve.test_images import data_url, message  # noqa: E402

IMAGE = "<|image|>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
    "{{ part.text if part.type == 'text' else '" + IMAGE + "' }}{% endfor %}{% endfor %}"
    "{% if thinking is defined and thinking %}<think>{% endif %}"
)


@pytest.mark.parametrize(
    "template, names",
    [
        ("{% if x is not defined %}{% set x = true %}{% endif %}{{ x }}", {"x"}),
        ("{% set x = x | default(false) %}{% set y = 1 %}{{ x }}{{ y }}", {"x"}),
        ("{% macro f(a) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}", {"b"}),
        ("{% generation %}{{ c }}{% endgeneration %}{{ messages }}{{ tools }}", {"c"}),
        ("{% for m in messages %}{% if d %}{% break %}{% endif %}{{ loop.index }}{% endfor %}",
         {"d"}),
        ("{{ raise_exception('x') }}{{ strftime_now('%d') }}{{ namespace(a=1) }}{{ range(3) }}",
         set()),
        ("{{ add_generation_prompt }}{{ documents }}{{ bos_token }}", set()),
        ("{% for %}", set()),
    ],
)  # fmt: skip
def test_what_a_template_reads(template: str, names: set[str]) -> None:
    assert variables(template, frozenset({"bos_token"})) == names


@pytest.fixture(scope="module")
def prompts(tokenizer_folder: Path) -> Prompts:
    """Those of a processor of transformers' own."""
    from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
    from transformers.models.aria.processing_aria import AriaProcessor

    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer_folder, extra_special_tokens={"image_token": IMAGE}
    )
    processor = AriaProcessor(AriaImageProcessorPil(), tokenizer, TEMPLATE)
    return Prompts(processor, len(tokenizer), 4096, calls=False)


def asked(**fields: Any) -> Any:
    from moepress.serve.schema import Chat, parsed

    return parsed(Chat, json.dumps(fields).encode())


@pytest.fixture
def address() -> Iterator[tuple[str, list[str]]]:
    """A server of images, and the paths that it was asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    thread.join()
    server.server_close()


def test_variables_reach_the_template_and_nothing_else(
    prompts: Prompts, address: tuple[str, list[str]], tmp_path: Path
) -> None:
    from moepress.serve.schema import RefusedError

    url, fetched = address
    file = tmp_path / "x.png"
    Image.new("RGB", (3, 3)).save(file)
    wrong = {
        "images": f"{url}/x.png", "videos": f"{url}/x.mp4", "audio": f"{url}/x.wav",
        "min_image_size": 3, "max_image_size": 490, "return_offsets_mapping": True, "padding": True,
        "max_length": 1 << 40, "tools": "x", "bos_token": "x", "add_generation_prompt": False,
        "processor_kwargs": None, "self": 1, "messages": "x", "raise_exception": "x",
    }  # fmt: skip
    says = r"the model's chat template takes thinking\. Got"
    for name, value in [*wrong.items(), ("images", str(file)), ("Thinking", True), ("", 1)]:
        chat = asked(messages=message(data_url()), chat_template_kwargs={name: value})
        with pytest.raises(RefusedError, match=says) as e:
            prompts.of_chat(chat)
        assert e.value.param == "chat_template_kwargs" and repr(name) in e.value.message
    assert not fetched
    taken = asked(messages=message(data_url()), chat_template_kwargs={"thinking": True})
    assert prompts.of_chat(taken).text.endswith("<think>")


def test_a_prompt_with_images_is_what_transformers_makes(prompts: Prompts) -> None:
    found = prompts.of_chat(asked(messages=message(data_url(size=40)) * 2))
    image = Image.new("RGB", (40, 40), (200, 10, 10))
    parts = [{"type": "text", "text": "What?"}, {"type": "image", "image": image}]
    expected = prompts.processor.apply_chat_template(
        [{"role": "user", "content": parts}] * 2, add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert list(found.ids) == expected["input_ids"][0].tolist()
    assert found.inputs is not None
    assert found.inputs.keys() == expected.keys() - {"input_ids", "attention_mask"}
    assert (found.inputs["pixel_values"] == expected["pixel_values"]).all()


def test_a_template_without_variables_says_so(here: Here) -> None:
    status, error = here.refused(
        "/v1/chat/completions", chat_template_kwargs={"enable_thinking": False}
    )
    assert status == 400 and error["param"] == "chat_template_kwargs"
    assert error["message"].endswith("template takes a. Got 'enable_thinking'.")


def role(prompts: Any, template: str, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(vars(prompts), "templates", {"default": template})
    text: str = prompts.of_chat(asked(messages=[{"role": name, "content": "x"}])).text
    return text


def test_developers_speak_as_the_system(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates such as Qwen3's leave out every role that they do not know."""
    known = (
        "{%% for m in messages %%}{%% if m.role == '%s' %%}"
        "{{ m.content }}{%% endif %%}{%% endfor %%}."
    )
    knows_not, knows = known % "system", known % "developer"
    prompts = here.served.prompts
    assert role(prompts, knows_not, "developer", monkeypatch) == "x."
    assert role(prompts, knows_not, "system", monkeypatch) == "x."
    assert role(prompts, knows, "developer", monkeypatch) == "x."
    assert role(prompts, knows, "system", monkeypatch) == "."


def test_a_template_of_tools_is_used_with_tools(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = here.served.prompts
    both = {"default": "plain {{ x }}", "tool_use": "{{ tools[0].function.name }} {{ y }}"}
    monkeypatch.setitem(vars(prompts), "templates", both)
    monkeypatch.setattr(prompts, "calls", True)
    tool = {"type": "function", "function": {"name": "add"}}
    hello = [{"role": "user", "content": "x"}]
    plain = asked(messages=hello, chat_template_kwargs={"x": 1})
    assert prompts.of_chat(plain).text == "plain 1"
    tools = asked(messages=hello, tools=[tool], chat_template_kwargs={"y": 2})
    assert prompts.of_chat(tools).text == "add 2"
