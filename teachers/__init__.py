"""Models to start from and their text: the embedded `stdlib-coder` and any Hugging Face folder of a family in families.py."""

from paretune.teachers.teacher import EMBEDDED, Teacher, load_teacher
from paretune.teachers.text import SPLITS, Corpus, Document, Split, chosen_corpus, library_corpus, user_corpus
from paretune.teachers.tokens import TokenSplit, token_splits

__all__ = [
    "EMBEDDED",
    "SPLITS",
    "Corpus",
    "Document",
    "Split",
    "Teacher",
    "TokenSplit",
    "chosen_corpus",
    "library_corpus",
    "load_teacher",
    "token_splits",
    "user_corpus",
]
