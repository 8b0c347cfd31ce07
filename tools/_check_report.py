"""What tools/check_data.py has found."""

from collections import defaultdict

EXAMPLES = 3


class Report:
    """Problems, which make a training fail or learn what is wrong, and notes on what it leaves out."""

    def __init__(self):
        self.found: dict[tuple[bool, str, str], list[str]] = defaultdict(list)

    def problem(self, what: str, where: str, fix: str) -> None:
        """Add a problem: `what` kind, `where` and with which values, and how to `fix` this kind."""
        self.found[True, what, fix].append(where)

    def note(self, what: str, where: str, why: str) -> None:
        """Add what is worth to know, and why it is no problem."""
        self.found[False, what, why].append(where)

    @property
    def problems(self) -> int:
        """How many problems there are."""
        return sum(len(places) for (bad, *_), places in self.found.items() if bad)

    def __str__(self) -> str:
        lines = []
        for (bad, what, fix), places in sorted(self.found.items(), key=lambda item: not item[0][0]):
            lines.append(f"  {'PROBLEM' if bad else 'note'}: {what}: {len(places)}; {fix}")
            lines += [f"    {place}" for place in places[:EXAMPLES]]
            lines += [f"    and {len(places) - EXAMPLES} more"] * (len(places) > EXAMPLES)
        # Names come from files, and a terminal may not know all their characters.
        return "\n".join(lines).encode(errors="backslashreplace").decode()
