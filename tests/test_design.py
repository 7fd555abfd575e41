"""The shape of the code, as docs/design.md has it: floors, and sizes that leave a reader room."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
METHOD = ROOT / "deepstyle.py"
SUPPORT, APP = (sorted((ROOT / name).glob("*.py")) for name in ("deepstyle_support", "deepstyle_app"))
FILES = [METHOD, *SUPPORT, *APP]


def imported(path, without=None):
    """The first names of the modules that a file imports; one of its own package by that package's."""
    names = set()
    tree = ast.parse(path.read_text())
    if without:
        tree.body = [node for node in tree.body if not without(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(path.parent.name if node.level else (node.module or "").split(".")[0])
    return names


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def parameters(function):
    given = function.args
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return (
        [name for name in names if name not in ("self", "cls")]
        + [given.vararg] * bool(given.vararg)
        + [given.kwarg] * bool(given.kwarg)
    )


@pytest.mark.parametrize("path", SUPPORT, ids=lambda path: path.name)
def test_what_the_method_stands_on_imports_nothing_above_it(path):
    assert not imported(path) & {"deepstyle", "deepstyle_app"}


def test_the_method_calls_the_command_only_where_it_is_the_program():
    def is_start(node):
        return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"

    assert "deepstyle_app" in imported(METHOD)
    assert "deepstyle_app" not in imported(METHOD, without=is_start)


def test_importing_the_method_loads_neither_the_command_nor_a_backend():
    code = "import sys, deepstyle; print({*sys.modules} & {'deepstyle_app', 'keras', 'ray', 'rich'})"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"


def test_the_method_stays_under_a_thousand_lines():
    assert len(METHOD.read_text().splitlines()) < 1000


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_function_takes_more_than_six_parameters_or_sixty_lines(path):
    for function in functions(path):
        assert len(parameters(function)) <= 6, function.name
        assert function.end_lineno - function.lineno < 60, function.name


def test_half_of_the_functions_have_eight_lines_or_fewer():
    lengths = sorted(one.end_lineno - one.lineno + 1 for path in FILES for one in functions(path))
    assert lengths[len(lengths) // 2] <= 8
