"""Models to start from and their text: the embedded `stdlib-coder` and any Hugging Face folder of a family in families.py."""
