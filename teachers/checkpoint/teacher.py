"""A trained model in a Hugging Face folder, checked before anything of it is executed.

Only safetensors are read; `config.json` is matched against a list of families and never hands control to remote code
(CVE-2025-32434, CVE-2026-5241: see docs/security.md).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.common import file_access as access
from paretune.common.errors import UsageError
from paretune.common.files import warn_damaged
from paretune.spaces.candidate import Shape
from paretune.teachers.checkpoint.config import check_window, read_config, shape_of
from paretune.teachers.checkpoint.contents import check_tensors
from paretune.teachers.checkpoint.families import family_of
from paretune.teachers.checkpoint.layout import canonical_shapes, from_stored, stored_as
from paretune.teachers.checkpoint.pruned import fold_masks, masked_names, zero_masks
from paretune.teachers.checkpoint.stored import read_headers, weight_files
from paretune.teachers.tokenizer.special_tokens import (
    SpecialTokens,
    check_named_tokens,
    check_token_ids,
    read_json,
    special_tokens,
)
from paretune.teachers.tokenizer.tokenizer_files import load_tokenizer

if TYPE_CHECKING:
    import torch

EMBEDDED = "stdlib-coder"
# Raised when what a stored checkpoint is converted into changes.
CONVERSION = 1
EMBEDDED_FOLDER = Path(__file__).resolve().parents[1] / "stdlib_coder"
# A vocabulary is often padded to a round number; a tokenizer that covers less than this belongs to another model.
LEAST_COVERAGE = 0.5


@dataclass(frozen=True)
class Teacher:
    """A checked model folder. Weights and tokenizer are loaded when asked for.

    `cache` is where weights that cannot be used as they lie (not float32, or in GPT-2's layout) are kept converted, so that
    all processes of the machine map one copy; without it every caller converts for itself.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    shape: Shape
    digest: str
    cache: Path | None = None

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files of the checkpoint. Raises UsageError if there are none or their index is wrong."""
        return weight_files(self.folder)

    @property
    def context(self) -> int:
        """Longest sequence in tokens."""
        return int(self.config["max_position_embeddings"])

    @property
    def parameters(self) -> int:
        """Number of parameters, a tied embedding counted once."""
        return sum(math.prod(size) for size in expected_tensors(self.shape).values())

    def kept_in(self, cache: Path) -> Teacher:
        """The same teacher, its converted weights (if it needs any) in `cache`."""
        return replace(self, cache=cache)

    @property
    def is_plain(self) -> bool:
        """Whether its files can be memory-mapped and used as they are."""
        stored = read_headers(self.weight_files)
        same = not family_of(self.shape).gpt2 and not masked_names(stored)
        return same and {t.dtype for t in stored.values()} == {"F32"}

    def weights(self) -> dict[str, torch.Tensor]:
        """All tensors as float32 under this project's names, memory-mapped where they can be; a tied head is not repeated, masks
        of torch.nn.utils.prune are applied. Do not write into them."""
        from paretune.teachers.checkpoint.training_state import DAMAGED, load_tensors, save_tensors

        if self.cache is None or self.is_plain:
            return self._weights_and_masks()[0]
        kept = self.cache / "teachers" / f"{self.name}-{self.digest}-{CONVERSION}.safetensors"
        try:
            return self._named(load_tensors(kept)[0])
        except FileNotFoundError:
            pass
        except (KeyError, *DAMAGED) as error:
            warn_damaged(kept, error)
        save_tensors(kept, self._weights_and_masks()[0], {"teacher": self.name})
        return self._named(load_tensors(kept)[0])

    def _named(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensors[name] for name in expected_tensors(self.shape)}

    @cached_property
    def has_masks(self) -> bool:
        """Whether the checkpoint holds masks of torch.nn.utils.prune."""
        return bool(masked_names(read_headers(self.weight_files)))

    def masks(self, zeros: bool = False) -> dict[str, torch.Tensor]:
        """Boolean masks (True where a weight stays) that came with the checkpoint, by parameter; `zeros` takes those of every
        matrix that is zero in at least 5 % of its entries too."""
        weights, masks = self._weights_and_masks()
        return {**(zero_masks(weights) if zeros else {}), **masks}

    def _weights_and_masks(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        import torch
        from safetensors import safe_open

        found: dict[str, torch.Tensor] = {}
        for file in self.weight_files:
            with safe_open(file, "pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        masks: dict[str, torch.Tensor] = {}
        if masked_names(found):
            try:
                found, masks = fold_masks(found)
            except ValueError as error:
                raise UsageError(f"{self.folder}: {error}", "save the pruned model again") from None
        weights = {n: value.to(torch.float32).contiguous() for n, value in from_stored(found, self.shape).items()}
        if not masks:
            return weights, {}
        everywhere = {name: masks.get(name, torch.ones_like(value, dtype=torch.bool)) for name, value in found.items()}
        kept = from_stored(everywhere, self.shape)
        return weights, {n: mask.contiguous() for n, mask in kept.items() if stored_as(n, self.shape, masks)}

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's fast tokenizer (tokenizers.Tokenizer) without truncation, padding and dropout."""
        return load_tokenizer(self.folder)

    @cached_property
    def generation(self) -> dict[str, Any]:
        """generation_config.json, empty if there is none."""
        return read_json(self.folder / "generation_config.json")

    @cached_property
    def special(self) -> SpecialTokens:
        """The tokens that end and begin a text, of all files that name them."""
        return special_tokens(self.config, self.generation, self.folder, self.tokenizer.get_vocab())

    @property
    def end_token(self) -> int | None:
        """Token id that ends a document; None where no file names one."""
        return next(iter(self.special.stop), None)


def load_teacher(name_or_folder: str) -> Teacher:
    """The embedded teacher by its name or a Hugging Face folder by its path; every file is checked, none kept in memory.

    Raises UsageError with the file, key or tensor that is wrong.
    """
    if name_or_folder == EMBEDDED:
        return _check(EMBEDDED, EMBEDDED_FOLDER)
    if not is_folder(name_or_folder):
        told = name_or_folder if len(name_or_folder) < 200 else f"{name_or_folder[:200]}…"
        raise UsageError(
            f"--teacher must be {EMBEDDED!r} or an existing Hugging Face folder, but {told or 'an empty path'} is not a folder",
            "check the path",
        )
    folder = Path(name_or_folder)
    return _check(folder.resolve().name, folder.resolve())


def is_folder(path: str, what: str = "--teacher") -> bool:
    """Whether an existing folder is named; an empty path, or one with a zero byte, names none. Raises as `access.unreadable`."""
    return bool(path) and "\0" not in path and access.is_folder(Path(path), what)


def _check(name: str, folder: Path) -> Teacher:
    config = read_config(folder / "config.json")
    shape = shape_of(config, folder / "config.json")
    check_window(config, folder / "config.json")
    check_token_ids(config, shape.vocab, folder / "config.json")
    check_token_ids(read_json(folder / "generation_config.json"), shape.vocab, folder / "generation_config.json")
    files = weight_files(folder)
    check_tensors(read_headers(files), shape, folder)
    if not access.is_file(folder / "tokenizer.json"):
        raise UsageError(
            f"{folder} holds no file tokenizer.json", "save the tokenizer into it: tokenizer.save_pretrained(DIR)"
        )
    access.require_readable(folder / "tokenizer.json")
    teacher = Teacher(name, folder, config, shape, _digest([folder / "config.json", folder / "tokenizer.json", *files]))
    known = teacher.tokenizer.get_vocab()
    vocabulary = 1 + max(known.values(), default=-1)  # more than the number of tokens where ids are left out
    if vocabulary > shape.vocab:
        raise UsageError(
            f"the tokenizer has {vocabulary} tokens, but the model only {shape.vocab}",
            "use the tokenizer it was trained with",
        )
    if vocabulary < LEAST_COVERAGE * shape.vocab:
        raise UsageError(
            f"the tokenizer must cover at least half of the embedding, but has {vocabulary} tokens of {shape.vocab}",
            "use the tokenizer it was trained with",
        )
    check_named_tokens(folder, known, shape.vocab)
    return teacher


def expected_tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """This project's tensor names of a model of this shape and family, with their shapes [out, in]."""
    return canonical_shapes(shape)


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
