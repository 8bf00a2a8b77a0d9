"""The options that say how to compress, and the recipe made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moepress.recipe import Recipe

Bits = Annotated[
    float | None, typer.Option(help="Budget: average code bits of the routed experts.")
]
Bpw = Annotated[float | None, typer.Option(help="Budget: stored bits per weight of the model.")]
Size = Annotated[str | None, typer.Option(help="Budget: bytes of the folder, such as 16GB.")]
RecipeName = Annotated[
    str, typer.Option(help="default, fast, paper, paper-released, or a .toml or .json file.")
]
# The values that the named recipes have. Written out, since importing them would slow down --help;
# a test compares them.
DEFAULTS = {
    "calib": "self",
    "sequences": "128",
    "sequence_length": "512",
    "score_tokens": "4096",
    "expert_bits": "1,1.5,2,2.5,3,3.5,4; fast: 1,2,3,4; paper: 1,2,3",
    "expert_codec": "trellis; fast, paper: int",
    "over": "mean",
    "group_size": "128",
    "seed": "0",
}

Calib = Annotated[
    list[str] | None,
    typer.Option(
        help="Calibration text as PATH[=WEIGHT]: a text, .jsonl or .json file, a folder, c4, "
        "wikitext2, math, stdlib, or self (the model's own samples). Repeatable.",
        show_default=DEFAULTS["calib"],
    ),
]
Sequences = Annotated[
    int | None, typer.Option(help="Calibration sequences.", show_default=DEFAULTS["sequences"])
]
Length = Annotated[
    int | None,
    typer.Option(
        "--sequence-length",
        help="Tokens per sequence, special ones that texts begin with included.",
        show_default=DEFAULTS["sequence_length"],
    ),
]
ScoreTokens = Annotated[
    int | None,
    typer.Option(
        "--score-tokens",
        help="Tokens of an expert, in the mean, that its costs are measured on; 0, and recipes but "
        "default: all.",
        show_default=DEFAULTS["score_tokens"],
    ),
]
WIDTHS_HELP = "Widths offered to experts, such as 1,1.5,2; 0 leaves an expert out."
Widths = Annotated[
    str | None,
    typer.Option("--expert-bits", help=WIDTHS_HELP, show_default=DEFAULTS["expert_bits"]),
]
WidthsOfScores = Annotated[
    str | None,
    typer.Option("--expert-bits", help=WIDTHS_HELP, show_default="all in the scores"),
]
ExpertCodec = Annotated[
    str | None,
    typer.Option(
        help="How experts are stored: int (scalar grids) or trellis.",
        show_default=DEFAULTS["expert_codec"],
    ),
]
Over = Annotated[
    str | None,
    typer.Option(
        help="Loss to minimise: mean (all calibration text) or worst (of the texts).",
        show_default=DEFAULTS["over"],
    ),
]
Group = Annotated[
    int | None,
    typer.Option(
        "--group-size", help="Weights that share a scale.", show_default=DEFAULTS["group_size"]
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(help="Seed of every random choice.", show_default=DEFAULTS["seed"]),
]


def recipe_of(
    name: str,
    *,
    bits: float | None = None,
    bpw: float | None = None,
    size: str | None = None,
    calib: list[str] | None = None,
    sequences: int | None = None,
    sequence_length: int | None = None,
    score_tokens: int | None = None,
    expert_bits: str | None = None,
    expert_codec: str | None = None,
    over: str | None = None,
    group_size: int | None = None,
    seed: int | None = None,
) -> Recipe:
    """The named recipe, changed by the options that are not None."""
    from moepress.recipe import Recipe, parse_size, parse_widths
    from moepress.text.windows import parse_text

    changes: dict[str, Any] = {
        "bits": bits,
        "bpw": bpw,
        "size": parse_size(size) if size is not None else None,
        "calib": tuple(parse_text(text) for text in calib) if calib else None,
        "sequences": sequences,
        "sequence_length": sequence_length,
        "score_tokens": score_tokens,
        "expert_bits": parse_widths(expert_bits) if expert_bits is not None else None,
        "expert_codec": expert_codec,
        "over": over,
        "group_size": group_size,
        "seed": seed,
    }
    return Recipe.load(name, **{k: v for k, v in changes.items() if v is not None})
