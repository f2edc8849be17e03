"""The packages as a whole: importing costs and changes nothing, imports point one way."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import tfb
import tfb_kernels
from benchmarks.environment import REPOSITORY

TFB = sorted((REPOSITORY / "tfb").rglob("*.py"))
KERNELS = sorted((REPOSITORY / "tfb_kernels").rglob("*.py"))

IMPORT = """
import json, os, signal, sys, threading, warnings
import torch, logging

def state():
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": sys.path[:],
        "warning filters": [repr(f) for f in warnings.filters],
        "log handlers": [repr(h) for h in logging.getLogger().handlers],
        "log level": logging.getLogger().level,
        "interrupt": repr(signal.getsignal(signal.SIGINT)),
        "threads": [threading.active_count(), torch.get_num_threads()],
        "random": torch.get_rng_state().tolist(),
        "dtype": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "hooks": [repr(sys.excepthook), len(sys.meta_path)],
    }

before = state()
import tfb, tfb_kernels
import tfb.draws, tfb.linear, tfb.posterior, tfb.predictive
after = state()
print(json.dumps({
    "changed": [k for k in before if before[k] != after[k]],
    "loaded": sorted({m.split(".")[0] for m in sys.modules}),
    "cuda": torch.cuda.is_initialized(),
}))
"""


def test_import_has_no_side_effects(tmp_path: Path) -> None:
    """No PEFT, transformers or triton, no CUDA context, no file, no setting, no warning."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    report = json.loads(done.stdout)
    assert report["changed"] == [] and not report["cuda"] and done.stderr == ""
    heavy = {"peft", "transformers", "triton", "pyarrow", "scipy", "typer", "matplotlib", "ray"}
    assert not heavy & set(report["loaded"])
    assert list(tmp_path.iterdir()) == []


def test_public_names_resolve() -> None:
    for package in (tfb, tfb_kernels):
        assert len(set(package.__all__)) == len(package.__all__)
        for name in package.__all__:
            assert getattr(package, name) is not None
    assert set(tfb.__all__) == set(tfb._HOMES)
    for name, home in tfb._HOMES.items():
        assert getattr(tfb, name) is getattr(import_module(f"tfb.{home}"), name)


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-evaluation-harness is imported by the one file that needs it."""
    for name in [n for n in sys.modules if n.split(".")[0] == "lm_eval" or n == "tfb.lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r'pip install "tfb\[lm-eval\]"'):
        import_module("tfb.lm_eval")


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'tfb' has no attribute 'bayesianise'"):
        tfb.bayesianise  # noqa: B018


def imported(file: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, at import time or later."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("file", KERNELS, ids=lambda p: p.name)
def test_kernels_know_tensors_only(file: Path) -> None:
    assert not imported(file) & {"tfb", "transformers", "peft"}


# Lowest first: a module imports from its own package and from lower layers, never from higher ones.
LAYERS = (
    ("tfb.atomic", "tfb.draws", "tfb.plain"),
    ("tfb.posterior", "tfb.predictive"),
    ("tfb.linear",),
    ("tfb.data",),
    ("tfb.demo",),
    ("tfb.evaluation",),
    ("tfb.sampling",),
    ("tfb.model", "tfb.module"),
    ("tfb.search",),
    ("tfb.adapters",),
    ("tfb.scoring",),
    ("tfb.pretrained",),
    ("tfb.cli", "tfb.lm_eval"),
    ("tfb.__main__",),
)
LAZY = ("tfb.cli",)  # commands import what they need, so that --help is quick


def module_of(file: Path) -> str:
    """The dotted name of a source file."""
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module: str) -> str:
    """What the layers are made of: ``tfb.data`` of ``tfb.data.rows``."""
    return ".".join(module.split(".")[:2])


MODULES = {module_of(file): file for file in TFB}


def dependencies(file: Path) -> Iterator[tuple[str, ast.stmt]]:
    """The modules of tfb that a file imports, anywhere in it, and where."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in inner]
        for name in names:
            if name.split(".")[0] == "tfb":
                assert isinstance(node, ast.Import | ast.ImportFrom)
                yield name, node


@pytest.mark.parametrize("module", [m for m in MODULES if m != "tfb"])
def test_imports_point_downwards(module: str) -> None:
    level = {unit: i for i, layer in enumerate(LAYERS) for unit in layer}
    own = unit_of(module)
    for name, _ in dependencies(MODULES[module]):
        if name == "tfb":
            assert own in LAZY, f"{module}: the package itself is for users"
        elif unit_of(name) != own:
            assert level[unit_of(name)] < level[own], f"{module} imports {name}, which is above"


def test_no_circles() -> None:
    """Each module can be imported after all that it imports."""
    waiting = {m: {name for name, _ in dependencies(f)} - {m} for m, f in MODULES.items()}
    waiting["tfb"] = set()  # its names are resolved on first use
    while waiting:
        ready = {m for m, needs in waiting.items() if not needs & waiting.keys()}
        assert ready, f"a circle among {sorted(waiting)}"
        waiting = {m: needs for m, needs in waiting.items() if m not in ready}


@pytest.mark.parametrize("module", [m for m in MODULES if m != "tfb"])
def test_imports_of_ours_stand_at_the_top(module: str) -> None:
    """Inside functions are optional packages alone, and what commands load when they run."""
    if unit_of(module) in LAZY:
        return
    inner = [n for n, node in dependencies(MODULES[module]) if node.col_offset > 0]
    typing = "if TYPE_CHECKING" in MODULES[module].read_text(encoding="utf-8")
    assert not inner or typing, f"{module}: {inner}"


@pytest.mark.parametrize("module", MODULES)
def test_private_names_stay_at_home(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tfb"):
            names = {alias.name for alias in node.names}
            assert not [n for n in names if n.startswith("_") and n != "__version__"], module
            modules |= {n for n in names if f"{node.module}.{n}" in MODULES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert not (node.value.id in modules and node.attr.startswith("_")), module


@pytest.mark.parametrize("module", MODULES)
def test_tfb_reaches_peft_in_its_adapters_and_triton_nowhere(module: str) -> None:
    """artifact.py alone says triton, whose version it writes down."""
    packages = imported(MODULES[module])
    assert "triton" not in packages
    assert "peft" not in packages or unit_of(module) == "tfb.adapters"
    if module != "tfb.adapters.artifact":
        assert "triton" not in MODULES[module].read_text(encoding="utf-8").lower()


def test_sources_were_found() -> None:
    assert {"__init__.py", "linear.py"} <= {p.name for p in TFB}
    assert {"__init__.py", "noise.py", "ops.py"} <= {p.name for p in KERNELS}


def test_one_version() -> None:
    """pyproject.toml, the metadata, the attribute, and what is to be cited."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    project = text.split("[project]")[1].split("\n[")[0]
    found = re.findall(r'^version = "(.+)"$', project, flags=re.MULTILINE)
    assert found == [tfb.__version__] == [version("tfb")]
    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["version"] == tfb.__version__


def test_one_ruff() -> None:
    """The hook before a commit formats as ``make lint`` does."""
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    pinned = (REPOSITORY / "constraints.txt").read_text().split()
    assert [f"ruff=={repo['rev'][1:]}" for repo in hooks["repos"]] == [
        pin for pin in pinned if pin.startswith("ruff==")
    ]


def test_the_wheel_holds_the_packages_and_nothing_else(tmp_path: Path) -> None:
    """Every file of the two packages, no test, the licence, and the command."""
    pytest.importorskip("setuptools", "77")  # what pyproject.toml asks for; older Pythons' has less
    packages = ("tfb", "tfb_kernels")
    for name in packages:
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("*.pyc"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copyfile(REPOSITORY / name, tmp_path / name)
    program = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, cwd=tmp_path)
    with zipfile.ZipFile(*(tmp_path / "dist").glob("*.whl")) as wheel:
        names, info = wheel.namelist(), f"tfb-{tfb.__version__}.dist-info"
        command = wheel.read(f"{info}/entry_points.txt").decode()
        read = wheel.read(f"{info}/METADATA").decode()
    files = (path for name in packages for path in (REPOSITORY / name).rglob("*.*"))
    expected = {str(p.relative_to(REPOSITORY)) for p in files if p.is_file() and p.suffix != ".pyc"}
    assert {name for name in names if not name.startswith(info)} == expected
    assert f"{info}/licenses/LICENSE" in names and "tfb = tfb.cli.app:main" in command
    assert (REPOSITORY / "README.md").read_text() in read


def promised(extra: str | None = None) -> Iterator[Requirement]:
    """What pyproject.toml requires, an extra's own extras unfolded."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    for requirement in map(Requirement, lines):
        if requirement.name == project["name"]:
            for name in requirement.extras:
                yield from promised(name)
        else:
            yield requirement


def test_the_lowest_promised_versions_are_those_that_are_tested() -> None:
    """Every lower bound is the pin of ``make test-lowest``, and everything has one."""
    text = (REPOSITORY / "constraints-lowest.txt").read_text(encoding="utf-8")
    pins = dict(line.lower().split("==") for line in text.splitlines() if "==" in line)
    bounds = {r.name: str(r.specifier) for r in promised()}
    assert bounds.keys() >= {"torch", "transformers", "peft", "triton"}
    bounds |= {r.name: str(r.specifier) for r in promised("dev") if r.specifier}
    for name, bound in bounds.items():
        assert bound.startswith(">="), f"{name}: {bound or 'no lower bound'}"
        assert Version(bound[2:]) == Version(pins[name]), name
