"""Damage to the files beside the weights: tokenizer, chat template, generation settings.

`variants(path, rng)` yields (name, apply) for a good folder; `apply(copy)` damages a copy of it.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

from tests.damage.folders import inside
from tests.damage.parts import VALUES, Variants, damaged_bytes, damaged_json, kinds

COUNT = 120  # changes of fields of a file
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TEMPLATES = (
    "", "{", "{% for %}", "{{ messages[9] }}", "{{ x.y.z }}", "{{ 1 / 0 }}", "{{ 'x' * 10**8 }}",
    "{% for i in range(10**9) %}{% endfor %}", "{{ ''.__class__.__mro__ }}", "\0", "\ud800",
    "{% include '/etc/passwd' %}", "{{ raise_exception('\x1b[2J no') }}", "{% macro a() %}{{ a() }}"
    "{% endmacro %}{{ a() }}", "{{ messages }}" * 1000,
)  # fmt: skip
# Fields of generation_config.json that transformers or moepress reads.
SETTINGS = (
    "eos_token_id", "bos_token_id", "pad_token_id", "stop_strings", "temperature", "top_k", "top_p",
    "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids",
    "num_beams", "suppress_tokens", "begin_suppress_tokens", "do_sample", "max_length",
    "max_new_tokens", "max_time", "num_return_sequences", "return_dict_in_generate",
    "cache_implementation", "cache_config", "watermarking_config", "guidance_scale",
    "prompt_lookup_num_tokens", "transformers_version", "forced_eos_token_id", "sequence_bias",
    "compile_config",
)  # fmt: skip
MORE_VALUES = ("0.5", "-5", "2", "[[1]]", "[[]]", '["x"]', "[999]", '"static"', '["def"]')


def add_missing(folder: Path) -> None:
    """Give a folder each of the files, so that they can be damaged."""
    for name, content in (
        ("generation_config.json", "{}"),
        ("chat_template.jinja", TEMPLATE),
        ("special_tokens_map.json", '{"eos_token": "</s>", "bos_token": "<s>"}'),
    ):
        if not (folder / name).is_file():
            (folder / name).write_text(content, encoding="utf-8")


def variants(path: Path, rng: random.Random, count: int = COUNT) -> Variants:
    """Variants of a folder that has all of the files (`add_missing`)."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        yield from inside(name, kinds(rng))
        yield from inside(name, damaged_json(path / name, rng, count))
        yield from inside(name, damaged_bytes(path / name, rng, count // 12))
    name = "generation_config.json"
    yield from inside(name, kinds(rng))
    for _ in range(2 * count):
        field, value = rng.choice(SETTINGS), rng.choice((*VALUES, *MORE_VALUES))
        what = f"{field} = {value[:20]}"
        yield from inside(name, iter([(what, partial(_write, text=f'{{"{field}": {value}}}'))]))
    name = "chat_template.jinja"
    yield from inside(name, kinds(rng))
    yield from inside(name, damaged_bytes(path / name, rng, count // 12))
    for template in TEMPLATES:
        yield from inside(name, iter([(template[:30], partial(_write, text=template))]))


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
