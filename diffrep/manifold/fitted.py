"""How an estimator shows and saves itself: its settings before it was fitted, its map afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from diffrep.files import number_of
from diffrep.results import Result, summary

if TYPE_CHECKING:
    from PIL import Image


class FittedMap(BaseEstimator, Result):
    """Base of estimators with an `embedding_`, (n, n_components) float64.

    `numpy`, `to_pandas` and `save` are of the fitted map; without one they raise scikit-learn's `NotFittedError`, a
    ValueError. A notebook draws the map in the place of scikit-learn's diagram of the settings.
    """

    MAIN: ClassVar[str | None] = "embedding"

    embedding_: NDArray[np.float64]

    def arrays(self) -> dict[str, np.ndarray]:
        check_is_fitted(self)
        return {"embedding": self.embedding_}

    def columns(self) -> Mapping[str, Any]:
        check_is_fitted(self)
        return {f"coordinate {k + 1}": values for k, values in enumerate(self.embedding_.T)}

    def picture(self) -> Image.Image | None:
        """The first two coordinates as a scatter plot; None before it was fitted."""
        if not hasattr(self, "embedding_"):
            return None
        from diffrep.manifold.files import draw_embedding, figure_image

        return figure_image(draw_embedding(self.embedding_))

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        usual, settings = type(self), self.get_params(deep=False).items()
        words = {name: summary(value) if isinstance(value, np.ndarray) else repr(value) for name, value in settings}
        text = ", ".join(f"{name}={word}" for name, word in words.items() if word != repr(getattr(usual, name)))
        if not hasattr(self, "embedding_"):
            return f"{usual.__name__}({text})"
        path = getattr(self, "path_", "fitted")
        about = f"fitted to {number_of(len(self.embedding_), 'point')} ({path}), embedding {summary(self.embedding_)}"
        return f"{usual.__name__}({text}): {about}"

    def _repr_mimebundle_(self, **options: Any) -> dict[str, str]:
        diagram: dict[str, str] = super()._repr_mimebundle_(**options)
        return {"text/plain": repr(self)} if hasattr(self, "embedding_") else diagram

    @property
    def _repr_html_(self) -> Any:  # as scikit-learn has it, a property, which a notebook takes for missing
        if hasattr(self, "embedding_"):
            raise AttributeError("a fitted map is shown as a picture")
        return super()._repr_html_
