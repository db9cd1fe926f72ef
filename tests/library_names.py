"""What our code looks up in libraries of TensorRT, read from its source.

Their objects have no types that a checker knows: the code annotates them as `Any`, and so they are found here. Whatever
is an `Any` parameter, variable, field or result, or comes out of one, counts as the library's.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

Function = ast.FunctionDef | ast.Lambda


@dataclass
class Names:
    """names: of attributes and methods, with where they stand. chains: from the module down, such as
    ("DataType", "FLOAT"). defined: classes and members that are derived from the library's, which then calls them."""

    names: dict[str, str] = field(default_factory=dict)
    chains: set[tuple[str, ...]] = field(default_factory=set)
    defined: set[str] = field(default_factory=set)


@functools.cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def looked_up(file: Path, together: tuple[Path, ...]) -> Names:
    """What a file looks up; `together` are those whose fields and functions it uses."""
    trees = [tree_of(path) for path in together]
    fields = {name for tree in trees for name in _fields(tree)}
    functions = {
        node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and _gives(node)
    }
    reader = _Reader(file, fields, functions)
    tree = tree_of(file)
    for _ in range(2):  # fields may be used above the line that fills them
        for node in tree.body:
            reader.read(node, set())
    return reader.found


@functools.cache
def own_names(files: tuple[Path, ...]) -> set[str]:
    """Names that these files define: functions, classes, fields, attributes."""
    names: set[str] = set()
    for file in files:
        for node in ast.walk(tree_of(file)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    names |= {part.attr for part in ast.walk(target) if isinstance(part, ast.Attribute)}
                    names |= {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


def _is_any(annotation: ast.expr | None) -> bool:
    """Any, or something that holds one: `Any | None`, `tuple[Any, Any]`."""
    return annotation is not None and any(
        isinstance(node, ast.Name) and node.id == "Any" for node in _unwrapped(annotation)
    )


def _unwrapped(annotation: ast.expr) -> Iterator[ast.AST]:
    """The annotation without what stands inside of mappings, lists and functions, which are Python's own."""
    if isinstance(annotation, ast.Subscript):
        if isinstance(annotation.value, ast.Name) and annotation.value.id == "tuple":
            yield from ast.walk(annotation.slice)
        return
    yield annotation
    if isinstance(annotation, ast.BinOp):
        yield from _unwrapped(annotation.left)
        yield from _unwrapped(annotation.right)


def _gives(function: ast.FunctionDef) -> bool:
    return _is_any(function.returns)


def _fields(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and _is_any(node.annotation):
            if isinstance(node.target, ast.Attribute):
                yield node.target.attr
            elif isinstance(node.target, ast.Name):
                yield node.target.id


def _stored(node: ast.Name | ast.Attribute) -> bool:
    """Whether a name or attribute is what is assigned to, and not a part of that."""
    return isinstance(node.ctx, ast.Store)


class _Reader:
    """Reads one file, function by function."""

    def __init__(self, file: Path, fields: set[str], functions: set[str]) -> None:
        self.file, self.fields, self.functions = file, fields, functions
        self.found = Names()

    def read(self, node: ast.AST, known: set[str]) -> None:
        """Walks a body with the variables that are the library's there."""
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            known = known | self._parameters(node)
            for _ in range(2):  # a variable may be used above the line that makes it, in a loop
                known |= self._assigned(node, known)
        if isinstance(node, ast.ClassDef) and any(self._library(base, known) for base in node.bases):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            self.found.defined |= {method.name for method in methods if not method.name.startswith("_")}
        if isinstance(node, ast.Attribute) and self._library(node.value, known):
            self.found.names.setdefault(node.attr, f"{self.file.name}:{node.lineno}")
            chain = self._chain(node)
            if chain:
                self.found.chains.add(chain)
        for child in ast.iter_child_nodes(node):
            self.read(child, known)

    def _parameters(self, function: Function) -> set[str]:
        every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        return {parameter.arg for parameter in every if _is_any(parameter.annotation)}

    def _assigned(self, function: Function, known: set[str]) -> set[str]:
        names: set[str] = set()
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    names |= self._bound(target, node.value, known)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_any(node.annotation):
                names.add(node.target.id)
            elif isinstance(node, (ast.For, ast.comprehension)) and self._library(node.iter, known):
                names |= {part.id for part in ast.walk(node.target) if isinstance(part, ast.Name)}
        return names

    def _bound(self, target: ast.expr, value: ast.expr, known: set[str]) -> set[str]:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            pairs = zip(target.elts, value.elts, strict=True)
            return {name for one, other in pairs for name in self._bound(one, other, known)}
        if not self._library(value, known):
            return set()
        self.fields |= {part.attr for part in ast.walk(target) if isinstance(part, ast.Attribute) and _stored(part)}
        return {part.id for part in ast.walk(target) if isinstance(part, ast.Name) and _stored(part)}

    def _library(self, node: ast.expr, known: set[str]) -> bool:
        """Whether an expression is the library's."""
        if isinstance(node, ast.Name):
            return node.id in known
        if isinstance(node, ast.Attribute):
            return node.attr in self.fields or self._library(node.value, known)
        if isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            return name in self.functions or self._library(called, known)
        return isinstance(node, ast.Subscript) and self._library(node.value, known)

    def _chain(self, node: ast.expr) -> tuple[str, ...]:
        """Names from the module on: ("BuilderFlag", "TF32") of `trt.BuilderFlag.TF32`; () of anything else."""
        names: list[str] = []
        while isinstance(node, ast.Attribute) and node.attr != "trt":
            names.append(node.attr)
            node = node.value
        root = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
        return tuple(reversed(names)) if root == "trt" else ()
