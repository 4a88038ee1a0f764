"""Read the options that dataclasses declare from their source, without importing them.

Importing TRL's and transformers' configurations takes seconds; `--help` and the check for unknown options must not. A
class is found from its public name by following `from … import …` statements, those for type checkers included, so
nothing here knows where other packages keep their classes.
"""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

MISSING = object()


class SourceError(LookupError):
    """A name could not be followed to its source."""


class Option(NamedTuple):
    """
    One field of a dataclass.

    Args:
        name (`str`):
            Its name.
        annotation (`str`):
            Its type, as it is written.
        default (`Any`):
            Its default, `MISSING` for none; where the source computes it, the expression as text.
        help (`str`):
            Its help, with `%` as it is to be shown.
        choices (`tuple[str, ...]`):
            The values it may have; empty for any.
        aliases (`tuple[str, ...]`):
            Further flags.
        declared_in (`str`):
            The module of the class that introduces it, whichever redefines it.
    """

    name: str
    annotation: str
    default: Any
    help: str
    choices: tuple[str, ...]
    aliases: tuple[str, ...]
    declared_in: str

    @property
    def is_flag(self) -> bool:
        """Whether it is a boolean."""
        return self.annotation.replace(" ", "") in ("bool", "bool|None", "None|bool", "Optional[bool]")

    @property
    def flags(self) -> tuple[str, ...]:
        """Every spelling that transformers' parser makes of it, the plain one first."""
        names = [f"--{self.name}", *self.aliases]
        if self.is_flag and self.default is True:
            names.append(f"--no_{self.name}")
        return tuple(dict.fromkeys([*names, *(f"--{name[2:].replace('_', '-')}" for name in names)]))


class Module:
    """
    A parsed module.

    Args:
        name (`str`):
            Its dotted name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = _locate(name)
        self.is_package = self.path.name == "__init__.py"
        self.tree = ast.parse(self.path.read_text(encoding="utf-8"))

    def find_class(self, name: str) -> tuple["Module", ast.ClassDef]:
        """The definition of a class that is known under `name` here."""
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return self, node
        module, original = self._origin(name)
        return module.find_class(original)

    def find_value(self, name: str) -> Any:  # noqa: ANN401 (any constant)
        """The value of a constant that is known under `name` here."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and name in _targets(node) and node.value is not None:
                return evaluate(node.value, self)
        module, original = self._origin(name)
        return module.find_value(original)

    def _origin(self, name: str) -> tuple["Module", str]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return load(self._absolute(node)), alias.name
        raise SourceError(f"{self.name} neither defines nor imports {name}")

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        base = parts[: len(parts) - node.level + self.is_package]
        return ".".join([*base, *([node.module] if node.module else [])])


@cache
def load(name: str) -> Module:
    """A module, parsed once."""
    return Module(name)


def options_of(module: str, class_name: str) -> dict[str, Option]:
    """
    The options of a dataclass and of its bases.

    Args:
        module (`str`):
            A module that defines or imports the class.
        class_name (`str`):
            Its name there.

    Returns:
        `dict[str, Option]`: Option by name, those of the farthest base first; redefined ones keep their place.
    """
    found: dict[str, Option] = {}
    for owner, definition in _bases_first(*load(module).find_class(class_name)):
        for node in definition.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_":
                option = _option(node, node.target.id, owner, definition)
                if option.name in found:
                    option = option._replace(declared_in=found[option.name].declared_in)
                found[option.name] = option
    return found


def evaluate(node: ast.expr, module: Module, scope: dict[str, ast.expr] | None = None) -> Any:  # noqa: ANN401
    """
    The value of an expression made of constants, `+`, `list(…)`, `tuple(…)` and names of constants.

    Args:
        node (`ast.expr`):
            The expression.
        module (`Module`):
            Where it stands.
        scope (`dict`, *optional*):
            Names of the class around it.

    Returns:
        `Any`: Its value.

    Raises:
        SourceError: If it takes more to compute it.
    """
    try:
        return ast.literal_eval(node)
    except ValueError:
        pass
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return evaluate(node.left, module, scope) + evaluate(node.right, module, scope)
    if isinstance(node, ast.Name):
        inner = (scope or {}).get(node.id)
        return module.find_value(node.id) if inner is None else evaluate(inner, module, scope)
    if isinstance(node, ast.Dict):
        # Only its keys are of interest: names of choices
        return dict.fromkeys(evaluate(key, module, scope) for key in node.keys if key is not None)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("list", "tuple"):
        return [*(evaluate(node.args[0], module, scope) if node.args else ())]
    raise SourceError(f"{module.name}:{node.lineno}: {ast.unparse(node)[:60]} is no constant")


def _locate(name: str) -> Path:
    top, *rest = name.split(".")
    # Of a top-level package the specification is found without importing it; of a submodule it is not
    spec = find_spec(top)
    if spec is None or spec.origin is None:
        raise SourceError(f"there is no package {top}")
    path = Path(spec.origin).parent.joinpath(*rest)
    found = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not found.is_file():
        raise SourceError(f"there is no module {name}")
    return found


def _bases_first(module: Module, definition: ast.ClassDef) -> Iterator[tuple[Module, ast.ClassDef]]:
    for base in definition.bases:
        if isinstance(base, ast.Name):
            yield from _bases_first(*module.find_class(base.id))
    yield module, definition


def _option(node: ast.AnnAssign, name: str, module: Module, definition: ast.ClassDef) -> Option:
    scope = {target: statement.value for statement in _assignments(definition.body) for target in _targets(statement)}
    default: Any = MISSING
    metadata: dict[str, ast.expr] = {}
    if isinstance(node.value, ast.Call):
        keywords = {keyword.arg: keyword.value for keyword in node.value.keywords}
        if "default" in keywords:
            default = _value_or_text(keywords["default"], module, scope)
        elif "default_factory" in keywords:
            default = _factory_value(keywords["default_factory"], module, scope)
        metadata = _entries(keywords.get("metadata"))
    elif node.value is not None:
        default = _value_or_text(node.value, module, scope)
    return Option(
        name=name,
        annotation=ast.unparse(node.annotation),
        default=default,
        help=_text(metadata.get("help"), module, scope),
        choices=_strings(metadata.get("choices"), module, scope) or _literal_choices(node.annotation),
        aliases=_strings(metadata.get("aliases"), module, scope),
        declared_in=module.name,
    )


def _assignments(body: list[ast.stmt]) -> Iterator[ast.Assign]:
    """In order: where versions decide between several values, the last one is that of recent versions."""
    for statement in body:
        if isinstance(statement, ast.Assign):
            yield statement
        elif isinstance(statement, ast.If):
            yield from _assignments(statement.body)


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _entries(node: ast.expr | None) -> dict[str, ast.expr]:
    if not isinstance(node, ast.Dict):
        return {}
    pairs = zip(node.keys, node.values, strict=True)
    return {str(key.value): value for key, value in pairs if isinstance(key, ast.Constant)}


def _value_or_text(node: ast.expr, module: Module, scope: dict[str, ast.expr]) -> Any:  # noqa: ANN401
    try:
        return evaluate(node, module, scope)
    except SourceError:
        return ast.unparse(node)


def _factory_value(node: ast.expr, module: Module, scope: dict[str, ast.expr]) -> Any:  # noqa: ANN401
    if isinstance(node, ast.Lambda):
        return _value_or_text(node.body, module, scope)
    return {"list": [], "dict": {}}.get(ast.unparse(node), MISSING)


def _text(node: ast.expr | None, module: Module, scope: dict[str, ast.expr]) -> str:
    if node is None:
        return ""
    try:
        # Escaped for argparse's formatting, which shows it once
        return " ".join(str(evaluate(node, module, scope)).replace("%%", "%").split())
    except SourceError:
        # Text with computed parts: what stands between them
        parts = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
        return " ".join("".join(part for part in parts if isinstance(part, str)).replace("%%", "%").split())


def _strings(node: ast.expr | None, module: Module, scope: dict[str, ast.expr]) -> tuple[str, ...]:
    if node is None:
        return ()
    try:
        value = evaluate(node, module, scope)
    except SourceError:
        return ()
    return (value,) if isinstance(value, str) else tuple(map(str, value))


def _literal_choices(annotation: ast.expr) -> tuple[str, ...]:
    for node in ast.walk(annotation):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
            values = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return tuple(
                value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)
            )
    return ()
