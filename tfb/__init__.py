"""Training-Free Bayesianization of LoRA adapters (TFB, arXiv 2412.05723).

    bayes = tfb.bayesianize(peft_model)
    fit = tfb.fit_sigma(bayes, anchors)
    pred = bayes.predict(batch)

Names are resolved on first use, so that importing tfb costs nothing and ``BayesLoRALinear`` needs
neither PEFT nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfb.adapters import load_adapter, load_base
    from tfb.adaptive import Adaptive
    from tfb.anchor import AnchorSet
    from tfb.artifact import ArtifactError, load
    from tfb.convert import bayesianize
    from tfb.draws import Draws
    from tfb.engine import BayesianModel
    from tfb.exporting import export
    from tfb.generation import Generation
    from tfb.layer_scale import fit_layer_scales
    from tfb.linear import BayesLoRALinear
    from tfb.posterior import AdapterError, LowRankPosterior
    from tfb.predictive import Predictive
    from tfb.scoring import score
    from tfb.search import SearchError, SigmaFit, fit_sigma
    from tfb.selection import last_layers

__version__ = "0.1.0"

_HOMES = {
    "Adaptive": "adaptive",
    "AdapterError": "posterior",
    "AnchorSet": "anchor",
    "ArtifactError": "artifact",
    "BayesLoRALinear": "linear",
    "BayesianModel": "engine",
    "Draws": "draws",
    "Generation": "generation",
    "LowRankPosterior": "posterior",
    "Predictive": "predictive",
    "SearchError": "search",
    "SigmaFit": "search",
    "bayesianize": "convert",
    "export": "exporting",
    "fit_layer_scales": "layer_scale",
    "fit_sigma": "search",
    "last_layers": "selection",
    "load": "artifact",
    "load_adapter": "adapters",
    "load_base": "adapters",
    "score": "scoring",
}

__all__ = [
    "AdapterError",
    "Adaptive",
    "AnchorSet",
    "ArtifactError",
    "BayesLoRALinear",
    "BayesianModel",
    "Draws",
    "Generation",
    "LowRankPosterior",
    "Predictive",
    "SearchError",
    "SigmaFit",
    "bayesianize",
    "export",
    "fit_layer_scales",
    "fit_sigma",
    "last_layers",
    "load",
    "load_adapter",
    "load_base",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tfb' has no attribute {name!r}")
    return getattr(import_module(f"tfb.{_HOMES[name]}"), name)
