"""Turn requests into tokens. Everything here may take long: it runs outside the event loop.

The chat template is that of the model's folder. A request sets variables of it at most.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from moepress.reading.json import parse_json
from moepress.serve.images import Room, decoded
from moepress.serve.schema import Chat, Completion, Message, Piece, RefusedError
from moepress.serve.template import variables
from moepress.serve.work import Prompt

NO_TEMPLATE = (
    "This model has no chat template: it was not trained to chat. Use /v1/completions to continue "
    "a text, or add a chat_template.jinja to the model's folder"
)
NO_TOOLS = (
    "tools are not supported: the model's chat template or its answers have no place for them"
)
EFFORT = "reasoning_effort"  # a field of requests; gpt-oss' template reads a variable of its name
DEVELOPER = "developer"  # OpenAI's newer name for the system's role; most templates leave it out


class Prompts:
    """Makes prompts for one model.

    Args:
        processor: a tokenizer or processor of transformers.
        vocabulary: tokens that the model knows.
        context: tokens of the longest prompt and answer.
        calls: whether calls of tools are found in the model's answers.
        room: bytes for images of all requests, made ready for the model.
    """

    def __init__(
        self, processor: Any, vocabulary: int, context: int, calls: bool, room: int = 1 << 30
    ) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.vocabulary = vocabulary
        self.context = context
        self.calls = calls
        self.room = Room(room)

    @cached_property
    def templates(self) -> Mapping[str, str]:
        """The folder's chat templates by name; one without a name is "default"."""
        for owner in (self.processor, self.tokenizer):
            found = getattr(owner, "chat_template", None)
            if found:
                named = found if isinstance(found, Mapping) else {"default": found}
                return {str(name): str(text) for name, text in named.items()}
        return {}

    def template(self, tools: bool) -> str | None:
        """The template of a conversation, chosen as transformers does; None: there is none."""
        default = self.templates.get("default")
        return self.templates.get("tool_use", default) if tools else default

    @cached_property
    def reserved(self) -> frozenset[str]:
        """Names that no request may set in `chat_template_kwargs`, whatever the template reads."""
        names = set(getattr(self.tokenizer, "special_tokens_map", ()))
        for owner in {type(self.processor), type(self.tokenizer)}:
            names |= set(inspect.signature(owner.apply_chat_template).parameters)
        return frozenset(names)

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
        uses_tools = bool(asked.callable)
        template = self.template(uses_tools)
        if template is None:
            raise RefusedError(None, NO_TEMPLATE)
        if uses_tools and not (self.calls and "tools" in template):
            raise RefusedError("tools", NO_TOOLS)
        self._check_length("messages", json_length(asked))
        chosen = self._variables(asked, template)
        images = self._images(asked)
        following = iter(images)
        messages = [self._message(message, template, following) for message in asked.messages]
        tools = [tool.shown for tool in asked.tools or ()] if uses_tools else None
        try:
            text = self._rendered(messages, template, tools, add_generation_prompt=True, **chosen)
        except Exception as error:  # of the template's own: raise_exception, a missing field
            raise RefusedError(
                "messages", f"the model's chat template refuses them: {error}"
            ) from error
        if not images:
            return self._of_text(text, "messages", special=False)
        return self._of_text_and_images(text, images)

    def past(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
        """A conversation that ends in a message of the assistant's, as the template writes it."""
        template = self.template(tools=True) or ""
        if self.sees:
            parts = ({"content": [{"type": "text", "text": m["content"]}]} for m in messages)
            messages = [{**one, **part} for one, part in zip(messages, parts, strict=True)]
        return self._rendered(messages, template, tools, add_generation_prompt=False)

    def _rendered(self, messages: Any, template: str, tools: Any, **options: Any) -> str:
        owner = self.processor if self.sees else self.tokenizer
        text: str = owner.apply_chat_template(
            messages, chat_template=template, tools=tools, tokenize=False, **options
        )
        return text

    def _of_text_and_images(self, text: str, images: Sequence[Any]) -> Prompt:
        """What the processor makes of them. It gets nothing else of a request."""
        self._check_length("messages", len(text))
        first = getattr(self.tokenizer, "bos_token", None)
        begun = first is not None and text.startswith(first)
        options = {"add_special_tokens": False} if begun else {}  # as transformers does
        try:
            made = dict(
                self.processor(text=text, images=[list(images)], return_tensors="pt", **options)
            )
        except Exception as error:
            raise RefusedError("messages", f"an image cannot be read: {error}") from error
        ids = made.pop("input_ids")[0].tolist()
        made.pop("attention_mask", None)
        prompt = self._checked(Prompt(tuple(ids), made, text), "messages")
        self.room.take(sum(getattr(value, "nbytes", 0) for value in made.values()), prompt)
        return prompt

    def _of_text(self, text: str, param: str = "prompt", special: bool = True) -> Prompt:
        self._check_length(param, len(text))
        ids = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return self._checked(Prompt(tuple(ids), None, text), param)

    def _of_ids(self, ids: list[int]) -> Prompt:
        prompt = self._checked(Prompt(tuple(ids)), "prompt")
        return replace(prompt, text=self.tokenizer.decode(ids))

    def _checked(self, prompt: Prompt, param: str) -> Prompt:
        if not prompt.ids:
            raise RefusedError(param, f"{param}: expected at least one token", "")
        if len(prompt.ids) >= self.context:
            raise _too_long(param, f"{len(prompt.ids)} tokens", self.context)
        # Also of texts: a tokenizer may have tokens that were added to it alone. On a card, one
        # that the model does not know ends all further work. Those of images are replaced.
        if prompt.inputs is None and max(prompt.ids) >= self.vocabulary:
            message = f"{param}: expected tokens below {self.vocabulary}"
            raise RefusedError(param, message, max(prompt.ids))
        return prompt

    def _check_length(self, param: str, characters: int) -> None:
        if characters > self.most_characters:
            raise _too_long(param, f"{characters} characters", self.context)

    def _variables(self, asked: Chat, template: str) -> dict[str, Any]:
        """What a request sets in the template. Names that it does not read are refused.

        transformers takes any other as an option of its own: an image by its address or path, the
        size of a buffer, another template.
        """
        chosen = dict(asked.chat_template_kwargs or {})
        effort = asked.reasoning_effort
        if not chosen and effort is None:
            return chosen
        read = variables(template, self.reserved)
        names = ", ".join(sorted(read)) or "no variables"
        for name in chosen:
            if name not in read:
                message = f"chat_template_kwargs: the model's chat template takes {names}"
                raise RefusedError("chat_template_kwargs", message, name)
        if effort is not None:
            if EFFORT not in read:
                message = (
                    f"{EFFORT}: the model's chat template has no variable of this name, it takes "
                    f"{names}: leave the field out"
                )
                raise RefusedError(EFFORT, message, effort)
            if chosen.setdefault(EFFORT, effort) != effort:
                message = f"{EFFORT}: chat_template_kwargs has another one"
                raise RefusedError(EFFORT, message, effort)
        return chosen

    def _images(self, asked: Chat) -> list[Any]:
        """The images of all messages, in turn."""
        lists = (one.content for one in asked.messages if isinstance(one.content, list))
        pieces = [piece for content in lists for piece in content]
        if not self.sees and any(piece.type != "text" for piece in pieces):
            raise RefusedError("messages", "this model reads no images: expected text only")
        return decoded([piece.image_url.url for piece in pieces if piece.image_url is not None])

    def _message(self, message: Message, template: str, images: Iterator[Any]) -> dict[str, Any]:
        """A message as templates expect it: arguments of calls as objects, text as one string."""
        made = message.model_dump(exclude_none=True)
        if message.role == DEVELOPER and DEVELOPER not in template:
            made["role"] = "system"
        for call in made.get("tool_calls", ()):
            try:
                call["function"]["arguments"] = parse_json(call["function"]["arguments"])
            except ValueError as error:
                raise RefusedError("messages", "arguments of a call: expected JSON") from error
        if isinstance(message.content, list):
            made["content"] = self._content(message.content, images)
        else:
            text = message.content or ""
            made["content"] = [{"type": "text", "text": text}] if self.sees else text
        return made

    def _content(self, pieces: list[Piece], images: Iterator[Any]) -> Any:
        if not self.sees:
            return " ".join(piece.text or "" for piece in pieces)
        return [
            {"type": "text", "text": piece.text}
            if piece.image_url is None
            else {"type": "image", "image": next(images)}
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


def _too_long(param: str, got: str, context: int) -> RefusedError:
    message = (
        f"{param} has {got}. Expected at most {context - 1} tokens: this server reads {context}, "
        "with the answer"
    )
    return RefusedError(param, message, code="context_length_exceeded")
