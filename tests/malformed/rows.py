"""Malformed preference data: strategies for rows with one fault, and for the ways in which data reach a trainer."""

import copy
import functools
import io
import itertools
import json
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import tiny
from datasets import Dataset, Features, Image, IterableDataset, List
from hypothesis import strategies as st
from outcomes import ERROR, SKIP, TRAINED

from trl_cwdpo.loading import load_preference_dataset

ROWS = 6
TEXT_COLUMNS = ("prompt", "chosen", "rejected")
# What may become of a fault
REFUSED = frozenset({ERROR})
LEFT_OUT = frozenset({SKIP, ERROR})  # an error where no other row is left
ODD = frozenset({ERROR, SKIP, TRAINED})  # harmless by itself: anything but a crash or a bad number


@dataclass(frozen=True)
class Case:
    """
    One malformed dataset and the run it is given to.

    Args:
        fault: What is wrong, in words.
        rows: The rows, plain values.
        expected: What may become of it.
        bad: Numbers of the rows that the fault is in.
        route: "map" (in memory), "stream" or "file" (JSON lines).
        vision: Whether it goes to a vision-language model.
        options: Options of the trainer that the fault needs.
    """

    fault: str
    rows: list[dict[str, Any]] = field(repr=False)
    expected: frozenset[str]
    bad: tuple[int, ...]
    route: str
    vision: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self):
        """What tells it from other cases."""
        return f"{self.route} {self.vision} {self.options} {self.rows!r}"


# --- values ----------------------------------------------------------------------------------------------------------

EMPTY = st.sampled_from([None, "", " ", "\n\t ", "\u200b", "\u2060\ufeff ", "\u00a0\u3000"])
WRONG_TYPES = st.one_of(
    st.integers(-5, 5),
    st.floats(allow_nan=True),
    st.booleans(),
    st.binary(min_size=1, max_size=3),
    st.just({"text": "blue"}),
    st.just(["blue", "green"]),
    st.just([["blue"]]),
    st.just([None]),
    st.just([1, 2]),
)
ODD_TEXTS = st.one_of(
    st.sampled_from(
        [
            "blue\x00green",
            "\u202eeulb si ti",
            "e\u0301" * 20,
            "\U0001f469\u200d\U0001f469\u200d\U0001f467",
            "<eos> <pad> <|assistant|> blue",
            "<image>",
            "{{ messages[0] }}{% for %}",
            "blue " * 500,
            "%s %(name)s {0} \\n",
            "<script>alert(1)</script>",
            "../../etc/passwd",
        ]
    ),
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(lambda text: text.strip()),
)
BAD_ROLES = st.sampled_from(["wizard", "Assistant ", "", None, 3, "user", "system"])
BAD_CONTENTS = st.one_of(
    st.integers(0, 3),
    st.just({"text": "blue"}),
    st.just([{"type": "video", "text": "blue"}]),
    st.just([{"type": "text"}]),
    st.just([{"text": "blue"}]),
    st.just(["blue"]),
    st.just([None]),
    st.just([{"type": "text", "text": 5}]),
)


def message(role, content):
    return {"role": role, "content": content}


def png(mode="RGB", size=(32, 32)):
    buffer = io.BytesIO()
    form = "TIFF" if mode in ("F", "CMYK") else "PNG"
    PIL.Image.new(mode, size).save(buffer, form)
    return buffer.getvalue()


def header_of_a_huge_picture():
    """A PNG that says it has 60000 × 60000 pixels and brings none of them."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


UNREADABLE = st.one_of(
    st.just({"bytes": b"no picture", "path": None}),
    st.just({"bytes": b"", "path": None}),
    st.just({"bytes": None, "path": None}),
    st.just({"bytes": png()[:40], "path": None}),
    st.just({"bytes": header_of_a_huge_picture(), "path": None}),
    st.just({"bytes": None, "path": "/no/such/file.png"}),
    st.just({"bytes": None, "path": "/"}),
    st.just({"bytes": None, "path": ""}),
    st.binary(min_size=1, max_size=30).map(lambda junk: {"bytes": junk, "path": None}),
    # Without its last bytes alone, which are no pixels, a picture can be read
    st.integers(50, len(png()) - 26).map(lambda end: {"bytes": png()[:end], "path": "cut_off.png"}),
)
ODD_PICTURES = st.one_of(
    st.sampled_from(["1", "L", "LA", "P", "RGBA", "I;16", "F", "CMYK"]).map(png),
    st.tuples(st.sampled_from([1, 2, 600]), st.sampled_from([1, 3, 400])).map(lambda size: png(size=size)),
).map(lambda content: {"bytes": content, "path": None})
NO_PICTURES = st.sampled_from(
    ["a.png", 5, {"url": "x"}, [1, 2], np.zeros((2, 2)).tolist(), "https://example.com/a.png"]
)

# --- rows ------------------------------------------------------------------------------------------------------------


def good_rows(kind):
    """Rows that nothing is wrong with: "standard", "conversational", "implicit", "parts" or "vision"."""
    return copy.deepcopy(_good_rows(kind))


@functools.cache
def _good_rows(kind):
    if kind == "standard":
        return tiny.pairs(ROWS, conversational=False).to_list()
    rows = tiny.pairs(ROWS).to_list()
    if kind == "implicit":
        return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    if kind in ("parts", "vision"):
        for index, row in enumerate(rows):
            parts = [{"type": "image", "text": None}, {"type": "text", "text": "describe the image"}]
            content = parts if kind == "parts" else "describe the image"
            row["prompt"] = [message("user", content)]
            row["images"] = [{"bytes": png(size=(32, 32 + index)), "path": None}]
    return rows


def is_vision(kind):
    return kind in ("parts", "vision")


# Each fault takes `draw` and rows and changes those rows; it returns what may become of them, and options it needs


def missing_column(draw, rows, bad, kind):
    columns = [name for name in TEXT_COLUMNS if name in rows[0]]
    if kind == "standard":
        columns.remove("prompt")  # it may stand within the responses
    column = draw(st.sampled_from(columns if kind != "conversational" else ["chosen", "rejected"]))
    new = draw(st.sampled_from([None, column.upper(), f" {column}", "text", "response"]))
    for row in rows:
        value = row.pop(column)
        if new is not None:
            row[new] = value
    return REFUSED


def empty_response(draw, rows, bad, kind):
    side, value = draw(st.sampled_from(["chosen", "rejected"])), draw(EMPTY)
    for index in bad:
        row = rows[index]
        if kind == "standard":
            row[side] = value
        elif kind == "implicit":
            row[side] = [*row[side][:-1], message("assistant", value)]
        else:
            row[side] = draw(st.sampled_from([None, [], [message("assistant", value)]]))
    return LEFT_OUT


def identical_responses(draw, rows, bad, kind):
    for index in bad:
        rows[index]["rejected"] = rows[index]["chosen"]
    return LEFT_OUT


def empty_prompt(draw, rows, bad, kind):
    value = draw(EMPTY) if kind == "standard" else draw(st.sampled_from([None, [], [message("user", "")]]))
    for index in bad:
        rows[index]["prompt"] = value
    return ODD


def wrong_type(draw, rows, bad, kind):
    column, value = draw(st.sampled_from([name for name in TEXT_COLUMNS if name in rows[0]])), draw(WRONG_TYPES)
    for index in bad:
        rows[index][column] = value
    return REFUSED


def say(rows, bad, kind, column, content):
    """Put a text, or what stands for one, into a column of rows of a kind."""
    for index in bad:
        role = "user" if column == "prompt" else "assistant"
        before = rows[index][column][:-1] if kind == "implicit" else []
        rows[index][column] = content if kind == "standard" else [*before, message(role, content)]


def odd_text(draw, rows, bad, kind):
    column, text = draw(st.sampled_from([name for name in TEXT_COLUMNS if name in rows[0]])), draw(ODD_TEXTS)
    say(rows, bad, kind, column, text)
    return ODD


def lone_surrogate(draw, rows, bad, kind):
    column = draw(st.sampled_from([name for name in TEXT_COLUMNS if name in rows[0]]))
    text = "blue " + draw(st.characters(categories=("Cs",)))
    say(rows, bad, kind, column, text)
    return REFUSED


def bad_role(draw, rows, bad, kind):
    side, role = draw(st.sampled_from(["chosen", "rejected"])), draw(BAD_ROLES)
    for index in bad:
        rows[index][side] = [*rows[index][side][:-1], message(role, "it looks blue")]
    return REFUSED


def bad_prompt_role(draw, rows, bad, kind):
    role = draw(st.sampled_from(["wizard", "", None, 3, "assistant"]))
    for index in bad:
        rows[index]["prompt"] = [message(role, "what is it")]
    # TRL takes a prompt that ends with the assistant's message for the beginning of its response
    return ODD if role == "assistant" else REFUSED


def bad_content(draw, rows, bad, kind):
    column, content = draw(st.sampled_from([name for name in TEXT_COLUMNS if name in rows[0]])), draw(BAD_CONTENTS)
    for index in bad:
        role = "user" if column == "prompt" else "assistant"
        before = rows[index][column][:-1] if kind == "implicit" else []
        rows[index][column] = [*before, message(role, content)]
    return LEFT_OUT


def bad_message(draw, rows, bad, kind):
    column = draw(st.sampled_from([name for name in TEXT_COLUMNS if name in rows[0]]))
    for index in bad:
        (*before, last) = rows[index][column]
        value = draw(
            st.sampled_from(
                [
                    {"content": "blue"},
                    {"role": "assistant"},
                    {"from": "gpt", "value": "blue"},
                    "blue",
                    None,
                    5,
                    [last],
                ]
            )
        )
        rows[index][column] = [*before, value]
    return LEFT_OUT


def lone_message(draw, rows, bad, kind):
    column = draw(st.sampled_from(["chosen", "rejected"]))
    for index in bad:
        rows[index][column] = rows[index][column][-1]
    return REFUSED


def mixed_formats(draw, rows, bad, kind):
    column = draw(st.sampled_from(TEXT_COLUMNS))
    for index in bad:
        value = rows[index][column]
        rows[index][column] = [message("assistant", value)] if isinstance(value, str) else "what is it"
    return REFUSED


def turns_out_of_order(draw, rows, bad, kind):
    user, assistant = message("user", "what is it"), message("assistant", "it is blue")
    turns = draw(
        st.sampled_from(
            [[user, user], [assistant, user], [user, assistant, assistant, user], [user, message("system", "a")]]
        )
    )
    for index in bad:
        rows[index]["prompt"] = turns
    return ODD


def tool_messages(draw, rows, bad, kind):
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    turns = draw(
        st.sampled_from(
            [
                [{"role": "assistant", "tool_calls": [call]}],
                [{"role": "assistant", "content": "", "tool_calls": [call]}],
                [{"role": "assistant", "content": None, "tool_calls": "look"}],
                [message("tool", "blue")],
                [{"role": "tool", "name": "look", "content": "blue"}, message("assistant", "it is blue")],
            ]
        )
    )
    for index in bad:
        rows[index]["chosen"] = turns
    return ODD


def bad_tools(draw, rows, bad, kind):
    value = draw(st.sampled_from([5, "no JSON {", [5], [{"type": "function"}], {"name": "look"}]))
    for index, row in enumerate(rows):
        row["tools"] = value if index in bad else None
    return ODD


def prompt_fills_max_length(draw, rows, bad, kind):
    for index in bad:
        words = " ".join(["what"] * 80)
        rows[index]["prompt"] = words if kind == "standard" else [message("user", words)]
    return LEFT_OUT, {"max_length": 40}


def nothing_fits(draw, rows, bad, kind):
    return REFUSED, {"max_length": draw(st.sampled_from([1, 2]))}


def numbers_that_are_not(draw, rows, bad, kind):
    name = draw(st.sampled_from(["score", "chosen_rating", "weight", "length", "labels", "input_ids"]))
    value = draw(st.sampled_from([float("nan"), float("inf"), None, "many"]))
    for index, row in enumerate(rows):
        row[name] = value if index in bad else 1.0
    return ODD


def unreadable_picture(draw, rows, bad, kind):
    for index in bad:
        rows[index]["images"] = [draw(UNREADABLE)]
    return REFUSED


def odd_picture(draw, rows, bad, kind):
    for index in bad:
        rows[index]["images"] = [draw(ODD_PICTURES)]
    return ODD


def no_picture(draw, rows, bad, kind):
    for index in bad:
        rows[index]["images"] = draw(st.one_of(NO_PICTURES, NO_PICTURES.map(lambda value: [value])))
    return REFUSED


def wrong_number_of_pictures(draw, rows, bad, kind):
    count = draw(st.sampled_from([0, 2, 3]))
    for index in bad:
        rows[index]["images"] = [{"bytes": png(), "path": None}] * count
    # Where the prompt does not say how many it wants, it gets what there are
    return REFUSED if kind == "parts" else ODD


def missing_picture(draw, rows, bad, kind):
    value = draw(st.sampled_from([None, [None]]))
    for index in bad:
        rows[index]["images"] = value
    return REFUSED if kind == "parts" else ODD


ANY = ("standard", "conversational", "implicit", "vision", "parts")
WITH_PROMPT = ("standard", "conversational", "vision")
MESSAGES = ("conversational", "implicit", "vision")
PICTURES = ("vision", "parts")
ROUTES = ("map", "stream", "file")
FAULTS = {
    missing_column: ANY,
    empty_response: ANY,
    identical_responses: ANY,
    empty_prompt: WITH_PROMPT,
    wrong_type: ANY,
    odd_text: ("standard", "conversational", "implicit", "vision"),
    lone_surrogate: (*MESSAGES, "standard"),
    bad_role: MESSAGES,
    bad_prompt_role: ("conversational", "vision"),
    bad_content: MESSAGES,
    bad_message: MESSAGES,
    lone_message: MESSAGES,
    mixed_formats: WITH_PROMPT,
    turns_out_of_order: ("conversational", "vision"),
    tool_messages: ("conversational",),
    bad_tools: ("conversational",),
    prompt_fills_max_length: WITH_PROMPT,
    nothing_fits: WITH_PROMPT,
    numbers_that_are_not: ANY,
    unreadable_picture: PICTURES,
    odd_picture: PICTURES,
    no_picture: PICTURES,
    wrong_number_of_pictures: PICTURES,
    missing_picture: PICTURES,
}
# The first kind of every fault, then the second of each that has one, …
PLAN = [(fault, kinds[place]) for place in range(len(ANY)) for fault, kinds in FAULTS.items() if place < len(kinds)]


@st.composite
def cases(draw, fault, kind):
    """Malformed datasets: one fault in one row, in two, or in all."""
    rows = good_rows(kind)
    bad = draw(st.sampled_from([(0,), (ROWS - 1,), (1, 3), tuple(range(ROWS))]))
    if fault in (missing_column, nothing_fits):
        bad = tuple(range(ROWS))
    result = fault(draw, rows, bad, kind)
    expected, options = result if isinstance(result, tuple) else (result, {})
    return Case(
        fault=fault.__name__.replace("_", " "),
        rows=rows,
        expected=expected,
        bad=bad,
        route=draw(st.sampled_from(["map", "map", "stream", "file"])),
        vision=is_vision(kind),
        options=tuple(options.items()),
    )


# --- the ways to a trainer -------------------------------------------------------------------------------------------


def dataset_of(case, folder):
    """
    The dataset of a case. Where Arrow cannot hold its rows together, they come as a stream, which can.

    Returns:
        `tuple`: the dataset, and by which way it came.
    """
    if case.route == "file" and (file := _written(case, folder)):
        return load_preference_dataset(str(file))["train"], "file"
    if case.route != "stream":
        features = Features({"images": List(Image())}) if case.vision else None
        try:
            dataset = Dataset.from_list(case.rows)
            return (dataset.cast_column("images", features["images"]) if features else dataset), "map"
        except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
            pass
    return stream_of(case.rows, decoded=case.vision), "stream"


def stream_of(rows, *, decoded):
    def generate():
        for row in rows:
            yield dict(row, images=_decoded(row["images"])) if decoded and "images" in row else dict(row)

    return IterableDataset.from_generator(generate)


def _decoded(cells):
    """Pictures as a stream of somebody's own would bring them: opened, where they can be."""
    if not isinstance(cells, list):
        return cells
    opened = []
    for cell in cells:
        try:
            opened.append(PIL.Image.open(io.BytesIO(cell["bytes"])))
        except Exception:  # noqa: BLE001 (left as it is: that is the fault)
            opened.append(cell)
    return opened


def _written(case, folder):
    """JSON lines, with pictures beside them, or None where the rows cannot be written so."""
    file = folder / "pairs.jsonl"
    with file.open("w") as lines:
        for number, row in enumerate(case.rows):
            row = dict(row)
            if case.vision and isinstance(row.get("images"), list):
                row["images"] = [_path_of(cell, folder, number) for cell in row["images"]]
            try:
                lines.write(json.dumps(row) + "\n")
            except (TypeError, ValueError):
                return None
    return file


def _path_of(cell, folder, number):
    if not isinstance(cell, dict) or "bytes" not in cell:
        return cell
    if cell["bytes"] is None:
        return cell["path"]
    name = f"{number}-{next(_NUMBERS)}.png"
    (folder / name).write_bytes(cell["bytes"])
    return name


_NUMBERS = itertools.count()
