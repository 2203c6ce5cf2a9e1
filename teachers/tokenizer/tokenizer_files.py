"""What a tokenizer's files carry besides the vocabulary: settings of somebody's batches, templates, a sampling rule.

Text is encoded, and tokenizers are shipped, without truncation, padding and dropout: they say how somebody made batches once,
not what the tokens of a text are. The template that adds BOS or EOS stays, as transformers resolves it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paretune.common.errors import UsageError
from paretune.teachers.tokenizer.special_tokens import NAMES, read_json

TOKENIZER = "tokenizer.json"
SAMPLING = ("dropout", "alpha", "nbest_size")
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes that go by tokenizer.json alone; those of a family follow the keys `add_bos_token` and `add_eos_token`."""
BATCH_SETTINGS = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "padding")


def plain_tokenizer_json(folder: Path) -> dict[str, Any]:
    """tokenizer.json without what would cut, fill or vary the tokens of a text, with the template that adds BOS and EOS.

    Raises UsageError if it is no JSON object.
    """
    found = read_json(folder / TOKENIZER)
    found |= {"truncation": None, "padding": None}
    if isinstance(found.get("model"), dict):
        found["model"] = {key: None if key in SAMPLING else value for key, value in found["model"].items()}
    config = read_json(folder / "tokenizer_config.json")
    keyed = "add_bos_token" in config or "add_eos_token" in config
    if keyed and config.get("tokenizer_class", GENERIC[0]) not in GENERIC:
        found["post_processor"] = _template(found, config, folder)
    return found


def load_tokenizer(folder: Path) -> Any:
    """The folder's fast tokenizer (tokenizers.Tokenizer), deterministic and without limits. Raises UsageError."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps(plain_tokenizer_json(folder)))
    except UsageError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise UsageError(f"{folder / TOKENIZER} cannot be read: {error}", "save the tokenizer again") from None


def plain_tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json without settings of batches and keys that name code, in words that old and new readers know."""
    found = read_json(folder / "tokenizer_config.json")
    for key in ("auto_map", "backend", *BATCH_SETTINGS):
        found.pop(key, None)
    found["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name, value in read_json(folder / "special_tokens_map.json").items():
        if name in NAMES or name == "additional_special_tokens":
            found.setdefault(name, value)
    if isinstance(
        found.get("extra_special_tokens"), list
    ):  # transformers 4 wants a dict there, and a list under this name
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    found |= _added(load_tokenizer(folder))  # onnxruntime-genai goes by these keys, transformers by the template
    templates = chat_templates(folder)
    found.pop("chat_template", None)
    if "default" in templates:  # onnxruntime-genai reads one string here, and no list
        found["chat_template"] = templates["default"]
    return found


def chat_templates(folder: Path) -> dict[str, str]:
    """Templates by name as transformers finds them: files before the key `chat_template` of tokenizer_config.json."""
    files = {"default": folder / TEMPLATE} if (folder / TEMPLATE).is_file() else {}
    if (folder / TEMPLATES).is_dir():
        files |= {path.stem: path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    if files:
        return {name: _text(path) for name, path in files.items()}
    given = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list):
        given = {t.get("name"): t.get("template") for t in given if isinstance(t, dict)}
    if not isinstance(given, dict):
        return {}
    return {n: t for n, t in given.items() if isinstance(n, str) and isinstance(t, str) and _is_plain_name(n)}


def _added(tokenizer: Any) -> dict[str, bool]:
    """Whether the template adds tokens before a text and behind it."""
    plain, full = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    more = len(full) - len(plain)
    before = next((i for i in range(more + 1) if full[i : i + len(plain)] == plain), 0)
    return {"add_bos_token": before > 0, "add_eos_token": more > before}


def _is_plain_name(name: str) -> bool:
    return bool(name) and Path(name).name == name and not name.startswith(".")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as UTF-8 text: {error}", "copy the folder again") from None


def _template(found: dict[str, Any], config: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """The post-processor that transformers makes of `add_bos_token` and `add_eos_token`, where tokenizer_config.json has them."""
    ids = {t.get("content"): t.get("id") for t in found.get("added_tokens") or () if isinstance(t, dict)}
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    used = {}
    for key, name, place in (("add_bos_token", "bos_token", 0), ("add_eos_token", "eos_token", 1)):
        value = config.get(name) or read_json(folder / "special_tokens_map.json").get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if config.get(key) and text is not None:
            if ids.get(text) is None:
                raise UsageError(
                    f"{folder / 'tokenizer_config.json'}: {key} needs {name} to be an added token of {TOKENIZER}, but {text!r} is not",
                    "save the tokenizer again",
                )
            single.insert(place * len(single), {"SpecialToken": {"id": text, "type_id": 0}})
            used[text] = {"id": text, "ids": [ids[text]], "tokens": [text]}
    second = [{kind: {**part, "type_id": 1}} for piece in single for kind, part in piece.items()]
    for piece in second:
        if "Sequence" in piece:
            piece["Sequence"]["id"] = "B"
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, *second], "special_tokens": used}
