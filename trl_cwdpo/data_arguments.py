"""What a command line says about the layout of its data, next to TRL's `ScriptArguments`, which name the data."""

from dataclasses import dataclass, field

from .formats import parse_columns


@dataclass
class DataArguments:
    r"""
    How the columns of a dataset become `prompt`, `chosen`, `rejected` and `images`.

    Args:
        columns (`dict[str, str]` or `str`, *optional*, defaults to `"auto"`):
            The dataset's layout: `"auto"` recognises it by its columns; `"trl"` (columns as TRL names them, left as
            they are), `"rlaif-v"`, `"rlhf-v"` or `"llava"` name it. Or a mapping of names this package knows to the
            dataset's, as JSON on a command line (`'{"prompt": "question", "images": "image"}'`) or as a mapping in
            YAML; the layout of the renamed columns is then recognised as with `"auto"`. `None` leaves the dataset as
            it is.
        image_folder (`str`, *optional*):
            Folder that paths of images in the data are relative to, and inside of which they must stay. Defaults to
            the folder of the data.
        train_rows (`str`, *optional*):
            Rows of the training split to train on, as `FILE.json:KEY`: the file holds an object whose `KEY` is a list
            of row numbers, counted from 0. `trl-cwdpo run` writes such a file. Defaults to all rows.
        eval_rows (`str`, *optional*):
            Rows of the *training* split to hold out for evaluation and probes, in the same form, instead of the test
            split.
    """

    columns: dict[str, str] | str | None = field(
        default="auto",
        metadata={
            "help": "Layout of the dataset: 'auto' recognises it by its columns; 'trl', 'rlaif-v', 'rlhf-v' and "
            "'llava' name it. Or a mapping of names this package knows to the dataset's, as JSON on a command line "
            '(\'{"prompt": "question", "images": "image"}\') or as a mapping in YAML.'
        },
    )
    image_folder: str | None = field(
        default=None,
        metadata={
            "help": "Folder that paths of images in the data are relative to, and inside of which they must stay. "
            "Defaults to the folder of the data."
        },
    )
    train_rows: str | None = field(
        default=None,
        metadata={
            "help": "Rows of the training split to train on, as FILE.json:KEY: the key of a list of row numbers, "
            "counted from 0. Defaults to all rows."
        },
    )
    eval_rows: str | None = field(
        default=None,
        metadata={
            "help": "Rows of the training split to hold out for evaluation and probes, as FILE.json:KEY, instead of "
            "the test split."
        },
    )

    def __post_init__(self) -> None:
        self.columns = parse_columns(self.columns)
