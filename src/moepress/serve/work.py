"""What the engine is asked to do, and what it answers."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from moepress.serve.grammar import Grammar
from moepress.serve.parsing import Message, Reader
from moepress.serve.sampling import Choice, Sampler, Settings
from moepress.serve.stepping import State
from moepress.serve.writing import Writer

Finish = Literal["stop", "length"]  # answers.py says where calls of tools ended it


@dataclass(frozen=True)
class Prompt:
    """The tokens to continue, and what a processor made of images beside them."""

    ids: tuple[int, ...]
    inputs: Mapping[str, Any] | None = None
    text: str = ""  # the prompt as text, for parsers and `echo`


@dataclass(frozen=True)
class Wanted:
    """What every answer to a request has in common."""

    settings: Settings
    most: int  # new tokens; 0 with `score`
    stop: tuple[str, ...] = ()  # texts that end an answer
    parser: Callable[[str], Reader | None] | None = None  # from the prompt's text
    grammar: Grammar | None = None  # that the answer is held to
    score: bool = False  # also the logprobs of the prompts' tokens
    continues: bool = False  # the answer goes on with the prompt's text: it may begin with a space


@dataclass(frozen=True)
class Event:
    """News of one answer of a request."""

    index: int  # of the answer
    message: Message
    choices: tuple[Choice, ...] = ()  # tokens whose text is certain now
    starts: tuple[int, ...] = ()  # where they begin in the text, in characters
    finish: Finish | None = None  # set in the last event of an answer
    error: str | None = None  # the answer ends here: why
    scored: tuple[Choice, ...] | None = None  # if `Answer.scores`: of the prompt but its first
    tokens: int = 0  # generated so far
    reused: int = 0  # tokens of the prompt that were taken over from another text


class Job:
    """One request: its answers, and the way back to the client.

    Args:
        prompts: one for each answer; answers with the same prompt follow each other.
        wanted: of all answers.
        loop: in which `events` is read.
        ends: time (monotonic seconds) of the deadline.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        wanted: Wanted,
        loop: asyncio.AbstractEventLoop,
        ends: float,
    ) -> None:
        self.prompts = tuple(prompts)
        self.wanted = wanted
        self.ends = ends
        self.cancelled = False  # the client has left: set in its thread, read by the engine
        self.done = False  # the client got all of it, or why not
        self.begun = time.monotonic()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = loop

    def tell(self, event: Event) -> None:
        """Pass an event to the client's coroutine. Called by the engine."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


@dataclass
class Answer:
    """One answer, while the engine makes it."""

    job: Job
    index: int
    writer: Writer
    sampler: Sampler
    parser: Reader | None
    state: State | None = None  # None: waiting
    last: int = 0  # token, of which the next step computes the logits
    tokens: int = 0  # generated so far
    reused: int = 0  # tokens of its prompt that were taken over from another text
    untold: deque[Choice] = field(default_factory=deque)  # its tokens whose text is not certain
    scored: list[Choice] = field(default_factory=list)

    @property
    def prompt(self) -> Prompt:
        return self.job.prompts[self.index]

    @cached_property
    def first(self) -> list[int]:
        """The tokens of its prompt that need not be computed: the last one gives the logits."""
        return list(self.prompt.ids[:-1])

    @property
    def scores(self) -> bool:
        """Whether it has the logprobs of its prompt: the first of all answers to that prompt."""
        prompts, at = self.job.prompts, self.index
        return self.job.wanted.score and (at == 0 or prompts[at] is not prompts[at - 1])

    def told(self) -> tuple[tuple[Choice, ...], tuple[int, ...]]:
        """Tokens whose text became certain since the last call, and where they begin in it."""
        starts = self.writer.told()[: len(self.untold)]  # a writer may know the one that ends
        return tuple(self.untold.popleft() for _ in starts), tuple(starts)

    @property
    def room(self) -> int:
        """Tokens that its cache may come to hold."""
        return len(self.prompt.ids) + self.job.wanted.most
