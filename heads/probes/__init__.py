"""Probes: heads that are trained on the features of a frozen backbone.

`read_labelled` and `split_rows` bring images, `ReadPlan` says where features are read, `ProbeData.read` reads them into
a cache, `train_probe` trains one probe and `sweep` one for every block and timestep; `Probe` is what is saved, loaded
and used on images. `train_feedback`, `train_pixel_probe` and `train_dense_probe` train DifFeed, few-shot segmentation,
and depth or normals on frozen maps; `pair_annotations` finds the files beside the images.
"""

from diffrep.heads.probes.annotated import (
    AnnotatedFiles,
    Annotation,
    PixelClasses,
    find_classes,
    hold_out,
    pair_annotations,
)
from diffrep.heads.probes.cells import (
    Cell,
    PooledFeatures,
    ReadPlan,
    block_taps,
    numbered_taps,
    parse_cells,
    read_features,
    readings_of,
)
from diffrep.heads.probes.dense import DenseProbe, DenseSettings, DepthProbe, NormalsProbe, train_dense_probe
from diffrep.heads.probes.experiment import (
    ProbeData,
    ProbeResult,
    RowSplit,
    Scores,
    balance,
    paired_gain,
    score,
    split_rows,
    top_accuracy,
    train_probe,
    wilson,
)
from diffrep.heads.probes.feedback import DifFeed, FeedbackProbe, FeedbackSettings, feedback_layer, train_feedback
from diffrep.heads.probes.grid import FeatureRows, GridSettings, LinearGrid, Standardiser, fit_grid
from diffrep.heads.probes.labelled import DataError, LabelledImages, read_labelled
from diffrep.heads.probes.layouts import (
    KINDS,
    AttentionFusion,
    CnnHead,
    FeatureHead,
    HeadShape,
    Layout,
    NearestNeighbours,
    PooledHead,
    TokenReadout,
    TransformerBlock,
    build_head,
    readout_string,
)
from diffrep.heads.probes.pixels import (
    PixelClassifier,
    PixelEnsemble,
    PixelProbe,
    PixelSettings,
    Resizing,
    fit_pixels,
    pixel_features,
    train_pixel_probe,
)
from diffrep.heads.probes.probe import Prediction, Probe, load_probe, saved_kind
from diffrep.heads.probes.sweeps import CellScore, ProbeSweep, draw_heat_map, load_sweep, sweep
from diffrep.heads.probes.training import ProbeFit, ProbeRecipe, fit_head, train_recipe

# their names in version 0.1, which other classes have too, or one class has for all
AnnotatedImages, Reading, Recipe, Result, Split = AnnotatedFiles, ReadPlan, ProbeRecipe, ProbeResult, RowSplit
Sweep, MappedRows, HeldRows, SideBySide = ProbeSweep, FeatureRows, FeatureRows.held, FeatureRows.side_by_side
load_dense_probe, load_feedback_probe, load_pixel_probe = DenseProbe.load, FeedbackProbe.load, PixelProbe.load

# images and their annotations
__all__ = ["AnnotatedFiles", "Annotation", "DataError", "LabelledImages", "PixelClasses", "RowSplit", "balance"]
__all__ += ["find_classes", "hold_out", "pair_annotations", "read_labelled", "split_rows"]
# where features are read, and how they are kept
__all__ += ["Cell", "FeatureRows", "HeldRows", "MappedRows", "PooledFeatures", "ReadPlan", "SideBySide", "block_taps"]
__all__ += ["numbered_taps", "parse_cells", "pixel_features", "read_features", "readings_of"]
# heads
__all__ += ["KINDS", "AttentionFusion", "CnnHead", "DepthProbe", "DifFeed", "FeatureHead", "HeadShape", "Layout"]
__all__ += ["NearestNeighbours", "NormalsProbe", "PixelClassifier", "PixelEnsemble", "PooledHead", "TokenReadout"]
__all__ += ["TransformerBlock", "build_head", "feedback_layer", "readout_string"]
# training and scores
__all__ += ["CellScore", "DenseSettings", "FeedbackSettings", "GridSettings", "LinearGrid", "PixelSettings"]
__all__ += ["ProbeData", "ProbeFit", "ProbeRecipe", "ProbeResult", "ProbeSweep", "Recipe", "Resizing", "Scores"]
__all__ += ["Standardiser", "draw_heat_map", "fit_grid", "fit_head", "fit_pixels", "load_sweep", "paired_gain", "score"]
__all__ += ["sweep", "top_accuracy", "train_dense_probe", "train_feedback", "train_pixel_probe", "train_probe"]
__all__ += ["train_recipe", "wilson"]
# what is saved, loaded and used on images
__all__ += ["DenseProbe", "FeedbackProbe", "PixelProbe", "Prediction", "Probe", "load_dense_probe"]
__all__ += ["load_feedback_probe", "load_pixel_probe", "load_probe", "saved_kind"]
