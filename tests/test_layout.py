"""The order of the package's rooms: imports run downwards only."""

import ast
from collections.abc import Iterator

import pytest

from tests.support import runs

# From top to bottom; the rooms of one line do not import each other. See CONTRIBUTING.md.
ROOMS = """
cli
jobs
train
run
evaluate visualize
weights
checkpoints config
training configs
backend
data models
memory
sharding cache output distributed
paths peers
errors text streams
"""
LEVELS = {room: i for i, line in enumerate(ROOMS.strip().splitlines()) for room in line.split()}
RULE = "a module imports only its own room and rooms below it (tests/test_layout.py)"


def is_command(node: ast.stmt) -> bool:
    """Whether a statement is `if __name__ == "__main__"`, whose imports do not count."""
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def imported(source: str) -> Iterator[str]:
    """The rooms that a module's source imports, also inside functions."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not is_command(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "dino_jax" and not rest.startswith("__"):
                yield rest.partition(".")[0]


def problems(room: str, source: str) -> list[str]:
    """Imports that break the rule."""
    unknown = [r for r in (room, *imported(source)) if r not in LEVELS]
    assert not unknown, f"new rooms {unknown}: add them to ROOMS"
    return [
        f"{room} imports {other}: {RULE}"
        for other in imported(source)
        if other != room and LEVELS[other] <= LEVELS[room]
    ]


def modules() -> dict[str, str]:
    """Path of every module below a room: its room."""
    package = runs.ROOT / "dino_jax"
    paths = sorted(path.relative_to(package) for path in package.rglob("*.py"))
    rooms = {f"dino_jax/{path}": path.parts[0].removesuffix(".py") for path in paths}
    rooms |= {f"configs/{path.name}": "configs" for path in runs.ROOT.glob("configs/*.py")}
    return {path: room for path, room in rooms.items() if not room.startswith("__")}


@pytest.mark.parametrize(("path", "room"), modules().items())
def test_imports_run_downwards(path: str, room: str) -> None:
    source = (runs.ROOT / path).read_text()
    assert not problems(room, source)


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("models", "from dino_jax.training.step import train_step"),
        ("data", "from dino_jax.models import vit"),
        ("evaluate", "import dino_jax.visualize.sheet"),
        ("weights", "def f():\n    from dino_jax import jobs"),
    ],
)
def test_finds_a_wrong_import(room: str, line: str) -> None:
    (problem,) = problems(room, line)
    assert "imports only its own room and rooms below it" in problem


def test_every_room_exists() -> None:
    assert set(modules().values()) == set(LEVELS)
