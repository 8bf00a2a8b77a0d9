"""Talk to a model in the terminal.

    $ moepress chat mixtral-2.5bit
    > Why is the sky blue?
    ...                                  text appears as it is generated; Ctrl-C stops
    (42 tokens, 6.1 tokens/s)            on stderr
    > /reset                             forgets the conversation

The model's own chat template turns the conversation into text. A model without one was not trained
to chat: with `raw` it continues what is typed instead.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from moepress.errors import FileError, InputError
from moepress.generation import chat_settings, context_of, following, left_aside
from moepress.hf import load_model, set_threads, text_model
from moepress.hf.captured import CapturedSteps
from moepress.hf.past import Past
from moepress.original.folder import resolve
from moepress.original.remote_code import tokenizer_of
from moepress.pieces import Pieces
from moepress.prune import Pruning, Strength
from moepress.store.memory import Memory
from moepress.store.statistics import statistics

HELP = "/reset forgets the conversation, /exit ends it, Ctrl-C stops an answer."
PROMPT = "> "
LONGEST = 1 << 24  # characters of a conversation, as the template writes it


@dataclass(frozen=True)
class Reply:
    """An answer of a model."""

    text: str
    tokens: int
    tokens_per_second: float | None  # without the first token; None: fewer than two tokens
    stopped: bool  # interrupted by the user


class Conversation:
    """A conversation between a user and a model.

    Args:
        model, tokenizer: of transformers, loaded.
        system: system message; None: none.
        raw: continue the user's text, without a chat template.
        tokens: most tokens of an answer.
        temperature: 0: greedy; None: as the model's own generation settings say.

    Raises:
        InputError: the model has no chat template, or an option is out of range.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system: str | None = None,
        raw: bool = False,
        tokens: int = 512,
        temperature: float | None = None,
    ) -> None:
        check_options(tokenizer, system, raw, tokens, temperature)
        self.model = model
        self.tokenizer = tokenizer
        self.system = system
        self.raw = raw
        self.tokens = tokens
        self.temperature = temperature
        self.settings = chat_settings(model)
        self.steps = CapturedSteps(model)  # kept from turn to turn
        self.past = Past(model)
        self.reset()

    def reset(self) -> None:
        """Forget the conversation so far."""
        self.past.forget()
        self.text = ""  # all that was said, for `raw`
        self.messages: list[dict[str, str]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})

    def say(self, text: str, write: Callable[[str], None]) -> Reply:
        """Answer a turn, passing each piece of the answer to `write` as soon as it is generated.

        Raises:
            InputError: the conversation exceeds the model's context; this turn is not kept.
        """
        ids = self._ids(text)
        prompt: list[int] = ids[0].tolist()
        room = self._room(len(prompt))
        # Through a template an answer begins a text of its own.
        after = prompt if self.raw else []
        streamer = _Streamer(Pieces(self.tokenizer, after=after), write)
        stopped = False
        try:
            with (
                torch.inference_mode(),
                following(self.model, self.settings),
                self.steps,
                _heeding_interrupts(streamer),
            ):
                self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    tokenizer=self.tokenizer,
                    streamer=streamer,
                    max_new_tokens=min(self.tokens, room),
                    **self.past.begin(prompt),
                    **self._sampling(),
                )
        except KeyboardInterrupt:
            streamer.end()
            stopped = True
        self.past.end(prompt + streamer.ids, whole=not stopped)
        self.text += text + streamer.text
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": streamer.text},
        ]
        return Reply(streamer.text, max(streamer.tokens, 0), streamer.tokens_per_second, stopped)

    def _ids(self, text: str) -> torch.Tensor:
        """Token ids [1, T] int64 of the conversation so far and this turn.

        Raises:
            FileError: the chat template fails, or writes nothing.
        """
        if self.raw:
            found = self.tokenizer(self.text + text, return_tensors="pt")
        else:
            found = self._written([*self.messages, {"role": "user", "content": text}])
        ids: torch.Tensor = found["input_ids"].to(self.model.device)
        return ids

    def _written(self, messages: list[dict[str, str]]) -> Any:
        """What the chat template makes of messages, as tokens."""
        found: Any = None
        try:
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            if len(text) > LONGEST:  # tokenizers end the process where memory is short
                reason = f"it writes {len(text):,} characters"
            else:
                found = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
                reason = "" if found["input_ids"].numel() else "it writes nothing"
        except MemoryError:
            raise
        except Exception as error:  # a template is a program and may raise anything
            reason = f"{type(error).__name__}: {error}"
        if reason:
            raise FileError(
                f"The model's chat template fails on the conversation ({reason}). Expected text: "
                "restore its chat_template.jinja or tokenizer_config.json, or chat with --raw."
            )
        return found

    def _room(self, used: int) -> int:
        """Tokens left in the model's context after `used` ones."""
        most = context_of(self.model.config.get_text_config(decoder=True)) or sys.maxsize
        if used >= most:
            raise InputError(
                f"The conversation has {used:,} tokens, the model reads {most:,}. /reset forgets "
                "the conversation."
            )
        return int(most - used)

    def _sampling(self) -> dict[str, Any]:
        if self.temperature is None:
            return {}
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature}


def check_options(
    tokenizer: Any, system: str | None, raw: bool, tokens: int, temperature: float | None
) -> None:
    """Raise InputError for options that `Conversation` refuses, before a model is loaded."""
    if tokens < 1 or (temperature is not None and not 0 <= temperature < math.inf):
        raise InputError(
            f"tokens is {tokens} and temperature {temperature}. Expected at least 1 token and a "
            "finite temperature of 0 or above."
        )
    if not raw and not tokenizer.chat_template:
        raise InputError(
            "This model has no chat template: it was not trained to chat. Use --raw to have it "
            "continue what you type, or add a chat_template.jinja to its folder."
        )
    if raw and system is not None:
        raise InputError("A system message needs a chat template. Leave out --raw or --system.")


class _Streamer(BaseStreamer):  # type: ignore[misc]  # transformers is untyped
    """Pass text to `write` as soon as its characters are complete; count and time tokens."""

    def __init__(self, pieces: Pieces, write: Callable[[str], None]) -> None:
        self.pieces = pieces
        self.write = write
        self.text = ""
        self.ids: list[int] = []  # of the answer
        self.tokens = -1  # the first `put` gets the prompt
        self.interrupted = False
        self.first = self.last = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        return (self.tokens - 1) / (self.last - self.first) if self.tokens > 1 else None

    def put(self, value: torch.Tensor) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.tokens += 1
        self.last = time.perf_counter()
        if self.tokens == 0:
            return
        if self.tokens == 1:
            self.first = self.last
        for token in value.flatten().tolist():
            self.ids.append(token)
            self._give(self.pieces.add(token))

    def end(self) -> None:
        self._give(self.pieces.end())

    def _give(self, text: str) -> None:
        if text:
            self.text += text
            self.write(text)


@contextmanager
def _heeding_interrupts(streamer: _Streamer) -> Iterator[None]:
    """Inside the `with` statement, Ctrl-C ends the text at the next token at the latest.

    Python ignores the exception of a Ctrl-C that comes during a `__del__`, and torch has some.
    """
    raises = signal.default_int_handler
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not raises:  # it is somebody else's
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        streamer.interrupted = True
        raises(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, raises)


def chat(
    folder: str | Path,
    *,
    system: str | None = None,
    raw: bool = False,
    tokens: int = 512,
    temperature: float | None = None,
    threads: int | None = None,
    device: str = "cpu",
    activation_bits: int = 8,
    pruning: Strength | Pruning | None = None,
    memory: Memory | None = None,
    gpu_memory: int | None = None,
    trust_remote_code: bool = False,
    turns: Iterable[str] | None = None,
) -> None:
    """Answer turns on stdout until they end; notes such as the speed go to stderr.

    Args:
        folder: a folder made by moepress, or an original model that fits in memory (folder or hub
            id).
        system, raw, tokens, temperature: see `Conversation`.
        threads: CPU threads; None: torch's setting.
        device: "cpu", or a card such as "cuda" or "cuda:1".
        activation_bits: for a compressed model, see `set_activation_bits`.
        pruning: for a compressed model, see `prune`; None: as stored in the folder.
        memory: for a compressed model, bytes for its weights, "all" or "mapped"
            (store/memory.py); None: mapped if it fits.
        gpu_memory: for a compressed model on a card, bytes of its memory for weights, see
            `hf.load_model`.
        trust_remote_code: run code in the model's folder, where transformers has no class for it.
        turns: what the user says; None: lines of stdin.

    Raises:
        InputError: no such folder, no chat template, or an option is out of range.
    """
    folder = resolve(folder)
    set_threads(threads)
    tokenizer = tokenizer_of(folder, trust_remote_code)
    check_options(tokenizer, system, raw, tokens, temperature)
    model = text_model(
        load_model(folder, device, activation_bits, pruning, trust_remote_code, memory, gpu_memory)
    )
    conversation = Conversation(
        model, tokenizer, system=system, raw=raw, tokens=tokens, temperature=temperature
    )
    if ignored := left_aside(model, conversation.settings):
        _say(f"(A chat does not follow these settings of the model: {ignored}.)")
    for text in _typed() if turns is None else turns:
        command = text.strip()
        if command in ("/exit", "/quit"):
            return
        if command == "/reset":
            conversation.reset()
            _say("(conversation forgotten)")
        elif command.startswith("/"):
            _say(HELP)
        elif command:
            _answer(conversation, text)


def _answer(conversation: Conversation, text: str) -> None:
    before = statistics(conversation.model)
    try:
        reply = conversation.say(text, lambda piece: print(piece, end="", flush=True))
    except InputError as error:  # too long: the conversation is unchanged
        _say(str(error))
        return
    print(flush=True)
    rate = reply.tokens_per_second
    speed = "" if rate is None else f", {rate:.1f} tokens/s"
    after = statistics(conversation.model)
    disk = "" if before is None or after is None else f", {after.since(before)}"
    _say(f"({reply.tokens} tokens{speed}{disk}{', stopped' if reply.stopped else ''})")


def _typed() -> Iterator[str]:
    """Lines of stdin; on a terminal, with a prompt and line editing."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() a history and the arrow keys
    _say(HELP)
    while True:
        try:
            yield input(PROMPT)
        except (EOFError, KeyboardInterrupt):
            _say("")
            return


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
