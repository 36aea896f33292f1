"""Preparations: from raw records to a model's input tensors. A modality is one file here."""

from fedgraft_common.preparations.image import ImagePreparation
from fedgraft_common.preparations.preparation import Preparation

__all__ = ["ImagePreparation", "Preparation"]
