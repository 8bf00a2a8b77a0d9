"""Chat: the model gets the conversation through its template, and its answer is printed."""

from __future__ import annotations

import copy
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationMixin

from moepress.chat import HELP, Conversation, chat
from moepress.compress import compress
from moepress.errors import InputError
from moepress.hf import load_model
from tests.conftest import small_recipe
from tests.llama_tokenizer import llama_tokenizer

Folder = Callable[..., Path]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def folder(model_folder: Folder, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model that has a chat template."""
    original = tmp_path_factory.mktemp("original") / "model"
    shutil.copytree(model_folder(), original)
    (original / "chat_template.jinja").write_text(TEMPLATE)
    out = tmp_path_factory.mktemp("chat") / "model"
    return compress(original, out, small_recipe(text_file, bits=2))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[object, object]:
    return load_model(folder), AutoTokenizer.from_pretrained(folder)


def greedy(loaded: tuple[object, object], text: str, tokens: int) -> str:
    """The plain way to continue a text."""
    model, tokenizer = loaded
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize(
    "template",
    ["{% for %}", "{{ 1 / 0 }}", "{{ messages[9].role }}", "", "{{ 'long ' * 4000000 }}"],
)
def test_a_template_that_fails_is_one_error(loaded: tuple[object, object], template: str) -> None:
    tokenizer = copy.copy(loaded[1])
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="chat template"):
        Conversation(loaded[0], tokenizer, tokens=2).say("def", lambda _: None)


def test_turns_are_read_through_the_template(loaded: tuple[object, object]) -> None:
    talk = Conversation(*loaded, system="Be brief.", tokens=6, temperature=0)
    pieces: list[str] = []
    first = talk.say("def f1(x):", pieces.append)
    text = "[system] Be brief.\n[user] def f1(x):\n[assistant] "
    assert first.text == "".join(pieces) == greedy(loaded, text, 6)
    assert first.tokens == 6 and not first.stopped
    assert first.tokens_per_second is not None and first.tokens_per_second > 0
    second = talk.say("go on", pieces.append)
    assert talk.past.reused > len("def f1(x):")  # what the first turn has computed
    text += f"{first.text}\n[user] go on\n[assistant] "
    assert second.text == greedy(loaded, text, 6)
    talk.reset()
    assert talk.say("def f1(x):", pieces.append).text == first.text
    assert talk.past.reused == 0


def test_raw_continues_the_text(loaded: tuple[object, object]) -> None:
    talk = Conversation(*loaded, raw=True, tokens=5, temperature=0)
    first = talk.say("def f2(x):", lambda piece: None)
    assert first.text == greedy(loaded, "def f2(x):", 5)
    second = talk.say(" and", lambda piece: None)
    assert second.text == greedy(loaded, f"def f2(x):{first.text} and", 5)


class Says:
    """A model that says " world" after each text."""

    device = torch.device("cpu")

    def __init__(self, model: object, token: int) -> None:
        self.model = model
        self.token = token
        self.read: list[list[int]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)

    def generate(self, *, input_ids: torch.Tensor, streamer: object, **_: object) -> None:
        self.read.append(input_ids[0].tolist())
        for tokens in (input_ids, torch.tensor([self.token]), torch.tensor([self.token])):
            streamer.put(tokens)
        streamer.end()


@pytest.mark.parametrize("raw", [False, True])
def test_spaces_between_words_stay(loaded: tuple[object, object], raw: bool) -> None:
    """Tokenizers in the manner of SentencePiece leave out the space that a text begins with."""
    tokenizer = llama_tokenizer()
    tokenizer.chat_template = TEMPLATE
    word = tokenizer.convert_tokens_to_ids("\u2581world")
    model = Says(loaded[0], word)
    talk = Conversation(model, tokenizer, raw=raw)
    pieces: list[str] = []
    reply = talk.say("Hello", pieces.append)
    assert reply.text == "".join(pieces) == (" world world" if raw else "world world")
    talk.say(" the", pieces.append)
    if raw:  # as one text
        assert model.read[1][:-1] == [*model.read[0], word, word]


def test_an_answer_can_be_stopped(loaded: tuple[object, object]) -> None:
    talk = Conversation(*loaded, raw=True, tokens=100, temperature=0)
    heard: list[str] = []

    def interrupt(piece: str) -> None:
        heard.append(piece)
        if len(heard) == 2:
            raise KeyboardInterrupt

    reply = talk.say("def f3(x):\n", interrupt)
    assert reply.stopped and reply.tokens < 100
    assert talk.text == "def f3(x):\n" + reply.text
    assert not talk.say("x", heard.append).stopped


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_ignores_stops_too(loaded: tuple[object, object]) -> None:
    class Interrupted:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    heard: list[str] = []

    def write(piece: str) -> None:
        heard.append(piece)
        if len(heard) == 2:
            Interrupted()

    talk = Conversation(*loaded, raw=True, tokens=100, temperature=0)
    # As in a terminal; a shell starts jobs in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        reply = talk.say("def f3(x):\n", write)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert reply.stopped and len(heard) == 2 and reply.tokens < 100


def test_an_answer_stopped_before_it_began_has_no_tokens(
    loaded: tuple[object, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(GenerationMixin, "generate", interrupted)
    reply = Conversation(*loaded, raw=True).say("x", lambda piece: None)
    assert (reply.text, reply.tokens, reply.stopped) == ("", 0, True)


def test_temperature_changes_the_answer(loaded: tuple[object, object]) -> None:
    torch.manual_seed(0)
    answers = set()
    for temperature in (0, 0, 3.0, 3.0):
        talk = Conversation(*loaded, raw=True, tokens=12, temperature=temperature)
        answers.add(talk.say("def f4(x):", lambda piece: None).text)
    assert len(answers) == 3


def test_a_long_conversation_is_refused_and_kept(loaded: tuple[object, object]) -> None:
    talk = Conversation(*loaded, raw=True, tokens=1000, temperature=0)
    reply = talk.say("def f5(x):", lambda piece: None)
    most = loaded[0].config.max_position_embeddings
    assert reply.tokens <= most
    before = talk.text
    with pytest.raises(InputError, match=f"the model reads {most}"):
        talk.say("x = 1\n" * most, lambda piece: None)
    assert talk.text == before


def test_a_session(
    folder: Path, loaded: tuple[object, object], capsys: pytest.CaptureFixture[str]
) -> None:
    turns = ["def f6(x):", "", "/reset", "/what", "def f6(x):", "/exit", "never said"]
    chat(folder, tokens=4, temperature=0, turns=turns)
    out, err = capsys.readouterr()
    answer = greedy(loaded, "[user] def f6(x):\n[assistant] ", 4)
    assert out == f"{answer}\n" * 2
    assert HELP in err and err.count("4 tokens, ") == 2 and "tokens/s)" in err


def test_what_cannot_be_is_refused_before_loading(folder: Path, model_folder: Folder) -> None:
    with pytest.raises(InputError, match="no chat template"):
        chat(model_folder(), turns=[])
    with pytest.raises(InputError, match="needs a chat template"):
        chat(folder, raw=True, system="x", turns=[])
    with pytest.raises(InputError, match="Expected at least 1 token"):
        chat(folder, tokens=0, turns=[])
    with pytest.raises(InputError, match="No model folder"):
        chat(folder / "missing", turns=[])
    with pytest.raises(InputError, match="threads is 0"):
        chat(folder, threads=0, turns=[])
