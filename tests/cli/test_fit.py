"""What is kept of a search that was interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.command import Run, fit_command
from support.files import edit

import tfb
from tfb.cli.console import Meter
from tfb.cli.fit import identity
from tfb.demo import digits


@pytest.fixture
def fit(tfb_command: Run, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """``tfb fit`` on 40 digits, with its output in the test's folder."""
    rows = [json.dumps(row) for row in digits.rows("anchor")[:40]]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    command = fit_command(digits.BASE, digits.ADAPTER, tmp_path / "rows.jsonl", tmp_path / "made")
    return lambda *options: tfb_command(*command, "--draws", 2, "--batch-size", 20, *options)


@pytest.fixture
def interrupted(
    fit: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The file that a search leaves behind when Ctrl-C comes in its third pass."""
    calls: list[int] = []

    def advance(_: Meter, n: int) -> None:
        calls.append(n)
        if len(calls) == 3:
            raise KeyboardInterrupt

    kept = tmp_path / "made.search.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Meter, "advance", advance)
        code, out, err = fit()
    sweeps = len(load_file(kept))
    assert code == 130 and out == "" and sweeps > 0
    assert f"interrupted: {sweeps} finished sweeps are kept in {kept}; the same comm" in err
    assert not (tmp_path / "made").exists()
    return kept


def test_sigterm_does_what_ctrl_c_does(
    fit: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calls = signal.getsignal(signal.SIGTERM), list[int]()

    def advance(_: Meter, n: int) -> None:
        calls.append(n)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Meter, "advance", advance)
    code, out, err = fit()
    kept = tmp_path / "made.search.safetensors"
    assert code == 143 and out == "" and f"{len(load_file(kept))} finished sweeps are kept" in err
    assert signal.getsignal(signal.SIGTERM) is before


def record(folder: Path) -> Any:
    return json.loads((folder / "tfb.json").read_text())["fit"]


def test_the_same_command_goes_on(
    fit: Callable[..., tuple[int, str, str]], interrupted: Path, tmp_path: Path
) -> None:
    """To the fit of a search that nothing interrupted, bit for bit; then the file is gone."""
    sweeps = len(load_file(interrupted))
    code, _, err = fit()
    assert code == 0 and f"going on with {sweeps} finished sweeps of an interrupted search" in err
    assert not interrupted.exists()
    (tmp_path / "made").rename(tmp_path / "resumed")
    code, _, err = fit()
    assert code == 0 and "finished sweeps" not in err
    assert record(tmp_path / "resumed") == record(tmp_path / "made")


@pytest.mark.parametrize("fault", ["foreign", "damaged"])
def test_what_cannot_be_used_is_said(
    fit: Callable[..., tuple[int, str, str]], interrupted: Path, fault: str
) -> None:
    if fault == "foreign":
        save_file({k: v + 1 for k, v in load_file(interrupted).items()}, interrupted)
    else:
        interrupted.write_bytes(interrupted.read_bytes()[:-9])
    code, _, err = fit("--sigma", 0)
    said = "is of another model" if fault == "foreign" else "damaged"
    assert code == 0 and f"{interrupted}: {said}" in err and "the search begins anew" in err
    assert not interrupted.exists()


def test_what_a_sweep_depends_on(tmp_path: Path) -> None:
    """Its model, to every tensor and field of either configuration."""
    base = Path(shutil.copytree(digits.BASE, tmp_path / "base"))
    adapter = Path(shutil.copytree(digits.ADAPTER, tmp_path / "adapter"))

    def now() -> str:
        return identity(tfb.from_pretrained(adapter, base))

    found = [now(), now()]
    edit(adapter / "adapter_config.json", lora_alpha=99)
    found.append(now())
    edit(base / "config.json", rms_norm_eps=0.5)
    found.append(now())
    m = tfb.from_pretrained(adapter, base)
    m.bayes.base.get_input_embeddings().weight.data *= 2
    found.append(identity(m))
    assert found[0] == found[1] and len(set(found)) == 4


def test_nothing_is_kept_of_nothing(
    fit: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tfb.pretrained.TfbModel.fit", stop)
    code, _, err = fit()
    assert code == 130 and "before the first sweep was finished; nothing to keep" in err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_curve_on_request(fit: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Every point, below the verdict."""
    code, out, err = fit("--curve", "--no-temperature")
    assert code == 0, err
    table = out.split("on 40 anchors", 1)[1]
    for point in record(tmp_path / "made")["curve"]:
        assert f" {point['sigma']:.5g} " in table
