"""What commands share: options, and what people see on a terminal."""
