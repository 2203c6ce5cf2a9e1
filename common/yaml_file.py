"""YAML files that people edit: safe, size-limited, and every error says file:line:column and the nearest key."""

from __future__ import annotations

import difflib
import io
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

from paretune.common.errors import UsageError
from paretune.common.file_access import unreadable, unwritable
from paretune.common.files import write_atomically
from paretune.common.text import require_text
from paretune.common.validation import OWN_RULE, said

MAX_BYTES = 1_000_000
MAX_ALIASES = 20
MAX_DEPTH = 20

Model = TypeVar("Model", bound=BaseModel)


def load_model(path: Path, model: type[Model]) -> Model:
    """Read `path` as YAML and validate it as `model`; raises UsageError with the position of the first problem."""
    tree = _parse(path)
    if not isinstance(tree, CommentedMap):
        raise UsageError(
            f"{path}:1:1: a mapping of settings is expected, but got {type(tree).__name__}", "write `key: value` lines"
        )
    try:
        plain = _plain(tree)
        require_text(plain)
        return model.model_validate(plain)
    except ValidationError as error:
        raise UsageError(_explain(path, tree, model, error), "mend that line") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}", "mend that text") from None
    except RecursionError:
        raise UsageError(f"{path} contains itself", "write plain `key: value` lines") from None


def dump_model(model: BaseModel, header: str) -> str:
    """The model as YAML text with `header` as a comment above it; what is None is left out."""
    buffer = io.StringIO()
    YAML().dump(model.model_dump(mode="json", exclude_none=True), buffer)
    return "".join(f"# {line}\n" for line in header.splitlines()) + buffer.getvalue()


def set_keys(path: Path, changes: dict[str, Any], model: type[BaseModel]) -> None:
    """Change keys of a YAML file whose mapping is a `model`; mappings are merged, comments and other keys stay.

    Raises UsageError if what comes out is no valid `model`, EnvironmentProblem if it cannot be written; the file is as it was then.
    """
    tree = _parse(path)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(tree.get(key), CommentedMap):
            tree[key].update(value)
        else:
            tree[key] = value
    buffer = io.StringIO()
    YAML(typ="rt").dump(tree, buffer)
    try:
        model.model_validate(_plain(YAML(typ="rt").load(buffer.getvalue())))
    except ValidationError as error:
        raise UsageError(_explain(path, tree, model, error), "mend that line, or detect the machine anew") from None
    try:
        write_atomically(path, buffer.getvalue().encode())
    except OSError as error:
        raise unwritable(path, error, "choose a writable folder with --home") from None


def _parse(path: Path) -> Any:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path} has {len(data):,} bytes, the limit is {MAX_BYTES:,}", "name a settings file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: the file must be UTF-8, but byte {error.start} is not", "convert it") from None
    yaml = YAML(typ="rt")
    yaml.allow_duplicate_keys = False
    try:
        _refuse_bombs(path, text)
        return yaml.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{mark.line + 1}:{mark.column + 1}" if mark else "1:1"
        raise UsageError(f"{path}:{where}: {error.problem or error.context}", "mend that line") from None
    except (YAMLError, ValueError) as error:
        raise UsageError(f"{path}: {error}", "mend the file") from None


def _refuse_bombs(path: Path, text: str) -> None:
    """Raise UsageError where aliases could multiply or nesting could exhaust the stack, before anything is built."""
    aliases = depth = 0
    for event in YAML(typ="rt").parse(text):
        aliases += isinstance(event, AliasEvent)
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if aliases > MAX_ALIASES or depth > MAX_DEPTH:
            raise UsageError(
                f"{path} has more than {MAX_ALIASES} aliases or {MAX_DEPTH} levels", "write plain `key: value` lines"
            )


def _plain(node: Any) -> Any:
    """Plain dicts and lists; a tagged node (such as !!python/object) stays an object that no model accepts."""
    if isinstance(node, CommentedMap):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, CommentedSeq):
        return [_plain(value) for value in node]
    return node


def _explain(path: Path, tree: CommentedMap, model: type[BaseModel], error: ValidationError) -> str:
    first = min(
        error.errors(), key=lambda found: found["type"] != "extra_forbidden"
    )  # a misspelled key before the one it leaves missing
    location = [part for part in first["loc"] if isinstance(part, str | int)]
    line, column = _position(tree, location)
    name = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        known = _keys_at(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"{path}:{line}:{column}: unknown key {name!r}; {hint}"
    if not name:  # a rule over several keys says itself what it got
        return f"{path}:{line}:{column}: {str(first['msg']).removeprefix(OWN_RULE)}"
    return f"{path}:{line}:{column}: {name}: {said(first)}"


def _position(tree: Any, location: list[str | int]) -> tuple[int, int]:
    """1-based line and column of the deepest part of `location` that exists in the file."""
    line, column = 1, 1
    for part in location:
        try:
            mark = tree.lc.key(part) if isinstance(tree, CommentedMap) else tree.lc.item(part)
            line, column, tree = mark[0] + 1, mark[1] + 1, tree[part]
        except (KeyError, IndexError, AttributeError, TypeError):
            break
    return line, column


def _keys_at(model: type[BaseModel], location: list[str | int]) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)
