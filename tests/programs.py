"""What a compiled program does."""

import re

EXCHANGES = "all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute"


def exchanges(compiled):
    """The names of what its devices exchange with each other."""
    return set(re.findall(rf"({EXCHANGES})(?:-start)?\(", compiled.as_text()))
