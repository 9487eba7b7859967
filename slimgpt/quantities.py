"""Sizes and counts as people write them: 200MB, 1.5GB, 100M, 5.4B."""

import re

BYTES = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
COUNTS = {"k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def read_quantity(text: str, units: dict[str, int], name: str) -> int:
    """The number that ``text`` means, in bytes or parameters.

    Args:
        text: a number and one of ``units``, in any case, with or without a blank between them.
        units: BYTES or COUNTS.
        name: of the setting, for the error.

    Raises:
        ValueError: when it is something else, or not more than 0.
    """
    factors = {unit.lower(): factor for unit, factor in units.items()}
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]+)\s*", text.lower())
    if not match or match[2] not in factors or not (number := round(float(match[1]) * factors[match[2]])):
        known = list(units)
        raise ValueError(
            f"{name} is {text!r}; it must be a number and {', '.join(known[:-1])} or {known[-1]}, such as 200{known[1]}"
        )
    return number
