"""What the sensitivity table of mixed precision costs, and whether a search can afford it. No torch in here."""

from __future__ import annotations

from paretune.spaces.candidate import Shape

MOST_TOKENS, LEAST_TOKENS = 2048, 256
# Of a float32 forward pass on one core, with room to spare.
GFLOPS_PER_CORE = 50.0
BUDGET_SHARE = 0.05


def affordable_tokens(shape: Shape, formats: int, budget_s: float, cores: int) -> int:
    """On how much text (2,048 tokens down to 256) the table may be measured; 0 where even that takes more than 5 % of the budget."""
    tokens = MOST_TOKENS
    while tokens >= LEAST_TOKENS:
        if expected_seconds(shape, formats, tokens, cores) <= BUDGET_SHARE * budget_s:
            return tokens
        tokens //= 2
    return 0


def expected_seconds(shape: Shape, formats: int, tokens: int, cores: int) -> float:
    """How long a table of that many formats takes: every entry runs the layers from its own on, and the head."""
    head = shape.vocab * shape.hidden
    layers = shape.parameters - head * (1 if shape.tied else 2)
    whole = 2 * shape.layers + 2  # rows; with learned positions each runs all layers, else half of them on average
    passes = formats * ((whole if shape.positions else shape.layers + 2) * layers + whole * head)
    return 2e-9 * passes * tokens / (GFLOPS_PER_CORE * max(1, cores))
