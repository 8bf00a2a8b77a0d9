"""The doctor reports what is present, missing and failed, and never fails itself."""

from __future__ import annotations

import importlib
import json
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch

from moepress.doctor import Check, Report, doctor, format_report

ROOT = Path(__file__).parents[1]
module = importlib.import_module("moepress.doctor")  # `moepress.doctor` is the function


def named(report: Report, name: str) -> Check:
    (check,) = (check for check in report.checks if check.name == name)
    return check


def test_a_working_machine() -> None:
    report = doctor()
    assert {"python", "torch", "transformers", "cpu", "memory", "disk", "cuda", "malloc"} & {
        check.name.split(":")[0] for check in report.checks
    } >= {"python", "torch", "transformers", "cpu", "memory", "disk", "cuda", "malloc"}
    assert named(report, "torch").found == metadata.version("torch")
    assert [c for c in report.checks if c.state == "failed"] == []
    assert named(report, "kernels on cpu").state in ("ok", "missing")
    assert all(check.do for check in report.checks if check.state == "missing")
    assert json.loads(json.dumps(report.to_dict()))["checks"][0]["name"] == "python"


def test_one_line_per_check() -> None:
    report = Report((Check("a", "ok", "1"), Check("long", "missing", "nothing", "get it")))
    assert format_report(report).split("\n") == [
        "ok       a     1",
        "missing  long  nothing  ->  get it",
    ]
    assert len(format_report(doctor()).split("\n")) == len(doctor().checks)


def test_a_probe_that_raises_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> NoReturn:
        raise OSError("a library\nis gone")

    monkeypatch.setattr(module, "PROBES", dict.fromkeys(module.PROBES, broken))
    report = doctor()
    assert [check.name for check in report.checks] == list(module.PROBES)
    assert {check.state for check in report.checks} == {"failed"}
    assert report.checks[0].found == "OSError: a library"


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    report = doctor()
    assert named(report, "cuda").state == "failed"
    assert named(report, "torch runs").state == "failed"
    assert named(report, "python").state == "ok"


def test_old_and_absent_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "datasets":
            raise metadata.PackageNotFoundError(name)
        return {"torch": "2.9.1+cu130", "transformers": "5.16.0.dev0"}.get(name, "9.9")

    monkeypatch.setattr(module.metadata, "version", version)
    report = doctor()
    torch_check = named(report, "torch")
    assert (torch_check.state, torch_check.do) == ("missing", "pip install -U 'torch>=2.11'")
    assert named(report, "transformers").state == "ok"
    do = named(report, "datasets").do
    assert do.endswith("pip install '.[datasets]' in the clone of moepress")


def test_python_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, state in [
        ((3, 10), "missing"),
        ((3, 11), "ok"),
        ((3, 13), "ok"),
        ((3, 14), "missing"),
    ]:
        monkeypatch.setattr(sys, "version_info", (*version, 1))
        (check,) = module._python()
        assert check.state == state


def test_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties(NamedTuple):
        name: str = "Big GPU"
        major: int = 9
        minor: int = 0
        total_memory: int = 80_000_000_000

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (check,) = module._cuda()
    assert (check.state, check.found) == ("missing", "torch has CUDA 13.0, no device found")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70_000_000_000, 80_000_000_000))
    first, second = module._cuda()
    assert (first.name, second.name) == ("cuda:0", "cuda:1")
    assert first.found == (
        "Big GPU, compute capability 9.0, CUDA 13.0, 70.0 GB of 80.0 GB free: models of up to "
        "about 202 billion weights at 2.5 bits fit"
    )


@pytest.mark.parametrize(
    ("system", "do"), [("Linux", "install a torch build with CUDA"), ("Darwin", "on the CPU")]
)
def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch, system: str, do: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr("platform.system", lambda: system)
    (check,) = module._cuda()
    assert check.state == "missing" and do in check.do


def test_refused_kernels_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from moepress import kernels

    answer: list[Any] = [kernels.Status("cpu", "reference", {"avx512": "no AVX-512 here"})]
    monkeypatch.setattr(kernels, "status", lambda: answer)
    assert list(module._kernels()) == [
        Check("kernels on cpu", "ok", "reference"),
        Check("kernels on cpu", "missing", "avx512", "no AVX-512 here"),
    ]


def test_supported_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = dict(re.fullmatch(r"([\w.-]+)>=([\d.]+)", d).groups() for d in project["dependencies"])
    assert set(wanted) == {*module.OLDEST, *module.NEEDED}
    for name, oldest in module.OLDEST.items():
        assert wanted[name] == ".".join(map(str, oldest))
    assert project["requires-python"] == ">=" + ".".join(map(str, module.PYTHONS[0]))
    extras = project["optional-dependencies"]
    assert {extra for extra, _ in module.EXTRAS.values()} == set(extras) - {"test"}
