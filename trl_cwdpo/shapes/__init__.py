"""The embedded toy task: drawn shapes, exact captions, negatives of three grades, an oracle, and a tiny VLM.

Importing this package imports nothing heavy; each name is imported from its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_cwdpo.shapes.captions import PROMPT, captions_of, sample_caption
    from trl_cwdpo.shapes.dataset import build_dataset, scenes_of, write_dataset
    from trl_cwdpo.shapes.evaluation import EvaluationResult, Sample, evaluate, generate_captions, score_captions
    from trl_cwdpo.shapes.model import build_model, build_processor, prompt_text
    from trl_cwdpo.shapes.negatives import GRADES, easy_negative, hard_negative, medium_negative, negative
    from trl_cwdpo.shapes.oracle import ATTRIBUTES, Verdict, attribute_reward, judge, parse
    from trl_cwdpo.shapes.pretraining import PretrainResult, Recipe, pretrain
    from trl_cwdpo.shapes.scenes import Scene, Thing, draw_scene, draw_scenes, sample_scene, sample_scenes, split_of

_MODULES = {
    "captions": ("PROMPT", "captions_of", "sample_caption"),
    "dataset": ("build_dataset", "scenes_of", "write_dataset"),
    "evaluation": ("EvaluationResult", "Sample", "evaluate", "generate_captions", "score_captions"),
    "model": ("build_model", "build_processor", "prompt_text"),
    "negatives": ("GRADES", "easy_negative", "hard_negative", "medium_negative", "negative"),
    "oracle": ("ATTRIBUTES", "Verdict", "attribute_reward", "judge", "parse"),
    "pretraining": ("PretrainResult", "Recipe", "pretrain"),
    "scenes": ("Scene", "Thing", "draw_scene", "draw_scenes", "sample_scene", "sample_scenes", "split_of"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ATTRIBUTES",
    "GRADES",
    "PROMPT",
    "EvaluationResult",
    "PretrainResult",
    "Recipe",
    "Sample",
    "Scene",
    "Thing",
    "Verdict",
    "attribute_reward",
    "build_dataset",
    "build_model",
    "build_processor",
    "captions_of",
    "draw_scene",
    "draw_scenes",
    "easy_negative",
    "evaluate",
    "generate_captions",
    "hard_negative",
    "judge",
    "medium_negative",
    "negative",
    "parse",
    "pretrain",
    "prompt_text",
    "sample_caption",
    "sample_scene",
    "sample_scenes",
    "scenes_of",
    "score_captions",
    "split_of",
    "write_dataset",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
