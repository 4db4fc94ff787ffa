"""Writes docs/reference: a page per public module, from the signatures and docstrings of the package.

    python tools/reference.py            writes the pages and removes those that are no more
    python tools/reference.py --check    writes nothing; exit status 1 with the names of pages that are not up to date

Signatures and docstrings are read from the sources of this tree: pages depend neither on the versions of Python and
torch nor on clients that a module needs for its import.  What no definition shows, the schemas of operators, properties
and the tables of old names, is asked of the imported package, which needs no native library for that.
"""

import argparse
import ast
import importlib
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "reference"
SOURCES = ROOT / "python" / "bitsandbytes"
WIDTH = 100
MARK = "<!-- Written by tools/reference.py from the docstrings: change those. -->"

# page: (what it is about, the module where clients find its names, the modules that define them)
PAGES = {
    "bitsandbytes": ("the package", "", ["__init__"]),
    "functional": ("quantise, dequantise, products, single updates", "functional", ["functional"]),
    "functional-codebooks": ("codebooks and quantiles", "functional", ["codebooks"]),
    "functional-int8": ("LLM.int8() on tensors", "functional", ["int8", "igemm"]),
    "functional-memory": ("paged memory, upstream's layout for CPUs", "functional", ["paged", "cpu_layout"]),
    "functional-state": ("the statistics of a quantised tensor", "functional", ["quant_state"]),
    "autograd": ("differentiable products", "autograd._functions", ["autograd._functions"]),
    "nn-embedding": ("embeddings", "nn", ["nn.embedding", "nn.quantized_embedding"]),
    "nn-linear": (
        "linear layers; the classes are in nn too",
        "nn.modules",
        ["nn.linear4bit", "nn.linear8bit", "nn.outlier_linear"],
    ),
    "nn-parameters": ("quantised parameters", "nn", ["nn.params4bit", "nn.int8params"]),
    "nn.experts": ("mixture-of-experts models", "nn.experts", ["nn.experts"]),
    "nn.experts_transformers": ("experts through Transformers", "nn.experts_transformers", ["nn.experts_transformers"]),
    "nn.parametrize": ("4-bit storage for any parameter", "nn.parametrize", ["nn.parametrize"]),
    "optim-base": ("base classes of optimizers", "optim.optimizer", ["optim.optimizer"]),
    "optim-manager": ("settings of single parameters", "optim", ["optim.manager"]),
    "utils": ("helpers; outlier features", "utils", ["utils", "outliers"]),
    "legacy": ("functions of old releases", "legacy", ["legacy"]),
    "cextension": ("the native library", "cextension", ["cextension"]),
    "cuda_specs": ("what PyTorch says about CUDA", "cuda_specs", ["cuda_specs"]),
    "backends": ("kernels from other packages", "backends", ["backends.__init__"]),
    "consts": ("constants", "consts", ["consts"]),
}
OPTIMIZERS = ["adagrad", "adam", "adamw", "ademamix", "lamb", "lars", "lion", "rmsprop", "sgd"]
PAGES |= {f"optim-{name}": ("optimizers", "optim", [f"optim.{name}"]) for name in OPTIMIZERS}

# Imported or made beside public names; modules that are not for clients as a whole.
INNER = {"logger", "torch", "default_map"}
INNER_MODULES = {"_ops", "_ops_gemm", "_version", "gone", "research", "triton", "nn.modules", "nn.__init__"}
INNER_MODULES |= {"__main__", "optim.__init__", "autograd.__init__", "nn.quantized_linear", "nn.saved_4bit"}
INNER_MODULES |= {f"optim.{name}" for name in ("calls", "checkpoint", "layouts", "scales", "settings", "sharding")}
INNER_MODULES |= {"optim.variants", "nn.layer_kinds"}
# Private by name, and part of what clients import.
OUTER = {"__version__", "_mul", "_convert_weight_packed_for_cpu", "_convert_weight_packed_for_cpu_inverse"}


class Module:
    """The source of one module: its docstring, and its public definitions by name, in order."""

    def __init__(self, name):
        self.name = name
        text = SOURCES.joinpath(*name.split(".")).with_suffix(".py").read_text()
        self.tree, self.lines = ast.parse(text), text.splitlines()
        self.doc = ast.get_docstring(self.tree) or ""
        self.nodes = {}
        for node in self.tree.body:
            for defined in _names(node):
                self.nodes[defined] = node

    def exported(self):
        """The names of __all__, else those without an underscore in front."""
        if "__all__" in self.nodes:
            return [name for name in ast.literal_eval(self.nodes["__all__"].value) if name in self.nodes]
        return [name for name in self.nodes if name not in INNER and (name in OUTER or not name.startswith("_"))]

    def comment(self, node):
        """The comment behind a constant, or the lines of comment above it."""
        own = self.lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
        if own.startswith("#"):
            return own.lstrip("# ")
        above = []
        for line in reversed(self.lines[: node.lineno - 1]):
            if not line.startswith("# ") or line.startswith("# ---"):
                break
            above.insert(0, line[2:])
        return " ".join(above)


def _names(node):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


_modules = {}


def module(name):
    """The Module of that name, read once."""
    if name not in _modules:
        _modules[name] = Module(name)
    return _modules[name]


def public_names(home, public):
    """The names that clients use, in the order of the source; what module `public` does not offer is not for them."""
    names = [name for name in home.nodes if name in home.exported() or name in OUTER]
    live = imported(public)
    if dotted(home.name) == dotted(public) or live is None:
        return names
    found = [(name, getattr(live, name)) for name in names if hasattr(live, name)]
    foreign = [name for name, value in found if callable(value) and value.__module__ != dotted(home.name)]
    return [name for name, _ in found if name not in foreign]


def find_class(name):
    """The definition of a class of the package; None if it is not of the package."""
    for home in all_modules():
        node = module(home).nodes.get(name)
        if isinstance(node, ast.ClassDef):
            return node
    return None


def all_modules():
    """Every module of the package, as the names here are written."""
    paths = sorted(path.relative_to(SOURCES).with_suffix("") for path in SOURCES.rglob("*.py"))
    return [".".join(path.parts) for path in paths if path.name != "_version"]


# ---------------------------------------------------------------- signatures


def signature(node, name, drop_first=False):
    """One call of a function as text, wrapped."""
    args, texts = node.args, []
    positional = args.posonlyargs + args.args
    defaults = [None] * (len(positional) - len(args.defaults)) + args.defaults
    for i, (arg, default) in enumerate(zip(positional, defaults, strict=True)):
        if not (drop_first and i == 0):
            texts.append(_parameter(arg, default))
    if args.vararg:
        texts.append(f"*{_parameter(args.vararg, None)}")
    elif args.kwonlyargs:
        texts.append("*")
    texts += [_parameter(arg, default) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg:
        texts.append(f"**{_parameter(args.kwarg, None)}")
    makes = node.name in ("__init__", "__new__") or node.returns is None
    return _wrapped(name, texts, "" if makes else f" -> {_type(node.returns)}")


def _parameter(arg, default):
    kind = f": {_type(arg.annotation)}" if arg.annotation else ""
    if default is None:
        return arg.arg + kind
    return f"{arg.arg}{kind} = {ast.unparse(default)}" if kind else f"{arg.arg}={ast.unparse(default)}"


def _type(annotation):
    return annotation.value if isinstance(annotation, ast.Constant) and annotation.value else ast.unparse(annotation)


def _wrapped(name, texts, result):
    line = f"{name}({', '.join(texts)}){result}"
    if len(line) <= WIDTH:
        return line
    lines = []
    for text in texts:
        if lines and len(lines[-1]) + len(text) + 2 <= WIDTH:
            lines[-1] += f" {text},"
        else:
            lines.append(f"    {text},")
    return "\n".join([f"{name}(", *lines, f"){result}"])


def _constructor(node):
    """The function that makes objects of a class: its own, or that of the nearest base in the package."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name in ("__init__", "__new__"):
            return item
    for base in node.bases:
        found = find_class(ast.unparse(base).split(".")[-1])
        made = _constructor(found) if found else None
        if made is not None:
            return made
    return None


def _bases(node):
    """The bases that a reader can look up: public ones, in place of private ones their bases."""
    result = []
    for base in node.bases:
        text = ast.unparse(base)
        short = text.split(".")[-1]
        found = find_class(short) if "." not in text else None
        if found is not None and short in ("Variant", "WideState"):
            continue
        result += _bases(found) if found is not None and short.startswith("_") else [text]
    return result


# ---------------------------------------------------------------- entries


def _block(*texts, language=""):
    return [f"```{language}", *"\n\n".join(filter(None, texts)).splitlines(), "```", ""]


def function_entry(node, level, name=None, drop_first=False):
    """A function or method: a heading, the signature, the docstring."""
    kinds = [ast.unparse(each) for each in node.decorator_list]
    title = f"`{name or node.name}`"
    lines = [f"{'#' * level} {title}", ""]
    if "property" in kinds:
        lines += _block(f"{node.name}: {_type(node.returns)}  # property", language="python")
    else:
        prefix = "".join(f"@{kind}\n" for kind in kinds if kind in ("classmethod", "staticmethod"))
        first = drop_first and "staticmethod" not in kinds
        lines += _block(prefix + signature(node, node.name, first), language="python")
    return lines + _block(ast.get_docstring(node) or "", language="text")


def class_entry(node, level, live=None):
    """A class: how it is made, what it is, and the public methods that it or a private base defines.

    live  the class itself, None if its module cannot be imported: it shows properties that no method defines
    """
    made, bases = _constructor(node), _bases(node)
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and not made]
    if made is not None:
        call = signature(made, f"class {node.name}", drop_first=True)
    elif fields:
        texts = [_parameter(ast.arg(item.target.id, item.annotation), item.value) for item in fields]
        call = _wrapped(f"class {node.name}", texts, "")
    else:
        call = f"class {node.name}"
    lines = [f"{'#' * level} `{node.name}`", "", *_block(call, language="python")]
    if bases:
        lines += [f"Extends {', '.join(f'`{base}`' for base in bases)}.", ""]
    lines += _block(ast.get_docstring(node) or "", language="text")
    named = {item.name for item in _methods(node)}
    for name, value in vars(live).items() if live is not None else ():
        if isinstance(value, property) and value.__doc__ and not name.startswith("_") and name not in named:
            lines.append(f"* `{name}`: {value.__doc__}")
    lines += [""] * (lines[-1] != "")
    for item in _methods(node):
        lines += function_entry(item, level + 1, f"{node.name}.{item.name}", drop_first=True)
    return lines


def _methods(node):
    own = [item for item in node.body if isinstance(item, ast.FunctionDef) and not item.name.startswith("_")]
    for base in node.bases:
        short = ast.unparse(base)
        found = find_class(short) if short.startswith("_") else None
        own += [item for item in (_methods(found) if found else []) if item.name not in {x.name for x in own}]
    return own


def constant_lines(home, names):
    """Constants as a list: the value where it is short, and the comment beside it."""
    lines = []
    for name in names:
        node = home.nodes[name]
        value = ast.unparse(node.value) if node.value is not None else "_"
        shown = f"`{name}`" if len(value) > 60 or value.startswith("_") else f"`{name} = {value}`"
        comment = home.comment(node)
        lines += textwrap.wrap(f"* {shown}{': ' + comment if comment else ''}", WIDTH, subsequent_indent="  ")
    return [*lines, ""] if lines else []


def home_lines(home, public):
    """Everything that one module defines and module `public` offers."""
    names = public_names(home, public)
    kinds = {name: home.nodes[name] for name in names}
    lines = constant_lines(home, [n for n in names if not isinstance(kinds[n], (ast.FunctionDef, ast.ClassDef))])
    for name in names:
        if isinstance(kinds[name], ast.FunctionDef):
            lines += function_entry(kinds[name], 2)
        elif isinstance(kinds[name], ast.ClassDef):
            lines += class_entry(kinds[name], 2, getattr(imported(home.name), name, None))
    return lines


# ---------------------------------------------------------------- pages


def imported(name):
    """A module of the package, alive; None if a client that it needs is not installed."""
    try:
        return importlib.import_module(dotted(name))
    except ModuleNotFoundError as error:
        if error.name.startswith("bitsandbytes"):
            raise
        return None


def borrowed(home):
    """What a module takes over from others to offer it: a line for each of them."""
    lines = []
    for node in home.tree.body:
        if isinstance(node, ast.ImportFrom):
            names = [each.name for each in node.names if each.asname == each.name or node.module is None]
            names = [name for name in names if not name.startswith("_")]
            place = f": see `{node.module}`" if node.module else ": modules"
            lines += [f"* {', '.join(f'`{name}`' for name in names)}{place}"] if names else []
    return [*lines, ""] if lines else []


def dotted(name):
    """The full name of a module."""
    return ".".join(part for part in ("bitsandbytes", *name.split(".")) if part and part != "__init__")


def page(about, public, homes):
    """The text of a page."""
    lines = [MARK, "", f"# `{dotted(public)}`: {about}", ""]
    for home in map(module, homes):
        lines += _block(home.doc, language="text")
        lines += (borrowed(home) if home.name == "__init__" else []) + home_lines(home, public)
    return "\n".join(lines).rstrip() + "\n"


def operators():
    """The page of torch.ops.bitsandbytes."""
    functions = importlib.import_module("bitsandbytes.functional")
    public, private = [], []
    for home in ("_ops", "_ops_gemm"):
        values = vars(importlib.import_module(f"bitsandbytes.{home}"))
        for node in module(home).tree.body:
            for each in getattr(node, "decorator_list", []):
                if isinstance(each, ast.Call) and ast.unparse(each.func) == "_operator":
                    schema = eval(compile(ast.Expression(each.args[0]), home, "eval"), values)
                    (private if schema.startswith("_") else public).append((schema, ast.get_docstring(node)))
    lines = [MARK, "", "# `torch.ops.bitsandbytes`: the operators", ""]
    lines += [
        "Kernels for the CPU are in the native library; every operator has a fake for `torch.compile`, `torch.export`"
    ]
    lines += ["and meta tensors. A refusal is a RuntimeError with the text that the functions raise as ValueError.", ""]
    lines += ["## Public", "", "Schemas that other packages register kernels for.", ""]
    for schema, doc in sorted(public):
        name = schema[: schema.index("(")]
        short = name.split(".")[0]
        if doc is None:
            if not hasattr(functions, short):
                raise SystemExit(f"{name} has neither a docstring nor a function of its name in functional")
            doc = f"See {short}() in bitsandbytes.functional." + (" Writes to out." if name.endswith(".out") else "")
        lines += [f"### `{name}`", "", *_block(_fold(schema)), *_block(doc, language="text")]
    lines += ["## Internal", "", "What functions and layers call. They may change.", ""]
    for schema, _ in sorted(private):
        lines += _block(_fold(schema))
    return "\n".join(lines).rstrip() + "\n"


def _fold(schema):
    """A schema in lines that break between arguments."""
    whole = schema.replace(" ", "\0").replace(",\0", ", ")
    return "\n".join(textwrap.wrap(whole, WIDTH, subsequent_indent="    ", break_long_words=False)).replace("\0", " ")


def gone():
    """The page of removed names."""
    table = importlib.import_module("bitsandbytes.gone")
    lines = [MARK, "", "# Names of old releases", "", *_block(module("gone").doc, language="text")]
    lines += ["## Gone", "", "Reading one raises AttributeError, importing a module ImportError, with this advice.", ""]
    for home, names in table._GONE.items():
        lines += [f"### `{home}`", "", "| name | advice |", "|---|---|"]
        lines += [f"| `{name}` | {advice} |" for name, advice in names.items()] + [""]
    lines += ["## Moved", "", "Found under the old name, loaded when asked for.", ""]
    for home, names in table._MOVED.items():
        lines += [f"### `{home}`", "", "| name | defined in |", "|---|---|"]
        lines += [f"| `{name}` | `{place}` |" for name, place in names.items()] + [""]
    return "\n".join(lines).rstrip() + "\n"


def index(pages):
    """The page that lists the others."""
    lines = [
        MARK,
        "",
        "# Reference",
        "",
        "What each function and class does, takes, returns and raises. Names are those",
    ]
    lines += ["clients import; the module in front is where they find them.", "", "| page | module | about |"]
    lines += ["|---|---|---|"]
    for name, (about, public, _) in sorted(pages.items()):
        lines.append(f"| [{name}]({name}.md) | `{dotted(public)}` | {about} |")
    lines.append("| [operators](operators.md) | `torch.ops.bitsandbytes` | the operators and their schemas |")
    lines.append("| [gone](gone.md) | | names of old releases that moved or are gone |")
    lines += [
        "",
        "`python -m bitsandbytes` prints a report on the installation and checks it. `nn.modules` has all names",
    ]
    lines += ["of the `nn` pages too; `research` and `triton` are gone, their import says what to use instead.", ""]
    lines += ["Formats: [FORMAT.md](../FORMAT.md). Numbers: [NUMERICS.md](../NUMERICS.md). Optimizer formulas:"]
    lines += ["[OPTIMIZERS.md](../OPTIMIZERS.md). Coming from upstream: [MIGRATION.md](../MIGRATION.md)."]
    return "\n".join(lines) + "\n"


def pages():
    """{page: its entry in PAGES}, with a page for every public module that PAGES does not name."""
    covered = {home for _, _, homes in PAGES.values() for home in homes} | INNER_MODULES
    new = [name for name in all_modules() if name not in covered]
    return PAGES | {name: (module(name).doc.split("\n")[0].split(":")[0].rstrip("."), name, [name]) for name in new}


def documents():
    """{file name: text} of the whole folder."""
    found = pages()
    result = {f"{name}.md": page(*entry) for name, entry in found.items()}
    return {**result, "operators.md": operators(), "gone.md": gone(), "README.md": index(found)}


def exported():
    """[(module, name, live object)] of everything that the pages promise and that can be imported here."""
    for _, public, homes in pages().values():
        live = imported(public)
        for home in homes if live is not None else ():
            for name in public_names(module(home), public):
                yield dotted(public), name, getattr(live, name)


def main():
    """Write or check. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say which pages are not up to date")
    check = parser.parse_args().check
    wanted = documents()
    stale = [
        name for name, text in wanted.items() if not (FOLDER / name).is_file() or (FOLDER / name).read_text() != text
    ]
    extra = [path.name for path in FOLDER.glob("*.md") if path.name not in wanted]
    if check:
        for name in sorted(stale + extra):
            print(f"docs/reference/{name} is not up to date: run python tools/reference.py")
        return 1 if stale or extra else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in stale:
        (FOLDER / name).write_text(wanted[name])
    for name in extra:
        (FOLDER / name).unlink()
    print(f"docs/reference: {len(wanted)} pages, {len(stale)} written, {len(extra)} removed")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "python"))
    sys.exit(main())
