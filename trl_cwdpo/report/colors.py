"""The colours of a report, for a light and a dark page: one list for style sheet, interactive charts and pictures."""

# Light, dark. Hues that stay apart for colour-blind readers; curves differ in their dashes as well.
COLORS: dict[str, tuple[str, str]] = {
    "page": ("#f6f7f9", "#0e1217"),
    "surface": ("#ffffff", "#171c23"),
    "raised": ("#f0f2f5", "#1f262f"),
    "border": ("#d9dee5", "#303945"),
    "grid": ("#e6e9ee", "#2a323d"),
    "text": ("#1b2330", "#e4e8ee"),
    "muted": ("#596575", "#9ba7b6"),
    "accent": ("#1f6feb", "#6cacff"),
    "good": ("#1a7f4b", "#4cc38a"),
    "watch": ("#96640a", "#e3a835"),
    "bad": ("#c0362c", "#ff7b72"),
    "neutral": ("#5a6676", "#9ba7b7"),
    "chosen": ("#0a66c2", "#63a9ff"),
    "rejected": ("#b42318", "#ff8a80"),
    "rejected_hard": ("#d9480f", "#ffa05c"),
    "rejected_easy": ("#a87900", "#f2c744"),
    "rephrase": ("#0f8b8d", "#4dd0d2"),
    "mismatched": ("#6b7a8c", "#a4b2c2"),
    "shuffled": ("#8a6d5a", "#c9ab96"),
    "argmax": ("#7b3fb5", "#c792f5"),
    "run0": ("#0b67c3", "#64aaff"),
    "run1": ("#d94a10", "#ffa15d"),
    "run2": ("#1a804c", "#4dc48b"),
    "run3": ("#7c40b6", "#c893f6"),
    "run4": ("#b52419", "#ff8b81"),
    "run5": ("#108c8e", "#4ed1d3"),
    "run6": ("#8b6e5b", "#caac97"),
    "run7": ("#c2308f", "#ff8fd0"),
}
RUN_COLORS = tuple(name for name in COLORS if name.startswith("run"))


def light(name: str) -> str:
    """A colour on a light page."""
    return COLORS[name][0]


def darkened(svg: str) -> str:
    """A picture that was drawn in light colours, in the colours of a dark page."""
    for before, after in COLORS.values():
        svg = svg.replace(before, after)
    return svg
