"""How model cards cite the paper."""

import textwrap
from typing import Any

PAPER: dict[str, Any] = {
    "title": "Learning Dynamics of VLM Finetuning",
    "id": "2510.11978",
    "citation": textwrap.dedent("""\
        @article{yang2025learning,
            title        = {{Learning Dynamics of VLM Finetuning}},
            author       = {Jing Yang and Jusheng Zhang and Kaitong Cai and Keze Wang},
            year         = 2025,
            eprint       = {arXiv:2510.11978},
        }"""),
}
