"""Cooling-Weighted DPO for vision-language models, on top of Hugging Face TRL.

Importing the package stays light: the public names are resolved on first use, so that `trl-cwdpo --help` and tools
that only read the version do not pay for torch, transformers and TRL.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from trl_cwdpo._version import __version__

if TYPE_CHECKING:
    from trl_cwdpo.callbacks import CurriculumCallback, ProbeEarlyStoppingCallback
    from trl_cwdpo.cwdpo_config import CWDPOConfig
    from trl_cwdpo.cwdpo_trainer import CWDPOTrainer
    from trl_cwdpo.gentle_negative_sft_config import GentleNegativeSFTConfig
    from trl_cwdpo.gentle_negative_sft_trainer import GentleNegativeSFTTrainer
    from trl_cwdpo.probes import DeltaLogpProbeCallback

__all__ = [
    "CWDPOConfig",
    "CWDPOTrainer",
    "CurriculumCallback",
    "DeltaLogpProbeCallback",
    "GentleNegativeSFTConfig",
    "GentleNegativeSFTTrainer",
    "ProbeEarlyStoppingCallback",
    "__version__",
]

# Public name -> the module that defines it. A name added here is added to `__all__` and to the TYPE_CHECKING block.
_LAZY_NAMES = {
    "CurriculumCallback": "trl_cwdpo.callbacks",
    "CWDPOConfig": "trl_cwdpo.cwdpo_config",
    "CWDPOTrainer": "trl_cwdpo.cwdpo_trainer",
    "DeltaLogpProbeCallback": "trl_cwdpo.probes",
    "GentleNegativeSFTConfig": "trl_cwdpo.gentle_negative_sft_config",
    "GentleNegativeSFTTrainer": "trl_cwdpo.gentle_negative_sft_trainer",
    "ProbeEarlyStoppingCallback": "trl_cwdpo.callbacks",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562) and keep it, so that the next access is an ordinary one."""
    if name not in _LAZY_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the lazy names too, for completion in shells and notebooks."""
    return sorted(set(globals()) | set(__all__))
