"""Turn requests into tokens. Everything here may take long: it runs outside the event loop.

The chat template is that of the model's folder. A request sets variables of it at most.
"""

from __future__ import annotations

import base64
import binascii
import inspect
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from moepress.reading.json import parse_json
from moepress.serve.schema import Chat, Completion, Message, Piece, RefusedError
from moepress.serve.work import Prompt

NO_TEMPLATE = (
    "This model has no chat template: it was not trained to chat. Use /v1/completions to continue "
    "a text, or add a chat_template.jinja to the model's folder"
)
NO_TOOLS = (
    "tools are not supported: the model's chat template or its answers have no place for them"
)
DATA = "data:image/"
MOST_PIXELS = 64 << 20


class Prompts:
    """Makes prompts for one model.

    Args:
        processor: a tokenizer or processor of transformers.
        vocabulary: tokens that the model knows.
        context: tokens of the longest prompt and answer.
        calls: whether calls of tools are found in the model's answers.
    """

    def __init__(self, processor: Any, vocabulary: int, context: int, calls: bool) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.vocabulary = vocabulary
        self.context = context
        self.calls = calls

    @cached_property
    def template(self) -> str | None:
        """The folder's chat template; None: there is none."""
        for owner in (self.processor, self.tokenizer):
            found = getattr(owner, "chat_template", None)
            if isinstance(found, dict):
                found = found.get("default")
            if found:
                return str(found)
        return None

    @cached_property
    def sees(self) -> bool:
        """Whether the model takes images."""
        return getattr(self.processor, "image_processor", None) is not None

    @cached_property
    def most_characters(self) -> int:
        """No text with more characters fits: no token stands for more than the longest one."""
        return self.context * max(map(len, self.tokenizer.get_vocab()), default=1)

    def of_completion(self, asked: Completion) -> list[Prompt]:
        """The prompts to continue.

        Raises:
            RefusedError: one is empty, too long, or has tokens that the model does not know.
        """
        prompts = asked.prompts
        if not prompts:
            raise RefusedError("prompt", "prompt: expected at least one", [])
        return [
            self._of_text(one) if isinstance(one, str) else self._of_ids(one) for one in prompts
        ]

    def of_chat(self, asked: Chat) -> Prompt:
        """The conversation as the model's template writes it.

        Raises:
            RefusedError: the template, or the model, cannot take it.
        """
        if self.template is None:
            raise RefusedError(None, NO_TEMPLATE)
        tools = None
        if asked.tools and asked.tool_choice != "none":
            if not self.calls or "tools" not in self.template:
                raise RefusedError("tools", NO_TOOLS)
            tools = [tool.model_dump(exclude_none=True) for tool in asked.tools]
        self._check_length("messages", json_length(asked))
        messages = [self._message(message) for message in asked.messages]
        images = any(
            isinstance(part, Mapping) and part.get("type") == "image"
            for message in messages
            for part in (message["content"] if isinstance(message["content"], list) else ())
        )
        variables = asked.chat_template_kwargs or {}
        self._check_variables(variables)
        owner = self.processor if self.sees else self.tokenizer
        try:
            text = owner.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=False, **variables
            )
        except RefusedError:
            raise
        except Exception as error:  # of the template's own: raise_exception, a missing field
            raise RefusedError(
                "messages", f"the model's chat template refuses them: {error}"
            ) from error
        if not images:
            return self._of_text(text, "messages", special=False)
        try:
            made = dict(
                owner.apply_chat_template(
                    messages,
                    tools=tools,
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                    **variables,
                )
            )
        except Exception as error:
            raise RefusedError("messages", f"an image cannot be read: {error}") from error
        ids = made.pop("input_ids")[0].tolist()
        made.pop("attention_mask", None)
        return self._checked(Prompt(tuple(ids), made, text), "messages")

    def _of_text(self, text: str, param: str = "prompt", special: bool = True) -> Prompt:
        self._check_length(param, len(text))
        ids = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return self._checked(Prompt(tuple(ids), None, text), param)

    def _of_ids(self, ids: list[int]) -> Prompt:
        if len(ids) > self.context:
            return self._checked(Prompt(tuple(ids)), "prompt")
        strange = next((token for token in ids if token >= self.vocabulary), None)
        if strange is not None:
            raise RefusedError(
                "prompt", f"prompt: expected tokens below {self.vocabulary}", strange
            )
        return self._checked(Prompt(tuple(ids), None, self.tokenizer.decode(ids)), "prompt")

    def _checked(self, prompt: Prompt, param: str) -> Prompt:
        if not prompt.ids:
            raise RefusedError(param, f"{param}: expected at least one token", "")
        if len(prompt.ids) >= self.context:
            raise _too_long(param, f"{len(prompt.ids)} tokens", self.context)
        return prompt

    def _check_length(self, param: str, characters: int) -> None:
        if characters > self.most_characters:
            raise _too_long(param, f"{characters} characters", self.context)

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        """Refuse variables that are options of transformers, such as another template."""
        taken: set[str] = {"messages", "conversation", "chat_template", "tokenize", "documents"}
        for owner in {type(self.processor), type(self.tokenizer)}:
            taken |= set(inspect.signature(owner.apply_chat_template).parameters)
        for name in variables:
            if name in taken or not name.isidentifier():
                raise RefusedError(
                    "chat_template_kwargs", "it has a name that is not for requests", name
                )

    def _message(self, message: Message) -> dict[str, Any]:
        """A message as templates expect it: arguments of calls as objects, text as one string."""
        made = message.model_dump(exclude_none=True)
        for call in made.get("tool_calls", ()):
            try:
                call["function"]["arguments"] = parse_json(call["function"]["arguments"])
            except ValueError as error:
                raise RefusedError("messages", "arguments of a call: expected JSON") from error
        if isinstance(message.content, list):
            made["content"] = self._content(message.content)
        else:
            text = message.content or ""
            made["content"] = [{"type": "text", "text": text}] if self.sees else text
        return made

    def _content(self, pieces: list[Piece]) -> Any:
        if not self.sees:
            if any(piece.type != "text" for piece in pieces):
                raise RefusedError("messages", "this model reads no images: expected text only")
            return " ".join(piece.text or "" for piece in pieces)
        return [
            {"type": "text", "text": piece.text}
            if piece.image_url is None
            else {"type": "image", "image": _image(piece.image_url.url)}
            for piece in pieces
        ]


def json_length(asked: Chat) -> int:
    """Characters of all texts in the messages."""
    return sum(
        len(message.content)
        if isinstance(message.content, str)
        else sum(len(piece.text or "") for piece in message.content or ())
        for message in asked.messages
    )


def _image(url: str) -> Any:
    """The image in a data URL. Nothing is fetched for a client, and no file is read."""
    from PIL import Image

    head, _, data = url.partition(",")
    if not head.startswith(DATA) or not head.endswith(";base64"):
        raise RefusedError("messages", "image_url: expected data:image/TYPE;base64,DATA", url[:40])
    try:
        import io

        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        if image.width * image.height > MOST_PIXELS:
            raise RefusedError("messages", f"an image has more than {MOST_PIXELS} pixels")
        return image.convert("RGB")
    except (OSError, ValueError, binascii.Error, Image.DecompressionBombError) as error:
        raise RefusedError(
            "messages", "image_url: the data are no image that can be read"
        ) from error


def _too_long(param: str, got: str, context: int) -> RefusedError:
    message = (
        f"{param} has {got}. Expected at most {context - 1} tokens: this server reads {context}, "
        "with the answer"
    )
    return RefusedError(param, message, code="context_length_exceeded")
