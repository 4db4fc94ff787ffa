"""Types and docstrings of everything public, and docs/reference, which is made of them."""

import importlib
import importlib.util
import inspect
import pathlib
import subprocess
import sys
import typing

import pytest
import torch

import bitsandbytes as bnb

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "reference.py"
MODULES = ("functional", "nn", "optim", "autograd", "nn.parametrize", "nn.experts")


def load_tool():
    spec = importlib.util.spec_from_file_location("reference", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


reference = load_tool()
EXPORTED = list(reference.exported())
CALLABLES = {f"{module}.{name}": value for module, name, value in EXPORTED if callable(value)}


def functions_of(owner):
    """(name, function) of what can be called on a class of this package: constructor and public methods, or itself."""
    if not inspect.isclass(owner):
        yield owner.__name__, owner
        return
    for cls in owner.__mro__:
        if not cls.__module__.startswith("bitsandbytes"):
            continue
        for name, value in vars(cls).items():
            value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if inspect.isfunction(value) and value.__name__ == name and is_ours(name, value):
                yield f"{cls.__name__}.{name}", value


def is_ours(name, function):
    """Written in this package, and public; what a dataclass or NamedTuple writes itself is typed by its fields."""
    public = not name.startswith("_") or name in ("__init__", "__new__")
    return public and function.__module__.startswith("bitsandbytes") and "<string>" not in function.__code__.co_filename


def test_py_typed():
    assert pathlib.Path(bnb.__file__).with_name("py.typed").is_file()


def test_pages_are_up_to_date():
    done = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_check_finds_what_is_stale(tmp_path, monkeypatch, capsys):
    tool = load_tool()
    monkeypatch.setattr(tool, "FOLDER", tmp_path / "reference")
    monkeypatch.setattr(sys, "argv", ["reference.py", "--check"])
    assert tool.main() == 1
    monkeypatch.setattr(sys, "argv", ["reference.py"])
    assert tool.main() == 0
    monkeypatch.setattr(sys, "argv", ["reference.py", "--check"])
    assert tool.main() == 0
    (tool.FOLDER / "utils.md").write_text("old")
    (tool.FOLDER / "gone.md").unlink()
    (tool.FOLDER / "extra.md").write_text("of a module that was removed")
    capsys.readouterr()
    assert tool.main() == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == [f"docs/reference/{name}.md" for name in ("extra", "gone", "utils")]


def test_pages_are_short():
    for name, text in reference.documents().items():
        assert text.count("\n") < 500, name


@pytest.mark.parametrize("module", MODULES)
def test_every_exported_name_has_a_page(module):
    live = importlib.import_module(f"bitsandbytes.{module}")
    found = {name for _, name, _ in EXPORTED} | {name.rpartition(".")[2] for name in reference.pages()}
    found |= {"lib"}  # of cextension, offered by functional too
    assert not {name for name in live.__all__ if name not in found or not hasattr(live, name)}


def test_every_exported_name_is_on_its_page():
    for page, (_, public, homes) in reference.pages().items():
        text = (reference.FOLDER / f"{page}.md").read_text()
        for home in homes:
            for name in reference.public_names(reference.module(home), public):
                assert f"# `{name}`\n" in text or f"* `{name}" in text, (page, name)


def test_every_operator_has_an_entry():
    text = (reference.FOLDER / "operators.md").read_text()
    own = {name.removeprefix("bitsandbytes::") for name in torch._C._dispatch_get_all_op_names()}
    own = {name for name in own if hasattr(torch.ops.bitsandbytes, name.split(".")[0])}
    assert own
    for name in own:
        assert f"\n{name}(" in text, name


@pytest.mark.parametrize("name", CALLABLES)
def test_docstring(name):
    owner = CALLABLES[name]
    assert inspect.getdoc(owner), name
    if inspect.isclass(owner):
        assert owner.__doc__, f"{name} inherits its docstring"
    for method, function in functions_of(owner):
        if not method.endswith("__init__"):
            assert function.__doc__, method


@pytest.mark.parametrize("name", CALLABLES)
def test_types(name):
    for method, function in functions_of(CALLABLES[name]):
        hints = typing.get_type_hints(function)
        parameters = list(inspect.signature(function).parameters)
        first = parameters[:1] if parameters[:1] in (["self"], ["cls"], ["ctx"]) else []
        missing = [each for each in parameters[len(first) :] if each not in hints]
        assert not missing and "return" in hints, (method, missing)


@pytest.mark.parametrize("cls", [bnb.functional.QuantState, bnb.nn.Params4bit, bnb.nn.Int8Params, bnb.MatmulLtState])
def test_types_of_attributes(cls):
    assert typing.get_type_hints(cls)


def test_every_public_module_has_a_docstring():
    for name in reference.all_modules():
        assert reference.module(name).doc, name
