"""What a tokenizer's files say, besides its vocabulary."""
