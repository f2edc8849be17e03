"""Training-Free Bayesianization of LoRA adapters (TFB, arXiv 2412.05723).

    m = tfb.from_pretrained("path/to/adapter")
    print(m.fit("dev.csv", text="sentence", label="label"))
    df = m.score("test.csv")

Names are resolved on first use, so that importing tfb costs nothing and ``BayesLoRALinear`` needs
neither PEFT nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfb.adapters.artifact import ArtifactError, load, save
    from tfb.adapters.bridge import bayesianize, last_layers
    from tfb.adapters.export import export
    from tfb.adapters.loading import load_adapter, load_base
    from tfb.draws import Draws
    from tfb.evaluation.compare import Comparison
    from tfb.evaluation.decisions import Decisions
    from tfb.linear import BayesLoRALinear
    from tfb.model import BayesianModel
    from tfb.module import BayesianModule
    from tfb.posterior import AdapterError, LowRankPosterior
    from tfb.predictive import Predictive
    from tfb.pretrained import TfbModel, from_peft, from_pretrained
    from tfb.sampling.adaptive import Adaptive
    from tfb.sampling.config import SamplingConfig
    from tfb.sampling.generate import Generation
    from tfb.scoring.scorer import score
    from tfb.search.fit import fit_sigma
    from tfb.search.loss import AnchorSet
    from tfb.search.result import PredictiveFit, SearchError

__version__ = "0.1.0"

_HOMES = {
    "Adaptive": "sampling.adaptive",
    "AdapterError": "posterior",
    "AnchorSet": "search.loss",
    "ArtifactError": "adapters.artifact",
    "BayesLoRALinear": "linear",
    "BayesianModel": "model",
    "BayesianModule": "module",
    "Comparison": "evaluation.compare",
    "Decisions": "evaluation.decisions",
    "Draws": "draws",
    "Generation": "sampling.generate",
    "LowRankPosterior": "posterior",
    "Predictive": "predictive",
    "PredictiveFit": "search.result",
    "SamplingConfig": "sampling.config",
    "SearchError": "search.result",
    "TfbModel": "pretrained",
    "bayesianize": "adapters.bridge",
    "export": "adapters.export",
    "fit_sigma": "search.fit",
    "from_peft": "pretrained",
    "from_pretrained": "pretrained",
    "last_layers": "adapters.bridge",
    "load": "adapters.artifact",
    "load_adapter": "adapters.loading",
    "load_base": "adapters.loading",
    "save": "adapters.artifact",
    "score": "scoring.scorer",
}

__all__ = [
    "AdapterError",
    "Adaptive",
    "AnchorSet",
    "ArtifactError",
    "BayesLoRALinear",
    "BayesianModel",
    "BayesianModule",
    "Comparison",
    "Decisions",
    "Draws",
    "Generation",
    "LowRankPosterior",
    "Predictive",
    "PredictiveFit",
    "SamplingConfig",
    "SearchError",
    "TfbModel",
    "bayesianize",
    "export",
    "fit_sigma",
    "from_peft",
    "from_pretrained",
    "last_layers",
    "load",
    "load_adapter",
    "load_base",
    "save",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tfb' has no attribute {name!r}")
    return getattr(import_module(f"tfb.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
