"""Several calibration texts, each with its share of the sequences: ``c4,notes.txt:0.2``."""

from slimgpt.data.text import same_text
from slimgpt.files import exists, expanded


def parts_of(source: str, num_samples: int) -> list[tuple[str, int]]:
    """The texts that ``source`` names, with the number of sequences that is drawn from each.

    A share follows a colon; texts without one divide the rest equally. Shares are rounded to whole sequences, so that
    all are drawn. A file or folder of that very name is one text, whatever its name holds.

    Args:
        source: one text as ``calibration_text`` takes it, or several, separated by commas.
        num_samples: sequences in all.

    Raises:
        ValueError: for shares that are none, or that leave a text without a sequence; for a text named twice.
    """
    if ("," not in source and not _share(source)[1]) or exists(expanded(source)):
        return [(source, num_samples)]
    given = [_share(item.strip()) for item in source.split(",")]
    if any(not name for name, _ in given):
        raise ValueError(f"the text is {source!r}; every part needs a text's name")
    texts = [same_text(name) for name, _ in given]
    if twice := [i for i, text in enumerate(texts) if text in texts[:i]]:
        name, before = given[twice[0]][0], given[texts.index(texts[twice[0]])][0]
        also = "" if name == before else f" ({before} is the same text)"
        raise ValueError(f"the text is {source!r}, which names {name} twice{also}; give it once, with its whole share")
    said, silent = sum(share for _, share in given), sum(not share for _, share in given)
    if said > 1 + 1e-9 or (silent and said > 1 - 1e-9) or (not silent and abs(said - 1) > 1e-6):
        rest = "leave room for the parts without one" if silent else "be 1 together"
        raise ValueError(f"the text is {source!r}, whose shares are {said:g} in total; they must {rest}")
    shares = [share or (1 - said) / silent for _, share in given]
    counts = [int(share * num_samples + 1e-9) for share in shares]
    largest_rest = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * num_samples)
    for i in largest_rest[: num_samples - sum(counts)]:
        counts[i] += 1
    for (name, _), share, count in zip(given, shares, counts, strict=True):
        if count == 0:
            raise ValueError(
                f"the text is {source!r}: {share:g} of {num_samples} sequences leave none for {name}; "
                "ask for more sequences, or a larger share"
            )
    return [(name, count) for (name, _), count in zip(given, counts, strict=True)]


def _share(item: str) -> tuple[str, float]:
    """A text's name, and its share: 0 where none is given."""
    name, colon, text = item.rpartition(":")
    if not colon:
        return item, 0.0
    try:
        share = float(text)
    except ValueError:  # a colon of the name itself
        return item, 0.0
    if not 0 < share <= 1:
        raise ValueError(f"a text is {item!r}; a share must be more than 0 and at most 1")
    return name, share
