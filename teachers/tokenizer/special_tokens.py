"""Special tokens of a teacher's folder: which ids end a text, begin one and pad a batch, wherever the folder says so.

config.json, generation_config.json and the tokenizer's own files may each name them. The tokens that end a text are all that
any of them names; where none does there are none, and nothing is made up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretune.common.errors import UsageError

NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class SpecialTokens:
    """`stop` are the ids that end a text, the one that the config names first; `begin` and `pad` are None where none is named."""

    stop: tuple[int, ...] = ()
    begin: int | None = None
    pad: int | None = None


def read_json(path: Path) -> dict[str, Any]:
    """An optional JSON object of a teacher's folder; empty if there is no such file. Raises UsageError if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        return {}
    except PermissionError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "check the permissions") from None
    except (ValueError, OSError) as error:
        raise UsageError(
            f"{path} is not readable JSON: {error}", "copy the folder again, it may be half-written"
        ) from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} must hold a JSON object, but holds {type(found).__name__}", "copy the file again")
    return found


def check_token_ids(settings: Mapping[str, Any], vocabulary: int, where: Path) -> None:
    """Refuse special tokens that the embedding has no row for."""
    for key in TOKEN_IDS:
        value = settings.get(key)
        ids = value if isinstance(value, list) else [value]
        good = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocabulary for i in ids)
        if value is not None and not (ids and good):
            raise UsageError(
                f"{where}: {key} must be null, a token id from 0 to {vocabulary - 1} or a list of them, but is {value!r}",
                f"mend {where.name}",
            )


def named_tokens(folder: Path) -> dict[str, str]:
    """Texts of the special tokens by their name such as `eos_token`: tokenizer_config.json before special_tokens_map.json."""
    found = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for name, value in read_json(folder / file).items():
            if name in NAMES:
                text = value.get("content") if isinstance(value, dict) else value
                if isinstance(text, str):
                    found[name] = text
    return found


def check_named_tokens(folder: Path, vocabulary: Mapping[str, int], rows: int) -> None:
    """Refuse a special token that tokenizer.json lacks where the embedding has no row left: transformers would add it behind."""
    end = 1 + max(vocabulary.values(), default=-1)
    missing = {text: name for name, text in named_tokens(folder).items() if text not in vocabulary}
    for number, (text, name) in enumerate(missing.items(), end):
        if number >= rows:
            raise UsageError(
                f"{folder / 'tokenizer_config.json'}: {name} must be a token of tokenizer.json, but {text!r} is not; "
                f"transformers would give it the id {number}, and the model has {rows} rows",
                "use the tokenizer it was trained with",
            )


def special_tokens(
    config: Mapping[str, Any], generation: Mapping[str, Any], folder: Path, vocabulary: Mapping[str, int]
) -> SpecialTokens:
    """The union of what config.json, generation_config.json and the tokenizer name. All ids were checked before."""
    own = {f"{name}_id": vocabulary.get(text) for name, text in named_tokens(folder).items()}
    stop = [i for source in (config, generation, own) for i in _ids(source.get("eos_token_id"))]
    first = {
        key: next((i for source in (config, generation, own) for i in _ids(source.get(key))), None)
        for key in ("bos_token_id", "pad_token_id")
    }
    return SpecialTokens(tuple(dict.fromkeys(stop)), first["bos_token_id"], first["pad_token_id"])


def _ids(value: Any) -> list[int]:
    return [] if value is None else [int(i) for i in (value if isinstance(value, list) else [value])]
