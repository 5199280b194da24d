"""The rules that hold the parts apart: who imports whom, where vLLM is, and what the top level holds."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIGHT = [
    "server.vicuna",
    "server.language.resolve",
    "server.language.guide",
    "server.language.score",
    "server.settings",
]


def imports(path: Path) -> set[str]:
    """Every module that `path` imports, by absolute name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize(("package", "other"), [("server", "training"), ("training", "server")])
def test_server_and_training_meet_only_through_files(package: str, other: str) -> None:
    for path in modules(package):
        assert not [name for name in imports(path) if within(name, other)], path


def test_vllm_is_imported_by_the_engine_modules_only() -> None:
    """vLLM itself imports the guard and the worker, in its engine's processes, which have no use for the rest."""
    users = [path for path in modules("server") if any(within(name, "vllm") for name in imports(path))]
    wanted = ["engine.py", "engine_flags.py", "engine_guard.py", "engine_serving.py", "engine_worker.py"]
    assert [path.relative_to(ROOT / "server").as_posix() for path in users] == wanted


def test_imports_go_one_way() -> None:
    """cli -> serve -> app -> routes -> the rooms -> engine, settings, errors, metrics."""
    upper = ["server.cli", "server.serve", "server.app", "server.routes"]
    for path in modules("server"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        rank = next((i for i, name in enumerate(upper) if within(module, name)), len(upper))
        above = [name for name in upper[:rank] if any(within(found, name) for found in imports(path))]
        assert not above, f"{module} imports {above}"


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_need_neither_torch_nor_vllm(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('torch', 'vllm', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
