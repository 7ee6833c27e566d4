"""The rules of the house that a machine can hold."""

from __future__ import annotations

import ast
import doctest
import graphlib
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
import zipfile
from collections.abc import Container
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent

# Imports go down only: a module may import its own floor and those below. Longest prefix counts.
FLOORS = {
    "diffrep": 9,  # the package itself only re-exports
    "diffrep.images": 0,
    "diffrep.files": 0,
    "diffrep.results": 0,
    "diffrep.pictures": 0,
    "diffrep.tasks": 4,
    "diffrep.masks": 0,
    "diffrep.devices": 0,
    "diffrep.graphs": 0,
    "diffrep.processes": 0,
    "diffrep.settings": 0,
    "diffrep.scenes": 0,
    "diffrep.backbones": 1,
    "diffrep.alignment": 0,
    "diffrep.features": 2,
    "diffrep.fusion": 2,
    "diffrep.store": 2,
    "diffrep.matching": 3,
    "diffrep.similarity": 3,
    "diffrep.swap": 3,
    "diffrep.index": 3,
    "diffrep.draw": 3,
    "diffrep.recipes": 3,
    "diffrep.painting": 3,
    "diffrep.manifold": 3,
    "diffrep.sampling": 3,
    "diffrep.searched": 3,
    "diffrep.table_scheduler": 3,
    "diffrep.guidance": 3,
    "diffrep.synthesis": 3,
    "diffrep.training": 3,
    "diffrep.heads": 4,
    "diffrep.eval": 5,
    "diffrep.eval.benchmarks": 6,  # they time what commands do
    "diffrep.cli": 6,
    "diffrep.commands": 6,
    "diffrep.__main__": 6,
}


def floor_of(module: str) -> int | None:
    parts = module.split(".")
    if parts[0] != "diffrep":
        return None
    for end in range(len(parts), 1, -1):
        if (name := ".".join(parts[:end])) in FLOORS:
            return FLOORS[name]
    return FLOORS["diffrep"] if len(parts) == 1 else None


def sources() -> list[tuple[str, Path]]:
    """(module name, file) of everything that is packaged."""
    found = []
    for folder, package in (("diffrep", "diffrep"), ("heads", "diffrep.heads"), ("eval", "diffrep.eval")):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found.append((name, file))
    assert len(found) > 10
    return found


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: relative import"
        return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


@pytest.mark.parametrize(("name", "file"), sources(), ids=[name for name, _ in sources()])
def test_imports_go_down_only(name: str, file: Path) -> None:
    own = floor_of(name)
    assert own is not None, f"{name} has no floor: give it one in FLOORS"
    if name == "diffrep":
        return
    for node in ast.walk(ast.parse(file.read_text())):
        for target in imported(node):
            floor = floor_of(target)
            if target == "diffrep":  # `from diffrep import x` is judged by x below
                continue
            assert floor is None or floor == 9 or floor <= own, f"{file}: floor {own} imports {target} of floor {floor}"


def listed_packages() -> dict[str, str]:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {"diffrep.heads": "heads", "diffrep.eval": "eval"}
    assert tools["package-dir"] == folders
    places = {}
    for package in tools["packages"]:
        head = next((h for h in folders if package == h or package.startswith(f"{h}.")), None)
        path = folders[head] + package[len(head) :].replace(".", "/") if head else package.replace(".", "/")
        places[package] = path
    return places


def test_every_package_is_listed_for_the_wheel() -> None:
    on_disk = {
        str(init.parent.relative_to(ROOT))
        for folder in ("diffrep", "heads", "eval")
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert set(listed_packages().values()) == on_disk


@pytest.mark.slow
def test_the_wheel_has_one_top_level_and_everything_in_it(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"diffrep"}
    for expected in (
        "diffrep/heads/__init__.py",
        "diffrep/eval/__init__.py",
        "diffrep/py.typed",
        "diffrep/templates/base.html",
        "diffrep/models/tiny/unet/config.json",
        "diffrep/eval/data/correspondence.toml",
        "diffrep/eval/data/keypoints.toml",
        "diffrep/scenes/scenes.json",
        "diffrep/models/tiny-dino/model.safetensors",
    ):
        assert expected in names
    assert wheel.stat().st_size < 60 * 2**20


def run_python(code: str, cwd: Path) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_checkout_finds_heads_and_eval_and_installs_nothing_generic() -> None:
    code = (
        "import diffrep.heads, diffrep.eval, sys;"
        "print([m for m in sys.modules if m.split('.')[0] in ('heads', 'eval')])"
    )
    assert run_python(code, ROOT) == "[]"
    assert not [m for m in sys.modules if m.split(".")[0] in ("heads", "eval")]


def test_importing_the_package_is_light() -> None:
    heavy = (
        "torch",
        "faiss",
        "diffusers",
        "transformers",
        "sklearn",
        "matplotlib",
        "timm",
        "open_clip",
        "scipy",
    )
    code = f"import diffrep, diffrep.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    assert run_python(code, ROOT) == "[]"


def test_every_public_name_can_be_imported() -> None:
    import diffrep

    for name in diffrep.__all__:
        assert getattr(diffrep, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        diffrep.nothing  # noqa: B018


def test_doctests() -> None:
    tried = 0
    for name in ("diffrep", "diffrep.heads", "diffrep.eval"):
        package = importlib.import_module(name)
        for info in pkgutil.walk_packages(package.__path__, f"{name}."):
            if info.name.endswith("__main__"):
                continue
            if info.name == "diffrep.commands.app_page" and importlib.util.find_spec("gradio") is None:
                continue  # of an extra that the tests do without: it wants an older Pillow, which resizes differently
            result = doctest.testmod(importlib.import_module(info.name))
            assert result.failed == 0, info.name
            tried += result.attempted
    assert tried > 0


def test_weights_are_read_by_safe_readers_only() -> None:
    for name, file in sources():
        text = file.read_text()
        assert not re.search(r"\b(import pickle\b|pickle\.loads?|joblib|np\.load\(.*allow_pickle=True)", text), name
        for call in text.split("torch.load(")[1:]:
            assert "weights_only=True" in call.split(")")[0], name


# -- size, circles, names -----------------------------------------------------------------------------------

LINES, FILES, LINES_OF_A_FILE = 34_000, 190, 500  # what the product may hold at most


def test_no_file_is_long() -> None:
    long = {name: count for name, file in sources() if (count := len(file.read_text().splitlines())) > LINES_OF_A_FILE}
    assert not long


def test_the_product_is_small() -> None:
    files = [file for _, file in sources()]
    lines = sum(len(file.read_text().splitlines()) for file in files)
    if lines > LINES or len(files) > FILES:
        pytest.skip(f"not yet: {lines:,} lines in {len(files)} files, the budget is {LINES:,} in {FILES}")


def test_a_class_name_has_one_meaning() -> None:
    homes: dict[str, list[str]] = {}
    for name, file in sources():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(name)
    assert not {name: modules for name, modules in homes.items() if len(modules) > 1}


def imports_at_load(body: list[ast.stmt], modules: Container[str]) -> list[str]:
    """Which of the modules a module imports when it is loaded: not in functions, not for type checkers alone."""
    names: list[str] = []
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            names += imports_at_load(node.orelse, modules)
        elif isinstance(node, (ast.If, ast.Try)):
            names += imports_at_load([*node.body, *node.orelse], modules)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):  # `from package import module` does not need the package's own names
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [member if member in modules else node.module or "" for member in members]
    return [name for name in names if name in modules]


def test_no_imports_go_in_a_circle() -> None:
    modules = dict(sources())
    graph = {
        name: set(imports_at_load(ast.parse(file.read_text()).body, modules)) - {name}
        for name, file in modules.items()
        if name != "diffrep"  # it imports nothing before it is asked for a name
    }
    for targets in graph.values():
        targets.discard("diffrep")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


NEWER = {  # module -> names that Python 3.10, the oldest that is supported, does not have
    "typing": {
        *("LiteralString", "Never", "NotRequired", "Required", "Self", "TypeVarTuple", "Unpack", "assert_never"),
        *("assert_type", "dataclass_transform", "override", "reveal_type", "TypeAliasType"),
    },
    "enum": {"StrEnum", "ReprEnum", "EnumCheck", "member", "nonmember", "verify"},
    "datetime": {"UTC"},
    "itertools": {"batched"},
    "contextlib": {"chdir"},
    "hashlib": {"file_digest"},
    "collections.abc": {"Buffer"},
    "asyncio": {"TaskGroup", "Runner", "timeout"},
    "inspect": {"getmembers_static"},
    "math": {"cbrt", "exp2", "sumprod"},
    "operator": {"call"},
}


def test_nothing_is_imported_that_the_oldest_python_lacks() -> None:
    files = [*(file for _, file in sources()), *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    late = []
    for file in files:
        tree = ast.parse(file.read_text(), feature_version=(3, 10))
        guards = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
        guards = [g for g in guards if re.search("TYPE_CHECKING|version_info", ast.unparse(g.test))]
        apart = {id(inner) for guard in guards for node in guard.body for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if id(node) in apart:
                continue
            if isinstance(node, ast.ImportFrom):
                late += [(file.name, a.name) for a in node.names if a.name in NEWER.get(node.module or "", ())]
            if isinstance(node, ast.Attribute) and node.attr in NEWER.get(ast.unparse(node.value), ()):
                late.append((file.name, ast.unparse(node)))
    assert not late
