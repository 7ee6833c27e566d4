"""Probes: heads that are trained on the features of a frozen backbone.

`read_labelled` and `split_rows` bring images, `ReadPlan` says where features are read, `ProbeData.read` reads them into
a cache, `train_probe` trains one probe and `sweep` one for every block and timestep; `Probe` is what is saved, loaded
and used on images. `train_feedback`, `train_pixel_probe` and `train_dense_probe` train DifFeed, few-shot segmentation,
and depth or normals on frozen maps; `pair_annotations` finds the files beside the images.
"""

from diffrep.heads.probes.annotated import AnnotatedFiles, hold_out, pair_annotations
from diffrep.heads.probes.attention import AttentionFusion, TokenReadout, TransformerBlock, readout_string
from diffrep.heads.probes.cache import PooledFeatures, read_features
from diffrep.heads.probes.cells import Cell, ReadPlan, block_taps, parse_cells, readings_of
from diffrep.heads.probes.dense import DepthProbe, NormalsProbe
from diffrep.heads.probes.dense_probe import (
    Annotation,
    DenseProbe,
    DenseSettings,
    train_dense_probe,
)
from diffrep.heads.probes.experiment import ProbeData, ProbeResult, train_probe
from diffrep.heads.probes.feedback import DifFeed, feedback_layer, numbered_taps
from diffrep.heads.probes.feedback_probe import FeedbackProbe, FeedbackSettings, train_feedback
from diffrep.heads.probes.fitting import ProbeFit, fit_head
from diffrep.heads.probes.grid import GridSettings, LinearGrid, Standardiser, fit_grid
from diffrep.heads.probes.labelled import DataError, LabelledImages, read_labelled
from diffrep.heads.probes.layouts import KINDS, CnnHead, FeatureHead, HeadShape, Layout, PooledHead, build_head
from diffrep.heads.probes.neighbours import NearestNeighbours, top_accuracy
from diffrep.heads.probes.pixel_labels import PixelClasses, find_classes
from diffrep.heads.probes.pixel_probe import (
    PixelClassifier,
    PixelEnsemble,
    PixelProbe,
    PixelSettings,
    Resizing,
    fit_pixels,
    pixel_features,
    train_pixel_probe,
)
from diffrep.heads.probes.probe import Prediction, Probe
from diffrep.heads.probes.recipe import ProbeRecipe, train_recipe
from diffrep.heads.probes.rows import HeldRows, MappedRows, SideBySide
from diffrep.heads.probes.saved import load_probe, saved_kind
from diffrep.heads.probes.scores import Scores, paired_gain, score, wilson
from diffrep.heads.probes.splits import RowSplit, balance, split_rows
from diffrep.heads.probes.sweeps import CellScore, ProbeSweep, draw_heat_map, load_sweep, sweep

# their names in version 0.1, which other classes have too
AnnotatedImages, Reading, Recipe, Result, Split, Sweep = (
    AnnotatedFiles,
    ReadPlan,
    ProbeRecipe,
    ProbeResult,
    RowSplit,
    ProbeSweep,
)
load_dense_probe = DenseProbe.load
load_feedback_probe = FeedbackProbe.load
load_pixel_probe = PixelProbe.load

__all__ = [
    "KINDS",
    "AnnotatedFiles",
    "Annotation",
    "AttentionFusion",
    "Cell",
    "CellScore",
    "CnnHead",
    "DataError",
    "DenseProbe",
    "DenseSettings",
    "DepthProbe",
    "DifFeed",
    "FeatureHead",
    "FeedbackProbe",
    "FeedbackSettings",
    "GridSettings",
    "HeadShape",
    "HeldRows",
    "LabelledImages",
    "Layout",
    "LinearGrid",
    "MappedRows",
    "NearestNeighbours",
    "NormalsProbe",
    "PixelClasses",
    "PixelClassifier",
    "PixelEnsemble",
    "PixelProbe",
    "PixelSettings",
    "PooledFeatures",
    "PooledHead",
    "Prediction",
    "Probe",
    "ProbeData",
    "ProbeFit",
    "ProbeRecipe",
    "ProbeResult",
    "ProbeSweep",
    "ReadPlan",
    "Recipe",
    "Resizing",
    "RowSplit",
    "Scores",
    "SideBySide",
    "Standardiser",
    "TokenReadout",
    "TransformerBlock",
    "balance",
    "block_taps",
    "build_head",
    "draw_heat_map",
    "feedback_layer",
    "find_classes",
    "fit_grid",
    "fit_head",
    "fit_pixels",
    "hold_out",
    "load_dense_probe",
    "load_feedback_probe",
    "load_pixel_probe",
    "load_probe",
    "load_sweep",
    "numbered_taps",
    "pair_annotations",
    "paired_gain",
    "parse_cells",
    "pixel_features",
    "read_features",
    "read_labelled",
    "readings_of",
    "readout_string",
    "saved_kind",
    "score",
    "split_rows",
    "sweep",
    "top_accuracy",
    "train_dense_probe",
    "train_feedback",
    "train_pixel_probe",
    "train_probe",
    "train_recipe",
    "wilson",
]
