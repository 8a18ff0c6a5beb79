"""Numbers as people read them."""

NOT_AVAILABLE = "n/a"

_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")

_MS_OF_SECOND = 1000


def significant(value: float | None) -> str:
    """`value` with three significant digits, as many as the histograms are good for."""
    if value is None:
        return NOT_AVAILABLE
    if value == 0:
        return "0"
    decimals = next((digits for digits, floor in enumerate((100, 10, 1, 0.1, 0.01)) if abs(value) >= floor), 5)
    return f"{value:,.{decimals}f}"


def bytes_text(value_bytes: int | None) -> str:
    """`value_bytes` in the largest binary unit that leaves at least 1."""
    if value_bytes is None:
        return NOT_AVAILABLE
    power = min(max(value_bytes.bit_length() - 1, 0) // 10, len(_BINARY_UNITS) - 1)
    return f"{significant(value_bytes / (1 << 10 * power))} {_BINARY_UNITS[power]}"


def percent_text(part: float | None) -> str:
    """A ratio as a percentage."""
    return NOT_AVAILABLE if part is None else f"{part * 100:.1f} %"


def seconds_text(value_s: float | None) -> str:
    """A run time as one reads it: `12.3 s`, `4 m 05 s`, `2 h 07 m`."""
    if value_s is None:
        return NOT_AVAILABLE
    minutes, seconds = divmod(round(value_s), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} m"
    return f"{minutes} m {seconds:02} s" if minutes else f"{value_s:.1f} s"


def plain(value: object) -> str:
    """`value` as one line that no terminal takes for a command: control characters and broken text become blanks."""
    return "".join(char if char.isprintable() else " " for char in str(value))


def time_text(value_ms: float | None) -> str:
    """A latency for people: in seconds from one second on."""
    if value_ms is None:
        return NOT_AVAILABLE
    return f"{significant(value_ms / 1e3)} s" if value_ms >= _MS_OF_SECOND else f"{significant(value_ms)} ms"


def with_unit(number: str, unit: str) -> str:
    """A number as text with its unit, where there is a number."""
    return number if number == NOT_AVAILABLE else f"{number} {unit}"
