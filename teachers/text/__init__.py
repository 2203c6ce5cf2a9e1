"""The text of a search: files, records, splits, token ids."""
