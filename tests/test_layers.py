"""Imports point down the layers of docs/design.md; commands answer `--help` without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "detector"

# From the bottom up; a module may import from its own layer and from those before it.
LAYERS = (
    (
        "detector.errors",
        "detector.seeding",
        "detector.files",
        "detector.canvas",
        "detector.pixels",
        "detector.config.node",
        "detector.config.yaml",
        "detector.train.length",
    ),
    ("detector.boxes", "detector.coders", "detector.structures"),
    ("detector.data", "detector.models", "detector.assign"),
    ("detector.losses", "detector.decode"),
    ("detector.evaluate", "detector.draw"),
    # RunConfig knows the sections of the trainer, which stand alone; the loop knows RunConfig.
    # A run may start from converted weights, so these are of the same layer.
    ("detector.config", "detector.train", "detector.convert"),
    ("detector.predict", "detector.media", "detector.bench", "detector.pseudo_labels", "detector.proposals"),
    ("detector.lab",),
    ("detector.cli",),
)
# Siblings that do not know each other.
STRANGERS = ("detector.data", "detector.models", "detector.assign")
# Two-stage models assign and sample their proposals in the forward pass.
ACQUAINTED = {("detector.models.two_stage", "detector.assign"), ("detector.models.cascade", "detector.assign")}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> tuple[int, str]:
    found = [
        (len(prefix), i, prefix)
        for i, layer in enumerate(LAYERS)
        for prefix in layer
        if module == prefix or module.startswith((prefix + ".", prefix + "_"))
    ]
    assert found, f"{module} is in no layer: add it to LAYERS and to docs/design.md"
    _, i, prefix = max(found)
    return i, prefix


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports when it is loaded or run, type-checking imports aside."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("detector."):
            inner = {f"{node.module}.{a.name}" for a in node.names}
            files = {n for n in inner if (PACKAGE.parent / Path(*n.split("."))).with_suffix(".py").is_file()}
            names |= files or {node.module}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names if a.name.startswith("detector.")}
    return names


@pytest.mark.parametrize("path", [p for p in modules() if p != PACKAGE / "__init__.py"], ids=name_of)
def test_imports_point_down(path: Path) -> None:
    own, own_layer = layer_of(name_of(path))
    for other in imported(path):
        rank, layer = layer_of(other)
        assert rank <= own, f"{name_of(path)} imports {other} from a higher layer"
        if own_layer in STRANGERS and layer in STRANGERS and (name_of(path), layer) not in ACQUAINTED:
            assert own_layer == layer, f"{name_of(path)} imports {other}: these packages do not know each other"


def test_no_module_hides_two_ideas() -> None:
    long = {name_of(p): n for p in modules() if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long, f"files past 400 lines: {long}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "cli").glob("[!_]*.py")), ids=lambda p: p.stem)
def test_a_command_answers_help_without_torch(path: Path) -> None:
    if path.stem == "common":
        pytest.skip("shared by the commands, not one itself")
    code = (
        f"import sys; from detector.cli.{path.stem} import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "usage" in shown.stdout
    tool = PACKAGE.parent / "tools" / path.name
    assert tool.is_file(), "every command has its file in tools/"
    assert len(tool.read_text(encoding="utf-8").splitlines()) < 60
