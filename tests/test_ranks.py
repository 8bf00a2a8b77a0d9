"""Compression by several processes: the bytes of one, also after one of them was killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from moepress.allocation.plan import BitAllocation
from moepress.cli import job
from moepress.format.checkpoint import PLAN, SCORES
from moepress.original import batches
from moepress.original.division import Division
from moepress.ranks import ALONE, Ranks
from moepress.rounding import factor
from moepress.rounding.factor import column_slices
from moepress.rounding.gathering import divided
from tests.cli.test_cli import SMALL, run
from tests.families.models import make_model, save_model
from tests.original.test_carried import LOOP
from tests.uneven import with_uneven_channels, with_uneven_norms

Folder = Callable[..., Path]
BATCH = 64  # tokens: two sequences, so that there are three batches
NOBODY = "none 0 score 0"  # dies


def torchrun(count: int, dies: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a command of moepress on `count` ranks; see tests/ranked.py."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "tests.ranked"]
    command = [sys.executable, *start, str(BATCH), *dies.split(), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def on_two_machines(dies: str, *words: Sequence[object], path: Path) -> list[tuple[int, str]]:
    """Run a command on two ranks of two launchers, as two machines would: exit codes and stderr.

    Args:
        words: of each machine, which may have other paths.
        path: where each machine has a working directory, temporary files and a name of its own.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[1]
    started = []
    for number, own in enumerate(words):
        place = path / "machines" / str(number)
        (place / "tmp").mkdir(parents=True, exist_ok=True)
        start = f"-m torch.distributed.run --nnodes 2 --node-rank {number} --nproc-per-node 1"
        start += f" --master-addr localhost --master-port {port} -m tests.ranked {BATCH} {dies}"
        environment = {
            **os.environ,
            "TMPDIR": str(place / "tmp"),
            "HOSTNAME": f"machine{number}",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "PYTHONPATH": os.pathsep.join((str(root / "src"), str(root))),
        }
        command = [sys.executable, *start.split(), *map(str, own)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=place, env=environment, **pipes))
    return [(one.communicate(timeout=300)[1], one.returncode)[::-1] for one in started]


def told(stderr: str) -> list[str]:
    """What moepress says in the end."""
    return [line for line in stderr.splitlines() if line.startswith("moepress: ")]


def files(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items()}


@pytest.fixture
def alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., None]:
    """A function that compresses in this process, in the batches of `torchrun`."""

    def compress(*words: object) -> None:
        monkeypatch.setattr(batches, "BATCH_TOKENS", BATCH)
        monkeypatch.setattr(factor, "COLUMNS_PER_SLICE", 24)
        code, _, err = run(monkeypatch, capsys, "-q", "compress", *words)
        assert code == 0, err

    return compress


def test_a_killed_rank_ends_the_job_and_one_process_finishes_it_with_the_same_bytes(
    model_folder: Folder, text_file: Path, tmp_path: Path, alone: Callable[..., None]
) -> None:
    """`default`: backward walk, drawn errors, trellis codes and the correction. And a dense layer,
    latent attention and shared experts."""
    several, one = tmp_path / "several", tmp_path / "one"
    rest = ("--bits", 2, "--calib", text_file, *SMALL)
    model = model_folder("deepseek_v3", "bfloat16")
    ended = torchrun(2, "kill 1 quantize 1", "compress", model, several, *rest)
    (line,) = told(ended.stderr)
    assert ended.returncode == 1 and ended.stdout == ""
    assert "Another rank" in line or "stopped by SIGTERM" in line  # from torchrun, if it is faster
    assert (several / SCORES).is_file() and (several / "model-layer-0000.safetensors").is_file()
    assert not (several / "model-layer-0001.safetensors").exists()

    for out in (several, one):
        alone(model, out, *rest)
    assert files(one) == files(several)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("family", "recipe", "count"),
    [
        ("deepseek_v3", "default", 4),  # rank 3 has no sequences
        ("mixtral", "default", 2),
        ("qwen2_moe", "default", 3),
        ("mixtral", "fast", 3),
        ("qwen2_moe", "paper", 2),
        ("uneven mixtral", "default", 2),  # norms, values and inputs of its experts are scaled
    ],
)
def test_any_number_of_ranks_writes_the_same_bytes(
    family: str,
    recipe: str,
    count: int,
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    alone: Callable[..., None],
) -> None:
    rest = ("--bits", 2, "--recipe", recipe, "--calib", text_file, *SMALL)
    model = model_folder(family.removeprefix("uneven "), "bfloat16")
    if family.startswith("uneven"):
        model = with_uneven_norms(model, tmp_path / "norms")
        model = with_uneven_channels(model, tmp_path / "uneven")
    ended = torchrun(count, NOBODY, "compress", model, tmp_path / "several", *rest)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [str(tmp_path / "several")]
    assert sum("WARNING" in line for line in ended.stderr.splitlines()) <= 1
    alone(model, tmp_path / "one", *rest)
    assert files(tmp_path / "one") == files(tmp_path / "several")
    scaled = BitAllocation.load(tmp_path / "one" / PLAN).scaled_layers
    assert bool(scaled) == family.startswith("uneven")


@pytest.mark.ranks
def test_layers_that_run_several_times(
    text_file: Path, tokenizer_folder: Path, tmp_path: Path, alone: Callable[..., None]
) -> None:
    """Three batches in each of three passes: two ranks have two and one, the fourth has none. A
    rank is killed inside the loop, and three ranks go on."""
    model = save_model(
        make_model("inkling2_loop_text", **LOOP).bfloat16(), tmp_path / "model", tokenizer_folder
    )
    rest = ("--bits", 2, "--calib", text_file, *SMALL)
    alone(model, tmp_path / "one", *rest)
    for count in (2, 4):
        ended = torchrun(count, NOBODY, "compress", model, tmp_path / str(count), *rest)
        assert ended.returncode == 0, ended.stderr
        assert files(tmp_path / "one") == files(tmp_path / str(count))
    for count, kill in ((2, "kill 1 score 2"), (4, "kill 1 quantize 3"), (3, NOBODY)):
        ended = torchrun(count, kill, "compress", model, tmp_path / "killed", *rest)
        assert ended.returncode == int(kill != NOBODY), ended.stderr
    assert files(tmp_path / "one") == files(tmp_path / "killed")


@pytest.mark.ranks
def test_bad_input_is_told_once(tmp_path: Path) -> None:
    ended = torchrun(2, NOBODY, "score", tmp_path / "missing", tmp_path / "s.safetensors")
    (line,) = told(ended.stderr)
    assert "No model folder" in line and ended.returncode == 1


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("dies", "says"),
    [
        ("raise 1 quantize 1", "Layer 1 gives NaN"),
        ("full 0 score 1", "refused folder/file: No space left"),
        ("kill 0 quantize 1", "verything finished is kept"),
    ],
)
def test_one_rank_fails_and_another_number_goes_on(
    dies: str,
    says: str,
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    alone: Callable[..., None],
) -> None:
    rest = ("--bits", 2, "--recipe", "fast", "--calib", text_file, *SMALL)
    model, several, one = model_folder("mixtral", "bfloat16"), tmp_path / "s", tmp_path / "one"
    ended = torchrun(3, dies, "compress", model, several, *rest)
    (line,) = told(ended.stderr)
    assert ended.returncode == 1 and says in line
    assert torchrun(2, NOBODY, "compress", model, several, *rest).returncode == 0
    alone(model, one, *rest)
    assert files(one) == files(several)


@pytest.mark.ranks
def test_machines_that_share_a_disk(
    model_folder: Folder, text_file: Path, tmp_path: Path, alone: Callable[..., None]
) -> None:
    """The disk has another path on the second machine, where a rank is killed once."""
    rest = ("--bits", 2, "--calib", text_file, *SMALL)
    model = model_folder("deepseek_v3", "bfloat16")
    (tmp_path / "mounted").symlink_to(tmp_path)
    both = [("compress", model, Path("../../out"), *rest)]
    both.append(("compress", model, tmp_path / "mounted" / "out", *rest))
    for code, error in on_two_machines("kill 1 quantize 1", *both, path=tmp_path):
        assert code == 1 and len(told(error)) <= 1
    assert [code for code, _ in on_two_machines(NOBODY, *both, path=tmp_path)] == [0, 0]
    alone(model, tmp_path / "one", *rest)
    assert files(tmp_path / "one") == files(tmp_path / "out")


@pytest.mark.ranks
def test_machines_that_do_other_work_or_share_no_disk(
    model_folder: Folder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compress(out: Path, bits: str) -> tuple[object, ...]:
        widths = ("--expert-bits", bits)
        return ("compress", model, out, "--bits", 2, "--calib", text_file, *widths, *SMALL)

    model = model_folder("mixtral", "bfloat16")
    for second, says in (
        (compress(tmp_path / "a", "1,2"), "The recipe of rank 1 is not that of rank 0"),
        (compress(tmp_path / "b", "1,2,3"), "does not see the files that rank 0 writes"),
    ):
        first = compress(tmp_path / "a", "1,2,3")
        for code, error in on_two_machines(NOBODY, first, second, path=tmp_path):
            (line,) = told(error)
            assert code == 1 and (says in line or "Another rank" in line)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


@pytest.mark.ranks
def test_the_stages_one_by_one(
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, made = model_folder("mixtral", "bfloat16"), {}
    for name in ("several", "one"):
        scores, plan, out = (tmp_path / f"{name}{end}" for end in (".safetensors", ".json", ""))
        score = ("score", model, scores, "--calib", text_file, *SMALL)
        quantize = ("quantize", model, plan, out)
        if name == "several":
            assert torchrun(2, NOBODY, *score).returncode == 0
        else:
            monkeypatch.setattr(batches, "BATCH_TOKENS", BATCH)
            monkeypatch.setattr(factor, "COLUMNS_PER_SLICE", 24)
            assert run(monkeypatch, capsys, *score)[0] == 0
        assert run(monkeypatch, capsys, "allocate", scores, plan, "--bits", 2)[0] == 0
        if name == "several":
            assert torchrun(3, NOBODY, *quantize).returncode == 0
        else:
            assert run(monkeypatch, capsys, *quantize)[0] == 0
        made[name] = {"scores": scores.read_bytes(), **files(out)}
    assert made["several"] == made["one"]


def test_other_commands_are_refused_under_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(job, "_several", lambda: True)
    code, out, err = run(monkeypatch, capsys, "inspect", tmp_path)
    assert code == 2 and out == "" and "only compress, score, quantize" in err


def test_the_longest_task_is_given_first_and_to_the_rank_with_least_to_do() -> None:
    assert Ranks(0, 2).owners([1, 5, 3, 3]) == [0, 0, 1, 1]
    assert ALONE.owners([1, 5, 3]) == [0, 0, 0]
    owners = Ranks(0, 3).owners([float(i % 7) for i in range(100)])
    loads = [sum(i % 7 for i in range(100) if owners[i] == rank) for rank in range(3)]
    assert max(loads) - min(loads) <= 6


@pytest.mark.parametrize("corrects", [False, True])
def test_large_statistics_are_summed_by_all_ranks(corrects: bool) -> None:
    columns = {"q": 7168, "q_b": 1536, "o": 16384, "gate": 7168, "down": 2048}  # DeepSeek-V3
    shares = divided(columns, Ranks(0, 8), True, corrects)
    assert list(shares) == list(columns)
    sums = [0.0] * 8
    for name, (owner, slices) in shares.items():
        count = columns[name]
        assert owner in slices
        if name in ("q_b", "down"):
            assert slices == {owner: None}
            sums[owner] += (1 + corrects / 2) * count**2 / 2
        else:
            every = sorted((s.start, s.stop) for own in slices.values() for s in own or ())
            assert every == [(s.start, s.stop) for s in column_slices(count)]
        for rank, own in slices.items():
            sums[rank] += sum((s.stop - s.start) * (count - s.start) for s in own or ())
            sums[rank] += corrects * sum((s.stop - s.start) * count for s in own or ())
    assert max(sums) < 1.2 * sum(sums) / 8
    whole = divided(columns, Ranks(0, 8), False, corrects)
    assert all(slices == {owner: None} for owner, slices in whole.values())


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_batches_are_those_of_one_process_whichever_rank_has_them(
    count: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BATCH_TOKENS", 10)
    ids = torch.arange(7 * 4).view(7, 4)  # batches of 2, 2, 2 and 1 sequences
    parts = [Division(ids, Ranks(rank, count)).repeated(passes) for rank in range(count)]
    whole = torch.full((passes * 28,), -1)
    for rank, part in enumerate(parts):
        assert torch.equal(part.ids, part.all_ids[part.sequences])
        assert torch.equal(part.ids, part.own(part.all_ids))
        for batch in part.own_batches:
            assert (whole[part.tokens(batch)] == -1).all()
            whole[part.tokens(batch)] = part.all_ids[batch].flatten()
        in_rounds = [found[rank] for found in part.rounds if rank < len(found)]
        assert in_rounds == part.own_batches
    assert torch.equal(whole, ids.flatten().repeat(passes))
    assert sorted(n for part in parts for n in part.sequences) == list(range(7 * passes))
    sizes = [batch.stop - batch.start for _, batch in parts[0].batches]
    assert sizes == [2, 2, 2, 1] * passes
