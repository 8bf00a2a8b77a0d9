"""How the small operations of decoding call their C functions, and what those refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moepress import kernels
from moepress.kernels import cpu
from moepress.kernels import small_reference as reference
from moepress.kernels.cpu import interface
from tests.kernels.test_small_cpu import EPS, MISSING, caches, drawn, same, turned_alike


class Recorded(TorchDispatchMode):
    """The operations of torch that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_decoded_token_is_one_call_each(called: list[str]) -> None:
    """No operation of torch but the making of results."""
    if MISSING:
        pytest.skip(f"the library {MISSING}")
    x, weight = torch.randn(1, 1, 2048).bfloat16(), torch.randn(2048).bfloat16()
    q, k = (torch.randn(1, 1, n, 128).bfloat16() for n in (32, 4))
    of_head, (cos, sin) = weight[:128], torch.randn(2, 1, 1, 128).bfloat16()
    keys, values, key, value = caches("one sequence", torch.bfloat16)
    heads = q.transpose(1, 2), k.transpose(1, 2)
    position = torch.tensor([3])
    calls: list[tuple[Callable[[], object], int]] = [
        (lambda: cpu.rms_norm(x, weight, EPS, "rounded"), 1),
        (lambda: cpu.rms_norm(q, of_head, EPS, "rounded"), 1),
        (lambda: cpu.rotary(*heads, cos, sin, "halves", False), 2),
        (lambda: cpu.cache_write(keys, values, key, value, position), 0),
    ]
    for call, made in calls:
        called.clear()
        with Recorded() as recorded:
            call()
        assert len(called) == 1
        assert len(recorded.names) == made
        assert set(recorded.names) <= {"empty_like", "new_empty"}


def test_the_ops_run_them(called: list[str]) -> None:
    if MISSING:
        pytest.skip(f"the library {MISSING}")
    x, weight = torch.randn(2, 3, 16).bfloat16(), torch.randn(16)
    q, k, cos, sin = drawn("a part of the numbers", torch.float32, torch.float32)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    given = *caches("odd", torch.float32), torch.tensor(1)
    expected = reference.rotary(q, k, cos, sin, "halves", True)
    assert kernels.rms_norm(x, weight, EPS, "rounded").dtype == torch.float32
    same(kernels.rotary(q, k, cos, sin, "halves", True), expected)
    kernels.cache_write(*given)
    assert torch.equal(given[0][:, :, 1:2], given[2])
    assert called == ["moepress_rms_norm", "moepress_rotary", "moepress_cache_write"]
    torch.library.opcheck(kernels.rms_norm.op, (x, weight, EPS, "rounded"))
    torch.library.opcheck(kernels.rotary.op, (q, k, cos, sin, "halves", True))
    torch.library.opcheck(kernels.cache_write.op, given)


def test_other_dtypes_go_to_the_reference(called: list[str]) -> None:
    x = torch.randn(2, 16).double()
    for args in ((x, None), (x, x[0]), (x.float(), x[0])):
        found, expected = (f(*args, EPS, "rounded") for f in (cpu.rms_norm, reference.rms_norm))
        assert found.dtype == torch.float64 or args[1] is None
        assert torch.equal(found, expected)
    q, k, cos, sin = drawn("several", torch.float64, torch.float64)
    turned_alike(q, k, cos, sin, "halves", False)
    turned_alike(q.float(), k.float(), cos, sin, "halves", True)
    assert not called


# What the C functions refuse (moepress.h): arguments by name, of which one is wrong.

NAMES = {
    "moepress_rms_norm": "x x_numbers outer outer_stride rows row_stride size weight "
    "weight_numbers epsilon formula threads y",
    "moepress_add": "x b n numbers y",
    "moepress_rotary": "q q_batch q_head q_token q_heads k k_batch k_head k_token k_heads numbers "
    "cos sin angle_batch angle_token angle_numbers batches tokens size rotated turn threads "
    "q_out q_out_batch q_out_head q_out_token k_out k_out_batch k_out_head k_out_token",
    "moepress_cache_write": "keys keys_batch keys_head keys_position key key_batch key_head "
    "key_size key_bytes values values_batch values_head values_position value value_batch "
    "value_head value_size value_bytes batches heads room position",
}
POINTERS = (
    "x", "weight", "b", "y", "q", "k", "cos", "sin", "q_out", "k_out", "keys", "key", "values",
    "value", "position",
)  # fmt: skip
ZEROS = ("epsilon", "formula", "turn")
SIZES = {"size": 8, "key_size": 8, "value_size": 8, "rotated": 8, "key_bytes": 4, "value_bytes": 4}
GREAT = 1 << 40
WRONG: dict[str, list[dict[str, int]]] = {
    "moepress_rms_norm": [
        {"outer": -1}, {"rows": -1}, {"size": -1}, {"rows": GREAT, "size": GREAT},
        {"threads": 0}, {"formula": 3}, {"formula": -1}, {"x_numbers": 3}, {"x_numbers": -1},
        {"weight_numbers": 3},
    ],
    "moepress_add": [{"n": -1}, {"numbers": 3}, {"numbers": -1}],
    "moepress_rotary": [
        {"batches": -1}, {"tokens": -1}, {"size": -1}, {"q_heads": -1}, {"k_heads": -1},
        {"q_heads": GREAT, "tokens": GREAT}, {"rotated": -2}, {"rotated": 7}, {"rotated": 10},
        {"threads": 0}, {"numbers": 3}, {"numbers": 1}, {"angle_numbers": 1},
        {"angle_numbers": 3, "turn": 8}, {"turn": 16}, {"turn": -1},
    ],
    "moepress_cache_write": [
        {"batches": -1}, {"heads": -1}, {"key_size": -1}, {"value_size": -1}, {"key_bytes": 0},
        {"value_bytes": -4}, {"batches": GREAT, "heads": GREAT}, {"room": -1},
    ],
}  # fmt: skip


def right(name: str) -> int:
    """A right value of an argument that is no pointer: one row of eight floats."""
    return SIZES.get(name, 0 if name in ZEROS or name.endswith("numbers") else 1)


@pytest.mark.parametrize("name", WRONG)
def test_what_the_c_functions_refuse(name: str) -> None:
    if MISSING:
        pytest.skip(f"the library {MISSING}")
    names = NAMES[name].split()
    memory = {key: torch.zeros(8) for key in names if key in POINTERS}
    arguments = {n: memory[n].data_ptr() if n in memory else right(n) for n in names}
    bad_shape = next(code for code, text in interface.RESULTS.items() if "a size" in text)
    function = getattr(interface.library(), name)
    for changed in WRONG[name]:
        assert function(*(arguments | changed).values()) == bad_shape, changed
    assert function(*arguments.values()) == 0
