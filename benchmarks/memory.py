"""What a process holds in memory of its own: anonymous pages, without files that are mapped."""

from pathlib import Path


def anonymous(process: int | None) -> int:
    """RssAnon of a process in kB; 0 where the system does not tell it."""
    try:
        told = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in told.splitlines() if line.startswith("RssAnon")), 0)
