"""Rules of the house that no other linter knows; `make lint` runs this, and exits 1 where one is broken.

- A name with an underscore is private to its file.
- Imports go down: a room imports only what ROOMS names before it.
- No file of the package, of csrc and of the tests is longer than 500 lines.

`--graph` prints the imports between rooms instead.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "apt_ext"
# From the ground up. A room is a folder, or one of the files beside them.
ROOMS = (
    "_version _load common distributed optim reference ops adapter config pruning storage wrapping model exporting "
    "method steps reporting hf structure __init__ tools __main__"
).split()
# What torch calls so, of modules, tensors and hooks.
TORCH = {"_C", "_apply", "_buffers", "_modules", "_parameters", "_version"}
BUILT = {"_C", "_built_for"}  # modules that the build writes
LONGEST = 500


def room(file: Path) -> str:
    """The room of a file of the package."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_private(name: str) -> bool:
    """True for _name; False for __name__."""
    return name.startswith("_") and not name.startswith("__")


def private_definitions(tree: ast.Module) -> set[str]:
    """The private names that a file defines: functions, classes, variables, and attributes of self."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in found if is_private(name)}


def private_uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of each private attribute that is read, and of each private name that is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, name.name) for name in node.names if is_private(name.name) and node.module)


def imports(file: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, room) of everything of the package that a file imports."""
    package = ["apt_ext", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        path = [*base, *(node.module.split(".") if node.module else [])]
        if path[:1] == ["apt_ext"]:
            for name in node.names:
                target = path[1] if len(path) > 1 else name.name
                if target not in BUILT:
                    yield node.lineno, target if target in ROOMS else "__init__"


def broken(trees: dict[Path, ast.Module]) -> Iterator[str]:
    """Each place where a rule is broken, in words."""
    defined = defaultdict(set)
    for file, tree in trees.items():
        for name in private_definitions(tree):
            defined[name].add(file)
    for file, tree in trees.items():
        where, own = file.relative_to(ROOT), room(file)
        if own in BUILT:
            continue
        if own not in ROOMS:
            yield f"{where}: expected a room of {' '.join(ROOMS)}"
            continue
        for line, name in private_uses(tree):
            if name in defined and file not in defined[name] and name not in TORCH:
                yield f"{where}:{line}: {name} is private to {min(defined[name]).relative_to(ROOT)}"
        for line, target in imports(file, tree):
            if target != own and ROOMS.index(target) > ROOMS.index(own):
                yield f"{where}:{line}: {own} imports {target}, which stands above it"
    for pattern in ("apt_ext/**/*.py", "csrc/**/*", "tests/**/*.py", "benchmarks/**/*.py"):
        for file in ROOT.glob(pattern):
            length = len(file.read_text().splitlines()) if file.is_file() else 0
            if length > LONGEST:
                yield f"{file.relative_to(ROOT)}: expected at most {LONGEST} lines, got {length}"


def main() -> int:
    trees = {file: ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}
    if "--graph" in sys.argv:
        edges = Counter((room(f), target) for f, tree in trees.items() for _, target in imports(f, tree) if target != room(f))
        nodes = {room(file) for file in trees}
        print(f"{len(nodes)} rooms, {len(edges)} edges, {len(trees)} files")
        for name in ROOMS:
            print(name, "->", " ".join(target for target in ROOMS if (name, target) in edges))
        return 0
    found = list(broken(trees))
    print("\n".join(found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
