"""The packages as a whole: who may import whom, what an import costs, and whose `kernels` it is."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = ("kernels", "architectures", "zoology", "experiments")  # each may import itself and those before it
OPTIONAL = {"triton", "flash_attn", "mamba_ssm", "causal_conv1d", "fla", "transformers", "ray", "wandb", "tensorboard"}
ALLOWED = {
    "kernels": {"torch", "triton"},
    "architectures": {"torch", "triton", "flash_attn", "mamba_ssm", "causal_conv1d", "fla"},
}


@pytest.fixture(autouse=True)
def _importable_from_any_folder(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


def imports(path):
    """(top module, line, at import time) of every import statement of a file."""
    tree, deferred = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if function or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
            deferred |= {id(child) for statement in node.body for child in ast.walk(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # A relative import stays in its own package.
            modules = [path.relative_to(ROOT).with_suffix("").parts[0] if node.level else node.module]
        else:
            continue
        for module in modules:
            yield module.split(".")[0], node.lineno, id(node) not in deferred


def python(code, *, blocked=()):
    """Run code in a fresh interpreter, from another folder, with some modules made impossible to import."""
    block = "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{block}{code}"],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        timeout=240,
    )


@pytest.mark.parametrize("package", HOUSE)
def test_imports_go_one_way(package):
    later = set(HOUSE[HOUSE.index(package) + 1 :]) | {"tests", "notebooks"}
    found = [(path, line, module) for path in files(package) for module, line, _ in imports(path)]
    assert len(found) > 3
    assert [f"{path}:{line} imports {module}" for path, line, module in found if module in later] == []


@pytest.mark.parametrize("package", ["kernels", "architectures"])
def test_the_lower_floors_need_torch_and_what_a_backend_brings(package):
    allowed = ALLOWED[package] | set(HOUSE[: HOUSE.index(package) + 1]) | set(sys.stdlib_module_names)
    found = [
        f"{path}:{line} imports {module}"
        for path in files(package)
        for module, line, at_import in imports(path)
        # A benchmark loads the peers it measures, and what draws its figure, when it runs.
        if module not in allowed and (at_import or path.name != "benchmark.py")
    ]
    assert found == []


@pytest.mark.parametrize("package", HOUSE)
def test_optional_libraries_are_imported_where_they_are_used(package):
    """At import time only files of Triton kernels import Triton, and those are imported when they first run."""
    found = [
        f"{path}:{line} imports {module}"
        for path in files(package)
        for module, line, at_import in imports(path)
        if at_import and module in OPTIONAL and not (module == "triton" and path.name.startswith("triton"))
    ]
    assert found == []


def test_the_import_checks_see_what_they_should(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "example.py"
    file.write_text(
        "import torch.nn as nn\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import ray\n"
        "class A:\n    import wandb\n    def f(self):\n        from fla.ops import gla\n"
        "try:\n    import triton\nexcept ImportError:\n    from . import inner\n"
    )
    assert {module: at_import for module, _, at_import in imports(file)} == {
        "torch": True, "typing": True, "ray": False, "wandb": True, "fla": False, "triton": True,
        "example": True,
    }  # fmt: skip


def test_everything_imports_and_runs_without_any_optional_library():
    result = python(
        "import torch, kernels, architectures, zoology\n"
        "from zoology import config, model, train, doctor\n"
        "for name in architectures.names():\n"
        "    mixer = architectures.create(name, d_model=8)\n"
        "    assert mixer(torch.randn(1, 5, 8)).shape == (1, 5, 8), name\n"
        "    assert mixer.backends_used()[0] in ('reference', 'sdpa'), name\n"
        "print('ran', len(architectures.names()))\n",
        blocked=sorted(OPTIONAL | {"einops"}),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ran ")


def test_an_import_brings_in_no_optional_library():
    result = python(
        "import kernels, architectures, zoology, zoology.doctor\n"
        "for name in architectures.names():\n    architectures.describe(name)\n"
        f"print(sorted(set(sys.modules) & {OPTIONAL | {'einops', 'pandas.plotting', 'torch._inductor'}!r}))\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("order", [("kernels", "transformers"), ("transformers", "kernels")], ids=" then ".join)
def test_kernels_is_ours_beside_transformers(order):
    """Some other distribution is called `kernels` too, and transformers looks for it."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    result = python(
        f"import {order[0]}\nimport {order[1]}\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "is_kernels_available()\n"
        "import architectures, torch\n"
        "architectures.create('based', d_model=8)(torch.randn(1, 4, 8))\n"
        "print(kernels.__file__)\nprint(callable(kernels.taylor_linear_attention))\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(ROOT / "kernels" / "__init__.py"), "True"]
