"""The package as installed: light to import, complete in its wheel, its parts knowing only the parts below them."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import densezoo

ROOT = Path(__file__).parents[1]
PARTS = ("densezoo", "backbones", "configs", "heads", "model_cards", "necks", "ops")
OPENMMLAB = {"mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain"}


def run_python(code: str, **kwargs) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORT = """
import sys, time
import timm
loaded, entries = set(sys.modules), dict(timm.models._registry._model_entrypoints)
start = time.perf_counter()
import densezoo
seconds = time.perf_counter() - start
new = set(sys.modules) - loaded
heavy = {name for name in new if name.split(".")[0] in ("triton", "mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain")}
print(seconds, sorted(heavy | {name for name in new if name.endswith(".kernels")}))
changed = [name for name in entries if timm.models._registry._model_entrypoints[name] is not entries[name]]
print(changed, len(timm.models._registry._model_entrypoints) - len(entries))
"""


def test_import_is_light_and_leaves_timm_as_it_is():
    # A machine under load gets more chances.
    for _ in range(3):
        first, second = run_python(IMPORT).splitlines()
        seconds, heavy = first.split(" ", 1)
        assert heavy == "[]"
        changed, added = second.rsplit(" ", 1)
        assert changed == "[]" and int(added) == len(densezoo.backbones.VARIANTS)
        if float(seconds) < 0.5:
            return
    pytest.fail(f"importing densezoo adds {seconds} s to importing timm")


def test_works_where_triton_is_not_installed():
    out = run_python("""
import importlib.machinery, sys
finder = importlib.machinery.PathFinder
find = finder.find_spec
finder.find_spec = lambda name, *args: None if name.split(".")[0] == "triton" else find(name, *args)
import torch
from densezoo.ops import na2d
q, k, v = (torch.randn(1, 6, 7, 2, 8, requires_grad=True) for _ in range(3))
na2d(q, k, v, 3, rpb=torch.zeros(2, 5, 5)).sum().backward()
import timm
image = torch.randn(1, 3, 32, 40)
print(timm.create_model("nat_mini")(image).shape, all(x.grad is not None for x in (q, k, v)), "triton" in sys.modules)
""")
    assert out == "torch.Size([1, 1000]) True False\n"


def imports_of(path: Path) -> set[str]:
    """Return the modules that a file imports anywhere, `from a import b` as `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {"." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names}
    return names


# What a part may import of the zoo; a name alone is a whole part.
ARROWS = {
    "ops": {"ops"},
    "backbones": {"ops", "backbones"},
    "necks": {"ops", "necks"},
    "heads": {"ops", "heads"},
    "densezoo": {"ops", "backbones", "necks", "heads", "densezoo"},
}


@pytest.mark.parametrize("part", ARROWS)
def test_parts_import_only_what_lies_below(part):
    imports = [(path, name) for path in (ROOT / part).rglob("*.py") for name in imports_of(path)]
    for path, name in imports:
        top, *rest = name.split(".")
        # Never relative, and never by the folder's own name.
        assert top and top not in set(PARTS) - {"densezoo"} | {"tools", "tests"}, (path, name)
        if top == "densezoo" and rest != ["__version__"]:
            assert (rest[0] if rest[0] in PARTS else "densezoo") in ARROWS[part], (path, name)
        if part in ("ops", "backbones"):
            assert top not in OPENMMLAB, (path, name)
        if top == "triton":
            holds_kernels = path.stem.endswith("kernels") or path.name in (
                "axes.py",
                "compiling.py",
                "gelu.py",
                "partials.py",
                "products.py",
                "registration.py",
                "strips.py",
            )
            assert part == "ops" and holds_kernels, (path, name)


def test_only_the_openmmlab_modules_need_openmmlab():
    """The root's other modules, and what they import, work with the core dependencies alone."""
    for name in ("__init__", "checkpoints", "env", "exporting", "hub", "version"):
        assert not {module.split(".")[0] for module in imports_of(ROOT / "densezoo" / f"{name}.py")} & OPENMMLAB


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy, so that the tree stays clean."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_the_whole_package(wheel):
    expected = set()
    for part in PARTS:
        for path in (ROOT / part).rglob("*"):
            if path.suffix == ".py" or (part == "model_cards" and path.suffix in (".md", ".yaml")):
                name = path.relative_to(ROOT).as_posix()
                expected.add(name if part == "densezoo" else f"densezoo/{name}")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    held = {name for name in names if ".dist-info/" not in name}
    assert held == expected
    assert f"densezoo-{densezoo.__version__}.dist-info/licenses/LICENSE" in names


def test_wheel_imports(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    out = run_python(
        "import densezoo, densezoo.configs, densezoo.checkpoints, timm\n"
        "timm.create_model('nat_mini')\nprint(densezoo.__file__, densezoo.configs.__file__, densezoo.__version__)",
        env={"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
    )
    files = f"{tmp_path}/densezoo/__init__.py {tmp_path}/densezoo/configs/__init__.py"
    assert out == f"{files} {densezoo.__version__}\n"


def test_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0" and "Apache License" in (ROOT / "LICENSE").read_text()
    assert {"openmmlab", "export", "test"} <= project["optional-dependencies"].keys()
    core = " ".join(project["dependencies"])
    assert "onedl" not in core and all(name in core for name in ("torch", "timm", "safetensors"))


def test_ruff():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
