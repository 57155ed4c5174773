"""What a notebook teaches is what samelib runs: the code of every `core` cell equals samelib's own."""

import ast
import importlib
import inspect
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


class Bare(ast.NodeTransformer):
    """Drops docstrings and annotations: a lesson may leave them out."""

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        node.returns = None
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            argument.annotation = None
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        return node

    def visit_ClassDef(self, node):
        self.generic_visit(node)
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        return node


def definitions(source: str) -> dict[str, str]:
    """Functions and classes by name, as text that leaves out what `Bare` drops."""
    kinds = ast.FunctionDef | ast.ClassDef
    return {n.name: ast.dump(Bare().visit(n)) for n in ast.parse(source).body if isinstance(n, kinds)}


def core_cells():
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            if "core" in cell.metadata.get("tags", []):
                for name, code in definitions(cell.source).items():
                    yield pytest.param(cell.metadata["samelib"], name, code, id=f"{path.stem}-{name}")


@pytest.mark.parametrize(("module", "name", "code"), list(core_cells()))
def test_core_equals_samelib(module, name, code):
    own = inspect.getsource(getattr(importlib.import_module(module), name))
    assert definitions(own)[name] == code


def test_every_notebook_has_cores():
    with_cores = {p.id.split("-")[0] for p in core_cells()}
    assert with_cores == {p.stem for p in NOTEBOOKS}


def test_a_changed_core_is_noticed():
    same = definitions("def f(x):\n    return x + 1")
    assert definitions('def f(x: int) -> int:\n    "Doc."\n    return x + 1') == same
    assert definitions("def f(x):\n    return x + 2") != same
