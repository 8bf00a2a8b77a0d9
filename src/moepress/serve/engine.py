"""Continuous batching: one thread that computes the answers to all requests.

Each turn of its loop takes in new requests, drops those whose client has left or whose deadline
has passed, computes at most `CHUNK` tokens of prompts, and then one token of every running answer.
So a long prompt delays the others by one chunk at a time, and an answer that is no longer wanted
costs at most one turn. Prompts take turns. A request's second answer waits as if it had come one
request later, its third two, and so on: nobody waits for all of a large request, and no answer for
more than a certain number of later ones.

A prompt that begins like another text goes on from what the model keeps of that one: an answer that
is being computed, or one that is done (kept.py). So the turns of a conversation, a system message
and the prompt of several answers are computed once.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moepress.hf.growing_cache import room_beyond
from moepress.hf.prefix import GAIN, place_of_mark
from moepress.serve.grammar import GrammarError
from moepress.serve.kept import Kept
from moepress.serve.limits import Limits
from moepress.serve.parsing import Message
from moepress.serve.sampling import Sampler, described
from moepress.serve.stepping import CHUNK, State, Stepper
from moepress.serve.work import Answer, Event, Finish, Job
from moepress.serve.writing import Writer

logger = logging.getLogger(__name__)

FAILED = "The model failed on this request; the server's log says how."
LATE = "The deadline of the request has passed."
STOPPING = "The server is stopping."


class Engine:
    """Computes answers until `stop`.

    Args:
        stepper: the model.
        tokenizer: of transformers.
        ends: tokens that end an answer.
        limits: of the server.
        cache: bytes that all caches may take.
        reuse: whether prompts begin with what other texts have in common with them.

    Attributes:
        generated, prefilled, reused: tokens since the start: of answers, of prompts, and of prompts
            that another text had in common.
    """

    def __init__(
        self,
        stepper: Stepper,
        tokenizer: Any,
        ends: Sequence[int],
        limits: Limits,
        cache: int,
        *,
        reuse: bool = True,
    ) -> None:
        self.stepper = stepper
        self.tokenizer = tokenizer
        self.ends = frozenset(ends)
        self.limits = limits
        self.cache = cache
        stepper.keep_within(cache)
        self.reuse = reuse and stepper.begins
        self.generated = self.prefilled = self.reused = 0
        self._kept = Kept(stepper.reach, self._bytes_of)
        self._inbox: deque[Job] = deque()
        self._waiting: list[tuple[int, int, Answer]] = []  # a heap
        self._arrivals = itertools.count()  # of requests
        self._prompts: deque[Answer] = deque()  # whose prompts are being computed
        self._running: list[Answer] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._turn_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="moepress-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Have a job computed. Its answers come as events."""
        with self._wake:
            self._inbox.append(job)
            self._wake.notify()

    def stop(self, seconds: float) -> bool:
        """End all answers and the thread. Returns whether it ended within the time."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def running(self) -> int:
        return len(self._running) + len(self._prompts)

    @property
    def waiting(self) -> int:
        return len(self._waiting) + sum(len(job.prompts) for job in list(self._inbox))

    def trouble(self) -> str | None:
        """Why the engine does not work; None: it does."""
        if not self._thread.is_alive():
            return "stopped"
        began = self._turn_began
        if began is not None and time.monotonic() - began > self.limits.stuck:
            return "stuck"
        return None

    def held(self, answer: Answer) -> int:
        """Bytes that an answer's cache may come to take."""
        return self._bytes(answer.room)

    def _bytes_of(self, state: State) -> int:
        return self._bytes(state.length)

    def _bytes(self, tokens: int) -> int:
        """Bytes of a sequence of so many tokens, with a mark where the model forgets."""
        least = self.stepper.least_bytes * (2 if self.stepper.forgets else 1)
        return least + (tokens + room_beyond(tokens)) * self.stepper.token_bytes

    def _run(self) -> None:
        try:
            try:
                while not self._stopping:
                    self._turn()
            finally:
                self.stepper.close()
        except Exception:  # a fault of this module: /health reports that the thread has ended
            logger.exception("the engine failed")
        why = STOPPING if self._stopping else FAILED
        for answer in self._all():
            self._fail(answer, why)
        for job in self._inbox:
            job.tell(Event(0, Message(), error=why))

    def _turn(self) -> None:
        self._turn_began = None
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._inbox or self._all())
            jobs = list(self._inbox)
            self._inbox.clear()
        self._turn_began = time.monotonic()
        for job in jobs:
            self._take(job)
        self._sweep()
        self._admit()
        self._prefill()
        self._decode()

    def _all(self) -> list[Answer]:
        return [*self._running, *self._prompts, *(answer for _, _, answer in self._waiting)]

    def _take(self, job: Job) -> None:
        wanted = job.wanted
        arrival = next(self._arrivals)
        for index, prompt in enumerate(job.prompts):
            try:
                parser = None if wanted.parser is None else wanted.parser(prompt.text)
                answer = Answer(
                    job,
                    index,
                    Writer(
                        self.tokenizer,
                        wanted.stop,
                        raw=parser is not None,
                        after=prompt.ids if wanted.continues else (),
                    ),
                    Sampler(
                        wanted.settings,
                        prompt.ids,
                        index,
                        None if wanted.grammar is None else wanted.grammar.matcher(),
                    ),
                    parser,
                )
            except Exception:
                logger.exception("a request could not begin")
                job.tell(Event(index, Message(), error=FAILED))
                continue
            heapq.heappush(self._waiting, (arrival + index, arrival, answer))

    def _sweep(self) -> None:
        """Drop the answers of those who left, and those that are late."""
        now = time.monotonic()
        over = {id(a.job) for a in self._all() if a.job.cancelled or now > a.job.ends}
        if not over:
            return
        for answer in self._all():
            if id(answer.job) in over:
                self._keep(answer)
                if not answer.job.cancelled:
                    self._fail(answer, LATE)
        self._running = [a for a in self._running if id(a.job) not in over]
        self._prompts = deque(a for a in self._prompts if id(a.job) not in over)
        self._waiting = [entry for entry in self._waiting if id(entry[2].job) not in over]
        heapq.heapify(self._waiting)

    def _admit(self) -> None:
        """Start waiting answers while there is room."""
        free = self.cache - sum(map(self.held, [*self._running, *self._prompts]))
        while self._waiting and self.running < self.limits.concurrent:
            answer = self._waiting[0][2]
            free -= self.held(answer)
            if free < 0 and self.running:
                return
            heapq.heappop(self._waiting)
            answer.state = self._begun(answer, max(0, free))
            self._prompts.append(answer)

    def _begun(self, answer: Answer, free: int) -> State:
        """A sequence for an answer, with first tokens of its prompt if they are kept.

        Args:
            free: bytes that kept sequences may take beside it.
        """
        found = self._kept.best(answer.first) if self._may_take(answer) else None
        if found is None or found[1] < GAIN:
            self._kept.make_room(free)
            return self.stepper.new()
        state, first = found
        self._took(answer, first)
        if first == state.length:  # the text goes on: who else would go on from it?
            self._kept.take(state)
            self._kept.make_room(free)
            return state
        self._kept.make_room(free, last=state)
        return self.stepper.beginning(state, first)

    def _may_take(self, answer: Answer) -> bool:
        """Whether an answer's prompt may begin with what another text has in common with it."""
        return self.reuse and answer.prompt.inputs is None and not answer.scores

    def _took(self, answer: Answer, tokens: int) -> None:
        answer.reused += tokens
        self.reused += tokens

    def _keep(self, answer: Answer) -> None:
        """Keep the sequence of an answer that ends here, where no other may come to need memory."""
        if answer.state is not None and self.reuse:
            others = (a for a in (*self._running, *self._prompts) if a is not answer)
            self._kept.add(answer.state, max(0, self.cache - sum(map(self.held, others))))

    def _prefill(self) -> None:
        """Compute parts of prompts, in turn, `CHUNK` tokens in all; images make a prompt whole."""
        left = CHUNK
        for _ in range(len(self._prompts)):
            answer = self._prompts.popleft()
            try:
                left -= self._prefill_one(answer, left)
            except GrammarError as error:
                self._fail(answer, str(error))
            except Exception:
                logger.exception("a prompt could not be computed")
                self._fail(answer, FAILED)
            if left <= 0:
                return

    def _prefill_one(self, answer: Answer, most: int) -> int:
        """Tokens computed of a prompt. Its answer goes where it belongs now."""
        if self._may_take(answer):
            self._overtake(answer)
        state, prompt = answer.state, answer.prompt
        assert state is not None
        start, marks = state.length, self._marks(answer)
        end = self._end_of_part(answer, start, marks, most)
        ids = prompt.ids[start:end]
        score = answer.scores
        logits = self.stepper.prefill(state, ids, prompt.inputs, all_logits=score)
        if end == marks:
            self.stepper.mark(state)
        self.prefilled += len(ids)
        if score:
            self._score(answer, logits, start)
            logits = logits[-1]
        if state.length < len(prompt.ids):
            self._prompts.append(answer)
        elif self._next(answer, logits):
            self._running.append(answer)
        else:
            self._keep(answer)
        return len(ids)

    def _overtake(self, answer: Answer) -> None:
        """Go on from another answer's sequence that has more of the prompt."""
        assert answer.state is not None
        others = [a.state for a in (*self._running, *self._prompts) if a.state is not None]
        reached = [self.stepper.reach(state, answer.first) for state in others]
        first = max(reached, default=0)
        gain = first - answer.state.length
        if gain >= GAIN:
            answer.state = self.stepper.beginning(others[reached.index(first)], first)
            self._took(answer, gain)

    def _marks(self, answer: Answer) -> int:
        """The place in an answer's prompt that gets a mark; 0: none does."""
        marks = self.stepper.forgets and self._may_take(answer)
        return place_of_mark(len(answer.prompt.ids)) if marks else 0

    def _end_of_part(self, answer: Answer, start: int, marks: int, most: int) -> int:
        """Where the part of a prompt ends that begins at a place."""
        tokens = len(answer.prompt.ids)
        if answer.prompt.inputs is not None or not self.stepper.chunks:
            return tokens
        end = min(start + most, tokens)
        return marks if start < marks < end else end

    def _score(self, answer: Answer, logits: Tensor, start: int) -> None:
        """Keep the logprobs of a prompt's tokens start + 1 .. start + len(logits)."""
        most = answer.job.wanted.settings.logprobs or 0
        following = answer.prompt.ids[start + 1 : start + 1 + len(logits)]
        for row, token in zip(logits, following, strict=False):
            answer.scored.append(described(row, token, most))

    def _decode(self) -> None:
        """One token of every running answer."""
        answers = self._running
        if not answers:
            return
        states = [answer.state for answer in answers if answer.state is not None]
        try:
            logits = self.stepper.decode(states, [answer.last for answer in answers])
        except Exception:  # out of memory, for example: the caches may be in any state
            logger.exception("a step failed")
            for answer in answers:
                self._fail(answer, FAILED)
            self._running = []
            return
        running = []
        for answer, row in zip(answers, logits, strict=True):
            try:
                if self._next(answer, row):
                    running.append(answer)
                else:
                    self._keep(answer)
            except GrammarError as error:
                self._fail(answer, str(error))
            except Exception:
                logger.exception("an answer could not go on")
                self._fail(answer, FAILED)
        self._running = running

    def _next(self, answer: Answer, logits: Tensor) -> bool:
        """Add a token to an answer and tell the client. Returns whether the answer goes on."""
        wanted = answer.job.wanted
        if wanted.most == 0:
            self._tell(answer, "", "length")
            return False
        choice = answer.sampler.choose(logits)
        answer.last = choice.token
        answer.tokens += 1
        self.generated += 1
        ended = choice.token in self.ends
        writer = answer.writer
        if not ended:
            answer.untold.append(choice)
        # Parsers know the token that ends an answer; a reader need not see it.
        text = "" if ended and answer.parser is None else writer.add(choice.token)
        over = ended or answer.sampler.complete
        finish: Finish | None = None
        if over or writer.stopped or answer.tokens >= wanted.most:
            text += writer.end()
            finish = "stop" if over or writer.stopped else "length"
        self._tell(answer, text, finish)
        return finish is None

    def _tell(self, answer: Answer, text: str, finish: Finish | None) -> None:
        message = Message(text)
        if answer.parser is not None:
            message = answer.parser.feed(text)
            if finish:
                message.add(answer.parser.end(cut=finish == "length"))
                if answer.last in self.ends:
                    message = message.without_end(self.tokenizer.decode([answer.last]))
        scored = tuple(answer.scored) if finish and answer.scores else None
        choices, starts = answer.told()
        answer.job.tell(
            Event(
                answer.index,
                message,
                choices,
                starts,
                finish,
                scored=scored,
                tokens=answer.tokens,
                reused=answer.reused,
            )
        )

    def _fail(self, answer: Answer, why: str) -> None:
        answer.job.tell(Event(answer.index, Message(), error=why, tokens=answer.tokens))
